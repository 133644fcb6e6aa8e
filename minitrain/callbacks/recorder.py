"""`Recorder`: what the statistics callbacks share: arguments, tables, and how these are read, written, drawn and kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from minitrain.callback import Callback
from minitrain.measures import histogram
from minitrain.recording import Recording
from minitrain.units import Activity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_MEMORY = 64 * 2**20
_BY_FACTORS = ("norm", "grad_norm", "update_ratio")  # drawn on a logarithmic scale


class Recorder(Callback):
    """The base of the statistics callbacks: tables of numbers by step and layer, in bounded memory.

    Attributes:
        recordings: The tables by name: "train", "valid", "histogram", those that this object fills. Empty before the first fit.
        edges: The edges of the histogram's bins, of shape (bins + 1,).
    """

    fields: ClassVar[tuple[str, ...]]
    log_histogram: ClassVar[bool] = False  # of |x|, in bins of equal size on a logarithmic scale
    recordings: dict[str, Recording]
    edges: Tensor

    def __init__(
        self,
        select: Any,
        *,
        every: int,
        phases: Sequence[str] = ("train",),
        threshold: float,
        window: int,
        histogram_every: int | None,
        bins: int,
        limits: tuple[float, float],
        max_memory: int,
    ) -> None:
        for name, value in {"every": every, "window": window, "bins": bins, "max_memory": max_memory}.items():
            _check_count(name, value)
        if histogram_every is not None:
            _check_count("histogram_every", histogram_every)
        if not _is_number(threshold) or not 0 <= threshold < math.inf:
            raise ValueError(f"threshold={threshold!r}, wanted a number from 0 up: the largest |x| that is near zero.")
        low, high = _check_limits(limits, self.log_histogram)
        self.select, self.every, self.threshold, self.window = select, every, threshold, window
        self.histogram_every, self.max_memory = histogram_every, max_memory
        if self.log_histogram:
            self.edges = torch.logspace(math.log10(low), math.log10(high), bins + 1)
        else:
            self.edges = torch.linspace(low, high, bins + 1)
        if not (self.edges.diff() > 0).all():
            raise ValueError(f"limits={limits!r} are too close for bins={bins}: in float32 some bins have no width.")
        self._edges: dict[torch.device, Tensor] = {}
        self._phases = tuple(phases)
        self.recordings = {}
        self._clear()

    @property
    def names(self) -> list[str]:
        """The names of the layers: the columns. Empty before the first fit."""
        return list(self._main.names) if self.recordings else []

    @property
    def steps(self) -> list[int]:
        """For each row the number of its step, counted from 0 over the whole fit."""
        return self._main.steps if self.recordings else []

    @property
    def mean(self) -> Tensor:
        """The means, of shape (steps, layers); NaN where a layer was not called."""
        return self["mean"]

    @property
    def std(self) -> Tensor:
        """The standard deviations, with n - 1 in the denominator, likewise."""
        return self["std"]

    @property
    def min(self) -> Tensor:
        """The smallest values, likewise; NaN where there is one among them."""
        return self["min"]

    @property
    def max(self) -> Tensor:
        """The largest values, likewise."""
        return self["max"]

    @property
    def nonfinite(self) -> Tensor:
        """How many values were NaN or infinite, likewise."""
        return self["nonfinite"]

    @property
    def near_zero(self) -> Tensor:
        """The fraction of values with |x| <= `threshold` (of more than 4096 values, of about every seventeenth)."""
        return self["near_zero"]

    @property
    def dead(self) -> Tensor:
        """The fraction of units that were not active in any of the last `window` recorded steps, likewise."""
        return self["dead"]

    @property
    def histogram(self) -> Tensor:
        """Counts of the values, of shape (histogram steps, layers, bins + 2); of more than 4096 about every seventeenth counts.

        The first is of values below `edges[0]`, then come the bins, the last is of values at or above `edges[-1]`.

        Raises:
            ValueError: This object takes no histograms.
        """
        if self.histogram_every is None:
            raise ValueError(f"no histograms were taken: {type(self).__name__}(histogram_every=10) takes them.")
        if not self.recordings:
            return torch.empty(0, 0, len(self.edges) + 1)
        return self.recordings["histogram"].table()

    @property
    def histogram_steps(self) -> list[int]:
        """For each histogram the number of its step."""
        return self.recordings["histogram"].steps if "histogram" in self.recordings else []

    @property
    def nbytes(self) -> int:
        """The bytes that the tables take, at most `max_memory`."""
        return sum(recording.nbytes for recording in self.recordings.values())

    def __getitem__(self, field: str) -> Tensor:
        """One of `fields` by its name, of shape (steps, layers), on the CPU."""
        if self.recordings:
            return self._main[field]
        if field not in self.fields:
            raise KeyError(f"{field!r}: recorded are {', '.join(self.fields)}.")
        return torch.empty(0, 0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types: names, steps, for each field a list of rows; histograms where they are taken."""
        data: dict[str, Any] = {"names": self.names, "steps": self.steps}
        data |= {field: self[field].tolist() for field in self.fields}
        if self.histogram_every is not None:
            data |= {"histogram_steps": self.histogram_steps, "histogram": self.histogram.tolist()}
            data |= {"edges": self.edges.tolist()}
        if len(self._phases) > 1 and self.recordings:
            data["valid"] = self.recordings["valid"].to_dict()
        return data

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for each step and layer: `step, layer`, and the fields. The file is there whole or not at all.

        Args:
            path: Where to. A file that is there is replaced.

        Raises:
            FileNotFoundError: The folder does not exist.
            ValueError: Nothing has been recorded yet.
        """
        if not self.recordings:
            raise ValueError(f"{type(self).__name__} has recorded nothing yet: fit first.")
        self._main.to_csv(path)

    def plot(self, **kwargs: Any) -> Figure:
        """Draw mean and standard deviation of each layer by step; arguments (`ax`, `save`) as of `minitrain.plot.stats`.

        Returns:
            The matplotlib figure.
        """
        from minitrain import plot

        return plot.stats(self.names, self.steps, self.mean, self.std, **kwargs)

    def plot_heatmap(self, field: str = "std", **kwargs: Any) -> Figure:
        """Draw one field as a map of layers by steps; arguments as of `minitrain.plot.heatmap`."""
        from minitrain import plot

        options = {"label": field.replace("_", " ")} | ({"log": True} if field in _BY_FACTORS else {})
        return plot.heatmap(self.names, self.steps, self[field], **{**options, **kwargs})

    def plot_dead(self, **kwargs: Any) -> Figure:
        """Draw the fraction of dead units by step; arguments (`ax`, `save`) as of `minitrain.plot.dead`."""
        from minitrain import plot

        return plot.dead(self.names, self.steps, self.dead, **kwargs)

    def plot_histograms(self, **kwargs: Any) -> Figure:
        """Draw the histograms over time, a panel a layer; arguments (`ax`, `save`) as of `minitrain.plot.histograms`.

        Raises:
            ValueError: This object takes no histograms.
        """
        from minitrain import plot

        counts = self.histogram
        return plot.histograms(
            self.names, self.histogram_steps, counts, self.edges, **{"log_values": self.log_histogram, **kwargs}
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.steps)} steps, {len(self.names)} layers>"

    def state_dict(self) -> dict[str, Any]:
        """All rows so far, how many steps there were, and for how long each unit has been silent."""
        return {
            "options": self._options(),
            "recordings": {key: recording.state_dict() for key, recording in self.recordings.items()},
            "counts": dict(self._counts),
            "activity": {phase: activity.state_dict() for phase, activity in self._activity.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: It is of other layers, fields, steps or options than those of this object, which then stays as it is.
        """
        self._checked(state)()

    # -- for subclasses -----------------------------------------------------------------------------------------------

    def _checked(self, state: dict[str, Any]) -> Callable[[], None]:
        """Check a state without changing anything; what is returned takes it over."""
        own = type(self).__name__
        try:
            options, saved, counts = state["options"], state["recordings"], dict(state["counts"])
            names = self.names or next((table["names"] for table in saved.values()), [])
            activities = {phase: Activity(self.window) for phase in self._phases}
            for name, value in self._options().items():
                if options[name] != value:
                    raise ValueError(
                        f"the state was made with {name}={options[name]!r}, this {own} has {name}={value!r}."
                    )
            recordings = self._make(names) if saved or self.recordings else {}
            if saved and set(saved) != set(recordings):
                raise ValueError(f"the state has the tables {sorted(saved)}, this {own} has {sorted(recordings)}.")
            for key, table in saved.items():
                recordings[key].load_state_dict(table)
            if set(counts) != set(self._phases) or not all(type(n) is int and n >= 0 for n in counts.values()):
                raise ValueError(
                    f"counts={counts!r:.60}, wanted how many steps there were in {', '.join(self._phases)}."
                )
            for phase, activity in activities.items():
                activity.load_state_dict(state["activity"][phase])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no state of {own} ({type(error).__name__}: {error}).") from error

        def take() -> None:
            self._clear()
            self.recordings, self._counts, self._activity = recordings, counts, activities

        return take

    def _options(self) -> dict[str, Any]:
        """What the numbers depend on, beside the layers."""
        limits = [self.edges[0].item(), self.edges[-1].item()]
        of_histogram = {"histogram_every": self.histogram_every, "bins": len(self.edges) - 1, "limits": limits}
        return {"threshold": self.threshold, "window": self.window, "phases": list(self._phases)} | of_histogram

    @property
    def _main(self) -> Recording:
        return self.recordings[self._phases[0]]

    def _begin(self, names: Sequence[str]) -> None:
        """Begin anew, with these layers."""
        recordings = self._make(names)
        self._clear()
        self.recordings = recordings

    def _make(self, names: Sequence[str]) -> dict[str, Recording]:
        tables: dict[str, tuple[Sequence[str], int]] = dict.fromkeys(self._phases, (self.fields, self.every))
        if self.histogram_every is not None:
            tables["histogram"] = ([str(i) for i in range(len(self.edges) + 1)], self.histogram_every)
        share = self.max_memory // len(tables)
        return {key: Recording(names, fields, every=every, max_memory=share) for key, (fields, every) in tables.items()}

    def _clear(self) -> None:
        self._counts = dict.fromkeys(self._phases, 0)  # of the steps that came through
        self._activity = {phase: Activity(self.window) for phase in self._phases}

    def _flush(self) -> None:
        for recording in self.recordings.values():
            recording.flush()

    def _histogram(self, x: Tensor) -> Tensor:
        x = x.detach()
        if x.device not in self._edges:
            self._edges[x.device] = self.edges.to(x.device)
        return histogram(x.abs() if self.log_histogram else x, self._edges[x.device])

    def _rows(self, values: dict[str, Tensor], width: int) -> Tensor:
        """The values of all layers on one device, of shape (layers, width); NaN where there are none."""
        first = next(iter(values.values()), None)
        device = None if first is None else first.device
        missing = torch.full((width,), math.nan, device=device)
        rows = [values.get(name, missing) for name in self._main.names]
        return torch.stack([row.to(device, torch.float32, non_blocking=True) for row in rows])


