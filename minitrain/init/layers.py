"""What a weight layer is: finding them all, their parameters, and who else uses those."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minitrain.errors import InitError
from minitrain.hooks import select_modules

WEIGHT_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""The layers that LSUV normalises; their lazy forms and subclasses belong to them."""

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.PReLU)
_NO_LAYERS = (nn.Embedding, nn.EmbeddingBag, *_NORMS)  # a `weight`, but no matrix product


class Layer(NamedTuple):
    """A weight layer of a model.

    Attributes:
        name: Its dotted name.
        module: The module itself; for the input projection of an attention the attention.
        parent: The module that uses its weights without calling it, if there is one: naming that one names this one, too.
        problem: Why LSUV cannot handle it; empty if it can.
    """

    name: str
    module: nn.Module
    parent: nn.Module | None = None
    problem: str = ""

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__.removeprefix("Parametrized")

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter that scales the weight: itself, or what it is computed from (of weight norm the magnitude)."""
        return _parameter(self.module, "weight", "weight_g", "weight_orig")

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias; None if there is none, or none that can be shifted because it is computed from something else."""
        return self.module._parameters.get("bias")

    @property
    def is_affine(self) -> bool:
        """It is certain that the output is W x + b: torch's own class, untouched by hooks, patches or parametrisations."""
        module = self.module
        return (
            type(module) in WEIGHT_LAYERS
            and type(module._parameters.get("weight")) is nn.Parameter
            and getattr(module, "bias", None) is module._parameters.get("bias")
            and "forward" not in vars(module)
            and not module._forward_pre_hooks
            and not module._forward_hooks
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
            dot = f"{name}." if name else ""
            problem = "attention multiplies with this weight itself, without calling a layer"
            layers.append(Layer(f"{dot}in_proj", module, module, problem))
            layers.append(Layer(f"{dot}out_proj", module.out_proj, module, problem))
        elif isinstance(module, WEIGHT_LAYERS):
            layers.append(Layer(name, module))
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            layers.append(
                Layer(name, module, problem="the output of a recurrent layer does not follow its weights' scale")
            )
        elif not isinstance(module, _NO_LAYERS) and _is_matrix(module._parameters.get("weight")):
            layers.append(Layer(name, module, problem="LSUV does not know this class"))
    return layers


def unowned_parameters(model: nn.Module, layers: list[Layer]) -> tuple[str, ...]:
    """Names of the parameters of two or more dimensions that belong to no layer and no norm."""
    known = {module for layer in layers for module in layer.module.modules()}
    return tuple(
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if module not in known and not isinstance(module, _NORMS)
        for key, parameter in module._parameters.items()
        if _is_matrix(parameter)
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
    modules = set(select_modules(model, select).values())
    names = {layer.name for layer in layers if layer.module in modules or layer.parent in modules}
    if not names:
        raise ValueError(
            f"{argument}={select!r} picks no weight layer. There are {', '.join(repr(layer.name) for layer in layers)}; for "
            "all layers inside of a module write 'name.*'."
        )
    return names


def _is_matrix(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and (is_lazy(parameter) or parameter.ndim >= 2)


def _parameter(module: nn.Module, *names: str) -> nn.Parameter | None:
    for name in names:
        if module._parameters.get(name) is not None:
            return module._parameters[name]
    if nn.utils.parametrize.is_parametrized(module, names[0]):
        return _parameter(module.get_submodule(f"parametrizations.{names[0]}"), "original", "original0")
    return None


class Sharing:
    """Which parameters live in the same memory: tied ones, and views of one another.

    Args:
        model: The model, without lazy parameters that will be used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._extents: list[tuple[str, int, int, str]] = []  # device, first byte, the one behind the last, owner
        self._of: dict[int, tuple[str, int, int]] = {}
        for name, module in model.named_modules():
            owner = name.split(".parametrizations.")[0].removesuffix(".parametrizations")
            for parameter in module._parameters.values():
                if parameter is not None and not is_lazy(parameter) and parameter.numel():
                    place = (str(parameter.device), *_extent(parameter))
                    self._of[id(parameter)] = place
                    self._extents.append((*place, owner))

    def partners(self, parameter: nn.Parameter, name: str) -> list[str]:
        """The names of the other modules that hold (part of) this parameter of the layer `name`; no parents of it."""
        device, start, end = self._of.get(id(parameter), ("", 0, 0))
        owners = dict.fromkeys(o for d, s, e, o in self._extents if d == device and s < end and start < e)
        return [o for o in owners if o != name and o and not name.startswith(f"{o}.")]

    @property
    def sharers(self) -> set[str]:
        """The names of all modules that share a parameter with another one."""
        found: set[str] = set()
        last: tuple[str, int, int, str] | None = None
        for extent in sorted(self._extents):
            if last is not None and extent[0] == last[0] and extent[1] < last[2]:
                found |= {last[3], extent[3]}
            if last is None or extent[0] != last[0] or extent[2] > last[2]:
                last = extent
        return found


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte, and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile`, `DataParallel` and `DistributedDataParallel` make of it, if it can be changed.

    Raises:
        TypeError: This is no model, or none whose weights can be changed in place.
        InitError: The model is sharded, quantised, or has no values.
    """
    if isinstance(model, type):
        raise TypeError(f"model={model.__name__} is a class, wanted an instance: did you forget ()?")
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} (type={type(model).__name__}), wanted a torch.nn.Module.")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's OptimizedModule; importing it would import its compiler
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    for name, module in model.named_modules():
        _check_module(f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})", module)
    return model


def _check_module(which: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{which} is a ScriptModule, whose layers cannot be reached. Initialise first, then compile it."
        )
    kinds = {kind.__name__ for kind in type(module).__mro__}
    parameters = [p for p in module._parameters.values() if p is not None]
    if kinds & {"FullyShardedDataParallel", "FSDPModule"} or any(hasattr(p, "device_mesh") for p in parameters):
        raise InitError(
            f"{which} is sharded (FSDP, DTensor): no process sees a whole weight. Initialise before sharding."
        )
    home = type(module).__module__
    if (home.startswith("torch") and ".quantized" in home) or any(p.is_quantized for p in parameters):
        raise InitError(f"{which} is quantised: its weights cannot be scaled freely. Initialise before quantising.")
    if any(p.is_meta for p in parameters):
        raise InitError(
            f"{which} is on the meta device: its weights have no values. Call model.to_empty(device=...) and initialise "
            "its parameters first."
        )
