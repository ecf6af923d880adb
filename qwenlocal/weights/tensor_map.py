"""
Which tensor of a checkpoint goes where in a GGUF file.

The tables are those of llama.cpp (conversion/qwen.py, src/models/qwen2.cpp, src/models/qwen2moe.cpp). The world is
closed: every stored tensor is placed, dropped for a stated reason, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.weights.architecture import Experts, Hyperparameters
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.mix import by_layer
from qwenlocal.weights.numbers import Place, same_bytes
from qwenlocal.weights.safetensors import StoredTensor

_READABLE = {"F32", "F16", "BF16"}
_CHUNK = 1 << 20  # bytes looked at at once
_RECOMPUTED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Rows:
    """Rows of a stored matrix, one below the other: `count` of them from `first` on."""

    tensor: StoredTensor
    first: int
    count: int


@dataclass(frozen=True)
class Placed:
    """
    A tensor of the GGUF file: `shape` in ggml's order (fastest first), and the rows it consists of.

    `exact` ones stay float32 whatever the file's type: norms, biases, routers (llama.cpp, conversion/base.py:
    prepare_tensors).
    """

    name: str
    shape: tuple[int, ...]
    parts: Sequence[Rows]
    exact: bool

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return sum(part.count for part in self.parts) * self.shape[0]


@dataclass(frozen=True)
class Dropped:
    """A stored tensor that the file does not need."""

    name: str
    reason: str
    size: int


@dataclass(frozen=True)
class Placement:
    """Where every tensor of a checkpoint goes."""

    tensors: Sequence[Placed]
    dropped: Sequence[Dropped]


def place_tensors(checkpoint: Checkpoint, model: Hyperparameters, *, keep_tied_head: bool = False) -> Placement:
    """
    Where each stored tensor goes, in llama.cpp's order: by layer, then by name.

    A head that is tied to the embeddings and stored all the same is dropped if it is equal (a fifth of a 0.5B file),
    unless `keep_tied_head`.

    Raises
    ------
    BadCheckpoint: a tensor is missing, unknown, or not of the shape that the config says.
    UnsupportedCheckpoint: a tensor has no place in llama.cpp's graph.
    """
    stored = _Stored(checkpoint, "" if model.bare else "model.")
    placed = [*_whole_model(stored, model, keep_tied_head=keep_tied_head)]
    for layer in range(model.layers):
        placed += _attention(stored, model, layer)
        placed += _mixture(stored, model, model.experts, layer) if model.experts else _dense(stored, model, layer)
    stored.check_nothing_left()
    return Placement(sorted(placed, key=lambda tensor: by_layer(tensor.name)), stored.dropped)


class _Stored:
    """The tensors of a checkpoint, each taken once."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.folder, self._prefix, self.has_weights = checkpoint.folder, prefix, checkpoint.has_weights
        self._left = dict(checkpoint.tensors)
        self.dropped: list[Dropped] = []
        for name in list(self._left):
            if name.endswith(_RECOMPUTED):
                self.drop(name, "computed anew by llama.cpp")
            elif name.endswith("_proj.bias") and not re.search(r"self_attn\.[qkv]_proj\.bias$", name):
                self._drop_zero_bias(name)

    def has(self, name: str, *, prefix: str | None = None) -> bool:
        return (self._prefix if prefix is None else prefix) + name in self._left

    def take(self, name: str, *shape: int, prefix: str | None = None) -> StoredTensor:
        full = (self._prefix if prefix is None else prefix) + name
        tensor = self._left.pop(full, None)
        if tensor is None:
            raise BadCheckpoint(self.folder, f"“{full}” is missing")
        if tensor.shape != shape:
            raise BadCheckpoint(
                tensor.file, f"“{full}” is {list(tensor.shape)}; by config.json it should be {list(shape)}"
            )
        if tensor.dtype not in _READABLE:
            raise UnsupportedCheckpoint(
                tensor.file, f"“{full}” is of type {tensor.dtype}; plain f32, f16 and bf16 are converted"
            )
        return tensor

    def matrix(self, target: str, source: str, rows: int, columns: int, *, exact: bool = False) -> Placed:
        tensor = self.take(f"{source}.weight", rows, columns)
        return Placed(f"{target}.weight", (columns, rows), [Rows(tensor, 0, rows)], exact)

    def vector(self, target: str, source: str, size: int) -> Placed:
        return Placed(target, (size,), [Rows(self.take(source, size), 0, 1)], exact=True)

    def drop(self, name: str, reason: str) -> None:
        self.dropped.append(Dropped(name, reason, self._left.pop(name).size))

    def _drop_zero_bias(self, name: str) -> None:
        tensor = self._left[name]
        if self.has_weights and not _is_zero(tensor):
            raise UnsupportedCheckpoint(
                tensor.file, f"“{name}” is not zero; Qwen1.5 has no such bias, nor has llama.cpp"
            )
        self.drop(name, "a bias of nothing but zeros")

    def check_nothing_left(self) -> None:
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ", ".join(f"“{name}”" for name in names[:3])
            raise BadCheckpoint(
                self._left[names[0]].file,
                f"it holds what this architecture does not have: {shown}{more}",
                hint="An adapter, or layers that somebody added? Only plain checkpoints are converted.",
            )


def _is_zero(tensor: StoredTensor) -> bool:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.size
        while left:
            data = file.read(min(left, _CHUNK))
            if not data or any(data):
                return False
            left -= len(data)
    return True


