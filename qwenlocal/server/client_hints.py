"""Hints for clients of the server, which can change their requests but cannot run commands on the server."""

from __future__ import annotations

from qwenlocal.chat.chat_template import MessagesRejected
from qwenlocal.errors import ChatNotFound, ContextFull, LowMemory, QwenlocalError, ServerBusy, TextTooLong
from qwenlocal.hints import find_hint
from qwenlocal.i18n import tr


def find_client_hint(error: QwenlocalError) -> str:
    """Return the hint of an error; it begins with "On the server" if only the server's owner can follow it."""
    if isinstance(error, ContextFull):
        return _shorten_prompt(error)
    if isinstance(error, TextTooLong):
        return tr("Send a shorter text.")
    if isinstance(error, MessagesRejected):
        return tr("Change the roles or the order of “messages”, or use /v1/completions.")
    if isinstance(error, LowMemory):
        return tr("On the server: close other programs, or use a shorter context (-c).")
    if isinstance(error, ChatNotFound):
        return ""
    hint = find_hint(error)
    is_for_server = error.http_status >= 500 and not isinstance(error, ServerBusy)
    return tr("On the server: {hint}", hint=hint) if hint and is_for_server else hint


def _shorten_prompt(error: ContextFull) -> str:
    if error.needed <= error.n_ctx_train:
        return tr("Shorten the prompt. For a longer context, on the server: -c {needed}", needed=error.needed)
    return error.hint
