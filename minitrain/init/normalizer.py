"""`Normalizer`: meets the layers in order of execution, and decides at each one what can be done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minitrain.errors import InitError
from minitrain.init.forward import Call, Forward, is_measurable, measure, output_moments, run_watched
from minitrain.init.layers import Layer, Sharing
from minitrain.init.report import LayerRow
from minitrain.init.solve import Bench, center, is_rounding, normalize, tolerance_of
from minitrain.moments import Moments, moments

HELPLESS = frozenset({"dead", "few_values", "unscalable", "unhandled", "unreached", "failed"})
"""The statuses that are an error if `strict`."""
UNIT = frozenset({"normalized", "no_bias", "scaled", "reused"})
"""The statuses that claim a standard deviation of 1."""


class _Visit(NamedTuple):
    """The first call of a layer: all that there is to decide on."""

    layer: Layer
    call: Call
    output: Tensor
    stats: Moments


class _Verdict(NamedTuple):
    """What was done at a layer; `output` is what replaces its output."""

    status: str
    reason: str = ""
    excused: bool = False
    output: Tensor | None = None
    centered: bool = False


class Normalizer:
    """LSUV on one model and one batch.

    Args:
        model: The model, with every parameter shaped.
        layers: All its weight layers.
        chosen: The names of those that are to be normalised.
        center: Bring means to 0, too.
        strict: Raise at the first layer that cannot be normalised.
        batch: The shapes of the inputs, for messages.
    """

    def __init__(
        self, model: nn.Module, layers: list[Layer], chosen: set[str], *, center: bool, strict: bool, batch: str
    ) -> None:
        self._model, self._layers, self._chosen = model, layers, chosen
        self._center, self._strict, self._batch = center, strict, batch
        self._sharing = Sharing(model)
        self._affine = {layer.name for layer in layers if layer.is_affine}  # seen before our own hooks are on
        self._entered: set[str] = set()  # names of those that share a parameter and have been called
        self._rows: dict[str, LayerRow] = {}
        self._centered: set[str] = set()  # names of the layers that are claimed to have mean 0
        self._tolerance: dict[str, float] = {}
        self._busy = False  # a layer runs on the bench: layers inside of it are not visited again

    def normalize(self, forward: Forward) -> None:
        """One forward pass, in which each layer is normalised at its first call."""
        names = self._sharing.sharers
        handles = [
            module.register_forward_pre_hook(self._enter(name), prepend=True)
            for name, module in self._model.named_modules()
            if name in names
        ]
        try:
            run_watched(forward, self._handled(), self._visit, repeatable=self._affine.__contains__)
        finally:
            for handle in handles:
                handle.remove()
        for layer in self._layers:
            if layer.name not in self._rows:
                self._add(layer, self._absent(layer), None)
        for row in self._rows.values():
            if row.calls > 1 and row.status in UNIT:
                reason = "; ".join(
                    filter(None, [f"called {row.calls} times, normalised on the first call", row.reason])
                )
                self._rows[row.name] = replace(row, status="reused", reason=reason)

    def verify(self, forward: Forward) -> None:
        """One more forward pass: report what it measures, and take back the claims that it does not confirm."""
        found = measure(forward, self._handled())
        for layer in self._layers:
            row, stats = self._rows[layer.name], found.get(layer.name)
            if stats:
                row = replace(row, mean_after=stats[0].mean, std_after=stats[0].std)
            if row.status in UNIT and not self._confirmed(row):
                measured = f"mean={row.mean_after:.3g}, std={row.std_after:.3g}" if stats else "nothing"
                reason = (
                    f"was {row.status}, but the verifying pass measured {measured}: is its weight, or that of a layer "
                    "before it, also used elsewhere, or does the model keep state?"
                )
                row = replace(row, status="failed", reason=reason)
            elif row.status == "reused" and stats and len(stats) > 1:
                worst = max(stats[1:], key=lambda s: max(abs(s.mean), abs(s.std - 1)))
                row = replace(row, reason=f"{row.reason}; worst later call mean={worst.mean:.3g}, std={worst.std:.3g}")
            self._rows[layer.name] = row
            self._refuse(row)

    def rows(self) -> tuple[LayerRow, ...]:
        """The rows, in order of execution; those of layers that were never called come last."""
        return tuple(self._rows.values())

    def _handled(self) -> Iterable[Layer]:
        return [layer for layer in self._layers if not layer.problem]

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._entered.add(name)

        return enter

    def _confirmed(self, row: LayerRow) -> bool:
        tolerance = self._tolerance[row.name]
        if row.mean_after is None or row.std_after is None or not abs(row.std_after - 1) < tolerance:
            return False
        return row.name not in self._centered or abs(row.mean_after) < tolerance

    def _add(self, layer: Layer, verdict: _Verdict, stats: Moments | None) -> None:
        row = LayerRow(layer.name, layer.kind, verdict.status, verdict.reason, verdict.excused)
        if stats is not None:
            row = replace(row, mean_before=stats.mean, std_before=stats.std, count=stats.count, calls=1)
        self._rows[layer.name] = row
        self._refuse(row)

    def _refuse(self, row: LayerRow) -> None:
        """Raise if this row is an error."""
        if self._strict and row.status in HELPLESS:
            what = "output std is 0" if row.std_before == 0 else row.reason
            raise InitError(
                f"layer {row.name!r} ({row.kind}): {what} on the given batch of shape {self._batch}, LSUV cannot scale it to "
                f"1. Use a larger batch, or leave the layer out with skip=[{row.name!r}]."
            )

    def _absent(self, layer: Layer) -> _Verdict:
        """What to say of a layer that was not visited."""
        if layer.name not in self._chosen:
            return _left_out()
        if layer.problem:
            return _Verdict("unhandled", layer.problem)
        return _Verdict("unreached", "never called in this forward pass")

    # -- at a layer ---------------------------------------------------------------------------------------------------

    def _visit(self, layer: Layer, call: Call, output: Any) -> Tensor | None:
        if self._busy or (isinstance(output, Tensor) and not output.numel()):  # an expert that got no sample, say
            return None
        if layer.name in self._rows:
            row = self._rows[layer.name]
            self._rows[layer.name] = replace(row, calls=row.calls + 1)
            return None
        stats = output_moments(layer, call, output)
        if stats is None:
            verdict = _Verdict("unscalable", f"its output is no dense real tensor with values ({_describe(output)})")
            if layer.name not in self._chosen:
                verdict = _left_out()
            self._add(layer, verdict, None)
            self._rows[layer.name] = replace(self._rows[layer.name], calls=1)
            return None
        self._busy = True
        try:
            verdict = self._treat(_Visit(layer, call, output, stats))
        finally:
            self._busy = False
        if verdict.centered:
            self._centered.add(layer.name)
        self._add(layer, verdict, stats)
        return verdict.output

    def _treat(self, visit: _Visit) -> _Verdict:
        """Leave the layer as it is, for a reason, or normalise it."""
        layer, stats, weight = visit.layer, visit.stats, visit.layer.weight
        if layer.name not in self._chosen:
            return _left_out()
        if weight is None or not weight.is_floating_point():
            return _Verdict("unscalable", "its weight is no floating-point parameter")
        if not weight.requires_grad:
            return _Verdict("frozen", "its weight does not require a gradient", excused=True)
        if stats.count < 2:
            return _Verdict("few_values", "its output is a single value")
        if not weight.any():
            return _Verdict("dead", "its weight is all zeros", excused=True)
        if stats.std <= 1e-15 * abs(stats.mean):  # what float64 leaves of a constant
            return _Verdict("dead", "its output does not vary: std is 0")
        if self._gets_zeros(visit):
            return _Verdict("dead", "its input is all zeros")
        if is_rounding(stats, weight.dtype, visit.output.dtype):
            return _Verdict("unscalable", _not_representable(stats, visit.output.dtype))
        self._tolerance[layer.name] = tolerance_of(weight.dtype, visit.output.dtype)
        partner = self._partner(weight, layer.name)
        bias, why_not = self._movable_bias(layer)
        if partner:
            return self._tied(visit, partner, bias)
        return self._scale(visit, weight, bias, why_not)

    def _gets_zeros(self, visit: _Visit) -> bool:
        """What it puts out can only be the spread of its bias. Of a layer that takes more than one input, all count."""
        given = [t for t in (*visit.call.args, *visit.call.kwargs.values()) if is_measurable(t)]
        product = visit.layer.name in self._affine and isinstance(visit.layer.module, nn.Bilinear)
        return bool(given) and (any if product else all)(not t.any() for t in given)

    def _partner(self, parameter: nn.Parameter, name: str) -> str:
        """The name of a module that shares this parameter, and was called before or is to be left as it is."""
        untouchable = {layer.name for layer in self._layers} - self._chosen
        for partner in self._sharing.partners(parameter, name):
            if partner in self._entered or partner in untouchable:
                return partner
        return ""

    def _movable_bias(self, layer: Layer) -> tuple[nn.Parameter | None, str]:
        """The bias if it may be changed; otherwise None, and why not."""
        bias = layer.bias
        if bias is None:
            return None, "no bias" if getattr(layer.module, "bias", None) is None else "its bias is computed"
        if not bias.requires_grad:
            return None, "its bias is frozen"
        partner = self._partner(bias, layer.name)
        return (None, f"its bias is shared with {partner!r}") if partner else (bias, "")

    def _tied(self, visit: _Visit, partner: str, bias: nn.Parameter | None) -> _Verdict:
        reason = f"its weight is shared with {partner!r}"
        output = None
        if self._center and bias is not None:
            bench = Bench(None, bias, partial(visit.call.repeat, visit.layer.module))
            output = center(bench, visit.stats, self._tolerance[visit.layer.name])
        return _Verdict("tied", reason, excused=True, output=output)

    def _scale(self, visit: _Visit, weight: nn.Parameter, bias: nn.Parameter | None, why_not: str) -> _Verdict:
        centering = self._center and bias is not None
        status, reason = ("normalized", "") if centering or not self._center else ("no_bias", why_not)
        if self._is_exact(visit, weight, bias):
            output = _divide(visit, weight, bias, centering)
            return _Verdict(status, reason, output=output, centered=centering)
        tolerance = self._tolerance[visit.layer.name]
        bench = Bench(weight, bias, partial(visit.call.repeat, visit.layer.module))
        solve = partial(normalize, bench, visit.output, visit.stats, tolerance=tolerance)
        affine = visit.layer.name in self._affine
        if (solved := solve(center=centering)) is not None:
            near = affine or abs(visit.stats.mean) >= 100 * visit.stats.std  # to the limit of what can be represented
            if not near or _holds_in_float64(visit, tolerance, centering):
                return _Verdict(status, reason, output=solved, centered=centering)
            bench.run()
            return _Verdict("unscalable", _not_representable(visit.stats, visit.output.dtype))
        if centering and not affine and (scaled := solve(center=False)) is not None:
            if (
                center(Bench(None, bias, partial(visit.call.repeat, visit.layer.module)), moments(scaled), tolerance)
                is None
            ):
                return _Verdict("scaled", "its mean cannot be brought to 0 by its bias", output=scaled)
            bench.run()
        if affine:
            fixed = visit.layer.bias is not None and bias is None
            cause = f"{why_not}, and its spread alone is too large" if fixed else ""
            return _Verdict("unscalable", cause or _not_representable(visit.stats, visit.output.dtype))
        shifted = center(bench, visit.stats, tolerance) if centering else None
        also = "" if shifted is None else ", only centred"
        return _Verdict("unscalable", f"the std of its output does not follow its weight{also}", output=shifted)

    def _is_exact(self, visit: _Visit, weight: nn.Parameter, bias: nn.Parameter | None) -> bool:
        """Dividing weight and bias divides the output, and the numbers are such that rounding does no harm."""
        stats, dtype = visit.stats, visit.output.dtype
        return (
            visit.layer.name in self._affine
            and dtype == weight.dtype
            and dtype in (torch.float32, torch.float64)
            and abs(stats.mean) < 100 * stats.std
            and 1e-30 < stats.std < 1e30
            and (bias is not None or visit.layer.bias is None or not visit.layer.bias.any())
        )


def _divide(visit: _Visit, weight: nn.Parameter, bias: nn.Parameter | None, centering: bool) -> Tensor:
    """`W / s` and `(b - m) / s`, in place; returns `(y - m) / s`."""
    mean, std = visit.stats.mean if centering else 0.0, visit.stats.std
    weight.div_(std)
    if bias is not None:
        bias.sub_(mean).div_(std)
    return visit.output.sub(mean).div_(std)


def _holds_in_float64(visit: _Visit, tolerance: float, centering: bool) -> bool:
    """The layer, as it is now, computed in float64: mean and standard deviation are no artefact of rounding."""
    if visit.output.dtype == torch.float64 or visit.output.device.type == "mps":  # which has none
        return True
    try:
        stats = moments(visit.call.repeat(copy.deepcopy(visit.layer.module).double(), torch.float64))
    except (RuntimeError, TypeError):  # a layer of one's own that cannot be copied, or works in one precision only
        return True
    return abs(stats.std - 1) < 2 * tolerance and (not centering or abs(stats.mean) < 2 * tolerance)


def _not_representable(stats: Moments, dtype: torch.dtype) -> str:
    return (
        f"its spread (std={stats.std:.3g}) beside its mean ({stats.mean:.3g}) is too small for the precision of "
        f"{str(dtype).removeprefix('torch.')}"
    )


def _left_out() -> _Verdict:
    return _Verdict("skipped", "left out by layers= or skip=", excused=True)


def _describe(output: Any) -> str:
    return f"{output.dtype}, {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
