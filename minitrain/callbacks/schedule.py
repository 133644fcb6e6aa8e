"""`OneCycle`: the one-cycle schedule of learning rate and momentum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from minitrain.callback import Callback
from minitrain.errors import DataError
from minitrain.optim import rate_of
from minitrain.optimizer_state import alike
from minitrain.passes import loader_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minitrain.learner import Learner

# What torch's scheduler writes into the parameter groups.
_GROUP_KEYS = ("lr", "betas", "momentum", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")


class OneCycle(Callback):
    """Raise the learning rate to a peak and lower it to almost nothing, once in a fit; momentum goes the other way.

    It is torch's `OneCycleLR`, moved on after every optimiser step, so with the same numbers the rates are the same to the
    bit. When the fit ends, in whatever way, learning rates and momenta are as they were before it.

    Args:
        lr_max: The highest learning rate, of every parameter group. None: for each group the one that it has.
        total_steps: The number of optimiser steps of the fit. None: epochs times training batches. Steps beyond it are made
            at the last rate.
        **options: What torch's `OneCycleLR` takes besides: `pct_start`, `anneal_strategy`, `cycle_momentum`,
            `base_momentum`, `max_momentum`, `div_factor`, `final_div_factor`, `three_phase`. Unless told by
            `cycle_momentum`, momentum is cycled only if the optimiser uses momentum (or betas) in every group.

    Attributes:
        lrs: The learning rate of the first group at each step of the last fit.
        momentums: Its momentum (or first beta) at each step; NaN where the optimiser has none.

    Raises:
        TypeError: `lr_max` is no number, or there is no such option.
        ValueError: `lr_max` is not positive and finite, or torch refuses an option.

    Example:
        >>> from minitrain import BatchLoader, DataLoaders, Learner
        >>> x = torch.linspace(-1, 1, 40).reshape(-1, 1)
        >>> dls = DataLoaders(BatchLoader(x, 2 * x, batch_size=4))
        >>> cycle = OneCycle(0.1)
        >>> learn = Learner(torch.nn.Linear(1, 1), dls, torch.nn.MSELoss(), cbs=[cycle], lr=0.01, progress=False)
        >>> learn.fit(2)
        >>> len(cycle.lrs), max(cycle.lrs), learn.opt.param_groups[0]["lr"]
        (20, 0.1, 0.01)

    References:
        Smith, Topin, *Super-Convergence*, 2018, https://arxiv.org/abs/1708.07120.
    """

    def __init__(self, lr_max: float | None = None, *, total_steps: int | None = None, **options: Any) -> None:
        if lr_max is not None:
            if isinstance(lr_max, bool) or not isinstance(lr_max, (int, float)):
                raise TypeError(f"lr_max={lr_max!r} (type={type(lr_max).__name__}), wanted a number.")
            if not (math.isfinite(lr_max) and lr_max > 0):
                raise ValueError(f"lr_max={lr_max!r}, wanted a positive finite number.")
        if total_steps is not None and (isinstance(total_steps, bool) or not isinstance(total_steps, int)):
            raise TypeError(f"total_steps={total_steps!r} (type={type(total_steps).__name__}), wanted an int.")
        _try_out(total_steps, options)
        self.lr_max, self.total_steps, self.options = lr_max, total_steps, options
        self.lrs: list[float] = []
        self.momentums: list[float] = []
        self._scheduler: OneCycleLR | None = None
        self._before: list[dict[str, Any]] = []  # the groups' values when the fit began
        self._is_over = False  # a fit that goes on where nothing is left of it

    @contextmanager
    def during_fit(self, learn: Learner) -> Iterator[None]:
        """Remember the optimiser's values, and put them back at the end."""
        opt = learn.opt
        self._before = [_values(group) for group in opt.param_groups]
        wrapped = "step" in vars(opt)
        try:
            yield
        finally:
            self._scheduler = None
            _put_back(opt, self._before)
            if not wrapped:  # torch wraps `opt.step` for its schedulers, and leaves it so
                for key in ("step", "_opt_called"):
                    vars(opt).pop(key, None)

    def before_fit(self, learn: Learner) -> None:
        """Begin the cycle."""
        self._is_over = learn.position is not None and learn.position[0] >= learn.n_epochs
        self.lrs, self.momentums = [], []
        groups = learn.opt.param_groups
        total = self.total_steps if self.total_steps is not None else _count_steps(learn)
        rates = [rate_of(group) if self.lr_max is None else self.lr_max for group in groups]
        lr_max = [rate for rate in rates if rate is not None]
        if len(lr_max) < len(groups):
            raise ValueError("lr_max=None, but a parameter group has no learning rate. Give one: OneCycle(lr_max=...).")
        options = {"cycle_momentum": all(_momentum(group) for group in groups)} | self.options
        try:
            self._scheduler = OneCycleLR(learn.opt, lr_max, total_steps=total, **options)
        except ZeroDivisionError:
            raise ValueError(
                f"total_steps={total} is too few for these options of OneCycle: {options}: a phase has no step. Train "
                "longer, or choose another pct_start."
            ) from None

    def after_step(self, learn: Learner) -> None:
        """Note what this step used, and move on."""
        group, scheduler = learn.opt.param_groups[0], self._scheduler
        assert scheduler is not None
        self.lrs.append(float(group["lr"]))
        self.momentums.append(_momentum(group, math.nan))
        if scheduler.last_epoch < scheduler.total_steps - 1:  # the cycle's last rate stays
            if any("max_lr" not in group for group in learn.opt.param_groups):
                raise ValueError(
                    "a parameter group was added within a cycle, which has no rate for it. Give all groups from the start "
                    "(Learner(splitter=...)), and thaw them by requires_grad_(True)."
                )
            scheduler.step()

    def after_fit(self, learn: Learner) -> None:
        """Warn if the cycle was not gone through: the net may have been left at a high rate."""
        scheduler = self._scheduler
        assert scheduler is not None
        made, total = len(self.lrs), scheduler.total_steps
        if made < 0.9 * total and learn.stop_reason is None and not self._is_over:
            cause = "updates or batches were cancelled" if made else "train_batch is overridden and fires no after_step"
            rate = float(learn.opt.param_groups[0]["lr"])
            warnings.warn(
                f"OneCycle has made {made} of its {total} steps ({cause}?), and ended at lr={rate:.3g}. "
                "Give the number of optimiser steps: OneCycle(total_steps=...).",
                UserWarning,
                stacklevel=2,
            )

    def plot(self, **kwargs: Any) -> Figure:
        """Draw learning rate and momentum by step; the arguments (`ax`, `save`) are those of `minitrain.plot.schedule`.

        Returns:
            The matplotlib figure.
        """
        from minitrain import plot

        return plot.schedule({"lr": self.lrs, "momentum": self.momentums}, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The rates so far; within a fit also where the cycle stands, and what is to be put back at its end."""
        state: dict[str, Any] = {"lrs": list(self.lrs), "momentums": list(self.momentums)}
        if self._scheduler is not None:
            groups = [_values(group) for group in self._scheduler.optimizer.param_groups]
            state |= {"scheduler": self._scheduler.state_dict(), "groups": groups, "before": self._before}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rates back; within a fit also go on in the cycle.

        Raises:
            ValueError: The state is of another cycle: of another length, another highest rate, or other options.
        """
        scheduler = self._scheduler
        lrs, momentums = [float(rate) for rate in state["lrs"]], [float(value) for value in state["momentums"]]
        if scheduler is not None and "scheduler" not in state and not self._is_over:
            raise ValueError("the cycle had come to its end when this was saved: load the file, and begin another fit.")
        if scheduler is not None and "scheduler" in state:
            saved, own = state["scheduler"], scheduler.state_dict()
            if saved["total_steps"] != own["total_steps"]:
                raise ValueError(
                    f"the cycle was of {saved['total_steps']} steps, now it is of {own['total_steps']}. Train for as many "
                    "epochs as it was made for; then load the result, and begin another fit."
                )
            for key in own:
                if key not in ("last_epoch", "_step_count", "_last_lr") and saved[key] != own[key]:
                    raise ValueError(f"the cycle was made with {key}={saved[key]!r:.80}, now it is {own[key]!r}.")
            present = [_values(group) for group in scheduler.optimizer.param_groups]
            if not (_fits(state["groups"], present) and _fits(state["before"], self._before)):
                raise ValueError("the cycle was made for other parameter groups.")
            for key in ("last_epoch", "_step_count"):
                if type(saved[key]) is not int or not 0 <= saved[key] <= own["total_steps"]:
                    raise ValueError(f"{key}={saved[key]!r:.40} is no step of this cycle.")
            if not alike(saved["_last_lr"], own["_last_lr"]):
                raise ValueError(f"_last_lr={saved['_last_lr']!r:.40} are no rates of this cycle.")
            scheduler.load_state_dict({key: saved[key] for key in own})
            _put_back(scheduler.optimizer, state["groups"])
            self._before = state["before"]
        self.lrs, self.momentums = lrs, momentums


def _fits(saved: Any, present: list[dict[str, Any]]) -> bool:
    """Whether values of parameter groups can stand for others."""
    return len(saved) == len(present) and all(
        set(a) <= set(_GROUP_KEYS) and "lr" in a and all(alike(a[key], b.get(key, 0.0)) for key in a)
        for a, b in zip(saved, present, strict=True)
    )


def _try_out(total_steps: int | None, options: dict[str, Any]) -> None:
    """Let torch check the options now, on an optimiser of no account, rather than in the fit."""
    own = {"optimizer", "max_lr", "epochs", "steps_per_epoch", "last_epoch"} & set(options)
    if own:
        raise TypeError(f"OneCycle gives {', '.join(sorted(own))} to OneCycleLR itself; use lr_max and total_steps.")
    n_groups = max([1, *(len(value) for value in options.values() if isinstance(value, (list, tuple)))])
    groups = [{"params": [torch.zeros(1)]} for _ in range(n_groups)]
    try:
        opt = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        OneCycleLR(opt, 1.0, total_steps=1_000_003 if total_steps is None else total_steps, **options)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        raise kind(f"OneCycle(total_steps={total_steps}{given}): torch's OneCycleLR refuses that: {error}") from error


def _count_steps(learn: Learner) -> int:
    batches = loader_length(learn.dls.train)
    if batches is None:
        raise DataError(
            f"the training loader ({type(learn.dls.train).__name__}) has no len(), so OneCycle cannot know how long its cycle "
            "is. Tell it: OneCycle(total_steps=...)."
        )
    return learn.n_epochs * batches


def _momentum(group: dict[str, Any], default: float = 0.0) -> float:
    value = group["betas"][0] if "betas" in group else group.get("momentum", default)
    return float(value)


def _values(group: dict[str, Any]) -> dict[str, Any]:
    values = {key: group[key] for key in _GROUP_KEYS if key in group}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _put_back(opt: Optimizer, saved: list[dict[str, Any]]) -> None:
    for group, values in zip(opt.param_groups, saved, strict=False):  # groups may have been added since
        for key in _GROUP_KEYS:
            if key not in values:
                group.pop(key, None)
            elif isinstance(group.get(key), Tensor):
                group[key].copy_(values[key])  # a captured graph reads this very tensor
            else:
                group[key] = values[key]
