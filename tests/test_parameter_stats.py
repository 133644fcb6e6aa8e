import math

import pytest
import torch
from torch import nn

from minitrain import BatchLoader, Callback, DataLoaders, Learner
from minitrain.callbacks import ParameterStats
from minitrain.errors import CancelBatch, CancelStep

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def momentum(params, lr):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def fit(*cbs, model=None, loss_func=None, n_epochs=1, cls=Learner, opt_func=momentum, x=X):
    dls = DataLoaders(BatchLoader(x, X[:, :4], batch_size=5))
    model = make_net() if model is None else model
    learn = cls(model, dls, loss_func or nn.MSELoss(), opt_func=opt_func, lr=0.1, cbs=cbs, progress=False)
    learn.fit(n_epochs)
    return learn


# -- values -----------------------------------------------------------------------------------------------------------


def numbers(p, before, dead, threshold):
    """The fields of one parameter, the slow way."""
    old, grad = before.double(), p.grad.double()
    return {
        "mean": old.mean(),
        "std": old.std(),
        "min": old.min(),
        "max": old.max(),
        "nonfinite": 0.0,
        "near_zero": (old.abs() <= threshold).double().mean(),
        "dead": dead,
        "grad_mean": grad.mean(),
        "grad_std": grad.std(),
        "grad_norm": grad.norm(),
        "grad_nonfinite": 0.0,
        "update_ratio": (p.detach().double() - old).norm() / old.norm(),
    }


def test_every_field_is_that_of_a_plain_loop():
    stats = ParameterStats(every=1, threshold=0.1, window=2)
    fit(stats, n_epochs=2)
    model, masks, rows = make_net(), {0: [], 2: []}, []
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in X.split(5) * 2:
        nn.functional.mse_loss(model(x), x).backward()
        before = {i: model[i].weight.detach().clone() for i in masks}
        opt.step()
        row = []
        for i, seen in masks.items():
            seen.append((model[i].weight.grad != 0).any(1))
            dead = (~torch.stack(seen[-2:]).any(0)).double().mean()
            row.append(numbers(model[i].weight, before[i], dead, 0.1))
        rows.append(row)
        opt.zero_grad()
    assert (stats.names, stats.steps) == (["0.weight", "2.weight"], list(range(8)))
    for field in ParameterStats.fields:
        expected = torch.tensor([[float(layer[field]) for layer in row] for row in rows])
        torch.testing.assert_close(
            stats[field], expected, rtol=1e-4, atol=1e-7, msg=lambda text, f=field: f"{f}: {text}"
        )
        assert torch.equal(getattr(stats, field), stats[field])


def test_weights_that_are_zero_have_an_infinite_ratio_and_such_as_stay_one_of_zero():
    model = make_net()
    with torch.no_grad():
        model[2].weight.zero_()

    class Frozen(Callback):
        def before_step(self, learn):
            for group in learn.opt.param_groups:
                group["lr"] = 0.0 if learn.step_idx else 0.1

    stats = ParameterStats(every=1)
    fit(stats, Frozen(), model=model)
    assert stats.update_ratio[0, 1] == math.inf
    assert (stats.update_ratio[1:] == 0).all()
    assert stats.std[0, 1] == 0
    assert (stats.std[1:, 1] > 0).all()  # rows are of the weights before the step


def test_the_histogram_is_of_the_weights_before_the_step():
    stats = ParameterStats(every=1, histogram_every=2, bins=4, limits=(-0.2, 0.2))
    before = []

    class Look(Callback):
        def before_step(self, learn):
            before.append(learn.model[0].weight.detach().clone())

    fit(stats, Look())
    assert stats.histogram_steps == [0, 2]
    for counts, step in zip(stats.histogram[:, 0], (0, 2), strict=True):
        w = before[step]
        assert counts.tolist() == [(w < -0.2).sum(), *w.histc(4, -0.2, 0.2).tolist(), (w >= 0.2).sum()]


