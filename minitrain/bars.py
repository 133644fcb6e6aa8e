"""Progress bars: whether there is anywhere to draw them, and one over work that is not training."""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import torch

REDRAW = 0.1
"""Seconds between two drawings of a bar."""
_NARROW = 72  # columns; in fewer a bar with its loss would not fit into a line


class BarTypes(NamedTuple):
    """fastprogress's classes for where we are."""

    bar: Any
    master: Any
    notebook: bool


def rank() -> int:
    """The rank of this process among those that train together; 0 where it is alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    found = os.environ.get("RANK", "")
    return int(found) if found.isdecimal() else 0


def bar_types() -> BarTypes | None:
    """What to draw bars with; None where there is no terminal or notebook to draw them in, or it is not for us to draw."""
    notebook = _in_notebook()
    terminal = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    narrow = terminal and not notebook and shutil.get_terminal_size().columns < _NARROW
    if rank() or ci or narrow or not (notebook or terminal):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 1.0.x warns where matplotlib is missing
            from fastprogress import fastprogress
    except ImportError:
        return None
    notebook = notebook and getattr(fastprogress, "IN_NOTEBOOK", True)
    kind = "NB" if notebook else "Console"
    return BarTypes(getattr(fastprogress, f"{kind}ProgressBar"), getattr(fastprogress, f"{kind}MasterBar"), notebook)


def move(bar: Any, value: int) -> None:
    """Draw a bar at `value`, whether or not fastprogress thinks that it is time to."""
    bar.wait_for = 0
    if hasattr(bar, "cols"):  # on a terminal fill the line, so that nothing of a longer text stays
        bar.length = bar.cols
    bar.update(value)


class Bar:
    """A bar over work whose length may be a guess. It appears after a while: what is soon done shows none.

    Args:
        title: What is going on.
        shown: False: no bar at all.
        patience: Seconds until it appears.
    """

    def __init__(self, title: str, shown: bool = True, patience: float = 1.0) -> None:
        self._title, self._types = title, bar_types() if shown else None
        self._next = time.perf_counter() + patience
        self._bar: Any = None
        self.done, self.total = 0, 0

    def tick(self) -> None:
        """One more piece is done."""
        self.done += 1
        if self._types is None or time.perf_counter() < self._next:
            return
        self.total = max(self.total, self.done + 1)  # a full bar would close itself
        if self._bar is None:
            self._bar = self._types.bar(None, total=self.total, leave=False)
            move(self._bar, 0)
            self._bar.comment = self._title
        self._bar.total = self.total
        move(self._bar, self.done)
        self._next = time.perf_counter() + REDRAW

    def close(self) -> None:
        """Remove it."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(ImportError):  # in a notebook 1.1.x wants matplotlib, even where nothing is drawn with it
                bar.on_iter_end()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")  # a notebook's shell has one, a terminal's has none
