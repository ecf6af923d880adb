"""
How true a GGUF file is to the checkpoint it was made from: its numbers, its tokens, and what it computes.

The checkpoint's own weights are put into the same engine from memory, so both sides run the same graph and what
differs is conversion and quantization alone. No torch is needed.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenlocal import ggml
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.in_memory import ModelInMemory
from qwenlocal.engine.llama import Model
from qwenlocal.ggml import TensorInMemory
from qwenlocal.measure.said import Contradiction, contradictions
from qwenlocal.weights import gguf
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.convert import Options, plan_conversion
from qwenlocal.weights.header import read_pairs, tensor_type_name
from qwenlocal.weights.mix import file_type
from qwenlocal.weights.numbers import errors_by_row, is_readable, numbers_of, read_rows
from qwenlocal.weights.parts import Located, read_parts
from qwenlocal.weights.plan import Plan
from qwenlocal.weights.writing import Strip

if TYPE_CHECKING:
    import numpy

_HEAD, _EMBEDDINGS = "output.weight", "token_embd.weight"
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
_MOST = 0.98  # nothing but zeros is off by 1
_LEAST_NMSE = 1e-2  # the engine itself rounds activations, too
_GENEROSITY = 50  # tiny models with random weights make that much more of an error than real ones

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


def _some(names: Sequence[str]) -> str:
    """`_some(["a", "b", "c"])` is "“a” and 2 more are"."""
    return f"“{names[0]}” is" if len(names) == 1 else f"“{names[0]}” and {len(names) - 1} more are"


class TensorError(NamedTuple):
    """
    A tensor's relative RMSE against the checkpoint, and that of its worst row, `row`; what its type explains of both.

    A row that was replaced by another is off by 1.4 (two vectors that have nothing in common, each as long as the
    other), but hardly shows among thousands.
    """

    name: str
    type: str
    rmse: float
    allowed: float
    row: int
    row_rmse: float
    row_allowed: float

    @property
    def is_explained(self) -> bool:
        """Whether quantization alone makes such errors."""
        return self.rmse <= self.allowed and self.row_rmse <= self.row_allowed

    def __str__(self) -> str:
        if not self.rmse <= self.allowed:  # NaN, too
            return (
                f"“{self.name}” ({self.type}) is off by {self.rmse:.2%}, where {self.type} explains {self.allowed:.2%}"
            )
        return (
            f"row {self.row:,} of “{self.name}” ({self.type}) is off by {self.row_rmse:.2%}, "
            f"where {self.type} explains {self.row_allowed:.2%}"
        )


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
    """
    All that was compared.

    `missing` and `surplus` are tensors that only one side has, or in another shape; where there are any, or the file
    contradicts the checkpoint's sizes, it is not run: no texts, no logits. `logits` is None, too, where both models did
    not fit into memory. `not_finite` counts weights of the checkpoint that are NaN or infinite, taken for zero.
    """

    tensors: Sequence[TensorError]
    missing: Sequence[str] = ()
    surplus: Sequence[str] = ()
    contradictions: Sequence[Contradiction] = ()
    texts: int = 0
    wrong_texts: Sequence[TextError] = ()
    logits: LogitsError | None = None
    layers: int = 0
    not_finite: int = 0

    @property
    def worst(self) -> TensorError | None:
        """The tensor whose error is largest against what its type allows."""
        return max(self.tensors, key=lambda tensor: tensor.rmse / tensor.allowed, default=None)

    @property
    def problems(self) -> list[str]:
        """Sentences about what quantization does not explain; none for a good file."""
        found = []
        if self.missing:
            found.append(f"{_some(self.missing)} missing in it, or of another shape: it was made from another model")
        if self.surplus:
            found.append(f"{_some(self.surplus)} in it, and not in the checkpoint")
        found += [str(contradiction) for contradiction in self.contradictions]
        found += [str(tensor) for tensor in self.tensors if not tensor.is_explained]
        found += [f"the text {wrong.text!r} gives other token ids" for wrong in self.wrong_texts]
        if self.logits and not math.isfinite(self.logits.nmse):
            found.append("its logits are not numbers")
        elif self.logits and self.logits.nmse > self.allowed_nmse:
            found.append(
                f"its logits are off by an NMSE of {self.logits.nmse:.2e}, where its weights explain "
                f"{self.allowed_nmse:.2e}: it computes something else"
            )
        return found

    @property
    def allowed_nmse(self) -> float:
        """
        What the errors of the weights explain of the logits' error: the squares of all layers' errors, generously.

        24 layers in Q8_0, off by 0.68 %: 50 x 25 x 0.0068² is 0.058. Where it comes to more than one, any answer is
        explained.
        """
        matrices = [tensor.rmse for tensor in self.tensors if tensor.type != "f32"]
        mean = sum(rmse**2 for rmse in matrices) / len(matrices) if matrices else 0.0
        return max(_LEAST_NMSE, _GENEROSITY * (self.layers + 1) * mean)


def measure(
    checkpoint: Checkpoint,
    file: Path,
    texts: Texts,
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
        source = _Source(reference)
        tensors, missing, surplus = _tensor_errors(source, file, report)
        pairs = read_pairs(header)
        against = contradictions(pairs, read_pairs(file))
        found = Fidelity(tensors, missing, surplus, against, layers=_layers(pairs), not_finite=source.not_finite)
        if missing or surplus or any(not each.key.startswith("tokenizer.") for each in against):
            return found
        sides = _Sides(file, header, source, pairs)
        if reference.files[0].size + read_parts(file).size < memory:
            wrong, logits = _compute(sides, texts, threads, report)
            return replace(found, texts=len(texts), wrong_texts=wrong, logits=logits)
        return replace(found, texts=len(texts), wrong_texts=_spell(sides, texts))


def _layers(pairs: Mapping[str, bytes]) -> int:
    return int(gguf.decode(pairs[f"{gguf.decode(pairs['general.architecture'])}.block_count"]))


def _reference_plan(checkpoint: Checkpoint, path: Path, options: Options) -> Plan:
    """The checkpoint as a file in its own floats, never written."""
    kinds = {tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1}
    plain = kinds.pop().lower() if len(kinds) == 1 else "f32"
    return plan_conversion(
        checkpoint, [(path, file_type(plain if plain in ("f32", "f16", "bf16") else "f32"))], options
    )


# --- numbers


def _tensor_errors(source: _Source, file: Path, report: Report) -> tuple[list[TensorError], list[str], list[str]]:
    """Errors, names of tensors that are missing, and of those that are not the checkpoint's."""
    there = read_parts(file).by_name
    errors, missing = [], []
    for number, planned in enumerate(source.tensors):
        report("comparing weights", number, len(source.tensors))
        located = there.get(planned.name)
        if located is None or located.tensor.shape != planned.shape or not is_readable(located.tensor):
            missing.append(planned.name)
            continue
        errors.append(_tensor_error(source.numbers(planned.name), located))
    surplus = sorted(set(there) - {planned.name for planned in source.tensors})
    table = next((t.shape for t in source.tensors if t.name == _EMBEDDINGS), ())
    head = there.get(_HEAD)
    if head and _HEAD in surplus and head.tensor.shape == table and is_readable(head.tensor):  # tied, and stored twice
        errors.append(_tensor_error(source.numbers(_EMBEDDINGS), head))
        surplus.remove(_HEAD)
    return errors, missing, surplus


