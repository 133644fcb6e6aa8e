"""`Meeting`: what all batches have at one layer, when it is its turn: the outputs of its first call, measured as one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minitrain.errors import InitError
from minitrain.init.calls import OutOfStep
from minitrain.init.channels import channel_dim, channels_of, over_output
from minitrain.init.sample import Sample, look, merged, moments_of
from minitrain.init.watch import Use
from minitrain.moments import Moments, moments


class Probe:
    """Measures the output of a use.

    Args:
        channels: Channel by channel, too.
        exact: In float64 throughout: what verifies.
    """

    def __init__(self, channels: bool = False, exact: bool = False) -> None:
        self._channels, self._exact = channels, exact

    def __call__(self, use: Use, output: Tensor | None = None, *, signal: bool = True) -> Sample | None:
        """The sample; None where there is no dense tensor of real numbers to measure.

        Args:
            use: The use of a layer.
            output: What to measure instead of its output: what the layer puts out by now.
            signal: Measure the signal share, too.

        Raises:
            InitError: There are NaN or infinite values in it.
        """
        behind = use.behind
        before = use.output if output is None else output
        if not is_measurable(before):
            return None
        y = before if behind is None else behind.apply(before)
        if not is_measurable(y):
            return None
        sample = look(y, use.batch_dim, self._exact) if signal else Sample(moments_of(y))
        if not (math.isfinite(sample.moments.mean) and math.isfinite(sample.moments.m2)):
            if output is not None:  # on the bench: the solver sees that for itself
                return sample
            raise InitError(_not_finite(use))
        if behind is not None:
            sample = replace(sample, before=moments_of(before))
        if self._channels:
            sample = replace(sample, channels=channels_of(y, channel_dim(use.layer, use.call, y)))
        return sample


class Meeting(ABC):
    """All batches at one layer.

    Attributes:
        use: The layer's use in the first batch; layer, bias and activation are the same for all.
        sample: What was measured.
        dtype: Of the output.
        silent: The input is all zeros, in every batch.
    """

    use: Use
    sample: Sample
    dtype: torch.dtype
    silent: bool

    def check_repeatable(self) -> None:  # noqa: B027 - most can be
        """Raise `OutOfStep` unless the layer can be called again: before anything of it is changed."""

    @abstractmethod
    def remeasure(self, factor: float | None = None) -> Sample:
        """Measure again, with the weights as they are now.

        Args:
            factor: That is known to be the layer's output before, times this.
        """

    @abstractmethod
    def rescale(self, mean: float, factor: float) -> None:
        """What is put out by now is `(y - mean) * factor`: that is certain, and need not be measured."""

    @abstractmethod
    def rescale_channels(self, mean: Tensor, factor: Tensor) -> None:
        """Likewise, channel by channel."""

    @abstractmethod
    def in_float64(self) -> Moments | None:
        """The moments of the layer, as it is now, computed in float64; None where that cannot be done."""


class Noted(NamedTuple):
    """What is noted of a use at once, where it is looked at later."""

    sample: Sample | None
    silent: bool


class Held(Meeting):
    """The outputs are held in memory.

    Args:
        uses: The use in each batch.
        samples: What was measured of each.
        probe: Measures.
    """

    def __init__(self, uses: Sequence[Use], samples: Sequence[Sample], probe: Probe) -> None:
        self.use, self._uses, self._probe = uses[0], uses, probe
        self.sample, self.dtype = merged(list(samples)), uses[0].output.dtype
        self.outputs: list[Tensor] = [use.output for use in uses]  # of the layer itself, if an activation is behind it

    @property
    def silent(self) -> bool:  # type: ignore[override]
        """Looked at only when asked."""
        return all(use.note.silent if isinstance(use.note, Noted) else is_silent(use) for use in self._uses)

    def check_repeatable(self) -> None:
        """The inputs are still there."""
        if any(use.call.forgotten for use in self._uses):
            raise OutOfStep(f"layer {self.use.layer.name!r} has to be run again")

    def remeasure(self, factor: float | None = None) -> Sample:
        """Run the layer again on each of its inputs, or take its word."""
        if factor is None:
            self.outputs = [use.call.repeat() for use in self._uses]
            given = self.outputs
        else:
            given = [output * factor for output in self.outputs]
        samples = [self._probe(use, y, signal=False) for use, y in zip(self._uses, given, strict=True)]
        return merged([Sample() if sample is None else sample for sample in samples])

    def rescale(self, mean: float, factor: float) -> None:
        """In place, where that can be."""
        self.outputs = [
            _writable(y).sub_(mean).mul_(factor) if mean else _writable(y).mul_(factor) for y in self.outputs
        ]

    def rescale_channels(self, mean: Tensor, factor: Tensor) -> None:
        """Likewise."""
        outputs = []
        for use, y in zip(self._uses, self.outputs, strict=True):
            dim = channel_dim(use.layer, use.call, y)
            outputs.append(_writable(y).sub_(over_output(mean, y, dim)).mul_(over_output(factor, y, dim)))
        self.outputs = outputs

    def in_float64(self) -> Moments | None:
        """Run a copy of the layer."""
        return float64_moments(self._uses)


def float64_moments(uses: Sequence[Use]) -> Moments | None:
    """The moments of a layer over these calls, with its weights as they are now, computed in float64."""
    total = Moments()
    for use in uses:
        if use.output.dtype == torch.float64 or use.output.device.type == "mps":  # which has none
            return None
        try:
            total = total.merge(moments(use.call.in_float64()))
        except (RuntimeError, TypeError):  # a layer of one's own that cannot be copied, or works in one precision only
            return None
    return total


def is_measurable(output: object) -> bool:
    """A dense tensor of real floating-point numbers with something in it."""
    return (
        isinstance(output, Tensor)
        and output.layout == torch.strided
        and not output.is_nested
        and output.is_floating_point()
        and output.numel() > 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(
            output
        )  # within vmap or grad there are no values to read
    )


def is_silent(use: Use) -> bool:
    """What it puts out can only be the spread of its bias. Of a layer that takes more than one input, all count."""
    given = [t for t in use.call.inputs if is_measurable(t)]
    product = use.call.function is torch.bilinear or type(use.call.function) is nn.Bilinear
    return bool(given) and (any if product else all)(is_zero(t) for t in given)


def is_zero(tensor: Tensor) -> bool:
    """All values are 0: mostly seen by the first few."""
    return not tensor.reshape(-1)[:1024].any() and not tensor.any()


def _writable(y: Tensor) -> Tensor:
    return y.clone() if y.is_inference() or 0 in y.stride() else y


def _not_finite(use: Use) -> str:
    layer, given = use.layer, use.call.inputs
    if not all(t.isfinite().all() for t in given):
        cause = "So does its input: look at the data, and at what comes before this layer."
    elif not all(p.isfinite().all() for p in layer.module.parameters()):
        cause = "So do its parameters: initialise them first."
    else:
        cause = f"Its input and its parameters do not: the values are too large for {use.output.dtype}."
    where = f"behind {use.behind.name}, its output" if use.behind else "its output"
    return f"layer {layer.name!r} ({layer.class_name}): {where} holds NaN or infinite values. {cause}"
