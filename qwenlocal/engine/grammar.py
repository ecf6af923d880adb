"""
Answers that follow a grammar, on llguidance (https://github.com/guidance-ai/llguidance).

A grammar is a string in llguidance's own form: `json_schema` makes one of a JSON schema, `gbnf` of llama.cpp's
notation.

A token is sampled as always, and the matcher checks that one (1 µs). Only if the grammar refuses it, the mask over all
tokens is computed (0.1 ms for JSON, 4 ms for GBNF) and another one sampled among those that it allows, as llama.cpp
does (common/sampling.cpp: common_sampler_sample). Without top-k, top-p and min-p, both together have exactly the
probabilities of the allowed tokens. With them, a token that they keep among all tokens stays possible also if it were
cut among the allowed ones.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_NO_TOKEN = "NoExtension"  # llguidance's stop reason when no token can follow (StopReason)


class _Tokens:
    """The tokens as llguidance's `TokenizerWrapper` asks for them."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, pieces: Sequence[bytes], end: int, tokenizer: Tokenizer | None = None) -> None:
        self.tokens, self.eos_token_id = pieces, end
        self._tokenizer = weakref.ref(tokenizer) if tokenizer is not None else None  # which keeps this object

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of a forced text; llguidance takes back those that what follows could change."""
        tokenizer = self._tokenizer() if self._tokenizer else None
        return tokenizer.tokenize_bytes(text) if tokenizer is not None else list(text)


_tries: weakref.WeakKeyDictionary[Tokenizer, Any] = weakref.WeakKeyDictionary()


def build_token_trie(tokenizer: Tokenizer) -> Any:
    """
    Build the trie of tokens that llguidance walks (its `LLTokenizer`), once per tokenizer; 0.3 s for Qwen's 151,936.

    Control tokens and padding have no bytes in it, so that no grammar allows them. Without llguidance's "slices", masks
    take 0.1 ms more, and the trie 0.15 s less: worth it for answers of up to 1,500 tokens.

    Raises
    ------
    UsageError: no token ends an answer.
    """
    if tokenizer not in _tries:
        pieces = tokenizer.pieces()
        candidates = {token for token, piece in enumerate(pieces) if not piece} | set(tokenizer.ends())
        ends = sorted(token for token in candidates if tokenizer.is_end(token))
        if not ends:
            raise UsageError(
                tr("This model has no token that ends an answer, so its answers cannot follow a grammar."),
                hint=tr("Take another model: qwenlocal list --all"),
            )
        for token in (*ends, *tokenizer.padding):
            pieces[token] = b""
        first = next((token for token in tokenizer.ends() if token in ends), ends[0])
        _tries[tokenizer] = _build(_Tokens(pieces, first, tokenizer), ends)
    return _tries[tokenizer]


def _build(tokens: _Tokens, ends: list[int]) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(tokens), eos_token=ends, slices=[])


@functools.cache
def _byte_trie() -> Any:
    """A trie of single bytes, to try grammars on before any model is there; made in 1 ms."""
    return _build(_Tokens([*(bytes([byte]) for byte in range(256)), b""], 256), [256])


def _matcher(trie: Any, grammar: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(trie, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))


def find_fault(grammar: str) -> str:
    """
    Return llguidance's reason for refusing a grammar, "" if it takes it; no model is needed for that.

    The reason is "NoExtension…" if no answer can even begin.
    """
    matcher = _matcher(_byte_trie(), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error())


def _dead_end() -> UsageError:
    """The error for a grammar that no token can follow."""
    return UsageError(
        tr("The grammar leaves nothing that this model could say."), hint=tr("Check the grammar, or leave it out.")
    )


class GrammarMatcher:
    """A grammar, and the place in it that an answer has reached."""

    def __init__(self, grammar: str, tokenizer: Tokenizer) -> None:
        """
        Raises
        ------
        UsageError: llguidance does not take the grammar; its reason is in the error.
        """
        self._tokenizer = tokenizer
        self._matcher = _matcher(build_token_trie(tokenizer), grammar)
        self._check()

    def allows(self, token: int) -> bool:
        """Return whether the answer may continue, or end, with `token`."""
        if self._tokenizer.is_end(token):
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.validate_tokens([token]))

    def accept(self, token: int) -> None:
        """
        Continue the answer with `token`, which `allows` or `forced_tokens` has named.

        Raises
        ------
        UsageError: the grammar outgrew one of llguidance's limits.
        """
        self._matcher.consume_token(token)
        self._check()

    def accept_beginning(self, tokens: Sequence[int]) -> None:
        """
        Begin the answer with `tokens`.

        Raises
        ------
        UsageError: the grammar does not allow that.
        """
        if self._matcher.try_consume_tokens(list(tokens)) < len(tokens):
            raise UsageError(
                tr("The answer does not follow the grammar so far."), hint=tr("Ask for another one: /retry")
            )

    def apply_mask(self, scores: Any) -> None:
        """
        Set the scores of all tokens that are not allowed to minus infinity; `scores` is a numpy array, one a token.

        Raises
        ------
        UsageError: no token is allowed.
        """
        import numpy

        mask = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        self._check()
        allowed = numpy.unpackbits(mask, bitorder="little", count=len(scores))
        if not allowed.any():
            raise _dead_end()
        numpy.copyto(scores, -numpy.inf, where=allowed == 0)

    def forced_tokens(self) -> list[int]:
        """
        Return the tokens that must come now: those of `{"name": "` at the beginning of such an object.

        llguidance leaves out the last bytes of what is certain if another token could begin with them, such as the
        blank of `: true`. An opening quote is nearly always a token of its own: with it, a fifth more is certain.
        """
        forced: bytes = self._matcher.compute_ff_bytes()
        if forced.endswith((b' "', b'{"', b'["')):
            tokens = self._tokenizer.tokenize_bytes(forced)
        else:
            tokens = self._matcher.compute_ff_tokens() if forced else []
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else []

    def _check(self) -> None:
        if reason := self._matcher.get_error():
            raise _dead_end() if reason.startswith(_NO_TOKEN) else _unusable(reason)


def _unusable(reason: str) -> UsageError:
    """The error for a grammar that llguidance gives up; of its reason, the first line is shown."""
    return UsageError(
        tr("The grammar cannot be used: {reason}.", reason=reason.strip().partition("\n")[0].rstrip(".")),
        hint=tr("How to write a grammar: llama.cpp, grammars/README.md"),
    )
