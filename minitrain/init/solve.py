"""Bring one layer to mean 0 and a given standard deviation, with its own input at hand: no further pass of the model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minitrain.moments import Moments

ATTEMPTS = 20
ENOUGH = 1e-6  # nearer than this is not looked for
PATIENCE = 3  # attempts without an improvement: rounding has the last word


class Bench:
    """A layer on the bench: set its weight and bias relative to what they were, and run it again on the same input.

    Args:
        weight: What scales the output. None: it may not be changed.
        bias: What shifts it. None: it may not be changed.
        measure: Runs the layer and measures its output; it is told by how much the weight is scaled.

    Attributes:
        scale: By how much the weight is scaled now.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, measure: Callable[[float], Moments]) -> None:
        self._weight, self._bias, self._measure = weight, bias, measure
        self._weight0 = None if weight is None else weight.detach().clone()
        self._bias0 = None if bias is None else bias.detach().clone()
        self.scale = 1.0
        self._setting: tuple[float, float, float] | None = None
        self._found = Moments()

    def run(self, scale: float = 1.0, bias_scale: float = 1.0, shift: float = 0.0) -> Moments:
        """The moments of the layer's output with `W = scale * W0` and `b = bias_scale * b0 + shift`, which it keeps."""
        if self._setting == (scale, bias_scale, shift):
            return self._found
        if self._weight is not None and self._weight0 is not None:
            self._weight.copy_(_affine(self._weight0, scale, 0.0))
        if self._bias is not None and self._bias0 is not None:
            self._bias.copy_(_affine(self._bias0, bias_scale, shift))
        torch.clear_autocast_cache()  # a model may open autocast by itself, and that keeps the weight as it was cast
        self.scale, self._setting = scale, (scale, bias_scale, shift)
        self._found = self._measure(scale)
        return self._found


def normalize(bench: Bench, start: Moments, *, center: bool, tolerance: float, target: float = 1.0) -> bool:
    """Find scale and shift of a layer that need not be affine in its weight and bias.

    Each attempt scales, looks, shifts, and looks again, and learns how the standard deviation follows the scale and the mean
    the shift. For an affine layer the first attempt is exact.

    Args:
        bench: The layer.
        start: The moments of what it puts out now, with a standard deviation above 0.
        center: Bring the mean to 0, too.
        tolerance: How far mean and standard deviation may be off, as a part of `target`.
        target: The standard deviation that is wanted.

    Returns:
        Whether it was found. The layer keeps the best setting, or is as it was.
    """
    scale, shift, now = 1.0, 0.0, start
    slope, gain = 1.0, 1.0  # of log std over log scale, of mean over shift
    best, setting, fruitless = math.inf, (1.0, 0.0), 0
    for attempt in range(ATTEMPTS):
        factor = (now.std / target) ** (-1 / slope)
        scale, shift = scale * factor, shift * factor
        last, now = now, bench.run(scale, scale, shift)
        if not _is_usable(now):
            break
        scales = abs(now.std / target - 1) < tolerance  # the output does, as weight and bias do
        if attempt == 0 and not scales and not _responds(bench, start):
            break
        if abs(math.log(factor)) > 1e-3:
            slope = min(max(math.log(now.std / last.std) / math.log(factor), 0.25), 4.0)
        if center and now.mean:
            move = -now.mean / gain
            shift += move
            last, now = now, bench.run(scale, scale, shift)
            if not _is_usable(now):
                break
            if abs(move) > 1e-3 * target:
                gain = _gain(now.mean - last.mean, move)
        off = max(abs(now.std / target - 1), abs(now.mean) / target if center else 0.0)
        fruitless = 0 if off < best else fruitless + 1
        if off < best:
            best, setting = off, (scale, shift)
        if fruitless == PATIENCE or best < ENOUGH:
            break
    if best < tolerance:
        bench.run(setting[0], *setting)
        return True
    bench.run()
    return False


def center(bench: Bench, start: Moments, tolerance: float) -> bool:
    """Shift the bias only, so that the mean becomes 0.

    Returns:
        Whether the mean follows the bias. If not, the layer is as it was.
    """
    gain = 1.0 if not start.mean else _gain(bench.run(shift=-start.mean).mean - start.mean, -start.mean)
    found = bench.run(shift=-start.mean / gain)
    if abs(found.mean) <= max(tolerance, 0.01 * abs(start.mean)):
        return True
    bench.run()
    return False


def tolerance_of(*dtypes: torch.dtype) -> float:
    """How far mean and standard deviation may be off: 1e-3, and 1e-2 where one of the types has half precision or less."""
    return 1e-2 if min(dtype.itemsize for dtype in dtypes) < 4 else 1e-3


def is_rounding(stats: Moments, *dtypes: torch.dtype) -> bool:
    """The spread is no more than what rounding leaves beside such a mean: sums are made in float32, or in float64."""
    return stats.std <= 100 * rounding_of(*dtypes) * abs(stats.mean)


def rounding_of(*dtypes: torch.dtype) -> float:
    """The relative error of a sum."""
    exact = all(dtype == torch.float64 for dtype in dtypes)
    return torch.finfo(torch.float64 if exact else torch.float32).eps


def _is_usable(stats: Moments) -> bool:
    return math.isfinite(stats.mean) and math.isfinite(stats.m2) and stats.std > 0


def _responds(bench: Bench, start: Moments) -> bool:
    """Many times the weight, with the same bias, makes a difference that is not small against the output's spread."""
    for factor in (2**4, 2**10, 2**20):  # a large bias may hide a smaller one, half precision may not hold a larger one
        now = bench.run(factor)
        moved = max(abs(now.std - start.std), abs(now.mean - start.mean))
        if math.isfinite(moved) and moved > 1e-2 * start.std:
            return True
    return False


def _gain(moved: float, move: float) -> float:
    gain = moved / move
    return math.copysign(min(max(abs(gain), 1e-3), 1e3), gain)


def _affine(tensor: Tensor, scale: float, shift: float) -> Tensor:
    """`scale * tensor + shift`, rounded once (MPS has no float64)."""
    if scale == 1 and shift == 0:
        return tensor  # -0.0 stays -0.0
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64) * scale + shift
