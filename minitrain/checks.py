"""Argument checks: which argument, what it was, what was wanted, what to do. Nothing is changed before they have passed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from minitrain.callback import Callback
from minitrain.data import DataLoaders
from minitrain.errors import DataError
from minitrain.optim import check_parameters
from minitrain.passes import loader_length


def check_model(model: Any) -> None:
    """A module, not its class, with something to train."""
    if inspect.isclass(model):
        raise TypeError(f"model={model.__name__} is a class, wanted an instance: did you forget ()?")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} (type={type(model).__name__}) is not a torch.nn.Module.")
    parameters = list(model.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"model={type(model).__name__}: all of its {len(parameters)} parameters are frozen, nothing could be trained. "
            "Set requires_grad_(True) on those that should be."
        )


def check_dls(dls: Any) -> None:
    """A `DataLoaders`."""
    if not isinstance(dls, DataLoaders):
        raise TypeError(
            f"dls={type(dls).__name__}, wanted DataLoaders(train, valid): dls=DataLoaders(train_loader, None)."
        )


def check_not_empty(dl: Any, which: str) -> None:
    """A loader that knows its length has at least one batch."""
    if loader_length(dl) == 0:
        raise DataError(
            f"the {which} loader ({type(dl).__name__}) is empty. drop_last=True with fewer samples than a batch?"
        )


def check_bool(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted True or False.")


def check_function(name: str, value: Any, *, module_class_hint: bool = False) -> None:
    """Something to call; a loss class that somebody forgot to instantiate is told apart."""
    if module_class_hint and inspect.isclass(value):
        raise TypeError(f"{name}={value.__name__} is a class, wanted an instance or a function: did you forget ()?")
    if not callable(value):
        raise TypeError(f"{name}={value!r} (type={type(value).__name__}) is not callable.")


def check_lr(name: str, lr: Any) -> None:
    """None, or a positive finite number."""
    if lr is None:
        return
    if isinstance(lr, bool) or not isinstance(lr, Real):
        raise TypeError(f"{name}={lr!r} (type={type(lr).__name__}), wanted a positive number.")
    if not (math.isfinite(lr) and float(lr) > 0):
        raise ValueError(f"{name}={lr!r}, wanted a positive finite number, for example {name}=1e-3.")


def check_optimizer(opt_func: Any, lr: Any, splitter: Any, model: nn.Module, loss_func: Any) -> None:
    """A callable, or a ready optimiser over the model's own parameters with neither `lr` nor `splitter` beside it."""
    check_lr("lr", lr)
    if splitter is not None:
        check_function("splitter", splitter)
    if isinstance(opt_func, Optimizer):
        for name, value in (("lr", lr), ("splitter", splitter)):
            if value is not None:
                raise TypeError(
                    f"{name}={value!r} beside a ready optimiser ({type(opt_func).__name__}), which has its own. Leave {name} "
                    f"out, or pass the class: opt_func=torch.optim.{type(opt_func).__name__}."
                )
        check_parameters(opt_func, [m for m in (model, loss_func) if isinstance(m, nn.Module)])
    elif opt_func is not None:
        check_function("opt_func", opt_func)


def check_callbacks(cbs: Any, where: str = "cbs") -> list[Callback]:
    """A list of callback instances, each with a state key of its own."""
    if isinstance(cbs, Callback) or inspect.isclass(cbs):
        raise TypeError(f"{where}={cbs!r}, wanted a list: {where}=[...].")
    if not isinstance(cbs, Iterable):
        raise TypeError(f"{where}={cbs!r} (type={type(cbs).__name__}), wanted a list of callbacks.")
    callbacks, keys = list(cbs), dict[str, int]()
    for i, cb in enumerate(callbacks):
        if inspect.isclass(cb) and issubclass(cb, Callback):
            raise TypeError(f"{where}[{i}]={cb.__name__} is a class, wanted an instance: did you forget ()?")
        if not isinstance(cb, Callback):
            raise TypeError(f"{where}[{i}]={cb!r} (type={type(cb).__name__}) is not a minitrain.Callback.")
        key = state_key(cb)
        if key in keys:
            both = f"{where}[{keys[key]}] and {where}[{i}]"
            if callbacks[keys[key]] is cb:
                raise ValueError(f"{both} are the same {type(cb).__name__}: remove one.")
            raise ValueError(
                f"{both} have the same state_key={key!r}: their states could not be told apart. Remove one; or, if both are "
                f"meant, give one of them a name of its own: callback.state_key = {key + '2'!r}."
            )
        keys[key] = i
    return callbacks


def state_key(cb: Callback) -> str:
    """The name under which a checkpoint keeps the state of `cb`."""
    return cb.state_key if cb.state_key is not None else type(cb).__name__


def check_stages(init: Any) -> list[Callable[..., Any]]:
    """None, an init stage, or a list of stages: always as a list."""
    if isinstance(init, str):
        raise TypeError(f"init={init!r} (type=str) is not callable, wanted a stage: init=LSUV().")
    stages = [] if init is None else list(init) if isinstance(init, Sequence) else [init]
    for stage in stages:
        check_function("init", stage, module_class_hint=True)
    return stages


def check_device(device: Any) -> torch.device | None:
    """None, or something that torch takes for a device."""
    if device is None:
        return None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device, wanted for example 'cpu' or 'cuda:0'.") from error


def check_seed(seed: Any) -> None:
    """None, or an integer that python, numpy and torch all take."""
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed={seed!r} (type={type(seed).__name__}), wanted an integer.")
    if not 0 <= int(seed) < 2**32:
        raise ValueError(f"seed={seed!r}, wanted 0 <= seed < 2**32 (numpy takes no other).")


def check_n_epochs(n_epochs: Any) -> None:
    """A positive integer."""
    if isinstance(n_epochs, bool) or not isinstance(n_epochs, Integral):
        raise TypeError(f"n_epochs={n_epochs!r} (type={type(n_epochs).__name__}), wanted a positive integer.")
    if n_epochs <= 0:
        raise ValueError(f"n_epochs={n_epochs!r}, wanted at least 1.")


def check_loss(loss: Any) -> None:
    """A scalar floating-point tensor."""
    if not isinstance(loss, torch.Tensor):
        raise TypeError(
            f"the loss is {loss!r} (type={type(loss).__name__}), wanted a scalar tensor: loss_func must not call .item() or "
            "convert it."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}, wanted a scalar: reduce it in loss_func, for example "
            "reduction='mean'."
        )
    if not loss.is_floating_point():
        raise TypeError(f"the loss has dtype={loss.dtype}, wanted a floating-point scalar that can be differentiated.")


def check_differentiable(loss: Any) -> None:
    """A loss that leads back to a parameter."""
    check_loss(loss)
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no gradient: it depends on no parameter with requires_grad=True. Is it detached, computed under "
            "no_grad, made by torch.tensor(...), or is every layer that it uses frozen?"
        )
