"""What is noted of a tensor at a step: on its device, cheap enough for every step, and nothing waits for an accelerator."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from minitrain.moments import flatten, mean_std, squares_sum

FIELDS = ("mean", "std", "min", "max", "nonfinite", "near_zero", "signal_share")
"""The entries of what `measure` returns, in order."""

_ALL = 2**12  # values up to this many are all looked at
_EVERY = 17  # of more, each seventeenth
_MOST = 2**16  # values in a sample: a fraction is known to 0.2 %, and more would cost a percent of a step
_SAMPLES = 64  # whose signal share is taken
_COMPARABLE = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def measure(x: Tensor, threshold: float, batch_dim: int = 0) -> Tensor:
    """The numbers of `FIELDS`, in one tensor on the device of `x`.

    Args:
        x: A dense tensor of real numbers, of any shape.
        threshold: The largest |x| that counts as near zero.
        batch_dim: The dimension of the samples.

    Returns:
        In one dimension, float32 (float64 for float64): mean; standard deviation (n - 1 in the denominator); smallest and
        largest value (NaN if any is); the number of values that are NaN or infinite; the fraction of values that are near
        zero (of more than 4096 values, of a `sample`); the `signal_share`. What is not defined is NaN.

    Raises:
        TypeError: `x` is no tensor, or complex, sparse, quantised or without values.

    Example:
        >>> numbers = measure(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), threshold=0.05)
        >>> dict(zip(FIELDS, numbers.tolist(), strict=True))["near_zero"]
        0.5
    """
    flat = _comparable(flatten(x))
    mean, std = mean_std(flat)
    if not flat.numel():
        low = high = near = share = mean.new_full((), math.nan)
    else:
        low, high = torch.aminmax(flat)
        near = (_real(sample(flat)).abs() <= threshold).to(mean.dtype).mean()
        share = signal_share(x, batch_dim)
    return torch.stack([v.to(mean.dtype) for v in (mean, std, low, high, _nonfinite(flat, mean), near, share)])


def signal_share(x: Tensor, batch_dim: int = 0) -> Tensor:
    """How much of the variance tells one sample from another.

    It is the mean over the units of their variance across samples, over the variance of all values. Of more than 64 samples, up
    to 64 evenly spread ones are looked at.

    A unit is one place in the output of a single sample: a feature, or a channel at a position.

    Args:
        x: A dense tensor of real numbers, not empty.
        batch_dim: The dimension of the samples.

    Returns:
        A number from 0 to about 1, without dimensions; NaN for less than two samples, or values that do not vary.
    """
    if x.ndim < 2 or x.shape[batch_dim] < 2:
        return torch.full((), math.nan, device=x.device)
    rows = x.detach().movedim(batch_dim, 0)
    rows = _real(rows[:: -(-len(rows) // _SAMPLES)]).reshape(-1, x.numel() // len(rows))
    n, units = rows.shape
    rows = rows - rows.mean()
    low, high = torch.aminmax(rows)
    rows /= torch.maximum(-low, high)  # or squares could leave the range of float32
    total, between = squares_sum(rows.reshape(-1)), squares_sum(rows.sum(0))
    within = (total - between / n).clamp_min(0)
    share: Tensor = within / total * ((n * units - 1) / (units * (n - 1)))
    return share.where(low < high, math.nan)  # without variance what is left of the mean is rounding


def norm(mean: Tensor, std: Tensor, n: int) -> Tensor:
    """The norm of `n` values of which mean and standard deviation are known: without squares, which could underflow."""
    spread = std if n > 1 else torch.zeros_like(std)  # of a single value there is none
    return torch.hypot(mean * math.sqrt(n), spread * math.sqrt(max(n - 1, 0)))


def sample(flat: Tensor) -> Tensor:
    """Every seventeenth value; where they are few (up to 4096) all of them, and of more than a million about 65,536.

    Where their number has a factor in common with that step, it is the next one without: so it has none with the number of the
    units either, and the sample meets them all.
    """
    n = flat.numel()
    if n <= _ALL:
        return flat
    steps = itertools.count(max(_EVERY, n // _MOST))
    return flat[:: next(step for step in steps if math.gcd(step, n) == 1)].contiguous()


def histogram(x: Tensor, edges: Tensor) -> Tensor:
    """How many values of a sample lie in each bin: `edges[i] <= value < edges[i + 1]`.

    Args:
        x: A dense tensor of real numbers, of any shape; of more than 4096 values a `sample` is counted.
        edges: The edges of the bins, increasing, float32 (or float64) and on the device of `x`, of shape (bins + 1,).

    Returns:
        Of shape (bins + 2,), float32: what lies below the first edge, the bins, what lies at or above the last edge. NaN is
        in none of them.

    Example:
        >>> histogram(torch.tensor([-9.0, 0.1, 0.2, 0.7, 1.0, float("nan")]), torch.tensor([0.0, 0.5, 1.0])).tolist()
        [1.0, 2.0, 1.0, 1.0]
    """
    values = sample(flatten(x)).to(edges.dtype)
    return (_count_on_cpu if values.device.type == "cpu" else _count_on_device)(values, edges)


def _count_on_cpu(values: Tensor, edges: Tensor) -> Tensor:
    values = values[values == values]  # NaN would count as large
    return torch.bincount(torch.bucketize(values, edges, right=True), minlength=len(edges) + 1).float()


def _count_on_device(values: Tensor, edges: Tensor) -> Tensor:
    """By sorting: `bincount` would wait for the device, `histc` is refused where algorithms must be deterministic."""
    numbers = values == values
    ordered = values.where(numbers, math.inf).sort().values  # a search among NaN would go astray
    below = torch.searchsorted(ordered, edges)
    ends = torch.stack([torch.zeros_like(below[0]), numbers.sum()])
    return torch.cat([ends[:1], below, ends[1:]]).diff().float()


def _nonfinite(flat: Tensor, mean: Tensor) -> Tensor:
    if not flat.is_floating_point():
        return torch.zeros_like(mean)
    if flat.device.type == "cpu" and bool(mean.isfinite()):  # then all of them are
        return torch.zeros_like(mean)
    return flat.numel() - flat.isfinite().sum()


def _real(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _comparable(flat: Tensor) -> Tensor:
    """Of a dtype that can be compared: bools, float8 and the rarer integers cannot."""
    if flat.dtype == torch.bool:
        return flat.byte()
    return flat if flat.dtype in _COMPARABLE else flat.float()
