"""The tokenizer that a model file defines, through llama.cpp, and incremental detokenization with stop strings."""

from __future__ import annotations

import codecs
import ctypes
import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenlocal.engine.token_types import (
    ATTR_CONTROL,
    ATTR_NORMAL,
    ATTR_UNKNOWN,
    ATTR_UNUSED,
    ATTR_USER_DEFINED,
    FORCED_TEXTS,
    TokenTypes,
)
from qwenlocal.weights.gguf_reader import PADDING, read_token_types

# "tokenizer.ggml.<role>_token_id" (llama-arch.cpp), spelled as there
_ROLES = (
    "bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "cls",
    "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle",
)  # fmt: skip
_SPACE = "▁".encode()
_PIECES = 4096  # tokens whose bytes are remembered
_CONTROL = ATTR_CONTROL | ATTR_UNKNOWN
# Where a text is cut so that llama.cpp does not find `FORCED_TEXTS` in it; Qwen's pre-tokenizer splits there, too.
_FORCED_CUT = re.compile("|".join(f"(?<=<\\|)(?={re.escape(text[2:])})" for text in sorted(FORCED_TEXTS)).encode())


class Tokenizer:
    """
    The tokenizer of `model`, a C pointer; `c` holds llama.cpp's functions.

    `metadata` returns a value of the model file `path` as text, "" if it is missing.
    """

    def __init__(self, c: Any, model: Any, path: Path, metadata: Callable[[str], str]) -> None:
        self._c = c
        self._vocab = c.llama_model_get_vocab(model)
        self._piece = functools.lru_cache(_PIECES)(self._read_piece)
        self._types = TokenTypes(c, self._vocab, functools.partial(read_token_types, path))
        # Qwen's tokenizer.json starts with Unicode normalization form C; llama.cpp omits it.
        self._normalize = metadata("tokenizer.ggml.pre") == "qwen2"
        self.hides_padding = self._has_reachable_padding()
        ids = {role: metadata(f"tokenizer.ggml.{role}_token_id") for role in _ROLES}
        roles = {role: int(number) for role, number in ids.items() if number}
        # Tokens to which the file gives a role keep the types that llama.cpp gives them.
        self._with_role: frozenset[int] = frozenset()
        self.false_end = self._find_false_end(roles.get("eos", -1))
        self._with_role = frozenset(roles.values()) - {self.false_end}

    def __len__(self) -> int:
        return int(self._c.llama_vocab_n_tokens(self._vocab))

    def ends(self) -> list[int]:
        """Return the ids of the end-of-text and end-of-turn tokens."""
        ids = (self._c.llama_vocab_eos(self._vocab), self._c.llama_vocab_eot(self._vocab))
        return sorted({token for token in ids if token >= 0 and self.is_end(token)})

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        """
        Convert `text` to token ids; with `special`, spellings like `<|im_end|>` become control tokens.

        Lone surrogates (terminal input that is not UTF-8) become question marks.
        """
        if self._normalize:
            text = unicodedata.normalize("NFC", text)
        parts = _split_padding(text) if self.hides_padding and PADDING.search(text) else [text]
        ids = [self._c.llama_vocab_bos(self._vocab)] if add_bos else []
        for part in parts:
            ids += self.tokenize_bytes(part.encode("utf-8", errors="replace"), special=special)
        return ids

    def _has_reachable_padding(self) -> bool:
        """
        Return whether typing the name of a padding token yields that token, as some old converters allowed.

        Padding tokens are at the end of the vocabulary, so the last one is enough to tell.
        """
        last = len(self) - 1
        is_reachable = self._c.llama_vocab_get_attr(self._vocab, last) & ATTR_USER_DEFINED
        return bool(is_reachable and PADDING.fullmatch(self.text_of(last)))

    def tokenize_bytes(self, data: bytes, *, special: bool = False) -> list[int]:
        """Convert UTF-8 to token ids without normalization; spelled-out padding tokens are parsed."""
        ids = self._tokenize(data, special=True)
        if not any(self._is_misread(token, special) for token in set(ids)):
            return ids
        ids = []
        for number, part in enumerate(self._special_patterns[special].split(data)):
            if number % 2:
                ids.append(self._specials[part])
                continue
            for text in _FORCED_CUT.split(part):
                ids += self._tokenize(text, special=False)
        return ids

    def _tokenize(self, data: bytes, *, special: bool) -> list[int]:
        """Call llama.cpp; with `special`, it finds all tokens in the text that it considers special."""
        capacity = len(data) + 8
        ids = (ctypes.c_int32 * capacity)()
        count = self._c.llama_tokenize(self._vocab, data, len(data), ids, capacity, False, special)
        if count < 0:
            ids = (ctypes.c_int32 * -count)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), ids, -count, False, special)
        return ids[:count]

    def _is_misread(self, token: int, special: bool) -> bool:
        """Return whether llama.cpp may have found `token` in a text that, by the file, does not spell it."""
        attributes = self._attributes(token)
        if attributes & _CONTROL:
            return not special
        is_special = self._c.llama_vocab_get_attr(self._vocab, token) & (ATTR_CONTROL | ATTR_USER_DEFINED)
        return bool(is_special) and not attributes & ATTR_USER_DEFINED

    @functools.cached_property
    def _specials(self) -> dict[bytes, int]:
        """The ids of the tokens that are found in a text as a whole, by spelling."""
        ids = (token for token in range(len(self)) if self._attributes(token) & (_CONTROL | ATTR_USER_DEFINED))
        return {self.text_of(token).encode(): token for token in ids}

    @functools.cached_property
    def _special_patterns(self) -> dict[bool, re.Pattern[bytes]]:
        """Patterns of the user-defined tokens in `_specials` (False), and of all (True); longer ones match first."""
        return {special: self._compile_specials(special) for special in (False, True)}

    def _compile_specials(self, special: bool) -> re.Pattern[bytes]:
        kinds = _CONTROL | ATTR_USER_DEFINED if special else ATTR_USER_DEFINED
        texts = [re.escape(text) for text, token in self._specials.items() if self._attributes(token) & kinds]
        texts.sort(key=len, reverse=True)
        return re.compile(b"(%b)" % (b"|".join(texts) or b"(?!)"))

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of `token`, often incomplete UTF-8; control tokens have none unless `special`."""
        return self._piece(token, special)

    def _read_piece(self, token: int, special: bool) -> bytes:
        attributes = self._attributes(token)
        if not special and attributes & _CONTROL:
            return b""
        buffer = ctypes.create_string_buffer(256)  # one per call: several threads decode answers
        size = self._c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        # llama.cpp spells normal tokens of SentencePiece with spaces, but not those that it considers special.
        return buffer.raw[:size].replace(_SPACE, b" ") if attributes == ATTR_NORMAL else buffer.raw[:size]

    def is_end(self, token: int) -> bool:
        """Return whether `token` ends the turn or the text."""
        if token == self.false_end or not self._c.llama_vocab_is_eog(self._vocab, token):
            return False
        return token in self._with_role or self.is_control(token)

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """The ids of all tokens that end an answer; finding them takes 0.1 s for Qwen's vocabulary."""
        return [token for token in range(len(self)) if self.is_end(token)]

    def _find_false_end(self, eos: int) -> int | None:
        """
        Return the end-of-text token if it is an ordinary word, which would cut answers short.

        The model must have another token that ends its turns.
        """
        if not 0 <= eos < len(self) or self._types.attributes(eos) & (ATTR_CONTROL | ATTR_USER_DEFINED):
            return None
        ids = self._tokenize(b"<|im_end|>", special=True)
        return eos if len(ids) == 1 and self.is_control(ids[0]) else None

    def _attributes(self, token: int) -> int:
        if token in self._with_role:
            return int(self._c.llama_vocab_get_attr(self._vocab, token))
        return self._types.attributes(token)

    @functools.cached_property
    def padding(self) -> list[int]:
        """Ids at the end of the vocabulary that stand for no token; the model must not generate them."""
        ids: list[int] = []
        for token in range(len(self) - 1, -1, -1):
            is_unused = self._c.llama_vocab_get_attr(self._vocab, token) & ATTR_UNUSED
            if not (is_unused or PADDING.fullmatch(self.text_of(token))):
                break
            ids.append(token)
        return ids

    def is_control(self, token: int) -> bool:
        """Return whether `token` is a control token, which user input must never produce."""
        return bool(self._attributes(token) & ATTR_CONTROL)

    def text_of(self, token: int) -> str:
        """Return the spelling of `token` in the vocabulary; "" for -1 (no token)."""
        if token < 0:
            return ""
        return str(self._c.llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="replace"))

    @property
    def bos(self) -> str:
        """The spelling of the beginning-of-text token; "" if the model has none."""
        return self._spell_role(self._c.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """The spelling of the end-of-text token; "" if the model has none."""
        return self._spell_role(self._c.llama_vocab_eos(self._vocab))

    def _spell_role(self, token: int) -> str:
        """Spell a token, unless it is an ordinary one that llama.cpp assumes, such as 11 for any byte-level BPE."""
        is_known = token in self._with_role or (token >= 0 and self.is_control(token))
        return self.text_of(token) if is_known else ""

    @property
    def adds_bos(self) -> bool:
        """True if plain text starts with a beginning-of-text token (not for Qwen)."""
        return bool(self.bos) and bool(self._c.llama_vocab_get_add_bos(self._vocab))


def _split_padding(text: str) -> list[str]:
    """
    Split "[PAD5]" before its last bracket, so that tokenizing the parts separately yields text.

    Qwen's pre-tokenizer splits at every digit, so the ids are those of the whole text.
    """
    return PADDING.sub(lambda match: f"{match[0][:-1]}\0]", text.replace("\0", "")).split("\0")


class IncrementalDetokenizer:
    """
    A decoder that turns the bytes of tokens into text as soon as the text is certain.

    It holds back the bytes of an incomplete character, and text that may be the beginning of a stop string. The work
    per token depends on the lengths of the token and the stop strings, not on the length of the answer.
    `IncrementalDetokenizer(["END"])`: `feed(b"an E")` returns "an ", `feed(b"NDX")` returns "" and `matched_stop` is
    "END".
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._pending = ""
        self.matched_stop: str | None = None

    def feed(self, data: bytes) -> str:
        """Add the bytes of a token and return the text that is now certain; "" after a stop string."""
        if self.matched_stop is not None:
            return ""
        return self._release(self._pending + self._decoder.decode(data))

    def finish(self) -> str:
        """Return the pending text; an incomplete character becomes U+FFFD."""
        if self.matched_stop is not None:
            return ""
        text = self._release(self._pending + self._decoder.decode(b"", final=True))
        text, self._pending = text + self._pending, ""
        return text

    def _release(self, text: str) -> str:
        matches = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            at, self.matched_stop = min(matches)
            self._pending = ""
            return text[:at]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`: `_overlap("an E", "END")` is 1."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
