"""Checks of parts of streamed files by their digests: two requests for a part, equal tensors, biases that are zero."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qwenlocal.errors import BadWeights, ConflictingBytes
from qwenlocal.library.streaming.stream_journal import FileProgress, PartDigest, PartOfFile, part_digest
from qwenlocal.library.streaming.stream_layout import StreamUnit
from qwenlocal.weights.assumptions import Assumption, EqualTensors, ZeroTensor


class PartChecks:
    """
    The parts of files whose digests must agree, and the digests known so far.

    `watched` are the parts whose digests `note_passed` must get when they pass in the order of the file.
    """

    def __init__(
        self,
        units: Sequence[StreamUnit],
        assumptions: Iterable[Assumption],
        progress: Mapping[Path, FileProgress],
    ) -> None:
        self._requested = {part: digest for file in progress.values() for part, digest in file.requested.items()}
        self._passed = {part: digest for file in progress.values() for part, digest in file.passed.items()}
        self._twins: dict[PartOfFile, tuple[PartOfFile, EqualTensors]] = {}
        self._zeros: dict[PartOfFile, ZeroTensor] = {}
        for assumption in assumptions:
            if isinstance(assumption, ZeroTensor):
                self._zeros[PartOfFile.of(assumption.tensor)] = assumption
            elif isinstance(assumption, EqualTensors):
                self._add_twins(assumption, units)
        sides = {part for unit in units for part in unit.side_parts.values()}
        self.watched = {*sides, *self._twins, *self._zeros}

    def _add_twins(self, assumption: EqualTensors, units: Sequence[StreamUnit]) -> None:
        """Pair each part of the kept tensor with the same bytes of the dropped one, to compare their digests."""
        kept, dropped = PartOfFile.of(assumption.kept), assumption.dropped
        for part in (part for unit in units for part in unit.parts):
            if part.path == kept.path and kept.offset <= part.offset < kept.end:
                twin = PartOfFile(dropped.file, dropped.offset + part.offset - kept.offset, part.size)
                self._twins[part], self._twins[twin] = (twin, assumption), (part, assumption)

    def note_requested(self, part: PartOfFile, sha256: bytes) -> PartDigest:
        """
        Take the digest of a part that was requested on its own.

        Raises
        ------
        ConflictingBytes: it had another one before.
        """
        digest = part_digest(sha256)
        if digest != self._requested.setdefault(part, digest) or digest != self._passed.get(part, digest):
            raise ConflictingBytes(part.path)
        return digest

    def note_passed(self, part: PartOfFile, sha256: bytes) -> PartDigest:
        """
        Take the digest of a part that passed in the order of the file.

        Raises
        ------
        ConflictingBytes: it had another one when it was requested on its own.
        UnexpectedWeights, UnsupportedCheckpoint: an assumption is wrong.
        """
        self._passed[part] = digest = part_digest(sha256)
        if digest != self._requested.get(part, digest):
            raise ConflictingBytes(part.path)
        if error := self._find_contradiction(part, digest):
            raise error
        return digest

    def _find_contradiction(self, part: PartOfFile, digest: PartDigest) -> BadWeights | None:
        if zero := self._zeros.get(part):
            return zero.error() if digest != part_digest(hashlib.sha256(bytes(part.size)).digest()) else None
        if part in self._twins:
            twin, assumption = self._twins[part]
            return assumption.error() if digest != self._passed.get(twin, digest) else None
        return None
