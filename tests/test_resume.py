"""`learn.save`, `learn.load`, and a fit that goes on."""

import gc
import hashlib
import random
import re
import sys
import weakref

import pytest
import torch
from faults import victim
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from minitrain import (
    BatchLoader,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTrain,
    CheckpointError,
    DataLoaders,
    Learner,
    LoopError,
    checkpoint,
)
from minitrain.callbacks import ActivationStats, Checkpoint, OneCycle
from minitrain.init import KaimingNormal
from minitrain.metrics import accuracy

X = torch.linspace(-1, 1, 24).reshape(-1, 1)


def learner(*cbs, n=24, batch_size=4, seed=1, model=None, valid=False, train=None, **options):
    """A small regression with dropout, so that the random state counts."""
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    if train is None:
        train = BatchLoader(X[:n], 2 * X[:n], batch_size=batch_size, shuffle=True)
    dls = DataLoaders(train, BatchLoader(X, 2 * X, batch_size=5) if valid else None)
    options = dict(opt_func=torch.optim.AdamW, lr=0.01) | options
    return Learner(model, dls, nn.functional.mse_loss, cbs=cbs, seed=seed, progress=False, **options)


class SaveAt(Callback):
    """Save after so many training batches of this process, at the event that is asked for."""

    order = 500

    def __init__(self, path, n, event="after_batch"):
        self.path, self.n, self.event, self.count = path, n, event, 0

    def after_batch(self, learn):
        self.count += learn.training
        if self.event == "after_batch" and self.count == self.n and learn.training:
            learn.save(self.path)

    def after_epoch(self, learn):
        if self.event == "after_epoch" and learn.epoch + 1 == self.n:
            learn.save(self.path)


class Crash(Exception):
    pass


class CrashAt(Callback):
    """End a run for good, after so many training batches."""

    order = 600

    def __init__(self, n):
        self.n, self.count = n, 0

    def after_batch(self, learn):
        self.count += learn.training
        if self.count == self.n:
            raise Crash


def same(a, b):
    """The digests of two Learners, that name what differs."""
    a, b = victim.digest(a), victim.digest(b)
    assert a == b, [name for name in a if a[name] != b[name]]


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 5, 6, 7, 11, 12])
def test_a_fit_goes_on_from_any_batch_as_if_it_had_not_been_interrupted(tmp_path, n):
    whole = learner(valid=True)
    whole.fit(3)
    path = tmp_path / "a.ckpt"
    with pytest.raises(Crash):
        learner(SaveAt(path, n), CrashAt(n + 1), valid=True).fit(3)
    torch.manual_seed(77)
    random.seed(78)
    again = learner(valid=True)
    again.fit(3, resume=path)
    same(whole, again)
    assert again.resumed


def test_saving_changes_nothing(tmp_path):
    whole, saving = learner(valid=True), learner(SaveAt(tmp_path / "a.ckpt", 3), valid=True)
    whole.fit(2)
    saving.fit(2)
    assert victim.digest(whole) | {"callbacks": 0} == victim.digest(saving) | {"callbacks": 0}


@pytest.mark.parametrize("n", [1, 2])
def test_a_fit_goes_on_from_the_end_of_an_epoch(tmp_path, n):
    whole, path = learner(), tmp_path / "a.ckpt"
    whole.fit(2)
    learner(SaveAt(path, n, "after_epoch")).fit(2)
    again = learner()
    again.fit(2, resume=path)
    same(whole, again)


def test_two_resumes_within_one_epoch(tmp_path):
    whole = learner()
    whole.fit(2)
    one, two = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    with pytest.raises(Crash):
        learner(SaveAt(one, 2), CrashAt(3)).fit(2)
    with pytest.raises(Crash):
        learner(SaveAt(two, 2), CrashAt(3)).fit(2, resume=one)
    assert checkpoint.read(two)["position"]["batch"] == 4
    again = learner()
    again.fit(2, resume=two)
    same(whole, again)


