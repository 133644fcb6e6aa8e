"""`atomic_file`: a file that is there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_PART = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.part", re.DOTALL)
_NO_FOLDER_SYNC = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], mode: str = "wb", *, durable: bool = False, **open_options: Any
) -> Iterator[IO[Any]]:
    """Write a temporary file beside its place, and move it there when the block has ended well.

    Whoever reads the file never sees half of it. If the block or the move fails, by whatever exception, the temporary file
    is removed and the old file is as it was.

    Args:
        path: Where to. A file that is there is replaced; a link stays a link.
        mode: As of `open`: one that writes.
        durable: Wait until the disk has the data, and then the new name: the file outlives a power cut. If only the name
            cannot be made sure of, that raises too, with the new file in place.
        open_options: For `open`: `encoding`, `newline`.

    Yields:
        The open temporary file.

    Raises:
        FileNotFoundError: The folder does not exist.
        FileExistsError: There is something that is no file: a folder, a device.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with atomic_file(path, "w", encoding="utf-8") as file:
        ...     _ = file.write("all of it")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('all of it', 1)
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}. Make it first.")
    if path.exists() and not path.is_file():  # to replace a device would break it
        raise FileExistsError(f"path={str(path)!r} is there, and is no file. Give the name of a file.")
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(part, mode, **open_options) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):  # of the two errors the first one tells more
            part.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def is_part(name: str) -> bool:
    """Whether a file of this name is a temporary one of `atomic_file`, left behind by a process that was killed.

    Example:
        >>> is_part(".last.ckpt.4711.0a1b2c3d.part"), is_part("last.ckpt")
        (True, False)
    """
    return _PART.fullmatch(name) is not None


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder, and a folder may be one to write to only
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)
