"""LSUV over several batches: as if they were one, however they are cut and gone through, and nothing else is touched."""

import copy
import random
import signal
import threading
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from lsuv_nets import CLAIMS, bits, mlp, statuses
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from minitrain import BatchLoader, Callback, DataLoaders, Learner
from minitrain.errors import DataError, InitError
from minitrain.init import LSUV, layer_stats, lsuv_

STRATEGIES = ["lock-step", "streaming", "auto"]
CUTS = [2, 7, 24]
MANY = ["lock-step", "streaming"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def snapshot(model):
    """Whatever may change, in the model and around it."""
    modules = list(model.modules())
    return {
        "tensors": [
            (n, id(t), t.data_ptr(), bits(t))
            for n, t in [*model.named_parameters(), *model.named_buffers()]
            if t.numel()
        ],
        "modules": [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks), sorted(vars(m))) for m in modules],
        "grads": [None if p.grad is None else (id(p.grad), bits(p.grad)) for p in model.parameters()],
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "threads": set(threading.enumerate()),
        "torch's modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
    }


def pairs(x, n):
    """The samples in `n` batches, each with a target that nobody needs."""
    return [(part, torch.zeros(len(part))) for part in x.tensor_split(n)]


def oracle(model, batches, *, norms_in_training=False):
    """Mean and std of each layer's first output over the union of the batches, in float64, by hooks of its own."""
    model, found = copy.deepcopy(model).double().eval(), {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            module.register_forward_hook(lambda m, i, y, n=name: found.setdefault(n, []).append(y.clone()) and None)
        if norms_in_training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    with torch.no_grad():
        for x in batches:
            model(x.double())
    values = {name: torch.cat([y.flatten() for y in ys]) for name, ys in found.items()}
    return {name: (y.mean().item(), y.std().item()) for name, y in values.items()}


def assert_same_weights(a, b, tolerance=1e-6):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# -- nets -------------------------------------------------------------------------------------------------------------


def conv_net():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3, 2, groups=2, bias=False), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(64, 5)),
    )


def norm_net(**options):
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, **options), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, **options), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(150, 8), nn.BatchNorm1d(8, **options), nn.Dropout(0.5), nn.Linear(8, 3)),
    )


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(9, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(9, 3, batch_first=True), nn.Linear(9, 4)

    def forward(self, x):
        return self.out(x + self.attn(x, x.flip(1), x * 2, need_weights=False)[0])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(4))
        self.head = nn.Linear(9, 2)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (9,))).relu()
        return self.head(x.mean(1))


class Functional(nn.Module):
    """Weights that are used by themselves, a layer that is called twice, a tied one."""

    def __init__(self):
        super().__init__()
        self.qkv, self.twice, self.tied = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
        self.tied.weight = self.twice.weight
        self.kernel = nn.Parameter(torch.randn(4, 9))

    def forward(self, x):
        x = F.linear(x, self.qkv.weight, self.qkv.bias).tanh()
        x = self.twice(self.twice(x).relu()).relu()
        return F.linear(self.tied(x), self.kernel)


def weight_normed():
    model = mlp(9, 12, 6, 3)
    for i in (0, 2):
        nn.utils.parametrizations.weight_norm(model[i])
    return model


# name: (net, shape of one sample)
NETS = {
    "conv": (conv_net, (1, 9, 9)),
    "batch norm": (norm_net, (1, 9, 9)),
    "batch norm without running statistics": (lambda: norm_net(track_running_stats=False), (1, 9, 9)),
    "transformer": (transformer, (5, 9)),
    "attention": (Attention, (5, 9)),
    "residual": (Residual, (5, 9)),
    "functional": (Functional, (5, 9)),
    "weight norm": (weight_normed, (9,)),
}


def make(net, n=48):
    function, shape = NETS[net]
    return function(), torch.randn(n, *shape) + 0.3


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("net", "mode"), [(net, mode) for net in NETS for mode in ("eval", "batch")[: 1 + ("norm" in net)]]
)
def test_however_the_data_is_cut_the_weights_are_the_same(net, mode, strategy):
    model, x = make(net)
    whole = copy.deepcopy(model)
    expected = lsuv_(whole, x, mode=mode)
    for n in CUTS if strategy != "auto" else [7]:
        cut = copy.deepcopy(model)
        report = lsuv_(cut, pairs(x, n), batches="all", mode=mode, strategy=strategy)
        assert_same_weights(cut, whole)
        assert statuses(report) == statuses(expected)
        assert [row.name for row in report] == [row.name for row in expected]
        assert [row.calls for row in report] == [row.calls for row in expected]
        assert [row.count for row in report] == [row.count for row in expected]
        assert report.batches == n
        assert report.batch == str(tuple(pairs(x, n)[0][0].shape))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_batches_of_different_sizes_count_by_their_samples(mode, strategy):
    model, x = make("batch norm")
    whole = copy.deepcopy(model)
    lsuv_(whole, x, mode=mode)
    parts = [(part, 0) for part in x.split([1, 2, 30, 15])]
    lsuv_(model, parts, batches="all", mode=mode, strategy=strategy)
    assert_same_weights(model, whole)


