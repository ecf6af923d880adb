"""The chats of the journal for the page. Everything here reads or writes a file: call it in a thread."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwenlocal.chat.context_window import evictable_turns, is_in_context
from qwenlocal.chat.events import FinishReason
from qwenlocal.chat.export import export_thread
from qwenlocal.chat.journal import ChatInfo, Journal
from qwenlocal.chat.journal_writer import JournalWriter
from qwenlocal.chat.thread import USER, Message, Thread
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.paths import Folders, ensure_writable
from qwenlocal.server.http_errors import HttpError

FREE, ANSWERING, ELSEWHERE = "free", "answering", "elsewhere"  # who has a chat open


@dataclass
class OpenChat:
    """A chat that may be changed: its thread, and the writer that saves what changes."""

    thread: Thread
    writer: JournalWriter


class PageChats:
    """
    The journal in `folders`, opened when it is first used.

    A chat is open only while it changes. The locks of `Journal` keep it from other processes, such as a terminal; here,
    a chat that is open already belongs to another tab, or to another reader of the page.
    """

    def __init__(self, folders: Folders) -> None:
        self._folders, self._lock = folders, threading.Lock()

    @functools.cached_property
    def journal(self) -> Journal:
        """
        The journal.

        Raises
        ------
        JournalError: it cannot be used. NotWritable: its folder cannot be created.
        """
        ensure_writable(self._folders.journal.parent)
        return Journal(self._folders.journal)

    def close(self) -> None:
        """Close the journal, if it was used."""
        if "journal" in vars(self):
            self.journal.close()

    # --- reading

    def list_chats(self) -> list[dict[str, Any]]:
        """Return all chats, the most recently changed one first."""
        with self._lock:
            return [vars(chat) for chat in self.journal.list_chats()]

    def search(self, words: str) -> list[dict[str, Any]]:
        """Return the messages that contain all words."""
        with self._lock:
            return [vars(hit) for hit in self.journal.search(words)]

    def read(self, chat_id: int) -> dict[str, Any]:
        """
        Return a chat as the page shows it.

        Raises
        ------
        ChatNotFound: there is no such chat.
        """
        with self._lock:
            info, state = self.journal.get_chat(chat_id), self._state(chat_id)
            return describe_chat(self.journal.load_thread(chat_id), info, state)

    def load_thread(self, chat_id: int) -> Thread:
        """Return the messages of a chat, to count them."""
        with self._lock:
            return self.journal.load_thread(chat_id)

    def export(self, chat_id: int, format: str) -> str:
        """Return a chat in one of `chat.export.FORMATS`."""
        with self._lock:
            info = self.journal.get_chat(chat_id)
            return export_thread(self.journal.load_thread(chat_id), info.title, info.model, format)

    def _state(self, chat_id: int) -> str:
        """Return who has a chat open. Only an attempt to lock it shows that."""
        if self.journal.chat_locks.is_held(chat_id):
            return ANSWERING
        if not self.journal.acquire(chat_id):
            return ELSEWHERE
        self.journal.release(chat_id)
        return FREE

    # --- writing

    def rename(self, chat_id: int, title: str) -> None:
        """Set the title of a chat."""
        if not title.strip():
            raise UsageError(tr("The title is empty."))
        with self._lock:
            self.journal.rename_chat(chat_id, title.strip())

    def delete(self, chat_id: int) -> None:
        """
        Delete a chat, and all prompt caches on disk, which contain its text.

        Raises
        ------
        HttpError: it is open. ChatNotFound: there is no such chat.
        """
        from qwenlocal.engine.prompt_cache import delete_prompt_caches

        with self._lock:
            self._acquire(chat_id)
            try:
                self.journal.delete_chat(chat_id)
            finally:
                self.journal.release(chat_id)
        delete_prompt_caches(self._folders.states)

    def select_version(self, chat_id: int, number: int) -> None:
        """Switch the path of a chat to a version of a message and the messages that follow it."""
        with self.open(chat_id) as chat:
            chat.thread.select_version(find_message(chat.thread, number))

    def set_system_prompt(self, chat_id: int, text: str) -> None:
        """Replace the system prompt of a chat."""
        with self.open(chat_id) as chat:
            chat.thread.set_system_prompt(text)

    @contextlib.contextmanager
    def open(self, chat_id: int | None, model: str = "", *, copies: bool = False) -> Iterator[OpenChat]:
        """
        Open a chat to change it, or a new one (None), for an answer of `model`.

        If `copies` and it is open in another process, the first change makes a copy, unless it was closed there.

        Raises
        ------
        HttpError: it is open. ChatNotFound: there is no such chat.
        """
        with self._lock:
            thread, known_model = Thread(), model
            if chat_id is not None:
                self._acquire(chat_id, copies=copies)
                try:
                    known_model = model or self.journal.get_chat(chat_id).model
                    thread = self.journal.load_thread(chat_id)
                except BaseException:
                    self.journal.release(chat_id)
                    raise
            writer = JournalWriter(self.journal, thread, known_model, chat_id)
        try:
            yield OpenChat(thread, writer)
        finally:
            writer.close()

    def _acquire(self, chat_id: int, *, copies: bool = False) -> None:
        state = self._state(chat_id)
        if state == ANSWERING:
            raise HttpError(
                409,
                tr("Chat {id} is being answered.", id=chat_id),
                code="chat_answering",
                hint=tr("Stop the answer first, or wait until it is complete."),
            )
        if state == ELSEWHERE and not copies:
            raise HttpError(
                409,
                tr("Chat {id} is open in another window.", id=chat_id),
                code="chat_open_elsewhere",
                hint=tr("Close it there, or continue in a copy."),
            )
        self.journal.acquire(chat_id)

    def remove_empty(self, chat: OpenChat) -> None:
        """Delete a new chat whose first question could not be answered."""
        if chat.writer.chat_id is not None and not chat.thread.messages:
            chat_id = chat.writer.chat_id
            chat.writer.close()
            self.journal.delete_chat(chat_id)


def find_message(thread: Thread, number: int) -> Message:
    """
    Return a message by its number.

    Raises
    ------
    HttpError: there is none.
    """
    if message := thread.messages.get(number):
        return message
    raise HttpError(404, tr("There is no message {number}.", number=number), code="message_not_found", param="message")


def describe_chat(thread: Thread, info: ChatInfo, state: str) -> dict[str, Any]:
    """Return a chat and its path. In the journal, an answer that is growing looks like one that was interrupted."""
    path = describe_path(thread)
    if state != FREE and path and path[-1]["finish_reason"] == "interrupted":
        path[-1] |= {"finish_reason": "", "can_continue": False}
    return {**vars(info), "system": thread.system, "summary": thread.summary, "state": state, "path": path}


def describe_path(thread: Thread) -> list[dict[str, Any]]:
    """Return the messages of the path, each with its versions, and whether the model can see and continue it."""
    outside = {message.number for turn in thread.turns if not is_in_context(thread, turn) for message in turn.messages}
    return [
        {
            **describe_message(thread, message),
            "is_in_context": message.number not in outside,
            "can_continue": message is thread.last and can_continue(thread, message),
        }
        for message in thread.path
    ]


def can_continue(thread: Thread, answer: Message) -> bool:
    """Return True if an answer was cut off and, if it filled the context, there are turns to remove from it."""
    if answer.role == USER or answer.finish_reason in (FinishReason.EOS.value, FinishReason.STOP_STRING.value):
        return False
    return answer.finish_reason != FinishReason.CONTEXT_FULL.value or bool(evictable_turns(thread))


def describe_message(thread: Thread, message: Message) -> dict[str, Any]:
    """Return a message without its tokens; `finish_reason` is the name of a `FinishReason` in lower case."""
    reason = FinishReason(message.finish_reason).name.lower() if message.finish_reason else ""
    return {
        "number": message.number,
        "role": message.role,
        "text": message.text,
        "model": message.model,
        "created": message.created,
        "finish_reason": reason if message.role != USER else "",
        "versions": [version.number for version in thread.versions(message)],
    }
