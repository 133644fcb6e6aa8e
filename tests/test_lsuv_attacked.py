"""What an attack on LSUV found: a claim that is not true, a standstill, a crash on a legal model. Each test failed first."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from lsuv_nets import statuses
from torch import nn

from minitrain.init import lsuv_

STRATEGIES = ["lock-step", "streaming"]
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(x, 0) for x in X.chunk(4)]


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def real(model, name, x=X, call=None):
    """Mean and std of a module's first output, as a hook of our own sees it."""
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: found.append(y.detach().double()))
    training = model.training
    with torch.no_grad():
        model.eval()(x) if call is None else call(model.eval(), x)
    handle.remove()
    model.train(training)
    return found[0].mean().item(), found[0].std().item()


def assert_unit(model, *names, biased=True, tolerance=1e-5):
    for name in names:
        mean, std = real(model, name)
        assert abs(std - 1) < tolerance, (name, std)
        assert not biased or abs(mean) < tolerance, (name, mean)


# -- claims -----------------------------------------------------------------------------------------------------------


def test_what_comes_behind_an_orthonormal_layer_that_cannot_be_scaled_is_as_claimed():
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    model = nn.Sequential(spectral, nn.ReLU(), nn.Linear(8, 8))
    assert lsuv_(model, X, orthonormal=True)["2"].status == "normalized"
    assert_unit(model, "2")


class TiedBackwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.a = nn.Linear(8, 8), nn.Linear(8, 8)
        self.a.weight = self.b.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def test_an_orthonormal_weight_that_is_tied_to_a_layer_registered_before_is_as_claimed():
    model = TiedBackwards()
    assert statuses(lsuv_(model, X, orthonormal=True)) == {"a": "normalized", "b": "tied"}
    assert_unit(model, "a")


def test_an_orthonormal_weight_that_is_never_used_is_put_back_beside_tied_ones_too():
    class Net(TiedBackwards):
        def __init__(self):
            super().__init__()
            self.never = nn.Linear(8, 8)

    model = Net()
    before = model.never.weight.clone()
    assert lsuv_(model, X, orthonormal=True)["never"].status == "unreached"
    assert torch.equal(model.never.weight, before)
    assert_unit(model, "a")


@pytest.mark.parametrize("verify", [True, False])
def test_a_frozen_bias_is_allowed_for_channel_by_channel(verify):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[0].bias.requires_grad_(False)
    model[0].bias.data.add_(5 * torch.randn(8))
    assert statuses(lsuv_(model, X, scope="channel", verify=verify)) == {"0": "no_bias", "2": "normalized"}
    with torch.no_grad():
        y = model(X)
    torch.testing.assert_close(y.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(0), torch.ones(8), atol=1e-4, rtol=0)


class Hyper(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.a = nn.Linear(8, 32), nn.Linear(8, 4)

    def forward(self, x):
        weight = self.make(x).mean(0).view(4, 8)
        return torch.func.functional_call(self.a, {"weight": weight}, x)


def test_a_weight_that_functional_call_replaces_is_not_claimed():
    model = Hyper()
    before = model.a.weight.clone()
    report = lsuv_(model, X, verify=False)
    assert report["a"].status == "unscalable"
    assert torch.equal(model.a.weight, before)


@pytest.mark.parametrize("how", ["global hook", "patched class"])
def test_a_layer_that_is_not_what_torch_made_it_is_solved_by_looking(how, monkeypatch):
    model, handle = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), None
    if how == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, a, y: y + 0.5 if isinstance(m, nn.Linear) else None
        )
    else:
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) + 0.5)
    try:
        assert statuses(lsuv_(model, X, verify=False)) == {"0": "normalized", "2": "normalized"}
        assert_unit(model, "0", "2", tolerance=1e-3)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("what", ["weight", "input"])
