"""Metrics: `accuracy`, `top_k_accuracy`, and `Mean`, which averages any function over samples."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, SupportsFloat

import torch
from torch import Tensor

from minitrain.batch import n_samples
from minitrain.errors import LoopError


class Metric(Protocol):
    """What a Learner needs of a metric; those of torchmetrics are such."""

    def update(self, preds: Any, targets: Any, /) -> Any:
        """Take one batch into account."""

    def compute(self) -> Any:
        """The value over all batches since the last `reset`: a number, a scalar tensor, or a dict of these."""

    def reset(self) -> Any:
        """Forget all batches."""


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The fraction of samples whose highest score is that of their class.

    Args:
        preds: Scores (logits or probabilities) of shape (batch, classes, ...), at least two classes.
        targets: Class indices of shape (batch, ...).

    Returns:
        A scalar tensor, a fraction in [0, 1].

    Raises:
        TypeError: One of them is no tensor.
        ValueError: The shapes do not fit together.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
        >>> accuracy(scores, torch.tensor([0, 1, 1, 0]))
        tensor(0.7500)
    """
    _check_scores("accuracy", preds, targets)
    return (preds.argmax(1) == targets).float().mean()


def top_k_accuracy(preds: Tensor, targets: Tensor, k: int = 5) -> Tensor:
    """The fraction of samples whose class is among the `k` highest scores.

    Args:
        preds: Scores of shape (batch, classes, ...), at least two classes.
        targets: Class indices of shape (batch, ...).
        k: How many guesses a sample has, from 1 to the number of classes.

    Returns:
        A scalar tensor, a fraction in [0, 1].

    Raises:
        TypeError: `preds` or `targets` is no tensor, or `k` no integer.
        ValueError: The shapes do not fit together, or `k` not to the number of classes.

    Example:
        >>> from functools import partial
        >>> metrics = {"top_2": partial(top_k_accuracy, k=2)}
        >>> scores = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
        >>> metrics["top_2"](scores, torch.tensor([1, 2]))
        tensor(0.5000)
    """
    _check_scores("top_k_accuracy", preds, targets)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"top_k_accuracy: k={k!r} (type={type(k).__name__}), wanted an integer.")
    if not 1 <= k <= preds.shape[1]:
        raise ValueError(
            f"top_k_accuracy: k={k!r} with {preds.shape[1]} classes, wanted 1 <= k <= {preds.shape[1]}: "
            "functools.partial(top_k_accuracy, k=...)."
        )
    hits = (preds.topk(k, dim=1).indices == targets.unsqueeze(1)).any(1)
    return hits.float().mean()


for _function in (accuracy, top_k_accuracy):
    _function.higher_is_better = True  # type: ignore[attr-defined]  # as `Checkpoint(keep_best=...)` asks