def test_nonfinite_weights_and_gradients_are_counted():
    class Spoil(Callback):
        def after_backward(self, learn):
            if learn.batch_idx == 1:
                learn.model[2].weight.grad[0, :3] = math.nan

    stats = ParameterStats(every=1)
    fit(stats, Spoil())
    assert stats.grad_nonfinite[:2].tolist() == [[0, 0], [0, 3]]
    assert stats.nonfinite[:3].tolist() == [[0, 0], [0, 0], [0, 3]]
    assert stats.grad_nonfinite[2, 0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_numbers_are_those_of_the_rounded_weights(dtype):
    class Keep(Callback):
        def before_step(self, learn):
            self.before = learn.model.weight.detach().clone()

        def after_step(self, learn):
            change = (learn.model.weight.detach().double() - self.before.double()).norm()
            ratios.append((change / self.before.double().norm()).item())

    ratios = []
    model = nn.Linear(4, 4).to(dtype)
    with torch.no_grad():
        model.weight.mul_(1e5)  # their norm leaves float16
    stats = ParameterStats(every=1)
    dls = DataLoaders(BatchLoader(X.to(dtype), X.to(dtype), batch_size=5))
    options = {"opt_func": torch.optim.SGD, "lr": 100.0, "cbs": [stats, Keep()], "progress": False}
    Learner(model, dls, lambda preds, y: preds.float().sum(), **options).fit(1)
    torch.testing.assert_close(stats.update_ratio[:, 0], torch.tensor(ratios), rtol=1e-4, atol=0)


# -- which steps ------------------------------------------------------------------------------------------------------


def test_every_counts_optimiser_steps_over_the_epochs():
    stats = ParameterStats(every=3)
    fit(stats, n_epochs=2)
    assert stats.steps == [0, 3, 6]


def test_by_default_every_tenth_step_is_recorded():
    stats = ParameterStats()
    fit(stats, n_epochs=6)
    assert stats.steps == [0, 10, 20]


class Accumulate(Callback):
    def after_backward(self, learn):
        if learn.batch_idx % 2 == 0:
            raise CancelStep


def test_accumulated_steps_count_once_with_the_accumulated_gradient():
    norms = []

    class Norms(Callback):
        def before_step(self, learn):
            norms.append(learn.model[0].weight.grad.norm())

    stats = ParameterStats(every=1)
    fit(stats, Accumulate(), Norms(), n_epochs=2)
    assert stats.steps == [0, 1, 2, 3]
    torch.testing.assert_close(stats.grad_norm[:, 0], torch.stack(norms))


@pytest.mark.parametrize("error", [CancelStep, CancelBatch])
@pytest.mark.parametrize("order", [0, 100])
def test_a_skipped_step_leaves_no_row_and_does_not_count(error, order):
    class Skip(Callback):
        def before_step(self, learn):
            if learn.batch_idx in (0, 2):
                raise error

    skip = Skip()
    skip.order = order
    stats = ParameterStats(every=1, histogram_every=1)
    learn = fit(stats, skip, n_epochs=2)
    assert stats.steps == stats.histogram_steps == [0, 1, 2, 3]
    assert learn.step_idx == 4
    assert stats.update_ratio.isfinite().all()


def test_a_batch_that_is_cancelled_after_its_step_is_a_step_all_the_same():
    class Cancel(Callback):
        def after_step(self, learn):
            raise CancelBatch

    stats = ParameterStats(every=1)
    fit(stats, Cancel())
    assert stats.steps == [0, 1, 2, 3]


def test_no_copy_of_the_weights_outlives_the_step():
    class Look(Callback):
        order = 51

        def before_step(self, learn):
            kept.append(len(stats._looks))

        def after_step(self, learn):
            kept.append(len(stats._looks))

    kept = []
    stats = ParameterStats(every=2)
    fit(stats, Look())
    assert kept == [2, 0, 0, 0, 2, 0, 0, 0]


# -- gradients as the optimiser gets them -----------------------------------------------------------------------------


def test_clipped_gradients_are_seen_as_clipped():
    class Clip(Callback):
        def before_step(self, learn):
            nn.utils.clip_grad_norm_(learn.model.parameters(), 1e-3)

    stats = ParameterStats(every=1, select=["0", "2"])
    fit(stats, Clip())
    assert stats.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    torch.testing.assert_close(stats.grad_norm.square().sum(1).sqrt(), torch.full((4,), 1e-3))


class Scaled(Callback):
    def __init__(self, scale, clip=None):
        self.scaler, self.clip = torch.amp.GradScaler("cpu", init_scale=scale), clip

    def before_fit(self, learn):
        learn.scaler = self.scaler

    def before_step(self, learn):
        if self.clip is not None:
            self.scaler.unscale_(learn.opt)
            nn.utils.clip_grad_norm_(learn.model.parameters(), self.clip)


@pytest.mark.parametrize("clip", [None, 1e9])
def test_gradients_are_without_the_scale_of_a_scaler(clip):
    plain, scaled = ParameterStats(every=1, histogram_every=1), ParameterStats(every=1, histogram_every=1)
    fit(plain, n_epochs=2)
    fit(scaled, Scaled(2.0**16, clip), n_epochs=2)
    for field in ParameterStats.fields:
        torch.testing.assert_close(scaled[field], plain[field], rtol=1e-4, atol=1e-7)
    assert torch.equal(scaled.histogram, plain.histogram)


def test_a_step_that_the_scaler_skips_leaves_no_row():
    stats, scaler = ParameterStats(every=1), Scaled(2.0**127)
    learn = fit(stats, scaler, loss_func=lambda p, y: 1e3 * (p - y).square().mean(), n_epochs=5)
    assert 0 < learn.step_idx < 20
    assert stats.steps == list(range(learn.step_idx))
    assert stats.grad_norm.isfinite().all()


# -- which parameters -------------------------------------------------------------------------------------------------


def test_select_takes_all_parameters_of_the_modules_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            return self.scale * self.body(x)

    for select, names in {
        None: ["body.0.weight"],
        nn.BatchNorm1d: ["body.1.weight", "body.1.bias"],
        "Net": ["scale"],
        "body.0": ["body.0.weight", "body.0.bias"],
    }.items():
        stats = ParameterStats(select, every=1)
        fit(stats, model=Net())
        assert stats.names == names
        assert stats.update_ratio[1:].isfinite().all()
    with pytest.raises(ValueError, match="these modules have none of their own"):
        fit(ParameterStats("body"), model=Net())


def test_of_a_model_without_matrices_all_parameters_are_looked_at():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by, self.plus = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x * self.by + self.plus

    stats = ParameterStats(every=1)
    fit(stats, model=Scale())
    assert stats.names == ["by", "plus"]
    assert stats.dead[:, 0].isfinite().all()


def test_a_model_without_parameters_is_refused():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, preds, y):
            return (preds @ self.weight - y).square().mean()

    loss = Loss()
    with pytest.raises(ValueError, match="the Tanh has no parameters"):
        fit(ParameterStats(), model=nn.Tanh(), loss_func=loss, opt_func=lambda p, lr: momentum(loss.parameters(), lr))