OPTIONS = {
    "channel": {"scope": "channel"},
    "activation": {"where": "activation", "layers": nn.modules.conv._ConvNd},
    "uncentred": {"center": False},
    "target": {"target_std": lambda name: 0.5 + len(name)},
    "orthonormal": {"orthonormal": True},
    "some": {"skip": "4"},
    "unverified": {"verify": False},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", OPTIONS)
def test_the_cut_does_not_matter_with_any_option(case, strategy):
    model, x = make("conv")
    nets = [copy.deepcopy(model) for _ in range(3)]
    for net, n in zip(nets, (1, 3, 8), strict=True):
        torch.manual_seed(1)
        report = lsuv_(net, pairs(x, n), batches="all", strategy=strategy, **OPTIONS[case])
        assert report.ok, report
        assert_same_weights(net, nets[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("net", ["conv", "residual", "weight norm", "batch norm without running statistics"])
def test_mean_and_std_over_the_union_are_what_an_oracle_in_float64_measures(net, strategy):
    model, x = make(net)
    report = lsuv_(model, pairs(x, 7), batches="all", strategy=strategy)
    union = [x] if "running" in net else x.tensor_split(7)
    for name, (mean, std) in oracle(model, union, norms_in_training="running" in net).items():
        row = report[name]
        assert row.status in ("normalized", "no_bias")
        assert abs(std - 1) < 1e-6
        assert row.status == "no_bias" or abs(mean) < 1e-6
        assert row.mean_after == pytest.approx(mean, abs=1e-6)
        assert row.std_after == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize("strategy", MANY)
def test_the_projections_of_attention_are_exact_over_the_union(strategy):
    model, x = make("attention")
    report = lsuv_(model, pairs(x, 5), batches="all", strategy=strategy)
    w, b = model.attn.in_proj_weight.detach().double(), model.attn.in_proj_bias.detach().double()
    for i, (which, given) in enumerate({"q": x, "k": x.flip(1), "v": x * 2}.items()):
        y = given.double() @ w[9 * i : 9 * i + 9].T + b[9 * i : 9 * i + 9]
        assert abs(y.mean()) < 1e-6
        assert abs(y.std() - 1) < 1e-6
        assert report[f"attn.{which}"].status == "normalized"


def test_statistics_before_are_those_of_the_union_too():
    x = torch.randn(48, 9) * torch.linspace(0.1, 3, 48)[:, None]
    for strategy in MANY:
        model = mlp(9, 5)
        mean, std = oracle(model, [x])["0"]
        row = lsuv_(model, pairs(x, 6), batches="all", strategy=strategy)["0"]
        assert row.mean_before == pytest.approx(mean, abs=1e-6)
        assert row.std_before == pytest.approx(std, rel=1e-6)
        assert row.count == 48 * 5


@pytest.mark.parametrize("strategy", MANY)
def test_half_precision_is_within_a_hundredth_over_the_union(strategy):
    model, x = mlp(9, 32, 16, 4).bfloat16(), torch.randn(64, 9).bfloat16()
    report = lsuv_(model, pairs(x, 4), batches="all", strategy=strategy)
    assert set(statuses(report).values()) == {"normalized"}
    found = []
    for module in model:
        module.register_forward_hook(lambda m, i, y: found.append(y.double()) if isinstance(m, nn.Linear) else None)
    with torch.no_grad():
        for part in x.tensor_split(4):
            model(part)
    for i in range(3):
        y = torch.cat([part.flatten() for part in found[i::3]])
        assert abs(y.mean()) < 1e-2
        assert abs(y.std() - 1) < 1e-2


def test_layer_stats_takes_several_batches_as_one():
    model, x = make("conv")
    stats = layer_stats(model, pairs(x, 7), batches="all")
    for name, (mean, std) in oracle(model, x.tensor_split(7)).items():
        assert stats[name].mean_before == pytest.approx(mean, abs=1e-6)
        assert stats[name].std_before == pytest.approx(std, rel=1e-6)
    assert stats.forwards == 7


# -- which batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_a_loader_the_first_batches_count_as_many_as_are_wanted(strategy):
    model, x = make("conv")
    whole, loader = copy.deepcopy(model), DataLoader(TensorDataset(x, x), batch_size=8)
    lsuv_(whole, x[:24])
    report = lsuv_(model, loader, batches=3, strategy=strategy)
    assert report.batches == 3
    assert_same_weights(model, whole)


def test_one_batch_is_the_default_and_needs_no_strategy():
    model, x = make("conv")
    whole = copy.deepcopy(model)
    lsuv_(whole, x[:8])
    for options in ({}, {"strategy": "streaming"}, {"strategy": "lock-step", "max_memory": 1}):
        net = copy.deepcopy(model)
        report = lsuv_(net, pairs(x, 6), **options)
        assert (report.batches, report.strategy, report.why, report.forwards) == (1, "one batch", "", 2)
        assert_same_weights(net, whole, tolerance=0)


def test_more_batches_than_there_are_is_an_error_that_says_how_many_there_are():
    model, x = make("conv")
    before = snapshot(model)
    with pytest.raises(DataError, match=r"batches=7, but data holds 3 batches only\. Pass batches=3, or batches='all'"):
        lsuv_(model, pairs(x, 3), batches=7)
    with pytest.raises(DataError, match=r"batches=2, but data holds 1 batch only\. Pass batches=1"):
        lsuv_(model, x, batches=2)
    with pytest.raises(DataError, match=r"batches=7, but batches holds 3 batches only"):
        LSUV(batches=7)(model, list(x.tensor_split(3)))
    with pytest.raises(DataError, match="no batch"):
        LSUV(batches="all")(model, [])
    with pytest.raises(DataError, match="no sample"):
        lsuv_(model, [(x, 0), (x[:0], 0)], batches="all")
    assert snapshot(model) == before


def test_all_of_a_single_tensor_is_that_tensor():
    model, x = make("conv")
    other = copy.deepcopy(model)
    assert lsuv_(model, x, batches="all").strategy == "one batch"
    lsuv_(other, x)
    assert_same_weights(model, other, tolerance=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batches", [1, 3, "all"])
def test_a_stage_takes_no_more_of_an_iterator_than_it_wants(batches, strategy):
    model, x = make("conv")
    whole, stream = copy.deepcopy(model), iter(x.tensor_split(6))
    report = LSUV(batches=batches, strategy=strategy, max_memory=2**30)(model, stream)
    used = 6 if batches == "all" else batches
    assert report.batches == used
    assert len(list(stream)) == 6 - used
    lsuv_(whole, x[: 8 * used])
    assert_same_weights(model, whole)


def test_data_that_can_be_gone_through_once_only_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(torch.randn(9, 9))

    for data in (iter(pairs(torch.randn(12, 9), 3)), DataLoader(Endless(), batch_size=3)):
        with pytest.raises(InitError, match=r"pass the data: LSUV\(data=...\)"):
            lsuv_(mlp(9, 4), data, batches=2)


def test_equal_batches_do_not_vary_and_batches_that_differ_do():
    one, two = torch.ones(1, 3), torch.tensor([[1.0, 2, 3]])
    with pytest.raises(InitError, match="does not vary"):
        lsuv_(mlp(3, 4), [(one, 0)] * 3, batches="all")
    for strategy in MANY:
        report = lsuv_(mlp(3, 4), [(one, 0), (two, 0), (-two, 0)], batches="all", strategy=strategy)
        assert statuses(report) == {"0": "normalized"}
        assert report["0"].count == 12


def test_all_forms_of_batches_give_the_same_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, *, scale=1.0):
            return self.out(self.lin(x).relu()) * scale

    model, x = Net(), torch.randn(12, 3)
    forms = [
        (pairs(x, 3), {}),
        ([(part, 0) for part in x.tensor_split(3)], {"forward": lambda model, x: model(x, scale=2.0)}),
        ([{"image": part} for part in x.tensor_split(3)], {"inputs": lambda batch: batch["image"]}),
        ([{"x": part, "scale": 3.0} for part in x.tensor_split(3)], {"inputs": lambda batch: batch}),
        (DataLoader(TensorDataset(x, x), batch_size=4), {}),
        (BatchLoader(x, x, batch_size=4, shuffle=False), {}),
    ]
    nets = [copy.deepcopy(model) for _ in forms]
    for net, (data, options) in zip(nets, forms, strict=True):
        assert lsuv_(net, data, batches="all", **options).ok
        assert_same_weights(net, nets[0], tolerance=0)


# -- strategy ---------------------------------------------------------------------------------------------------------


def test_the_report_says_how_the_batches_were_gone_through_and_why():
    model, x = make("conv")
    for options, strategy, why in (
        ({}, "lock-step", "lock-step takes about"),
        ({"max_memory": 1}, "streaming", "max_memory is 0 MiB"),
        ({"strategy": "lock-step", "max_memory": 1}, "lock-step", "as asked for"),
        ({"strategy": "streaming"}, "streaming", "as asked for"),
    ):
        report = lsuv_(copy.deepcopy(model), pairs(x, 3), batches="all", **options)
        assert (report.strategy, report.batches) == (strategy, 3)
        assert why in report.why
        assert f"3 batches as one, in {strategy}: {report.why}" in str(report)


def test_memory_decides_by_what_lock_step_would_really_hold():
    model, x = (
        nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 3, padding=1)),
        torch.randn(16, 1, 32, 32),
    )
    held = 16 * 32 * 32 * 32 * 4  # bytes of the first layer's output over all batches
    for max_memory, strategy in (
        (held * 9 // 10, "streaming"),
        (held * 8 + 8 * 2**24, "lock-step"),
    ):  # threads count, too
        report = lsuv_(copy.deepcopy(model), pairs(x, 8), batches="all", max_memory=max_memory)
        assert report.strategy == strategy, report.why


@pytest.mark.parametrize("net", ["conv", "transformer", "batch norm"])
def test_lock_step_takes_one_pass_over_the_batches_and_one_to_verify(net):
    model, x = make(net)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    report = lsuv_(model, pairs(x, 6), batches="all", strategy="lock-step")
    assert (len(passes), report.forwards, report.verified) == (12, 12, True)
    assert "6 forward passes and 6 to verify" in str(report)
    passes.clear()
    report = lsuv_(model, pairs(x, 6), batches="all")
    assert len(passes) == report.forwards == 13  # one more to see how much memory it takes


def test_lock_step_is_always_verified_and_streaming_if_asked_for():
    model, x = make("conv")
    assert lsuv_(copy.deepcopy(model), pairs(x, 3), batches="all", strategy="lock-step", verify=False).verified
    report = lsuv_(copy.deepcopy(model), pairs(x, 3), batches="all", strategy="streaming", verify=False)
    assert not report.verified
    assert all(row.std_after is None for row in report)


def test_streaming_takes_one_partial_pass_a_layer_and_batch():
    model, x, begun, ended = mlp(9, 8, 7, 6, 5), torch.randn(48, 9), [], []
    model.register_forward_pre_hook(lambda *_: begun.append(1) and None)
    model.register_forward_hook(lambda *_: ended.append(1) and None)
    report = lsuv_(model, pairs(x, 6), batches="all", strategy="streaming")
    assert len(begun) == report.forwards == 1 + 4 * 6 + 6  # one to see the order, one a layer, one to verify
    assert len(ended) == 1 + 6 + 6


def test_more_than_256_batches_are_streamed_unless_lock_step_is_asked_for():
    model, x = mlp(3, 4, 2), torch.randn(514, 3)
    whole, forced = copy.deepcopy(model), copy.deepcopy(model)
    lsuv_(whole, x)
    report = lsuv_(model, pairs(x, 257), batches="all")
    assert (report.strategy, report.why) == ("streaming", "there are more than 256 batches")
    assert lsuv_(forced, pairs(x, 257), batches="all", strategy="lock-step").strategy == "lock-step"
    assert_same_weights(model, whole)
    assert_same_weights(forced, whole)


def counted(dataset_class):
    class Counted(dataset_class):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            return super().__getitem__(i)

        __getitems__ = None

    return Counted


@pytest.mark.parametrize("strategy", MANY)
def test_what_does_not_fit_in_memory_is_drawn_again_and_what_does_is_drawn_once(strategy):
    model, x = make("conv")
    whole = copy.deepcopy(model)
    lsuv_(whole, x)
    for max_memory in (2**30, 1):
        net, dataset = copy.deepcopy(model), counted(TensorDataset)(x, x)
        lsuv_(net, DataLoader(dataset, batch_size=8), batches="all", strategy=strategy, max_memory=max_memory)
        assert (dataset.reads == 48) == (max_memory > 1)
        assert_same_weights(net, whole)


# -- nets that lock-step cannot serve ---------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Keeps a tensor on itself from one layer to the next."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.kept = self.a(x)
        h = self.kept.relu()
        return self.b(h + 2 * self.kept)


class Noise(nn.Module):
    """Draws random numbers, whatever the mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(F.dropout(self.b(F.dropout(self.a(x)))))


class Counts(nn.Module):
    """A buffer that each layer moves on, and that the next one uses."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        for layer in self.layers:
            self.count += 1
            x = layer(x) * self.count
        return x


@pytest.mark.parametrize("net", [Keeps, Counts])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 8, 3), (8, 1)], ids=str)
def test_a_net_that_keeps_state_from_layer_to_layer_is_streamed_in_the_end(net, sizes):
    model, x = net(), torch.randn(sum(sizes), 4)
    whole = copy.deepcopy(model)
    lsuv_(whole, x)
    report = lsuv_(model, [(part, 0) for part in x.split(sizes)], batches="all")
    assert report.ok
    assert_same_weights(model, whole)
    if net is Keeps:
        assert not hasattr(model, "kept")
    else:
        assert model.count == 0