class Mean:
    """A running mean over samples: a batch counts by its size, so the smaller last one counts less.

    The sum is kept on the device, in float64 where the device has it, and nothing waits for it before `compute`.

    Args:
        func: `func(preds, targets)` returns the mean over a batch: a scalar tensor or a number. None: only `add` is used.
        name: The name of the metric. None: that of the function.

    Attributes:
        count: How many samples have been added since the last `reset`.

    Raises:
        TypeError: `func` is not callable, or `name` is no text.

    Example:
        >>> mean = Mean(lambda preds, targets: (preds - targets).abs().mean(), name="mae")
        >>> mean.update(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
        >>> mean.update(torch.tensor([6.0]), torch.zeros(1))
        >>> mean.compute(), mean.count
        (3.0, 4)
    """

    count: int

    def __init__(self, func: Callable[[Any, Any], Any] | None = None, name: str | None = None) -> None:
        if func is not None and (inspect.isclass(func) or not callable(func)):
            raise TypeError(f"Mean(func={func!r}), wanted a function (preds, targets) -> scalar tensor.")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"Mean(name={name!r}) (type={type(name).__name__}), wanted a text.")
        self.func, self.name = func, name
        self.reset()

    def reset(self) -> None:
        """Forget all that was added."""
        self.count = 0
        self._total: Tensor | None = None  # of value * n, on the device of the values
        self._number = 0.0  # the same for values that are plain numbers

    def update(self, preds: Any, targets: Any, n: int | None = None) -> None:
        """Add `func(preds, targets)`.

        Args:
            preds: The predictions of a batch.
            targets: Its targets.
            n: How many samples it has. None: the leading dimension of the first tensor in it.
        """
        if self.func is None:
            raise TypeError(f"{self} has no function to update with: Mean(func), or call add(value, n).")
        self.add(self.func(preds, targets), n_samples((preds, targets)) if n is None else n)

    def add(self, value: Tensor | SupportsFloat, n: int) -> None:
        """Add the mean over `n` samples. The value is read now: it may be changed afterwards.

        Args:
            value: A scalar tensor (also an integer or a bool, and with a gradient, which is not kept), or a number.
            n: How many samples it stands for; with 0 it is left out.

        Raises:
            TypeError: `value` is neither a real tensor nor a number, or `n` no integer.
            ValueError: `value` is not a scalar, or `n` negative.
        """
        if not isinstance(n, int):
            raise TypeError(f"{self}: n={n!r} (type={type(n).__name__}), wanted how many samples the value stands for.")
        if n <= 0:
            if n < 0:
                raise ValueError(f"{self}: n={n!r}, wanted a number of samples >= 0.")
            return  # the mean over nothing is NaN
        shape = tuple(getattr(value, "shape", ()))
        if math.prod(shape) != 1:
            raise ValueError(f"{self}: got a value of shape {shape}, wanted a scalar: take the mean over the batch.")
        if isinstance(value, Tensor) and not value.is_complex():
            self._add_tensor(value.detach(), n)
        elif isinstance(value, SupportsFloat) and not isinstance(value, Tensor):
            self._number += float(value) * n
        else:
            raise TypeError(f"{self}: got {value!r:.60} (type={type(value).__name__}), wanted a real scalar tensor.")
        self.count += n

    def _add_tensor(self, value: Tensor, n: int) -> None:
        if value.ndim:  # a scalar of shape (1,)
            value = value.reshape(())
        if self._total is None or self._total.device != value.device:
            self._total = self._on(value.device)
        self._total.add_(value, alpha=n)  # widened before it is multiplied, added without waiting for the device

    def _on(self, device: torch.device) -> Tensor:
        """The total so far, on `device`."""
        dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # MPS has no float64
        with torch.inference_mode(False):  # a tensor born in inference mode could not be added to outside of it
            return torch.zeros((), dtype=dtype, device=device) if self._total is None else self._total.to(device, dtype)

    def compute(self) -> float:
        """The mean so far. This is the one place that waits for the device.

        Raises:
            LoopError: Nothing was added.
        """
        if self.count == 0:
            raise LoopError(f"{self} is a mean over nothing: no sample was added since it was made or reset.")
        return (self._number + (0.0 if self._total is None else self._total.item())) / self.count

    @property
    def higher_is_better(self) -> bool | None:
        """What the function says of itself by an attribute of this name; None where it does not."""
        func = self.func
        while isinstance(func, functools.partial):
            func = func.func
        return getattr(func, "higher_is_better", None)

    def state_dict(self) -> dict[str, Any]:
        """What has been added so far."""
        return {"count": self.count, "number": self._number, "total": self._total}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Take it back.

        Args:
            state: What `state_dict` gave.
            device: Where the sum goes on. None: where it is.
        """
        count, number, total = state["count"], float(state["number"]), state["total"]
        if type(count) is not int or not (total is None or (isinstance(total, Tensor) and total.ndim == 0)):
            raise ValueError(f"this is no state of {self}.")
        self.count, self._number = count, number
        self._total = total if total is None else total.to(device or total.device, copy=True)

    def __repr__(self) -> str:
        name = self.name or _name_of(self.func)
        return f"Mean({name})" if name else "Mean()"


def as_metrics(metrics: Sequence[Any] | Mapping[str, Any]) -> dict[str, Metric]:
    """Metrics by name, each with `update`, `compute` and `reset`.

    Args:
        metrics: A list, or a dict `{name: metric}`. Objects with the three methods pass through; functions
            `(preds, targets) -> scalar tensor` are wrapped in `Mean`. Without a dict the name of a metric is its attribute
            `name`, or that of the function, or that of its class.

    Raises:
        TypeError: It is no list or dict, or an item of it is no metric.
        ValueError: A metric has no name, or the name of another.

    Example:
        >>> as_metrics([accuracy, Mean(lambda preds, targets: preds.std(), name="spread")])
        {'accuracy': Mean(accuracy), 'spread': Mean(spread)}
    """
    if isinstance(metrics, (str, bytes)) or not isinstance(metrics, (Sequence, Mapping)):
        name = _name_of(metrics) or "..."
        raise TypeError(
            f"metrics={metrics!r:.80} (type={type(metrics).__name__}), wanted a list or a dict: metrics=[{name}]."
        )
    named: Iterable[tuple[Any, Any]]
    named = metrics.items() if isinstance(metrics, Mapping) else ((_name_of(metric), metric) for metric in metrics)
    found: dict[str, Metric] = {}
    for i, (name, metric) in enumerate(named):
        where = f"metrics[{name!r}]" if isinstance(metrics, Mapping) else f"metrics[{i}]"
        wrapped = _as_metric(where, name, metric)
        if not isinstance(name, str):
            raise (TypeError if isinstance(metrics, Mapping) else ValueError)(
                f"{where}={metric!r:.80} has no name. Give it one: Mean(func, name='...'), or metrics={{'...': func}}."
            )
        _check_name(where, name, found)
        found[name] = wrapped
    return found


def compute_metrics(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The value of each metric, read once.

    Args:
        metrics: By name, as `as_metrics` makes them.

    Returns:
        `{name: value}`. A metric that computes a dict (a `MetricCollection` of torchmetrics) adds its entries under their
        own names.

    Raises:
        ValueError: A value is no number and no scalar tensor, or two have one name.
    """
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        value = metric.compute()
        for key, number in value.items() if isinstance(value, Mapping) else [(name, value)]:
            _check_name(f"the metric {name!r}", key, values)
            values[key] = _as_float(name, key, number)
    return values


