"""How the parts of a checkpoint come back, and `load`, which takes them all but for random states and position."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minitrain import checkpoint
from minitrain.callback import Callback
from minitrain.checks import state_key
from minitrain.errors import CheckpointError
from minitrain.optimizer_state import alike, load_optimizer, optimizer_differences, parameter_names
from minitrain.snapshot import hidden_buffers, loss_module
from minitrain.undo import Undo, applying
from minitrain.wrappers import inner

if TYPE_CHECKING:
    from minitrain.learner import Learner

_PARTS: dict[str, type] = {  # of a checkpoint, beside its position
    "versions": dict,
    "initialized": bool,
    "fingerprint": dict,
    "model": dict,
    "counters": dict,
    "hidden_buffers": dict,
    "loss_func": dict,
    "hidden_loss_buffers": dict,
    "optimizers": dict,
    "frozen": list,
    "grads": dict,
    "callbacks": dict,
    "history": list,
    "rng": dict,
}
_COUNTS = ("epoch", "batch", "step", "batch_idx", "n_epochs")


def load(learn: Learner, path: str | os.PathLike[str], *, strict: bool, with_opt: bool, build: Any) -> None:
    """What `Learner.load` does; `build(learn)` builds the optimiser where there is none yet."""
    state = checked(path, checkpoint.read(path))
    unlike = weight_differences(learn, state)
    refuse(path, unlike if strict else [], "strict=False loads what fits")
    if state["model"] and not fitting(learn.model, state["model"]):
        refuse(path, ["none of its tensors fits"], "it is of another net")
    undo = Undo(learn)
    try:
        with applying(path, "it"):
            load_weights(learn, state)
            learn.initialized, learn.position = state["initialized"], None
            if with_opt:
                _load_training(learn, path, state, strict, unlike, build, undo)
    except BaseException:
        undo.restore()
        raise


def _load_training(
    learn: Learner, path: Any, state: Mapping[str, Any], strict: bool, unlike: list[str], build: Any, undo: Undo
) -> None:
    """Optimisers, scaler, callbacks, history, and how many fits and epochs there have been."""
    if saved := state["optimizers"]:
        build(learn)
        if not (found := unlike + training_differences(learn, saved)):
            load_optimizers(learn, saved, at_rest=True)
        elif strict:
            refuse(path, found, "with_opt=False loads the model alone")
        else:
            warnings.warn(f"path={str(path)!r}: the optimiser is left alone: {'; '.join(found)}.", stacklevel=5)
    if learn.scaler is not None and state["scaler"]:
        load_scaler(learn.scaler, state["scaler"])
    load_history(learn, state)
    learn._fits, learn._epochs_begun = state["counters"]["fits"], state["counters"]["epochs_begun"]
    load_callbacks(learn.cbs, state["callbacks"], undo)


# -- the parts of a file ----------------------------------------------------------------------------------------------


def checked(path: Any, state: Any) -> dict[str, Any]:
    """A state that has all parts, each of its kind."""
    if not isinstance(state, dict):
        state = {}
    wrong = [name for name, kind in _PARTS.items() if not isinstance(state.get(name), kind)]
    position, scaler = state.get("position", 0), state.get("scaler", 0)
    if not isinstance(scaler, (dict, type(None))):
        wrong.append("scaler")
    in_epoch = False
    if position is not None and not _is_position(position):
        wrong.append("position")
    elif position is not None:
        in_epoch = position["batch"] > 0
    counters = [state["counters"].get(name) for name in ("fits", "epochs_begun")] if "counters" not in wrong else []
    if not _are_counts(counters) or (in_epoch and counters[1:] == [0]):
        wrong.append("counters")
    if wrong:
        raise CheckpointError(
            f"path={str(path)!r} is no state of a Learner: it lacks {', '.join(wrong)}. Was it written by learn.save?"
        )
    return dict(state)


def _is_position(position: Any) -> bool:
    if not isinstance(position, dict) or not isinstance(position.get("stop_reason", 0), (str, type(None))):
        return False
    if not _are_counts([position.get(name) for name in _COUNTS]) or type(position.get("is_over")) is not bool:
        return False
    return not position["batch"] or {"seconds", "running_loss", "rng_of_epoch"} <= set(position)


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def refuse(path: Any, found: list[str], remedy: str) -> None:
    """Raise `CheckpointError` if there is anything that does not fit."""
    if found:
        lines = "".join(f"\n- {text}" for text in found[:20]) + ("\n- ..." if len(found) > 20 else "")
        raise CheckpointError(f"path={str(path)!r} does not fit, nothing has been changed ({remedy}):{lines}")


def weight_differences(learn: Learner, state: Mapping[str, Any]) -> list[str]:
    """Why the weights of a file do not fit the model or the loss, a sentence each."""
    found = model_differences(learn.model, state["model"])
    return found + model_differences(loss_module(learn), state["loss_func"], "the loss")


def load_weights(learn: Learner, state: Mapping[str, Any]) -> None:
    """Copy what fits into the model and the loss."""
    load_model(learn.model, state["model"], state["hidden_buffers"])
    load_model(loss_module(learn), state["loss_func"], state["hidden_loss_buffers"])


def load_history(learn: Learner, state: Mapping[str, Any]) -> None:
    """Take the rows of the history."""
    rows = state["history"]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row of the history is no dict")
    learn.history[:] = [dict(row) for row in rows]


def load_scaler(scaler: Any, saved: Mapping[str, Any]) -> None:
    """Take back a scaler's state, which it would not check by itself."""
    own = scaler.state_dict()
    wrong = [key for key in own if key not in saved or not alike(saved[key], own[key]) or saved[key] < 0]
    if wrong or len(saved) != len(own):
        raise ValueError(f"the scaler's {wrong[0] if wrong else 'state'} is none of this GradScaler")
    if own:
        scaler.load_state_dict(dict(saved))


def load_callbacks(cbs: Iterable[Callback], states: Mapping[str, Any], undo: Undo | None) -> None:
    """Give each callback its state; what it had is noted, to be given back if anything fails."""
    for cb in cbs:
        if (key := state_key(cb)) in states:
            if undo is not None:
                with suppress(Exception):  # one that makes its state in `before_fit` has none to be given back
                    undo.note(cb, cb.state_dict())
            try:
                cb.load_state_dict(states[key])
            except Exception as error:
                why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                raise ValueError(f"the state of {key}: {why}") from error


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
