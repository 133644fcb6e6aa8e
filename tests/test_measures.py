import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minitrain.measures import FIELDS, _count_on_device, histogram, measure, norm, sample, signal_share
from minitrain.moments import _on_device, mean_std, moments
from minitrain.units import Activity, active_units


def look(x, threshold=0.05, **kwargs):
    return dict(zip(FIELDS, measure(x, threshold, **kwargs).tolist(), strict=True))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_numbers_of_a_known_tensor():
    found = look(torch.tensor([[0.0, 1.0], [0.05, -3.0]]))
    assert found["mean"] == pytest.approx(-0.4875)
    assert found["std"] == pytest.approx(1.73703528)
    assert (found["min"], found["max"], found["nonfinite"], found["near_zero"]) == (-3.0, 1.0, 0.0, 0.5)
    assert found["signal_share"] == pytest.approx((0.05**2 / 2 + 8) / 2 / 1.73703528**2)


def test_of_nothing_only_the_count_is_known():
    for x in (torch.empty(0), torch.empty(3, 0), torch.empty(0, 3, dtype=torch.int64)):
        assert {key for key, value in look(x).items() if value == value} == {"nonfinite"}


def test_of_one_value_there_is_no_spread():
    assert {key for key, value in look(torch.tensor(2.0)).items() if value != value} == {"std", "signal_share"}
    assert {key for key, value in look(torch.tensor([[2]])).items() if value != value} == {"std", "signal_share"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nan_and_infinities_are_counted_and_shown(dtype):
    found = look(torch.tensor([1.0, math.nan, math.inf, -math.inf], dtype=dtype))
    assert found["nonfinite"] == 3
    assert math.isnan(found["min"])
    assert math.isnan(found["max"])
    found = look(torch.tensor([1.0, 2.0, math.inf], dtype=dtype))
    assert (found["min"], found["max"], found["nonfinite"], found["near_zero"]) == (1.0, math.inf, 1.0, 0.0)


def test_values_that_overflow_the_sums_are_not_taken_for_infinite():
    assert look(torch.tensor([3e38, -3e38, 3e38]))["nonfinite"] == 0
    assert look(torch.full((4,), 1e200, dtype=torch.float64))["nonfinite"] == 0


def test_near_zero_looks_at_the_size_and_includes_the_threshold():
    assert look(torch.tensor([-5.0, -0.04, 0.04, 0.25, -0.25, 5.0]), threshold=0.25)["near_zero"] == pytest.approx(
        4 / 6
    )
    assert look(torch.tensor([-1, 0, 1, -128], dtype=torch.int8), threshold=1.0)["near_zero"] == 0.75
    assert look(torch.tensor([True, False]), threshold=0.0)["near_zero"] == 0.5


@pytest.mark.parametrize("features", [17, 34, 85, 7 * 17 * 19])
def test_near_zero_of_many_values_sees_all_features_also_where_their_number_is_a_multiple_of_17(features):
    x = torch.zeros(1000, features)
    x[:, 0] = 1
    assert look(x)["near_zero"] == pytest.approx(1 - 1 / features, abs=0.01)


def test_near_zero_of_many_values_is_that_of_a_sample():
    x = torch.ones(5000)
    x[::17] = 0
    assert look(x)["near_zero"] == 1.0


def test_up_to_4096_values_are_all_looked_at_and_of_more_every_seventeenth():
    assert len(sample(torch.arange(4096))) == 4096
    assert sample(torch.arange(4098)).tolist() == list(range(0, 4098, 17))
    assert sample(torch.arange(17 * 17 * 17)).tolist() == list(range(0, 17**3, 18))
    assert sample(torch.arange(2**24)).tolist() == list(range(0, 2**24, 257))
    assert sample(torch.arange(17 * 512)).tolist() == list(range(0, 17 * 512, 19))


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool]
)
def test_the_rarer_dtypes_are_measured_too(dtype):
    x = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    assert measure(x, 0.05).tolist() == pytest.approx(measure(x.float(), 0.05).tolist())
    assert histogram(x, torch.tensor([0.0, 1.0, 2.0])).tolist() == [0, 1, 3, 0]
    assert active_units(x[:, :1], 1, positive=True).tolist() == [True]
    assert active_units(x[:1], 1, positive=False).tolist() == [False, True]


# -- the share of the signal ------------------------------------------------------------------------------------------


def test_samples_that_are_all_alike_carry_no_signal():
    assert signal_share(randn(1, 50).expand(20, 50)).item() == pytest.approx(0, abs=1e-6)


