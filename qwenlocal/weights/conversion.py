"""
The plan for converting a checkpoint to one or several GGUF files. It decides what they contain; nothing is written.

    checkpoint.py      files                architecture.py                   hyperparameters
    tensor_map.py      tensors              vocabulary_reader.py              tokenizer
    model_metadata.py  name, license, …     quant_mix.py, conversion_plan.py  types, sizes, offsets

write_workers.py executes the plan.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwenlocal.errors import UsageError
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.adapter_merge import WeightedAdapter, merge_adapters
from qwenlocal.weights.architecture import Hyperparameters, read_hyperparameters
from qwenlocal.weights.checkpoint import Checkpoint, read_config
from qwenlocal.weights.conversion_plan import ConversionPlan, make_plan
from qwenlocal.weights.file_types import FileType, QuantOverrides, file_type
from qwenlocal.weights.gguf_reader import EncodedValue
from qwenlocal.weights.imatrix import ImportanceMatrix
from qwenlocal.weights.model_metadata import read_model_metadata
from qwenlocal.weights.packed_types import lossless_types, refuse_requantizing
from qwenlocal.weights.packing import read_packing
from qwenlocal.weights.quant_mix import ModelFacts
from qwenlocal.weights.row_source import SourceTensor
from qwenlocal.weights.tensor_map import map_tensors
from qwenlocal.weights.vocabulary import Vocabulary
from qwenlocal.weights.vocabulary_reader import read_vocabulary

_TOKEN_ID_KEYS = {
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # sic: llama.cpp's spelling
    "pad": "padding_token_id",
}


@dataclass(frozen=True)
class ConversionOptions:
    """
    Options of a conversion. `name` and `repo` are the checkpoint's name and the repository it came from.

    `requantize` allows quantizing packed weights again. The adapters in `merges` are added to the weights before they
    are quantized. `like_llama_cpp` does without our differences from llama.cpp's converter: it keeps an output matrix
    that equals the embeddings to which it is tied, and leaves out end-of-turn and suppressed tokens and the repository.
    """

    name: str = ""
    repo: str = ""
    pre: str | None = None
    like_llama_cpp: bool = False
    overrides: QuantOverrides = field(default_factory=QuantOverrides)
    imatrix: ImportanceMatrix | None = None
    requantize: bool = False
    merges: Sequence[WeightedAdapter] = ()


def default_file_type(folder: Path) -> FileType:
    """
    Return the type of file to write from a checkpoint: q4_k_m, or one that holds packed weights without rounding.

    Raises
    ------
    BadCheckpoint: config.json cannot be read. UnsupportedCheckpoint: the weights cannot be converted.
    """
    packing = read_packing(folder, read_config(folder))
    return file_type(packing.file_type if packing else "q4_k_m")


def plan_conversion(
    checkpoint: Checkpoint,
    targets: Sequence[tuple[Path, FileType]],
    options: ConversionOptions = ConversionOptions(),
) -> ConversionPlan:
    """
    Plan to write `targets` (paths and types) from one pass over `checkpoint`.

    Raises
    ------
    BadCheckpoint: a file is damaged or missing, or contradicts another.
    UnsupportedCheckpoint: llama.cpp would compute something else.
    UsageError: a type needs an importance matrix, an option does not fit the checkpoint, or packed weights would be
        quantized again (not with `requantize`).
    BadWeights: the importance matrix is of another model.
    """
    model = read_hyperparameters(checkpoint)
    tensors, tensor_notes, assumptions = map_tensors(checkpoint, model, keep_tied_output=options.like_llama_cpp)
    if options.merges:
        tensors, merge_notes = _merge(checkpoint, tensors, options)
        tensor_notes = [*tensor_notes, *merge_notes]
    lossless = lossless_types(tensors, checkpoint.packing)
    if checkpoint.packing and not options.requantize:
        refuse_requantizing(tensors, checkpoint.packing, lossless, [kind for _, kind in targets], options.overrides)
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.config, model.vocab_size, pre=options.pre)
    experts = model.experts.count if model.experts else 0
    model_metadata = read_model_metadata(
        checkpoint.folder,
        checkpoint.config,
        options.name or checkpoint.folder.name,
        sum(tensor.elements for tensor in tensors),
        "" if options.like_llama_cpp else options.repo,
        in_experts=sum(tensor.elements for tensor in tensors if "_exps." in tensor.name),
        experts=experts,
    )
    metadata = {
        "general.architecture": gguf_writer.string(model.architecture),
        **model_metadata.pairs,
        **_hyperparameter_keys(model),
    }
    tokenizer = _tokenizer_keys(vocabulary, like_llama_cpp=options.like_llama_cpp)
    facts = ModelFacts(model.architecture, model.layers, model.heads // model.kv_heads, experts)
    notes = [*checkpoint.notes, *tensor_notes, *model_metadata.notes, *vocabulary.notes]
    overrides = options.overrides
    if overrides.best and not checkpoint.has_weights:
        notes.append("The best mix is chosen when the weights are on this disk; until then the types are llama.cpp's.")
        overrides = replace(overrides, best=False)
    plan = make_plan(tensors, targets, metadata, facts, overrides, options.imatrix, tokenizer, notes, lossless)
    return replace(plan, assumptions=assumptions)


def _merge(
    checkpoint: Checkpoint, tensors: Sequence[SourceTensor], options: ConversionOptions
) -> tuple[list[SourceTensor], list[str]]:
    if checkpoint.packing:
        source = f"hf:{options.repo}" if options.repo else str(checkpoint.folder)
        original = re.sub(r"-(GPTQ|AWQ)(-Int\d)?$", "", source) if options.repo else "ORIGINAL"
        adapter = shlex.quote(str(options.merges[0].adapter.folder))
        raise UsageError(
            f"An adapter cannot be merged into quantized weights ({checkpoint.packing}).",
            hint=f"Use it as it is: qwenlocal run {shlex.quote(source)} --adapter {adapter}; or merge it into the "
            f"original checkpoint: qwenlocal convert {original} --merge {adapter}",
        )
    return merge_adapters(tensors, options.merges, options.name or checkpoint.folder.name)


def _hyperparameter_keys(model: Hyperparameters) -> dict[str, EncodedValue]:
    """Encode the keys that llama.cpp's loader reads (conversion/base.py: set_gguf_parameters; conversion/qwen.py)."""
    pairs = {
        "block_count": gguf_writer.u32(model.layers),
        "context_length": gguf_writer.u32(model.context),
        "embedding_length": gguf_writer.u32(model.width),
        "feed_forward_length": gguf_writer.u32(model.feed_forward),
        "attention.head_count": gguf_writer.u32(model.heads),
        "attention.head_count_kv": gguf_writer.u32(model.kv_heads),
    }
    if scaling := model.scaling:
        pairs["rope.scaling.type"] = gguf_writer.string(scaling.kind)
        pairs["rope.scaling.factor"] = gguf_writer.f32(scaling.factor)
        if scaling.kind == "yarn":
            pairs["rope.scaling.original_context_length"] = gguf_writer.u32(scaling.original_context)
            if scaling.attention != 1:
                pairs["rope.scaling.attn_factor"] = gguf_writer.f32(scaling.attention)
    pairs["rope.freq_base"] = gguf_writer.f32(model.rope_base)
    pairs["attention.layer_norm_rms_epsilon"] = gguf_writer.f32(model.epsilon)
    if experts := model.experts:
        pairs["expert_count"] = gguf_writer.u32(experts.count)
        pairs["expert_used_count"] = gguf_writer.u32(experts.used)
        pairs["expert_feed_forward_length"] = gguf_writer.u32(experts.width)
        pairs["expert_shared_feed_forward_length"] = gguf_writer.u32(experts.shared_width)
    return {f"{model.architecture}.{key}": value for key, value in pairs.items()}


