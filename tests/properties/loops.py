"""Drawn runs of the loop: callbacks that write down every event, and that intervene where a plan says so."""

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import nn

from minitrain import EVENTS, BatchLoader, Callback, DataLoaders, Learner, errors
from minitrain.stages import Stages

CANCELS = (
    errors.CancelBatch,
    errors.CancelStep,
    errors.CancelTrain,
    errors.CancelValidate,
    errors.CancelEpoch,
    errors.CancelFit,
)
FAULTS = (ValueError, KeyError, StopIteration, RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)
POINTS = [event for event in EVENTS if not event.startswith("during_")]
CONTEXTS = [event for event in EVENTS if event.startswith("during_")]
BATCH_LEVEL = set(POINTS[3:11]) | {"after_cancel_batch", "after_cancel_step"}


@dataclass
class Plan:
    """At the `nth` time that `event` reaches callback `who`, call `act(learn)`."""

    who: int
    event: str
    nth: int
    act: object = field(repr=False)
    done: bool = False


def _point(event):
    def method(self, learn):
        self.log.append((self.index, event))
        self.seen[event] += 1
        for plan in self.plans:
            if plan.who == self.index and plan.event == event and plan.nth == self.seen[event] - 1 and not plan.done:
                plan.done = True
                plan.act(learn)

    return lambda self, learn: method(self, learn)


def _context(event):
    @contextlib.contextmanager
    def method(self, learn):
        self.log.append((self.index, f"open {event}"))
        try:
            yield
        finally:
            self.log.append((self.index, f"close {event}"))

    return lambda self, learn: method(self, learn)


def _init(self, index, log, plans, order=0):
    self.index, self.log, self.plans, self.order = index, log, plans, order
    self.seen, self.state_key = Counter(), f"recorder{index}"


Recorder = type(
    "Recorder",
    (Callback,),
    {"__init__": _init} | {e: _point(e) for e in POINTS} | {e: _context(e) for e in CONTEXTS},
)


class Net(nn.Module):
    """Everything that training can disturb: batch norm's buffers, dropout's random numbers, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.last(self.drop(self.norm(self.first(x)).relu())) * self.frozen


@dataclass(frozen=True)
class Size:
    """How large a run is: epochs, training batches, validation batches (None: no validation loader)."""

    epochs: int
    train: int
    valid: int | None
    callbacks: int = 2


sizes = st.builds(
    Size,
    epochs=st.integers(1, 3),
    train=st.integers(1, 3),
    valid=st.none() | st.integers(1, 2),
    callbacks=st.integers(1, 3),
)


def make_data(n_batches, seed, batch_size=4, uneven=True):
    """`n_batches` batches, the last one a little smaller."""
    g = torch.Generator().manual_seed(seed)
    n = n_batches * batch_size - (1 if uneven else 0)
    return torch.randn(n, 3, generator=g), torch.randint(0, 2, (n,), generator=g)


def make_loaders(size, shuffle=True):
    train = BatchLoader(*make_data(size.train, 1), batch_size=4, shuffle=shuffle, seed=3)
    valid = None if size.valid is None else BatchLoader(*make_data(size.valid, 2), batch_size=4)
    return DataLoaders(train, valid)


def make_learner(size, cbs=(), **options):
    torch.manual_seed(0)
    options = {"opt_func": torch.optim.SGD, "lr": 0.1, "seed": 5, "progress": False} | options
    net = options.pop("net", None) or Net()
    return Learner(net, options.pop("dls", None) or make_loaders(size), nn.functional.cross_entropy, cbs=cbs, **options)


def make_recorders(size, plans, orders=None):
    log = []
    return log, [Recorder(i, log, plans, (orders or [0] * 9)[i]) for i in range(size.callbacks)]


def expected_events(size):
    """The reference: the events of a fit in which nobody intervenes, written out as DESIGN.md draws them."""
    forward = ["before_batch", "open during_forward", "after_pred", "close during_forward", "after_loss"]
    step = ["before_backward", "after_backward", "before_step", "after_step"]
    log = ["open during_fit", "before_fit"]
    for _ in range(size.epochs):
        log += ["before_epoch", "before_train", *[*forward, *step, "after_batch"] * size.train, "after_train"]
        if size.valid is not None:
            log += ["open during_validate", "before_validate", *[*forward, "after_batch"] * size.valid]
            log += ["after_validate", "close during_validate"]
        log += ["after_epoch"]
    return [*log, "after_fit", "close during_fit"]


@st.composite
def plans(draw, size, acts, events=POINTS):
    """One intervention at a drawn moment of a run of this size (which may never come)."""
    event = draw(st.sampled_from(events))
    most = 1 + (size.epochs * (size.train + (size.valid or 0)) if event in BATCH_LEVEL else size.epochs)
    return Plan(draw(st.integers(0, size.callbacks - 1)), event, draw(st.integers(0, most - 1)), draw(acts))


def raiser(error):
    error.planned = True

    def act(learn):
        raise error

    return act


def snapshot(model):
    """All that a run must leave as it was or may be compared by: parameters, buffers, modes, hooks."""
    return {
        "values": {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "modes": [m.training for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()
        ],
    }


def same_values(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def assert_clean(learn, before_modes, before_hooks):
    """After whatever happened: no hook, mode, grad mode, context, batch or dispatch table is left."""
    after = snapshot(learn.model)
    assert after["modes"] == before_modes
    assert after["hooks"] == before_hooks
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert isinstance(learn.cbs, list)
    assert learn.phase is None
    assert learn.dl is None
    assert not learn.training
    for name in ("batch", "xb", "yb", "preds", "loss", "backward_loss"):
        assert getattr(learn, name) is None, name
    assert learn not in [stages._learn for stages in Stages._entered]
