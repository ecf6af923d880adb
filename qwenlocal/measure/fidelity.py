"""
How true a GGUF file is to the checkpoint it was made from: its numbers, its tokens, and what it computes.

The checkpoint's own weights are put into the same engine from memory, so both sides run the same graph and what
differs is conversion and quantization alone. No torch is needed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenlocal import ggml
from qwenlocal.engine.in_memory import ModelInMemory
from qwenlocal.engine.llama import Context, ContextOptions, Model
from qwenlocal.ggml import TensorInMemory
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.convert import Options, plan_conversion
from qwenlocal.weights.header import read_header, tensor_type_name
from qwenlocal.weights.mix import file_type
from qwenlocal.weights.numbers import is_readable, numbers_of, read_rows, relative_error
from qwenlocal.weights.plan import Plan
from qwenlocal.weights.writing import Strip

if TYPE_CHECKING:
    import numpy

_BATCH = 32  # tokens whose logits are kept at once

# The relative error that a type makes in weights as models have them (Student's t with 5 degrees of freedom, 64 rows of
# 4096, measured with ggml); what is beyond twice that is not quantization but a mistake.
_TYPICAL = {
    "f32": 1e-7, "f16": 0.0003, "bf16": 0.0017, "q8_0": 0.0068, "q6_k": 0.0215, "q5_k": 0.0421, "q5_1": 0.0436,
    "q5_0": 0.0539, "q4_k": 0.0832, "iq4_nl": 0.0886, "iq4_xs": 0.0895, "q4_1": 0.0901, "q4_0": 0.1078,
    "mxfp4": 0.1266, "q3_k": 0.1766, "iq3_s": 0.1891, "iq3_xxs": 0.2423, "iq2_s": 0.3151, "iq2_xs": 0.3281,
    "q2_k": 0.3322, "iq2_xxs": 0.3871, "iq1_s": 0.5575, "iq1_m": 0.5973, "q1_0": 0.6761, "q2_0": 0.7417,
    "tq1_0": 0.8517, "tq2_0": 0.8517,
}  # fmt: skip
_UNKNOWN_TYPE = 0.85

# What both models read: the kinds of text that people have, so that each corner of the vocabulary is touched.
SAMPLE = """The old lighthouse keeper wrote down the weather every evening: wind from the north-west, 7 knots, 1013 hPa.
def quicksort(items):
    if len(items) < 2:
        return items
    pivot, *rest = items
    return quicksort([x for x in rest if x < pivot]) + [pivot] + quicksort([x for x in rest if x >= pivot])
北京的秋天很美，天空又高又蓝。Les élèves étudient l'après-midi. Der Zug fährt um 18:45 Uhr ab.
Сегодня хорошая погода. 東京の天気は晴れです。 오늘은 날씨가 좋아요. الطقس جميل اليوم. हिन्दी में लिखो।
| name | price |\n|------|-------|\n| tea  | 3.50 € |\n🙂👍🏽 "Why?" — she asked…
"""

Report = Callable[[str, int, int], object]


class TensorError(NamedTuple):
    """A tensor's relative RMSE against the checkpoint; `allowed` is what its type explains."""

    name: str
    type: str
    rmse: float
    allowed: float

    @property
    def is_explained(self) -> bool:
        """Whether quantization alone makes such an error."""
        return self.rmse <= self.allowed


@dataclass(frozen=True)
class LogitsError:
    """
    What both models say about the next token, over `tokens` positions.

    `nmse` is the mean squared difference over the reference's variance, `kl` the mean Kullback–Leibler divergence in
    nats, `agreement` how often both find the same token likeliest.
    """

    tokens: int
    nmse: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class TextError:
    """A text whose token ids differ: those of the checkpoint and those of the file."""

    text: str
    expected: Sequence[int]
    actual: Sequence[int]


