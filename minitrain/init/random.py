"""`Orthogonal`, `XavierNormal`, `KaimingNormal`, `Zero`: torch's initialisers as stages, over the weight layers of a model."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from minitrain.errors import DataError
from minitrain.init.forward import Forward, at_rest, has_lazy
from minitrain.init.inputs import from_inputs
from minitrain.init.layers import Layer, choose, find_layers
from minitrain.init.orthogonal import orthonormal_
from minitrain.init.report import InitReport, LayerRow
from minitrain.init.rollback import rolled_back_on_error
from minitrain.init.unwrap import unwrap
from minitrain.moments import moments


class _WeightStage(ABC):
    """What the stages of this file share: the selection of layers, what is left alone, the report.

    A subclass has the fields `layers`, `skip` and `include_frozen`, and says in `_fill` what a matrix becomes.
    """

    layers: Any
    skip: Any
    include_frozen: Any
    _done: ClassVar[str] = "drawn"
    _min_ndim: ClassVar[int] = 2  # a fan, or an orthonormal matrix, takes two dimensions

    def __post_init__(self) -> None:
        if not isinstance(self.include_frozen, bool):
            kind = type(self.include_frozen).__name__
            raise TypeError(f"include_frozen={self.include_frozen!r} (type={kind}), wanted True or False.")

    def __call__(self, model: nn.Module, batches: Iterable[Any] = ()) -> InitReport:
        """Initialise the weights of `model`, in place. If anything raises, the model is as it was.

        Args:
            model: Changed in place.
            batches: The model's inputs; needed only if it has lazy modules, which take their shapes from the first one.

        Returns:
            The report: mean and standard deviation of each weight before and after.

        Raises:
            DataError: There are lazy modules, and no batch.
            InitError: The model cannot be initialised (sharded, quantised, without values).
            TypeError: `model` is no module.
            ValueError: `layers` or `skip` names no weight layer.
        """
        start, name = time.perf_counter(), type(self).__name__
        model = unwrap(model)
        with rolled_back_on_error(model):
            forwards = _shape_lazy(model, batches, name)
            layers = [layer for layer in find_layers(model) if not layer.latent]
            chosen = choose(model, layers, self.layers, self.skip)
            weights = [(layer, _weight_of(layer)) for layer in layers]
            # where a weight lies, and the layer that decides on it; layers that are left out come first
            taken = {w.place: layer.name for layer, w in weights if layer.name not in chosen and isinstance(w, _Weight)}
            rows = tuple(self._treat(layer, weight, layer.name in chosen, taken) for layer, weight in weights)
        return InitReport(name, rows, forwards, time.perf_counter() - start, of="weights")

    @torch.no_grad()
    def _treat(self, layer: Layer, weight: _Weight | _NoWeight, chosen: bool, taken: dict[Any, str]) -> LayerRow:
        """Change a layer, or leave it as it is for a reason."""
        row = LayerRow(layer.name, layer.class_name, self._done)
        if not chosen:
            return replace(row, status="skipped", reason="left out by layers= or skip=", excused=True)
        if isinstance(weight, _NoWeight):
            return replace(row, status=weight.status, reason=weight.reason)
        if weight.matrix.ndim < self._min_ndim:
            return replace(row, status="unhandled", reason=f"its weight has {weight.matrix.ndim} dimension, no matrix")
        before = moments(weight.effective)
        row = replace(row, mean_before=before.mean, std_before=before.std, count=before.count)
        if not (self.include_frozen or all(p.requires_grad for p in weight.parameters)):
            return replace(row, status="frozen", reason="its weight does not require a gradient", excused=True)
        owner = taken.setdefault(weight.place, layer.name)
        if owner != layer.name:
            row = replace(row, status="tied", reason=f"its weight is shared with {owner!r}", excused=True)
            return self._finish(layer, row)
        self._change(weight)
        if weight.hook is not None:  # the old weight norm keeps its product until the next call
            setattr(layer.module, weight.hook.name, weight.effective)
        after = moments(weight.effective)
        return self._finish(layer, replace(row, mean_after=after.mean, std_after=after.std))

    def _change(self, weight: _Weight) -> None:
        self._fill(weight.outputs_first)
        if weight.magnitude is not None:  # the product is what was drawn
            weight.magnitude.copy_(torch.norm_except_dim(weight.matrix, 2, weight.norm_dim))

    @abstractmethod
    def _fill(self, matrix: Tensor) -> None:
        """Fill a writable view of a weight, the output's channels in dimension 0 and the input's in dimension 1."""

    def _finish(self, layer: Layer, row: LayerRow) -> LayerRow:
        """What is to be done, once a layer's weight is as it should be."""
        return row


