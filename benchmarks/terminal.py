"""
How quick the chat is at a terminal: ready for typing, keys while an answer comes, and what laying answers out takes.

    .venv/bin/python benchmarks/terminal.py MODEL.gguf

The program runs in a real pseudo-terminal. *Ready*: from the command to the input line. *Keys*: a letter is typed every
tenth of a second while an answer streams; the time until it is written to the terminal. *Laying out*: the time that
drawing took in its own thread, of the time that 1,000 tokens of a Markdown answer took.
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
from pathlib import Path

import pexpect

from qwenlocal.chat.chat_model import load_chat_model
from qwenlocal.chat.conversation import GenerationConfig
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.sampling import Sampling
from qwenlocal.machine import this_machine
from qwenlocal.terminal.markdown import MarkdownStream, RenderOptions, warm_up
from qwenlocal.terminal.screen import Screen, TerminalSize
from qwenlocal.terminal.view import AnswerProgress, AnswerView

PROGRAM = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "qwenlocal"
QUESTION = (
    "Write a long tutorial about Python lists in Markdown: headings, numbered lists, a table of methods, and many "
    "code examples."
)


def open_chat(model: Path, home: str) -> pexpect.spawn:
    environment = {**os.environ, "HOME": home, "QWENLOCAL_HOME": home, "TERM": "xterm-256color"}
    command = ["run", "-m", str(model), "--no-journal", "--no-keep-cache", "--temp", "0"]
    child = pexpect.spawn(str(PROGRAM), command, env=environment, dimensions=(40, 100), timeout=120)
    child.delaybeforesend = None
    return child


def until(child: pexpect.spawn, wanted: bytes, seconds: float = 60) -> bytes:
    data, end = b"", time.perf_counter() + seconds
    while wanted not in data and time.perf_counter() < end:
        with contextlib.suppress(pexpect.TIMEOUT):
            new = child.read_nonblocking(1 << 16, timeout=0.5)
            if b"\x1b[6n" in new:
                child.send("\x1b[5;1R")
            data += new
    return data


def ready(model: Path, home: str) -> float:
    begun = time.perf_counter()
    child = open_chat(model, home)
    until(child, b"\x1b[?2004h")
    taken = time.perf_counter() - begun
    child.close(force=True)
    return taken


def keys(model: Path, home: str, count: int) -> list[float]:
    child = open_chat(model, home)
    until(child, b"\x1b[?2004h")
    child.send(QUESTION + "\r")
    until(child, b"tokens of context")
    found, letters = [], "abcdefghijklmnopqrstuvwxyz"
    for number in range(count):
        time.sleep(0.1)
        with contextlib.suppress(pexpect.TIMEOUT):
            while True:
                child.read_nonblocking(1 << 16, timeout=0)
        line = "> " + "".join(letters[at % 26] for at in range(number % 40 + 1))
        begun = time.perf_counter()
        if number % 40 == 0 and number:
            child.send("\x15")
        child.send(line[-1])
        if line.encode() not in until(child, line.encode(), 5):
            raise SystemExit("The answer was over before the last key: it must be longer.")
        found.append(time.perf_counter() - begun)
    child.close(force=True)
    return found


def interrupts(model: Path, home: str, count: int, question: str, begun_when: bytes) -> list[float]:
    """Seconds from Ctrl-C to the sentence that says so; the question is asked anew each time."""
    child, found = open_chat(model, home), []
    until(child, b"\x1b[?2004h")
    time.sleep(2)
    for number in range(count):
        child.send(f"\x1b[200~{number} {question}\x1b[201~\r")
        until(child, begun_when)
        time.sleep(0.5 + 0.13 * (number % 5))
        with contextlib.suppress(pexpect.TIMEOUT):
            while True:
                child.read_nonblocking(1 << 16, timeout=0)
        begun = time.perf_counter()
        child.send("\x03")
        until(child, b"[interrupted]", 20)
        found.append(time.perf_counter() - begun)
        child.send("/clear\r")
        until(child, b"Started a new chat")
        time.sleep(0.3)
    child.close(force=True)
    return found


def laying_out(model: Path, tokens: int) -> tuple[float, float]:
    """Seconds of drawing, and of the whole answer."""
    loaded = load_chat_model(model, LoadOptions(), this_machine(), name="m", size=model.stat().st_size)
    warm_up()
    talk = loaded.conversation(GenerationConfig(Sampling(temperature=0), max_tokens=tokens))
    view = AnswerView(
        Screen(io.StringIO(), lambda: TerminalSize(100, 40)),
        lambda: RenderOptions(100, color=True),
        AnswerProgress(4096),
    )
    begun = time.perf_counter()
    view.show(talk.ask(QUESTION))
    taken = time.perf_counter() - begun
    loaded.close()
    return view.drawing_seconds, taken


def at_every_token(text: str) -> float:
    """Milliseconds for a picture, were one made for every four letters of an answer."""
    stream, count, begun = MarkdownStream(), 0, time.perf_counter()
    for at in range(0, len(text), 4):
        stream.feed(text[at : at + 4])
        stream.render(RenderOptions(100, color=True))
        count += 1
    return (time.perf_counter() - begun) / count * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        starts = [ready(asked.model, home) for _ in range(asked.runs)]
        latencies = sorted(taken for _ in range(3) for taken in keys(asked.model, home, 50))
        answering = interrupts(asked.model, home, 10, QUESTION, b"tokens of context")
        text = " ".join(f"Line {number} of a long text about nothing." for number in range(2000))
        reading = interrupts(asked.model, home, 10, text, b"reading prompt")
    drawing, whole = laying_out(asked.model, 1000)
    print(f"{asked.model.name}, {os.cpu_count()} cores, {time.strftime('%d %B %Y')}\n")
    print("| what | median | worst | wanted |\n|---|---|---|---|")
    print(f"| ready for typing | {statistics.median(starts):.2f} s | {max(starts):.2f} s | <= 0.4 s |")
    p99 = latencies[int(len(latencies) * 0.99) - 1] * 1000
    median = statistics.median(latencies) * 1000
    print(f"| a key while an answer comes (worst: p99) | {median:.1f} ms | {p99:.1f} ms | <= 16 ms |")
    for what, times in (("an answer comes", answering), ("the question is read", reading)):
        median, worst = statistics.median(times) * 1000, max(times) * 1000
        print(f"| Ctrl-C while {what} | {median:.0f} ms | {worst:.0f} ms | <= 100 ms |")
    print(f"| laying out 1,000 tokens | {drawing:.2f} of {whole:.1f} s | {drawing / whole:.1%} | <= 3 % |")
    print(
        f"| a picture, were one made at every token | {at_every_token(Path(__file__).read_text()):.1f} ms | | |",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
