"""LSUV, layer-sequential unit-variance initialisation: exact, in one forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from minitrain.errors import InitError
from minitrain.init.forward import Forward, at_rest, measure
from minitrain.init.inputs import ModelInputs, first, from_data, from_inputs
from minitrain.init.layers import Layer, choose, find_layers, unowned_parameters, unwrap
from minitrain.init.normalizer import Normalizer
from minitrain.init.report import InitReport, LayerRow, LSUVReport
from minitrain.init.rollback import rolled_back, rolled_back_on_error
from minitrain.moments import Moments


@dataclass(frozen=True)
class LSUV:
    """The init stage: every weight layer's output gets mean 0 and standard deviation 1 on one batch.

    In one forward pass, in evaluation mode, each weight layer (`Linear`, `Bilinear`, convolutions, transposed convolutions,
    their lazy forms and subclasses) is met in order of execution. With m and s the mean and standard deviation over its
    whole output, samples, channels and positions alike, its weight becomes `W / s` and its bias `(b - m) / s`, in place,
    and what comes behind it sees the normalised output `(y - m) / s`. So each layer is measured on what it will really get,
    and one pass does for the whole net. A second pass verifies: what it measures is what is reported.

    Nothing else changes: other parameters, buffers, modes, random states, gradients, hooks, the parameters' storage. If an
    error is raised, all of it is as before, to the bit; lazy modules are lazy again. (Hooks of your own are called during
    the passes; what they keep for themselves is theirs.) Lazy modules are shaped by a forward pass of their own first, from
    the global random generator, which is then put back.

    The report's statuses:

    | status | meaning |
    |---|---|
    | normalized | mean 0 and standard deviation 1 (with `center=False`: standard deviation 1) |
    | no_bias | standard deviation 1; there is no bias that might move the mean (none, frozen, shared) |
    | scaled | standard deviation 1; the bias cannot bring the mean to 0 (an activation inside of the layer) |
    | reused | called several times; the first call is normalised |
    | tied | the weight is shared with a layer that was there first, and not scaled again; centred by its own bias |
    | frozen | its weight does not require a gradient; left as it is |
    | skipped | left out by `layers=` or `skip=` |
    | dead | standard deviation 0, or the weight or the layer's input all zero; left as it is |
    | few_values | one output value, which has no standard deviation; left as it is |
    | unscalable | the output does not follow the weight (spectral norm: only centred), or its spread is rounding |
    | unhandled | attention's weights, recurrent layers, classes that LSUV does not know; left as they are |
    | unreached | never called in this forward pass; left as it is |
    | failed | should be normalised, but the verifying pass measured something else: do not rely on it |

    Args:
        data: What to take statistics on instead of the Learner's training batches: a tensor, a tuple (the model's
            positional arguments), a dict (its keyword arguments), or a loader or list of batches, of which the first one is
            taken; its inputs are all but the last element, or what `inputs` picks.
        inputs: Picks the model's inputs (tensor, tuple or dict) out of a batch of a loader that is passed as `data`.
        center: Bring the mean to 0, too. False is the paper's form: the standard deviation only.
        layers: Normalise these only: types, names, globs, a predicate `(name, module)`, or a list of them.
        skip: Leave these as they are; likewise.
        verify: Measure every layer in one more forward pass. Without it nothing is known about the state afterwards.
        strict: The first layer that cannot be normalised is an error.

    Raises:
        TypeError: An argument is of the wrong type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from minitrain.init import LSUV
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = LSUV()(model, [torch.randn(64, 8)])
        >>> [row.status for row in report], report.forwards
        (['normalized', 'normalized'], 2)

    References:
        Dmytro Mishkin and Jiri Matas, "All you need is a good init", 2016, https://arxiv.org/abs/1511.06422. We depart from
        it in four points: means are brought to 0 as well; a layer is solved exactly, not by repeated divisions until a
        tolerance is met; all layers in one forward pass, not several passes each; and weights are not made orthonormal
        first.
    """

    data: Any = field(default=None, repr=False)
    _: KW_ONLY
    inputs: Callable[[Any], Any] | None = None
    center: bool = True
    layers: Any = None
    skip: Any = ()
    verify: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("center", "verify", "strict"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted True or False.")
        if self.inputs is not None and not callable(self.inputs):
            raise TypeError(f"inputs={self.inputs!r} is not callable, wanted a function batch -> the model's inputs.")
        if self.inputs is not None and self.data is None:
            raise TypeError("inputs= picks from the batches of data=, which is not given.")

    def __call__(self, model: nn.Module, batches: Iterable[Any]) -> LSUVReport:
        """Initialise `model` on the first of `batches`, or on `data` if that was given.

        Args:
            model: Changed in place. What `torch.compile` or a data-parallel wrapper made is unwrapped.
            batches: The model's inputs; a tuple holds several positional arguments.

        Returns:
            The report, a row a layer.

        Raises:
            InitError: A value is NaN or infinite, the batch does not vary, there is no weight layer, the model cannot be
                initialised (sharded, quantised, without values), or, if `strict`, a layer cannot be normalised.
            DataError: There is no batch, or no sample in it.
            TypeError: `model` or `data` is of the wrong type.
            ValueError: `layers` or `skip` names no weight layer.
        """
        start = time.perf_counter()
        model = unwrap(model)
        if self.data is not None:
            found = from_data(self.data, self.inputs)
        else:
            found = from_inputs(first(batches, "batches"))
        inputs = _on_device(found, model)
        with rolled_back_on_error(model), at_rest(model):
            forward = Forward(model, inputs)
            layers = _shaped_layers(model, forward)
            chosen = choose(model, layers, self.layers, self.skip)
            stage = Normalizer(model, layers, chosen, center=self.center, strict=self.strict, batch=str(inputs))
            stage.normalize(forward)
            if self.verify:
                stage.verify(forward)
            return LSUVReport(
                "LSUV",
                stage.rows(),
                forward.count,
                time.perf_counter() - start,
                batch=str(inputs),
                unowned=unowned_parameters(model, layers),
            )


def lsuv_(
    model: nn.Module,
    data: Any,
    *,
    inputs: Callable[[Any], Any] | None = None,
    center: bool = True,
    layers: Any = None,
    skip: Any = (),
    verify: bool = True,
    strict: bool = False,
) -> LSUVReport:
    """Give every weight layer of `model` an output of mean 0 and standard deviation 1 on `data`, in place.

    This is the stage `LSUV` as a function; its documentation says what is done, and what each status of the report means.

    Args:
        model: Changed in place: the weights (each by a positive factor) and the biases of its weight layers.
        data: A tensor, a tuple (the model's positional arguments), a dict (its keyword arguments), or a loader or list of
            batches, of which the first one is taken; its inputs are all but the last element, or what `inputs` picks.
        inputs: Picks the model's inputs (tensor, tuple or dict) out of a loader's batch.
        center: Bring the mean to 0, too.
        layers: Normalise these only: types, names, globs, a predicate `(name, module)`, or a list of them.
        skip: Leave these as they are; likewise.
        verify: Measure every layer in one more forward pass.
        strict: The first layer that cannot be normalised is an error.

    Returns:
        The report, a row a layer, in order of execution.

    Raises:
        InitError: Nothing sensible can be done, as `LSUV` lists it; the model is as before.
        DataError: There is no batch, or no sample in it.
        TypeError: An argument is of the wrong type.
        ValueError: `layers` or `skip` names no weight layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from minitrain.init import lsuv_
        >>> model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4))
        >>> report = lsuv_(model, torch.randn(64, 8))
        >>> [(row.name, row.status) for row in report]
        [('0', 'no_bias'), ('2', 'normalized')]
        >>> abs(report["2"].mean_after) < 1e-6, abs(report["2"].std_after - 1) < 1e-6
        (True, True)

    References:
        Dmytro Mishkin and Jiri Matas, "All you need is a good init", 2016, https://arxiv.org/abs/1511.06422
    """
    _require(data)
    stage = LSUV(data, inputs=inputs, center=center, layers=layers, skip=skip, verify=verify, strict=strict)
    return stage(model, ())


def layer_stats(model: nn.Module, batch: Any, *, layers: Any = None) -> InitReport:
    """Measure mean µ and standard deviation σ of every weight layer's output, and change nothing.

    Measured is the first call of each layer, in evaluation mode, as `lsuv_` does it.

    Args:
        model: The model.
        batch: What to call it with; the same forms as `data` of `lsuv_`.
        layers: These only: types, names, globs, a predicate `(name, module)`, or a list of them.

    Returns:
        A report whose rows have `mean_before` and `std_before`; printed, it is a table of layer, class, µ and σ.

    Raises:
        InitError: A value is NaN or infinite, the batch does not vary, or there is no weight layer.
        DataError: There is no batch, or no sample in it.
        TypeError: An argument is of the wrong type.
        ValueError: `layers` names no weight layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from minitrain.init import layer_stats
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 2.0)
        >>> row = layer_stats(model, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))[""]
        >>> row.mean_before, round(row.std_before, 3)
        (3.0, 1.414)
    """
    start = time.perf_counter()
    _require(batch)
    model = unwrap(model)
    inputs = _on_device(from_data(batch, None), model)
    with rolled_back(model), at_rest(model):
        forward = Forward(model, inputs)
        found = _shaped_layers(model, forward)
        chosen = choose(model, found, layers)
        stats = measure(forward, [layer for layer in found if not layer.problem])
    by_name = {layer.name: layer for layer in found if layer.name in chosen}
    order = [name for name in stats if name in by_name] + [name for name in by_name if name not in stats]
    rows = tuple(_measured(by_name[name], stats.get(name, [])) for name in order)
    return InitReport("layer_stats", rows, forward.count, time.perf_counter() - start)


def _measured(layer: Layer, stats: list[Moments]) -> LayerRow:
    row = LayerRow(layer.name, layer.kind, "measured", calls=len(stats))
    if stats:
        return replace(row, mean_before=stats[0].mean, std_before=stats[0].std, count=stats[0].count)
    if layer.problem:
        return replace(row, status="unhandled", reason=layer.problem)
    return replace(row, status="unreached", reason="never called in this forward pass")


def _require(data: Any) -> None:
    if data is None:
        raise TypeError("data=None, wanted what the model is to be called with: a tensor, a tuple, a dict or a loader.")


def _on_device(inputs: ModelInputs, model: nn.Module) -> ModelInputs:
    """The inputs, checked, where the model is."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise InitError(f"the model ({type(model).__name__}) has no weight layer, it has no parameter at all.")
    inputs.check()
    return inputs.to(parameter.device)


def _shaped_layers(model: nn.Module, forward: Forward) -> list[Layer]:
    """Every weight layer, after lazy ones have got their shapes by a forward pass."""
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        forward()
    layers = find_layers(model)
    if not layers:
        raise InitError(
            f"the model ({type(model).__name__}) has no weight layer (linear, bilinear, convolution): there is nothing to "
            "normalise."
        )
    return layers
