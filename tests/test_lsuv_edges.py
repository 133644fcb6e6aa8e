"""LSUV on nets that are odd. Each of these has been wrong once: called normalised when it was not, or left half changed."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minitrain.init import layer_stats, lsuv_


def in_float64(layer, x):
    y = copy.deepcopy(layer).double()(x.double())
    return y.mean().item(), y.std().item()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Wrapped(nn.Module):
    """A module of the tests as a whole model."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


# -- nothing that is wrong is called normalised -----------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("noise", [5e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_a_spread_that_is_rounding_is_never_blown_up_to_one(noise, center):
    for seed in range(60):
        torch.manual_seed(seed)
        layer, x = nn.Linear(8, 1), torch.rand(8) + noise * torch.randn(16, 8)
        before = copy.deepcopy(layer.state_dict())
        (row,) = lsuv_(layer, x, center=center)
        mean, std = in_float64(layer, x)
        if row.ok:
            assert row.status == "normalized"
            assert abs(std - 1) < 2e-3
            assert not center or abs(mean) < 2e-3
        else:
            assert row.status in ("unscalable", "dead")
            assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        assert row.status != "scaled", "an affine layer's mean follows its bias"


def test_a_saturated_layer_before_does_not_fool_it():
    wrong = []
    for seed in range(60):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        nn.init.normal_(model[0].bias, std=30)
        x = torch.randn(16, 8)
        row = lsuv_(model, x)["2"]
        model.double()
        y = model(x.double())
        if row.ok and (abs(y.std() - 1) > 5e-3 or abs(y.mean()) > 5e-3):
            wrong.append((seed, row, y.mean().item(), y.std().item()))
    assert not wrong


class Times(nn.Linear):
    factor = 3.0

    def forward(self, x):
        return self.factor * super().forward(x)


class Negative(Times):
    factor = -1.0


class Half(Times):
    factor = 0.5


class Leaky(nn.Linear):
    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1)


