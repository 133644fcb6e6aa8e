"""A folder of checkpoints: their names, which one is the newest, which may go, and who may write there."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minitrain import checkpoint
from minitrain.atomic import is_part, sync_folder
from minitrain.errors import CheckpointError

BEST = "best.ckpt"
_NAME = re.compile(r"(\d{6,})-epoch\d+-batch\d+\.ckpt")
_LOCK = ".lock"
_LOCKED: set[str] = set()  # by this process, which the system would let lock them once more


def name_of(number: int, epoch: int, batch: int) -> str:
    """The name of checkpoint `number`, taken after so many epochs and so many batches of the next one.

    Example:
        >>> name_of(12, 3, 450)
        '000012-epoch3-batch450.ckpt'
    """
    return f"{number:06d}-epoch{epoch}-batch{batch}.ckpt"


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder with their numbers, in the order in which they were written: no clock is asked."""
    found = [(int(match[1]), folder / match[0]) for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]
    return sorted(found)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, read; None where the folder has none, or is not there.

    Warns:
        A newer one is damaged: it is passed over.

    Raises:
        CheckpointError: There are some, and none of them can be read.
    """
    if not folder.is_dir():
        return None
    found = [path for _, path in reversed(numbered(folder))] or [folder / BEST] * (folder / BEST).is_file()
    errors: list[str] = []
    for path in found:
        try:
            state = checkpoint.read(path)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        for text in errors:
            warnings.warn(f"passed over for {path.name}: {text}", stacklevel=5)
        return path, state
    if not found:
        return None
    raise CheckpointError(
        f"folder={str(folder)!r}: none of the {len(found)} checkpoints can be read. Remove them to begin anew. The newest: "
        f"{errors[0]}"
    )


def retain(folder: Path, keep_last: int) -> None:
    """Delete all but the newest checkpoints. It is called when one has just been written, which is never deleted."""
    for _, path in numbered(folder)[:-keep_last]:
        with suppress(OSError):  # it does no harm where it is
            path.unlink()


def link(path: Path, name: Path) -> None:
    """Make `name` the same file as `path`, whatever becomes of that one; whoever reads it never sees half of it.

    Raises:
        CheckpointError: The file system refuses.
    """
    part = name.with_name(f".{name.name}.{os.getpid()}.00000000.part")
    part.unlink(missing_ok=True)
    try:
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, part)
        os.replace(part, name)
        sync_folder(name.parent)
    except OSError as error:
        raise CheckpointError(f"path={str(name)!r} cannot be written ({error.strerror}).") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder, and clear away what a killed one has left half written.

    The lock goes with the process, however that ends; where the system has no such locks, there is none.

    Raises:
        CheckpointError: The folder cannot be made or written to, or another process writes there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"folder={str(folder)!r} cannot be made or written to ({error.strerror}). Choose another, or mend its permissions."
        ) from error
    place = os.path.realpath(folder)
    if place in _LOCKED:
        os.close(file)
        raise CheckpointError(
            f"folder={str(folder)!r}: another Checkpoint of this process writes there. Give each its own folder."
        )
    _LOCKED.add(place)
    try:
        _lock(file, folder)
        for name in os.listdir(folder):
            if is_part(name):
                with suppress(OSError):
                    (folder / name).unlink()
        yield
    finally:
        _LOCKED.discard(place)
        os.close(file)


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: the workers that it forks do not inherit it
    except (BlockingIOError, PermissionError) as error:
        raise CheckpointError(
            f"folder={str(folder)!r}: another process writes its checkpoints there. Wait for it, or choose another folder."
        ) from error
    except OSError as error:  # a network file system without locks
        warnings.warn(
            f"folder={str(folder)!r} cannot be locked ({error.strerror}): let no other process write there.",
            stacklevel=4,
        )
