"""Type-ahead: keys pressed while the model answers, shown below the answer and kept for the next message."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

_PASTE_START, _PASTE_END = "\x1b[200~", "\x1b[201~"
# Any sequence, known or not: prompt_toolkit's Vt100Parser would put unknown ones (replies of the terminal, keys of
# newer keyboard protocols) into the text.
_ESCAPE_SEQUENCE = re.compile("\x1b(?:\\[[0-9;?<]*[@-~]|O.|[^\\[O])", re.DOTALL)  # arrows, function keys, Alt + key
_MAX_SEQUENCE = 16
_POLL_SECONDS = 0.05  # longest delay until the reader notices the end of an answer


class TypeAhead:
    """
    Applies keys to a line as the input line would: `submitted` lines, and the `text` of the one still being typed.

    After the keys `a b ⌫ c ⏎ d`, `submitted` is ["ac"] and `text` is "d". `eof` is set by Ctrl-D on an empty line.
    """

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.text = ""
        self.eof = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._incomplete = ""  # the start of an escape sequence or a paste

    def feed(self, data: bytes) -> None:
        """Process bytes from a terminal."""
        text = self._incomplete + self._decoder.decode(data)
        self._incomplete = ""
        while text:
            if text.startswith(_PASTE_START):
                end = text.find(_PASTE_END)
                if end < 0:
                    self._incomplete = text
                    return
                self.text += text[len(_PASTE_START) : end].replace("\r\n", "\n").replace("\r", "\n")
                text = text[end + len(_PASTE_END) :]
            elif text[0] == "\x1b":
                sequence = _ESCAPE_SEQUENCE.match(text)
                if sequence is None and len(text) < _MAX_SEQUENCE:
                    self._incomplete = text
                    return
                text = text[sequence.end() if sequence else 1 :]
            else:
                self._press(text[0])
                text = text[1:]

    def _press(self, key: str) -> None:
        if key == "\r":
            if self.text.strip():
                self.submitted.append(self.text)
            self.text = ""
        elif key == "\n":  # Ctrl-J
            self.text += "\n"
        elif key in "\x7f\x08":
            self.text = self.text[:-1]
        elif key == "\x15":  # Ctrl-U
            self.text = ""
        elif key == "\x04" and not self.text:
            self.eof = True
        elif key == "\x17":  # Ctrl-W
            self.text = self.text.rstrip().rpartition(" ")[0]
        elif key.isprintable() or key == "\t":
            self.text += key


@contextlib.contextmanager
def capture_keys(terminal: TextIO, type_ahead: TypeAhead, on_key: Callable[[], object]) -> Iterator[None]:
    """
    Feed the keys of `terminal` to `type_ahead` in another thread, and call `on_key` there after each.

    The terminal must be in the mode of `tty.disable_echo`.
    """
    if sys.platform == "win32" or not terminal.isatty():
        yield
        return
    stop = threading.Event()
    reader = threading.Thread(target=_read_keys, args=(terminal.fileno(), type_ahead, on_key, stop), daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def _read_keys(descriptor: int, type_ahead: TypeAhead, on_key: Callable[[], object], stop: threading.Event) -> None:
    while not stop.is_set():
        readable, _, _ = select.select([descriptor], [], [], _POLL_SECONDS)
        if readable:
            try:
                data = os.read(descriptor, 65536)
            except OSError:  # the terminal was closed
                return
            if not data:
                return
            type_ahead.feed(data)
            on_key()
