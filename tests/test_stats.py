import contextlib
import copy
import csv
import gc
import io
import json
import math
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from minitrain import BatchLoader, Callback, DataLoaders, Learner
from minitrain.callbacks import ActivationStats, Diagnose, GradientStats, ParameterStats
from minitrain.errors import CancelBatch, CancelEpoch, CancelFit, CancelStep, CancelTrain
from minitrain.recording import Recording

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def named(stats, key):
    """Beside another one of its class."""
    stats.state_key = key
    return stats


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))


def make_learner(*cbs, model=None, loss_func=None, valid=True):
    dls = DataLoaders(BatchLoader(X, X, batch_size=5), BatchLoader(X, X, batch_size=10) if valid else None)
    model = make_net() if model is None else model
    return Learner(model, dls, loss_func or nn.MSELoss(), lr=0.01, cbs=cbs, progress=False)


def n_hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


class Reference(Callback):
    """The same numbers, the slow way: forward passes of its own, before the step."""

    def before_fit(self, learn):
        self.rows = []

    def before_batch(self, learn):
        if learn.training:
            with torch.no_grad():
                a = learn.model[0](learn.xb)
                b = learn.model[2](a.relu())
            self.rows.append([[a.double().mean(), b.double().mean()], [a.double().std(), b.double().std()]])


def test_mean_and_std_are_those_of_each_layers_output_before_the_activation():
    stats, reference = ActivationStats(), Reference()
    reference.order = -1  # its own forward passes come before the measuring begins
    make_learner(stats, reference).fit(2)
    expected = torch.tensor(reference.rows, dtype=torch.float32)
    assert stats.names == ["0", "2"]
    assert stats.steps == list(range(8))
    torch.testing.assert_close(stats.mean, expected[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.std, expected[:, 1], rtol=1e-5, atol=1e-6)


def test_every_records_each_nth_batch_over_the_epochs():
    stats = ActivationStats(every=3)
    make_learner(stats).fit(2)
    assert stats.steps == [0, 3, 6]
    assert stats.mean.shape == stats.std.shape == (3, 2)


def test_training_is_the_same_with_and_without():
    one, other = make_learner(ActivationStats()), make_learner()
    one.fit(2)
    other.fit(2)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_rows_can_be_read_in_the_midst_of_training():
    shapes = []

    class Read(Callback):
        order = 1

        def after_batch(self, learn):
            if learn.training:
                shapes.append((tuple(stats.mean.shape), len(stats.steps)))

    stats = ActivationStats()
    make_learner(stats, Read()).fit(1)
    assert shapes == [((n, 2), n) for n in (1, 2, 3, 4)]


def test_before_any_fit_it_is_empty():
    stats = ActivationStats()
    assert (stats.names, stats.steps, tuple(stats.mean.shape)) == ([], [], (0, 0))


def test_a_new_fit_begins_anew():
    stats = ActivationStats()
    learn = make_learner(stats)
    learn.fit(3)
    learn.fit(1)
    assert stats.steps == [0, 1, 2, 3]


def test_validation_and_prediction_leave_no_row():
    stats = ActivationStats()
    learn = make_learner(stats)
    learn.fit(1)
    learn.validate()
    learn.get_preds()
    assert len(stats.steps) == 4


@pytest.mark.parametrize("event", ["before_batch", "after_pred"])
def test_a_validation_in_the_midst_of_a_batch_is_not_measured(event):
    def validate(self, learn):
        if learn.training:
            learn.validate()

    watch = type("Validate", (Callback,), {event: validate, "order": 1})()
    one, other = ActivationStats(), ActivationStats()
    make_learner(one, watch).fit(1)
    make_learner(other).fit(1)
    assert torch.equal(one.mean, other.mean)


def test_select_is_that_of_hooks():
    stats = ActivationStats(nn.ReLU)
    make_learner(stats).fit(1)
    assert stats.names == ["1"]
    assert (stats.mean > 0).all()
    with pytest.raises(ValueError, match="no module 'head'"):
        make_learner(ActivationStats("head")).fit(1)


def test_a_net_without_weights_shows_all_leaves():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.by

    stats = ActivationStats()
    make_learner(stats, model=nn.Sequential(Scale(), nn.Tanh())).fit(1)
    assert stats.names == ["0", "1"]


def test_attention_norms_and_parametrised_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x):
            x = self.norm(x)[:, None]
            return self.head(self.attention(x, x, x)[0])[:, 0]

    stats = ActivationStats()
    make_learner(stats, model=Net()).fit(1)
    assert stats.names == ["attention", "head"]
    assert stats.std.isfinite().all()


def test_the_first_call_counts_and_a_layer_that_is_not_called_is_nan():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.twice(1000 * self.twice(x))

    stats, model = ActivationStats(), Net()
    first = model.twice(X[:5]).std()
    make_learner(stats, model=model).fit(1)
    assert stats.names == ["twice", "idle"]
    torch.testing.assert_close(stats.std[0, 0], first.detach())
    assert stats.mean[:, 1].isnan().all()


def test_the_signal_of_a_recurrent_net_lies_between_its_samples_wherever_these_are():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(4, 4)

        def forward(self, x):  # (B, 4)
            return self.rnn(torch.stack([x, -x, 2 * x]))[0][-1]

    stats, gradients, model = ActivationStats(), GradientStats(), Net()
    h = model.rnn(torch.stack([X[:5], -X[:5], 2 * X[:5]]))[0]  # (T, B, 4)
    make_learner(stats, gradients, model=model).fit(1)
    torch.testing.assert_close(stats.signal_share[0, 0], h.var(1).mean() / h.var())
    assert gradients.signal_share.isfinite().all()