def test_a_fit_goes_on_after_another_one(tmp_path):
    path = tmp_path / "a.ckpt"
    whole = learner(OneCycle(0.1))
    whole.fit(1)
    whole.fit(2, lr=0.5)
    broken = learner(OneCycle(0.1), SaveAt(path, 9), CrashAt(10))
    broken.fit(1)
    with pytest.raises(Crash):
        broken.fit(2, lr=0.5)
    again = learner(OneCycle(0.1))
    again.fit(2, lr=0.5, resume=path)
    same(whole, again)
    assert again.opt.param_groups[0]["lr"] == 0.01
    assert [row["fit"] for row in again.history] == [0, 1, 1]


@pytest.mark.parametrize(
    ("was", "now", "name"),
    [
        (dict(lr=0.01), dict(lr=0.5), "lr"),
        (dict(weight_decay=0.1), dict(weight_decay=0.3), "weight_decay"),
        (dict(betas=(0.8, 0.99)), dict(betas=(0.9, 0.99)), "betas"),
    ],
)
def test_another_option_of_the_optimiser_is_named_and_counts_if_it_is_allowed(tmp_path, was, now, name):
    path = tmp_path / "a.ckpt"

    def run(options, *cbs):
        return learner(*cbs, opt_func=lambda params: torch.optim.AdamW(params, **options), lr=None)

    with pytest.raises(Crash):
        run(was, SaveAt(path, 3), CrashAt(3)).fit(1)
    other = run(now)
    before = state_of(other)
    with pytest.raises(CheckpointError, match=rf"learn\.opt: {name} was .* now it is") as error:
        other.fit(1, resume=path)
    assert "allow_changes=True" in str(error.value)
    assert state_of(other) == before
    other.fit(1, resume=path, allow_changes=True)
    assert other.opt.param_groups[0][name] == now[name]
    same_run = run(was)
    same_run.fit(1, resume=path)


def test_another_rate_of_a_fit_counts_from_there_if_it_is_allowed(tmp_path):
    path, rates = tmp_path / "a.ckpt", []

    class Look(Callback):
        def before_step(self, learn):
            rates.append(learn.opt.param_groups[0]["lr"])

    with pytest.raises(Crash):
        learner(SaveAt(path, 3), CrashAt(3)).fit(1, lr=0.2)
    other = learner(Look())
    with pytest.raises(CheckpointError, match=r"lr was 0\.2, now it is 0\.1"):
        other.fit(1, lr=0.1, resume=path)
    other.fit(1, lr=0.1, resume=path, allow_changes=True)
    assert rates == [0.1] * 3
    assert other.opt.param_groups[0]["lr"] == 0.01


def test_loading_from_the_midst_of_a_cycle_leaves_the_rates_of_before_it(tmp_path):
    """What a schedule has made of them belongs to its fit: after one cycle the rate is almost nothing."""
    path = tmp_path / "a.ckpt"
    with pytest.raises(Crash):
        learner(OneCycle(0.1), SaveAt(path, 9), CrashAt(9)).fit(2)
    other = learner()
    other.load(path)
    assert other.opt.param_groups[0]["lr"] == 0.01
    assert other.opt.param_groups[0]["betas"] == (0.9, 0.999)
    assert "initial_lr" not in other.opt.param_groups[0]


def test_a_finished_run_returns_at_once_and_is_as_it_was(tmp_path):
    path = tmp_path / "a.ckpt"
    whole = learner(OneCycle(0.1))
    whole.fit(2)
    whole.save(path)
    drawn = []
    again = learner(OneCycle(0.1), train=Counting(drawn))
    with pytest.raises(CheckpointError, match=r"train\.loader was 'BatchLoader', now it is 'Counting'"):
        again.fit(2, resume=path)
    again.fit(2, resume=path, allow_changes=True)
    assert not drawn
    assert victim.digest(again)["rng"] == victim.digest(whole)["rng"]
    assert victim.digest(again)["model"] == victim.digest(whole)["model"]


