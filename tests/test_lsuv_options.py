"""Each option of LSUV does what its documentation says, as an oracle in float64 sees it; wrong ones are refused by name."""

import copy
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from lsuv_nets import CLAIMS, bits, mlp, statuses
from torch import nn

from minitrain.errors import InitError
from minitrain.init import LSUV, kinds, layer_stats, lsuv_, register_layer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def snapshot(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(t), t.data_ptr(), t.requires_grad, bits(t)) for name, t in tensors if t.numel()],
        [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        (random.getstate(), torch.get_rng_state().tolist(), torch._C._len_torch_function_stack()),
    )


def outputs(model, *args, norms_in_training=False, **kwargs):
    """Each layer's first output, in float64, by hooks of its own."""
    model, found = copy.deepcopy(model).double().eval(), {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)):
            module.register_forward_hook(lambda m, i, y, n=name: found.setdefault(n, y.clone()) is None or None)
        if norms_in_training and isinstance(module, (nn.modules.batchnorm._NormBase)):
            module.train()
    with torch.no_grad():
        model(*(a.double() if a.is_floating_point() else a for a in args), **kwargs)
    return found


def assert_unit(y, tolerance=1e-6, mean=True, std=1.0):
    assert abs(y.std() / std - 1) < tolerance, (y.mean(), y.std())
    assert not mean or abs(y.mean()) < tolerance * max(std, 1), (y.mean(), y.std())


# -- scope="channel" --------------------------------------------------------------------------------------------------

weight_norm = nn.utils.parametrizations.weight_norm
CHANNELS = {  # layer, shapes of its inputs, dimension of the channels
    "linear": (lambda: nn.Linear(4, 6), [(32, 4)], -1),
    "linear on a sequence": (lambda: nn.Linear(4, 6), [(8, 5, 4)], -1),
    "1d": (lambda: nn.Conv1d(4, 6, 3), [(8, 4, 9)], 1),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), [(8, 4, 9, 9)], 1),
    "3d": (lambda: nn.Conv3d(4, 6, 3), [(4, 4, 5, 5, 5)], 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), [(8, 4, 9, 9)], 1),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), [(8, 4, 9, 9)], 1),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), [(4, 9, 9)], 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), [(8, 4, 5, 5)], 1),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), [(8, 4, 5)], 1),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), [(8, 4, 5, 5)], 1),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=4), [(8, 4, 5, 5)], 1),
    "unbatched transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), [(4, 5, 5)], 0),
    "bilinear": (lambda: nn.Bilinear(3, 4, 6), [(32, 3), (32, 4)], -1),
    "weight norm": (lambda: weight_norm(nn.Linear(4, 6)), [(32, 4)], -1),
    "weight norm of a convolution": (lambda: weight_norm(nn.Conv2d(4, 6, 3)), [(8, 4, 9, 9)], 1),
}


def per_channel(y, dim):
    rows = y.double().movedim(dim, 0).flatten(1)
    return rows.mean(1), rows.std(1)


@pytest.mark.parametrize("case", CHANNELS)
def test_every_channel_gets_mean_0_and_std_1(case):
    make, shapes, dim = CHANNELS[case]
    layer, inputs = make(), tuple(torch.randn(shape) * 2 + 1 for shape in shapes)
    where = [(id(p), p.data_ptr()) for p in layer.parameters()]
    (row,) = lsuv_(layer, inputs, scope="channel")
    assert row.status == "normalized", row
    with torch.no_grad():
        mean, std = per_channel(copy.deepcopy(layer).double()(*(x.double() for x in inputs)), dim)
    assert mean.abs().max() < 1e-5
    assert (std - 1).abs().max() < 1e-5
    assert abs(row.mean_after) < 1e-5
    assert abs(row.std_after - 1) < 1e-5
    assert [(id(p), p.data_ptr()) for p in layer.parameters()] == where


def test_every_channel_of_a_whole_net_is_normalised_in_one_pass():
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.GELU()),
        *(nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5)),
    )
    x = torch.randn(16, 1, 9, 9)
    report = lsuv_(model, x, scope="channel")
    assert set(statuses(report).values()) == {"normalized"}
    assert report.forwards == 2
    for y in outputs(model, x).values():
        mean, std = per_channel(y, 1)
        assert mean.abs().max() < 1e-5
        assert (std - 1).abs().max() < 1e-5


def test_every_channel_of_attention_is_normalised():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(16, 5, 8) + 0.5
    report = lsuv_(attention, (x, x, x), scope="channel")
    assert statuses(report) == dict.fromkeys(["q", "k", "v", "out_proj"], "normalized")
    for y in [*projected(attention, x, x, x), attention(x, x, x)[0].detach()]:
        mean, std = per_channel(y, -1)
        assert mean.abs().max() < 1e-5
        assert (std - 1).abs().max() < 1e-5