def test_undone_lock_step_says_why_and_begins_anew_from_the_same_weights():
    model, x = Keeps(), torch.randn(24, 4)
    streamed = copy.deepcopy(model)
    lsuv_(streamed, pairs(x, 3), batches="all", strategy="streaming")
    for strategy in ("auto", "lock-step"):
        net = copy.deepcopy(model)
        report = lsuv_(net, pairs(x, 3), batches="all", strategy=strategy)
        assert report.strategy == "streaming"
        assert "lock-step was undone, since layer 'b'" in report.why
        assert_same_weights(net, streamed, tolerance=0)
        for name, (mean, std) in oracle(net, x.tensor_split(3)).items():
            assert (abs(mean) < 1e-6, abs(std - 1) < 1e-6) == (True, True), name


def test_a_net_that_draws_random_numbers_is_measured_with_the_same_ones_each_time():
    model, x = Noise(), torch.randn(48, 4)
    report = lsuv_(model, pairs(x, 4), batches="all")
    assert report.ok
    assert report.strategy == "streaming"
    state, found = torch.get_rng_state(), {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, i, y, n=name: found.setdefault(n, []).append(y.double()) and None)
    with torch.no_grad():
        for part in x.tensor_split(4):
            torch.set_rng_state(state)
            model(part)
    for name, ys in found.items():
        y = torch.cat(ys)
        assert abs(y.mean()) < 1e-6, name
        assert abs(y.std() - 1) < 1e-6, name


