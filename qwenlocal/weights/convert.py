"""
From a checkpoint to the plan of one or several GGUF files: what is in the files is decided here, nothing is written.

    checkpoint.py    what is there       architecture.py  what it computes
    placement.py     where tensors go    vocabulary.py    how it spells
    about.py         what it is called   mix.py, plan.py  types, sizes, places; writing.py carries it out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwenlocal import ggml
from qwenlocal.weights import gguf
from qwenlocal.weights.about import Parameters, read_about
from qwenlocal.weights.architecture import Hyperparameters, hyperparameters
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.importance import Importance
from qwenlocal.weights.mix import FileType, ModelFacts, Wishes
from qwenlocal.weights.placement import Placed, Placement, place_tensors
from qwenlocal.weights.plan import Plan, SourceTensor, Stretch, make_goals, make_plan
from qwenlocal.weights.vocabulary import Vocabulary, read_vocabulary


@dataclass(frozen=True)
class Options:
    """
    How to convert. `name` and `repo` are what the checkpoint is called and where it came from.

    `like_llama_cpp` leaves out what we do otherwise than llama.cpp's own converter: a tied head that is stored twice
    is kept, and end-of-turn and suppressed tokens are not named.
    """

    name: str = ""
    repo: str = ""
    pre: str | None = None
    like_llama_cpp: bool = False
    wishes: Wishes = field(default_factory=Wishes)
    importance: Importance | None = None


def plan_conversion(
    checkpoint: Checkpoint, wanted: Sequence[tuple[Path, FileType]], options: Options = Options()
) -> Plan:
    """
    The plan for writing `wanted` (paths and types) from one reading of `checkpoint`.

    Raises
    ------
    BadCheckpoint: a file of it is damaged, missing, or contradicts another.
    UnsupportedCheckpoint: llama.cpp would compute something else.
    BadWeights: a type needs an importance matrix.
    """
    model = hyperparameters(checkpoint)
    placement = place_tensors(checkpoint, model, keep_tied_head=options.like_llama_cpp)
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.config, model.vocabulary, pre=options.pre)
    about = read_about(
        checkpoint.folder,
        checkpoint.config,
        options.name or checkpoint.folder.name,
        _parameters(placement, model),
        options.repo,
        like_llama_cpp=options.like_llama_cpp,
    )
    pairs = {
        "general.architecture": gguf.string(model.architecture),
        **about.pairs,
        **_sizes(model),
    }
    spelling = _spelling(vocabulary, like_llama_cpp=options.like_llama_cpp)
    goals = make_goals(wanted, pairs, options.importance, spelling)
    facts = ModelFacts(
        model.architecture, model.layers, model.heads // model.kv_heads, model.experts.count if model.experts else 0
    )
    notes = [*about.notes, *vocabulary.notes, *_dropped(placement)]
    return make_plan(_sources(placement.tensors), goals, facts, options.wishes, options.importance, notes)


def _parameters(placement: Placement, model: Hyperparameters) -> Parameters:
    total = sum(tensor.elements for tensor in placement.tensors)
    inside = sum(tensor.elements for tensor in placement.tensors if "_exps." in tensor.name)
    return Parameters(total, inside, model.experts.count if model.experts else 0)


def _dropped(placement: Placement) -> list[str]:
    """One sentence for each reason, not for each tensor."""
    reasons: dict[str, list[int]] = {}
    for dropped in placement.dropped:
        reasons.setdefault(dropped.reason, []).append(dropped.size)
    names = {dropped.reason: dropped.name for dropped in placement.dropped}
    return [
        f"Left out: {names[why] if len(sizes) == 1 else f'{len(sizes)} tensors'}, {why} ({sum(sizes) / 1e6:,.1f} MB)."
        for why, sizes in reasons.items()
    ]


def _sources(placed: Sequence[Placed]) -> list[SourceTensor]:
    return [
        SourceTensor(
            tensor.name,
            tensor.shape,
            [
                Stretch(
                    rows.tensor.file,
                    rows.tensor.offset
                    + rows.first * (kind := ggml.tensor_type(rows.tensor.dtype.lower())).row_bytes(tensor.shape[0]),
                    rows.count,
                    kind,
                )
                for rows in tensor.parts
            ],
            tensor.exact,
        )
        for tensor in placed
    ]


def _sizes(model: Hyperparameters) -> dict[str, gguf.Encoded]:
    """The keys that llama.cpp's loader asks for (conversion/base.py: set_gguf_parameters; conversion/qwen.py)."""
    pairs = {
        "block_count": gguf.u32(model.layers),
        "context_length": gguf.u32(model.context),
        "embedding_length": gguf.u32(model.width),
        "feed_forward_length": gguf.u32(model.feed_forward),
        "attention.head_count": gguf.u32(model.heads),
        "attention.head_count_kv": gguf.u32(model.kv_heads),
    }
    if scaling := model.scaling:
        pairs["rope.scaling.type"] = gguf.string(scaling.kind)
        pairs["rope.scaling.factor"] = gguf.f32(scaling.factor)
        if scaling.kind == "yarn":
            pairs["rope.scaling.original_context_length"] = gguf.u32(scaling.original_context)
            if scaling.attention != 1:
                pairs["rope.scaling.attn_factor"] = gguf.f32(scaling.attention)
    pairs["rope.freq_base"] = gguf.f32(model.rope_base)
    pairs["attention.layer_norm_rms_epsilon"] = gguf.f32(model.epsilon)
    if experts := model.experts:
        pairs["expert_count"] = gguf.u32(experts.count)
        pairs["expert_used_count"] = gguf.u32(experts.used)
        pairs["expert_feed_forward_length"] = gguf.u32(experts.width)
        pairs["expert_shared_feed_forward_length"] = gguf.u32(experts.shared_width)
    return {f"{model.architecture}.{key}": value for key, value in pairs.items()}


