"""`Pass`: one pass over a loader, which counts what it draws and knows whether it came to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from minitrain.errors import DataError
from minitrain.preserve import with_samplers


class Pass:
    """Draw the batches of a loader until they end, or until somebody asks to stop.

    Args:
        dl: Any iterable of batches.
        which: What the loader is for, in error messages.
        stopped: Asked before each batch is drawn; True ends the pass.
        begin: Called when the pass begins, returns what is iterated over: the loader, or what is left of it. None: the loader.
        n_drawn: How many batches are counted as drawn before it begins.

    Attributes:
        n_drawn: How many batches have been drawn so far.
        complete: The loader has nothing left, as far as one can tell without drawing.

    Raises:
        DataError: The loader came to its end without a single batch.

    Example:
        >>> drawing = Pass([1, 2, 3], "training", lambda: drawing.n_drawn == 2)
        >>> list(drawing), drawing.complete
        ([1, 2], False)
    """

    def __init__(
        self,
        dl: Iterable[Any],
        which: str,
        stopped: Callable[[], bool] = lambda: False,
        begin: Callable[[], Iterable[Any]] | None = None,
        n_drawn: int = 0,
    ) -> None:
        self._dl, self._which, self._stopped = dl, which, stopped
        self._begin = begin
        self._ended = False
        self.n_drawn = n_drawn

    def __iter__(self) -> Iterator[Any]:
        # Before all else, even if it was stopped by now: a fit that goes on loads its state here.
        batches = self._dl if self._begin is None else self._begin()
        if self._stopped():
            return
        for batch in self._noted(batches):
            self.n_drawn += 1
            yield batch
            del batch  # or it would live on while the next one is made
            if self._stopped():
                return
        self._ended = True
        if self.n_drawn == 0:
            raise DataError(
                f"the {self._which} loader ({type(self._dl).__name__}) gave no batch. A generator gives its batches only "
                "once: pass a list or a loader. Or drop_last=True with fewer samples than a batch?"
            )

    def _noted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; an error of the loader says where it happened."""
        try:
            yield from batches
        except Exception as error:
            error.add_note(
                f"while drawing batch {self.n_drawn} from the {self._which} loader ({type(self._dl).__name__})"
            )
            raise

    @property
    def complete(self) -> bool:
        """Whether nothing is left to draw; False where the loader cannot tell."""
        return self._ended or self.n_drawn == loader_length(self._dl)


def loader_length(dl: Any) -> int | None:
    """How many batches the loader has, or None where it cannot tell."""
    try:
        return len(dl)
    except (TypeError, NotImplementedError):  # a generator, an iterable dataset
        return None


def set_epoch(dl: Any, epoch: int) -> None:
    """Tell a loader and its samplers which training epoch this is: their order may depend on it."""
    for thing in with_samplers(dl):
        tell = getattr(thing, "set_epoch", None)
        if tell is not None:
            tell(epoch)