class Counting(BatchLoader):
    def __init__(self, drawn):
        super().__init__(X, 2 * X, batch_size=4, shuffle=True)
        self.drawn = drawn

    def _make(self, start, order):
        for batch in super()._make(start, order):
            self.drawn.append(batch)
            yield batch


def test_what_comes_before_is_skipped_by_index(tmp_path):
    path, drawn = tmp_path / "a.ckpt", []
    with pytest.raises(Crash):
        learner(SaveAt(path, 4), CrashAt(4), train=Counting([])).fit(1)
    learner(train=Counting(drawn)).fit(1, resume=path)
    assert len(drawn) == 2


def test_more_epochs_than_were_planned(tmp_path):
    path = tmp_path / "a.ckpt"
    whole, first = learner(), learner()
    whole.fit(3)
    first.fit(1)
    first.save(path)
    again = learner()
    again.fit(3, resume=path)
    same(whole, again)


def test_the_init_stage_is_not_run_again(tmp_path):
    path, ran = tmp_path / "a.ckpt", []

    def stage(model, batches):
        ran.append(1)
        return KaimingNormal()(model, batches)

    first = learner(init=stage)
    first.fit(1)
    first.save(path)
    again = learner(init=stage)
    again.fit(2, resume=path)
    loaded = learner(init=stage)
    loaded.load(path)
    loaded.fit(1)
    assert ran == [1]
    assert again.initialized
    assert loaded.initialized
    assert checkpoint.read(path)["initialized"]


def test_what_was_saved_before_the_init_stage_is_still_to_be_initialised(tmp_path):
    path = tmp_path / "a.ckpt"
    learner(init=KaimingNormal()).save(path)
    with pytest.raises(CheckpointError, match="before the init stages had run"):
        learner(init=KaimingNormal()).fit(1, resume=path)
    loaded, whole = learner(init=KaimingNormal()), learner(init=KaimingNormal())
    loaded.load(path)
    loaded.fit(1)
    whole.fit(1)
    same(whole, loaded)
    learner().save(path)  # without stages there is nothing left to do
    loaded.load(path)
    assert loaded.initialized


def test_the_events_of_a_fit_that_goes_on(tmp_path):
    path = tmp_path / "a.ckpt"
    seen = []

    class Log(Callback):
        def state_dict(self):
            return {"here": 1}

        def load_state_dict(self, state):
            seen.append("load")

        def before_fit(self, learn):
            seen.append(("fit", learn.resumed, learn.epoch, learn.step_idx))

        def before_epoch(self, learn):
            seen.append("epoch")

        def before_train(self, learn):
            seen.append("train")

        def before_batch(self, learn):
            seen.append(learn.batch_idx)

        def after_fit(self, learn):
            seen.append("end")

    with pytest.raises(Crash):
        learner(Log(), SaveAt(path, 10), CrashAt(10)).fit(2)
    seen.clear()
    learner(Log()).fit(2, resume=path)
    assert seen == [("fit", True, 1, 10), "epoch", "train", "load", 4, 5, "end"]
    learner(Log(), SaveAt(path, 1, "after_epoch")).fit(2)
    seen.clear()
    learner(Log()).fit(2, resume=path)
    assert seen == [("fit", True, 1, 6), "load", "epoch", "train", 0, 1, 2, 3, 4, 5, "end"]


def test_resumed_is_false_in_the_next_fit(tmp_path):
    path = tmp_path / "a.ckpt"
    first = learner()
    first.fit(1)
    first.save(path)
    first.fit(1, resume=path)
    assert first.resumed
    first.fit(1)
    assert not first.resumed