def test_without_a_bias_every_channel_gets_its_std_only():
    layer, x = nn.Linear(4, 6, bias=False), torch.randn(32, 4) + 1
    (row,) = lsuv_(layer, x, scope="channel")
    assert (row.status, row.reason) == ("no_bias", "no bias")
    assert (per_channel(layer(x).detach(), -1)[1] - 1).abs().max() < 1e-5
    layer = nn.Linear(4, 6)
    layer.bias.requires_grad_(False)
    bias = layer.bias.clone()
    (row,) = lsuv_(layer, x, scope="channel")
    assert (row.status, row.reason) == ("no_bias", "its bias is frozen")
    assert torch.equal(layer.bias, bias)
    assert (per_channel(layer(x).detach(), -1)[1] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_channels_of_other_precisions_are_within_their_tolerance(dtype):
    model, x = mlp(8, 16, 4).to(dtype), torch.randn(64, 8, dtype=dtype)
    assert set(statuses(lsuv_(model, x, scope="channel")).values()) == {"normalized"}
    h = model[0](x)
    for y in (h, model(x)):
        mean, std = per_channel(y.detach(), -1)
        tolerance = 1e-9 if dtype == torch.float64 else 2e-2
        assert mean.abs().max() < tolerance
        assert (std - 1).abs().max() < tolerance


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_channels_that_do_not_vary_are_left_to_the_bit_and_the_others_normalised(kind):
    layer = {"linear": nn.Linear(4, 6), "conv": nn.Conv1d(4, 6, 1), "transposed": nn.ConvTranspose1d(4, 6, 1)}[kind]
    x = torch.randn(32, 4) if kind == "linear" else torch.randn(8, 4, 5)
    rows = layer.weight.data if kind != "transposed" else layer.weight.data.transpose(0, 1)
    rows[1] = 0.0
    rows[4] = -0.0
    before = copy.deepcopy(layer)
    (row,) = lsuv_(layer, x, scope="channel")
    assert (row.status, row.ok) == ("partial", False)
    assert "2 of its 6 channels do not vary" in row.reason
    mean, std = per_channel(layer(x).detach(), -1 if kind == "linear" else 1)
    alive = torch.tensor([True, False, True, True, False, True])
    assert mean[alive].abs().max() < 1e-5
    assert (std[alive] - 1).abs().max() < 1e-5
    was = before.weight if kind != "transposed" else before.weight.transpose(0, 1)
    for i in (1, 4):
        assert bits(rows[i]) == bits(was[i])
    assert bits(layer.bias[~alive]) == bits(before.bias[~alive])
    with pytest.raises(InitError, match="2 of its 6 channels do not vary"):
        lsuv_(before, x, scope="channel", strict=True)


def test_a_layer_of_which_no_channel_varies_is_dead_and_single_values_are_few():
    x = torch.cat([torch.randn(8, 2), torch.zeros(8, 2)], 1)
    layer = nn.Linear(4, 3)
    layer.weight.data[:, :2] = 0
    before = snapshot(layer)
    assert statuses(lsuv_(layer, x, scope="channel")) == {"": "dead"}
    assert snapshot(layer) == before
    assert statuses(lsuv_(nn.Linear(4, 3), torch.randn(1, 4), scope="channel")) == {"": "few_values"}


def test_what_has_no_channels_to_scale_by_is_unscalable_and_untouched():
    layer, x = weight_norm(nn.Linear(4, 6), dim=None), torch.randn(32, 4)
    before = snapshot(layer)
    (row,) = lsuv_(layer, x, scope="channel")
    assert row.status == "unscalable"
    assert snapshot(layer) == before


# -- target_std -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.5, 3, 1e-3, lambda name: {"0": 0.1, "2": 2, "4": 30.0}[name]])
def test_the_std_is_what_is_wanted_layer_by_layer(target):
    model, x = mlp(8, 16, 8, 4), torch.randn(64, 8)
    report = lsuv_(model, x, target_std=target)
    assert report.ok
    for name, y in outputs(model, x).items():
        wanted = target(name) if callable(target) else target
        assert abs(y.std() / wanted - 1) < 1e-6
        assert abs(y.mean()) < 1e-6 * wanted
        assert report[name].std_after == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_a_wanted_std_that_is_no_number_above_0_is_refused(value):
    with pytest.raises(ValueError, match=r"target_std=.*wanted a number above 0"):
        LSUV(target_std=value)
    model, x = mlp(8, 16, 4), torch.randn(64, 8)
    before = snapshot(model)
    with pytest.raises(InitError, match=r"target_std\('2'\) gave .*wanted a number above 0"):
        lsuv_(model, x, target_std=lambda name: 1.0 if name == "0" else value)
    assert snapshot(model) == before


def test_an_error_of_the_users_target_function_surfaces_as_itself():
    model, x = mlp(8, 16, 4), torch.randn(64, 8)
    before = snapshot(model)
    with pytest.raises(KeyError, match="'2'"):
        lsuv_(model, x, target_std={"0": 1.0}.__getitem__)
    assert snapshot(model) == before


# -- where="activation" -----------------------------------------------------------------------------------------------


class Form(nn.Module):
    """A layer, something behind it in one of many forms, and another layer."""

    def __init__(self, form, layer=None):
        super().__init__()
        self.layer, self.form, self.head = layer or nn.Linear(8, 16), form, nn.Linear(16, 4)

    def forward(self, x):
        y = self.layer(x)
        return self.head(self.form(y))


FORMS = {  # what is called, the same as a plain function, the std that is wanted
    "module": (nn.ReLU(), F.relu, 1.0),
    "in-place module": (nn.ReLU(inplace=True), F.relu, 1.0),
    "function": (F.relu, F.relu, 1.0),
    "of torch": (torch.relu, F.relu, 1.0),
    "method": (torch.Tensor.relu, F.relu, 1.0),
    "in-place method": (torch.Tensor.relu_, F.relu, 1.0),
    "clamped": (lambda y: y.clamp(min=0), F.relu, 1.0),
    "leaky": (nn.LeakyReLU(0.2), lambda y: F.leaky_relu(y, 0.2), 1.0),
    "leaky in place": (nn.LeakyReLU(0.2, inplace=True), lambda y: F.leaky_relu(y, 0.2), 1.0),
    "gelu": (nn.GELU(approximate="tanh"), lambda y: F.gelu(y, approximate="tanh"), 1.0),
    "silu in place": (nn.SiLU(inplace=True), F.silu, 1.0),
    "elu": (nn.ELU(0.7), lambda y: F.elu(y, 0.7), 1.0),
    "tanh": (nn.Tanh(), torch.tanh, 0.5),
    "tanh method": (lambda y: y.tanh(), torch.tanh, 0.5),
    "sigmoid": (torch.sigmoid, torch.sigmoid, 0.2),
    "hardtanh": (nn.Hardtanh(), F.hardtanh, 0.5),
    "softplus": (nn.Softplus(), F.softplus, 1.0),
    "behind a view": (lambda y: y.view(len(y), 4, 4).relu().flatten(1), F.relu, 1.0),
    "with a keyword": (lambda y: F.leaky_relu(input=y, negative_slope=0.2), lambda y: F.leaky_relu(y, 0.2), 1.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_std_behind_the_activation_is_set_in_one_pass(form):
    act, plain, target = FORMS[form]
    model, x = Form(act), torch.randn(64, 8) + 0.3
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1) and None)
    report = lsuv_(model, x, where="activation", target_std=target)
    assert len(passes) == report.forwards == 2
    assert statuses(report) == {"layer": "normalized", "head": "normalized"}
    found = outputs(model, x)
    y = plain(found["layer"])
    assert abs(y.std() / target - 1) < 1e-5
    assert abs(found["layer"].mean()) < 1e-5, "the mean before the activation"
    assert_unit(found["head"], 1e-5, std=target)
    assert report["layer"].std_after == pytest.approx(y.std().item(), rel=1e-5)
    assert report["layer"].mean_after == pytest.approx(y.mean().item(), abs=1e-5)


LAYERS = {
    "no bias": lambda: nn.Linear(8, 16, bias=False),
    "weight norm": lambda: weight_norm(nn.Linear(8, 16)),
    "half": lambda: nn.Linear(8, 16).bfloat16(),
    "double": lambda: nn.Linear(8, 16).double(),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_std_behind_the_activation_of_any_layer_is_set(case):
    model = nn.Sequential(LAYERS[case](), nn.ReLU(inplace=True))
    x = torch.randn(256, 8, dtype=next(model.parameters()).dtype)
    (row,) = lsuv_(model, x, where="activation")
    assert row.status == ("no_bias" if case == "no bias" else "normalized")
    assert abs(model(x).double().std() - 1) < (1e-2 if case == "half" else 1e-5)


def test_without_centring_only_the_std_behind_the_activation_is_set():
    model, x = Form(nn.ReLU()), torch.randn(64, 8) + 1
    ratio = (model.layer.bias / model.layer.weight[:, 0]).detach()
    assert lsuv_(model, x, where="activation", center=False).ok
    y = outputs(model, x)["layer"]
    assert abs(y.relu().std() - 1) < 1e-5
    assert abs(y.mean()) > 1e-3
    torch.testing.assert_close(model.layer.bias / model.layer.weight[:, 0], ratio)


def test_a_layer_with_no_activation_behind_it_is_normalised_at_its_output():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed, self.norm, self.added, self.twice = (
                nn.Linear(8, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 8),
                nn.Linear(8, 8),
            )
            self.returned = nn.Linear(8, 4)

        def forward(self, x):
            x = self.norm(self.normed(x)).relu()
            x = F.relu(x + self.added(x))
            y = self.twice(x)
            return self.returned(y * 0.5 + y.relu())

    model, x = Net(), torch.randn(64, 8)
    report = lsuv_(model, x, where="activation")
    assert set(statuses(report).values()) == {"normalized"}
    for y in outputs(model, x).values():
        assert_unit(y, 1e-5)


@pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid(), nn.Hardtanh(-0.5, 0.5), lambda y: F.hardtanh_(y)])
def test_a_std_that_the_activation_cannot_have_is_unscalable_and_untouched(act):
    model, x = Form(act), torch.randn(64, 8)
    before = copy.deepcopy(model.layer)
    report = lsuv_(model, x, where="activation")
    assert statuses(report) == {"layer": "unscalable", "head": "normalized"}
    assert "cannot be brought to 1 by its weight" in report["layer"].reason
    assert bits(model.layer.weight) == bits(before.weight)
    assert bits(model.layer.bias) == bits(before.bias)
    assert_unit(outputs(model, x)["head"], 1e-5)


