"""Conversions that are interrupted: another process that is killed, Ctrl-C in this one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenlocal.errors import Interrupted
from qwenlocal.resumable import journal_path, part_path
from qwenlocal.weights.write_job import WriteJob
from qwenlocal.weights.write_workers import run_job

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")


SLOW_TYPE = "iq4_xs"


CONVERT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoint_files import plan_job
from qwenlocal.weights.write_workers import run_job
source, targets, replace = Path(sys.argv[2]), [Path(text) for text in sys.argv[3].split(",")], sys.argv[4] == "replace"
print(run_job(plan_job(source, *targets), threads=1, replace=replace).resumed)
"""


def count_chunks(target: Path) -> int:
    """Count the finished chunks in the journal."""
    try:
        return journal_path(target).read_text().count("\n") - 1
    except OSError:
        return 0


def start_conversion(source: Path, *targets: Path, replace: str = "") -> subprocess.Popen[str]:
    """Start a conversion in another process."""
    arguments = [str(Path(__file__).parent), str(source), ",".join(map(str, targets)), replace]
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_after(child: subprocess.Popen[str], target: Path, after: int, how: int = signal.SIGKILL) -> str:
    """Wait until so many chunks are finished, and send a signal; returns the error output."""
    deadline = time.monotonic() + 60
    while count_chunks(target) < after and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert child.poll() is None, "it finished before it could be stopped"
    child.send_signal(how)
    return child.communicate(timeout=60)[1]


def stop_before_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when a GGUF file is complete and is about to get its name."""
    rename = Path.replace

    def stop(path: Path, target: Path) -> Path:
        if target.suffix == ".gguf":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", stop)


def interrupt_conversion(job: WriteJob, **options: Any) -> None:
    """Press Ctrl-C at the first report, after at least one chunk; of a small job, after all."""

    def stop(_done: int, _all: int) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(Interrupted, KeyboardInterrupt):
        run_job(job, threads=1, report=stop, **options)
    assert part_path(job.outputs[0].path).exists()


@contextlib.contextmanager
def expect_interrupted() -> Iterator[None]:
    """Check that an interrupt inside is reported with the hint that the work is kept."""
    try:
        yield
    except Interrupted as stop:
        assert "kept" in stop.hint
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C was not caught")
    else:
        pytest.fail("Ctrl-C was swallowed")
