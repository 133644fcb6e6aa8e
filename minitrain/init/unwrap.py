"""`unwrap`: the model inside of what others have wrapped around it, refused where its weights cannot be changed."""

from __future__ import annotations

import torch
from torch import nn

from minitrain.errors import InitError
from minitrain.wrappers import inner


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile`, `DataParallel` and `DistributedDataParallel` make of it, if it can be changed.

    Raises:
        TypeError: This is no model, or none whose weights can be changed in place.
        InitError: The model is sharded, quantised, or has no values.
    """
    if isinstance(model, type):
        raise TypeError(f"model={model.__name__} is a class, wanted an instance: did you forget ()?")
    model = inner(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} (type={type(model).__name__}), wanted a torch.nn.Module.")
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
