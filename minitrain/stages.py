"""`Stages`: who runs when, how a stage ends, and how what is open gets closed. One object serves one run of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch

from minitrain.batch import describe_batch
from minitrain.callback import EVENTS, STAGES, Callback
from minitrain.errors import Cancel, LoopError

if TYPE_CHECKING:
    from minitrain.learner import Learner

# stage -> what opens it, what ends it, what ends it when it is cancelled. A step opens with `after_backward`, so that
# CancelStep may be raised there as well as in `before_step`, which is fired by the step itself.
_EVENTS_OF = {
    stage: ("after_backward" if stage == "step" else f"before_{stage}", f"after_{stage}", f"after_cancel_{stage}")
    for stage in STAGES
}
_EPOCH_ENDS = _EVENTS_OF["epoch"][1:]  # the epoch is no longer open there, and yet they are of it
_ENDINGS = frozenset(event for events in _EVENTS_OF.values() for event in events[1:])
_BATCH_EVENTS = frozenset((*EVENTS[3:11], "after_cancel_batch", "after_cancel_step", "during_forward"))


class Stages:
    """The dispatch table of one run, and the rules of its stages.

    Every `before_X` that returned is followed by exactly one of `after_X` and `after_cancel_X`, or, when an error ends the
    run, by neither.

    Args:
        learn: What the callbacks are called with.
        cbs: The callbacks, in the order in which they run.
    """

    _entered: ClassVar[WeakSet[Stages]] = WeakSet()  # of all Learners; a callback must not be in two that run

    def __init__(self, learn: Learner, cbs: Sequence[Callback]) -> None:
        self._learn, self.cbs = learn, tuple(cbs)
        self._table = {event: tuple(_bound(self.cbs, event)) for event in EVENTS}
        self._no_context: AbstractContextManager[None] = nullcontext()
        self.open: list[str] = []
        """The stages that are open at this moment, outermost first."""
        self._blamed: BaseException | None = None  # the last error that got a note

    def __enter__(self) -> Stages:
        taken = {id(cb) for stages in Stages._entered if stages._learn._stages is stages for cb in stages.cbs}
        for cb in self.cbs:
            if id(cb) in taken:
                raise LoopError(
                    f"{type(cb).__name__} is in use by another Learner that is running: a callback serves one Learner at a "
                    "time. Make a second instance."
                )
        Stages._entered.add(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        Stages._entered.discard(self)
        self._blamed = None  # its traceback leads here, and holds every tensor on the way

    def fire(self, event: str) -> None:
        """Call `event` of every callback that overrides it.

        A cancel ends the round at once, except in an `after_*` that ends a stage: there the others are owed theirs, and
        the cancel goes on afterwards.
        """
        held: Cancel | None = None
        for name, function in self._table[event]:
            try:
                function(self._learn)
            except BaseException as error:
                self.surface(error, name, event)
                if not isinstance(error, Cancel) or event not in _ENDINGS:
                    raise
                held = self._outermost(held, error)
        if held is not None:
            try:
                raise held
            finally:
                del held  # or its traceback and this frame would hold one another, and the batch, until a collection

    def run(self, stage: str, body: Callable[[], None]) -> bool:
        """Open a stage, run its body, and end it by the right event.

        Args:
            stage: One of `STAGES`.
            body: What the stage does.

        Returns:
            True if the stage ran to its end, False if a cancel of its own kind ended it. A cancel of a stage further out
            goes on outwards.

        Raises:
            LoopError: A cancel names a stage that is not open.
        """
        before, after, after_cancel = _EVENTS_OF[stage]
        cancel: Cancel | None = None
        self.open.append(stage)
        try:
            self.fire(before)
            body()
        except Cancel as raised:
            self._check(raised, "the loop")
            cancel = raised
        finally:
            self.open.pop()
        if cancel is None:
            self.fire(after)
            return True
        try:
            self.fire(after_cancel)
        except Cancel as other:
            cancel = self._outermost(other, cancel)
        try:
            if cancel.stage != stage:
                raise cancel
        finally:
            del cancel  # as in `fire`
        return False

    def during(self, event: str) -> AbstractContextManager[Any]:
        """The contexts of all callbacks: opened in order, closed last in first out, on every exit, whatever fails."""
        return _Contexts(self, event) if self._table[event] else self._no_context

    def _check(self, cancel: Cancel, where: str) -> None:
        """Raise `LoopError` unless there is something left to cancel."""
        if cancel.stage not in self.open:
            kind = type(cancel).__name__
            now = f"open are: {', '.join(self.open)}" if self.open else "nothing is open"
            raise LoopError(
                f"{kind} raised in {where}, but no {cancel.stage} is open that it could end ({now}). {kind} is valid from "
                f"{_EVENTS_OF[cancel.stage][0]} until {_EVENTS_OF[cancel.stage][1]} begins."
            ) from cancel

    def _outermost(self, a: Cancel | None, b: Cancel) -> Cancel:
        """Of two cancels the one that reaches further out; the first one if they reach equally far."""
        if a is None:
            return b

        def depth(cancel: Cancel) -> int:  # a stage that has just been closed lies innermost
            return max((i for i, stage in enumerate(self.open) if stage == cancel.stage), default=len(self.open))

        return b if depth(b) < depth(a) else a

    def surface(self, error: BaseException, name: str, event: str) -> None:
        """An error of a callback surfaces as itself, with a note that says where; a cancel must have something to cancel."""
        if isinstance(error, Cancel):
            self._check(error, f"{name}.{event}")
        else:
            error.add_note(", ".join([f"{name}.{event}", *self._place(event in _BATCH_EVENTS, event in _EPOCH_ENDS)]))
            self._blamed = error

    def explain(self, error: Exception) -> None:
        """Add to an error of the model, the loss or the optimiser where it happened, and on what."""
        if error is not self._blamed and not isinstance(error, Cancel):
            learn = self._learn
            dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in learn.model.parameters()})
            error.add_note(
                f"{', '.join(self._place())}: the batch is {describe_batch(learn.batch)}, "
                f"the model is {'/'.join(dtypes) or 'without parameters'} on {learn.device}"
            )
            if _is_out_of_memory(error):
                error.add_note(_out_of_memory(learn))
            self._blamed = error

    def _place(self, with_batch: bool = True, with_epoch: bool = False) -> list[str]:
        """Where the loop stands, in words: `["epoch 3", "batch 17"]`."""
        learn = self._learn
        place = [f"epoch {learn.epoch}"] if learn.phase == "fit" and (with_epoch or "epoch" in self.open) else []
        if with_batch:
            kind = "" if learn.training else " (prediction)" if learn.phase == "predict" else " (validation)"
            place.append(f"batch {learn.batch_idx}{kind}")
        return place

    def __str__(self) -> str:
        lines = ["Callbacks in order: " + (", ".join(f"{type(cb).__name__} ({cb.order})" for cb in self.cbs) or "none")]
        lines += [
            f"  {event:<22} {', '.join(name for name, _ in functions)}"
            for event, functions in self._table.items()
            if functions
        ]
        return "\n".join(lines)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(learn: Learner) -> str:
    try:
        size = f" of {learn.n_samples(learn.batch)} samples"
    except Exception:  # noqa: BLE001 - whatever fails here, it is the first error that is to be seen
        size = ""
    return (
        f"Out of memory on a batch{size}. Try a smaller batch_size, and make up for it by a step every few batches "
        "(CancelStep in after_backward); bfloat16 (autocast in during_forward); torch.utils.checkpoint in the model; or a "
        "smaller model."
    )


class _Contexts:
    """The contexts of all callbacks as one. Not a generator: that would turn a StopIteration of theirs into another error."""

    def __init__(self, stages: Stages, event: str) -> None:
        self._stages, self._event = stages, event

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for name, function in self._stages._table[self._event]:
                try:
                    context = function(self._stages._learn)
                    if not isinstance(context, AbstractContextManager):
                        raise TypeError(
                            f"{name}.{self._event} returned {context!r}, wanted a context manager: decorate a generator "
                            "with @contextlib.contextmanager, or return one."
                        )
                    context.__enter__()
                except BaseException as error:
                    self._stages.surface(error, name, self._event)
                    raise
                stack.push(self._closer(context, name))
            self._open = stack.pop_all()

    def __exit__(self, *exc_info: Any) -> None:
        self._open.__exit__(*exc_info)

    def _closer(self, context: AbstractContextManager[Any], name: str) -> Callable[..., bool]:
        def close(*exc_info: Any) -> bool:
            try:
                context.__exit__(*exc_info)
            except BaseException as error:
                if error is not exc_info[1]:
                    self._stages.surface(error, name, self._event)
                raise
            return False  # a resource may see an error, it may not swallow it

        return close


def _bound(cbs: Sequence[Callback], event: str) -> Iterator[tuple[str, Callable[[Learner], Any]]]:
    """The methods that override `event`, bound, each with the name of its class."""
    for cb in cbs:
        function = getattr(cb, event)
        if getattr(function, "__func__", None) is not getattr(Callback, event):
            yield type(cb).__name__, function