def _tensor_error(true: Iterator[numpy.ndarray], located: Located) -> TensorError:
    kind = tensor_type_name(located.tensor.type).lower()
    typical = _TYPICAL.get(kind, _UNKNOWN_TYPE)
    rmse, row, row_rmse = errors_by_row(true, numbers_of(*located), located.tensor.shape[0])
    limits = min(2 * typical, _MOST), min(4 * typical, _MOST)
    return TensorError(located.tensor.name, kind, rmse, limits[0], row, row_rmse, limits[1])


class _Source:
    """The numbers of the checkpoint, as a plan has them."""

    def __init__(self, plan: Plan) -> None:
        self.tensors, self._strips = plan.files[0].tensors, _by_tensor(plan)
        self._not_finite: dict[str, int] = {}

    @property
    def not_finite(self) -> int:
        """How many of the numbers read so far were NaN or infinite."""
        return sum(self._not_finite.values())

    def has(self, name: str) -> bool:
        return name in self._strips

    def numbers(self, name: str) -> Iterator[numpy.ndarray]:
        """A tensor's, in pieces of whole rows; zeros for what is no number, as `convert --allow-nan` writes."""
        import numpy

        wrong = 0
        for strip in self._strips[name]:
            for found in read_rows(strip.file, strip.offset, strip.type, strip.rows, strip.columns):
                finite = numpy.isfinite(found)
                if not finite.all():
                    wrong += found.size - int(finite.sum())
                    found = numpy.where(finite, found, numpy.float32(0))
                yield found
        self._not_finite[name] = wrong


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


