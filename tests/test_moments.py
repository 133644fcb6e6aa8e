import math

import pytest
import torch

from minitrain.moments import Moments, mean_std, moments


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
    from minitrain.moments import _values

    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert _values(x).data_ptr() == x.data_ptr()
