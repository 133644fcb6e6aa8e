"""`snapshot`: everything that a checkpoint holds of a Learner, and how weights and optimisers come back, all or nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minitrain.callback import Callback
from minitrain.checks import state_key
from minitrain.errors import CheckpointError
from minitrain.fingerprint import fingerprint, versions
from minitrain.optimizer_state import (
    load_optimizer,
    optimizer_differences,
    optimizer_state,
    parameter_names,
)
from minitrain.preserve import Buffers, loader_generators
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


def gradient(saved: Any, p: nn.Parameter) -> Tensor:
    """What `snapshot` has kept of the gradient of `p`."""
    if isinstance(saved, Mapping):
        parts = saved["indices"].to(p.device), saved["values"].to(p.device), tuple(saved["shape"])
        sparse = torch.sparse_coo_tensor(*parts, check_invariants=True)
        return sparse._coalesced_(bool(saved["is_coalesced"]))
    if saved.shape != p.shape or saved.dtype != p.dtype:
        raise ValueError(f"a gradient is {saved.dtype} {tuple(saved.shape)} for {p.dtype} {tuple(p.shape)}")
    grad: Tensor = saved.to(p.device, copy=True)
    return grad


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


# -- weights ----------------------------------------------------------------------------------------------------------


def model_differences(module: Any, saved: Any, what: str = "the model") -> list[str]:
    """Why the tensors of a file do not fit a module: what is missing, unexpected, or of another shape, a sentence each."""
    if not isinstance(saved, Mapping):
        return [f"the state of {what} is {saved!r:.40} in place of tensors by name"]
    own = inner(module).state_dict()
    missing, unexpected = [n for n in own if n not in saved], [n for n in saved if n not in own]
    found = [f"missing in the file: {listed(missing)}"] if missing else []
    found += [f"unexpected in the file, since {what} has no such names: {listed(unexpected)}"] if unexpected else []
    forms = {n: (_form(saved[n]), _form(own[n])) for n in own if n in saved and not is_lazy(own[n])}
    wrong = [f"{name!r} is {a} in the file and {b} here" for name, (a, b) in forms.items() if a != b]
    return found + ([f"of another form: {listed(wrong, quote=False)}"] if wrong else [])


def load_model(module: Any, saved: Mapping[str, Any], hidden: Mapping[str, Any]) -> None:
    """Copy what fits into a module's parameters and buffers, in place."""
    inner(module).load_state_dict(fitting(module, saved), strict=False)
    for name, owner, key, buffer in list(hidden_buffers(module)):
        if name in hidden:
            _set_buffer(owner, key, buffer, hidden[name])


