"""`Strand`: a function that can be paused in its midst, and goes on later. Only one of them, or their owner, runs at a time."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from minitrain.init.calls import OutOfStep

STILL = 3 if hasattr(time, "pthread_getcpuclockid") else 60
"""Seconds without any progress after which a strand is taken to stand still."""


class _Abandoned(BaseException):
    """Unwinds a strand that is not needed any more."""


class Strand:
    """A thread that serves as a coroutine: a forward pass cannot be a generator.

    Args:
        body: What it runs; it may call `pause` of the strand that it is given.
    """

    def __init__(self, body: Callable[[Strand], None]) -> None:
        self._body = body
        self._mine, self._owners = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stop: Any = None
        self._value: Any = None
        self._abandoned = False
        self._context, self._surroundings = contextvars.copy_context(), _Surroundings()
        self._thread = threading.Thread(target=self._run, name="minitrain lock-step", daemon=True)
        self._started = False

    def advance(self, value: Any = None) -> Any:
        """Run on, until the next pause or the end.

        Args:
            value: What the `pause` that it stands at returns.

        Returns:
            What the next `pause` was called with; None at the end.

        Raises:
            BaseException: What the body raised.
        """
        self._value, self._stop = value, None
        if self._started:
            self._mine.release()
        else:
            self._started = True
            self._thread.start()
        self._wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        stop, self._stop = self._stop, None
        return stop

    def pause(self, stop: Any) -> Any:
        """Called by the body: wait here. Returns what `advance` is called with next."""
        if self._abandoned:
            raise _Abandoned
        self._stop = stop
        del stop  # it is large, and this frame lives on
        self._owners.release()
        self._mine.acquire()
        if self._abandoned:
            raise _Abandoned
        value, self._value = self._value, None
        return value

    def _wait(self) -> None:
        """Until the body pauses or ends.

        Raises:
            OutOfStep: It stands still, most likely for a lock that another strand holds.
        """
        before: tuple[Any, ...] | None = None
        patience = STILL
        while not self._owners.acquire(timeout=1):
            now = self._place()
            patience = patience - 1 if now == before else STILL
            if patience == 0:
                raise OutOfStep("a batch stood still, most likely at a lock that the pass of another batch holds")
            before = now

    def _place(self) -> tuple[Any, ...]:
        """Where the body is, and how much time it has been computing: a long operation is no standstill."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        clock = getattr(time, "pthread_getcpuclockid", None)  # Unix only
        spent = 0.0
        if clock is not None and self._thread.is_alive():
            spent = round(time.clock_gettime(clock(self._thread.ident)), 2)
        return (id(frame), frame.f_lasti if frame else None, spent)

    def _run(self) -> None:
        try:
            with self._surroundings:
                self._context.run(self._body, self)
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - it surfaces where the owner waits
            self._error = error
        finally:
            self._owners.release()


class _Surroundings(ExitStack):
    """The device and the stream of the thread that makes it, for the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()
        default = torch.get_default_device()
        self._contexts: list[Any] = [] if default.type == "cpu" else [default]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
            self._contexts += [torch.cuda.device(device), torch.cuda.stream(stream)]

    def __enter__(self) -> _Surroundings:
        super().__enter__()
        for context in self._contexts:
            self.enter_context(context)
        return self


def abandon(strands: list[Strand]) -> None:
    """End them, wherever they stand, and wait until they have ended, Ctrl-C notwithstanding."""
    interrupted: KeyboardInterrupt | None = None
    for strand in strands:
        strand._abandoned = True
    while waiting := [strand for strand in strands if strand._thread.is_alive()]:
        for strand in waiting:
            strand._mine.release()  # more often than needed does no harm: it pauses no more
        try:
            waiting[0]._thread.join(0.1)
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
