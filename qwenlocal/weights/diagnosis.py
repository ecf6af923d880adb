"""
What is wrong with a GGUF file of a Qwen model, and how it can be put right.

Old files have old faults: Qwen's own first ones lack the rope base (llama.cpp then takes 10,000 and the text falls
apart after some 2,000 tokens), converters before mid-2024 marked padding ids so that a typed "[PAD5]" becomes one, and
many carry the tied head twice. `examine_file` finds these and damage; `repair.py` writes a file without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenlocal import ggml
from qwenlocal.jinja import compile_template, find_template_error
from qwenlocal.weights import gguf
from qwenlocal.weights.header import Header, Tensor, read_pairs, tensor_bytes, tensor_type_name
from qwenlocal.weights.kinds import NORMAL, PADDING, UNUSED, USER_DEFINED
from qwenlocal.weights.numbers import place_of, read_rows, same_bytes
from qwenlocal.weights.parts import Located, Parts, read_parts

QWEN = ("qwen2", "qwen2moe")
_NO_TOKEN = 0xFFFFFFFF  # llama.cpp's -1
_END_OF_TURN, _END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
_CHUNK = 1 << 22
_SAMPLE = 64  # rows of a matrix that are looked at closely

# rope_theta of the published checkpoints (their config.json): 1e6, only the 4B, 2,560 wide, has 5e6.
_ROPE_BASE, _ROPE_BASE_4B, _WIDTH_4B = 1_000_000.0, 5_000_000.0, 2560


@dataclass(frozen=True)
class Finding:
    """
    Something wrong. `is_serious`: the model answers wrongly or not at all.

    `pairs` puts it right with values of the header; `drops` names a tensor that is not needed.
    """

    what: str
    is_serious: bool
    pairs: Mapping[str, gguf.Encoded] = field(default_factory=dict)
    drops: str = ""

    @property
    def can_be_fixed(self) -> bool:
        """Whether `repair.py` can put it right."""
        return bool(self.pairs or self.drops)


@dataclass(frozen=True)
class Checkup:
    """A file, what it says of itself, and what is wrong with it; of a split model, all files taken together."""

    path: Path
    header: Header
    findings: Sequence[Finding]
    parts: Parts

    @property
    def fixable(self) -> list[Finding]:
        """Those that can be put right."""
        return [finding for finding in self.findings if finding.can_be_fixed]


Report = Callable[[int, int], object]


def missing_rope_base(metadata: Mapping[str, Any]) -> float | None:
    """
    The rope base of a Qwen model whose file does not state it; None where it does, or where nothing is missing.

    `missing_rope_base({"general.architecture": "qwen2"})` is 1000000.0.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in QWEN or f"{architecture}.rope.freq_base" in metadata:
        return None
    return _ROPE_BASE_4B if metadata.get(f"{architecture}.embedding_length") == _WIDTH_4B else _ROPE_BASE


def examine_file(path: Path, report: Report = lambda done, all: None, *, weights: bool = True) -> Checkup:
    """
    Look at a GGUF file; with `weights`, at every number in it, of which `report` gets bytes done and altogether.

    Raises
    ------
    BadWeights: it is not a GGUF file, or is cut off.
    """
    parts = read_parts(path)
    header = parts.header
    findings = [*_header_findings(header, read_pairs(parts.paths[0]))]
    findings += _head_findings(header.architecture, parts)
    if weights:
        findings += _weight_findings(parts, report)
    return Checkup(path, header, sorted(findings, key=lambda finding: not finding.is_serious), parts)


# --- the header


def _header_findings(header: Header, pairs: Mapping[str, gguf.Encoded]) -> Iterator[Finding]:
    base = missing_rope_base(header.metadata)
    if base is not None:
        yield Finding(
            f"The rope base is missing; llama.cpp would take 10,000 where Qwen's models of this width were trained "
            f"with {base:,.0f}, and long texts fall apart.",
            True,
            {f"{header.architecture}.rope.freq_base": gguf.f32(base)},
        )
    yield from _vocabulary_findings(header, pairs)
    yield from _template_findings(pairs)
    if header.architecture in QWEN:
        yield from _contract_findings(header)


