"""Chats of the journal by number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlocal.errors import ChatNotFound

if TYPE_CHECKING:
    from qwenlocal.chat.journal import ChatInfo, Journal
    from qwenlocal.cli.context import AppContext

LAST = "last"


def open_existing_journal(app: AppContext) -> Journal | None:
    """
    Open the journal, if there is one.

    Raises
    ------
    JournalError: it is damaged, locked, or of a newer version.
    """
    from qwenlocal.chat.journal import Journal

    path = app.folders.journal
    return Journal(path) if path.exists() else None


def find_chat(app: AppContext, text: str) -> tuple[Journal, ChatInfo]:
    """
    Find the chat of a number, or the last one.

    Raises
    ------
    ChatNotFound: there is none. JournalError: the journal cannot be used.
    """
    journal = open_existing_journal(app)
    chats = journal.list_chats() if journal else []
    if journal is not None and chats:
        if text == LAST:
            return journal, chats[0]
        for chat in chats:
            if str(chat.id) == text.lstrip("#"):
                return journal, chat
    raise ChatNotFound("" if text == LAST else text)
