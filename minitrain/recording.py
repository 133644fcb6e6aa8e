"""`Recording`: a table of (steps, layers, numbers) that never outgrows its memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minitrain.csvfile import write_csv

_BLOCK = 64  # rows that wait on the device


class Recording(Mapping[str, Tensor]):
    """Rows of numbers, one a recorded step, each with some fields for every layer; `recording["mean"]` is (steps, layers).

    Rows wait on the device in a block of up to 64, and come to the CPU in one copy. Both buffers are allocated once, and
    together stay within `max_memory`: when the table is full every second row is dropped, and from then on only every second
    step is recorded, so that the steps stay evenly spaced over the whole run. Numbers are float32; what lies beyond its range
    becomes infinite or zero.

    Args:
        names: The layers.
        fields: What is noted of each.
        every: Record every n-th step, the first one included.
        max_memory: The bound, in bytes.

    Attributes:
        names: The layers.
        fields: What is noted of each.
        stride: By how much decimation has thinned the rows: now every (every * stride)-th step is recorded.
        capacity: How many rows the table holds at most.

    Raises:
        ValueError: `max_memory` does not hold four rows.

    Example:
        >>> recording = Recording(["a", "b"], ["mean"], every=2, max_memory=1024)
        >>> for step in range(5):
        ...     if recording.wants(step):
        ...         recording.put(step, torch.tensor([[1.0], [float(step)]]))
        >>> recording.steps, recording["mean"].tolist()
        ([0, 2, 4], [[1.0, 0.0], [1.0, 2.0], [1.0, 4.0]])
    """

    def __init__(self, names: Sequence[str], fields: Sequence[str], *, every: int, max_memory: int) -> None:
        self.names, self.fields, self.every = list(names), list(fields), every
        self.stride = 1
        row = 4 * len(self.names) * len(self.fields) + 8  # the number of the step, too
        n = max_memory // max(1, row)
        if n < 4:
            raise ValueError(
                f"max_memory={max_memory} bytes: a row of {len(self.names)} layers takes {row}, and four have to fit in. Give "
                "more, or select fewer layers."
            )
        self._block_size = min(_BLOCK, n // 4)
        self.capacity = n - self._block_size
        shape = (self.capacity, len(self.names), len(self.fields))
        self._table = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        self._steps = torch.empty(self.capacity, dtype=torch.int64, device="cpu")
        self._n = 0  # rows in the table
        self._block: Tensor | None = None
        self._waiting: list[int] = []  # the steps of the rows in the block

    @property
    def nbytes(self) -> int:
        """The bytes that the buffers take."""
        row = self._table[0].nbytes + self._steps[0].nbytes
        return row * (self.capacity + self._block_size)

    @property
    def steps(self) -> list[int]:
        """The step of each row."""
        self.flush()
        return self._steps[: self._n].tolist()

    def wants(self, step: int) -> bool:
        """Whether this step is to be recorded."""
        return step % (self.every * self.stride) == 0

    def put(self, step: int, row: Tensor) -> None:
        """Add a row; nothing waits for the device unless the block is full.

        A step that is not wanted is left out: the table may have been thinned since it was asked whether it is.

        Args:
            step: Its number, higher than those before.
            row: Of shape (layers, fields).

        Raises:
            ValueError: The row is of another shape.
        """
        shape = self._table.shape[1:]
        if row.shape != shape:
            raise ValueError(f"row of shape={tuple(row.shape)}, wanted (layers, fields)={tuple(shape)}.")
        if self._block is None or self._block.device != row.device:
            self.flush()
            self._block = torch.empty(self._block_size, *shape, dtype=torch.float32, device=row.device)
        if not self.wants(step):
            return
        self._block[len(self._waiting)] = row.detach()
        self._waiting.append(step)
        if len(self._waiting) == self._block_size:
            self.flush()

    def flush(self) -> None:
        """Bring what waits on the device to the CPU, in one copy."""
        steps, self._waiting = self._waiting, []
        if steps:
            assert self._block is not None
            self._append(steps, self._block[: len(steps)].cpu())

    def table(self) -> Tensor:
        """All numbers, a copy of shape (steps, layers, fields)."""
        self.flush()
        return self._table[: self._n].clone()

    def __getitem__(self, field: str) -> Tensor:
        """One field, a copy of shape (steps, layers), float32; NaN where a layer was not called."""
        if field not in self.fields:
            raise KeyError(f"{field!r}: recorded are {', '.join(self.fields)}.")
        self.flush()
        return self._table[: self._n, :, self.fields.index(field)].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # a copy takes the rows along, not the room for more
        full = {"_table": self._table[: self._n].clone(), "_steps": self._steps[: self._n].clone(), "_block": None}
        return vars(self) | full

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for name in ("_table", "_steps"):
            rows = state[name]
            room = rows.new_empty((self.capacity, *rows.shape[1:]))
            room[: self._n] = rows
            setattr(self, name, room)

    __eq__ = object.__eq__  # two mappings of tensors cannot be compared by ==
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.steps)} steps, {len(self.names)} layers: {', '.join(self.fields)})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types: names, steps, and for each field a list of rows."""
        return {"names": list(self.names), "steps": self.steps, **{key: self[key].tolist() for key in self.fields}}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for each step and layer: `step, layer`, and the fields. The file is there whole or not at all.

        Args:
            path: Where to. A file that is there is replaced.

        Raises:
            FileNotFoundError: The folder does not exist.
        """
        steps, table = self.steps, self.table()
        rows = (
            [step, name, *numbers]
            for i, step in enumerate(steps)
            for name, numbers in zip(self.names, table[i].tolist(), strict=True)
        )
        write_csv(path, ["step", "layer", *self.fields], rows)

    def state_dict(self) -> dict[str, Any]:
        """All rows so far."""
        self.flush()  # which may thin them: the stride is only then known
        return {
            "names": list(self.names),
            "fields": list(self.fields),
            "every": self.every,
            "stride": self.stride,
            "steps": self.steps,
            "table": self.table(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows back. Where they are more than fit in, they are thinned.

        Raises:
            ValueError: They are of other layers or fields, or of other steps. Nothing has changed then.
        """
        missing = {"names", "fields", "every", "stride", "steps", "table"} - state.keys()
        if missing:
            raise ValueError(f"the state lacks {sorted(missing)}, wanted what `state_dict` gives.")
        for key in ("names", "fields", "every"):
            if getattr(self, key) != state[key]:
                raise ValueError(
                    f"the state has {key}={state[key]!r}, this recording has {key}={getattr(self, key)!r}. Make it with those "
                    "of the state, or begin anew."
                )
        steps, table, stride = state["steps"], state["table"], state["stride"]
        shape = (len(steps), len(self.names), len(self.fields))
        if tuple(table.shape) != shape:
            raise ValueError(f"the state has a table of shape={tuple(table.shape)}, wanted {shape}: it is damaged.")
        if stride < 1 or any(step % (self.every * stride) for step in steps) or sorted(set(steps)) != steps:
            raise ValueError(
                f"the state has stride={stride!r} and steps={_short(steps)}, wanted multiples of every * stride, increasing: "
                "it is damaged."
            )
        self._n, self._waiting, self.stride = 0, [], stride
        while len(steps) > self.capacity:
            self.stride *= 2
            steps, table = self._thin(steps, table)
        self._append(steps, table)

    def _append(self, steps: list[int], rows: Tensor) -> None:
        while steps and self._n + len(steps) > self.capacity:
            self.stride *= 2
            self._halve()
            steps, rows = self._thin(steps, rows)
        end = self._n + len(steps)
        self._table[self._n : end] = rows
        self._steps[self._n : end] = torch.tensor(steps, dtype=torch.int64, device="cpu")
        self._n = end

    def _thin(self, steps: list[int], rows: Tensor) -> tuple[list[int], Tensor]:
        kept = [i for i, step in enumerate(steps) if self.wants(step)]
        return [steps[i] for i in kept], rows[kept]

    def _halve(self) -> None:
        """Keep the rows that are still wanted, in place: a copy of the table would break the bound."""
        end = 0
        for start in range(0, self._n, self._block_size):
            some = slice(start, min(start + self._block_size, self._n))
            kept = self._steps[some] % (self.every * self.stride) == 0
            steps, rows = self._steps[some][kept], self._table[some][kept]  # copies of a block
            start, end = end, end + len(steps)
            self._steps[start:end], self._table[start:end] = steps, rows
        self._n = end


def _short(steps: list[int]) -> str:
    return repr(steps) if len(steps) <= 8 else f"[{', '.join(map(str, steps[:8]))}, ...]"
