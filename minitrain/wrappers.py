"""`inner`: the model inside of what torch has wrapped around it."""

from __future__ import annotations

from typing import Any

from torch import nn


def inner(model: Any) -> Any:
    """The model inside of what `torch.compile`, `DataParallel` and `DistributedDataParallel` make of it.

    Its names are those that the user gave, without `module.` or `_orig_mod.` before them. What is not wrapped, and what is no
    module, is returned as it is.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> inner(nn.DataParallel(model)) is model
        True
    """
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's OptimizedModule; importing it would import its compiler
            model = model._orig_mod
        else:
            break
    return model
