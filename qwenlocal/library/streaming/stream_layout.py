"""
The units that a streamed conversion reads: a chunk of float rows, or all tensors of a packed matrix.

The bytes of a unit that lie together arrive in order with the rest of the file. Those that lie elsewhere (safetensors
sorts tensors by their type, so the scales of packed matrices follow behind all codes) are requested on their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.library.streaming.stream_journal import PartOfFile
from qwenlocal.weights.assumptions import Assumption, PackedFacts
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.row_source import FileRows
from qwenlocal.weights.write_job import RowChunk

if TYPE_CHECKING:
    import numpy

REQUEST_SIZE = 4 << 20  # bytes of parts that are requested together on their own


@dataclass(eq=False)
class StreamUnit:
    """
    Bytes that are needed together for `chunks` (their numbers).

    `parts` arrive in order, `side_parts` are requested on their own, by their place among the tensors of the matrix.
    `facts` are what the plan assumed about them. `data` is what has arrived, `missing` the bytes that have not, and
    `unwritten` the number of chunks that are not written.
    """

    start: int
    parts: list[PartOfFile]
    side_parts: dict[int, PartOfFile]
    facts: PackedFacts | None = None
    chunks: list[int] = field(default_factory=list)
    data: dict[PartOfFile, numpy.ndarray] = field(default_factory=dict)
    missing: int = 0
    unwritten: int = 0
    is_ready: bool = False  # everything has arrived, and was checked
    is_done: bool = False  # all chunks are written

    @property
    def path(self) -> Path:
        """The file whose order decides when the unit is read."""
        return self.parts[0].path

    @property
    def size(self) -> int:
        """Bytes of the parts that arrive in order."""
        return sum(part.size for part in self.parts)

    def check(self) -> None:
        """
        Compare what has arrived with the facts.

        Raises
        ------
        UnexpectedWeights, BadWeights: it is not what the plan assumed.
        """
        if self.facts:
            self.facts.check(self)

    def load(self, path: Path, offset: int, size: int) -> numpy.ndarray:
        """Return a part that has arrived."""
        return self.data[PartOfFile(path, offset, size)]

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with a part that has arrived."""
        buffer[:] = self.load(path, offset, len(buffer)).data


def build_units(chunks: Sequence[RowChunk], assumptions: Iterable[Assumption]) -> list[StreamUnit]:
    """
    Return the units of chunks, in the order in which they are read.

    >>> [unit.chunks for unit in build_units(chunks, [])]  # three chunks of floats, and a packed matrix in two chunks
    [[0], [1], [2], [3, 4]]
    """
    facts = {fact.stored.weight: fact for fact in assumptions if isinstance(fact, PackedFacts)}
    units: dict[PartOfFile, StreamUnit] = {}
    for number, chunk in enumerate(chunks):
        source = chunk.range.source
        if isinstance(source, PackedRows):
            key = PartOfFile.of(source.matrix.weight)
            if key not in units:
                units[key] = _packed_unit(source, facts.get(source.matrix.weight))
        elif isinstance(source, FileRows):
            row_size = source.type.row_bytes(source.columns)
            key = PartOfFile(source.file, source.offset + chunk.first * row_size, chunk.row_count * row_size)
            units[key] = StreamUnit(key.offset, [key], {})
        else:
            raise TypeError(f"{type(source).__name__} cannot be streamed")
        units[key].chunks.append(number)
    return sorted(units.values(), key=lambda unit: (str(unit.path), unit.start))


def _packed_unit(source: PackedRows, facts: PackedFacts | None) -> StreamUnit:
    """Divide the tensors of a matrix into those that touch the codes, and others."""
    tensors = dict.fromkeys((*source.matrix.tensors, *(facts.stored.tensors if facts else ())))
    codes = PartOfFile.of(source.matrix.weight)
    others = {place: PartOfFile.of(tensor) for place, tensor in enumerate(tensors) if tensor != source.matrix.weight}
    run, begin, end = [codes], codes.offset, codes.end
    while touching := [place for place, part in others.items() if _touches(part, codes.path, begin, end)]:
        for place in touching:
            part = others.pop(place)
            run.append(part)
            begin, end = min(begin, part.offset), max(end, part.end)
    return StreamUnit(begin, sorted(run), others, facts)


def _touches(part: PartOfFile, path: Path, begin: int, end: int) -> bool:
    return part.path == path and (part.offset == end or part.end == begin)


def plan_requests(units: Sequence[StreamUnit]) -> Iterator[tuple[int, list[tuple[StreamUnit, PartOfFile]]]]:
    """
    Yield the requests for all side parts, each with the number of the first unit that needs it.

    A request is for parts of following units that lie close behind each other. Each part is in one request.
    """
    requested = set[PartOfFile]()
    for number, unit in enumerate(units):
        for place, part in unit.side_parts.items():
            if part not in requested:
                request = [(unit, part), *_following_parts(units[number + 1 :], place, part)]
                requested.update(part for _, part in request)
                yield number, request


def _following_parts(
    units: Sequence[StreamUnit], place: int, part: PartOfFile
) -> Iterator[tuple[StreamUnit, PartOfFile]]:
    """Yield the parts at the same place of the following units, as long as they lie close behind each other."""
    limit, end = part.offset + REQUEST_SIZE, part.end
    for unit in units:
        following = unit.side_parts.get(place)
        if following is None or following.path != part.path or following.offset < end or following.end > limit:
            return
        yield unit, following
        end = following.end
