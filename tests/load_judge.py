"""
Have llama.cpp judge GGUF files: a process loads each of the files given as arguments and generates three tokens.

Prints a list of verdicts as JSON: "ok", "NaN" if the model computes NaN, or why the file cannot be run. Each file has a
process of its own, because some files make llama.cpp abort.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model, load_library
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.errors import QwenlocalError

_MAX_SECONDS = 30


def judge(path: Path) -> str:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(_MAX_SECONDS)
        load_library().on_abort = lambda reason: _answer(write, f"abort: {reason}")
        try:
            _generate(path)
        except QwenlocalError as error:
            _answer(write, "NaN" if "NaN" in str(error) else str(error))
        _answer(write, "ok")
    os.close(write)
    with open(read, "rb") as answer:
        verdict = answer.read().decode()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else verdict


def _answer(pipe: int, verdict: str) -> None:
    os.write(pipe, verdict.encode()[:1000])
    os._exit(0)


def _generate(path: Path) -> None:
    model = Model(path)
    context = Context(model, ContextOptions(256, threads=1, batch_threads=1, n_batch=64, n_ubatch=64))
    ids = model.tokenizer.tokenize("Hi there", special=False)
    list(TokenSequence(context).generate(ids, Sampling(temperature=0), limit=3))


if __name__ == "__main__":
    load_library()
    print(json.dumps([judge(Path(argument)) for argument in sys.argv[1:]]))
