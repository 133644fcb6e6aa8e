"""What surrounds a run of the loop: who takes part, what is prepared before it, and what is put back after it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from minitrain import checks
from minitrain.batch import to_device
from minitrain.callback import Callback
from minitrain.callbacks import Progress
from minitrain.data import check_loader
from minitrain.errors import DataError, InitError, LoopError
from minitrain.init import InitReport, InitStage
from minitrain.optim import build_optimizer, check_parameters
from minitrain.optimizer_state import values_of_groups
from minitrain.passes import set_epoch
from minitrain.peek import peek
from minitrain.preserve import (
    Buffers,
    loader_generators,
    parameters_unchanged_on_error,
    preserve_iterator,
    preserve_modes,
)
from minitrain.random_states import RandomState
from minitrain.resume import Resume, find
from minitrain.stages import Stages

if TYPE_CHECKING:
    from minitrain.learner import Learner

_OF_A_BATCH = ("batch", "xb", "yb", "preds", "loss", "_backward_loss", "_pending")
# What a validation inside a fit puts aside.
_LOOP_STATE = (*_OF_A_BATCH, "batch_idx", "dl", "training", "phase", "running_loss")
# What a fit counts, and puts back if it fails before it has trained on anything.
_COUNTERS = (
    *("_fits", "_epochs_begun", "position", "epoch", "step_idx", "batch_idx", "n_epochs", "stop_reason", "resumed"),
    *("running_loss", "rng_of_epoch", "_lr", "_groups_at_rest"),
)
# The state of a Learner that runs nothing.
AT_REST: dict[str, Any] = {
    **dict.fromkeys(_OF_A_BATCH),
    **dict.fromkeys(("_stages", "_run", "_fire", "_during", "_explain", "phase", "dl")),
    "training": False,
    "_evaluating": False,
}


def participants(learn: Learner, cbs: Iterable[Callback] = ()) -> list[Callback]:
    """The user's callbacks, those of one fit, and the default ones, in the order in which they run."""
    everyone: Sequence[Callback] = [*learn._cbs, *checks.check_callbacks(cbs)]
    if learn._progress and not any(isinstance(cb, Progress) for cb in everyone):
        everyone = [*everyone, Progress()]
    return sorted(checks.check_callbacks(everyone), key=lambda cb: cb.order)


@contextmanager
def running(learn: Learner, phase: str, cbs: Iterable[Callback] = ()) -> Iterator[None]:
    """A run: the dispatch table is made, callbacks are taken; afterwards modes and all loop state are as before."""
    with Stages(learn, participants(learn, cbs)) as stages:
        try:
            learn._stages, learn.phase = stages, phase
            learn._run, learn._fire, learn._during, learn._explain = (
                stages.run,
                stages.fire,
                stages.during,
                stages.explain,
            )
            with preserve_modes(learn.model), torch.enable_grad():
                yield
        finally:
            vars(learn).update(AT_REST)


@contextmanager
def aside(learn: Learner, phase: str, dl: Any = None) -> Iterator[None]:
    """A run of its own, or, inside a fit, one that puts the loop's state aside and back."""
    if learn._evaluating:
        raise LoopError(f"{phase} inside a validation or prediction: they cannot be nested. Call it afterwards.")
    if learn._stages is None:
        with running(learn, phase):
            yield
        return
    saved = {name: getattr(learn, name) for name in _LOOP_STATE}
    try:
        learn.phase = phase
        with preserve_iterator(dl) if dl is learn.dl else nullcontext():
            yield
    finally:
        for name, value in saved.items():
            setattr(learn, name, value)


class Before:
    """What a fit puts back if it fails before it has trained on anything: random states, buffers, gradients, counters."""

    def __init__(self, learn: Learner) -> None:
        self._learn = learn
        self._counters = {name: getattr(learn, name) for name in _COUNTERS}
        self._rng = RandomState(loader_generators(learn.dls.train))
        self._buffers = [Buffers(module) for module in _trainable(learn)]
        self._grads = [(p, p.grad) for module in _trainable(learn) for p in module.parameters()]

    def restore(self) -> None:
        """Put it all back."""
        vars(self._learn).update(self._counters)
        for buffers in self._buffers:
            buffers.restore()
        for p, grad in self._grads:
            p.grad = grad
        self._rng.restore()


@contextmanager
def new_fit(learn: Learner, n_epochs: int, lr: float | None) -> Iterator[None]:
    """Counters and gradients of a fit. One that fails before it has trained on anything leaves no trace."""
    check_parameters(learn.opt, _trainable(learn))  # the model may have been replaced since it was built
    learn._before = Before(learn)
    try:
        learn.n_epochs, learn._lr, learn._fingerprint = n_epochs, lr, None
        if learn._resume is not None:
            learn._resume.begin_optimizers(learn)
        learn._groups_at_rest = values_of_groups(learn.opt)
        _set_position(learn)
        held = {id(p) for group in learn.opt.param_groups for p in group["params"]}
        learn._strays = [p for module in _trainable(learn) for p in module.parameters() if id(p) not in held]
        learn._zero_grad()
        yield
    except BaseException:
        learn.position = None
        if learn._before is not None:
            learn._before.restore()
        raise
    finally:
        learn._before = None


