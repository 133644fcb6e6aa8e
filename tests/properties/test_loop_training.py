"""What a fit computes: equal to the loop written by hand, counted rightly, and undisturbed by whoever looks on."""

import copy
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.loops import (
    POINTS,
    Net,
    Plan,
    Size,
    make_data,
    make_learner,
    make_loaders,
    make_recorders,
    plans,
    raiser,
    same_values,
    sizes,
    snapshot,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from minitrain import BatchLoader, Callback, CancelBatch, CancelStep, DataLoaders, Learner
from minitrain.metrics import accuracy

optimisers = st.sampled_from(
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        lambda params: torch.optim.RMSprop(params, lr=1e-3),
        lambda params: torch.optim.Adadelta(params),
    ]
)


def loaders_of(kind, size):
    """Training data as a BatchLoader, a list, or a shuffling DataLoader with and without a generator of its own."""
    x, y = make_data(size.train, 1)
    valid = None if size.valid is None else BatchLoader(*make_data(size.valid, 2), batch_size=4)
    generator = torch.Generator().manual_seed(7) if kind == "generator" else None
    train = {
        "list": lambda: list(BatchLoader(x, y, batch_size=4)),
        "batches": lambda: BatchLoader(x, y, batch_size=4, shuffle=True, seed=3),
        "global": lambda: DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
        "generator": lambda: DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator),
    }[kind]()
    return DataLoaders(train, valid)


kinds = st.sampled_from(["list", "batches", "global", "generator"])


def by_hand(model, dls, opt, n_epochs):
    """The reference: the loop that one would write oneself."""
    losses = []
    for epoch in range(n_epochs):
        if isinstance(dls.train, BatchLoader):
            dls.train.set_epoch(epoch)
        model.train()
        for xb, yb in dls.train:
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
    return losses


class Losses(Callback):
    def __init__(self):
        self.losses, self.counts = [], []

    def after_batch(self, learn):
        if learn.training:
            self.losses.append(learn.loss.item())
            self.counts.append(len(learn.yb))


@given(size=sizes, make_opt=optimisers, kind=kinds)
def test_a_fit_equals_the_loop_by_hand_bit_for_bit(size, make_opt, kind):
    torch.manual_seed(1)
    model = Net()
    twin = copy.deepcopy(model)
    torch.manual_seed(2)
    expected = by_hand(
        twin, loaders_of(kind, Size(size.epochs, size.train, None)), make_opt(twin.parameters()), size.epochs
    )
    rng = torch.get_rng_state()
    seen = Losses()
    dls = loaders_of(kind, size)
    torch.manual_seed(2)
    learn = Learner(model, dls, F.cross_entropy, opt_func=make_opt, cbs=[seen], progress=False)
    learn.fit(size.epochs)
    assert seen.losses == expected
    model.calls.zero_(), twin.calls.zero_()
    assert same_values(snapshot(model)["values"], snapshot(twin)["values"])
    assert torch.equal(torch.get_rng_state(), rng)  # validation has not moved it


@given(size=sizes, make_opt=optimisers, split=st.integers(1, 2))
def test_two_fits_in_a_row_are_one_longer_fit(size, make_opt, split):
    one = make_learner(size, opt_func=make_opt, lr=None)
    one.fit(size.epochs + split)
    two = make_learner(size, opt_func=make_opt, lr=None)
    two.fit(size.epochs)
    two.fit(split)
    assert same_values(snapshot(one.model)["values"], snapshot(two.model)["values"])
    assert [row["train_loss"] for row in one.history] == [row["train_loss"] for row in two.history]
    assert [row["fit"] for row in two.history] == [0] * size.epochs + [1] * split


NESTED = st.sampled_from(
    [
        lambda learn: learn.validate(),
        lambda learn: learn.validate(learn.dls.train),
        lambda learn: learn.predict(torch.ones(3, 3)),
        lambda learn: learn.get_preds([make_data(1, 9)]),
    ]
)
OUTSIDE_VALIDATION = [
    event
    for event in POINTS
    if "cancel" not in event and event not in ("before_validate", "after_validate", "after_fit")
]


