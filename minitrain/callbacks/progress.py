"""`Progress`: bars on a terminal and in a notebook, one plain line an epoch elsewhere."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from minitrain.bars import REDRAW, BarTypes, bar_types, move, rank
from minitrain.callback import Callback
from minitrain.callbacks.history import show
from minitrain.passes import loader_length

if TYPE_CHECKING:
    from minitrain.learner import Learner


class Progress(Callback):
    """Show how a fit goes on: every Learner has it, unless it is made with `progress=False`.

    On a terminal: a bar over the batches with the running loss beside it, and a table with a row an epoch. In a notebook
    also a bar over the epochs, and a picture of the losses where matplotlib is installed. The bars are fastprogress's; they
    are redrawn by the clock, about ten times a second, so that they cost the same however short a step is.

    Where standard output is no terminal or a narrow one, where `CI` is set in the environment, and on every rank but the first
    one, it is one plain line an epoch. Only fits are shown: `validate` and `predict` by themselves are quiet.

    A fit that does not come to its end is marked as interrupted, failed, or cancelled.

    Example:
        >>> import torch
        >>> from minitrain import BatchLoader, DataLoaders, Learner
        >>> x = torch.zeros(8, 1)
        >>> learn = Learner(torch.nn.Linear(1, 1, bias=False), DataLoaders(BatchLoader(x, x, batch_size=4)), torch.nn.MSELoss())
        >>> learn.fit(1)  # doctest: +ELLIPSIS
        epoch 1/1  train_loss 0.000  lr 0.001  ... s
    """

    order = 100  # after the others: the row of an epoch shows what they have done to it

    def __init__(self) -> None:
        self._display: _Lines | None = None
        self._cancelled = False

    @contextmanager
    def during_fit(self, learn: Learner) -> Iterator[None]:
        """Open the display, and close it with a mark where the fit did not come to its end."""
        self._display, self._cancelled = display, _ = _choose_display(), False
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # the latter is how SIGTERM ends a run with `on_interrupt=True`
            display.close(learn, "interrupted")
            raise
        except BaseException:
            display.close(learn, "failed")
            raise
        else:
            display.close(learn, "cancelled" if self._cancelled else "")
        finally:
            self._display = None

    def before_fit(self, learn: Learner) -> None:
        """Draw the head of the table."""
        if self._display:
            self._display.open(learn)

    def before_epoch(self, learn: Learner) -> None:
        """Move the bar over the epochs."""
        if self._display:
            self._display.begin_epoch(learn)

    def before_train(self, learn: Learner) -> None:
        """Begin a bar over the training batches."""
        if self._display:
            self._display.begin_pass(learn, "train")

    def before_validate(self, learn: Learner) -> None:
        """Begin a bar over the validation batches."""
        if self._display and learn.phase == "fit":
            self._display.begin_pass(learn, "valid")

    def after_batch(self, learn: Learner) -> None:
        """Redraw, if it is time to."""
        if self._display and learn.phase == "fit":
            self._display.draw(learn)

    def after_epoch(self, learn: Learner) -> None:
        """Show the row of this epoch."""
        if self._display:
            self._display.end_epoch(learn, learn.history[-1])

    def after_cancel_epoch(self, learn: Learner) -> None:
        """Say that this epoch has no row."""
        if self._display:
            self._display.mark(learn, "cancelled")

    def after_cancel_fit(self, learn: Learner) -> None:
        """Remember that this is not the end that was planned."""
        self._cancelled = True


class _Lines:
    """One plain line an epoch. What is empty here is for bars."""

    def __init__(self, rank: int = 0) -> None:
        self._prefix = f"[rank {rank}] " if rank else ""
        self._marked: tuple[int, str] | None = None

    def open(self, learn: Learner) -> None:
        pass

    def begin_epoch(self, learn: Learner) -> None:
        pass

    def begin_pass(self, learn: Learner, which: str) -> None:
        pass

    def draw(self, learn: Learner) -> None:
        pass

    def end_epoch(self, learn: Learner, row: dict[str, Any]) -> None:
        left_out = ("fit", "epoch", "seconds", "partial")
        parts = [
            f"{name} {_cell(name, value)}" for name, value in row.items() if name not in left_out and value is not None
        ]
        parts.append(f"{_cell('seconds', row['seconds'])} s")
        if row.get("partial"):
            parts.append("partial")
        if learn.stop_reason:
            parts.append(f"stopped: {learn.stop_reason}")
        self._print(learn, "  ".join(parts))

    def mark(self, learn: Learner, how: str) -> None:
        """Say once in an epoch that it did not come to its end: a cancel of the fit cancels the epoch, too."""
        if (learn.epoch, how) != self._marked:
            self._marked = (learn.epoch, how)
            self._draw_mark(learn, how)

    def close(self, learn: Learner, how: str) -> None:
        if how:
            self.mark(learn, how)

    def _draw_mark(self, learn: Learner, how: str) -> None:
        self._print(learn, how)

    def _print(self, learn: Learner, text: str) -> None:
        print(f"{self._prefix}epoch {learn.epoch + 1}/{learn.n_epochs}  {text}", flush=True)  # noqa: T201


class _Bars(_Lines):
    """fastprogress's bars and its table. They are moved by the events of the loop: it iterates over its own loaders."""

    def __init__(self, types: BarTypes) -> None:
        super().__init__()
        self._bar_type, self._master_type, self._notebook = types
        self._master: Any = None
        self._bar: Any = None
        self._picture: Any = None
        self._columns: list[str] = []
        self._next = 0.0

    def open(self, learn: Learner) -> None:
        self._columns = []
        self._master = self._master_type(None, total=learn.n_epochs)
        move(self._master.main_bar, 0)

    def begin_epoch(self, learn: Learner) -> None:
        move(self._master.main_bar, learn.epoch)

    def begin_pass(self, learn: Learner, which: str) -> None:
        self._end_pass()
        bar = self._bar_type(None, total=loader_length(learn.dl) or "noinfer", parent=self._master)
        move(bar, 0)
        bar.comment = which
        self._bar, self._next = bar, time.perf_counter() + REDRAW

    def draw(self, learn: Learner) -> None:
        if time.perf_counter() < self._next:
            return
        done, total = learn.batch_idx + 1, self._bar.total
        if total is None or done < total:  # a full bar would close itself
            if learn.running_loss.count:
                which = "train" if learn.training else "valid"
                self._bar.comment = f"{which} loss {show(learn.running_loss.compute())}"
            move(self._bar, done)
        self._next = time.perf_counter() + REDRAW

    def end_epoch(self, learn: Learner, row: dict[str, Any]) -> None:
        self._end_pass()
        names = [name for name in row if name not in ("fit", "epoch", "partial")]
        if not set(names) <= set(self._columns):  # the first row, or one with something that those before it lack
            self._columns = names
            self._write(["epoch", *names])
        cells = [_cell(name, row.get(name)) for name in self._columns]
        cells[-1] += " partial" if row.get("partial") else ""
        self._write([str(learn.epoch + 1), *cells])
        if self._notebook:
            self._draw_picture(learn)

    def close(self, learn: Learner, how: str) -> None:
        if self._master is None:  # it never began
            return
        super().close(learn, how)
        if not how:
            self._end_pass()
            if learn.stop_reason:
                self._master.write(f"stopped: {learn.stop_reason}")
            vars(self._master).get("inner_dict", {}).pop(
                "pb2", None
            )  # a notebook would go on showing the last inner bar
            self._master.main_bar.update_bar(learn.epoch + 1)
            with suppress(ImportError):  # in a notebook 1.1.x wants matplotlib, even where nothing was drawn with it
                self._master.main_bar.on_iter_end()

    def _end_pass(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.on_iter_end()

    def _write(self, cells: list[str]) -> None:
        if not self._notebook:  # the terminal's columns are as wide as their heads
            cells = [cells[0], *(cell.ljust(10) for cell in cells[1:])]
        self._master.write(cells, table=True)

    def _draw_mark(self, learn: Learner, how: str) -> None:
        bar, self._bar = self._bar, None
        if self._notebook:
            if bar is not None:
                bar.on_update(learn.batch_idx, how, interrupted=True)
            self._master.main_bar.on_update(learn.epoch, how, interrupted=True)
            self._master.write(f"epoch {learn.epoch + 1}/{learn.n_epochs} {how}")
            self._master.show()
        elif bar is not None:
            bar.comment += f" {how}"  # the loss is not read anew: after an error that could fail, too
            bar.length, bar.last_t = bar.cols, time.time()
            bar.update_bar(
                max(learn.batch_idx, bar.last_v or 0)
            )  # not `update`: that would close a full bar, and wipe it
            print(flush=True)  # noqa: T201 - what is printed next begins on a new line
        else:
            self._print(learn, how)

    def _draw_picture(self, learn: Learner) -> None:
        losses = {
            name: column for name, column in learn.history.to_dict().items() if name in ("train_loss", "valid_loss")
        }
        from minitrain import plot

        file = io.BytesIO()
        try:
            plot.curves(losses, save=file)
        except ImportError:  # no matplotlib, no picture
            return
        from IPython.display import Image, display

        image = Image(data=file.getvalue(), format="png")
        if self._picture is None:
            self._picture = display(image, display_id=True)
        else:
            self._picture.update(image)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    formats = {"lr": ".3g", "seconds": ".1f"}
    return format(value, formats[name]) if name in formats else show(value)


def _choose_display() -> _Lines:
    types = bar_types()
    return _Lines(rank()) if types is None else _Bars(types)
