"""How a checkpoint comes back: `load`, and `Resume`, by which a fit goes on where another one stood."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from minitrain.skip import enter, inexact
from minitrain.snapshot import (
    Undo,
    applying,
    fitting,
    gradient,
    keeps_state,
    load_model,
    load_optimizers,
    loss_module,
    model_differences,
    named_optimizers,
    training_differences,
)

if TYPE_CHECKING:
    from minitrain.learner import Learner

_PARTS: dict[str, type | tuple[type, ...]] = {  # of a checkpoint, beside its position
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
    state = _read(path)
    unlike = _model_differences(learn, state)
    _refuse(path, unlike if strict else [], "strict=False loads what fits")
    if state["model"] and not fitting(learn.model, state["model"]):
        _refuse(path, ["none of its tensors fits"], "it is of another net")
    undo = Undo(learn)
    try:
        with applying(path, "it"):
            _load_weights(learn, state)
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
            _refuse(path, found, "with_opt=False loads the model alone")
        else:
            warnings.warn(f"path={str(path)!r}: the optimiser is left alone: {'; '.join(found)}.", stacklevel=5)
    if learn.scaler is not None and state["scaler"]:
        _load_scaler(learn.scaler, state["scaler"])
    _load_history(learn, state)
    learn._fits, learn._epochs_begun = state["counters"]["fits"], state["counters"]["epochs_begun"]
    _load_callbacks(learn.cbs, state["callbacks"], undo)


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
        _refuse(
            path, _model_differences(learn, state), "it is another net: learn.load(path, strict=False) loads what fits"
        )
        found = differences(state["fingerprint"], fingerprint(learn, lr))
        cbs = list(cbs)
        keys = {state_key(cb) for cb in cbs} | {Checkpoint.__name__}  # a run is the same whether it is saved or not
        found += [f"the callback {key!r:.60} is missing" for key in state["callbacks"] if key not in keys]
        if not allow_changes:
            _refuse(path, found, "fit(..., allow_changes=True) goes on nevertheless, though not exactly")
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
                _load_weights(learn, self._state)
                _load_history(learn, self._state)
                learn.initialized = learn.resumed = True
            yield
        except BaseException:
            if learn._undo is not None:
                learn._undo.restore()
            raise
        finally:
            learn._undo = None

    def check_optimizers(self, learn: Learner) -> None:
        """Raise `CheckpointError` unless the optimisers, which have been built by now, are those of the checkpoint."""
        saved = self._state["optimizers"]
        with applying(self.path, "the optimiser"):
            _refuse(self.path, training_differences(learn, saved), "build it as it was")
            opts = named_optimizers(learn)
            self._changed = {key: changed_defaults(opt, saved.get(key, {})) for key, opt in opts.items()}
            found = [
                f"learn.{key}: {name} was {saved[key]['defaults'][name]!r:.40}, now it is {opts[key].defaults[name]!r:.40}"
                for key, names in self._changed.items()
                for name in names
            ]
            if not self._allow_changes:
                _refuse(self.path, found, "fit(..., allow_changes=True) goes on with what is now")
        if self._state["fingerprint"].get("lr") != learn._lr and learn._lr is not None:
            self._changed["opt"].append("lr")
        with applying(self.path, "the optimiser"):  # contexts will find what they found when the fit began
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
            _load_weights(learn, state)
            self._load_optimizers(learn)
            for p, name in names.items():
                if p.requires_grad != (name not in state["frozen"]):
                    p.requires_grad_(not p.requires_grad)
                p.grad = gradient(state["grads"][name], p) if name in state["grads"] else None
            if learn.scaler is not None:
                _load_scaler(learn.scaler, state["scaler"])
                learn._scaled_by = learn.scaler
            if not self.in_epoch and position.get("loader") is not None:
                self._note_loader(learn, position["loader"])
                learn.dls.train.load_state_dict(position["loader"])  # type: ignore[attr-defined]  # it has given it
            if self.in_epoch:
                learn.running_loss.load_state_dict(position["running_loss"], learn.device)
                learn._began = time.perf_counter() - float(position["seconds"])
            _load_callbacks(learn.cbs, state["callbacks"], learn._undo)
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
    return Resume(learn, n_epochs, lr, cbs, path, _checked(path, state), allow_changes)


# -- the parts of a file ----------------------------------------------------------------------------------------------


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    return _checked(path, checkpoint.read(path))


def _checked(path: Any, state: Any) -> dict[str, Any]:
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


def _refuse(path: Any, found: list[str], remedy: str) -> None:
    if found:
        lines = "".join(f"\n- {text}" for text in found[:20]) + ("\n- ..." if len(found) > 20 else "")
        raise CheckpointError(f"path={str(path)!r} does not fit, nothing has been changed ({remedy}):{lines}")


def _model_differences(learn: Learner, state: Mapping[str, Any]) -> list[str]:
    found = model_differences(learn.model, state["model"])
    return found + model_differences(loss_module(learn), state["loss_func"], "the loss")


def _load_weights(learn: Learner, state: Mapping[str, Any]) -> None:
    load_model(learn.model, state["model"], state["hidden_buffers"])
    load_model(loss_module(learn), state["loss_func"], state["hidden_loss_buffers"])


def _load_history(learn: Learner, state: Mapping[str, Any]) -> None:
    rows = state["history"]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row of the history is no dict")
    learn.history[:] = [dict(row) for row in rows]


def _load_scaler(scaler: Any, saved: Mapping[str, Any]) -> None:
    own = scaler.state_dict()
    wrong = [key for key in own if key not in saved or not alike(saved[key], own[key]) or saved[key] < 0]
    if wrong or len(saved) != len(own):
        raise ValueError(f"the scaler's {wrong[0] if wrong else 'state'} is none of this GradScaler")
    if own:
        scaler.load_state_dict(dict(saved))


def _load_callbacks(cbs: Iterable[Callback], states: Mapping[str, Any], undo: Undo | None) -> None:
    """Give each callback its state; what it had is noted, to be given back if anything fails."""
    for cb in cbs:
        if (key := state_key(cb)) in states:
            if undo is not None:
                with suppress(Exception):  # one that makes its state in `before_fit` has none to be given back
                    undo.note(cb, cb.state_dict())
            try:
                cb.load_state_dict(states[key])
            except Exception as error:
                raise ValueError(f"the state of {key}: {error}") from error
