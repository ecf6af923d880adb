"""
Measure what the types of GGUF lose of packed weights (GPTQ, AWQ): KL divergence from the packed model itself.

    .venv/bin/python benchmarks/packed_loss.py MODEL.gguf    about twenty minutes for a 0.5B

MODEL is a model of floats, for example one made by benchmarks/regrid.py. Its layers are rounded to the nearest codes in
groups of 128, packed like GPTQ and AWQ, and written as GGUF: exactly, nearly, and quantized again, as programs do that
cannot read packed weights. The base of each comparison has the packed weights as float32. Embeddings and output matrix
are f16 in all files. The text is the one that comes with qwenlocal for calibration.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
from comparison import QWENLOCAL, ROOT, table_header, table_row

sys.path.insert(0, str(ROOT / "tests"))

from from_gguf import write_checkpoint_of
from packing import PACKERS, quantization_settings, round_weights

from qwenlocal.measure.importance import CALIBRATION_TEXT
from qwenlocal.testing import write_safetensors
from qwenlocal.weights.safetensors import read_tensors

PACKINGS = {
    "GPTQ-Int4": ("gptq", 4, True, ("q4_0", "q4_k_m", "q8_0")),
    "GPTQ-Int8": ("gptq", 8, True, ("q8_0", "q6_k")),
    "AWQ": ("gemm", 4, False, ("q5_0", "q4_1", "q4_k_m", "q8_0")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--chunks", type=int, default=4)
    options = parser.parse_args()
    print(f"{options.model.name}, {options.chunks} windows of 512 tokens, {time.strftime('%d %B %Y')}\n")
    print(table_header("packed", "GGUF", "file", "KL divergence", "same most likely token"))
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as temporary:
        folder = Path(temporary)
        for name, (layout, bits, symmetric, kinds) in PACKINGS.items():
            checkpoint = pack(options.model, folder / name, layout, bits, symmetric=symmetric)
            base = convert(checkpoint, folder / f"{name}-base.gguf", "f32")
            for kind in kinds:
                file = convert(checkpoint, folder / f"{name}-{kind}.gguf", kind)
                measure(name, kind, file, base, options.chunks)
                file.unlink()
            base.unlink()


def pack(model: Path, folder: Path, layout: str, bits: int, *, symmetric: bool) -> Path:
    write_checkpoint_of(model, folder, dtype="F16")
    path = folder / "model.safetensors"
    data, tensors = path.read_bytes(), {}
    for stored in read_tensors(path):
        values = data[stored.offset : stored.offset + stored.size]
        module, _, kind = stored.name.rpartition(".")
        if kind != "weight" or not module.endswith("_proj"):
            tensors[stored.name] = (stored.dtype, stored.shape, values)
            continue
        weights = numpy.frombuffer(values, numpy.float16).reshape(stored.shape).astype(numpy.float32)
        layer = round_weights(weights, bits, 128, symmetric=symmetric)
        tensors |= {f"{module}.{part}": tensor for part, tensor in PACKERS[layout](layer).items()}
    write_safetensors(path, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_settings(layout, {"bits": bits, "symmetric": symmetric})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(checkpoint: Path, target: Path, kind: str) -> Path:
    options = ["--ends", "f32" if kind == "f32" else "f16", "--requantize", "--force"]
    subprocess.run(
        [QWENLOCAL, "convert", checkpoint, "-o", target, "--type", kind, *options], check=True, capture_output=True
    )
    return target


def measure(name: str, kind: str, file: Path, base: Path, chunks: int) -> None:
    command = [QWENLOCAL, "quality", file, "--base", base, "--text", CALIBRATION_TEXT, "--chunks", chunks, "--json"]
    output = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
    facts = json.loads(output)
    size, divergence, agreement = file.stat().st_size / 1e6, facts["kl"], facts["same_top"] * 100
    print(table_row(name, kind, f"{size:.0f} MB", f"{divergence:.6f}", f"{agreement:.1f} %"), flush=True)


if __name__ == "__main__":
    main()
