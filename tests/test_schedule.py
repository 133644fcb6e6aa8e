import copy
import math
import warnings

import pytest
import torch
from torch import nn

from minitrain import BatchLoader, Callback, DataLoaders, Learner
from minitrain.callbacks import OneCycle
from minitrain.errors import CancelFit, DataError

X = torch.linspace(-1, 1, 20).reshape(-1, 1)


def adamw(params, lr=1e-3):
    return torch.optim.AdamW(params, lr=lr, betas=(0.8, 0.99))


def sgd(params, lr=1e-3):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def make_learner(*cbs, opt_func=sgd, lr=0.01, train=None, **kwargs):
    torch.manual_seed(0)
    train = BatchLoader(X, 2 * X, batch_size=4) if train is None else train
    return Learner(
        nn.Linear(1, 1), DataLoaders(train), nn.MSELoss(), opt_func=opt_func, lr=lr, cbs=cbs, progress=False, **kwargs
    )


def settings(opt):
    return [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]


@pytest.mark.parametrize("opt_func", [sgd, adamw, torch.optim.RMSprop, torch.optim.NAdam])
@pytest.mark.parametrize(
    "options", [{}, {"pct_start": 0.5, "div_factor": 10, "anneal_strategy": "linear"}, {"three_phase": True}]
)
def test_rates_and_weights_equal_torch_by_hand_to_the_bit(opt_func, options):
    cycle = OneCycle(0.1, **options)
    learn = make_learner(cycle, opt_func=opt_func)
    model = copy.deepcopy(learn.model)
    learn.fit(3)

    opt = opt_func(model.parameters(), lr=0.01)
    uses_momentum = "betas" in opt.defaults or opt.defaults["momentum"] > 0
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=15, cycle_momentum=uses_momentum, **options)
    lrs, momentums = [], []
    for step in range(15):
        x = X[step % 5 * 4 : step % 5 * 4 + 4]
        nn.functional.mse_loss(model(x), 2 * x).backward()
        group = opt.param_groups[0]
        lrs.append(group["lr"])
        momentums.append(group["betas"][0] if "betas" in group else group["momentum"])
        opt.step()
        opt.zero_grad()
        if step < 14:
            scheduler.step()
    assert (cycle.lrs, cycle.momentums) == (lrs, momentums)
    for ours, theirs in zip(learn.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_lr_max_each_group_peaks_at_its_own_rate():
    peaks = [0.0, 0.0]

    class Watch(Callback):
        def before_step(self, learn):
            for i, group in enumerate(learn.opt.param_groups):
                peaks[i] = max(peaks[i], group["lr"])

    model = nn.Linear(1, 1)
    opt = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    opt.param_groups[1]["lr"] = 0.02
    learn = Learner(
        model, DataLoaders([(X, X)] * 40), nn.MSELoss(), opt_func=opt, cbs=[OneCycle(), Watch()], progress=False
    )
    learn.fit(1)
    assert peaks == pytest.approx([0.1, 0.02], rel=1e-2)
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.02]


class End(Callback):
    """Raise `error` at `event`."""

    order = 50

    def __init__(self, event, error):
        self.event, self.error = event, error

    def _end(self, event):
        if event == self.event:
            raise self.error

    def before_fit(self, learn):
        self._end("before_fit")

    def after_batch(self, learn):
        self._end("after_batch" if learn.batch_idx == 2 else "elsewhere")

    def after_epoch(self, learn):
        self._end("after_epoch")


@pytest.mark.parametrize("opt_func", [sgd, adamw, torch.optim.Adagrad])
@pytest.mark.parametrize("event", ["", "before_fit", "after_batch", "after_epoch"])
@pytest.mark.parametrize("error", [CancelFit(), ValueError(), KeyboardInterrupt()])
def test_the_optimiser_is_as_before_however_the_fit_ends(opt_func, event, error):
    learn = make_learner(OneCycle(0.5), End(event, error), opt_func=opt_func)
    before, attributes = settings(learn.opt), set(vars(learn.opt))
    try:
        learn.fit(2)
    except (ValueError, KeyboardInterrupt):
        assert event
    assert settings(learn.opt) == before
    assert set(vars(learn.opt)) == attributes
    assert "step" not in vars(learn.opt)


def test_what_a_users_scheduler_has_put_there_stays():
    learn = make_learner(OneCycle(0.5))
    theirs = torch.optim.lr_scheduler.StepLR(learn.opt, 10)
    before, step = settings(learn.opt), learn.opt.step
    learn.fit(1)
    assert settings(learn.opt) == before
    assert learn.opt.step is step
    theirs.step()


def test_a_second_fit_makes_a_cycle_of_its_own():
    cycle = OneCycle(0.1)
    learn = make_learner(cycle)
    learn.fit(2)
    first = cycle.lrs
    learn.fit(2)
    assert cycle.lrs == first
    assert len(first) == 10


