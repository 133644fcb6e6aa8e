"""The zip archive that `torch.save` makes, checked before anything in it is believed.

It is read by two programs, Python's `zipfile` here and torch's own reader afterwards: whatever they could understand
differently is refused.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zipfile
from typing import BinaryIO

from minitrain.checkpoint.pickles import MAX_BYTES, Refused, check_pickle

_MAX_DIRECTORY = 8 * 2**20  # bytes: about 100,000 tensors
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")
_FLAGS = 0x0808  # sizes that follow the data, names in UTF-8: which torch sets, and nothing else
_STORAGE = re.compile(r"archive/data/(0|[1-9]\d{0,8})")
_OTHERS = {
    f"archive/{name}"
    for name in ("data.pkl", "byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id")
}


class Section(io.RawIOBase):
    """A part of an open file, as a file: torch reads it from there, without a copy in memory."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position, in bytes from the start of the section."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"offset={offset} is before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: object, /) -> int:
        """Read what there is, up to the size of the buffer."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        n = max(0, min(len(view), self._size - self._position))
        self._file.seek(self._start + self._position)
        n = int(self._file.readinto(view[:n]))  # type: ignore[attr-defined]
        self._position += n
        return n


def check_archive(section: Section) -> None:
    """Check that an archive is one as `torch.save` makes them, of plain data and tensors, and no larger than it looks.

    Raises:
        Refused: It is not; with the reason.
    """
    end = _check_end(section)
    try:
        with zipfile.ZipFile(section) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError, struct.error) as error:
        # All that zipfile raises on bytes that somebody has made up.
        raise Refused(f"its archive is malformed ({error})") from error
    sizes, starts = dict[str, int](), dict[str, int]()
    for entry in entries:
        name, size = entry.orig_filename, entry.file_size
        if name in sizes:
            raise Refused(f"its archive has two entries {name[:100]!r}")
        if name not in _OTHERS and not _STORAGE.fullmatch(name):
            raise Refused(f"its archive has an entry {name[:100]!r}, which no checkpoint has")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != size:
            raise Refused(f"its archive has a compressed entry {name!r}, which no checkpoint has")
        zip64 = struct.pack("<2H", 1, max(0, len(entry.extra) - 4))
        if entry.flag_bits & ~_FLAGS or (entry.extra and not entry.extra.startswith(zip64)):
            raise Refused(f"its archive has an entry {name!r} with unusual flags")
        starts[name], sizes[name] = _start(section, entry), size
        if starts[name] + size > end:
            raise Refused(f"the entry {name!r} of its archive claims {size} bytes, and the file is too short for it")
    if sum(sizes.values()) > end:
        raise Refused("the entries of its archive overlap")
    if sizes.get("archive/data.pkl", MAX_BYTES + 1) > MAX_BYTES:
        raise Refused(f"its structure, data.pkl, is missing or takes more than {MAX_BYTES} bytes")
    if any(sizes[name] > 100 for name in _OTHERS & sizes.keys() if name != "archive/data.pkl"):
        raise Refused("its archive has an entry that is too long")

    def content(name: str) -> bytes:
        section.seek(starts[name])
        return section.read(sizes[name]) or b""

    if "archive/byteorder" not in sizes or content("archive/byteorder") != sys.byteorder.encode():
        raise Refused(f"it was written on a machine with another order of bytes; this one is {sys.byteorder}-endian")
    storages = {m[1]: size for name, size in sizes.items() if (m := _STORAGE.fullmatch(name))}
    check_pickle(content("archive/data.pkl"), storages)


def _check_end(section: Section) -> int:
    """The position at which the entries end and the directory begins; there must be only one way to find it."""
    size = section.seek(0, io.SEEK_END)
    position = size - _END.size
    if position < 0:
        raise Refused("it holds no archive")
    end = _END.unpack(_read(section, position, _END.size))
    n_entries, length, start = end[4:7]
    if end[0] != b"PK\5\6" or any(end[1:3]) or end[3] != n_entries or end[7]:
        raise Refused("its archive does not end as those of torch.save do")
    locator = _read(section, position - _LOCATOR64.size, _LOCATOR64.size) if position >= 76 else b""
    if locator.startswith(b"PK\6\7"):
        position -= _LOCATOR64.size + _END64.size
        end64 = _END64.unpack(_read(section, position, _END64.size))
        if _LOCATOR64.unpack(locator)[1:] != (0, position, 1) or end64[:2] != (b"PK\6\6", 44) or any(end64[4:6]):
            raise Refused("its archive has two ends")
        wide = end64[6:]
        narrow = tuple(min(n, limit) for n, limit in zip(wide, (0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1), strict=True))
        if narrow != (n_entries, n_entries, length, start) or wide[0] != wide[1]:
            raise Refused("its archive has two directories")
        _, _, length, start = wide
    if start + length != position:
        raise Refused("the directory of its archive is not at its end")
    if length > _MAX_DIRECTORY:
        raise Refused(f"the directory of its archive takes {length} bytes, and at most {_MAX_DIRECTORY} are read")
    return int(start)


def _start(section: Section, entry: zipfile.ZipInfo) -> int:
    """Where the data of an entry begin: behind its own header, which has a name and padding of its own."""
    try:
        header = _LOCAL.unpack(_read(section, entry.header_offset, _LOCAL.size))
    except (ValueError, struct.error) as error:
        raise Refused(f"the entry {entry.filename!r} of its archive begins outside the file") from error
    name = entry.orig_filename.encode()
    if header[0] != b"PK\3\4" or header[3] or _read(section, entry.header_offset + _LOCAL.size, header[9]) != name:
        raise Refused(f"the entry {entry.filename!r} of its archive has another name in its place")
    return entry.header_offset + _LOCAL.size + int(header[9]) + int(header[10])


def _read(section: Section, position: int, size: int) -> bytes:
    section.seek(position)
    return section.read(size) or b""
