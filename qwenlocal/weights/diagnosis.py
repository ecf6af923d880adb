"""
Checks of GGUF files of Qwen models: known faults, damage, and which of them can be repaired.

Old files have known faults: Qwen's own first ones lack the RoPE base (llama.cpp then uses 10,000, and answers degrade
after some 2,000 tokens), converters before mid-2024 marked padding tokens so that typing "[PAD5]" produces one, and
many store a tied output matrix twice. `repair.py` writes files without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenlocal.formatting import format_bytes, format_quantity, shorten
from qwenlocal.jinja import CompiledTemplate, TemplateFailure, TemplateRejection, find_template_error
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import (
    NORMAL,
    PADDING,
    UNUSED,
    USER_DEFINED,
    EncodedValue,
    Header,
    TensorInfo,
    decode_value,
    read_raw_metadata,
)
from qwenlocal.weights.load_errors import QWEN, find_load_errors, is_adapter_file
from qwenlocal.weights.row_source import FileRows
from qwenlocal.weights.split_model import SplitModel, read_split_model
from qwenlocal.weights.tensor_values import SCAN_SIZE, have_same_bytes, read_rows, scan_values

_TOKEN_ID = re.compile(r"tokenizer\.ggml\..*_token_id")
_END_KEYS = {role: f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot")}
_NO_TOKEN = 0xFFFFFFFF  # llama.cpp's -1
_END_OF_TURN, _END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
_SAMPLE_ROWS = 64  # rows of a matrix that are compared closely
_MIN_CORRELATION = 0.98

# rope_theta of the published checkpoints (in their config.json): 1e6; only the 4B, 2,560 wide, has 5e6.
_ROPE_BASE, _ROPE_BASE_4B, _WIDTH_4B = 1_000_000.0, 5_000_000.0, 2560


@dataclass(frozen=True)
class Finding:
    """
    A problem in a file. `is_serious`: the model gives wrong answers, or none.

    `fixed_keys` are metadata values that repair it; `drops` names a tensor that is not needed.
    """

    problem: str
    is_serious: bool
    fixed_keys: Mapping[str, EncodedValue] = field(default_factory=dict)
    drops: str = ""

    @property
    def can_be_fixed(self) -> bool:
        """True if `repair.py` can repair it."""
        return bool(self.fixed_keys or self.drops)


@dataclass(frozen=True)
class Diagnosis:
    """A file, its model, and its problems, serious ones first."""

    path: Path
    model: SplitModel
    findings: Sequence[Finding]

    @property
    def header(self) -> Header:
        """The header, with the tensors of all files of a split model."""
        return self.model.header

    @property
    def fixable(self) -> list[Finding]:
        """The problems that can be repaired."""
        return [finding for finding in self.findings if finding.can_be_fixed]


Report = Callable[[int, int], object]


def missing_rope_base(metadata: Mapping[str, Any]) -> float | None:
    """
    Return the RoPE base of a Qwen model whose file lacks it; None for other models, or if the file has it.

    `missing_rope_base({"general.architecture": "qwen2"})` is 1000000.0.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in QWEN or f"{architecture}.rope.freq_base" in metadata:
        return None
    return _ROPE_BASE_4B if metadata.get(f"{architecture}.embedding_length") == _WIDTH_4B else _ROPE_BASE


def diagnose_file(path: Path, report: Report = lambda done, total: None, *, weights: bool = True) -> Diagnosis:
    """
    Check a GGUF file; with `weights`, every value in it. `report` gets bytes read and the total.

    Raises
    ------
    BadWeights: it is not a GGUF file, or incomplete.
    """
    model = read_split_model(path)
    header = model.header
    pairs = read_raw_metadata(model.paths[0])
    load_errors = [
        Finding(f"llama.cpp cannot run the file: {error}.", True) for error in find_load_errors(model, pairs)
    ]
    findings = [*load_errors, *(() if is_adapter_file(model) else _header_findings(header, pairs))]
    if not load_errors:
        findings += _duplicate_output_findings(model)
    if weights:
        findings += _weight_findings(model, report)
    return Diagnosis(path, model, sorted(findings, key=lambda finding: not finding.is_serious))


# --- the header


def _header_findings(header: Header, pairs: Mapping[str, EncodedValue]) -> Iterator[Finding]:
    base = missing_rope_base(header.metadata)
    if base is not None:
        yield Finding(
            f"The RoPE base is missing. llama.cpp uses 10,000, but Qwen models of this width were trained with "
            f"{base:,.0f}, so long texts degrade.",
            True,
            {f"{header.architecture}.rope.freq_base": gguf_writer.f32(base)},
        )
    yield from _vocabulary_findings(header, pairs)
    yield from _template_findings(_chat_template(header))


