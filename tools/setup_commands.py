"""
Commands of set-up, with their output in a log. The user sees the elapsed time, the compiler's progress, and the
relevant lines of a failure. Uses the standard library only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from system_packages import advice

_TELLING = r"error|fatal|not found|could be found|No space|killed"
_NETWORK_FAILURE = r"Temporary failure|Name or service|Connection refused|ProxyError|No matching distribution"
WINDOWS = sys.platform == "win32"


class SetupFailed(Exception):
    """Set-up cannot continue; the text says why and what to do."""


def say(text: str) -> None:
    """Print a line for the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


class CommandRunner:
    """Runs commands one after the other, with one log."""

    def __init__(self, log: Path) -> None:
        """`log` is created with its folder, or appended to."""
        self.log = log

    def run(
        self,
        command: Sequence[str],
        doing: str,
        environment: Mapping[str, str] | None = None,
        *,
        slow: bool = False,
        venv_hint: bool = False,
    ) -> None:
        """
        Run a command; show the elapsed time of a slow one.

        Raises
        ------
        SetupFailed: it failed; the text has the relevant lines of its output.
        """
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            begin = self.log.stat().st_size
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=not WINDOWS,
            )
            try:
                self._wait(child, doing, begin, slow)
            except BaseException:
                _end(child)
                raise
        if child.returncode != 0:
            self._explain(doing, begin, venv_hint)

    def _wait(self, child: subprocess.Popen[bytes], doing: str, begin: int, slow: bool) -> None:
        started, shown = time.monotonic(), ""
        every = 0.5 if sys.stderr.isatty() else 20
        due = started + every
        while child.poll() is None:
            time.sleep(0.1)
            if slow and time.monotonic() >= due:
                due += every
                seconds = int(time.monotonic() - started)
                elapsed = f"{seconds // 60}:{seconds % 60:02}"
                line = f"{doing}: {elapsed}{self._compiled(begin)}, log in {self.log.parent.name}/{self.log.name}"
                shown = _show(line, shown)
        if shown and sys.stderr.isatty():
            sys.stderr.write("\n")

    def _compiled(self, begin: int) -> str:
        """Read the compiler's progress from the last “[12/345]” in the log."""
        steps = re.findall(r"\[(\d+)/(\d+)\]", self._read_log(max(begin, self.log.stat().st_size - 4000)))
        return f", {steps[-1][0]} of {steps[-1][1]} steps" if steps else ""

    def _read_log(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            return log.read().decode("utf-8", errors="replace")

    def _explain(self, doing: str, begin: int, venv_hint: bool) -> None:
        lines = [line.rstrip() for line in self._read_log(begin).splitlines() if line.strip()]
        telling = [line for line in lines if re.search(_TELLING, line, re.I)]
        shown = "\n".join(f"  {line[:160]}" for line in (telling or lines)[-8:])
        text = "\n".join(lines)
        hint = ""
        if venv_hint or "ensurepip" in text:
            hint = advice("python3-venv")
        elif re.search(r"CMAKE_CXX_COMPILER|No CMAKE_C_COMPILER|compiler identification is unknown", text):
            hint = advice("compiler")
        elif re.search(_NETWORK_FAILURE, text):
            hint = "Cannot reach the package index. Check the network, or set PIP_INDEX_URL and HTTPS_PROXY."
        elif re.search(r"Killed|out of memory|cannot allocate", text, re.I):
            hint = "The compiler ran out of memory. Try again with CMAKE_BUILD_PARALLEL_LEVEL=1."
        raise SetupFailed(f"{doing} failed:\n{shown}\n{hint}\nFull log: {self.log}".replace("\n\n", "\n"))


def _show(line: str, before: str) -> str:
    if sys.stderr.isatty():
        sys.stderr.write("\r" + line + " " * max(0, len(before) - len(line)))
        sys.stderr.flush()
    else:
        say(line)
    return line


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stop a command and the processes it started."""
    if WINDOWS:
        child.terminate()
    else:
        os.killpg(child.pid, signal.SIGTERM)
    child.wait()