def test_outputs_that_are_tuples_or_no_tensors():
    class Words(nn.Module):
        def forward(self, x):
            return "words"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.words = nn.LSTM(4, 4), Words()

        def forward(self, x):
            self.words(x)
            return self.lstm(x)[0]

    stats = ActivationStats(["lstm", "words"])
    make_learner(stats, model=Net()).fit(1)
    assert stats.std[:, 0].isfinite().all()
    assert stats.std[:, 1].isnan().all()


def test_a_cancelled_batch_leaves_no_row_and_does_not_count():
    class Skip(Callback):
        def after_pred(self, learn):
            if learn.training and learn.batch_idx == 1:
                raise CancelBatch

    stats = ActivationStats()
    make_learner(stats, Skip()).fit(1)
    assert stats.steps == [0, 1, 2]
    assert len(stats.mean) == 3


@pytest.mark.parametrize("error", [CancelFit, CancelTrain, ValueError, KeyboardInterrupt])
def test_no_hook_stays_and_rows_so_far_are_kept(error):
    class End(Callback):
        order = 1

        def after_batch(self, learn):
            if learn.batch_idx == 2:
                raise error

    stats = ActivationStats()
    learn = make_learner(stats, End(), valid=False)
    with contextlib.suppress(ValueError, KeyboardInterrupt):
        learn.fit(1)
    assert n_hooks(learn.model) == 0
    assert stats.steps == [0, 1, 2]
    assert len(stats.std) == 3


def test_to_dict_is_plain():
    stats = ActivationStats()
    make_learner(stats).fit(1)
    data = json.loads(json.dumps(stats.to_dict()))
    assert data["names"] == ["0", "2"]
    assert torch.equal(torch.tensor(data["std"]), stats.std)


def test_plot_draws_a_line_a_layer(tmp_path):
    stats = ActivationStats()
    make_learner(stats).fit(1)
    figure = stats.plot(save=tmp_path / "stats.png")
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert (tmp_path / "stats.png").exists()


# -- values -----------------------------------------------------------------------------------------------------------


def numbers(x, threshold):
    """The fields of a (samples, features) tensor, the slow way."""
    x = x.detach().double()
    return {
        "mean": x.mean(),
        "std": x.std(),
        "min": x.min(),
        "max": x.max(),
        "nonfinite": (~x.isfinite()).sum(),
        "near_zero": (x.abs() <= threshold).double().mean(),
        "signal_share": x.var(0).mean() / x.var(),
        "norm": x.norm(),
    }


def silent(masks, window):
    """The fraction of units that are active in none of the last `window` masks."""
    return (~torch.stack(masks[-window:]).any(0)).double().mean()


def plain_loop(n_epochs, window, thresholds):
    """Train by hand, and note outputs and gradients of both layers."""
    model, rows = make_net(), {"forward": [], "backward": []}
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = {(kind, name): [] for kind in rows for name in ("0", "2")}
    for start in list(range(0, 20, 5)) * n_epochs:
        x = X[start : start + 5]
        a = model[0](x)
        b = model[2](a.relu())
        a.retain_grad()
        b.retain_grad()
        nn.functional.mse_loss(b, x).backward()
        row = {"forward": [], "backward": []}
        for name, h in (("0", a), ("2", b)):
            masks["forward", name].append((h > 0).any(0))
            masks["backward", name].append((h.grad != 0).any(0))
            for kind, x in (("forward", h), ("backward", h.grad)):
                row[kind].append(numbers(x, thresholds[kind]) | {"dead": silent(masks[kind, name], window)})
        for kind in rows:
            rows[kind].append(row[kind])
        opt.step()
        opt.zero_grad()
    return rows


@pytest.mark.parametrize("cls", [ActivationStats, GradientStats])
def test_every_field_is_that_of_a_plain_loop(cls):
    stats = cls(threshold=0.01, window=2)
    dls = DataLoaders(BatchLoader(X, X, batch_size=5), BatchLoader(X, X, batch_size=10))
    options = {"opt_func": torch.optim.SGD, "lr": 0.1, "cbs": [stats], "progress": False}
    Learner(make_net(), dls, nn.MSELoss(), **options).fit(2)
    rows = plain_loop(2, 2, {"forward": 0.01, "backward": 0.01})[cls.kind]
    for field in cls.fields:
        expected = torch.tensor([[float(layer[field]) for layer in row] for row in rows])
        torch.testing.assert_close(
            stats[field], expected, rtol=1e-4, atol=1e-6, msg=lambda text, f=field: f"{f}: {text}"
        )
        assert torch.equal(getattr(stats, field), stats[field])
    assert cls.kind == "backward" or 0 < stats.dead[:, 0].max() < 1  # the window is put to the test


class Shift(Callback):
    """Only one unit of the first layer is above zero: unit 0 in batch 0, unit 1 in batch 1, ..."""

    def before_batch(self, learn):
        with torch.no_grad():
            learn.model[0].weight.zero_()
            learn.model[0].bias.fill_(-1.0)
            learn.model[0].bias[learn.batch_idx] = 1.0


def test_dead_units_are_those_that_were_silent_for_the_whole_window():
    stats = ActivationStats("0", window=3)
    make_learner(stats, Shift(), valid=False).fit(1)
    assert stats.dead[:, 0].tolist() == [7 / 8, 6 / 8, 5 / 8, 5 / 8]


def test_a_step_of_which_only_a_histogram_is_taken_is_none_for_the_window():
    stats = ActivationStats("0", window=3, every=2, histogram_every=1)
    make_learner(stats, Shift(), valid=False).fit(1)
    assert stats.dead[:, 0].tolist() == [7 / 8, 6 / 8]


def test_nonfinite_outputs_are_counted_and_make_the_extremes_nan():
    class Spoil(Callback):
        def before_batch(self, learn):
            if learn.training and learn.batch_idx == 1:
                learn.xb = learn.xb.clone()
                learn.xb[0, 0] = math.inf

    stats = ActivationStats()
    make_learner(stats, Spoil(), valid=False).fit(1)
    assert stats.nonfinite[:, 0].tolist() == [0, 8, *[40, 40]]  # from then on the weights are NaN
    assert stats.nonfinite.dtype == torch.float32
    assert not stats.mean[1].isfinite().any()