class Experts(nn.Module):
    """Each sample goes to one of the experts, by its first value; the others are not called, or with nothing."""

    def __init__(self, empty):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 4), nn.ModuleList(mlp(4, 6, 4) for _ in range(3))
        self.empty, self.head = empty, nn.Linear(4, 2)

    def forward(self, x):
        which = x[:, 0].sign().long() + 1
        x, y = self.gate(x), x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            mine = which == i
            if self.empty or mine.any():
                y = y.masked_scatter(mine[:, None], expert(x[mine]))
        return self.head(y)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("empty", [False, True])
def test_experts_that_get_no_sample_of_some_batches_are_exact_over_the_others(empty, strategy):
    model, x = Experts(empty).double(), torch.randn(36, 4).double()
    x[:, 0] = torch.tensor([-1.0, 1.0, 0.0]).repeat_interleave(12)  # the batches are sorted by expert
    whole = copy.deepcopy(model)
    expected = lsuv_(whole, x)
    report = lsuv_(model, pairs(x, 6), batches="all", strategy=strategy)
    assert statuses(report) == statuses(expected) == dict.fromkeys(statuses(report), "normalized")
    assert len(report) == 8
    assert report.strategy == "streaming"
    assert {row.name: row.count for row in report} == {row.name: row.count for row in expected}
    assert_same_weights(model, whole, tolerance=1e-12)


