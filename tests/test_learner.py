"""The Learner as its contract says: optimisers, batches, seeds, stages, predictions, history. The loop's own rules are in
`properties/`, wrong arguments in `test_bad_input.py`."""

import copy
import random
from collections import namedtuple
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from minitrain import (
    LSUV,
    BatchLoader,
    Callback,
    CancelFit,
    DataLoaders,
    InitError,
    KaimingNormal,
    Learner,
    LoopError,
)
from minitrain.callbacks import OneCycle
from minitrain.metrics import accuracy

X, Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2


def loaders(valid=True, batch_size=8):
    return DataLoaders(BatchLoader(X, Y, batch_size=batch_size), BatchLoader(X, Y, batch_size=6) if valid else None)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def make(model=None, dls=None, loss_func=F.cross_entropy, **options):
    return Learner(model or net(), dls or loaders(), loss_func, **{"progress": False} | options)


class Look(Callback):
    """Note `what(learn)` at each `event`."""

    def __init__(self, event, what):
        self.seen = []
        setattr(self, event, lambda learn: self.seen.append(what(learn)))


# -- optimisers -------------------------------------------------------------------------------------------------------


def test_opt_func_is_called_exactly_as_given():
    calls = []

    def opt_func(*args, **kwargs):
        calls.append((len(list(args[0])), kwargs))
        return torch.optim.SGD(learn.model.parameters(), lr=0.1)

    for lr, expected in ((None, {}), (0.5, {"lr": 0.5})):
        learn = make(opt_func=opt_func, lr=lr)
        learn.fit(1)
        learn.fit(1)
        assert calls == [(4, expected)], "built once"
        calls.clear()


def test_without_opt_func_it_is_adamw_fused_where_the_parameters_allow_it():
    learn = make(lr=0.02)
    assert type(learn.opt) is torch.optim.AdamW
    assert learn.opt.param_groups[0]["fused"]
    assert learn.opt.param_groups[0]["lr"] == 0.02
    odd = make(nn.Linear(3, 2, dtype=torch.complex64), loss_func=lambda preds, yb: preds.abs().mean())
    assert type(odd.opt) is torch.optim.AdamW
    assert not odd.opt.param_groups[0]["fused"]
    odd.dls = DataLoaders([(X.to(torch.complex64), Y)])
    odd.fit(1)


def test_a_ready_optimiser_is_taken_as_it_is():
    model = net()
    opt = torch.optim.SGD(model[2].parameters(), lr=0.1)
    first = model[0].weight.clone()
    learn = make(model, opt_func=opt)
    learn.fit(1)
    assert learn.opt is opt
    assert torch.equal(model[0].weight, first)
    assert model[0].weight.grad is None  # nobody else would drop what the optimiser does not hold


def test_a_splitter_gives_the_parameter_groups():
    def splitter(model):
        return [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}]

    learn = make(opt_func=torch.optim.SGD, lr=0.1, splitter=splitter)
    assert [group["lr"] for group in learn.opt.param_groups] == [1e-3, 0.1]


def test_the_optimiser_holds_frozen_parameters_too():
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    learn = make(model)
    learn.fit(1)
    assert torch.equal(model[0].weight, before)
    assert {id(p) for p in learn.opt.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    model[0].requires_grad_(True)
    learn.fit(1)
    assert not torch.equal(model[0].weight, before)


def test_a_loss_with_parameters_of_its_own_may_be_trained_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds, yb):
            return F.cross_entropy(preds * self.scale, yb)

    model, loss = net(), Scaled()
    make(model, loss_func=loss, opt_func=torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)).fit(1)
    assert loss.scale != 1