def _vocabulary_findings(header: Header, pairs: Mapping[str, EncodedValue]) -> Iterator[Finding]:
    tokens = _decode_list(pairs, "tokenizer.ggml.tokens", str)
    token_types = _decode_list(pairs, "tokenizer.ggml.token_type", int)
    if not tokens:
        return
    if len(token_types) > len(tokens):
        size = format_quantity(len(tokens), "token")
        yield Finding(f"The vocabulary has {size}, but {format_quantity(len(token_types), 'token type')}.", False)
    typeable = [
        number
        for number, (token, token_type) in enumerate(zip(tokens, token_types, strict=False))
        if token_type in (NORMAL, USER_DEFINED) and PADDING.fullmatch(token)
    ]
    if typeable:
        fixed_types = list(token_types)
        for number in typeable:
            fixed_types[number] = UNUSED
        yield Finding(
            f"{format_quantity(len(typeable), 'padding token')} can be typed: the text "
            f"“{shorten(tokens[typeable[0]])}” becomes a token that was never trained.",
            False,
            {"tokenizer.ggml.token_type": gguf_writer.i32s(fixed_types)},
        )
    ids = {key: value for key, value in header.metadata.items() if _TOKEN_ID.fullmatch(key) and isinstance(value, int)}
    yield from _token_id_findings(tokens, ids)
    false_end = list(_false_end_findings(tokens, token_types, ids))
    yield from false_end or _end_of_turn_findings(tokens, ids, _chat_template(header) or "")


def _token_id_findings(tokens: Sequence[str], ids: Mapping[str, int]) -> Iterator[Finding]:
    """Find ids of special tokens that are outside of the vocabulary."""
    for key, number in ids.items():
        if number != _NO_TOKEN and not 0 <= number < len(tokens):
            role = key.removeprefix("tokenizer.ggml.").removesuffix("_token_id")
            yield Finding(
                f"The {shorten(role)} token has the id {number:,}, but the last id is {len(tokens) - 1:,}.",
                role == "eos",  # llama.cpp ends answers at token 11 instead, and ignores the others
                _fix_end(key, tokens) if role == "eos" else {},
            )


def _fix_end(key: str, tokens: Sequence[str]) -> dict[str, EncodedValue]:
    """Make `key` the token with which Qwen's models end a turn, or else a text; {} if there is neither."""
    end = next((tokens.index(end) for end in (_END_OF_TURN, _END_OF_TEXT) if end in tokens), None)
    return {} if end is None else {key: gguf_writer.u32(end)}


def _false_end_findings(tokens: Sequence[str], token_types: Sequence[int], ids: Mapping[str, int]) -> Iterator[Finding]:
    """Find end tokens that are normal tokens, which stop an answer in the middle of a text, or that are padding."""
    for role, key in _END_KEYS.items():
        number = ids.get(key, -1)
        if not 0 <= number < min(len(tokens), len(token_types)):
            continue
        token = shorten(tokens[number])
        if token_types[number] == UNUSED or PADDING.fullmatch(tokens[number]):
            problem = f"The {role} token is “{token}”, which is padding: no answer ends with it."
        elif token_types[number] == NORMAL:
            problem = f"The {role} token is “{token}”, which is a normal token: answers stop wherever it occurs."
        else:
            continue
        yield Finding(problem, True, _fix_end(key, tokens))


def _end_of_turn_findings(tokens: Sequence[str], ids: Mapping[str, int], template: str) -> Iterator[Finding]:
    if _END_OF_TURN not in template or _END_OF_TURN not in tokens:
        return
    end = tokens.index(_END_OF_TURN)
    if end in (ids.get(key) for key in _END_KEYS.values()):
        return
    eos = ids.get(_END_KEYS["eos"], -1)
    name = tokens[eos] if 0 <= eos < len(tokens) else "missing"
    is_known = name in (_END_OF_TEXT, _END_OF_TURN)
    yield Finding(
        f"The chat template ends turns with {_END_OF_TURN}, but the end token is {shorten(name)}"
        + (": some programs do not stop at the end of a turn." if is_known else "."),
        False,
        {_END_KEYS["eot"]: gguf_writer.u32(end)},
    )


def _chat_template(header: Header) -> str | None:
    value = header.metadata.get("tokenizer.chat_template")
    return value if isinstance(value, str) else None


