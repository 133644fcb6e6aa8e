"""What is measured equals a slow reference in plain Python, for every dtype, shape and order of memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitrain.measures import FIELDS, _count_on_cpu, _count_on_device, histogram, measure, norm, sample, signal_share
from minitrain.moments import mean_std
from minitrain.units import Activity, active_units

LARGEST = {torch.float16: 3, torch.bfloat16: 25, torch.float32: 25, torch.float64: 100}  # power of ten
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
DTYPES = [*LARGEST, *INTEGERS, torch.bool]
LAYOUTS = ["plain", "transposed", "strided", "expanded", "channels last", "offset"]


@st.composite
def tensors(draw, min_dims=0, max_dims=4, nonfinite=True):
    """A tensor of any real dtype, shape, order of memory, scale and offset; sometimes constant, sparse or not finite."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([0, *range(1, 8)]), min_size=min_dims, max_size=max_dims))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    kind = draw(st.sampled_from(["normal", "relu", "constant", "two values", "units"]))
    if kind == "relu":
        x = x.relu()
    elif kind == "constant":
        x = torch.full_like(x, 0.1)
    elif kind == "two values":
        x = x.sign()
    elif kind == "units" and x.ndim:  # each of which is nearly constant
        x = x * 0.1 + torch.arange(x.shape[-1])
    if dtype.is_floating_point:
        exponent = LARGEST[dtype]
        x = x * draw(st.sampled_from([1.0, 0.0, 0.05, 10.0**-exponent, 10.0**exponent]))
        if x.numel():
            x = x + x.abs().max() * draw(st.sampled_from([0, 1, -30]))
        x = x.to(dtype)
        if nonfinite and x.numel() and draw(st.booleans()):
            where = draw(st.lists(st.integers(0, x.numel() - 1), max_size=3))
            x.view(-1)[where] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    elif dtype == torch.bool:
        x = x > 0
    else:
        x = (x * draw(st.sampled_from([1, 0, 40, 1e4, 1e9]))).to(torch.int64).to(dtype)  # some wrap around
    return arrange(x, draw(st.sampled_from(LAYOUTS)))


def arrange(x, layout):
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1)
    if layout == "strided" and x.ndim:
        return x[..., ::2]
    if layout == "expanded" and x.ndim and len(x):
        return x[:1].expand(3, *x.shape[1:])
    if layout == "channels last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "offset" and x.ndim:
        return x[1:]
    return x


def numbers(x):
    return x.flatten().tolist()


def moments_of(values):
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def share_of(x, batch_dim=0):
    """The mean variance of the units over the variance of all values, of up to 64 samples."""
    if x.ndim < 2 or x.shape[batch_dim] < 2 or not x.numel():
        return math.nan
    n = x.shape[batch_dim]
    rows = [numbers(x.select(batch_dim, i)) for i in range(0, n, math.ceil(n / 64))]
    everything = [v for row in rows for v in row]
    if not all(map(math.isfinite, everything)) or len(set(everything)) == 1:
        return math.nan
    within = [moments_of(unit)[1] ** 2 for unit in zip(*rows, strict=True)]
    return math.fsum(within) / len(within) / moments_of(everything)[1] ** 2


def same(a, b, tolerance=0.0):
    return (math.isnan(a) and math.isnan(b)) or a == b or abs(a - b) <= tolerance


def test_no_number_of_measure_is_without_a_reference_here():
    assert FIELDS == ("mean", "std", "min", "max", "nonfinite", "near_zero", "signal_share")


@given(x=tensors(), threshold=st.sampled_from([0.0, 0.05, 1.0, 1e-20]))
def test_measure_equals_the_reference(x, threshold):
    row = measure(x, threshold)
    assert row.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert row.shape == (len(FIELDS),)
    found = dict(zip(FIELDS, row.tolist(), strict=True))
    values = numbers(x)
    rounding = 1e-15 if x.dtype == torch.float64 else 1.2e-7
    bad = sum(not math.isfinite(v) for v in values)
    assert found["nonfinite"] == bad
    if bad:
        assert not math.isfinite(found["mean"])
        assert not math.isfinite(found["std"])
    else:
        mean, std = moments_of(values)
        spread = 0 if math.isnan(std) else std
        assert same(found["mean"], mean, 1e-6 * (abs(mean) + spread))
        assert same(found["std"], std, 1e-5 * spread + 1e-6 * abs(mean))
    if not values or any(v != v for v in values):
        assert math.isnan(found["min"])
        assert math.isnan(found["max"])
    else:
        assert same(found["min"], min(values), rounding * abs(min(values)))
        assert same(found["max"], max(values), rounding * abs(max(values)))
    if x.dtype != torch.float64:
        threshold = torch.tensor(threshold).item()  # compared in float32
    near = sum(abs(v) <= threshold for v in values) / len(values) if values else math.nan
    assert same(found["near_zero"], near, 1e-7)
    assert same(found["signal_share"], share_of(x), 1e-4)


@given(x=tensors(min_dims=2, nonfinite=False), data=st.data())
def test_signal_share_equals_the_reference_in_every_dimension(x, data):
    if x.numel():
        dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
        assert same(signal_share(x, dim).item(), share_of(x, dim), 1e-4)


@given(n=st.integers(2, 300), units=st.integers(1, 5), seed=st.integers(0, 99), noise=st.sampled_from([0.1, 1.0, 10.0]))
def test_signal_share_looks_at_no_more_than_64_samples_evenly_spread(n, units, seed, noise):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, units, generator=g) * noise + torch.randn(units, generator=g)
    assert same(signal_share(x).item(), share_of(x), 2e-6)
    x[[i for i in range(n) if i % math.ceil(n / 64)]] = math.nan  # which the others do not touch
    assert same(signal_share(x).item(), share_of(x), 2e-6)