def test_a_single_image_without_a_batch_dimension_does_not_pass_off_its_biases_as_a_signal(what):
    conv, x = nn.Conv2d(2, 4, 3), torch.randn(2, 6, 6)
    conv.bias.data.normal_()
    if what == "weight":
        nn.init.zeros_(conv.weight)
    model = nn.Sequential(nn.Identity() if what == "weight" else nn.Threshold(1e9, 0.0), conv)
    assert lsuv_(model, x, verify=False)["1"].status == "dead"


# -- standstill -------------------------------------------------------------------------------------------------------


class Cached(nn.Module):
    """Python 3.11 holds a lock while it computes a cached property."""

    def __init__(self):
        super().__init__()
        self.a, self.p, self.lock = nn.Linear(8, 6), nn.Linear(8, 6), threading.RLock()
        self.table = None

    def forward(self, x):
        with self.lock:
            return self.a(x) + self.p(X[:4]).relu().mean(0)


def test_batches_that_wait_for_a_lock_of_one_another_are_streamed(monkeypatch):
    monkeypatch.setattr("minitrain.init.strands.STILL", 1)
    model, threads = Cached(), threading.active_count()
    report = lsuv_(model, BATCHES, batches="all")
    assert report.strategy == "streaming"
    assert "stood still" in report.why
    assert statuses(report) == {"a": "normalized", "p": "normalized"}
    assert threading.active_count() == threads


# -- legal models that crashed ----------------------------------------------------------------------------------------


class InferenceInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        with torch.inference_mode():
            y = self.a(x)
        return self.b(F.relu(y.clone()))


class Expanding(nn.Linear):
    def forward(self, x):
        return super().forward(x).unsqueeze(1).expand(-1, 3, -1)


class ExpandedInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Expanding(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class AutocastInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.b(F.relu(self.a(x)))


@pytest.mark.parametrize("model", [InferenceInside, ExpandedInside, AutocastInside])
@pytest.mark.parametrize("where", ["output", "activation"])
@pytest.mark.parametrize("strategy", ["one batch", *STRATEGIES])
def test_an_output_that_cannot_be_written_to_is_no_obstacle(model, where, strategy):
    data = X if strategy == "one batch" else BATCHES
    options = {} if strategy == "one batch" else {"batches": "all", "strategy": strategy}
    report = lsuv_(model(), data, where=where, **options)
    assert statuses(report) == {"a": "normalized", "b": "normalized"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_norm_without_statistics_of_its_own_in_half_precision(strategy):
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    model = nn.Sequential(nn.Linear(8, 6), norm, nn.ReLU(), nn.Linear(6, 4)).bfloat16()
    batches = [(x.bfloat16(), 0) for x, _ in BATCHES]
    assert lsuv_(model, batches, batches="all", strategy=strategy).ok


class Vmapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(torch.vmap(self.a)(x))


@pytest.mark.parametrize("strategy", ["one batch", *STRATEGIES])
def test_a_layer_within_vmap_has_no_values_to_look_at(strategy):
    data = X if strategy == "one batch" else BATCHES
    options = {} if strategy == "one batch" else {"batches": "all", "strategy": strategy}
    assert statuses(lsuv_(Vmapped(), data, **options)) == {"a": "unscalable", "b": "normalized"}


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        u, v = self.a(x), self.a(x.flip(0))
        return self.b(u.relu() + v.relu())


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x).mT.relu().mT)


@pytest.mark.parametrize("model", [Siblings, Transposed])
@pytest.mark.parametrize("where", ["output", "activation"])
def test_outputs_that_wait_for_their_activation_are_looked_at_before_it_is_too_late(model, where):
    report = lsuv_(model(), X, where=where)
    assert report["b"].status == "normalized"
    assert report.ok


class Around(nn.Linear):
    """A layer around a layer, whose output it returns."""

    def __init__(self):
        super().__init__(8, 8)
        self.inner = nn.Linear(8, 4)

    def forward(self, x):
        return self.inner(x * self.weight.mean())


