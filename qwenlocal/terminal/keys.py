"""Keys of the terminal: bytes become key presses in the same way at the prompt and while nothing is being asked."""

from __future__ import annotations

import contextlib
import os
import re
import select
import termios
import time
from asyncio import get_running_loop
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TextIO

from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.typeahead import get_typeahead
from prompt_toolkit.input.vt100 import Vt100Input, raw_mode
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys

_PASTE_START, _PASTE_END = "\x1b[200~", "\x1b[201~"
# Any sequence, known or not. prompt_toolkit's own parser puts unknown ones (replies of the terminal, keys of newer
# keyboard protocols) into the text, and fails on `ESC[31m`, which it takes for a mouse event.
_ESCAPE_SEQUENCE = re.compile(
    "\x1b(?:\\[M.{3}"  # mouse, X10
    "|\\[\\[."  # function keys of the Linux console
    "|\\[[0-?]*[ -/]*[@-~]"  # CSI, ECMA-48 section 5.4
    "|O."
    "|[\\]PX^_][^\x00-\x1f]*(?:\x07|\x1b\\\\)"  # OSC, DCS and other strings
    "|[^\\[O\\]PX^_])",  # Alt and a key
    re.DOTALL,
)
_INCOMPLETE_SEQUENCE = re.compile(
    "\x1b(?:\\[M.{0,2}|\\[\\[?|\\[[0-?]*[ -/]*|O|[\\]PX^_][^\x00-\x1f]*\x1b?)?\\Z", re.DOTALL
)
_CPR_RESPONSE = re.compile(r"\x1b\[\d+;\d+R")
_PLAIN_TEXT = re.compile("[^\x00-\x1f\x7f\x9b]+")
_ENTER = re.compile("(?<!\x1b)\r\n?")

_QUIET_SECONDS = 0.03  # a burst of bytes ends with such a pause
_MAX_BURST = 1 << 26  # characters
_CHUNK = 1 << 16
_PASTE_SECONDS = 3.0  # a paste does not pause for longer
_MIN_PASTED_LINES = 5  # in one burst; nobody types as fast
_MIN_PASTED_CHARACTERS = 1000
_PAUSE = 0.001  # seconds between two keys, in which prompt_toolkit completes a word or loads the history