def trajectory(size, kind, cbs, **options):
    seen = Losses()
    learn = make_learner(size, [seen, *cbs], dls=loaders_of(kind, size), metrics=[accuracy], **options)
    learn.fit(size.epochs)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in learn.history]
    return seen.losses, rows, snapshot(learn.model)["values"], torch.get_rng_state()


def same_trajectory(a, b):
    return a[:2] == b[:2] and same_values(a[2], b[2]) and torch.equal(a[3], b[3])


@given(data=st.data(), size=sizes, kind=kinds)
def test_validation_and_prediction_inside_a_fit_leave_training_untouched(data, size, kind):
    size = Size(size.epochs, size.train, size.valid or 1, size.callbacks)
    act = data.draw(NESTED)
    plan = data.draw(
        plans(size, st.just(lambda learn: act(learn) if not _validating(learn) else None), OUTSIDE_VALIDATION)
    )
    _, quiet = make_recorders(size, [])
    _, nosy = make_recorders(size, [plan])
    assert same_trajectory(trajectory(size, kind, quiet), trajectory(size, kind, nosy))


def _validating(learn):
    return not learn.training and learn.dl is not learn.dls.train and learn.batch is not None


@given(data=st.data(), size=sizes)
def test_validation_inside_a_fit_puts_all_loop_state_back(data, size):
    names = [
        "batch",
        "xb",
        "yb",
        "preds",
        "loss",
        "batch_idx",
        "step_idx",
        "epoch",
        "dl",
        "training",
        "phase",
        "running_loss",
    ]
    seen = []

    def act(learn):
        before = {name: getattr(learn, name) for name in names}
        grads = [(p, p.grad) for p in learn.model.parameters()]
        data.draw(NESTED)(learn)
        seen.append(all(getattr(learn, name) is value for name, value in before.items()))
        seen.append(all(p.grad is grad for p, grad in grads))

    size = Size(size.epochs, size.train, size.valid or 1, 1)
    training = ["after_pred", "after_loss", "before_backward", "after_backward", "before_step", "after_step"]
    event = data.draw(st.sampled_from(training))
    _, recorders = make_recorders(size, [Plan(0, event, 0, act)])
    make_learner(size, recorders).fit(size.epochs)
    assert seen == [True, True]


@given(size=sizes, kind=kinds, n_drawn=st.integers(0, 3))
def test_a_stage_that_only_looks_leaves_training_bit_identical(size, kind, n_drawn):
    drawn = []

    def look(model, batches):
        for _, xb in zip(range(n_drawn), batches, strict=False):
            drawn.append(xb)

    with_stage = trajectory(size, kind, [], init=look)
    assert same_trajectory(trajectory(size, kind, []), with_stage)
    assert len(drawn) == min(n_drawn, size.train)


@given(size=sizes, kind=kinds)
def test_an_init_stage_is_shown_the_batches_that_training_will_see_first(size, kind):
    drawn, trained = [], []

    def look(model, batches):
        drawn.extend(batches)

    class Inputs(Callback):
        def before_batch(self, learn):
            if learn.training and learn.epoch == 0:
                trained.append(learn.xb.clone())

    trajectory(size, kind, [Inputs()], init=look)
    assert len(drawn) == len(trained)
    assert all(torch.equal(a, b) for a, b in zip(drawn, trained, strict=True))


@given(data=st.data(), size=sizes)
def test_a_cancelled_batch_is_never_counted(data, size):
    """Wherever it is cancelled: means are those of the other batches, weighted by samples, in float64."""
    size = Size(1, size.train, size.valid or 1, 1)
    kind = data.draw(st.sampled_from(["training", "validation"]))
    n = size.train if kind == "training" else size.valid
    cancelled = data.draw(st.sets(st.integers(0, n - 1), max_size=n))
    points = ["before_batch", "after_pred", "after_loss"]
    if kind == "training":
        points += ["before_backward", "after_backward", "before_step", "after_step"]
    event = data.draw(st.sampled_from(points))
    counted = []

    def hear(self, learn):
        if learn.training == (kind == "training") and learn.batch_idx in cancelled:
            raise CancelBatch

    def count(self, learn):
        if learn.training == (kind == "training"):
            counted.append((learn.loss.double().item(), len(learn.yb), accuracy(learn.preds, learn.yb).item()))

    cb = type("Canceller", (Callback,), {event: hear, "after_batch": count})()
    learn = make_learner(size, [cb], metrics=[accuracy])
    learn.fit(1)
    (row,) = learn.history
    assert len(counted) == n - len(cancelled)
    total = sum(k for _, k, _ in counted)
    name = "train_loss" if kind == "training" else "valid_loss"
    if not counted:
        assert row.get(name) is None
        return
    assert row[name] == pytest.approx(sum(loss * k for loss, k, _ in counted) / total, rel=1e-6)
    if kind == "validation":
        assert row["valid_accuracy"] == pytest.approx(sum(a * k for *_, k, a in counted) / total, rel=1e-6)


