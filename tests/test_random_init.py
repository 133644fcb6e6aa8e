"""The random init stages: as torch.nn.init by hand, on every weight layer that can be drawn, or a reason in the report."""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations, prune

import minitrain
from minitrain import (
    LSUV,
    BatchLoader,
    DataError,
    DataLoaders,
    InitError,
    InitStage,
    KaimingNormal,
    Learner,
    Orthogonal,
    XavierNormal,
    Zero,
)
from minitrain.init import lsuv_, register_layer

BY_HAND = [  # a stage, and what it does to one matrix
    (Orthogonal(), nn.init.orthogonal_),
    (Orthogonal(gain=1.5), lambda w: nn.init.orthogonal_(w, 1.5)),
    (XavierNormal(), nn.init.xavier_normal_),
    (XavierNormal(gain=0.5), lambda w: nn.init.xavier_normal_(w, 0.5)),
    (KaimingNormal(), lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
    (KaimingNormal("leaky_relu", "fan_out", 0.2), lambda w: nn.init.kaiming_normal_(w, 0.2, "fan_out", "leaky_relu")),
]
NAMES = ["orthogonal", "orthogonal-gain", "xavier", "xavier-gain", "kaiming", "kaiming-options"]
by_hand = pytest.mark.parametrize(("stage", "fill"), BY_HAND, ids=NAMES)
DRAWING = [Orthogonal, XavierNormal, KaimingNormal]
drawing = pytest.mark.parametrize("make", DRAWING, ids=lambda make: make.__name__)
ALL = [*DRAWING, lambda **options: Zero(**{"layers": "*"} | options)]
family = pytest.mark.parametrize("make", ALL, ids=["Orthogonal", "XavierNormal", "KaimingNormal", "Zero"])


def mlp(*sizes):
    layers = [f for a, b in itertools.pairwise(sizes) for f in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def every_kind():
    """A layer of each kind of torch's; of transposed convolutions and groups torch's own fans hold."""
    return nn.ModuleList(
        [
            nn.Linear(12, 8),
            nn.Bilinear(3, 4, 5),
            nn.Conv1d(4, 6, 3),
            nn.Conv2d(4, 6, 3, groups=2),
            nn.Conv3d(2, 3, 2, bias=False),
            nn.ConvTranspose1d(4, 6, 3),
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            nn.ConvTranspose3d(2, 3, 2),
        ]
    )


class Attended(nn.Module):
    """A self-attention (packed weights) or one with keys and values of other sizes (three weights), and a head."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


def blocks(attn):
    """The four matrices of an attention."""
    packed = attn.in_proj_weight
    q, k, v = packed.chunk(3) if packed is not None else (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
    return {"q": q, "k": k, "v": v, "out_proj": attn.out_proj.weight}


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def statuses(report):
    return {row.name: row.status for row in report}


def assert_same(model, expected):
    for (name, a), (_, b) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def assert_orthonormal(weight, gain=1.0, atol=1e-5):
    matrix = weight.detach().double().flatten(1)
    product = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    torch.testing.assert_close(product, gain**2 * torch.eye(len(product), dtype=torch.float64), atol=atol, rtol=0)


# -- as by hand -------------------------------------------------------------------------------------------------------


@by_hand
def test_a_stage_is_what_torch_nn_init_does_layer_by_layer_in_order_of_registration(stage, fill):
    model = every_kind()
    expected = copy.deepcopy(model)
    torch.manual_seed(3)
    report = stage(model)
    torch.manual_seed(3)
    for layer in expected:
        fill(layer.weight)
    assert_same(model, expected)
    assert set(statuses(report).values()) == {"drawn"}
    assert report.ok
    assert (report.stage, report.of, report.forwards) == (type(stage).__name__, "weights", 0)


@by_hand
def test_the_order_is_that_of_registration_not_of_execution(stage, fill):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.last(self.first(x))

    model = Backwards()
    expected = copy.deepcopy(model)
    torch.manual_seed(0)
    report = stage(model, [torch.randn(2, 3)])
    torch.manual_seed(0)
    torch.randn(2, 3)
    fill(expected.last.weight)
    fill(expected.first.weight)
    assert_same(model, expected)
    assert [row.name for row in report] == ["last", "first"]


@by_hand
def test_the_global_generator_moves_as_by_hand(stage, fill):
    model = mlp(6, 5, 4)
    torch.manual_seed(5)
    stage(model)
    after = torch.rand(1)
    torch.manual_seed(5)
    fill(model[0].weight)
    fill(model[2].weight)
    assert torch.equal(torch.rand(1), after)


@drawing
def test_the_same_seed_gives_the_same_weights_and_another_one_others(make):
    def weights(seed):
        model = Attended()
        torch.manual_seed(seed)
        make()(model)
        return blocks(model.attn)["q"].detach().clone()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(
    ("stage", "std"),
    [
        (XavierNormal(), math.sqrt(2 / (300 + 200))),
        (XavierNormal(gain=3.0), 3 * math.sqrt(2 / (300 + 200))),
        (KaimingNormal(), math.sqrt(2 / 300)),
        (KaimingNormal(mode="fan_out"), math.sqrt(2 / 200)),
        (KaimingNormal("linear"), math.sqrt(1 / 300)),
        (KaimingNormal("leaky_relu", a=1.0), math.sqrt(1 / 300)),
        (Orthogonal(), math.sqrt(1 / 300)),
        (Orthogonal(gain=2.0), 2 * math.sqrt(1 / 300)),
    ],
    ids=repr,
)
def test_the_standard_deviation_is_that_of_the_paper(stage, std):
    model = nn.Linear(300, 200)
    row = stage(model)[""]
    assert row.std_after == pytest.approx(std, rel=0.02)
    assert abs(row.mean_after) < 0.05 * std


@family
def test_the_report_has_mean_and_std_of_each_weight_before_and_after(make):
    model = mlp(6, 5, 4)
    before = model[0].weight.detach().double().clone()
    row = make()(model)["0"]
    after = model[0].weight.detach().double()
    assert (row.name, row.kind, row.count) == ("0", "Linear", 30)
    assert (row.mean_before, row.std_before) == (
        pytest.approx(before.mean().item()),
        pytest.approx(before.std().item()),
    )
    assert (row.mean_after, row.std_after) == (pytest.approx(after.mean().item()), pytest.approx(after.std().item()))


@drawing
def test_nothing_but_weights_changes(make):
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.PReLU())
    before, places = values(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    model.eval()
    make()(model)
    assert changed(model, before) == {"1.weight", "3.weight"}
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None and p.is_leaf for p in model.parameters())


def test_kaiming_keeps_the_order_of_its_arguments():
    assert KaimingNormal("leaky_relu", "fan_out", 0.1, "head") == KaimingNormal(
        nonlinearity="leaky_relu", mode="fan_out", a=0.1, layers="head"
    )
    assert Orthogonal(2.0, "head", "x", True) == Orthogonal(gain=2.0, layers="head", skip="x", include_frozen=True)


def test_a_wrapped_model_is_unwrapped():
    model = mlp(4, 3)
    before = values(model)
    assert statuses(Orthogonal()(nn.DataParallel(model))) == {"0": "drawn"}
    assert changed(model, before) == {"0.weight"}


# -- orthonormal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
def test_orthogonal_makes_rows_or_columns_orthonormal(gain):
    model = every_kind()
    Orthogonal(gain)(model)
    for layer in model:
        assert_orthonormal(layer.weight, gain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_orthogonal_is_that_of_float32_rounded(dtype):
    model = mlp(16, 8, 4).to(dtype)
    torch.manual_seed(0)
    assert Orthogonal()(model).ok
    torch.manual_seed(0)
    for layer in (model[0], model[2]):
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, nn.init.orthogonal_(torch.empty(layer.weight.shape)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@drawing
def test_half_precision_is_drawn(make, dtype):
    model = nn.Sequential(nn.Linear(64, 64), parametrizations.weight_norm(nn.Linear(64, 8))).to(dtype)
    report = make()(model)
    assert report.ok
    assert all(row.std_after == pytest.approx(row.count**-0.5 * 8, rel=0.9) for row in report)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


@by_hand
def test_a_weight_in_channels_last_is_drawn_and_stays_so(stage, fill):
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    stride = model.weight.stride()
    assert stage(model).ok
    assert model.weight.stride() == stride
    if isinstance(stage, Orthogonal):
        assert_orthonormal(model.weight, stage.gain)


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}, {"bias": False}, {"add_bias_kv": True}], ids=repr)
@by_hand
def test_each_projection_of_attention_is_drawn_as_a_matrix_of_its_own(stage, fill, options):
    model = Attended(**options)
    expected = copy.deepcopy(model)
    torch.manual_seed(0)
    report = stage(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in blocks(expected.attn).values():
            fill(block)
    fill(expected.head.weight)
    assert_same(model, expected)
    assert statuses(report) == dict.fromkeys(["attn.q", "attn.k", "attn.v", "attn.out_proj", "head"], "drawn")
    assert report.ok


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}], ids=repr)
def test_orthogonal_makes_q_k_v_and_out_orthonormal_each(options):
    model = Attended(**options)
    Orthogonal()(model)
    for block in blocks(model.attn).values():
        assert_orthonormal(block)


def test_xavier_takes_the_fan_of_the_block_not_of_the_packed_weight():
    attn = nn.MultiheadAttention(128, 4)
    report = XavierNormal()(attn)
    for name in ("q", "k", "v", "out_proj"):
        assert report[name].std_after == pytest.approx(math.sqrt(2 / 256), rel=0.03)
        assert report[name].count == 128 * 128


@drawing
def test_of_a_transformer_every_weight_layer_is_drawn(make):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    report = make()(model)
    assert set(statuses(report).values()) == {"drawn"}
    assert [row.name for row in report][:6] == [
        f"layers.0.{name}"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out_proj", "linear1", "linear2")
    ]


# -- which layers -----------------------------------------------------------------------------------------------------

EVERY = {"attn.q", "attn.k", "attn.v", "attn.out_proj", "head"}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"layers": "head"}, {"head"}),
        ({"layers": nn.MultiheadAttention}, EVERY - {"head"}),
        ({"layers": "attn"}, EVERY - {"head"}),
        ({"layers": "attn.q"}, {"attn.q"}),
        ({"layers": "attn.?"}, {"attn.q", "attn.k", "attn.v"}),
        ({"layers": ["attn.v", "head"]}, {"attn.v", "head"}),
        ({"layers": lambda name, module: name == "head"}, {"head"}),
        ({"skip": "attn.q"}, EVERY - {"attn.q"}),
        ({"skip": ["attn", "head"], "layers": "*"}, set()),
        ({"layers": "attn", "skip": "attn.out_proj"}, {"attn.q", "attn.k", "attn.v"}),
        ({"skip": ()}, EVERY),
        ({"skip": None}, EVERY),
    ],
    ids=str,
)
@family
def test_layers_and_skip_choose_and_the_others_stay(make, options, wanted):
    model = Attended()
    before = {name: block.detach().clone() for name, block in blocks(model.attn).items()}
    report = make(**options)(model)
    done = "zeroed" if report.stage == "Zero" else "drawn"
    assert statuses(report) == {name: done if name in wanted else "skipped" for name in EVERY}
    assert report.ok
    for name, block in blocks(model.attn).items():
        assert torch.equal(block, before[name]) == (f"attn.{name}" not in wanted)


@pytest.mark.parametrize("argument", ["layers", "skip"])
@pytest.mark.parametrize("select", ["haed", nn.LSTM, ["attn", "x"], "attn.w"], ids=str)
@family
def test_a_selection_that_matches_nothing_is_an_error_and_changes_nothing(make, argument, select):
    model = Attended()
    before, state = values(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"there is no module|matches no module"):
        make(**{argument: select})(model)
    assert not changed(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@family
def test_frozen_weights_stay(make):
    model = Attended()
    model.attn.in_proj_weight.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    before = values(model)
    report = make()(model)
    assert {name for name, status in statuses(report).items() if status == "frozen"} == EVERY - {"attn.out_proj"}
    assert report.ok
    assert changed(model, before) - {"attn.out_proj.bias"} == {"attn.out_proj.weight"}


@family
def test_include_frozen_takes_them_too_and_leaves_them_frozen(make):
    model = mlp(4, 3, 2).requires_grad_(False)
    before = values(model)
    assert make(include_frozen=True)(model).ok
    assert changed(model, before) >= {"0.weight", "2.weight"}
    assert not any(p.requires_grad for p in model.parameters())


@by_hand
def test_a_shared_weight_is_drawn_once(stage, fill):
    model = mlp(4, 4, 4, 4)
    model[2].weight = model[0].weight
    expected = copy.deepcopy(model)
    torch.manual_seed(0)
    report = stage(model)
    torch.manual_seed(0)
    fill(expected[0].weight)
    fill(expected[4].weight)
    assert_same(model, expected)
    assert statuses(report) == {"0": "drawn", "2": "tied", "4": "drawn"}
    assert "'0'" in report["2"].reason
    assert report.ok


@family
def test_a_view_of_a_weight_that_was_done_is_tied(make):
    model = mlp(4, 4, 4)
    model[2].weight = nn.Parameter(model[0].weight.detach())
    assert statuses(make()(model))["2"] == "tied"


@family
def test_two_attentions_that_share_their_packed_weight_are_tied_block_by_block(make):
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    found = statuses(make()(model))
    assert {name for name, status in found.items() if status == "tied"} == {"b.q", "b.k", "b.v"}


@family
def test_a_weight_that_is_shared_with_a_layer_left_out_stays(make):
    model = mlp(4, 4, 4)
    model[2].weight = model[0].weight
    before = model[0].weight.detach().clone()
    for options in ({"skip": "2"}, {"layers": "0"}):
        assert statuses(make(**options)(model)) == {"0": "tied", "2": "skipped"}
        assert torch.equal(model[0].weight, before)


class Odd(nn.Module):
    """A class of one's own, with a weight and with another matrix."""

    def __init__(self):
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2, 3))


