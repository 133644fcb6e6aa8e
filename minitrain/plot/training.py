"""Pictures of a training run as a whole: losses and metrics, the schedule, the search for a learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minitrain.plot.axes import PALETTE, Save, as_axes, count_along_x, done, finish, need_matplotlib
from minitrain.plot.tables import far_apart, levels, vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from minitrain.plot.tables import Array


def curves(columns: Mapping[str, Sequence[Any]], *, ax: Any = None, save: Save = None) -> Figure:
    """Training and validation loss by epoch, and the metrics, if there are any, beside them.

    Args:
        columns: `{name: values}`, a value an epoch, None where there is none: what `History.to_dict` gives. Drawn are
            `train_loss`, `valid_loss`, and as metrics the other `train_*` and `valid_*`.
        ax: The axes to draw on: one for the losses, or a pair for losses and metrics. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `ax` is neither of these.

    Example:
        >>> figure = curves({"train_loss": [0.9, 0.4], "valid_loss": [0.7, 0.5], "valid_accuracy": [0.6, 0.8]})
        >>> [axes.get_title() for axes in figure.axes]
        ['loss', 'metrics']
    """
    losses = {"train_loss": ("training", PALETTE[0]), "valid_loss": ("validation", PALETTE[1])}
    kinds = ("train_", "valid_")
    metrics = [name for name in columns if name.startswith(kinds) and name not in losses and _any(columns[name])]
    n_panels = 2 if metrics else 1
    axes = as_axes(ax, n_panels, (5.2 * n_panels, 3.8), at_least=1)
    for name, (label, colour) in losses.items():
        if name in columns and _any(columns[name]):
            _by_epoch(axes[0], columns[name], label=label, color=colour)
    finish(axes[0], "loss", "epoch")
    if metrics and len(axes) > 1:
        for i, name in enumerate(metrics):
            label = name.removeprefix("valid_").replace("train_", "training ")
            _by_epoch(axes[1], columns[name], label=label, color=PALETTE[i % len(PALETTE)])
        finish(axes[1], "metrics", "epoch")
    return done(axes, save)


def schedule(columns: Mapping[str, Sequence[Any]], *, ax: Any = None, save: Save = None) -> Figure:
    """Learning rate by optimiser step, and the momentum, if there is one, beside it.

    Learning rates of several parameter groups whose middle values differ by a factor of more than 50 are drawn on a
    logarithmic axis.

    Args:
        columns: `{name: values}`, a value an optimiser step, NaN or None where there is none. A name that begins with `lr`
            (`lr`, `lr 1`, ...) is a line of the first panel, one that begins with `momentum` of the second; others are not
            drawn.
        ax: The axes to draw on: one for the rates, or a pair for rates and momenta. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: A column is no list of numbers, or `ax` is neither of these.

    Example:
        >>> figure = schedule({"lr": [0.01, 0.1, 0.01], "momentum": [0.95, 0.85, 0.95]})
        >>> [axes.get_title() for axes in figure.axes]
        ['learning rate', 'momentum']
    """
    need_matplotlib()
    import numpy as np

    found = {name: vector(f"columns[{name!r}]", values) for name, values in columns.items() if _scheduled(name)}
    rates = {name: values for name, values in found.items() if name.startswith("lr")}
    momenta = {n: values for n, values in found.items() if n not in rates and not np.isnan(values).all()}
    n_panels = 2 if momenta else 1
    axes = as_axes(ax, n_panels, (5.2 * n_panels, 3.8), at_least=1)
    for panel, lines, title in zip(axes, (rates, momenta)[:n_panels], ("learning rate", "momentum"), strict=False):
        for i, (name, values) in enumerate(lines.items()):
            style: dict[str, Any] = {
                "color": PALETTE[i % len(PALETTE)],
                "linestyle": ("-", "--", ":")[i // len(PALETTE) % 3],
            }
            panel.plot(range(len(values)), values, label=name, marker="." if len(values) == 1 else "", **style)
        finish(panel, title, "optimiser step", legend=False)
        if len(lines) > 1:
            panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        count_along_x(panel)
    middle = [level for values in rates.values() for level in levels(values[:, None])]
    if far_apart(middle):
        axes[0].set_yscale("log", nonpositive="mask")
        axes[0].set_ylim(
            bottom=max(axes[0].get_ylim()[0], 1e-2 * min(middle))
        )  # a last rate of almost 0 squashes the rest
    else:
        axes[0].set_ylim(bottom=0)
    return done(axes, save)


def lr_find(
    rates: Sequence[float],
    losses: Sequence[float],
    *,
    suggestions: Mapping[str, float | None] | None = None,
    ax: Any = None,
    save: Save = None,
) -> Figure:
    """Loss by learning rate, on a logarithmic axis, with the rates that are suggested.

    The loss axis shows the way down to the lowest loss, and half as much above it: a loss that then explodes runs out of
    the picture, and does not squash the rest.

    Args:
        rates: The learning rate of each step.
        losses: The loss of each step; NaN or inf leaves a gap.
        suggestions: `{name: rate}`, drawn as vertical lines, and as points where they meet the curve. A rate that is None
            or NaN is left out.
        ax: The axes to draw on. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The lengths differ, a rate is not positive and finite, or `ax` is no axes.

    Example:
        >>> figure = lr_find([1e-4, 1e-3, 1e-2, 1e-1], [2.3, 2.0, 0.9, 80.0], suggestions={"steepest": 1e-3})
        >>> figure.axes[0].get_xscale(), bool(figure.axes[0].get_ylim()[1] < 4)
        ('log', True)
    """
    need_matplotlib()
    import numpy as np

    x = vector("rates", rates)
    y = vector("losses", losses, len(x))
    marks = {name: float(rate) for name, rate in (suggestions or {}).items() if rate is not None and rate == rate}
    named = [(f"rates[{i}]", rate) for i, rate in enumerate(x.tolist())]
    for name, rate in named + [(f"suggestions[{name!r}]", rate) for name, rate in marks.items()]:
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"{name}={rate!r}, wanted a positive finite learning rate.")
    (panel, *_) = axes = as_axes(ax, 1, (6.2, 3.8))
    y = np.where(np.isfinite(y), y, np.nan)
    panel.plot(x, y, color=PALETTE[0], linewidth=1.5, marker="." if len(x) == 1 else "")
    panel.set_xscale("log")
    drawn = np.flatnonzero(~np.isnan(y))
    drawn = drawn[np.argsort(x[drawn], kind="stable")]
    for i, (name, rate) in enumerate(marks.items()):
        style: dict[str, Any] = {"color": PALETTE[1 + i % 5], "linestyle": ("--", "-.", ":")[i % 3]}
        panel.axvline(rate, label=f"{name}: {rate:.2g}", **style)
        if len(drawn) and x[drawn[0]] <= rate <= x[drawn[-1]]:
            loss = np.interp(np.log(rate), np.log(x[drawn]), y[drawn])
            panel.plot(rate, loss, "o", color=style["color"], markersize=5)
    limits = _without_tail(y)
    if limits:
        panel.set_ylim(*limits)
    finish(panel, "search for a learning rate", "learning rate")
    panel.set_ylabel("loss")
    return done(axes, save)


def _without_tail(losses: Array) -> tuple[float, float] | None:
    """Limits that show the losses up to the lowest, and of what comes behind them half as much again."""
    import numpy as np

    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return None
    low = float(finite.min())
    top = float(np.quantile(finite[: int(finite.argmin()) + 1], 0.95))  # without a first batch that stands out
    way = max(top - low, 0.1 * abs(low), 1e-12)
    return low - 0.08 * way, max(top, min(float(finite.max()), top + 0.5 * way)) + 0.05 * way


def _scheduled(name: str) -> bool:
    return name.startswith(("lr", "momentum"))


def _by_epoch(axes: Axes, values: Sequence[Any], **style: Any) -> None:
    numbers = [float("nan") if value is None else float(value) for value in values]
    axes.plot(range(1, len(numbers) + 1), numbers, "o-", markersize=4, linewidth=1.5, **style)
    count_along_x(axes)


def _any(values: Sequence[Any]) -> bool:
    return any(value is not None for value in values)