def _tokenizer_keys(vocabulary: Vocabulary, *, like_llama_cpp: bool) -> dict[str, EncodedValue]:
    pairs: dict[str, EncodedValue] = {
        "model": gguf_writer.string(vocabulary.model),
        "pre": gguf_writer.string(vocabulary.pre),
        "tokens": gguf_writer.strings(vocabulary.tokens),
    }
    if vocabulary.scores:
        pairs["scores"] = gguf_writer.f32s(vocabulary.scores)
    pairs["token_type"] = gguf_writer.i32s(vocabulary.token_types)
    if vocabulary.merges:
        pairs["merges"] = gguf_writer.strings(vocabulary.merges)
    special = {role: id for role, id in vocabulary.special.items() if not (like_llama_cpp and role in ("eot", "eom"))}
    for role, number in special.items():
        pairs[_TOKEN_ID_KEYS.get(role, f"{role}_token_id")] = gguf_writer.u32(number)
    for name, flag in vocabulary.add_flags.items():
        if name == "space" and not like_llama_cpp:
            pairs["add_space_prefix"] = gguf_writer.boolean(flag)
        elif name != "space":
            pairs[f"add_{name}_token"] = gguf_writer.boolean(flag)
    first, count = vocabulary.first_unused, len(vocabulary.tokens)
    if first < count and not like_llama_cpp:
        pairs["suppress_tokens"] = gguf_writer.i32s(range(first, count))
    keys = {f"tokenizer.ggml.{key}": value for key, value in pairs.items()}
    return {**keys, **_template_keys(vocabulary.templates)}


def _template_keys(templates: Mapping[str, str]) -> dict[str, EncodedValue]:
    named = [name for name in templates if name]
    pairs = {"tokenizer.chat_templates": gguf_writer.strings(named)} if named else {}
    for name, text in templates.items():
        pairs[f"tokenizer.chat_template{f'.{name}' if name else ''}"] = gguf_writer.string(text)
    return pairs
