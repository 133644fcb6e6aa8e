"""Whatever net is watched, and whatever happens in training: the callbacks of statistics leave no hook, and rows agree."""

import json
import warnings

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.loops import (
    CANCELS,
    FAULTS,
    POINTS,
    assert_clean,
    make_learner,
    make_recorders,
    plans,
    raiser,
    same_values,
    sizes,
    snapshot,
)
from torch import nn

from minitrain import LoopError
from minitrain.callbacks import ActivationStats, Diagnose, GradientStats, ParameterStats

LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "frozen": lambda: nn.Linear(4, 4).requires_grad_(False),
    "norm": lambda: nn.BatchNorm1d(4),
    "relu": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "tanh": nn.Tanh,
    "drop": lambda: nn.Dropout(0.3),
    "normed": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "product": lambda: Product(),
}


class Product(nn.Module):
    """A layer that is called twice, one that nobody calls, and an output that is a tuple."""

    def __init__(self):
        super().__init__()
        self.both, self.idle, self.rnn = nn.Linear(4, 4), nn.Linear(4, 4), nn.RNN(4, 4)

    def forward(self, x):
        return self.rnn(self.both(x) * self.both(x.tanh()))[0]


class Drawn(nn.Module):
    def __init__(self, kinds, shared):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.body = nn.Sequential(*[LAYERS[kind]() for kind in kinds])
        self.again = self.first if shared is None or not kinds else self.body[shared % len(kinds)]
        self.norm = nn.BatchNorm1d(4)  # which a plan may put into evaluation mode
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = self.body(self.first(x))
        return self.last(self.norm(x if self.again is self.first else self.again(x)))


descriptions = st.tuples(st.lists(st.sampled_from(sorted(LAYERS)), max_size=4), st.none() | st.integers(0, 3))
selections = st.sampled_from(
    [
        None,
        nn.Linear,
        [nn.Linear, nn.BatchNorm1d],
        "first",
        "[fbl]*",
        ["last", nn.Linear],
        lambda name, module: "a" in name,
    ]
)
of_parameters = st.sampled_from([None, nn.Linear, [nn.Linear, nn.BatchNorm1d], "first", ["last", nn.Linear]])


@st.composite
def callbacks(draw):
    """All four, with drawn options."""
    small = {"max_memory": draw(st.sampled_from([20_000, 2**20])), "window": draw(st.integers(1, 3))}
    every, histogram_every = st.integers(1, 3), st.none() | st.integers(1, 2)
    train, valid = draw(st.sampled_from([(True, False), (True, True), (False, True)]))
    options = [small | {"every": draw(every), "histogram_every": draw(histogram_every), "bins": 5} for _ in range(3)]
    return [
        ActivationStats(draw(selections), train=train, valid=valid, **options[0]),
        GradientStats(draw(selections), **options[1]),
        ParameterStats(draw(of_parameters), **options[2]),
        Diagnose(draw(of_parameters), every=draw(st.none() | every), show=len),
    ]


def tables(cbs):
    """Every `Recorder`, those within `Diagnose` too."""
    return [*cbs[:3], *cbs[3]._parts]


def with_hooks_of_the_users(model, log):
    """Two of the user's on every module, as a fit must find and leave them."""
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, i, n=name: log.append(("pre", n)))
        module.register_forward_hook(lambda m, i, o, n=name: log.append(("forward", n)))
    return model


def hooks(model):
    """The functions themselves, in order."""
    return [
        [list(getattr(m, kind).values()) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for m in model.modules()
    ]


def assert_consistent(stats):
    for key, table in stats.recordings.items():
        steps, rows = table.steps, table.table()
        assert len(steps) == len(rows)
        assert steps == sorted(set(steps))
        assert all(step % (table.every * table.stride) == 0 for step in steps)
        assert tuple(rows.shape) == (len(steps), len(table.names), len(table.fields))
        assert table.nbytes <= stats.max_memory
        assert len(steps) <= table.capacity
        assert key == "histogram" or not rows[..., table.fields.index("dead")].gt(1).any()
    json.dumps(stats.to_dict())
    for field in stats.fields:
        assert len(stats[field]) == len(stats.steps)


def run(data, size, acts):
    kinds, shared = data.draw(descriptions)
    torch.manual_seed(0)
    called: list[tuple[str, str]] = []
    model = with_hooks_of_the_users(Drawn(kinds, shared), called)
    cbs = data.draw(callbacks())
    _, recorders = make_recorders(size, data.draw(st.lists(plans(size, acts), max_size=3)), [-1, 60, 200])
    everyone = data.draw(st.permutations([*cbs, *recorders]))
    learn = make_learner(size, everyone, net=model)
    before, functions = snapshot(model), hooks(model)
    error = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no hook fired")  # what was named may not have been reached
            learn.fit(size.epochs)
    except BaseException as e:
        if not isinstance(e, LoopError) and not hasattr(e, "planned"):
            raise
        error = e
    assert_clean(learn, before["modes"], before["hooks"])
    assert hooks(model) == functions
    called.clear()
    model(torch.ones(2, 3))
    assert ("forward", "last") in called
    for stats in tables(cbs):
        assert_consistent(stats)
    return learn, cbs, error


cancels, faults = st.sampled_from(CANCELS), st.sampled_from(FAULTS)
ends = st.one_of(
    cancels.map(lambda kind: raiser(kind())),
    faults.map(lambda kind: raiser(kind())),
    st.just(lambda learn: learn.stop("enough") if learn.phase == "fit" else None),
)
nested = st.just(lambda learn: learn.predict(torch.ones(2, 3)) if learn.training else None)


@given(data=st.data(), size=sizes)
def test_whatever_happens_no_hook_of_ours_stays_and_the_users_do(data, size):
    run(data, size, st.one_of(ends, nested))


@given(data=st.data(), size=sizes)
def test_whatever_happened_the_next_fit_has_all_its_rows(data, size):
    learn, cbs, _ = run(data, size, ends)
    learn.cbs = cbs
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no hook fired")
        learn.fit(2)
    n = 2 * size.train
    for stats in tables(cbs)[1:]:
        assert stats._counts["train"] == n
        assert stats.steps == list(range(0, n, stats.every * stats.recordings["train"].stride))
    phase = cbs[0]._phases[0]
    assert cbs[0]._counts[phase] == (n if phase == "train" else 2 * (size.valid or 0))


def reader(cbs):
    def read(learn):
        for stats in tables(cbs):
            assert_consistent(stats)
            stats.state_dict()

    return read


@given(data=st.data(), size=sizes)
def test_training_is_the_same_with_and_without_and_whoever_reads(data, size):
    kinds, shared = data.draw(descriptions)
    cbs = data.draw(callbacks())
    others = [
        type(cb)(
            cb.select,
            **{k: v for k, v in vars(cb).items() if k in ("every", "window", "histogram_every", "max_memory")},
            bins=5,
        )
        for cb in cbs[1:3]
    ]
    for other in others:
        other.state_key = f"other {type(other).__name__}"

    def fit(*more):
        torch.manual_seed(0)
        learn = make_learner(size, more, net=Drawn(kinds, shared))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no hook fired")
            learn.fit(size.epochs)
        return snapshot(learn.model)["values"]

    acts = st.just(reader(cbs))
    _, recorders = make_recorders(size, data.draw(st.lists(plans(size, acts, POINTS), max_size=3)), [-1, 60, 200])
    assert same_values(fit(*cbs, *recorders), fit())
    fit(*others)
    for read, unread in zip(cbs[1:3], others, strict=True):
        assert json.dumps(read.to_dict()) == json.dumps(unread.to_dict())
