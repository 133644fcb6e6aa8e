"""Lines by training batch, one a layer, from dark to bright by depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minitrain.plot.axes import (
    MOST_IN_LEGEND,
    Save,
    as_axes,
    colours,
    count_along_x,
    done,
    finish,
    inches,
    key_of_depth,
    need_matplotlib,
)
from minitrain.plot.maps import draw_map, map_size
from minitrain.plot.tables import by_step, far_apart, increasing, levels, some, vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from minitrain.plot.tables import Array


def stats(names: Sequence[str], steps: Any, mean: Any, std: Any, *, ax: Any = None, save: Save = None) -> Figure:
    """Mean and standard deviation of each layer's output by training step, a line a layer, from dark to bright by depth.

    Up to twelve layers are named in a legend, beyond that a colour bar shows the depth.

    Args:
        names: The names of the layers, in order of depth.
        steps: The number of the training batch for each row.
        mean: The means, of shape (steps, layers): an array, a tensor or nested lists. NaN leaves a gap.
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
    axes = as_axes(ax, 2, (9.6 + inches(names), 3.8))
    x = vector("steps", steps)
    tables = [by_step(argument, table, len(x), names) for argument, table in (("mean", mean), ("std", std))]
    lines = [_line_a_layer(panel, x, table) for panel, table in zip(axes, tables, strict=False)]
    for panel, title in zip(axes, ("mean", "standard deviation"), strict=False):
        finish(panel, title, "training batch", legend=False)
    if far_apart(levels(tables[1])):
        axes[1].set_yscale("log", nonpositive="mask")
    else:
        axes[1].set_ylim(bottom=0)
    key_of_depth(axes[1], lines[1], names)
    return done(axes, save)


def dead(names: Sequence[str], steps: Any, fraction: Any, *, ax: Any = None, save: Save = None) -> Figure:
    """The fraction of dead units of each layer by training step, from 0 to 100 %.

    Up to twelve layers are lines with a legend, beyond that they are the rows of a map.

    Args:
        names: The names of the layers, in order of depth.
        steps: The number of the training batch for each row, increasing.
        fraction: The fractions in [0, 1], of shape (steps, layers): an array, a tensor or nested lists. NaN leaves a gap.
        ax: The axes to draw on. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The shapes do not fit, a fraction is not in [0, 1], or `ax` is no axes.

    Example:
        >>> figure = dead(["1", "3"], [0, 1], [[0.0, 0.1], [0.05, 0.4]])
        >>> figure.axes[0].get_title(), [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ('dead units', ['1', '3'])
    """
    need_matplotlib()
    import numpy as np

    some(names)
    x = increasing("steps", steps)
    table = by_step("fraction", fraction, len(x), names)
    table = np.where(np.isfinite(table), table, np.nan)
    wrong = np.argwhere((table < 0) | (table > 1))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(f"fraction[{row}, {column}]={table[row, column]:g}, wanted fractions in [0, 1].")
    few = len(names) <= MOST_IN_LEGEND
    axes = as_axes(ax, 1, (5.2 + inches(names), 3.8) if few else map_size(names))
    from matplotlib.ticker import PercentFormatter

    if few:
        lines = _line_a_layer(axes[0], x, table, clip_on=False, zorder=3)  # else half of a line at 0 % were cut off
        axes[0].set_ylim(0, 1)
        axes[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        finish(axes[0], "dead units", "training batch", legend=False)
        key_of_depth(axes[0], lines, names)
    else:
        bar = draw_map(axes[0], names, x, table, limits=(0, 1))
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes[0].set_title("dead units", fontsize=11)
    return done(axes, save)


def _line_a_layer(axes: Axes, steps: Array, table: Array, **style: Any) -> list[Any]:
    n = table.shape[1]
    style |= {"linewidth": 1.1 if n <= MOST_IN_LEGEND else 0.5, "marker": "." if len(steps) == 1 else ""}
    lines = [axes.plot(steps, table[:, i], color=colour, **style)[0] for i, colour in enumerate(colours(n))]
    count_along_x(axes)
    return lines