def test_histograms_count_every_value_once_and_beyond_the_limits_in_the_outer_bins():
    outputs = []
    stats = ActivationStats("0", histogram_every=3, bins=6, limits=(-0.3, 0.3))
    learn = make_learner(stats)
    learn.model[0].register_forward_hook(lambda m, i, o: outputs.append(o.detach().clone()) if learn.training else None)
    learn.fit(2)
    assert stats.histogram_steps == [0, 3, 6]
    assert tuple(stats.histogram.shape) == (3, 1, 8)
    inner = torch.linspace(-0.3, 0.3, 7)
    torch.testing.assert_close(stats.edges, inner)
    for row, step in zip(stats.histogram, (0, 3, 6), strict=True):
        x = outputs[step].flatten()
        assert row[0, 0] == (x < -0.3).sum() > 0
        assert row[0, -1] == (x >= 0.3).sum() > 0
        assert torch.equal(row[0, 1:-1], x.histc(6, -0.3, 0.3))
    assert stats.steps == list(range(8))


def test_histograms_may_be_taken_more_often_than_rows():
    stats = ActivationStats(every=4, histogram_every=2)
    make_learner(stats).fit(2)
    assert (stats.steps, stats.histogram_steps) == ([0, 4], [0, 2, 4, 6])


def test_the_histogram_of_gradients_is_over_their_size_on_a_logarithmic_scale():
    gradients = []
    stats = GradientStats("2", histogram_every=1, bins=4, limits=(1e-4, 1.0))
    learn = make_learner(stats, valid=False)
    learn.model[2].register_forward_hook(
        lambda m, i, o: o.register_hook(lambda g: gradients.append(g.abs().flatten())) and None
    )
    learn.fit(1)
    torch.testing.assert_close(stats.edges, torch.tensor([1e-4, 1e-3, 1e-2, 1e-1, 1.0]))
    for row, g in zip(stats.histogram[:, 0], gradients, strict=True):
        expected = [
            ((g >= low) & (g < high)).sum() for low, high in zip(stats.edges[:-1], stats.edges[1:], strict=True)
        ]
        assert row.tolist() == [(g < stats.edges[0]).sum(), *expected, (g >= stats.edges[-1]).sum()]


def test_without_histograms_asking_for_one_says_how_to_get_it():
    stats = ActivationStats()
    with pytest.raises(ValueError, match=r"ActivationStats\(histogram_every=10\)"):
        _ = stats.histogram
    assert tuple(ActivationStats(histogram_every=1).histogram.shape) == (0, 0, 42)
    assert stats.histogram_steps == []


def test_an_unknown_field_is_refused_before_and_after_a_fit():
    stats = ActivationStats()
    for _ in range(2):
        with pytest.raises(KeyError, match="recorded are mean"):
            stats["median"]
        make_learner(stats).fit(1)


# -- which steps ------------------------------------------------------------------------------------------------------


def test_validation_rows_are_those_of_the_validations_within_the_fit():
    stats, both = ActivationStats(train=False, valid=True), named(ActivationStats(valid=True, every=3), "both")
    learn = make_learner(stats, both)
    outputs = []
    learn.model[0].register_forward_hook(lambda m, i, o: None if learn.training else outputs.append(o.mean()))
    learn.fit(3)
    assert (stats.steps, both.valid.steps, both.steps) == ([0, 1, 2, 3, 4, 5], [0, 3], [0, 3, 6, 9])
    torch.testing.assert_close(stats.mean[:, 0], torch.stack(outputs))
    assert torch.equal(stats.valid["mean"], stats.mean)
    assert torch.equal(both.valid["std"], stats.std[[0, 3]])
    assert set(both.to_dict()["valid"]) == {"names", "steps", *both.fields}
    learn.validate()
    learn.predict(X)
    assert (len(stats.steps), len(both.steps)) == (6, 4)


def test_validation_rows_are_refused_where_none_were_asked_for():
    stats = ActivationStats()
    make_learner(stats).fit(1)
    with pytest.raises(ValueError, match="valid=True"):
        _ = stats.valid


def test_without_a_validation_loader_there_are_no_validation_rows():
    stats = ActivationStats(train=False, valid=True)
    make_learner(stats, valid=False).fit(1)
    assert (stats.steps, tuple(stats.mean.shape)) == ([], (0, 2))


@pytest.mark.parametrize("cls", [ActivationStats, GradientStats])
def test_a_transformer_is_measured_in_validation_too(cls):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x):  # in evaluation it has a fast path of its own, past its layers
            return self.layer(x[:, None])[:, 0]

    stats = ActivationStats(valid=True)
    make_learner(stats, model=Net()).fit(1)
    assert stats.names == ["layer.self_attn", "layer.linear1", "layer.linear2"]
    assert stats.mean.isfinite().all()
    assert stats.valid["mean"].isfinite().all()


@pytest.mark.parametrize("error", [CancelStep, CancelBatch])
@pytest.mark.parametrize("event", ["after_backward", "before_step"])
def test_a_cancelled_step_counts_as_a_batch_and_a_cancelled_batch_does_not(error, event):
    def cancel(self, learn):
        if learn.batch_idx == 1:
            raise error

    stats, gradients = ActivationStats(), GradientStats()
    make_learner(stats, gradients, type("Cancel", (Callback,), {event: cancel})()).fit(2)
    n = 8 if error is CancelStep else 6
    assert stats.steps == gradients.steps == list(range(n))
    assert stats.mean.isfinite().all()
    assert gradients.mean.isfinite().all()


