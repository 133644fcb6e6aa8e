"""`ActivationStats`: mean and standard deviation of each layer's output, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from minitrain.callback import Callback
from minitrain.hooks import Hooks, first_tensor
from minitrain.moments import mean_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minitrain.learner import Learner


class ActivationStats(Callback):
    """Record the mean and the standard deviation of each selected layer's output at the training steps.

    Nothing waits for the device during an epoch: a step leaves one small tensor of shape (layers, 2) there, and at the end of
    the epoch they come to the CPU in one copy. The rows can be read at any time, in the midst of training too (which waits for
    the device). They append over the epochs of a fit; a new fit begins anew.

    Of a layer that is called several times in a step the first call counts; of an output with several tensors the first one.
    A cancelled batch leaves no row, and does not count.

    Args:
        select: Which layers, as in `Hooks`: types, names, globs, a predicate, or a list of these. None: the layers with a
            weight of two or more dimensions (linear, convolution, embedding, attention), or, without any, every leaf module.
        every: Record every n-th training batch, the first one included.

    Attributes:
        names: The names of the layers: the columns.
        steps: For each row the number of the training batch, counted from 0 over the whole fit.

    Raises:
        TypeError: `every` is no int.
        ValueError: `every` is not positive.

    Example:
        >>> from minitrain import BatchLoader, DataLoaders, Learner
        >>> x = torch.linspace(-1, 1, 12).reshape(-1, 1)
        >>> model = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> stats = ActivationStats()
        >>> learn = Learner(model, DataLoaders(BatchLoader(x, x, batch_size=4)), nn.MSELoss(), cbs=[stats], progress=False)
        >>> learn.fit(2)
        >>> stats.names, stats.steps, tuple(stats.std.shape)
        (['0', '2'], [0, 1, 2, 3, 4, 5], (6, 2))
    """

    names: list[str]
    steps: list[int]
    _rows: list[Tensor]  # on the CPU, each of shape (steps, layers, 2)
    _pending: list[Tensor]  # on the device, each of shape (layers, 2)
    _values: dict[str, Tensor] | None  # of this step; None where it is not recorded
    _n_batches: int  # that came through

    def __init__(self, select: Any = None, *, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every={every!r} (type={type(every).__name__}), wanted an int.")
        if every < 1:
            raise ValueError(f"every={every}, wanted at least 1.")
        self.select, self.every = select, every
        self.names = []
        self._clear()

    @contextmanager
    def during_fit(self, learn: Learner) -> Iterator[None]:
        """Hooks on the layers, for as long as the fit lasts."""

        def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._values is not None and learn.training and name not in self._values:
                measured = _measure(output)
                if measured is not None:
                    self._values[name] = measured

        with Hooks(learn.model, note, _weight_layers(learn.model) if self.select is None else self.select) as hooks:
            self.names = hooks.names
            try:
                yield
            finally:
                self._flush()
                self._values = None

    def before_fit(self, learn: Learner) -> None:
        """Begin anew."""
        self._clear()

    def before_batch(self, learn: Learner) -> None:
        """From here on outputs are measured."""
        if learn.training:
            self._values = {} if self._n_batches % self.every == 0 else None

    def after_batch(self, learn: Learner) -> None:
        """The batch has come through: keep what was measured."""
        if learn.training:
            if self._values is not None:
                self.steps.append(self._n_batches)
                self._pending.append(_row([self._values.get(name) for name in self.names]))
            self._values = None
            self._n_batches += 1

    def after_train(self, learn: Learner) -> None:
        """Bring this epoch's rows to the CPU."""
        self._flush()

    after_cancel_train = after_train

    @property
    def mean(self) -> Tensor:
        """The means, on the CPU, of shape (steps, layers); NaN where a layer was not called."""
        return self._table().select(-1, 0)

    @property
    def std(self) -> Tensor:
        """The standard deviations, likewise."""
        return self._table().select(-1, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types: names, steps, and for mean and std a list of rows."""
        return {
            "names": list(self.names),
            "steps": list(self.steps),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    def plot(self, **kwargs: Any) -> Figure:
        """Draw mean and standard deviation of each layer by step; arguments (`ax`, `save`) as of `minitrain.plot.stats`.

        Returns:
            The matplotlib figure.
        """
        from minitrain import plot

        return plot.stats(self.names, self.steps, self.mean, self.std, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """All rows so far."""
        return {
            "names": list(self.names),
            "steps": list(self.steps),
            "rows": self._table(),
            "n_batches": self._n_batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows back.

        Raises:
            ValueError: They are of other layers than those that this object records.
        """
        if self.names and self.names != state["names"]:
            raise ValueError(f"the state is of the layers {state['names']}, these ActivationStats record {self.names}.")
        self._clear()
        self.names, self.steps, self._n_batches = list(state["names"]), list(state["steps"]), state["n_batches"]
        self._rows = [state["rows"]]

    def _clear(self) -> None:
        self.steps, self._rows, self._pending = [], [], []
        self._values, self._n_batches = None, 0

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if pending:
            device = pending[-1].device
            self._rows.append(torch.stack([row.to(device) for row in pending]).cpu())

    def _table(self) -> Tensor:
        self._flush()
        if len(self._rows) != 1:
            self._rows = [torch.cat(self._rows)] if self._rows else [torch.empty(0, len(self.names), 2)]
        return self._rows[0]


def _measure(output: Any) -> Tensor | None:
    """Mean and standard deviation of an output as one tensor; None where it has none."""
    tensor = first_tensor(output)
    try:
        return None if tensor is None else torch.stack(mean_std(tensor)).float()
    except TypeError:  # complex, sparse, quantised
        return None


def _row(values: list[Tensor | None]) -> Tensor:
    """The values of all layers on one device, NaN for None."""
    device = next((value.device for value in values if value is not None), None)
    missing = torch.full((2,), math.nan, device=device)
    return torch.stack([missing if value is None else value.to(device) for value in values])


def _weight_layers(model: nn.Module) -> Any:
    """A selection: the layers with a weight matrix, or None (every leaf) if there are none."""
    return _has_weight if any(_has_weight(name, module) for name, module in model.named_modules()) else None


def _has_weight(name: str, module: nn.Module) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear):  # attention's own last layer, which it never calls
        return False
    if isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module, "weight"):
        return True
    weights = [
        module._parameters.get(key) for key in ("weight", "weight_v", "weight_orig")
    ]  # the last two: older torch
    return any(weight is not None and (is_lazy(weight) or weight.ndim >= 2) for weight in weights)