def test_an_activation_that_lets_nothing_through_leaves_the_layer_alone():
    model, x = Form(nn.Threshold(1e9, 0.0)), torch.randn(64, 8)
    before = copy.deepcopy(model.layer.state_dict())
    report = lsuv_(model, x, where="activation")
    assert report["layer"].status == "dead"
    assert all(torch.equal(value, before[name]) for name, value in model.layer.state_dict().items())


# -- mode="batch" -----------------------------------------------------------------------------------------------------


def norm_net(**options):
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(inplace=True), nn.Dropout2d(0.5)),
        *(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, **options), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        *(nn.InstanceNorm2d(4, affine=True, **options), nn.GELU(), nn.Flatten()),
        *(nn.Linear(100, 8), nn.BatchNorm1d(8, **options), nn.Dropout(0.5), nn.Linear(8, 3)),
    )


@pytest.mark.parametrize("options", [{"track_running_stats": True}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_with_batch_statistics_the_layers_are_exact_in_a_net_whose_norms_are_in_training(training, options):
    model, x = norm_net(**options).train(training), torch.randn(16, 3, 9, 9) * 2 + 1
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(), module.running_var.uniform_(0.1, 9)
    before, state = [bits(b) for b in model.buffers()], snapshot(model)
    report = lsuv_(model, x, mode="batch")
    assert statuses(report) == {
        "0": "normalized",
        "4": "no_bias",
        "7": "normalized",
        "11": "normalized",
        "14": "normalized",
    }
    assert [bits(b) for b in model.buffers()] == before
    assert snapshot(model)[1:] == state[1:]
    for name, y in outputs(model, x, norms_in_training=True).items():
        assert_unit(y, 1e-5, mean=name != "4")
        assert report[name].std_after == pytest.approx(y.std().item(), abs=1e-5)


def test_without_batch_statistics_the_running_ones_count():
    model, x = norm_net(), torch.randn(16, 3, 9, 9) * 2 + 1
    model[1].running_var.fill_(50.0)
    other = copy.deepcopy(model)
    lsuv_(model, x), lsuv_(other, x, mode="batch")
    assert not torch.allclose(model[4].weight, other[4].weight, rtol=0.1)
    for name, y in outputs(model, x).items():
        assert_unit(y, 1e-5, mean=name != "4")


def test_a_norm_called_twice_takes_the_statistics_of_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.c(self.norm(3 * self.b(self.norm(5 * self.a(x) + 2).relu())).relu())

    for data, options in ((torch.randn(32, 4), {}), ([(torch.randn(8, 4), 0) for _ in range(4)], {"batches": "all"})):
        model = Twice()
        assert lsuv_(model, data, mode="batch", **options).ok
        x = data if isinstance(data, torch.Tensor) else torch.cat([batch[0] for batch in data])
        for y in outputs(model, x, norms_in_training=True).values():
            assert_unit(y, 1e-5)


# -- frozen, forward, tol ---------------------------------------------------------------------------------------------


def test_frozen_layers_are_normalised_if_that_is_asked_for_and_stay_frozen():
    model, x = mlp(8, 16, 16, 4), torch.randn(32, 8)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    report = lsuv_(model, x, include_frozen=True)
    assert set(statuses(report).values()) == {"normalized"}
    for y in outputs(model, x).values():
        assert_unit(y)
    frozen = [model[0].weight, model[0].bias, model[2].bias]
    assert not any(p.requires_grad for p in frozen)
    assert model[4].weight.requires_grad


@pytest.mark.parametrize("batches", [1, 2])
def test_a_model_that_is_not_called_plainly_is_called_as_the_user_does(batches):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.decoder = mlp(4, 8, 4), nn.Linear(4, 4)

        def encode(self, x, scale):
            return self.body(x * scale)

    model, x = Encoder(), torch.randn(32, 4)
    data = [((x[:16], 2.0), 0), ((x[16:], 2.0), 0)]
    pick = {"inputs": lambda batch: batch[0]}
    report = lsuv_(model, data, batches=batches, forward=lambda model, x, scale: model.encode(x, scale=scale), **pick)
    assert statuses(report) == {"body.0": "normalized", "body.2": "normalized", "decoder": "unreached"}
    assert_unit(model.body(x[: 16 * batches] * 2).detach())
    stats = layer_stats(model, data, batches=batches, forward=Encoder.encode, **pick)
    assert stats["body.2"].std_before == pytest.approx(1, abs=1e-5)


def test_a_tolerance_that_rounding_exceeds_takes_the_claim_back():
    model, x = mlp(8, 16, 4), torch.randn(64, 8)
    report = lsuv_(model, x, tol=1e-14)
    assert set(statuses(report).values()) <= {"failed", "unscalable"}
    assert not report.ok
    assert lsuv_(mlp(8, 16, 4).double(), x.double(), tol=1e-11).ok


# -- orthonormal ------------------------------------------------------------------------------------------------------


def assert_orthonormal(matrix):
    """Its rows or columns are orthogonal, and of one length."""
    w = matrix.detach().double().flatten(1)
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)


def test_weights_are_orthonormal_times_a_positive_factor():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(196, 8), nn.ReLU(), nn.Linear(8, 20))
    x, before = torch.randn(16, 1, 9, 9), copy.deepcopy(model)
    report = lsuv_(model, x, orthonormal=True)
    assert set(statuses(report).values()) == {"normalized"}
    assert report.forwards == 2
    for i in (0, 3, 5):
        assert_orthonormal(model[i].weight)
        assert not torch.allclose(model[i].weight / model[i].weight.norm(), before[i].weight / before[i].weight.norm())
    for y in outputs(model, x).values():
        assert_unit(y)


