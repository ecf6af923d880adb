"""The tokenizer that a model file defines: text to token ids and back, through llama.cpp."""

from __future__ import annotations

import ctypes
import functools
import unicodedata
from typing import Any

from qwenlocal.weights.gguf_reader import PADDING

_END_OF_TURN = "<|im_end|>"
_ATTR_UNUSED = 1 << 1  # llama.h: LLAMA_TOKEN_ATTR_UNUSED
_ATTR_CONTROL, _ATTR_USER_DEFINED = 1 << 3, 1 << 4  # llama.h: LLAMA_TOKEN_ATTR_CONTROL, …_USER_DEFINED


class Tokenizer:
    """The tokenizer of `model`, a C pointer; `c` holds llama.cpp's functions."""

    def __init__(self, c: Any, model: Any, pre_tokenizer: str) -> None:
        self._c = c
        self._vocab = c.llama_model_get_vocab(model)
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

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        """
        Convert `text` to token ids; with `special`, spellings like `<|im_end|>` become control tokens.

        Lone surrogates (terminal input that is not UTF-8) become question marks.
        """
        if self._normalize:
            text = unicodedata.normalize("NFC", text)
        if self.hides_padding and PADDING.search(text):
            return self._tokenize_around_padding(text, special=special, add_bos=add_bos)
        return self._tokenize(text, special=special, add_bos=add_bos)

    def _has_reachable_padding(self) -> bool:
        """
        Return whether typing the name of a padding token yields that token, as some old converters allowed.

        Padding tokens are at the end of the vocabulary, so the last one is enough to tell.
        """
        last = len(self) - 1
        is_reachable = self._c.llama_vocab_get_attr(self._vocab, last) & _ATTR_USER_DEFINED
        return bool(is_reachable and PADDING.fullmatch(self.text_of(last)))

    def _tokenize_around_padding(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        """
        Tokenize "[PAD5]" as text: split it before its last bracket, and tokenize the parts separately.

        Qwen's pre-tokenizer splits at every digit, so the ids are those of the whole text.
        """
        ids: list[int] = []
        parts = PADDING.sub(lambda match: f"{match[0][:-1]}\0]", text.replace("\0", "")).split("\0")
        for number, part in enumerate(parts):
            ids += self._tokenize(part, special=special, add_bos=add_bos and number == 0)
        return ids

    def _tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        return self.tokenize_bytes(text.encode("utf-8", errors="replace"), special=special, add_bos=add_bos)

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
        ids = self._tokenize(_END_OF_TURN, special=True, add_bos=False)
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
