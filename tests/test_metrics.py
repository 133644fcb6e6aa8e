"""Metrics: what is computed, how it is named, and what is refused."""

import copy
import functools
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from minitrain.errors import DataError, LoopError
from minitrain.metrics import Mean, accuracy, as_metrics, compute_metrics, top_k_accuracy

SCORES = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4], [0.6, 0.1, 0.3]])
TARGETS = torch.tensor([1, 1, 2, 2])


def mae(preds, targets):
    return (preds - targets).abs().mean()


# -- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_fraction_of_hits():
    assert accuracy(SCORES, TARGETS).item() == 0.5
    assert accuracy(SCORES, TARGETS).shape == ()
    assert accuracy(SCORES.half(), TARGETS.int()).dtype == torch.float32


def test_accuracy_counts_every_place_of_a_map():
    scores = SCORES.reshape(1, 2, 2, 3).permute(0, 3, 1, 2)  # (batch, classes, height, width)
    assert accuracy(scores, TARGETS.reshape(1, 2, 2)).item() == 0.5


def test_top_k_accuracy_counts_the_k_best_guesses():
    assert top_k_accuracy(SCORES, TARGETS, k=1) == accuracy(SCORES, TARGETS)
    assert top_k_accuracy(SCORES, TARGETS, k=2).item() == 1.0
    assert top_k_accuracy(SCORES, torch.tensor([2, 2, 2, 1]), k=2).item() == 0.5
    assert top_k_accuracy(SCORES, TARGETS, k=3).item() == 1.0
    scores = SCORES.reshape(1, 2, 2, 3).permute(0, 3, 1, 2)
    assert top_k_accuracy(scores, torch.tensor([[[2, 2], [2, 1]]]), k=2).item() == 0.5


WRONG_SCORES = {
    "another batch": (
        SCORES,
        TARGETS[:3],
        ValueError,
        r"preds of shape \(4, 3\) and targets of shape \(3,\), wanted scores",
    ),
    "one-hot targets": (SCORES, torch.eye(3)[TARGETS], ValueError, r"targets of shape \(4, 3\).*class indices \(batch"),
    "a column of targets": (SCORES, TARGETS[:, None], ValueError, r"targets of shape \(4, 1\)"),
    "no classes": (SCORES[:, 0], TARGETS, ValueError, r"preds of shape \(4,\)"),
    "a single score": (SCORES[:, :1], TARGETS, ValueError, "have 1 class.*threshold"),
    "preds of several parts": ((SCORES, SCORES), TARGETS, TypeError, r"preds is a tuple.*preds\[0\]"),
    "no targets": (SCORES, None, TypeError, "targets is a NoneType"),
}


@pytest.mark.parametrize("name", WRONG_SCORES)
@pytest.mark.parametrize("metric", [accuracy, partial(top_k_accuracy, k=1)])
def test_accuracy_refuses(name, metric):
    preds, targets, error, match = WRONG_SCORES[name]
    with pytest.raises(error, match=f"accuracy: .*{match}"):
        metric(preds, targets)


@pytest.mark.parametrize(
    ("k", "error", "match"),
    [
        (0, ValueError, "k=0 with 3 classes, wanted 1 <= k <= 3"),
        (4, ValueError, "k=4 with 3 classes"),
        (5, ValueError, "partial"),
        (1.0, TypeError, r"k=1.0 \(type=float\)"),
        (True, TypeError, "k=True"),
    ],
)
def test_top_k_accuracy_refuses(k, error, match):
    with pytest.raises(error, match=match):
        top_k_accuracy(SCORES, TARGETS, k=k)


# -- Mean -------------------------------------------------------------------------------------------------------------


def test_a_smaller_batch_counts_less():
    mean = Mean(mae)
    mean.update(torch.ones(3), torch.zeros(3))
    mean.update(torch.full((1,), 5.0), torch.zeros(1))
    assert mean.compute() == 2.0
    assert mean.count == 4


def test_the_number_of_samples_may_be_given():
    mean = Mean(mae)
    mean.update(torch.ones(3), torch.zeros(3), n=30)
    mean.update(torch.full((1,), 5.0), torch.zeros(1), n=10)
    assert mean.compute() == 2.0
    assert mean.count == 40


def test_the_number_of_samples_is_found_in_nested_predictions():
    mean = Mean(lambda preds, targets: preds["a"][0].mean())
    mean.update({"a": (torch.ones(3),)}, None)
    assert mean.count == 3
    with pytest.raises(DataError, match="how many samples"):
        Mean(lambda preds, targets: 1.0).update(3, None)


def test_reset_forgets():
    mean = Mean()
    mean.add(torch.tensor(3.0), 2)
    mean.add(4.0, 2)
    mean.reset()
    assert mean.count == 0
    mean.add(torch.tensor(1.0), 2)
    assert mean.compute() == 1.0