@pytest.mark.parametrize("strategy", MANY)
def test_an_expert_that_no_batch_reaches_is_unreached(strategy):
    model, x = Experts(False), torch.randn(36, 4).abs()
    before = copy.deepcopy(model.experts[0].state_dict())
    report = lsuv_(model, pairs(x, 4), batches="all", strategy=strategy)
    assert {name for name, status in statuses(report).items() if status == "unreached"} == {
        f"experts.{i}.{j}" for i in (0, 1) for j in (0, 2)
    }
    assert all(torch.equal(value, before[name]) for name, value in model.experts[0].state_dict().items())


@pytest.mark.parametrize("strategy", MANY)
def test_batches_that_go_through_the_layers_in_opposite_orders_are_never_wrongly_called_normalised(strategy):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            first, then = (self.a, self.b) if x[0, 0] > 0 else (self.b, self.a)
            return self.head(then(first(x).relu()).relu())

    model, x = Either(), torch.randn(40, 4)
    x[:20, 0], x[20:, 0] = 1, -1
    report = lsuv_(model, pairs(x, 4), batches="all", strategy=strategy)
    for name, (mean, std) in oracle(model, x.tensor_split(4)).items():
        if report[name].status in CLAIMS:
            assert abs(std - 1) < 1e-3, report[name]
            assert abs(mean) < 1e-3, report[name]
        else:
            assert report[name].reason


@pytest.mark.parametrize("strategy", MANY)
def test_a_layer_called_as_often_as_the_batch_demands_counts_its_first_calls(strategy):
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            for _ in range(len(x)):
                x = self.step(x).tanh()
            return self.head(x)

    model, x = Loops(), torch.randn(9, 4)
    report = lsuv_(model, [(part, 0) for part in x.split([2, 4, 3])], batches="all", strategy=strategy)
    assert (report["step"].status, report["step"].calls) == ("reused", 4)
    assert report["head"].status == "normalized"
    y = model.step(x)
    assert abs(y.mean()) < 1e-6
    assert abs(y.std() - 1) < 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layer_that_gets_zeros_only_in_the_first_batch_is_not_dead(strategy):
    model, x = mlp(4, 6, 3), torch.randn(24, 4)
    x[:8] = 0
    whole = copy.deepcopy(model)
    lsuv_(whole, x)
    report = lsuv_(model, pairs(x, 3), batches="all", strategy=strategy)
    assert statuses(report) == {"0": "normalized", "2": "normalized"}
    assert_same_weights(model, whole)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_where_the_activation_differs_from_batch_to_batch_nothing_wrong_is_claimed(strategy):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x)
            return self.b(y.relu() if x[0, 0] > 0 else y.sigmoid())

    model, x = Either(), torch.randn(32, 4)
    x[:16, 0], x[16:, 0] = 1, -1
    weight = model.a.weight.detach().clone()
    report = lsuv_(model, pairs(x, 4), batches="all", strategy=strategy, where="activation")
    assert statuses(report) == {"a": "unscalable", "b": "normalized"}
    assert "differs from batch to batch" in report["a"].reason
    assert torch.equal(model.a.weight, weight)


def test_a_net_that_opens_autocast_is_coped_with_in_threads_as_well():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(16, 32), nn.Linear(32, 8)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.out(self.lin(x).relu())

    for strategy in MANY:
        model = Inside()
        report = lsuv_(model, pairs(torch.randn(64, 16), 4), batches="all", strategy=strategy)
        assert statuses(report) == {"lin": "normalized", "out": "normalized"}


def test_lazy_modules_are_shaped_by_the_first_batch():
    for strategy in MANY:
        model, x = nn.Sequential(nn.LazyConv1d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)), torch.randn(24, 2, 9)
        report = lsuv_(model, pairs(x, 3), batches="all", strategy=strategy)
        assert statuses(report) == {"0": "normalized", "3": "normalized"}
        for mean, std in oracle(model, x.tensor_split(3)).values():
            assert abs(mean) < 1e-6
            assert abs(std - 1) < 1e-6


def test_a_model_that_differentiates_in_its_forward_pass_is_exact_over_the_union():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 1), nn.Linear(4, 3)

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.b(torch.tanh(self.a(x))).sum()
                return self.c(torch.autograd.grad(energy, x)[0])

    model, x = Forces(), torch.randn(32, 4)
    whole = copy.deepcopy(model)
    lsuv_(whole, x)
    for strategy in MANY:
        net = copy.deepcopy(model)
        assert lsuv_(net, pairs(x, 4), batches="all", strategy=strategy).ok
        assert_same_weights(net, whole)