def test_a_loss_function_with_parameters_is_left_alone():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, preds, y):
            return (preds @ self.weight - y).square().mean()

    loss, model, stats = Loss(), make_net(), ParameterStats(every=1)
    fit(stats, model=model, loss_func=loss, opt_func=lambda p, lr: momentum([*p, *loss.parameters()], lr))
    assert stats.names == ["0.weight", "2.weight"]


def test_frozen_and_idle_layers_have_weights_and_no_gradient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.idle, self.head = (nn.Linear(4, 4) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.head(self.frozen(x))

    stats = ParameterStats(every=1)
    fit(stats, model=Net())
    of_gradients = ["dead", "grad_mean", "grad_std", "grad_norm", "grad_nonfinite", "update_ratio"]
    for field in ParameterStats.fields:
        assert stats[field][:, :2].isnan().all() == (field in of_gradients), field
        assert stats[field][:, 2].isfinite().all()


def test_a_layer_that_is_frozen_in_the_midst_is_nan_from_then_on():
    class Freeze(Callback):
        def after_step(self, learn):
            if learn.step_idx == 2:
                learn.model[0].requires_grad_(False)

    stats = ParameterStats(every=1)
    fit(stats, Freeze())
    assert stats.update_ratio[:, 0].isnan().tolist() == [False, False, True, True]


def test_tied_and_shared_weights_appear_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.again = self.a

        def forward(self, x):
            return self.b(self.again(self.a(x)))

    stats = ParameterStats(every=1)
    fit(stats, model=Net())
    assert stats.names == ["a.weight"]
    tied = ParameterStats("b", every=1)
    fit(tied, model=Net())
    assert tied.names == ["b.weight", "b.bias"]


def test_parametrised_layers_go_by_their_originals():
    stats = ParameterStats(nn.Linear, every=1)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 4))
    fit(stats, model=model)
    originals = ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    assert stats.names == ["0.bias", *originals, "1.weight", "1.bias"]
    assert stats.update_ratio.isfinite().all()


