"""`qwenlocal imatrix`: measure an importance matrix."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import find_installed, refuse_existing
from qwenlocal.errors import Interrupted, NotWritable, OutOfRange, UsageError
from qwenlocal.formatting import format_duration, format_quantity
from qwenlocal.paths import parse_path
from qwenlocal.text_encoding import read_text

if TYPE_CHECKING:
    from qwenlocal.engine.evaluation import InputCollector
    from qwenlocal.engine.llama import Model
    from qwenlocal.library.store import ModelRecord
    from qwenlocal.weights.imatrix import InputStatistics

_MAX_TEXT = 1 << 28  # bytes
_MAX_CHUNKS = 1_000_000


def create_imatrix(
    name: str, *, text: str | None, out: str | None, chunks: int | None, threads: int | None, force: bool
) -> None:
    """
    Measure the importance matrix of a model and write it.

    Raises
    ------
    UsageError: the text is too short or no text. OutputExists: the file exists, without `force`.
    BadWeights: llama.cpp cannot run the model. NotEnoughMemory: it does not fit into the memory.
    Interrupted: Ctrl-C, after the matrix of the chunks so far is written.
    """
    from qwenlocal.engine.evaluation import InputCollector
    from qwenlocal.engine.llama import Model
    from qwenlocal.engine.load_plan import LoadRequest
    from qwenlocal.machine import this_machine
    from qwenlocal.measure.importance import CALIBRATION_TEXT, CHUNK_SIZE, split_text
    from qwenlocal.measure.perplexity import plan_reading
    from qwenlocal.terminal.progress import loading_status
    from qwenlocal.weights.imatrix import write_imatrix
    from qwenlocal.weights.load_errors import check_file

    if chunks is not None and not 1 <= chunks <= _MAX_CHUNKS:
        raise OutOfRange("--chunks", 1, _MAX_CHUNKS, chunks)
    app = AppContext()
    text_path = parse_path(text) if text else CALIBRATION_TEXT
    content = read_text(text_path, limit=_MAX_TEXT)
    record = find_installed(app, name)
    target = _choose_target(out, record, text_path, force=force)
    machine = this_machine()
    metadata, available = check_file(record.path).header.metadata, machine.memory().available
    plan_reading(record.path.name, metadata, record.size, available, LoadRequest(CHUNK_SIZE, "f16"))
    with loading_status(sys.stderr, record.path.name) as show_loading:
        model = Model(record.path, on_progress=lambda fraction: show_loading(fraction) is None)
    collector, begin = InputCollector(), time.monotonic()
    with contextlib.closing(model):
        parts = split_text(model.tokenizer, content, text_path.name, special=text is None)[:chunks]
        done = _read_chunks(model, parts, threads or machine.cores, collector)
    if done:
        write_imatrix(target, collector.statistics, done, CHUNK_SIZE, text_path.name)
        app.say(
            f"Wrote {target}: {format_quantity(len(collector.statistics), 'matrix', 'matrices')}, "
            f"{format_quantity(done * CHUNK_SIZE, 'token')} of {text_path.name}, in {time.monotonic() - begin:.0f} s."
        )
        _say_unused_experts(app, collector.statistics)
    if done < len(parts):
        raise Interrupted(f"{done} of {len(parts)} chunks were measured.")
    app.say(f"Use it with: qwenlocal convert SRC --imatrix {shlex.quote(str(target))}")


def _read_chunks(model: Model, chunks: Sequence[Sequence[int]], threads: int, collector: InputCollector) -> int:
    """Measure chunks with progress; return the number of those read, fewer than all after Ctrl-C."""
    from qwenlocal.chat.worker import iterate_in_thread
    from qwenlocal.engine.context import Aborted, AbortFlag
    from qwenlocal.measure.importance import measure_importance
    from qwenlocal.terminal.progress import status_line

    abort, begin, done = AbortFlag(), time.monotonic(), 0
    with (
        status_line(sys.stderr, delay=0) as show,
        iterate_in_thread(lambda: measure_importance(model, chunks, threads, collector, abort), abort.set) as counts,
        contextlib.suppress(Aborted),
    ):
        show(_describe_progress(0, len(chunks), 0))
        for done in counts:
            show(_describe_progress(done, len(chunks), time.monotonic() - begin))
    return done


def _choose_target(out: str | None, record: ModelRecord, text: Path, *, force: bool) -> Path:
    """
    Return the file to write, before anything takes time.

    Raises
    ------
    OutputExists, UsageError, NotWritable: it cannot be written.
    """
    default = f"{record.path.stem}.imatrix.gguf"
    target = parse_path(out or default)
    if target.is_dir():
        target /= default
    refuse_existing(target, force=force)
    used = (str(text), *(file.path for file in record.files))
    if target.exists() and any(map(target.samefile, used)):
        message = f"The matrix would replace {target}, which it is measured with."
        raise UsageError(message, hint="Name another file: -o OUT")
    if not target.parent.is_dir():
        raise NotWritable(target.parent, "it does not exist", hint="Name a folder that exists: -o OUT")
    if not os.access(target.parent, os.W_OK):
        raise NotWritable(target.parent, "permission denied", hint="Write to another folder: -o OUT")
    return target


def _say_unused_experts(app: AppContext, statistics: Mapping[str, InputStatistics]) -> None:
    counts = [count for entry in statistics.values() if len(entry.counts) > 1 for count in entry.counts]
    if unused := counts.count(0):
        app.say(
            f"{unused:,} of {format_quantity(len(counts), 'matrix', 'matrices')} of experts got no tokens, and will be "
            "quantized as without an importance matrix. To reach more of them, use a longer text."
        )


def _describe_progress(done: int, total: int, seconds: float) -> str:
    left = f", {format_duration(seconds / done * (total - done))} left" if 0 < done < total else ""
    return f"measuring: chunk {done} of {total}{left}"
