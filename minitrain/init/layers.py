"""`Layer`: a weight and a bias with an output of their own, and where they are found in a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minitrain.hooks import select_modules
from minitrain.init.kinds import WEIGHT_LAYERS, Kind, kind_of

_FORWARDS: dict[type[nn.Module], Any] = {
    cls: cls.forward for cls in WEIGHT_LAYERS
}  # as they are now: somebody may patch them
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.PReLU)
_NO_LAYERS = (nn.Embedding, nn.EmbeddingBag, *_NORMS)  # a `weight`, but no matrix product


@dataclass(frozen=True)
class Part:
    """A parameter, or some rows of it: what a layer scales or shifts."""

    parameter: nn.Parameter
    rows: slice | None = None

    @property
    def tensor(self) -> Tensor:
        """What can be written to; a view, where it is some rows only."""
        return self.parameter if self.rows is None else self.parameter.detach()[self.rows]


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight layer of a model.

    Attributes:
        name: Its dotted name; of attention's projections `<attention>.q`, `.k`, `.v` and `.out_proj`.
        module: The module that holds the parameters.
        owner: The dotted name of that module.
        kind: Under which names it holds them; None for a class that LSUV does not know.
        calls_module: Its output is what the module puts out. Otherwise it is what a function makes of the weight, which the
            model calls by itself.
        parent: The module that uses its weights without calling it, if there is one: naming that one names this one, too.
        problem: Why LSUV cannot handle it, unless the model calls a function with its weight; empty if it can.
        weight: What scales the output: the weight, or what it is computed from (of weight norm the magnitude).
        bias: What shifts it; None if there is none, or none that can be shifted because it is computed from something else.
        latent: Only a parameter with two or more dimensions: a layer once a function multiplies with it.
    """

    name: str
    module: nn.Module
    owner: str
    kind: Kind | None = None
    calls_module: bool = True
    parent: nn.Module | None = None
    problem: str = ""
    weight: Part | None = None
    bias: Part | None = None
    latent: bool = False

    @property
    def class_name(self) -> str:
        """The name of its class."""
        return type(self.module).__name__.removeprefix("Parametrized")

    @property
    def has_bias(self) -> bool:
        """There is a bias, even if it is computed."""
        if self.bias is not None or self.kind is None:
            return self.bias is not None
        return getattr(self.module, self.kind.bias, None) is not None

    @property
    def matrix(self) -> Part | None:
        """The weight matrix itself; of weight norm its direction. None where it is computed in another way."""
        if self.weight is None:
            return None
        name = self.kind.weight if self.kind else "weight"
        if not self.calls_module or self.module._parameters.get(name) is self.weight.parameter:
            return self.weight if self.weight.parameter.ndim >= 2 else None
        direction = _parameter(self.module, (f"{name}_v",), "original1", name)
        return None if direction is None else Part(direction)

    @property
    def is_affine(self) -> bool:
        """It is certain that the output is W x + b: torch's own class, untouched by hooks, patches or parametrisations."""
        module = self.module
        return not self.calls_module or (
            type(module) in WEIGHT_LAYERS
            and type(module._parameters.get("weight")) is nn.Parameter
            and getattr(module, "bias", None) is module._parameters.get("bias")
            and "forward" not in vars(module)
            and not module._forward_pre_hooks
            and not module._forward_hooks
            and type(module).forward is _FORWARDS.get(type(module))
            and not (nn.modules.module._global_forward_pre_hooks or nn.modules.module._global_forward_hooks)
        )


def find_layers(model: nn.Module) -> list[Layer]:
    """Every weight layer of a model, those that LSUV cannot handle included, in order of registration."""
    layers: list[Layer] = []
    by_attention: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in by_attention:
            continue
        if isinstance(module, nn.MultiheadAttention):
            by_attention.add(module.out_proj)
            layers += _projections(name, module)
        elif (kind := kind_of(module)) is not None:
            weight = _parameter(
                module, (kind.weight, f"{kind.weight}_g", f"{kind.weight}_orig"), "original0", kind.weight
            )
            bias = module._parameters.get(kind.bias)
            layers.append(Layer(name, module, name, kind, weight=_part(weight), bias=_part(bias)))
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            problem = "the output of a recurrent layer does not follow its weights' scale"
            layers.append(Layer(name, module, name, calls_module=False, problem=problem))
        elif not isinstance(module, _NO_LAYERS):
            layers += _functional(name, module)
    return layers


