"""The optimiser of a run: how it is built from what the user gave, and a learning rate for one fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices with a fused kernel, for floating-point parameters

Splitter = Callable[[nn.Module], Iterable[Any]]


def build_optimizer(
    model: nn.Module,
    opt_func: Optimizer | Callable[..., Optimizer] | None = None,
    lr: float | None = None,
    splitter: Splitter | None = None,
) -> Optimizer:
    """Build the optimiser over all parameters of the model, frozen ones too (they may be thawed later).

    Args:
        model: Whose parameters are trained.
        opt_func: Called as `opt_func(params, lr=lr)`, or `opt_func(params)` without `lr`, exactly as given. A ready
            optimiser is taken as it is. None: AdamW, fused where the parameters allow it.
        lr: The learning rate, or None for the optimiser's own default.
        splitter: `splitter(model)` returns parameter groups.

    Returns:
        The optimiser.

    Raises:
        TypeError: `opt_func` returned something that is no optimiser.
        ValueError: The optimiser holds parameters that are not the model's.

    Example:
        >>> build_optimizer(nn.Linear(2, 1), torch.optim.SGD, lr=0.1).param_groups[0]["lr"]
        0.1
    """
    if isinstance(opt_func, Optimizer):
        return opt_func
    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    if opt_func is None:
        # torch itself finds out only at the first step
        fused = all(p.is_floating_point() and p.device.type in _FUSED for p in model.parameters())
        opt_func = partial(torch.optim.AdamW, fused=fused or None)
    opt = opt_func(list(model.parameters() if splitter is None else splitter(model)), **options)
    if not all(hasattr(opt, name) for name in ("step", "zero_grad", "param_groups", "state_dict")):
        raise TypeError(f"opt_func returned {opt!r}, wanted an optimiser (as torch.optim.AdamW returns).")
    return opt


def check_parameters(opt: Optimizer, modules: Iterable[nn.Module]) -> None:
    """Raise `ValueError` if `opt` holds a parameter that none of the modules owns."""
    known = {id(p) for module in modules for p in module.parameters()}
    foreign = [p for group in opt.param_groups for p in group["params"] if id(p) not in known]
    if foreign:
        shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:4])
        raise ValueError(
            f"opt_func={type(opt).__name__} holds {len(foreign)} parameters that are not the model's (shapes {shapes}): it "
            "would train something else. Build it from this model's parameters, or pass the class: opt_func=torch.optim.AdamW."
        )


@contextmanager
def learning_rate(opt: Optimizer, lr: float | None) -> Iterator[None]:
    """Set the learning rate of every group inside, and put the old ones back on exit. None: leave them alone."""
    if lr is None:
        yield
        return
    before = [rate_of(group) for group in opt.param_groups]
    if None in before:
        raise ValueError(
            f"lr={lr!r}, but {type(opt).__name__} has a parameter group without a learning rate. Leave lr out."
        )
    try:
        _set_rates(opt, [lr] * len(before))
        yield
    finally:
        _set_rates(opt, before)


def rate_of(group: dict[str, Any]) -> float | None:
    """The learning rate of a parameter group; None where the optimiser finds its own."""
    rate = group.get("lr")
    return None if rate is None else float(rate)


def _set_rates(opt: Optimizer, rates: list[Any]) -> None:
    for group, rate in zip(opt.param_groups, rates, strict=False):  # a callback may have added groups
        if isinstance(group["lr"], torch.Tensor):  # a compiled step reads the rate from this very tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
