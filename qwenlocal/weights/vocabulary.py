"""
A checkpoint's vocabulary as GGUF wants it: tokens, kinds, merges or scores, special tokens, chat template.

Everything is read from the checkpoint's own files; a vocabulary that does not hang together is an error, since its
model would load and speak nonsense. Two kinds are known: byte-level BPE (tokenizer.json, or vocab.json and merges.txt;
Qwen1.5) and SentencePiece (tokenizer.model, or a tokenizer.json with byte fallback; CodeQwen1.5).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.errors import BadCheckpoint, CannotExpress, UsageProblem
from qwenlocal.weights import sentencepiece
from qwenlocal.weights.checkpoint import read_json, shortly
from qwenlocal.weights.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

if TYPE_CHECKING:
    from typing import TypeGuard

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
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Vocabulary:
    """
    `tokens[id]` and `kinds[id]` (GGUF's numbers: 1 normal, 3 control, 5 unused, …) for every row of the embeddings.

    Byte-level BPE has `merges` ("a b" in order of rank), SentencePiece has `scores`. `special` are ids by role ("eos",
    "bos", "pad", "eot", …). `templates` are chat templates by name, the usual one under "".
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(
        default_factory=dict
    )  # "bos", "eos": put one at the text's ends; "space": likewise
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def first_unused(self) -> int:
        """The id from which on there are only ids without a token."""
        at = len(self.kinds)
        while at and self.kinds[at - 1] == UNUSED:
            at -= 1
        return at


def read_vocabulary(folder: Path, config: Mapping[str, Any], size: int, *, pre: str | None = None) -> Vocabulary:
    """
    The vocabulary of the checkpoint in `folder`, filled up to `size` ids, the rows of its embedding matrix.

    `pre` names the pre-tokenizer where the checkpoint's regular expression is not a known one.

    Raises
    ------
    BadCheckpoint: a file is missing or damaged, an id is named twice or out of range, or ids are missing in between.
    CannotExpress: llama.cpp has no such tokenizer.
    """
    settings = _optional_json(folder / "tokenizer_config.json", "special tokens")
    if (folder / "tokenizer.model").exists():
        draft = _from_pieces(folder, settings, size)
    elif (folder / "tokenizer.json").exists():
        draft = _from_json(folder, settings, size, pre)
    elif (folder / "vocab.json").exists():
        draft = _from_parts(folder, settings, size, pre)
    else:
        raise BadCheckpoint(folder, "it has no tokenizer.json (nor tokenizer.model, nor vocab.json)")
    draft.check_texts()
    special, notes = _special(folder, settings, config, draft)
    if draft.pre not in PRE_TOKENIZER_NAMES:
        raise UsageProblem(f"llama.cpp has no pre-tokenizer called “{draft.pre}”.", hint="Qwen1.5's is: --pre qwen2")
    return Vocabulary(
        draft.model,
        draft.pre,
        draft.tokens,
        draft.kinds,
        draft.merges,
        draft.scores,
        special,
        draft.adds,
        _templates(folder, settings),
        notes,
    )


@dataclass
class _Draft:
    """A vocabulary while it is put together. `file` is where it comes from."""

    file: Path
    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    adds: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def empty(cls, file: Path, model: str, pre: str, size: int) -> _Draft:
        """Nothing but ids without a token, which no text can reach."""
        return cls(file, model, pre, [f"[PAD{number}]" for number in range(size)], [UNUSED] * size)

    def put(self, number: Any, token: Any, kind: int) -> None:
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(token, str) or number < 0:
            raise BadCheckpoint(
                self.file, f"the token {shortly(token)} with the id {shortly(number)} has the wrong form"
            )
        if number >= len(self.tokens):
            raise BadCheckpoint(
                self.file, f"“{token}” has the id {number:,}, but the embeddings have only {len(self.tokens):,} rows"
            )
        self.tokens[number], self.kinds[number] = token, kind

    def put_all(self, vocabulary: Mapping[str, Any], kind: int) -> None:
        """`put` for many; a hundred and fifty thousand at once where all have the right form."""
        numbers = vocabulary.values()
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= len(self.tokens):
            for token, number in vocabulary.items():
                self.put(number, token, kind)
        for token, number in vocabulary.items():
            self.tokens[number] = token
            self.kinds[number] = kind

    def add(self, added: Mapping[int, tuple[str, int]]) -> None:
        """Tokens beside the vocabulary proper; an id that it has given to another token is not theirs."""
        for number, (token, kind) in added.items():
            known = self.tokens[number] if 0 <= number < len(self.tokens) else token
            if known != token and self.kinds[number] != UNUSED:
                raise BadCheckpoint(self.file, f"the id {number} is given twice, to “{known}” and to “{token}”")
            self.put(number, token, kind)

    def check_texts(self) -> None:
        """Each token has a text of its own, and one that llama.cpp can keep: it ends texts at a zero byte."""
        whole = "".join(self.tokens)
        if "\0" in whole or not _is_text(whole):
            wrong = next(token for token in self.tokens if "\0" in token or not _is_text(token))
            raise CannotExpress(self.file, f"the token {shortly(wrong)} cannot stand in a GGUF file")
        if len(set(self.tokens)) < len(self.tokens):
            first: dict[str, int] = {}
            for number, token in enumerate(self.tokens):
                if token in first:
                    raise BadCheckpoint(self.file, f"“{token}” has two ids, {first[token]} and {number}")
                first[token] = number


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- byte-level BPE


def _from_json(folder: Path, settings: Mapping[str, Any], size: int, pre: str | None) -> _Draft:
    file = folder / "tokenizer.json"
    data = read_json(file, "the vocabulary")
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CannotExpress(file, "its tokenizer is not BPE, which all Qwen1.5 models have")
    merges = _merges(file, model.get("merges"))
    added = _added(file, data.get("added_tokens"), settings)
    if model.get("byte_fallback"):
        return _with_byte_fallback(file, data, model["vocab"], merges, added, size, settings)
    draft = _Draft.empty(file, "gpt2", pre or _pre_tokenizer(file, data), size)
    draft.adds = _adds(data.get("post_processor"), settings)
    _fill(draft, model["vocab"], merges, added)
    return draft


def _from_parts(folder: Path, settings: Mapping[str, Any], size: int, pre: str | None) -> _Draft:
    """vocab.json and merges.txt, which Qwen's repositories have beside tokenizer.json."""
    file, merges_file = folder / "vocab.json", folder / "merges.txt"
    if pre is None and settings.get("tokenizer_class") not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise CannotExpress(
            file,
            "without tokenizer.json it is not said how text is cut into words",
            hint="If you know, say: --pre qwen2",
        )
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as reason:
        raise BadCheckpoint(merges_file, f"it cannot be read ({reason})") from reason
    merges = _merges(merges_file, [line for line in lines if line and not line.startswith("#version")])
    draft = _Draft.empty(file, "gpt2", pre or "qwen2", size)
    draft.adds = {"bos": False, "eos": False}
    _fill(draft, read_json(file, "the vocabulary"), merges, _added(file, None, settings))
    return draft


def _fill(
    draft: _Draft, vocabulary: Mapping[str, Any], merges: list[tuple[str, str]], added: Mapping[int, tuple[str, int]]
) -> None:
    draft.put_all(vocabulary, NORMAL)
    _check_holes(draft, vocabulary)
    _check_merges(draft.file, vocabulary, merges)
    draft.merges = [f"{left} {right}" for left, right in merges]
    draft.add(added)


def _check_holes(draft: _Draft, vocabulary: Mapping[str, Any]) -> None:
    """Ids of the vocabulary proper are given to one token each, without gaps."""
    if not vocabulary:
        raise BadCheckpoint(draft.file, "its vocabulary is empty")
    last = max(vocabulary.values())
    if last + 1 == len(vocabulary):
        numbers = set(vocabulary.values())
        if len(numbers) == len(vocabulary):
            return
    seen: dict[int, str] = {}
    for token, number in vocabulary.items():
        if number in seen:
            raise BadCheckpoint(draft.file, f"the id {number} is given twice, to “{seen[number]}” and to “{token}”")
        seen[number] = token
    hole = next(number for number in range(last) if number not in seen)
    raise BadCheckpoint(draft.file, f"no token has the id {hole}, though others go up to {last}")


def _merges(file: Path, found: Any) -> list[tuple[str, str]]:
    """transformers 4 writes "a b", transformers 5 pairs."""
    if not isinstance(found, list) or not found:
        raise BadCheckpoint(file, "there are no merges in it")
    if set(map(type, found)) == {str}:
        pairs = [tuple(entry.split(" ")) for entry in found]
        if set(map(len, pairs)) == {2} and not any("" in pair for pair in pairs):
            return [(left, right) for left, right in pairs]
    merges: list[tuple[str, str]] = []
    for entry in found:
        try:
            left, right = entry.split(" ") if isinstance(entry, str) else entry
            if not left or not right or type(entry) is dict:
                raise ValueError
            merges.append((left.replace(" ", "Ġ"), right.replace(" ", "Ġ")))
        except (ValueError, TypeError, AttributeError) as wrong:
            raise BadCheckpoint(file, f"the merge {shortly(entry)} is not a pair of tokens") from wrong
    return merges


def _check_merges(file: Path, vocabulary: Mapping[str, Any], merges: Iterable[tuple[str, str]]) -> None:
    for left, right in merges:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise BadCheckpoint(file, f"the merge of “{left}” and “{right}” needs a token that is not there")


def _pre_tokenizer(file: Path, data: Mapping[str, Any]) -> str:
    expressions = list(_expressions(data.get("pre_tokenizer")))
    digest = hashlib.sha256("".join(expressions).encode(errors="replace")).hexdigest()
    name = PRE_TOKENIZERS.get(digest)
    if name is None:
        shown = expressions[0][:60] + "…" if expressions else "none"
        raise CannotExpress(
            file,
            f"it cuts text into words in a way that is not Qwen1.5's (the expression {shown})",
            hint="If you know llama.cpp's name of it, say so: --pre NAME",
        )
    return name


def _expressions(pre: Any) -> Iterable[str]:
    if isinstance(pre, dict):
        expression = pre.get("pattern", {}).get("Regex") if isinstance(pre.get("pattern"), dict) else None
        if isinstance(expression, str):
            yield expression
        inner = pre.get("pretokenizers")
        for part in inner if isinstance(inner, list) else ():
            yield from _expressions(part)


def _adds(post: Any, settings: Mapping[str, Any]) -> dict[str, bool]:
    """
    Whether a token is put at a text's beginning or end.

    tokenizer.json's post-processor says so, or does not (ByteLevel, as Qwen's is); where it is silent, the settings do.
    """
    found = {role: flag for role in ("bos", "eos") if isinstance(flag := settings.get(f"add_{role}_token"), bool)}
    inner = post.get("processors") if isinstance(post, dict) else None
    for step in inner if isinstance(inner, list) else [post]:
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(step, dict) and step.get("type") == "ByteLevel":
            found = {"bos": False, "eos": False}
        elif isinstance(single, list) and single and step.get("type") == "TemplateProcessing":
            ends = (isinstance(single[n], dict) and "SpecialToken" in single[n] for n in (0, -1))
            found = dict(zip(("bos", "eos"), ends, strict=True))
    return found


def _added(file: Path, listed: Any, settings: Mapping[str, Any]) -> dict[int, tuple[str, int]]:
    """Tokens beside the vocabulary proper, as tokenizer.json and tokenizer_config.json list them: id → text, kind."""
    found: dict[int, tuple[str, int]] = {}
    decoder = settings.get("added_tokens_decoder")
    entries: list[Any] = [
        {**entry, "id": int(number) if re.fullmatch(r"[0-9]{1,9}", number) else number}
        for number, entry in (decoder.items() if isinstance(decoder, dict) else ())
        if isinstance(entry, dict)
    ]
    entries += listed if isinstance(listed, list) else []
    for entry in entries:
        number, token = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(token, str):
            raise BadCheckpoint(file, f"the added token {shortly(entry)} has the wrong form")
        known = found.get(number)
        if known and known[0] != token:
            raise BadCheckpoint(file, f"the id {number} is given twice, to “{known[0]}” and to “{token}”")
        found[number] = (token, CONTROL if entry.get("special") or _looks_special(token) else USER_DEFINED)
    return found


def _looks_special(token: str) -> bool:
    return token.startswith("<|") and token.endswith("|>")


# --- SentencePiece


def _from_pieces(folder: Path, settings: Mapping[str, Any], size: int) -> _Draft:
    file = folder / "tokenizer.model"
    model = sentencepiece.read_pieces(file)
    draft = _Draft.empty(file, "llama", "default", size)
    draft.scores = [-10000.0] * size
    for number, piece in enumerate(model.pieces):
        draft.put(number, *_as_matched(piece.text, piece.kind))
        draft.scores[number] = piece.score
    fast = _optional_json(folder / "tokenizer.json", "the vocabulary")
    draft.adds = {"space": model.adds_space, **_adds(fast.get("post_processor"), settings)}
    listed = fast.get("added_tokens")
    extra = _optional_json(folder / "added_tokens.json", "further tokens")
    more = [{"id": number, "content": token} for token, number in extra.items()]
    added = {**_added(folder / "added_tokens.json", more, {}), **_added(file, listed, settings)}
    for number, (token, kind) in added.items():
        there = (draft.tokens[number], draft.kinds[number]) if 0 <= number < size else ("", UNUSED)
        if there[1] in (UNKNOWN, CONTROL) and there[0] == token:
            continue
        if there[1] in (NORMAL, BYTE) and there[0] != token:
            raise BadCheckpoint(file, f"the id {number} is given twice, to “{there[0]}” and to “{token}”")
        _put_added(draft, number, token, kind)
    return draft


def _put_added(draft: _Draft, number: int, token: str, kind: int) -> None:
    """A token beside the pieces; one of spaces alone stays what it is among them, so that it is found by merging."""
    text, kind = _as_matched(token, kind)
    draft.put(number, text, kind)
    if kind != NORMAL:
        draft.scores[number] = -1000.0


def _as_matched(text: str, kind: int) -> tuple[str, int]:
    """
    Text that is matched as it stands (user defined) has spaces; "▁" is what llama.cpp writes for them in pieces only.

    A piece of spaces alone, or of one letter, is better found by merging, as llama.cpp's own converter has them all.
    """
    if kind != USER_DEFINED:
        return text, kind
    if not text.strip("▁ ") or len(text) == 1:
        return text.replace(" ", "▁"), NORMAL
    return text.replace("▁", " "), kind


def _with_byte_fallback(
    file: Path,
    data: Mapping[str, Any],
    vocabulary: Mapping[str, Any],
    merges: list[tuple[str, str]],
    added: Mapping[int, tuple[str, int]],
    size: int,
    settings: Mapping[str, Any],
) -> _Draft:
    """
    A SentencePiece vocabulary in the form of tokenizer.json, which keeps ranks of merges instead of scores.

    Among the neighbours that may be merged, both take the best: the lowest rank, or the highest score. So a token's
    score is the negative rank of the first merge that makes it.
    """
    draft = _Draft.empty(file, "llama", "default", size)
    draft.scores = [-10000.0] * size
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left.replace("Ġ", " ") + right.replace("Ġ", " "), rank)
    for token, number in vocabulary.items():
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        draft.put(number, token, BYTE if is_byte else NORMAL)
        draft.scores[number] = -float(ranks.get(token, len(merges)))
    _check_holes(draft, vocabulary)
    _refuse_other_normalizers(file, data.get("normalizer"))
    for number, (token, kind) in added.items():
        known = draft.tokens[number] if 0 <= number < size else token
        if known != token and draft.kinds[number] != UNUSED:
            raise BadCheckpoint(file, f"the id {number} is given twice, to “{known}” and to “{token}”")
        _put_added(draft, number, token, UNKNOWN if token == "<unk>" else kind)
    draft.adds = {"space": _prepends_space(data), **_adds(data.get("post_processor"), settings)}
    return draft