@given(data=st.data(), size=sizes)
def test_a_cancelled_batch_leaves_no_gradient_behind(data, size):
    event = data.draw(st.sampled_from(["after_backward", "before_step", "after_step"]))
    grads = []

    def look(self, learn):
        grads.append([p.grad for p in learn.model.parameters()])

    cb = type(
        "Canceller", (Callback,), {event: lambda self, learn: raiser(CancelBatch())(learn), "before_batch": look}
    )()
    make_learner(size, [cb]).fit(size.epochs)
    assert all(grad is None for batch in grads for grad in batch)


@given(every=st.integers(1, 3), n_batches=st.integers(1, 6))
def test_cancel_step_accumulates_gradients_and_the_batch_still_counts(every, n_batches):
    """SGD on k summed small batches is SGD on the gradient of their sum."""
    x, y = make_data(n_batches, 3, uneven=False)

    class Accumulate(Callback):
        skipped = 0

        def after_backward(self, learn):
            if (learn.batch_idx + 1) % every:
                raise CancelStep

        def after_cancel_step(self, learn):
            self.skipped += 1

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    opt = torch.optim.SGD(twin.parameters(), lr=0.1)
    cb = Accumulate()
    learn = Learner(
        model,
        DataLoaders(BatchLoader(x, y, batch_size=4)),
        F.cross_entropy,
        opt_func=torch.optim.SGD,
        lr=0.1,
        cbs=[cb],
        progress=False,
    )
    learn.fit(1)
    for start in range(0, n_batches - n_batches % every, every):
        opt.zero_grad()
        for i in range(start, start + every):
            F.cross_entropy(twin(x[4 * i : 4 * i + 4]), y[4 * i : 4 * i + 4]).backward()
        opt.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-6, atol=1e-7)
    assert learn.step_idx == n_batches // every
    assert cb.skipped == n_batches - learn.step_idx
    assert learn.running_loss.count == 4 * n_batches


@given(size=sizes)
def test_gradients_are_there_from_after_backward_through_after_step_only(size):
    log = []

    def look(event):
        def method(self, learn):
            if learn.training or event == "before_fit":
                log.append((event, [p.grad is not None for p in learn.model.parameters() if p.requires_grad]))

        return lambda self, learn: method(self, learn)

    events = ("before_fit", "before_batch", "after_loss", "after_backward", "before_step", "after_step", "after_batch")
    learn = make_learner(size, [type("Look", (Callback,), {event: look(event) for event in events})()])
    for p in learn.model.parameters():
        p.grad = torch.ones_like(p)  # left over from something else
    learn.fit(size.epochs)
    for event, present in log:
        assert set(present) == {event in ("after_backward", "before_step", "after_step")}, event
    assert all(p.grad is None for p in learn.model.parameters())


@given(data=st.data(), size=sizes)
def test_a_batch_is_released_right_after_it(data, size):
    alive = []

    class Watch(Callback):
        def after_batch(self, learn):
            alive.append([weakref.ref(t) for t in (learn.xb, learn.preds, learn.loss)])

        def before_batch(self, learn):
            assert all(ref() is None for refs in alive for ref in refs)

    make_learner(size, [Watch()]).fit(size.epochs)
    assert len(alive) == size.epochs * (size.train + (size.valid or 0))
    assert all(ref() is None for refs in alive for ref in refs)