def test_gradients_of_accumulated_batches_are_those_of_each_batch():
    class Accumulate(Callback):
        def after_backward(self, learn):
            if learn.batch_idx % 2 == 0:
                raise CancelStep

    stats, alone = GradientStats(), GradientStats()
    learn = make_learner(stats, Accumulate(), valid=False)
    learn.fit(1)
    frozen = make_learner(alone, valid=False)
    for group in frozen.opt.param_groups:
        group["lr"] = 0.0
    frozen.fit(1)
    assert stats.steps == [0, 1, 2, 3]
    assert torch.equal(stats.norm[:2], alone.norm[:2])  # batches 0 and 1 meet the same weights


def test_nothing_is_kept_of_a_cancelled_batch_for_the_next_one():
    class Cancel(Callback):
        order = -1

        def after_pred(self, learn):
            if learn.training and learn.batch_idx == 0:
                raise CancelBatch

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.rest = nn.Linear(4, 4), nn.Linear(4, 4)
            self.n = 0

        def forward(self, x):
            self.n += 1
            return self.rest(self.once(x) if self.n == 1 else x)

    stats = ActivationStats()
    make_learner(stats, Cancel(), model=Idle(), valid=False).fit(1)
    assert stats.steps == [0, 1, 2]
    assert stats.mean[:, 0].isnan().all()


def test_a_fit_that_fails_before_its_first_batch_leaves_nothing_or_what_was_there():
    class Fail(Callback):
        order = -1

        def before_fit(self, learn):
            raise ValueError("no")

    stats = ActivationStats()
    learn = make_learner(stats)
    learn.fit(1)
    stats.select = "nobody"
    with pytest.raises(ValueError, match="nobody"):
        learn.fit(1)
    assert (stats.names, stats.steps) == (["0", "2"], [0, 1, 2, 3])
    stats.select = None
    with pytest.raises(ValueError, match="no"):
        learn.fit(1, cbs=[Fail()])
    assert (stats.names, stats.steps, tuple(stats.mean.shape)) == (["0", "2"], [], (0, 2))
    assert n_hooks(learn.model) == 0


EVENTS = ("before_batch", "after_pred", "after_loss", "before_backward", "after_backward", "before_step", "after_step")


@pytest.mark.parametrize("order", [-1, 60])
def test_reading_at_any_event_disturbs_nothing(order):
    def read(self, learn):
        for one in first:
            assert len(one.steps) == len(one[one.fields[0]])
            one.to_dict()
            one.state_dict()

    def make():
        few = {"max_memory": 3000}
        return [
            ActivationStats(valid=True, histogram_every=2, bins=4, **few),
            GradientStats(**few),
            ParameterStats(every=1, histogram_every=3, bins=4, **few),
        ]

    first, second = make(), make()
    reader = type("Read", (Callback,), dict.fromkeys((*EVENTS, "after_batch", "after_train", "after_epoch"), read))()
    reader.order = order
    one, other = make_learner(*first, reader), make_learner(*second)
    one.fit(8)
    other.fit(8)
    assert all(a.recordings["train"].stride > 1 for a in first)  # so decimation is met, too
    for a, b in zip(first, second, strict=True):
        assert json.dumps(a.to_dict()) == json.dumps(b.to_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


# -- the run is not disturbed -----------------------------------------------------------------------------------------


def make_disturbable():
    torch.manual_seed(0)
    layers = [
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def test_training_with_all_statistics_is_bit_for_bit_that_without():
    def fit(*cbs):
        learn = make_learner(*cbs, model=make_disturbable())
        torch.manual_seed(1)
        learn.fit(3)
        return learn, torch.get_rng_state()

    everything = [
        ActivationStats(valid=True, histogram_every=2),
        GradientStats(histogram_every=1),
        ParameterStats(every=1, histogram_every=1),
        Diagnose(show=len),
    ]
    (one, rng), (other, rng_without) = fit(*everything), fit()
    assert torch.equal(rng, rng_without)
    for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    rows, rows_without = list(one.history), list(other.history)
    assert [row["valid_loss"] for row in rows] == [row["valid_loss"] for row in rows_without]


def test_hooks_of_the_users_stay_in_order_also_those_that_come_in_the_midst():
    def hook(n):
        return lambda module, inputs, output: seen.append(n) if module.training else None

    class More(Callback):
        def before_batch(self, learn):
            if learn.training and learn.batch_idx == 2:
                learn.model[0].register_forward_hook(hook(1))
                learn.model[0].register_forward_hook(hook(2), prepend=True)

    seen, model = [], make_net()
    model[0].register_forward_hook(hook(0))
    make_learner(*all_kinds(), More(), model=model).fit(1)
    assert seen == [0, 0, *[2, 0, 1] * 2]
    assert [hook.__closure__[0].cell_contents for hook in model[0]._forward_hooks.values()] == [2, 0, 1]
    assert n_hooks(model) == 3


# -- gradients, scaled ------------------------------------------------------------------------------------------------


class Scaled(Callback):
    def __init__(self, scale):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def before_fit(self, learn):
        learn.scaler = self.scaler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_the_loss_as_it_is_also_under_a_scaler(dtype):
    def fit(*cbs):
        stats = GradientStats(histogram_every=1)
        x = X.to(dtype)
        dls = DataLoaders(BatchLoader(x, x, batch_size=5))
        Learner(make_net().to(dtype), dls, nn.MSELoss(), lr=0.01, cbs=[stats, *cbs], progress=False).fit(1)
        return stats

    plain, scaled = fit(), fit(Scaled(2.0**16))
    for field in ("mean", "std", "min", "max", "norm", "dead", "near_zero"):
        tolerance = {"rtol": 1e-4, "atol": 1e-7} if dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 1e-3}
        torch.testing.assert_close(scaled[field], plain[field], **tolerance)
    if dtype == torch.float32:
        assert torch.equal(scaled.histogram, plain.histogram)


def test_a_small_half_precision_gradient_is_not_lost_by_the_division():
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x).half()

    def loss(preds, y):
        return preds.float().sum() * 2.0**-30

    stats = GradientStats()
    make_learner(stats, Scaled(2.0**20), model=Half(4, 4), loss_func=loss, valid=False).fit(1)
    assert (stats.mean == 2.0**-30).all()  # half precision ends at 2 ** -24