def test_in_lock_step_a_layer_inside_of_another_is_not_overlooked():
    model = nn.Sequential(Around(), nn.ReLU(), nn.Linear(4, 4))
    one, several = lsuv_(model, X), lsuv_(model, BATCHES, batches="all", strategy="lock-step")
    assert {row.name for row in one if row.calls} == {row.name for row in several if row.calls} == {"0.inner", "0", "2"}


@pytest.mark.parametrize("model", [AutocastInside])
def test_within_autocast_channels_follow_their_weight(model):
    assert statuses(lsuv_(model(), X, scope="channel")) == {"a": "normalized", "b": "normalized"}


# -- data -------------------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, adjacency, x):
        return adjacency @ self.a(x)


def test_a_sparse_input_is_data_too():
    adjacency = (torch.rand(64, 64) > 0.8).float().to_sparse()
    assert lsuv_(Graph(), (adjacency, X)).ok


def test_an_empty_argument_beside_a_full_one_is_legal():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x, more):
            return self.a(torch.cat([x, more]))

    assert lsuv_(Net(), (X, torch.empty(0, 8))).ok


def test_a_loader_that_refills_one_buffer_is_gone_through_batch_by_batch():
    from minitrain.init import LSUV

    class Loader:
        def __iter__(self):
            buffer = torch.empty(16, 8)
            for i, x in enumerate(X.chunk(4)):
                yield buffer.copy_(x * (i + 1))

    model = nn.Sequential(nn.Linear(8, 8))
    union = torch.cat([x * (i + 1) for i, x in enumerate(X.chunk(4))])
    for strategy in STRATEGIES:
        assert LSUV(batches="all", strategy=strategy)(model, Loader()).ok
        mean, std = real(model, "0", union)
        assert abs(mean) < 1e-5
        assert abs(std - 1) < 1e-5


def test_nan_in_the_data_is_the_same_nan_the_next_time():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x.nan_to_num())

    from minitrain import BatchLoader

    x = X.clone()
    x[3, 3] = float("nan")
    assert lsuv_(Net(), BatchLoader(x, x, batch_size=16), batches="all", strategy="streaming", max_memory=1).ok


# -- what must not change ---------------------------------------------------------------------------------------------


def test_a_module_with_a_hook_in_front_gets_its_attributes_back_too():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.last = nn.Linear(8, 4), 0, None

        def forward(self, x):
            self.n, self.last = self.n + 1, x
            return self.a(x)

    model = Counts()
    model.register_forward_pre_hook(lambda m, args: None)
    lsuv_(model, X)
    assert model.n == 0
    assert model.last is None


def test_an_interrupt_between_two_lines_leaves_no_function_mode_on():
    modes = torch._C._len_torch_function_stack()

    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x):
            torch.overrides.TorchFunctionMode().__enter__()  # as a context does that is interrupted on its way out
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lsuv_(Leaving(), X)
    assert torch._C._len_torch_function_stack() == modes


@pytest.mark.parametrize("argument", ["layers", "skip"])
def test_a_name_that_is_none_is_named_by_its_argument(argument):
    with pytest.raises(ValueError, match=f"{argument}='zz'"):
        lsuv_(nn.Sequential(nn.Linear(8, 4)), X, **{argument: "zz"})


def test_rows_are_in_order_of_execution_in_lock_step_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            u, v = self.a(x), self.b(x)
            return v.relu() + u.relu()

    report = lsuv_(Net(), BATCHES, batches="all", strategy="lock-step")
    assert [row.name for row in report] == ["a", "b"]
    assert report.strategy == "lock-step"


def test_a_cached_property_of_a_model_is_computed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.p = nn.Linear(8, 6), nn.Linear(8, 6)

        @functools.cached_property
        def table(self):
            return self.p(X[:4]).relu()

        def forward(self, x):
            return self.a(x) + self.table.mean(0)

    assert lsuv_(Net(), X).ok