@given(data=st.data(), size=sizes)
def test_modes_are_as_before_and_what_before_train_sets_survives_validation(data, size):
    modes = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    seen = []

    class FrozenNorm(Callback):
        def before_train(self, learn):
            assert all(m.training for m in learn.model.modules())
            learn.model.norm.eval()

        def after_loss(self, learn):
            seen.append((learn.training, learn.model.training, learn.model.norm.training))

        def after_epoch(self, learn):
            seen.append((True, learn.model.training, learn.model.norm.training))

    learn = make_learner(size, [FrozenNorm()])
    for module, mode in zip(learn.model.modules(), modes, strict=True):
        module.training = mode
    learn.fit(size.epochs)
    assert [m.training for m in learn.model.modules()] == modes
    assert set(seen) <= {(True, True, False), (False, False, False)}


@given(data=st.data(), size=sizes)
def test_a_fit_that_fails_before_its_first_update_changes_nothing(data, size):
    events = [
        "before_fit",
        "before_epoch",
        "before_train",
        "before_batch",
        "after_pred",
        "after_loss",
        "before_backward",
    ]
    plan = Plan(0, data.draw(st.sampled_from(events)), 0, raiser(ValueError("boom")))
    kind = data.draw(kinds)

    def fit(with_failure):
        _, recorders = make_recorders(size, [plan] if with_failure else [])
        learn = make_learner(size, recorders, dls=loaders_of(kind, size))
        if with_failure:
            before = snapshot(learn.model)["values"]
            with pytest.raises(ValueError, match="boom"):
                learn.fit(size.epochs)
            assert same_values(before, snapshot(learn.model)["values"])
            assert len(learn.history) == 0
        learn.fit(size.epochs)
        return [row["train_loss"] for row in learn.history], snapshot(learn.model)["values"]

    quiet, failed = fit(False), fit(True)
    assert quiet[0] == failed[0]
    assert same_values(quiet[1], failed[1])


@given(size=sizes, seed=st.integers(0, 2**32 - 1), noise=st.integers(0, 100))
def test_a_seed_makes_a_run_repeatable_whatever_came_before(size, seed, noise):
    def losses():
        torch.manual_seed(0)
        net = Net()
        torch.rand(noise)
        learn = make_learner(size, net=net, dls=loaders_of("global", size), seed=seed)
        learn.fit(size.epochs)
        return [row["train_loss"] for row in learn.history]

    assert losses() == losses()


@given(fits=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_set_epoch_counts_training_epochs_over_the_whole_life(fits):
    told = []

    class Loader(list):
        def set_epoch(self, epoch):
            told.append(epoch)

    learn = make_learner(Size(1, 1, None), dls=DataLoaders(Loader(make_loaders(Size(1, 2, None)).train)))
    for n in fits:
        learn.fit(n)
        learn.validate(list(learn.dls.train))
    assert told == list(range(sum(fits)))


@given(size=sizes, batch_size=st.integers(1, 7))
def test_the_training_loss_is_the_mean_over_samples(size, batch_size):
    x, y = make_data(size.train, 5)
    seen = Losses()
    dls = DataLoaders(BatchLoader(x, y, batch_size=batch_size))
    learn = Learner(nn.Linear(3, 2), dls, F.cross_entropy, opt_func=torch.optim.SGD, lr=0.1, cbs=[seen], progress=False)
    learn.fit(1)
    expected = sum(loss * n for loss, n in zip(seen.losses, seen.counts, strict=True)) / len(x)
    assert learn.history[0]["train_loss"] == pytest.approx(expected, rel=1e-6)


@given(size=sizes)
def test_validate_and_get_preds_equal_one_big_batch(size):
    x, y = make_data(size.train, 6)
    learn = make_learner(size, metrics=[accuracy])
    learn.fit(1)
    dl = BatchLoader(x, y, batch_size=3)
    result, (preds, targets) = learn.validate(dl), learn.get_preds(dl)
    learn.model.eval()
    with torch.no_grad():
        expected = learn.model(x)
    torch.testing.assert_close(preds, expected)
    assert torch.equal(targets, y)
    assert result["valid_loss"] == pytest.approx(F.cross_entropy(expected, y).item(), rel=1e-5)
    assert result["valid_accuracy"] == pytest.approx(accuracy(expected, y).item(), rel=1e-6)
