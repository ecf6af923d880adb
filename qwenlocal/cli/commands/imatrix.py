"""`qwenlocal imatrix`: measure an importance matrix."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import find_installed
from qwenlocal.errors import NotWritable, OutOfRange, OutputExists
from qwenlocal.formatting import format_quantity
from qwenlocal.paths import parse_path
from qwenlocal.text_encoding import read_text

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
    BadWeights: llama.cpp cannot run the model.
    """
    from qwenlocal.engine.llama import Model
    from qwenlocal.machine import this_machine
    from qwenlocal.measure.importance import CALIBRATION_TEXT, CHUNK_SIZE, measure_importance, split_text
    from qwenlocal.terminal.progress import loading_status, status_line
    from qwenlocal.weights.imatrix import write_imatrix
    from qwenlocal.weights.load_errors import check_file

    if chunks is not None and not 1 <= chunks <= _MAX_CHUNKS:
        raise OutOfRange("--chunks", 1, _MAX_CHUNKS, chunks)
    app = AppContext()
    text_path = parse_path(text) if text else CALIBRATION_TEXT
    content = read_text(text_path, limit=_MAX_TEXT)
    record = find_installed(app, name)
    check_file(record.path)
    target = parse_path(out) if out else Path(f"{record.path.stem}.imatrix.gguf")
    if target.exists() and not force:
        raise OutputExists(target)
    if not target.parent.is_dir():
        raise NotWritable(target.parent, "it does not exist")
    with loading_status(sys.stderr, record.path.name) as show_loading:
        model = Model(record.path, on_progress=lambda fraction: show_loading(fraction) is None)
    with contextlib.closing(model):
        parts = split_text(model.tokenizer, content, text_path.name, special=text is None)[:chunks]
        begin = time.monotonic()
        with status_line(sys.stderr, delay=0) as show:
            statistics = measure_importance(
                model,
                parts,
                threads or this_machine().cores,
                lambda done, total: show(_describe_progress(done, total, time.monotonic() - begin)),
            )
    write_imatrix(target, statistics, len(parts), CHUNK_SIZE, text_path.name)
    seconds = time.monotonic() - begin
    app.say(
        f"Wrote {target}: {format_quantity(len(statistics), 'matrix', 'matrices')}, "
        f"{format_quantity(len(parts) * CHUNK_SIZE, 'token')} of {text_path.name}, in {seconds:.0f} s."
    )
    app.say(f"Use it with: qwenlocal convert SRC --imatrix {target}")


def _describe_progress(done: int, total: int, seconds: float) -> str:
    left = f", {seconds / done * (total - done):.0f} s left" if done else ""
    return f"measuring: chunk {done} of {total}{left}"