def _refuse_other_normalizers(file: Path, step: Any) -> None:
    """llama.cpp writes "▁" for spaces, and may put one before a text; it does nothing else."""
    if not isinstance(step, dict):
        return
    inner = step.get("normalizers")
    if step.get("type") == "Sequence" and isinstance(inner, list):
        for part in inner:
            _refuse_other_normalizers(file, part)
    elif step.get("type") not in ("Prepend", "Replace"):
        raise CannotExpress(file, f"it changes text before cutting it ({step.get('type')}), which llama.cpp does not")


def _prepends_space(data: Mapping[str, Any]) -> bool:
    steps = [data.get("normalizer"), data.get("pre_tokenizer")]
    while steps:
        step = steps.pop()
        if not isinstance(step, dict):
            continue
        if step.get("type") == "Prepend" or (
            step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        ):
            return True
        for inner in ("normalizers", "pretokenizers"):
            steps += step[inner] if isinstance(step.get(inner), list) else []
    return False


# --- special tokens and templates


def _special(
    folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], draft: _Draft
) -> tuple[dict[str, int], list[str]]:
    """Ids by role: tokenizer_config.json first, then config.json; every end that generation_config.json names."""
    ids = {token: number for number, token in enumerate(draft.tokens) if draft.kinds[number] != UNUSED}
    found: dict[str, int] = {}
    notes: list[str] = []
    for role in _SPECIAL:
        entry = settings.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text in ids:
            found[role] = ids[text]
        number = config.get(f"{role}_token_id")
        if _is_id(number, draft):
            if role in found and found[role] != number:
                written, other = draft.tokens[found[role]], draft.tokens[number]
                notes.append(f"The files disagree on {role}: tokenizer_config.json's {written} is kept, not {other}.")
            found.setdefault(role, number)
    ends = _ends(folder, found, draft, ids)
    for role, number in zip(("eot", "eom"), ends, strict=False):
        found[role] = number
    unsaid = [draft.tokens[number] for number in ends[2:]]
    if unsaid:
        notes.append(f"GGUF has no place for further end tokens: {', '.join(unsaid)}.")
    return found, notes