@family
def test_what_cannot_be_drawn_stays_and_the_report_says_why(make):
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(3, 3),
            "cell": nn.GRUCell(3, 3),
            "odd": Odd(),
            "spectral": parametrizations.spectral_norm(nn.Linear(3, 3)),
            "orthogonal": parametrizations.orthogonal(nn.Linear(3, 3)),
            "pruned": prune.l1_unstructured(nn.Linear(3, 3), "weight", amount=2),
            "complex": nn.Linear(3, 3, dtype=torch.complex64),
        }
    )
    model.train()  # reading a spectral norm's weight would move its buffers
    before, state = values(model), torch.get_rng_state()
    report = make()(model)
    assert statuses(report) == dict.fromkeys(model, "unhandled"), "odd.table is no layer of this class"
    assert not changed(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert "recurrent" in report["lstm"].reason
    assert "recurrent" in report["cell"].reason
    assert "register_layer" in report["odd"].reason
    for name in ("spectral", "orthogonal", "pruned"):
        assert "computed from other parameters" in report[name].reason
    assert not report.ok


@family
def test_a_matrix_of_an_unknown_class_cannot_be_chosen_in_silence(make):
    with pytest.raises(ValueError, match=r"'odd\.table'"):
        make(layers="odd.table")(nn.ModuleDict({"odd": Odd(), "head": nn.Linear(3, 3)}))


@family
def test_an_empty_weight_stays(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(0, 3), nn.Linear(0, 4))
    assert statuses(make()(model)) == {"0": "unhandled", "1": "unhandled"}


# -- classes of one's own ---------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """A product with a weight of shape (inputs, outputs), as in GPT-2, under names of its own."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return x @ self.matrix + self.shift


class Scaled(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return x * self.weight


class Last(Turned):
    """A weight of shape (height, width, inputs, outputs)."""

    def __init__(self):
        super().__init__(3, 4)
        self.matrix = nn.Parameter(torch.randn(5, 2, 3, 4))


class Wrong(Turned):
    pass


register_layer(Turned, weight="matrix", bias="shift", weight_dim=1)
register_layer(Last, weight="matrix", bias="shift", weight_dim=-1)
register_layer(Wrong, weight="matrix", bias="shift", weight_dim=2)
register_layer(Scaled)


@by_hand
def test_a_registered_weight_of_shape_inputs_outputs_is_drawn_transposed(stage, fill):
    model = Turned(12, 5)
    shift = model.shift.detach().clone()
    torch.manual_seed(0)
    report = stage(model)
    torch.manual_seed(0)
    expected = torch.empty(12, 5)
    fill(expected.T)  # as the documentation of torch.nn.init asks for
    assert torch.equal(model.matrix, expected)
    assert torch.equal(model.shift, shift)
    assert report[""].status == "drawn"


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 1000), ("fan_out", 10)])
def test_fan_in_and_fan_out_of_a_transposed_weight_are_not_swapped(mode, fan):
    model = Turned(1000, 10)
    assert KaimingNormal(mode=mode)(model)[""].std_after == pytest.approx(math.sqrt(2 / fan), rel=0.05)