@pytest.mark.parametrize("opt_func", [torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimiser_without_momentum_is_not_given_any(opt_func):
    cycle, seen = OneCycle(0.1), []

    class Watch(Callback):
        def before_step(self, learn):
            seen.append(learn.opt.param_groups[0].get("momentum", 0))

    make_learner(cycle, Watch(), opt_func=opt_func).fit(1)
    assert set(seen) == {0}
    assert len(cycle.momentums) == 5
    assert all(m == 0 or math.isnan(m) for m in cycle.momentums)


def test_momentum_goes_the_other_way():
    cycle = OneCycle(0.1)
    make_learner(cycle).fit(4)
    assert cycle.momentums[0] == 0.95
    assert cycle.momentums[cycle.lrs.index(max(cycle.lrs))] == pytest.approx(0.85, abs=1e-3)


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor():
    lr = torch.tensor(0.01)
    learn = make_learner(OneCycle(0.1), opt_func=lambda params: torch.optim.AdamW(params, lr=lr), lr=None)
    learn.fit(1)
    assert learn.opt.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.01)


def test_steps_beyond_the_total_are_made_at_the_last_rate():
    cycle = OneCycle(0.1, total_steps=3)
    make_learner(cycle).fit(1)
    assert cycle.lrs[2:] == [cycle.lrs[2]] * 3


class NoLength:
    def __iter__(self):
        return iter([(X, 2 * X)] * 5)


def test_a_loader_without_a_length_needs_total_steps():
    with pytest.raises(DataError, match=r"NoLength.*OneCycle\(total_steps=\.\.\.\)"):
        make_learner(OneCycle(), train=NoLength()).fit(1)
    cycle = OneCycle(total_steps=5)
    make_learner(cycle, train=NoLength()).fit(1)
    assert len(cycle.lrs) == 5


def test_too_few_steps_for_a_phase_are_explained():
    with pytest.raises(ValueError, match=r"total_steps=5 is too few.*pct_start"):
        make_learner(OneCycle(0.1, pct_start=0.2)).fit(1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: OneCycle(0), ValueError, "lr_max=0, wanted a positive finite number"),
        (lambda: OneCycle(-1.0), ValueError, "lr_max=-1.0"),
        (lambda: OneCycle(math.nan), ValueError, "lr_max=nan"),
        (lambda: OneCycle(math.inf), ValueError, "lr_max=inf"),
        (lambda: OneCycle("0.1"), TypeError, "lr_max='0.1'"),
        (lambda: OneCycle(True), TypeError, "lr_max=True"),
        (lambda: OneCycle(total_steps=2.5), TypeError, "total_steps=2.5"),
        (lambda: OneCycle(total_steps=0), ValueError, "total_steps=0"),
        (lambda: OneCycle(pct_start=1.5), ValueError, "pct_start"),
        (lambda: OneCycle(pct_stat=0.5), TypeError, "pct_stat"),
        (lambda: OneCycle(anneal_strategy="up"), ValueError, "anneal_strategy"),
        (lambda: OneCycle(div_factor=0), ValueError, "div_factor=0"),
        (lambda: OneCycle(max_lr=0.1), TypeError, "use lr_max"),
        (lambda: OneCycle(epochs=3), TypeError, "epochs"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(make, error, words):
    with pytest.raises(error, match=words.replace(".", r"\.")):
        make()


def test_momenta_may_differ_by_group():
    OneCycle(base_momentum=[0.8, 0.9], max_momentum=[0.9, 0.95])


def test_no_warning_is_emitted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn = make_learner(OneCycle(0.1))
        learn.fit(1)
        learn.fit(1)
        learn.validate(learn.dls.train)


def test_state_goes_on_in_the_cycle_and_still_puts_the_first_values_back():
    whole = OneCycle(0.1)
    straight = make_learner(whole, opt_func=adamw)
    straight.fit(2)

    saved = {}

    class Save(Callback):
        order = 10

        def after_batch(self, learn):
            if learn.step_idx == 4:
                saved.update(cycle=copy.deepcopy(first.state_dict()), opt=copy.deepcopy(learn.opt.state_dict()))
                raise CancelFit

    first = OneCycle(0.1)
    make_learner(first, Save(), opt_func=adamw).fit(2)

    second = OneCycle(0.1)
    learn = make_learner(second, opt_func=adamw)
    learn.opt.load_state_dict(saved["opt"])  # in the midst of the cycle: its rate is not the one to go back to
    with second.during_fit(learn):
        learn.n_epochs = 2
        second.before_fit(learn)
        second.load_state_dict(saved["cycle"])
        for _ in range(6):
            learn.opt.step()
            second.after_step(learn)
    assert second.lrs == whole.lrs
    assert second.momentums == whole.momentums
    assert settings(learn.opt) == settings(straight.opt)


def test_state_outside_a_fit_is_the_record_alone():
    cycle = OneCycle(0.1)
    learn = make_learner(cycle)
    learn.fit(1)
    state = cycle.state_dict()
    assert set(state) == {"lrs", "momentums"}
    other = OneCycle(0.1)
    other.load_state_dict(state)
    assert other.lrs == cycle.lrs


def test_nothing_of_the_learner_is_kept():
    cycle = OneCycle(0.1)
    make_learner(cycle).fit(1)
    assert cycle._scheduler is None


def test_plot_draws_rate_and_momentum_by_step(tmp_path):
    pytest.importorskip("matplotlib")
    cycle = OneCycle(0.1)
    make_learner(cycle).fit(2)
    rates, momenta = cycle.plot(save=tmp_path / "cycle.png").axes
    assert (tmp_path / "cycle.png").stat().st_size > 1000
    assert rates.lines[0].get_ydata().tolist() == cycle.lrs
    assert momenta.lines[0].get_ydata().tolist() == cycle.momentums


def test_plot_of_an_optimiser_without_momentum_is_of_the_rate_alone():
    pytest.importorskip("matplotlib")
    cycle = OneCycle(0.1)
    make_learner(cycle, opt_func=torch.optim.Adagrad).fit(1)
    assert [axes.get_title() for axes in cycle.plot().axes] == ["learning rate"]
    assert len(OneCycle(0.1).plot().axes) == 1  # before any fit
