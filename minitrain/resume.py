"""`Resume`: how a fit goes on where another one stood, as if it had not been interrupted."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitrain import checkpoint
from minitrain.callback import Callback
from minitrain.callbacks import Checkpoint
from minitrain.checks import state_key
from minitrain.errors import CheckpointError
from minitrain.fingerprint import differences, fingerprint, versions
from minitrain.folder import newest
from minitrain.optimizer_state import alike, changed_defaults, parameter_names, values_of_groups
from minitrain.passes import loader_length
from minitrain.preserve import loader_generators, preserve_rng
from minitrain.random_states import RandomState
from minitrain.restore import (
    checked,
    gradient,
    load_callbacks,
    load_history,
    load_optimizers,
    load_scaler,
    load_weights,
    named_optimizers,
    refuse,
    training_differences,
    weight_differences,
)
from minitrain.skip import enter, inexact
from minitrain.snapshot import keeps_state
from minitrain.undo import Undo, applying

if TYPE_CHECKING:
    from minitrain.learner import Learner


class Resume:
    """A checkpoint from which a fit goes on. It is checked when it is made, and changes nothing before `begin`.

    Args:
        learn: The Learner whose fit goes on.
        n_epochs: How many epochs there will be in all.
        lr: The learning rate that the fit is given.
        cbs: The callbacks that take part.
        path: The file.
        state: What `checkpoint.read` has found there.
        allow_changes: Go on although data, seed or callbacks are not those of the checkpoint.

    Raises:
        CheckpointError: No fit can go on from it, or not this one: each difference is named.
    """

    def __init__(
        self,
        learn: Learner,
        n_epochs: int,
        lr: float | None,
        cbs: Iterable[Callback],
        path: Path,
        state: dict[str, Any],
        allow_changes: bool,
    ) -> None:
        self.path, self._state, self._n_epochs = path, state, n_epochs
        position = state["position"]
        if position is None:
            raise CheckpointError(
                f"path={str(path)!r} was saved in the midst of a batch or a validation, or after a fit was cancelled: from "
                "there none can go on exactly. Use learn.load(path) and a new fit; or save by Checkpoint(...), or in "
                "after_batch or after_epoch."
            )
        if not state["initialized"]:
            raise CheckpointError(
                f"path={str(path)!r} was saved before the init stages had run. Use learn.load(path), and a new fit."
            )
        self.position: dict[str, Any] = position
        self.counters: dict[str, int] = state["counters"]
        if position["epoch"] > n_epochs or (position["epoch"] == n_epochs and position["batch"]):
            raise CheckpointError(
                f"n_epochs={n_epochs}, but the run in path={str(path)!r} has {position['epoch']} epochs behind it: n_epochs is "
                "the total of all epochs, those before the checkpoint included."
            )
        refuse(
            path, weight_differences(learn, state), "it is another net: learn.load(path, strict=False) loads what fits"
        )
        found = differences(state["fingerprint"], fingerprint(learn, lr))
        cbs = list(cbs)
        keys = {state_key(cb) for cb in cbs} | {Checkpoint.__name__}  # a run is the same whether it is saved or not
        found += [f"the callback {key!r:.60} is missing" for key in state["callbacks"] if key not in keys]
        if not allow_changes:
            refuse(path, found, "fit(..., allow_changes=True) goes on nevertheless, though not exactly")
        for key in [state_key(cb) for cb in cbs if keeps_state(cb) and not isinstance(cb, Checkpoint)]:
            if key not in state["callbacks"] and not self.is_over:
                warnings.warn(f"path={str(path)!r} has no state of {key}: it begins anew.", stacklevel=5)
        self._allow_changes = allow_changes
        self._changed: dict[str, list[str]] = {}  # of each optimiser the options that are now others
        self._check_versions(learn)

    def _check_versions(self, learn: Learner) -> None:
        changed = differences(self._state["versions"], versions(learn.device))
        if changed:
            warnings.warn(f"path={str(self.path)!r}: {'; '.join(changed)}. The bits may differ.", stacklevel=6)

    @property
    def in_epoch(self) -> bool:
        """Whether the fit goes on in the midst of an epoch, rather than at its beginning."""
        return bool(self.position["batch"])

    @property
    def is_over(self) -> bool:
        """Whether it was saved after its fit had ended, and there is nothing to do but to load it."""
        ended = self.position["epoch"] >= self._n_epochs or self.position["stop_reason"] is not None
        return bool(self.position["is_over"]) and ended and self.counters["fits"] > 0

    @contextmanager
    def begin(self, learn: Learner) -> Iterator[None]:
        """Load the weights. If something fails before the fit has trained on anything, all is put back."""
        learn._undo = Undo(learn)  # it lives until the first batch is trained on
        try:
            with applying(self.path, "it"):
                load_weights(learn, self._state)
                load_history(learn, self._state)
                learn.initialized = True
            yield
        except BaseException:
            if learn._undo is not None:
                learn._undo.restore()
            raise
        finally:
            learn._undo = None

    def begin_optimizers(self, learn: Learner) -> None:
        """Check the optimisers, which have been built by now, and give them the rates that they had when the fit began.

        Contexts will find those, and put them back at its end. What a schedule has made of them since comes by `finish`.
        """
        saved, opts = self._state["optimizers"], named_optimizers(learn)
        with applying(self.path, "the optimiser"):
            refuse(self.path, training_differences(learn, saved), "build it as it was")
            self._changed = {key: changed_defaults(opt, saved.get(key, {})) for key, opt in opts.items()}
            found = [
                f"learn.{key}: {name} was {saved[key]['defaults'][name]!r:.40}, now it is {opts[key].defaults[name]!r:.40}"
                for key, names in self._changed.items()
                for name in names
            ]
            if not self._allow_changes:
                refuse(self.path, found, "fit(..., allow_changes=True) goes on with what is now")
            if learn._lr is not None and self._state["fingerprint"].get("lr") != learn._lr:
                self._changed["opt"].append("lr")
            for group, values in zip(learn.opt.param_groups, saved.get("opt", {}).get("at_rest", ()), strict=False):
                for name, value in values.items():
                    is_number = isinstance(group.get(name), (int, float, tuple)) and not isinstance(group[name], bool)
                    if is_number and name not in self._changed["opt"]:
                        if not alike(value, group[name]):
                            raise ValueError(f"{name}={value!r:.40}")
                        group[name] = value

    def enter(self, learn: Learner, loader: Any) -> Iterator[Any]:
        """The rest of the epoch, entered by index; then everything is loaded that changes while a fit goes on."""
        start, length = self.position["batch"], loader_length(loader)
        if (why := inexact(loader)) is not None:
            warnings.warn(f"this fit may not go on exactly: {why}", stacklevel=2)
        with applying(self.path, "the state of the loader"):
            generators = loader_generators(loader)
            learn.rng_of_epoch = RandomState.from_state_dict(self.position["rng_of_epoch"], generators)
            learn.rng_of_epoch.restore()
            state = self.position.get("loader")
            self._note_loader(learn, state)
            batches = enter(loader, start if length is None else min(start, length), state)
        self.finish(learn)
        return batches

    def _note_loader(self, learn: Learner, state: Any) -> None:
        loader: Any = learn.dls.train
        if state is not None and learn._undo is not None:
            with preserve_rng(loader_generators(loader)):  # one that was never begun may begin now
                learn._undo.note(loader, loader.state_dict())

    def finish(self, learn: Learner) -> None:
        """Load what contexts and the events before have set anew: optimisers, scaler, callbacks, random states."""
        state, position = self._state, self.position
        names = parameter_names(learn.model, learn.loss_func)
        with applying(self.path, "it"):
            rng = RandomState.from_state_dict(state["rng"], loader_generators(learn.dls.train))
            self._check_scaler(learn)
            load_weights(learn, state)
            self._load_optimizers(learn)
            for p, name in names.items():
                if p.requires_grad != (name not in state["frozen"]):
                    p.requires_grad_(not p.requires_grad)
                p.grad = gradient(state["grads"][name], p) if name in state["grads"] else None
            if learn.scaler is not None:
                load_scaler(learn.scaler, state["scaler"])
                learn._scaled_by = learn.scaler
            if not self.in_epoch and position.get("loader") is not None:
                self._note_loader(learn, position["loader"])
                learn.dls.train.load_state_dict(position["loader"])  # type: ignore[attr-defined]  # it has given it
            if self.in_epoch:
                learn.running_loss.load_state_dict(position["running_loss"], learn.device)
                learn._began = time.perf_counter() - float(position["seconds"])
            load_callbacks(learn.cbs, state["callbacks"], learn._undo)
            learn.step_idx, learn.stop_reason = position["step"], learn.stop_reason or position["stop_reason"]
            if self.in_epoch:
                generators = loader_generators(learn.dls.train)
                learn.rng_of_epoch = RandomState.from_state_dict(position["rng_of_epoch"], generators)
        rng.restore()
        self._state = {}  # the memory of a whole file

    def _load_optimizers(self, learn: Learner) -> None:
        """The optimisers as they were, but for options that are now others: those begin to count here."""
        opts = named_optimizers(learn)
        now = {key: values_of_groups(opt) for key, opt in opts.items()}  # a schedule may have put in something new
        load_optimizers(learn, self._state["optimizers"], at_rest=False)
        for key, groups in now.items():
            for group, values in zip(opts[key].param_groups, groups, strict=True):
                group.update({name: values[name] for name in self._changed[key] if name in values})
                group.update({name: value for name, value in values.items() if name not in group})

    def _check_scaler(self, learn: Learner) -> None:
        if (learn.scaler is None) != (self._state["scaler"] is None):
            was, now = ("had a", "has none") if learn.scaler is None else ("had no", "has one")
            raise CheckpointError(f"path={str(self.path)!r}: the run {was} GradScaler, this Learner {now}.")


def find(
    learn: Learner, n_epochs: int, lr: float | None, cbs: Iterable[Callback], resume: Any, allow_changes: bool
) -> Resume | None:
    """The checkpoint that `fit(resume=...)` means; None where a new fit begins.

    Raises:
        TypeError: `resume` is neither "auto" nor a path.
        ValueError: "auto" without a `Checkpoint` among the callbacks.
        CheckpointError: There is nothing to go on from, or it does not fit.
    """
    if resume is None:
        return None
    cbs = list(cbs)
    if not isinstance(resume, (str, os.PathLike)):
        raise TypeError(
            f"resume={resume!r} (type={type(resume).__name__}), wanted 'auto', a checkpoint, or a folder of them."
        )
    if resume == "auto":
        folders = [cb.folder for cb in cbs if isinstance(cb, Checkpoint)]
        if len(folders) != 1:
            raise ValueError(
                f"resume='auto', but there are {len(folders)} Checkpoint callbacks to say in which folder to look. Pass one, "
                "cbs=[Checkpoint('runs/a')], or the path of a checkpoint, resume='runs/a/....ckpt'."
            )
        found = newest(folders[0])
        if found is None:
            return None
    elif Path(resume).is_dir():
        found = newest(Path(resume))
        if found is None:
            raise CheckpointError(f"resume={str(resume)!r}: there is no checkpoint in this folder.")
    else:
        found = Path(resume), checkpoint.read(resume)
    path, state = found
    return Resume(learn, n_epochs, lr, cbs, path, checked(path, state), allow_changes)
