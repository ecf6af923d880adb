"""Hints of errors in responses: clients can change their requests, but cannot run commands on the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenlocal.chat.chat_template import MessagesRejected
from qwenlocal.errors import (
    BadWeights,
    ChatNotFound,
    ContextFull,
    ContextNotCreated,
    DiskFull,
    EngineCrashed,
    JournalError,
    LowMemory,
    NotEnoughMemory,
    NotWritable,
    QwenlocalError,
    ServerBusy,
    TextTooLong,
)
from qwenlocal.server.client_hints import find_client_hint

FOR_THE_SERVER = [
    BadWeights("model.gguf", "it is damaged", hint="Check it: qwenlocal inspect"),
    ContextNotCreated(4096, "no reason given"),
    DiskFull(Path("folder"), 2, 1),
    EngineCrashed("device lost", uses_gpu=True),
    EngineCrashed.from_exit_code(-9),
    JournalError(Path("chats.db"), "it is locked"),
    LowMemory(1 << 20),
    NotEnoughMemory("large", 2 << 30, 1 << 30, hint="Use a smaller file (qwenlocal plan NAME)."),
    NotWritable(Path("folder"), "it is read-only"),
]
FOR_THE_CLIENT = [
    ChatNotFound(7),
    ContextFull(40_000, 4096, 32_768),
    MessagesRejected("chat template", "it rejects the conversation", hint="qwenlocal run MODEL --raw"),
    TextTooLong(2_000_000, 1_000_000),
]


@pytest.mark.parametrize("error", FOR_THE_SERVER, ids=lambda error: type(error).__name__)
def test_hints_that_need_the_servers_owner_are_marked(error: QwenlocalError) -> None:
    assert find_client_hint(error).startswith("On the server: ")


@pytest.mark.parametrize("error", FOR_THE_CLIENT, ids=lambda error: type(error).__name__)
def test_hints_for_clients_contain_no_commands(error: QwenlocalError) -> None:
    hint = find_client_hint(error)
    assert "qwenlocal" not in hint and " -" not in hint and "server" not in hint


def test_both_can_help_if_a_longer_context_is_possible() -> None:
    hint = find_client_hint(ContextFull(5000, 4096, 32_768))
    assert hint == "Shorten the prompt. For a longer context, on the server: -c 6144"
    assert "Try again in 5 s. On the server: " in find_client_hint(ServerBusy(3, 5))
