"""
Answers that keep to a grammar (GBNF, llama.cpp: grammars/README.md), without the price of asking it about every token.

Asking about 151,936 tokens takes longer than computing their scores. So one token is chosen as always, and the grammar
asked about that one; only where it says no, the likeliest ones are asked about, and all of them where none of these
will do. Where the grammar leaves no choice (`{"name":"`), nothing is chosen at all: the text is found byte by byte, and
computed together with the token before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from qwenlocal.engine.llama import load_library
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import UsageError

_IN_TEXT = frozenset(range(1, 256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 has
_LONGEST_LITERAL = 400  # bytes looked ahead at most
_COMPLAINT = "parse: error parsing grammar: "


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[list[str]]:
    """
    What llama.cpp's reader of grammars complains of, without the grammar behind it.

    It goes past llama.cpp's log to stderr itself (src/llama-grammar.cpp: llama_grammar_parser::parse).
    """
    complaints: list[str] = []
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield complaints
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield complaints
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            data = caught.read()
            lines = data.decode(errors="replace").splitlines()
            complaints += [line.removeprefix(_COMPLAINT) for line in lines if line.startswith(_COMPLAINT)]
            if data and not complaints:  # another thread's, a status line for example
                os.write(2, data)


class Constraint:
    """A grammar, and how far the answer is in it."""

    def __init__(self, grammar: str, vocabulary: Tokenizer) -> None:
        """
        Raises
        ------
        UsageError: llama.cpp cannot read the grammar; its reason is in the error.
        """
        lib = load_library()
        self._c, self._vocabulary = lib.c, vocabulary
        lib.log.clear()
        if "\0" in grammar or not grammar.strip():  # llama.cpp would read up to there, and take nothing for no grammar
            raise UsageError("The grammar cannot be read: it is empty, or has a zero byte in it.")
        with _said_on_stderr() as complaints:
            self._grammar = self._c.llama_sampler_init_grammar(vocabulary.handle, grammar.encode(), b"root")
        if not self._grammar:
            said = "; ".join(complaints) or " ".join(line.text.strip() for line in lib.log if line.text.strip())
            raise UsageError(
                f"The grammar cannot be read: {said or 'it has no rule “root”'}.",
                hint="How grammars are written: llama.cpp, grammars/README.md",
            )
        self._bytes = vocabulary.single_bytes()
        self._probes = [*self._bytes, *vocabulary.ends()]
        self._sees_all = set(self._bytes.values()) >= _IN_TEXT  # or a choice could look like none

    def allows(self, token: int) -> bool:
        """Whether the answer may go on with `token`."""
        return bool(self.allowed([token]))

    def allowed(self, tokens: list[int]) -> list[int]:
        """Those of `tokens` with which the answer may go on."""
        return self._ask(self._grammar, tokens)

    def _ask(self, grammar: Any, tokens: list[int]) -> list[int]:
        data = (self._c.llama_token_data * len(tokens))()
        for place, token in zip(data, tokens, strict=True):
            place.id = token
        array = self._c.llama_token_data_array(data, len(tokens), -1, False)
        self._c.llama_sampler_apply(grammar, ctypes.byref(array))
        return [place.id for place in data if place.logit != -float("inf")]

    def filter(self, candidates: Any) -> None:
        """Take the chance from those in a llama_token_data_array that the grammar does not allow."""
        self._c.llama_sampler_apply(self._grammar, ctypes.byref(candidates))

    def accept(self, token: int) -> None:
        """The answer went on with `token`."""
        self._c.llama_sampler_accept(self._grammar, token)

    def catch_up(self, tokens: Sequence[int]) -> None:
        """
        The answer begins with `tokens`.

        Raises
        ------
        UsageError: the grammar does not allow that.
        """
        for token in tokens:
            if not self.allows(token):  # llama.cpp ends the process where it is told of such a token
                self.close()
                raise UsageError("The answer does not keep to the grammar so far.", hint="Have it answer anew: /retry")
            self.accept(token)

    def forced(self) -> bytes:
        """What must come now, as far as there is no choice: b'{"name":"' at the beginning of such an object."""
        if not self._sees_all or len(self.allowed(self._probes)) != 1:
            return b""
        ahead, found = self._c.llama_sampler_clone(self._grammar), bytearray()
        try:
            while len(found) < _LONGEST_LITERAL:
                allowed = self._ask(ahead, self._probes)
                if len(allowed) != 1 or allowed[0] not in self._bytes:
                    break
                found.append(self._bytes[allowed[0]])
                self._c.llama_sampler_accept(ahead, allowed[0])
        finally:
            self._c.llama_sampler_free(ahead)
        return bytes(found)

    def forced_tokens(self) -> list[int]:
        """The same as token ids; none where the text ends within a character, or tokens do not spell it as it is."""
        data = self.forced()
        try:
            tokens = self._vocabulary.tokenize(data.decode(), special=False) if data else []
        except UnicodeDecodeError:
            return []
        # Accents are composed on the way, some vocabularies begin with a space: llama.cpp ends the process where a
        # grammar is told of a token that it does not allow.
        return tokens if b"".join(map(self._vocabulary.piece, tokens)) == data else []

    def close(self) -> None:
        """Give the memory back."""
        if self._grammar:
            self._c.llama_sampler_free(self._grammar)
            self._grammar = None