def _projections(name: str, module: nn.MultiheadAttention) -> Iterable[Layer]:
    """The input projections of an attention, three blocks of one parameter or three parameters, and the output's."""
    dot = f"{name}." if name else ""
    problem = "a function of torch that LSUV does not follow multiplies with this weight"
    size = module.embed_dim
    packed, bias = module._parameters.get("in_proj_weight"), module._parameters.get("in_proj_bias")
    for i, which in enumerate("qkv"):
        rows = slice(i * size, (i + 1) * size)
        own = module._parameters.get(f"{which}_proj_weight")
        weight = Part(packed, rows) if packed is not None else _part(own)
        yield Layer(
            f"{dot}{which}",
            module,
            name,
            Kind("in_proj_weight", "in_proj_bias"),
            calls_module=False,
            parent=module,
            problem=problem,
            weight=weight,
            bias=None if bias is None else Part(bias, rows),
        )
    out = module.out_proj
    yield Layer(
        f"{dot}out_proj",
        out,
        f"{dot}out_proj",
        Kind(),
        calls_module=False,
        parent=module,
        problem=problem,
        weight=_part(out._parameters.get("weight")),
        bias=_part(out._parameters.get("bias")),
    )


def _functional(name: str, module: nn.Module) -> Iterable[Layer]:
    """Matrices of a class that LSUV does not know: layers, if a function of torch multiplies with them."""
    for key, parameter in module._parameters.items():
        if _is_matrix(parameter):
            known = key == "weight"
            yield Layer(
                name if known else f"{name}.{key}" if name else key,
                module,
                name,
                calls_module=False,
                problem="LSUV does not know this class (teach it by register_layer)",
                weight=_part(parameter),
                latent=not known,
            )


def unowned_parameters(model: nn.Module, layers: Iterable[Layer]) -> tuple[str, ...]:
    """Names of the parameters of two or more dimensions that belong to none of `layers`, and to no norm."""
    owning = [layer for layer in layers if layer.kind is not None or layer.weight is None]  # with all that is in them
    known = {module for layer in owning for module in layer.module.modules()}
    used = {id(layer.weight.parameter) for layer in layers if layer.weight is not None}
    return tuple(
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if module not in known and not isinstance(module, _NORMS)
        for key, parameter in module._parameters.items()
        if _is_matrix(parameter) and id(parameter) not in used
    )


def choose(model: nn.Module, layers: list[Layer], only: Any, skip: Any = ()) -> set[str]:
    """The names of the layers that the arguments `layers` (None: all) and `skip` leave.

    Raises:
        ValueError: One of them picks no weight layer.
    """
    chosen = {layer.name for layer in layers} if only is None else _selected(model, layers, only, "layers")
    empty = skip is None or (isinstance(skip, (list, tuple, set, frozenset)) and not skip)
    return chosen if empty else chosen - _selected(model, layers, skip, "skip")


def _selected(model: nn.Module, layers: list[Layer], select: Any, argument: str) -> set[str]:
    names: set[str] = set()
    for part in list(select) if isinstance(select, (list, tuple, set, frozenset)) else [select]:
        own = {layer.name for layer in layers if isinstance(part, str) and fnmatchcase(layer.name, part)}
        try:
            modules = set(select_modules(model, part).values())
        except ValueError as error:
            if not own:  # attention's "q", say, is a layer and no module
                raise ValueError(str(error).replace("select=", f"{argument}=", 1)) from None
            modules = set()
        names |= own | {layer.name for layer in layers if layer.module in modules or layer.parent in modules}
    if not names:
        known = ", ".join(repr(layer.name) for layer in layers if not layer.latent)
        raise ValueError(
            f"{argument}={select!r} picks no weight layer. There are {known}; for all layers inside of a module write "
            "'name.*'."
        )
    return names


def _is_matrix(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and (is_lazy(parameter) or parameter.ndim >= 2)


def _part(parameter: nn.Parameter | None) -> Part | None:
    return None if parameter is None else Part(parameter)


def _parameter(module: nn.Module, names: Iterable[str], original: str, parametrized: str) -> nn.Parameter | None:
    """The first parameter of these names; of a parametrised one its original (of several: the one of that name)."""
    for name in names:
        if module._parameters.get(name) is not None:
            return module._parameters[name]
    if nn.utils.parametrize.is_parametrized(module, parametrized):
        table = module.get_submodule(f"parametrizations.{parametrized}")._parameters
        found = table.get(original)
        return table.get("original") if found is None else found
    return None
