"""`Monitor`: one column of the history, and which way is better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitrain.learner import Learner


class Monitor:
    """Read a value from the history's rows and tell whether it is better than another one.

    Args:
        name: A column: "train_loss", "valid_loss", or "valid_<metric>".
        mode: "min", "max", or None: a loss is to be small, and of a metric its attribute `higher_is_better` tells.
        argument: What the user calls `name`, for error messages.

    Raises:
        TypeError: `name` is no text.
        ValueError: `mode` is something else.
    """

    def __init__(self, name: str, mode: str | None = None, argument: str = "monitor") -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"{argument}={name!r} (type={type(name).__name__}), wanted the name of a column of the history."
            )
        if mode not in ("min", "max", None):
            raise ValueError(f"mode={mode!r}, wanted 'min', 'max', or None.")
        self.name, self.mode, self._argument = name, mode, argument

    def check(self, learn: Learner) -> None:
        """Find out, before anything is trained, that there will be such a column, and which way is better.

        Raises:
            ValueError: There is no such column (the message lists those that there are), or the way is not known.
        """
        columns: dict[str, Any] = {"train_loss": None}
        if learn.dls.valid is not None:
            columns |= {"valid_loss": None, **{f"valid_{name}": metric for name, metric in learn.metrics.items()}}
        if self.name not in columns:
            if self.mode is not None and any(not hasattr(m, "func") for m in columns.values() if m is not None):
                return  # a metric that computes several values names them only when it does
            raise ValueError(
                f"{self._argument}={self.name!r}: the history has no such column, but {', '.join(columns)}."
            )
        self.mode = self.mode or _mode_of(self.name, columns[self.name])
        if self.mode is None:
            raise ValueError(
                f"{self._argument}={self.name!r}: whether a high or a low value is better is not known. Say mode='max' or "
                "mode='min'."
            )

    def value(self, row: dict[str, Any]) -> float:
        """The value in a row; NaN where it was not measured, as in an epoch whose validation was cancelled.

        Raises:
            ValueError: No row will have it.
        """
        if self.name not in row and any(name.startswith("valid_") for name in row):
            raise ValueError(f"{self._argument}={self.name!r}: the history has no such column, but {', '.join(row)}.")
        value = row.get(self.name)
        return math.nan if value is None else float(value)

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether `value` is better than the best so far; NaN never is, and any number is better than none."""
        if math.isnan(value):
            return False
        return than is None or (value > than if self.mode == "max" else value < than)


def _mode_of(name: str, metric: Any) -> str | None:
    if name.endswith("loss"):
        return "min"
    higher = getattr(metric, "higher_is_better", None)
    return None if higher is None else "max" if higher else "min"
