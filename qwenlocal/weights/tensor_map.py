"""
The mapping of a checkpoint's tensors to the tensors of a GGUF file.

The tables are those of llama.cpp (conversion/qwen.py, src/models/qwen2.cpp, src/models/qwen2moe.cpp). Every stored
tensor is mapped, dropped for a stated reason, or an error.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwenlocal.errors import BadCheckpoint
from qwenlocal.weights.architecture import ExpertDims, Hyperparameters
from qwenlocal.weights.assumptions import Assumption, EqualTensors
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.checkpoint_tensors import EMBEDDING, OUTPUT, CheckpointTensors, file_rows
from qwenlocal.weights.packed_rows import unify_types
from qwenlocal.weights.quant_mix import layer_order
from qwenlocal.weights.row_source import RowSource, SourceTensor
from qwenlocal.weights.safetensors import StoredTensor
from qwenlocal.weights.tensor_values import have_same_bytes, have_same_samples


def map_tensors(
    checkpoint: Checkpoint, model: Hyperparameters, *, keep_tied_output: bool
) -> tuple[list[SourceTensor], list[str], list[Assumption]]:
    """
    Return the tensors of the GGUF file in llama.cpp's order, by layer, then by name, and sentences for display.

    If the checkpoint is still on a hub, the assumptions that its weights must fulfil follow.

    An output matrix that is tied to the embeddings but stored as well is dropped if it is equal (a fifth of a 0.5B
    file), unless `keep_tied_output`. If it differs it is used, as transformers 5 (modeling_utils.py:
    tie_weights) and llama.cpp's converter do.

    Raises
    ------
    BadCheckpoint: a tensor is missing, unknown, or has another shape than config.json implies.
    UnsupportedCheckpoint: llama.cpp's graph has no such tensor, or the type of one is not supported.
    """
    stored = CheckpointTensors(checkpoint)
    mapped = [*_whole_model(stored, model, keep_tied_output=keep_tied_output)]
    for layer in range(model.layers):
        mapped += _attention(stored, model, layer)
        source, target = f"layers.{layer}.mlp.", f"blk.{layer}."
        if model.experts:
            mapped += _moe(stored, model.experts, source, target, model.width)
        else:
            mapped += _feed_forward(stored, source, target, "", model.width, model.feed_forward)
    stored.check_nothing_left()
    return sorted(mapped, key=lambda tensor: layer_order(tensor.name)), stored.describe(), stored.assumptions


def _whole_model(
    stored: CheckpointTensors, model: Hyperparameters, *, keep_tied_output: bool
) -> Iterator[SourceTensor]:
    is_in_output = model.is_tied and stored.has(OUTPUT) and not stored.has(EMBEDDING)  # saved under the other name
    embedding = stored.take_vocabulary(OUTPUT if is_in_output else EMBEDDING, model.vocab_size, model.width)
    table = [file_rows(embedding, 0, model.vocab_size)]
    shape = (model.width, model.vocab_size)
    yield SourceTensor("token_embd.weight", shape, table)
    yield stored.vector("output_norm.weight", "norm.weight", model.width)
    if stored.has(OUTPUT):
        output = stored.take_vocabulary(OUTPUT, model.vocab_size, model.width)
        is_copy = model.is_tied and _have_same_values(stored, output, embedding)
        if is_copy and not keep_tied_output and not model.experts:
            stored.dropped["tied to the embeddings and equal to them"] = [output]
            if not stored.has_weights:
                stored.assumptions.append(EqualTensors(output, embedding))
            return
        if model.is_tied and not is_copy:
            stored.notes.append(
                "config.json ties the output matrix to the embeddings (tie_word_embeddings), but “lm_head.weight” "
                "differs from them and is used, as transformers 5 does."
            )
        yield SourceTensor("output.weight", shape, [file_rows(output, 0, model.vocab_size)])
    elif stored.has("lm_head.qweight"):
        yield stored.matrix("output", "lm_head", model.vocab_size, model.width)
    elif model.is_tied and model.experts:  # llama.cpp's loader of this architecture requires it
        yield SourceTensor("output.weight", shape, table)
    elif not model.is_tied and not model.is_bare:  # those need none: llama.cpp uses the embeddings
        raise BadCheckpoint(
            stored.folder,
            "“lm_head.weight” is missing, and “tie_word_embeddings” is not set",
            hint="If the model was trained with tied embeddings, set “tie_word_embeddings” to true in config.json. "
            "Otherwise the checkpoint is incomplete: download or save it again.",
        )


def _have_same_values(stored: CheckpointTensors, output: StoredTensor, embedding: StoredTensor) -> bool:
    if output.dtype != embedding.dtype:
        return False
    if stored.has_weights:
        return have_same_bytes(output, embedding)
    return stored.samples is None or have_same_samples(output, embedding, stored.samples)


def _attention(stored: CheckpointTensors, model: Hyperparameters, layer: int) -> Iterator[SourceTensor]:
    source, target = f"layers.{layer}.", f"blk.{layer}."
    head_dim = model.width // model.heads
    yield stored.vector(f"{target}attn_norm.weight", f"{source}input_layernorm.weight", model.width)
    yield stored.vector(f"{target}ffn_norm.weight", f"{source}post_attention_layernorm.weight", model.width)
    for letter, rows in (("q", model.width), ("k", model.kv_heads * head_dim), ("v", model.kv_heads * head_dim)):
        yield stored.matrix(f"{target}attn_{letter}", f"{source}self_attn.{letter}_proj", rows, model.width)
        if model.has_qkv_bias:
            yield stored.vector(f"{target}attn_{letter}.bias", f"{source}self_attn.{letter}_proj.bias", rows)
    yield stored.matrix(f"{target}attn_output", f"{source}self_attn.o_proj", model.width, model.width)


def _feed_forward(
    stored: CheckpointTensors, source: str, target: str, ending: str, width: int, inner: int
) -> Iterator[SourceTensor]:
    yield stored.matrix(f"{target}ffn_gate{ending}", f"{source}gate_proj", inner, width)
    yield stored.matrix(f"{target}ffn_up{ending}", f"{source}up_proj", inner, width)
    yield stored.matrix(f"{target}ffn_down{ending}", f"{source}down_proj", width, inner)


def _moe(
    stored: CheckpointTensors, experts: ExpertDims, source: str, target: str, width: int
) -> Iterator[SourceTensor]:
    yield stored.matrix(f"{target}ffn_gate_inp", f"{source}gate", experts.count, width, keep_f32=True)
    yield stored.matrix(f"{target}ffn_gate_inp_shexp", f"{source}shared_expert_gate", 1, width, keep_f32=True)
    yield from _feed_forward(stored, f"{source}shared_expert.", target, "_shexp", width, experts.shared_width)
    gate, up, down = (
        _fused_experts(stored, experts, source, width)
        if stored.has(f"{source}experts.gate_up_proj")
        else _separate_experts(stored, experts, source, width)
    )
    inner, count = experts.width, experts.count
    yield SourceTensor(f"{target}ffn_gate_exps.weight", (width, inner, count), gate)
    yield SourceTensor(f"{target}ffn_up_exps.weight", (width, inner, count), up)
    yield SourceTensor(f"{target}ffn_down_exps.weight", (inner, width, count), down)


def _separate_experts(stored: CheckpointTensors, experts: ExpertDims, source: str, width: int) -> list[list[RowSource]]:
    """Take the matrices of transformers 4: three per expert."""
    shapes = {"gate": (experts.width, width), "up": (experts.width, width), "down": (width, experts.width)}
    return [
        unify_types(
            [stored.matrix_rows(f"{source}experts.{number}.{kind}_proj", *shape) for number in range(experts.count)]
        )
        for kind, shape in shapes.items()
    ]


def _fused_experts(stored: CheckpointTensors, experts: ExpertDims, source: str, width: int) -> list[list[RowSource]]:
    """Take the tensors of transformers 5: two for all experts; in one, each expert's gate is above its up matrix."""
    inner = experts.width
    gate_up = stored.take(f"{source}experts.gate_up_proj", experts.count, 2 * inner, width)
    down = stored.take(f"{source}experts.down_proj", experts.count, width, inner)
    return [
        [file_rows(gate_up, expert * 2 * inner, inner) for expert in range(experts.count)],
        [file_rows(gate_up, expert * 2 * inner + inner, inner) for expert in range(experts.count)],
        [file_rows(down, expert * width, width) for expert in range(experts.count)],
    ]
