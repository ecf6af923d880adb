"""
Draw docs/chat.svg: a screenshot of a chat with the starter, recorded in a pseudo-terminal.

    .venv/bin/python tools/picture.py        (first: make setup-dev, qwenlocal pull starter)
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pexpect
import pyte
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, LINES = 92, 28
MESSAGES = [
    "Python: a function reverse(text). Only the code, no comments.",
    "A Markdown table of the capitals of France, Japan and Kenya. Only the table.",
    "法国的首都是哪里？",
    "/ctx",
]


def main() -> None:
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    command = ["run", "starter", "--temp", "0", "-n", "260", "--no-journal"]
    child = pexpect.spawn(
        str(ROOT / ".venv/bin/qwenlocal"), command, env=environment, dimensions=(LINES, COLUMNS), timeout=60
    )
    wait_for_prompt(child, screen, stream)
    for message in MESSAGES:
        child.send(message + "\r")
        wait_for_prompt(child, screen, stream)
    child.sendeof()
    save_svg(screen, ROOT / "docs" / "chat.svg")


def wait_for_prompt(child: pexpect.spawn, screen: pyte.Screen, stream: pyte.ByteStream) -> None:
    """Wait until the input line is empty and there was no output for 1.5 seconds."""
    last_output = time.monotonic()
    while time.monotonic() - last_output < 1.5 or not re.search(r"^>\s*$", screen.display[screen.cursor.y]):
        try:
            data = child.read_nonblocking(1 << 16, timeout=0.2)
        except pexpect.TIMEOUT:
            continue
        stream.feed(data)
        if b"\x1b[6n" in data:  # the program asks for the cursor position
            child.send(f"\x1b[{screen.cursor.y + 1};{screen.cursor.x + 1}R")
        last_output = time.monotonic()


def save_svg(screen: pyte.Screen, path: Path) -> None:
    with open(os.devnull, "w") as devnull:
        console = Console(record=True, width=COLUMNS, file=devnull)
        for line in range(LINES):
            console.print(line_text(screen, line), end="\n", overflow="crop", no_wrap=True)
    console.save_svg(str(path), title="qwenlocal run", theme=SVG_EXPORT_THEME)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", file=sys.stderr)


def line_text(screen: pyte.Screen, line: int) -> Text:
    """Return a line of the screen with its colors and styles."""
    text = Text()
    for column in range(COLUMNS):
        cell = screen.buffer[line][column]
        style = Style(
            color=rich_color(cell.fg),
            bold=cell.bold,
            italic=cell.italics,
            underline=cell.underscore,
            reverse=cell.reverse,
        )
        text.append(cell.data, style)
    text.rstrip()
    return text


def rich_color(name: str) -> Color | None:
    """Translate pyte's name of a color; None is the default color."""
    if name == "default":
        return None
    return Color.parse(
        f"#{name}"
        if re.fullmatch(r"[0-9a-f]{6}", name)
        else name.replace("brown", "yellow").replace("bright", "bright_")
    )


if __name__ == "__main__":
    main()
