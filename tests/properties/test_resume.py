"""Going on with a fit: exact from any file of any drawn run; and whatever fails, nothing is half changed."""

import random
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from faults import victim
from hypothesis import assume, given
from hypothesis import strategies as st
from properties.loops import Net, make_data
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from minitrain import BatchLoader, Callback, CheckpointError, DataLoaders, Learner, checkpoint, errors
from minitrain.callbacks import ActivationStats, Checkpoint, OneCycle
from minitrain.preserve import loader_generators
from minitrain.random_states import RandomState

# What may be raised where by a callback that knows the moment from the loop's counters alone.
PLACES = {
    errors.CancelBatch: (
        "before_batch",
        "after_pred",
        "after_loss",
        "before_backward",
        "after_backward",
        "before_step",
    ),
    errors.CancelStep: ("after_backward", "before_step"),
    errors.CancelTrain: ("before_train", "before_batch", "after_loss", "after_backward", "after_batch"),
    errors.CancelValidate: ("before_validate", "before_batch", "after_pred", "after_batch"),
    errors.CancelEpoch: ("before_epoch", "before_train", "after_pred", "after_train", "after_batch", "after_validate"),
    errors.CancelFit: ("before_epoch", "before_batch", "after_step", "after_train", "before_validate"),
    "stop": (
        "before_epoch",
        "before_batch",
        "after_loss",
        "after_batch",
        "after_train",
        "after_validate",
        "after_epoch",
    ),
}
OF_A_BATCH = ("batch", "pred", "loss", "backward", "step")
OPTIMISERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "two groups": lambda params: torch.optim.RMSprop([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], lr=0.01),
}  # fmt: skip
LOADERS = ("tensors", "list", "shuffled", "own generator", "single", "stream", "iterable", "stateful")


class Stream(IterableDataset):
    def __init__(self, *tensors):
        self.data = TensorDataset(*tensors)

    def __iter__(self):
        yield from self.data


