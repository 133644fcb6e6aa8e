"""Properties of metrics: a mean over batches is the mean over their union, whatever the batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain.metrics import Mean, accuracy, as_metrics, compute_metrics, top_k_accuracy

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=150)
seeds = st.integers(0, 2**32)


def split(sizes, *tensors):
    yield from zip(*(tensor.split(sizes) for tensor in tensors), strict=True)


@settings(deadline=None)
@given(sizes, seeds, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_mean_over_batches_is_the_mean_over_their_union(sizes, seed, dtype, scale):
    g = torch.Generator().manual_seed(seed)
    preds = (torch.randn(sum(sizes), generator=g, dtype=torch.float64) * scale).to(dtype)
    targets = torch.zeros_like(preds)
    mean = Mean(lambda preds, targets: (preds - targets).square().mean())
    for batch in split(sizes, preds, targets):
        mean.update(*batch)
    expected = preds.double().square().mean().item()
    assert mean.count == sum(sizes)
    assert mean.compute() == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-12)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-1e4, 1e4), st.integers(0, 1000), st.sampled_from(["half", "float", "double", "long", "number"])
        ),
        min_size=1,
        max_size=200,
    )
)
def test_adding_is_exact_to_float64_in_any_order_and_type(added):
    mean, products, count = Mean(), [], 0
    for value, n, kind in added:
        value = value if kind == "number" else getattr(torch.tensor(value, dtype=torch.float64), kind)()
        mean.add(value, n)
        products.append(float(value) * n)
        count += n
        if torch.is_tensor(value):
            value.zero_()
    assert mean.count == count
    if count:
        assert mean.compute() == pytest.approx(
            math.fsum(products) / count, abs=1e-12 * max(1, sum(map(abs, products)) / count)
        )
        assert mean.compute() == mean.compute()


@settings(deadline=None)
@given(sizes, seeds, st.integers(2, 6), st.data())
def test_accuracy_over_batches_is_that_of_a_plain_count(sizes, seed, n_classes, data):
    g = torch.Generator().manual_seed(seed)
    places = data.draw(st.lists(st.integers(1, 3), max_size=2))
    scores = torch.randn(sum(sizes), n_classes, *places, generator=g)
    targets = torch.randint(0, n_classes, (sum(sizes), *places), generator=g)
    k = data.draw(st.integers(1, n_classes))
    metrics = as_metrics({"accuracy": accuracy, "top": lambda preds, targets: top_k_accuracy(preds, targets, k=k)})
    for batch in split(sizes, scores, targets):
        for metric in metrics.values():
            metric.update(*batch)
    rows = scores.movedim(1, -1).reshape(-1, n_classes).tolist()
    ranks = [sorted(row, reverse=True).index(row[t]) for row, t in zip(rows, targets.flatten().tolist(), strict=True)]
    expected = {"accuracy": sum(r == 0 for r in ranks) / len(ranks), "top": sum(r < k for r in ranks) / len(ranks)}
    assert compute_metrics(metrics) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(sizes, seeds)
def test_ours_and_those_of_torchmetrics_agree(sizes, seed):
    import torchmetrics

    g = torch.Generator().manual_seed(seed)
    scores, targets = torch.randn(sum(sizes), 4, generator=g), torch.randint(0, 4, (sum(sizes),), generator=g)
    theirs = torchmetrics.classification.MulticlassAccuracy(num_classes=4, average="micro", validate_args=False)
    metrics = as_metrics({"ours": accuracy, "theirs": theirs})
    for batch in list(split(sizes, scores, targets))[:20]:
        for metric in metrics.values():
            metric.update(*batch)
    values = compute_metrics(metrics)
    assert values["ours"] == pytest.approx(values["theirs"], rel=1e-6)