def _vocabulary_findings(header: Header, pairs: Mapping[str, gguf.Encoded]) -> Iterator[Finding]:
    tokens, kinds = _list(pairs, "tokenizer.ggml.tokens", str), _list(pairs, "tokenizer.ggml.token_type", int)
    if not tokens:
        yield Finding("It has no vocabulary: it cannot read or write text.", True)
        return
    rows = next(
        (t.shape[1] for t in header.tensors if t.name == "token_embd.weight" and len(t.shape) == 2), len(tokens)
    )
    if rows != len(tokens):
        yield Finding(f"The vocabulary has {len(tokens):,} tokens, the embeddings have {rows:,} rows.", True)
    if kinds and len(kinds) != len(tokens):
        yield Finding(f"The vocabulary has {len(tokens):,} tokens and {len(kinds):,} kinds of them.", True)
        return
    reachable = [
        number
        for number, kind in enumerate(kinds)
        if kind in (NORMAL, USER_DEFINED) and PADDING.fullmatch(tokens[number])
    ]
    if reachable:
        hidden = list(kinds)
        for number in reachable:
            hidden[number] = UNUSED
        yield Finding(
            f"{len(reachable)} padding ids can be reached by typing them: “{tokens[reachable[0]]}” becomes a "
            "token that was never trained.",
            False,
            {"tokenizer.ggml.token_type": gguf.i32s(hidden)},
        )
    yield from _special_findings(tokens, pairs)
    ordinary = list(_ordinary_end_findings(tokens, kinds, pairs))
    yield from ordinary or _end_findings(tokens, pairs)


def _special_findings(tokens: Sequence[str], pairs: Mapping[str, gguf.Encoded]) -> Iterator[Finding]:
    """Ids of special tokens that no token has."""
    for key in pairs:
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            number = gguf.decode(pairs[key])
            if isinstance(number, int) and number != _NO_TOKEN and not 0 <= number < len(tokens):
                role = key.removeprefix("tokenizer.ggml.").removesuffix("_token_id")
                right = _usual_end(tokens) if role == "eos" else None
                fix = {key: gguf.u32(right)} if right is not None else {}
                yield Finding(
                    f"Its {role} token is {number:,}, but the vocabulary ends at {len(tokens) - 1:,}.", True, fix
                )


def _usual_end(tokens: Sequence[str]) -> int | None:
    """The token with which Qwen's models end a turn, or else a text."""
    return next((tokens.index(end) for end in (_END_OF_TURN, _END_OF_TEXT) if end in tokens), None)


def _ordinary_end_findings(
    tokens: Sequence[str], kinds: Sequence[int], pairs: Mapping[str, gguf.Encoded]
) -> Iterator[Finding]:
    """An end that is a word like any other: answers break off where it should stand."""
    for role in ("eos", "eot"):
        key = f"tokenizer.ggml.{role}_token_id"
        number = gguf.decode(pairs[key]) if key in pairs else None
        if not isinstance(number, int) or not 0 <= number < len(kinds) or kinds[number] != NORMAL:
            continue
        right = _usual_end(tokens)
        yield Finding(
            f"Its {role} token is “{tokens[number]}”, a token like any other: answers break off before it.",
            True,
            {key: gguf.u32(right)} if right is not None else {},
        )


def _end_findings(tokens: Sequence[str], pairs: Mapping[str, gguf.Encoded]) -> Iterator[Finding]:
    template = _text(pairs, "tokenizer.chat_template") or ""
    if _END_OF_TURN not in template or _END_OF_TURN not in tokens:
        return
    end = tokens.index(_END_OF_TURN)
    said = {
        role: gguf.decode(pairs[f"tokenizer.ggml.{role}_token_id"])
        for role in ("eos", "eot")
        if f"tokenizer.ggml.{role}_token_id" in pairs
    }
    if end in said.values():
        return
    eos = said.get("eos")
    name = tokens[eos] if isinstance(eos, int) and 0 <= eos < len(tokens) else "nothing"
    known = name in (_END_OF_TEXT, _END_OF_TURN)
    yield Finding(
        f"The chat template ends turns with {_END_OF_TURN}, the file names {name} as the end"
        + (" only; programs that go by the file talk on past their turn." if known else "."),
        False,
        {"tokenizer.ggml.eot_token_id": gguf.u32(end)},
    )


def _text(pairs: Mapping[str, gguf.Encoded], key: str) -> str | None:
    value = gguf.decode(pairs[key]) if key in pairs else None
    return value if isinstance(value, str) else None


def _list(pairs: Mapping[str, gguf.Encoded], key: str, kind: type) -> list[Any]:
    """A list of such values; empty where there is none, or another kind of value."""
    value = gguf.decode(pairs[key]) if key in pairs else None
    return value if isinstance(value, list) and all(type(each) is kind for each in value) else []


