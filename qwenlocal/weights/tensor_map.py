"""
The mapping of a checkpoint's tensors to the tensors of a GGUF file.

The tables are those of llama.cpp (conversion/qwen.py, src/models/qwen2.cpp, src/models/qwen2moe.cpp). Every stored
tensor is mapped, dropped for a stated reason, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwenlocal import ggml
from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import format_bytes, format_quantity
from qwenlocal.weights.architecture import ExpertDims, Hyperparameters
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion_plan import SourceTensor
from qwenlocal.weights.quant_mix import layer_order
from qwenlocal.weights.row_source import FileRows
from qwenlocal.weights.safetensors import StoredTensor
from qwenlocal.weights.tensor_values import have_same_bytes

_FLOAT_TYPES = {"F32", "F16", "BF16"}
_EMBEDDING, _OUTPUT = "embed_tokens.weight", "lm_head.weight"
_UNUSED = {  # by what their names match
    re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$"): "computed by llama.cpp itself",
    re.compile(r"^v_head\."): "a value head, which only training uses",
}


def map_tensors(
    checkpoint: Checkpoint, model: Hyperparameters, *, keep_tied_output: bool
) -> tuple[list[SourceTensor], list[str]]:
    """
    Return the tensors of the GGUF file in llama.cpp's order, by layer, then by name, and sentences for display.

    An output matrix that is tied to the embeddings but stored as well is dropped if it is equal (a fifth of a 0.5B
    file), unless `keep_tied_output`. If it differs it is used, as transformers 5 (modeling_utils.py:
    tie_weights) and llama.cpp's converter do.

    Raises
    ------
    BadCheckpoint: a tensor is missing, unknown, or has another shape than config.json implies.
    UnsupportedCheckpoint: llama.cpp's graph has no such tensor, or the type of one is not supported.
    """
    stored = _StoredTensors(checkpoint)
    mapped = [*_whole_model(stored, model, keep_tied_output=keep_tied_output)]
    for layer in range(model.layers):
        mapped += _attention(stored, model, layer)
        source, target = f"layers.{layer}.mlp.", f"blk.{layer}."
        if model.experts:
            mapped += _moe(stored, model.experts, source, target, model.width)
        else:
            mapped += _feed_forward(stored, source, target, "", model.width, model.feed_forward)
    stored.check_nothing_left()
    return sorted(mapped, key=lambda tensor: layer_order(tensor.name)), [*stored.notes, *stored.describe_dropped()]


class _StoredTensors:
    """
    The tensors of a checkpoint, each of which must be taken or dropped once.

    Their names begin with "model.", or do not, if the model was saved without its output matrix; transformers loads
    both, whatever config.json says.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self.has_weights = checkpoint.folder, checkpoint.has_weights
        self._left, self._checkpoint_notes = dict(checkpoint.tensors), checkpoint.notes
        self._prefix = "" if any(name.startswith("layers.") for name in self._left) else "model."
        self.dropped: dict[str, list[StoredTensor]] = {}  # by the reason
        self.notes: list[str] = []
        for name in list(self._left):
            if reason := next((reason for pattern, reason in _UNUSED.items() if pattern.search(name)), None):
                self.drop(name, reason)
            elif name.endswith("_proj.bias") and not re.search(r"self_attn\.[qkv]_proj\.bias$", name):
                self._drop_zero_bias(name)

    def has(self, name: str) -> bool:
        return self._full_name(name) in self._left

    def _full_name(self, name: str) -> str:
        return name if name == _OUTPUT else self._prefix + name

    def take(self, name: str, *shape: int) -> StoredTensor:
        full = self._full_name(name)
        tensor = self._left.pop(full, None)
        if tensor is None:
            raise BadCheckpoint(self.folder, f"“{full}” is missing", hint=" ".join(self._checkpoint_notes))
        if tensor.shape != shape:
            raise BadCheckpoint(
                tensor.file, f"“{full}” has the shape {list(tensor.shape)}; config.json implies {list(shape)}"
            )
        if tensor.dtype not in _FLOAT_TYPES:
            raise UnsupportedCheckpoint(
                tensor.file, f"“{full}” has the type {tensor.dtype}; only f32, f16 and bf16 can be converted"
            )
        return tensor

    def take_vocabulary(self, name: str, rows: int, columns: int) -> StoredTensor:
        """Take a matrix with a row for each token."""
        stored = self._left.get(self._full_name(name))
        if stored and len(stored.shape) == 2 and stored.shape != (rows, columns) and stored.shape[1] == columns:
            raise BadCheckpoint(
                self.folder / "config.json",
                f"“vocab_size” is {rows:,}, but “{stored.name}” has {format_quantity(stored.shape[0], 'row')}",
                hint=f"If config.json is older than the weights, set “vocab_size” to {stored.shape[0]} in it.",
            )
        return self.take(name, rows, columns)

    def matrix(self, target: str, source: str, rows: int, columns: int, *, keep_f32: bool = False) -> SourceTensor:
        tensor = self.take(f"{source}.weight", rows, columns)
        return SourceTensor(f"{target}.weight", (columns, rows), [_rows(tensor, 0, rows)], keep_f32)

    def vector(self, target: str, source: str, size: int) -> SourceTensor:
        return SourceTensor(target, (size,), [_rows(self.take(source, size), 0, 1)], keep_f32=True)

    def drop(self, name: str, reason: str) -> None:
        self.dropped.setdefault(reason, []).append(self._left.pop(name))

    def describe_dropped(self) -> list[str]:
        """Return one sentence per reason, not per tensor."""
        return [
            f"Left out {group[0].name if len(group) == 1 else f'{len(group)} tensors'} "
            f"({format_bytes(sum(tensor.size for tensor in group))}): {reason}."
            for reason, group in self.dropped.items()
        ]

    def _drop_zero_bias(self, name: str) -> None:
        tensor = self._left[name]
        if self.has_weights and not _is_zero(tensor):
            raise UnsupportedCheckpoint(
                tensor.file, f"“{name}” is not zero, but neither Qwen1.5 nor llama.cpp has this bias"
            )
        self.drop(name, "a bias that is all zeros")

    def check_nothing_left(self) -> None:
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ", ".join(f"“{name}”" for name in names[:3])
            raise BadCheckpoint(
                self._left[names[0]].file,
                f"it contains tensors that this architecture does not have: {shown}{more}",
                hint="Convert an unmodified checkpoint, without adapters or added layers.",
            )


