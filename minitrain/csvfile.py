"""`write_csv`: a table in a file, whole or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from typing import Any

from minitrain.atomic import atomic_file


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
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