def test_a_step_whose_gradients_overflow_is_a_row_that_says_so():
    stats, scaler = GradientStats(), Scaled(2.0**127)
    learn = make_learner(stats, scaler, loss_func=lambda p, y: 1e3 * (p - y).square().mean(), valid=False)
    learn.fit(1)
    assert stats.nonfinite[0].min() > 0
    assert scaler.scaler.get_scale() < 2.0**127


# -- which layers -----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """One frozen, one shared under two names, one that nobody calls, one that is called twice."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.one = nn.Linear(4, 4)
        self.same = self.one
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.same(10 * self.one(self.frozen(x))))


def test_gradients_of_frozen_shared_and_idle_layers():
    stats = GradientStats()
    learn = make_learner(stats, model=Two(), valid=False)
    first = learn.model.one(learn.model.frozen(X[:5]))
    preds = learn.model.head(learn.model.one(10 * first))
    expected = [grad.norm() for grad in torch.autograd.grad(nn.functional.mse_loss(preds, X[:5]), [first, preds])]
    learn.fit(1)
    assert stats.names == ["frozen", "one", "idle", "head"]
    torch.testing.assert_close(stats.norm[0, [1, 3]], torch.stack(expected))  # of the first of two calls
    assert stats.norm[:, [0, 2]].isnan().all()
    assert stats.called == ["head", "one"]


def test_layers_of_many_kinds_are_measured():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(7, 6)
            self.conv = nn.Conv1d(6, 8, 3, padding=1)
            self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
            self.lstm = nn.LSTM(6, 5)
            self.cell = nn.GRUCell(5, 5)
            self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
            self.norm = nn.LayerNorm(5)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
            self.lazy = nn.LazyLinear(4)

        def forward(self, x):
            x = self.emb((x * 10).long().clamp(0, 6)).transpose(1, 2)  # (B, 6, 4)
            x = self.up(self.conv(x).relu()).permute(2, 0, 1)
            x = self.lstm(x)[0].transpose(0, 1)
            x = x + self.cell(x[:, -1])[:, None]
            x = self.norm(self.attention(x, x, x)[0])
            return self.lazy(self.normed(x[:, 0]))

    stats, gradients = ActivationStats(valid=True), GradientStats()
    parameters = ParameterStats(every=1)
    make_learner(stats, gradients, parameters, model=Net()).fit(1)
    assert stats.names == ["emb", "conv", "up", "lstm", "cell", "attention", "normed", "lazy"]
    assert gradients.names == stats.names
    for field in ("mean", "std", "min", "max", "near_zero", "dead"):
        assert stats[field].isfinite().all(), field
        assert gradients[field].isfinite().all(), field
    assert gradients.called == ["lazy", "normed", "attention", "cell", "lstm", "up", "conv", "emb"]
    assert parameters.update_ratio.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_precision(dtype):
    x = X.to(dtype)
    model = make_net().to(dtype)
    expected = model[0](x[:5]).detach()
    stats, gradients, parameters = ActivationStats(), GradientStats(), ParameterStats(every=1)
    dls = DataLoaders(BatchLoader(x, x, batch_size=5))
    cbs = [stats, gradients, parameters, Diagnose(show=len)]
    Learner(model, dls, nn.MSELoss(), opt_func=torch.optim.SGD, lr=0.1, cbs=cbs, progress=False).fit(1)
    torch.testing.assert_close(stats.std[0, 0].double(), expected.double().std(), rtol=1e-5, atol=0)
    assert all(table.dtype == torch.float32 for table in (stats.mean, gradients.norm, parameters.update_ratio))
    assert parameters.update_ratio.isfinite().all()


def test_under_autocast_the_outputs_are_those_of_autocast():
    class Autocast(Callback):
        def during_forward(self, learn):
            return torch.autocast("cpu", torch.bfloat16)

    model = make_net()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model[0](X[:5]).detach()
    stats, gradients = ActivationStats(histogram_every=1), GradientStats()
    make_learner(stats, gradients, Autocast(), model=model).fit(1)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(stats.std[0, 0].double(), expected.double().std(), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.mean[0, 0].double(), expected.double().mean(), rtol=1e-4, atol=1e-7)
    assert gradients.norm.isfinite().all()


@pytest.mark.parametrize("kind", ["integers", "bools", "complex", "scalar", "empty", "sparse"])
def test_outputs_of_every_kind(kind):
    class Odd(nn.Module):
        def forward(self, x):
            return {
                "integers": lambda: (100 * x).long(),
                "bools": lambda: x > 0,
                "complex": lambda: torch.complex(x, x),
                "scalar": lambda: x.sum(),
                "empty": lambda: x[:0],
                "sparse": lambda: x.to_sparse(),
            }[kind]()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.layer = Odd(), nn.Linear(4, 4)

        def forward(self, x):
            x = self.layer(x)
            out = self.odd(x)
            return x + (out.real if kind == "complex" else out.to_dense() if kind == "sparse" else 0)

    stats, gradients = ActivationStats(["odd", "layer"], histogram_every=1), GradientStats(Odd)
    make_learner(stats, gradients, Scaled(2.0**10), model=Net()).fit(1)
    assert stats.mean[:, 1].isfinite().all()
    assert stats.mean[:, 0].isfinite().all() == (kind in ("integers", "bools", "scalar"))
    assert len(gradients.steps) == 4


