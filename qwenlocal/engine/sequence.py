"""Token generation in one sequence of the KV cache; only tokens that the cache lacks are computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

from qwenlocal.engine.context import Aborted, CacheFull, Context
from qwenlocal.engine.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache, common_prefix
from qwenlocal.engine.prompt_cache import PromptCache
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.engine.speculation import Drafter, NoSpeculation
from qwenlocal.errors import ContextFull
from qwenlocal.progress import PromptProgress

_SEQUENCE = 0  # the others of the context belong to the prefix cache
_FIRST_CHUNK, _MIN_CHUNK = 256, 64  # tokens of a prompt per `decode`
_SLOW, _FAST = 3.0, 0.5  # seconds for a chunk; slower ones are halved, faster ones doubled


class TokenGenerator(Protocol):
    """A source of tokens that continue a prompt: a `TokenSequence`, or a scheduler of several."""

    def generate(self, ids: Sequence[int], sampling: Sampling, *, limit: int) -> Iterator[PromptProgress | int]:
        """
        Yield `PromptProgress` during the prefill, then the ids of the answer, at most `limit`.

        End tokens are yielded like any other; to stop there, close the iterator. The iterator ends early if it is
        stopped or the context is full (`is_full`).

        Raises
        ------
        ContextFull: the prompt leaves no room for an answer.
        BadWeights: the model computes NaN.
        """

    @property
    def is_full(self) -> bool:
        """True if the last answer ended because the context is full."""

    def stop(self) -> None:
        """Stop generating within milliseconds, from any thread."""

    @property
    def was_stopped(self) -> bool:
        """True if `stop` ended the last answer."""


class TokenSequence:
    """A generator in sequence 0 of a context; implements `TokenGenerator`."""

    def __init__(
        self,
        context: Context,
        *,
        speculation: Drafter | None = None,
        prefix_cache: PrefixCache | None = None,
        prompt_cache: PromptCache | None = None,
        check_memory: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Create a generator on top of `context`.

        With `speculation`, several drafted tokens are verified at once if the text repeats itself. Abandoned branches
        go to `prefix_cache`; prefixes found there or in `prompt_cache` are not computed again. `check_memory` is called
        regularly while generating; an exception that it raises ends the answer.
        """
        self._context, self._check_memory = context, check_memory
        self._speculation, self._prompt_cache = speculation or NoSpeculation(), prompt_cache
        self._prefix_cache = prefix_cache or PrefixCache(context, context.options.n_seq_max)  # one without capacity
        self._computed, self._seconds = 0, 0.0  # prompt tokens, and the time to compute them
        self._cached: list[int] = []  # the tokens in the KV cache
        self.is_full = self.was_stopped = False

    @property
    def cached_ids(self) -> tuple[int, ...]:
        """The tokens in the KV cache."""
        return tuple(self._cached)

    def adopt(self, ids: Sequence[int]) -> None:
        """Take over the tokens `ids`, which another object added to this sequence of the KV cache."""
        self._cached = list(ids)
        self._sync_cache()

    def forget(self, prompt_cache: PromptCache | None) -> None:
        """Drop all that was computed, because the model has changed, and use another prompt cache from now on."""
        while self._prefix_cache.evict_oldest():
            pass
        self._cached, self._prompt_cache = [], prompt_cache
        self._sync_cache()

    def stop(self) -> None:
        self._context.abort.set()

    def generate(self, ids: Sequence[int], sampling: Sampling, *, limit: int) -> Iterator[PromptProgress | int]:
        if not ids:
            raise ValueError("the prompt is empty")
        if len(ids) >= self._context.n_ctx:
            raise ContextFull(len(ids), self._context.n_ctx, self._context.model.n_ctx_train)
        self.is_full = self.was_stopped = False
        self._context.abort.clear()
        self._sync_cache()
        sampler = Sampler(sampling, self._context.model.tokenizer)
        try:
            yield from self._generate(ids, sampler, limit)
        except Aborted:
            self.was_stopped = True
        except CacheFull:
            self.is_full = True
        finally:
            sampler.close()
            self._sync_cache()

    def _generate(self, ids: Sequence[int], sampler: Sampler, limit: int) -> Iterator[PromptProgress | int]:
        context = self._context
        row = yield from self._prefill(ids)
        sampler.accept_prompt(ids)
        self._speculation.begin(ids)
        last: Sequence[int] = ()  # the last sampled token, which is not in the KV cache yet
        draft: Sequence[int] = ()
        left, seconds = limit, None
        while True:
            if forced := sampler.accept_forced()[:left]:
                row, draft, seconds = (yield from self._force(last, forced)), (), None
                self._speculation.learn(forced, 0, None)
                left -= len(forced)
            elif last:
                draft = self._speculation.propose(min(left, context.n_ctx - len(self._cached)) - 1)
                started = time.monotonic()
                row = self._decode(last, draft)
                seconds = time.monotonic() - started
            if not left:
                return
            new_tokens: list[int] = []
            for position in range(len(draft) + 1):
                token = sampler.sample(context, row + position)
                new_tokens.append(token)
                yield token
                if len(new_tokens) == left:
                    return
                if position == len(draft) or token != draft[position]:
                    break
                self._cached.append(token)  # its keys and values are in the cache already
            last = (token,)
            left -= len(new_tokens)
            self._check_memory()
            if draft:
                self._sync_cache()
            self._speculation.learn(new_tokens, len(draft), seconds)
            if context.abort:
                raise Aborted
            if len(self._cached) >= context.n_ctx:
                raise CacheFull

    def _decode(self, ids: Sequence[int], draft: Sequence[int] = ()) -> int:
        """Compute `ids`, and `draft` after them; if the KV cache is full, evict entries of the prefix cache."""
        while True:
            try:
                row = self._context.decode([(_SEQUENCE, (*ids, *draft))], all_logits=(_SEQUENCE,) if draft else ())[0]
            except CacheFull:
                if not self._prefix_cache.evict_oldest():
                    raise
            else:
                self._cached.extend(ids)
                return row

    def _force(self, before: Sequence[int], forced: Sequence[int]) -> Generator[int, None, int]:
        """Compute `before` and the tokens that a grammar forces, yield the latter, and return the row of logits."""
        row, rest = -1, [*before, *forced]
        while rest:
            new, rest = rest[: self._context.n_batch], rest[self._context.n_batch :]
            if len(self._cached) + len(new) > self._context.n_ctx:
                raise CacheFull
            row = self._decode(new)
        yield from forced
        return row

    def _prefill(self, ids: Sequence[int]) -> Generator[PromptProgress, None, int]:
        """Compute the part of `ids` that is not cached, at least the last token; return the row of logits."""
        self._reuse_cache(ids)
        del self._cached[min(common_prefix(self._cached, ids), len(ids) - 1) :]
        self._sync_cache()
        reused = len(self._cached)
        yield PromptProgress(reused, len(ids), reused)
        chunk, row = min(_FIRST_CHUNK, self._context.n_batch), -1
        while len(self._cached) < len(ids):
            if self._context.abort:
                raise Aborted
            new = ids[len(self._cached) : len(self._cached) + chunk]
            self._check_memory()
            started = time.monotonic()
            row = self._decode(new)
            seconds = time.monotonic() - started
            self._computed, self._seconds = self._computed + len(new), self._seconds + seconds
            yield PromptProgress(len(self._cached), len(ids), reused)
            chunk = self._next_chunk(chunk, seconds)
        return row

    def _reuse_cache(self, ids: Sequence[int]) -> None:
        """Switch to the prefix cache or the prompt cache if it has a longer prefix of `ids` than this sequence."""
        shared = common_prefix(self._cached, ids)
        if len(self._cached) - shared >= MIN_PREFIX_TOKENS:
            self._prefix_cache.insert(_SEQUENCE, self._cached)
        entry = self._prefix_cache.find_longest_prefix(ids, shared)
        if entry is not None:
            self._cached = self._prefix_cache.copy_to(_SEQUENCE, entry)
            shared = common_prefix(self._cached, ids)
        if self._prompt_cache is None or len(ids) <= shared + MIN_PREFIX_TOKENS:
            return
        saved = self._prompt_cache.find_longest_prefix(ids, shared + MIN_PREFIX_TOKENS)
        if saved and len(saved.tokens) < self._context.n_ctx:
            while self._prefix_cache.evict_oldest():  # llama.cpp needs room for the whole state at once
                pass
            is_loaded = self._prompt_cache.load(saved, self._context, _SEQUENCE)
            self._cached = list(saved.tokens) if is_loaded else []
            self._sync_cache()

    def save_prompt_cache(self) -> bool:
        """Save the sequence to the prompt cache if loading it is faster than computing it; return whether it was."""
        if self._prompt_cache is None or not self._computed:
            return False
        return self._prompt_cache.save(self._context, _SEQUENCE, self._cached, self._seconds / self._computed)

    def _next_chunk(self, chunk: int, seconds: float) -> int:
        """Adapt the chunk size: large chunks are faster (256 by a tenth over 64), small ones show more progress."""
        if seconds > _SLOW:
            return max(_MIN_CHUNK, chunk // 2)
        return min(chunk * 2, self._context.n_batch) if seconds < _FAST else chunk

    def _sync_cache(self) -> None:
        """
        Remove tokens from the KV cache that are not in `_cached`, so that the model does not see them.

        They remain after an abort, a rejected draft, or the work of another sequence object.
        """
        if self._context.length(_SEQUENCE) > len(self._cached):
            del self._cached[self._context.truncate(_SEQUENCE, len(self._cached)) :]
