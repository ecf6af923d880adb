"""Runs a program in a pseudo-terminal and reads back its screen."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="needs pseudo-terminals")
import pyte  # noqa: E402

COLUMNS, LINES = 80, 24


class Terminal:
    """A program in a pseudo-terminal of 80 columns and 24 lines."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self._screen = pyte.HistoryScreen(COLUMNS, LINES, history=1000)
        self._stream = pyte.ByteStream(self._screen)
        self._child = pexpect.spawn(
            command[0],
            command[1:],
            env={"TERM": "xterm-256color", **environment},
            cwd=str(folder),
            dimensions=(LINES, COLUMNS),
            timeout=30,
        )
        self._child.delaybeforesend = None
        self._raw = b""

    def type(self, text: str | bytes) -> None:
        self._child.send(text)

    def paste(self, text: str) -> None:
        """Send a bracketed paste, and read the output meanwhile so that the program never blocks."""
        data = f"\x1b[200~{text}\x1b[201~".encode()
        for start in range(0, len(data), 1 << 15):
            self._child.send(data[start : start + (1 << 15)])
            self.read(0.001)

    def enter(self, line: str, pattern: str) -> str:
        """Type a line and wait for the screen to show `pattern`."""
        self.type(f"{line}\r")
        return self.wait_for(pattern)

    def read(self, seconds: float = 0.05) -> None:
        """Read the output for a while, and answer prompt_toolkit's requests for the cursor position."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                data = self._child.read_nonblocking(1 << 16, timeout=left)
            except pexpect.TIMEOUT:
                return
            except pexpect.EOF:
                return
            self._raw += data
            self._stream.feed(data)
            if b"\x1b[6n" in data:
                self._child.send(f"\x1b[{self._screen.cursor.y + 1};{self._screen.cursor.x + 1}R")

    @property
    def text(self) -> str:
        """The screen with its scrollback."""
        top = [
            "".join(line[column].data for column in range(self._screen.columns)) for line in self._screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*top, *self._screen.display]).rstrip()

    @property
    def raw(self) -> bytes:
        return self._raw

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read until the screen shows `pattern`, and return the text."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text, re.M | re.S):
            assert time.monotonic() < end, f"{pattern!r} did not appear; the screen shows:\n{self.text}"
            self.read()
        return self.text

    def wait_for_prompt(self, count: int = 1) -> str:
        """Wait for the `count`-th input line, which is empty."""
        return self.wait_for(r"^>.*" * (count - 1) + r"^>$")

    @property
    def is_running(self) -> bool:
        return bool(self._child.isalive())

    def resize(self, columns: int, lines: int) -> None:
        """Resize the window."""
        self._screen.resize(lines, columns)
        self._child.setwinsize(lines, columns)

    def kill(self) -> None:
        """Kill the program with SIGKILL."""
        self._child.kill(9)
        self._child.wait()

    def terminate(self) -> None:
        """Ask the program to end with SIGTERM."""
        self._child.kill(15)

    def hang_up(self) -> None:
        """Close the window; the program may take a moment to end."""
        with contextlib.suppress(pexpect.ExceptionPexpect):
            self._child.close(force=False)

    def wait_for_exit(self, seconds: float = 15) -> int:
        """Wait until the program ends, and return its exit code."""
        end = time.monotonic() + seconds
        while self._child.isalive():
            assert time.monotonic() < end, f"the program did not end; the screen shows:\n{self.text}"
            self.read()
        self.read()  # what it printed last
        self._child.close()
        return int(self._child.exitstatus if self._child.exitstatus is not None else -self._child.signalstatus)

    def exit(self) -> int:
        """Press Ctrl-D, and return the exit code."""
        self.type("\x04")
        return self.wait_for_exit()

    def close(self) -> None:
        """Kill the program if it runs, and close the terminal."""
        if self._child.isalive():
            self.kill()
        self._child.close()


Open = Callable[..., Terminal]


def start_chat(terminal: Open, *arguments: str | Path, **variables: str) -> Terminal:
    """Open `qwenlocal run` and wait for its input line."""
    chat = terminal("run", *map(str, arguments), **variables)
    chat.wait_for_prompt()
    return chat


def save_messages(chat: Terminal, folder: Path) -> list[dict[str, str]]:
    """Save the chat, and return its messages."""
    chat.enter("\x15/save talk.json", "Saved:")
    messages: list[dict[str, str]] = json.loads((folder / "talk.json").read_text("utf-8"))["messages"]
    return messages
