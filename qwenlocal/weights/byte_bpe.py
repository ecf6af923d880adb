"""
Byte-level BPE as GGUF wants it, from tokenizer.json, or from vocab.json and merges.txt: Qwen1.5's kind of vocabulary.

llama.cpp has its own code for cutting text into words and merging bytes. So whatever a tokenizer.json asks for beyond
that, another normalizer or another way of cutting, is refused: the model would read other tokens than it was taught.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.weights.checkpoint import read_json, shortly
from qwenlocal.weights.draft import Draft, added_tokens, adds, merge_pairs, steps_of
from qwenlocal.weights.kinds import NORMAL

# The sha256 of the regular expression that cuts text into words, and llama.cpp's name for it (llama-vocab.cpp).
PRE_TOKENIZERS = {
    # (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e": "qwen2",
}
# Those that llama.cpp knows (llama-vocab.cpp: tokenizer_pre); with another one it does not load the file.
PRE_TOKENIZER_NAMES = frozenset(
    """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
    deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4
    gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2
    hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano
    joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2
    midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe
    sarvam-moe seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya
    trillion ufakzeka viking whitespace youtu
    """.split()  # noqa: SIM905 - a hundred quotes would not read better
)


def byte_level(
    file: Path,
    data: Mapping[str, Any],
    added: Mapping[int, tuple[str, int]],
    settings: Mapping[str, Any],
    size: int,
    pre: str | None,
) -> Draft:
    """
    The vocabulary of a tokenizer.json, whose content `data` is; `pre` as `vocabulary.read_vocabulary` has it.

    Raises
    ------
    BadCheckpoint: it does not hang together.
    UnsupportedCheckpoint: llama.cpp would cut texts otherwise.
    """
    model = data["model"]
    _refuse_other_normalizers(file, data.get("normalizer"))
    _refuse_other_merging(file, model)
    draft = Draft.empty(file, "gpt2", pre or _pre_tokenizer(file, data), size)
    draft.adds = adds(data.get("post_processor"), settings)
    _fill(draft, model["vocab"], merge_pairs(file, model.get("merges")), added)
    return draft


def from_parts(folder: Path, settings: Mapping[str, Any], size: int, pre: str | None) -> Draft:
    """
    vocab.json and merges.txt, which Qwen's repositories have beside tokenizer.json.

    Raises
    ------
    As `byte_level`.
    """
    file, merges_file = folder / "vocab.json", folder / "merges.txt"
    if pre is None and settings.get("tokenizer_class") not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise UnsupportedCheckpoint(
            file,
            "without tokenizer.json it is not said how text is cut into words",
            hint="If you know, say: --pre qwen2",
        )
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as reason:
        raise BadCheckpoint(merges_file, f"cannot read it ({reason})") from reason
    merges = merge_pairs(merges_file, [line for line in lines if line and not line.startswith("#version")])
    draft = Draft.empty(file, "gpt2", pre or "qwen2", size)
    draft.adds = {"bos": False, "eos": False}
    _fill(draft, read_json(file, "the vocabulary"), merges, added_tokens(file, None, settings))
    return draft


def _fill(
    draft: Draft, vocabulary: Mapping[str, Any], merges: list[tuple[str, str]], added: Mapping[int, tuple[str, int]]
) -> None:
    draft.put_all(vocabulary, NORMAL)
    draft.check_holes(vocabulary)
    _check_merges(draft.file, vocabulary, merges)
    draft.merges = [f"{left} {right}" for left, right in merges]
    draft.add(added)


def _check_merges(file: Path, vocabulary: Mapping[str, Any], merges: list[tuple[str, str]]) -> None:
    needed = {token for pair in merges for token in pair} | {left + right for left, right in merges}
    if needed <= vocabulary.keys():
        return
    for left, right in merges:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise BadCheckpoint(file, f"the merge of “{left}” and “{right}” needs a token that is not there")


def _pre_tokenizer(file: Path, data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the file says text is cut into words."""
    steps = list(steps_of(data.get("pre_tokenizer"), "pretokenizers"))
    splits = [step for step in steps if step.get("type") == "Split"]
    expressions = [str(_expression(step)) for step in splits]
    digest = hashlib.sha256("".join(expressions).encode(errors="replace")).hexdigest()
    name = PRE_TOKENIZERS.get(digest)
    if name is None:
        shown = shortly(expressions[0]) if expressions else "none"
        raise _other_cutting(file, f"the expression {shown}")
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        raise _other_cutting(file, f"the steps {', '.join(str(step.get('type')) for step in steps)}")
    split, level = steps
    for step, key, usual, wanted in (
        (split, "behavior", None, "Isolated"),
        (split, "invert", False, False),
        (level, "add_prefix_space", True, False),  # what is usual: tokenizers, byte_level.rs
        (level, "use_regex", True, False),
    ):
        if step.get(key, usual) != wanted:
            raise _other_cutting(file, f"{key} is {shortly(step.get(key, usual))}")
    return name


def _other_cutting(file: Path, what: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        file,
        f"it cuts text into words in a way that is not Qwen1.5's ({what})",
        hint="If you know llama.cpp's name of it, say so: --pre NAME",
    )


def _expression(step: Mapping[str, Any]) -> Any:
    pattern = step.get("pattern")
    return pattern.get("Regex") if isinstance(pattern, dict) else pattern


def _refuse_other_normalizers(file: Path, found: Any) -> None:
    """NFC is what the engine does before llama.cpp gets a text (`engine/text.py`)."""
    for step in steps_of(found, "normalizers"):
        if step.get("type") != "NFC":
            kind = shortly(step.get("type"))
            raise UnsupportedCheckpoint(file, f"it changes text before cutting it ({kind}), which llama.cpp does not")


def _refuse_other_merging(file: Path, model: Mapping[str, Any]) -> None:
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise UnsupportedCheckpoint(
                file, f"its tokenizer has {key} = {shortly(model[key])}, which llama.cpp does not know"
            )
