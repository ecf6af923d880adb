"""
Comparison of a GGUF file with the checkpoint it was made from: metadata, weights, token ids and logits.

The checkpoint's own weights are loaded into the same engine from memory. Both sides run the same graph, so every
difference comes from conversion and quantization. No torch is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from qwenlocal.engine.llama import Model
from qwenlocal.measure.independent_tokenizer import (
    IndependentTokenizer,
    added_token_texts,
    open_independent_tokenizer,
)
from qwenlocal.measure.logits import LogitsError, compare_logits
from qwenlocal.measure.metadata_diff import MetadataDifference, diff_metadata
from qwenlocal.measure.reference import ReferenceTensors, Report, load_reference, plan_reference
from qwenlocal.measure.tensor_errors import TensorError, compare_tensors
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions
from qwenlocal.weights.gguf_reader import NORMAL, decode_value, read_raw_metadata
from qwenlocal.weights.load_errors import check_file

_MIN_NMSE = 1e-2  # the engine itself rounds activations, too
_TOLERANCE = 50  # tiny models with random weights amplify an error that much more than real ones


class KnownText(NamedTuple):
    """
    A text and its token ids; None if they are those of the checkpoint's own vocabulary.

    With `special`, control tokens in the text are parsed.
    """

    text: str
    ids: Sequence[int] | None
    special: bool = False


@dataclass(frozen=True)
class Fidelity:
    """
    The result of a comparison.

    `missing` and `surplus` are tensors that only one side has or that differ in shape. If there are any, or if the
    dimensions in the metadata differ, the file is not run: no texts, no logits. `wrong_texts` are those of the `texts`
    compared whose token ids differ. `tokenizer` is the independent one, if one is installed. `logits` is also None if
    both models do not fit into memory together. `non_finite` counts weights of the checkpoint that are NaN or infinite;
    they are compared as zero.
    """

    tensors: Sequence[TensorError]
    missing: Sequence[str] = ()
    surplus: Sequence[str] = ()
    metadata: Sequence[MetadataDifference] = ()
    texts: int = 0
    wrong_texts: Sequence[str] = ()
    tokenizer: IndependentTokenizer | None = None
    logits: LogitsError | None = None
    layers: int = 0
    non_finite: int = 0

    @property
    def worst(self) -> TensorError | None:
        """The tensor whose error is largest in relation to its limit."""
        return max(self.tensors, key=lambda tensor: tensor.rmse / tensor.allowed, default=None)

    @property
    def problems(self) -> list[str]:
        """One sentence for each difference that quantization does not explain."""
        problems = []
        if self.missing:
            problems.append(f"{_join(self.missing)} missing or of another shape: the file was made from another model")
        if self.surplus:
            problems.append(f"{_join(self.surplus)} in the file but not in the checkpoint")
        problems += [str(difference) for difference in self.metadata]
        problems += [str(tensor) for tensor in self.tensors if not tensor.is_explained]
        problems += [f"the text {text!r} gives different token ids" for text in self.wrong_texts]
        if self.logits and not math.isfinite(self.logits.nmse):
            problems.append("its logits are not finite")
        elif self.logits and self.logits.nmse > self.nmse_limit:
            problems.append(
                f"its logits have an NMSE of {self.logits.nmse:.2e}, but its weights explain only "
                f"{self.nmse_limit:.2e}: it computes something else"
            )
        return problems

    @property
    def nmse_limit(self) -> float:
        """
        The NMSE of the logits that the errors of the weights explain: the sum of all layers' squared errors, times 50.

        24 layers in Q8_0, off by 0.68 %: 50 × 25 × 0.0068² = 0.058. Above 1, the limit accepts any answer.
        """
        errors = [tensor.rmse for tensor in self.tensors if tensor.type != "f32"]
        mean_square = sum(rmse**2 for rmse in errors) / len(errors) if errors else 0.0
        return max(_MIN_NMSE, _TOLERANCE * (self.layers + 1) * mean_square)


def _join(names: Sequence[str]) -> str:
    """`_join(["a", "b", "c"])` is "“a” and 2 more are"."""
    return f"“{names[0]}” is" if len(names) == 1 else f"“{names[0]}” and {len(names) - 1} more are"


def compare_with_checkpoint(
    checkpoint: Checkpoint,
    file: Path,
    texts: Sequence[KnownText],
    *,
    threads: int,
    memory: int,
    options: ConversionOptions = ConversionOptions(),
    report: Report = lambda step, done, total: None,
) -> Fidelity:
    """
    Compare the GGUF file `file` with `checkpoint`.

    The file's token ids of `texts` are compared with known ones, or else with those of an independent tokenizer, if one
    is installed, or of the checkpoint. `memory` is the number of bytes available for both models.

    Raises
    ------
    BadCheckpoint, UnsupportedCheckpoint, BadWeights: one of them cannot be read, or llama.cpp cannot run the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "reference.gguf"
        plan = plan_reference(checkpoint, header, options)
        header.write_bytes(plan.job.outputs[0].header)
        tensors = ReferenceTensors(plan)
        errors, missing, surplus = compare_tensors(tensors, file, report)
        metadata = read_raw_metadata(header)
        differences = diff_metadata(metadata, read_raw_metadata(file))
        fidelity = Fidelity(
            errors, missing, surplus, differences, layers=_layers(metadata), non_finite=tensors.non_finite
        )
        is_runnable = all(difference.key.startswith("tokenizer.") for difference in differences)
        if missing or surplus or not is_runnable:
            return fidelity
        size = check_file(file).size
        tokenizer = open_independent_tokenizer(checkpoint.folder)
        if tokenizer and tokenizer.encode:
            texts = _encode_texts(tokenizer.encode, texts, metadata)
        fidelity = replace(fidelity, texts=len(texts), tokenizer=tokenizer)
        if plan.files[0].size + size < memory:
            report("loading the checkpoint", 0, 1)
            with (
                contextlib.closing(Model(file)) as model,
                contextlib.closing(load_reference(header, tensors)) as reference,
            ):
                wrong = _compare_tokens(reference, model, texts)
                logits = compare_logits(reference, model, threads, report)
            return replace(fidelity, wrong_texts=wrong, logits=logits)
        return replace(fidelity, wrong_texts=_compare_vocabularies(file, header, metadata, texts))


