"""`write` and `read`: the file of a checkpoint.

A header of 52 bytes, whose form is the same in all versions to come, and the payload:

- 8 bytes: `MAGIC`, which no text has, and which a transfer as text would change;
- 4 and 8 bytes, unsigned, little-endian: the version of the format, and the length of the payload in bytes;
- 32 bytes: SHA-256 over the payload and those two numbers;
- the payload: what `torch.save` makes of a dict of plain types and tensors.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import threading
import warnings
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch

from minitrain.atomic import atomic_file
from minitrain.checkpoint import foreign
from minitrain.checkpoint.archive import Section, check_archive
from minitrain.checkpoint.loaded import checked
from minitrain.checkpoint.pickles import Refused
from minitrain.checkpoint.plain import escaped
from minitrain.errors import CheckpointError

FORMAT_VERSION = 1
MAGIC = b"\x89MINIT\r\n"
HEADER = struct.Struct("<8sIQ32s")
_NUMBERS = struct.Struct("<IQ")
_CHUNK = 2**22  # bytes
_REMEDIES = {
    errno.ENOSPC: "Free some space, or write to another disk.",
    errno.EDQUOT: "Free some space, or write to another disk.",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.EROFS: "Choose a folder that you may write to.",
}


class Loaded(NamedTuple):
    """What a file holds, and what it is."""

    state: dict[Any, Any]
    version: int
    n_bytes: int
    digest: str


def write(path: str | os.PathLike[str], state: dict[Any, Any], *, cancelled: threading.Event | None = None) -> None:
    """Write a checkpoint, whole or not at all; when this returns, the disk has it.

    Args:
        path: Where to. A file that is there is replaced.
        state: What `plain` takes: nested dicts, lists and tuples of plain types and tensors.
        cancelled: When it is set the write is abandoned.

    Raises:
        CheckpointError: The state holds something else, the file cannot be written, or the write was abandoned. The old file
            is as it was, and no temporary one is left.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> write(path, {"epoch": 3, "weight": torch.ones(2)})
        >>> read(path)
        {'epoch': 3, 'weight': tensor([1., 1.])}
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"state={state!r:.100} is no dict. Give one.")
    state = escaped(state)
    shown = os.fspath(path)
    try:
        with atomic_file(path, "w+b", durable=True) as file:
            file.write(bytes(HEADER.size))
            sink = _Sink(file, cancelled)
            _save(state, sink)
            sink.check()
            check_archive(
                Section(cast(BinaryIO, file), HEADER.size, sink.n_bytes)
            )  # what could not be read back is not written
            file.seek(0)
            file.write(
                HEADER.pack(MAGIC, FORMAT_VERSION, sink.n_bytes, _digest(sink.hash, FORMAT_VERSION, sink.n_bytes))
            )
            sink.check()
    except _Abandoned:
        raise CheckpointError(
            f"path={shown!r}: the write was abandoned; what was there before is there still."
        ) from None
    except Refused as error:
        raise CheckpointError(f"path={shown!r} was not written, as it could not be read back: {error}.") from error
    except (FileNotFoundError, FileExistsError) as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = _REMEDIES.get(getattr(error, "errno", None) or 0, "Is the disk in order?")
        raise CheckpointError(f"path={shown!r} cannot be written: {reason}. {remedy}") from error


def _save(state: dict[Any, Any], sink: _Sink) -> None:
    try:
        torch.save(state, sink, _use_new_zipfile_serialization=True)  # type: ignore[arg-type]  # it writes
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # of which torch's writer tells a long story
            raise error.__context__ from None
        raise


