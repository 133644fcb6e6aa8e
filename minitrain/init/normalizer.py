"""`Normalizer`: decides at each layer what can be done, and does it. How the layers are met is no concern of its."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minitrain.errors import InitError
from minitrain.init.channels import ChannelBench, Channels
from minitrain.init.layers import Layer, Part
from minitrain.init.meeting import Meeting, is_zero
from minitrain.init.report import LayerRow
from minitrain.init.sample import Sample
from minitrain.init.sharing import Sharing
from minitrain.init.solve import ATTEMPTS, Bench, center, is_rounding, normalize, rounding_of, tolerance_of
from minitrain.moments import Moments

HELPLESS = frozenset({"dead", "partial", "few_values", "unscalable", "unhandled", "unreached", "failed"})
"""The statuses that are an error if `strict`."""
UNIT = frozenset({"normalized", "no_bias", "scaled", "reused"})
"""The statuses that claim the standard deviation that was wanted."""


@dataclass(frozen=True)
class Wanted:
    """What is to be made of the layers.

    Attributes:
        center: Bring means to 0, too.
        channels: Channel by channel.
        target_std: The standard deviation, by the layer's name.
        tol: How far mean and standard deviation may be off; None: as the precision allows.
        include_frozen: Normalise layers whose weight requires no gradient, too, and move biases that require none.
        strict: Raise at the first layer that cannot be normalised.
    """

    center: bool = True
    channels: bool = False
    target_std: Callable[[str], float] = lambda name: 1.0
    tol: float | None = None
    include_frozen: bool = False
    strict: bool = False


class _Verdict(NamedTuple):
    """What was done at a layer."""

    status: str
    reason: str = ""
    excused: bool = False
    centered: bool = False


class Normalizer:
    """LSUV on the layers of one model.

    Args:
        layers: All its weight layers.
        chosen: The names of those that are to be normalised.
        wanted: What is to be made of them.
        affine: The names of those whose output is known to be W x + b.
        sharing: Which parameters are shared.
        batch: The shapes of the inputs, for messages.
    """

    def __init__(
        self, layers: list[Layer], chosen: set[str], wanted: Wanted, affine: set[str], sharing: Sharing, batch: str
    ) -> None:
        self._layers, self._chosen, self._wanted = layers, chosen, wanted
        self._affine, self._sharing, self._batch = affine, sharing, batch
        self._untouchable = {layer.owner for layer in layers if layer.name not in chosen}
        self.rows: dict[str, LayerRow] = {}
        self._centered: set[str] = set()  # names of the layers that are claimed to have mean 0
        self._tolerance: dict[str, float] = {}
        self._alive: dict[str, Tensor] = {}  # of layers with channels that vary and others that do not: which

    # -- from outside -------------------------------------------------------------------------------------------------

    def settle(self, meeting: Meeting) -> None:
        """A layer's turn has come."""
        layer = meeting.use.layer
        verdict = self._treat(meeting)
        if verdict.centered:
            self._centered.add(layer.name)
        self._add(layer, verdict, meeting.sample)

    def settle_unmeasurable(self, layer: Layer, output: object) -> None:
        """A layer has been called, but there is nothing to measure."""
        reason = f"its output is no dense real tensor with values ({_describe(output)}), or differs from batch to batch"
        verdict = _Verdict("unscalable", reason)
        self._add(layer, verdict if layer.name in self._chosen else _left_out(), None)

    def settle_rest(self) -> None:
        """No layer is called any more: those that were not met get a row, too."""
        for layer in self._layers:
            if layer.name not in self.rows and not layer.latent:
                self._add(layer, self._absent(layer), None)

    def count_calls(self, calls: dict[str, int]) -> None:
        """How often each layer is called in one pass; the first call is what was normalised."""
        for name, n in calls.items():
            row = self.rows[name]
            if n == row.calls:
                continue
            if n > 1 and row.status in UNIT:
                reason = "; ".join(filter(None, [f"called {n} times, normalised on the first call", row.reason]))
                row = replace(row, status="reused", reason=reason)
            self.rows[name] = replace(row, calls=n)

    def verify(self, found: dict[str, list[Sample]]) -> None:
        """What another pass measured, layer by layer and call by call: take back the claims that it does not confirm."""
        for layer in self._layers:
            if layer.name not in self.rows:  # a parameter that proved to be no layer
                continue
            row, samples = self.rows[layer.name], found.get(layer.name)
            if samples:
                mean, std = self._shown(layer.name, samples[0])
                row = replace(row, mean_after=mean, std_after=std, signal_share=samples[0].share)
            if row.status in UNIT and not self._confirmed(row, self._tolerance[row.name]):
                measured = f"mean={row.mean_after:.3g}, std={row.std_after:.3g}" if samples else "nothing"
                reason = (
                    f"was {row.status}, but the verifying pass measured {measured}: is its weight, or that of a layer "
                    "before it, also used elsewhere, or does the model keep state?"
                )
                row = replace(row, status="failed", reason=reason)
            elif row.status == "reused" and samples and len(samples) > 1:
                later = [self._shown(layer.name, sample) for sample in samples[1:]]
                mean, std = max(later, key=lambda s: max(abs(s[0]), abs(s[1] - self._target(row.name))))
                row = replace(row, reason=f"{row.reason}; worst later call mean={mean:.3g}, std={std:.3g}")
            self.rows[layer.name] = row
            self._refuse(row)
        # In order of execution: in lock-step they were met in the order in which their outputs were used.
        self.rows = {name: self.rows[name] for name in dict.fromkeys((*found, *self.rows)) if name in self.rows}

    def off(self, found: dict[str, list[Sample]]) -> str:
        """The name of a layer that was normalised and is off by more than rounding in these samples; empty if none is."""
        for name, row in self.rows.items():
            if row.status in UNIT:
                samples = found.get(name)
                if not samples:
                    return name
                mean, std = self._shown(name, samples[0])
                if not self._confirmed(replace(row, mean_after=mean, std_after=std), self._tolerance[name] / 10):
                    return name
        return ""

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _target(self, name: str) -> float:
        return self._wanted.target_std(name)

    def _confirmed(self, row: LayerRow, tolerance: float) -> bool:
        target = self._target(row.name)
        if row.mean_after is None or row.std_after is None or not abs(row.std_after / target - 1) < tolerance:
            return False
        return row.name not in self._centered or abs(row.mean_after) / target < tolerance

    def _shown(self, name: str, sample: Sample) -> tuple[float, float]:
        """Mean and standard deviation for the report: of channels those that are furthest off."""
        if sample.channels is None:
            return sample.moments.mean, sample.moments.std
        channels, alive = sample.channels, self._alive.get(name)
        mean, std = channels.mean, channels.std
        if alive is not None and alive.any():
            mean, std = mean[alive], std[alive]
        furthest = (std.clamp_min(1e-300) / self._target(name)).log().abs().argmax()
        return float(mean[mean.abs().argmax()]), float(std[furthest])

    def _add(self, layer: Layer, verdict: _Verdict, sample: Sample | None) -> None:
        measured: dict[str, Any] = {}
        if sample is not None:
            mean, std = self._shown(layer.name, sample)
            count, share = sample.moments.count, sample.share
            measured = {"mean_before": mean, "std_before": std, "count": count, "calls": 1, "signal_share": share}
        row = LayerRow(layer.name, layer.class_name, verdict.status, verdict.reason, verdict.excused, **measured)
        self.rows[layer.name] = row
        self._refuse(row)

    def _refuse(self, row: LayerRow) -> None:
        """Raise if this row is an error."""
        if self._wanted.strict and row.status in HELPLESS:
            what = "output std is 0" if row.std_before == 0 else row.reason
            raise InitError(
                f"layer {row.name!r} ({row.kind}): {what} on the given batch of shape {self._batch}, LSUV cannot scale it to "
                f"{self._target(row.name):g}. Use a larger batch, or leave the layer out with skip=[{row.name!r}]."
            )

    def _absent(self, layer: Layer) -> _Verdict:
        """What to say of a layer that was not visited."""
        if layer.name not in self._chosen:
            return _left_out()
        if layer.problem:
            return _Verdict("unhandled", layer.problem)
        return _Verdict("unreached", "never called in this forward pass")

    # -- at a layer ---------------------------------------------------------------------------------------------------

    def _treat(self, meeting: Meeting) -> _Verdict:
        """Leave the layer as it is, for a reason, or normalise it."""
        layer, stats, part = meeting.use.layer, meeting.sample.moments, meeting.use.layer.weight
        if layer.name not in self._chosen:
            return _left_out()
        if part is None or not part.parameter.is_floating_point():
            return _Verdict("unscalable", "its weight is no floating-point parameter, or not in this call")
        weight = part.tensor
        if not (part.parameter.requires_grad or self._wanted.include_frozen):
            return _Verdict("frozen", "its weight does not require a gradient", excused=True)
        if stats.count < 2:
            return _Verdict("few_values", "its output is a single value")
        if is_zero(weight):
            return _Verdict("dead", "its weight is all zeros", excused=True)
        if stats.std <= 1e-15 * abs(stats.mean):  # what float64 leaves of a constant
            return _Verdict("dead", "its output does not vary: std is 0")
        if meeting.silent:
            return _Verdict("dead", "its input is all zeros")
        raw = meeting.sample.before or stats  # what the layer itself puts out
        if not self._wanted.channels and is_rounding(raw, weight.dtype, meeting.dtype):
            return _Verdict("unscalable", _not_representable(raw, meeting.dtype))
        self._tolerance[layer.name] = self._wanted.tol or tolerance_of(weight.dtype, meeting.dtype)
        partner = self._partner(part.parameter, meeting)
        bias, why_not = self._movable_bias(meeting)
        if partner:
            return self._tied(meeting, partner, bias)
        if self._wanted.channels:
            return self._scale_channels(meeting, bias, why_not)
        if meeting.use.behind is not None:
            return self._scale_behind(meeting, weight, bias, why_not)
        return self._scale(meeting, weight, bias, why_not)

    def _partner(self, parameter: nn.Parameter, meeting: Meeting) -> str:
        """The name of a module that shares this parameter, and was called before or is to be left as it is."""
        for partner in self._sharing.partners(parameter, meeting.use.layer.owner):
            if partner in meeting.use.entered or partner in self._untouchable:
                return partner
        return ""

    def _movable_bias(self, meeting: Meeting) -> tuple[Tensor | None, str]:
        """The bias if it may be changed; otherwise None, and why not."""
        bias: Part | None = meeting.use.bias
        if bias is None:
            return None, "its bias is computed" if meeting.use.has_bias else "no bias"
        if not (bias.parameter.requires_grad or self._wanted.include_frozen):
            return None, "its bias is frozen"
        partner = self._partner(bias.parameter, meeting)
        return (None, f"its bias is shared with {partner!r}") if partner else (bias.tensor, "")

    def _tied(self, meeting: Meeting, partner: str, bias: Tensor | None) -> _Verdict:
        if self._wanted.center and bias is not None and meeting.use.behind is None and not self._wanted.channels:
            meeting.check_repeatable()
            bench = Bench(None, bias, lambda scale: meeting.remeasure().moments)
            center(bench, meeting.sample.moments, self._tolerance[meeting.use.layer.name])
        return _Verdict("tied", f"its weight is shared with {partner!r}", excused=True)

    def _claim(self, bias: Tensor | None, why_not: str) -> tuple[str, str]:
        """The status of a layer whose standard deviation is right, and the reason for it."""
        return ("no_bias", why_not) if self._wanted.center and bias is None else ("normalized", "")

    def _scale(self, meeting: Meeting, weight: Tensor, bias: Tensor | None, why_not: str) -> _Verdict:
        name, stats = meeting.use.layer.name, meeting.sample.moments
        centering = self._wanted.center and bias is not None
        status, reason = self._claim(bias, why_not)
        tolerance, target, affine = self._tolerance[name], self._target(name), name in self._affine
        if self._is_exact(meeting, stats, weight, bias):
            mean, factor = stats.mean if centering else 0.0, target / stats.std
            _divide(weight, bias, mean, factor)
            meeting.rescale(mean, factor)
            return _Verdict(status, reason, centered=centering)

        def solve(centering: bool) -> bool:
            return normalize(bench, stats, center=centering, tolerance=tolerance, target=target)

        meeting.check_repeatable()
        bench = Bench(weight, bias, lambda scale: meeting.remeasure().moments)
        if solve(centering):
            near = affine or abs(stats.mean) >= 100 * stats.std  # to the limit of what can be represented
            if not near or self._holds_in_float64(meeting, tolerance, target, centering):
                return _Verdict(status, reason, centered=centering)
            bench.run()
            return _Verdict("unscalable", _not_representable(stats, meeting.dtype))
        if centering and not affine and solve(False):
            now = meeting.remeasure().moments
            if not center(Bench(None, bias, lambda scale: meeting.remeasure().moments), now, tolerance):
                return _Verdict("scaled", "its mean cannot be brought to 0 by its bias")
            bench.run()
        if affine:
            fixed = meeting.use.has_bias and bias is None
            cause = f"{why_not}, and its spread alone is too large" if fixed else ""
            return _Verdict("unscalable", cause or _not_representable(stats, meeting.dtype))
        shifted = centering and center(bench, stats, tolerance)
        return _Verdict(
            "unscalable", f"the std of its output does not follow its weight{', only centred' if shifted else ''}"
        )

    def _scale_behind(self, meeting: Meeting, weight: Tensor, bias: Tensor | None, why_not: str) -> _Verdict:
        """The output is centred, then scaled such that the standard deviation behind the activation is right."""
        name, before, behind = meeting.use.layer.name, meeting.sample.before, meeting.use.behind
        assert before is not None
        assert behind is not None
        tolerance, target = self._tolerance[name], self._target(name)
        exact = self._is_exact(meeting, before, weight, bias)
        old = (weight.detach().clone(), None if bias is None else bias.detach().clone())
        if self._wanted.center and bias is not None:
            if exact:
                bias.sub_(before.mean)
                meeting.rescale(before.mean, 1.0)
            else:
                center(Bench(None, bias, lambda scale: _before(meeting.remeasure())), before, tolerance)
        bench = Bench(weight, bias, lambda scale: meeting.remeasure(scale if exact else None).moments)
        start = bench.run()
        if start.std > 0 and normalize(bench, start, center=False, tolerance=tolerance, target=target):
            if exact:
                meeting.rescale(0.0, bench.scale)
            return _Verdict(*self._claim(bias, why_not))
        weight.copy_(old[0])
        if bias is not None and old[1] is not None:
            bias.copy_(old[1])
        if exact and self._wanted.center and bias is not None:
            meeting.rescale(-before.mean, 1.0)
        else:
            meeting.remeasure()
        return _Verdict("unscalable", f"the std behind {behind.name} cannot be brought to {target:g} by its weight")

    def _scale_channels(self, meeting: Meeting, bias: Tensor | None, why_not: str) -> _Verdict:
        layer, channels = meeting.use.layer, meeting.sample.channels
        assert channels is not None
        assert layer.weight is not None
        name, weight = layer.name, layer.weight.tensor
        if channels.count < 2:
            return _Verdict("few_values", "each of its channels is a single value")
        alive = channels.std > 100 * rounding_of(weight.dtype, meeting.dtype) * channels.mean.abs()
        if not alive.any():
            return _Verdict("dead", "none of its channels varies")
        centering = self._wanted.center and bias is not None
        target, tolerance = self._target(name), self._tolerance[name]
        bench = ChannelBench(layer, bias)
        exact = self._is_exact(meeting, meeting.sample.moments, weight, bias, channels, alive)
        if not exact:
            meeting.check_repeatable()
        one, zero = torch.ones_like(channels.mean), torch.zeros_like(channels.mean)
        scale, shift, now, done = one, zero, channels, False
        for _ in range(ATTEMPTS):
            factor = torch.where(alive, target / now.std, one)
            mean = torch.where(alive & centering, now.mean, zero)
            scale, shift = scale * factor, (shift - mean) * factor
            if not bool(scale.isfinite().all() and shift.isfinite().all()):
                break
            if not bench.put(scale, shift):
                return _Verdict("unscalable", "its weight has other channels than its output")
            if exact:
                meeting.rescale_channels(mean, factor)
                done = True
                break
            found = meeting.remeasure().channels
            if found is None:
                break
            now, done = found, _channels_are(found, alive, target, tolerance / 2, centering)
            if done:
                break
        if not done and not _channels_are(now, alive, target, tolerance, centering):
            bench.restore()
            meeting.remeasure()
            return _Verdict("unscalable", "the std of its channels does not follow its weight")
        self._alive[name] = alive
        if not alive.all():
            dead = int((~alive).sum())
            return _Verdict("partial", f"{dead} of its {len(alive)} channels do not vary, and are left as they are")
        return _Verdict(*self._claim(bias, why_not), centered=centering)

    def _is_exact(
        self,
        meeting: Meeting,
        stats: Moments,
        weight: Tensor,
        bias: Tensor | None,
        channels: Channels | None = None,
        alive: Tensor | None = None,
    ) -> bool:
        """Dividing weight and bias divides the output, and the numbers are such that rounding does no harm."""
        dtype = meeting.dtype
        if not (
            meeting.use.layer.name in self._affine
            and dtype == weight.dtype
            and dtype in (torch.float32, torch.float64)
            and 1e-30 < stats.std < 1e30
        ):
            return False
        fixed = bias is None and meeting.use.has_bias and not self._is_zero_bias(meeting)
        if channels is not None and alive is not None:
            return not fixed and bool((channels.mean.abs() < 100 * channels.std)[alive].all())
        return abs(stats.mean) < 100 * stats.std and not fixed

    @staticmethod
    def _is_zero_bias(meeting: Meeting) -> bool:
        bias = meeting.use.bias
        return bias is not None and is_zero(bias.tensor)

    @staticmethod
    def _holds_in_float64(meeting: Meeting, tolerance: float, target: float, centering: bool) -> bool:
        """Mean and standard deviation are no artefact of rounding."""
        stats = meeting.in_float64()
        if stats is None:
            return True
        off = abs(stats.std / target - 1) < 2 * tolerance
        return off and (not centering or abs(stats.mean) / target < 2 * tolerance)


def _before(sample: Sample) -> Moments:
    return sample.before or sample.moments


def _channels_are(channels: Channels, alive: Tensor, target: float, tolerance: float, centering: bool) -> bool:
    off = (channels.std / target - 1).abs()[alive].max()
    mean = channels.mean.abs()[alive].max() / target if centering else torch.zeros(())
    return bool(off < tolerance and mean < tolerance)


def _divide(weight: Tensor, bias: Tensor | None, mean: float, factor: float) -> None:
    """`W * factor` and `(b - mean) * factor`, in place."""
    weight.mul_(factor)
    if bias is not None:
        bias.sub_(mean).mul_(factor)


def _not_representable(stats: Moments, dtype: torch.dtype) -> str:
    return (
        f"its spread (std={stats.std:.3g}) beside its mean ({stats.mean:.3g}) is too small for the precision of "
        f"{str(dtype).removeprefix('torch.')}"
    )


def _left_out() -> _Verdict:
    return _Verdict("skipped", "left out by layers= or skip=", excused=True)


def _describe(output: object) -> str:
    return f"{output.dtype}, {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
