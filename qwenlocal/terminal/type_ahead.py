"""What is typed while an answer comes: shown below it, and kept for the next question."""

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

_KEYS = re.compile("\x1b(?:\\[[0-9;?<]*[@-~]|O.|[^\\[O])", re.DOTALL)  # arrows and the like, whole
_LONGEST_KEY = 16
_WAIT = 0.05  # seconds, after which the end of an answer is noticed


class TypedAhead:
    """
    Keys in the order in which they came, with their meaning: what is sent already, and what is still being typed.

    After the keys `a b ⌫ c ⏎ d`, `sent` is ["ac"] and `text` is "d". `leaves` after Ctrl-D on an empty line.
    """

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.text = ""
        self.leaves = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._half = ""  # an escape sequence or a paste whose end has not come

    def feed(self, data: bytes) -> None:
        """Bytes of a terminal."""
        text = self._half + self._decoder.decode(data)
        self._half = ""
        while text:
            if text.startswith("\x1b[200~"):
                end = text.find("\x1b[201~")
                if end < 0:
                    self._half = text
                    return
                self.text += text[6:end].replace("\r\n", "\n").replace("\r", "\n")
                text = text[end + 6 :]
            elif text[0] == "\x1b":
                key = _KEYS.match(text)
                if key is None and len(text) < _LONGEST_KEY:
                    self._half = text
                    return
                text = text[key.end() if key else 1 :]
            else:
                self._key(text[0])
                text = text[1:]

    def _key(self, key: str) -> None:
        if key == "\r":
            if self.text.strip():
                self.sent.append(self.text)
            self.text = ""
        elif key == "\n":  # Ctrl-J
            self.text += "\n"
        elif key in "\x7f\x08":
            self.text = self.text[:-1]
        elif key == "\x15":  # Ctrl-U
            self.text = ""
        elif key == "\x04" and not self.text:
            self.leaves = True
        elif key == "\x17":  # Ctrl-W
            self.text = self.text.rstrip().rpartition(" ")[0]
        elif key.isprintable() or key == "\t":
            self.text += key


@contextlib.contextmanager
def typing_ahead(terminal: TextIO, typed: TypedAhead, on_key: Callable[[], object]) -> Iterator[None]:
    """Keys of a `quiet` terminal go into `typed`, and `on_key` is called, in another thread."""
    if sys.platform == "win32" or not terminal.isatty():
        yield
        return
    stopped = threading.Event()
    reader = threading.Thread(target=_read, args=(terminal.fileno(), typed, on_key, stopped), daemon=True)
    reader.start()
    try:
        yield
    finally:
        stopped.set()
        reader.join()


def _read(file: int, typed: TypedAhead, on_key: Callable[[], object], stopped: threading.Event) -> None:
    while not stopped.is_set():
        ready, _, _ = select.select([file], [], [], _WAIT)
        if ready:
            try:
                data = os.read(file, 65536)
            except OSError:  # the terminal is gone
                return
            if not data:
                return
            typed.feed(data)
            on_key()