def _decode_list(pairs: Mapping[str, EncodedValue], key: str, kind: type) -> list[Any]:
    """Return a list of values of type `kind`; an empty one if the key is missing or has other values."""
    value = decode_value(pairs[key]) if key in pairs else None
    return value if isinstance(value, list) and all(type(entry) is kind for entry in value) else []


def _template_findings(template: str | None) -> Iterator[Finding]:
    if template is None:
        yield Finding("The chat template is missing: programs must guess the format of a chat.", False)
    elif not template.strip():
        yield Finding("The chat template is empty.", False)
    elif error := find_template_error(template):
        yield Finding(f"The chat template is invalid ({shorten(error, 200)}): the model runs with --raw only.", True)
    elif "messages" not in template:
        yield Finding("The chat template does not use the messages, so it is not one for chats.", False)
    elif problem := _find_chat_problem(template):
        yield Finding(f"The chat template {problem}.", True)
    elif "add_generation_prompt" not in template and "<|im_start|>" in template:
        yield Finding("The chat template cannot start the assistant's turn (no add_generation_prompt).", False)


def _find_chat_problem(template: str) -> str:
    """Describe the fault of a template's text of a short chat; "" if there is none, or if it rejects the chat."""
    chat = [("user", "qfirst"), ("assistant", "afirst"), ("user", "qlast")]
    messages = [{"role": role, "content": text} for role, text in chat]
    try:
        text = CompiledTemplate(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, bos_token="", eos_token=""
        )
    except TemplateRejection:
        return ""
    except TemplateFailure as error:
        return f"fails ({error}): the model runs with --raw only"
    if "qlast" not in text:
        return "leaves out the last question"
    return "" if "qfirst" in text and "afirst" in text else "leaves out the messages before the last question"


# --- the weights


def _duplicate_output_findings(model: SplitModel) -> Iterator[Finding]:
    """Find an output matrix that duplicates the embeddings: byte for byte, or in another type."""
    output, embeddings = (model.tensors.get(name) for name in ("output.weight", "token_embd.weight"))
    if not output or not embeddings or output.shape != embeddings.shape:
        return
    if model.headers[0].architecture != "qwen2":
        return
    if output.type == embeddings.type:
        if have_same_bytes(output, embeddings):
            yield Finding(
                f"The output matrix is a copy of the embeddings, which wastes {format_bytes(output.size)}.",
                False,
                drops="output.weight",
            )
    elif _are_similar(output, embeddings):
        types = " and ".join(tensor.type.name.upper() for tensor in (output, embeddings))
        yield Finding(
            f"The output matrix is a copy of the embeddings in another type ({types}). If the two are tied in the "
            f"checkpoint, converting it gives a file {format_bytes(min(output.size, embeddings.size))} smaller.",
            False,
        )


def _are_similar(one: TensorInfo, other: TensorInfo) -> bool:
    """Return True if rows spread over the matrices correlate by more than 0.98."""
    import numpy

    columns, count = one.shape
    rows = range(0, count, max(1, count // _SAMPLE_ROWS))

    def read_samples(tensor: TensorInfo) -> Any:
        offsets = [tensor.offset + row * tensor.type.row_bytes(columns) for row in rows]
        return numpy.stack(
            [next(read_rows(FileRows(tensor.file, offset, 1, columns, tensor.type))) for offset in offsets]
        )

    left, right = read_samples(one), read_samples(other)
    if not (numpy.isfinite(left).all() and numpy.isfinite(right).all()):
        return False
    with numpy.errstate(all="ignore"):  # damaged values may be too large, or all the same: the result is NaN
        return bool(numpy.corrcoef(left.ravel(), right.ravel())[0, 1] > _MIN_CORRELATION)


def _weight_findings(model: SplitModel, report: Report) -> Iterator[Finding]:
    """Find NaN and infinite values, and matrices of zeros, which damaged downloads leave behind."""
    import numpy

    total, done = model.header.weights_size, 0

    def report_read(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    buffer = numpy.empty(SCAN_SIZE, numpy.uint8)
    for tensor in model.tensors.values():
        non_finite, all_zero = scan_values(tensor, buffer, report_read)
        if non_finite:
            values = format_quantity(non_finite, "value that is", "values that are")
            yield Finding(f"“{tensor.name}” has {values} NaN or infinite.", True)
        if all_zero and any(size > 1 for size in tensor.shape[1:]):
            yield Finding(f"“{tensor.name}” is all zeros: it is damaged, or was never completed.", True)