def test_the_optimiser_is_built_after_the_init_stage_and_survives_fits():
    order = []

    def stage(model, batches):
        order.append("init")

    def opt_func(params):
        order.append("opt")
        return torch.optim.Adam(params)

    learn = make(init=stage, opt_func=opt_func)
    learn.fit(1)
    opt, step = learn.opt, learn.opt.state[learn.model[0].weight]["step"].item()
    learn.fit(1)
    assert order == ["init", "opt"]
    assert learn.opt is opt
    assert opt.state[learn.model[0].weight]["step"] == 2 * step  # moments stay


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("error", [None, ValueError])
def test_the_lr_of_a_fit_holds_for_that_fit_only(lr, error):
    learn = make(opt_func=partial(torch.optim.SGD, lr=lr))
    rates = Look("before_step", lambda learn: float(learn.opt.param_groups[0]["lr"]))
    if error:
        rates.after_epoch = lambda learn: (_ for _ in ()).throw(error)
        with pytest.raises(error):
            learn.fit(1, lr=0.5, cbs=[rates])
    else:
        learn.fit(1, lr=0.5, cbs=[rates])
    assert rates.seen == [0.5] * 3
    assert float(learn.opt.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert isinstance(learn.opt.param_groups[0]["lr"], type(lr))


def test_fit_one_cycle_is_a_fit_with_one_cycle():
    a, b, cycle = make(opt_func=torch.optim.AdamW), make(opt_func=torch.optim.AdamW), OneCycle(0.3)
    a.fit_one_cycle(2, 0.3)
    b.fit(2, cbs=[cycle])
    assert [row["train_loss"] for row in a.history] == [row["train_loss"] for row in b.history]
    assert 0.29 < max(cycle.lrs) <= 0.3


def test_a_second_fit_after_one_cycle_goes_on_at_the_rate_given():
    learn = make(opt_func=torch.optim.AdamW, lr=0.01)
    learn.fit_one_cycle(1)
    assert learn.history[-1]["lr"] < 1e-6
    learn.fit(1)
    assert learn.history[-1]["lr"] == 0.01
    assert learn.opt.param_groups[0]["betas"] == (0.9, 0.999)


# -- batches ----------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, a, b=0):
        return self.linear(a + b)


def test_several_inputs_are_positional_arguments():
    inputs = Look("before_batch", lambda learn: (type(learn.xb), len(learn.xb)))
    make(Sum(), DataLoaders([(X, X, Y)], [(X, X, Y)]), cbs=[inputs]).fit(1)
    assert inputs.seen == [(tuple, 2)] * 2


def test_a_bare_tensor_is_its_own_input_and_has_no_target():
    seen = Look("after_loss", lambda learn: (learn.xb is learn.batch, learn.yb))
    learn = make(
        nn.Linear(3, 3), DataLoaders(BatchLoader(X, batch_size=8)), lambda preds: preds.square().mean(), cbs=[seen]
    )
    learn.fit(1)
    assert seen.seen == [(True, None)] * 3
    preds, targets = learn.get_preds(BatchLoader(X, batch_size=8))
    assert preds.shape == (20, 3)
    assert targets is None


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y)], ids=["tuple", "list", "named tuple"])
def test_pairs_of_any_kind_are_batches(batch):
    learn = make(dls=DataLoaders([batch]))
    learn.fit(1)
    assert learn.predict(batch).shape == (20, 2)


def test_what_a_step_computes_are_methods_to_override():
    class Mine(Learner):
        def split_batch(self, batch):
            return batch["x"], batch["y"]

        def n_samples(self, batch):
            return 2 * len(batch["y"])

        def forward(self, xb):
            return 2 * self.model(xb)

        def compute_loss(self, preds, yb):
            return super().compute_loss(preds, yb) + 1

        def backward(self, loss):
            (loss / 2).backward()

        def step(self):
            super().step()
            self.steps = getattr(self, "steps", 0) + 1

    model = net()
    loss = F.cross_entropy(2 * model(X), Y).item() + 1
    learn = Mine(
        model, DataLoaders([{"x": X, "y": Y}]), F.cross_entropy, opt_func=torch.optim.SGD, lr=1e-9, progress=False
    )
    learn.fit(1)
    assert learn.history[0]["train_loss"] == pytest.approx(loss)
    assert learn.running_loss.count == 40
    assert learn.steps == 1


def test_train_batch_may_be_overridden_with_several_optimisers():
    class Two(Learner):
        def train_batch(self):
            if not self.opts:
                self.opts = {"last": torch.optim.SGD(self.model[2].parameters(), lr=0.1)}
            self.preds = self.forward(self.xb)
            self.loss = self.compute_loss(self.preds, self.yb)
            self.loss.backward()
            self.opts["last"].step()
            self.model.zero_grad()

    model = net()
    first, last = (copy.deepcopy(model[i]) for i in (0, 2))
    losses = Look("after_batch", lambda learn: learn.loss.item())
    learn = Two(model, loaders(valid=False), F.cross_entropy, cbs=[losses], progress=False)
    learn.fit(1)
    assert torch.equal(model[0].weight, first.weight)
    assert not torch.equal(model[2].weight, last.weight)
    expected = sum(loss * n for loss, n in zip(losses.seen, (8, 8, 4), strict=True)) / 20
    assert learn.history[0]["train_loss"] == pytest.approx(expected)


def test_a_train_batch_that_reports_nothing_leaves_the_loss_out():
    class Silent(Learner):
        def train_batch(self):
            pass

    learn = Silent(net(), loaders(valid=False), F.cross_entropy, progress=False)
    learn.fit(1)
    assert learn.history[0]["train_loss"] is None


