"""
Abandoned branches of a conversation, kept in the KV cache so that returning to one needs no prefill.

Editing an early message or asking again drops the end of a conversation. Before that, its tokens are copied to another
sequence. With a unified KV cache, sequences share the cells of a common prefix (llama.h: llama_memory_seq_cp). If the
cache runs out of room, the oldest copy is evicted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenlocal.engine.context import Context

MIN_PREFIX_TOKENS = 64  # shorter prefixes are quick to compute


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens that two sequences share at their start: `common_prefix([1, 2, 3], [1, 2, 9])` is 2."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class PrefixCache:
    """Copies of sequences in a context, under the sequence numbers from `first` to `n_seq_max` - 1."""

    def __init__(self, context: Context, first: int = 1) -> None:
        self._context = context
        self._free = list(range(first, context.options.n_seq_max))
        self._entries: dict[int, list[int]] = {}  # token ids by sequence number, the oldest first

    def insert(self, source: int, ids: Sequence[int]) -> None:
        """Copy sequence `source`, which holds `ids`, and drop the entries that are prefixes of `ids`."""
        for number, entry in list(self._entries.items()):
            if list(ids[: len(entry)]) == entry:
                self._drop(number)
        if not self._free and not self.evict_oldest():
            return
        number = self._free.pop()
        self._context.copy(source, number)
        self._entries[number] = list(ids)

    def find_longest_prefix(self, ids: Sequence[int], more_than: int) -> int | None:
        """Find the entry that shares the longest prefix with `ids`; None unless it has more than `more_than` tokens."""
        best, best_length = None, more_than
        for number, entry in self._entries.items():
            length = common_prefix(entry, ids)
            if length > best_length:
                best, best_length = number, length
        return best

    def copy_to(self, target: int, number: int) -> list[int]:
        """Copy entry `number` to sequence `target` and return its tokens; the entry becomes the newest."""
        self._context.copy(number, target)
        self._entries[number] = entry = self._entries.pop(number)
        return list(entry)

    def evict_oldest(self) -> bool:
        """Drop the oldest entry; return False if there is none."""
        if not self._entries:
            return False
        self._drop(next(iter(self._entries)))
        return True

    def _drop(self, number: int) -> None:
        del self._entries[number]
        self._context.truncate(number, 0)
        self._free.append(number)