def test_gradients_that_wait_for_their_step_are_kept(tmp_path):
    path = tmp_path / "a.ckpt"
    options = dict(opt_func=torch.optim.SGD)
    whole = learner(victim.Accumulate(4), **options)
    whole.fit(1)
    with pytest.raises(Crash):
        learner(victim.Accumulate(4), SaveAt(path, 3), CrashAt(3), **options).fit(1)
    assert set(checkpoint.read(path)["grads"]) == {f"{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
    again = learner(victim.Accumulate(4), **options)
    again.fit(1, resume=path)
    same(whole, again)


def test_what_is_frozen_stays_so(tmp_path):
    path = tmp_path / "a.ckpt"

    class Freeze(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 0:
                learn.model[0].requires_grad_(False)

    whole = learner(Freeze())
    whole.fit(3)
    learner(Freeze(), SaveAt(path, 2, "after_epoch")).fit(3)
    again = learner(Freeze())
    again.fit(3, resume=path)
    same(whole, again)
    assert not again.model[0].weight.requires_grad


@pytest.mark.parametrize("cancel", [CancelBatch, CancelTrain, CancelEpoch])
@pytest.mark.parametrize("n", [2, 3])
def test_a_fit_with_cancels_goes_on(tmp_path, cancel, n):
    """Raised by a callback that keeps no state: it knows the moment from the loop's own counters."""

    class Cancelling(Callback):
        def after_pred(self, learn):
            if learn.training and learn.batch_idx == 2:
                raise cancel

    def run(folder, *cbs, resume=None):
        learn = learner(Cancelling(), Checkpoint(folder, every=1, async_write=False, keep_last=None), *cbs, valid=True)
        learn.fit(2, resume=resume)
        return learn

    whole = run(tmp_path / "whole")
    for path in sorted((tmp_path / "whole").glob("0*.ckpt")):
        again = learner(Cancelling(), valid=True)
        again.fit(2, resume=path)
        same(whole, again)


def test_a_stop_is_remembered(tmp_path):
    whole = learner(victim.StopAt(8), Checkpoint(tmp_path, every=1, async_write=False, keep_last=None), valid=True)
    whole.fit(3)
    assert whole.history[-1]["partial"]
    for path in sorted(tmp_path.glob("0*.ckpt")):
        again = learner(victim.StopAt(8), valid=True)
        again.fit(3, resume=path)
        same(whole, again)


def test_a_batch_norm_model_and_hidden_buffers_come_back(tmp_path):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.register_buffer("calls", torch.zeros(()), persistent=False)
            self.register_buffer("cache", None, persistent=False)

        def forward(self, x):
            if self.training:
                self.calls += 1
                self.cache = x.mean().detach() + (0 if self.cache is None else self.cache)
            return self.layer(x) * self.calls

    path = tmp_path / "a.ckpt"

    def run(*cbs):
        torch.manual_seed(4)
        return learner(*cbs, model=Counter())

    whole = run()
    whole.fit(2)
    with pytest.raises(Crash):
        run(SaveAt(path, 7), CrashAt(8)).fit(2)
    again = run()
    again.fit(2, resume=path)
    same(whole, again)
    assert again.model.calls == 12
    assert again.model.cache.equal(whole.model.cache)


def test_a_lazy_model_can_be_loaded_and_resumed(tmp_path):
    path = tmp_path / "a.ckpt"

    def lazy():
        torch.manual_seed(4)
        return learner(model=nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1)))

    whole = lazy()
    whole.fit(2)
    first = lazy()
    first.fit(1)
    first.save(path)
    again = lazy()
    again.fit(2, resume=path)
    same(whole, again)
    loaded = lazy()
    loaded.load(path)
    assert loaded.model[0].weight.equal(first.model[0].weight)


