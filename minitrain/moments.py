"""Count, mean and standard deviation of tensors: exact and mergeable ones, and cheap ones for every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**17  # elements that are worked on at a time: few enough to stay in the cache
_WIDE = 2**20  # where memory is only read once: fewer pieces, since each one has all threads wait for one another
_ROW = 2**10  # squares that are added in one go


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of some values; those of two sets can be merged.

    The numbers are Python's, which are float64 on every device.

    Attributes:
        count: The number of values.
        mean: Their mean; NaN if there are none.
        m2: The sum of the squared deviations from the mean.
    """

    count: int = 0
    mean: float = math.nan
    m2: float = 0.0

    @property
    def std(self) -> float:
        """The standard deviation with `count - 1` in the denominator, as `torch.std`; NaN for less than two values."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else math.nan

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together.

        Args:
            other: The moments of the other set; either may be empty.

        Returns:
            What `moments` would give on the union.

        Example:
            >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
            >>> moments(a).merge(moments(b))
            Moments(count=4, mean=3.0, m2=14.0)

        References:
            Chan, Golub, LeVeque, *Updating formulae and a pairwise algorithm for computing sample variances*, 1979.
        """
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count
        m2 = self.m2 + other.m2 + delta * delta * self.count * share
        return Moments(count, self.mean + delta * share, m2)


def moments(x: Tensor) -> Moments:
    """The exact moments of a tensor: two passes in float64, chunk by chunk, and one wait for the device.

    Args:
        x: A dense tensor of real numbers (floating point of any precision, integers, bools), of any shape.

    Returns:
        Its moments. NaN and infinities in `x` make them NaN or infinite.

    Raises:
        TypeError: `x` is no tensor, or complex, sparse, quantised or without values.

    Example:
        >>> stats = moments(torch.tensor([1.0, 2.0, 3.0]))
        >>> stats.count, stats.mean, stats.std
        (3, 2.0, 1.0)
    """
    flat = flatten(x)
    if not flat.numel():
        return Moments()
    chunks = torch.split(flat, _WIDE)
    rows = []
    for chunk in chunks:
        wide = (chunk.cpu() if chunk.device.type == "mps" else chunk).double()  # MPS has no float64
        mean = wide.mean()
        centred = wide - mean
        rows.append(torch.stack([mean, torch.dot(centred, centred)]))
    merged = Moments()
    for chunk, row in zip(chunks, torch.stack(rows).tolist(), strict=True):
        merged = merged.merge(Moments(len(chunk), *row))
    return merged


def mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as tensors on the device of `x`: for every step, since nothing waits for the device.

    Deviations are taken from the mean before they are squared, so a large mean does not spoil the result; neither do
    values whose squares are too small or too large for float32.

    Args:
        x: A dense tensor of real numbers, of any shape.

    Returns:
        `(mean, std)`, two tensors without dimensions, in float32 (float64 for float64). The standard deviation has n - 1 in
        the denominator and is NaN for fewer than two values; the mean of none is NaN.

    Raises:
        TypeError: As in `moments`.

    Example:
        >>> mean_std(torch.tensor([1.0, 2.0, 3.0]))
        (tensor(2.), tensor(1.))
    """
    flat = flatten(x)
    mean, std = _on_cpu(flat) if flat.device.type == "cpu" else _on_device(flat)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return mean.to(dtype), std.to(dtype)


def _on_cpu(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Sums in float32: of the values as they are, or around a centre, where that keeps the digits. Else in float64."""
    mean, std = _quickly(flat) or _exactly(flat)
    return flat.new_tensor(mean, dtype=torch.float64), flat.new_tensor(std, dtype=torch.float64)


def _exactly(flat: Tensor) -> tuple[float, float]:
    exact = moments(flat)
    return exact.mean, exact.std


def _quickly(flat: Tensor) -> tuple[float, float] | None:
    n = flat.numel()
    if n < 2 or not flat.is_floating_point() or flat.dtype == torch.float64:
        return None
    center = None if flat.dtype == torch.float32 else flat[:_CHUNK].float().mean()
    for _ in range(2):
        total, squares = _sums(flat, center)  # Python's numbers: free on the CPU
        m2 = squares - total * total / n
        mean = total / n if center is None else total / n + center.item()
        if 1e-30 < m2 / n < 1e30 and total * total / n < 10 * m2:
            return mean, math.sqrt(m2 / (n - 1))
        if not squares < math.inf:  # NaN, or squares that left the range of float32
            return None
        center = flat.new_tensor(mean, dtype=torch.float32)
    return None


def _sums(flat: Tensor, center: Tensor | None) -> tuple[float, float]:
    """The sum of the values, and of their squares; with a centre, of what is left without it."""
    if center is None:
        return flat.sum().item(), squares_sum(flat).item()
    pieces = (piece.float() - center for piece in torch.split(flat, _CHUNK))
    sums = torch.stack([torch.stack([piece.sum(), squares_sum(piece)]) for piece in pieces])
    total, squares = sums.double().sum(0).tolist()
    return total, squares


def squares_sum(flat: Tensor) -> Tensor:
    """The sum of the squares, row by row: over a million equal values the rounding errors of a norm add up to 1e-3."""
    n = flat.numel()
    if n <= 8 * _ROW:
        return torch.dot(flat, flat)
    cut = n - n % _ROW
    rows: Tensor = torch.linalg.vector_norm(flat[:cut].reshape(-1, _ROW), dim=1).square().sum()
    return rows if cut == n else rows + torch.dot(flat[cut:], flat[cut:])


def _on_device(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Sums in float64, where the device has it: its kernels convert as they read, and wait for memory anyway."""
    wide = torch.float32 if flat.device.type == "mps" else torch.float64
    exact = torch.float32 if flat.is_floating_point() and flat.dtype != torch.float64 else wide
    n = flat.numel()
    mean = flat.sum(dtype=wide) / n  # 0 / 0 is NaN, as wanted
    spread = torch.linalg.vector_norm(flat.to(exact) - mean.to(exact), dtype=wide)
    return mean, spread / math.sqrt(n - 1) if n > 1 else torch.full_like(spread, math.nan)


def flatten(x: Tensor) -> Tensor:
    """All values in one dimension and in the order of memory: a view, unless there are gaps."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x={x!r} (type={type(x).__name__}), wanted a tensor.")
    if x.is_complex() or x.layout != torch.strided or x.is_nested or x.is_quantized or x.is_meta:
        raise TypeError(
            f"x is a tensor of dtype={x.dtype}, layout={x.layout}, device={x.device}, is_nested={x.is_nested}, "
            "wanted a dense one of real numbers. Take x.abs(), x.to_dense() or x.dequantize() first."
        )
    x = x.detach()
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)
