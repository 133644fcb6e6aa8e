"""`ActivationStats` and `GradientStats`: what each layer's output looks like, and what gradient it gets, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from minitrain.callbacks.recorder import MAX_MEMORY, Recorder, weight_layers, widened
from minitrain.hooks import Hooks, first_tensor
from minitrain.measures import FIELDS, measure, norm
from minitrain.recording import Recording
from minitrain.units import active_units, batch_dim, unit_dims

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minitrain.learner import Learner


class _Look(NamedTuple):
    numbers: Tensor
    active: Tensor  # which units
    n: int  # values
    histogram: Tensor | None


class LayerStats(Recorder):
    """What `ActivationStats` and `GradientStats` share: hooks on layers for the time of a fit, a row a recorded step.

    Nothing waits for the device: a step leaves one small row there, and up to 64 rows come to the CPU in one copy. The rows can
    be read at any time, in the midst of training too (which waits for the device). They append over the epochs of a fit; a new
    fit begins anew. A cancelled batch leaves no row, and does not count.
    """

    kind: ClassVar[str]
    called: list[str]  # the layers in the order of their calls (of their gradients) in the first recorded step

    @contextmanager
    def during_fit(self, learn: Learner) -> Iterator[None]:
        """Hooks on the layers, for as long as the fit lasts."""

        def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._recording is None or learn.phase != "fit" or learn.training != self._training:
                return  # not this step, or a validation in its midst
            if self.kind == "forward" and name in self._looks:
                return
            x = first_tensor(output)
            if x is not None:
                self._note(name, module, x if learn.scaler is None else self._unscaled(x, learn))

        select = weight_layers(learn.model) if self.select is None else self.select
        try:
            with Hooks(learn.model, note, select, self.kind) as hooks:
                self._dims = unit_dims(learn.model)
                self._begin(hooks.names)
                yield
        finally:
            self._recording, self._looks, self._dims = None, {}, {}
            self._flush()

    def before_batch(self, learn: Learner) -> None:
        """From here on outputs are measured, if this step is one to be recorded."""
        if learn.phase != "fit":
            return
        phase = "train" if learn.training else "valid"
        recording, count = self.recordings.get(phase), self._counts.get(phase, 0)
        self._training, self._looks = learn.training, {}
        self._takes_histogram = phase == self._phases[0] and self._histograms_want(count)
        self._recording = recording if recording is not None and recording.wants(count) else None
        if self._takes_histogram and self._recording is None:
            self._recording = recording

    def after_batch(self, learn: Learner) -> None:
        """The batch has come through: keep what was measured."""
        if learn.phase != "fit":
            return
        phase = "train" if learn.training else "valid"
        if phase not in self._counts:
            return
        if self._recording is not None:
            self._keep(phase, self._counts[phase])
        self._counts[phase] += 1
        self._recording, self._looks = None, {}

    def state_dict(self) -> dict[str, Any]:
        """All rows so far, how many steps there were, and for how long each unit has been silent."""
        return super().state_dict() | {"called": list(self.called)}

    @property
    def signal_share(self) -> Tensor:
        """The part of the variance that lies between samples (up to 64), of shape (steps, layers), from 0 to about 1."""
        return self["signal_share"]

    # -----------------------------------------------------------------------------------------------------------------

    _positive: ClassVar[bool]  # whether only values above zero make a unit active
    _recording: Recording | None  # of this step; None where it is not recorded
    _training: bool
    _takes_histogram: bool
    _looks: dict[str, _Look]
    _dims: dict[nn.Module, int]

    def _clear(self) -> None:
        super()._clear()
        self._recording, self._looks, self.called = None, {}, []

    def _checked(self, state: dict[str, Any]) -> Callable[[], None]:
        take = super()._checked(state)
        called = list(state.get("called", ()))
        if not all(isinstance(name, str) for name in called):
            raise ValueError(f"called={called!r:.60}, wanted names of layers.")

        def take_all() -> None:
            take()
            self.called = called

        return take_all

    def _histograms_want(self, count: int) -> bool:
        return "histogram" in self.recordings and self.recordings["histogram"].wants(count)

    def _unscaled(self, x: Tensor, learn: Learner) -> Tensor:
        return x

    def _note(self, name: str, module: nn.Module, x: Tensor) -> None:
        try:
            numbers = measure(x, self.threshold, batch_dim(module))
        except TypeError:  # complex, sparse, quantised
            return
        active = active_units(x, self._dims.get(module, 1), self._positive)
        self._looks[name] = _Look(numbers, active, x.numel(), self._histogram(x) if self._takes_histogram else None)

    def _keep(self, phase: str, step: int) -> None:
        looks, recording = self._looks, self.recordings[phase]
        self.called = self.called or list(looks)
        if recording.wants(step):
            activity = self._activity[phase]
            rows = {name: self._numbers(look, activity.add(name, look.active)) for name, look in looks.items()}
            recording.put(step, self._rows(rows, len(self.fields)))
        if self._takes_histogram:
            counts = {name: look.histogram for name, look in looks.items() if look.histogram is not None}
            self.recordings["histogram"].put(step, self._rows(counts, len(self.edges) + 1))

    def _numbers(self, look: _Look, dead: Tensor) -> Tensor:
        return torch.cat([look.numbers, dead.to(look.numbers)[None]])


class ActivationStats(LayerStats):
    """Record what each selected layer's output looks like, step by step.

    For every recorded step and layer: mean, standard deviation, smallest and largest value, the number of values that are not
    finite, the fraction near zero, the fraction of dead units, the signal share, and where asked for a histogram.

    Nothing waits for the device: a step leaves one small row there, and up to 64 rows come to the CPU in one copy. The rows can
    be read at any time, in the midst of training too (which waits for the device). They append over the epochs of a fit; a new
    fit begins anew. A cancelled batch leaves no row, and does not count.

    Of a layer that is called several times in a step the first call counts; of an output with several tensors the first one.

    A unit (a channel of a convolution, a feature of a linear layer) is dead if its output was never above zero in the last
    `window` recorded steps: nothing of it passes a ReLU. Of a net with norms between layer and ReLU select the norms
    (`select=[nn.BatchNorm2d]`) or the activations. Of layers that no ReLU follows (the last one) it says little.

    Args:
        select: Which layers, as in `Hooks`: types, names, globs, a predicate, or a list of these. None: the layers with a
            weight of two or more dimensions (linear, convolution, embedding, recurrent, attention), or, without any, every leaf
            module.
        every: Record every n-th batch, the first one included.
        train: Record training batches.
        valid: Record the batches of the validations within the fit: `stats.valid["mean"]`; without `train` they are the
            object's own rows.
        threshold: The largest |x| that counts as near zero.
        window: How many recorded steps without activity make a unit dead.
        histogram_every: Take a histogram every n-th batch. None: never.
        bins: The number of its bins.
        limits: Where its bins begin and end; what lies outside is counted in two bins of their own.
        max_memory: The bound on the memory for all rows, in bytes. When a table is full every second row is dropped, and from
            then on only every second step is recorded. The default of 64 MiB holds 40,000 steps of 50 layers.

    Attributes:
        recordings: The tables themselves.
        edges: The edges of the histogram's bins, of shape (bins + 1,).

    Raises:
        TypeError: `every`, `window`, `bins`, `histogram_every` or `max_memory` is no int, `train` or `valid` no bool.
        ValueError: One of them is not positive, `train` and `valid` are both off, or `threshold` or `limits` is wrong. In the
            fit: `select` matches nothing, or `max_memory` is too small for these layers.

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

    kind = "forward"
    fields = (*FIELDS, "dead")
    _positive = True

    def __init__(
        self,
        select: Any = None,
        *,
        every: int = 1,
        train: bool = True,
        valid: bool = False,
        threshold: float = 0.05,
        window: int = 10,
        histogram_every: int | None = None,
        bins: int = 40,
        limits: tuple[float, float] = (-10.0, 10.0),
        max_memory: int = MAX_MEMORY,
    ) -> None:
        for name, value in {"train": train, "valid": valid}.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted a bool.")
        if not (train or valid):
            raise ValueError("train=False and valid=False: there is nothing to record. Set one of them.")
        super().__init__(
            select,
            every=every,
            phases=("train",) * train + ("valid",) * valid,
            threshold=threshold,
            window=window,
            histogram_every=histogram_every,
            bins=bins,
            limits=limits,
            max_memory=max_memory,
        )

    @property
    def valid(self) -> Recording:
        """The rows of the validation batches: `stats.valid["mean"]`, `stats.valid.steps`.

        Raises:
            ValueError: They are not recorded, or there was no fit yet.
        """
        if "valid" not in self.recordings:
            raise ValueError("no validation was recorded: ActivationStats(valid=True), and then a fit with one.")
        return self.recordings["valid"]


