"""`InitStage`: the contract of everything that can be `Learner(init=...)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import nn

from minitrain.init.report import InitReport


@runtime_checkable
class InitStage(Protocol):
    """A callable that initialises a model in place, once, before the first fit and before any hook or callback is active.

    A stage of one's own is any function with this signature; it may return None instead of a report. A class that
    takes options and has `__call__` serves as well.

    Example:
        >>> from torch import nn
        >>> from minitrain.init import InitStage
        >>> def zero_head(model, batches):
        ...     nn.init.zeros_(model[-1].weight)
        >>> isinstance(zero_head, InitStage)
        True
    """

    def __call__(self, model: nn.Module, batches: Iterable[Any]) -> InitReport | None:
        """Initialise `model`.

        Args:
            model: What is changed, in place.
            batches: The model's inputs, batch by batch, on the model's device: a tuple holds several positional
                arguments, anything else is a single one. Each iteration begins anew, and none moves the training stream.
                A stage that takes long may show a bar if they have an attribute `progress` that is True.

        Returns:
            What was done, layer by layer; or None.
        """