def _as_metric(where: str, name: Any, metric: Any) -> Metric:
    if inspect.isclass(metric):
        raise TypeError(f"{where}={metric.__name__} is a class, wanted an instance or a function: did you forget ()?")
    missing = [method for method in ("update", "compute", "reset") if not callable(getattr(metric, method, None))]
    if isinstance(metric, Mean) and metric.func is None and type(metric).update is Mean.update:
        raise TypeError(f"{where}=Mean() has no function to measure with: Mean(func, name='...').")
    if not missing:
        return metric  # type: ignore[no-any-return]
    if len(missing) < 3:
        raise TypeError(
            f"{where}={type(metric).__name__} lacks {' and '.join(missing)}: a metric has all three methods."
        )
    if not callable(metric):
        raise TypeError(
            f"{where}={metric!r:.80} (type={type(metric).__name__}) is no metric, wanted a function (preds, targets) -> scalar "
            "tensor, or an object with update, compute and reset."
        )
    return Mean(metric, name if isinstance(name, str) else None)


def _name_of(metric: Any) -> str | None:
    """The name by which a metric goes, or None where it has none."""
    name = getattr(metric, "name", None)
    if isinstance(name, str) and name:
        return name
    if isinstance(metric, Mean):
        return _name_of(metric.func)
    if isinstance(metric, functools.partial):
        return _name_of(metric.func)
    if metric is None or isinstance(metric, str):
        return None
    name = getattr(metric, "__name__", type(metric).__name__)
    return None if name == "<lambda>" else name


def _check_name(where: str, name: Any, taken: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has the name {name!r}, wanted a text that is not empty.")
    if name == "loss":
        raise ValueError(
            f"{where} has the name 'loss', which is that of the loss. Give it another: {{'my_loss': metric}}."
        )
    if name in taken:
        raise ValueError(
            f"{where} has the name {name!r}, as another metric has. Name them: metrics={{'{name}_1': ..., '{name}_2': ...}}."
        )


def _as_float(name: str, key: str, value: Any) -> float:
    what = name if key == name else f"{name}[{key!r}]"
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"the metric {what} is of shape {tuple(value.shape)}, wanted a scalar: average it, or give a dict of scalars."
        )
    try:
        return float(value)  # the one read of it
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the metric {what} is {value!r:.80} (type={type(value).__name__}), wanted a number or a scalar tensor."
        ) from error


def _check_scores(name: str, preds: Any, targets: Any) -> None:
    for what, value in (("preds", preds), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: {what} is a {type(value).__name__}, wanted a tensor. Pick it: "
                f"lambda preds, targets: {name}(preds[0], targets)."
            )
    if preds.ndim < 2 or preds.shape[:1] + preds.shape[2:] != targets.shape:
        raise ValueError(
            f"{name}: preds of shape {tuple(preds.shape)} and targets of shape {tuple(targets.shape)}, wanted scores "
            "(batch, classes, ...) and class indices (batch, ...)."
        )
    if preds.shape[1] < 2:
        raise ValueError(
            f"{name}: preds of shape {tuple(preds.shape)} have {preds.shape[1]} class, wanted at least 2: of one class every "
            "guess is right. A single score is for a threshold: lambda preds, targets: ((preds > 0) == targets).float().mean()."
        )
