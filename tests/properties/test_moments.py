"""Means and standard deviations equal a float64 reference, for every dtype and shape, and however the values are split."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from minitrain.moments import Moments, _on_device, mean_std, moments

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
]


@st.composite
def tensors(draw):
    """A tensor of any real dtype, shape, scale and offset; sometimes transposed, strided or constant."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if dtype.is_floating_point:
        largest = {torch.float16: 2, torch.bfloat16: 25, torch.float32: 25, torch.float64: 100}[dtype]
        x = x * draw(st.sampled_from([0.0, 1.0, 10.0**-largest, 10.0**largest, 0.1]))
        x = x + x.abs().max().item() * draw(st.sampled_from([0, 1, -100])) if x.numel() else x
    else:
        x = x * draw(st.sampled_from([0, 1, 40]))
    x = x.to(dtype)
    if x.ndim > 1 and draw(st.booleans()):
        x = x.transpose(0, -1)
    if x.ndim and draw(st.booleans()):
        x = x[::2]
    return x


def reference(x):
    values = x.double().flatten().tolist()
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    m2 = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(m2 / (len(values) - 1)) if len(values) > 1 else math.nan


def close(a, b, tolerance):
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance


@given(tensors())
def test_moments_are_exact(x):
    stats, (mean, std) = moments(x), reference(x)
    size = abs(mean) + (0 if math.isnan(std) else std)
    assert stats.count == x.numel()
    assert close(stats.mean, mean, 1e-12 * size)
    assert close(stats.std, std, 1e-12 * size)


@given(tensors())
def test_mean_std_keeps_its_accuracy(x):
    true_mean, true_std = reference(x)
    spread = 0 if math.isnan(true_std) else true_std
    for mean, std in (
        mean_std(x),
        _on_device(x.reshape(-1)),
    ):  # the second one is for accelerators, but runs everywhere
        assert close(mean.item(), true_mean, 1e-6 * (abs(true_mean) + spread))
        assert close(std.item(), true_std, 1e-3 * max(spread, abs(true_mean) / 100))


@given(
    n=st.integers(2, 400_000),
    offset=st.sampled_from([0.0, 1.0, 1e3, -1e5]),
    step=st.sampled_from([0.0, 10.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_mean_std_of_large_tensors_even_if_their_parts_differ(n, offset, step, dtype, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) + offset
    x[n // 2 :] += step
    x = x.to(dtype)
    wide = x.double()
    for mean, std in (mean_std(x), _on_device(x)):
        assert close(mean.item(), wide.mean().item(), 1e-6 * (wide.mean().abs() + wide.std()))
        assert close(std.item(), wide.std().item(), 1e-4 * wide.std() + 1e-7 * wide.mean().abs())


@given(tensors())
def test_the_conventions_are_those_of_torch(x):
    if x.numel() > 1:
        size = moments(x).std + abs(moments(x).mean)
        assert close(moments(x).std, x.double().std().item(), 1e-9 * size)


@given(x=tensors(), cuts=st.lists(st.integers(0, 400), max_size=5))
def test_moments_of_the_parts_merge_to_those_of_the_whole(x, cuts):
    flat, whole = x.flatten(), moments(x)
    edges = [0, *sorted(min(cut, flat.numel()) for cut in cuts), flat.numel()]
    merged = Moments()
    for start, end in itertools.pairwise(edges):
        merged = merged.merge(moments(flat[start:end]))
    size = abs(whole.mean) + (0 if math.isnan(whole.std) else whole.std)
    assert merged.count == whole.count
    assert close(merged.mean, whole.mean, 1e-10 * size)
    assert close(merged.std, whole.std, 1e-10 * size)


@given(a=tensors(), b=tensors())
def test_merging_does_not_depend_on_the_order(a, b):
    one, other = moments(a).merge(moments(b)), moments(b).merge(moments(a))
    size = abs(one.mean) + (0 if math.isnan(one.std) else one.std)
    assert one.count == other.count
    assert close(one.mean, other.mean, 1e-10 * size)
    assert close(one.std, other.std, 1e-10 * size)
