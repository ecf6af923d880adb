"""Digests of files that are here: the sha256 of all of it, and a CRC-32 for each block, to tell where damage is."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

_READ = 1 << 20

Report = Callable[[int], object]


def sha256_of(path: Path, report: Report = lambda _done: None) -> str:
    """The sha256 of a file; `report` gets the bytes read so far."""
    return digests_of(path, 0, report)[0]


def digests_of(path: Path, block: int, report: Report = lambda _done: None) -> tuple[str, list[int]]:
    """The sha256 of a file, and the CRC-32 of each of its blocks of `block` bytes (none where `block` is 0)."""
    digest, checksums, done, crc = hashlib.sha256(), list[int](), 0, 0
    for data in _chunks(path, min(_READ, block) if block else _READ):
        digest.update(data)
        done += len(data)
        if block:
            crc = zlib.crc32(data, crc)
            if done % block == 0:
                checksums.append(crc)
                crc = 0
        report(done)
    if block and done % block:
        checksums.append(crc)
    return digest.hexdigest(), checksums


def git_blob(path: Path) -> str:
    """The digest that git, and so a hub, has of a small file: sha1 of "blob", its size, a zero byte and its bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(size):
            yield data