def test_a_loss_with_parameters_and_a_second_optimiser_are_kept(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds, y):
            return ((preds - y) ** 2).mean() / self.scale.exp() + self.scale

    def run():
        torch.manual_seed(2)
        model, loss = nn.Linear(1, 1), Scaled()
        opt = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=0.1)
        dls = DataLoaders(BatchLoader(X, 2 * X, batch_size=4, shuffle=True))
        learn = Learner(model, dls, loss, opt_func=opt, seed=1, progress=False)
        learn.opts["second"] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return learn

    whole = run()
    whole.fit(2)
    first = run()
    first.fit(1)
    first.save(tmp_path / "a.ckpt")
    again = run()
    again.fit(2, resume=tmp_path / "a.ckpt")
    same(whole, again)
    assert again.loss_func.scale.equal(whole.loss_func.scale)
    other = run()
    del other.opts["second"]
    with pytest.raises(CheckpointError, match=r"learn\.opts\.second"):
        other.fit(2, resume=tmp_path / "a.ckpt")


# -- what does not fit ------------------------------------------------------------------------------------------------


def saved_run(tmp_path, *cbs, **options):
    path = tmp_path / "run.ckpt"
    with pytest.raises(Crash):
        learner(*cbs, SaveAt(path, 3), CrashAt(3), **options).fit(2)
    return path


def state_of(learn):
    """Everything that must not change when something is refused."""
    opt = None if learn._opt is None else learn._opt.state_dict()
    return victim._bytes(
        [learn.model.state_dict(), opt, list(learn.history), torch.get_rng_state(), random.getstate()]
        + [learn._fits, learn._epochs_begun, learn.initialized, learn.position, learn.resumed]
        + [cb.state_dict() for cb in learn._cbs]
        + [p.requires_grad for p in learn.model.parameters()]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n=20), r"train\.samples was 24, now it is 20"),
        (dict(batch_size=8), r"train\.batch_size was 4, now it is 8"),
        (dict(seed=2), r"seed was 1, now it is 2"),
        (dict(valid=True), r"valid was None, now it is"),
        (
            dict(train=BatchLoader(X, 3 * X, batch_size=4, shuffle=True)),
            r"train\.content has changed: the tensors are others",
        ),
        (dict(train=BatchLoader(X, 2 * X, batch_size=4)), r"train\.shuffle was True, now it is False"),
        (dict(train=BatchLoader(X, 2 * X, batch_size=4, shuffle=True, seed=9)), r"train\.seed was 0, now it is 9"),
    ],
)
def test_another_run_is_refused_and_every_difference_named(tmp_path, options, message):
    path = saved_run(tmp_path)
    other = learner(**options)
    before = state_of(other)
    with pytest.raises(CheckpointError, match=message) as error:
        other.fit(2, resume=path)
    assert "allow_changes=True" in str(error.value)
    assert str(path) in str(error.value)
    assert state_of(other) == before
    other.fit(2, resume=path, allow_changes=True)
    assert len(other.history) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(1, 1), r"missing in the file: 'weight', 'bias'"),
        (
            lambda: nn.Sequential(nn.Linear(1, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 1)),
            r"'0\.weight' is float32 \(8, 1\) in the file",
        ),
    ],
)
@pytest.mark.parametrize("how", ["load", "fit"])
def test_another_net_is_refused_whole(tmp_path, model, message, how):
    path = saved_run(tmp_path)
    other = learner(model=model())
    before = state_of(other)
    with pytest.raises(CheckpointError, match=message):
        other.load(path) if how == "load" else other.fit(2, resume=path, allow_changes=True)
    assert state_of(other) == before


def test_load_not_strictly_takes_what_fits(tmp_path):
    path = saved_run(tmp_path)
    first = learner()
    first.load(path)
    other = learner(model=nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)))
    last = other.model[3].weight.clone()
    with pytest.warns(UserWarning, match="the optimiser is left alone"):
        other.load(path, strict=False)
    assert other.model[0].weight.equal(first.model[0].weight)
    assert other.model[3].weight.equal(last)


