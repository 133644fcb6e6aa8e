"""`KaimingNormal`: one of torch's random initialisers as a stage, over the weight layers of a model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from minitrain.init.forward import Forward, at_rest
from minitrain.init.inputs import first, from_inputs
from minitrain.init.layers import Layer, choose, find_layers, unwrap
from minitrain.init.report import InitReport, LayerRow
from minitrain.init.rollback import rolled_back_on_error
from minitrain.moments import moments


@dataclass(frozen=True)
class KaimingNormal:
    """The init stage of He et al.: weights from a normal distribution of standard deviation `gain / sqrt(fan)`.

    It calls `torch.nn.init.kaiming_normal_` on the weight of each linear, bilinear and convolutional layer, in order of
    registration, and draws from the global random generator. Biases stay as they are. Left alone, with a reason in the
    report, are frozen weights, weights that have been drawn already because they are shared, attention, recurrent layers,
    and weights that are computed from other parameters (weight norm). The batches are used only to give lazy modules their
    shapes.

    Args:
        nonlinearity: What follows the layers; it gives the gain. One of the names of `torch.nn.init.calculate_gain`.
        mode: "fan_in" keeps the variance in the forward pass, "fan_out" in the backward pass.
        a: The negative slope, if `nonlinearity` is "leaky_relu".
        layers: These only: types, names, globs, a predicate `(name, module)`, or a list of them.

    Raises:
        ValueError: An unknown `nonlinearity` or `mode`; when called, `layers` that name no weight layer.

    Example:
        >>> from torch import nn
        >>> from minitrain.init import KaimingNormal
        >>> model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
        >>> report = KaimingNormal()(model, [])
        >>> round(report["0"].std_after, 1)  # (2 / 200) ** 0.5
        0.1

    References:
        Kaiming He, Xiangyu Zhang, Shaoqing Ren and Jian Sun, "Delving deep into rectifiers", 2015,
        https://arxiv.org/abs/1502.01852
    """

    nonlinearity: str = "relu"
    mode: str = "fan_in"
    a: float = 0.0
    layers: Any = None

    def __post_init__(self) -> None:
        if self.mode not in ("fan_in", "fan_out"):
            raise ValueError(f"mode={self.mode!r}, wanted 'fan_in' or 'fan_out'.")
        try:
            nn.init.calculate_gain(self.nonlinearity, self.a)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"nonlinearity={self.nonlinearity!r}, a={self.a!r}: {error}") from error

    def __call__(self, model: nn.Module, batches: Iterable[Any] = ()) -> InitReport:
        """Draw the weights of `model`, in place.

        Args:
            model: Changed in place.
            batches: The model's inputs; needed only if it has lazy modules.

        Returns:
            The report: mean and standard deviation of each weight before and after.
        """
        start = time.perf_counter()
        model, forwards = unwrap(model), 0
        with rolled_back_on_error(model):
            if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
                with at_rest(model):
                    Forward(model, from_inputs(first(batches, "batches")))()
                forwards = 1
            layers = find_layers(model)
            chosen = choose(model, layers, self.layers)
            drawn: set[int] = set()
            rows = tuple(self._draw(layer, layer.name in chosen, drawn) for layer in layers)
        return InitReport("KaimingNormal", rows, forwards, time.perf_counter() - start, of="weights")

    @torch.no_grad()
    def _draw(self, layer: Layer, chosen: bool, drawn: set[int]) -> LayerRow:
        row = LayerRow(layer.name, layer.kind, "drawn")
        weight = layer.module._parameters.get("weight")
        if not chosen:
            return replace(row, status="skipped", reason="left out by layers=", excused=True)
        if layer.problem or weight is None:
            return replace(
                row, status="unhandled", reason=layer.problem or "its weight is computed from other parameters"
            )
        if isinstance(weight, nn.UninitializedParameter):
            return replace(row, status="unreached", reason="never called: it has no shape")
        before = moments(weight)
        row = replace(row, mean_before=before.mean, std_before=before.std, count=before.count)
        if not weight.requires_grad:
            return replace(row, status="frozen", reason="its weight does not require a gradient", excused=True)
        if id(weight) in drawn:
            return replace(row, status="tied", reason="its weight is shared, and has been drawn", excused=True)
        drawn.add(id(weight))
        nn.init.kaiming_normal_(weight, self.a, self.mode, self.nonlinearity)  # type: ignore[arg-type]
        after = moments(weight)
        return replace(row, mean_after=after.mean, std_after=after.std)
