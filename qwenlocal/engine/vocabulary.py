"""Text to token ids and back, as a model's file defines it."""

from __future__ import annotations

import ctypes
import functools
import unicodedata
from typing import Any

from qwenlocal.weights.kinds import PADDING

_WHERE_BYTES_ARE = 1024
_END_OF_TURN = "<|im_end|>"
_ATTR_UNUSED = 1 << 1  # llama.h: LLAMA_TOKEN_ATTR_UNUSED
_ATTR_CONTROL, _ATTR_USER_DEFINED = 1 << 3, 1 << 4  # llama.h: LLAMA_TOKEN_ATTR_CONTROL, …_USER_DEFINED


class Vocabulary:
    """The vocabulary of `model`, a C pointer; `c` are llama.cpp's functions."""

    def __init__(self, c: Any, model: Any, pre_tokenizer: str) -> None:
        self._c = c
        self._vocab = c.llama_model_get_vocab(model)
        # Qwen's tokenizer.json begins with Unicode normalisation form C; llama.cpp does not do it.
        self._normalise = pre_tokenizer == "qwen2"
        self.hides_padding = self._has_reachable_padding()
        eos = c.llama_vocab_eos(self._vocab)
        # An end that is a word like any other would break answers off; the model's own end of turn is another token.
        self.false_end: int | None = eos if eos >= 0 and not self.is_control(eos) and self._has_end_of_turn() else None

    def __len__(self) -> int:
        return int(self._c.llama_vocab_n_tokens(self._vocab))

    @property
    def handle(self) -> Any:
        """The C pointer, for grammars."""
        return self._vocab

    def single_bytes(self) -> dict[int, int]:
        """The tokens that stand for one byte each, by their ids; byte-level vocabularies have them first."""
        pieces = {token: self.piece(token) for token in range(min(len(self), _WHERE_BYTES_ARE))}
        return {token: piece[0] for token, piece in pieces.items() if len(piece) == 1}

    def ends(self) -> list[int]:
        """The tokens with which the model ends its turn or its text."""
        found = (self._c.llama_vocab_eos(self._vocab), self._c.llama_vocab_eot(self._vocab))
        return sorted({token for token in found if token >= 0})

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        """
        The ids of `text`; with `special`, spellings like `<|im_end|>` become the control tokens they name.

        Lone surrogates (bytes of a terminal that are not UTF-8) become question marks.
        """
        if self._normalise:
            text = unicodedata.normalize("NFC", text)
        if self.hides_padding and PADDING.search(text):
            return self._around_padding(text, special=special, add_bos=add_bos)
        return self._ids(text, special=special, add_bos=add_bos)

    def _has_reachable_padding(self) -> bool:
        """
        Whether ids without a token are marked so that typing their names gives them, as converters once did.

        They stand at the end of the vocabulary, so looking at the last one is enough.
        """
        last = len(self) - 1
        reachable = self._c.llama_vocab_get_attr(self._vocab, last) & _ATTR_USER_DEFINED
        return bool(reachable and PADDING.fullmatch(self.text_of(last)))

    def _around_padding(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        """
        Ids of `text` in which "[PAD5]" is text: it is cut before its last bracket, and the parts are tokenised apart.

        With Qwen's expression, where a digit is a word of its own, these are the ids of the whole.
        """
        ids: list[int] = []
        parts = PADDING.sub(lambda match: f"{match[0][:-1]}\0]", text.replace("\0", "")).split("\0")
        for number, part in enumerate(parts):
            ids += self._ids(part, special=special, add_bos=add_bos and number == 0)
        return ids

    def _ids(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._c.llama_tokenize(self._vocab, data, len(data), ids, room, add_bos, special)
        if count < 0:
            ids = (ctypes.c_int32 * -count)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), ids, -count, add_bos, special)
        return ids[:count]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that `token` stands for; a control token gives none unless `special`. Often not whole UTF-8."""
        buffer = ctypes.create_string_buffer(256)  # each call has its own: answers come out of several threads
        size = self._c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:size]

    def is_end(self, token: int) -> bool:
        """Whether the model ends its turn or its text with `token`."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token)) and token != self.false_end

    def _has_end_of_turn(self) -> bool:
        ids = self._ids(_END_OF_TURN, special=True, add_bos=False)
        return len(ids) == 1 and self.is_control(ids[0])

    @functools.cached_property
    def padding(self) -> list[int]:
        """Ids at the end of the vocabulary that no token has: the model must not say them."""
        found: list[int] = []
        for token in range(len(self) - 1, -1, -1):
            is_unused = self._c.llama_vocab_get_attr(self._vocab, token) & _ATTR_UNUSED
            if not (is_unused or PADDING.fullmatch(self.text_of(token))):
                break
            found.append(token)
        return found

    def is_control(self, token: int) -> bool:
        """Whether `token` is markup that people must not be able to type."""
        return bool(self._c.llama_vocab_get_attr(self._vocab, token) & _ATTR_CONTROL)

    def text_of(self, token: int) -> str:
        """The spelling of a token in the vocabulary, "" for -1 (no such token)."""
        if token < 0:
            return ""
        return str(self._c.llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="replace"))

    @property
    def bos(self) -> str:
        """The spelling of the token that begins a text, "" where the model has none."""
        return self.text_of(self._c.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """The spelling of the token that ends a text, "" where the model has none."""
        return self.text_of(self._c.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether plain text starts with a begin token (not for Qwen)."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))