@pytest.mark.parametrize("how", ["load", "fit"])
def test_another_optimiser_is_refused_whole(tmp_path, how):
    path = saved_run(tmp_path)
    other = learner(opt_func=torch.optim.SGD)
    before = state_of(other)
    with pytest.raises(CheckpointError, match="optimiser was 'AdamW', now it is 'SGD'"):
        other.load(path) if how == "load" else other.fit(2, resume=path, allow_changes=True)
    assert state_of(other) == before
    other.load(path, with_opt=False)
    assert other.model[0].weight.shape == (8, 1)


def test_parameters_in_another_order_get_their_own_moments(tmp_path):
    """torch maps them by position, and would swap the moments in silence."""
    path = tmp_path / "a.ckpt"

    def run(order):
        return learner(opt_func=lambda params, lr: torch.optim.AdamW([list(params)[i] for i in order], lr=lr))

    first = run([0, 1, 2, 3, 4, 5])
    first.fit(1)
    first.save(path)
    other = run([3, 2, 1, 0, 5, 4])
    other.load(path)
    for p, q in zip(first.model.parameters(), other.model.parameters(), strict=True):
        assert first.opt.state[p]["exp_avg"].equal(other.opt.state[q]["exp_avg"])


def test_a_callback_that_is_missing_is_named(tmp_path):
    path = saved_run(tmp_path, victim.Noise())
    other = learner()
    with pytest.raises(CheckpointError, match="the callback 'Noise' is missing"):
        other.fit(2, resume=path)
    other.fit(2, resume=path, allow_changes=True)


def test_a_callback_that_refuses_its_state_leaves_all_as_it_was(tmp_path):
    path = saved_run(tmp_path, ActivationStats(), victim.Noise())

    for how in ("fit", "load"):
        noise = victim.Noise()
        noise.seen = [7.0]
        other = learner(noise, ActivationStats(threshold=0.5))
        before = state_of(other)
        with pytest.raises(CheckpointError, match=r"ActivationStats.*threshold"):
            other.fit(2, resume=path) if how == "fit" else other.load(path)
        assert how == "fit" or noise.seen == [7.0]
        noise.seen = [7.0]
        other.cbs[1]._clear()
        other.cbs[1].recordings = {}
        assert state_of(other) == before


def test_a_cycle_of_another_length_is_refused(tmp_path):
    path = saved_run(tmp_path, OneCycle(0.1))
    with pytest.raises(CheckpointError, match="the cycle was of 12 steps, now it is of 18"):
        learner(OneCycle(0.1)).fit(3, resume=path)


@pytest.mark.parametrize("event", ["before_batch", "after_pred", "before_validate", "after_train", "before_epoch"])
def test_what_was_saved_in_the_midst_can_be_loaded_but_not_resumed(tmp_path, event):
    path = tmp_path / "a.ckpt"
    saving = type("Saving", (Callback,), {event: lambda self, learn: learn.save(path)})()
    learner(saving, valid=True).fit(1)
    other = learner(valid=True)
    if event == "before_epoch":  # nothing has happened yet
        other.fit(1, resume=path)
        return
    with pytest.raises(CheckpointError, match="in the midst of a batch or a validation"):
        other.fit(1, resume=path)
    other.load(path)


def test_fewer_epochs_than_there_were_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    first = learner()
    first.fit(3)
    first.save(path)
    with pytest.raises(CheckpointError, match=r"n_epochs=2, but the run .* has 3 epochs behind it"):
        learner().fit(2, resume=path)


@pytest.mark.parametrize(
    ("resume", "error", "message"),
    [
        (3, TypeError, "resume=3"),
        (True, TypeError, "resume=True"),
        ("auto", ValueError, "resume='auto', but there are 0 Checkpoint callbacks"),
        ("nowhere.ckpt", CheckpointError, "nowhere.ckpt"),
        (".", CheckpointError, "no checkpoint in this folder"),
    ],
)
def test_bad_places_to_resume_from(tmp_path, monkeypatch, resume, error, message):
    monkeypatch.chdir(tmp_path)
    learn = learner()
    before = state_of(learn)
    with pytest.raises(error, match=re.escape(message) if isinstance(message, str) else message):
        learn.fit(1, resume=resume)
    assert state_of(learn) == before


