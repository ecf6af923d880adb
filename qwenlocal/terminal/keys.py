"""Keys of the terminal: bytes become key presses in the same way at the prompt and while nothing is being asked."""

from __future__ import annotations

import contextlib
import os
import re
import select
import termios
import time
from asyncio import get_running_loop
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TextIO

from prompt_toolkit.application import get_app
from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.vt100 import Vt100Input, raw_mode
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys

_PASTE_START, _PASTE_END = "\x1b[200~", "\x1b[201~"
# prompt_toolkit's own parser puts unknown sequences (replies of the terminal, keys of newer keyboard protocols) into
# the text, and fails on `ESC[31m`, which it takes for a mouse event.
_TOKEN = re.compile(
    "\x1b\\[200~(?P<paste>[^\x1b]*(?:\x1b(?!\\[201~)[^\x1b]*)*)\x1b\\[201~"
    "|(?P<incomplete>\x1b(?:\\[200~.*|\\[M.{0,2}|\\[\\[?|\\[[0-?]*[ -/]*|O|[\\]PX^_][^\x00-\x1f]*\x1b?)?\\Z)"
    "|\x1b(?:\\[M.{3}"  # mouse, X10
    "|\\[\\[."  # function keys of the Linux console
    "|\\[[0-?]*[ -/]*[@-~]"  # CSI, ECMA-48 section 5.4
    "|O."
    "|[\\]PX^_][^\x00-\x1f]*(?:\x07|\x1b\\\\)"  # OSC, DCS and other strings
    "|\r)"  # Alt-Enter
    "|.",  # a character; Escape alone stands for Alt before another key
    re.DOTALL,
)
_CPR_RESPONSE = re.compile(r"\x1b\[\d+;\d+R")
_SEQUENCES = {**ANSI_SEQUENCES, "\x1b\r": Keys.ControlJ}
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
        self._rest: list[str] = []  # the start of an escape sequence or of a bracketed paste
        self._tail, self._is_pasting = "", False  # the last characters, which may be the start of the paste's end mark

    def feed(self, text: str) -> list[KeyPress]:
        """Return the keys of a burst, replies about the cursor position first."""
        if self._is_pasting and self._was_flushed and self._clock() - self._fed_at > _PASTE_SECONDS:
            text = _PASTE_END + text  # its end was lost; without it, no key would ever work again
        self._fed_at, self._was_flushed = self._clock(), False
        self._rest.append(text)
        recent = self._tail + text
        self._tail = recent[1 - len(_PASTE_END) :]
        if self._is_pasting and _PASTE_END not in recent:  # so that a long paste takes linear time
            return []
        text, self._rest, self._is_pasting = "".join(self._rest), [], False
        keys = [KeyPress(Keys.CPRResponse, response) for response in _CPR_RESPONSE.findall(text)]
        text = _CPR_RESPONSE.sub("", text)
        if _PASTE_START not in text and _is_paste(text):
            return [*keys, *_paste_keys(text)]
        for token in _TOKEN.finditer(text):
            if token["paste"] is not None:
                keys.append(KeyPress(Keys.BracketedPaste, token["paste"]))
            elif token["incomplete"]:
                self._rest, self._is_pasting = [token[0]], token[0].startswith(_PASTE_START)
            else:
                keys += _find_keys(token[0])
        return keys

    def flush(self) -> list[KeyPress]:
        """Return the keys of a sequence that did not go on: Escape, or the keys that were typed one by one."""
        self._was_flushed = True
        if self._is_pasting:
            return []
        text, self._rest = "".join(self._rest), []
        return [key for character in text for key in _find_keys(character)]


def _find_keys(sequence: str) -> list[KeyPress]:
    """Return the key of a character, or those of an escape sequence; none if it is unknown."""
    known = _SEQUENCES.get(sequence, sequence if len(sequence) == 1 else ())
    keys = known if isinstance(known, tuple) else (known,)
    return [KeyPress(key, "" if index else sequence) for index, key in enumerate(keys)]