def _whole_model(stored: _Stored, model: Hyperparameters, *, keep_tied_head: bool) -> Iterator[Placed]:
    embedding = stored.take("embed_tokens.weight", model.vocabulary, model.width)
    table = [Rows(embedding, 0, model.vocabulary)]
    shape = (model.width, model.vocabulary)
    yield Placed("token_embd.weight", shape, table, exact=False)
    yield stored.vector("output_norm.weight", "norm.weight", model.width)
    if model.bare:
        return  # llama.cpp takes the embeddings for the head
    if stored.has("lm_head.weight", prefix=""):
        head = stored.take("lm_head.weight", model.vocabulary, model.width, prefix="")
        if model.tied and not keep_tied_head and not model.experts:
            if stored.has_weights:
                _check_equal(head, embedding)
            stored.dropped.append(Dropped(head.name, "the same as the embeddings, to which it is tied", head.size))
        else:
            yield Placed("output.weight", shape, [Rows(head, 0, model.vocabulary)], exact=False)
    elif not model.tied:
        raise BadCheckpoint(stored.folder, "“lm_head.weight” is missing, and config.json does not say that it is tied")
    elif model.experts:
        yield Placed("output.weight", shape, table, exact=False)  # llama.cpp's loader of this architecture asks for it


def _check_equal(head: StoredTensor, embedding: StoredTensor) -> None:
    places = (Place(tensor.file, tensor.offset, tensor.size) for tensor in (head, embedding))
    if head.dtype == embedding.dtype and same_bytes(*places):
        return
    raise BadCheckpoint(
        head.file,
        "config.json ties the head to the embeddings, but another “lm_head.weight” is stored",
        hint="Which is meant? For the stored one, set “tie_word_embeddings” to false in config.json.",
    )


def _attention(stored: _Stored, model: Hyperparameters, layer: int) -> Iterator[Placed]:
    source, target = f"layers.{layer}.", f"blk.{layer}."
    head = model.width // model.heads
    yield stored.vector(f"{target}attn_norm.weight", f"{source}input_layernorm.weight", model.width)
    yield stored.vector(f"{target}ffn_norm.weight", f"{source}post_attention_layernorm.weight", model.width)
    for letter, rows in (("q", model.width), ("k", model.kv_heads * head), ("v", model.kv_heads * head)):
        yield stored.matrix(f"{target}attn_{letter}", f"{source}self_attn.{letter}_proj", rows, model.width)
        if model.biased:
            yield stored.vector(f"{target}attn_{letter}.bias", f"{source}self_attn.{letter}_proj.bias", rows)
    yield stored.matrix(f"{target}attn_output", f"{source}self_attn.o_proj", model.width, model.width)


def _dense(stored: _Stored, model: Hyperparameters, layer: int) -> Iterator[Placed]:
    yield from _feed_forward(stored, f"layers.{layer}.mlp.", f"blk.{layer}.", "", model.width, model.feed_forward)


def _feed_forward(stored: _Stored, source: str, target: str, ending: str, width: int, inner: int) -> Iterator[Placed]:
    yield stored.matrix(f"{target}ffn_gate{ending}", f"{source}gate_proj", inner, width)
    yield stored.matrix(f"{target}ffn_up{ending}", f"{source}up_proj", inner, width)
    yield stored.matrix(f"{target}ffn_down{ending}", f"{source}down_proj", width, inner)


def _mixture(stored: _Stored, model: Hyperparameters, experts: Experts, layer: int) -> Iterator[Placed]:
    source, target, width = f"layers.{layer}.mlp.", f"blk.{layer}.", model.width
    yield stored.matrix(f"{target}ffn_gate_inp", f"{source}gate", experts.count, width, exact=True)
    yield stored.matrix(f"{target}ffn_gate_inp_shexp", f"{source}shared_expert_gate", 1, width, exact=True)
    yield from _feed_forward(stored, f"{source}shared_expert.", target, "_shexp", width, experts.shared_width)
    gate, up, down = (
        _fused_experts(stored, experts, source, width)
        if stored.has(f"{source}experts.gate_up_proj")
        else _separate_experts(stored, experts, source, width)
    )
    inner, count = experts.width, experts.count
    yield Placed(f"{target}ffn_gate_exps.weight", (width, inner, count), gate, exact=False)
    yield Placed(f"{target}ffn_up_exps.weight", (width, inner, count), up, exact=False)
    yield Placed(f"{target}ffn_down_exps.weight", (inner, width, count), down, exact=False)


def _separate_experts(stored: _Stored, experts: Experts, source: str, width: int) -> list[list[Rows]]:
    """transformers 4: a matrix each."""
    found = []
    for kind, rows, columns in (
        ("gate", experts.width, width),
        ("up", experts.width, width),
        ("down", width, experts.width),
    ):
        names = [f"{source}experts.{number}.{kind}_proj.weight" for number in range(experts.count)]
        found.append([Rows(stored.take(name, rows, columns), 0, rows) for name in names])
    return found


def _fused_experts(stored: _Stored, experts: Experts, source: str, width: int) -> list[list[Rows]]:
    """transformers 5: one tensor for all experts, in which each one's gate stands above its up."""
    inner = experts.width
    both = stored.take(f"{source}experts.gate_up_proj", experts.count, 2 * inner, width)
    down = stored.take(f"{source}experts.down_proj", experts.count, width, inner)
    return [
        [Rows(both, expert * 2 * inner, inner) for expert in range(experts.count)],
        [Rows(both, expert * 2 * inner + inner, inner) for expert in range(experts.count)],
        [Rows(down, expert * width, width) for expert in range(experts.count)],
    ]
