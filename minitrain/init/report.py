"""`InitReport`: what an init stage did, one row a layer, readable when printed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FINE = frozenset({"normalized", "reused", "no_bias", "scaled", "drawn", "measured"})
"""The statuses of a layer with which the stage did all that can be done."""


@dataclass(frozen=True)
class LayerRow:
    """What a stage found at one layer, and what it did there.

    Attributes:
        name: The layer's dotted name; empty where the model itself is the layer.
        kind: The name of its class.
        status: One word; the stage's own documentation lists them.
        reason: Why the status is what it is; empty where nothing needs explaining.
        excused: The layer was left as it is by intent: frozen, left out, shared, or zero by design.
        mean_before: Mean over all values before the stage; None where it could not be measured.
        std_before: Standard deviation (n - 1 in the denominator), likewise.
        mean_after: Mean as measured after the stage; None where it was not measured.
        std_after: Standard deviation, likewise.
        count: The number of values that were measured.
        calls: How often the layer was called in one forward pass.
        signal_share: The part of the output's variance that lies between samples, from 0 to about 1; None where it cannot be
            told (a single sample).
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    excused: bool = False
    mean_before: float | None = None
    std_before: float | None = None
    mean_after: float | None = None
    std_after: float | None = None
    count: int = 0
    calls: int = 0
    signal_share: float | None = None

    @property
    def ok(self) -> bool:
        """The stage did what it is for, or left the layer alone by intent."""
        return self.excused or self.status in FINE


@dataclass(frozen=True)
class InitReport:
    """What an init stage did: iterate over its rows, look one up by the layer's name, print it.

    Attributes:
        stage: The name of the stage.
        rows: A row a layer, in order of execution; layers that were never called come last.
        forwards: The number of forward passes of the model.
        seconds: How long the stage took.
        of: What the means and standard deviations are taken of: "outputs" or "weights".

    Example:
        >>> from minitrain.init import InitReport, LayerRow
        >>> report = InitReport("Mine", (LayerRow("0", "Linear", "drawn", std_before=0.21, std_after=1.0),))
        >>> report.ok, report["0"].std_after, [row.name for row in report]
        (True, 1.0, ['0'])
    """

    stage: str
    rows: tuple[LayerRow, ...]
    forwards: int = 0
    seconds: float = 0.0
    of: str = "outputs"

    @property
    def ok(self) -> bool:
        """Every layer is as the stage wants it, or was left alone by intent (frozen, left out, shared, zero by design)."""
        return all(row.ok for row in self.rows)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> LayerRow:
        """The row of the layer with this dotted name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}: there is no such layer in this report, only {[row.name for row in self.rows]}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types, ready for JSON."""
        return {**asdict(self), "rows": [{**asdict(row), "ok": row.ok} for row in self.rows], "ok": self.ok}

    def plot(self, **kwargs: Any) -> Figure:
        """Draw mean and standard deviation by depth, before and after; the arguments are those of `minitrain.plot.depth`.

        Args:
            **kwargs: `save`, and `ax`: with a single one only the standard deviation is drawn.

        Returns:
            The matplotlib figure.
        """
        from minitrain import plot

        rows = [row for row in self.rows if row.std_before is not None]

        def values(name: str) -> list[float]:
            return [math.nan if (value := getattr(row, name)) is None else value for row in rows]

        return plot.depth(
            [row.name for row in rows],
            values("std_before"),
            values("std_after"),
            mean_before=values("mean_before"),
            mean_after=values("mean_after"),
            **kwargs,
        )

    def summary(self) -> str:
        """One line: how many layers of each status, forward passes, seconds."""
        statuses = ", ".join(f"{n} {status}" for status, n in Counter(row.status for row in self.rows).items())
        layers = _count(len(self.rows), "layer")
        what = "" if self.of == "outputs" else f" (µ and σ are those of the {self.of})"
        return f"{self.stage}: {layers}: {statuses or 'nothing to do'}; {self._passes()}, {self.seconds:.2f} s{what}"

    def _passes(self) -> str:
        return _count(self.forwards, "forward pass", "forward passes")

    def __str__(self) -> str:
        return f"{self._table()}\n{self.summary()}"

    def _table(self) -> str:
        rows = self.rows
        measured_after = any(row.std_after is not None for row in rows)
        columns = [
            ["layer", *(row.name or "(model)" for row in rows)],
            ["class", *(row.kind for row in rows)],
            ["µ before" if measured_after else "µ", *(_number(row.mean_before) for row in rows)],
            ["σ before" if measured_after else "σ", *(_number(row.std_before) for row in rows)],
        ]
        if measured_after:
            columns.append(["µ after", *(_number(row.mean_after) for row in rows)])
            columns.append(["σ after", *(_number(row.std_after) for row in rows)])
        if measured_after and any(row.signal_share is not None for row in rows):
            columns.append(["signal", *(_share(row.signal_share) for row in rows)])
        if any(row.status != "measured" for row in rows):
            columns.append(["status", *(f"{row.status}: {row.reason}".removesuffix(": ") for row in rows)])
        widths = [max(map(len, column)) for column in columns]
        right = [column[0][0] in "µσ" or column[0] == "signal" for column in columns]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in zip(*columns, strict=True)
        )


@dataclass(frozen=True)
class LSUVReport(InitReport):
    """What LSUV did; `print(report)` shows mean µ and standard deviation σ of every weight layer before and after.

    With `scope="channel"` µ and σ are those of the channels that are furthest off; with `where="activation"` they are taken
    behind the activation. With several batches they are those of all batches together.

    Attributes:
        batch: The shapes of the inputs that the statistics were taken on.
        batches: The number of batches.
        strategy: How the batches were gone through: "one batch", "lock-step" or "streaming".
        why: Why in this way; empty for one batch.
        verified: What is reported as "after" was measured in passes of their own, which are among `forwards`.
        verify_seconds: How much of `seconds` these took.
        unowned: Names of parameters with two or more dimensions that belong to no weight layer that LSUV knows, such as an
            embedding, or a weight that a module of your own multiplies with: they are left as they are.
        warnings: What you should know although all has gone well; a line each.
    """

    batch: str = ""
    batches: int = 1
    strategy: str = "one batch"
    why: str = ""
    verified: bool = False
    verify_seconds: float = 0.0
    unowned: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def signal_share(self) -> float | None:
        """The signal share of the last layer that was normalised: what of its variance tells samples apart."""
        shares = [row.signal_share for row in self.rows if row.status in FINE and row.signal_share is not None]
        return shares[-1] if shares else None

    def summary(self) -> str:
        """How many layers of each status, forward passes, seconds; what "before" means; and a line for all else."""
        lines = [f"{super().summary()}, batch {self.batch}"]
        if self.batches > 1:
            lines.append(f"{self.batches} batches as one, in {self.strategy}: {self.why}")
        which = "before" if self.verified else "µ and σ are those before"
        lines.append(f"{which}: as each layer was met, behind those that were normalised already")
        if self.unowned:
            lines.append(f"left as they are, in no layer that LSUV knows: {', '.join(self.unowned)}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _passes(self) -> str:
        extra = self.batches if self.verified else 0
        passes = _count(self.forwards - extra, "forward pass", "forward passes")
        return f"{passes} and {extra} to verify" if extra else passes


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:.3f}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if value >= 1e-3 else f"{value:.0e}"