def _is_paste(burst: str) -> bool:
    lines = [line for line in _ENTER.split(burst) if line.strip()]
    return len(lines) >= _MIN_PASTED_LINES or max(map(len, lines), default=0) >= _MIN_PASTED_CHARACTERS


def _paste_keys(burst: str) -> list[KeyPress]:
    """Return the burst as a paste; an Enter after a single line sends it."""
    line, enter, rest = burst.partition("\r")
    if rest.strip():
        return [KeyPress(Keys.BracketedPaste, burst)]
    return [KeyPress(Keys.BracketedPaste, line), *(_find_keys(enter) if enter else ())]


class _TerminalReader(PosixStdinReader):
    """Decodes input; bytes that are not text become U+FFFD, since neither files nor models accept lone surrogates."""

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

    def __init__(self, stdin: TextIO, early_bytes: bytes) -> None:
        """`early_bytes` were typed in line mode, in which Enter becomes a line feed and Ctrl-D a zero."""
        super().__init__(stdin)
        self.stdin_reader = _TerminalReader(self._fileno, stdin.encoding)
        self._parser = KeyParser()
        self._on_ready: Callable[[], None] | None = None  # while a prompt reads keys
        early = early_bytes.decode(stdin.encoding, "replace").replace("\n", "\r").replace("\0", "\x04")
        self.waiting = self._parser.feed(early)

    # --- between prompts

    def has_input(self, seconds: float) -> bool:
        """Wait for input, at most so long."""
        return not self.closed and bool(select.select([self._fileno], [], [], seconds)[0])

    def collect(self, *, flush: bool = False) -> list[KeyPress]:
        """Read the available input; return its keys, which then wait. `flush` ends a sequence that did not go on."""
        keys = [key for key in self._parser.feed(self._read_burst()) if key.key is not Keys.CPRResponse]
        if flush and (flushed := self._parser.flush()):
            keys += [*flushed, KeyPress(Keys.Ignore, "")]  # so that Escape and a later key are two keys
        self.waiting += keys
        return keys

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
        with super().attach(input_ready_callback), self._pass_keys_to(input_ready_callback):
            yield

    def hold_keys(self) -> AbstractContextManager[None]:
        """Let keys wait during a prompt."""
        return self._pass_keys_to(None)

    @contextlib.contextmanager
    def _pass_keys_to(self, on_ready: Callable[[], None] | None) -> Iterator[None]:
        previous, self._on_ready = self._on_ready, on_ready
        self._pass_on_later()
        try:
            yield
        finally:
            self._on_ready = previous
            self._pass_on_later()

    def cooked_mode(self) -> AbstractContextManager[None]:
        return _QuietMode(self._fileno)

    def read_keys(self) -> list[KeyPress]:
        keys = self._parser.feed(self._read_burst())
        self.waiting += (key for key in keys if key.key is not Keys.CPRResponse)
        return [*(key for key in keys if key.key is Keys.CPRResponse), *self._next_keys()]

    def flush_keys(self) -> list[KeyPress]:
        self.waiting += self._parser.flush()
        return self._next_keys()

    def _next_keys(self) -> list[KeyPress]:
        """Remove and return the first characters that wait, or the first key without a text of its own."""
        if self._on_ready is None or get_app().is_done:
            return []
        special = (index for index, key in enumerate(self.waiting) if isinstance(key.key, Keys))
        count = next(special, len(self.waiting)) or 1
        keys, self.waiting = self.waiting[:count], self.waiting[count:]
        self._pass_on_later()
        return keys

    def _pass_on_later(self) -> None:
        if self.waiting and self._on_ready:
            get_running_loop().call_later(_PAUSE, self._pass_on)

    def _pass_on(self) -> None:
        if self._on_ready:
            self._on_ready()