class GradientStats(LayerStats):
    """Record what gradient each selected layer's output gets, step by step: of the loss with respect to the output.

    For every recorded step and layer: what `ActivationStats` records, of the gradient, and its `norm`. Gradients are those of
    the loss as it is, also where a `GradScaler` scales it. Of a layer that is called several times in a step the first call
    counts; of several backward passes in a step the last one.

    A unit (a channel of a convolution, a feature of a linear layer) is dead if its gradient was zero in all of the last
    `window` recorded steps: it learns nothing.

    Args:
        select: Which layers, as in `Hooks`. None: as in `ActivationStats`.
        every: Record every n-th training batch, the first one included.
        threshold: The largest |x| that counts as near zero; by default what is lost in half precision (2 ** -24).
        window: How many recorded steps without a gradient make a unit dead.
        histogram_every: Take a histogram of |gradient| every n-th batch, in bins of equal size on a logarithmic scale. None:
            never.
        bins: The number of its bins.
        limits: Where its bins begin and end.
        max_memory: The bound on the memory for all rows, in bytes, kept as in `ActivationStats`.

    Raises:
        TypeError: As in `ActivationStats`.
        ValueError: As in `ActivationStats`.

    Example:
        >>> from minitrain import BatchLoader, DataLoaders, Learner
        >>> x = torch.linspace(-1, 1, 12).reshape(-1, 1)
        >>> model = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> stats = GradientStats()
        >>> learn = Learner(model, DataLoaders(BatchLoader(x, x, batch_size=4)), nn.MSELoss(), cbs=[stats], progress=False)
        >>> learn.fit(1)
        >>> stats.names, tuple(stats.norm.shape)
        (['0', '2'], (3, 2))
    """

    kind = "backward"
    fields = (*FIELDS, "dead", "norm")
    log_histogram = True
    _positive = False

    def __init__(
        self,
        select: Any = None,
        *,
        every: int = 1,
        threshold: float = 2.0**-24,
        window: int = 10,
        histogram_every: int | None = None,
        bins: int = 56,
        limits: tuple[float, float] = (1e-12, 1e2),
        max_memory: int = MAX_MEMORY,
    ) -> None:
        super().__init__(
            select,
            every=every,
            threshold=threshold,
            window=window,
            histogram_every=histogram_every,
            bins=bins,
            limits=limits,
            max_memory=max_memory,
        )

    @property
    def norm(self) -> Tensor:
        """The norm of the gradient over all its values, of shape (steps, layers)."""
        return self["norm"]

    def plot_flow(self, **kwargs: Any) -> Figure:
        """Draw the gradient's norm by depth; arguments (`ax`, `save`) as of `minitrain.plot.gradient_flow`."""
        from minitrain import plot

        return plot.gradient_flow(self.names, self.norm, **kwargs)

    def _unscaled(self, x: Tensor, learn: Learner) -> Tensor:
        assert learn.scaler is not None
        return widened(x) / learn.scaler.scale(torch.ones((), device=x.device))

    def _numbers(self, look: _Look, dead: Tensor) -> Tensor:
        size = norm(look.numbers[0], look.numbers[1], look.n)
        return torch.cat([look.numbers, torch.stack([dead.to(size), size])])