@given(x=tensors(nonfinite=False))
def test_the_norm_follows_from_mean_and_std(x):
    if x.numel():
        wanted = math.hypot(*numbers(x))
        assert same(norm(*mean_std(x), x.numel()).item(), wanted, 1e-5 * wanted)


# -- histograms -------------------------------------------------------------------------------------------------------


def counts_of(values, edges):
    bins = [0] * (len(edges) + 1)
    for v in values:
        if v == v:
            bins[sum(edge <= v for edge in edges)] += 1
    return bins


@st.composite
def edges(draw):
    steps = draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=8))
    return torch.tensor([draw(st.sampled_from([-4.0, 0.0, 1.0])), *steps]).cumsum(0)


@given(x=tensors(), edges=edges())
def test_a_histogram_equals_the_reference(x, edges):
    counts = histogram(x, edges)
    assert (counts.dtype, counts.shape) == (torch.float32, (len(edges) + 1,))
    assert counts.tolist() == counts_of(numbers(x.float()), edges.tolist())


@given(
    values=st.lists(
        st.sampled_from([math.nan, math.inf, -math.inf, -9.0, -4.0, -0.0, 0.5, 1.0, 2.5, 99.0]), max_size=70
    ),
    edges=edges(),
)
def test_a_histogram_is_the_same_by_counting_and_by_sorting_as_on_an_accelerator(values, edges):
    wanted = counts_of(values, edges.tolist())
    for count in (_count_on_cpu, _count_on_device):
        counts = count(torch.tensor(values), edges)
        assert counts.dtype == torch.float32
        assert counts.tolist() == wanted


# -- samples ----------------------------------------------------------------------------------------------------------


@given(units=st.one_of(st.integers(1, 3000), st.integers(1, 100).map(lambda k: 17 * k)), rows=st.integers(40, 200))
def test_a_sample_meets_every_unit(units, rows):
    x = torch.arange(units).repeat(rows)
    picked = sample(x)
    assert picked.unique().numel() == units
    assert len(picked) == len(x) if len(x) <= 4096 else len(x) / 40 < len(picked) <= len(x) / 17 + 1


@given(units=st.integers(1, 400), rows=st.integers(50, 99), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_near_zero_of_a_large_tensor_comes_near_the_truth(units, rows, share, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, units, generator=g)
    x[:, : round(units * share)] = 0  # whole units
    near = dict(zip(FIELDS, measure(x, 0.0).tolist(), strict=True))["near_zero"]
    assert near == pytest.approx((x == 0).float().mean().item(), abs=0.08)


# -- units ------------------------------------------------------------------------------------------------------------


@given(x=tensors(), dim=st.integers(-5, 5), positive=st.booleans())
def test_active_units_equal_the_reference(x, dim, positive):
    active = active_units(x, dim, positive)
    x = x.reshape(1) if x.ndim == 0 else x
    dim = dim if -x.ndim <= dim < x.ndim else x.ndim - 1
    wanted = [
        any(v != v or (v > 0 if positive else v != 0) for v in numbers(x.select(dim, i))) for i in range(x.shape[dim])
    ]
    assert active.dtype == torch.bool
    assert active.tolist() == wanted


@given(
    n=st.integers(60, 200),
    spots=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 4)), max_size=5),
    late=st.sets(st.integers(0, 4)),
    dim=st.sampled_from([1, -1, 2]),
    value=st.sampled_from([1.0, -1.0, math.nan]),
    positive=st.booleans(),
)
def test_active_units_of_large_batches_are_found_wherever_they_are_active(n, spots, late, dim, value, positive):
    x = torch.zeros(n, 5, 2) if dim == 1 else torch.zeros(n, 2, 5)
    for i, unit in spots:
        x.select(dim, unit)[i, 1] = value
    for unit in late:
        x.select(dim, unit)[n - 1, 0] = value
    seen = value != -1.0 or not positive
    assert active_units(x, dim, positive).tolist() == [
        seen and (unit in late or any(unit == u for _, u in spots)) for unit in range(5)
    ]


@st.composite
def histories(draw):
    """What an `Activity` takes in: (layer, which units are active), now and then the layer's width changes."""
    rows, widths = [], {"a": 3, "b": 1}
    for _ in range(draw(st.integers(0, 30))):
        name = draw(st.sampled_from(["a", "a", "b"]))
        if draw(st.integers(0, 9)) == 9:
            widths[name] = draw(st.integers(0, 4))
        rows.append((name, draw(st.lists(st.booleans(), min_size=widths[name], max_size=widths[name]))))
    return rows


@given(window=st.integers(1, 6), history=histories(), saved_at=st.sets(st.integers(0, 29)))
def test_dead_units_equal_the_reference_and_a_resume_changes_nothing(window, history, saved_at):
    activity, seen = Activity(window), {}
    for i, (name, row) in enumerate(history):
        if i in saved_at:
            state = activity.state_dict()
            activity.add(name, torch.tensor(row, dtype=torch.bool))  # which the state does not notice
            activity = Activity(window)
            activity.load_state_dict(state)
        rows = seen.setdefault(name, [])
        if rows and len(rows[-1]) != len(row):
            rows.clear()
        rows.append(row)
        dead = [not any(unit) for unit in zip(*rows[-window:], strict=True)]
        found = activity.add(name, torch.tensor(row, dtype=torch.bool))
        assert (found.dtype, found.shape) == (torch.float32, ())
        assert same(found.item(), sum(dead) / len(dead) if dead else math.nan, 1e-7)
