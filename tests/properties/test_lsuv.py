"""LSUV on drawn nets: every layer is normalised, as an independent float64 oracle sees it, or has a reason; and nothing else
changes, or after a fault nothing at all."""

import copy
from dataclasses import dataclass

import pytest
import torch
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
