"""`Undo`: all or nothing. What a checkpoint is about to change of a Learner, to be put back if it cannot be used after all."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from minitrain.errors import CheckpointError
from minitrain.preserve import Buffers
from minitrain.snapshot import loss_module
from minitrain.wrappers import inner

if TYPE_CHECKING:
    from minitrain.learner import Learner

_OWN = ("_opt", "initialized", "_fits", "_epochs_begun", "position")


class Undo:
    """What loading changes: weights, buffers, optimisers, scaler, history, callbacks. A fit puts its counters back itself."""

    def __init__(self, learn: Learner) -> None:
        self._learn = learn
        self._own = {name: getattr(learn, name) for name in _OWN}
        self._history = list(learn.history)
        modules = [learn.model, loss_module(learn)]
        self._modules = [(inner(m), _copied(inner(m).state_dict())) for m in modules]
        self._buffers = [Buffers(m) for m in modules]
        self._frozen = [(p, p.requires_grad) for m in modules for p in m.parameters()]
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
        for p, requires_grad in self._frozen:
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
        why = (
            str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        )  # those are meant to be read
        raise CheckpointError(
            f"path={str(path)!r}: {what} cannot be used here, nothing has been changed: {why.rstrip('.')}."
        ) from error