def fitting(module: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file a module can take: by name, and by shape."""
    own = inner(module).state_dict()
    return {name: value for name, value in saved.items() if name in own and _fits(value, own[name])}


def _set_buffer(owner: nn.Module, key: str, buffer: Tensor | None, value: Any) -> None:
    if value is None or buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
        device = next((t.device for t in (buffer, *owner.parameters(), *owner.buffers()) if t is not None), None)
        owner._buffers[key] = None if value is None else value.to(device, copy=True)
    else:
        with torch.no_grad():
            buffer.copy_(value)


def _form(value: Any) -> str:
    """Dtype and shape of a tensor; of extra state the owner must judge."""
    return (
        f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"
    )


def _fits(saved: Any, own: Any) -> bool:
    """Whether it can be copied: of the same shape, and nothing complex into something real."""
    if not isinstance(own, Tensor) or not isinstance(saved, Tensor):
        return isinstance(own, Tensor) == isinstance(saved, Tensor)
    return is_lazy(own) or (saved.shape == own.shape and (own.is_complex() or not saved.is_complex()))


def listed(things: list[str], quote: bool = True) -> str:
    """The first ten of some names, and how many there are besides."""
    texts = [repr(thing)[:80] if quote else thing for thing in things[:10]]
    return ", ".join(texts) + (f" and {len(things) - 10} more" if len(things) > 10 else "")


# -- all or nothing ---------------------------------------------------------------------------------------------------

# The counters of a Learner, which a fit that has trained on nothing leaves as they were.
COUNTERS: tuple[str, ...] = (
    "_fits",
    "_epochs_begun",
    "position",
    "epoch",
    "step_idx",
    "batch_idx",
    "n_epochs",
    "stop_reason",
    "resumed",
)
COUNTERS += ("running_loss", "rng_of_epoch", "_lr", "_groups_at_rest")


class Undo:
    """What is needed to put a Learner back to where it was: weights, buffers, optimisers, scaler, history, counters."""

    def __init__(self, learn: Learner) -> None:
        self._learn = learn
        self._own = {name: getattr(learn, name) for name in (*COUNTERS, "_opt", "initialized")}
        self._history = list(learn.history)
        modules = [learn.model, loss_module(learn)]
        self._modules = [(inner(m), _copied(inner(m).state_dict())) for m in modules]
        self._buffers = [Buffers(m) for m in modules]
        self._parameters = [(p, p.grad, p.requires_grad) for m in modules for p in m.parameters()]
        ready = learn._opt_args[0] if isinstance(learn._opt_args[0], torch.optim.Optimizer) else None
        opts = [opt for opt in (learn._opt or ready, *learn.opts.values()) if opt is not None]
        self._opts = [(opt, copy.deepcopy(opt.state_dict())) for opt in opts]
        self._scaler = None if learn.scaler is None else (learn.scaler, learn.scaler.state_dict())
        self._taken: list[tuple[Any, Any]] = []

    def note(self, thing: Any, state: Any) -> None:
        """Something with a `load_state_dict` is about to be loaded; this is its state until now."""
        self._taken.append((thing, copy.deepcopy(state)))

    def restore(self) -> None:
        """Put it all back."""
        vars(self._learn).update(self._own)
        self._learn.history[:] = self._history
        for module, state in self._modules:
            module.load_state_dict(state, strict=False)
        for buffers in self._buffers:
            buffers.restore()
        for p, grad, requires_grad in self._parameters:
            p.grad = grad
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
        for opt, state in self._opts:
            opt.load_state_dict(state)
        if self._scaler is not None:
            self._scaler[0].load_state_dict(self._scaler[1])
        for thing, state in reversed(self._taken):
            with suppress(Exception):  # it is the error that led here that is to be seen
                thing.load_state_dict(state)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in state.items() if not is_lazy(value)}


@contextmanager
def applying(path: Any, what: str) -> Iterator[None]:
    """An error inside says that it is the file's content that cannot be used."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"path={str(path)!r}: {what} cannot be used here ({type(error).__name__}: {error}). Nothing has been changed."
        ) from error


# -- optimisers -------------------------------------------------------------------------------------------------------


def named_optimizers(learn: Learner) -> dict[str, Any]:
    """The optimisers by the names under which a checkpoint keeps them."""
    return {"opt": learn.opt, **{f"opts.{name}": opt for name, opt in learn.opts.items()}}


def training_differences(learn: Learner, saved: Mapping[str, Any]) -> list[str]:
    """Why the optimisers of a file do not fit those of a Learner, a sentence each. None at all fit any: nothing was trained."""
    names, found = parameter_names(learn.model, learn.loss_func), list[str]()
    if not saved:
        return found
    opts = named_optimizers(learn)
    for key in [*opts, *(key for key in saved if key not in opts)]:
        if key not in saved:
            found.append(f"the file has no state of learn.{key}")
        elif key not in opts:
            found.append(f"the file has a state of learn.{key!s:.40}, which is not here")
        else:
            found += [f"learn.{key}: {text}" for text in optimizer_differences(opts[key], saved[key], names)]
    return found


def load_optimizers(learn: Learner, saved: Mapping[str, Any], *, at_rest: bool) -> None:
    """Take back the state of every optimiser.

    Args:
        learn: The Learner.
        saved: The states by name.
        at_rest: The values of the parameter groups are to be those from before the fit: what a schedule has made of them
            belongs to that fit.
    """
    names = parameter_names(learn.model, learn.loss_func)
    for key, opt in named_optimizers(learn).items() if saved else ():
        load_optimizer(opt, saved[key], names, saved[key].get("at_rest") if at_rest else None)
