"""
What the plan says a model takes, beside what it took: the largest resident set after loading, its context full.

    .venv/bin/python benchmarks/memory.py MODEL.gguf [MODEL.gguf …]

A run is a process of its own. Pages of the model's file that are mapped but were copied for the processor's vector
units can be dropped at any time; they are given back after loading, so that what counts is what must be there (Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from qwenlocal.engine.context import ContextOptions
from qwenlocal.engine.memory import ModelDims, estimate_memory
from qwenlocal.weights.gguf_reader import read_header
from qwenlocal.weights.levels import weights_size

COMBINATIONS = (
    (2048, "f16", "f16", False, 128),
    (4096, "f16", "f16", False, 128),
    (4096, "f16", "f16", False, 512),
    (4096, "q8_0", "f16", False, 128),
    (4096, "q8_0", "q8_0", True, 128),
)

_RUN = """
import ctypes, json, re, sys
from pathlib import Path
import qwenlocal.cli.app, qwenlocal.engine.loader, numpy
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.measure.bench import fill_cache, peak_memory
path, n_ctx, keys, values = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
flash, together = map(int, sys.argv[5:])
model = Model(path)
context = Context(model, ContextOptions(n_ctx, threads=2, key_type=keys, value_type=values, flash_attention=bool(flash),
                                        n_ubatch=together))
libc = ctypes.CDLL(None)
for line in Path("/proc/self/maps").read_text().splitlines():
    if line.endswith(str(path.resolve())):
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4)  # MADV_DONTNEED
Path("/proc/self/clear_refs").write_text("5")
fill_cache(context, n_ctx)
print(json.dumps(peak_memory()))
"""


def measured(path: Path, combination: tuple[int, str, str, bool, int]) -> int:
    n_ctx, keys, values, flash, together = combination
    command = [sys.executable, "-c", _RUN, str(path), str(n_ctx), keys, values, str(int(flash)), str(together)]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def main() -> None:
    print(time.strftime("%d %B %Y"))
    print("\n| model | context | keys, values | flash attention | at once | planned | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for path in map(Path, sys.argv[1:]):
        header = read_header(path)
        dims = ModelDims.from_metadata(header.metadata)
        assert dims
        for combination in COMBINATIONS:
            n_ctx, keys, values, flash, together = combination
            options = ContextOptions(n_ctx, key_type=keys, value_type=values, flash_attention=flash, n_ubatch=together)
            need, took = estimate_memory(dims, weights_size(header), options).total, measured(path, combination)
            print(
                f"| {path.name} | {n_ctx:,} | {keys}, {values} | {'on' if flash else 'off'} | {together} | "
                f"{need / 2**20:,.0f} MiB | {took / 2**20:,.0f} MiB | {need / took:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
