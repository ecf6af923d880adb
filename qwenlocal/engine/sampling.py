"""Sampling of tokens: its parameters, and llama.cpp's chain of samplers, in llama.cpp's order."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwenlocal.engine.context import Context
from qwenlocal.engine.grammar import GrammarMatcher
from qwenlocal.engine.llama import load_library
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import OutOfRange

MAX_PENALTY_WINDOW = 1 << 17
_MAX_CANDIDATES = 4096  # where a grammar rejects a token and top-k is off, the tokens to choose another one from
_RANGES = {
    "temperature": (0, 10),
    "top_k": (0, 1_000_000),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.01, 10),
    "repeat_last_n": (0, MAX_PENALTY_WINDOW),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "seed": (0, 2**32 - 2),
}


@dataclass(frozen=True)
class Sampling:
    """
    Parameters for choosing the next token; the defaults are Qwen1.5's for its chat models.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 are off. `seed` None is random.
    Penalties apply to tokens among the last `repeat_last_n`. The other two are OpenAI's: subtracted from the logit of a
    token once for each time it occurs, and once if it occurs. `logit_bias` is added to the logits of tokens, as pairs
    (id, bias); -100 excludes a token. `ignore_eos` excludes all tokens that end an answer.
    `grammar` (of `grammar_from_schema` or `grammar_from_gbnf`) constrains the answer, including `answer_prefix`: the
    tokens at the end of the prompt with which the answer starts.
    """

    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.8
    min_p: float = 0.0
    repeat_penalty: float = 1.05
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    grammar: str | None = None
    answer_prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _RANGES:
            check_parameter(name, getattr(self, name))

    def with_overrides(self, values: Mapping[str, float | int | None]) -> Sampling:
        """Return a copy with the values that are not None."""
        overrides: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(self, **overrides)


def check_parameter(name: str, value: float | None, *, label: str = "") -> None:
    """
    Check the range of a parameter; errors call it `label`, or by its name.

    Raises
    ------
    OutOfRange: it is too small or too large.
    """
    minimum, maximum = _RANGES[name]
    if value is not None and not minimum <= value <= maximum:
        raise OutOfRange(label or name, minimum, maximum, value)


def _biases(sampling: Sampling, tokenizer: Tokenizer) -> list[tuple[int, float]]:
    """
    Return the logit biases: the requested ones, and minus infinity for tokens that must not occur.

    Raises
    ------
    OutOfRange: an id is not in the vocabulary.
    """
    for token, _ in sampling.logit_bias:
        if not 0 <= token < len(tokenizer):
            raise OutOfRange("logit_bias", 0, len(tokenizer) - 1, token)
    excluded = [*tokenizer.padding, *(tokenizer.end_tokens if sampling.ignore_eos else ())]
    return [*sampling.logit_bias, *((token, -math.inf) for token in excluded)]


class Sampler:
    """A chain of llama.cpp's samplers: penalties, top-k, top-p, min-p, temperature, random choice; and a grammar."""

    def __init__(self, sampling: Sampling, tokenizer: Tokenizer) -> None:
        """
        Raises
        ------
        UsageError: the grammar is invalid, or does not allow the answer's prefix.
        """
        self._c = c = load_library().c
        self._matcher = GrammarMatcher(sampling.grammar, tokenizer) if sampling.grammar is not None else None
        if self._matcher:
            self._matcher.accept_prefix(sampling.answer_prefix)
        self._penalties: Any = None
        self._recent: collections.deque[int] = collections.deque(maxlen=sampling.repeat_last_n)
        self._n_vocab = len(tokenizer)
        self._temperature = sampling.temperature
        top_k = 1 if sampling.temperature == 0 else sampling.top_k
        # A penalty lowers at most as many tokens as its window holds, so the candidates left by top-k afterwards are
        # among this many before.
        lowers = sampling.repeat_penalty >= 1 and sampling.frequency_penalty >= 0 and sampling.presence_penalty >= 0
        count = top_k + sampling.repeat_last_n
        self._n_candidates = count if top_k and lowers and count <= _MAX_CANDIDATES else None
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        self.seed = int.from_bytes(os.urandom(4), "little") % (2**32 - 1) if sampling.seed is None else sampling.seed
        for sampler in self._samplers(sampling, _biases(sampling, tokenizer)):
            c.llama_sampler_chain_add(self._chain, sampler)

    def _samplers(self, sampling: Sampling, biases: Sequence[tuple[int, float]]) -> Iterable[Any]:
        c = self._c
        if biases:
            array = (c.llama_logit_bias * len(biases))(*biases)
            yield c.llama_sampler_init_logit_bias(self._n_vocab, len(array), array)
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if penalties != (1, 0, 0) and sampling.repeat_last_n:
            if self._n_candidates:
                # Penalizing 84 candidates instead of 151,936 halves the time of sampling.
                yield c.llama_sampler_init_top_k(self._n_candidates)
            self._penalties = c.llama_sampler_init_penalties(self._n_vocab, sampling.repeat_last_n, *penalties)
            yield self._penalties
        if sampling.temperature == 0:
            yield c.llama_sampler_init_greedy()
            return
        if sampling.top_k:
            yield c.llama_sampler_init_top_k(sampling.top_k)
        if sampling.top_p < 1:
            yield c.llama_sampler_init_top_p(sampling.top_p, 1)
        if sampling.min_p > 0:
            yield c.llama_sampler_init_min_p(sampling.min_p, 1)
        yield c.llama_sampler_init_temp(sampling.temperature)
        yield c.llama_sampler_init_dist(self.seed)

    def accept_prompt(self, ids: Sequence[int]) -> None:
        """Count the last tokens of the prompt as earlier text for the repeat penalty."""
        for token in ids[-(self._recent.maxlen or 1) :]:
            self._c.llama_sampler_accept(self._chain, token)
            self._recent.append(token)

    def sample(self, context: Context, row: int) -> int:
        """
        Sample and accept the token after a row of logits.

        Raises
        ------
        BadWeights: the logits are NaN. UsageError: the grammar allows no token.
        """
        context.check_logits(row)
        token = int(self._c.llama_sampler_sample(self._chain, context.handle, row))
        if self._matcher:
            if not self._matcher.allows(token):
                self._withdraw_last()
                limit = self._n_candidates or _MAX_CANDIDATES
                self._matcher.apply_mask(self._logits(context, row), limit, self._temperature)
                token = int(self._c.llama_sampler_sample(self._chain, context.handle, row))
            self._matcher.accept(token)
        self._recent.append(token)
        return token

    def accept_forced(self) -> list[int]:
        """Return the tokens that the grammar forces next, and accept them."""
        tokens = self._matcher.forced_tokens() if self._matcher else []
        for token in tokens:
            self._c.llama_sampler_accept(self._chain, token)
            self._matcher.accept(token)  # type: ignore[union-attr]
            self._recent.append(token)
        return tokens

    def _logits(self, context: Context, row: int) -> Any:
        """Return a row of logits as a numpy array in llama.cpp's memory."""
        import numpy

        return numpy.ctypeslib.as_array(context.logits(row), (self._n_vocab,))

    def _withdraw_last(self) -> None:
        """Remove the token that was just sampled from the penalties."""
        if self._penalties:
            self._c.llama_sampler_reset(self._penalties)
            for token in self._recent:
                self._c.llama_sampler_accept(self._penalties, token)

    def close(self) -> None:
        """Free the memory."""
        if self._chain:
            self._c.llama_sampler_free(self._chain)
            self._chain = None
