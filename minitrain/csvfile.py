"""`write_csv`: a table in a file, whole or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a header and rows; what is None is left empty, floats are exact.

    The file is written beside its place and then moved there: whoever reads it never sees half of it.

    Args:
        path: Where to. A file that is there is replaced; a link stays a link.
        header: The names of the columns.
        rows: The cells of each row, in this order.

    Raises:
        FileNotFoundError: The folder does not exist.
        FileExistsError: There is something that is no file: a folder, a device.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}. Make it first.")
    if path.exists() and not path.is_file():  # to replace a device would break it
        raise FileExistsError(f"path={str(path)!r} is there, and is no file. Give the name of a file.")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
