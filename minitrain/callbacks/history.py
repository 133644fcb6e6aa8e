"""`History`: what each epoch brought, one row an epoch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from minitrain.csvfile import write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIRST = ("fit", "epoch", "train_loss", "valid_loss")
_LAST = ("lr", "seconds")


class History(list[dict[str, Any]]):
    """A list of rows, one an epoch, over all fits of a Learner; `print` shows a table.

    A row is a dict: `fit` and `epoch` count from 0 (bars and pictures from 1), `epoch` anew in each fit; `train_loss` and
    `valid_loss` are means over samples; then come the metrics as `valid_<name>`, the learning rate of the first parameter group
    at the end of the epoch, and its duration in seconds. A row of an epoch that was cut short has `partial=True`. A value that
    was not measured is None, or missing.

    Example:
        >>> history = History()
        >>> history.append({"fit": 0, "epoch": 0, "train_loss": 0.52, "lr": 0.01, "seconds": 1.5})
        >>> history.append({"fit": 0, "epoch": 1, "train_loss": 0.25, "lr": 0.01, "seconds": 1.5})
        >>> history.to_dict()["train_loss"]
        [0.52, 0.25]
        >>> print(history)
        fit  epoch  train_loss       lr  seconds
          0      0      0.5200  0.01000    1.500
          0      1      0.2500  0.01000    1.500
    """

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in order; `partial` comes last, and only if there is such a row."""
        seen = dict.fromkeys(key for row in self for key in row)
        metrics = [key for key in seen if key not in (*_FIRST, *_LAST, "partial")]
        return [*_FIRST, *metrics, *_LAST, *(["partial"] if "partial" in seen else [])]

    def to_dict(self) -> dict[str, list[Any]]:
        """Each column as a list, None where a row lacks it."""
        return {column: [row.get(column) for row in self] for column in self.columns}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a file with a header; what is missing is left empty, floats are exact.

        The file is written beside its place and then moved there: whoever reads it never sees half of it.

        Args:
            path: Where to. A file that is there is replaced.

        Raises:
            FileNotFoundError: The folder does not exist.
        """
        write_csv(path, self.columns, [[_plain(row.get(column, "")) for column in self.columns] for row in self])

    def plot(self, **kwargs: Any) -> Figure:
        """Draw losses and metrics by epoch; the arguments (`ax`, `save`) are those of `minitrain.plot.curves`.

        Returns:
            The matplotlib figure.
        """
        from minitrain import plot

        return plot.curves(self.to_dict(), **kwargs)

    def __str__(self) -> str:
        columns = {name: values for name, values in self.to_dict().items() if any(v is not None for v in values)}
        if not columns:
            return "no epochs yet"
        cells = [[name, *map(show, values)] for name, values in columns.items()]
        widths = [max(map(len, column)) for column in cells]
        lines = zip(*cells, strict=True)
        return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def _plain(value: Any) -> Any:
    """A number in place of a tensor that a callback has put into a row."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def show(value: Any) -> str:
    """A value for the eye: floats with four significant digits, nothing for None."""
    if isinstance(value, float):
        return f"{value:#.4g}".removesuffix(".")
    return "" if value is None else str(value)