def test_a_mean_over_nothing_is_an_error():
    with pytest.raises(LoopError, match=r"Mean\(mae\) is a mean over nothing"):
        Mean(mae).compute()
    mean = Mean()
    mean.add(torch.tensor(torch.nan), 0)  # an empty batch
    with pytest.raises(LoopError, match=r"Mean\(\) is a mean over nothing"):
        mean.compute()
    mean.add(torch.tensor(2.0), 1)
    assert mean.compute() == 2.0


def test_nan_is_not_hidden():
    mean = Mean()
    mean.add(torch.tensor(1.0), 3)
    mean.add(torch.tensor(torch.nan), 1)
    assert np.isnan(mean.compute())


def test_a_value_that_changes_later_does_not_matter():
    mean, value = Mean(), torch.tensor(2.0, dtype=torch.float64)
    mean.add(value, 1)
    value.zero_()
    mean.add(value, 1)
    value.fill_(9)
    assert mean.compute() == 1.0


def test_a_value_keeps_no_graph():
    w = torch.ones(3, requires_grad=True)
    mean = Mean()
    mean.add((w * 2).mean(), 3)
    assert not mean._total.requires_grad
    assert mean.compute() == 2.0


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_makes_no_difference(first):
    mean = Mean()
    for inference in (first, not first, first):
        with torch.inference_mode(inference):
            value = torch.tensor(2.0)
            mean.add(value, 1)
        mean.add(value, 1)
    assert mean.compute() == 2.0


def test_half_precision_is_widened_before_it_is_multiplied():
    mean = Mean()
    for _ in range(300):
        mean.add(torch.tensor(60000.0, dtype=torch.float16), 64)  # times 64 it would overflow
    mean.add(torch.tensor(1.0, dtype=torch.bfloat16), 64)
    assert mean.compute() == (300 * 60000 + 1) / 301


def test_many_small_values_are_not_lost():
    mean = Mean()
    mean.add(torch.tensor(1e8), 1)
    for _ in range(1000):
        mean.add(torch.tensor(1.0), 1)  # each would vanish in a float32 sum
    assert mean.compute() == (1e8 + 1000) / 1001


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3),
        torch.tensor(3.0),
        torch.tensor([3.0]),
        torch.tensor(3, dtype=torch.uint8),
        3,
        3.0,
        np.float32(3),
        np.array(3),
    ],
)
def test_any_real_scalar_is_taken(value):
    mean = Mean()
    mean.add(value, 2)
    assert mean.compute() == 3.0


@pytest.mark.parametrize("value", [torch.tensor(True), True, np.True_])
def test_a_bool_counts_as_one(value):
    mean = Mean()
    mean.add(value, 1)
    mean.add(torch.tensor(False), 3)
    assert mean.compute() == 0.25


def test_adding_reads_nothing_from_the_device():
    mean = Mean(lambda preds, targets: (preds == targets).float().mean())
    preds = torch.zeros(4, device="meta")  # a device from which nothing can be read
    mean.update(preds, preds)
    assert mean.count == 4
    with pytest.raises(RuntimeError):
        mean.compute()


@pytest.mark.parametrize(
    ("value", "n", "error", "match"),
    [
        (torch.ones(3), 3, ValueError, r"Mean\(mae\): got a value of shape \(3,\), wanted a scalar"),
        (np.ones((2, 2)), 3, ValueError, r"shape \(2, 2\)"),
        (torch.tensor(1j), 3, TypeError, "wanted a real scalar"),
        (1j, 3, TypeError, "type=complex"),
        ("0.5", 3, TypeError, r"got '0.5' \(type=str\)"),
        (None, 3, TypeError, "got None"),
        ((torch.tensor(1.0), 2), 3, TypeError, "type=tuple"),
        (torch.tensor(1.0), -1, ValueError, "n=-1, wanted a number of samples >= 0"),
        (torch.tensor(1.0), 2.0, TypeError, r"n=2.0 \(type=float\)"),
        (torch.tensor(1.0), torch.tensor(2), TypeError, r"n=tensor\(2\)"),
    ],
)
def test_add_refuses(value, n, error, match):
    mean = Mean(mae)
    mean.add(torch.tensor(1.0), 2)
    with pytest.raises(error, match=match):
        mean.add(value, n)
    assert mean.count == 2
    assert mean.compute() == 1.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(("mae",), "func='mae'"), ((nn.MSELoss,), "MSELoss"), ((mae, 3), r"name=3\) \(type=int\)")],
)
def test_mean_refuses(arguments, match):
    with pytest.raises(TypeError, match=match):
        Mean(*arguments)


