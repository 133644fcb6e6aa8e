"""LSUV, layer-sequential unit-variance initialisation: exact, in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import nn

from minitrain.bars import Bar
from minitrain.errors import InitError
from minitrain.init.engine import Engine, measure_layers
from minitrain.init.inputs import Batches, from_data, from_stage
from minitrain.init.report import InitReport, LSUVReport
from minitrain.init.unwrap import unwrap

GIB = 2**30


@dataclass(frozen=True)
class LSUV:
    """The init stage: every weight layer's output gets mean 0 and standard deviation 1, on one batch or on many.

    In one forward pass, in evaluation mode, each weight layer (`Linear`, `Bilinear`, convolutions, transposed convolutions,
    their lazy forms and subclasses, the projections q, k, v and out of `MultiheadAttention`, and whatever weight the model
    passes to `F.linear` or `F.conv2d` and the like by itself) is met in order of execution. With m and s the mean and standard
    deviation over its whole output, samples, channels and positions alike, its weight becomes `W / s` and its bias `(b - m) /
    s`, in place, and what comes behind it sees the normalised output `(y - m) / s`. So each layer is measured on what it will
    really get, and one pass does for the whole net. A second pass verifies: what it measures is what is reported.

    With `batches` of more than one, all batches count as if they were one, however they are cut. While the activations fit
    into `max_memory`, they advance in lock-step: the forward passes of all batches wait for one another at each layer, so
    that one sweep over the data does. Beyond that they are streamed: each batch runs up to the layer whose turn it is, and
    begins anew for the next one. Lock-step is always verified; where it fails (modules that keep tensors on themselves from
    one layer to another), it is undone, and the batches are streamed.

    Nothing else changes: other parameters, buffers, modes, random states, gradients, hooks, the parameters' storage. If an
    error is raised, all of it is as before, to the bit; lazy modules are lazy again. (Hooks of your own are called during
    the passes; what they keep for themselves is theirs.) Lazy modules are shaped by a forward pass of their own first, from
    the global random generator, which is then put back.

    The report's statuses:

    | status | meaning |
    |---|---|
    | normalized | mean 0 and the standard deviation wanted (with `center=False`: the latter only) |
    | no_bias | that standard deviation; there is no bias that might move the mean (none, frozen, shared, computed) |
    | scaled | that standard deviation; the bias cannot bring the mean to 0 (an activation inside of the layer) |
    | reused | called several times; the first call is normalised |
    | tied | the weight is shared with a layer that was there first, and not scaled again; centred by its own bias |
    | frozen | its weight does not require a gradient; left as it is |
    | skipped | left out by `layers=` or `skip=` |
    | dead | standard deviation 0, or the weight or the layer's input all zero; left as it is |
    | partial | with `scope="channel"`: some channels do not vary, and are left as they are; the others are normalised |
    | few_values | one output value (a channel), which has no standard deviation; left as it is |
    | unscalable | the output does not follow the weight (spectral norm: only centred), or its spread is rounding |
    | unhandled | recurrent layers, classes that LSUV does not know and whose weight it did not see used; left as they are |
    | unreached | never called in this forward pass; left as it is |
    | failed | should be normalised, but the verifying pass measured something else: do not rely on it |

    Args:
        data: What to take statistics on instead of the Learner's training batches: a tensor, a tuple (the model's
            positional arguments), a dict (its keyword arguments), or a loader or list of batches; the inputs of each are all
            but the last element, or what `inputs` picks.
        inputs: Picks the model's inputs (tensor, tuple or dict) out of a batch of a loader that is passed as `data`.
        batches: How many batches to take statistics over: a number, or "all".
        strategy: How to go through several batches: "lock-step", "streaming", or "auto", which chooses by `max_memory`.
        max_memory: How many bytes lock-step may hold. Of streaming it bounds the batches that are kept for the next sweep (to
            a quarter); what exceeds it is drawn from the loader again.
        orthonormal: First replace each weight by an orthonormal matrix, as the paper does. Weights that are frozen or all zeros
            stay, and so do those of layers that are never called.
        center: Bring the mean to 0, too. False is the paper's form: the standard deviation only.
        scope: "layer": one mean and standard deviation over the whole output. "channel": one for each channel. That keeps the
            signal in deep plain nets, and makes their gradients explode.
        target_std: The standard deviation that is wanted: a number, or a function of the layer's name.
        where: "output": the layer's own output. "activation": behind the activation that is the first to use it; there only
            the standard deviation is set (`center` brings the mean before the activation to 0). A layer with no
            activation directly behind it is normalised at its output.
        mode: "eval": as in evaluation. "batch": batch norms take their statistics from the batches (from all of them
            together), which is nearer to training; dropout stays off, and running statistics stay as they are.
        layers: Normalise these only: types, names, globs, a predicate `(name, module)`, or a list of them.
        skip: Leave these as they are; likewise.
        include_frozen: Normalise layers whose weight requires no gradient, too, and move frozen biases.
        forward: Called as `forward(model, *inputs)` where `model(*inputs)` would not do.
        tol: How far mean and standard deviation may be off, as a part of `target_std`. None: 1e-3, in half precision 1e-2.
        verify: Measure every layer in one more forward pass. Without it nothing is known about the state afterwards.
        strict: The first layer that cannot be normalised is an error.
        verbose: Show a bar while it takes long. In a Learner its `progress` does.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has a value that it cannot have.

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
        tolerance is met; all layers in one forward pass, not several passes each; and weights are made orthonormal first
        only with `orthonormal=True`.
    """

    data: Any = field(default=None, repr=False)
    _: KW_ONLY
    inputs: Callable[[Any], Any] | None = None
    batches: int | str = 1
    strategy: str = "auto"
    max_memory: int = 2 * GIB
    orthonormal: bool = False
    center: bool = True
    scope: str = "layer"
    target_std: float | Callable[[str], float] = 1.0
    where: str = "output"
    mode: str = "eval"
    layers: Any = None
    skip: Any = ()
    include_frozen: bool = False
    forward: Callable[..., Any] | None = None
    tol: float | None = None
    verify: bool = True
    strict: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("orthonormal", "center", "include_frozen", "verify", "strict", "verbose"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted True or False.")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r}, wanted one of {', '.join(map(repr, choices))}.")
        if self.inputs is not None and not callable(self.inputs):
            raise TypeError(f"inputs={self.inputs!r} is not callable, wanted a function batch -> the model's inputs.")
        if self.inputs is not None and self.data is None:
            raise TypeError("inputs= picks from the batches of data=, which is not given.")
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"forward={self.forward!r} is not callable, wanted a function (model, *inputs).")
        if self.batches != "all" and not (_is_number(self.batches, int) and self.batches >= 1):  # type: ignore[operator]
            raise ValueError(f"batches={self.batches!r}, wanted a number of batches, 1 or more, or 'all'.")
        if not (_is_number(self.max_memory, int, float) and self.max_memory > 0):
            raise ValueError(f"max_memory={self.max_memory!r}, wanted a number of bytes above 0.")
        if not callable(self.target_std) and not _is_positive(self.target_std):
            raise ValueError(
                f"target_std={self.target_std!r}, wanted a number above 0, or a function of a layer's name."
            )
        if self.tol is not None and not _is_positive(self.tol):
            raise ValueError(f"tol={self.tol!r}, wanted a number above 0, or None.")
        if self.scope == "channel" and self.where == "activation":
            raise ValueError("scope='channel' and where='activation' do not go together: choose one of them.")

    def __call__(self, model: nn.Module, batches: Iterable[Any]) -> LSUVReport:
        """Initialise `model` on the first of `batches`, on as many as the option `batches` says, or on `data`, if given.

        Args:
            model: Changed in place. What `torch.compile` or a data-parallel wrapper made is unwrapped.
            batches: The model's inputs; a tuple holds several positional arguments.

        Returns:
            The report, a row a layer.

        Raises:
            InitError: A value is NaN or infinite, the batches do not vary, there is no weight layer, the model cannot be
                initialised (sharded, quantised, without values), or, if `strict`, a layer cannot be normalised.
            DataError: There is no batch, no sample in one, or there are fewer batches than wanted.
            TypeError: `model` or `data` is of the wrong type.
            ValueError: `layers` or `skip` names no weight layer.
        """
        model = unwrap(model)
        wanted = None if self.batches == "all" else int(self.batches)
        if self.data is not None:
            source, held, what = *from_data(self.data, self.inputs), "data"
        else:
            source, held, what = from_stage(batches, wanted), isinstance(batches, list), "batches"
        budget = int(min(self.max_memory, 2**62)) // 4
        found = Batches(source, wanted, _device(model), budget=budget, held=held, what=what)
        shown = self.verbose or bool(getattr(batches, "progress", False))
        return Engine(self, model, found, Bar("LSUV", shown)).run()


_CHOICES = {
    "strategy": ("auto", "lock-step", "streaming"),
    "scope": ("layer", "channel"),
    "where": ("output", "activation"),
    "mode": ("eval", "batch"),
}


def lsuv_(
    model: nn.Module,
    data: Any,
    *,
    inputs: Callable[[Any], Any] | None = None,
    batches: int | str = 1,
    strategy: str = "auto",
    max_memory: int = 2 * GIB,
    orthonormal: bool = False,
    center: bool = True,
    scope: str = "layer",
    target_std: float | Callable[[str], float] = 1.0,
    where: str = "output",
    mode: str = "eval",
    layers: Any = None,
    skip: Any = (),
    include_frozen: bool = False,
    forward: Callable[..., Any] | None = None,
    tol: float | None = None,
    verify: bool = True,
    strict: bool = False,
    verbose: bool = False,
) -> LSUVReport:
    """Give every weight layer of `model` an output of mean 0 and standard deviation 1 on `data`, in place.

    This is the stage `LSUV` as a function; its documentation says what is done, what each option does, and what each status
    of the report means.

    Args:
        model: Changed in place: the weights (each by a positive factor) and the biases of its weight layers.
        data: A tensor, a tuple (the model's positional arguments), a dict (its keyword arguments), or a loader or list of
            batches; the inputs of each are all but the last element, or what `inputs` picks.
        inputs: Picks the model's inputs (tensor, tuple or dict) out of a loader's batch.
        batches: How many batches to take statistics over: a number, or "all".
        strategy: How to go through several: "auto", "lock-step" or "streaming".
        max_memory: How many bytes lock-step may hold.
        orthonormal: Make the weights orthonormal first.
        center: Bring the mean to 0, too.
        scope: "layer" or "channel".
        target_std: The standard deviation that is wanted, or a function of the layer's name.
        where: "output" or "activation".
        mode: "eval" or "batch".
        layers: Normalise these only: types, names, globs, a predicate `(name, module)`, or a list of them.
        skip: Leave these as they are; likewise.
        include_frozen: Normalise frozen layers, too.
        forward: Called as `forward(model, *inputs)` where `model(*inputs)` would not do.
        tol: How far mean and standard deviation may be off.
        verify: Measure every layer in one more forward pass.
        strict: The first layer that cannot be normalised is an error.
        verbose: Show a bar while it takes long.

    Returns:
        The report, a row a layer, in order of execution.

    Raises:
        InitError: Nothing sensible can be done, as `LSUV` lists it; the model is as before.
        DataError: There is no batch, no sample in one, or there are fewer batches than wanted.
        TypeError: An argument is of the wrong type.
        ValueError: An argument has a value that it cannot have; `layers` or `skip` names no weight layer.

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
    stage = LSUV(
        data,
        inputs=inputs,
        batches=batches,
        strategy=strategy,
        max_memory=max_memory,
        orthonormal=orthonormal,
        center=center,
        scope=scope,
        target_std=target_std,
        where=where,
        mode=mode,
        layers=layers,
        skip=skip,
        include_frozen=include_frozen,
        forward=forward,
        tol=tol,
        verify=verify,
        strict=strict,
        verbose=verbose,
    )
    return stage(model, ())


def layer_stats(
    model: nn.Module,
    batch: Any,
    *,
    layers: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    batches: int | str = 1,
    forward: Callable[..., Any] | None = None,
) -> InitReport:
    """Measure mean µ and standard deviation σ of every weight layer's output, and change nothing.

    Measured is the first call of each layer, in evaluation mode, as `lsuv_` does it.

    Args:
        model: The model.
        batch: What to call it with; the same forms as `data` of `lsuv_`.
        layers: These only: types, names, globs, a predicate `(name, module)`, or a list of them.
        inputs: Picks the model's inputs out of a loader's batch.
        batches: How many batches of a loader to measure, as if they were one: a number, or "all".
        forward: Called as `forward(model, *inputs)` where `model(*inputs)` would not do.

    Returns:
        A report whose rows have `mean_before`, `std_before`, `signal_share`; printed, it is a table of layer, class, µ, σ.

    Raises:
        InitError: A value is NaN or infinite, the batch does not vary, or there is no weight layer.
        DataError: There is no batch, no sample in one, or there are fewer than wanted.
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
    _require(batch)
    LSUV(batch, inputs=inputs, batches=batches, forward=forward)  # the same arguments, checked in the same way
    model = unwrap(model)
    source, held = from_data(batch, inputs)
    wanted = None if batches == "all" else int(batches)
    found = Batches(source, wanted, _device(model), budget=GIB, held=held, what="batch")
    return measure_layers(model, found, layers, forward)


def _require(data: Any) -> None:
    if data is None:
        raise TypeError("data=None, wanted what the model is to be called with: a tensor, a tuple, a dict or a loader.")


def _device(model: nn.Module) -> torch.device:
    """Where the model is."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise InitError(f"the model ({type(model).__name__}) has no weight layer, it has no parameter at all.")
    return parameter.device


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value, int, float) and math.isfinite(value) and value > 0