class KeyParser:
    """
    Turns text from a terminal into key presses; escape sequences without a meaning are left out.

    A sequence may be cut anywhere. A burst of several lines is a paste, also in terminals without bracketed paste.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._fed_at, self._was_flushed = clock, clock(), False
        self._incomplete = ""  # the start of an escape sequence
        self._paste: list[str] | None = None  # the text so far of a bracketed paste
        self._tail = ""  # the last characters of that text: they may be the start of its end mark

    def feed(self, text: str) -> list[KeyPress]:
        """Return the keys of a burst."""
        keys: list[KeyPress] = []
        if self._paste is not None and self._was_flushed and self._clock() - self._fed_at > _PASTE_SECONDS:
            self._feed_paste(_PASTE_END, keys)  # its end was lost; without it, no key would ever work again
        self._fed_at, self._was_flushed = self._clock(), False
        if self._paste is None and not self._incomplete and _PASTE_START not in text:
            keys.extend(KeyPress(Keys.CPRResponse, response) for response in _CPR_RESPONSE.findall(text))
            text = _CPR_RESPONSE.sub("", text)
            if _is_paste(text):
                return [*keys, *_paste_keys(text)]
        while text:
            text = self._feed_paste(text, keys) if self._paste is not None else self._feed_keys(text, keys)
        return keys

    def flush(self) -> list[KeyPress]:
        """Return the keys of a sequence that did not go on: Escape, or the keys that were typed one by one."""
        text, self._incomplete, self._was_flushed = self._incomplete, "", True
        return [_find_key(character) for character in text]

    def _feed_paste(self, text: str, keys: list[KeyPress]) -> str:
        """Add `text` to the paste, in linear time; return what follows the paste."""
        assert self._paste is not None
        recent = self._tail + text
        end = recent.find(_PASTE_END)
        if end < 0:
            self._paste.append(text)
            self._tail = recent[1 - len(_PASTE_END) :]
            return ""
        pasted = "".join([*self._paste, text])
        end += len(pasted) - len(recent)
        keys.append(KeyPress(Keys.BracketedPaste, pasted[:end]))
        self._paste, self._tail = None, ""
        return pasted[end + len(_PASTE_END) :]

    def _feed_keys(self, text: str, keys: list[KeyPress]) -> str:
        """Add the keys up to the next paste; return what follows its start."""
        text, self._incomplete = self._incomplete + text, ""
        position = 0
        while position < len(text):
            if plain := _PLAIN_TEXT.match(text, position):
                keys.extend(KeyPress(character, character) for character in plain[0])
                position = plain.end()
            elif text[position] != "\x1b":
                keys.append(_find_key(text[position]))
                position += 1
            elif text.startswith(_PASTE_START, position):
                self._paste = []
                return text[position + len(_PASTE_START) :]
            elif _INCOMPLETE_SEQUENCE.match(text, position):
                self._incomplete = text[position:]
                return ""
            else:
                position = _add_sequence(text, position, keys)
        return ""


def _add_sequence(text: str, position: int, keys: list[KeyPress]) -> int:
    """Add the keys of the escape sequence at `position`, if it is known; return its end."""
    match = _ESCAPE_SEQUENCE.match(text, position)
    if match is None or len(match[0]) == 2:  # Alt, or Escape, and another key
        keys.append(KeyPress(Keys.Escape, "\x1b"))
        return position + 1
    sequence = match[0]
    if _CPR_RESPONSE.fullmatch(sequence):
        keys.append(KeyPress(Keys.CPRResponse, sequence))
    elif known := ANSI_SEQUENCES.get(sequence):
        several = known if isinstance(known, tuple) else (known,)
        keys.extend(KeyPress(key, "" if index else sequence) for index, key in enumerate(several))
    return match.end()


def _find_key(character: str) -> KeyPress:
    key = ANSI_SEQUENCES.get(character, character)
    assert not isinstance(key, tuple)
    return KeyPress(key, character)


def _is_paste(burst: str) -> bool:
    lines = [line for line in _ENTER.split(burst) if line.strip()]
    return len(lines) >= _MIN_PASTED_LINES or max(map(len, lines), default=0) >= _MIN_PASTED_CHARACTERS


def _paste_keys(burst: str) -> list[KeyPress]:
    """Return the burst as a paste; an Enter after a single line sends it."""
    line, enter, rest = burst.partition("\r")
    if rest.strip():
        return [KeyPress(Keys.BracketedPaste, burst)]
    return [KeyPress(Keys.BracketedPaste, line), *map(_find_key, enter)]


class _TerminalReader(PosixStdinReader):
    """Decodes input; bytes that are no text become U+FFFD, since neither files nor models accept lone surrogates."""

    def __init__(self, descriptor: int, encoding: str) -> None:
        super().__init__(descriptor, errors="replace", encoding=encoding)

    def read(self, count: int = _CHUNK) -> str:
        try:
            data = os.read(self.stdin_fd, count)
        except OSError:  # the terminal is gone
            data = b""
        self.closed = not data
        return self._stdin_decoder.decode(data)


class _QuietMode(raw_mode):
    """The mode of `tty.disable_echo`, in which keys wait unchanged while notes are printed above the prompt."""

    @classmethod
    def _patch_lflag(cls, attrs: int) -> int:
        return super()._patch_lflag(attrs) | termios.ISIG


class TerminalInput(Vt100Input):
    """
    The keys of a terminal, for prompt_toolkit; those that are pressed between two prompts wait for the next one.

    Keys without a text of their own are passed on one by one, so that many at once (typed ahead, sent by a program)
    have the same effect as one after the other: Tab completes before Enter sends, Up finds the history loaded.
    """

    def __init__(self, stdin: TextIO) -> None:
        super().__init__(stdin)
        self.stdin_reader = _TerminalReader(self._fileno, stdin.encoding)
        self._parser = KeyParser()
        self._waiting: deque[KeyPress] = deque()
        self._on_ready: Callable[[], None] = lambda: None

    # --- between prompts

    def has_input(self, seconds: float) -> bool:
        """Wait for input, at most so long."""
        return not self.closed and bool(select.select([self._fileno], [], [], seconds)[0])

    def collect(self) -> list[KeyPress]:
        """Read the available input; return its keys, which then wait for the next prompt."""
        keys = self._parser.feed(self._read_burst())
        keys = [key for key in keys if key.key is not Keys.CPRResponse]
        self._waiting.extend(keys)
        return keys

    def collect_flushed(self) -> list[KeyPress]:
        """Like `collect`, with the keys of a sequence that did not go on."""
        keys = self._parser.flush()
        if keys:
            keys.append(KeyPress(Keys.Ignore, ""))  # so that Escape and a later key are two keys
        self._waiting.extend(keys)
        return keys

    def take_waiting(self) -> list[KeyPress]:
        """Remove and return the keys that wait for the next prompt."""
        keys = [*get_typeahead(self), *self._waiting]
        self._waiting.clear()
        return keys

    def put_back(self, keys: list[KeyPress]) -> None:
        """Let `keys` wait before all others."""
        self._waiting.extendleft(reversed(keys))

    def add_early_bytes(self, data: bytes) -> None:
        """Let the keys wait that a terminal in line mode has received: Enter has become a line feed, Ctrl-D a zero."""
        text = data.decode(self.stdin.encoding, "replace").replace("\n", "\r").replace("\0", "\x04")
        self._waiting.extend(self._parser.feed(text))

    def _read_burst(self) -> str:
        """Read what is available; if Enter comes together with other keys, read on until there is a pause."""
        if not self.has_input(0):
            return ""
        text = self.stdin_reader.read()
        pieces, size = [text], len(text)
        is_burst = size > 1 and ("\r" in text or size >= _MIN_PASTED_CHARACTERS)
        while is_burst and size < _MAX_BURST and self.has_input(_QUIET_SECONDS):
            pieces.append(self.stdin_reader.read())
            size += len(pieces[-1])
        return "".join(pieces)

    # --- during a prompt, called by prompt_toolkit

    @contextlib.contextmanager
    def attach(self, input_ready_callback: Callable[[], None]) -> Iterator[None]:
        self._on_ready = input_ready_callback
        with super().attach(input_ready_callback):
            self._pass_on_later()
            yield

    def cooked_mode(self) -> AbstractContextManager[None]:
        return _QuietMode(self._fileno)

    def read_keys(self) -> list[KeyPress]:
        keys = self._parser.feed(self._read_burst())
        self._waiting.extend(key for key in keys if key.key is not Keys.CPRResponse)
        return [*(key for key in keys if key.key is Keys.CPRResponse), *self._next_keys()]

    def flush_keys(self) -> list[KeyPress]:
        self._waiting.extend(self._parser.flush())
        return self._next_keys()

    def _next_keys(self) -> list[KeyPress]:
        """Return the characters that wait, or a single key without a text."""
        keys: list[KeyPress] = []
        while self._waiting and not (keys and isinstance(self._waiting[0].key, Keys)):
            keys.append(self._waiting.popleft())
            if isinstance(keys[-1].key, Keys):
                break
        self._pass_on_later()
        return keys

    def _pass_on_later(self) -> None:
        if self._waiting:
            get_running_loop().call_later(_PAUSE, self._on_ready)
