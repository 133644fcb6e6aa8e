"""The histogram of each layer's values over time, as a map of bins and training batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minitrain.plot.axes import Save, as_axes, colour_bar, count_along_x, done, need_matplotlib, shown
from minitrain.plot.maps import cell_edges, shades
from minitrain.plot.tables import by_step, increasing, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from minitrain.plot.tables import Array

MOST_PANELS = 24
MOST_COLUMNS = 400  # of a panel: there are no more pixels


def histograms(
    names: Sequence[str],
    steps: Any,
    counts: Any,
    edges: Any,
    *,
    log_values: bool = False,
    ax: Any = None,
    save: Save = None,
) -> Figure:
    """The histogram of each layer's values over time: a panel a layer, brighter where more of the values lie.

    Colour is the fraction of the step's values that lie in the bin, on a logarithmic scale over at most four decades, the
    same in all panels. What lies outside of the bins is in two rows of its own, at the bottom and at the top. A step without
    values is a grey gap. Of more than 24 layers 24 are drawn, evenly spread; of more than 400 steps neighbouring ones are
    added up.

    Args:
        names: The names of the layers, in order of depth.
        steps: The number of the training batch for each row, increasing.
        counts: How many values lie in each bin, of shape (steps, layers, bins + 2): the first entry is for what lies below
            `edges[0]`, the last for what lies at or above `edges[-1]`.
        edges: The bins + 1 edges of the bins, increasing. If one bin is more than 20 times as wide as another, the axis is
            logarithmic on both sides of a linear middle.
        log_values: The values are absolute ones, and are drawn on a logarithmic axis; the edges must be positive.
        ax: The axes to draw on, one a layer that is drawn. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The shapes do not fit, steps or edges do not increase, a count is negative, or `ax` are too few axes.

    Example:
        >>> figure = histograms(["0"], [0, 1], [[[0, 2, 6, 0]], [[1, 3, 3, 1]]], [-1.0, 0.0, 1.0])
        >>> below, inside, above = figure.axes[0].collections
        >>> inside.get_array().tolist()
        [[0.25, 0.375], [0.75, 0.375]]
    """
    need_matplotlib()
    import numpy as np

    some(names)
    x, bounds = increasing("steps", steps), increasing("edges", edges)
    if len(bounds) < 2 or (log_values and bounds[0] <= 0):
        wanted = "two or more" if len(bounds) < 2 else "positive ones: log_values=True"
        raise ValueError(f"edges={edges!r}, wanted {wanted}.")
    table = by_step("counts", counts, len(x), names, len(bounds) + 1)
    if (table < 0).any():
        raise ValueError(f"counts: the lowest is {np.nanmin(table):g}, wanted none below 0.")
    n = len(names)
    layers = range(n) if n <= MOST_PANELS else [round(i * (n - 1) / (MOST_PANELS - 1)) for i in range(MOST_PANELS)]
    columns = min(4, len(layers))
    size = (1.2 + max(2.7 * columns, 3.6), 0.7 + 1.8 * -(-len(layers) // columns))
    axes = as_axes(ax, len(layers), size if len(layers) > 1 else (6.2, 3.8), columns=columns)
    x_edges, fractions = _fractions(x, table[:, layers])
    seen = fractions[fractions > 0]
    highest = float(seen.max()) if seen.size else 1.0
    lowest = max(float(seen.min()) if seen.size else 0.0, 1e-4 * highest)
    from matplotlib.colors import LogNorm

    norm = LogNorm(min(lowest, 0.1 * highest), highest, clip=True)  # clipped, an empty bin is dark and no gap
    for i, (panel, layer) in enumerate(zip(axes, layers, strict=False)):
        mesh = _histogram(panel, x_edges, bounds, fractions[:, i], norm, log_values)
        panel.set_title(_folded(shown(names[layer])), fontsize=8)
        if not len(x):
            panel.set_xticks([])
        if ax is not None or i + columns >= len(layers):
            panel.set_xlabel("training batch", fontsize=9)
        else:
            panel.tick_params(labelbottom=False)
        if ax is not None or i % columns == 0:
            panel.set_ylabel("|x|" if log_values else "x", fontsize=9)
        else:
            panel.tick_params(labelleft=False)
    colour_bar(axes[: len(layers)], mesh, label="fraction of the values", extend="min")
    if ax is None and len(layers) < n:
        axes[0].figure.suptitle(f"{len(layers)} of {n} layers", fontsize=11)
    return done(axes, save)


def _fractions(steps: Array, counts: Array) -> tuple[Array, Array]:
    """The bounds of the columns, and for each the counts divided by their sum, of shape (columns, layers, bins + 2)."""
    import numpy as np

    bounds = cell_edges(steps)
    if not len(steps):
        return bounds, np.full((1, *counts.shape[1:]), np.nan)
    every = -(-len(steps) // MOST_COLUMNS)
    starts = np.arange(0, len(steps), every)
    counts = np.add.reduceat(np.where(np.isfinite(counts), counts, 0), starts)
    total = counts.sum(-1, keepdims=True)
    return bounds[[*starts, -1]], np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def _histogram(axes: Axes, x: Array, edges: Array, fractions: Array, norm: Any, log_values: bool) -> Any:
    """Draw the fractions of one layer, of shape (columns, bins + 2); return the map of what lies in the bins."""
    import numpy as np

    widths = np.diff(edges)
    if log_values:
        axes.set_yscale("log")
    elif widths.max() > 20 * widths.min():
        axes.set_yscale("symlog", linthresh=float(max(widths.min(), 1e-6 * abs(edges).max())))
    to_paper = axes.yaxis.get_transform()
    bottom, top = to_paper.transform(edges[[0, -1]])
    row, space = 0.07 * (top - bottom), 0.03 * (top - bottom)
    below = to_paper.inverted().transform(np.array([bottom - space - row, bottom - space]))
    above = to_paper.inverted().transform(np.array([top + space, top + space + row]))
    parts = ((below, fractions[:, :1]), (edges, fractions[:, 1:-1]), (above, fractions[:, -1:]))
    style: dict[str, Any] = {"cmap": shades("viridis"), "norm": norm, "rasterized": True}
    meshes = [axes.pcolormesh(x, y, np.ma.masked_invalid(part.T), **style) for y, part in parts]
    outside = to_paper.inverted().transform(np.array([bottom - space - row / 2, top + space + row / 2]))
    _tick_values(axes, edges, outside)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(labelsize=7)
    count_along_x(axes)
    return meshes[1]


def _tick_values(axes: Axes, edges: Array, outside: Array) -> None:
    """About five ticks at values within the bins, and one for each of the two rows outside."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = edges[0], edges[-1]
    linear = axes.get_yscale() == "linear"
    ticks = (MaxNLocator(4) if linear else axes.yaxis.get_major_locator()).tick_values(low, high)
    to_paper = axes.yaxis.get_transform()
    bottom, top = to_paper.transform(edges[[0, -1]])
    margin = 0.08 * (top - bottom)  # so that the labels of the rows outside have room
    ticks = [tick for tick in ticks if bottom + margin < to_paper.transform([tick])[0] < top - margin]
    ticks = ticks[:: max(1, len(ticks) // 5)]
    labels = [f"{abs(tick) if tick == 0 else tick:g}" for tick in ticks]
    axes.set_yticks([outside[0], *ticks, outside[1]], [f"< {low:.2g}", *labels, f"≥ {high:.2g}"])
    axes.yaxis.set_minor_locator(NullLocator())


def _folded(name: str, width: int = 30) -> str:
    """A long name in two lines, broken behind a dot."""
    if len(name) <= width:
        return name
    dots = [i + 1 for i, letter in enumerate(name) if letter == "."]
    middle = min(dots, key=lambda i: abs(i - len(name) / 2), default=len(name) // 2)
    return f"{name[:middle]}\n{name[middle:]}"
