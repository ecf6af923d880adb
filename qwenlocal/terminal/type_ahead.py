"""Type-ahead: keys pressed while the model answers. They wait for the next prompt, and are shown below the answer."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys

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

    After the keys `a b ⌫ c ⏎ d`, `submitted` is ["ac"] and `text` is "d". `fold` shortens long pastes.
    """

    def __init__(self, keys: Iterable[KeyPress], fold: Callable[[str], str]) -> None:
        self.submitted: list[str] = []
        self._ends = [0]  # number of keys up to the end of each line that was sent
        self._fold, self._buffer, self._count, self._is_after_escape = fold, Buffer(), 0, False
        self.feed(keys)

    @property
    def text(self) -> str:
        return self._buffer.text

    @property
    def keys_submitted(self) -> int:
        """The number of keys up to the last line that was sent."""
        return self._ends[-1]

    def remove(self, line: str, keys: Sequence[KeyPress]) -> list[KeyPress]:
        """Return `keys`, which made these lines, without those of `line`."""
        index = self.submitted.index(line)
        return [*keys[: self._ends[index]], *keys[self._ends[index + 1] :]]

    def feed(self, keys: Iterable[KeyPress]) -> None:
        """Press keys."""
        for key in keys:
            self._count += 1
            was_escape, self._is_after_escape = self._is_after_escape, key.key is Keys.Escape
            if was_escape and key.key is not Keys.ControlM:
                continue
            if key.key is Keys.ControlM and not was_escape:
                self._press_enter()
            elif key.key is Keys.BracketedPaste:
                self._buffer.insert_text(self._fold(clean_paste(key.data)))
            elif isinstance(key.key, Keys):
                if key.key in _EDITS:
                    _EDITS[key.key](self._buffer)
            else:
                self._buffer.insert_text(key.data)

    def _press_enter(self) -> None:
        if press_enter(self._buffer):
            if self._buffer.text.strip():
                self.submitted.append(self._buffer.text)
                self._ends.append(self._count)
            else:
                self._ends[-1] = self._count
            self._buffer.reset()


def clean_paste(text: str) -> str:
    """Return the text of a paste with plain line breaks, and control characters made visible."""
    return escape_controls(text.replace("\r\n", "\n").replace("\r", "\n"))


def _move(buffer: Buffer, distance: int) -> None:
    buffer.cursor_position += distance


def _delete_word(buffer: Buffer) -> None:
    start = buffer.document.find_start_of_previous_word(WORD=True)
    buffer.delete_before_cursor(-start if start else buffer.cursor_position)


def _delete_to_line_start(buffer: Buffer) -> None:
    start = buffer.document.get_start_of_line_position()
    buffer.delete_before_cursor(-start or 1)  # at the start of a line, its line break


def _delete_to_line_end(buffer: Buffer) -> None:
    buffer.delete(buffer.document.get_end_of_line_position() or 1)


_EDITS: Mapping[Keys, Callable[[Buffer], object]] = {
    Keys.ControlM: lambda buffer: buffer.insert_text("\n"),  # after Escape
    Keys.ControlJ: lambda buffer: buffer.insert_text("\n"),
    Keys.ControlH: lambda buffer: buffer.delete_before_cursor(),
    Keys.ControlD: lambda buffer: buffer.delete(),
    Keys.Delete: lambda buffer: buffer.delete(),
    Keys.ControlB: lambda buffer: buffer.cursor_left(),
    Keys.Left: lambda buffer: buffer.cursor_left(),
    Keys.ControlF: lambda buffer: buffer.cursor_right(),
    Keys.Right: lambda buffer: buffer.cursor_right(),
    Keys.ControlA: lambda buffer: _move(buffer, buffer.document.get_start_of_line_position()),
    Keys.Home: lambda buffer: _move(buffer, buffer.document.get_start_of_line_position()),
    Keys.ControlE: lambda buffer: _move(buffer, buffer.document.get_end_of_line_position()),
    Keys.End: lambda buffer: _move(buffer, buffer.document.get_end_of_line_position()),
    Keys.ControlW: _delete_word,
    Keys.ControlU: _delete_to_line_start,
    Keys.ControlK: _delete_to_line_end,
}


# --- reading


@contextlib.contextmanager
def capture_keys(terminal: TerminalInput, on_keys: Callable[[list[KeyPress]], object]) -> Iterator[None]:
    """Collect the keys of `terminal` in another thread, and call `on_keys` there with the new ones."""
    stop = threading.Event()
    reader = threading.Thread(target=_collect_keys, args=(terminal, on_keys, stop), daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def _collect_keys(terminal: TerminalInput, on_keys: Callable[[list[KeyPress]], object], stop: threading.Event) -> None:
    quiet = 0.0
    while not stop.is_set() and not terminal.closed:
        if terminal.has_input(_POLL_SECONDS):
            keys, quiet = terminal.collect(), 0.0
        else:
            quiet += _POLL_SECONDS
            keys = terminal.collect_flushed() if quiet >= _FLUSH_SECONDS else []
        if keys:
            on_keys(keys)