def test_units_that_differ_in_nothing_but_the_sample_carry_signal_alone():
    assert signal_share(randn(5000, 1)).item() == pytest.approx(1, abs=1e-5)
    assert signal_share(randn(60, 5000)).item() == pytest.approx(1, abs=0.01)


def test_the_share_tells_signal_from_what_is_the_same_for_all_samples():
    assert signal_share(randn(64, 5000) + 3 * randn(5000, seed=1)).item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("shape", [(64, 50), (3, 3), (7, 9), (64, 5000)])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 12345.6, -1e-3, 1e20])
def test_what_does_not_vary_has_no_share_whatever_the_rounding(shape, value):
    assert math.isnan(signal_share(torch.full(shape, value)))


def test_one_sample_has_no_share():
    assert math.isnan(signal_share(randn(1, 50)))
    assert math.isnan(signal_share(randn(50)))
    assert math.isnan(signal_share(torch.tensor(1.0)))


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25])
def test_the_share_neither_underflows_nor_overflows(scale):
    x = randn(16, 30) + randn(30, seed=1)
    assert signal_share(x * scale).item() == pytest.approx(signal_share(x).item(), rel=1e-3)


@pytest.mark.parametrize("offset", [1.0, 100.0, -1e4])
def test_a_large_mean_does_not_spoil_the_share(offset):
    x = (randn(64, 300) + randn(300, seed=1)).double()
    assert signal_share((x + offset).float()).item() == pytest.approx(signal_share(x).item(), abs=1e-4)


def test_the_share_of_millions_of_values_of_equal_size_keeps_its_digits():
    x = torch.full((64, 50_000), 2.735785961 / 4)  # of which the squares are rounded to the same side
    x[:, ::2] *= -1
    x[:9, :5000] *= -1
    x[0, 0] = 1
    assert signal_share(x).item() == pytest.approx(signal_share(x.double()).item(), abs=2e-6)


def test_samples_are_where_batch_dim_says():
    x = randn(6, 5, 4) + randn(6, 1, 4, seed=1)
    assert signal_share(x, 1).item() == pytest.approx(signal_share(x.transpose(0, 1).contiguous()).item())
    assert look(x, batch_dim=1)["signal_share"] == pytest.approx(signal_share(x, 1).item())
    assert signal_share(x, 1).item() < 0.8 < signal_share(x, 0).item()


# -- norm and histogram -----------------------------------------------------------------------------------------------


def test_the_norm_of_known_values():
    for x in (torch.tensor([3.0, 4.0]), torch.tensor([-5.0]), torch.tensor(5.0), torch.tensor([3e-30, 4e-30]) * 1e30):
        assert norm(*mean_std(x), x.numel()).item() == pytest.approx(5, rel=1e-6)
    assert norm(*mean_std(torch.tensor([3e-30, 4e-30])), 2).item() == pytest.approx(5e-30, rel=1e-5)
    assert norm(*mean_std(torch.tensor([3e30, 4e30])), 2).item() == pytest.approx(5e30, rel=1e-5)
    assert math.isinf(norm(*mean_std(torch.tensor([1.0, math.inf])), 2))


def test_a_value_at_an_edge_belongs_to_the_bin_above_and_at_the_last_edge_to_what_lies_over():
    edges = torch.tensor([0.0, 1.0, 2.0])
    values = torch.tensor([-0.0, 0.0, 1.0, 2.0, -1e-30, math.inf, -math.inf, math.nan])
    assert histogram(values, edges).tolist() == [2, 2, 1, 2]
    assert _count_on_device(values, edges).tolist() == [2, 2, 1, 2]


def test_nan_is_in_no_bin_even_where_most_values_are_nan():
    values = torch.tensor([0.1, *[math.nan] * 9, 0.9])
    edges = torch.tensor([0.0, 0.5, 1.0])
    for counts in (histogram(values, edges), _count_on_device(values, edges)):
        assert counts.tolist() == [0, 1, 1, 0]
    assert _count_on_device(values[1:-1], edges).tolist() == [0, 0, 0, 0]


def test_a_histogram_of_nothing_has_empty_bins():
    for x in (torch.empty(0), torch.empty(2, 0), torch.tensor([math.nan])):
        assert histogram(x, torch.tensor([0.0, 1.0])).tolist() == [0, 0, 0]


def test_a_histogram_of_many_values_counts_a_sample():
    counts = histogram(randn(100, 100), torch.linspace(-2, 2, 9))
    assert counts.sum().item() == math.ceil(10_000 / 17)


# -- what measuring leaves alone --------------------------------------------------------------------------------------

