"""
Answers that follow a grammar, on llguidance (https://github.com/guidance-ai/llguidance).

A grammar is a string in llguidance's own format, made from a JSON schema (`json_schema`) or from llama.cpp's notation
(`gbnf`).

llguidance matches bytes here, not tokens, so it needs no trie of the vocabulary, which takes 0.3 s to build. A token is
sampled without the grammar and its bytes are checked (1 µs). If the grammar rejects it, the tokens are checked in the
order of falling logits (2 µs each), and another one is sampled from the most probable allowed ones, as in llama.cpp
(common/sampling.cpp: common_sampler_sample). Without top-p and min-p, this yields the probabilities of the allowed
tokens, except for negligible ones (`GrammarMatcher.apply_mask`). With them, a token that they keep among all tokens
stays possible even if they would remove it among the allowed ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_NO_EXTENSION = "NoExtension"  # llguidance's stop reason if no token can follow (StopReason)
_LEXER_FUEL = 10_000_000  # for strings of 400,000 characters with a maxLength; the default allows 99,000
_NEGLIGIBLE = 10.0  # at temperature 1, a token whose logit is lower by this much is 22,000 times less probable


class _Bytes:
    """A vocabulary of the 256 bytes and an end token, in the form that llguidance's `TokenizerWrapper` reads."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"")
    eos_token_id = 256
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@functools.cache
def _byte_tokenizer() -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


def _create_matcher(grammar: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=_LEXER_FUEL, verbose_errors=False)
    return LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=limits)


def find_grammar_error(grammar: str) -> str:
    """
    Return llguidance's reason for rejecting a grammar; "" if it accepts it. Needs no model.

    The reason is "NoExtension…" if there is no first token.
    """
    matcher = _create_matcher(grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
        forced = matcher.compute_ff_bytes()
        matcher.try_consume_tokens(list(forced[:1]))  # fails after too long a text has been forced
    return str(matcher.get_error())


def require_valid_grammar(grammar: str) -> str:
    """
    Return `grammar`, in llguidance's format. Needs no model.

    Raises
    ------
    UsageError: llguidance rejects it; the error quotes its reason.
    """
    if reason := find_grammar_error(grammar):
        raise _unusable(reason)
    return grammar


def is_complete(grammar: str, text: str) -> bool:
    """Return True if `text` is a complete answer. Needs no model."""
    matcher, data = _create_matcher(grammar), text.encode()
    return bool(matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting())


class GrammarMatcher:
    """A grammar and the tokens of an answer that it has accepted so far."""

    def __init__(self, grammar: str, tokenizer: Tokenizer) -> None:
        """
        Raises
        ------
        UsageError: llguidance rejects the grammar (the error quotes its reason), or no token ends an answer.
        """
        self._tokenizer = tokenizer
        self._matcher = _create_matcher(grammar)
        self._check()
        self._padding = frozenset(tokenizer.padding)
        if not any(map(tokenizer.is_end, tokenizer.ends())):
            raise UsageError(
                tr("The model has no token that ends an answer, so its answers cannot follow a grammar."),
                hint=tr("Use another model."),
            )

    def allows(self, token: int) -> bool:
        """Return True if `token` may come next. Control tokens are allowed only if they end the answer."""
        if self._tokenizer.is_end(token):
            return bool(self._matcher.is_accepting())
        text = b"" if token in self._padding else self._tokenizer.piece(token)
        return bool(text) and self._matches(text)

    def _matches(self, text: bytes) -> bool:
        return int(self._matcher.validate_tokens(list(text))) == len(text)

    def accept(self, token: int) -> None:
        """
        Append `token`, which `allows` or `forced_tokens` permitted.

        Raises
        ------
        UsageError: the answer exceeds one of llguidance's limits.
        """
        if not self._tokenizer.is_end(token):
            self._matcher.consume_tokens(list(self._tokenizer.piece(token)))
        self._check()

    def accept_prefix(self, tokens: Sequence[int]) -> None:
        """
        Append the first tokens of the answer.

        Raises
        ------
        UsageError: the grammar does not allow them.
        """
        text = b"".join(map(self._tokenizer.piece, tokens))
        if self._matcher.try_consume_tokens(list(text)) < len(text):
            raise UsageError(
                tr("The answer so far does not follow the grammar."), hint=tr("To generate another one: /retry")
            )

    def apply_mask(self, logits: Any, limit: int, temperature: float) -> None:
        """
        Set all logits to minus infinity, except those of the `limit` most probable tokens that are allowed.

        `logits` is a numpy array, one per token. Tokens 22,000 times less probable than the most probable allowed one
        are left out, too; without that, the search would go through the whole vocabulary (0.2 s) wherever the grammar
        allows fewer than `limit` tokens.

        Raises
        ------
        UsageError: no token is allowed.
        """
        import numpy

        allowed: list[int] = []
        gap = _NEGLIGIBLE * max(1.0, temperature)
        for token in _by_probability(logits):
            if allowed and logits[token] < logits[allowed[0]] - gap:
                break
            if self.allows(token):
                allowed.append(token)
                if len(allowed) == limit:
                    break
        self._check()
        if not allowed:
            raise _unusable(_NO_EXTENSION)
        kept = logits[allowed]
        logits.fill(-numpy.inf)
        logits[allowed] = kept

    def forced_tokens(self) -> list[int]:
        """
        Return the tokens that must come next: those of `{"name": "` at the beginning of such an object.

        If the answer continues after them, the last one is omitted, because other bytes after it may make it another
        token. Not so for an opening quote: it is nearly always a token of its own, and including it forces a fifth more
        tokens.
        """
        forced = _whole_characters(self._matcher.compute_ff_bytes())
        if not forced:
            return []
        tokens = self._tokenizer.tokenize_bytes(forced)
        is_final = forced.endswith((b' "', b'{"', b'["')) or self._would_end_with(forced)
        return tokens if is_final else tokens[:-1]

    def _would_end_with(self, text: bytes) -> bool:
        matcher = self._matcher.deep_copy()
        matcher.try_consume_tokens(list(text))
        return bool(matcher.is_stopped())

    def _check(self) -> None:
        if reason := self._matcher.get_error():
            raise _unusable(reason)


def _by_probability(logits: Any) -> Iterator[int]:
    """Yield the tokens in the order of falling logits; sorting all at once would take 12 ms for Qwen's 151,936."""
    import numpy

    n_first = min(1000, len(logits) - 1)
    tokens = numpy.argpartition(-logits, n_first)
    for part in (tokens[:n_first], tokens[n_first:]):
        yield from part[numpy.argsort(-logits[part])].tolist()


def _whole_characters(text: bytes) -> bytes:
    """Return the valid UTF-8 at the beginning of `text`; llama.cpp tokenizes no other bytes."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start]
    return text


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