def test_of_a_weight_that_ends_in_inputs_outputs_both_fans_are_right():
    model = Last()
    torch.manual_seed(0)
    KaimingNormal(mode="fan_out")(model)
    std = model.matrix.std().item()
    KaimingNormal(mode="fan_in")(model)
    assert std == pytest.approx(math.sqrt(2 / (4 * 10)), rel=0.25)
    assert model.matrix.std().item() == pytest.approx(math.sqrt(2 / (3 * 10)), rel=0.25)
    Orthogonal()(model)
    assert_orthonormal(model.matrix.movedim(-1, 0))


@drawing
def test_a_registered_weight_that_is_no_matrix_cannot_be_drawn(make):
    report = make()(nn.Sequential(nn.Linear(3, 3), Scaled(3), Wrong(3, 3)))
    assert statuses(report) == {"0": "drawn", "1": "unhandled", "2": "unhandled"}
    assert "1 dimension" in report["1"].reason
    assert "weight_dim=2" in report["2"].reason


def test_a_registered_scale_can_be_zeroed():
    model = nn.Sequential(nn.Linear(3, 3), Scaled(3))
    assert Zero(Scaled)(model)["1"].status == "zeroed"
    assert not model(torch.randn(2, 3)).any()


# -- weight norm ------------------------------------------------------------------------------------------------------