def test_the_projections_of_attention_are_made_orthonormal_one_by_one():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(16, 5, 8)
    lsuv_(attention, (x, x, x), orthonormal=True)
    for matrix in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
        assert_orthonormal(matrix)
    for y in projected(attention, x, x, x):
        assert_unit(y, 1e-5)


def test_weights_that_are_frozen_zero_left_out_or_never_called_do_not_become_orthonormal():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.zero, self.never, self.frozen = (nn.Linear(4, 4) for _ in range(4))
            self.skipped, self.table = nn.Linear(4, 4), nn.Embedding(4, 4)
            self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
            nn.init.zeros_(self.zero.weight)
            self.frozen.requires_grad_(False)
            self.foreign = nn.Parameter(torch.randn(4, 4))
            self.product = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            x = self.frozen(self.skipped(self.a(x))) @ self.foreign
            return F.linear(self.spectral(x) + self.zero(x), self.product)

    model, x = Net(), torch.randn(32, 4)
    before = copy.deepcopy(model.state_dict())
    report = lsuv_(model, x, orthonormal=True, skip="skipped")
    assert statuses(report) == {
        "a": "normalized",
        "skipped": "skipped",
        "frozen": "frozen",
        "spectral": "unscalable",
        "zero": "dead",
        "product": "no_bias",
        "never": "unreached",
    }
    assert_orthonormal(model.a.weight)
    changed = {name for name, value in model.state_dict().items() if bits(value) != bits(before[name])}
    matrix = "spectral.parametrizations.weight.original"  # what comes behind it was normalised on what it makes
    assert changed == {"a.weight", "a.bias", "product", "spectral.bias", matrix}