def _ends(folder: Path, found: Mapping[str, int], draft: _Draft, ids: Mapping[str, int]) -> list[int]:
    """Tokens beside eos with which the model ends: the end of a turn first, then what the makers' settings list."""
    listed = _optional_json(folder / "generation_config.json", "").get("eos_token_id")
    numbers = [ids[_END_OF_TURN]] if _END_OF_TURN in ids else []
    numbers += [number for number in (listed if isinstance(listed, list) else [listed]) if _is_id(number, draft)]
    known = {number for number in (found.get("eos"), ids.get("<|endoftext|>")) if number != ids.get(_END_OF_TURN)}
    return [number for number in dict.fromkeys(numbers) if number not in known]


def _is_id(number: Any, draft: _Draft) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(draft.tokens)


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja goes before tokenizer_config.json, as in transformers; then chat_template.json."""
    file = folder / "chat_template.jinja"
    found: Any = settings.get("chat_template")
    if file.exists():
        try:
            found = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as reason:
            raise BadCheckpoint(file, f"it cannot be read ({reason})") from reason
    elif found is None:
        found = _optional_json(folder / "chat_template.json", "").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"": found, **_additional_templates(folder)}
    named = {
        _plain_name(entry["name"]): entry["template"]
        for entry in (found if isinstance(found, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    if not named:
        raise BadCheckpoint(folder / "tokenizer_config.json", "its “chat_template” has the wrong form")
    named[""] = named.pop("default", next(iter(named.values())))
    return dict(sorted(named.items()))


def _additional_templates(folder: Path) -> dict[str, str]:
    """Further ones, a file each, as transformers 5 has them."""
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {_plain_name(file.stem): file.read_text(encoding="utf-8", errors="replace") for file in files}


def _plain_name(name: str) -> str:
    """Letters and digits; it becomes part of a key (gguf-py, gguf_writer.py: add_chat_template)."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _optional_json(file: Path, what: str) -> dict[str, Any]:
    return read_json(file, what) if file.exists() else {}
