"""Maps: a colour for each value, with the training batch along the x axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minitrain.plot.axes import (
    GAP,
    Save,
    as_axes,
    colour_bar,
    count_along_x,
    done,
    inches,
    name_layers,
    need_matplotlib,
)
from minitrain.plot.tables import by_step, far_apart, increasing, some, vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from minitrain.plot.tables import Array


def heatmap(
    names: Sequence[str],
    steps: Any,
    values: Any,
    *,
    label: str = "",
    log: bool | None = None,
    limits: tuple[float, float] | None = None,
    ax: Any = None,
    save: Save = None,
) -> Figure:
    """A map of layers and training steps: the first layer on top, the value as colour, brighter where it is higher.

    Values of both signs have a diverging map with white at 0. Without limits the colours span all values but the outermost
    0.5 % on each side; an arrow at the colour bar says that there are values beyond. Each step's column reaches half-way to
    its neighbours.

    Args:
        names: The names of the layers, in order of depth.
        steps: The number of the training batch for each row, increasing.
        values: The values, of shape (steps, layers): an array, a tensor or nested lists. NaN and inf are grey gaps.
        label: What the values are, for the colour bar.
        log: A logarithmic scale of colours; zeros and negative values are then gaps. None: where no value is negative, and
            the positive ones span more than a factor of 50.
        limits: The values where the colours end. None: those of the data.
        ax: The axes to draw on. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The shapes do not fit, the steps do not increase, `limits` are not in order (or not positive on a
            logarithmic scale), or `ax` is no axes.

    Example:
        >>> figure = heatmap(["0", "2"], [0, 1, 5], [[1.0, 0.5], [1.1, 0.4], [1.2, 0.3]], label="standard deviation")
        >>> figure.axes[0].collections[0].get_array().tolist()
        [[1.0, 1.1, 1.2], [0.5, 0.4, 0.3]]
    """
    need_matplotlib()
    some(names)
    x = increasing("steps", steps)
    table = by_step("values", values, len(x), names)
    if limits is not None:
        low, high = vector("limits", limits, 2).tolist()
        if not (-float("inf") < low < high < float("inf")) or (log and low <= 0):
            raise ValueError(
                f"limits={limits!r}, wanted two {'positive' if log else 'finite'} numbers, the lower one first."
            )
        limits = low, high
    axes = as_axes(ax, 1, map_size(names))
    draw_map(axes[0], names, x, table, label=label, log=log, limits=limits)
    return done(axes, save)


def map_size(names: Sequence[str]) -> tuple[float, float]:
    """Inches of a figure that holds a map of these layers."""
    return 6.4 + inches(names), min(max(1.4 + 0.2 * len(names), 2.6), 7.2)


def draw_map(
    axes: Axes,
    names: Sequence[str],
    steps: Array,
    table: Array,
    *,
    label: str = "",
    log: bool | None = None,
    limits: tuple[float, float] | None = None,
) -> Any:
    """Draw a table of shape (steps, layers), and return the colour bar."""
    import numpy as np

    map_name, norm, extend = _scale(table, log, limits)
    usable = np.isfinite(table) & ((table > 0) | (not _is_log(norm)))
    columns = table if len(steps) else np.full((1, len(names)), np.nan)
    mesh = axes.pcolormesh(
        cell_edges(steps),
        np.arange(len(names) + 1) - 0.5,
        np.ma.masked_array(columns, ~usable if len(steps) else True).T,
        cmap=shades(map_name),
        norm=norm,
        rasterized=True,  # in a PDF a million cells would be a million rectangles
    )
    axes.invert_yaxis()
    count_along_x(axes)
    if not len(steps):
        axes.set_xticks([])
    axes.set_xlabel("training batch")
    axes.set_ylabel("layer")
    name_layers(axes, names, axis="y")
    return colour_bar([axes], mesh, label=label, extend=extend)


def cell_edges(steps: Array) -> Array:
    """The bounds of the steps' columns, half-way between them; of one step, or none, one batch wide."""
    import numpy as np

    if len(steps) < 2:
        return np.array([-0.5, 0.5]) + (steps[0] if len(steps) else 0)
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def shades(name: str) -> Any:
    """A map of colours, grey where there is no value."""
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad=GAP)


def _scale(table: Array, log: bool | None, limits: tuple[float, float] | None) -> tuple[str, Any, str]:
    """The name of the map of colours, the norm, and on which sides there are values beyond."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm

    finite = table[np.isfinite(table)]
    positive = finite[finite > 0]
    if log is None:
        negative = len(positive) < len(finite) and float(finite.min()) < 0
        log = not negative and far_apart(_inner(positive)) and (limits is None or limits[0] > 0)
    values = positive if log else finite
    low, high = limits or _inner(values) or ((0.1, 1) if log else (0, 1))
    diverging = low < 0 < high
    if limits is None and diverging:
        high = max(-low, high)
        low = -high
    elif low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    below, above = bool((values < low).any()), bool((values > high).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    if log:
        return "viridis", LogNorm(low, high), extend
    return ("PuOr", TwoSlopeNorm(0, low, high), extend) if diverging else ("viridis", Normalize(low, high), extend)


def _inner(values: Array) -> tuple[float, float] | tuple[()]:
    """Between which values all lie but the outermost 0.5 % on each side; of less than 200 the lowest and the highest."""
    import numpy as np

    if not len(values):
        return ()
    low, high = np.quantile(values, 0.005, method="lower"), np.quantile(values, 0.995, method="higher")
    return float(low), float(high)


def _is_log(norm: Any) -> bool:
    from matplotlib.colors import LogNorm

    return isinstance(norm, LogNorm)
