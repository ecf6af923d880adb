"""The text of an answer while the model generates it, for `for` and for `async for`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from types import TracebackType

from qwenlocal.api.answer import Answer, incomplete_answer
from qwenlocal.api.answer_options import AnswerSettings
from qwenlocal.api.answer_thread import AnswerThread
from qwenlocal.chat.events import Done, Event, Text
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.progress import PromptProgress


class PartialAnswer:
    """The part of an answer whose events have arrived, in a context of `n_ctx` tokens."""

    def __init__(self, settings: AnswerSettings, n_ctx: int) -> None:
        self._settings, self._n_ctx = settings, n_ctx
        self.text = ""
        self.progress: PromptProgress | None = None
        self.answer: Answer | None = None

    def add(self, event: Event) -> str:
        """Add an event and return its text; "" if it has none."""
        if isinstance(event, Text):
            self.text += event.text
            return event.text
        if isinstance(event, PromptProgress):
            self.progress = event
        elif isinstance(event, Done):
            reason, settings = event.finish_reason, self._settings
            error = incomplete_answer(reason, settings.max_tokens, self._n_ctx) if event.is_incomplete else None
            self.answer = Answer(self.text, reason, event.stats, error, settings.decode)
        return ""


class TextStream:
    """
    An iterator over pieces of an answer's text: whole characters, as soon as they are final.

    The model starts when the first piece is requested, and computes ahead of the reader. Leaving a `with` block,
    `close`, or dropping the stream stops it. `answer` is available once the iterator has ended.

        with model.stream("Why is the sky blue?") as stream:
            for text in stream:
                print(text, end="", flush=True)
        print(stream.answer.stats.answer_speed)

    Iterating raises ContextFull if the prompt is too long, LowMemory if memory runs out, BadWeights if the model
    computes NaN.
    """

    def __init__(
        self, thread: AnswerThread, ids: Sequence[int], settings: AnswerSettings, n_ctx: int, owner: object
    ) -> None:
        """`thread` answers the prompt `ids` in a context of `n_ctx` tokens; `owner` lives as long as the stream."""
        self._partial, self._owner = PartialAnswer(settings, n_ctx), owner
        self._thread, self._stopped = thread, threading.Event()
        # They have no reference to this object, so that dropping it stops them at once.
        self._pieces = _read(thread.iterate(ids, settings, self._stopped), self._partial)
        self._async_pieces = _read_async(thread.iterate_async(ids, settings, self._stopped), self._partial)

    @property
    def text(self) -> str:
        """The text so far."""
        return self._partial.text

    @property
    def progress(self) -> PromptProgress | None:
        """The part of the prompt that has been processed, in tokens; None before the start."""
        return self._partial.progress

    @property
    def answer(self) -> Answer:
        """
        The whole answer.

        Raises
        ------
        UsageError: the stream has not been read to its end.
        """
        if self._partial.answer is None:
            raise UsageError(
                tr("The answer has not ended."), hint=tr("Read the stream to its end, or use stream.text.")
            )
        return self._partial.answer

    def stop(self) -> None:
        """End the answer early, from any thread: the iterator ends, and the finish reason is INTERRUPTED."""
        self._stopped.set()
        self._thread.wake()

    # --- reading

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the answer if it has not ended."""
        self._pieces.close()

    # --- reading with asyncio

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        return await anext(self._async_pieces)

    async def __aenter__(self) -> TextStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop the answer if it has not ended."""
        await self._async_pieces.aclose()


def _read(events: Generator[Event, None, None], partial: PartialAnswer) -> Generator[str, None, None]:
    with contextlib.closing(events):
        for event in events:
            if text := partial.add(event):
                yield text


async def _read_async(events: AsyncGenerator[Event, None], partial: PartialAnswer) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(events):
        async for event in events:
            if text := partial.add(event):
                yield text