def _layers(metadata: Mapping[str, bytes]) -> int:
    return int(decode_value(metadata[f"{decode_value(metadata['general.architecture'])}.block_count"]))


def _compare_vocabularies(
    file: Path, header: Path, metadata: Mapping[str, bytes], texts: Sequence[KnownText]
) -> list[str]:
    """Compare token ids without loading any weights."""
    header.write_bytes(gguf_writer.make_layout(metadata, []).header)
    with (
        contextlib.closing(Model(file, vocab_only=True)) as model,
        contextlib.closing(Model(header, vocab_only=True)) as reference,
    ):
        return _compare_tokens(reference, model, texts)


# --- token ids


def known_texts(tokens: Sequence[str], types: Sequence[int]) -> list[KnownText]:
    """
    Return texts of many kinds and languages to compare a vocabulary of `tokens` with token `types`.

    If it is Qwen1.5's vocabulary, the texts come with the ids of the original tokenizer (made with Hugging Face's
    tokenizers by tests/goldens/make_tokens.py), otherwise with None.
    """
    golden = json.loads((Path(__file__).parent / "qwen1.5-tokens.json").read_text(encoding="utf-8"))
    normal = [token for token, type_ in zip(tokens, types, strict=False) if type_ == NORMAL]
    is_qwen = hashlib.sha256("\n".join(normal).encode()).hexdigest() == golden["vocabulary"]
    return [KnownText(text, ids if is_qwen else None) for text, ids in golden["texts"]]


def _encode_texts(
    encode: Callable[[str], list[int]], texts: Sequence[KnownText], metadata: Mapping[str, bytes]
) -> list[KnownText]:
    """Return `texts`, and others with added tokens, with the ids of an independent tokenizer if they are not known."""
    model, tokens, types = (
        decode_value(metadata[f"tokenizer.ggml.{key}"]) for key in ("model", "tokens", "token_type")
    )
    others = [KnownText(text, None) for text in added_token_texts(tokens, types)]
    return [
        each if each.ids is not None else KnownText(each.text, encode(each.text), special=True)
        for each in [*texts, *others]
        # With SentencePiece, Hugging Face's tokenizers disagree with each other about spaces at the beginning.
        if model == "gpt2" or not each.text.startswith(" ")
    ]


def _compare_tokens(reference: Model, model: Model, texts: Sequence[KnownText]) -> list[str]:
    """Tokenize `texts` with both models and return those whose ids differ."""
    wrong = []
    for text, known, special in texts:
        expected = list(known) if known is not None else reference.tokenizer.tokenize(text, special=special)
        if model.tokenizer.tokenize(text, special=special) != expected:
            wrong.append(text)
    return wrong
