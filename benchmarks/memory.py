"""
Compare the memory estimate of a load plan with the peak resident set after loading and filling the context.

    .venv/bin/python benchmarks/memory.py MODEL.gguf [MODEL.gguf …]

Each run is a process of its own (Linux only). Pages of the model file stay mapped after llama.cpp has repacked them for
the CPU's vector units, although they can be dropped at any time; the run drops them, so that only the necessary memory
counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from comparison import run_python, table_header, table_row

from qwenlocal.engine.context import ContextOptions
from qwenlocal.engine.memory import ModelDims, estimate_memory
from qwenlocal.weights.gguf_reader import read_header

LAYOUTS = (
    ContextOptions(2048, key_type="f16", value_type="f16", flash_attention=False, n_ubatch=128),
    ContextOptions(4096, key_type="f16", value_type="f16", flash_attention=False, n_ubatch=128),
    ContextOptions(4096, key_type="f16", value_type="f16", flash_attention=False, n_ubatch=512),
    ContextOptions(4096, key_type="q8_0", value_type="f16", flash_attention=False, n_ubatch=128),
    ContextOptions(4096, key_type="q8_0", value_type="q8_0", flash_attention=True, n_ubatch=128),
    ContextOptions(4096, key_type="f16", value_type="f16", flash_attention=True, n_ubatch=128),
)

_RUN = """
import ctypes, json, re, sys
from pathlib import Path
import qwenlocal.cli.app, qwenlocal.engine.loader, numpy
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.measure.bench import fill_cache, peak_memory
path, n_ctx, keys, values = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
flash, n_ubatch = map(int, sys.argv[5:])
model = Model(path)
context = Context(model, ContextOptions(n_ctx, threads=2, key_type=keys, value_type=values, flash_attention=bool(flash),
                                        n_ubatch=n_ubatch))
libc = ctypes.CDLL(None)
for line in Path("/proc/self/maps").read_text().splitlines():
    if line.endswith(str(path.resolve())):
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4)  # MADV_DONTNEED
Path("/proc/self/clear_refs").write_text("5")
fill_cache(context, n_ctx)
print(json.dumps(peak_memory()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    models = parser.parse_args().models
    print(time.strftime("%d %B %Y\n"))
    print(
        table_header(
            "model", "context", "keys, values", "flash attention", "micro-batch", "estimated", "measured", "ratio"
        )
    )
    for path in models:
        header = read_header(path)
        dims = ModelDims.from_metadata(header.metadata)
        assert dims
        for layout in LAYOUTS:
            estimated = estimate_memory(dims, header.weights_size, layout).total
            print(format_result(path.name, layout, estimated, measure_memory(path, layout)), flush=True)


def measure_memory(path: Path, layout: ContextOptions) -> int:
    """Return the peak resident set in bytes."""
    types = layout.key_type, layout.value_type
    return int(run_python(_RUN, path, layout.n_ctx, *types, int(layout.flash_attention), layout.n_ubatch))


def format_result(name: str, layout: ContextOptions, estimated: int, measured: int) -> str:
    return table_row(
        name,
        f"{layout.n_ctx:,}",
        f"{layout.key_type}, {layout.value_type}",
        "on" if layout.flash_attention else "off",
        layout.n_ubatch,
        f"{estimated / 2**20:,.0f} MiB",
        f"{measured / 2**20:,.0f} MiB",
        f"{estimated / measured:.3f}",
    )


if __name__ == "__main__":
    main()
