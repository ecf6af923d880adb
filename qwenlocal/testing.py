"""
Stand-ins for tests, ours and yours: models of a few hundred kilobytes that the real llama.cpp loads in milliseconds.

`write_model(path, says="abc")` writes a model that answers "abc" to everything; `write_model(path)` one with random
weights, whose answers depend on every token before them. `ScriptedGenerator` needs no llama.cpp at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.chat.template import CHATML
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import Prefill

if TYPE_CHECKING:
    import numpy

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WIDTH = 288  # of the embedding: room for a direction of its own for each of the 259 tokens


def byte_alphabet() -> list[str]:
    """
    The letters that byte-level BPE (GPT-2, encoder.py: `bytes_to_unicode`) uses for the bytes 0 to 255.

    Byte 65 is "A"; byte 32, a space, is "Ġ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def write_model(
    path: Path,
    *,
    says: str | None = None,
    ends: bool = True,
    seed: int = 0,
    layers: int = 2,
    context: int = 4096,
    template: str | None = CHATML,
    architecture: str = "qwen2",
    metadata: dict[str, Any] | None = None,
) -> Path:
    """
    Write a tiny qwen2 model to `path`: one token a byte, and Qwen's three control tokens.

    With `says`, the model continues a line break with that text, one byte after the other, then ends its turn, or
    begins again if not `ends`. No byte may come twice in it. Without, the weights are random, from `seed`.
    """
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    _add_vocabulary(writer, template)
    for name, data in _weights(says, ends, seed, layers):
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def _add_vocabulary(writer: Any, template: str | None) -> None:
    import gguf

    tokens = [*byte_alphabet(), *SPECIALS]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["ÿ ÿ"])  # llama.cpp wants one; this one never applies, no text holds the byte 0xFF
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _weights(says: str | None, ends: bool, seed: int, layers: int) -> Iterator[tuple[str, numpy.ndarray[Any, Any]]]:
    import numpy

    random = numpy.random.default_rng(seed)
    count = 256 + len(SPECIALS)

    def matrix(rows: int, columns: int) -> numpy.ndarray[Any, Any]:
        values: numpy.ndarray[Any, Any] = random.standard_normal((rows, columns)) / columns**0.5
        return values.astype(numpy.float32)

    scripted = says is not None
    embedding = numpy.eye(count, _WIDTH, dtype=numpy.float32) if scripted else matrix(count, _WIDTH) * 8
    yield "token_embd.weight", embedding
    yield "output_norm.weight", numpy.ones(_WIDTH, numpy.float32)
    yield "output.weight", _successors(says, ends, count) if says is not None else matrix(count, _WIDTH)
    for layer in range(layers):
        prefix = f"blk.{layer}."
        quiet = 0.0 if scripted else 1.0  # a scripted model's layers add nothing to what the embedding says
        yield prefix + "attn_norm.weight", numpy.ones(_WIDTH, numpy.float32)
        yield prefix + "ffn_norm.weight", numpy.ones(_WIDTH, numpy.float32)
        for name, rows in (("attn_q", _WIDTH), ("attn_k", _WIDTH // 2), ("attn_v", _WIDTH // 2)):
            yield f"{prefix}{name}.weight", matrix(rows, _WIDTH)
            yield f"{prefix}{name}.bias", numpy.zeros(rows, numpy.float32)
        yield prefix + "attn_output.weight", matrix(_WIDTH, _WIDTH) * numpy.float32(quiet * 8)
        yield prefix + "ffn_gate.weight", matrix(32, _WIDTH)
        yield prefix + "ffn_up.weight", matrix(32, _WIDTH)
        yield prefix + "ffn_down.weight", matrix(_WIDTH, 32) * numpy.float32(quiet * 8)


def _successors(says: str, ends: bool, count: int) -> numpy.ndarray[Any, Any]:
    """The output matrix in which every token points at its successor."""
    import numpy

    chain = [0x0A, *says.encode()]
    if len(set(chain)) != len(chain):
        raise ValueError("every byte of `says` must be another one, and none a line break")
    end = 256 + SPECIALS.index("<|im_end|>") if ends else chain[1]
    following = dict(zip(chain, [*chain[1:], end], strict=True))
    output = numpy.zeros((count, _WIDTH), numpy.float32)
    for before in range(count):
        output[following.get(before, chain[1]), before] = 2.0
    return output


class ScriptedGenerator:
    """
    Fulfils `engine.sequence.Generator` without a model: yields the tokens of `script`, one answer after the other.

    `asked` keeps the ids of every prompt.
    """

    def __init__(self, script: Sequence[Sequence[int]], *, n_ctx: int = 4096) -> None:
        self._script, self._n_ctx = list(script), n_ctx
        self._stop = self._full = False
        self.asked: list[list[int]] = []

    def generate(self, ids: Sequence[int], sampling: Sampling, *, limit: int) -> Iterator[Prefill | int]:
        self.asked.append(list(ids))
        self._stop = self._full = False
        yield Prefill(len(ids), len(ids), 0)
        for produced, token in enumerate(self._script[len(self.asked) - 1]):
            if self._stop or produced >= limit:
                return
            if len(ids) + produced >= self._n_ctx:
                self._full = True
                return
            yield token

    @property
    def is_full(self) -> bool:
        return self._full

    @property
    def was_stopped(self) -> bool:
        return self._stop

    def stop(self) -> None:
        self._stop = True
