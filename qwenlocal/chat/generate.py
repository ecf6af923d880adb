"""One answer, from token ids to events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from qwenlocal.chat.chat_template import require_tokens
from qwenlocal.chat.events import Done, Event, FinishReason, GenerationStats, Text
from qwenlocal.engine.grammar import is_complete
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenGenerator
from qwenlocal.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from qwenlocal.progress import PromptProgress


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
    detokenizer = IncrementalDetokenizer(stop_strings)
    # The text of the prefix is known, but it may end in the middle of a character.
    answer_text = "".join(detokenizer.feed(tokenizer.piece(token)) for token in prefix)
    count, reused, reason = 0, 0, None
    answer = list(prefix)
    start = first = last = clock()
    if sampling.grammar is not None:
        sampling = replace(sampling, answer_prefix=tuple(prefix))
    for step in generator.generate(require_tokens([*ids, *prefix]), sampling, limit=max_tokens or 1 << 30):
        if isinstance(step, PromptProgress):
            reused = step.reused
            yield step
            continue
        count, last = count + 1, clock()
        if count == 1:
            first = last
        if tokenizer.is_end(step):
            reason = FinishReason.EOS
            break
        answer.append(step)
        if text := detokenizer.feed(tokenizer.piece(step)):
            answer_text += text
            yield Text(text, count)
        if detokenizer.matched_stop is not None:
            reason = FinishReason.STOP_STRING
            break
    if text := detokenizer.finish():
        answer_text += text
        yield Text(text, count)
    reason = reason or _finish_reason(generator)
    if not count:
        first = clock()
    yield Done(
        reason,
        GenerationStats(len(ids) + len(prefix), reused, count, first - start, last - first if count else 0.0),
        tuple(answer) if reason is not FinishReason.STOP_STRING else (),
        reason is not FinishReason.EOS
        and sampling.grammar is not None
        and not is_complete(sampling.grammar, answer_text),
    )


def _finish_reason(generator: TokenGenerator) -> FinishReason:
    """Return why the generator produced no more tokens."""
    if generator.was_stopped:
        return FinishReason.INTERRUPTED
    return FinishReason.CONTEXT_FULL if generator.is_full else FinishReason.LENGTH