def _template_findings(pairs: Mapping[str, gguf.Encoded]) -> Iterator[Finding]:
    template = _text(pairs, "tokenizer.chat_template")
    if template is None:
        yield Finding("It has no chat template: programs must guess how turns are marked.", False)
    elif not template.strip():
        yield Finding("Its chat template is empty.", False)
    elif fault := find_template_error(template):
        yield Finding(f"Its chat template cannot be read ({fault}): chats are refused, --raw runs.", True)
    elif "messages" not in template:
        yield Finding("Its chat template never looks at the messages; it is not a template of turns.", False)
    elif forgotten := _forgotten_by(template):
        yield Finding(f"Its chat template does not show the model {forgotten}.", True)
    elif "add_generation_prompt" not in template and "<|im_start|>" in template:
        yield Finding("Its chat template cannot begin the assistant's turn (no add_generation_prompt).", False)


def _forgotten_by(template: str) -> str:
    """What of a short conversation a template leaves out; "" where all is there, or where it refuses to tell."""
    from jinja2 import TemplateError

    said = [("user", "qfirst"), ("assistant", "afirst"), ("user", "qlast")]
    messages = [{"role": role, "content": text} for role, text in said]
    try:
        text = compile_template(template).render(
            messages=messages, add_generation_prompt=True, bos_token="", eos_token="", tools=None
        )
    except (TemplateError, TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError, RecursionError):
        return ""
    if "qlast" not in text:
        return "the last question"
    return "" if "qfirst" in text and "afirst" in text else "what was said before the last question"


def _contract_findings(header: Header) -> Iterator[Finding]:
    """Every tensor that llama.cpp's loader asks for is there, in its shape (src/models/qwen2.cpp, qwen2moe.cpp)."""
    there = {tensor.name: tensor.shape for tensor in header.tensors}
    expected = set()
    for name, shape in _expected(header):
        expected.add(name)
        if name not in there:
            if name == "output.weight" and header.architecture == "qwen2":
                continue
            yield Finding(f"“{name}” is missing; llama.cpp will not load the file.", True)
            return
        if None not in shape and _trimmed(there[name]) != _trimmed(shape):
            yield Finding(f"“{name}” is {list(there[name])}; by the header it should be {list(shape)}.", True)
            return
    optional = re.compile(r"blk\.\d+\.attn_[qkv]\.bias|output\.bias|.*\.(scale|input_scale)|rope_freqs\.weight")
    strange = [name for name in there if name not in expected and not optional.fullmatch(name)]
    if strange:
        yield Finding(f"{len(strange)} tensors have no place in this architecture, “{strange[0]}” for example.", True)


def _trimmed(shape: Sequence[Any]) -> list[Any]:
    """A shape without ones at its end, which mean nothing to ggml."""
    found = list(shape)
    while len(found) > 1 and found[-1] == 1:
        found.pop()
    return found


def _expected(header: Header) -> Iterator[tuple[str, tuple[Any, ...]]]:
    def number(key: str, default: Any = None) -> Any:
        value = header.hyperparameter(key)
        return value if isinstance(value, int) else default

    width, heads = number("embedding_length"), number("attention.head_count")
    keys = width // heads * number("attention.head_count_kv", heads) if width and heads else None
    rows = next((t.shape[1] for t in header.tensors if t.name == "token_embd.weight" and len(t.shape) == 2), None)
    yield "token_embd.weight", (width, rows)
    yield "output.weight", (width, rows)
    yield "output_norm.weight", (width,)
    for layer in range(number("block_count", 0)):
        at = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            yield f"{at}{name}.weight", (width,)
        for name, size in (("attn_q", width), ("attn_k", keys), ("attn_v", keys), ("attn_output", width)):
            yield f"{at}{name}.weight", (width, size)
        yield from _expected_feed_forward(header.architecture, at, width, number)