def test_orthonormal_draws_from_the_global_generator_and_nothing_else_does():
    model, x = mlp(8, 16, 4), torch.randn(64, 8)
    other, python = copy.deepcopy(model), random.getstate()
    torch.manual_seed(3)
    start = torch.get_rng_state()
    lsuv_(copy.deepcopy(model), x)
    assert torch.equal(torch.get_rng_state(), start)
    lsuv_(model, x, orthonormal=True)
    assert not torch.equal(torch.get_rng_state(), start)
    assert random.getstate() == python
    torch.manual_seed(3)
    lsuv_(other, x, orthonormal=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_an_error_puts_back_weights_and_the_random_state_that_orthonormal_has_used():
    model = mlp(8, 16, 4)
    model.append(nn.Linear(9, 9))  # does not fit
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        lsuv_(model, torch.randn(8, 8, generator=torch.Generator()), orthonormal=True)
    assert snapshot(model) == before


def test_weight_norm_gets_an_orthonormal_direction():
    layer, x = weight_norm(nn.Linear(8, 4)), torch.randn(64, 8)
    assert lsuv_(nn.Sequential(layer), x, orthonormal=True).ok
    assert_orthonormal(layer.parametrizations.weight.original1)
    assert_unit(layer(x).detach(), 1e-5)


# -- attention --------------------------------------------------------------------------------------------------------


def projected(attention, q, k, v):
    """What attention makes of its inputs before it attends, in float64."""
    e, packed = attention.embed_dim, attention.in_proj_weight
    names = [f"{which}_proj_weight" for which in "qkv"]
    weights = packed.chunk(3) if packed is not None else [getattr(attention, name) for name in names]
    bias = attention.in_proj_bias
    biases = [torch.zeros(e)] * 3 if bias is None else bias.chunk(3)
    return [
        x.detach().double() @ w.detach().double().T + b.detach().double()
        for x, w, b in zip((q, k, v), weights, biases, strict=True)
    ]


ATTENTIONS = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {}),
    "other sizes": ({"kdim": 6, "vdim": 10, "batch_first": True}, {}),
    "other sizes, no bias": ({"kdim": 6, "vdim": 10, "bias": False}, {}),
    "bias for k and v": ({"add_bias_kv": True}, {}),
    "zeros for k and v": ({"add_zero_attn": True, "batch_first": True}, {}),
    "dropout": ({"dropout": 0.5}, {}),
    "mask": ({"batch_first": True}, {"attn_mask": torch.ones(5, 7).triu(2).bool()}),
    "float mask": ({}, {"attn_mask": torch.randn(5, 7), "need_weights": False}),
    "padding": ({"batch_first": True}, {"key_padding_mask": torch.arange(7).expand(12, 7) > 4, "need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
}


class Attends(nn.Module):
    def __init__(self, options, call):
        super().__init__()
        self.attn, self.call = nn.MultiheadAttention(8, 2, **options), call
        self.mix = nn.Linear(8, 8)

    def forward(self, query, key, value):
        return self.attn(query, key=key, value=value, **self.call)[0]


@pytest.mark.parametrize("case", ATTENTIONS)
def test_each_projection_of_attention_is_exact(case):
    options, call = ATTENTIONS[case]
    model = Attends(options, call)
    first = bool(options.get("batch_first"))
    kdim, vdim = options.get("kdim", 8), options.get("vdim", 8)
    q = torch.randn(12, 5, 8) + 1
    k, v = torch.randn(12, 7, kdim) * 3, torch.randn(12, 7, vdim) - 2
    if not first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    where = [(id(p), p.data_ptr()) for p in model.parameters()]
    with torch.no_grad():
        if model.attn.in_proj_bias is not None:
            model.attn.in_proj_bias.normal_()
    report = lsuv_(model, (q, k, v))
    bias = options.get("bias", True)
    assert {name: status for name, status in statuses(report).items() if name != "mix"} == dict.fromkeys(
        ["attn.q", "attn.k", "attn.v", "attn.out_proj"], "normalized" if bias else "no_bias"
    )
    assert statuses(report)["mix"] == "unreached"
    for y in projected(model.attn, q, k, v):
        assert_unit(y, 1e-5, mean=bias)
    double = copy.deepcopy(model).double().eval()
    double.call = {name: m.double() if torch.is_floating_point(torch.as_tensor(m)) else m for name, m in call.items()}
    with torch.no_grad():
        assert_unit(double(q.double(), k.double(), v.double()), 1e-5, mean=bias)
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == where
    assert report.forwards == 2


def test_one_projection_of_attention_can_be_chosen_and_the_others_are_left_to_the_bit():
    for options in ({"layers": "attn.q"}, {"skip": ["attn.k", "attn.v", "*.out_proj", "mix"]}, {"layers": ["*.q"]}):
        model = Attends({"batch_first": True}, {})
        before, x = copy.deepcopy(model), torch.randn(12, 5, 8)
        report = lsuv_(model, (x, x, x), **options)
        assert {name for name, status in statuses(report).items() if status != "skipped"} == {"attn.q"}
        assert_unit(projected(model.attn, x, x, x)[0], 1e-5)
        assert bits(model.attn.in_proj_weight[8:]) == bits(before.attn.in_proj_weight[8:])
        assert bits(model.attn.in_proj_bias[8:]) == bits(before.attn.in_proj_bias[8:])
        assert bits(model.attn.out_proj.weight) == bits(before.attn.out_proj.weight)


@pytest.mark.parametrize(
    "select", [nn.MultiheadAttention, "attn", "attn.*", lambda name, module: name == "attn"], ids=str
)
def test_attention_is_chosen_or_left_out_as_a_whole(select):
    model, x = Attends({"batch_first": True}, {}), torch.randn(12, 5, 8)
    before = [bits(p) for p in model.parameters()]
    skipped = lsuv_(model, (x, x, x), skip=select)
    assert {name for name, status in statuses(skipped).items() if status == "skipped"} == {
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.out_proj",
    }
    assert [bits(p) for p in model.parameters()] == before
    chosen = lsuv_(model, (x, x, x), layers=select)
    assert statuses(chosen)["mix"] == "skipped"
    assert list(statuses(chosen).values()).count("normalized") == 4


@pytest.mark.parametrize("norm_first", [False, True])
def test_whole_transformers_are_exact(norm_first):
    options = {"dim_feedforward": 12, "batch_first": True, "norm_first": norm_first}
    layer = nn.TransformerDecoderLayer(8, 2, **options)
    source, target = torch.randn(6, 7, 8), torch.randn(6, 5, 8)
    report = lsuv_(layer, (target, source))
    assert statuses(report) == dict.fromkeys(statuses(report), "normalized")
    assert len(report) == 10
    layer.eval()
    if not norm_first:
        for y in projected(layer.self_attn, target, target, target):
            assert_unit(y, 1e-5)
        x = layer.norm1(target + layer.self_attn(target, target, target)[0])
        for y in projected(layer.multihead_attn, x, source, source):
            assert_unit(y, 1e-5)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **options), 2, enable_nested_tensor=False)
    padding = torch.arange(7).expand(6, 7) > 4
    report = lsuv_(encoder, {"src": source, "src_key_padding_mask": padding})
    assert statuses(report) == dict.fromkeys(statuses(report), "normalized")
    assert len(report) == 12


# -- weights that are used by themselves ------------------------------------------------------------------------------