def test_load_and_initialise_inside_a_fit_are_refused(tmp_path):
    path = saved_run(tmp_path)

    class Loading(Callback):
        def after_epoch(self, learn):
            learn.load(path)

    with pytest.raises(LoopError, match=r"load\(path=.*during a fit"):
        learner(Loading()).fit(1)


def test_load_leaves_the_random_state_alone(tmp_path):
    path = saved_run(tmp_path)
    learn = learner()
    torch.manual_seed(5)
    random.seed(6)
    before = torch.get_rng_state(), random.getstate()
    learn.load(path)
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]


def test_a_state_that_is_no_plain_data_is_named(tmp_path):
    class Bad(Callback):
        def state_dict(self):
            return {"a": {"b": object()}}

        def load_state_dict(self, state):
            raise NotImplementedError

    path = tmp_path / "a.ckpt"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=r"callbacks\.Bad\.a\.b"):
        learner(Bad()).save(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_file_of_something_else_is_no_state_of_a_learner(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoint.write(path, {"model": {}})
    with pytest.raises(CheckpointError, match="is no state of a Learner: it lacks"):
        learner().load(path)


def test_other_versions_warn(tmp_path):
    path = saved_run(tmp_path)
    state = checkpoint.read(path)
    state["versions"]["torch"] = "2.3.4"
    checkpoint.write(path, state)
    with pytest.warns(UserWarning, match=r"torch was '2\.3\.4'"):
        learner().fit(2, resume=path)


def test_a_stream_is_drawn_again_with_a_warning(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from TensorDataset(X, 2 * X)

    whole = learner(train=DataLoader(Stream(), batch_size=4))
    whole.fit(2)
    path = tmp_path / "a.ckpt"
    with pytest.raises(Crash):
        learner(SaveAt(path, 8), CrashAt(8), train=DataLoader(Stream(), batch_size=4)).fit(2)
    again = learner(train=DataLoader(Stream(), batch_size=4))
    with pytest.warns(UserWarning, match="may not go on exactly"):
        again.fit(2, resume=path)
    same(whole, again)


def test_an_epoch_that_has_become_shorter_than_what_was_done_of_it_has_ended(tmp_path):
    path = saved_run(tmp_path)
    other = learner(n=8)
    other.fit(2, resume=path, allow_changes=True)
    assert [row["epoch"] for row in other.history] == [0, 1]
    assert other.step_idx == 3 + 2


def test_a_fit_that_fails_after_loading_leaves_no_trace(tmp_path):
    path = saved_run(tmp_path)

    class Failing(Callback):
        def before_train(self, learn):
            raise Crash

    other = learner(Failing())
    before = state_of(other)
    with pytest.raises(Crash):
        other.fit(2, resume=path)
    assert state_of(other) == before


def test_a_cancelled_fit_cannot_be_gone_on_with(tmp_path):
    class Cancelling(Callback):
        def after_batch(self, learn):
            if learn.step_idx == 3:
                raise CancelFit

    first = learner(Cancelling())
    first.fit(2)
    first.save(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="or after a fit was cancelled"):
        learner().fit(2, resume=tmp_path / "a.ckpt")


def test_accuracy_and_the_history_come_back(tmp_path):
    path = tmp_path / "a.ckpt"
    y = (X[:, 0] > 0).long()

    def run():
        torch.manual_seed(3)
        dls = DataLoaders(BatchLoader(X, y, batch_size=4), BatchLoader(X, y, batch_size=4))
        return Learner(
            nn.Linear(1, 2), dls, nn.functional.cross_entropy, metrics=[accuracy], lr=0.1, seed=1, progress=False
        )

    first = run()
    first.fit(2)
    first.save(path)
    other = run()
    other.load(path)
    assert other.history == first.history
    assert other.history.columns == first.history.columns


# -- files of other machines and other kinds --------------------------------------------------------------------------


def test_a_file_from_a_gpu_is_loaded_without_one(tmp_path, monkeypatch):
    """What was saved from a GPU says so of each tensor; here torch is made to say it of these."""
    path = tmp_path / "a.ckpt"
    first = learner(opt_func=torch.optim.AdamW)
    first.fit(1)
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
    first.save(path)
    monkeypatch.undo()
    assert b"cuda:0" in path.read_bytes()
    whole, again = learner(), learner()
    whole.fit(2)
    again.fit(2, resume=path)
    same(whole, again)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.with_name("good").read_bytes()[:-1]), "truncated|cut|bytes"),
        (lambda path: path.write_bytes(path.with_name("good").read_bytes()[:-1] + b"\x7f"), "damaged"),
        (lambda path: torch.save({"a": 1}, path), r"torch\.save"),
        (lambda path: path.write_text("epoch,loss\n"), "no checkpoint"),
        (lambda path: path.mkdir(), "folder"),
        (lambda path: path.write_bytes(_newer(path.with_name("good").read_bytes())), "newer"),
    ],
    ids=["missing", "empty", "truncated", "flipped", "torch.save", "text", "folder", "newer"],
)
@pytest.mark.parametrize("how", ["load", "fit"])
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_changed(tmp_path, make, message, how):
    good = learner()
    good.fit(1)
    good.save(tmp_path / "good")
    path = tmp_path / "bad.ckpt"
    make(path)
    other = learner()
    before = state_of(other)
    with pytest.raises(CheckpointError, match=message) as error:
        other.load(path) if how == "load" else other.fit(2, resume=path)
    assert "bad.ckpt" in str(error.value)
    assert state_of(other) == before