class Reads(nn.Module):
    """Looks at the values of a layer's output in a way of its own before the next layer."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x):
        return self.b(self.how(self.a(x)))


def put(y):
    y[:, 0] = 5.0
    return y


WAYS = {
    "data": lambda y: y.data.relu(),
    "detached": lambda y: y.detach().relu(),
    "numpy": lambda y: torch.from_numpy(y.numpy()).relu(),
    "list": lambda y: torch.tensor(y.tolist()).relu(),
    "item": lambda y: y * (2.0 if y[0, 0].abs().item() >= 0 else 1.0),
    "branch": lambda y: y.relu() if y.abs().sum() > -1 else y,
    "put": put,
    "put into views": lambda y: [y.chunk(2, 1)[0].mul_(3), y][1],
    "in place": lambda y: y.abs_().add_(1),
    "out": lambda y: torch.exp(y, out=torch.empty_like(y)),
    "split": lambda y: torch.cat([part.relu_() for part in y.split(1, dim=1)], 1),
    "iterated": lambda y: torch.stack([row.sigmoid() for row in y]),
    "custom function": lambda y: Double.apply(y),
    "none": lambda y: y,
}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return 2 * y


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("way", WAYS)
def test_in_whatever_way_an_output_is_used_it_is_the_normalised_one(way, strategy):
    model, x = Reads(WAYS[way]), torch.randn(24, 4)
    whole = copy.deepcopy(model)
    lsuv_(whole, x)
    report = lsuv_(model, pairs(x, 3), batches="all", strategy=strategy)
    assert statuses(report) == {"a": "normalized", "b": "normalized"}
    assert_same_weights(model, whole)


# -- nothing is left behind -------------------------------------------------------------------------------------------


@contextmanager
def fault(kth, error):
    """The k-th call of any module raises. Yields the list of calls."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == kth:
            raise error

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def fragile():
    class Draws(nn.Module):
        def forward(self, x):
            torch.rand(1), random.random()
            return x.relu_()

    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), Draws(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    )
    model.append(nn.Linear(4, 2))
    model[1].eval()
    model.register_buffer("calls", torch.zeros(()), persistent=False)
    model.register_forward_hook(lambda module, args, y: module.calls.add_(1) * 0 + y)
    model(torch.randn(6, 4)).sum().backward()
    return model


ERRORS = [ValueError, KeyboardInterrupt, MemoryError]