class Swin(nn.Module):
    """As torchvision's shifted-window attention does it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return F.linear((q @ k.transpose(-1, -2)).softmax(-1) @ v, self.proj.weight, self.proj.bias)


def test_a_layer_whose_weight_is_passed_to_a_function_is_exact():
    model, x = Swin(), torch.randn(12, 5, 8)
    report = lsuv_(model, x)
    assert statuses(report) == {"qkv": "normalized", "proj": "normalized"}
    assert_unit(model.qkv(x).detach().double(), 1e-5)
    assert_unit(model(x).detach().double(), 1e-5)
    assert report.forwards == 2


class Own(nn.Module):
    """A class of one's own whose parameters have names of one's own."""

    def __init__(self):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(6, 1, 3, 3)), nn.Parameter(torch.randn(6))
        self.matrix, self.offset = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        x = F.conv2d(x, self.kernel, bias=self.shift, padding=1).relu_().mean((2, 3))
        return F.linear(F.linear(x, weight=self.matrix, bias=self.offset).relu(), self.weight)


def test_a_class_of_ones_own_that_calls_functions_is_exact():
    model, x = Own(), torch.randn(32, 1, 5, 5)
    report = lsuv_(model, x)
    assert statuses(report) == {"kernel": "normalized", "matrix": "normalized", "": "no_bias"}
    assert report.unowned == ()
    y = F.conv2d(x, model.kernel, model.shift, padding=1)
    assert_unit(y.detach().double(), 1e-5)
    y = F.linear(y.relu().mean((2, 3)), model.matrix, model.offset)
    assert_unit(y.detach().double(), 1e-5)
    assert_unit(model(x).detach().double(), 1e-5, mean=False)


COMPUTED = {
    "cat": lambda m: torch.cat([m.q_bias, torch.zeros(8), m.v_bias]),
    "clone": lambda m: m.qkv.bias.clone(),
    "scaled": lambda m: m.qkv.bias * 2,
    "buffer": lambda m: m.constant,
}


@pytest.mark.parametrize("case", COMPUTED)
@pytest.mark.parametrize("scale", [1e-2, 1.0])
def test_a_bias_that_is_computed_is_allowed_for_and_never_claimed_to_centre(case, scale):
    class Beit(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.q_bias, self.v_bias = (nn.Parameter(torch.randn(8) * scale + 0.1) for _ in range(2))
            self.register_buffer("constant", torch.randn(24) * scale + 0.1)
            self.head = nn.Linear(24, 4)

        def forward(self, x):
            return self.head(F.linear(x, self.qkv.weight, COMPUTED[case](self)).relu())

    model, x = Beit(), torch.randn(64, 8) + 0.2
    before = {name: bits(p) for name, p in model.named_parameters()}
    report = lsuv_(model, x)
    row = report["qkv"]
    y = F.linear(x, model.qkv.weight, COMPUTED[case](model)).detach().double()
    assert row.mean_after == pytest.approx(y.mean().item(), abs=1e-5)
    assert row.std_after == pytest.approx(y.std().item(), rel=1e-5)
    if row.status == "unscalable":
        assert scale == 1.0
        assert bits(model.qkv.weight) == before["qkv.weight"]
    else:
        assert (row.status, row.reason) == ("no_bias", "its bias is computed")
        assert_unit(y, 1e-3, mean=False)
    assert {name: bits(p) for name, p in model.named_parameters() if "bias" in name and "head" not in name} == {
        name: value for name, value in before.items() if "bias" in name and "head" not in name
    }
    assert_unit(model.head(y.float().relu()).detach().double(), 1e-4)


class First(nn.Module):
    """A weight that is used in a function first, and then as a module."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(F.linear(x, self.a.weight, self.a.bias).relu()).relu())


class Then(First):
    def forward(self, x):
        return self.b(F.linear(self.a(x).relu(), self.a.weight, self.a.bias).relu())


class Transposed(First):
    def forward(self, x):
        return self.b(self.a(F.linear(x, self.a.weight.t()).relu()).relu())


class Product(First):
    def forward(self, x):
        return self.b(self.a((x @ self.a.weight).relu()).relu())


class Later(First):
    def forward(self, x):
        return self.b(self.a(x).relu()) @ self.a.weight


class TiedInAFunction(First):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias).relu())


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("net", [First, Then, Transposed, Product, Later, TiedInAFunction])
def test_a_weight_used_in_a_function_and_as_a_module_is_never_wrongly_called_normalised(net, batches):
    model, x = net(), torch.randn(96, 8)
    seen = {}

    class Sees(torch.overrides.TorchFunctionMode):
        """An oracle of its own: the first product with each weight."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            if func is F.linear:
                for name, p in model.named_parameters():
                    if p is args[1] and name.endswith("weight"):
                        seen.setdefault(name.removesuffix(".weight"), y.detach().double())
            return y

    report = lsuv_(model, [(part, 0) for part in x.chunk(batches)], batches="all")
    with torch.no_grad(), Sees():
        model.eval()(x)
    for row in report:
        if row.status in CLAIMS:
            assert_unit(seen[row.name], 1e-3)
        else:
            assert row.reason
    if net in (First, Then, Later):
        assert report.ok


def test_a_weight_that_is_used_in_a_function_and_tied_to_a_module_is_scaled_at_its_first_use():
    model, x = TiedInAFunction(), torch.randn(96, 8)
    report = lsuv_(model, x)
    assert statuses(report) == {"a": "normalized", "b": "tied"}
    assert_unit(model.a(x).detach().double(), 1e-5)


# -- register_layer ---------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(kinds, "_registered", {})


class Conv1D(nn.Module):
    """As Hugging Face's GPT-2 has it: the weight is (inputs, outputs)."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out) * 0.02), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    "options", [{}, {"scope": "channel"}, {"where": "activation"}, {"orthonormal": True}, {"batches": 2}], ids=str
)
def test_a_class_that_is_registered_is_a_weight_layer(registry, options):
    def make():
        return nn.Sequential(Conv1D(12, 8), nn.ReLU(), Conv1D(4, 12))

    x = torch.randn(6, 5, 8) + 1
    model = make()
    assert statuses(lsuv_(model, x)) == {"0": "unhandled", "2": "unhandled"}
    assert register_layer(Conv1D, weight_dim=1) is Conv1D
    model = make()
    report = lsuv_(model, [(x[:3], 0), (x[3:], 0)] if "batches" in options else x, **options)
    assert statuses(report) == {"0": "normalized", "2": "normalized"}
    y = model[0](x).detach().double()
    if "scope" not in options:
        assert_unit(y.relu() if "where" in options else y, 1e-5, mean="where" not in options)
    else:
        mean, std = per_channel(y, -1)
        assert mean.abs().max() < 1e-5
        assert (std - 1).abs().max() < 1e-5
    if "orthonormal" in options:
        assert_orthonormal(model[0].weight)


