"""Pictures with the depth of the net along the x axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minitrain.plot.axes import (
    GREY,
    PALETTE,
    Save,
    as_axes,
    done,
    finish,
    inches,
    name_layers,
    need_matplotlib,
    upright,
)
from minitrain.plot.tables import array, by_step, some, vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from minitrain.plot.tables import Array


def depth(
    names: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    *,
    mean_before: Sequence[float] | None = None,
    mean_after: Sequence[float] | None = None,
    ax: Any = None,
    save: Save = None,
) -> Figure:
    """Standard deviation of each layer by depth, before and after an initialisation, and below it the mean.

    The standard deviations have a logarithmic axis. That of the means is linear; where they are so different that most of
    them would lie on 0, it is logarithmic on both sides of a linear middle.

    Args:
        names: The names of the layers, in order of depth.
        before: Their standard deviations before; NaN where there is none. A value of 0 has no place on the axis.
        after: Their standard deviations after.
        mean_before: Their means before; NaN where there is none. None, or NaN throughout, here and after: no second panel.
        mean_after: Their means after.
        ax: The axes to draw on: one for the standard deviations, or a pair. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The lengths differ, or `ax` is neither of these.

    Example:
        >>> figure = depth(["0", "2"], [0.3, 0.05], [1.0, 1.0], mean_before=[0.1, -0.2], mean_after=[0.0, 0.0])
        >>> [(axes.get_ylabel(), axes.get_yscale()) for axes in figure.axes]
        [('standard deviation', 'log'), ('mean', 'linear')]
    """
    need_matplotlib()
    import numpy as np

    if not len(names) == len(before) == len(after):
        raise ValueError(
            f"{len(names)} names, {len(before)} values before, {len(after)} after: wanted one each a layer."
        )
    nothing, n = [math.nan] * len(names), len(names)
    stds = vector("before", before, n), vector("after", after, n)
    means = (
        vector("mean_before", nothing if mean_before is None else mean_before, n),
        vector("mean_after", nothing if mean_after is None else mean_after, n),
    )
    n_panels = 1 if np.isnan(means).all() else 2
    axes = as_axes(ax, n_panels, _size(names, n_panels), at_least=1, columns=1)
    _before_and_after(axes[0], names, stds, around=1)
    axes[0].set_yscale("log", nonpositive="mask")
    finish(axes[0], "standard deviation by depth", "layer")
    axes[0].set_ylabel("standard deviation")
    if n_panels == 2 and len(axes) > 1:
        linear = _linear_part(means)
        if linear:
            axes[1].set_yscale("symlog", linthresh=linear)
        _before_and_after(axes[1], names, means, around=0)
        finish(axes[1], "mean by depth", "layer", legend=False)
        axes[1].set_ylabel("mean")
        if ax is None:  # one lies on the other
            axes[0].set_xlabel("")
            axes[0].tick_params(labelbottom=False)
    return done(axes, save)


def gradient_flow(names: Sequence[str], norm: Any, *, ax: Any = None, save: Save = None) -> Figure:
    """Norm of the gradient at each layer's output by depth, on a logarithmic axis.

    Drawn are the median over the steps, the band from the 10th to the 90th percentile, and the first and the last step.

    Args:
        names: The names of the layers, in order of depth.
        norm: The norms, of shape (steps, layers): an array, a tensor or nested lists. NaN, inf and 0 leave a gap, and are not
            counted in.
        ax: The axes to draw on. None: a new figure.
        save: Where to save the picture: a path, or a binary file. None: nowhere.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The shapes do not fit, or `ax` is no axes.

    Example:
        >>> figure = gradient_flow(["0", "2"], [[0.01, 0.2], [0.03, 0.3], [0.02, 0.4]])
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [0.02, 0.3]
    """
    need_matplotlib()
    import numpy as np

    some(names)
    found = array("norm", norm)
    table = by_step("norm", found, len(found) if found.size else 0, names)
    table = np.where(np.isfinite(table) & (table > 0), table, np.nan)
    counted = [column[~np.isnan(column)] for column in table.T]
    low, middle, high = (
        np.array([np.quantile(column, q) if len(column) else np.nan for column in counted]) for q in (0.1, 0.5, 0.9)
    )
    axes = as_axes(ax, 1, _size(names, 1))
    panel, x = axes[0], np.arange(len(names))
    panel.plot(x, middle, "o-", color=PALETTE[0], markersize=4, linewidth=1.5, label="median", zorder=3)
    there = ~np.isnan(middle)
    if len(table) > 1 and there.any():
        panel.fill_between(x, low, high, color=PALETTE[0], alpha=0.2, linewidth=0, label="10 to 90 % of the steps")
        panel.vlines(
            x[there], low[there], high[there], color=PALETTE[0], alpha=0.3, linewidth=1
        )  # seen between gaps, too
        for row, line, colour, label in ((0, ":", PALETTE[1], "first step"), (-1, "--", PALETTE[2], "last step")):
            panel.plot(x, table[row], line, marker=".", markersize=3, color=colour, linewidth=1, alpha=0.8, label=label)
    panel.set_yscale("log", nonpositive="mask")
    finish(panel, "gradient norm by depth", "layer")
    panel.set_ylabel("norm of the gradient")
    name_layers(panel, names)
    return done(axes, save)


def _size(names: Sequence[str], n_panels: int) -> tuple[float, float]:
    width = min(5.2 + 0.12 * len(names), 12)
    return width, 1 + 2.8 * n_panels + (inches(names) if upright(names, 0.85 * width) else 0)


def _before_and_after(axes: Axes, names: Sequence[str], values: Sequence[Array], around: float) -> None:
    import numpy as np

    axes.axhline(around, color=GREY, linewidth=0.8, zorder=0)
    for label, numbers, colour in zip(("before", "after"), values, (PALETTE[1], PALETTE[0]), strict=True):
        if not np.isnan(numbers).all():
            axes.plot(range(len(names)), numbers, "o-", color=colour, markersize=4, linewidth=1.2, label=label)
    name_layers(axes, names)


def _linear_part(means: Sequence[Array]) -> float | None:
    """Where the logarithmic parts of the axis begin; None where a linear one shows all."""
    import numpy as np

    sizes = [abs(found) for values in means if len(found := values[np.isfinite(values) & (values != 0)])]
    if not sizes:
        return None
    highest, middle = max(size.max() for size in sizes), max(np.median(size) for size in sizes)
    if not highest > 50 * middle:
        return None
    return float(10.0 ** np.floor(np.log10(max(middle, 1e-6 * highest))))