@pytest.mark.parametrize("options", [{}, {"mode": "batch"}, {"where": "activation"}, {"orthonormal": True}], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fault_in_any_module_at_any_moment_leaves_everything_as_before_and_no_thread(strategy, options):
    model, data = fragile(), pairs(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), 3)
    options = {"batches": "all", "strategy": strategy, **options}
    with fault(0, None) as calls:
        lsuv_(copy.deepcopy(model), data, **options)
    before = snapshot(model)
    step = max(1, len(calls) // 25)
    for kth in range(1, len(calls) + 1, step):
        error = ERRORS[kth % 3]
        with pytest.raises(error), fault(kth, error):
            lsuv_(model, data, **options)
        assert snapshot(model) == before, (kth, error)


def test_a_signal_in_the_midst_of_lock_step_leaves_everything_as_before_and_no_thread():
    class Signals(nn.Module):
        kth = calls = 0

        def forward(self, x):
            Signals.calls += 1
            if Signals.calls == Signals.kth:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return x.relu()

    model = nn.Sequential(nn.Linear(4, 4), Signals(), nn.Linear(4, 4), Signals(), nn.Linear(4, 2))
    before = snapshot(model)
    for kth in range(1, 13):
        Signals.kth, Signals.calls = kth, 0
        with pytest.raises(KeyboardInterrupt):
            lsuv_(model, pairs(torch.randn(12, 4, generator=torch.Generator()), 3), batches="all")
        assert snapshot(model) == before, kth


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("strategy", MANY)
def test_a_fault_in_the_loader_at_any_draw_leaves_everything_as_before(strategy, error):
    class Breaks(TensorDataset):
        def __init__(self, kth, *tensors):
            super().__init__(*tensors)
            self.kth, self.reads = kth, 0

        def __getitem__(self, i):
            self.reads += 1
            if self.reads == self.kth:
                raise error
            return super().__getitem__(i)

        __getitems__ = None

    model, x = fragile(), torch.randn(12, 4)
    options = {"batches": "all", "strategy": strategy, "max_memory": 1}
    whole = Breaks(0, x, x)
    lsuv_(copy.deepcopy(model), DataLoader(whole, batch_size=4, shuffle=True), **options)
    before = snapshot(model)
    for kth in range(1, whole.reads + 1, 4):
        loader = DataLoader(Breaks(kth, x, x), batch_size=4, shuffle=True)
        with pytest.raises(error):
            lsuv_(model, loader, **options)
        assert snapshot(model) == before, kth


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_after_success_too_nothing_but_weights_and_biases_has_changed(strategy):
    model = fragile()
    before = snapshot(model)
    assert lsuv_(model, pairs(torch.randn(12, 4, generator=torch.Generator()), 3), batches="all", strategy=strategy).ok
    after = snapshot(model)
    for old, new in zip(before.pop("tensors"), after.pop("tensors"), strict=True):
        assert old[:3] == new[:3]
        assert old[3] == new[3] or "original0" in old[0] or old[0].split(".")[-1] in ("weight", "bias")
        assert old[3] == new[3] or not old[0].startswith("1."), "a norm is no weight layer"
    assert before == after


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", range(3))
def test_nan_in_one_of_the_batches_names_the_layer_and_restores_everything(where, strategy):
    model, x = mlp(4, 4, 2), torch.randn(12, 4)
    x[4 * where] = torch.nan
    before = snapshot(model)
    with pytest.raises(InitError, match=r"layer '0' \(Linear\): its output holds NaN.*So does its input"):
        lsuv_(model, pairs(x, 3), batches="all", strategy=strategy)
    assert snapshot(model) == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_that_arises_deep_in_the_net_names_the_layer_there(strategy):
    class Root(nn.Module):
        def forward(self, x):
            return x if len(x) > 3 else (x - 100).sqrt()

    model, x = nn.Sequential(nn.Linear(4, 4), Root(), nn.Linear(4, 4)), torch.randn(11, 4)
    before = snapshot(model)
    with pytest.raises(InitError, match=r"layer '2' \(Linear\)"):
        lsuv_(model, pairs(x, 3), batches="all", strategy=strategy)
    assert snapshot(model) == before


# -- loaders ----------------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Integers for pixels, as images have them; each time another view."""

    def __init__(self, how):
        self.x, self.how = torch.randint(0, 256, (24, 1, 9, 9)).float() * torch.arange(1.0, 10), how

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.how(self.x[i]), 0


FRESH = random.SystemRandom()
HOWS = {
    "noise": lambda x: x + FRESH.random(),
    "scale": lambda x: x * FRESH.uniform(0.5, 2),
    "flip": lambda x: x.flip(-1) if FRESH.random() < 0.5 else x,
    "crop": lambda x: F.pad(x, (1, 1, 1, 1))[:, FRESH.randrange(3) :, FRESH.randrange(3) :][:, :9, :9],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", HOWS)
def test_a_loader_that_gives_other_data_each_time_is_refused_where_it_has_to_be_gone_through_again(how, strategy):
    model, loader = conv_net(), DataLoader(Augmented(HOWS[how]), batch_size=8)
    before = snapshot(model)
    with pytest.raises(InitError, match=r"batch 0 is another one than before.*random augmentation.*max_memory"):
        lsuv_(model, loader, batches="all", strategy=strategy, max_memory=1)
    assert snapshot(model) == before
    assert lsuv_(model, loader, batches="all", strategy=strategy).ok  # it fits into memory, and is drawn once


def test_augmentation_from_the_global_generators_is_the_same_each_time():
    loader = DataLoader(Augmented(lambda x: x * (1 + torch.rand(1)) + random.random()), batch_size=8, shuffle=True)
    model = conv_net()
    other = copy.deepcopy(model)
    assert lsuv_(model, loader, batches="all", max_memory=1).ok
    assert lsuv_(other, loader, batches="all").ok
    assert_same_weights(model, other)


def test_a_stage_whose_batches_end_early_the_second_time_says_so():
    class Shrinks:
        n = 3

        def __iter__(self):
            n, self.n = self.n, 2
            return iter(torch.ones(n, 5, 3) * torch.randn(5, 1, generator=torch.Generator().manual_seed(0)))

    model = mlp(3, 2)
    before = snapshot(model)
    with pytest.raises(InitError, match=r"gave 3 batches before, and now 2.*Pass a list"):
        LSUV(batches="all", max_memory=1)(model, Shrinks())
    assert snapshot(model) == before


def streams():
    x = torch.arange(24.0)[:, None] + torch.zeros(24, 3)
    generator = torch.Generator().manual_seed(3)
    return {
        "shuffled": DataLoader(TensorDataset(x, x), batch_size=4, shuffle=True),
        "own generator": DataLoader(TensorDataset(x, x), batch_size=4, shuffle=True, generator=generator),
        "augmented": DataLoader(Augmented(lambda x: x.flatten()[:3] + torch.rand(3)), batch_size=4, shuffle=True),
        "from memory": BatchLoader(x, x, batch_size=4, seed=5),
    }


@pytest.mark.parametrize("max_memory", [2**30, 1])
@pytest.mark.parametrize("batches", [1, 3, "all"])
@pytest.mark.parametrize("kind", ["shuffled", "own generator", "augmented", "from memory"])
def test_the_next_batches_of_a_loader_are_the_same_as_without(kind, batches, max_memory):
    def drawn(use):
        torch.manual_seed(2), random.seed(2)
        loader = streams()[kind]
        model = mlp(3, 2)
        if use:
            lsuv_(model, loader, batches=batches, max_memory=max_memory)
        return [[batch[0] for batch in loader] for _ in range(2)]

    for a, b in zip(drawn(False), drawn(True), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- in a Learner -----------------------------------------------------------------------------------------------------

X, Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def train_loader(kind):
    if kind == "memory":
        return BatchLoader(X, Y, batch_size=8)
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)


def learner(init, kind="memory", model=None, **options):
    options = {"progress": False, "seed": 4, "lr": 0.01, **options}
    return Learner(
        model or net(),
        DataLoaders(train_loader(kind), BatchLoader(X, Y, batch_size=8)),
        F.cross_entropy,
        init=init,
        **options,
    )


@pytest.mark.parametrize("kind", ["memory", "torch"])
@pytest.mark.parametrize("batches", [3, "all"])
def test_the_learner_normalises_over_the_batches_that_training_sees_first(batches, kind):
    class Look(Callback):
        def __init__(self):
            self.seen = []

        def before_batch(self, learn):
            if learn.training:
                self.seen.append(learn.xb)

    look, learn = Look(), learner(LSUV(batches=batches), kind)
    learn.initialize()
    weights = copy.deepcopy(learn.model.state_dict())
    assert learn.init_report.batches == (3 if batches == 3 else 5)
    learn.fit(1, cbs=[look])
    model = net()
    model.load_state_dict(weights)
    for name, (mean, std) in oracle(model, look.seen[: learn.init_report.batches]).items():
        assert abs(mean) < 1e-6, name
        assert abs(std - 1) < 1e-6, name


NO_OPS = {
    "skipping LSUV": LSUV(batches=3, skip="*"),
    "skipping LSUV on all": LSUV(batches="all", skip="*", max_memory=1),
    "looking": lambda model, batches: [batch.sum() for batch in batches] and None,
    "drawing": lambda model, batches: next(iter(batches)) is None or None,
}


@pytest.mark.parametrize("kind", ["memory", "torch"])
@pytest.mark.parametrize("case", NO_OPS)
def test_training_is_bit_identical_with_and_without_a_stage_that_changes_nothing(case, kind):
    plain, staged = learner(None, kind), learner(NO_OPS[case], kind)
    plain.fit(2)
    staged.fit(2)
    for key in ("train_loss", "valid_loss"):
        assert [row[key] for row in plain.history] == [row[key] for row in staged.history]
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), staged.model.parameters(), strict=True))