def test_a_registered_class_may_name_its_parameters_and_have_subclasses_and_no_bias(registry):
    class Dense(nn.Module):
        def __init__(self, bias=True):
            super().__init__()
            self.kernel, self.offset = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8)) if bias else None

        def forward(self, x):
            y = torch.einsum("bi,io->bo", x, self.kernel)
            return y if self.offset is None else y + self.offset

    class Sub(Dense):
        pass

    register_layer(Dense, weight="kernel", bias="offset")
    model, x = nn.Sequential(Dense(), nn.ReLU(), Sub(bias=False), nn.ReLU(), Sub()), torch.randn(64, 8)
    assert statuses(lsuv_(model, x)) == {"0": "normalized", "2": "no_bias", "4": "normalized"}
    assert_unit(model(x).detach().double(), 1e-5)


def test_a_registered_class_that_does_not_follow_its_weight_is_not_believed(registry):
    @register_layer
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return F.linear(x, F.normalize(self.weight, dim=1)) * 3

    model, x = nn.Sequential(Normed(), nn.Linear(8, 4)), torch.randn(64, 8)
    weight = bits(model[0].weight)
    assert statuses(lsuv_(model, x)) == {"0": "unscalable", "1": "normalized"}
    assert bits(model[0].weight) == weight


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("Linear",), {}, "cls='Linear'"),
        ((nn.Linear(2, 2),), {}, "wanted a class"),
        ((int,), {}, "wanted a class"),
        ((nn.Embedding,), {"weight": 3}, "weight=3"),
        ((nn.Embedding,), {"bias": None}, "bias=None"),
    ],
)
def test_what_is_no_class_of_layers_is_not_registered(registry, args, options, message):
    with pytest.raises(TypeError, match=message):
        register_layer(*args, **options)
    assert kinds._registered == {}


# -- signal share -----------------------------------------------------------------------------------------------------


def share(y, batch_dim=0):
    """The mean over units of the variance across samples, over the variance of all."""
    y = y.detach().double()
    return (y.var(batch_dim).mean() / y.var()).item()