KINDS = {
    "float32": lambda: randn(70, 9, 5),
    "float16": lambda: randn(70, 9, 5).half(),
    "float64": lambda: randn(70, 9, 5).double(),
    "int64": lambda: torch.arange(700).reshape(70, 10),
    "bool": lambda: randn(70, 90) > 0,
    "large": lambda: randn(64, 17, 9, 9),
    "channels last": lambda: randn(8, 17, 9, 9).contiguous(memory_format=torch.channels_last),
    "not finite": lambda: torch.tensor([[1.0, math.nan], [math.inf, 2.0]]),
    "no dimensions": lambda: torch.tensor(1.0),
    "empty": lambda: torch.empty(3, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensor_is_left_as_it_was(kind):
    x = KINDS[kind]()
    before = x.clone()
    measure(x, 0.05)
    signal_share(x) if x.numel() else None
    histogram(x, torch.tensor([0.0, 1.0]))
    active_units(x, 1, positive=True)
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))


def test_what_is_measured_carries_no_graph():
    x = randn(5000, 3).requires_grad_() * 2
    assert not measure(x, 0.05).requires_grad
    assert not signal_share(x).requires_grad
    assert not histogram(x, torch.tensor([0.0, 1.0])).requires_grad
    assert not active_units(x, 1, positive=True).requires_grad


def test_autocast_costs_no_digits():
    x = randn(64, 100) + 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = measure(x, 0.05)
    assert within.dtype == torch.float32
    assert within.tolist() == measure(x, 0.05).tolist()


def test_torch_s_defaults_do_not_matter():
    x, edges = randn(64, 100), torch.linspace(-1, 1, 5)
    wanted = measure(x, 0.05), histogram(x, edges), moments(x), Activity(2).add("a", active_units(x, 1, positive=True))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = measure(x, 0.05), histogram(x, edges), moments(x)
            dead = Activity(2).add("a", active_units(x, 1, positive=True))
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip((*found, dead), wanted, strict=True):
        assert one == other if one is found[2] else torch.equal(one, other)
    assert torch.equal(histogram(x, edges.double()), wanted[1])


@pytest.mark.parametrize(
    "x", [[1.0, 2.0], torch.zeros(3, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.zeros(2, device="meta")]
)
def test_what_cannot_be_measured_is_refused(x):
    with pytest.raises(TypeError, match="wanted a"):
        measure(x, 0.05)
    with pytest.raises(TypeError, match="wanted a"):
        histogram(x, torch.tensor([0.0, 1.0]))


# -- on an accelerator ------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Notes every operation that brings something from one device to another."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, out) if isinstance(t, torch.Tensor) and t.ndim}
        if len(devices) > 1:
            self.found.append(str(func))
        return out


def waits(work):
    """Whether the CPU would wait for an accelerator: for a value, for a shape that depends on one, or for a copy."""
    try:
        with FakeTensorMode(), Copies() as copies:
            work()
    except (DataDependentOutputException, DynamicOutputShapeException):
        return True
    return bool(copies.found)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x[x > 0],
        lambda x: torch.bincount(x.long().flatten()),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
    ],
)
def test_a_wait_would_be_noticed(work):
    assert waits(lambda: work(torch.zeros(8, 8, device="cuda")))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_an_accelerator(kind):
    real = KINDS[kind]()
    activity = Activity(3)

    def work():
        x = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cuda")
        row = measure(x, 0.05)
        assert (row.shape, row.device.type) == ((len(FIELDS),), "cuda")
        counts = histogram(x, torch.empty(5, device="cuda"))
        assert (counts.shape, counts.dtype, counts.device.type) == ((6,), torch.float32, "cuda")
        for positive in (True, False):
            for dim in (0, 1, -1):
                dead = activity.add(f"{positive} {dim}", active_units(x, dim, positive))
                assert (dead.shape, dead.device.type) == ((), "cuda")
        assert norm(*mean_std(x), x.numel()).device.type == "cuda"

    assert not waits(work)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "empty"])
def test_an_accelerator_finds_the_same_numbers(kind, monkeypatch):
    x, edges = KINDS[kind](), torch.linspace(-1, 1, 5)
    on_cpu = measure(x, 0.05).tolist(), histogram(x, edges).tolist()
    monkeypatch.setattr("minitrain.moments._on_cpu", _on_device)
    monkeypatch.setattr("minitrain.measures._count_on_cpu", _count_on_device)
    assert measure(x, 0.05).tolist() == pytest.approx(on_cpu[0], rel=1e-5, abs=1e-6, nan_ok=True)
    assert histogram(x, edges).tolist() == on_cpu[1]