def old_weight_norm(module, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, **options)


norms = pytest.mark.parametrize("norm", [parametrizations.weight_norm, old_weight_norm], ids=["new", "old"])


@pytest.mark.parametrize("dim", [0, 1, None])
@norms
@by_hand
def test_of_weight_norm_the_product_is_what_was_drawn(stage, fill, norm, dim):
    model = nn.Sequential(norm(nn.Linear(6, 4), dim=dim), norm(nn.Conv2d(2, 3, 3), dim=dim))
    places = [p.data_ptr() for p in model.parameters()]
    torch.manual_seed(0)
    report = stage(model)
    torch.manual_seed(0)
    for layer, shape in ((model[0], (4, 6)), (model[1], (3, 2, 3, 3))):
        expected = fill(torch.empty(shape))
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert report.ok
    assert statuses(report) == {"0": "drawn", "1": "drawn"}
    assert report["0"].std_after == pytest.approx(model[0].weight.std().item(), rel=1e-5)
    assert places == [p.data_ptr() for p in model.parameters()]


@norms
def test_the_forward_pass_and_the_gradients_of_weight_norm_are_those_of_the_drawn_weight(norm):
    model, x = norm(nn.Linear(6, 4)), torch.randn(5, 6)
    KaimingNormal()(model)
    weight = model.weight.detach().clone()
    y = model(x)
    torch.testing.assert_close(y, F.linear(x, weight, model.bias))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    copy.deepcopy(KaimingNormal()(norm(nn.Linear(6, 4))))