@dataclass(frozen=True)
class Fidelity:
    """All that was compared; `logits` is None where both models did not fit into memory."""

    tensors: Sequence[TensorError]
    missing: Sequence[str]
    texts: int
    wrong_texts: Sequence[TextError]
    logits: LogitsError | None

    @property
    def worst(self) -> TensorError | None:
        """The tensor whose error is largest against what its type allows."""
        return max(self.tensors, key=lambda tensor: tensor.rmse / tensor.allowed, default=None)

    @property
    def problems(self) -> list[str]:
        """Sentences about what quantization does not explain; none for a good file."""
        found = []
        if self.missing:
            more = f" and {len(self.missing) - 1} more" if len(self.missing) > 1 else ""
            found.append(f"“{self.missing[0]}”{more} is missing, or of another shape: it was made from another model")
        found += [
            f"“{t.name}” ({t.type}) is off by {t.rmse:.2%}, where {t.type} explains {t.allowed:.2%}"
            for t in self.tensors
            if not t.is_explained
        ]
        found += [f"the text {wrong.text!r} gives other token ids" for wrong in self.wrong_texts]
        if self.logits and not math.isfinite(self.logits.nmse):
            found.append("its logits are not numbers")
        return found


def measure(
    checkpoint: Checkpoint,
    file: Path,
    texts: Sequence[tuple[str, Sequence[int] | None]],
    *,
    threads: int,
    memory: int,
    options: Options = Options(),
    report: Report = lambda what, done, all: None,
) -> Fidelity:
    """
    Compare `file` with `checkpoint`.

    `texts` are to be tokenised, with the ids that are known to be right (None: those of the checkpoint's vocabulary).
    `memory` is how many bytes there are for both models.

    Raises
    ------
    BadCheckpoint, CannotExpress, BadWeights: one of them cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "reference.gguf"
        reference = _reference_plan(checkpoint, header, options)
        header.write_bytes(reference.job.outputs[0].header)
        tensors, missing = _tensor_errors(reference, file, report)
        if missing:
            return Fidelity(tensors, missing, 0, [], None)
        fits = reference.files[0].size + file.stat().st_size < memory
        texts_wrong, logits = _compute(reference, header, file, texts, threads, logits=fits, report=report)
    return Fidelity(tensors, missing, len(texts), texts_wrong, logits)


def _reference_plan(checkpoint: Checkpoint, path: Path, options: Options) -> Plan:
    """The checkpoint as a file in its own floats, never written."""
    kinds = {tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1}
    plain = kinds.pop().lower() if len(kinds) == 1 else "f32"
    return plan_conversion(
        checkpoint, [(path, file_type(plain if plain in ("f32", "f16", "bf16") else "f32"))], options
    )


# --- numbers


def _tensor_errors(reference: Plan, file: Path, report: Report) -> tuple[list[TensorError], list[str]]:
    header = read_header(file)
    there = {tensor.name: tensor for tensor in header.tensors}
    strips = _by_tensor(reference)
    errors, missing = [], []
    for number, planned in enumerate(reference.files[0].tensors):
        report("comparing weights", number, len(reference.files[0].tensors))
        tensor = there.get(planned.name)
        if tensor is None or tensor.shape != planned.shape or not is_readable(tensor):
            missing.append(planned.name)
            continue
        kind = tensor_type_name(tensor.type).lower()
        rmse = relative_error(_source_numbers(strips[planned.name]), numbers_of(file, header, tensor))
        errors.append(TensorError(planned.name, kind, rmse, 2 * _TYPICAL.get(kind, _UNKNOWN_TYPE)))
    return errors, missing


def _by_tensor(plan: Plan) -> dict[str, list[Strip]]:
    """For each tensor its rows, in the order in which they lie in the file to be."""
    found: dict[str, list[Strip]] = {}
    placed = [(target.offset, strip) for strip in plan.job.strips for target in strip.targets]
    in_order = iter(sorted(placed, key=lambda pair: pair[0]))
    for tensor in plan.files[0].tensors:
        rows, parts = tensor.elements // tensor.shape[0], list[Strip]()
        while rows:
            _, strip = next(in_order)
            parts.append(strip)
            rows -= strip.rows
        found[tensor.name] = parts
    return found


def _source_numbers(parts: Sequence[Strip]) -> Iterator[numpy.ndarray]:
    for strip in parts:
        yield from read_rows(strip.file, strip.offset, strip.type, strip.rows, strip.columns)


# --- tokens and logits


def _compute(
    plan: Plan, header: Path, file: Path, texts: Sequence[tuple[str, Sequence[int] | None]], threads: int,
    *, logits: bool, report: Report,
) -> tuple[list[TextError], LogitsError | None]:  # fmt: skip
    model = Model(file)
    try:
        if not logits:
            return _wrong_texts(model, model, texts), None
        report("loading the checkpoint", 0, 1)
        reference = ModelInMemory(header, _Filler(plan).fill)
        try:
            wrong = _wrong_texts(reference, model, texts)
            return wrong, _logits_error(reference, model, threads, report)
        finally:
            reference.close()
    finally:
        model.close()


def _wrong_texts(reference: Model, model: Model, texts: Sequence[tuple[str, Sequence[int] | None]]) -> list[TextError]:
    found = []
    for text, known in texts:
        expected = list(known) if known is not None else reference.vocabulary.tokenize(text, special=False)
        actual = model.vocabulary.tokenize(text, special=False)
        if expected != actual:
            found.append(TextError(text, expected, actual))
    return found


class _Filler:
    """Gives llama.cpp the numbers of the checkpoint, as the plan has them."""

    def __init__(self, plan: Plan) -> None:
        self._strips = _by_tensor(plan)

    def fill(self, tensor: TensorInMemory) -> None:
        parts = self._strips.get(tensor.name)
        if parts is None:
            self._fill_unlisted(tensor)
            return
        self._copy(parts, tensor)

    def _copy(self, parts: Sequence[Strip], tensor: TensorInMemory) -> None:
        at = 0
        for strip in parts:
            for numbers in read_rows(strip.file, strip.offset, strip.type, strip.rows, strip.columns):
                data = _as_type(numbers, tensor.type, strip.columns)
                tensor.put(data.ctypes.data, at, data.nbytes)
                at += data.nbytes

    def _fill_unlisted(self, tensor: TensorInMemory) -> None:
        """A head that is tied is the embeddings; scales are one, biases nothing."""
        import numpy

        if tensor.name == "output.weight":
            self._copy(self._strips["token_embd.weight"], tensor)
            return
        value = 1.0 if "scale" in tensor.name else 0.0
        numbers = numpy.full(tensor.size // 4, value, numpy.float32)
        tensor.put(numbers.ctypes.data, 0, numbers.nbytes)


def _as_type(numbers: numpy.ndarray, kind: ggml.TensorType, columns: int) -> Any:
    """float32 as `kind`, which is the floats that they were: nothing is lost."""
    import numpy

    if kind.name == "f32":
        return numbers
    rows = numbers.size // columns
    found = numpy.empty(rows * kind.row_bytes(columns), numpy.uint8)
    ggml.quantize(kind, numbers.ctypes.data, found.ctypes.data, rows, columns)
    return found


def _logits_error(reference: Model, model: Model, threads: int, report: Report) -> LogitsError:
    import numpy

    ids = reference.vocabulary.tokenize(SAMPLE, special=False)
    ids = [number for number in ids if number < len(model.vocabulary)]
    squares = variance = divergence = 0.0
    same = count = 0
    pairs = zip(_logits(reference, ids, threads), _logits(model, ids, threads), strict=True)
    for one, other in pairs:
        report("comparing answers", count, len(ids))
        width = min(one.shape[1], other.shape[1])
        one, other = one[:, :width].astype(numpy.float64), other[:, :width].astype(numpy.float64)
        squares += float(((one - other) ** 2).sum())
        variance += float(((one - one.mean(axis=1, keepdims=True)) ** 2).sum())
        left, right = _log_softmax(one), _log_softmax(other)
        divergence += float((numpy.exp(left) * (left - right)).sum())
        same += int((one.argmax(axis=1) == other.argmax(axis=1)).sum())
        count += len(one)
    return LogitsError(count, squares / variance, divergence / count, same / count)


def _log_softmax(logits: Any) -> Any:
    import numpy

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))


def _logits(model: Model, ids: Sequence[int], threads: int) -> Iterator[Any]:
    """The logits after each token, `_BATCH` tokens at a time: arrays of (tokens, vocabulary)."""
    import numpy

    context = Context(model, ContextOptions(len(ids) + _BATCH, threads=threads, n_batch=_BATCH))
    size = len(model.vocabulary)
    try:
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            (first,) = context.decode([(0, batch)], all_logits=True)
            rows = [numpy.ctypeslib.as_array(context.logits(first + n), (size,)).copy() for n in range(len(batch))]
            yield numpy.stack(rows)
    finally:
        context.close()
