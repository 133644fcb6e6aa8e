"""`Callback`, the base class that is the manual, and `EVENTS`, the one list of everything that it can react to."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitrain.learner import Learner

STAGES = ("batch", "step", "train", "validate", "epoch", "fit")
"""The stages that a cancel can end, innermost first (a step lies within a batch)."""

EVENTS = (
    "before_fit",
    "before_epoch",
    "before_train",
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "after_backward",
    "before_step",
    "after_step",
    "after_batch",
    "after_train",
    "before_validate",
    "after_validate",
    "after_epoch",
    "after_fit",
    *(f"after_cancel_{stage}" for stage in STAGES),
    "during_fit",
    "during_validate",
    "during_forward",
)
"""Every event, in the order of a fit; then the six cancels; then the three contexts."""

_UNUSUAL = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)
# Whatever begins like an event, however spelt, and what other libraries call theirs.
_LIKE_AN_EVENT = re.compile(
    r"(before|befor|bfore|after|aftr|afer|during|durin)_?"
    r"(fit|epoch|train|batch|pred|loss|backward|step|valid|cancel|forward|_)"
    r"|(before|after|during)_"
    r"|on_\w+_(start|end|begin)$|begin_(fit|epoch|train|batch|validate)$",
    re.IGNORECASE,
)


class Callback:
    """Look at a run, or intervene in it: subclass, and override the events that you need.

    Each event is called with the `Learner`, which carries the whole state of the loop; a callback keeps only what is its
    own. A method whose name begins like an event but is none (one of Lightning's or of an older fastai neither), or whose
    signature is not `(self, learn)`, is a `TypeError` when the class is made: a misspelt event never does nothing in silence.
    So is a class that gives a state and does not take it back, or the other way round.

    The events of one epoch, in order::

        before_fit
          before_epoch
            before_train
              before_batch  after_pred  after_loss  before_backward  after_backward  before_step  after_step  after_batch
            after_train
            before_validate
              before_batch  after_pred  after_loss  after_batch
            after_validate
          after_epoch
        after_fit

    To end a stage early, raise `CancelBatch`, `CancelStep`, `CancelTrain`, `CancelValidate`, `CancelEpoch` or `CancelFit`
    (from `minitrain.errors`): every open stage up to that one then runs its `after_cancel_*` instead of its `after_*`. To
    end a fit gracefully call `learn.stop(reason)`. For a resource that must be closed whatever happens (a hook, a file, a
    bar) use a context: `during_fit`, `during_validate`, `during_forward`.

    Attributes:
        order: Callbacks run in ascending order, for before and after events alike; ties keep the order of the list.
        state_key: The name of this callback's state in a checkpoint. None means the name of the class; give it where
            several callbacks of one class are used.

    Example:
        >>> from minitrain import Callback
        >>> class CountBatches(Callback):
        ...     def before_fit(self, learn):
        ...         self.n = 0
        ...     def after_batch(self, learn):
        ...         self.n += learn.training
        >>> class Misspelt(Callback):
        ...     def after_bach(self, learn): ...
        Traceback (most recent call last):
            ...
        TypeError: Misspelt.after_bach is not an event. Did you mean 'after_batch'? (minitrain.EVENTS lists them all.)
    """

    order: int = 0
    state_key: str | None = None

    # -- the whole fit ------------------------------------------------------------------------------------------------

    def before_fit(self, learn: Learner) -> None:
        """A fit begins: the model is initialised, the optimiser built, no gradient is set. `learn.n_epochs` is known."""

    def after_fit(self, learn: Learner) -> None:
        """The fit has ended, by itself or by `learn.stop`."""

    def before_epoch(self, learn: Learner) -> None:
        """Epoch `learn.epoch`, counted from 0 within the fit, begins."""

    def after_epoch(self, learn: Learner) -> None:
        """The epoch has ended; its row is `learn.history[-1]`."""

    # -- training -----------------------------------------------------------------------------------------------------

    def before_train(self, learn: Learner) -> None:
        """Training begins: all modules are in training mode. What you set here survives the validation of this fit."""

    def after_train(self, learn: Learner) -> None:
        """The training batches of this epoch are done."""

    def before_batch(self, learn: Learner) -> None:
        """A batch is on the device: `learn.batch`, `learn.xb`, `learn.yb` may be read and replaced."""

    def after_pred(self, learn: Learner) -> None:
        """`learn.preds` is what the model made of `learn.xb`."""

    def after_loss(self, learn: Learner) -> None:
        """`learn.loss` is there. It is what is reported; `learn.backward_loss` is what will be differentiated."""

    def before_backward(self, learn: Learner) -> None:
        """The last moment to change `learn.backward_loss` (training only)."""

    def after_backward(self, learn: Learner) -> None:
        """Gradients are there. From here until the update, `CancelStep` skips the update and keeps the gradients."""

    def before_step(self, learn: Learner) -> None:
        """The last look at the gradients before the optimiser uses them."""

    def after_step(self, learn: Learner) -> None:
        """The optimiser has made a step; gradients are still there and are dropped right after this event."""

    def after_batch(self, learn: Learner) -> None:
        """The batch is counted; `learn.batch`, `preds` and `loss` are released right after this event."""

    # -- validation ---------------------------------------------------------------------------------------------------

    def before_validate(self, learn: Learner) -> None:
        """Validation begins, in evaluation mode and without gradients; `learn.phase` tells who asked for it."""

    def after_validate(self, learn: Learner) -> None:
        """Validation has ended."""

    # -- a stage was cancelled: called instead of its after_* ---------------------------------------------------------

    def after_cancel_batch(self, learn: Learner) -> None:
        """The batch was cancelled: it does not count."""

    def after_cancel_step(self, learn: Learner) -> None:
        """The update was skipped, by `CancelStep` or by a gradient scaler; the batch goes on to `after_batch`."""

    def after_cancel_train(self, learn: Learner) -> None:
        """Training was cancelled in this epoch; validation follows, unless the cancel goes further."""

    def after_cancel_validate(self, learn: Learner) -> None:
        """Validation was cancelled."""

    def after_cancel_epoch(self, learn: Learner) -> None:
        """The epoch was cancelled: it has no row in the history."""

    def after_cancel_fit(self, learn: Learner) -> None:
        """The fit was cancelled."""

    # -- resources: return a context manager (write a generator under @contextlib.contextmanager) ---------------------

    def during_fit(self, learn: Learner) -> AbstractContextManager[Any]:
        """A resource for the whole fit: opened after initialisation and before `before_fit`, closed on every exit."""
        return nullcontext()

    def during_validate(self, learn: Learner) -> AbstractContextManager[Any]:
        """A resource for one validation or prediction, for example averaged weights."""
        return nullcontext()

    def during_forward(self, learn: Learner) -> AbstractContextManager[Any]:
        """A resource for one forward pass and its loss, for example autocast."""
        return nullcontext()

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: plain types and tensors only. Asked between batches or epochs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; check it, since it comes from a file.

        In a fit that goes on (`learn.resumed`) it is called after `before_fit`, in mid-epoch after `before_train`.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        gives, takes = cls.state_dict is not Callback.state_dict, cls.load_state_dict is not Callback.load_state_dict
        if gives != takes:
            has, lacks = ("state_dict", "load_state_dict") if gives else ("load_state_dict", "state_dict")
            raise TypeError(
                f"{cls.__name__} has a {has} and no {lacks}: its state would be lost. Write both, or neither."
            )
        behind = cls.__mro__[cls.__mro__.index(Callback) + 1 :]
        for base in cls.__mro__:
            for name, value in vars(base).items() if base is not Callback else ():
                if _LIKE_AN_EVENT.match(name):
                    _check_event(cls, name, value)
                    if base in behind and name in EVENTS:
                        raise TypeError(
                            f"{base.__name__}.{name} would never run: Callback comes before it and has a {name} of its own. "
                            f"Write class {cls.__name__}({base.__name__}, Callback)."
                        )


def _check_event(cls: type, name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` can serve as the event `name` of `cls`."""
    if name in EVENTS and _is_plain(value):
        return
    where = f"{cls.__name__}.{name}"
    is_bound = hasattr(type(value), "__get__")  # looked up on an instance, it becomes a method of it
    is_method = callable(value) or is_bound
    if name not in EVENTS:
        if not is_method:
            return  # data may be called as it likes: `after_steps = 100`
        near = difflib.get_close_matches(name, EVENTS, n=1, cutoff=0.0)[0]
        raise TypeError(f"{where} is not an event. Did you mean {near!r}? (minitrain.EVENTS lists them all.)")
    if not is_method or isinstance(value, property):
        raise TypeError(f"{where} must be a method (self, learn), got {value!r}.")
    function = getattr(cls, name)
    wanted = ["self", "learn"] if is_bound and not isinstance(value, (staticmethod, classmethod)) else ["learn"]
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{where} is a coroutine: the loop calls it, nobody would await it. Write a plain def.")
    if inspect.isgeneratorfunction(function):
        remedy = "decorate it with @contextlib.contextmanager" if name.startswith("during_") else "remove the yield"
        raise TypeError(f"{where} is a bare generator, its body would never run: {remedy}.")
    parameters = list(inspect.signature(function).parameters.values())
    if isinstance(value, (functools.partial, functools.partialmethod)):  # what it gives by keyword is given
        parameters = [p for p in parameters if p.name not in value.keywords]
    if len(parameters) != len(wanted) or any(
        p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters
    ):
        got = ", ".join(str(p) for p in parameters)
        raise TypeError(f"{where} has the signature ({got}), wanted ({', '.join(wanted)}).")


def _is_plain(value: Any) -> bool:
    """A function (self, learn) like any other: seen without `inspect`, which is slow."""
    code = getattr(value, "__code__", None)
    return (
        type(value) is FunctionType
        and code is not None
        and (code.co_argcount, code.co_kwonlyargcount) == (2, 0)
        and not code.co_flags & _UNUSUAL
        and not hasattr(value, "__wrapped__")
    )