@pytest.mark.parametrize("weight_scale", [1e-4, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kind", [Times, Negative, Half, Leaky])
def test_a_mean_that_follows_the_bias_is_brought_to_zero(kind, weight_scale):
    layer, x = kind(16, 16), torch.randn(64, 16)
    with torch.no_grad():
        layer.weight.mul_(weight_scale)
    (row,) = lsuv_(Wrapped(layer), x)
    assert row.status == "normalized"
    y = layer(x)
    assert abs(y.mean()) < 1e-3
    assert abs(y.std() - 1) < 1e-3


def test_a_layer_whose_mean_cannot_reach_zero_is_scaled_with_a_reason_that_is_true():
    class Rectified(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    layer, x = Rectified(16, 16), torch.randn(64, 16)
    (row,) = lsuv_(Wrapped(layer), x)
    assert (row.status, row.reason) == ("scaled", "its mean cannot be brought to 0 by its bias")
    assert abs(layer(x).std() - 1) < 1e-3


# -- after an error everything is as before ---------------------------------------------------------------------------


def assert_rolled_back(model, x, error=Exception):
    before = [(t.detach(), t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    with pytest.raises(error):
        lsuv_(model, x)
    for tensor, value in before:
        same = (
            tensor.to_dense().equal(value.to_dense())
            if tensor.is_sparse
            else tensor.nan_to_num(7).equal(value.nan_to_num(7))
        )
        assert same


class Breaks(nn.Module):
    """A layer that is normalised, and another one that cannot take its output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(5, 4)

    def forward(self, x):
        return self.b(self.a(x))


class FrozenDict(OrderedDict):
    """A configuration that refuses to be changed, as libraries of models have it."""

    def update(self, *args, **kwargs):
        raise TypeError("frozen")

    def clear(self):
        raise TypeError("frozen")


def test_a_model_that_holds_a_frozen_dict_is_rolled_back():
    model = Breaks()
    model._internal_dict = FrozenDict(sample_size=4)
    assert_rolled_back(model, torch.randn(8, 4), RuntimeError)
    assert model._internal_dict == {"sample_size": 4}


class Graph(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.register_buffer("adjacency", torch.eye(8).to_sparse())
        self.register_buffer("mask", torch.full((1, 1), float("nan")).expand(4, 4))
        self.layer, self.breaks = nn.Linear(4, 4), breaks

    def forward(self, x):
        y = self.layer(torch.sparse.mm(self.adjacency, x))
        return y @ y if self.breaks else y


def test_sparse_and_expanded_buffers_are_no_obstacle():
    model = Graph(breaks=False)
    sparse = model.adjacency
    assert lsuv_(model, torch.randn(8, 4)).ok
    assert model.adjacency is sparse
    assert_rolled_back(Graph(breaks=True), torch.randn(8, 4), RuntimeError)


def test_a_model_made_in_inference_mode_is_rolled_back():
    with torch.inference_mode():
        model = Breaks()
    assert_rolled_back(model, torch.randn(8, 4), RuntimeError)
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    assert lsuv_(model, torch.randn(8, 4)).ok


def test_gradients_are_rolled_back_too():
    model = Breaks()
    grads = [torch.ones_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    assert_rolled_back(model, torch.randn(8, 4), RuntimeError)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


# -- models that do more than to multiply -----------------------------------------------------------------------------


def test_a_model_that_differentiates_in_its_forward_pass_is_normalised():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 1), nn.Linear(4, 3)

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.b(torch.tanh(self.a(x))).sum()
                return self.c(torch.autograd.grad(energy, x)[0])

    report = lsuv_(Forces(), torch.randn(32, 4))
    assert [(row.status, row.calls) for row in report] == [("normalized", 1)] * 3


def test_what_a_model_keeps_on_itself_is_put_back_after_each_pass():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(4, 4), 0

        def forward(self, x):
            self.seen += len(x)
            self.cache = x
            return self.layer(x * (1 + self.seen // 20))

    model, x = Counts(), torch.randn(8, 4)
    assert lsuv_(model, x).ok
    assert model.seen == 0
    assert not hasattr(model, "cache")
    assert abs(model(x).std() - 1) < 1e-6


def test_a_zero_second_input_does_not_make_a_layer_dead():
    class Adds(nn.Linear):
        def forward(self, x, h):
            return super().forward(x) + h

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Adds(4, 4)

        def forward(self, x):
            return self.layer(x, torch.zeros(len(x), 4))

    assert lsuv_(Cell(), torch.randn(8, 4))["layer"].status == "normalized"


@pytest.mark.parametrize("by_hook", [False, True])
def test_a_layer_that_writes_to_its_input_is_repeated_on_the_original(by_hook):
    class Writes(nn.Linear):
        def forward(self, x):
            return super().forward(x if by_hook else x.mul_(0.5))

    model = nn.Sequential(nn.Linear(4, 4), Writes(4, 4), nn.Linear(4, 4))
    if by_hook:
        model[1].register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5),))
    report = lsuv_(model, torch.randn(32, 4))
    assert [row.status for row in report] == ["normalized"] * 3


def test_a_layer_that_draws_random_numbers_is_repeated_with_the_same_ones():
    class Noisy(nn.Linear):
        def forward(self, x):
            return F.linear(x + 0.5 * torch.randn_like(x), self.weight, self.bias)

    report = lsuv_(nn.Sequential(Noisy(4, 4), nn.Linear(4, 4)), torch.randn(32, 4))
    assert [row.status for row in report] == ["normalized"] * 2


def test_an_expert_whose_first_call_is_empty_is_normalised_on_the_next():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            self.layer(x[:0])
            return self.layer(x)

    assert lsuv_(Expert(), torch.randn(8, 4))["layer"].status == "normalized"


def test_slices_of_a_flat_parameter_are_layers_of_their_own():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.flat = nn.Parameter(torch.randn(32))
            self.a.weight = nn.Parameter(self.flat.data[:16].view(4, 4))
            self.b.weight = nn.Parameter(self.flat.data[16:].view(4, 4))

        def forward(self, x):
            return self.b(self.a(x))

    assert [row.status for row in lsuv_(Flat(), torch.randn(16, 4))] == ["no_bias"] * 2


def test_a_buffer_that_is_a_view_of_the_weight_follows_it():
    layer = nn.Linear(4, 4)
    layer.register_buffer("alias", layer.weight.data)
    assert lsuv_(nn.Sequential(layer), torch.randn(16, 4))["0"].status == "normalized"
    assert torch.equal(layer.alias, layer.weight)


def test_a_frozen_bias_that_spreads_too_much_is_named():
    layer = nn.Linear(16, 16)
    layer.bias.data.mul_(10)
    layer.bias.requires_grad_(False)
    (row,) = lsuv_(Wrapped(layer), torch.randn(64, 16))
    assert (row.status, row.reason) == ("unscalable", "its bias is frozen, and its spread alone is too large")


def test_negative_zeros_of_a_layer_that_is_left_alone_stay():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original[0, 0] = -0.0
    assert lsuv_(Wrapped(layer), torch.randn(16, 4))["layer"].status == "unscalable"
    assert torch.signbit(original[0, 0])


def test_layer_stats_leaves_lazy_modules_lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    assert [row.status for row in layer_stats(model, torch.randn(8, 3))] == ["measured"] * 2
    assert [type(layer) for layer in model] == [nn.LazyLinear, nn.ReLU, nn.LazyLinear]
    assert lsuv_(model, torch.randn(8, 3)).ok


def test_a_model_that_builds_itself_on_its_first_call_stays_built():
    class Builds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.built = nn.Linear(4, 4), False

        def forward(self, x):
            if not self.built:
                self.head, self.built = nn.Linear(4, 2), True
            return self.head(self.first(x))

    model, x = Builds(), torch.randn(8, 4)
    lsuv_(model, x)
    head = model.head
    model(x)
    assert model.built
    assert model.head is head


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_is_fresh_afterwards():
    model, x = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))), torch.randn(8, 4)
    lsuv_(model, x)
    fresh = model[0].weight.clone()
    model(x)
    torch.testing.assert_close(model[0].weight, fresh)


def test_a_lazy_module_called_by_keyword_is_lazy_again_and_usable_after_an_error():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.lazy, self.breaks = nn.LazyLinear(4), True

        def forward(self, x):
            y = self.lazy(input=x)
            return y @ y if self.breaks else y

    model, x = Keyword(), torch.randn(8, 3)
    with pytest.raises(RuntimeError):
        lsuv_(model, x)
    assert type(model.lazy) is nn.LazyLinear
    model.breaks = False
    assert model(x).shape == (8, 4)


def test_named_tuples_and_packed_sequences_are_single_inputs_as_in_the_learner():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, packed):
            return self.layer(packed.data)

    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    for data in (packed, [(packed, torch.zeros(2))]):
        assert lsuv_(Packed(), data)["layer"].status == "normalized"


def test_the_report_says_what_before_means_how_many_passes_and_what_else_there_is():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, i):
            return self.layer(self.words(i))

    report = lsuv_(Words(), torch.arange(10))
    assert report.unowned == ("words.weight",)
    text = str(report)
    assert "; 1 forward pass and 1 to verify, " in text
    assert "\nbefore: as each layer was met, behind those that were normalised already" in text
    assert "\nleft as they are, in no layer that LSUV knows: words.weight" in text
    assert "1 forward pass, " in str(lsuv_(Words(), torch.arange(10), verify=False))


def test_the_plot_of_a_report_can_be_saved(tmp_path):
    lsuv_(nn.Linear(4, 2), torch.randn(8, 4)).plot(save=tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


# -- rows of the table of hard cases that are tested nowhere else -----------------------------------------------------


def test_a_model_wrapped_for_distributed_training_is_unwrapped():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32, 8)
        wrapped = nn.parallel.DistributedDataParallel(model)
        where = [(id(p), p.data_ptr()) for p in wrapped.parameters()]
        for data, options in ((x, {}), ([(x[:16], 0), (x[16:], 0)], {"batches": "all"})):
            report = lsuv_(wrapped, data, **options)
            assert [(row.name, row.status) for row in report] == [("0", "normalized"), ("2", "normalized")]
        assert [(id(p), p.data_ptr()) for p in wrapped.parameters()] == where
        mean, std = in_float64(model, x)
        assert abs(mean) < 1e-6
        assert abs(std - 1) < 1e-6
        wrapped(x).sum().backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_weights_are_listed_as_unhandled_and_left_alone(cell):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.cell, self.head = nn.Linear(4, 6), cell(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.cell(self.front(x))
            while isinstance(y, tuple):
                y = y[0]
            return self.head(y)

    model = Net()
    before = copy.deepcopy(model.cell.state_dict())
    report = lsuv_(model, torch.randn(32, 4) if "Cell" in cell.__name__ else torch.randn(5, 32, 4))
    assert {row.name: row.status for row in report} == {
        "front": "normalized",
        "head": "normalized",
        "cell": "unhandled",
    }
    assert "recurrent" in report["cell"].reason
    assert all(torch.equal(value, before[name]) for name, value in model.cell.state_dict().items())


LAZY = {
    nn.LazyLinear: (6, (8, 5)),
    nn.LazyConv1d: (6, (8, 4, 9)),
    nn.LazyConv2d: (6, (8, 4, 5, 5)),
    nn.LazyConv3d: (6, (4, 4, 4, 4, 4)),
    nn.LazyConvTranspose1d: (6, (8, 4, 9)),
    nn.LazyConvTranspose2d: (6, (8, 4, 5, 5)),
    nn.LazyConvTranspose3d: (6, (4, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", LAZY)
def test_every_lazy_form_is_shaped_and_exact(kind):
    out, shape = LAZY[kind]
    layer, x = kind(*((out,) if kind is nn.LazyLinear else (out, 2))), torch.randn(shape) + 1
    (row,) = lsuv_(Wrapped(layer), x)
    assert row.status == "normalized"
    mean, std = in_float64(layer, x)
    assert abs(mean) < 1e-6
    assert abs(std - 1) < 1e-6


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_exact_over_several_batches(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8)), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=reentrant))

    for strategy in ("lock-step", "streaming"):
        model, x = Net(), torch.randn(32, 8)
        report = lsuv_(model, [(part, 0) for part in x.chunk(4)], batches="all", strategy=strategy)
        assert [row.status for row in report] == ["normalized"] * 3
        mean, std = in_float64(model.b, model.a(x))
        assert abs(mean) < 1e-5
        assert abs(std - 1) < 1e-5


def test_a_parameter_beside_a_weight_that_is_known_is_listed_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x @ self.weight @ self.other)

    report = lsuv_(Both(), torch.randn(16, 4))
    assert {row.name: row.status for row in report} == {"layer": "normalized", "": "unhandled"}
    assert report.unowned == ("other",)
