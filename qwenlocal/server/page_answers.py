"""Answers for the page: a conversation of the journal in a thread, its events as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

from qwenlocal.chat.chat_template import MAX_CHARACTERS
from qwenlocal.chat.conversation import Conversation, GenerationConfig
from qwenlocal.chat.documents import ANSWER_SHARE, Document, cut_documents
from qwenlocal.chat.events import Done, Event, Summarizing, Text, TurnsEvicted
from qwenlocal.chat.thread import ASSISTANT, Thread
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import TextTooLong
from qwenlocal.formatting import shorten
from qwenlocal.i18n import tr
from qwenlocal.progress import PromptProgress
from qwenlocal.server.answering import AnswerService
from qwenlocal.server.engine_backend import EngineBackend
from qwenlocal.server.http_errors import BadField
from qwenlocal.server.page_chats import OpenChat, PageChats, describe_path, find_message

_MAX_ANSWERS = 64  # at the same time, each in a thread

PageEvent = Mapping[str, Any]


@dataclass(frozen=True)
class PageQuestion:
    """
    A question of the page.

    `kind` is "ask", "edit" (ask `text` in place of the question `message`), "retry" (the answer `message`, or the last
    one) or "continue" (the last answer, which was cut). `cut` selects the part to send of `documents` that do not fit:
    "head", "passages", or "" for all. `key` identifies the answer, to stop it.
    """

    key: str
    kind: str
    text: str
    chat: int | None
    message: int | None
    system: str
    documents: Sequence[Document]
    cut: str
    sampling: Mapping[str, Any]
    max_tokens: int | None
    overflow: str
    copies: bool

    @property
    def title(self) -> str:
        """A title that does not begin with the text of a file."""
        return shorten(self.text) or shorten(", ".join(document.name for document in self.documents))

    def config(self) -> GenerationConfig:
        """Return the settings for the answer; the model's recommendations replace missing ones."""
        unset = frozenset(field.name for field in fields(Sampling)) - set(self.sampling)
        sampling = Sampling().with_overrides(self.sampling)
        return GenerationConfig(sampling, self.max_tokens, overflow=self.overflow, unset=unset)


class PageAnswers:
    """The answers that are being generated for the page."""

    def __init__(self, service: AnswerService, chats: PageChats) -> None:
        self._service, self._chats = service, chats
        self._threads = ThreadPoolExecutor(_MAX_ANSWERS, thread_name_prefix="page")
        self._running: dict[str, EngineBackend] = {}

    def stop(self, key: str) -> bool:
        """Stop an answer; return False if there is none with this key."""
        backend = self._running.get(key)
        if backend:
            backend.stop()
        return backend is not None

    async def stream(self, question: PageQuestion, model: str, client: str) -> AsyncGenerator[PageEvent, None]:
        """
        Yield the events of an answer: "start", "progress", "summarizing", "evicted", "text", then one "done".

        Closing the iterator stops the answer; the text so far stays in the journal.
        """
        if question.key in self._running:
            raise BadField("key", tr("An answer with this key is already being generated."))
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[PageEvent | None] = asyncio.Queue()
        async with self._service.open(model) as engine:
            backend = EngineBackend(self._service, engine, client)
            self._running[question.key] = backend
            task = loop.run_in_executor(
                self._threads, self._answer, question, backend, lambda event: _put(loop, events, event)
            )
            task.add_done_callback(lambda _: events.put_nowait(None))
            try:
                while (event := await events.get()) is not None:
                    yield event
                task.result()
            finally:
                del self._running[question.key]
                backend.stop()
                await asyncio.wait({task})

    def _answer(self, question: PageQuestion, backend: EngineBackend, emit: Callable[[PageEvent], None]) -> None:
        with self._chats.open(question.chat, backend.model, copies=question.copies) as chat:
            is_new = question.chat is None
            if is_new:
                chat.thread.system = question.system
            try:
                events = _ask(chat.thread, question, backend)
                if is_new and question.documents and chat.writer.chat_id is not None:
                    self._chats.rename(chat.writer.chat_id, question.title)
                emit(_describe_start(chat, backend, is_continued=question.kind == "continue"))
                for event in events:
                    if isinstance(event, Done):
                        chat.writer.write()
                        emit(_describe_end(chat, event, backend))
                    else:
                        emit(describe_event(event))
            except BaseException:
                self._chats.remove_empty(chat)
                raise


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[PageEvent | None], event: PageEvent) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


