"""The tokenizer that a model file defines, through llama.cpp, and incremental detokenization with stop strings."""

from __future__ import annotations

import codecs
import ctypes
import functools
import unicodedata
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.weights.gguf_reader import PADDING

_ATTR_UNUSED = 1 << 1  # llama.h: LLAMA_TOKEN_ATTR_UNUSED
_ATTR_CONTROL, _ATTR_USER_DEFINED = 1 << 3, 1 << 4  # llama.h: LLAMA_TOKEN_ATTR_CONTROL, …_USER_DEFINED


class Tokenizer:
    """The tokenizer of `model`, a C pointer; `c` holds llama.cpp's functions."""

    def __init__(self, c: Any, model: Any, pre_tokenizer: str) -> None:
        self._c = c
        self._vocab = c.llama_model_get_vocab(model)
        self._trie: Any = None
        # Qwen's tokenizer.json starts with Unicode normalization form C; llama.cpp omits it.
        self._normalize = pre_tokenizer == "qwen2"
        self.hides_padding = self._has_reachable_padding()
        eos = c.llama_vocab_eos(self._vocab)
        # If the EOS token is an ordinary word, it would cut answers short; the model ends its turns with another token.
        self.false_end: int | None = eos if eos >= 0 and not self.is_control(eos) and self._has_end_of_turn() else None

    def __len__(self) -> int:
        return int(self._c.llama_vocab_n_tokens(self._vocab))

    def pieces(self) -> list[bytes]:
        """Return `piece` of every token; 0.1 s for Qwen's 151,936."""
        buffer = ctypes.create_string_buffer(256)
        to_piece, vocab, size = self._c.llama_token_to_piece, self._vocab, len(buffer)
        lengths = ((token, to_piece(vocab, token, buffer, size, 0, False)) for token in range(len(self)))
        return [buffer.raw[:length] if length >= 0 else self.piece(token) for token, length in lengths]

    def ends(self) -> list[int]:
        """Return the ids of the end-of-text and end-of-turn tokens."""
        ids = (self._c.llama_vocab_eos(self._vocab), self._c.llama_vocab_eot(self._vocab))
        return sorted({token for token in ids if token >= 0})

    def token_trie(self) -> Any:
        """
        Return the trie of tokens that llguidance walks (its `LLTokenizer`), built once; 0.3 s for Qwen's 151,936.

        Control tokens and padding have no bytes in it, so no grammar allows them.

        Raises
        ------
        UsageError: no token ends an answer.
        """
        if self._trie is None:
            pieces = self.pieces()
            without_text = (token for token, piece in enumerate(pieces) if not piece)
            ends = [token for token in dict.fromkeys((*self.ends(), *without_text)) if self.is_end(token)]
            if not ends:
                raise UsageError(
                    tr("The model has no token that ends an answer, so its answers cannot follow a grammar."),
                    hint=tr("Use another model: qwenlocal list --all"),
                )
            for token in (*ends, *self.padding):
                pieces[token] = b""
            tokenizer = weakref.proxy(self)  # llguidance's objects are invisible to the garbage collector
            self._trie = build_token_trie(pieces, ends, lambda text: tokenizer.tokenize_bytes(text))
        return self._trie

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        """
        Convert `text` to token ids; with `special`, spellings like `<|im_end|>` become control tokens.

        Lone surrogates (terminal input that is not UTF-8) become question marks.
        """
        if self._normalize:
            text = unicodedata.normalize("NFC", text)
        parts = _split_padding(text) if self.hides_padding and PADDING.search(text) else [text]
        ids: list[int] = []
        for number, part in enumerate(parts):
            data = part.encode("utf-8", errors="replace")
            ids += self.tokenize_bytes(data, special=special, add_bos=add_bos and number == 0)
        return ids

    def _has_reachable_padding(self) -> bool:
        """
        Return whether typing the name of a padding token yields that token, as some old converters allowed.

        Padding tokens are at the end of the vocabulary, so the last one is enough to tell.
        """
        last = len(self) - 1
        is_reachable = self._c.llama_vocab_get_attr(self._vocab, last) & _ATTR_USER_DEFINED
        return bool(is_reachable and PADDING.fullmatch(self.text_of(last)))

    def tokenize_bytes(self, data: bytes, *, special: bool = False, add_bos: bool = False) -> list[int]:
        """Convert UTF-8 to token ids without normalization; spelled-out padding tokens are parsed."""
        capacity = len(data) + 8
        ids = (ctypes.c_int32 * capacity)()
        count = self._c.llama_tokenize(self._vocab, data, len(data), ids, capacity, add_bos, special)
        if count < 0:
            ids = (ctypes.c_int32 * -count)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), ids, -count, add_bos, special)
        return ids[:count]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of `token`, often incomplete UTF-8; control tokens have none unless `special`."""
        buffer = ctypes.create_string_buffer(256)  # one per call: several threads decode answers
        size = self._c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:size]

    def is_end(self, token: int) -> bool:
        """Return whether `token` ends the turn or the text."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token)) and token != self.false_end

    def _has_end_of_turn(self) -> bool:
        ids = self.tokenize_bytes(b"<|im_end|>", special=True)
        return len(ids) == 1 and self.is_control(ids[0])

    @functools.cached_property
    def padding(self) -> list[int]:
        """Ids at the end of the vocabulary that stand for no token; the model must not generate them."""
        ids: list[int] = []
        for token in range(len(self) - 1, -1, -1):
            is_unused = self._c.llama_vocab_get_attr(self._vocab, token) & _ATTR_UNUSED
            if not (is_unused or PADDING.fullmatch(self.text_of(token))):
                break
            ids.append(token)
        return ids

    def is_control(self, token: int) -> bool:
        """Return whether `token` is a control token, which user input must never produce."""
        return bool(self._c.llama_vocab_get_attr(self._vocab, token) & _ATTR_CONTROL)

    def text_of(self, token: int) -> str:
        """Return the spelling of `token` in the vocabulary; "" for -1 (no token)."""
        if token < 0:
            return ""
        return str(self._c.llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="replace"))

    @property
    def bos(self) -> str:
        """The spelling of the beginning-of-text token; "" if the model has none."""
        return self.text_of(self._c.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """The spelling of the end-of-text token; "" if the model has none."""
        return self.text_of(self._c.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """True if plain text starts with a beginning-of-text token (not for Qwen)."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))


def _split_padding(text: str) -> list[str]:
    """
    Split "[PAD5]" before its last bracket, so that tokenizing the parts separately yields text.

    Qwen's pre-tokenizer splits at every digit, so the ids are those of the whole text.
    """
    return PADDING.sub(lambda match: f"{match[0][:-1]}\0]", text.replace("\0", "")).split("\0")


class _Vocabulary:
    """The tokens in the form that llguidance's `TokenizerWrapper` reads."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Sequence[bytes], end: int, tokenize: Callable[[bytes], list[int]]) -> None:
        self.tokens, self.eos_token_id, self._tokenize = tokens, end, tokenize

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenize(text)


def build_token_trie(tokens: Sequence[bytes], ends: list[int], tokenize: Callable[[bytes], list[int]]) -> Any:
    """
    Build llguidance's trie of `tokens`, of which `ends` end an answer; `tokenize` splits forced text.

    Without its "slices", masks take 0.1 ms longer and the trie 0.15 s less, which pays off for answers of up to 1,500
    tokens.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokens, ends[0], tokenize)), eos_token=ends, slices=[])


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
