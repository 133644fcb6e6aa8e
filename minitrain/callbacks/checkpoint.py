"""`Checkpoint`: keep a run on disk, so that it can be killed at any moment and go on."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitrain import checkpoint
from minitrain.bars import rank
from minitrain.callback import Callback
from minitrain.callbacks.monitor import Monitor
from minitrain.errors import CheckpointError
from minitrain.folder import BEST, link, locked, name_of, numbered, retain
from minitrain.interrupts import Interrupts
from minitrain.passes import loader_length
from minitrain.skip import inexact
from minitrain.snapshot import snapshot

if TYPE_CHECKING:
    from minitrain.learner import Learner

_DEFAULT = "valid_loss"


class Checkpoint(Callback):
    """Save everything that a run is, again and again: `fit(n, resume="auto")` goes on from the newest file.

    A file is written beside its place and moved there, so that at any moment the newest one is whole. The files are numbered:
    `000012-epoch3-batch450.ckpt` was taken after 3 epochs and 450 batches of the fourth. They hold model, optimisers, scaler,
    callbacks, history, random states and position, at a moment at which nothing is under way: between two training batches, or
    between two epochs. After the last epoch one is written in any case.

    Args:
        folder: Where to; it is made where it is not there. One process at a time may write there.
        every: How often: "epoch", a number of optimiser steps, or a `datetime.timedelta`.
        keep_last: How many of the newest files to keep. None: all.
        keep_best: The column of the history whose best epoch is kept as `best.ckpt`. None: no such file; nor is there one with
            the default where nothing is validated.
        mode: "min" or "max": which value of that column is best. None: for losses "min", for metrics as their attribute
            `higher_is_better` says.
        async_write: Write in a thread, from a copy: training waits for the copy only. What falls due while a file is still
            being written is taken up when that is done.
        on_interrupt: Answer the first Ctrl-C or SIGTERM by a last checkpoint at the next batch boundary; then the interrupt
            goes on. A second one acts at once, and writes nothing.

    Attributes:
        last: The file that was written last, or None.
        best: The best value of `keep_best` so far, or None.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range; in the fit: there is no column `keep_best`.
        CheckpointError: The folder cannot be used, or writing has failed twice in a row.

    Warns:
        Writing has failed: the files from before are kept, and the next one will be tried. Or: the loader cannot be entered
        exactly in mid-epoch.

    Example:
        >>> import tempfile, torch
        >>> from minitrain import BatchLoader, DataLoaders, Learner
        >>> x = torch.linspace(-1, 1, 40).reshape(-1, 1)
        >>> def learner(folder):
        ...     dls = DataLoaders(BatchLoader(x, 2 * x, batch_size=4, shuffle=True))
        ...     cbs = [Checkpoint(folder)]
        ...     return Learner(torch.nn.Linear(1, 1), dls, torch.nn.MSELoss(), lr=0.01, seed=1, cbs=cbs, progress=False)
        >>> folder = tempfile.mkdtemp()
        >>> learner(folder).fit(1, resume="auto")  # there is none yet: it begins
        >>> learn = learner(folder)
        >>> learn.fit(2, resume="auto")  # one more epoch
        >>> learn.history.to_dict()["epoch"], learn.cbs[0].last.name
        ([0, 1], '000002-epoch2-batch0.ckpt')
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: str | int | timedelta = "epoch",
        *,
        keep_last: int | None = 3,
        keep_best: str | None = _DEFAULT,
        mode: str | None = None,
        async_write: bool = True,
        on_interrupt: bool = False,
    ) -> None:
        if not isinstance(folder, (str, os.PathLike)) or not str(folder):
            raise TypeError(f"folder={folder!r} (type={type(folder).__name__}), wanted the path of a folder.")
        _check_every(every)
        if keep_last is not None and (isinstance(keep_last, bool) or not isinstance(keep_last, int)):
            raise TypeError(
                f"keep_last={keep_last!r} (type={type(keep_last).__name__}), wanted an int, or None for all."
            )
        if keep_last is not None and keep_last < 1:
            raise ValueError(
                f"keep_last={keep_last!r}, wanted at least 1: without a file there is nothing to go on from."
            )
        for name, value in (("async_write", async_write), ("on_interrupt", on_interrupt)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted True or False.")
        self.folder, self.every, self.keep_last = Path(folder).absolute(), every, keep_last
        self.keep_best, self.mode = keep_best, mode
        self.async_write, self.on_interrupt = async_write, on_interrupt
        self._monitor = None if keep_best is None else Monitor(keep_best, mode, "keep_best")
        self.last: Path | None = None
        self.best: float | None = None
        self._best_before: float | None = None  # while the best one is being written
        self._is_best_under_way = False
        self._writing: Future[Path] | None = None
        self._failures = 0
        self._buffers: dict[Any, Any] = {}  # the copy, whose memory is used again
        self._held: dict[str, Any] | None = None

    @contextmanager
    def during_fit(self, learn: Learner) -> Iterator[None]:
        """Lock the folder, listen for interrupts; at the end wait for the last file, whatever has happened."""
        if self._monitor is not None and not self._watches_nothing(learn):
            self._monitor.check(learn)
        if self._is_exposed(learn) and (why := inexact(learn.dls.train)) is not None:
            warnings.warn(f"the checkpoints of this run may not be resumed exactly: {why}", stacklevel=2)
        self._cancelled = threading.Event()
        self._interrupts = Interrupts(self._cancelled.set)
        self._marked, self._batches, self._clock = None, 0, time.monotonic()
        self._writing, self._held, self._failures = None, None, 0
        if rank():  # the first process writes for all of them
            yield
            return
        with locked(self.folder), ThreadPoolExecutor(1, "checkpoint") as self._pool:
            found = numbered(self.folder)
            self._number = found[-1][0] if found else 0
            learn.save_points.append(self._at_save_point)
            try:
                with self._interrupts if self.on_interrupt else nullcontext():
                    try:
                        yield
                    except RuntimeError as error:
                        if self._interrupts.pending is not None and "DataLoader worker" in str(error):
                            self._at_save_point(learn)  # the signal has reached the workers, too: no batch can be drawn
                        raise
                    self._settle()
                    self._interrupts.go_on()  # one that has come after the last save point
            finally:
                learn.save_points.remove(self._at_save_point)
                self._abandon()

    def before_fit(self, learn: Learner) -> None:
        """A new fit has its own best value."""
        self.best = None

    def after_batch(self, learn: Learner) -> None:
        """An interrupt in validation is answered by what was kept when the training of this epoch had ended."""
        held = self._held
        if not learn.training and learn.phase == "fit" and self._interrupts.pending and held is not None:
            if held["position"]["epoch"] != learn.epoch:  # the training of this epoch was cut short
                return
            self._settle()
            self._write(held, is_best=False, wait=True)
            self._interrupts.go_on()

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        best = state["best"]
        if best is not None and type(best) not in (int, float):
            raise ValueError(f"best={best!r:.40}, wanted a number.")
        self.best = best

    # -----------------------------------------------------------------------------------------------------------------

    _marked: int | None  # the step up to which nothing is due any longer
    _batches: int  # that have been trained in this fit
    _clock: float  # seconds, of the last checkpoint
    _number: int
    _pool: ThreadPoolExecutor
    _cancelled: threading.Event
    _interrupts: Interrupts

    def _is_exposed(self, learn: Learner) -> bool:
        """Whether it matters that a loader cannot be entered exactly: one without lasting workers can between epochs."""
        in_epoch = self.every != "epoch" or self.on_interrupt
        return in_epoch or getattr(learn.dls.train, "persistent_workers", False)

    def _watches_nothing(self, learn: Learner) -> bool:
        return self.keep_best == _DEFAULT and learn.dls.valid is None

    def _at_save_point(self, learn: Learner) -> None:
        """Save, if it is time to: nothing is under way at this moment."""
        if learn.position is None:
            return
        epoch, batch = learn.position
        self._batches += batch > 0
        if self._marked is None:
            self._marked = max(self._steps(learn) - 1, 0)
        if self._writing is not None and (self._writing.done() or not batch):
            self._settle()
        at_end = not batch and (epoch >= learn.n_epochs or learn.stop_reason is not None)
        is_best = not batch and self._is_best(learn)
        interrupted = self._interrupts.pending is not None
        must = at_end or is_best or interrupted or (self.every == "epoch" and not batch)
        if must or (self._writing is None and self._is_due(learn)):
            self._save(learn, is_best, wait=interrupted or not self.async_write)
        self._interrupts.go_on()
        if self.on_interrupt and learn.dls.valid is not None and batch and batch == loader_length(learn.dls.train):
            self._held = checkpoint.plain(snapshot(learn), copy=True)  # validation changes what callbacks know

    def _steps(self, learn: Learner) -> int:
        if learn.step_idx == 0 and learn._has_own_train_batch:
            return self._batches  # it counts no steps
        return learn.step_idx

    def _is_due(self, learn: Learner) -> bool:
        if isinstance(self.every, timedelta):
            return time.monotonic() - self._clock >= self.every.total_seconds()
        if isinstance(self.every, str):
            return False
        assert self._marked is not None
        return self._steps(learn) // self.every > self._marked // self.every

    def _is_best(self, learn: Learner) -> bool:
        assert learn.position is not None
        row = learn.history[-1] if learn.history else {}
        is_this = row.get("fit") == learn._fits - 1 and row.get("epoch") == learn.position[0] - 1
        if self._monitor is None or self._watches_nothing(learn) or not is_this:  # a cancelled epoch has no row
            return False
        value = self._monitor.value(row)
        if not self._monitor.is_better(value, self.best):
            return False
        self._best_before, self.best = self.best, value
        return True

    def _save(self, learn: Learner, is_best: bool, wait: bool) -> None:
        self._settle()  # its copy is about to be used again
        self._marked, self._clock = self._steps(learn), time.monotonic()
        state = snapshot(learn)
        state = checkpoint.plain(state) if wait else checkpoint.plain(state, copy=True, buffers=self._buffers)
        self._write(state, is_best, wait)

    def _write(self, state: dict[str, Any], is_best: bool, wait: bool) -> None:
        self._number += 1
        self._is_best_under_way = is_best
        path = self.folder / name_of(self._number, state["position"]["epoch"], state["position"]["batch"])
        if not wait:
            self._writing = self._pool.submit(self._put, path, state, is_best)
            return
        try:
            self._written(self._put(path, state, is_best))
        except CheckpointError as error:
            self._failed(error)

    def _put(self, path: Path, state: dict[str, Any], is_best: bool) -> Path:
        """Write a file, and only then let older ones go."""
        if is_best:  # it is written first: who is killed in between will find this epoch to be the best once more
            checkpoint.write(path.with_name(BEST), state, cancelled=self._cancelled)
            link(path.with_name(BEST), path)
        else:
            checkpoint.write(path, state, cancelled=self._cancelled)
        if self.keep_last is not None:
            retain(self.folder, self.keep_last)
        return path

    def _settle(self) -> None:
        """Wait for the file that is being written, and hear what has become of it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                self._written(writing.result())
            except CheckpointError as error:
                self._failed(error)

    def _abandon(self) -> None:
        """The fit has ended, maybe by an error: let go of everything, and say so if the last file could not be written."""
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.exception()
        if error is not None and not self._cancelled.is_set():
            warnings.warn(f"{error} The checkpoints from before are kept.", stacklevel=2)
        self._buffers, self._held = {}, None

    def _written(self, path: Path) -> None:
        self.last, self._failures = path, 0

    def _failed(self, error: CheckpointError) -> None:
        self._failures += 1
        if self._is_best_under_way:
            self.best = self._best_before
        if self._failures > 1:
            raise error
        warnings.warn(f"{error} The checkpoints from before are kept; the next one will be tried.", stacklevel=2)


def _check_every(every: Any) -> None:
    if isinstance(every, timedelta):
        if every <= timedelta(0):
            raise ValueError(f"every={every!r}, wanted a positive span of time.")
    elif isinstance(every, int) and not isinstance(every, bool):
        if every < 1:
            raise ValueError(f"every={every!r}, wanted at least 1 optimiser step.")
    elif every != "epoch":
        remedy = "seconds are timedelta(seconds=...)." if isinstance(every, float) else "for example every=500."
        kind = ValueError if isinstance(every, str) else TypeError
        raise kind(f"every={every!r}, wanted 'epoch', a number of optimiser steps, or a datetime.timedelta: {remedy}")
