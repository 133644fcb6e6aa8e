"""LSUV on drawn nets: every layer is normalised, as an independent float64 oracle sees it, or has a reason; and nothing else
changes, or after a fault nothing at all."""

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn

from minitrain.init import lsuv_

ACTIVATIONS = {
    "relu": nn.ReLU,
    "in place": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "none": nn.Identity,
}
CLAIMS = {"normalized", "no_bias", "reused"}


@dataclass(frozen=True)
class Block:
    """One weight layer and what surrounds it: plain data, so that a failing net can be read and shrinks."""

    out: int
    kind: str  # "plain", "transposed", "residual", "twice", "detour" (registered before the block in front of it)
    bias: bool
    activation: str
    norm: bool
    dropout: bool
    log_scale: float  # of the weight, base 10
    bias_mean: float
    frozen: bool


blocks = st.builds(
    Block,
    out=st.integers(1, 6),
    kind=st.sampled_from(["plain", "transposed", "residual", "twice", "detour"]),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    norm=st.booleans(),
    dropout=st.booleans(),
    log_scale=st.floats(-6, 6),
    bias_mean=st.sampled_from([0.0, 0.0, 1.0, -30.0]),
    frozen=st.sampled_from([False, False, False, True]),
)


class Net(nn.Module):
    """Blocks in a row, over (batch, 3) or (batch, 3, 6, 5) inputs; execution order need not be registration order."""

    def __init__(self, plan, dims):
        super().__init__()
        self.plan = plan
        width, made = 3, []
        for block in plan:
            out = width if block.kind in ("residual", "twice") else block.out
            layer = nn.Linear(width, out, bias=block.bias) if dims == 0 else self._conv(width, out, block)
            with torch.no_grad():
                layer.weight.mul_(10**block.log_scale)
                if block.bias:
                    layer.bias.add_(block.bias_mean)
            layer.weight.requires_grad_(not block.frozen)
            after = [
                nn.GroupNorm(1, out)
                if block.norm and (out > 1 or dims)
                else nn.Identity(),  # of one value it leaves rounding
                ACTIVATIONS[block.activation](),
                nn.Dropout(0.5 if block.dropout else 0.0),
            ]
            made.append((layer, nn.Sequential(*after)))
            width = out
        order = sorted(range(len(plan)), key=lambda i: i - 1.5 if plan[i].kind == "detour" else i)
        self.layers = nn.ModuleDict({f"n{i}": made[i][0] for i in order})
        self.after = nn.ModuleDict({f"n{i}": made[i][1] for i in order})
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    @staticmethod
    def _conv(width, out, block):
        if block.kind == "transposed":
            return nn.ConvTranspose2d(width, out, 2, bias=block.bias)
        return nn.Conv2d(width, out, 3, padding=1, bias=block.bias)

    def forward(self, x):
        self.calls += 1
        for i, block in enumerate(self.plan):
            layer, after = self.layers[f"n{i}"], self.after[f"n{i}"]
            y = after(layer(x))
            if block.kind == "twice":
                y = after(layer(y))
            x = x + y if block.kind == "residual" else y
        return x


plans = st.lists(blocks, min_size=1, max_size=5).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64])


def build(plan, dims, dtype, batch, input_scale):
    torch.manual_seed(0)
    model = Net(plan, dims).to(dtype)
    x = torch.randn(batch, 3, *(6, 5)[:dims], dtype=dtype) * input_scale
    return model, x


def oracle(model, x):
    """Mean and std of each layer's output on its first call, in float64 throughout, by hooks of its own."""
    model, found = copy.deepcopy(model).double().eval(), {}

    def keep(name):
        return lambda module, args, y: found.setdefault(name, (y.mean().item(), y.std().item())) and None

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        model(x.double())
    return found