def test_the_backward_loss_is_what_is_differentiated_and_the_loss_what_is_reported():
    class Double(Callback):
        def after_loss(self, learn):
            assert learn.backward_loss is learn.loss
            learn.backward_loss = 2 * learn.loss

    grads = Look("after_backward", lambda learn: learn.model[0].weight.grad.clone())
    doubled = Look("after_backward", lambda learn: learn.model[0].weight.grad.clone())
    doubled.state_key = "doubled"
    plain, double = make(cbs=[grads], lr=1e-9), make(cbs=[Double(), doubled], lr=1e-9)
    plain.fit(1), double.fit(1)
    assert plain.history[0]["train_loss"] == pytest.approx(double.history[0]["train_loss"], rel=1e-5)
    torch.testing.assert_close(doubled.seen[0], 2 * grads.seen[0])


def test_before_batch_may_replace_the_batch():
    class Flip(Callback):
        def before_batch(self, learn):
            learn.xb, learn.yb = -learn.xb, 1 - learn.yb

    learn = make(cbs=[Flip()])
    torch.testing.assert_close(learn.predict((X, Y)), learn.model(-X).detach())


# -- mixed precision has its place ------------------------------------------------------------------------------------


class Overflow(torch.amp.GradScaler):
    """A scaler whose `nth` step finds a gradient that is not finite."""

    def __init__(self, nth, params):
        super().__init__("cpu", init_scale=4.0)
        self.nth, self.params = nth, params

    def step(self, opt):
        if self.nth == 0:
            next(p.grad for p in self.params if p.grad is not None).fill_(float("inf"))
        self.nth -= 1
        return super().step(opt)


def test_the_scaler_scales_the_loss_and_a_step_that_it_skips_is_a_cancelled_one():
    model = net()
    twin = copy.deepcopy(model)
    events = []

    class Note(Callback):
        def after_step(self, learn):
            events.append("step")

        def after_cancel_step(self, learn):
            events.append("cancel")

        def before_batch(self, learn):
            assert all(p.grad is None for p in learn.model.parameters())

    learn = make(model, loaders(valid=False), opt_func=torch.optim.SGD, lr=0.1, cbs=[Note()])
    learn.scaler = Overflow(1, list(model.parameters()))
    learn.fit(1)
    assert events == ["step", "cancel", "step"]
    assert learn.step_idx == 2
    assert learn.scaler.get_scale() == 2.0
    opt = torch.optim.SGD(twin.parameters(), lr=0.1)
    for part in (slice(0, 8), slice(16, 20)):  # the second batch was skipped
        F.cross_entropy(twin(X[part]), Y[part]).backward()
        opt.step(), opt.zero_grad()
    torch.testing.assert_close(model[0].weight, twin[0].weight)


def test_during_forward_is_open_for_forward_and_loss_only():
    log = []

    class Scope(Callback):
        @contextmanager
        def during_forward(self, learn):
            log.append("open")
            yield
            log.append("close")

        def after_backward(self, learn):
            log.append("backward")

    model = net()
    model.register_forward_hook(lambda *_: log.append("forward"))

    def loss_func(preds, yb):
        log.append("loss")
        return F.cross_entropy(preds, yb)

    make(model, DataLoaders([(X, Y)]), loss_func, cbs=[Scope()]).fit(1)
    assert log == ["open", "forward", "loss", "close", "backward"]


# -- seeds, devices, stages -------------------------------------------------------------------------------------------


def test_the_seed_sets_python_numpy_and_torch_once_before_the_stage_of_the_first_fit():
    drawn = []

    def draw(*_):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))

    learn = make(init=draw, seed=3, cbs=[Look("before_fit", draw)])
    torch.manual_seed(99)
    learn.fit(1)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    draw()
    assert drawn[0] == drawn[-1]
    assert len({*drawn[:2]}) == 2
    del drawn[:]
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    learn.fit(1)
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    draw()
    assert drawn[0] == drawn[1]  # the second fit has not seeded anew