def test_a_mean_without_a_function_cannot_be_updated():
    with pytest.raises(TypeError, match=r"no function to update with: Mean\(func\)"):
        Mean().update(SCORES, TARGETS)


def test_a_mean_is_copied_and_pickled():
    mean = Mean(mae, name="error")
    mean.add(torch.tensor(2.0), 3)
    for other in (copy.deepcopy(mean), pickle.loads(pickle.dumps(mean))):
        other.add(torch.tensor(4.0), 3)
        assert (other.compute(), other.name) == (3.0, "error")
    assert mean.compute() == 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu_before_compute():
    mean = Mean(accuracy)
    scores, targets = SCORES.cuda(), TARGETS.cuda()
    mean.update(scores, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in range(1, 100):
            mean.update(scores, targets, n)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    mean.add(torch.tensor(0.5), 4)  # a value from the CPU
    assert mean.compute() == 0.5


# -- as_metrics -------------------------------------------------------------------------------------------------------


class Largest:
    def __init__(self):
        self.reset()

    def update(self, preds, targets):
        self.value = max(self.value, preds.max().item())

    def compute(self):
        return self.value

    def reset(self):
        self.value = -1.0


class Half(Largest):
    reset = None

    def __init__(self):
        pass


class Named:
    name = "spread"

    def __call__(self, preds, targets):
        return preds.std()


def test_metrics_are_named_by_key_name_function_or_class():
    largest, error = Largest(), Mean(mae, name="error")
    metrics = as_metrics([accuracy, largest, error, Mean(mae), Named(), partial(top_k_accuracy, k=2), nn.L1Loss()])
    assert list(metrics) == ["accuracy", "Largest", "error", "mae", "spread", "top_k_accuracy", "L1Loss"]
    assert metrics["Largest"] is largest
    assert metrics["error"] is error
    assert isinstance(metrics["accuracy"], Mean)
    metrics = as_metrics(
        {"a": accuracy, "b": lambda preds, targets: preds.std(), "c": Mean(lambda p, t: p.std()), "d": accuracy}
    )
    assert list(metrics) == ["a", "b", "c", "d"]
    assert repr(metrics["b"]) == "Mean(b)"
    assert as_metrics([]) == as_metrics({}) == as_metrics(()) == {}


METRICS = {
    "a bare function": (accuracy, TypeError, r"metrics=\[accuracy\]"),
    "a bare object": (Largest(), TypeError, r"metrics=\[Largest\]"),
    "none": (None, TypeError, "metrics=None"),
    "a text": ("accuracy", TypeError, r"metrics='accuracy' \(type=str\), wanted a list"),
    "a generator": ((m for m in [accuracy]), TypeError, "type=generator"),
    "a list of texts": (["accuracy"], TypeError, r"metrics\[0\]='accuracy' \(type=str\) is no metric"),
    "a class": ([accuracy, Largest], TypeError, r"metrics\[1\]=Largest is a class.*did you forget \(\)"),
    "a class in a dict": ({"a": Largest}, TypeError, r"metrics\['a'\]=Largest is a class"),
    "a lambda": ([lambda p, t: p.mean()], ValueError, r"metrics\[0\].*has no name.*Mean\(func, name='...'\)"),
    "a mean of a lambda": ([Mean(lambda p, t: p.mean())], ValueError, "has no name"),
    "a mean of nothing": ([Mean()], TypeError, r"Mean\(func, name='...'\)"),
    "twice the same": ([accuracy, accuracy], ValueError, r"metrics\[1\] has the name 'accuracy', as another"),
    "two partials": (
        [partial(top_k_accuracy, k=1), partial(top_k_accuracy, k=2)],
        ValueError,
        "'top_k_accuracy_1': ...",
    ),
    "a number for a name": ({1: accuracy}, TypeError, r"metrics\[1\].*has no name"),
    "an empty name": ({"": accuracy}, ValueError, "has the name ''"),
    "the name of the loss": ({"loss": accuracy}, ValueError, "has the name 'loss'"),
    "half a metric": ([Half()], TypeError, r"metrics\[0\]=Half lacks reset"),
    "a number": ([3], TypeError, r"metrics\[0\]=3 \(type=int\) is no metric"),
}


@pytest.mark.parametrize("name", METRICS)
def test_as_metrics_refuses(name):
    metrics, error, match = METRICS[name]
    with pytest.raises(error, match=match):
        as_metrics(metrics)


# -- compute_metrics --------------------------------------------------------------------------------------------------


class Gives:
    def __init__(self, value):
        self.value, self.reads = value, 0

    def compute(self):
        self.reads += 1
        return self.value


def test_metrics_are_read_once_each_and_flattened():
    metrics = {
        "a": Gives(torch.tensor(0.5)),
        "b": Gives({"x": torch.tensor([1]), "y": 2}),
        "c": Gives(np.float32(0.25)),
        "d": Gives(True),
    }
    values = compute_metrics(metrics)
    assert values == {"a": 0.5, "x": 1.0, "y": 2.0, "c": 0.25, "d": 1.0}
    assert all(type(value) is float for value in values.values())
    assert [metric.reads for metric in metrics.values()] == [1] * 4
    assert compute_metrics({}) == {}


@pytest.mark.parametrize(
    ("metrics", "match"),
    [
        ({"a": Gives(torch.ones(3))}, r"the metric a is of shape \(3,\), wanted a scalar"),
        ({"a": Gives({"x": torch.ones(2)})}, r"the metric a\['x'\] is of shape \(2,\)"),
        ({"a": Gives(None)}, r"the metric a is None \(type=NoneType\), wanted a number"),
        ({"a": Gives("high")}, "the metric a is 'high'"),
        ({"a": Gives(torch.tensor(1j))}, "the metric a is tensor"),
        ({"a": Gives(1), "b": Gives({"a": 2})}, "the metric 'b' has the name 'a', as another"),
        ({"a": Gives({"loss": 2})}, "has the name 'loss'"),
        ({"a": Gives({1: 2})}, "has the name 1"),
    ],
)
def test_compute_metrics_refuses(metrics, match):
    with pytest.raises(ValueError, match=match):
        compute_metrics(metrics)


# -- torchmetrics, unchanged ------------------------------------------------------------------------------------------


def test_objects_of_torchmetrics_give_what_ours_give():
    import torchmetrics
    from torchmetrics import classification

    metrics = as_metrics(
        {
            "theirs": classification.MulticlassAccuracy(num_classes=3, average="micro"),
            "ours": accuracy,
            "their_top": classification.MulticlassAccuracy(num_classes=3, average="micro", top_k=2),
            "our_top": partial(top_k_accuracy, k=2),
            "several": torchmetrics.MetricCollection(
                {"precision": classification.MulticlassPrecision(num_classes=3, average="micro")}
            ),
        }
    )
    for _ in range(2):  # used again after a reset
        for metric in metrics.values():
            metric.reset()
        g = torch.Generator().manual_seed(0)
        for n in (8, 8, 3):
            scores, targets = torch.randn(n, 3, generator=g), torch.randint(0, 3, (n,), generator=g)
            for metric in metrics.values():
                metric.update(scores, targets)
        values = compute_metrics(metrics)
        assert list(values) == ["theirs", "ours", "their_top", "our_top", "precision"]
        assert values["ours"] == pytest.approx(values["theirs"], rel=1e-6)
        assert values["our_top"] == pytest.approx(values["their_top"], rel=1e-6)
        assert values["precision"] == pytest.approx(values["ours"], rel=1e-6)


def test_objects_of_torchmetrics_are_named_by_their_class():
    import torchmetrics

    metrics = as_metrics([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()])
    assert list(metrics) == ["MeanSquaredError", "MeanAbsoluteError"]
    mse, ours = metrics["MeanSquaredError"], as_metrics([nn.functional.mse_loss])["mse_loss"]
    for n in (5, 2):
        preds, targets = torch.randn(n), torch.randn(n)
        mse.update(preds, targets), ours.update(preds, targets)
    metrics["MeanAbsoluteError"].update(preds, targets)
    assert compute_metrics(metrics)["MeanSquaredError"] == pytest.approx(ours.compute(), rel=1e-6)


def test_a_class_or_a_bare_collection_of_torchmetrics_is_refused():
    import torchmetrics

    with pytest.raises(TypeError, match=r"MulticlassAccuracy is a class.*did you forget \(\)"):
        as_metrics([torchmetrics.classification.MulticlassAccuracy])
    with pytest.raises(TypeError, match="wanted a list or a dict"):
        as_metrics(torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()]))


def test_a_metric_says_whether_higher_is_better():
    assert Mean(accuracy).higher_is_better
    assert Mean(functools.partial(top_k_accuracy, k=2), name="top_2").higher_is_better
    assert Mean(lambda preds, targets: preds.mean(), name="mean").higher_is_better is None


def test_a_mean_goes_on_from_its_state():
    whole, first, second = Mean(name="a"), Mean(name="a"), Mean(name="a")
    for mean in (whole, first):
        mean.add(torch.tensor(1.5), 3)
        mean.add(0.25, 2)
    second.load_state_dict(first.state_dict())
    for mean in (whole, second):
        mean.add(torch.tensor(7.0), 1)
    assert second.compute() == whole.compute()
    assert first.count == 5
    for state in ({"count": 1.5}, {"total": torch.zeros(2)}, {"total": "os.system"}):
        with pytest.raises(ValueError, match="this is no state of"):
            second.load_state_dict(whole.state_dict() | state)
    assert second.compute() == whole.compute()
