"""
Byte-level BPE vocabularies, Qwen1.5's kind: from tokenizer.json, or from vocab.json and merges.txt.

llama.cpp has its own code for splitting text into words and for merging bytes. A tokenizer.json that needs anything
else, such as another normalizer, is refused: the model would get other tokens than in its training.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import brief_repr
from qwenlocal.weights.added_tokens import SETTINGS, read_added_tokens, special_tokens
from qwenlocal.weights.gguf_reader import CONTROL, NORMAL
from qwenlocal.weights.json_files import read_json
from qwenlocal.weights.vocabulary import (
    Vocabulary,
    apply_post_processor,
    flatten_steps,
    parse_merges,
)

# With the pre-tokenizer "qwen2", `engine.tokenizer` composes texts; a GGUF file cannot say whether to do that.
_NORMALIZED = "The tokenizer composes characters (NFC, é from e and ´), but qwenlocal only does with --pre qwen2."
_NOT_NORMALIZED = "The tokenizer does not compose characters (NFC, é from e and ´), but qwenlocal does, as for Qwen1.5."
_END_OF_TEXT = "<|endoftext|>"
# The regular expression that splits text into words, called "qwen2" in llama.cpp (llama-vocab.cpp).
_QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# All names that llama.cpp accepts (llama-vocab.cpp: tokenizer_pre); it does not load a file with another one.
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
    """.split()  # noqa: SIM905 - a hundred quotes would be less readable
)


def build_byte_bpe(
    file: Path,
    data: Mapping[str, Any],
    added: Mapping[int, tuple[str, int]],
    settings: Mapping[str, Any],
    size: int,
    pre: str | None,
) -> Vocabulary:
    """
    Build the vocabulary of a tokenizer.json with the content `data`; `pre` is that of `read_vocabulary`.

    Raises
    ------
    BadCheckpoint: the vocabulary is inconsistent.
    UnsupportedCheckpoint: llama.cpp would tokenize differently.
    """
    model = data["model"]
    _check_normalizer(file, data.get("normalizer"))
    check_merging(file, model)
    _check_prefix_space(file, settings)
    vocabulary = Vocabulary.empty(file, "gpt2", pre or _find_pre_tokenizer(file, data), size)
    _fill(vocabulary, model["vocab"], parse_merges(file, model.get("merges")), added)
    apply_post_processor(vocabulary, data.get("post_processor"), settings)
    is_normalized = any(flatten_steps(data.get("normalizer"), "normalizers"))
    if vocabulary.pre == "qwen2":
        _check_composed(file, added)
    if is_normalized != (vocabulary.pre == "qwen2"):
        vocabulary.notes.append(_NORMALIZED if is_normalized else _NOT_NORMALIZED)
    return vocabulary


def _check_composed(file: Path, added: Mapping[int, tuple[str, int]]) -> None:
    for token, _ in added.values():
        if not unicodedata.is_normalized("NFC", token):
            raise UnsupportedCheckpoint(
                file, f"texts are composed (Unicode NFC), so none contains the added token {brief_repr(token)}"
            )


def build_from_vocab_json(folder: Path, settings: Mapping[str, Any], size: int, pre: str | None) -> Vocabulary:
    """
    Build the vocabulary of vocab.json and merges.txt, which Qwen's repositories have next to tokenizer.json.

    Raises
    ------
    As `build_byte_bpe`.
    """
    file, merges_file = folder / "vocab.json", folder / "merges.txt"
    if pre is None and settings.get("tokenizer_class") not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise UnsupportedCheckpoint(
            file,
            "without tokenizer.json, it is unknown how text is split into words",
            hint="If it is split as in Qwen1.5: --pre qwen2",
        )
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as reason:
        raise BadCheckpoint.unreadable(merges_file, reason) from reason
    merges = parse_merges(merges_file, [line for line in lines if line and not line.startswith("#version")])
    _check_prefix_space(file, settings)
    vocabulary = Vocabulary.empty(file, "gpt2", pre or "qwen2", size)
    vocabulary.add_flags = {"bos": False, "eos": False}
    ids = read_json(file, "the vocabulary")
    added = read_added_tokens(folder, None, settings, size)
    _fill(vocabulary, ids, merges, added or _default_tokens(ids, settings, size))
    return vocabulary