def test_batches_of_any_size_and_layers_whose_width_changes():
    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, : len(x) + 1]

    batches = [(X[:n], X[:n, :2]) for n in (1, 3, 1, 5)]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Cut(8, 8), nn.AdaptiveAvgPool1d(2))
    stats = ActivationStats(window=2)
    learn = Learner(model, DataLoaders(batches), nn.MSELoss(), lr=0.01, cbs=[stats, GradientStats()], progress=False)
    learn.fit(1)
    assert stats.steps == [0, 1, 2, 3]
    assert stats.dead[:, 1].isfinite().all()
    assert stats.signal_share[[0, 2]].isnan().all()  # of a single sample nothing can be said
    assert stats.signal_share[[1, 3]].isfinite().all()


def test_a_loop_of_ones_own_is_measured():
    class Adversary(Learner):
        def train_batch(self):
            opt = self.opts["second"]
            for which in (self.opt, opt):
                which.zero_grad()
                self.loss = self.model(self.xb).square().mean()
                self.loss.backward()
                which.step()

    model = make_net()
    stats, gradients, parameters = ActivationStats(), GradientStats(), ParameterStats(every=1)
    dls = DataLoaders(BatchLoader(X, X, batch_size=5))
    opt = torch.optim.SGD(model[0].parameters(), lr=0.1)
    cbs = [stats, gradients, parameters, Diagnose(show=len)]
    learn = Adversary(model, dls, nn.MSELoss(), opt_func=torch.optim.SGD, lr=0.1, cbs=cbs, progress=False)
    learn.opts["second"] = opt
    learn.fit(1)
    assert (stats.steps, gradients.steps, parameters.steps) == ([0, 1, 2, 3], [0, 1, 2, 3], [])
    assert gradients.norm.isfinite().all()
    assert (parameters.names, tuple(parameters.update_ratio.shape)) == (["0.weight", "2.weight"], (0, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, as it looks at the output
@pytest.mark.parametrize("cls", [ActivationStats, GradientStats, ParameterStats])
def test_a_compiled_model_gives_the_same_rows(cls):
    torch._dynamo.reset()
    plain, compiled = cls(every=2), cls(every=2)
    make_learner(plain).fit(1)
    make_learner(compiled, model=torch.compile(make_net(), backend="eager")).fit(1)
    assert compiled.names == [f"_orig_mod.{name}" for name in plain.names]
    assert compiled.steps == plain.steps == [0, 2]
    for field in cls.fields:
        torch.testing.assert_close(compiled[field], plain[field], equal_nan=True)


# -- memory and device ------------------------------------------------------------------------------------------------


def test_memory_stays_within_its_bound_and_rows_stay_evenly_spaced():
    bounded = ActivationStats(max_memory=4000, histogram_every=1, bins=10, valid=True)
    free = named(ActivationStats(), "free")
    make_learner(bounded, free).fit(25)
    assert bounded.nbytes <= 4000
    assert len(free.steps) == 100
    stride = bounded.recordings["train"].stride
    assert stride >= 4
    assert bounded.steps == list(range(0, 100, stride))
    assert torch.equal(bounded.mean, free.mean[::stride])
    spaces = {b - a for a, b in zip(bounded.histogram_steps, bounded.histogram_steps[1:], strict=False)}
    assert len(spaces) == 1
    assert len(bounded.valid.steps) > 1


@pytest.mark.parametrize(
    "stats",
    [
        ActivationStats(histogram_every=1, valid=True),
        GradientStats(histogram_every=1),
        ParameterStats(histogram_every=1),
    ],
)
def test_a_hundred_thousand_steps_of_fifty_layers_fit_into_the_stated_bound(stats):
    stats._begin([str(i) for i in range(50)])
    assert stats.nbytes <= stats.max_memory == 64 * 2**20
    table = stats.recordings["train"]
    row = torch.zeros(50, len(stats.fields))
    before = table._table.data_ptr()
    for step in range(0, 100_000, 7):  # every seventh one, to be quick
        if table.wants(step):
            table.put(step, row)
    assert stats.nbytes <= 64 * 2**20
    assert table._table.data_ptr() == before  # it was allocated once


def test_memory_that_is_too_small_for_the_layers_is_refused_and_nothing_stays():
    for stats in (ActivationStats(max_memory=100), GradientStats(max_memory=100), ParameterStats(max_memory=100)):
        learn = make_learner(stats)
        with pytest.raises(ValueError, match="max_memory=100 bytes"):
            learn.fit(1)
        assert n_hooks(learn.model) == 0
        pickle.dumps(stats)
        model = weakref.ref(learn.model)
        del learn
        gc.collect()
        assert model() is None


def test_rows_come_to_the_cpu_sixty_four_at_a_time(monkeypatch):
    copies = []
    flush = Recording.flush
    monkeypatch.setattr(Recording, "flush", lambda self: (copies.append(len(self._waiting)), flush(self))[1])
    make_learner(ActivationStats(), valid=False).fit(40)
    assert [n for n in copies if n] == [64, 64, 32]


@contextlib.contextmanager
def an_accelerator():
    """A device whose tensors have no values: to ask for one, which would be a wait, is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda")


def test_such_an_accelerator_refuses_to_be_waited_for():
    with an_accelerator() as device, pytest.raises(DataDependentOutputException):
        bool(torch.ones(3, device=device).sum() > 0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("cls", [ActivationStats, GradientStats, ParameterStats])
def test_nothing_waits_for_the_device(monkeypatch, cls, scaled):
    copies = []
    flush = Recording.flush
    monkeypatch.setattr(Recording, "flush", lambda self: (copies.append(len(self._waiting)), flush(self))[1])
    monkeypatch.setattr("minitrain.recording._BLOCK", 4)
    stats = cls(every=1, histogram_every=2)
    with an_accelerator() as device:
        first, last = nn.Conv1d(3, 4, 3, device=device), nn.Linear(4 * 98, 5, device=device)
        first.idle = nn.Linear(1, 1, device=device)  # never called, and without a gradient
        model = nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), last)
        scaler = SimpleNamespace(scale=lambda x: 2 * x) if scaled else None
        learn = SimpleNamespace(model=model, phase="fit", training=True, scaler=scaler, opt=None, device=device)
        with stats.during_fit(learn), torch.no_grad():  # for a real backward pass it is not enough of an accelerator
            for _ in range(6):
                for p in (*first.parameters(recurse=False), *last.parameters()):
                    p.grad = torch.ones_like(p)
                if cls is ParameterStats:
                    stats.before_step(learn)
                    stats.after_step(learn)
                    continue
                stats.before_batch(learn)
                out = model(torch.ones(6, 3, 100, device=device))
                if cls is GradientStats:
                    stats._note("3", last, stats._unscaled(out, learn) if scaled else out)
                stats.after_batch(learn)
            assert [n for n in copies if n] == [4]
        assert [n for n in copies if n] == [4, 2, 3]


# -- state ------------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def all_kinds():
    return [
        ActivationStats(every=2, valid=True, histogram_every=3, window=3),
        GradientStats(window=3, histogram_every=2),
        ParameterStats(every=1, window=3, histogram_every=2),
        Diagnose(show=len, every=1),
    ]


class Load(Callback):
    """What a resumed fit does, once the epoch has begun."""

    order = 1000

    def __init__(self, cbs, states):
        self.cbs, self.states = cbs, states

    def before_train(self, learn):
        for cb, state in zip(self.cbs, self.states, strict=True):
            cb.load_state_dict(state)


def tables(cb):
    return {str(i): part.to_dict() for i, part in enumerate(cb._parts)} if isinstance(cb, Diagnose) else cb.to_dict()


@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
@pytest.mark.parametrize("max_memory", [None, 6000])
def test_a_run_that_goes_on_from_a_state_has_the_table_of_an_uninterrupted_one(stop_at, max_memory):
    def make():
        cbs = all_kinds()
        for cb in cbs[:3] if max_memory else ():
            cb.max_memory = max_memory
        return cbs

    def fit(cbs, batches, learn=None, *more):
        model, opt = (make_dying(), torch.optim.SGD) if learn is None else (learn.model, learn.opt)
        valid = BatchLoader(X, X, batch_size=10)
        again = {"lr": 0.1} if learn is None else {}
        learn = Learner(
            model, DataLoaders(batches, valid), nn.MSELoss(), opt_func=opt, cbs=[*cbs, *more], progress=False, **again
        )
        learn.fit(1)
        return learn

    batches = [(x, x) for x in X.split(2) for _ in range(2)]
    whole, first, second = make(), make(), make()
    fit(whole, batches)
    learn = fit(first, batches[:stop_at])
    states = through_a_file([cb.state_dict() for cb in first])
    states[0]["counts"]["valid"] = 0  # the first part has validated, which an interrupted run has not
    states[0]["recordings"]["valid"] = without_rows(states[0]["recordings"]["valid"])
    states[0]["activity"]["valid"] = {"silent": {}, "rows": {}}
    fit(second, batches[stop_at:], learn, Load(second, states))
    for a, b in zip(whole, second, strict=True):
        assert json.dumps(tables(a)) == json.dumps(tables(b))
    assert whole[3].findings == second[3].findings
    assert second[1].called == whole[1].called


def without_rows(table):
    return table | {"steps": [], "table": table["table"][:0], "stride": 1}


def make_dying():
    """Some units are dead, others are on the way."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].bias -= torch.linspace(0, 2, 16)
    return model


def test_the_silence_of_units_survives():
    stats, other = ActivationStats(window=4), ActivationStats(window=4)
    learn = make_learner(stats, model=make_dying(), valid=False)
    learn.fit(1)
    last = stats.dead[-1]
    more = make_learner(other, Load([other], [through_a_file(stats.state_dict())]), model=learn.model, valid=False)
    more.fit(1)
    assert (other.dead[4] <= last).all()
    fresh = ActivationStats(window=4)
    make_learner(fresh, model=make_dying(), valid=False).fit(1)
    assert fresh.dead[0, 0] > other.dead[4, 0]


def test_a_state_can_be_read_without_a_fit():
    stats, other = GradientStats(every=2), GradientStats(every=2)
    make_learner(stats).fit(1)
    other.load_state_dict(through_a_file(stats.state_dict()))
    assert (other.names, other.steps, other.called) == (stats.names, stats.steps, ["2", "0"])
    assert torch.equal(other.mean, stats.mean)


def test_the_state_of_an_object_that_saw_no_fit_is_empty_and_comes_back():
    for cb, other in zip(all_kinds(), all_kinds(), strict=True):
        other.load_state_dict(through_a_file(cb.state_dict()))
        other.load_state_dict(through_a_file(other.state_dict()))
    make_learner(other, valid=False).fit(1)


def plain(value):
    if isinstance(value, dict):
        return all(type(key) in (str, int) and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


def test_a_state_is_of_plain_types_and_shares_no_memory_with_the_object():
    cbs = all_kinds()
    learn = make_learner(*cbs)
    learn.fit(1)
    for cb in cbs:
        state = cb.state_dict()
        assert plain(state)
        before = copy.deepcopy(state)
        cb.load_state_dict(state)
    learn.fit(2)
    assert json.dumps(state, default=lambda t: t.tolist()) == json.dumps(before, default=lambda t: t.tolist())


OTHERS = [
    (ActivationStats(), ActivationStats("0"), "names="),
    (ActivationStats(), ActivationStats(every=2), "every="),
    (ActivationStats(), ActivationStats(window=3), "window="),
    (ActivationStats(), ActivationStats(threshold=0.1), "threshold="),
    (ActivationStats(), ActivationStats(valid=True), "phases="),
    (ActivationStats(), ActivationStats(histogram_every=1), "histogram_every="),
    (ActivationStats(histogram_every=1), ActivationStats(histogram_every=1, bins=5), "bins="),
    (ActivationStats(histogram_every=1), ActivationStats(histogram_every=1, limits=(0, 1)), "limits="),
    (ActivationStats(), GradientStats(threshold=0.05), "bins="),
    (GradientStats(), GradientStats("0"), "names="),
    (ParameterStats(), ParameterStats(every=1), "every="),
    (ParameterStats(), ParameterStats("0"), "names="),
    (Diagnose(show=len), Diagnose("0", show=len), "names="),
    (Diagnose(show=len), Diagnose(every=2, show=len), "every="),
    (Diagnose(show=len), ActivationStats(), "no state of ActivationStats"),
    (ActivationStats(), Diagnose(show=len), "no state of Diagnose"),
]


@pytest.mark.parametrize(("one", "other", "match"), OTHERS)
def test_a_state_of_other_layers_or_options_is_refused_and_nothing_changes(one, other, match):
    make_learner(one).fit(1)
    make_learner(other).fit(2)
    before = json.dumps(tables(other)), json.dumps(other.state_dict(), default=lambda t: t.tolist())
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(one.state_dict())
    assert (json.dumps(tables(other)), json.dumps(other.state_dict(), default=lambda t: t.tolist())) == before


@pytest.mark.parametrize(
    "state", [{}, {"recordings": {}}, {"options": None}, [], None, {"parts": [{}, {}, {}]}, {"parts": []}]
)
@pytest.mark.parametrize("cls", [ActivationStats, GradientStats, ParameterStats, Diagnose])
def test_what_is_no_state_is_refused(cls, state):
    with pytest.raises(ValueError, match=f"no state of (Activation|Gradient|Parameter|{cls.__name__})|shorter than"):
        cls().load_state_dict(state)


def test_one_bad_part_leaves_all_of_diagnose_as_it_was():
    one, other = Diagnose(show=len, every=1), Diagnose(show=len, every=1)
    make_learner(one).fit(1)
    make_learner(other).fit(2)
    before = json.dumps(tables(other))
    state = one.state_dict()
    state["parts"][2]["recordings"]["train"]["names"] = ["elsewhere"]
    with pytest.raises(ValueError, match="names="):
        other.load_state_dict(state)
    assert json.dumps(tables(other)) == before


# -- afterwards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, CancelEpoch, CancelFit])
def test_after_a_fit_nothing_of_the_learner_is_held_and_copies_work(error):
    class End(Callback):
        order = 60

        def before_step(self, learn):
            if error is not None and learn.batch_idx == 2:
                raise error

    cbs = [*all_kinds()[:3], Diagnose(every=1, show=print)]
    for part in (*cbs[:3], *cbs[3]._parts):
        part.max_memory = 10_000  # or copies take their time
    learn = make_learner(*cbs, End())
    with contextlib.suppress(KeyboardInterrupt):
        learn.fit(1)
    held = [weakref.ref(learn), weakref.ref(learn.model), *[weakref.ref(p) for p in learn.model.parameters()]]
    for cb in cbs:
        for other in (copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))):
            assert json.dumps(tables(other)) == json.dumps(tables(cb))
            make_learner(other).fit(1)
    del learn
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_to_csv_has_a_line_for_each_step_and_layer(tmp_path):
    stats = GradientStats(every=2)
    with pytest.raises(ValueError, match="GradientStats has recorded nothing yet"):
        stats.to_csv(tmp_path / "stats.csv")
    make_learner(stats).fit(1)
    stats.to_csv(tmp_path / "stats.csv")
    with open(tmp_path / "stats.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "layer", *GradientStats.fields]
    assert [row[:2] for row in rows] == [["0", "0"], ["0", "2"], ["2", "0"], ["2", "2"]]
    assert float(rows[3][header.index("norm")]) == stats.norm[1, 1]
    with pytest.raises(FileNotFoundError):
        stats.to_csv(tmp_path / "nowhere" / "stats.csv")


def test_pictures_are_drawn_of_every_kind(tmp_path):
    stats, gradients = ActivationStats(histogram_every=2), GradientStats(histogram_every=2)
    make_learner(stats, gradients).fit(2)
    for name, draw in {
        "stats": stats.plot,
        "heatmap": stats.plot_heatmap,
        "dead": stats.plot_dead,
        "histograms": stats.plot_histograms,
        "log": gradients.plot_histograms,
        "flow": gradients.plot_flow,
    }.items():
        draw(save=tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").exists()


# -- arguments --------------------------------------------------------------------------------------------------------

COUNTS = [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)]
BAD = [
    *[
        (name, value, error)
        for name in ("every", "window", "bins", "max_memory")
        for value, error in (*COUNTS, (None, TypeError))
    ],
    *[("histogram_every", value, error) for value, error in COUNTS],
    *[("threshold", value, ValueError) for value in (-0.1, math.nan, math.inf, "0", None, True)],
    *[
        ("limits", value, ValueError)
        for value in (None, 1, (1,), (1, 2, 3), (2, 1), (1, 1), (1, math.inf), (1, math.nan), "ab")
    ],
    *[("limits", value, ValueError) for value in ((1e300, 1e301), (1.0, 1.0 + 1e-9), (1e-300, 1e-290))],
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
@pytest.mark.parametrize("cls", [ActivationStats, GradientStats, ParameterStats])
def test_wrong_arguments_are_refused_at_construction(cls, name, value, error):
    with pytest.raises(error, match=name) as caught:
        cls(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["train", "valid"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_train_and_valid_are_bools(name, value):
    with pytest.raises(TypeError, match=f"{name}={value!r}"):
        ActivationStats(**{name: value})


def test_to_record_nothing_is_refused():
    with pytest.raises(ValueError, match="train=False and valid=False"):
        ActivationStats(train=False)


def test_the_limits_of_a_logarithmic_histogram_are_above_zero():
    for limits in ((0, 1), (-1, 1)):
        with pytest.raises(ValueError, match="both > 0"):
            GradientStats(limits=limits)