def _ask(thread: Thread, question: PageQuestion, backend: EngineBackend) -> Iterator[Event]:
    """Start the answer to a question; if that fails, the thread is unchanged."""
    conversation, leaf = Conversation(backend, question.config(), thread), thread.leaf
    if question.kind == "ask":
        return conversation.ask(compose_message(question, thread, backend))
    if question.kind == "continue":
        return conversation.continue_answer()
    message = find_message(thread, question.message) if question.message else None
    if question.kind == "retry":
        if message:
            thread.set_leaf(message.number)
        try:
            return conversation.retry()
        except Exception:
            thread.set_leaf(leaf)
            raise
    turn = next((turn for turn in thread.turns if message and turn.question.number == message.number), None)
    if turn is None:
        raise BadField("message", tr("Only a question of this version of the chat can be edited."))
    return conversation.edit(turn, compose_message(question, thread, backend))


def compose_message(question: PageQuestion, thread: Thread, backend: EngineBackend) -> str:
    """
    Put the documents before the text, as the terminal does with `@file`; cut them if that was chosen.

    Raises
    ------
    TextTooLong: the documents are too long even to count their tokens.
    """

    def join(documents: Sequence[Document]) -> str:
        return "\n\n".join([*(one.to_markdown() for one in documents), *([question.text] if question.text else [])])

    documents = question.documents
    if documents and question.cut:
        room = int(backend.n_ctx * (1 - ANSWER_SHARE)) - backend.count_prompt_tokens(thread)
        documents = cut_documents(
            documents, join, question.text, room, backend.count_tokens, select=question.cut == "passages"
        )
    message = join(documents)
    if len(message) > MAX_CHARACTERS:
        raise TextTooLong(len(message), MAX_CHARACTERS)
    return message


# --- events


def describe_event(event: Event) -> PageEvent:
    """Return an event as JSON."""
    if isinstance(event, Text):
        return {"type": "text", "text": event.text, "tokens": event.tokens}
    if isinstance(event, PromptProgress):
        return {"type": "progress", "done": event.done, "total": event.total, "reused": event.reused}
    if isinstance(event, Summarizing):
        return {"type": "summarizing", "turns": event.turns, "words": event.words}
    if isinstance(event, TurnsEvicted):
        return {"type": "evicted", **vars(event)}
    raise TypeError(f"the server has no events of type {type(event).__name__}")


def _describe_start(chat: OpenChat, backend: EngineBackend, *, is_continued: bool) -> PageEvent:
    """Return the first event: the messages before the answer, and the text of an answer that is continued."""
    thread = chat.thread
    answer = thread.last if is_continued and thread.last and thread.last.role == ASSISTANT else None
    return {
        "type": "start",
        "chat": chat.writer.chat_id,
        "model": backend.model,
        "n_ctx": backend.n_ctx,
        "path": describe_path(thread)[: -1 if answer else None],
        "text": answer.text if answer else "",
        "summary": thread.summary,
    }


def _describe_end(chat: OpenChat, done: Done, backend: EngineBackend) -> PageEvent:
    """Return the last event; `error` says why the chat could not be saved, "" if it was."""
    return {
        "type": "done",
        "chat": chat.writer.chat_id,
        "n_ctx": backend.n_ctx,
        "path": describe_path(chat.thread),
        "summary": chat.thread.summary,
        "error": chat.writer.error,
        "stats": {**vars(done.stats), "speed": done.stats.answer_speed, "prompt_speed": done.stats.prompt_speed},
    }