def test_lazy_layers_have_their_shape_by_then():
    stats = ParameterStats(every=1)
    fit(stats, model=nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(4)))
    assert stats.names == ["0.weight", "1.weight"]
    assert stats.update_ratio.isfinite().all()


class Words(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(9, 5, sparse=sparse), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.emb((x.abs() * 3).long().clamp(0, 8)).mean(1))


def test_embeddings_have_no_dead_units_and_sparse_gradients_only_a_ratio():
    dense, sparse = ParameterStats(every=1), ParameterStats(every=1, histogram_every=1)
    fit(dense, model=Words(), opt_func=torch.optim.SGD)
    fit(sparse, model=Words(sparse=True), opt_func=torch.optim.SGD)
    for field in ParameterStats.fields:
        if field.startswith("grad"):
            assert dense[field].isfinite().all()
            assert sparse[field][:, 0].isnan().all()
        elif field != "dead":
            torch.testing.assert_close(sparse[field], dense[field])
    assert (dense.update_ratio > 0).all()
    assert dense.dead[:, 0].isnan().all()
    assert dense.dead[:, 1].isfinite().all()


def test_complex_parameters_have_a_ratio_and_nothing_else():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.phases = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return self.head((x.to(torch.complex64) @ self.phases).real)

    stats = ParameterStats(every=1, histogram_every=1)
    fit(stats, model=Net(), opt_func=torch.optim.SGD)
    assert stats.names == ["phases", "head.weight"]
    assert stats.update_ratio.isfinite().all()
    assert stats.mean[:, 0].isnan().all()
    assert stats.grad_norm[:, 0].isnan().all()
    assert stats.grad_norm[:, 1].isfinite().all()


# -- dead units -------------------------------------------------------------------------------------------------------


class Mask(Callback):
    """From step to step, other units get no gradient."""

    def __init__(self, *masks):
        self.masks = masks

    def before_step(self, learn):
        learn.model[0].weight.grad[list(self.masks[learn.batch_idx])] = 0


def test_a_unit_is_dead_that_got_no_gradient_for_a_whole_window():
    stats = ParameterStats("0", every=1, window=2)
    model = nn.Sequential(nn.Linear(4, 4))
    fit(stats, Mask({0, 1, 2}, {0, 1}, {1, 3}, {1, 3}), model=model)
    assert stats.dead[:, 0].tolist() == [0.75, 0.5, 0.25, 0.5]


def test_units_of_a_transposed_convolution_are_in_its_second_dimension():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 4, 2, stride=2)

        def forward(self, x):
            return self.up(x.reshape(-1, 2, 2))[:, 1:2].reshape(len(x), 4)  # one of four channels is used

    stats = ParameterStats(every=1)
    fit(stats, model=Net())
    assert stats.dead[:, 0].tolist() == [0.75] * 4


# -- steps of one's own -----------------------------------------------------------------------------------------------


def test_a_step_that_drops_the_gradients_is_measured_all_the_same():
    class Dropping(Learner):
        def step(self):
            self.opt.step()
            self.opt.zero_grad()

    one, other = ParameterStats(every=1), ParameterStats(every=1)
    fit(one, cls=Dropping)
    fit(other)
    for field in ParameterStats.fields:
        assert torch.equal(one[field], other[field])


def test_an_optimiser_with_a_closure_is_measured():
    class Closure(Learner):
        def step(self):
            def closure():
                self.opt.zero_grad()
                loss = self.compute_loss(self.forward(self.xb), self.yb)
                loss.backward()
                return loss

            self.opt.step(closure)

    stats = ParameterStats(every=1)
    fit(stats, cls=Closure, opt_func=lambda p, lr: torch.optim.LBFGS(p, lr=lr, max_iter=2))
    assert stats.steps == [0, 1, 2, 3]
    assert (stats.update_ratio > 0).all()


def test_a_loop_of_ones_own_may_fire_no_steps_and_leaves_no_rows():
    class Own(Learner):
        def train_batch(self):
            self.loss = self.model(self.xb).square().mean()
            self.loss.backward()
            self.opt.step()
            self.opt.zero_grad()

    stats = ParameterStats(every=1)
    fit(stats, cls=Own)
    assert (stats.names, stats.steps, tuple(stats.mean.shape)) == (["0.weight", "2.weight"], [], (0, 2))
