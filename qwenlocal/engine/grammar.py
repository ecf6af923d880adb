"""
Answers that follow a grammar, on llguidance (https://github.com/guidance-ai/llguidance).

A grammar is a string in llguidance's own format, made from a JSON schema (`json_schema`) or from llama.cpp's notation
(`gbnf`).

A token is sampled without the grammar, and the matcher checks only that one (1 µs). If the grammar rejects it, the mask
over all tokens is computed (0.1 ms for JSON, 4 ms for GBNF) and another token is sampled from the allowed ones, as in
llama.cpp (common/sampling.cpp: common_sampler_sample). Without top-k, top-p and min-p, this yields exactly the
probabilities of the allowed tokens. With them, a token that they keep among all tokens stays possible even if they
would remove it among the allowed ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from qwenlocal.engine.tokenizer import Tokenizer, build_token_trie
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_NO_EXTENSION = "NoExtension"  # llguidance's stop reason if no token can follow (StopReason)


@functools.cache
def _byte_trie() -> Any:
    """Build a trie of single bytes to check grammars before a model is loaded; 1 ms."""
    return build_token_trie([*(bytes([byte]) for byte in range(256)), b""], [256], list)


def _create_matcher(trie: Any, grammar: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(trie, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))


def find_grammar_error(grammar: str) -> str:
    """
    Return llguidance's reason for rejecting a grammar; "" if it accepts it. Needs no model.

    The reason is "NoExtension…" if there is no first token.
    """
    matcher = _create_matcher(_byte_trie(), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error())


class GrammarMatcher:
    """A grammar and the tokens of an answer that it has accepted so far."""

    def __init__(self, grammar: str, tokenizer: Tokenizer) -> None:
        """
        Raises
        ------
        UsageError: llguidance rejects the grammar; the error quotes its reason.
        """
        self._tokenizer = tokenizer
        self._matcher = _create_matcher(tokenizer.token_trie(), grammar)
        self._check()

    def allows(self, token: int) -> bool:
        """Return True if the answer may continue, or end, with `token`."""
        if self._tokenizer.is_end(token):
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.validate_tokens([token]))

    def accept(self, token: int) -> None:
        """
        Append `token`, which `allows` or `forced_tokens` permitted.

        Raises
        ------
        UsageError: the answer exceeds one of llguidance's limits.
        """
        self._matcher.consume_token(token)
        self._check()

    def accept_prefix(self, tokens: Sequence[int]) -> None:
        """
        Append the first tokens of the answer.

        Raises
        ------
        UsageError: the grammar does not allow them.
        """
        if self._matcher.try_consume_tokens(list(tokens)) < len(tokens):
            raise UsageError(
                tr("The answer so far does not follow the grammar."), hint=tr("To generate another one: /retry")
            )

    def apply_mask(self, logits: Any) -> None:
        """
        Set the logits of all tokens that are not allowed to minus infinity; `logits` is a numpy array, one per token.

        Raises
        ------
        UsageError: no token is allowed.
        """
        import numpy

        mask = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        self._check()
        allowed = numpy.unpackbits(mask, bitorder="little", count=len(logits))
        if not allowed.any():
            raise _unusable(_NO_EXTENSION)
        numpy.copyto(logits, -numpy.inf, where=allowed == 0)

    def forced_tokens(self) -> list[int]:
        """
        Return the tokens that must come next: those of `{"name": "` at the beginning of such an object.

        llguidance omits the last forced bytes if another token could begin with them, such as the space of `: true`.
        An opening quote is nearly always a token of its own; including it forces a fifth more tokens.
        """
        forced: bytes = self._matcher.compute_ff_bytes()
        if forced.endswith((b' "', b'{"', b'["')):
            tokens = self._tokenizer.tokenize_bytes(forced)
        else:
            tokens = self._matcher.compute_ff_tokens() if forced else []
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else []

    def _check(self) -> None:
        if reason := self._matcher.get_error():
            raise _unusable(reason)


def _unusable(reason: str) -> UsageError:
    """Create the error for a grammar that llguidance rejects or cannot continue; it quotes the reason's first line."""
    if reason.startswith(_NO_EXTENSION):
        return UsageError(
            tr("The grammar allows no token of the model at this point."), hint=tr("Check the grammar, or omit it.")
        )
    return UsageError(
        tr("Cannot use the grammar: {reason}.", reason=reason.strip().partition("\n")[0].rstrip(".")),
        hint=tr("For the syntax, see grammars/README.md in llama.cpp."),
    )
