"""One answer, from token ids to events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from qwenlocal.chat.chat_template import require_tokens
from qwenlocal.chat.events import Done, Event, FinishReason, GenerationStats, Text, TokenLogprob
from qwenlocal.engine.grammar import is_complete
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenGenerator
from qwenlocal.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from qwenlocal.progress import PromptProgress


class AnswerBuilder:
    """
    The events of an answer, from its tokens as they come.

    Feed every token to `add` until `finish_reason` is set, then call `finish`. A token that ends the answer or
    completes a stop string sets it; the caller sets any other reason by passing it to `finish`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        n_prompt: int,
        *,
        grammar: str | None = None,
        stop_strings: Sequence[str] = (),
        prefix: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock of an answer to `n_prompt` tokens; `prefix` are its first tokens, known before."""
        self._tokenizer, self._grammar, self._clock = tokenizer, grammar, clock
        self._detokenizer = IncrementalDetokenizer(stop_strings)
        # The text of the prefix is known, but it may end in the middle of a character.
        self._text = "".join(self._detokenizer.feed(tokenizer.piece(token)) for token in prefix)
        self._ids, self._n_prompt = list(prefix), n_prompt + len(prefix)
        self._emitted = len(self._ids)  # the number of tokens in the events so far
        self._count, self._reused, self._logprobs = 0, 0, list[TokenLogprob]()
        self._start = self._first = self._last = clock()
        self.finish_reason: FinishReason | None = None

    def report(self, progress: PromptProgress) -> PromptProgress:
        """Note how much of the prompt was in the cache; return `progress`, which is an event itself."""
        self._reused = progress.reused
        return progress

    def add(self, token: int, logprob: TokenLogprob | None = None) -> Iterator[Event]:
        """Append a token and yield the text that it completes."""
        self._count, self._last = self._count + 1, self._clock()
        if self._count == 1:
            self._first = self._last
        if self._tokenizer.is_end(token):
            self.finish_reason = FinishReason.EOS
            return
        self._ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        text = self._detokenizer.feed(self._tokenizer.piece(token))
        if self._detokenizer.matched_stop is not None:
            self.finish_reason = FinishReason.STOP_STRING
            self._cut_logprobs(len((self._text + text).encode()))
        yield from self._emit(text)

    def _cut_logprobs(self, end: int) -> None:
        """Remove the tokens that begin at byte `end` of the answer or later: a stop string cut them off."""
        start = sum(len(self._tokenizer.piece(token)) for token in self._ids)
        while self._logprobs:
            start -= len(self._logprobs[-1].piece)
            if start < end:
                break
            self._logprobs.pop()

    def _emit(self, text: str) -> Iterator[Event]:
        if text:
            self._text += text
            yield Text(text, self._count, tuple(self._logprobs), tuple(self._ids[self._emitted :]))
            self._logprobs.clear()
            self._emitted = len(self._ids)

    def finish(self, reason: FinishReason) -> Iterator[Event]:
        """Yield the text that was held back, and `Done`; `reason` holds unless a token has ended the answer."""
        reason = self.finish_reason or reason
        yield from self._emit(self._detokenizer.finish())
        if self._logprobs:
            yield Text("", self._count, tuple(self._logprobs))
        if not self._count:
            self._first = self._clock()
        first, answer = self._first - self._start, self._last - self._first if self._count else 0.0
        yield Done(
            reason,
            GenerationStats(self._n_prompt, self._reused, self._count, first, answer),
            tuple(self._ids) if reason is not FinishReason.STOP_STRING else (),
            reason is not FinishReason.EOS and self._grammar is not None and not is_complete(self._grammar, self._text),
            self._detokenizer.matched_stop if reason is FinishReason.STOP_STRING else None,
        )


def stream_answer(
    generator: TokenGenerator,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    max_tokens: int | None = None,
    stop_strings: Sequence[str] = (),
    prefix: Sequence[int] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """
    Yield the events of the answer to the prompt `ids`: `PromptProgress`, then `Text`, then one `Done`.

    `prefix` are the tokens of an answer to continue. The answer ends at an end-of-generation token, before a stop
    string, after `max_tokens` tokens (None: no limit), when the context is full, or when the generator is stopped.

    Raises
    ------
    ContextFull: the prompt leaves no space for an answer; raised before the first event.
    BadWeights: the prompt has no tokens.
    """
    answer = AnswerBuilder(
        tokenizer, len(ids), grammar=sampling.grammar, stop_strings=stop_strings, prefix=prefix, clock=clock
    )
    if sampling.grammar is not None:
        sampling = replace(sampling, answer_prefix=tuple(prefix))
    for step in generator.generate(require_tokens([*ids, *prefix]), sampling, limit=max_tokens or 1 << 30):
        if isinstance(step, PromptProgress):
            yield answer.report(step)
            continue
        yield from answer.add(step)
        if answer.finish_reason:
            break
    yield from answer.finish(_finish_reason(generator))


def _finish_reason(generator: TokenGenerator) -> FinishReason:
    """Return why the generator produced no more tokens."""
    if generator.was_stopped:
        return FinishReason.INTERRUPTED
    return FinishReason.CONTEXT_FULL if generator.is_full else FinishReason.LENGTH