def test_the_signal_share_is_that_of_an_independent_computation():
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(100, 8), nn.Tanh(), nn.Linear(8, 3)),
    )
    x = torch.randn(32, 1, 9, 9) + 2
    report = lsuv_(model, x)
    for name, y in outputs(model, x).items():
        assert report[name].signal_share == pytest.approx(share(y), rel=1e-5)
    assert report.signal_share == report["7"].signal_share
    for name, y in outputs(model, x).items():
        assert layer_stats(model, x)[name].signal_share == pytest.approx(share(y), rel=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_signal_share_of_attention_lies_between_samples_too(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    x = torch.randn(12, 5, 8) * 0.1 + torch.randn(5, 8)
    x = x if batch_first else x.transpose(0, 1)
    report = lsuv_(attention, (x, x, x))
    dim = 0 if batch_first else 1
    for which, y in zip("qkv", projected(attention, x, x, x), strict=True):
        assert report[which].signal_share == pytest.approx(share(y, dim), rel=1e-4)
    assert report["out_proj"].signal_share == pytest.approx(
        share(attention.double()(*[x.double()] * 3)[0], dim), rel=1e-4
    )


@pytest.mark.parametrize("strategy", ["lock-step", "streaming"])
def test_the_signal_share_over_several_batches_is_that_of_their_union(strategy):
    model, x = mlp(8, 16, 16, 4), torch.randn(48, 8) + torch.arange(48)[:, None] / 10
    report = lsuv_(model, [(part, 0) for part in x.split([5, 1, 30, 12])], batches="all", strategy=strategy)
    for name, y in outputs(model, x).items():
        assert report[name].signal_share == pytest.approx(share(y), rel=1e-5)


def test_a_single_sample_has_no_signal_share():
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(1, 1, 9, 9)
    report = lsuv_(model, x)
    assert report.ok
    assert [row.signal_share for row in report] == [None, None]
    assert report.signal_share is None
    assert report.warnings == ()


def deep(act, how=lambda w: None, depth=50):
    torch.manual_seed(0)
    model = mlp(*[256] * (depth + 1), act=act)
    for module in model:
        if isinstance(module, nn.Linear):
            how(module.weight)
    return model


FIGURES = {  # the table of RESEARCH.md 1.4
    "relu": (nn.ReLU, lambda w: None, 0.021),
    "relu, kaiming": (nn.ReLU, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"), 0.057),
    "relu, orthogonal": (nn.ReLU, nn.init.orthogonal_, 0.061),
    "tanh": (nn.Tanh, lambda w: None, 0.88),
    "gelu": (nn.GELU, lambda w: None, 0.93),
}


@pytest.mark.parametrize("case", FIGURES)
def test_what_is_left_of_the_signal_behind_fifty_layers_is_what_was_measured_before(case):
    act, how, figure = FIGURES[case]
    report = lsuv_(deep(act, how), torch.randn(512, 256))
    assert report.ok
    if figure > 0.5:
        assert report.signal_share == pytest.approx(figure, abs=0.05)
    else:
        assert figure / 2.5 < report.signal_share < figure * 2.5
    assert report.warnings == ()


def test_channel_by_channel_the_signal_survives_fifty_layers():
    assert lsuv_(deep(nn.ReLU), torch.randn(512, 256), scope="channel").signal_share == pytest.approx(1, abs=5e-3)


def test_a_lost_signal_is_warned_of_in_one_line():
    report = lsuv_(deep(nn.ReLU, depth=150), torch.randn(64, 256))
    assert report.ok
    assert report.signal_share < 0.01
    (warning,) = report.warnings
    assert "signal is lost" in warning
    assert "'298'" in warning
    assert "\n" not in warning
    assert f"\nwarning: {warning}" in str(report)
    assert list(report.to_dict()["warnings"]) == [warning]
    assert "warning" not in str(lsuv_(deep(nn.Tanh, depth=20), torch.randn(64, 256)))


# -- report -----------------------------------------------------------------------------------------------------------


def test_a_report_can_be_printed_drawn_and_written_as_json(tmp_path):
    model, x = mlp(8, 16, 16, 4), torch.randn(24, 8)
    nn.init.zeros_(model[4].weight)
    model.aux = nn.LSTM(3, 3)
    report = lsuv_(model[:5], [(part, 0) for part in x.chunk(3)], batches="all")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True
    assert (data["batches"], data["strategy"], data["verified"], data["forwards"]) == (3, "lock-step", True, 7)
    assert data["why"] == report.why
    assert [row["status"] for row in data["rows"]] == ["normalized", "normalized", "dead"]
    assert data["rows"][0]["signal_share"] == report["0"].signal_share
    assert data["rows"][2]["ok"] is True
    report.plot(save=tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 1000
    lines = str(report).splitlines()
    head = ["µ before", "σ before", "µ after", "σ after", "signal", "status"]
    assert lines[0].startswith("layer  class")
    assert [name for name in head if name in lines[0]] == head
    assert len({len(line[: lines[0].index("status")]) for line in lines[:4]}) == 1
    assert lines[3].split()[-6:] == ["dead:", "its", "weight", "is", "all", "zeros"]
    assert "4 forward passes and 3 to verify" in lines[4]


def test_seconds_and_passes_of_a_report_are_those_of_the_run():
    model, x = mlp(8, 16, 4), torch.randn(24, 8)
    report = lsuv_(model, x)
    assert 0 < report.verify_seconds < report.seconds
    assert (report.forwards, report.batches, report.strategy, report.batch) == (2, 1, "one batch", "(24, 8)")
    unverified = lsuv_(model, x, verify=False)
    assert (unverified.forwards, unverified.verified, unverified.verify_seconds) == (1, False, 0.0)


# -- strict -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["lock-step", "streaming", "auto"])
def test_strict_names_layer_batches_and_remedy_and_restores_everything(strategy):
    model, x = mlp(3, 4, 4), torch.randn(24, 3)
    nn.init.zeros_(model[2].weight), nn.init.zeros_(model[2].bias)
    before = snapshot(model)
    data = [(part, 0) for part in x.chunk(3)]
    with pytest.raises(InitError) as info:
        lsuv_(model, data, batches="all", strategy=strategy, strict=True)
    assert str(info.value) == (
        "layer '2' (Linear): output std is 0 on the given batch of shape (8, 3) and 2 batches more, LSUV cannot scale it to 1. "
        "Use a larger batch, or leave the layer out with skip=['2']."
    )
    assert snapshot(model) == before
    assert lsuv_(model, data, batches="all", strategy=strategy, strict=True, skip=["2"]).ok


# -- wrong arguments --------------------------------------------------------------------------------------------------

WRONG = [
    ({"batches": 0}, ValueError, r"batches=0, wanted a number of batches, 1 or more, or 'all'"),
    ({"batches": -1}, ValueError, "batches=-1"),
    ({"batches": 2.0}, ValueError, "batches=2.0"),
    ({"batches": True}, ValueError, "batches=True"),
    ({"batches": "some"}, ValueError, "batches='some'"),
    ({"batches": None}, ValueError, "batches=None"),
    ({"batches": [1]}, ValueError, r"batches=\[1\]"),
    ({"strategy": "fast"}, ValueError, "strategy='fast', wanted one of 'auto', 'lock-step', 'streaming'"),
    ({"strategy": ["auto"]}, ValueError, r"strategy=\['auto'\]"),
    ({"max_memory": 0}, ValueError, "max_memory=0, wanted a number of bytes above 0"),
    ({"max_memory": "2GB"}, ValueError, "max_memory='2GB'"),
    ({"max_memory": True}, ValueError, "max_memory=True"),
    ({"max_memory": None}, ValueError, "max_memory=None"),
    ({"max_memory": math.nan}, ValueError, "max_memory=nan"),
    ({"orthonormal": 1}, TypeError, r"orthonormal=1 \(type=int\), wanted True or False"),
    ({"center": None}, TypeError, "center=None"),
    ({"include_frozen": "no"}, TypeError, "include_frozen='no'"),
    ({"verify": 0}, TypeError, "verify=0"),
    ({"strict": 1.0}, TypeError, "strict=1.0"),
    ({"verbose": 2}, TypeError, "verbose=2"),
    ({"scope": "layers"}, ValueError, "scope='layers', wanted one of 'layer', 'channel'"),
    ({"scope": None}, ValueError, "scope=None"),
    ({"where": "input"}, ValueError, "where='input', wanted one of 'output', 'activation'"),
    ({"mode": "train"}, ValueError, "mode='train', wanted one of 'eval', 'batch'"),
    ({"mode": True}, ValueError, "mode=True"),
    ({"target_std": 0.0}, ValueError, "target_std=0.0"),
    ({"target_std": [1.0]}, ValueError, "target_std=.*function of a layer's name"),
    ({"tol": 0}, ValueError, "tol=0, wanted a number above 0, or None"),
    ({"tol": "1e-3"}, ValueError, "tol='1e-3'"),
    ({"tol": math.nan}, ValueError, "tol=nan"),
    ({"forward": "encode"}, TypeError, r"forward='encode' is not callable, wanted a function"),
    ({"inputs": 3}, TypeError, "inputs=3 is not callable"),
    ({"scope": "channel", "where": "activation"}, ValueError, "do not go together"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_a_wrong_argument_is_refused_by_name_and_value_before_anything_is_done(options, error, message):
    model, x = mlp(3, 4, 2), torch.randn(8, 3)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        LSUV(x, **options)
    with pytest.raises(error, match=message):
        lsuv_(model, x, **options)
    assert snapshot(model) == before


def test_memory_without_a_bound_is_taken_or_refused_by_name():
    x = torch.randn(8, 3)
    try:
        assert lsuv_(mlp(3, 4, 2), [(x, 0), (x + 1, 0)], batches="all", max_memory=math.inf).strategy == "lock-step"
    except ValueError as error:
        assert "max_memory=inf" in str(error)  # noqa: PT017 - either will do


@pytest.mark.parametrize("argument", ["layers", "skip"])
@pytest.mark.parametrize("select", ["attn.z", "z*", nn.Conv2d, lambda name, module: False, ["0", "zz"]], ids=str)
def test_a_selection_that_picks_no_layer_is_refused_and_nothing_is_done(select, argument):
    model, x = mlp(3, 4, 2), torch.randn(8, 3)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"zz|picks no weight layer|no module|match"):
        lsuv_(model, x, **{argument: select}, orthonormal=True)
    assert snapshot(model) == before


def test_an_unknown_option_is_no_option():
    with pytest.raises(TypeError, match="tolerance"):
        LSUV(tolerance=1e-3)
    with pytest.raises(TypeError, match="positional"):
        lsuv_(mlp(3, 4), torch.randn(8, 3), None)
