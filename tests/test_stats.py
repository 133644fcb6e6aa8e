import contextlib
import json

import pytest
import torch
from torch import nn

from minitrain import BatchLoader, Callback, DataLoaders, Learner
from minitrain.callbacks import ActivationStats
from minitrain.errors import CancelBatch, CancelFit, CancelTrain

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


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


def test_nothing_waits_for_the_device_within_an_epoch(monkeypatch):
    copies = []
    stats = ActivationStats()
    flush = stats._flush
    monkeypatch.setattr(stats, "_flush", lambda: (copies.append(len(stats._pending)), flush()))
    make_learner(stats).fit(2)
    assert [n for n in copies if n] == [4, 4]  # one copy an epoch, of all its rows


def test_state_comes_back():
    stats = ActivationStats(every=2)
    make_learner(stats).fit(1)
    other = ActivationStats(every=2)
    other.load_state_dict(stats.state_dict())
    assert (other.names, other.steps, other._n_batches) == (stats.names, stats.steps, 4)
    assert torch.equal(other.mean, stats.mean)
    elsewhere = ActivationStats("0")
    make_learner(elsewhere).fit(1)
    with pytest.raises(ValueError, match=r"\['0', '2'\]"):
        elsewhere.load_state_dict(stats.state_dict())


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


@pytest.mark.parametrize(
    ("every", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_wrong_arguments_are_refused_at_construction(every, error):
    with pytest.raises(error, match="every="):
        ActivationStats(every=every)
