"""`ParameterStats`: weights, their gradients, and how far each optimiser step moves them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minitrain.callbacks.recorder import MAX_MEMORY, Recorder, widened
from minitrain.hooks import select_modules
from minitrain.measures import FIELDS, measure, norm
from minitrain.moments import mean_std
from minitrain.units import active_units

if TYPE_CHECKING:
    from minitrain.learner import Learner

_OF_WEIGHTS = FIELDS[:-1]  # parameters have no samples, and so no signal share
_OF_GRADIENTS = ("grad_mean", "grad_std", "grad_norm", "grad_nonfinite")
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


class _Look(NamedTuple):
    weights: Tensor  # their numbers, and those of the gradients
    gradients: Tensor
    active: Tensor | None  # which units; None where there are none
    before: Tensor | None  # the weights, where the step may change them


class ParameterStats(Recorder):
    """Record weights, their gradients, and the update-to-weight ratio, optimiser step by optimiser step.

    For every recorded step and parameter: of the weights before the step mean, standard deviation, smallest and largest
    value, the number of values that are not finite, and the fraction near zero; of the gradient mean, standard deviation, norm
    and the number of values that are not finite; `update_ratio`, which is ||change|| / ||weights||, for a healthy net about
    1e-3; and the fraction of dead units. Where a parameter has no gradient, all that depends on it is NaN; where it has a
    sparse one, all but `update_ratio`.

    A unit (a row of a weight matrix, that is an output feature or channel) is dead if its gradient was zero in all of the last
    `window` recorded steps: it learns nothing, as behind a ReLU that never opens. Embeddings have no such units.

    Rows come to the CPU as in `ActivationStats`. A skipped step leaves no row, and does not count. Gradients are as the
    optimiser gets them: accumulated, clipped, and without the scale of a `GradScaler`. A `train_batch` of your own that fires
    neither `before_step` nor `after_step` leaves no rows.

    Args:
        select: Which modules, as in `Hooks`; of these all parameters of their own. None: every parameter of two or more
            dimensions, or, without any, every parameter.
        every: Record every n-th optimiser step, the first one included. A recorded step keeps a copy of the weights for its
            duration.
        threshold: The largest |x| that counts as near zero.
        window: How many recorded steps without a gradient make a unit dead.
        histogram_every: Take a histogram of the weights every n-th step. None: never.
        bins: The number of its bins.
        limits: Where its bins begin and end; what lies outside is counted in two bins of their own.
        max_memory: The bound on the memory for all rows, in bytes, kept as in `ActivationStats`.

    Raises:
        TypeError: As in `ActivationStats`.
        ValueError: As in `ActivationStats`; in the fit also: the selected modules have no parameters of their own.

    Example:
        >>> from minitrain import BatchLoader, DataLoaders, Learner
        >>> x = torch.linspace(-1, 1, 12).reshape(-1, 1)
        >>> stats = ParameterStats(every=1)
        >>> dls = DataLoaders(BatchLoader(x, 2 * x, batch_size=4))
        >>> learn = Learner(nn.Linear(1, 1), dls, nn.MSELoss(), opt_func=torch.optim.SGD, lr=0.1, cbs=[stats], progress=False)
        >>> learn.fit(1)
        >>> stats.names, tuple(stats.update_ratio.shape)
        (['weight'], (3, 1))
    """

    order = 50  # after those that change gradients before a step
    fields = (*_OF_WEIGHTS, "dead", *_OF_GRADIENTS, "update_ratio")

    def __init__(
        self,
        select: Any = None,
        *,
        every: int = 10,
        threshold: float = 1e-3,
        window: int = 10,
        histogram_every: int | None = None,
        bins: int = 40,
        limits: tuple[float, float] = (-1.0, 1.0),
        max_memory: int = MAX_MEMORY,
    ) -> None:
        self._parameters: dict[str, tuple[nn.Parameter, int | None]] = {}
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
    def grad_mean(self) -> Tensor:
        """The means of the gradients, of shape (steps, parameters)."""
        return self["grad_mean"]

    @property
    def grad_std(self) -> Tensor:
        """Their standard deviations, likewise."""
        return self["grad_std"]

    @property
    def grad_norm(self) -> Tensor:
        """Their norms, likewise."""
        return self["grad_norm"]

    @property
    def grad_nonfinite(self) -> Tensor:
        """How many of their values were NaN or infinite, likewise."""
        return self["grad_nonfinite"]

    @property
    def update_ratio(self) -> Tensor:
        """||weights after - weights before|| / ||weights before||, likewise; infinite where the weights were zero."""
        return self["update_ratio"]

    @contextmanager
    def during_fit(self, learn: Learner) -> Iterator[None]:
        """Look up the parameters, and let go of them at the end."""
        try:
            self._parameters = _select_parameters(learn.model, self.select)
            self._begin(list(self._parameters))
            yield
        finally:
            self._parameters = {}
            self._drop()
            self._flush()

    def before_step(self, learn: Learner) -> None:
        """Measure weights and gradients, and keep the weights for a comparison."""
        step = self._counts["train"]
        if self._main.wants(step):
            scale = _scale(learn)
            for name, (p, dim) in self._parameters.items():
                self._looks[name] = self._look(p, dim, scale)
        table = self.recordings.get("histogram")
        if table is not None and table.wants(step):
            self._counts_of_step = {
                name: self._histogram(p) for name, (p, _) in self._parameters.items() if _is_real(p)
            }

    def after_step(self, learn: Learner) -> None:
        """The step was made: see how far it went, and keep the row."""
        step = self._counts["train"]
        if self._looks:
            rows = {name: self._row(name, look) for name, look in self._looks.items()}
            self._main.put(step, self._rows(rows, len(self.fields)))
        if self._counts_of_step:
            self.recordings["histogram"].put(step, self._rows(self._counts_of_step, len(self.edges) + 1))
        self._counts["train"] += 1
        self._drop()

    def after_cancel_step(self, learn: Learner) -> None:
        """The step was skipped: it leaves no row."""
        self._drop()

    # -----------------------------------------------------------------------------------------------------------------

    _looks: dict[str, _Look]  # of the step that is about to be made
    _counts_of_step: dict[str, Tensor]

    def _clear(self) -> None:
        super()._clear()
        self._drop()

    def _drop(self) -> None:
        self._looks, self._counts_of_step = {}, {}

    def _look(self, p: nn.Parameter, dim: int | None, scale: Tensor | None) -> _Look:
        before = None if p.grad is None else p.detach().clone()
        missing = torch.full((len(_OF_GRADIENTS),), math.nan, device=p.device)
        if _is_real(p):
            weights = measure(p, self.threshold)[: len(_OF_WEIGHTS)]
        else:
            weights = missing.new_full((len(_OF_WEIGHTS),), math.nan)
        if p.grad is None or not _is_real(p.grad):
            return _Look(weights, missing, None, before)
        grad = p.grad if scale is None else widened(p.grad) / scale.to(p.grad.device)
        mean, std = mean_std(grad)
        nonfinite = grad.numel() - grad.isfinite().sum()
        numbers = torch.stack([mean, std, norm(mean, std, grad.numel()), nonfinite.to(mean)])
        return _Look(weights, numbers, None if dim is None else active_units(grad, dim, positive=False), before)

    def _row(self, name: str, look: _Look) -> Tensor:
        weights, p = look.weights, self._parameters[name][0]
        dead = ratio = weights.new_full((), math.nan)
        if look.active is not None:
            dead = self._activity["train"].add(name, look.active)
        if look.before is not None:
            ratio = _length(p.detach() - look.before) / _length(look.before)
        return torch.cat(
            [weights, torch.stack([dead]).to(weights), look.gradients.to(weights), ratio.to(weights)[None]]
        )


def _is_real(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_complex()


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(widened(x))
    return length


def _select_parameters(model: nn.Module, select: Any) -> dict[str, tuple[nn.Parameter, int | None]]:
    """The parameters by name, each with the dimension of its units; None where it has none."""
    modules = set(model.modules()) if select is None else set(select_modules(model, select).values())
    found: dict[str, tuple[nn.Parameter, int | None]] = {}
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        owner = _owner(model, name)
        if owner in modules:
            for key, p in module.named_parameters(prefix=name, recurse=False):
                if p not in seen:
                    found[key] = p, _unit_dim(owner, p)
                seen.add(p)
    if not found:
        which = (
            f"the {type(model).__name__} has no parameters"
            if select is None
            else "these modules have none of their own"
        )
        raise ValueError(f"select={select!r}: there are no parameters to look at, {which}.")
    matrices = {key: (p, dim) for key, (p, dim) in found.items() if p.ndim >= 2}
    return matrices if select is None and matrices else found


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module to which a parameter belongs in the user's eyes: not the parametrisation that holds it."""
    parts = name.split(".")
    if "parametrizations" in parts:
        name = ".".join(parts[: parts.index("parametrizations")])
    return model.get_submodule(name)


def _unit_dim(module: nn.Module, p: nn.Parameter) -> int | None:
    if p.ndim == 0 or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None
    return 1 if isinstance(module, _TRANSPOSED) and p.ndim > 1 else 0


def _scale(learn: Learner) -> Tensor | None:
    """By what the gradients are multiplied before this step; None where by nothing."""
    if learn.scaler is None:
        return None
    states: Any = getattr(learn.scaler, "_per_optimizer_states", {})
    stage = states[id(learn.opt)]["stage"] if id(learn.opt) in states else None
    if getattr(stage, "name", "READY") != "READY":  # a clip has unscaled them
        return None
    return learn.scaler.scale(torch.ones((), device=learn.device))