@norms
@pytest.mark.parametrize("which", [0, 1])
def test_weight_norm_of_which_one_part_is_frozen_stays(norm, which):
    model = norm(nn.Linear(6, 4))
    [p for name, p in model.named_parameters() if name != "bias"][which].requires_grad_(False)
    before = values(model)
    assert KaimingNormal()(model)[""].status == "frozen"
    assert not changed(model, before)


@norms
def test_zero_keeps_the_direction_of_weight_norm_so_that_it_can_learn(norm):
    model = norm(nn.Linear(6, 4))
    assert Zero("*")(nn.Sequential(model))["0"].status == "zeroed"
    y = model(torch.randn(5, 6))
    assert torch.equal(y, torch.zeros(5, 4))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.any() for name, p in model.named_parameters() if name != "bias")


def test_weight_norm_with_something_behind_it_is_unhandled():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    model = parametrizations.weight_norm(nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model, "weight", Double())
    before = values(model)
    assert Orthogonal()(model)[""].status == "unhandled"
    assert not changed(model, before)


# -- zero -------------------------------------------------------------------------------------------------------------


def test_zero_makes_weights_and_biases_zero_and_moves_no_generator():
    model = mlp(4, 3, 2)
    state, before = torch.get_rng_state(), values(model)
    report = Zero(layers="2")(model)
    assert changed(model, before) == {"2.weight", "2.bias"}
    assert torch.equal(torch.get_rng_state(), state)
    assert not model(torch.randn(5, 4)).any()
    assert statuses(report) == {"0": "skipped", "2": "zeroed"}
    assert (report["2"].std_after, report.stage, report.ok) == (0.0, "Zero", True)


