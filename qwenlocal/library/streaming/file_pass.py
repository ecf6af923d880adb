"""Progress through a file: its digest so far, and the offsets from which a later attempt can continue."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from qwenlocal.library.artifact import Artifact
from qwenlocal.library.streaming.resumable_hash import ResumableSha256, can_export_state, is_state_after
from qwenlocal.library.streaming.stream_journal import FileProgress, PartOfFile
from qwenlocal.library.streaming.stream_layout import StreamUnit


class FilePass:
    """
    The bytes of a file from where an earlier attempt left off: hashed, and divided into parts.

    `watched` are the parts whose digests are needed, too.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        progress: FileProgress,
        units: Sequence[StreamUnit],
        watched: Collection[PartOfFile],
    ) -> None:
        self.path, self.size, self.offset = path, size, progress.offset
        self.is_verified, self.is_void, self.has_right_digest = progress.is_verified, False, False
        self.digest, self.saved_at = ResumableSha256(progress.state), time.monotonic()
        self._units = deque(unit for unit in units if not unit.is_done)
        parts = {part for unit in units for part in unit.parts} | {part for part in watched if part.path == path}
        self._parts = deque(sorted(part for part in parts if part.offset >= self.offset and part.size))
        self._watched, self._part_digest = watched, hashlib.sha256()
        self._snapshots: deque[tuple[int, bytes]] = deque()  # offsets in no part, and the state of the digest there

    def take(self, offset: int, data: memoryview) -> Iterator[tuple[PartOfFile, int, memoryview]]:
        """Hash the next bytes; yield those of parts, with their offset in the part."""
        while data:
            part = self._parts[0] if self._parts else None
            if part is None or offset <= part.offset:
                self._add_snapshot(offset)
            if part is None or offset < part.offset:
                count = min(len(data), part.offset - offset) if part else len(data)
                self.digest.update(data[:count])
            else:
                count = min(len(data), part.end - offset)
                self.digest.update(data[:count])
                yield part, offset - part.offset, data[:count]
                if offset + count == part.end:
                    self._parts.popleft()
            offset, data = offset + count, data[count:]
            self.offset = offset

    def watch(self, part: PartOfFile, data: memoryview, *, is_last: bool) -> bytes | None:
        """Hash bytes of a watched part; return its digest after the last ones."""
        if part not in self._watched:
            return None
        self._part_digest.update(data)
        if not is_last:
            return None
        digest, self._part_digest = self._part_digest.digest(), hashlib.sha256()
        return digest

    def _add_snapshot(self, offset: int) -> None:
        if can_export_state() and offset:
            self._snapshots.append((offset, self.digest.state or b""))

    @property
    def is_written(self) -> bool:
        """True if the rows of all units are written."""
        while self._units and self._units[0].is_done:
            self._units.popleft()
        return not self._units

    def find_resume_point(self) -> tuple[int, bytes] | None:
        """Return the last offset before which all rows are written, and the state of the digest there."""
        limit = self.size if self.is_written else self._units[0].start
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= limit:
            self._snapshots.popleft()
        return self._snapshots[0] if self._snapshots and self._snapshots[0][0] <= limit else None


def find_usable_progress(
    progress: Mapping[Path, FileProgress],
    artifacts: Mapping[Path, Artifact],
    units: Sequence[StreamUnit],
    finished: Collection[int],
) -> dict[Path, FileProgress]:
    """
    Return the progress from which each file can be continued, and mark the units that are done.

    A file starts again unless all units before the offset are finished, and the digests of the parts that were
    requested on their own for them are known.
    """
    usable = {}
    for path, file in progress.items():
        size = artifacts[path].size
        has_state = file.state is not None and can_export_state() and is_state_after(file.state, file.offset)
        is_possible = file.offset == size if file.is_verified else file.offset < size and has_state
        before = [unit for unit in units if unit.path == path and unit.start < file.offset]
        if is_possible and all(_is_finished(unit, finished, progress) for unit in before):
            passed = {part: digest for part, digest in file.passed.items() if part.end <= file.offset}
            usable[path] = FileProgress(file.offset, file.state, file.is_verified, file.requested, passed)
            for unit in before:
                unit.is_done = True
        else:
            usable[path] = FileProgress(requested=file.requested)
    return usable


def _is_finished(unit: StreamUnit, finished: Collection[int], progress: Mapping[Path, FileProgress]) -> bool:
    has_digests = all(part in progress[part.path].requested for part in unit.side_parts.values())
    return has_digests and all(chunk in finished for chunk in unit.chunks)