def _default_tokens(ids: Mapping[str, Any], settings: Mapping[str, Any], size: int) -> dict[int, tuple[str, int]]:
    """
    Return the token that Qwen2Tokenizer appends to a vocabulary of text alone.

    It appends all special tokens that have no id, in the order of their roles (tokenization_qwen2.py). More than that
    one would get ids that the model was hardly trained with, so they stay unknown.
    """
    defaults = dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END_OF_TEXT)
    tokens = special_tokens({**defaults, **settings})
    missing = {token for token in tokens if isinstance(token, str) and token not in ids}
    return {len(ids): (_END_OF_TEXT, CONTROL)} if missing == {_END_OF_TEXT} and len(ids) < size else {}


def _fill(
    vocabulary: Vocabulary,
    ids: Mapping[str, Any],
    merges: list[tuple[str, str]],
    added: Mapping[int, tuple[str, int]],
) -> None:
    vocabulary.put_all(ids, NORMAL)
    vocabulary.check_ids(ids)
    _check_merges(vocabulary.file, ids, merges)
    vocabulary.merges = [f"{left} {right}" for left, right in merges]
    for number, (token, token_type) in added.items():
        vocabulary.check_free(number, token)
        vocabulary.put(number, token, token_type)


def _check_merges(file: Path, vocabulary: Mapping[str, Any], merges: list[tuple[str, str]]) -> None:
    tokens = {token for pair in merges for token in pair} | {left + right for left, right in merges}
    if tokens <= vocabulary.keys():
        return
    for left, right in merges:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise BadCheckpoint(
                file, f"the merge of “{left}” and “{right}” needs a token that is not in the vocabulary"
            )


def _find_pre_tokenizer(file: Path, data: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json, which must be that of Qwen1.5."""
    steps = list(flatten_steps(data.get("pre_tokenizer"), "pretokenizers"))
    expressions = [str(_split_pattern(step)) for step in steps if step.get("type") == "Split"]
    if "".join(expressions) != _QWEN2_REGEX:
        raise _other_pre_tokenizer(file, f"the regex is {brief_repr(expressions[0]) if expressions else 'missing'}")
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        raise _other_pre_tokenizer(file, f"the steps are {', '.join(str(step.get('type')) for step in steps)}")
    split, byte_level = steps
    for step, key, default, expected in (
        (split, "behavior", None, "Isolated"),
        (split, "invert", False, False),
        (byte_level, "add_prefix_space", True, False),  # the defaults: tokenizers, byte_level.rs
        (byte_level, "use_regex", True, False),
    ):
        if step.get(key, default) != expected:
            raise _other_pre_tokenizer(file, f"{key} is {brief_repr(step.get(key, default))}")
    return "qwen2"


def _other_pre_tokenizer(file: Path, difference: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        file,
        f"it splits text into words differently from Qwen1.5 ({difference})",
        hint="If llama.cpp supports it, pass llama.cpp's name for it: --pre NAME",
    )


def _split_pattern(step: Mapping[str, Any]) -> Any:
    pattern = step.get("pattern")
    return pattern.get("Regex") if isinstance(pattern, dict) else pattern


def _check_normalizer(file: Path, normalizer: Any) -> None:
    """Accept NFC only, which `engine.tokenizer` applies before llama.cpp gets a text, or nothing."""
    for step in flatten_steps(normalizer, "normalizers"):
        if step.get("type") != "NFC":
            kind = brief_repr(step.get("type"))
            raise UnsupportedCheckpoint(file, f"it changes text before tokenizing ({kind}), which llama.cpp does not")


def _check_prefix_space(file: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("add_prefix_space"):
        raise UnsupportedCheckpoint(
            file.parent / SETTINGS,
            "its tokenizer puts a space before every text (add_prefix_space), which llama.cpp does not",
            hint='If the model was trained without that, set "add_prefix_space" to false in the file.',
        )


def check_merging(file: Path, model: Mapping[str, Any]) -> None:
    """Raise `UnsupportedCheckpoint` if a BPE model has options that change how a word becomes tokens."""
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise UnsupportedCheckpoint(
                file, f"its tokenizer has {key} = {brief_repr(model[key])}, which llama.cpp does not support"
            )