class Again:
    """A loader of one's own, whose order is drawn from the global random state."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __iter__(self):
        order = torch.randperm(len(self.tensors[0]))
        yield from zip(*(t[order].split(4) for t in self.tensors), strict=True)


class Points3(TensorDataset):
    """For `victim.Stateful`."""


def make_loader(kind, n):
    x, y = make_data(n, 1)
    if kind == "tensors":
        return BatchLoader(x, y, batch_size=4, shuffle=True, seed=3)
    if kind == "list":
        return list(zip(x.split(4), y.split(4), strict=True))
    if kind == "single":  # a batch a sample
        data = TensorDataset(*(torch.stack(t[: 4 * (len(t) // 4)].split(4)) for t in (x, y)))
        return DataLoader(data, batch_size=None, shuffle=True)
    if kind == "stream":
        return DataLoader(Stream(x, y), batch_size=4)
    if kind == "iterable":
        return Again(x, y)
    if kind == "stateful":
        return victim.Stateful(Points3(x, y), 4)
    own = torch.Generator().manual_seed(4) if kind == "own generator" else None
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=own)


class Keep(Callback):
    """A state that no event of a beginning sets back."""

    def __init__(self):
        self.n, self.total = 0, torch.zeros(2)

    def after_batch(self, learn):
        self.n += 1
        self.total += learn.n_samples(learn.batch)

    def state_dict(self):
        return {"n": self.n, "total": self.total}

    def load_state_dict(self, state):
        self.n = int(state["n"])
        self.total.copy_(state["total"])


def intervention(what, event, epoch, batch, training):
    def act(self, learn):
        at_batch = not any(part in event for part in OF_A_BATCH) or (learn.batch_idx, learn.training) == (
            batch,
            training,
        )
        if learn.epoch == epoch and at_batch:
            if what != "stop":
                raise what
            learn.stop("enough")

    return type("Intervene", (Callback,), {event: act})


@st.composite
def interventions(draw):
    what = draw(st.sampled_from(list(PLACES)))
    event = draw(st.sampled_from(PLACES[what]))
    training = what is not errors.CancelValidate and (
        what in (errors.CancelStep, errors.CancelTrain) or draw(st.booleans())
    )
    return intervention(what, event, draw(st.integers(0, 2)), draw(st.integers(0, 2)), training)


@st.composite
def runs(draw, **fixed):
    """A function that makes the Learner of one drawn run anew, and how many epochs it has."""
    fixed = {key: st.just(value) for key, value in fixed.items()}
    kind = draw(fixed.get("loader", st.sampled_from(LOADERS)))
    n, epochs = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    own = [
        victim.Noise,
        Keep,
        lambda: victim.Accumulate(2),
        victim.Average,
        victim.Scaler,
        ActivationStats,
        victim.Steps,
    ]
    own += [lambda: OneCycle(0.1, total_steps=12)]
    picked = draw(fixed.get("cbs", st.lists(st.sampled_from(range(len(own))), max_size=4, unique=True)))
    picked = [own[i] for i in picked if not {6, 7} <= {*picked} or i != 7]  # one schedule
    acts = draw(fixed.get("acts", st.lists(interventions(), max_size=2)))
    acts = [type(f"{act.__name__}{i}", (act,), {}) for i, act in enumerate(acts)]
    optimiser, ready = OPTIMISERS[draw(st.sampled_from(list(OPTIMISERS)))], draw(st.booleans())
    seed, valid = draw(st.sampled_from([5, None])), draw(st.booleans())

    def make(*cbs):
        torch.manual_seed(0)
        random.seed(0)
        net, dls = Net(), DataLoaders(make_loader(kind, n), make_loader("list", 2) if valid else None)
        opt_func = optimiser(list(net.parameters())) if ready else optimiser
        cbs = [*(make() for make in (*acts, *picked)), *cbs]
        return Learner(net, dls, nn.functional.cross_entropy, opt_func=opt_func, cbs=cbs, seed=seed, progress=False)

    return make, epochs


def quiet_fit(learn, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(*args, **kwargs)


def files_of(make, epochs, folder, asynchronous=False):
    """Every file of an uninterrupted run, and its Learner."""
    keep = Checkpoint(folder, every=1, keep_last=None, keep_best=None, async_write=asynchronous)
    learn = make(keep)
    quiet_fit(learn, epochs)
    return learn, sorted(Path(folder).glob("0*.ckpt"))


COUNTERS = ("position", "_fits", "_epochs_begun", "initialized", "_seeded", "phase", "scaler")
COUNTERS += ("resumed", "epoch", "step_idx", "n_epochs", "stop_reason")


def everything(learn):
    """All that nothing may have touched, as bytes."""
    opts = [learn._opt, *learn.opts.values(), *(o for o in learn._opt_args[:1] if isinstance(o, torch.optim.Optimizer))]
    parameters = [
        p for module in (learn.model, learn.loss_func) if isinstance(module, nn.Module) for p in module.parameters()
    ]
    return {
        name: victim._bytes(value)
        for name, value in {
            "model": learn.model.state_dict(),
            "buffers": list(learn.model.buffers()),
            "parameters": [[p.requires_grad, p.grad] for p in parameters],
            "modules": [[m.training, len(m._forward_hooks), len(m._forward_pre_hooks)] for m in learn.model.modules()],
            "optimisers": [None if opt is None else opt.state_dict() for opt in opts],
            "history": list(learn.history),
            "rng": RandomState(loader_generators(learn.dls.train)).state_dict(),
            "callbacks": [cb.state_dict() for cb in learn._cbs if isinstance(cb, Keep)],
            "counters": {name: getattr(learn, name) for name in COUNTERS},
        }.items()
    }


def assert_same(a, b):
    assert a == b, [name for name in a if a[name] != b[name]]


@given(run=runs(), data=st.data(), asynchronous=st.booleans(), in_place=st.booleans())
def test_from_any_file_of_any_run_a_fit_goes_on_exactly(run, data, asynchronous, in_place):
    make, epochs = run
    with tempfile.TemporaryDirectory() as folder:
        whole, files = files_of(make, epochs, folder, asynchronous)
        wanted = victim.digest(whole)
        for number in data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)):
            if not files:  # how many there are depends on the clock, if they are written beside training
                return
            path = files[number % len(files)]
            again = whole if in_place else make()  # the Learner that has gone on may be the one that was interrupted
            quiet_fit(again, epochs, resume=path)
            assert_same(victim.digest(again), wanted)


EARLY = (
    "during_fit",
    "before_fit",
    "before_epoch",
    "before_train",
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
)


class Fault(Exception):
    pass


@given(
    run=runs(cbs=[0, 1, 5], acts=[]),
    data=st.data(),
    event=st.sampled_from((*EARLY, "load_state_dict")),
    used=st.booleans(),
)
def test_a_fault_before_the_first_batch_of_a_fit_that_goes_on_changes_nothing(run, data, event, used):
    make, epochs = run
    armed = [False]

    def fail(self, argument):
        if armed[0]:
            raise Fault
        return Callback.during_fit(self, argument) if event == "during_fit" else None

    failing = type(
        "Failing",
        (Callback,),
        {"load_state_dict": lambda self, state: None, event: fail, "state_dict": lambda self: {"a": 1}, "order": 9},
    )
    with tempfile.TemporaryDirectory() as folder:
        whole, files = files_of(lambda *cbs: make(failing(), *cbs), epochs, folder)
        path = files[data.draw(st.integers(0, 99)) % len(files)]
        position = checkpoint.read(path)["position"]
        assume(position["epoch"] < epochs)
        assume(position["batch"] < max(int(file.stem.split("batch")[1]) for file in files))  # or an epoch ends first
        learn = make(failing())
        if used:
            quiet_fit(learn, 1)
        before = everything(learn)
        armed[0] = True
        with pytest.raises((Fault, CheckpointError)):
            quiet_fit(learn, epochs, resume=path)
        assert_same(everything(learn), before)
        armed[0] = False
        anew = not used and data.draw(st.booleans())
        quiet_fit(learn, epochs, resume=None if anew else path)
        assert_same(victim.digest(learn), victim.digest(whole))


GARBAGE = [None, True, -1, 0, 7, 2**62 - 1, 0.5, float("nan"), "os.system", "", [], {}, (1, 2), [[]], {"a": 1}]
GARBAGE += [torch.zeros(3), torch.zeros(()), torch.ones(2, 2, dtype=torch.int64), torch.zeros(0), "missing"]


@given(
    run=runs(loader="tensors", cbs=[1, 3, 4, 5, 7], acts=[]),
    data=st.data(),
    how=st.sampled_from(["fit", "fit anyway", "load"]),
)
def test_a_state_with_garbage_in_it_is_refused_or_does_no_harm(run, data, how):
    make, epochs = run
    with tempfile.TemporaryDirectory() as folder:
        files = files_of(make, epochs, folder)[1]
        path = files[data.draw(st.integers(0, 99)) % len(files)]
        state = checkpoint.read(path)
        place, key = None, None
        while place is None or (isinstance(place[key], (dict, list)) and place[key] and data.draw(st.integers(0, 9))):
            place = state if place is None else place[key]
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(min(len(place), 9))))
        garbage = data.draw(st.sampled_from(GARBAGE))
        if isinstance(garbage, str) and garbage == "missing":
            del place[key]
        else:
            place[key] = garbage
        checkpoint.write(path, state)
        learn = make()
        before = everything(learn)
        try:
            if how == "load":
                learn.load(path)
            quiet_fit(learn, epochs, resume=None if how == "load" else path, allow_changes=how == "fit anyway")
        except CheckpointError:
            assert_same(everything(learn), before)
