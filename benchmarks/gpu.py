"""
Check a GPU with a model: no layer, half of them and all of them on the GPU.

    tools/check_gpu.sh MODEL.gguf

Prints speed (pp512 and tg128, fewer tokens on slow devices), the memory that was planned for the GPU and what was
measured there, whether 32 tokens of greedy text are those of the processor, and the mean KL divergence of 64 tokens
from the processor's logits.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
from comparison import table_header, table_row

from qwenlocal.devices import Device
from qwenlocal.engine.context import Context
from qwenlocal.engine.device_plan import choose_offload, plan_load_with_offload
from qwenlocal.engine.gpu_offload import GpuOffload, GpuRequest, read_layer_sizes
from qwenlocal.engine.llama import load_library
from qwenlocal.engine.load_plan import LoadPlan, LoadRequest
from qwenlocal.engine.loader import open_model
from qwenlocal.engine.memory import ModelDims
from qwenlocal.machine import this_machine
from qwenlocal.measure.bench import decode_speed, fill_cache, prefill_speed
from qwenlocal.weights.gguf_reader import read_metadata
from qwenlocal.weights.split_model import shard_paths

PROMPT, ANSWER, TEXT, COMPARED = 512, 128, 32, 64  # tokens
N_CTX = 1024
SLOW = 20  # tokens per second, below which fewer tokens are measured
COLUMNS = ("layers", "pp512", "tg128", "memory planned", "measured", "greedy text", "KL divergence")


@dataclass(frozen=True)
class Outputs:
    """Greedy text, and logits of the first tokens after a prompt."""

    ids: list[int]
    logits: numpy.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    path = parser.parse_args().model
    gpus = [device for device in load_library().list_devices() if device.is_gpu]
    if not gpus:
        sys.exit("llama.cpp finds no GPU. To see the devices: qwenlocal doctor")
    names = ", ".join(f"{gpu.name} ({gpu.description}, {gpu.free / 2**30:.1f} GiB free)" for gpu in gpus)
    print(f"{path.name} on {names}, {time.strftime('%d %B %Y')}\n")
    print(table_header(*COLUMNS))
    total = len(read_layer_sizes(shard_paths(path)).layers) + 1
    reference: Outputs | None = None
    for layers in (0, total // 2, total):
        row, outputs = check(path, layers, reference)
        reference = reference or outputs
        print(row, flush=True)


def check(path: Path, layers: int, reference: Outputs | None) -> tuple[str, Outputs]:
    """Return a row of the table, and what the model answered."""
    dims, size, machine = ModelDims.from_metadata(read_metadata(path)), path.stat().st_size, this_machine()
    request = LoadRequest(n_ctx=N_CTX, threads=machine.cores)
    files = shard_paths(path)
    offload = choose_offload(lambda: read_layer_sizes(files), dims, size, request, GpuRequest(layers))
    plan = plan_load_with_offload(path.name, dims, size, machine.memory().available, request, offload)
    before = free_bytes(offload)
    model, context, _, offload, notes = open_model(path, plan.options, offload, {}, lambda _fraction: True)
    fill_cache(context, 32)  # compiles the GPU's programs
    measured = before - free_bytes(offload)
    outputs = Outputs(greedy_ids(context), compared_logits(context))
    speeds = measure_speeds(context)
    context.close()
    model.close()
    row = table_row(
        f"{offload.layers} of {offload.total}{' (*)' if notes else ''}",
        *(f"{speed:.1f}" for speed in speeds),
        format_mib(planned_bytes(plan)),
        format_mib(measured) if offload.layers and measured else "–",
        "–" if reference is None else "equal" if outputs.ids == reference.ids else "differs",
        "–" if reference is None else f"{kl_divergence(reference.logits, outputs.logits):.6f}",
    )
    return row, outputs


def free_bytes(offload: GpuOffload) -> int:
    names = {device.name for device in offload.devices}
    devices: list[Device] = load_library().list_devices()
    return sum(device.free for device in devices if device.name in names)


def planned_bytes(plan: LoadPlan) -> int:
    return sum(share.weights + share.kv_cache for share in plan.offload.shares)


def measure_speeds(context: Context) -> tuple[float, float]:
    prefill = prefill_speed(context, 32)
    if prefill > SLOW:
        prefill = prefill_speed(context, PROMPT)
    decode = decode_speed(context, 4)
    return prefill, decode_speed(context, ANSWER) if decode > SLOW else decode


def greedy_ids(context: Context) -> list[int]:
    """Decode greedily after a fixed prompt."""
    context.truncate(0, 0)
    tokens, ids = context.model.tokenizer.tokenize("The capital of France is", special=False) or [1], list[int]()
    while len(ids) < TEXT:
        (row,) = context.decode([(0, tokens)])
        tokens = [int(numpy.ctypeslib.as_array(context.logits(row), (len(context.model.tokenizer),)).argmax())]
        ids += tokens
    return ids


def compared_logits(context: Context) -> numpy.ndarray:
    """Return the logits after each of the last 32 of the `COMPARED` first tokens of a text."""
    context.truncate(0, 0)
    ids = context.model.tokenizer.tokenize(read_text(), special=False)[:COMPARED]
    context.decode([(0, ids[: COMPARED // 2])])
    context.decode([(0, ids[COMPARED // 2 :])], all_logits=(0,))
    return context.logit_rows(COMPARED // 2).astype(numpy.float64)


def read_text() -> str:
    """Return the text that importance matrices are computed on; it has several languages and code."""
    return importlib.resources.files("qwenlocal.measure").joinpath("calibration.txt").read_text("utf-8")


def kl_divergence(reference: numpy.ndarray, other: numpy.ndarray) -> float:
    """Return the mean KL divergence in nats."""
    p, q = (logits - numpy.logaddexp.reduce(logits, axis=-1, keepdims=True) for logits in (reference, other))
    return float((numpy.exp(p) * (p - q)).sum(axis=-1).mean())


def format_mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
