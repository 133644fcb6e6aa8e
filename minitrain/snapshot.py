"""`snapshot`: everything that a checkpoint holds of a Learner."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minitrain.callback import Callback
from minitrain.checks import state_key
from minitrain.fingerprint import fingerprint, versions
from minitrain.optimizer_state import optimizer_state, parameter_names
from minitrain.preserve import loader_generators
from minitrain.random_states import RandomState
from minitrain.skip import loader_state
from minitrain.wrappers import inner

if TYPE_CHECKING:
    from minitrain.learner import Learner


def snapshot(learn: Learner) -> dict[str, Any]:
    """The state of a Learner as nested plain values; its tensors are the living ones, nothing is copied.

    Returns:
        A dict of `versions`, `position` (None where a run could not go on from here), `initialized`, `fingerprint`, `model`,
        `hidden_buffers` (those that are not persistent), `loss_func`, `optimizers`, `scaler`, `frozen` (names of parameters),
        `grads` (those that wait for a step), `callbacks`, `history`, `rng`.
    """
    names = parameter_names(learn.model, learn.loss_func)
    opts = {"opt": learn._opt, **{f"opts.{name}": opt for name, opt in learn.opts.items()}}
    loss = loss_module(learn)
    states = {state_key(cb): _state_of(cb) for cb in learn.cbs if keeps_state(cb)}
    position = _position(learn)
    return {
        "versions": versions(learn.device),
        "position": position,
        "counters": {"fits": learn._fits, "epochs_begun": learn._epochs_begun},
        "initialized": learn.initialized or not learn._init,
        "fingerprint": _fingerprint(learn),
        "model": inner(learn.model).state_dict(),
        "hidden_buffers": {name: buffer for name, _, _, buffer in hidden_buffers(learn.model)},
        "loss_func": loss.state_dict(),
        "hidden_loss_buffers": {name: buffer for name, _, _, buffer in hidden_buffers(loss)},
        "optimizers": {key: _optimizer(learn, key, opt, names) for key, opt in opts.items() if opt is not None},
        "scaler": None if learn.scaler is None else learn.scaler.state_dict(),
        "frozen": [name for p, name in names.items() if not p.requires_grad],
        "grads": {} if position is None else {n: _dense(p.grad) for p, n in names.items() if p.grad is not None},
        "callbacks": states,
        "history": list(learn.history),
        "rng": RandomState(loader_generators(learn.dls.train)).state_dict(),
    }


def _optimizer(learn: Learner, key: str, opt: Any, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Its state, and in the midst of a fit also what its groups will be given back when that ends."""
    at_rest = {"at_rest": learn._groups_at_rest} if key == "opt" and learn.phase == "fit" else {}
    return optimizer_state(opt, names) | at_rest


def loss_module(learn: Learner) -> nn.Module:
    """The loss, if it is a module; else an empty one."""
    return learn.loss_func if isinstance(learn.loss_func, nn.Module) else nn.Module()


def _dense(grad: Tensor) -> Any:
    """A gradient as a file can hold it: of a sparse one its parts."""
    if grad.layout is not torch.sparse_coo:
        return grad
    parts = {"indices": grad._indices(), "values": grad._values(), "shape": list(grad.shape)}
    return parts | {"is_coalesced": grad.is_coalesced()}


def keeps_state(cb: Callback) -> bool:
    """Whether a callback gives a state to a checkpoint."""
    return type(cb).state_dict is not Callback.state_dict or "state_dict" in vars(cb)


def _state_of(cb: Callback) -> dict[str, Any]:
    try:
        return cb.state_dict()
    except Exception as error:
        error.add_note(f"{type(cb).__name__}.state_dict")
        raise


def _fingerprint(learn: Learner) -> dict[str, Any]:
    """That of the present fit is made once: to look at the data takes longer than a step of a small net."""
    if learn.phase is None:
        return fingerprint(learn, learn._lr)
    if learn._fingerprint is None:
        learn._fingerprint = fingerprint(learn, learn._lr)
    return learn._fingerprint


def _position(learn: Learner) -> dict[str, Any] | None:
    """Where the run goes on: after so many epochs, and so many batches of the next one."""
    if learn.position is None or learn.phase in ("validate", "predict"):
        return None
    epoch, batch = learn.position
    if batch and learn.rng_of_epoch is None:
        return None
    position: dict[str, Any] = {
        "epoch": epoch,
        "batch": batch,
        "step": learn.step_idx,
        "batch_idx": learn.batch_idx,
        "n_epochs": learn.n_epochs,
        "is_over": learn.phase is None,
        "stop_reason": learn.stop_reason,
    }
    if learn.rng_of_epoch is not None:
        position["loader"] = loader_state(learn.dls.train)
    if batch:
        position |= {
            "seconds": time.perf_counter() - learn._began,
            "running_loss": learn.running_loss.state_dict(),
            "rng_of_epoch": learn.rng_of_epoch.state_dict() if learn.rng_of_epoch else None,
        }
    return position


def hidden_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
    """The buffers that a `state_dict` leaves out, by name, each with its module and its name there."""
    for prefix, module in inner(model).named_modules():
        for name in sorted(module._non_persistent_buffers_set & set(module._buffers)):
            buffer = module._buffers[name]
            if buffer is None or not is_lazy(buffer):
                yield f"{prefix}.{name}" if prefix else name, module, name, buffer
