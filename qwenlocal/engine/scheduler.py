"""
Continuous batching: many requests in one context, each in its own sequence.

Each step decodes the next token of every running sequence, and a part of the prompts that are waiting, in one call of
llama.cpp: the weights are read once for all of them. The part is as large as can be computed in about 150 ms, so that a
long prompt stops nobody's answer. A sequence that runs alone drafts several tokens (`speculation`).

Sequences share the KV cache of common prefixes, also with those that are still running (llama.h:
llama_memory_seq_cp). A finished sequence stays in the cache, parked, until a request begins that has nothing in common
with it, or its room is needed; then it moves to the machine's memory (`memory_cache`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwenlocal.engine.context import Aborted, CacheFull, Context
from qwenlocal.engine.logprobs import Logprobs, log_softmax, rank_tokens
from qwenlocal.engine.memory_cache import MemoryCache, StoredSequence
from qwenlocal.engine.prefix_cache import MIN_PREFIX_TOKENS, common_prefix
from qwenlocal.engine.prompt_cache import PromptCache
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.engine.speculation import Drafter, NoSpeculation
from qwenlocal.errors import ContextFull, QwenlocalError
from qwenlocal.progress import PromptProgress

_STREAMING_SECONDS, _IDLE_SECONDS = 0.15, 0.5  # for parts of prompts, while an answer is generated and while none is
_FIRST_PART, _MIN_PART = 64, 16  # tokens of prompts per step
_SHORT = 16  # a sequence with at most this many tokens to compute counts as decoding, not as a prompt


@dataclass(frozen=True)
class SequenceRequest:
    """
    A prompt as token ids, how to sample, and the maximum number of tokens.

    `top_logprobs` asks for the probability of each token and of that many alternatives, `prompt_logprobs` for those of
    the prompt. Clients take turns: a `client` with many requests does not delay the others. `key` identifies the
    request in the events.
    """

    key: int
    ids: Sequence[int]
    sampling: Sampling
    limit: int
    client: str = ""
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    reuses_cache: bool = True


@dataclass(frozen=True)
class Prefilled:
    """A part of a prompt was computed; `logprobs` of its tokens, if requested (the first one has none)."""

    key: int
    progress: PromptProgress
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True)
class Sampled:
    """A sequence has another token."""

    key: int
    id: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Ended:
    """
    A sequence has ended and is no longer in the scheduler: at its limit, because the context `is_full`, or by an error.

    Sequences that `Scheduler.finish` ends have no such event.
    """

    key: int
    is_full: bool = False
    error: QwenlocalError | None = None


SchedulerEvent = Prefilled | Sampled | Ended


@dataclass
class _Slot:
    """A request and its tokens: the first `n_cached` of `ids` are in the KV cache, under sequence `number`."""

    request: SequenceRequest
    sampler: Sampler
    ids: list[int]
    number: int = -1
    n_cached: int = 0
    n_shared: int = 0  # of them, those that share their cells with another sequence
    reused: int = 0

    @property
    def n_left(self) -> int:
        return self.request.limit - (len(self.ids) - len(self.request.ids))

    @property
    def n_pending(self) -> int:
        return len(self.ids) - self.n_cached

    @property
    def reuses_cache(self) -> bool:
        return self.request.reuses_cache and not self.request.prompt_logprobs


class _PartSize:
    """
    The number of tokens of prompts that a step computes, so that it takes about `seconds`.

    From `n_ubatch` tokens on, these are whole micro-batches: a part of 150 tokens would compute 128 at the speed of a
    batch and 22 at hardly more than that of single tokens.
    """

    def __init__(self, seconds: float, n_ubatch: int, limit: int) -> None:
        self._seconds, self._n_ubatch, self._limit = seconds, n_ubatch, limit
        self._tokens = float(min(_FIRST_PART, limit))

    @property
    def tokens(self) -> int:
        tokens = int(self._tokens)
        return tokens if tokens < self._n_ubatch else tokens // self._n_ubatch * self._n_ubatch

    def learn(self, tokens: int, seconds: float) -> None:
        """Note that a step with `tokens` tokens of prompts took `seconds`; small last parts say nothing."""
        factor = max(0.5, min(2.0, self._seconds / seconds))
        if factor < 1 or tokens >= self.tokens // 2:
            self._tokens = max(_MIN_PART, min(self.tokens * factor, self._limit))


class Scheduler:
    """
    Runs requests on a context whose `n_seq_max` is `max_running` and the number of sequences to park.

    `submit`, `finish` and `step` are called by one thread; `interrupt` by any.
    """

    def __init__(
        self,
        context: Context,
        max_running: int,
        *,
        speculation: Drafter | None = None,
        memory_cache: MemoryCache | None = None,
        prompt_cache: PromptCache | None = None,
        check_memory: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`check_memory` is called after each step; an exception that it raises ends the newest sequence."""
        self._context, self._max_running = context, max_running
        self._memory_cache, self._prompt_cache = memory_cache or MemoryCache(0), prompt_cache
        self._speculation, self._check_memory, self._clock = speculation or NoSpeculation(), check_memory, clock
        self._waiting: dict[str, list[_Slot]] = {}  # by client; the one whose turn it is comes first
        self._running: list[_Slot] = []  # the oldest first
        self._parked: dict[int, list[int]] = {}  # token ids by sequence number, the oldest first
        self._free = list(range(context.options.n_seq_max - 1, -1, -1))
        self._drafting: _Slot | None = None  # the sequence that the drafter knows
        n_ubatch, n_batch = context.options.n_ubatch, context.n_batch
        self._streaming_part = _PartSize(_STREAMING_SECONDS, n_ubatch, n_batch)
        self._idle_part = _PartSize(_IDLE_SECONDS, n_ubatch, n_batch)
        self._is_tight = False
        self._computed, self._seconds = 0, 0.0  # prompt tokens computed without others, and the time for it

    # --- requests

    @property
    def is_idle(self) -> bool:
        """True if there is nothing to do."""
        return not self._running and not self._waiting

    @property
    def n_running(self) -> int:
        """The number of sequences that are being computed."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """The number of requests that have not begun."""
        return sum(map(len, self._waiting.values()))

    def submit(self, request: SequenceRequest, sampler: Sampler | None = None) -> None:
        """
        Add a request.

        `sampler` was created for its sampling by another thread: large grammars take seconds. It is closed at the end.

        Raises
        ------
        ContextFull: the prompt leaves no room for an answer, even alone. UsageError: its grammar is not usable.
        """
        if len(request.ids) >= self._context.n_ctx:
            if sampler:
                sampler.close()
            raise ContextFull(len(request.ids), self._context.n_ctx, self._context.model.n_ctx_train)
        sampler = sampler or Sampler(request.sampling, self._context.model.tokenizer)
        sampler.accept_prompt(request.ids)
        self._waiting.setdefault(request.client, []).append(_Slot(request, sampler, list(request.ids)))

    def finish(self, key: int) -> None:
        """End a request, because its answer is complete or nobody waits for it; unknown keys are ignored."""
        for slot in self._running:
            if slot.request.key == key:
                self._close(slot)
                return
        for client, slots in self._waiting.items():
            for slot in slots:
                if slot.request.key == key:
                    self._remove_waiting(client, slot)
                    slot.sampler.close()
                    return

    def is_interruptible(self, key: int) -> bool:
        """
        Tell whether `interrupt` frees the time of a request that nobody needs any more. From any thread.

        It does while its prompt is computed, or if it runs alone; else others compute what they do together again.
        """
        running = list(self._running)
        return any(slot.request.key == key and (slot.n_pending > _SHORT or len(running) == 1) for slot in running)

    def interrupt(self) -> None:
        """Let the running or next `step` return at once; what it computed is computed again. From any thread."""
        self._context.abort.set()

    def close(self) -> None:
        """End all requests."""
        for slot in [*self._running, *(slot for slots in self._waiting.values() for slot in slots)]:
            self.finish(slot.request.key)

    # --- steps

    def step(self) -> list[SchedulerEvent]:
        """Compute the next tokens, and return what happened. Does nothing if the scheduler is idle."""
        events: list[SchedulerEvent] = []
        self._admit()
        parts = self._choose_parts()
        if not parts:
            return events
        try:
            draft = self._draft(parts)
            with_all = [slot.number for slot, _ in parts if draft or self._wants_prompt_logprobs(slot)]
            batch = [(slot.number, (*slot.ids[slot.n_cached : slot.n_cached + count], *draft)) for slot, count in parts]
            started = self._clock()
            rows = self._context.decode(batch, all_logits=with_all)
        except CacheFull:
            self._make_room(events)
            return events
        except Aborted:
            self._context.abort.clear()  # not before: an interrupt between two steps counts, too
            for slot, _ in parts:
                self._truncate(slot)
            return events
        seconds = self._clock() - started
        self._learn_part_size(parts, seconds)
        for (slot, count), row in zip(parts, rows, strict=True):
            try:
                self._advance(slot, count, row, draft, seconds if len(parts) == 1 else None, events)
            except QwenlocalError as error:
                self._end(slot, events, error=error)
        self._watch_memory(events)
        return events

    def _choose_parts(self) -> list[tuple[_Slot, int]]:
        """Choose how many pending tokens of each running sequence to compute now."""
        parts = [(slot, slot.n_pending) for slot in self._running if not self._is_limited(slot)]
        prompts = [slot for slot in self._running if self._is_limited(slot)]
        room = self._context.n_batch - sum(count for _, count in parts)
        part = self._streaming_part if parts else self._idle_part
        budget, n_outputs = min(part.tokens, room), self._context.options.n_outputs - len(parts)
        if prompts:  # half for the oldest one, so that it is not overtaken forever; the rest for the shortest ones
            oldest, share = prompts[0], budget if len(prompts) == 1 else budget // 2
            for slot in (oldest, *sorted(prompts[1:], key=lambda slot: slot.n_pending)):
                limit = min(share if slot is oldest else budget, slot.n_pending)
                has_all_rows = self._wants_prompt_logprobs(slot)
                if has_all_rows:
                    limit = min(limit, n_outputs)
                if limit > 0 and n_outputs > 0:
                    parts.append((slot, limit))
                    budget -= limit
                    n_outputs -= limit if has_all_rows else 1
        return parts

    def _is_limited(self, slot: _Slot) -> bool:
        """Tell whether a step may compute a part of the pending tokens instead of all."""
        return slot.n_pending > _SHORT or self._wants_prompt_logprobs(slot)

    def _draft(self, parts: Sequence[tuple[_Slot, int]]) -> Sequence[int]:
        """Propose tokens after the last one of a sequence that runs alone."""
        (slot, count), *others = parts
        if others or count > 1 or len(slot.ids) == len(slot.request.ids) or slot.request.top_logprobs is not None:
            return ()
        if self._drafting is not slot:
            self._speculation.begin(slot.ids)
            self._drafting = slot
        return self._speculation.propose(min(slot.n_left, self._context.n_ctx - len(slot.ids)) - 1)

    def _advance(
        self,
        slot: _Slot,
        count: int,
        row: int,
        draft: Sequence[int],
        seconds: float | None,
        events: list[SchedulerEvent],
    ) -> None:
        """Note that `count` tokens are in the cache now, and sample if they were the last pending ones."""
        request, first = slot.request, slot.n_cached
        has_all_rows = self._wants_prompt_logprobs(slot)
        slot.n_cached += count
        if first < len(request.ids):
            progress = PromptProgress(min(slot.n_cached, len(request.ids)), len(request.ids), slot.reused)
            logprobs = self._prompt_logprobs(slot, first, row) if has_all_rows else ()
            events.append(Prefilled(request.key, progress, logprobs))
        if has_all_rows:
            row += count - 1
        if slot.n_pending:
            return
        if slot.n_left <= 0:
            self._end(slot, events)
            return
        new = self._sample(slot, row, draft, events)
        if self._drafting is slot:
            self._speculation.learn(new, len(draft), seconds)
        if draft:
            self._truncate(slot)  # rejected tokens
        if slot.n_left > 0 and slot in self._running:
            self._force(slot, events)
        if slot.n_left <= 0:
            self._end(slot, events)
        elif len(slot.ids) >= self._context.n_ctx:
            self._end(slot, events, is_full=True)

    def _sample(self, slot: _Slot, row: int, draft: Sequence[int], events: list[SchedulerEvent]) -> list[int]:
        """Sample the next token, and the ones after it as long as they are those of the draft."""
        new: list[int] = []
        for position in range(len(draft) + 1):
            token, logprobs = self._sample_token(slot, row + position)
            events.append(Sampled(slot.request.key, token, logprobs))
            new.append(token)
            slot.ids.append(token)
            if slot.n_left <= 0 or position == len(draft) or token != draft[position]:
                break
            slot.n_cached += 1  # its keys and values are in the cache already
        return new

    def _sample_token(self, slot: _Slot, row: int) -> tuple[int, Logprobs | None]:
        count = slot.request.top_logprobs
        ranks = None if count is None else log_softmax(self._context, row)
        token = slot.sampler.sample(self._context, row)
        return token, None if count is None else rank_tokens(ranks, token, count)

    def _force(self, slot: _Slot, events: list[SchedulerEvent]) -> None:
        """Append the tokens that the grammar forces; the next step computes them together."""
        forced = slot.sampler.accept_forced()[: slot.n_left]
        if not forced:
            return
        count = slot.request.top_logprobs
        events.extend(Sampled(slot.request.key, id, None if count is None else Logprobs(0.0)) for id in forced)
        slot.ids.extend(forced)
        if self._drafting is slot:
            self._speculation.learn(forced, 0, None)

    def _learn_part_size(self, parts: Sequence[tuple[_Slot, int]], seconds: float) -> None:
        if all(count == 1 for _, count in parts):  # the usual case, in which only answers grow
            return
        counts = [count for slot, count in parts if slot.n_pending > _SHORT]
        if not counts or seconds <= 0:
            return
        (self._streaming_part if len(counts) < len(parts) else self._idle_part).learn(sum(counts), seconds)
        if len(parts) == 1:
            self._computed, self._seconds = self._computed + counts[0], self._seconds + seconds

    # --- probabilities of the prompt

    def _wants_prompt_logprobs(self, slot: _Slot) -> bool:
        return slot.request.prompt_logprobs and slot.n_cached < len(slot.request.ids)

    def _prompt_logprobs(self, slot: _Slot, first: int, row: int) -> tuple[Logprobs, ...]:
        """Return the probabilities of the tokens after those that were computed from position `first` on."""
        following = slot.request.ids[first + 1 : slot.n_cached + 1]
        count = slot.request.top_logprobs or 0
        return tuple(
            rank_tokens(log_softmax(self._context, row + offset), token, count)
            for offset, token in enumerate(following)
        )

    # --- beginning and end

    def _admit(self) -> None:
        """Start waiting requests, of one client after the other, as long as there is room for them."""
        while len(self._running) < self._max_running and not self._is_tight:
            heads = ((client, slots[0]) for client, slots in self._waiting.items())
            ready = ((client, slot) for client, slot in heads if not self._waits_for_prefix(slot))
            client, slot = next(((client, slot) for client, slot in ready if self._has_room(slot)), ("", None))
            if slot is None:
                return
            self._remove_waiting(client, slot)
            if client in self._waiting:  # its turn is over
                self._waiting[client] = self._waiting.pop(client)
            self._start(slot)

    def _waits_for_prefix(self, slot: _Slot) -> bool:
        """Tell whether a running prompt is about to compute a prefix that this one can share."""
        if not slot.reuses_cache:
            return False
        return any(
            common_prefix(other.ids, slot.ids) >= max(MIN_PREFIX_TOKENS, other.n_cached + 1)
            and other.n_pending > _SHORT
            for other in self._running
        )

    def _has_room(self, slot: _Slot) -> bool:
        used = sum(len(other.ids) - other.n_shared for other in self._running)
        return used + len(slot.ids) - self._longest_prefix(slot)[1] < self._context.n_ctx

    def _start(self, slot: _Slot) -> None:
        """Give a request a sequence, with the longest prefix of its tokens that is in a cache."""
        source, shared = self._longest_prefix(slot)
        stored = self._memory_cache.find_longest_prefix(slot.ids, shared + MIN_PREFIX_TOKENS)
        self._store_unrelated(slot, keep=source)  # perhaps in place of `stored`, which is in use now
        if source in self._parked and shared == len(self._parked[source]):
            slot.number = source  # a continued chat: nothing of the parked sequence is lost
            del self._parked[source]
        else:
            slot.number = self._take_number(keep=source)
            if shared:
                self._context.copy(source, slot.number)
                slot.n_shared = shared
        slot.n_cached = shared
        self._truncate(slot)
        if slot.reuses_cache:
            self._load_saved_prefix(slot, stored)
        slot.reused = min(slot.n_cached, len(slot.request.ids))
        self._running.append(slot)

    def _longest_prefix(self, slot: _Slot) -> tuple[int, int]:
        """Find the sequence that has the longest prefix of a request's tokens in the cache: its number, the length."""
        best, best_length = -1, 0
        if not slot.reuses_cache:
            return best, best_length
        cached = [(number, ids) for number, ids in self._parked.items()]
        cached += [(other.number, other.ids[: other.n_cached]) for other in self._running]
        for number, ids in cached:
            length = min(common_prefix(ids, slot.ids), len(slot.ids) - 1)
            if length > best_length:
                best, best_length = number, length
        return best, best_length

    def _store_unrelated(self, slot: _Slot, keep: int) -> None:
        """Move parked sequences to memory that have little in common with a new request, but not `keep`."""
        for number, ids in list(self._parked.items()):
            if number == keep or common_prefix(ids, slot.ids) >= MIN_PREFIX_TOKENS:
                continue
            if self._memory_cache.save(self._context, number, ids):
                self._drop(number)

    def _load_saved_prefix(self, slot: _Slot, stored: StoredSequence | None) -> None:
        """Load a longer prefix, which is `stored` in memory or saved on the disk, if there is one."""
        if stored:
            while not (is_loaded := self._memory_cache.load(stored, self._context, slot.number)) and self._parked:
                self._evict(next(iter(self._parked)))  # there is no room for both
            self._use_loaded(slot, stored.tokens, is_loaded)
        saved = self._prompt_cache and self._prompt_cache.find_longest_prefix(
            slot.ids, slot.n_cached + MIN_PREFIX_TOKENS
        )
        if self._prompt_cache and saved and len(saved.tokens) < self._context.n_ctx:
            self._use_loaded(slot, saved.tokens, self._prompt_cache.load(saved, self._context, slot.number))

    def _use_loaded(self, slot: _Slot, ids: Sequence[int], is_loaded: bool) -> None:
        """Keep what a sequence that was loaded for a request has in common with it."""
        slot.n_cached = min(common_prefix(ids, slot.ids), len(slot.ids) - 1) if is_loaded else 0
        slot.n_shared = 0
        self._truncate(slot)

    def _end(
        self,
        slot: _Slot,
        events: list[SchedulerEvent],
        *,
        is_full: bool = False,
        error: QwenlocalError | None = None,
    ) -> None:
        if slot in self._running:
            self._close(slot)
            events.append(Ended(slot.request.key, is_full, error))

    def _close(self, slot: _Slot) -> None:
        """Park the sequence of a request that has ended."""
        self._running.remove(slot)
        slot.sampler.close()
        self._is_tight = False
        if self._drafting is slot:
            self._drafting = None
        self._truncate(slot)
        cached = slot.ids[: slot.n_cached]
        for number, ids in list(self._parked.items()):
            if ids == cached[: len(ids)]:
                self._drop(number)
        if len(cached) >= MIN_PREFIX_TOKENS:
            self._parked[slot.number] = cached
        else:
            self._context.truncate(slot.number, 0)
            self._free.append(slot.number)

    # --- room

    def _make_room(self, events: list[SchedulerEvent]) -> None:
        """Free room in the KV cache: of what is parked, or of the newest request, which starts again later."""
        if self._parked:
            self._evict(next(iter(self._parked)))
            return
        newest = self._running[-1]
        if len(self._running) == 1:
            self._end(newest, events, is_full=True)
            return
        self._running.remove(newest)
        self._context.truncate(newest.number, 0)
        self._free.append(newest.number)
        newest.n_cached = newest.n_shared = 0
        client = newest.request.client
        rest = self._waiting.pop(client, [])
        self._waiting = {client: [newest, *rest], **self._waiting}
        self._is_tight = True  # start no request until another one has ended

    def _take_number(self, keep: int) -> int:
        """Return a free sequence number; drop the oldest parked sequence for it, but not `keep`."""
        if not self._free:
            self._evict(next(number for number in self._parked if number != keep))
        return self._free.pop()

    def _evict(self, number: int) -> None:
        """Free a parked sequence in the KV cache; it is stored in memory, if there is room."""
        self._memory_cache.save(self._context, number, self._parked[number])
        self._drop(number)

    def _drop(self, number: int) -> None:
        del self._parked[number]
        self._context.truncate(number, 0)
        self._free.append(number)

    def _truncate(self, slot: _Slot) -> None:
        """Remove what is in the KV cache but not in the sequence: rejected drafts, and parts of stopped steps."""
        if self._context.length(slot.number) > slot.n_cached:
            slot.n_cached = self._context.truncate(slot.number, slot.n_cached)

    def _remove_waiting(self, client: str, slot: _Slot) -> None:
        self._waiting[client].remove(slot)
        if not self._waiting[client]:
            del self._waiting[client]

    def _watch_memory(self, events: list[SchedulerEvent]) -> None:
        try:
            self._check_memory()
        except QwenlocalError as error:
            if self._running:
                self._end(self._running[-1], events, error=error)

    def save_prompt_caches(self) -> None:
        """Save finished sequences on disk; takes seconds for long ones, so only while nothing else is to be done."""
        if not self._prompt_cache or not self._computed:
            return
        seconds = self._seconds / self._computed
        for number, ids in list(self._parked.items()):
            self._prompt_cache.save(self._context, number, ids, seconds)
            self._drop(number)
        number = self._free[-1]
        for stored in self._memory_cache:
            if self._context.set_state(number, stored.state):
                self._prompt_cache.save(self._context, number, stored.tokens, seconds)
        self._context.truncate(number, 0)