def read(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a checkpoint; all of it is verified before anything is believed, and no code in it can run.

    Args:
        path: A file that `write` has written.

    Returns:
        Its state, tensors on the CPU.

    Raises:
        CheckpointError: There is no such file, or it is damaged, of another kind, of a newer version, or hostile.
    """
    return load(path).state


def load(path: str | os.PathLike[str]) -> Loaded:
    """As `read`, with what is known of the file."""
    place = Path(path)
    shown = f"path={os.fspath(path)!r}"
    if place.is_dir():
        raise CheckpointError(f"{shown} is a folder.{_neighbours(place)} Give a file.")
    if not place.exists():
        raise CheckpointError(f"{shown}: there is no such file.{_neighbours(place.parent)} Is the name right?")
    if not place.is_file():  # to open a pipe could wait for ever
        raise CheckpointError(f"{shown} is no file. Give the name of a checkpoint.")
    try:
        with open(place, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            version, digest = _verify(file, size, shown)
            section = Section(file, HEADER.size, size - HEADER.size)
            check_archive(section)
            state = checked(_unpickled(section), size)
    except CheckpointError:
        raise
    except Refused as error:
        raise CheckpointError(f"{shown} is whole, but {error}. Do not use it unless you know who made it.") from error
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{shown} cannot be read: {reason}. Is it yours to read, and the disk in order?"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        raise CheckpointError(f"{shown} is whole, but torch cannot read what is in it ({reason}).") from error
    return Loaded(state, version, size, digest)


def _unpickled(section: Section) -> Any:
    section.seek(0)
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a dtype is experimental
        return torch.load(section, map_location="cpu", weights_only=True, mmap=False)  # type: ignore[arg-type]  # it reads


def _verify(file: BinaryIO, size: int, shown: str) -> tuple[int, str]:
    """The version and the digest, when header and payload are what has been written."""
    copy = "Take another copy of it, or an earlier checkpoint."
    head = file.read(max(HEADER.size, foreign.LENGTH))
    if not head:
        raise CheckpointError(f"{shown} is empty. {copy}")
    if not head.startswith(MAGIC):
        if MAGIC.startswith(head[: len(MAGIC)]):
            raise CheckpointError(f"{shown} is truncated: it has {size} bytes. {copy}")
        raise CheckpointError(f"{shown} is no checkpoint of minitrain{foreign.kind(head, MAGIC)}.")
    if len(head) < HEADER.size:
        raise CheckpointError(f"{shown} is truncated: it has {size} bytes. {copy}")
    _, version, length, digest = HEADER.unpack(head[: HEADER.size])
    newer = f"written by a newer minitrain (format {version}, this one reads {FORMAT_VERSION}): upgrade"
    other = f" Or it was {newer}." if version > FORMAT_VERSION else ""
    if HEADER.size + length > size:
        raise CheckpointError(f"{shown} is truncated: it has {size} of {HEADER.size + length} bytes. {copy}{other}")
    if HEADER.size + length < size:
        raise CheckpointError(f"{shown} is damaged: {size - HEADER.size - length} bytes too many. {copy}{other}")
    hash_ = hashlib.sha256()
    file.seek(HEADER.size)
    buffer = memoryview(bytearray(min(_CHUNK, length)))
    left = length
    while left and (n := file.readinto(buffer[: min(left, _CHUNK)])):  # type: ignore[attr-defined]
        hash_.update(buffer[:n])
        left -= n
    if left or _digest(hash_, version, length) != digest:
        raise CheckpointError(f"{shown} is damaged: its content does not match its checksum. {copy}{other}")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{shown} was {newer}.")
    if version < 1:
        raise CheckpointError(f"{shown} is of format {version}, which there never was.")
    return version, digest.hex()


def _digest(payload: hashlib._Hash, version: int, length: int) -> bytes:
    whole = payload.copy()
    whole.update(_NUMBERS.pack(version, length))
    return whole.digest()


def _neighbours(folder: Path) -> str:
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".ckpt"))
    except OSError:
        return " Nor is there such a folder."
    if not names:
        return ""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f" The folder has {', '.join(map(repr, names[-8:]))}{more}."


class _Abandoned(BaseException):
    pass


class _Sink:
    """The file as torch sees it: counts and hashes what goes by.

    An error waits for `check`, as torch's writer, which is not in Python, might take the whole process down with it.
    """

    def __init__(self, file: IO[bytes], cancelled: threading.Event | None) -> None:
        self.hash, self.n_bytes = hashlib.sha256(), 0
        self._file, self._cancelled = file, cancelled
        self._error: BaseException | None = None

    def write(self, data: memoryview | bytes) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view) if self._error is None else 0, _CHUNK):
                self.check()
                chunk = view[start : start + _CHUNK]
                self._file.write(chunk)
                self.hash.update(chunk)
                self.n_bytes += len(chunk)
        except BaseException as error:  # noqa: BLE001 - `check` raises it
            self._error = self._error or error
        return len(view)

    def flush(self) -> None:
        """Nothing: `atomic_file` does it."""

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is not None:
            raise self._error
        if self._cancelled is not None and self._cancelled.is_set():
            raise _Abandoned