def everything(model):
    return {
        "tensors": {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "places": [t.data_ptr() for t in [*model.parameters(), *model.buffers()]],
        "modes": [m.training for m in model.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "grads": [p.grad for p in model.parameters()],
        "rng": torch.get_rng_state().tolist(),
    }


def same(a, b, *, but=()):
    assert all(a[key] == b[key] for key in ("places", "modes", "hooks", "rng"))
    assert all(x is y for x, y in zip(a["grads"], b["grads"], strict=True))
    for name, value in a["tensors"].items():
        assert name in but or torch.equal(value, b["tensors"][name]), name


drawn = {
    "plan": plans,
    "dims": st.sampled_from([0, 2]),
    "dtype": dtypes,
    "batch": st.integers(2, 9),
    "input_scale": st.sampled_from([1.0, 1.0, 1e-3, 1e3]),
    "training": st.booleans(),
}


@given(**drawn)
def test_every_layer_is_normalised_or_has_a_reason(plan, dims, dtype, batch, input_scale, training):
    model, x = build(plan, dims, dtype, batch, input_scale)
    model.train(training)
    report = lsuv_(model, x)
    measured = oracle(model, x)
    assert {row.name for row in report} == set(measured)
    for row in report:
        mean, std = measured[row.name]
        event(row.status)
        if row.status in CLAIMS:
            assert abs(std - 1) < 1e-3, row
            if row.status == "normalized" or (row.status == "reused" and "bias" not in row.reason):
                assert abs(mean) < 1e-3, row
        else:
            assert row.reason, row
        if row.status == "no_bias":
            assert model.get_submodule(row.name).bias is None
        elif row.status == "frozen":
            assert not model.get_submodule(row.name).weight.requires_grad
        elif row.status == "dead":
            assert std < 1e-5 * max(1, abs(mean)) or "input is all zeros" in row.reason
        elif row.status == "unscalable":
            assert std < 1e-3 * abs(mean), row  # the only reason that these layers can have
        else:
            assert row.status in CLAIMS, row


@given(**drawn)
def test_each_weight_is_only_scaled_and_nothing_but_weights_and_biases_changes(
    plan, dims, dtype, batch, input_scale, training
):
    model, x = build(plan, dims, dtype, batch, input_scale)
    model.train(training)
    if any(p.requires_grad for p in model.parameters()):
        model(x).sum().backward()
    before = everything(model)
    lsuv_(model, x)
    own = {f"layers.n{i}.{key}" for i in range(len(plan)) for key in ("weight", "bias")}
    after = everything(model)
    same(before, after, but=own)
    for name in own & after["tensors"].keys():
        if name.endswith("weight"):
            ratio = (after["tensors"][name] / before["tensors"][name]).double()
            ratio = ratio[ratio.isfinite()]
            assert (ratio > 0).all()
            assert ratio.numel() == 0 or (ratio.max() / ratio.min() - 1) < 1e-5


@given(kth=st.integers(1, 12), error=st.sampled_from([KeyboardInterrupt, ValueError, MemoryError]), **drawn)
def test_a_fault_at_any_call_leaves_everything_as_before(kth, error, plan, dims, dtype, batch, input_scale, training):
    model, x = build(plan, dims, dtype, batch, input_scale)
    model.train(training)
    calls = []

    def bomb(*_):
        calls.append(None)
        if len(calls) == kth:
            raise error

    for i in range(len(plan)):
        model.after[f"n{i}"].register_forward_hook(bomb)
    before = everything(model)
    try:
        lsuv_(model, x)
    except error:
        same(before, everything(model))
    else:
        assert len(calls) < kth


@given(plan=plans, dims=st.sampled_from([0, 2]))
def test_a_second_time_finds_what_the_first_one_left(plan, dims):
    model, x = build(plan, dims, torch.float64, 8, 1.0)
    first, second = lsuv_(model, x), lsuv_(model, x)
    for row in first:
        if row.status in CLAIMS:
            assert abs(second[row.name].std_before - 1) < 1e-3
            assert second[row.name].mean_before == pytest.approx(row.mean_after, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(plan=plans, batch=st.integers(4, 9))
def test_half_precision_is_within_a_hundredth_where_it_is_claimed(dtype, plan, batch):
    model, x = build(plan, 0, torch.float32, batch, 1.0)
    for i, block in enumerate(plan):
        with torch.no_grad():
            model.layers[f"n{i}"].weight.div_(10**block.log_scale)  # or half precision could not hold it
    model, x = model.to(dtype), x.to(dtype)
    report = lsuv_(model, x)
    found = {}

    def keep(name):
        return lambda module, args, y: (
            found.setdefault(name, (y.double().mean().item(), y.double().std().item())) and None
        )

    for name, module in model.layers.items():
        module.register_forward_hook(keep(f"layers.{name}"))
    with torch.no_grad():
        model.eval()(x)
    for row in report:
        if row.status in CLAIMS:
            mean, std = found[row.name]
            assert abs(std - 1) < 1e-2
            if row.status == "normalized":
                assert abs(mean) < 1e-2


# -- several batches --------------------------------------------------------------------------------------------------

STRATEGIES = st.sampled_from(["lock-step", "streaming", "auto"])
modes = st.sampled_from(["eval", "batch"])


@dataclass(frozen=True)
class Unit:
    """One step of a net over (batch, 4, 6) inputs: a layer that is met in one way or another, and what is behind it."""

    kind: str
    bias: bool
    activation: str
    norm: bool
    log_scale: float  # of the weights, base 10
    residual: bool


KINDS = ["linear", "called", "own", "cat", "attention", "cross", "sizes", "weight norm", "twice", "conv"]
units = st.builds(
    Unit,
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    norm=st.booleans(),
    log_scale=st.floats(-3, 3),
    residual=st.booleans(),
)
unit_plans = st.lists(units, min_size=1, max_size=4).map(tuple)
cuts = st.lists(st.integers(1, 6), min_size=2, max_size=6)


class Met(nn.Module):
    """A layer, as its kind has it: a module, a weight passed to a function, attention."""

    def __init__(self, unit):
        super().__init__()
        self.unit, kind, bias = unit, unit.kind, unit.bias
        if kind in ("attention", "cross", "sizes"):
            sizes = {"kdim": 3, "vdim": 2} if kind == "sizes" else {}
            self.layer = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True, **sizes)
        elif kind == "own":
            self.matrix, self.offset = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6)) if bias else None
        elif kind == "conv":
            self.layer = nn.Conv1d(4, 4, 3, padding=1, bias=bias)
        else:
            self.layer = nn.Linear(6, 6, bias=bias)
        if kind == "weight norm":
            nn.utils.parametrizations.weight_norm(self.layer)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "bias" not in name and "offset" not in name and "original1" not in name:
                    parameter.mul_(10**unit.log_scale)

    def forward(self, x):
        kind = self.unit.kind
        if kind in ("attention", "cross", "sizes"):
            others = (x, x) if kind == "attention" else (x.flip(1), x * 2)
            return self.layer(x, *((x[..., :3], x[..., :2]) if kind == "sizes" else others))[0]
        if kind == "own":
            return F.linear(x, self.matrix, self.offset)
        if kind == "called":
            return F.linear(x, self.layer.weight, self.layer.bias)
        if kind == "cat":
            bias = None if self.layer.bias is None else torch.cat([self.layer.bias[:3], self.layer.bias[3:]])
            return F.linear(x, self.layer.weight, bias)
        return self.layer(self.layer(x).tanh()) if kind == "twice" else self.layer(x)