def _newer(data):
    """A file of the next version of the format, with a right hash."""
    version, length = 2, int.from_bytes(data[12:20], "little")
    numbers = version.to_bytes(4, "little") + length.to_bytes(8, "little")
    return data[:8] + numbers + hashlib.sha256(data[52:] + numbers).digest() + data[52:]


def test_saving_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        learner().save(tmp_path / "none" / "a.ckpt")


# -- weights for others -----------------------------------------------------------------------------------------------


def test_weights_are_exported_with_tied_ones_written_once(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.norm(self.b(self.a(x.expand(-1, 4))))

    learn = learner(model=nn.DataParallel(Tied()))
    path = tmp_path / "weights.safetensors"
    learn.export_weights(path)
    loaded = Tied()
    safetensors.load_model(loaded, path)
    for name, value in learn.model.module.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name
    assert len(safetensors.load_file(path)) == 8
    with pytest.raises(CheckpointError, match="there is no folder"):
        learn.export_weights(tmp_path / "none" / "a.safetensors")


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"minitrain\[safetensors\]"):
        learner().export_weights(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_names_are_those_of_the_model_inside_of_its_wrapper(tmp_path):
    path = tmp_path / "a.ckpt"
    first = learner()
    wrapped = learner(model=nn.DataParallel(first.model))
    wrapped.save(path)
    other = learner()
    other.load(path)
    assert list(checkpoint.read(path)["model"])[:2] == ["0.weight", "0.bias"]


def test_no_copy_of_the_file_or_of_what_was_before_lives_through_the_fit(tmp_path, monkeypatch):
    path, read, held, alive = saved_run(tmp_path), checkpoint.read, [], []

    def reading(path):
        state = read(path)
        held.append(weakref.ref(state["model"]["0.weight"]))
        return state

    class Look(Callback):
        def before_fit(self, learn):
            held.append(weakref.ref(learn._undo))

        def after_batch(self, learn):
            gc.collect()
            alive.append([ref() is not None for ref in held])

    monkeypatch.setattr(checkpoint, "read", reading)
    learner().fit(2, resume=path, cbs=[Look()])
    assert alive[0] == [False, False]
