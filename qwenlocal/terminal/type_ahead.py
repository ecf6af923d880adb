"""Type-ahead: keys pressed while the model answers. They wait for the next prompt, and are shown below the answer."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.clipboard import InMemoryClipboard
from prompt_toolkit.key_binding.bindings.named_commands import get_by_name
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import DummyOutput

from qwenlocal.terminal.ansi import escape_controls

if TYPE_CHECKING:
    from qwenlocal.terminal.keys import TerminalInput

_POLL_SECONDS = 0.05  # longest delay until the reader notices the end of an answer
_FLUSH_SECONDS = 0.5  # as in prompt_toolkit: a sequence that does not go on ends after this time
_BLOCK = '"""'
_BLOCK_END = re.compile(r'"""[ \t]*$', re.MULTILINE)


# --- what Enter does


def press_enter(buffer: Buffer) -> bool:
    """Insert a line break after a backslash and in an open block; otherwise return True: the message is complete."""
    if buffer.document.text_before_cursor.endswith("\\"):
        buffer.delete_before_cursor()
    elif not is_open_block(buffer.text):
        return True
    buffer.insert_text("\n")
    return False


def is_open_block(text: str) -> bool:
    '''Tell whether `text` begins with `"""` and no line ends with another one.'''
    return text.startswith(_BLOCK) and _BLOCK_END.search(text, len(_BLOCK)) is None


def unquote_block(text: str) -> str | None:
    '''Return the text between `"""` at the start and the end of a message; None if that is not all there is.'''
    end = _BLOCK_END.search(text, len(_BLOCK)) if text.startswith(_BLOCK) else None
    if end is None or text[end.end() :].strip():
        return None
    return text[len(_BLOCK) : end.start()].removeprefix("\n").removesuffix("\n")


# --- the line that the keys make


class LinePreview:
    """
    The lines that keys will send, and the text of the one after them, without completion and history.

    After the keys `a b ⌫ c ⏎ d`, `queue` has the line "ac" with its keys, `text` is "d". `fold` shortens long pastes.
    """

    def __init__(self, keys: Iterable[KeyPress], fold: Callable[[str], str]) -> None:
        self.queue: list[tuple[str, list[KeyPress]]] = []
        self.rest: list[KeyPress] = []  # the keys of `text`
        self._fold, self._buffer, self._is_after_escape = fold, Buffer(), False
        self._app = SimpleNamespace(clipboard=InMemoryClipboard(), output=DummyOutput())
        self.feed(keys)

    @property
    def text(self) -> str:
        return self._buffer.text

    @property
    def keys(self) -> list[KeyPress]:
        """All keys, without those of lines that were removed from the queue."""
        return [*(key for _, keys in self.queue for key in keys), *self.rest]

    def feed(self, keys: Iterable[KeyPress]) -> None:
        """Press keys."""
        for key in keys:
            self.rest.append(key)
            was_escape, self._is_after_escape = self._is_after_escape, key.key is Keys.Escape
            if key.key is Keys.ControlM:
                self._press_enter()
            elif key.key is Keys.ControlJ:
                self._buffer.insert_text("\n")
            elif key.key is Keys.BracketedPaste:
                self._buffer.insert_text(self._fold(clean_paste(key.data)))
            elif command := (_ALT_EDITS if was_escape else _EDITS).get(key.key):
                event: Any = SimpleNamespace(current_buffer=self._buffer, arg=1, is_repeat=False, app=self._app)
                get_by_name(command).handler(event)
            elif not was_escape and not isinstance(key.key, Keys):
                self._buffer.insert_text(key.data)

    def _press_enter(self) -> None:
        if press_enter(self._buffer):
            if self.text.strip():
                self.queue.append((self.text, self.rest))
            self.rest = []
            self._buffer.reset()


def clean_paste(text: str) -> str:
    """Return the text of a paste with plain line breaks, and control characters made visible."""
    return escape_controls(text.replace("\r\n", "\n").replace("\r", "\n"))


_EDITS: Mapping[str, str] = {  # prompt_toolkit's names of readline's commands
    Keys.ControlH: "backward-delete-char",
    Keys.Delete: "delete-char",
    Keys.ControlD: "delete-char",
    Keys.Left: "backward-char",
    Keys.ControlB: "backward-char",
    Keys.Right: "forward-char",
    Keys.ControlF: "forward-char",
    Keys.ControlLeft: "backward-word",
    Keys.ControlRight: "forward-word",
    Keys.Home: "beginning-of-line",
    Keys.ControlA: "beginning-of-line",
    Keys.End: "end-of-line",
    Keys.ControlE: "end-of-line",
    Keys.ControlW: "unix-word-rubout",
    Keys.ControlU: "unix-line-discard",
    Keys.ControlK: "kill-line",
    Keys.ControlT: "transpose-chars",
    Keys.ControlY: "yank",
}
_ALT_EDITS: Mapping[str, str] = {
    "b": "backward-word",
    "f": "forward-word",
    "d": "kill-word",
    Keys.ControlH: "backward-kill-word",
}


# --- reading


def collect_keys(terminal: TerminalInput, on_keys: Callable[[list[KeyPress]], object], stop: threading.Event) -> None:
    """Collect the keys of `terminal` until `stop` is set, and call `on_keys` with the new ones."""
    last_input = time.monotonic()
    while not stop.is_set() and not terminal.closed:
        if terminal.has_input(_POLL_SECONDS):
            last_input = time.monotonic()
        if keys := terminal.collect(flush=time.monotonic() - last_input > _FLUSH_SECONDS):
            on_keys(keys)