def _is_zero(tensor: StoredTensor) -> bool:
    import numpy

    return not (tensor.size and numpy.memmap(tensor.file, numpy.uint8, "r", tensor.offset, (tensor.size,)).any())


def _rows(tensor: StoredTensor, first: int, count: int) -> FileRows:
    """Describe `count` rows of a stored matrix (or one of several stacked matrices) from `first` on."""
    kind, columns = ggml.tensor_type(tensor.dtype.lower()), tensor.shape[-1]
    return FileRows(tensor.file, tensor.offset + first * kind.row_bytes(columns), count, columns, kind)


def _whole_model(stored: _StoredTensors, model: Hyperparameters, *, keep_tied_output: bool) -> Iterator[SourceTensor]:
    is_in_output = model.is_tied and stored.has(_OUTPUT) and not stored.has(_EMBEDDING)  # saved under the other name
    embedding = stored.take_vocabulary(_OUTPUT if is_in_output else _EMBEDDING, model.vocab_size, model.width)
    table = [_rows(embedding, 0, model.vocab_size)]
    shape = (model.width, model.vocab_size)
    yield SourceTensor("token_embd.weight", shape, table)
    yield stored.vector("output_norm.weight", "norm.weight", model.width)
    if stored.has(_OUTPUT):
        output = stored.take_vocabulary(_OUTPUT, model.vocab_size, model.width)
        is_copy = model.is_tied and (not stored.has_weights or _have_same_values(output, embedding))
        if is_copy and not keep_tied_output and not model.experts:
            stored.dropped["tied to the embeddings and equal to them"] = [output]
            return
        if model.is_tied and not is_copy:
            stored.notes.append(
                "config.json ties the output matrix to the embeddings (tie_word_embeddings), but “lm_head.weight” "
                "differs from them and is used, as transformers 5 does."
            )
        yield SourceTensor("output.weight", shape, [_rows(output, 0, model.vocab_size)])
    elif model.is_tied and model.experts:  # llama.cpp's loader of this architecture requires it
        yield SourceTensor("output.weight", shape, table)
    elif not model.is_tied and not model.is_bare:  # those need none: llama.cpp uses the embeddings
        raise BadCheckpoint(
            stored.folder,
            "“lm_head.weight” is missing, and “tie_word_embeddings” is not set",
            hint="If the model was trained with tied embeddings, set “tie_word_embeddings” to true in config.json. "
            "Otherwise the checkpoint is incomplete: download or save it again.",
        )


def _have_same_values(output: StoredTensor, embedding: StoredTensor) -> bool:
    return output.dtype == embedding.dtype and have_same_bytes(output, embedding)


def _attention(stored: _StoredTensors, model: Hyperparameters, layer: int) -> Iterator[SourceTensor]:
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
    stored: _StoredTensors, source: str, target: str, ending: str, width: int, inner: int
) -> Iterator[SourceTensor]:
    yield stored.matrix(f"{target}ffn_gate{ending}", f"{source}gate_proj", inner, width)
    yield stored.matrix(f"{target}ffn_up{ending}", f"{source}up_proj", inner, width)
    yield stored.matrix(f"{target}ffn_down{ending}", f"{source}down_proj", width, inner)


def _moe(stored: _StoredTensors, experts: ExpertDims, source: str, target: str, width: int) -> Iterator[SourceTensor]:
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


def _separate_experts(stored: _StoredTensors, experts: ExpertDims, source: str, width: int) -> list[list[FileRows]]:
    """Take the matrices of transformers 4: three per expert."""
    shapes = {"gate": (experts.width, width), "up": (experts.width, width), "down": (width, experts.width)}
    return [
        [
            _rows(stored.take(f"{source}experts.{number}.{kind}_proj.weight", *shape), 0, shape[0])
            for number in range(experts.count)
        ]
        for kind, shape in shapes.items()
    ]


def _fused_experts(stored: _StoredTensors, experts: ExpertDims, source: str, width: int) -> list[list[FileRows]]:
    """Take the tensors of transformers 5: two for all experts; in one, each expert's gate is above its up matrix."""
    inner = experts.width
    gate_up = stored.take(f"{source}experts.gate_up_proj", experts.count, 2 * inner, width)
    down = stored.take(f"{source}experts.down_proj", experts.count, width, inner)
    return [
        [_rows(gate_up, expert * 2 * inner, inner) for expert in range(experts.count)],
        [_rows(gate_up, expert * 2 * inner + inner, inner) for expert in range(experts.count)],
        [_rows(down, expert * width, width) for expert in range(experts.count)],
    ]
