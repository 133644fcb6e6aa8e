"""LSUV: every layer is normalised or has a reason, nothing else changes, and an error leaves no trace."""

import copy
import itertools
import random
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import UninitializedParameter

from minitrain.errors import DataError, InitError
from minitrain.init import LSUV, layer_stats, lsuv_


def moments_of(model, *args, **kwargs):
    """The oracle: mean and std of each layer's first output, by hooks of its own, in evaluation mode."""
    found = {}

    def keep(name, y):
        if name not in found:
            found[name] = (y.double().mean().item(), y.double().std().item())

    kinds = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda m, i, o, n=name: keep(n, o))
    with torch.no_grad():
        model(*args, **kwargs)
    return found


def assert_normalized(model, *args, tolerance=1e-6, only=None, mean=True):
    measured = moments_of(model, *args)
    for name in measured if only is None else only:
        m, s = measured[name]
        assert abs(s - 1) < tolerance, (name, m, s)
        assert not mean or abs(m) < tolerance, (name, m, s)


def everything(model):
    """Whatever may change: bits of parameters and buffers, where they lie, modes, hooks, gradients, random state."""
    return {
        "tensors": [
            (n, id(t), t.data_ptr(), t.detach().clone().flatten().view(torch.uint8).tolist() if t.numel() else [])
            for n, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        ],
        "modes": [m.training for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def mlp(*sizes, act=nn.ReLU, bias=True):
    layers = [f for a, b in itertools.pairwise(sizes) for f in (nn.Linear(a, b, bias=bias), act())]
    return nn.Sequential(*layers[:-1])


def seed_net():
    """The net of the seed post."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 5, 2, 1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, 3, 1, 2),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(16, 32, 3, 1, 2),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(32, 32, 3, 1, 2),
            relu4=nn.ReLU(),
            avg=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            lin=nn.Linear(32, 10),
        )
    )


def statuses(report):
    return {row.name: row.status for row in report}


# -- exactness ------------------------------------------------------------------------------------------------------------


def test_the_seed_net_is_normalised_to_a_millionth_in_one_pass_and_one_to_verify():
    model, x = seed_net(), torch.rand(64, 1, 28, 28)
    report = lsuv_(model, x)
    assert statuses(report) == dict.fromkeys(["conv1", "conv2", "conv3", "conv4", "lin"], "normalized")
    assert report.ok
    assert report.forwards == 2
    assert_normalized(model, x)
    for row, (m, s) in zip(report, moments_of(model, x).values(), strict=True):
        assert abs(row.mean_after) < 1e-6
        assert abs(row.std_after - 1) < 1e-6
        assert row.mean_after == pytest.approx(m, abs=1e-9)
        assert row.std_after == pytest.approx(s, abs=1e-9)


def test_what_is_reported_before_is_what_the_layer_would_get_behind_normalised_ones():
    model, x = mlp(8, 16, 4), torch.randn(32, 8)
    (m0, s0), _ = moments_of(model, x).values()
    row = lsuv_(model, x)["0"]
    assert (row.mean_before, row.std_before) == (pytest.approx(m0, abs=1e-7), pytest.approx(s0, rel=1e-6))
    assert (row.count, row.calls, row.kind) == (32 * 16, 1, "Linear")


def test_a_hundred_layers_deep_net_is_exact():
    model, x = mlp(*[64] * 101), torch.randn(32, 64)
    assert lsuv_(model, x).ok
    assert_normalized(model, x, tolerance=1e-5)


def test_only_the_scale_of_weights_and_the_biases_change():
    model, x = seed_net(), torch.rand(8, 1, 28, 28)
    before = copy.deepcopy(model.state_dict())
    report = lsuv_(model, x)
    for name, module in model.named_children():
        if hasattr(module, "weight"):
            ratio = module.weight / before[f"{name}.weight"]
            torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / report[name].std_before))
            shift = module.bias * report[name].std_before - before[f"{name}.bias"]
            torch.testing.assert_close(shift, torch.full_like(shift, -report[name].mean_before))


def test_without_verify_one_pass_is_made_and_nothing_is_claimed_about_afterwards():
    model, x = mlp(8, 16, 4), torch.randn(32, 8)
    report = lsuv_(model, x, verify=False)
    assert report.forwards == 1
    assert all(row.mean_after is None and row.std_after is None for row in report)
    assert_normalized(model, x)


def test_without_centring_only_the_std_is_set():
    model, x = mlp(8, 16, 4), torch.randn(32, 8) + 1
    report = lsuv_(model, x, center=False)
    assert set(statuses(report).values()) == {"normalized"}
    assert_normalized(model, x, mean=False)
    assert any(abs(row.mean_after) > 1e-2 for row in report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_within_their_tolerance(dtype):
    model, x = mlp(32, 64, 64, 10).to(dtype), torch.randn(64, 32, dtype=dtype)
    report = lsuv_(model, x)
    assert set(statuses(report).values()) == {"normalized"}
    assert_normalized(model, x, tolerance=1e-9 if dtype == torch.float64 else 1e-2)


LAYERS = {
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), (6, 4, 9, 9)),
    "dilated": (nn.Conv2d(4, 8, 3, dilation=2), (6, 4, 9, 9)),
    "circular": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (6, 4, 9, 9)),
    "strided": (nn.Conv2d(4, 8, 3, stride=2), (6, 4, 9, 9)),
    "1d": (nn.Conv1d(4, 8, 3), (6, 4, 9)),
    "3d": (nn.Conv3d(4, 8, 3), (6, 4, 5, 5, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 8, 3), (6, 4, 9)),
    "transposed 2d": (nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), (6, 4, 9, 9)),
    "transposed 3d": (nn.ConvTranspose3d(4, 8, 3), (6, 4, 4, 4, 4)),
    "linear on a sequence": (nn.Linear(4, 8), (6, 5, 4)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_every_kind_of_layer_is_exact(case):
    layer, shape = copy.deepcopy(LAYERS[case][0]), LAYERS[case][1]
    model, x = nn.Sequential(layer, nn.ReLU(inplace=True)), torch.randn(shape)
    assert statuses(lsuv_(model, x)) == {"0": "normalized"}
    assert_normalized(model, x)


def test_bilinear_is_exact():
    model, a, b = nn.Bilinear(3, 4, 5), torch.randn(16, 3), torch.randn(16, 4)
    assert statuses(lsuv_(model, (a, b))) == {"": "normalized"}
    assert_normalized(model, a, b)


def test_channels_last_stays_channels_last():
    model = seed_net().to(memory_format=torch.channels_last)
    x = torch.rand(8, 1, 28, 28).to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    assert lsuv_(model, x).ok
    assert [p.stride() for p in model.parameters()] == strides
    assert_normalized(model, x)


class Backwards(nn.Module):
    """Registered in the opposite order of execution."""

    def __init__(self):
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(6, 8)

    def forward(self, x):
        return self.last(self.middle(self.first(x).relu_()).relu_())


def test_order_of_execution_counts_not_order_of_registration():
    model, x = Backwards(), torch.randn(32, 6)
    assert [row.name for row in lsuv_(model, x)] == ["first", "middle", "last"]
    assert_normalized(model, x)


# -- statuses -------------------------------------------------------------------------------------------------------------


def test_without_a_bias_the_std_is_set_and_the_mean_reported():
    model, x = mlp(8, 16, 4, bias=False), torch.randn(32, 8) + 1
    report = lsuv_(model, x)
    assert {(row.status, row.reason) for row in report} == {("no_bias", "no bias")}
    assert report.ok
    assert_normalized(model, x, mean=False)
    assert report["0"].mean_after == pytest.approx(moments_of(model, x)["0"][0])
    assert model[0].bias is None


def test_a_zero_layer_is_left_alone_and_excused():
    model, x = mlp(8, 16, 4), torch.randn(32, 8)
    nn.init.zeros_(model[2].weight)
    bias = model[2].bias.clone()
    report = lsuv_(model, x)
    assert (report["2"].status, report["2"].reason) == ("dead", "its weight is all zeros")
    assert report.ok
    assert torch.equal(model[2].bias, bias)
    assert not model[2].weight.any()


def test_a_layer_that_gets_zeros_only_is_dead_and_not_excused():
    model, x = mlp(8, 16, 4), torch.randn(32, 8)
    model[1] = nn.Threshold(1e9, 0.0)
    before = copy.deepcopy(model[2].state_dict())
    report = lsuv_(model, x)
    assert (report["2"].status, report["2"].reason) == ("dead", "its input is all zeros")
    assert not report.ok
    assert all(torch.equal(before[key], value) for key, value in model[2].state_dict().items())


def test_a_constant_output_is_dead():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), torch.randn(8, 4)
    model[0] = nn.Hardtanh(0.1, 0.1 + 1e-7)
    model.insert(0, nn.Linear(4, 4))
    model[1] = nn.Threshold(1e9, 0.3)
    report = lsuv_(model, x)
    assert (report["2"].status, report["2"].reason) == ("dead", "its output does not vary: std is 0")


def test_one_output_value_has_no_std():
    model, x = mlp(8, 16, 1), torch.randn(1, 8)
    report = lsuv_(model, x)
    assert (report["2"].status, report["2"].count) == ("few_values", 1)
    assert not report.ok


def test_tied_linears_are_scaled_once_and_both_centred():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(32, 8)
    model[2].weight = model[0].weight
    report = lsuv_(model, x)
    assert statuses(report) == {"0": "normalized", "2": "tied"}
    assert "'0'" in report["2"].reason
    assert_normalized(model, x, only=["0"])
    assert abs(moments_of(model, x)["2"][0]) < 1e-6
    assert report.ok
    assert model[2].weight is model[0].weight


def test_a_transposed_view_of_a_weight_is_tied_too():
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)), torch.randn(32, 8)
    model[2].weight = nn.Parameter(model[0].weight.detach().t())
    assert statuses(lsuv_(model, x)) == {"0": "normalized", "2": "tied"}
    assert_normalized(model, x, only=["0"])


def test_a_head_that_is_tied_to_the_embedding_before_it_is_not_scaled():
    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.emb, self.body = nn.Linear(8, 11), nn.Embedding(11, 8), nn.Linear(8, 8)
            self.head.weight = self.emb.weight

        def forward(self, tokens):
            return self.head(self.body(self.emb(tokens)))

    model, tokens = LM(), torch.randint(0, 11, (4, 7))
    weight = model.emb.weight.clone()
    report = lsuv_(model, tokens)
    assert statuses(report) == {"body": "normalized", "head": "tied"}
    assert torch.equal(model.emb.weight, weight)
    assert abs(moments_of(model, tokens)["head"][0]) < 1e-6
    assert_normalized(model, tokens, only=["body"])


def test_a_weight_shared_with_a_skipped_layer_is_left_to_it():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(32, 8)
    model[2].weight = model[0].weight
    weight = model[0].weight.clone()
    assert statuses(lsuv_(model, x, skip="2")) == {"0": "tied", "2": "skipped"}
    assert torch.equal(model[0].weight, weight)


def test_a_shared_bias_is_moved_once():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(32, 8)
    model[2].bias = model[0].bias
    report = lsuv_(model, x)
    assert statuses(report) == {"0": "normalized", "2": "no_bias"}
    assert report["2"].reason == "its bias is shared with '0'"
    assert_normalized(model, x, only=["0"])
    assert_normalized(model, x, only=["2"], mean=False)


def test_slices_of_one_buffer_are_not_tied():
    model, x = mlp(8, 8, 8), torch.randn(32, 8)
    flat = torch.randn(128)
    model[0].weight, model[2].weight = nn.Parameter(flat[:64].view(8, 8)), nn.Parameter(flat[64:].view(8, 8))
    assert set(statuses(lsuv_(model, x)).values()) == {"normalized"}
    assert_normalized(model, x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return self.out(x)


def test_a_layer_called_several_times_is_normalised_on_its_first_call():
    model, x = Recurrent(), torch.randn(32, 8)
    report = lsuv_(model, x)
    assert statuses(report) == {"step": "reused", "out": "normalized"}
    assert report["step"].calls == 3
    assert "worst later call" in report["step"].reason
    assert report.ok
    assert_normalized(model, x)


def test_frozen_layers_stay_and_a_frozen_bias_is_allowed_for():
    model, x = mlp(8, 16, 16, 4), torch.randn(32, 8)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    frozen = [p.clone() for p in (model[0].weight, model[0].bias, model[2].bias)]
    report = lsuv_(model, x)
    assert statuses(report) == {"0": "frozen", "2": "no_bias", "4": "normalized"}
    assert report["2"].reason == "its bias is frozen"
    assert report.ok
    assert all(torch.equal(a, b) for a, b in zip(frozen, (model[0].weight, model[0].bias, model[2].bias), strict=True))
    assert_normalized(model, x, only=["2"], mean=False)
    assert_normalized(model, x, only=["4"])


def test_a_frozen_bias_that_alone_varies_too_much_is_unscalable():
    model, x = mlp(8, 16), torch.randn(32, 8)
    nn.init.normal_(model[0].bias, std=5).requires_grad_(False)
    before = model[0].weight.clone()
    assert statuses(lsuv_(model, x)) == {"0": "unscalable"}
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    "select", ["0", ["0"], "[0]", nn.Conv1d, lambda name, module: name == "0", ["0", nn.Conv1d]], ids=str
)
def test_skipped_layers_stay(select):
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(28, 4))
    x = torch.randn(32, 2, 9)
    before = model[0].weight.clone()
    report = lsuv_(model, x, skip=select)
    assert statuses(report) == {"0": "skipped", "2": "normalized"}
    assert report.ok
    assert torch.equal(model[0].weight, before)
    model[0].weight.data.mul_(3)
    assert statuses(lsuv_(model, x, layers=select)) == {"0": "normalized", "2": "skipped"}


def test_a_selection_that_picks_no_weight_layer_is_an_error():
    with pytest.raises(ValueError, match=r"skip='1' picks no weight layer\. There are '0', '2'"):
        lsuv_(mlp(8, 16, 4), torch.randn(4, 8), skip="1")
    with pytest.raises(ValueError, match="no"):
        lsuv_(mlp(8, 16, 4), torch.randn(4, 8), layers="nothing_like_it")


def test_a_layer_that_is_never_called_is_reported():
    model, x = Backwards(), torch.randn(32, 6)
    model.aux = nn.Linear(3, 3)
    report = lsuv_(model, x)
    assert report["aux"].status == "unreached"
    assert report.rows[-1].name == "aux"
    assert not report.ok


def test_attention_is_normalised_projection_by_projection_and_recurrent_layers_are_not_handled():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.attn = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.rnn = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            x = self.proj(x)
            return self.rnn(self.attn(x, x, x)[0])[0]

    report = lsuv_(Net(), torch.randn(4, 5, 4))
    handled = ("proj", "attn.q", "attn.k", "attn.v", "attn.out_proj")
    assert statuses(report) == {**dict.fromkeys(handled, "normalized"), "rnn": "unhandled"}
    assert not report.ok
    assert report["rnn"].reason
    skipped = lsuv_(Net(), torch.randn(4, 5, 4), skip=[nn.MultiheadAttention, "rnn"])
    assert skipped.ok


def test_a_fused_encoder_layer_is_taken_apart():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(4, 5, 8)
    report = lsuv_(model, x)
    assert (report["linear1"].status, report["linear2"].status) == ("normalized", "normalized")
    assert_normalized(model, x, tolerance=1e-5)


def test_unknown_weights_are_never_silently_absent():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.weight

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(Foreign(), nn.Linear(8, 4))
            self.pos = nn.Parameter(torch.randn(4, 4))

    report = lsuv_(Net(), torch.randn(4, 8))
    assert statuses(report) == {"1": "normalized", "0": "unhandled"}
    assert report.unowned == ("pos",)
    assert "pos" in str(report)


def weight_norms():
    old = nn.Linear(8, 16)
    with warnings.catch_warnings(action="ignore"):
        nn.utils.weight_norm(old)
    return {
        "old": old,
        "new": nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)),
        "conv": nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 16, 1)),
    }


@pytest.mark.parametrize("kind", ["old", "new", "conv"])
def test_weight_norm_is_exact_and_written_into_its_originals(kind):
    layer = weight_norms()[kind]
    model, x = nn.Sequential(layer, nn.ReLU(inplace=True)), torch.randn(32, 8, 1)[:, :, : 1 if kind == "conv" else None]
    x = x if kind == "conv" else x[:, :, 0]
    where = [(id(p), p.data_ptr()) for p in model.parameters()]
    assert statuses(lsuv_(model, x)) == {"0": "normalized"}
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == where
    y = model[0](x)
    assert abs(y.mean()) < 1e-6
    assert abs(y.std() - 1) < 1e-6


class Standardized(nn.Conv1d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2), keepdim=True)) / w.std((1, 2), keepdim=True)
        return F.conv1d(x, w, self.bias)


@pytest.mark.parametrize("kind", ["spectral", "old spectral", "orthogonal", "standardized"])
def test_what_does_not_follow_its_weight_is_restored_and_centred(kind):
    layer = Standardized(8, 8, 1) if kind == "standardized" else nn.Conv1d(8, 8, 1)
    if kind == "old spectral":
        nn.utils.spectral_norm(layer)
    elif kind != "standardized":
        wrap = {"spectral": nn.utils.parametrizations.spectral_norm, "orthogonal": nn.utils.parametrizations.orthogonal}
        layer = wrap[kind](layer)
    model, x = nn.Sequential(layer, nn.ReLU()), torch.randn(32, 8, 3) * 3 + 0.2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = lsuv_(model, x)
    assert statuses(report) == {"0": "unscalable"}
    assert "only centred" in report["0"].reason
    assert not report.ok
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if not name.endswith("bias"))
    assert abs(report["0"].mean_after) < 1e-5
    assert report["0"].std_after == pytest.approx(report["0"].std_before, rel=1e-5)


def test_an_activation_within_the_layer_is_solved_with_the_input_at_hand():
    class Softplus(nn.Linear):
        def forward(self, x):
            return F.softplus(super().forward(x))

    class LeakyLinear(nn.Linear):
        def forward(self, x):
            return F.leaky_relu(super().forward(x), 0.2)

    for layer in (Softplus(8, 16), LeakyLinear(8, 16)):
        model, x = nn.Sequential(layer, nn.Linear(16, 4)), torch.randn(64, 8)
        report = lsuv_(model, x)
        assert report.forwards == 2
        assert report["1"].status == "normalized"
        mean, std = moments_of(model, x)["0"]
        assert abs(std - 1) < 1e-3
        if isinstance(layer, Softplus):  # never below 0, so the mean cannot be 0
            assert report["0"].status == "scaled"
        else:
            assert report["0"].status == "normalized"
            assert abs(mean) < 1e-3


def test_a_layer_that_cannot_reach_std_1_is_unscalable():
    class Tanh(nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x).tanh()

    model, x = nn.Sequential(Tanh(8, 16)), torch.randn(64, 8)
    weight = model[0].weight.clone()
    assert statuses(lsuv_(model, x)) == {"0": "unscalable"}
    assert torch.equal(model[0].weight, weight)


def test_a_layer_whose_output_is_no_tensor_is_not_touched():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.out = Pair(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.out(self.pair(x)[0])

    report = lsuv_(Net(), torch.randn(16, 8))
    assert statuses(report) == {"pair": "unscalable", "out": "normalized"}
    assert "tuple" in report["pair"].reason


def test_a_claim_that_the_verifying_pass_does_not_confirm_is_taken_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x @ self.b.weight))  # b's weight is used before b is called

    model, x = Net(), torch.randn(32, 8)
    report = lsuv_(model, x)
    assert report["a"].status == "failed"
    assert "verifying pass measured" in report["a"].reason
    assert not report.ok
    with pytest.raises(InitError, match=r"layer 'a' \(Linear\)"):
        lsuv_(Net(), x, strict=True)


def test_tiny_spread_beside_a_large_mean_is_never_called_normalised_when_it_is_not():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(32, 8) * 1e-6
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    report = lsuv_(model, x)
    mean, std = moments_of(model, x)["0"]
    assert report["0"].status == "unscalable" or (abs(mean) < 1e-3 and abs(std - 1) < 1e-3)


def test_user_hooks_that_change_inputs_and_outputs_are_respected():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(32, 8)
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 3,))
    model[2].register_forward_hook(lambda m, args, out: out * 5)
    assert set(statuses(lsuv_(model, x)).values()) == {"normalized"}
    assert_normalized(model, x)


def test_layers_may_be_called_with_keywords():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, x):
            return self.lin(input=x)

    assert statuses(lsuv_(Net(), {"x": torch.randn(8, 8)})) == {"lin": "normalized"}


# -- strict ---------------------------------------------------------------------------------------------------------------


def test_strict_names_layer_batch_and_remedy_and_restores_everything():
    model, x = nn.Sequential(OrderedDict(body=mlp(3, 4, 4))), torch.randn(8, 3)
    nn.init.zeros_(model.body[2].weight)
    nn.init.zeros_(model.body[2].bias)
    before = everything(model)
    with pytest.raises(InitError) as info:
        lsuv_(model, x, strict=True)
    assert str(info.value) == (
        "layer 'body.2' (Linear): output std is 0 on the given batch of shape (8, 3), LSUV cannot scale it to 1. Use a larger "
        "batch, or leave the layer out with skip=['body.2']."
    )
    assert everything(model) == before
    assert lsuv_(model, x, strict=True, skip=["body.2"]).ok


def test_a_model_that_swallows_errors_does_not_swallow_ours():
    class Swallow(nn.Sequential):
        def forward(self, x):
            try:
                return super().forward(x)
            except RuntimeError:
                return x

    model = Swallow(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(InitError, match="NaN"):
        lsuv_(model, torch.randn(4, 8))


# -- bad input ------------------------------------------------------------------------------------------------------------


def quantized():
    with warnings.catch_warnings(action="ignore"):
        return torch.ao.quantization.quantize_dynamic(mlp(3, 4), {nn.Linear})


def scripted():
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(mlp(3, 4))


class FSDPModule:  # what torch's fully_shard adds to a class
    pass


class Sharded(FSDPModule, nn.Linear):
    pass


BAD_MODELS = {
    "class": (lambda: nn.Linear, TypeError, "did you forget"),
    "function": (lambda: F.relu, TypeError, "wanted a torch.nn.Module"),
    "scripted": (scripted, TypeError, "ScriptModule"),
    "quantised": (quantized, InitError, "quantised"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), InitError, "meta device"),
    "no weight layer": (lambda: nn.Sequential(nn.BatchNorm1d(3)), InitError, "no weight layer"),
    "no parameter": (nn.ReLU, InitError, "no weight layer"),
    "sharded": (lambda: Sharded(3, 3), InitError, "before sharding"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be_initialised_is_refused(case):
    make, error, message = BAD_MODELS[case]
    with pytest.raises(error, match=message):
        lsuv_(make(), torch.randn(4, 3))


X, Y = torch.randn(16, 3), torch.zeros(16)
BAD_DATA = {
    "none": (None, TypeError, "data=None"),
    "number": (3, TypeError, "data=3"),
    "text": ("train", TypeError, "data='train'"),
    "array": (X.numpy(), TypeError, "ndarray"),
    "list of tensors": ([X, Y], TypeError, r"Pass x, or \[\(x, y\)\]"),
    "empty list": ([], DataError, "no batch"),
    "empty batch": (X[:0], DataError, "no sample"),
    "zeros": (torch.zeros(8, 3), InitError, "does not vary"),
    "zero image": (torch.zeros(1, 3), InitError, "does not vary"),
    "constant": (torch.ones(8, 3), InitError, "does not vary"),
    "equal samples": (X[:1].expand(8, 3), InitError, "does not vary"),
    "meta": (torch.empty(8, 3, device="meta"), InitError, "meta device"),
    "nan": (torch.full((8, 3), torch.nan), InitError, r"layer '0' \(Linear\).*So does its input"),
    "inf": (X / 0, InitError, r"layer '0'.*So does its input"),
    "wrong shape": (torch.randn(8, 5), RuntimeError, "shapes cannot be multiplied"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_used_is_refused_and_nothing_changes(case):
    data, error, message = BAD_DATA[case]
    model = mlp(3, 4, 2)
    before = everything(model)
    with pytest.raises(error, match=message):
        lsuv_(model, data)
    assert everything(model) == before
    with pytest.raises(error, match=message):
        layer_stats(model, data)


def test_an_error_of_the_model_says_on_which_batch():
    with pytest.raises(RuntimeError) as info:
        lsuv_(mlp(3, 4), torch.randn(8, 5))
    assert any("batch of shape (8, 5)" in note for note in info.value.__notes__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"center": 1}, "center=1"),
        ({"verify": None}, "verify=None"),
        ({"strict": "yes"}, "strict='yes'"),
        ({"data": X, "inputs": 3}, "inputs=3"),
        ({"inputs": len}, "data="),
    ],
)
def test_options_of_the_wrong_type_are_refused_at_construction(options, message):
    with pytest.raises(TypeError, match=message):
        LSUV(**options)


def test_inputs_picks_from_loaders_only():
    with pytest.raises(TypeError, match="inputs="):
        lsuv_(mlp(3, 4), X, inputs=lambda batch: batch)


# -- forms of data --------------------------------------------------------------------------------------------------------


def test_all_forms_of_data_give_the_same_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.lin(x).relu())

    model = Net()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=16)
    forms = [
        (X, {}),
        ((X,), {}),
        ({"x": X}, {}),
        ([(X, Y)], {}),
        (loader, {}),
        ([{"image": X, "label": Y}], {"inputs": lambda batch: batch["image"]}),
        ([{"image": X, "label": Y}], {"inputs": lambda batch: {"x": batch["image"]}}),
    ]
    nets = [copy.deepcopy(model) for _ in forms]
    for net, (data, options) in zip(nets, forms, strict=True):
        assert lsuv_(net, data, **options).ok
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), nets[0].parameters(), strict=True))


def test_a_loader_is_left_where_it_was():
    dataset = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    model, state = mlp(3, 4), torch.get_rng_state()
    lsuv_(model, loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_stage_takes_the_first_batch_or_its_own_data():
    a, b, x1, x2 = mlp(3, 4), mlp(3, 4), torch.randn(16, 3), torch.randn(16, 3)
    assert LSUV()(a, [x1, x2]).ok
    assert_normalized(a, x1)
    assert LSUV(x2)(b, [x1]).ok
    assert_normalized(b, x2)
    with pytest.raises(DataError, match="no batch"):
        LSUV()(a, [])


def test_the_users_data_is_not_changed_by_a_model_that_begins_in_place():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), torch.randn(16, 8)
    before = x.clone()
    assert lsuv_(model, x).ok
    assert torch.equal(x, before)


# -- surroundings ---------------------------------------------------------------------------------------------------------


def test_nothing_but_weights_and_biases_changes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.drop = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.5)
            self.lin = nn.Linear(28, 4)
            self.register_buffer("calls", torch.zeros(1), persistent=False)

        def forward(self, x):
            self.calls += 1
            x = F.dropout(x, 0.1)  # draws from the global generator, whatever the mode
            return self.lin(self.drop(self.bn(self.conv(x))).flatten(1))

    model = Net()
    model.bn.eval()
    model(torch.randn(4, 2, 9)).sum().backward()
    model.conv.register_forward_hook(lambda *_: None)
    before = everything(model)
    report = lsuv_(model, torch.randn(8, 2, 9, generator=torch.Generator()))
    assert report.ok
    after = everything(model)
    may = {"conv.weight", "conv.bias", "lin.weight", "lin.bias"}
    for old, new in zip(before.pop("tensors"), after.pop("tensors"), strict=True):
        assert old[:3] == new[:3]
        assert old[3] == new[3] or old[0] in may
    assert before == after


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_surrounding_grad_mode_does_not_matter(context):
    model, x = mlp(8, 16, 4), torch.randn(32, 8)
    with context():
        assert lsuv_(model, x).ok
    assert_normalized(model, x)
    model(x).sum().backward()


def test_data_made_in_inference_mode_will_do():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4))
    with torch.inference_mode():
        x = torch.randn(32, 8)
    assert lsuv_(model, x).ok


def test_autocast_outside_is_switched_off_and_autocast_inside_is_coped_with():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(16, 32), nn.Linear(32, 8)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.out(self.lin(x).relu())

    model, x = mlp(8, 16, 4), torch.randn(32, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert lsuv_(model, x).ok
    assert_normalized(model, x)
    model, x = Inside(), torch.randn(64, 16)
    assert set(statuses(lsuv_(model, x)).values()) == {"normalized"}
    assert_normalized(model, x, tolerance=1e-2)


def test_wrappers_are_unwrapped():
    model, x = mlp(8, 16, 4), torch.randn(32, 8)
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    report = lsuv_(wrapped, x)
    assert [row.name for row in report] == ["0", "2"]
    assert_normalized(model, x)


def test_a_compiled_part_runs_eagerly():
    model, x = nn.Sequential(nn.Linear(8, 8), torch.compile(mlp(8, 16, 4), backend="eager")), torch.randn(32, 8)
    with torch.no_grad():
        model(x)  # now it is compiled
    assert set(statuses(lsuv_(model, x)).values()) == {"normalized"}


def test_gradient_checkpointing_does_not_matter():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = mlp(8, 16, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False))

    model, x = Net(), torch.randn(32, 8)
    assert lsuv_(model, x).ok
    assert_normalized(model, x)


def test_lazy_modules_are_shaped_first_and_lazy_again_after_an_error():
    def lazy():
        return nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.Flatten(), nn.LazyLinear(4), nn.ReLU())

    model, x = lazy(), torch.randn(8, 2, 9)
    state = torch.get_rng_state()
    report = lsuv_(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert statuses(report) == {"0": "normalized", "3": "normalized"}
    assert report.forwards == 3
    assert_normalized(model, x)

    model = lazy()
    model.append(nn.Linear(99, 1))  # does not fit
    weight = model[0].weight
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        lsuv_(model, x)
    assert type(model[0]) is nn.LazyConv1d
    assert model[0].weight is weight
    assert type(weight) is UninitializedParameter
    assert model[1].has_uninitialized_params()
    assert lsuv_(model[:-1], torch.randn(8, 3, 7)).ok  # it can take any shape again


def test_user_hooks_survive_an_error_and_can_still_be_removed():
    model = mlp(8, 8, 8)
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model[2].weight.fill_(torch.inf)
    with pytest.raises(InitError, match=r"layer '2' \(Linear\).*So do its parameters"):
        lsuv_(model, torch.randn(4, 8))
    seen.clear()
    model[0](torch.randn(1, 8))
    assert seen == [1]
    handle.remove()
    model[0](torch.randn(1, 8))
    assert seen == [1]


@pytest.mark.parametrize("kth", range(1, 9))
def test_ctrl_c_at_any_layer_leaves_everything_as_before(kth):
    class Bomb(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(1), persistent=False)

        def forward(self, x):
            self.state += 1
            torch.rand(1)
            Bomb.calls += 1
            if Bomb.calls == kth:
                raise KeyboardInterrupt
            return x.relu_()

    model = nn.Sequential(
        nn.Linear(6, 6), Bomb(), nn.Linear(6, 6), Bomb(), nn.Linear(6, 6), Bomb(), nn.Linear(6, 2), Bomb()
    )
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        lsuv_(model, torch.randn(8, 6, generator=torch.Generator()))
    assert everything(model) == before


def test_an_overflow_in_half_precision_is_an_error_not_a_success():
    model = mlp(64, 64).half()
    with torch.no_grad():
        model[0].weight.fill_(60000)
    with pytest.raises(InitError, match=r"too large for torch.float16"):
        lsuv_(model, torch.rand(8, 64).half())


# -- layer_stats ----------------------------------------------------------------------------------------------------------


def test_layer_stats_measures_and_changes_nothing():
    model, x = Backwards(), torch.randn(16, 6)
    before = everything(model)
    stats = layer_stats(model, x)
    assert everything(model) == before
    assert [row.name for row in stats] == ["first", "middle", "last"]
    for name, (m, s) in moments_of(model, x).items():
        assert (stats[name].mean_before, stats[name].std_before) == (
            pytest.approx(m, abs=1e-7),
            pytest.approx(s, rel=1e-6),
        )
    assert len(layer_stats(model, x, layers="first")) == 1
    lines = str(stats).splitlines()
    assert lines[0].split() == ["layer", "class", "µ", "σ"]
    assert lines[1].split()[:2] == ["first", "Linear"]