def _spelling(vocabulary: Vocabulary, *, like_llama_cpp: bool) -> dict[str, gguf.Encoded]:
    pairs: dict[str, gguf.Encoded] = {
        "model": gguf.string(vocabulary.model),
        "pre": gguf.string(vocabulary.pre),
        "tokens": gguf.strings(vocabulary.tokens),
    }
    if vocabulary.scores:
        pairs["scores"] = gguf.f32s(vocabulary.scores)
    pairs["token_type"] = gguf.i32s(vocabulary.kinds)
    if vocabulary.merges:
        pairs["merges"] = gguf.strings(vocabulary.merges)
    special = {role: id for role, id in vocabulary.special.items() if not (like_llama_cpp and role in ("eot", "eom"))}
    for role, number in special.items():
        pairs[_ROLES.get(role, f"{role}_token_id")] = gguf.u32(number)
    for what, flag in vocabulary.adds.items():
        if what == "space" and not like_llama_cpp:
            pairs["add_space_prefix"] = gguf.boolean(flag)
        elif what != "space":
            pairs[f"add_{what}_token"] = gguf.boolean(flag)
    first, count = vocabulary.first_unused, len(vocabulary.tokens)
    if first < count and not like_llama_cpp:
        pairs["suppress_tokens"] = gguf.i32s(range(first, count))
    found = {f"tokenizer.ggml.{key}": value for key, value in pairs.items()}
    return {**found, **_templates(vocabulary.templates)}


_ROLES = {
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
}  # sic: llama.cpp's spelling


def _templates(templates: Mapping[str, str]) -> dict[str, gguf.Encoded]:
    named = [name for name in templates if name]
    pairs = {"tokenizer.chat_templates": gguf.strings(named)} if named else {}
    for name, text in templates.items():
        pairs[f"tokenizer.chat_template{f'.{name}' if name else ''}"] = gguf.string(text)
    return pairs