def test_a_second_fit_does_not_normalise_again_and_the_optimiser_holds_the_same_parameters():
    learn = learner(LSUV(batches="all"))
    parameters = list(learn.model.parameters())
    learn.fit(1)
    report = learn.init_report
    weights = [p.detach().clone() for p in parameters]
    learn.opt.param_groups[0]["lr"] = 0.0
    learn.opt.param_groups[0]["weight_decay"] = 0.0
    learn.fit(1)
    assert learn.init_report is report
    assert len(learn.init_reports) == 1
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    assert [id(p) for group in learn.opt.param_groups for p in group["params"]] == [id(p) for p in parameters]
    assert [id(p) for p in learn.model.parameters()] == [id(p) for p in parameters]


def test_an_averaged_model_made_after_initialize_has_the_new_weights():
    learn = learner(LSUV(batches=3))
    before = learn.model[0].weight.detach().clone()
    learn.initialize()
    averaged = torch.optim.swa_utils.AveragedModel(learn.model)
    assert not torch.equal(averaged.module[0].weight, before)
    for p, q in zip(averaged.module.parameters(), learn.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_optimiser_made_before_sees_the_new_weights_too():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    lsuv_(model, pairs(X, 5), batches="all")
    model.eval()(X).sum().backward()
    weight, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    opt.step()
    assert torch.equal(model[0].weight, weight - grad)


def test_a_model_compiled_before_or_afterwards_has_the_new_weights():
    model = mlp(3, 8, 2)
    whole = copy.deepcopy(model)
    lsuv_(whole, X)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(X)
    report = lsuv_(compiled, pairs(X, 5), batches="all")
    assert [row.name for row in report] == ["0", "2"]
    assert_same_weights(model, whole)
    with torch.no_grad():
        assert torch.equal(compiled(X), model(X))
        assert torch.equal(torch.compile(whole, backend="eager")(X), whole(X))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad, "autocast", "device"])
def test_the_surroundings_do_not_matter(context, strategy):
    contexts = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "device": lambda: torch.device("cpu")}
    model, whole = mlp(3, 8, 2), None
    whole = copy.deepcopy(model)
    lsuv_(whole, X)
    with contexts.get(context, context)():
        assert lsuv_(model, pairs(X, 5), batches="all", strategy=strategy).ok
    assert_same_weights(model, whole)
    model(X).sum().backward()


def test_it_works_in_a_thread_that_is_not_the_main_one():
    model, x = make("conv")
    nets = [copy.deepcopy(model) for _ in range(3)]
    lsuv_(nets[2], x)
    for net in nets[:2]:
        thread = threading.Thread(target=lsuv_, args=(net, pairs(x, 6)), kwargs={"batches": "all"})
        thread.start()
        thread.join()  # one after the other: modes and random states are global
    assert_same_weights(nets[0], nets[2])
    assert_same_weights(nets[1], nets[2])


def test_a_warm_process_has_no_more_threads_than_before():
    before, model, x = threading.active_count(), mlp(3, 4), torch.randn(20, 3)
    for _ in range(5):
        lsuv_(model, pairs(x, 10), batches="all", strategy="lock-step")
    assert threading.active_count() == before