def test_without_a_seed_nothing_is_seeded():
    learn = make()
    before = torch.get_rng_state()
    learn.fit(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_device_is_the_models_own_unless_given():
    assert make().device == torch.device("cpu")
    assert make(nn.Linear(3, 2, device="meta")).device == torch.device("meta")
    model = net()
    learn = make(model, device="meta", loss_func=F.cross_entropy)
    assert learn.device == torch.device("meta")
    assert all(p.is_meta for p in model.parameters())


def test_batches_are_moved_however_nested_they_are():
    class Nested(Learner):
        def split_batch(self, batch):
            return batch, None

        def n_samples(self, batch):
            return len(batch["a"])

        def forward(self, xb):
            assert xb["a"].is_meta
            assert xb["more"][0].x.is_meta
            assert xb["name"] == "n"
            return self.model(xb["a"])

    batch = {"a": X, "more": [Pair(X, 1)], "name": "n"}
    learn = Nested(nn.Linear(3, 2), DataLoaders([batch]), lambda preds: preds.mean(), device="meta", progress=False)
    assert learn.predict(batch).is_meta
    assert not batch["a"].is_meta


def test_stages_run_once_in_order_and_each_reports():
    learn = make(init=[KaimingNormal(), LSUV()])
    assert learn.init_report is None
    report = learn.initialize()
    assert [r.stage for r in learn.init_reports] == ["KaimingNormal", "LSUV"]
    assert report is learn.init_report
    assert report.ok
    weights = copy.deepcopy(learn.model.state_dict())
    learn.fit(1, lr=1e-30)
    assert learn.init_report is report
    for name, value in learn.model.state_dict().items():
        torch.testing.assert_close(value, weights[name])


def test_the_stage_runs_before_any_context_opens_and_on_the_first_batch_of_training():
    order = []

    class Context(Callback):
        @contextmanager
        def during_fit(self, learn):
            order.append("during_fit")
            yield

    def stage(model, batches):
        order.append("init")
        assert not model[0]._forward_hooks
        assert torch.equal(next(iter(batches)), X[:8])

    make(init=stage, cbs=[Context()]).fit(1)
    assert order == ["init", "during_fit"]


def test_a_stage_that_fails_undoes_those_before_it_and_the_fit_may_be_tried_again():
    fail = [True]

    def second(model, batches):
        if fail:
            raise InitError("no")

    learn = make(init=[KaimingNormal(), second], seed=0)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(InitError):
        learn.fit(1)
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
    assert not learn.initialized
    assert learn.init_reports == []
    fail.clear()
    learn.fit(1)
    assert learn.initialized
    assert learn.init_reports[1] is None


def test_lsuv_is_one_argument_and_normalises_to_a_millionth():
    learn = make(init=LSUV())
    learn.initialize()
    for row in learn.init_report:
        assert abs(row.mean_after) < 1e-6
        assert abs(row.std_after - 1) < 1e-6


@pytest.mark.parametrize("shuffle", [False, True])
def test_set_epoch_reaches_a_loader_and_a_sampler(shuffle):
    dataset = TensorDataset(X, Y)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=0, shuffle=shuffle)
    learn = make(dls=DataLoaders(DataLoader(dataset, batch_size=5, sampler=sampler)))
    seen = Look("before_train", lambda learn: sampler.epoch)
    learn.fit(2, cbs=[seen])
    learn.fit(1, cbs=[seen])
    assert seen.seen == [0, 1, 2]


# -- history, validation, predictions ---------------------------------------------------------------------------------


def test_history_has_the_documented_columns_and_appends_over_fits():
    learn = make(metrics=[accuracy])
    learn.fit(2)
    learn.fit(1)
    assert learn.history.columns == ["fit", "epoch", "train_loss", "valid_loss", "valid_accuracy", "lr", "seconds"]
    assert [(row["fit"], row["epoch"]) for row in learn.history] == [(0, 0), (0, 1), (1, 0)]
    assert all(type(value) in (int, float) for row in learn.history for value in row.values())


def test_validate_returns_the_keys_of_the_history_and_takes_any_loader():
    learn = make(metrics={"right": accuracy})
    assert list(learn.validate()) == ["valid_loss", "valid_right"]
    part = learn.validate([(X[:5], Y[:5])])
    assert part["valid_right"] == pytest.approx((learn.predict(X[:5]).argmax(1) == Y[:5]).float().mean().item())
    assert len(learn.history) == 0


def test_validate_before_any_fit_builds_no_optimiser_and_runs_no_stage():
    learn = make(init=LSUV())
    weights = copy.deepcopy(learn.model.state_dict())
    learn.validate(), learn.predict(X), learn.get_preds()
    assert learn._opt is None
    assert not learn.initialized
    assert all(torch.equal(value, weights[name]) for name, value in learn.model.state_dict().items())


def test_predict_takes_a_batch_with_or_without_its_target():
    learn = make()
    assert torch.equal(learn.predict(X), learn.predict((X, Y)))
    assert not learn.predict(X).requires_grad


def test_get_preds_joins_nested_outputs():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return {"scores": self.linear(x), "pair": (x, x.sum(1))}

    preds, targets = make(Both(), loss_func=lambda preds, yb: preds["scores"].mean()).get_preds()
    assert preds["scores"].shape == (20, 2)
    assert torch.equal(preds["pair"][1], X.sum(1))
    assert torch.equal(targets, Y)