def _set_position(learn: Learner) -> None:
    """Where the fit begins: at its first epoch, or where the one that it continues stood."""
    learn.epoch, learn.step_idx, learn.batch_idx, learn.stop_reason, learn.position = 0, 0, 0, None, (0, 0)
    learn.resumed = learn._resume is not None
    if learn._resume is None:
        learn._fits += 1
        return
    saved = learn._resume.position
    done = saved["epoch"] >= learn.n_epochs or (saved["stop_reason"] is not None and not saved["batch"])
    learn.epoch = max(saved["epoch"] - done, 0)
    learn.step_idx, learn.batch_idx = saved["step"], saved["batch_idx"]
    counters = learn._resume.counters
    learn._fits = max(counters["fits"], 1)
    learn._epochs_begun = counters["epochs_begun"] - (saved["batch"] > 0)  # that epoch begins once more
    learn.position = saved["epoch"], saved["batch"]


def take_over(learn: Learner, n_epochs: int, lr: float | None, going_on: Resume) -> None:
    """A fit that goes on from a file which was saved after it had ended: there is nothing to do but to load."""
    with seeded(learn), resuming(learn, going_on):
        prepare(learn)
        with new_fit(learn, n_epochs, lr):
            going_on.finish(learn)


@contextmanager
def resuming(learn: Learner, going_on: Resume | None) -> Iterator[None]:
    """What is loaded before the optimiser is built, for a fit that goes on."""
    learn._resume = going_on
    try:
        with nullcontext() if going_on is None else going_on.begin(learn):
            yield
    finally:
        learn._resume = None


def check_fit(
    learn: Learner, n_epochs: Any, lr: Any, cbs: Iterable[Callback], resume: Any, allow_changes: Any
) -> Resume | None:
    """Everything that can be known to be wrong before anything is changed; from where the fit goes on, if it does."""
    if learn._stages is not None:
        raise LoopError(f"fit inside a callback (during a {learn.phase}): fits cannot be nested. Call it afterwards.")
    checks.check_n_epochs(n_epochs)
    checks.check_lr("lr", lr)
    checks.check_bool("allow_changes", allow_changes)
    checks.check_model(learn.model)
    checks.check_not_empty(learn.dls.train, "training")
    checks.check_not_empty(learn.dls.valid, "validation")
    return find(learn, n_epochs, lr, participants(learn, cbs), resume, allow_changes)


def loader_of(learn: Learner, dl: Any) -> Iterable[Any]:
    """The loader that was given, or the validation loader."""
    if dl is None:
        dl = learn.dls.valid
    if dl is None:
        raise DataError("dl=None and there is no validation loader. Pass one: DataLoaders(train, valid), or dl=...")
    check_loader("dl", dl)
    checks.check_not_empty(dl, "given")
    loader: Iterable[Any] = dl
    return loader


def prepare(learn: Learner) -> None:
    """What comes before the first fit, in this order: init stages, lazy parameters, optimiser."""
    if learn._init and not learn.initialized:
        run_init(learn)
    if learn._opt is None:
        _materialize(learn)
        opt = build_optimizer(learn.model, *learn._opt_args)
        check_parameters(opt, _trainable(learn))
        learn._opt = opt


def _trainable(learn: Learner) -> list[nn.Module]:
    return [m for m in (learn.model, learn.loss_func) if isinstance(m, nn.Module)]


def run_init(learn: Learner) -> None:
    """Run all init stages; if one fails, what those before it did is undone too."""
    rng, buffers = RandomState(), Buffers(learn.model)
    learn._initializing = True
    try:
        with parameters_unchanged_on_error(learn.model):
            learn.init_reports = [_run_stage(learn, i, stage) for i, stage in enumerate(learn._init)]
    except BaseException:
        buffers.restore()
        rng.restore()
        raise
    finally:
        learn._initializing = False
    learn.initialized = True


def _run_stage(learn: Learner, i: int, stage: InitStage) -> InitReport | None:
    try:
        return stage(learn.model, _Inputs(learn))
    except Exception as error:
        error.add_note(f"in init[{i}]: {getattr(stage, '__name__', type(stage).__name__)}(model, batches)")
        raise


@contextmanager
def seeded(learn: Learner) -> Iterator[None]:
    """Seed once.

    If what follows fails before it has trained on anything, random states are as before, and the next try begins as this one
    would have gone on.
    """
    if learn._seed is None or learn._seeded:
        yield
        return
    before = RandomState()
    if learn._retry is None:
        _seed(learn._seed)
    else:
        learn._retry.restore()
    learn._seeded = True
    try:
        yield
    except BaseException:
        if not learn._touched:
            learn._seeded, learn._retry = False, RandomState()
            before.restore()
        raise
    learn._retry = None


def _seed(seed: int) -> None:
    seed = int(seed)  # numpy's integers are taken, too
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy as np
    except ImportError:  # optional, for torch too
        return
    np.random.seed(seed)


def _materialize(learn: Learner) -> None:
    """Give lazy parameters their shapes, by a forward pass over the first training batch."""
    if any(is_lazy(p) for p in learn.model.parameters()):
        with preserve_modes(learn.model), torch.no_grad():
            learn.model.eval()
            try:
                xb = next(iter(_Inputs(learn)))
            except InitError as error:
                raise InitError(
                    f"the model has lazy modules, and no batch of {type(learn.dls.train).__name__} can be drawn to shape them "
                    "without moving its stream. Call the model once before: model(x)."
                ) from error
            learn.forward(xb)


class _Inputs:
    """The model's inputs from the training loader, on the device: drawn without moving the training stream."""

    def __init__(self, learn: Learner) -> None:
        self._learn = learn
        self.progress = learn._progress or any(
            isinstance(cb, Progress) for cb in learn.cbs
        )  # long stages may draw a bar

    def __iter__(self) -> Iterator[Any]:
        set_epoch(self._learn.dls.train, self._learn._epochs_begun)  # another Learner may have used the loader
        for batch in peek(self._learn.dls.train):
            yield self._learn.split_batch(to_device(batch, self._learn.device))[0]