def test_zero_of_one_projection_leaves_the_others_and_their_biases():
    model = Attended()
    nn.init.normal_(model.attn.in_proj_bias)
    before = values(model)
    Zero("attn.k")(model)
    weight, bias = model.attn.in_proj_weight.chunk(3), model.attn.in_proj_bias.chunk(3)
    assert not weight[1].any()
    assert not bias[1].any()
    for i in (0, 2):
        assert torch.equal(weight[i], before["attn.in_proj_weight"].chunk(3)[i])
        assert torch.equal(bias[i], before["attn.in_proj_bias"].chunk(3)[i])


def test_a_residual_branch_that_ends_in_a_zeroed_attention_is_not_there():
    model = Attended()
    nn.init.normal_(model.attn.out_proj.bias)
    Zero("attn.out_proj")(model)
    x = torch.randn(2, 5, 8)
    assert not model.attn(x, x, x)[0].any()


def test_zero_leaves_a_frozen_bias_and_says_so():
    model = mlp(4, 3)
    model[0].bias.requires_grad_(False)
    before = values(model)
    report = Zero("0")(model)
    assert changed(model, before) == {"0.weight"}
    assert "bias is frozen" in report["0"].reason
    assert report.ok
    Zero("0", include_frozen=True)(model)
    assert not model[0].bias.any()


def test_zero_does_not_claim_a_computed_bias():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3), "bias", dim=None))
    report = Zero("0")(model)
    assert not model[0].weight.any()
    assert "bias is computed" in report["0"].reason
    assert not report.ok


def test_of_layers_with_one_weight_every_bias_is_zeroed():
    model = mlp(4, 4, 4)
    model[2].weight = model[0].weight
    assert Zero("*")(model).ok
    assert not model[0].bias.any()
    assert not model[2].bias.any()


# -- lazy modules -----------------------------------------------------------------------------------------------------


def lazy_net():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