@dataclass(frozen=True)
class Orthogonal(_WeightStage):
    """The init stage of Saxe et al.: weights are random matrices with orthonormal rows, or columns, times `gain`.

    It calls `torch.nn.init.orthogonal_` (which works on the weight as a matrix of `weight.shape[0]` rows) on the weight of each
    linear, bilinear and (transposed) convolutional layer, of each class that `register_layer` knows, and of the projections q,
    k, v and out of each attention, every block as a matrix of its own; in order of registration, from the global random
    generator. Half precision is drawn in float32 and rounded. Of weight norm direction and magnitude are set such that their
    product is what was drawn. Biases stay as they are.

    The statuses in the report:

    | status | meaning |
    |---|---|
    | drawn | the weight was drawn |
    | tied | the weight is shared with a layer that was drawn before, or that is left out |
    | frozen | the weight does not require a gradient; left as it is |
    | skipped | left out by `layers=` or `skip=` |
    | unhandled | recurrent, of an unknown class, or its weight is computed from other parameters; left as it is |
    | unreached | a lazy layer that the model did not call, and that has no shape |

    Args:
        gain: What the orthonormal matrix is multiplied with, such as `torch.nn.init.calculate_gain("relu")`.
        layers: These only: types, names (of a projection: "attn.q"), globs, a predicate `(name, module)`, or a list of them.
        skip: Leave these as they are; likewise.
        include_frozen: Draw weights that require no gradient, too.

    Raises:
        TypeError: `gain` is no number, or `include_frozen` is neither True nor False.
        ValueError: `gain` is not above 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from minitrain.init import Orthogonal
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> report = Orthogonal()(model)
        >>> torch.allclose(model[0].weight @ model[0].weight.T, torch.eye(4), atol=1e-6)
        True

    References:
        Andrew M. Saxe, James L. McClelland and Surya Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep
        linear neural networks", 2013, https://arxiv.org/abs/1312.6120
    """

    gain: float = 1.0
    layers: Any = None
    skip: Any = ()
    include_frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gain(self.gain)

    def _fill(self, matrix: Tensor) -> None:
        drawn = torch.empty_like(matrix, memory_format=torch.contiguous_format)  # torch wants it so
        orthonormal_(drawn, self.gain)
        matrix.copy_(drawn)


@dataclass(frozen=True)
class XavierNormal(_WeightStage):
    """The init stage of Glorot and Bengio: weights from a normal distribution, alike for the passes forward and backward.

    Their standard deviation is `gain * sqrt(2 / (fan_in + fan_out))`, by `torch.nn.init.xavier_normal_`. Which layers, in which
    order, and what the report says, is as of `Orthogonal`.

    Args:
        gain: A factor for what follows the layers, such as `torch.nn.init.calculate_gain("tanh")`.
        layers: These only: types, names (of a projection: "attn.q"), globs, a predicate `(name, module)`, or a list of them.
        skip: Leave these as they are; likewise.
        include_frozen: Draw weights that require no gradient, too.

    Raises:
        TypeError: `gain` is no number, or `include_frozen` is neither True nor False.
        ValueError: `gain` is not above 0.

    Example:
        >>> from torch import nn
        >>> from minitrain.init import XavierNormal
        >>> report = XavierNormal()(nn.Sequential(nn.Linear(150, 50), nn.Tanh(), nn.Linear(50, 10)))
        >>> round(report["0"].std_after, 2)  # (2 / (150 + 50)) ** 0.5
        0.1

    References:
        Xavier Glorot and Yoshua Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010,
        https://proceedings.mlr.press/v9/glorot10a.html
    """

    gain: float = 1.0
    layers: Any = None
    skip: Any = ()
    include_frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gain(self.gain)

    def _fill(self, matrix: Tensor) -> None:
        nn.init.xavier_normal_(matrix, self.gain)


