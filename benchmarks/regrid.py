"""
Make a model of unquantized weights from a quantized one, with the same function.

    .venv/bin/python benchmarks/regrid.py MODEL.gguf OUT.gguf

The columns of each matrix are multiplied by random factors, and the rows or norms before them are divided by the same,
so that the outputs stay the same, but the weights no longer lie on the grid of the types they were quantized to. A
comparison of types with this model as the base is fair: the original types have no advantage.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    reader = gguf.GGUFReader(source)
    weights = {
        tensor.name: numpy.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), numpy.float32).copy()
        for tensor in reader.tensors
    }
    architecture = reader.fields["general.architecture"].contents()
    heads, kv_heads, layers = (
        int(reader.fields[f"{architecture}.{key}"].contents())
        for key in ("attention.head_count", "attention.head_count_kv", "block_count")
    )
    random = numpy.random.default_rng(0)
    for layer in range(layers):
        regrid_layer(weights, f"blk.{layer}.", heads // kv_heads, kv_heads, random)
    write(reader, weights, architecture, target)


def regrid_layer(
    weights: dict[str, numpy.ndarray], at: str, group: int, kv_heads: int, random: numpy.random.Generator
) -> None:
    def factors(count: int) -> numpy.ndarray:
        return numpy.exp2(random.uniform(-0.5, 0.5, count)).astype(numpy.float32)

    for norm, matrices in (("attn_norm", ("attn_q", "attn_k", "attn_v")), ("ffn_norm", ("ffn_gate", "ffn_up"))):
        scale = factors(len(weights[f"{at}{norm}.weight"]))
        weights[f"{at}{norm}.weight"] /= scale
        for name in matrices:
            weights[f"{at}{name}.weight"] *= scale
    scale = factors(weights[f"{at}ffn_down.weight"].shape[1])
    weights[f"{at}ffn_down.weight"] *= scale
    weights[f"{at}ffn_up.weight"] /= scale[:, None]
    scale = factors(weights[f"{at}attn_v.weight"].shape[0])
    weights[f"{at}attn_v.weight"] /= scale[:, None]
    weights[f"{at}attn_v.bias"] /= scale
    per_query_head = scale.reshape(kv_heads, -1).repeat(group, axis=0).reshape(-1)
    weights[f"{at}attn_output.weight"] *= per_query_head


def write(reader: gguf.GGUFReader, weights: dict[str, numpy.ndarray], architecture: str, target: Path) -> None:
    writer = gguf.GGUFWriter(target, architecture)
    for name, part in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = part.types[1] if len(part.types) > 1 else None
        writer.add_key_value(name, part.contents(), part.types[0], sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
