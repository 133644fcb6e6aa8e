import math

import pytest
import torch

from minitrain.moments import Moments, _on_device, flatten, mean_std, moments, squares_sum


def test_moments_of_a_known_tensor():
    stats = moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert stats == Moments(4, 3.0, 14.0)
    assert stats.std == pytest.approx(math.sqrt(14 / 3))


def test_nothing_has_no_mean_and_one_value_no_std():
    empty, one = moments(torch.empty(0, 3)), moments(torch.tensor(5.0))
    assert empty.count == 0
    assert math.isnan(empty.mean)
    assert math.isnan(empty.std)
    assert (one.count, one.mean) == (1, 5.0)
    assert math.isnan(one.std)


@pytest.mark.parametrize("x", [torch.empty(0), torch.tensor([3.0])])
def test_mean_std_of_too_few_values_is_nan_without_a_warning(x):
    mean, std = mean_std(x)
    assert math.isnan(std)
    assert math.isnan(mean) == (x.numel() == 0)


def test_merging_with_nothing_changes_nothing():
    some = moments(torch.arange(5))
    assert some.merge(Moments()) == some
    assert Moments().merge(some) == some


def test_a_tensor_larger_than_a_chunk_is_exact():
    x = torch.randn(2**20 * 2 + 17, generator=torch.Generator().manual_seed(0)) + 1000
    stats = moments(x)
    assert stats.mean == pytest.approx(x.double().mean().item(), rel=1e-12)
    assert stats.std == pytest.approx(x.double().std().item(), rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_show(bad):
    x = torch.tensor([1.0, bad, 3.0])
    assert not math.isfinite(moments(x).mean)
    assert not math.isfinite(moments(x).std)
    assert not any(value.isfinite() for value in mean_std(x))


@pytest.mark.parametrize("function", [moments, mean_std])
@pytest.mark.parametrize(
    "x", [[1.0, 2.0], torch.zeros(3, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.zeros(2, device="meta")]
)
def test_what_has_no_mean_is_refused(function, x):
    with pytest.raises(TypeError, match="wanted a"):
        function(x)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_mean_std_neither_underflows_nor_overflows(scale):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
    mean, std = mean_std(x)
    assert std.item() == pytest.approx(x.double().std().item(), rel=1e-5)
    assert mean.item() == pytest.approx(x.double().mean().item(), rel=1e-4)


@pytest.mark.parametrize("offset", [100.0, 1000.0, 1e5])
def test_a_large_mean_does_not_spoil_the_std(offset):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) + offset
    assert mean_std(x)[1].item() == pytest.approx(x.double().std().item(), rel=1e-4)


def test_half_precision_does_not_overflow():
    x = torch.full((100_000,), 60000.0, dtype=torch.float16)
    x[::2] = -60000
    assert mean_std(x)[1].item() == pytest.approx(60000, rel=1e-2)


def test_results_carry_no_graph_and_have_the_stated_dtype():
    x = torch.ones(4, requires_grad=True) * 2
    assert not any(value.requires_grad for value in mean_std(x))
    assert mean_std(x)[0].dtype == torch.float32
    assert mean_std(x.double())[0].dtype == torch.float64
    assert mean_std(torch.arange(3))[1].dtype == torch.float32


def test_the_order_of_memory_does_not_matter():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    views = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(0, 3),
        x.flip(0),
        x[:, 1:2].expand(-1, 3, 4, 5),
    ]
    for view in views:
        assert moments(view).std == pytest.approx(view.double().std().item())
        assert mean_std(view)[1].item() == pytest.approx(view.double().std().item(), rel=1e-6)


def test_a_channels_last_tensor_is_not_copied():
    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert flatten(x).data_ptr() == x.data_ptr()


def large(n, kind):
    """Many values with which sums in float32 have trouble."""
    normal = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if kind == "equal sign":
        return normal.abs() + 0.1
    if kind == "relu":
        return normal.relu()
    if kind == "sigmoid":
        return (normal * 3).sigmoid()
    if kind == "outlier":
        normal[n // 3] = 1e6
    if kind == "first part differs":  # from which a centre might be taken
        normal *= 1e-3
        normal[: min(n // 2, 2**17)] += 2.7
    if kind == "first part differs and the mean is large":
        return large(n, "first part differs") + 100
    return normal


@pytest.mark.parametrize("n", [1000, 2**17 + 1, 3_000_000])
@pytest.mark.parametrize(
    "kind",
    ["equal sign", "relu", "sigmoid", "outlier", "first part differs", "first part differs and the mean is large"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_std_of_many_values_keeps_its_digits(n, kind, dtype):
    x = large(n, kind).clamp(-6e4, 6e4).to(dtype)
    check_digits(x)


@pytest.mark.parametrize("n", [1000, 1_000_000, 3 * 2**20])
@pytest.mark.parametrize("value", [0.1, 2.735785961, 3.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("other", [-1, 0, 0.5])
def test_mean_std_of_values_of_equal_size_whose_rounding_errors_add_up(n, value, dtype, every, other):
    x = torch.full((n,), value)
    x[::every] *= other
    check_digits(x.to(dtype))


@pytest.mark.parametrize("n", [2, 1000, 1_000_000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1234.5, 1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_constant_has_its_value_for_mean_and_no_spread(n, value, dtype):
    x = torch.full((n,), value).to(dtype)
    for mean, std in (mean_std(x), _on_device(x)):
        assert mean.item() == pytest.approx(x[0].item(), rel=1e-6)
        assert 0 <= std.item() <= 1e-6 * abs(x[0].item())


def check_digits(x):
    exact = moments(x)
    for mean, std in (mean_std(x), _on_device(x)):
        assert std.item() == pytest.approx(exact.std, rel=1e-4)
        assert mean.item() == pytest.approx(exact.mean, abs=1e-6 * (abs(exact.mean) + exact.std))


@pytest.mark.parametrize("n", [0, 1, 1000, 2**13, 2**13 + 1, 2**20, 2**20 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_of_squares_is_close_for_every_length_and_order_of_memory(n, dtype):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    for values in (x[:, 0], x[:, 0].contiguous(), torch.full((n,), 2.735785961, dtype=dtype)):
        assert squares_sum(values).dtype == dtype
        assert squares_sum(values).item() == pytest.approx(values.double().square().sum().item(), rel=1e-5)


def test_the_usual_tensor_is_not_converted_to_float64(monkeypatch):
    def fail(x):
        raise AssertionError("the slow way was taken")

    monkeypatch.setattr("minitrain.moments.moments", fail)
    normal = large(5000, "normal")
    for x in (
        normal,
        normal.relu(),
        normal.sigmoid(),
        normal + 5,
        normal + 1e3,
        normal.half(),
        normal.bfloat16() + 100,
    ):
        mean_std(x)


def test_what_is_not_finite_is_found_at_the_first_look(monkeypatch):
    looks = []
    monkeypatch.setattr("minitrain.moments._sums", lambda *args: looks.append(1) or (math.nan, math.nan))
    mean_std(torch.tensor([1.0, math.nan]))
    assert len(looks) == 1