def test_phase_says_who_asks():
    seen = Look("before_validate", lambda learn: learn.phase)
    learn = make(cbs=[seen])
    learn.fit(1), learn.validate(), learn.predict(X), learn.get_preds()
    assert seen.seen == ["fit", "validate", "predict", "predict"]
    assert learn.phase is None


def test_an_averaged_model_can_stand_in_for_validation():
    """What an EMA callback does: a context, under each of the three that look on."""
    other = net()
    nn.init.zeros_(other[2].weight), nn.init.zeros_(other[2].bias)

    class Average(Callback):
        @contextmanager
        def during_validate(self, learn):
            mine, learn.model = learn.model, other
            try:
                yield
            finally:
                learn.model = mine

    learn = make(cbs=[Average()])
    model = learn.model
    assert learn.predict(X).eq(0).all()
    assert learn.get_preds()[0].eq(0).all()
    assert learn.validate()["valid_loss"] == pytest.approx(np.log(2), rel=1e-6)
    learn.fit(1)
    assert learn.history[0]["valid_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert learn.model is model


# -- stop, describe, callbacks of one fit -----------------------------------------------------------------------------


def test_stop_ends_after_this_batch_and_the_row_says_that_it_is_partial():
    class Stop(Callback):
        def after_loss(self, learn):
            if learn.training and learn.batch_idx == 1:
                learn.stop("enough")
                learn.stop("a second reason is not heard")

    learn = make(cbs=[Stop()], metrics=[accuracy])
    learn.fit(5)
    assert learn.stop_reason == "enough"
    (row,) = learn.history
    assert row["partial"] is True
    assert row["valid_accuracy"] is not None
    assert learn.step_idx == 2
    learn.cbs = []
    learn.fit(1)
    assert learn.stop_reason is None
    assert "partial" not in learn.history[1]


@pytest.mark.parametrize("reason", ["", None, 3])
def test_stop_wants_a_reason(reason):
    with pytest.raises(TypeError, match="reason="):
        make(cbs=[Look("after_batch", lambda learn: learn.stop(reason))]).fit(1)


def test_describe_prints_who_runs_when(capsys):
    class First(Callback):
        order = -1

        def after_batch(self, learn): ...

    class Second(Callback):
        def after_batch(self, learn): ...

        def before_fit(self, learn): ...

    make(cbs=[Second(), First()]).describe()
    assert capsys.readouterr().out == (
        "Callbacks in order: First (-1), Second (0)\n"
        "  before_fit             Second\n"
        "  after_batch            First, Second\n"
    )


def test_callbacks_of_one_fit_take_part_in_that_fit_only():
    always, once = Look("before_fit", lambda learn: type(learn.cbs)), Look("before_fit", lambda learn: len(learn.cbs))
    once.state_key = "once"
    learn = make(cbs=[always])
    learn.fit(1, cbs=[once])
    learn.fit(1)
    assert always.seen == [tuple, tuple]
    assert once.seen == [2]
    assert learn.cbs == [always]


def test_two_fits_in_a_callbacks_life_are_independent_of_a_cancelled_one():
    class Quit(Callback):
        def before_epoch(self, learn):
            raise CancelFit

    learn = make()
    learn.fit(3, cbs=[Quit()])
    assert len(learn.history) == 0
    learn.fit(1)
    assert [(row["fit"], row["epoch"]) for row in learn.history] == [(1, 0)]


def test_resumed_has_its_place_and_is_false():
    seen = Look("before_fit", lambda learn: learn.resumed)
    make(cbs=[seen]).fit(1)
    assert seen.seen == [False]


def test_an_interrupt_surfaces_and_the_learner_can_go_on():
    class Interrupt(Callback):
        def after_backward(self, learn):
            raise KeyboardInterrupt

    learn = make()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[Interrupt()])
    learn.fit(1)
    assert len(learn.history) == 1


def test_a_learner_can_be_copied():
    learn = make(cbs=[OneCycle()])
    learn.fit(1)
    twin = copy.deepcopy(learn)
    twin.fit(1)
    assert len(learn.history) == 1
    assert len(twin.history) == 2
    learn.fit(1)
    assert learn.history[1]["train_loss"] == twin.history[1]["train_loss"]


def test_a_fit_inside_a_fit_of_the_same_learner_is_an_error_that_names_the_phase():
    with pytest.raises(LoopError, match=r"fit inside a callback \(during a fit\)"):
        make(cbs=[Look("after_epoch", lambda learn: learn.fit(1))]).fit(1)
