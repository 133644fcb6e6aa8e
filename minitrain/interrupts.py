"""`Interrupts`: Ctrl-C and SIGTERM as a flag, to be taken where it suits; a second one acts at once."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupts:
    """Note the first SIGINT or SIGTERM instead of acting on it.

    A context: handlers are as before on exit. From the first signal on nobody hears of children that die: a signal to the
    whole group of processes reaches a loader's workers, too. A second signal does at once what the handler from before would
    have done. A signal that is ignored stays so.

    Args:
        at_once: Called before a second signal acts.

    Attributes:
        pending: The number of the signal that has come, or None.

    Warns:
        It is entered outside of the main thread, where Python lets nobody handle signals.

    Example:
        >>> import os
        >>> with Interrupts() as interrupts:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     interrupts.pending == signal.SIGTERM
        True
    """

    def __init__(self, at_once: Callable[[], Any] = lambda: None) -> None:
        self.pending: int | None = None
        self._at_once, self._before = at_once, dict[int, Any]()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "on_interrupt=True has no effect outside of the main thread: no signal arrives here.", stacklevel=2
            )
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            # None is a handler that was not set from Python, and could not be put back
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending is None:
            self.pending = number
            self._spare_children()
            return
        self._at_once()
        self._act(number, frame)

    def _spare_children(self) -> None:
        """Let no death of a worker interrupt what is under way: it may have got the same signal, and torch would raise."""
        child = getattr(signal, "SIGCHLD", None)
        if child is not None and callable(signal.getsignal(child)):
            self._before.setdefault(child, signal.signal(child, signal.SIG_DFL))

    def go_on(self) -> None:
        """Do what the pending signal would have done: raise `KeyboardInterrupt`, or `SystemExit` where it would have killed."""
        if self.pending is not None:
            number, self.pending = self.pending, None
            self._act(number, None)

    def _act(self, number: int, frame: FrameType | None) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
        else:  # the default would end the process with nothing closed
            raise SystemExit(128 + number)
