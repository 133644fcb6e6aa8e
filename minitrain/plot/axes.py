"""Figures, axes, colours and labels that all drawings share."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Save = str | os.PathLike[str] | io.IOBase | None

MOST_IN_LEGEND = 12
GREY = "#8c8c8c"
GAP = "#dcdcdc"  # where a map has no value
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)  # Okabe and Ito's, safe for colour-blind readers


def need_matplotlib() -> None:
    """Say what to install where matplotlib, and numpy with it, is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "minitrain[plot]"') from error


def as_axes(
    ax: Any, n_panels: int, size: tuple[float, float], *, at_least: int | None = None, columns: int | None = None
) -> list[Axes]:
    """The axes given, or those of a new figure of `size` inches, `columns` of them beside one another (None: all)."""
    if ax is None:
        return _new(n_panels, size, columns or n_panels)
    axes = list(ax.flat) if hasattr(ax, "flat") else list(ax) if isinstance(ax, (list, tuple)) else [ax]
    wanted = n_panels if at_least is None else at_least
    if len(axes) < wanted or not all(hasattr(a, "plot") and hasattr(a, "figure") for a in axes):
        raise ValueError(f"ax={ax!r}, wanted matplotlib axes, {wanted} of them.")
    return axes


def colours(n: int) -> list[Any]:
    """`n` colours that are ordered, and that colour-blind readers can tell apart."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    return [shades(0.9 * i / max(n - 1, 1)) for i in range(n)]  # the last tenth is too bright for white paper


def shown(name: str, most: int = 48) -> str:
    """A layer's name as it is written in a picture: of a very long one the beginning and the end."""
    if len(name) > most:
        name = f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"
    return name.replace("$", r"\$") or "(model)"  # matplotlib takes dollars for mathematics


def inches(names: Sequence[str], fontsize: float = 8) -> float:
    """About how wide the longest of the names is."""
    return 0.6 * fontsize / 72 * max((len(shown(name)) for name in names), default=0)


def upright(names: Sequence[str], width: float) -> bool:
    """Whether the names of layers must be turned to find room under an axis of this width in inches."""
    return len(names) * (inches(names) + 0.1) > width


def name_layers(axes: Axes, names: Sequence[str], axis: str = "x") -> None:
    """Names of layers along an axis: as many as have room, at most thirty."""
    box, dpi = axes.get_window_extent(), axes.figure.dpi
    length = (box.width if axis == "x" else box.height) / dpi
    every = -(-len(names) // max(1, min(30, int(length / 0.16))))
    ticks = range(0, len(names), every)
    labels = [shown(names[i]) for i in ticks]
    if axis == "y":
        axes.set_yticks(ticks, labels, fontsize=8)
    else:
        axes.set_xticks(ticks, labels, fontsize=8, rotation=90 if upright(labels, length) else 0)


def count_along_x(axes: Axes) -> None:
    """Ticks at whole numbers, no more than have room."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def colour_bar(axes: Sequence[Axes], mesh: Any, **options: Any) -> Any:
    """A colour bar beside these axes, about 0.2 inches wide however high they are."""
    figure: Any = axes[0].figure
    height = figure.bbox.height / figure.dpi
    return figure.colorbar(mesh, ax=list(axes), aspect=max(20, 4.5 * height), extendfrac=0.03, **options)


def finish(axes: Axes, title: str, xlabel: str, *, legend: bool = True) -> None:
    """Title, label, grid, and a legend if there is something to name."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(framealpha=0.8, edgecolor="none")  # lines may pass below it


def key_of_depth(axes: Axes, lines: Sequence[Any], names: Sequence[str]) -> None:
    """Which line is which layer: by name, or where they are many by depth."""
    if not len(names):
        return
    if len(names) <= MOST_IN_LEGEND:
        style: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False, "fontsize": 8}
        legend = axes.legend(lines, [str(i) for i in range(len(names))], title="layer", **style)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(shown(name))  # in this way a name that begins with _ is shown, too
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(0, len(names) - 1), ListedColormap(colours(256)))
    bar = colour_bar([axes], scale, label="layer")
    ticks = [round(i * (len(names) - 1) / 5) for i in range(6)]
    bar.set_ticks(ticks, labels=[shown(names[i]) for i in ticks], fontsize=8)
    bar.ax.invert_yaxis()  # the first layer on top, as in the legend


def done(axes: Sequence[Axes], save: Save) -> Figure:
    """The figure, saved if that was asked for."""
    figure: Any = axes[0].figure.canvas.figure  # that of a SubFigure, too
    if save is not None:
        figure.savefig(save, dpi=150)
    return figure  # type: ignore[no-any-return]


def _new(n_panels: int, size: tuple[float, float], columns: int) -> list[Axes]:
    need_matplotlib()
    from matplotlib.figure import Figure  # not pyplot: that keeps every figure, and may want a display

    figure = Figure(figsize=size, layout="constrained")
    return [figure.add_subplot(-(-n_panels // columns), columns, i + 1) for i in range(n_panels)]