@by_hand
def test_lazy_modules_are_shaped_by_the_first_batch_and_drawn_as_if_they_had_been_made_so(stage, fill):
    model, x = lazy_net(), torch.randn(2, 3, 5, 5)
    torch.manual_seed(0)
    report = stage(model, [x, torch.randn(1)])
    torch.manual_seed(0)
    torch.randn(1)
    assert torch.equal(model[0].weight, fill(torch.empty(4, 3, 3, 3)))
    assert torch.equal(model[3].weight, fill(torch.empty(2, 36)))
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert report.forwards == 1


@family
def test_lazy_modules_without_a_batch_are_an_error_that_says_what_to_do(make):
    model = lazy_net()
    with pytest.raises(DataError, match=r"lazy modules.*batches holds none\. Pass one: \w+\(\.\.\.\)\(model, \[x\]\)"):
        make()(model)
    assert isinstance(model[0].weight, UninitializedParameter)


@family
def test_a_lazy_layer_that_is_never_called_is_unreached(make):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.LazyLinear(2)

        def forward(self, x):
            return self.used(x)

    report = make()(Unused(), [torch.randn(4, 3)])
    assert report["unused"].status == "unreached"
    assert not report["unused"].ok


@family
def test_batches_are_not_touched_where_nothing_is_lazy(make):
    def batches():
        raise AssertionError
        yield

    assert make()(mlp(3, 2), batches()).forwards == 0


# -- errors -----------------------------------------------------------------------------------------------------------


@by_hand
def test_if_it_raises_the_model_is_as_it_was_to_the_bit(stage, fill, monkeypatch):
    model = nn.Sequential(nn.LazyLinear(3), Attended().attn, parametrizations.weight_norm(nn.Linear(8, 2)))
    done = []
    real = type(stage)._fill

    def failing(self, matrix):
        real(self, matrix)
        done.append(matrix)
        if len(done) == 6:
            raise KeyboardInterrupt

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts[0](x)

    monkeypatch.setattr(type(stage), "_fill", failing)
    before = values(model[1:])
    with pytest.raises(KeyboardInterrupt):
        stage(Net(), [torch.randn(2, 4)])
    assert len(done) == 6
    assert isinstance(model[0], nn.LazyLinear)
    assert isinstance(model[0].weight, UninitializedParameter)
    assert not changed(model[1:], before)