class Steps(nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.plan, self.met = plan, nn.ModuleList(map(Met, plan))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) if unit.norm else nn.Identity() for unit in plan)
        self.acts = nn.ModuleList(ACTIVATIONS[unit.activation]() for unit in plan)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        for unit, met, norm, act in zip(self.plan, self.met, self.norms, self.acts, strict=True):
            y = act(norm(met(x)))
            x = x + y if unit.residual else y
        return x


def build_steps(plan, sizes):
    torch.manual_seed(0)
    return Steps(plan).double(), torch.randn(sum(sizes), 4, 6, dtype=torch.float64) + 0.2


class Products(torch.overrides.TorchFunctionMode):
    """An oracle: the first output of each parameter that linear, conv1d or attention multiplies with, by its name."""

    def __init__(self, model):
        super().__init__()
        self.names, self.found = {id(p): name for name, p in model.named_parameters()}, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self._attention(args, kwargs)
        y = func(*args, **kwargs)
        if func in (F.linear, torch.conv1d):
            self.keep(self.names.get(id(args[1])), y)
        return y

    def keep(self, name, y):
        if name is not None:
            self.found.setdefault(name, y.detach().clone())

    def _attention(self, args, kwargs):
        if kwargs["use_separate_proj_weight"]:
            weights = [kwargs[f"{which}_proj_weight"] for which in "qkv"]
            names = [self.names[id(w)] for w in weights]
        else:
            weights = args[5].chunk(3)
            names = [f"{self.names[id(args[5])].removesuffix('in_proj_weight')}{which}" for which in "qkv"]
        biases = (None,) * 3 if args[6] is None else args[6].chunk(3)
        for name, x, w, b in zip(names, args[:3], weights, biases, strict=True):
            self.keep(name, x @ w.T if b is None else x @ w.T + b)