# --- tokens and logits


@dataclass(frozen=True)
class _Sides:
    """The two that are compared: the file; the checkpoint's header, the numbers behind it, and what it says."""

    file: Path
    header: Path
    source: _Source
    pairs: Mapping[str, bytes]


Texts = Sequence[tuple[str, Sequence[int] | None]]


def _compute(sides: _Sides, texts: Texts, threads: int, report: Report) -> tuple[list[TextError], LogitsError]:
    report("loading the checkpoint", 0, 1)
    with (
        contextlib.closing(Model(sides.file)) as model,
        contextlib.closing(ModelInMemory(sides.header, _Filler(sides.source).fill)) as reference,
    ):
        return _wrong_texts(reference, model, texts), _logits_error(reference, model, threads, report)


def _spell(sides: _Sides, texts: Texts) -> list[TextError]:
    """Token ids alone, without any weights in memory."""
    sides.header.write_bytes(gguf.lay_out(sides.pairs, []).header)
    with (
        contextlib.closing(Model(sides.file, vocabulary_only=True)) as model,
        contextlib.closing(Model(sides.header, vocabulary_only=True)) as reference,
    ):
        return _wrong_texts(reference, model, texts)


def _wrong_texts(reference: Model, model: Model, texts: Texts) -> list[TextError]:
    found = []
    for text, known in texts:
        expected = list(known) if known is not None else reference.vocabulary.tokenize(text, special=False)
        actual = model.vocabulary.tokenize(text, special=False)
        if expected != actual:
            found.append(TextError(text, expected, actual))
    return found


class _Filler:
    """Gives llama.cpp the numbers of the checkpoint."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def fill(self, tensor: TensorInMemory) -> None:
        if self._source.has(tensor.name):
            self._copy(tensor.name, tensor)
        elif tensor.name == _HEAD:
            self._copy(_EMBEDDINGS, tensor)  # a head that is tied is the embeddings
        else:
            self._fill_unlisted(tensor)

    def _copy(self, name: str, tensor: TensorInMemory) -> None:
        at = 0
        columns = next(planned.shape[0] for planned in self._source.tensors if planned.name == name)
        for numbers in self._source.numbers(name):
            data = _as_type(numbers, tensor.type, columns)
            tensor.put(data.ctypes.data, at, data.nbytes)
            at += data.nbytes

    def _fill_unlisted(self, tensor: TensorInMemory) -> None:
        """Scales are one, biases nothing."""
        import numpy

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

    ids = reference.vocabulary.tokenize(SAMPLE, special=False)
    ids = [number for number in ids if number < len(model.vocabulary)]
    left_side, right_side = (contextlib.closing(_logits(side, ids, threads)) for side in (reference, model))
    with left_side as left_logits, right_side as right_logits:  # Ctrl-C ends contexts before their models
        return _divergence(zip(left_logits, right_logits, strict=True), len(ids), report)


def _divergence(pairs: Iterable[tuple[Any, Any]], total: int, report: Report) -> LogitsError:
    import numpy

    squares = variance = divergence = 0.0
    same = count = 0
    for one, other in pairs:
        report("comparing answers", count, total)
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


def _logits(model: Model, ids: Sequence[int], threads: int) -> Generator[Any, None, None]:
    """The logits after each token, `_BATCH` tokens at a time: arrays of (tokens, vocabulary)."""
    import numpy

    size = len(model.vocabulary)
    options = ContextOptions(len(ids) + _BATCH, threads=threads, n_batch=_BATCH)
    with contextlib.closing(Context(model, options)) as context:
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            (first,) = context.decode([(0, batch)], all_logits=True)
            rows = [numpy.ctypeslib.as_array(context.logits(first + n), (size,)).copy() for n in range(len(batch))]
            yield numpy.stack(rows)
