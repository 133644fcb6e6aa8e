"""All drawing, from names and arrays: each function returns the matplotlib figure, and needs no display."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Save = str | os.PathLike[str] | io.IOBase | None

_MOST_IN_LEGEND = 12
_GREY = "#8c8c8c"
_PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)  # Okabe and Ito's, safe for colour-blind readers


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
    losses = {"train_loss": ("training", _PALETTE[0]), "valid_loss": ("validation", _PALETTE[1])}
    kinds = ("train_", "valid_")
    metrics = [name for name in columns if name.startswith(kinds) and name not in losses and _any(columns[name])]
    axes = _axes(ax, 2 if metrics else 1, (5.2, 3.8), at_least=1)
    for name, (label, colour) in losses.items():
        if name in columns and _any(columns[name]):
            _by_epoch(axes[0], columns[name], label=label, color=colour)
    _finish(axes[0], "loss", "epoch")
    if metrics and len(axes) > 1:
        for i, name in enumerate(metrics):
            _by_epoch(
                axes[1],
                columns[name],
                label=name.removeprefix("valid_").replace("train_", "training "),
                color=_PALETTE[i % len(_PALETTE)],
            )
        _finish(axes[1], "metrics", "epoch")
    return _done(axes, save)


def stats(names: Sequence[str], steps: Any, mean: Any, std: Any, *, ax: Any = None, save: Save = None) -> Figure:
    """Mean and standard deviation of each layer's output by training step, a line a layer, from dark to bright by depth.

    Up to twelve layers are named in a legend, beyond that a colour bar shows the depth.

    Args:
        names: The names of the layers, in order of depth.
        steps: The number of the training batch for each row.
        mean: The means, of shape (steps, layers): an array, a CPU tensor or nested lists. NaN leaves a gap.
        std: The standard deviations, likewise.
        ax: A pair of axes to draw on. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The shapes do not fit, or `ax` is no pair of axes.

    Example:
        >>> figure = stats(["0", "2"], [0, 1], [[0.0, 0.1], [0.1, 0.0]], [[1.0, 0.9], [1.1, 1.0]])
        >>> [axes.get_title() for axes in figure.axes]
        ['mean', 'standard deviation']
    """
    axes = _axes(ax, 2, (5.2, 3.8))
    import numpy as np

    colours = _colours(len(names))
    width = 1.1 if len(names) <= _MOST_IN_LEGEND else 0.5
    for panel, title, table in ((axes[0], "mean", mean), (axes[1], "standard deviation", std)):
        table = np.asarray(table, dtype=float).reshape(-1, len(names)) if len(names) else np.empty((len(steps), 0))
        if len(table) != len(steps):
            raise ValueError(f"{title}: a table of shape {table.shape} for {len(steps)} steps and {len(names)} layers.")
        for column, name, colour in zip(table.T, names, colours, strict=True):
            marker = "." if len(steps) == 1 else ""
            panel.plot(steps, column, color=colour, linewidth=width, label=name, marker=marker)
        _finish(panel, title, "training batch", legend=False)
    levels = _levels(table)
    if len(levels) and max(levels) > 50 * min(levels):
        axes[1].set_yscale("log", nonpositive="mask")  # or the small ones would all lie on the axis
    else:
        axes[1].set_ylim(bottom=0)
    _key_of_depth(axes, names)
    return _done(axes, save)


def depth(
    names: Sequence[str], before: Sequence[float], after: Sequence[float], *, ax: Any = None, save: Save = None
) -> Figure:
    """Standard deviation of each layer by depth, before and after an initialisation, on a logarithmic axis.

    Args:
        names: The names of the layers, in order of depth.
        before: Their standard deviations before; NaN where there is none. A value of 0 has no place on the axis.
        after: Their standard deviations after.
        ax: The axes to draw on. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The lengths differ, or `ax` is no axes.

    Example:
        >>> figure = depth(["0", "2"], [0.3, 0.05], [1.0, 1.0])
        >>> figure.axes[0].get_yscale()
        'log'
    """
    if not len(names) == len(before) == len(after):
        raise ValueError(
            f"{len(names)} names, {len(before)} values before, {len(after)} after: wanted one each a layer."
        )
    axes = _axes(ax, 1, (min(5.2 + 0.12 * len(names), 12), 3.8))
    panel, x = axes[0], range(len(names))
    panel.axhline(1, color=_GREY, linewidth=0.8, zorder=0)
    for label, values, colour in (("before", before, _PALETTE[1]), ("after", after, _PALETTE[0])):
        if any(value == value for value in values):  # not all NaN
            panel.plot(x, values, "o-", color=colour, markersize=4, linewidth=1.2, label=label)
    panel.set_yscale("log", nonpositive="mask")
    _finish(panel, "standard deviation by depth", "layer")
    every = -(-len(names) // 30)  # at most thirty names fit under the axis
    panel.set_xticks(list(x)[::every], list(names)[::every], rotation=90 if len(names) > 8 else 0, fontsize=8)
    return _done(axes, save)


def _figure(n_panels: int, size: tuple[float, float]) -> list[Axes]:
    try:
        from matplotlib.figure import Figure  # not pyplot: that keeps every figure, and may want a display
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "minitrain[plot]"') from error
    figure = Figure(figsize=(size[0] * n_panels, size[1]), layout="constrained")
    return [figure.add_subplot(1, n_panels, i + 1) for i in range(n_panels)]


def _axes(ax: Any, n_panels: int, size: tuple[float, float], at_least: int | None = None) -> list[Axes]:
    """The axes given, or those of a new figure."""
    if ax is None:
        return _figure(n_panels, size)
    axes = list(ax.flat) if hasattr(ax, "flat") else list(ax) if isinstance(ax, (list, tuple)) else [ax]
    wanted = n_panels if at_least is None else at_least
    if len(axes) < wanted or not all(hasattr(a, "plot") and hasattr(a, "figure") for a in axes):
        raise ValueError(f"ax={ax!r}, wanted matplotlib axes, {wanted} of them.")
    return axes


def _colours(n: int) -> list[Any]:
    """`n` colours that are ordered, and that colour-blind readers can tell apart."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    return [shades(0.9 * i / max(n - 1, 1)) for i in range(n)]  # the last tenth is too bright for white paper


def _by_epoch(axes: Axes, values: Sequence[Any], **style: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = [float("nan") if value is None else float(value) for value in values]
    axes.plot(range(1, len(numbers) + 1), numbers, "o-", markersize=4, linewidth=1.5, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _levels(table: Any) -> list[float]:
    """The middle value of each layer's column, of those that have a positive one."""
    import numpy as np

    return [float(np.median(positive)) for column in table.T if len(positive := column[column > 0])]


def _any(values: Sequence[Any]) -> bool:
    return any(value is not None for value in values)


def _finish(axes: Axes, title: str, xlabel: str, legend: bool = True) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _key_of_depth(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Which colour is which layer: by name, or where they are many by depth."""
    if not len(names):
        return
    last = axes[-1]
    if len(names) <= _MOST_IN_LEGEND:
        last.legend(title="layer", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(0, len(names) - 1), ListedColormap(_colours(256)))
    bar = last.figure.colorbar(scale, ax=last, label="layer")
    ticks = [round(i * (len(names) - 1) / 5) for i in range(6)]
    bar.set_ticks(ticks, labels=[names[i] for i in ticks])


def _done(axes: Sequence[Axes], save: Save) -> Figure:
    figure: Any = axes[0].figure
    if save is not None:
        figure.savefig(save, dpi=150)
    return figure  # type: ignore[no-any-return]