BAD = [
    (lambda: Orthogonal(gain="x"), TypeError, r"gain='x' \(type=str\), wanted a number above 0"),
    (lambda: Orthogonal(gain=True), TypeError, r"gain=True \(type=bool\)"),
    (lambda: Orthogonal(gain=0), ValueError, r"gain=0, wanted a number above 0.*Zero\(layers="),
    (lambda: Orthogonal(gain=-1.0), ValueError, r"gain=-1\.0, wanted"),
    (lambda: XavierNormal(gain=math.nan), ValueError, "gain=nan, wanted"),
    (lambda: XavierNormal(gain=math.inf), ValueError, "gain=inf, wanted"),
    (lambda: XavierNormal(gain=None), TypeError, r"gain=None \(type=NoneType\)"),
    (lambda: KaimingNormal("rleu"), ValueError, "nonlinearity='rleu', wanted a name.*'relu'"),
    (lambda: KaimingNormal(nn.ReLU), ValueError, "nonlinearity=<class.*wanted a name"),
    (lambda: KaimingNormal(mode="fan"), ValueError, "mode='fan', wanted 'fan_in' or 'fan_out'"),
    (lambda: KaimingNormal("leaky_relu", a="x"), TypeError, r"a='x' \(type=str\), wanted the negative slope"),
    (lambda: KaimingNormal("leaky_relu", a=math.nan), ValueError, "a=nan, wanted the negative slope"),
    (lambda: Zero(), TypeError, r"layers=None, wanted the layers to zero, such as Zero\(layers='head'\)"),
    (lambda: Zero(None), TypeError, "layers=None"),
    (lambda: Zero(skip="head"), TypeError, "layers=None"),
    *(
        (lambda make=make: make(include_frozen=1), TypeError, r"include_frozen=1 \(type=int\), wanted True")
        for make in ALL
    ),
    *((lambda make=make: make()(nn.Linear), TypeError, "is a class, wanted an instance") for make in ALL),
    *((lambda make=make: make()(nn.Linear(2, 2, device="meta")), InitError, "meta device") for make in ALL),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_a_bad_argument_is_an_error_that_names_it(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- stages of a run --------------------------------------------------------------------------------------------------


def learner(model, init):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    train = BatchLoader(x, torch.arange(64) % 2, batch_size=32)
    return Learner(model, DataLoaders(train), F.cross_entropy, init=init, seed=1, progress=False)


@family
def test_each_is_an_init_stage_with_a_repr_that_is_code(make):
    stage = make(layers="head")
    assert isinstance(stage, InitStage)
    assert eval(repr(stage), vars(minitrain)) == stage
    with pytest.raises(AttributeError):
        stage.layers = None


@drawing
def test_a_random_stage_and_lsuv_behind_it_compose(make):
    model = mlp(6, 16, 16, 2)
    learn = learner(model, [make(), LSUV()])
    learn.initialize()
    assert [report.stage for report in learn.init_reports] == [make.__name__, "LSUV"]
    assert all(report.ok for report in learn.init_reports)
    for row in learn.init_report:
        assert abs(row.std_after - 1) < 1e-5
        assert abs(row.mean_after) < 1e-5


def test_orthogonal_and_lsuv_without_centering_are_the_paper():
    model = mlp(6, 6, 6, 2)
    learn = learner(model, [Orthogonal(), LSUV(center=False)])
    report = learn.initialize()
    assert report.ok
    for layer, row in zip((model[0], model[2], model[4]), report, strict=True):
        assert row.std_after == pytest.approx(1, abs=1e-5)
        assert_orthonormal(layer.weight * row.std_before, atol=1e-4)


def test_it_is_the_same_as_lsuv_with_orthonormal():
    one, x = mlp(6, 8, 2), torch.randn(32, 6)
    two = copy.deepcopy(one)
    torch.manual_seed(0)
    lsuv_(one, x, orthonormal=True)
    torch.manual_seed(0)
    Orthogonal()(two)
    lsuv_(two, x)
    assert_same(one, two)


def test_zero_behind_lsuv_zeroes_the_head_and_lsuv_behind_zero_leaves_it():
    learn = learner(mlp(6, 8, 2), [KaimingNormal(), LSUV(), Zero("2")])
    learn.initialize()
    assert not learn.model[2].weight.any()
    learn = learner(mlp(6, 8, 2), [KaimingNormal(), Zero("2"), LSUV()])
    assert learn.initialize()["2"].status == "dead"
    assert learn.init_report.ok
    assert not learn.model[2].weight.any()


def test_a_plain_function_is_a_stage_beside_them():
    def halve(model, batches):
        assert next(iter(batches)).shape == (32, 6)
        with torch.no_grad():
            model[0].weight.mul_(0.5)

    model = mlp(6, 4, 2)
    learn = learner(model, [Orthogonal(), halve])
    learn.initialize()
    assert_orthonormal(model[0].weight, 0.5)
    assert_orthonormal(model[2].weight)
    assert learn.init_reports[0].stage == "Orthogonal"
    assert learn.init_reports[1] is None


def test_the_seed_of_the_learner_gives_the_weights():
    weights = []
    for n in (3, 17):
        torch.manual_seed(0)  # the biases stay
        learn = learner(mlp(6, 4, 2), KaimingNormal())
        torch.rand(n)
        learn.initialize()
        weights.append(values(learn.model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_report_prints_and_says_that_it_is_of_weights():
    text = str(Orthogonal(skip="2")(mlp(4, 3, 2)))
    assert "Orthogonal: 2 layers: 1 drawn, 1 skipped; 0 forward passes" in text
    assert "of the weights" in text
