"""
The pages of an SQLite file, read without SQLite, which gives up where its structure is damaged.

Only what holds rows is read: leaf pages of tables, their overflow pages, and the frames of the write-ahead log. The
tree above the leaves is ignored. The format: https://www.sqlite.org/fileformat2.html (the sections below are its own)
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE_SIZE = 4096
_FILE_HEADER = 100  # bytes, on page 1 before the header of its tree
_LEAF_OF_TABLE, _LEAF_HEADER = 0x0D, 8
_WAL_MAGIC = b"\x37\x7f\x06\x82"  # of logs with checksums of little-endian words, as all supported machines write
_WAL_HEADER, _FRAME_HEADER = 32, 24
_INTEGER_SIZES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # by serial type


class Record(NamedTuple):
    """
    A row of some table, its integer key and its columns.

    Records of newer pages have a higher `rank`. Of one that is not `is_complete`, the last column is cut and those
    after it are missing.
    """

    rank: int
    key: int
    columns: list[Any]
    is_complete: bool


class Frame(NamedTuple):
    """
    A page in the write-ahead log. `is_commit` marks the last one of a transaction.

    A frame that is not `is_intact` has a wrong checksum: it is damaged, or the header of the frame before it is.
    """

    page: int
    data: bytes
    is_commit: bool
    is_intact: bool


def read_records(path: Path) -> list[Record]:
    """
    Return all rows on readable pages of a database and its log, in no particular order; some are outdated.

    This process must not have the database open; see `has_damaged_log`.
    """
    return _Pages(_read(path), _read(wal_path(path))).records()


def has_damaged_log(path: Path) -> bool:
    """
    Return True if SQLite would silently drop transactions from the log of the database at `path`.

    It reads the log up to the first wrong checksum, because after a crash only an unfinished transaction can follow;
    and it deletes the log of a file of no or one byte (os_unix.c, unixFileSize). A damaged last transaction cannot be
    told from an unfinished one.

    The database itself is not opened: closing it would drop the locks that SQLite has on it in this process (fcntl(2)),
    and the next process to close it would take the log away from the connections of this one.
    """
    log = _read(wal_path(path))
    is_readable = _is_intact_wal_header(log) and path.exists() and path.stat().st_size > 1
    for frame in _read_frames(log):
        is_readable = is_readable and frame is not None and frame.is_intact
        if frame is not None and frame.is_commit and not is_readable:
            return True
    return False


def wal_path(path: Path) -> Path:
    """Return the path of the write-ahead log of the database at `path`."""
    return path.with_name(f"{path.name}-wal")


def _read_frames(log: bytes) -> list[Frame | None]:
    """
    Return the frames of the log since it was last started over, None for those with another salt.

    Each checksum continues that of the frame before (section 4), so one damaged frame does not spoil all that follow.
    If the header of the log is damaged, the first intact frame has the right salt.
    """
    salt, checksum, frames = log[16:24] if _is_intact_wal_header(log) else None, log[24:32], list[Frame | None]()
    size = _FRAME_HEADER + PAGE_SIZE
    for start in range(_WAL_HEADER, len(log) - size + 1, size):
        header, data = log[start : start + _FRAME_HEADER], log[start + _FRAME_HEADER : start + size]
        frame = None
        if salt in (None, header[8:16]):
            page, pages_after_commit = struct.unpack(">2I", header[:8])
            is_intact = page > 0 and _wal_checksum(checksum, header[:8] + data) == header[16:24]
            frame = Frame(page, data, pages_after_commit > 0, is_intact)
            salt = header[8:16] if is_intact else salt
        frames.append(frame)
        checksum = header[16:24]
    while frames and frames[-1] is None:  # from before the log was started over
        frames.pop()
    return frames


def _is_intact_wal_header(log: bytes) -> bool:
    return log[:4] == _WAL_MAGIC and len(log) >= _WAL_HEADER and _wal_checksum(bytes(8), log[:24]) == log[24:32]


def _wal_checksum(start: bytes, data: bytes) -> bytes:
    """Return the checksum of `data` that continues the checksum `start` (section 4.2)."""
    first, second = struct.unpack(">2I", start)
    words = struct.unpack(f"<{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return struct.pack(">2I", first, second)


class _Pages:
    """The pages of a database, each in the versions that may be the current one, the newest last."""

    def __init__(self, database: bytes, log: bytes) -> None:
        self._versions: defaultdict[int, list[tuple[int, bytes]]] = defaultdict(list)
        for number, start in enumerate(range(0, len(database), PAGE_SIZE), start=1):
            self._versions[number] = [(0, database[start : start + PAGE_SIZE])]
        for rank, frame in enumerate(_read_frames(log), start=1):
            if frame is not None:
                if frame.is_intact:
                    self._versions[frame.page].clear()
                self._versions[frame.page].append((rank, frame.data))

    def records(self) -> list[Record]:
        pages = [(number, *version) for number, versions in self._versions.items() for version in versions]
        return [record for number, rank, page in pages for record in self._records_of(number, rank, page)]

    def _records_of(self, number: int, rank: int, page: bytes) -> Iterator[Record]:
        """Yield the rows on a page if it is a leaf of a table (section 1.6)."""
        start = _FILE_HEADER if number == 1 else 0
        if len(page) < start + _LEAF_HEADER or page[start] != _LEAF_OF_TABLE:
            return
        count = int.from_bytes(page[start + 3 : start + 5], "big")
        pointers = page[start + _LEAF_HEADER : start + _LEAF_HEADER + 2 * count]
        for at in range(0, len(pointers) - 1, 2):
            try:
                payload_size, position = _read_varint(page, int.from_bytes(pointers[at : at + 2], "big"))
                key, position = _read_varint(page, position)
                payload = self._payload(page, position, payload_size)
                yield Record(rank, key, _columns(payload), len(payload) == payload_size)
            except (IndexError, ValueError):  # a damaged pointer, or a cell that is not one
                continue

    def _payload(self, page: bytes, start: int, size: int) -> bytes:
        """Return the payload of a cell; less than `size` bytes if its overflow pages are damaged (section 1.6)."""
        most, least = PAGE_SIZE - 35, (PAGE_SIZE - 12) * 32 // 255 - 23
        local = size if size <= most else least + (size - least) % (PAGE_SIZE - 4)
        local = local if local <= most else least
        end, payload = start + local, page[start : start + local]
        next_page, visited = int.from_bytes(page[end : end + 4], "big"), set[int]()
        while len(payload) < size and next_page in self._versions and next_page not in visited:
            visited.add(next_page)
            _, overflow = self._versions[next_page][-1]
            next_page, part = int.from_bytes(overflow[:4], "big"), overflow[4 : 4 + size - len(payload)]
            is_last = len(payload) + len(part) == size
            if is_last != (next_page == 0):  # only the last page of a chain has no next one
                break
            payload += part
        return payload


def _columns(payload: bytes) -> list[Any]:
    """
    Decode a record (section 2.1). Bytes of texts that are not UTF-8 become lone surrogates.

    Raises
    ------
    ValueError, IndexError: it is not a record.
    """
    header_size, position = _read_varint(payload, 0)
    types = []
    while position < header_size:
        serial_type, position = _read_varint(payload, position)
        types.append(serial_type)
    if position != header_size:
        raise ValueError("the header of the record has another size")
    columns = []
    for serial_type in types:
        if position >= len(payload) and serial_type not in (0, 8, 9, 12, 13):
            break
        value, position = _value(payload, position, serial_type)
        columns.append(value)
    return columns


def _value(payload: bytes, start: int, serial_type: int) -> tuple[object, int]:
    """Return the value of a column and the position after it."""
    if serial_type >= 12:
        end = start + (serial_type - 12) // 2
        data = payload[start:end]
        return (data.decode("utf-8", "surrogateescape") if serial_type % 2 else data), end
    if serial_type in _INTEGER_SIZES:
        end = start + _INTEGER_SIZES[serial_type]
        return int.from_bytes(payload[start:end], "big", signed=True), end
    if serial_type == 7:
        return struct.unpack(">d", payload[start : start + 8].ljust(8, b"\0"))[0], start + 8
    if serial_type in (0, 8, 9):
        return {0: None, 8: 0, 9: 1}[serial_type], start
    raise ValueError(f"there is no serial type {serial_type}")


def _read_varint(data: bytes, start: int) -> tuple[int, int]:
    """Return the variable-length integer at `start`, and the position after it (section 1.6); raises IndexError."""
    value = 0
    for position in range(start, start + 8):
        byte = data[position]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, position + 1
    return value << 8 | data[start + 8], start + 9


def _read(path: Path) -> bytes:
    """Return the bytes of a file, none if there is no file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
