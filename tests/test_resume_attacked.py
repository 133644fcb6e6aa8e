"""What an attack on saving, loading and going on has found, each as the test that failed."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch
from faults import victim
from test_resume import Crash, CrashAt, SaveAt, X, learner, same, saved_run, state_of
from torch import nn

from minitrain import (
    BatchLoader,
    Callback,
    CancelEpoch,
    CancelFit,
    CancelTrain,
    CancelValidate,
    CheckpointError,
    DataLoaders,
    Learner,
    checkpoint,
    folder,
)
from minitrain.callbacks import ActivationStats, Checkpoint, OneCycle


def at(event, act):
    """A callback that does one thing at an event."""
    return type("At", (Callback,), {event: lambda self, learn: act(learn)})()


def cancel(kind):
    def act(learn):
        raise kind

    return act


# -- a stop or a cancel before the state is loaded --------------------------------------------------------------------


@pytest.mark.parametrize("event", ["before_epoch", "before_train"])
def test_a_stop_before_the_state_is_loaded_loses_none_of_it(tmp_path, event):
    path = saved_run(tmp_path, victim.Noise())
    stopped = learner(victim.Noise(), at(event, lambda learn: learn.stop("time")), Checkpoint(tmp_path / "run"))
    stopped.fit(2, resume=path)
    state = checkpoint.read(folder.numbered(tmp_path / "run")[-1][1])
    assert len(state["optimizers"]["opt"]["state"]) == 6
    assert (state["position"]["epoch"], state["position"]["step"]) == (1, 3)
    assert stopped.history[-1]["train_loss"] is not None


def test_a_stop_in_before_fit_trains_no_more_and_has_loaded_everything(tmp_path):
    path = saved_run(tmp_path)
    stopped = learner(at("before_fit", lambda learn: learn.stop("time")))
    stopped.fit(2, resume=path)
    assert (stopped.step_idx, len(stopped.opt.state), len(stopped.history)) == (3, 6, 0)


def test_a_stop_in_before_fit_is_heard_at_the_beginning_of_an_epoch_too(tmp_path):
    first = learner(SaveAt(tmp_path / "a.ckpt", 1, "after_epoch"))
    first.fit(3)
    stopped = learner(at("before_fit", lambda learn: learn.stop("time")))
    stopped.fit(3, resume=tmp_path / "a.ckpt")
    assert len(stopped.history) == 1
    assert stopped.stop_reason == "time"


@pytest.mark.parametrize(("event", "kind"), [("before_epoch", CancelEpoch), ("before_train", CancelTrain)])
def test_a_cancel_of_the_epoch_that_was_to_go_on_leaves_the_next_one_whole(tmp_path, event, kind):
    path, seen = saved_run(tmp_path), []
    once = at(event, lambda learn: cancel(kind)(learn) if learn.epoch == 0 else None)
    look = type(
        "Look", (Callback,), {"before_batch": lambda self, learn: seen.append((learn.epoch, learn.batch_idx))}
    )()
    learn = learner(once, look)
    learn.fit(2, resume=path)
    assert seen == [(1, i) for i in range(6)]
    assert learn.step_idx == 3 + 6


def test_a_fit_that_is_cancelled_at_once_has_loaded_everything(tmp_path):
    path = saved_run(tmp_path)
    learn = learner(at("before_fit", cancel(CancelFit)))
    learn.fit(2, resume=path)
    assert len(learn.opt.state) == 6
    learn.save(tmp_path / "b.ckpt")
    assert checkpoint.read(tmp_path / "b.ckpt")["position"] is None


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["after_fit", "after_cancel_fit"])
def test_a_signal_after_the_last_save_point_goes_on(tmp_path, event):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        send = at(event, lambda learn: os.kill(os.getpid(), signal.SIGINT))
        other = at("after_epoch", cancel(CancelFit)) if event == "after_cancel_fit" else Callback()
        other.state_key = "other"
        with pytest.raises(KeyboardInterrupt):
            learner(send, other, Checkpoint(tmp_path, on_interrupt=True)).fit(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# -- what is put back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fit", "load"])
def test_a_ready_optimiser_is_put_back(tmp_path, how):
    def run(lr, *cbs):
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        dls = DataLoaders(BatchLoader(X, X, batch_size=4))
        opt = torch.optim.Adam(model.parameters(), lr=lr)
        return Learner(model, dls, nn.functional.mse_loss, opt_func=opt, cbs=cbs, progress=False), opt

    path = tmp_path / "a.ckpt"
    with pytest.raises(Crash):
        run(0.05, ActivationStats(), SaveAt(path, 3), CrashAt(3))[0].fit(1)
    fail = at("before_batch", cancel(Crash)) if how == "fit" else ActivationStats(threshold=0.7)
    learn, opt = run(0.05, *([ActivationStats()] if how == "fit" else []), fail)
    before = victim._bytes(opt.state_dict()), state_of(learn)
    with pytest.raises((Crash, CheckpointError)):
        learn.fit(1, resume=path) if how == "fit" else learn.load(path)
    learn._cbs = [cb for cb in learn._cbs if not isinstance(cb, ActivationStats)]
    assert victim._bytes(opt.state_dict()) == before[0]


class Living(Callback):
    """Its state is its own tensor, and is loaded in place."""

    def __init__(self):
        self.total = torch.zeros(2)

    def after_batch(self, learn):
        self.total += 1

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total.copy_(state["total"])


@pytest.mark.parametrize("how", ["fit", "load", "fault"])
def test_callbacks_frozen_parameters_and_counters_are_put_back(tmp_path, how):
    class Freeze(Callback):
        def before_fit(self, learn):
            if not learn.resumed:
                learn.model[0].requires_grad_(False)

    last = at("before_batch", cancel(Crash)) if how == "fault" else ActivationStats(threshold=0.7)
    path = saved_run(tmp_path, Freeze(), Living(), *([] if how == "fault" else [ActivationStats()]))
    learn = learner(Living(), last)
    counters = {name: getattr(learn, name) for name in ("n_epochs", "epoch", "step_idx", "batch_idx", "position")}
    with pytest.raises((Crash, CheckpointError)):
        learn.load(path) if how == "load" else learn.fit(2, resume=path)
    assert learn._cbs[0].total.tolist() == [0, 0]
    assert all(p.requires_grad for p in learn.model.parameters())
    assert {name: getattr(learn, name) for name in counters} == counters


def test_a_loader_with_a_state_of_its_own_is_put_back(tmp_path):
    def run(*cbs):
        return learner(*cbs, train=victim.Stateful(victim.Points(24, noisy=False), 4), model=nn.Linear(4, 1))

    path = tmp_path / "a.ckpt"
    losses = nn.functional.mse_loss
    first = run(SaveAt(path, 3), CrashAt(3))
    first.loss_func = lambda preds, y: losses(preds[:, 0], y.float())
    with pytest.raises(Crash):
        first.fit(1)
    learn = run(at("before_batch", lambda learn: cancel(Crash)(learn) if learn.resumed else None))
    learn.loss_func = first.loss_func
    with pytest.raises(Crash):
        learn.fit(1, resume=path)
    learn.fit(1)
    assert learn.step_idx == 6


# -- optimisers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda opt: opt["state"]["0.weight"].update(exp_avg=torch.zeros(3, 3)),
        lambda opt: opt["state"]["0.weight"].update(exp_avg="os.system"),
        lambda opt: opt["state"]["0.weight"].pop("exp_avg"),
        lambda opt: opt["state"].update(nobody={"exp_avg": torch.zeros(1)}),
        lambda opt: opt["groups"][0].update(lr=torch.zeros(4)),
        lambda opt: opt["groups"][0].update(lr=float("nan")),
        lambda opt: opt["groups"][0].update(lr="os.system"),
        lambda opt: opt["groups"][0].update(betas=[0.9]),
        lambda opt: opt["groups"][0].update(evil="os.system"),
        lambda opt: opt["groups"][0].pop("eps"),
        lambda opt: opt["groups"].append({}),
        lambda opt: opt.update(groups=3),
        lambda opt: [opt.pop(key) for key in list(opt) if key != "class"] and opt.update(raw={}),
    ],
)
@pytest.mark.parametrize("how", ["fit", "load"])
def test_a_state_of_an_optimiser_that_cannot_be_is_refused(tmp_path, spoil, how):
    path = saved_run(tmp_path)
    state = checkpoint.read(path)
    spoil(state["optimizers"]["opt"])
    checkpoint.write(path, state)
    learn = learner()
    before = state_of(learn)
    with pytest.raises(CheckpointError):
        learn.fit(2, resume=path) if how == "fit" else learn.load(path)
    assert state_of(learn) == before


def test_flags_are_the_scripts_and_not_the_files(tmp_path):
    path = saved_run(tmp_path)
    state = checkpoint.read(path)
    state["optimizers"]["opt"]["groups"][0].update(maximize=7, foreach=0.5, amsgrad=True)
    checkpoint.write(path, state)
    whole, learn = learner(), learner()
    whole.fit(2)
    learn.fit(2, resume=path)
    same(whole, learn)


def test_an_optimiser_with_state_beside_that_of_its_parameters(tmp_path):
    class Counting(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr, momentum=0.9)
            self.calls = 0

        def step(self, closure=None):
            self.calls += 1
            self.state["all"] = {"rate": 0.9 * self.state["all"].get("rate", 1.0)}
            for group in self.param_groups:
                group["lr"] = 0.01 * self.state["all"]["rate"] / self.calls
            return super().step(closure)

        def state_dict(self):
            return super().state_dict() | {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]
            super().load_state_dict(state)

    path = saved_run(tmp_path, opt_func=Counting)
    whole, learn = learner(opt_func=Counting), learner(opt_func=Counting)
    whole.fit(2)
    learn.fit(2, resume=path)
    same(whole, learn)


def test_a_rate_that_a_callback_has_left_is_what_a_fit_goes_back_to(tmp_path):
    class Halve(Callback):
        def after_epoch(self, learn):
            for group in learn.opt.param_groups:
                group["lr"] /= 2

    path = tmp_path / "a.ckpt"
    whole, broken, again = learner(), learner(), learner()
    whole.fit(1, cbs=[Halve()])
    whole.fit(2, lr=0.5)
    broken.fit(1, cbs=[Halve()])
    with pytest.raises(Crash):
        broken.fit(2, lr=0.5, cbs=[SaveAt(path, 3), CrashAt(3)])
    again.fit(2, lr=0.5, resume=path)
    assert again.opt.param_groups[0]["lr"] == whole.opt.param_groups[0]["lr"] == 0.005


def test_sparse_gradients_that_wait_are_kept(tmp_path):
    def run(*cbs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 2, sparse=True), nn.Flatten(), nn.Linear(6, 1))
        x = torch.randint(0, 9, (24, 3), generator=torch.Generator().manual_seed(1))
        train = BatchLoader(x, torch.ones(24, 1), batch_size=4, shuffle=True)
        return learner(victim.Accumulate(4), *cbs, model=model, train=train, opt_func=torch.optim.SGD)

    path = tmp_path / "a.ckpt"
    whole, again = run(), run()
    whole.fit(2)
    with pytest.raises(Crash):
        run(SaveAt(path, 3), CrashAt(3)).fit(2)
    again.fit(2, resume=path)
    same(whole, again)


# -- schedules, and files from between fits ---------------------------------------------------------------------------


def test_a_cycle_that_had_ended_is_not_gone_on_with(tmp_path):
    path = tmp_path / "a.ckpt"
    first = learner(OneCycle(0.1))
    first.fit(1)
    first.save(path)
    other = learner(OneCycle(0.1))
    before = state_of(other)
    with pytest.raises(CheckpointError, match="the cycle had come to its end"):
        other.fit(3, resume=path)
    other.cbs[0].lrs = other.cbs[0].momentums = []
    assert state_of(other) == before


def test_a_run_that_was_saved_after_its_end_fires_nothing_more(tmp_path):
    path, seen = tmp_path / "a.ckpt", []
    first = learner(victim.Noise())
    first.fit_one_cycle(2, 0.1)
    first.save(path)
    drawn = list(first.cbs[0].seen)
    first.fit(1)
    again = learner(victim.Noise(), at("before_fit", seen.append))
    again.fit_one_cycle(2, 0.1, resume=path)
    assert not seen
    assert again.resumed
    assert again.cbs[0].seen == drawn
    again.fit(1)
    same(first, learner_without(again))


def learner_without(learn):
    learn._cbs = learn._cbs[:1]
    return learn


def test_counters_survive_a_load_and_another_save(tmp_path):
    first = learner()
    first.fit(2)
    for path in (tmp_path / "a.ckpt", tmp_path / "b.ckpt"):
        first.save(path)
        first = learner()
        first.load(path)
    first.fit(1)
    assert [(row["fit"], row["epoch"]) for row in first.history] == [(0, 0), (0, 1), (1, 0)]
    assert first._epochs_begun == 3


def test_a_file_from_before_the_first_fit(tmp_path):
    path = tmp_path / "a.ckpt"
    learner().save(path)
    whole, again = learner(), learner()
    whole.fit(1)
    again.fit(1, resume=path)
    assert len(again.history) == 1


def test_what_is_saved_inside_a_validation_that_a_callback_runs_cannot_be_resumed(tmp_path):
    path = tmp_path / "a.ckpt"

    class Saving(Callback):
        def after_batch(self, learn):
            if learn.phase == "fit" and learn.training and learn.batch_idx == 2:
                learn.validate()
            elif learn.phase == "validate":
                learn.save(path)

    learner(Saving(), valid=True).fit(1)
    with pytest.raises(CheckpointError, match="in the midst of"):
        learner(valid=True).fit(1, resume=path)


def test_a_fit_that_was_cancelled_after_an_epoch_is_over(tmp_path):
    first = learner(at("after_epoch", cancel(CancelFit)))
    first.fit(3)
    first.save(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="after a fit was cancelled"):
        learner().fit(3, resume=tmp_path / "a.ckpt")


@pytest.mark.parametrize("garbage", [torch.zeros(3), "os.system", None, 1.5, -1, [], True])
@pytest.mark.parametrize(
    "place", ["epoch", "batch", "step", "batch_idx", "n_epochs", "is_over", "stop_reason", "running_loss"]
)
def test_a_position_that_cannot_be_is_refused(tmp_path, place, garbage):
    can_be = {"is_over": (bool,), "stop_reason": (type(None), str)}
    if isinstance(garbage, can_be.get(place, ())):
        return
    path = saved_run(tmp_path)
    state = checkpoint.read(path)
    state["position"][place] = garbage
    checkpoint.write(path, state)
    learn = learner()
    before = state_of(learn)
    with pytest.raises(CheckpointError):
        learn.fit(2, resume=path)
    assert state_of(learn) == before


def test_counters_that_cannot_be_are_refused(tmp_path):
    path = saved_run(tmp_path)
    state = checkpoint.read(path)
    state["counters"]["epochs_begun"] = 0
    checkpoint.write(path, state)
    with pytest.raises(CheckpointError, match="lacks counters"):
        learner().fit(2, resume=path)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("was", "now"), [(torch.float64, torch.float32), (torch.complex64, torch.float32)])
@pytest.mark.parametrize("how", ["fit", "load"])
def test_another_dtype_is_another_net(tmp_path, was, now, how):
    def run(dtype):
        train = BatchLoader(X.to(dtype), X.to(dtype), batch_size=4)
        learn = learner(model=nn.Linear(1, 1, dtype=dtype), train=train)
        learn.loss_func = lambda preds, y: (preds - y).abs().mean()
        return learn

    first = run(was)
    first.fit(1)
    first.save(tmp_path / "a.ckpt")
    other = run(now)
    with pytest.raises(CheckpointError, match=f"'weight' is {str(was)[6:]}"):
        other.load(tmp_path / "a.ckpt") if how == "load" else other.fit(
            2, resume=tmp_path / "a.ckpt", allow_changes=True
        )


def test_a_file_of_which_nothing_fits_is_refused_even_when_it_need_not_be_strict(tmp_path):
    path = saved_run(tmp_path)
    other = learner(model=nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1)))
    with pytest.raises(CheckpointError, match="none of its tensors fits"):
        other.load(path, strict=False)


def test_hidden_buffers_of_a_loss_come_back(tmp_path):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, preds, y):
            self.calls += 1
            return nn.functional.mse_loss(preds, y) / self.calls

    def run(*cbs):
        learn = learner(*cbs)
        learn.loss_func = Loss()
        return learn

    path = tmp_path / "a.ckpt"
    whole, again = run(), run()
    whole.fit(2)
    with pytest.raises(Crash):
        run(SaveAt(path, 3), CrashAt(3)).fit(2)
    again.fit(2, resume=path)
    same(whole, again)


def test_extra_state_may_be_of_any_plain_kind(tmp_path):
    class Extra(nn.Linear):
        extra = None

        def forward(self, x):
            self.extra = {"calls": (self.extra or {"calls": 0})["calls"] + 1}
            return super().forward(x)

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    path = tmp_path / "a.ckpt"
    first = learner(model=Extra(1, 1))
    first.fit(1)
    first.save(path)
    other = learner(model=Extra(1, 1))
    other.load(path)
    assert other.model.extra == {"calls": 6}


# -- Checkpoint -------------------------------------------------------------------------------------------------------


class Losses(Callback):
    def __init__(self, *values):
        self.values = values

    def after_epoch(self, learn):
        learn.history[-1]["valid_loss"] = self.values[learn.epoch]


def test_a_kill_between_the_best_file_and_its_number_loses_neither(tmp_path, monkeypatch):
    def killed(path, name):
        raise Crash

    cbs = [Losses(3.0, 2.0), Checkpoint(tmp_path, async_write=False)]
    learner(*cbs, valid=True).fit(1)
    with monkeypatch.context() as patch:
        patch.setattr("minitrain.callbacks.checkpoint.link", killed)
        with pytest.raises(Crash):
            learner(Losses(3.0, 2.0), Checkpoint(tmp_path, async_write=False), valid=True).fit(2, resume="auto")
    again = Checkpoint(tmp_path, async_write=False)
    learner(Losses(3.0, 2.0), again, valid=True).fit(2, resume="auto")
    assert again.best == 2.0
    assert checkpoint.read(tmp_path / "best.ckpt")["position"]["epoch"] == 2
    assert checkpoint.read(folder.numbered(tmp_path)[-1][1])["position"]["epoch"] == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_best_epoch_that_could_not_be_written_is_not_the_best(tmp_path, monkeypatch, asynchronous):
    write, n = checkpoint.write, [0]

    def failing(path, *args, **kwargs):
        n[0] += 1
        if n[0] == 2:
            raise CheckpointError("no")
        write(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", failing)
    cb = Checkpoint(tmp_path, async_write=asynchronous)
    with pytest.warns(UserWarning, match="no The checkpoints from before are kept"):
        learner(Losses(3.0, 1.0, 2.0), cb, valid=True).fit(3)
    assert cb.best == 2.0
    assert checkpoint.read(tmp_path / "best.ckpt")["position"]["epoch"] == 3


def test_an_epoch_without_a_validation_is_not_the_best(tmp_path):
    cb = Checkpoint(tmp_path)
    learner(
        at("before_validate", lambda learn: cancel(CancelValidate)(learn) if learn.epoch == 0 else None), cb, valid=True
    ).fit(2)
    assert checkpoint.read(tmp_path / "best.ckpt")["position"]["epoch"] == 2


def test_two_checkpoints_in_one_folder_are_refused(tmp_path):
    second = Checkpoint(tmp_path)
    second.state_key = "second"
    with pytest.raises(CheckpointError, match="another Checkpoint of this process"):
        learner(Checkpoint(tmp_path), second).fit(1)
    learner(Checkpoint(tmp_path)).fit(1)  # the folder is free again


def test_a_write_that_fails_beside_another_error_is_told_and_let_go_of(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise CheckpointError("no room")

    monkeypatch.setattr(checkpoint, "write", failing)
    cb = Checkpoint(tmp_path, every=1)
    with pytest.raises(Crash), pytest.warns(UserWarning, match="no room"):
        learner(cb, CrashAt(2)).fit(1)
    assert cb._writing is None


def test_a_folder_with_nothing_but_the_best_is_gone_on_from(tmp_path):
    first = learner(Checkpoint(tmp_path), valid=True)
    first.fit(1)
    for _, path in folder.numbered(tmp_path):
        path.unlink()
    again = learner(Checkpoint(tmp_path), valid=True)
    again.fit(2, resume="auto")
    assert again.resumed


def test_a_folder_is_where_it_was_meant_to_be_when_it_was_named(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    cb = Checkpoint("run")

    class Move(Callback):
        @contextmanager
        def during_fit(self, learn):
            os.chdir(tmp_path / "b")
            yield

    learner(Move(), cb).fit(1)
    assert len(folder.numbered(tmp_path / "a" / "run")) == 1


def test_an_interrupt_in_a_validation_after_a_cut_training_writes_no_older_state(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Cut(Callback):
        def after_batch(self, learn):
            if learn.epoch == 1 and learn.training and learn.batch_idx == 2:
                raise CancelTrain
            if learn.epoch == 1 and not learn.training and learn.batch_idx == 0:
                os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            learner(Cut(), Checkpoint(tmp_path, on_interrupt=True, keep_best=None), valid=True).fit(3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for _, path in folder.numbered(tmp_path)] == [
        "000001-epoch1-batch0.ckpt",
        "000002-epoch2-batch0.ckpt",
    ]


def test_a_state_that_is_empty_is_a_state(tmp_path):
    class Fickle(Callback):
        def __init__(self):
            self.mark = None

        def before_epoch(self, learn):
            self.mark = "set" if learn.resumed else None

        def state_dict(self):
            return {} if self.mark is None else {"mark": self.mark}

        def load_state_dict(self, state):
            self.mark = state.get("mark")

    path = saved_run(tmp_path, Fickle())
    seen = []
    learn = learner(Fickle())
    learn.fit(1, resume=path, cbs=[at("before_batch", lambda learn: seen.append(learn.cbs[0].mark))])
    assert seen == [None] * 3


# -- what broken versions got by with ---------------------------------------------------------------------------------


def test_contexts_see_the_loaded_weights_and_what_before_fit_does_to_them_is_undone(tmp_path):
    seen = []

    class Spoil(Callback):
        @contextmanager
        def during_fit(self, learn):
            seen.append(learn.model[0].weight.detach().clone())
            yield

        def before_fit(self, learn):
            with torch.no_grad():
                learn.model[0].weight.mul_(1.5)

    path = tmp_path / "a.ckpt"
    whole, again = learner(Spoil()), learner(Spoil())
    whole.fit(2)
    with pytest.raises(Crash):
        learner(Spoil(), SaveAt(path, 3), CrashAt(3)).fit(2)
    again.fit(2, resume=path)
    same(whole, again)
    assert seen[-1].equal(checkpoint.read(path)["model"]["0.weight"])


def test_moments_keep_a_dtype_that_is_not_the_parameters(tmp_path):
    class Wide(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                sums = self.state[p].setdefault("sums", torch.zeros_like(p, dtype=torch.float64))
                sums.add_(p.grad.double())
                p.sub_((0.01 * sums).to(p.dtype))

    path = saved_run(tmp_path, opt_func=Wide)
    whole, again = learner(opt_func=Wide), learner(opt_func=Wide)
    whole.fit(2)
    again.fit(2, resume=path)
    same(whole, again)


def test_nothing_falls_due_at_once_since_a_fit_has_been_resumed(tmp_path):
    for n_epochs in (1, 2):
        cb = Checkpoint(tmp_path, every=4, keep_last=None, async_write=False)
        learner(cb).fit(n_epochs, resume="auto")
    wanted = [
        "epoch0-batch4.ckpt",
        "epoch1-batch0.ckpt",
        "epoch1-batch2.ckpt",
        "epoch1-batch6.ckpt",
        "epoch2-batch0.ckpt",
    ]
    assert [path.name[7:] for _, path in folder.numbered(tmp_path)] == wanted


def test_a_fit_that_has_trained_is_not_undone(tmp_path):
    path = saved_run(tmp_path)
    learn = learner(CrashAt(2))
    with pytest.raises(Crash):
        learn.fit(2, resume=path)
    assert not learn.model[0].weight.equal(checkpoint.read(path)["model"]["0.weight"])
    assert learn.step_idx == 5


def test_gradients_and_a_scaler_of_ones_own_are_put_back(tmp_path):
    path = tmp_path / "a.ckpt"

    def run(*cbs):
        learn = learner(*cbs)
        learn.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return learn

    with pytest.raises(Crash):
        run(SaveAt(path, 3), CrashAt(3)).fit(1)
    assert checkpoint.read(path)["scaler"]["scale"] == 16.0
    learn = run(at("before_batch", cancel(Crash)))
    for p in learn.model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(Crash):
        learn.fit(1, resume=path)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in learn.model.parameters())
    assert learn.scaler.get_scale() == 8.0
    whole, again = run(), run()
    whole.fit(1)
    again.fit(1, resume=path)
    same(whole, again)
    assert whole.scaler.state_dict() == again.scaler.state_dict()


@pytest.mark.parametrize(
    "spoil", [{"scale": "os.system"}, {"growth_interval": None}, {"backoff_factor": float("nan")}, {"more": 1}]
)
def test_a_state_of_a_scaler_that_cannot_be_is_refused(tmp_path, spoil):
    path = tmp_path / "a.ckpt"

    def run(*cbs):
        learn = learner(*cbs)
        learn.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return learn

    first = run()
    first.fit(1)
    first.save(path)
    state = checkpoint.read(path)
    state["scaler"].update(spoil)
    checkpoint.write(path, state)
    other = run()
    with pytest.raises(CheckpointError, match="scaler"):
        other.fit(2, resume=path)
    assert other.scaler.get_scale() == 8.0


def test_seconds_count_what_there_was_before_the_interruption(tmp_path):
    path = saved_run(tmp_path)
    state = checkpoint.read(path)
    state["position"]["seconds"] = 1000.0
    checkpoint.write(path, state)
    learn = learner()
    learn.fit(1, resume=path)
    assert 1000 < learn.history[-1]["seconds"] < 1100


def test_a_cycle_puts_back_what_there_was_before_it_and_not_before_this_process(tmp_path):
    path = tmp_path / "a.ckpt"

    def run(lr, *cbs):
        learn = learner(OneCycle(0.1), *cbs)
        learn.opt.param_groups[0]["lr"] = lr
        return learn

    with pytest.raises(Crash):
        run(0.007, SaveAt(path, 3), CrashAt(3)).fit(1)
    again = run(0.5)
    again.fit(1, resume=path)
    assert again.opt.param_groups[0]["lr"] == 0.007


def test_the_fingerprint_is_that_of_the_present_fit(tmp_path):
    path = tmp_path / "a.ckpt"
    learn = learner()
    learn.fit(1, cbs=[SaveAt(path, 1)])
    learn.dls = DataLoaders(BatchLoader(X[:16], 2 * X[:16], batch_size=4, shuffle=True))
    with pytest.raises(Crash):
        learn.fit(1, cbs=[SaveAt(path, 2), CrashAt(2)])
    assert checkpoint.read(path)["fingerprint"]["train"]["samples"] == 16


def test_buffers_of_a_loss_are_put_back_too_if_the_first_batch_fails():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, preds, y):
            self.calls += 1
            return nn.functional.mse_loss(preds, y)

    learn = learner(at("after_loss", cancel(Crash)))
    learn.loss_func = Loss()
    with pytest.raises(Crash):
        learn.fit(1)
    assert learn.loss_func.calls == 0
