"""Exceptions: what minitrain raises, and the signals by which a callback ends a stage.

Every error is also a builtin, so that nobody needs to import ours to catch ours. Argument errors are plain
`TypeError` and `ValueError`.
"""

from __future__ import annotations

from typing import ClassVar


class MinitrainError(Exception):
    """Base class of everything that minitrain raises on its own account."""


class LoopError(MinitrainError, RuntimeError):
    """The loop is used in a way that cannot work: a fit inside a callback, a cancel with nothing to cancel."""


class DataError(MinitrainError, ValueError):
    """A loader or a batch cannot be used: it is empty, exhausted, or not of the form the Learner expects."""


class InitError(MinitrainError, RuntimeError):
    """An initialisation stage cannot do its work; the model is as it was before."""


class CheckpointError(MinitrainError, RuntimeError):
    """A checkpoint cannot be written or read; nothing has been half loaded or overwritten."""


class Cancel(MinitrainError):
    """Base class of the signals: raise one of its subclasses in a callback to end a stage of the loop.

    Each open stage up to the named one ends, innermost first, and runs its `after_cancel_*` event instead of `after_*`.
    """

    stage: ClassVar[str]

    def __init__(self, *args: object) -> None:
        if type(self) is Cancel:
            raise TypeError("Cancel does not say what it ends: raise CancelBatch, CancelTrain, CancelFit, ...")
        super().__init__(*args)


class CancelBatch(Cancel):
    """End this batch; it is not counted. The loop goes on with the next one.

    If it has been differentiated by then, all gradients are dropped, those that `CancelStep` has kept before it included.
    """

    stage = "batch"


class CancelStep(Cancel):
    """Skip the optimiser's update (from `after_backward` or `before_step`); gradients stay and the batch counts."""

    stage = "step"


class CancelTrain(Cancel):
    """End the training part of this epoch; the loop goes on with validation."""

    stage = "train"


class CancelValidate(Cancel):
    """End this validation; within a fit the loop goes on with the end of the epoch."""

    stage = "validate"


class CancelEpoch(Cancel):
    """End this epoch without a row in the history; the loop goes on with the next epoch."""

    stage = "epoch"


class CancelFit(Cancel):
    """End the whole fit at once. For a graceful end use `Learner.stop`."""

    stage = "fit"
