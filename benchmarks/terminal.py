"""
Measure the latency of the terminal chat: start, keys and Ctrl-C during an answer, and the cost of rendering Markdown.

    .venv/bin/python benchmarks/terminal.py MODEL.gguf

The program runs in a pseudo-terminal. *Start*: from the command to the input line. *Keys*: a letter is typed every
tenth of a second while an answer streams; the time until it is echoed. *Rendering*: the time spent drawing, out of the
time for 1,000 tokens of a Markdown answer.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pexpect
from comparison import QWENLOCAL, table_header, table_row

from qwenlocal.chat.chat_model import load_chat_model
from qwenlocal.chat.conversation import GenerationConfig
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.sampling import Sampling
from qwenlocal.machine import this_machine
from qwenlocal.terminal.markdown import MarkdownStream, RenderOptions, warm_up
from qwenlocal.terminal.screen import Screen
from qwenlocal.terminal.view import AnswerView

QUESTION = (
    "Write a long tutorial about Python lists in Markdown: headings, numbered lists, a table of methods, and many "
    "code examples."
)
_INPUT_LINE = b"\x1b[?2004h"  # bracketed paste is on
_ANSWERING, _PREFILL = b"tokens of context", b"reading prompt"  # in the status line
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LINE_LENGTH = 40  # typed letters before the line is cleared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        starts = [measure_start(options.model, home) for _ in range(options.runs)]
        keys = sorted(seconds for _ in range(3) for seconds in measure_keys(options.model, home, 50))
        interrupts = measure_interrupts(options.model, home, 10, QUESTION, _ANSWERING)
        text = " ".join(f"Line {number} of a long text about nothing." for number in range(2000))
        prefill_interrupts = measure_interrupts(options.model, home, 10, text, _PREFILL)
    drawing, total = measure_rendering(options.model, 1000)
    print(f"{options.model.name}, {os.cpu_count()} cores, {time.strftime('%d %B %Y')}\n")
    print(table_header("what", "median", "maximum", "target"))
    print(table_row("start", f"{statistics.median(starts):.2f} s", f"{max(starts):.2f} s", "<= 0.4 s"))
    p99 = keys[int(len(keys) * 0.99) - 1] * 1000
    print(table_row("key during an answer (p99)", f"{median_ms(keys):.1f} ms", f"{p99:.1f} ms", "<= 16 ms"))
    for phase, seconds in (("an answer", interrupts), ("a prefill", prefill_interrupts)):
        median, maximum = f"{median_ms(seconds):.0f} ms", f"{max(seconds) * 1000:.0f} ms"
        print(table_row(f"Ctrl-C during {phase}", median, maximum, "<= 100 ms"))
    print(table_row("rendering 1,000 tokens", f"{drawing:.2f} of {total:.1f} s", f"{drawing / total:.1%}", "<= 3 %"))
    render = f"{render_every_token(Path(__file__).read_text()):.1f} ms"
    print(table_row("rendering if done for every token", render, "", ""), file=sys.stderr)


def median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1000


def open_chat(model: Path, home: str) -> pexpect.spawn:
    environment = {**os.environ, "HOME": home, "QWENLOCAL_HOME": home, "TERM": "xterm-256color"}
    command = ["run", "-m", str(model), "--no-journal", "--no-keep-cache", "--temp", "0"]
    child = pexpect.spawn(QWENLOCAL, command, env=environment, dimensions=(40, 100), timeout=120)
    child.delaybeforesend = None
    return child


def read_until(child: pexpect.spawn, marker: bytes, timeout: float = 60) -> bytes:
    """Read until `marker` appears or the timeout ends; return what was read."""
    data, deadline = b"", time.perf_counter() + timeout
    while marker not in data and time.perf_counter() < deadline:
        with contextlib.suppress(pexpect.TIMEOUT):
            new = child.read_nonblocking(1 << 16, timeout=0.5)
            if b"\x1b[6n" in new:  # the program asks for the cursor position
                child.send("\x1b[5;1R")
            data += new
    return data


def drain(child: pexpect.spawn) -> None:
    """Read the output that is already there."""
    with contextlib.suppress(pexpect.TIMEOUT):
        while True:
            child.read_nonblocking(1 << 16, timeout=0)


def measure_start(model: Path, home: str) -> float:
    started = time.perf_counter()
    child = open_chat(model, home)
    read_until(child, _INPUT_LINE)
    seconds = time.perf_counter() - started
    child.close(force=True)
    return seconds


def measure_keys(model: Path, home: str, count: int) -> list[float]:
    """Type `count` letters during an answer; return the seconds until each is echoed."""
    child = open_chat(model, home)
    read_until(child, _INPUT_LINE)
    child.send(QUESTION + "\r")
    read_until(child, _ANSWERING)
    latencies = []
    for number in range(count):
        time.sleep(0.1)
        drain(child)
        line = "> " + "".join(_LETTERS[index % 26] for index in range(number % _LINE_LENGTH + 1))
        started = time.perf_counter()
        if number % _LINE_LENGTH == 0 and number:
            child.send("\x15")
        child.send(line[-1])
        if line.encode() not in read_until(child, line.encode(), 5):
            raise SystemExit("The answer ended before the last key was typed. Use a model with longer answers.")
        latencies.append(time.perf_counter() - started)
    child.close(force=True)
    return latencies


def measure_interrupts(model: Path, home: str, count: int, question: str, phase: bytes) -> list[float]:
    """Press Ctrl-C after `phase` appears in the status line; return the seconds until the chat confirms it."""
    child, latencies = open_chat(model, home), []
    read_until(child, _INPUT_LINE)
    time.sleep(2)
    for number in range(count):
        child.send(f"\x1b[200~{number} {question}\x1b[201~\r")
        read_until(child, phase)
        time.sleep(0.5 + 0.13 * (number % 5))
        drain(child)
        started = time.perf_counter()
        child.send("\x03")
        read_until(child, b"[interrupted]", 20)
        latencies.append(time.perf_counter() - started)
        child.send("/clear\r")
        read_until(child, b"Started a new chat")
        time.sleep(0.3)
    child.close(force=True)
    return latencies


def measure_rendering(model: Path, tokens: int) -> tuple[float, float]:
    """Return the seconds spent drawing, and those of the whole answer."""
    chat_model = load_chat_model(model, LoadOptions(), this_machine(), name="m", size=model.stat().st_size)
    warm_up()
    conversation = chat_model.conversation(GenerationConfig(Sampling(temperature=0), max_tokens=tokens))
    view = AnswerView(
        Screen(io.StringIO(), lambda: os.terminal_size((100, 40))),
        lambda: RenderOptions(100, color=True),
        4096,
    )
    started = time.perf_counter()
    view.show(conversation.ask(QUESTION))
    seconds = time.perf_counter() - started
    chat_model.close()
    return view.drawing_seconds, seconds


def render_every_token(text: str) -> float:
    """Return the milliseconds per token if an answer were rendered after each token of four characters."""
    stream, count, started = MarkdownStream(), 0, time.perf_counter()
    for start in range(0, len(text), 4):
        stream.feed(text[start : start + 4])
        stream.render(RenderOptions(100, color=True))
        count += 1
    return (time.perf_counter() - started) / count * 1000


if __name__ == "__main__":
    main()
