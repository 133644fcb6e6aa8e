"""`Sample`: what is known of a layer's output: its moments, and how much of them is signal. Those of several batches merge."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitrain.init.channels import Channels
from minitrain.moments import Moments, moments

_CHUNK = 2**18  # values that are worked on at a time, where that is possible: few enough to stay in the cache


@dataclass(frozen=True)
class Signal:
    """The part of the variance that lies between samples, unit by unit: what tells one sample from another.

    A unit is one place in the output of a single sample: a feature, or a channel at a position.

    Attributes:
        n: The number of samples.
        means: The mean of each unit over the samples, float64, in one dimension.
        within: The squared deviations from these means, summed over units and samples.
    """

    n: int
    means: Tensor = field(repr=False)
    within: float

    def merge(self, other: Signal) -> Signal | None:
        """Of both sets of samples together; None where their outputs have different sizes."""
        if self.means.shape != other.means.shape:
            return None
        n = self.n + other.n
        delta = other.means - self.means
        between = float(delta.dot(delta)) * self.n * other.n / n
        return Signal(n, self.means + delta * (other.n / n), self.within + other.within + between)

    def share(self, all_values: Moments) -> float | None:
        """The mean over the units of their variance across samples, over the variance of all values (both as `torch.var`)."""
        if self.n < 2 or not all_values.m2 > 0:
            return None
        return self.within / (len(self.means) * (self.n - 1)) / (all_values.m2 / (all_values.count - 1))


@dataclass(frozen=True)
class Sample:
    """The moments of a layer's output over one or several batches.

    Attributes:
        moments: Count, mean and standard deviation of all values.
        signal: The part of it that tells samples apart; None where there is no telling (outputs of several sizes).
        before: The moments before the activation, where the output is looked at behind it.
        channels: Channel by channel, where that is asked for.
    """

    moments: Moments = field(default_factory=Moments)
    signal: Signal | None = None
    before: Moments | None = None
    channels: Channels | None = None

    def merge(self, other: Sample) -> Sample:
        """As if the values of both were one batch."""
        if not self.moments.count or not other.moments.count:
            return self if self.moments.count else other
        signal = self.signal.merge(other.signal) if self.signal and other.signal else None
        before = self.before.merge(other.before) if self.before and other.before else None
        channels = self.channels.merge(other.channels) if self.channels and other.channels else None
        return Sample(self.moments.merge(other.moments), signal, before, channels)

    @property
    def share(self) -> float | None:
        """The signal share, from 0 to about 1; None for a single sample, or values that do not vary."""
        return None if self.signal is None else self.signal.share(self.moments)


def look(y: Tensor, batch_dim: int = 0, exact: bool = False) -> Sample:
    """The sample that an output gives.

    In float32 on the CPU sums are made in float32, pairwise, piece by piece, after a rough mean has been taken off: a fifth
    of the time of float64, and good to 1e-7 of the standard deviation. Where that is not enough, it is float64.

    Args:
        y: A dense tensor of real numbers.
        batch_dim: The dimension of the samples.
        exact: In float64 in any case.
    """
    quick = not exact and y.device.type == "cpu" and y.dtype == torch.float32
    if y.ndim < 2:
        return Sample(moments_of(y) if quick else moments(y))
    units, found = _quick(y, batch_dim) if quick else (_unit_means(y, batch_dim), None)
    if found is None:
        found = moments(y)
    if not math.isfinite(found.m2):
        return Sample(found)
    means, n = units.reshape(-1), y.shape[batch_dim]
    off = means - found.mean
    within = found.m2 - n * float(off.dot(off))
    if within < 1e-3 * found.m2:  # a difference of two large numbers: sum up the small one itself
        within = _within(y, units, batch_dim)
    return Sample(found, Signal(n, means, max(within, 0.0)))


def moments_of(y: Tensor) -> Moments:
    """Only the moments, as `look` takes them."""
    found = None
    if y.device.type == "cpu" and y.dtype == torch.float32:
        _, found = _quick(y.unsqueeze(0) if y.ndim < 2 else y, 0)
    return moments(y) if found is None else found


def merged(samples: list[Sample]) -> Sample:
    """All of them as one."""
    total = samples[0]
    for sample in samples[1:]:
        total = total.merge(sample)
    return total


def _unit_means(y: Tensor, batch_dim: int) -> Tensor:
    if y.device.type == "mps":  # which has no float64
        y = y.cpu()
    return y.sum(batch_dim, dtype=torch.float64) / y.shape[batch_dim]


def _quick(y: Tensor, batch_dim: int) -> tuple[Tensor, Moments | None]:
    """The means of the units, and the moments; None where float32 might not do."""
    rows = y if batch_dim == 0 else y.movedim(batch_dim, 0)
    n, size = y.numel(), y.numel() // max(1, len(rows))
    units = rows.sum(0).double() / len(rows)
    mean = float(units.mean())
    if n <= _CHUNK:
        m2 = float(rows.square().sum()) - n * mean * mean
        if m2 < 2 * n * mean * mean:  # or that difference would cost digits
            m2 = float((rows - mean).square_().sum())
    else:
        m2 = sum(float((piece - mean).square_().sum()) for piece in torch.split(rows, max(1, _CHUNK // size)))
    variance = m2 / max(1, n - 1)
    good = n > 1 and 1e-20 < variance < 1e20 and mean * mean < 100 * variance
    return units, Moments(n, mean, m2) if good else None


def _within(y: Tensor, means: Tensor, batch_dim: int) -> float:
    rows = y.movedim(batch_dim, 0)
    step = max(1, _CHUNK // max(1, means.numel()))
    if y.device.type == "mps":
        rows = rows.cpu()
    return sum(float((piece.double() - means).square_().sum()) for piece in torch.split(rows, step))
