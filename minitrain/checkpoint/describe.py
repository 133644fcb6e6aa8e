"""`describe`: what is inside a checkpoint, for people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from minitrain.checkpoint.dtypes import STORAGES
from minitrain.checkpoint.format import load

_ROWS = 200  # of a table of tensors
_LINES = 400  # of the outline of one entry
_ITEMS = 8  # of a list or tuple
_LETTERS = 80  # of a string
_DEPTH = 8  # levels of an outline


def describe(path: str | os.PathLike[str]) -> str:
    """What is inside a checkpoint, in words and tables; no model is built.

    Args:
        path: A file that `write` has written.

    Returns:
        Lines of text. Strings from the file are shown with `repr`, so that they cannot write to a terminal what they like.

    Raises:
        CheckpointError: As `read`.

    Example:
        >>> import tempfile, torch
        >>> from minitrain.checkpoint.format import write
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> write(path, {"model": {"weight": torch.ones(2, 3)}, "position": {"epoch": 3}})
        >>> print(describe(path))  # doctest: +ELLIPSIS
        'last.ckpt': ... bytes, format 1, checksum right (sha256 ...)
        <BLANKLINE>
        model: 1 tensor, 6 parameters and buffers, 24 bytes
          weight  float32  (2, 3)
        <BLANKLINE>
        position: dict of 1
          epoch: 3
    """
    loaded = load(path)
    lines = [
        f"{Path(path).name!r}: {loaded.n_bytes:,} bytes, format {loaded.version}, "
        f"checksum right (sha256 {loaded.digest[:16]}...)"
    ]
    for key, value in loaded.state.items():
        lines.append("")
        tensors = {k: v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, dict) else {}
        if tensors and (key == "model" or len(tensors) == len(value)):
            lines += _table(key, tensors)
            value = {k: v for k, v in value.items() if k not in tensors}
            lines += _capped(line for k, v in value.items() for line in _outline(_label(k), v, 1))
        else:
            lines += _capped(_outline(_label(key), value, 0))
    return "\n".join(lines)


def _table(key: Any, tensors: dict[Any, Tensor]) -> list[str]:
    unique = {id(t): t for t in tensors.values()}.values()  # tied weights count once
    numel, n_bytes = sum(t.numel() for t in unique), sum(t.numel() * t.itemsize for t in unique)
    cells = [(_label(name), *_form(t)) for name, t in list(tensors.items())[:_ROWS]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    kind = "parameters and buffers" if key == "model" else "elements"
    plural = "s" if len(tensors) != 1 else ""
    lines = [f"{_label(key)}: {len(tensors):,} tensor{plural}, {numel:,} {kind}, {n_bytes:,} bytes"]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    if len(tensors) > _ROWS:
        lines.append(f"  ... and {len(tensors) - _ROWS:,} more")
    return lines


def _capped(lines: Iterator[str]) -> list[str]:
    shown = [line for line, _ in zip(lines, range(_LINES), strict=False)]
    if next(lines, None) is not None:
        shown.append("  ... and more")
    return shown


def _outline(label: str, value: Any, depth: int) -> Iterator[str]:
    space = "  " * depth
    if not isinstance(value, dict | list | tuple) or _is_short(value):
        yield f"{space}{label}: {_short(value)}"
        return
    yield f"{space}{label}: {type(value).__name__} of {len(value):,}"
    if depth >= _DEPTH:
        yield f"{space}  ..."
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from _outline(_label(key), v, depth + 1)
    else:
        for i, v in enumerate(value[:_ITEMS]):
            yield from _outline(f"[{i}]", v, depth + 1)
        if len(value) > _ITEMS:
            yield f"{space}  ... and {len(value) - _ITEMS:,} more"


def _is_short(value: Any) -> bool:
    """Whether a container fits on a line: it is empty, or a list of numbers and the like."""
    return not value or (
        not isinstance(value, dict) and not any(isinstance(v, dict | list | tuple | Tensor) for v in value[:_ITEMS])
    )


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype, shape = _form(value)
        shown = value.ndim == 0 and value.dtype in STORAGES.values()  # of the newer kinds some have no Python number
        return f"{dtype} {value.item()!r}" if shown else f"{dtype} {shape}"
    if isinstance(value, str):
        return repr(value) if len(value) <= _LETTERS else f"{value[:_LETTERS]!r}... ({len(value):,} letters)"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list | tuple):
        more = f", ... and {len(value) - _ITEMS:,} more" if len(value) > _ITEMS else ""
        inside = ", ".join(map(_short, value[:_ITEMS])) + more
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return f"{value!r:.{_LETTERS}}" if not isinstance(value, dict) else "{}"


def _label(key: Any) -> str:
    text = str(key)
    text = text if len(text) <= _LETTERS else text[:_LETTERS] + "..."
    return text if text.isprintable() and text.strip() else repr(text)


def _form(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.dtype).removeprefix("torch."), str(tuple(tensor.shape))