@dataclass(frozen=True)
class KaimingNormal(_WeightStage):
    """The init stage of He et al.: weights from a normal distribution of standard deviation `gain / sqrt(fan)`.

    It calls `torch.nn.init.kaiming_normal_`. Which layers, in which order, and what the report says, is as of `Orthogonal`.

    Args:
        nonlinearity: What follows the layers; it gives the gain. One of the names of `torch.nn.init.calculate_gain`.
        mode: "fan_in" keeps the variance in the forward pass, "fan_out" in the backward pass.
        a: The negative slope, if `nonlinearity` is "leaky_relu".
        layers: These only: types, names (of a projection: "attn.q"), globs, a predicate `(name, module)`, or a list of them.
        skip: Leave these as they are; likewise.
        include_frozen: Draw weights that require no gradient, too.

    Raises:
        TypeError: `a` is no number, or `include_frozen` is neither True nor False.
        ValueError: An unknown `nonlinearity` or `mode`, or an `a` that is not finite.

    Example:
        >>> from torch import nn
        >>> from minitrain.init import KaimingNormal
        >>> model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
        >>> report = KaimingNormal()(model)
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
    skip: Any = ()
    include_frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("fan_in", "fan_out"):
            raise ValueError(f"mode={self.mode!r}, wanted 'fan_in' or 'fan_out'.")
        _check_number("a", self.a, "the negative slope of a leaky ReLU, such as a=0.1")
        try:
            nn.init.calculate_gain(self.nonlinearity, self.a)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"nonlinearity={self.nonlinearity!r}, wanted a name that torch.nn.init.calculate_gain knows, such as 'relu', "
                "'leaky_relu', 'tanh', 'selu' or 'linear'."
            ) from error

    def _fill(self, matrix: Tensor) -> None:
        nn.init.kaiming_normal_(matrix, self.a, self.mode, self.nonlinearity)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Zero(_WeightStage):
    """The init stage that makes the weights and biases of some layers 0: the last layer of a residual branch, say, or a head.

    A branch that ends in such a layer begins as if it were not there, and learns, since the gradient with respect to a weight
    does not depend on its own value. Of weight norm the magnitude becomes 0, the direction stays. What the report says is as
    of `Orthogonal`, with "zeroed" instead of "drawn". A frozen bias stays, and so does one that is computed: the reason says
    so.

    Args:
        layers: Types, names (of a projection: "attn.out_proj"), globs, a predicate `(name, module)`, or a list of them.
            Required: a net of which all weights are 0 does not learn.
        skip: Leave these as they are; likewise.
        include_frozen: Zero weights and biases that require no gradient, too.

    Raises:
        TypeError: `layers` is missing, or `include_frozen` is neither True nor False.

    Example:
        >>> from torch import nn
        >>> from minitrain.init import Zero
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [row.status for row in Zero(layers="2")(model)]
        ['skipped', 'zeroed']
    """

    layers: Any = None
    skip: Any = ()
    include_frozen: bool = False
    _done: ClassVar[str] = "zeroed"
    _min_ndim: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            raise TypeError(
                "layers=None, wanted the layers to zero, such as Zero(layers='head'): a net of which all weights are 0 does "
                "not learn."
            )

    def _change(self, weight: _Weight) -> None:
        self._fill(weight.matrix if weight.magnitude is None else weight.magnitude)  # a direction of 0 would give NaN

    def _fill(self, matrix: Tensor) -> None:
        matrix.zero_()

    def _finish(self, layer: Layer, row: LayerRow) -> LayerRow:
        bias = layer.bias
        if bias is None and layer.has_bias:
            return replace(row, reason="its bias is computed from other parameters: it stays", excused=False)
        if bias is not None and not (bias.parameter.requires_grad or self.include_frozen):
            return replace(row, reason="its bias is frozen: it stays", excused=True)
        if bias is not None:
            bias.tensor.zero_()
        return replace(row, excused=True)


class _NoWeight(NamedTuple):
    """Why a layer cannot be changed."""

    status: str
    reason: str


class _Weight(NamedTuple):
    """What of a layer is changed: a matrix, and of weight norm a magnitude besides."""

    matrix: Tensor
    output_dim: int
    parameters: tuple[nn.Parameter, ...]
    magnitude: nn.Parameter | None = None
    norm_dim: int = 0
    hook: WeightNorm | None = None

    @property
    def effective(self) -> Tensor:
        """The weight that the layer multiplies with."""
        if self.magnitude is None:
            return self.matrix
        return torch._weight_norm(self.matrix, self.magnitude, self.norm_dim)

    @property
    def outputs_first(self) -> Tensor:
        """A view as torch's initialisers want it: (outputs, inputs, ...). Elsewhere inputs come just before outputs."""
        dim = self.output_dim
        return self.matrix.movedim((dim, dim - 1), (0, 1)) if dim else self.matrix

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it lies in memory."""
        return self.matrix.device, self.matrix.data_ptr(), self.matrix.numel()


def _weight_of(layer: Layer) -> _Weight | _NoWeight:
    """The weight of a layer as something that can be drawn, or why it cannot."""
    kind, module = layer.kind, layer.module
    if kind is None:
        recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        why = "a recurrent layer" if recurrent else "its class is unknown (teach it by register_layer)"
        return _NoWeight("unhandled", why)
    if layer.weight is None:
        return _NoWeight("unhandled", "it has no weight, or one that is computed from other parameters")
    parameter = layer.weight.parameter
    if isinstance(parameter, nn.UninitializedParameter):
        return _NoWeight("unreached", "never called: it has no shape")
    # of transposed convolutions, (in, out / groups, ...), torch's initialisers have a fan of their own
    dim = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else kind.weight_dim
    plain = layer.parent is not None or module._parameters.get(kind.weight) is parameter
    found = _Weight(layer.weight.tensor, dim, (parameter,)) if plain else _weight_norm(module, kind.weight, dim)
    if found is None:
        return _NoWeight("unhandled", "its weight is computed from other parameters")
    if not found.matrix.is_floating_point() or not found.matrix.numel():
        return _NoWeight("unhandled", "its weight is empty, or no floating-point tensor")
    ndim = found.matrix.ndim
    if not -ndim <= dim < max(ndim, 1):
        return _NoWeight("unhandled", f"registered with weight_dim={dim}, but its weight has {ndim} dimensions")
    return found._replace(output_dim=dim % ndim if ndim else 0)


def _weight_norm(module: nn.Module, name: str, output_dim: int) -> _Weight | None:
    """The weight of torch's weight norm, in its two forms; None where it is computed in another way."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            g, v = module.get_parameter(f"{name}_g"), module.get_parameter(f"{name}_v")
            return _Weight(v, output_dim, (g, v), g, hook.dim, hook)
    if nn.utils.parametrize.is_parametrized(module, name):
        steps = module.get_submodule(f"parametrizations.{name}")
        norm = steps._modules.get("0")
        if isinstance(norm, _WeightNorm) and len(steps._modules) == 1:
            g, v = steps.get_parameter("original0"), steps.get_parameter("original1")
            return _Weight(v, output_dim, (g, v), g, norm.dim)
    return None


def _shape_lazy(model: nn.Module, batches: Iterable[Any], stage: str) -> int:
    """Give lazy modules their shapes; how many forward passes that took."""
    if not has_lazy(model):
        return 0
    for batch in batches:
        inputs = from_inputs(batch)
        inputs.check()
        with at_rest(model):
            Forward(model)(inputs)
        return 1
    raise DataError(
        f"the model has lazy modules, which take their shapes from a first batch, and batches holds none. Pass one: "
        f"{stage}(...)(model, [x])."
    )


def _check_number(name: str, value: Any, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted {wanted}.")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r}, wanted {wanted}.")


def _check_gain(gain: Any) -> None:
    wanted = (
        "a number above 0, such as torch.nn.init.calculate_gain('relu'); for weights of 0 there is Zero(layers=...)"
    )
    _check_number("gain", gain, wanted)
    if gain <= 0:
        raise ValueError(f"gain={gain!r}, wanted {wanted}.")