def products(model, x, norms_in_training=False):
    """By the layer's name in the report: its first output, in float64."""
    model = copy.deepcopy(model).eval()
    for norm in model.norms:
        norm.train(norms_in_training)
    with torch.no_grad():
        output, oracle = None, Products(model)
        hooks = []
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                hooks.append(
                    module.register_forward_hook(lambda m, i, y, n=f"{name}.out_proj": oracle.keep(n, y[0]) or None)
                )
            elif nn.utils.parametrize.is_parametrized(module):
                hooks.append(module.register_forward_hook(lambda m, i, y, n=name: oracle.keep(n, y) or None))
        with oracle:
            output = model(x)
        assert output is not None
    renamed = {}
    for name, y in oracle.found.items():
        for which in "qkv":
            name = name.replace(f"{which}_proj_weight", which)
        renamed[name.removesuffix(".weight")] = y
    return renamed


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@given(plan=unit_plans, sizes=cuts, other=cuts, strategy=STRATEGIES, mode=modes)
def test_however_the_data_is_cut_the_weights_and_statuses_are_the_same(plan, sizes, other, strategy, mode):
    model, x = build_steps(plan, sizes)
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    expected = lsuv_(whole, x, mode=mode)
    batches = [(part, 0) for part in x.split(sizes)]
    report = lsuv_(cut, batches, batches="all", mode=mode, strategy=strategy)
    event(report.strategy)
    assert [(row.name, row.status, row.calls, row.count) for row in report] == [
        (row.name, row.status, row.calls, row.count) for row in expected
    ]
    for name, value in weights_of(cut).items():
        torch.testing.assert_close(value, weights_of(whole)[name], rtol=1e-6, atol=1e-9)


@given(plan=unit_plans, sizes=cuts, strategy=STRATEGIES, mode=modes)
def test_layers_met_in_any_way_are_normalised_over_the_union_or_have_a_reason(plan, sizes, strategy, mode):
    model, x = build_steps(plan, sizes)
    before = weights_of(model)
    report = lsuv_(model, [(part, 0) for part in x.split(sizes)], batches="all", strategy=strategy, mode=mode)
    measured = products(model, x, norms_in_training=mode == "batch")
    assert {row.name for row in report} == set(measured)
    for row in report:
        mean, std = measured[row.name].mean(), measured[row.name].std()
        event(row.status)
        if row.status in CLAIMS:
            assert abs(std - 1) < 1e-6, row
            if row.status == "normalized" or (row.status == "reused" and "bias" not in row.reason):
                assert abs(mean) < 1e-6, row
        else:
            assert row.reason, row
            unit = plan[int(row.name.split(".")[1])]
            assert row.status in ("dead", "unscalable"), row
            # a spread that is rounding, or a computed bias whose spread alone is more than 1
            assert std < 1e-3 * max(1e-3, abs(mean)) or (unit.kind == "cat" and "bias" in row.reason), row
    assert weights_of(model).keys() == before.keys()


@given(plan=unit_plans, sizes=cuts, strategy=STRATEGIES)
def test_every_channel_is_normalised_or_the_layer_has_a_reason(plan, sizes, strategy):
    model, x = build_steps(plan, sizes)
    report = lsuv_(model, [(part, 0) for part in x.split(sizes)], batches="all", strategy=strategy, scope="channel")
    measured = products(model, x)
    for row in report:
        y = measured[row.name]
        dim = 1 if plan[int(row.name.split(".")[1])].kind == "conv" else -1
        rows = y.movedim(dim, 0).flatten(1)
        event(row.status)
        if row.status in CLAIMS:
            assert (rows.std(1) - 1).abs().max() < 1e-6, row
            if row.status == "normalized" or (row.status == "reused" and "bias" not in row.reason):
                assert rows.mean(1).abs().max() < 1e-6, row
        else:
            assert row.reason, row
            assert row.status in ("partial", "dead", "unscalable"), row
            if row.status == "partial":
                assert (rows.std(1) < 1e-9 * rows.mean(1).abs()).any(), row


@given(
    plan=unit_plans,
    sizes=cuts,
    strategy=STRATEGIES,
    mode=modes,
    at=st.floats(0, 1),
    error=st.sampled_from([KeyboardInterrupt, ValueError, MemoryError, SystemExit]),
    options=st.sampled_from([{}, {"where": "activation"}, {"scope": "channel"}, {"orthonormal": True}]),
)
def test_a_fault_at_any_call_over_several_batches_leaves_everything_as_before_and_no_thread(
    plan, sizes, strategy, mode, at, error, options
):
    model, x = build_steps(plan, sizes)
    batches = [(part, 0) for part in x.split(sizes)]
    options = {"batches": "all", "strategy": strategy, "mode": mode, **options}
    calls, kth = [], 0

    def bomb(*_):
        calls.append(None)
        if len(calls) == kth:
            raise error

    handle = nn.modules.module.register_module_forward_hook(bomb)
    try:
        lsuv_(copy.deepcopy(model), batches, **options)
        torch.manual_seed(1)
        kth, before, threads = 1 + int(at * (len(calls) - 1)), everything(model), threading.active_count()
        calls.clear()
        torch.manual_seed(1)
        with pytest.raises(error):
            lsuv_(model, batches, **options)
    finally:
        handle.remove()
    same(before, everything(model))
    assert threading.active_count() == threads
    assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0