def weight_layers(model: nn.Module) -> Any:
    """A selection: the layers with a weight matrix, or None (every leaf) if there are none."""
    return _has_weight if any(_has_weight(name, module) for name, module in model.named_modules()) else None


def widened(x: Tensor) -> Tensor:
    """Half precision as float32: a division may leave its range."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _has_weight(name: str, module: nn.Module) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear):  # attention's own last layer, which it never calls
        return False
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        return True
    if parametrize.is_parametrized(module, "weight"):
        return True
    keys = ("weight", "weight_v", "weight_orig")  # the last two: older forms of weight norm and pruning
    weights = [module._parameters.get(key) for key in keys]
    return any(weight is not None and (is_lazy(weight) or weight.ndim >= 2) for weight in weights)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted an int.")
    if value < 1:
        raise ValueError(f"{name}={value}, wanted at least 1.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _check_limits(limits: Any, log: bool) -> tuple[float, float]:
    pair = tuple(limits) if isinstance(limits, (tuple, list)) else ()
    most = torch.finfo(torch.float32).max
    fits = len(pair) == 2 and all(_is_number(v) and abs(v) <= most for v in pair) and pair[0] < pair[1]
    if not fits or (log and pair[0] <= 0):
        raise ValueError(f"limits={limits!r}, wanted two finite numbers (low, high), low < high{', both > 0' * log}.")
    return float(pair[0]), float(pair[1])