def _expected_feed_forward(
    architecture: str, at: str, width: Any, number: Callable[..., Any]
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    inner = number("feed_forward_length")
    if architecture == "qwen2":
        for name, shape in (("gate", (width, inner)), ("up", (width, inner)), ("down", (inner, width))):
            yield f"{at}ffn_{name}.weight", shape
        return
    count, each = number("expert_count"), number("expert_feed_forward_length")
    shared = number("expert_shared_feed_forward_length", inner)
    yield f"{at}ffn_gate_inp.weight", (width, count)
    yield f"{at}ffn_gate_inp_shexp.weight", (width,)
    for name in ("gate", "up"):
        yield f"{at}ffn_{name}_exps.weight", (width, each, count)
        yield f"{at}ffn_{name}_shexp.weight", (width, shared)
    yield f"{at}ffn_down_exps.weight", (each, width, count)
    yield f"{at}ffn_down_shexp.weight", (shared, width)


# --- the weights


def _head_findings(architecture: str, parts: Parts) -> Iterator[Finding]:
    """A head that repeats the embeddings: the very bytes, or the same numbers in another type."""
    by_name = parts.by_name
    left, right = by_name.get("output.weight"), by_name.get("token_embd.weight")
    if architecture != "qwen2" or left is None or right is None or left.tensor.shape != right.tensor.shape:
        return
    head, table = left.tensor, right.tensor
    size = tensor_bytes(head) or 0
    if head.type == table.type:
        if same_bytes(place_of(*left), place_of(*right)):
            yield Finding(
                f"The head repeats the embeddings byte for byte ({size / 1e6:,.0f} MB for nothing).",
                False,
                drops="output.weight",
            )
    elif _are_alike(left, right):
        saved = min(size, tensor_bytes(table) or 0)
        yield Finding(
            f"The head repeats the embeddings in another type ({tensor_type_name(head.type)} and "
            f"{tensor_type_name(table.type)}). If the model's makers tied the two, its checkpoint converts to a file "
            f"{saved / 1e6:,.0f} MB smaller.",
            False,
        )


def _are_alike(one: Located, other: Located) -> bool:
    """Whether rows here and there over the matrices correlate by more than 0.98."""
    import numpy

    count = one.tensor.shape[1]
    rows = range(0, count, max(1, count // _SAMPLE))
    try:
        left, right = (numpy.stack([_row(*each, row) for row in rows]) for each in (one, other))
    except ValueError:
        return False
    if not (numpy.isfinite(left).all() and numpy.isfinite(right).all()) or not left.std() or not right.std():
        return False
    return bool(numpy.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.98)


def _row(path: Path, header: Header, tensor: Tensor, row: int) -> Any:
    kind = ggml.tensor_type_by_number(tensor.type)
    if kind is None:
        raise ValueError(tensor.type)
    offset = header.data_offset + tensor.offset + row * kind.row_bytes(tensor.shape[0])
    return next(read_rows(path, offset, kind, 1, tensor.shape[0]))


def _weight_findings(parts: Parts, report: Report) -> Iterator[Finding]:
    """NaN and infinite numbers; all-zero matrices, which damaged downloads leave behind."""
    import numpy

    total, done = sum(tensor_bytes(located.tensor) or 0 for located in parts.located), 0
    buffer = numpy.empty(_CHUNK, numpy.uint8)
    for path, header in zip(parts.paths, parts.headers, strict=True):
        with path.open("rb") as file:
            for tensor in header.tensors:
                kind, size = ggml.tensor_type_by_number(tensor.type), tensor_bytes(tensor)
                if kind is None or size is None:
                    yield Finding(f"“{tensor.name}” is of a type that is not known here ({tensor.type}).", True)
                    continue
                file.seek(header.data_offset + tensor.offset)
                wrong, all_zero = _scan(
                    file,
                    kind,
                    size,
                    buffer,
                    lambda count, before=done: report(before + count, total),  # type: ignore[misc]
                )
                done += size
                if wrong:
                    yield Finding(f"“{tensor.name}” has {wrong:,} numbers that are NaN or infinite.", True)
                if all_zero and len(tensor.shape) > 1:
                    yield Finding(f"“{tensor.name}” is nothing but zeros; it was damaged or never finished.", True)


def _scan(
    file: Any, kind: ggml.TensorType, size: int, buffer: Any, report: Callable[[int], object]
) -> tuple[int, bool]:
    import numpy

    step = _CHUNK // kind.type_size * kind.type_size
    numbers = numpy.empty(step // kind.type_size * kind.block_size, numpy.float32)
    wrong, all_zero = 0, True
    for start in range(0, size, step):
        data = buffer[: min(step, size - start)]
        if file.readinto(data) != data.size:
            break
        all_zero = all_zero and not data.any()
        found = numbers[: data.size // kind.type_size * kind.block_size]
        try:
            ggml.dequantize(kind, data.ctypes.data, found.ctypes.data, found.size)
        except ValueError:
            return 0, False
        wrong += _not_finite(found)
        report(start + data.size)
    return wrong, all_zero


def _not_finite(numbers: Any) -> int:
    import numpy

    bits = numbers.view(numpy.uint32) & 0x7F800000
    return int((bits == 0x7F800000).sum()) if bits.size and int(bits.max()) == 0x7F800000 else 0
