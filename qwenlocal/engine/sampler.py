"""Choosing the next token: llama.cpp's own chain of samplers, in llama.cpp's order."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterable
from typing import Any

from qwenlocal.engine.context import Context
from qwenlocal.engine.grammar import GrammarMatcher
from qwenlocal.engine.llama import load_library
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.tokenizer import Tokenizer

_PENALTY_WINDOW = 64


class Sampler:
    """A sampler chain in llama.cpp: penalties, top-k, top-p, min-p, temperature, then a draw."""

    def __init__(self, sampling: Sampling, vocabulary: Tokenizer) -> None:
        """
        Raises
        ------
        UsageError: the grammar cannot be used, or does not allow what was begun.
        """
        self._c = c = load_library().c
        self._matcher = GrammarMatcher(sampling.grammar, vocabulary) if sampling.grammar is not None else None
        if self._matcher:
            self._matcher.accept_beginning(sampling.begun)
        self._penalties: Any = None
        self._recent: collections.deque[int] = collections.deque(maxlen=_PENALTY_WINDOW)
        self._padding = vocabulary.padding
        self._size = len(vocabulary)
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        self.seed = int.from_bytes(os.urandom(4), "little") % (2**32 - 1) if sampling.seed is None else sampling.seed
        for link in self._links(sampling, len(vocabulary)):
            c.llama_sampler_chain_add(self._chain, link)

    def _links(self, sampling: Sampling, vocabulary_size: int) -> Iterable[Any]:
        c = self._c
        if self._padding:
            never = (c.llama_logit_bias * len(self._padding))(*((token, -math.inf) for token in self._padding))
            yield c.llama_sampler_init_logit_bias(vocabulary_size, len(never), never)
        kept = 1 if sampling.temperature == 0 else sampling.top_k
        if sampling.repeat_penalty > 1 and kept:
            # A penalty lowers at most as many tokens as its window holds, so those that can be chosen afterwards are
            # among this many before; penalising 84 candidates instead of 151,936 takes half the time of it all.
            yield c.llama_sampler_init_top_k(kept + _PENALTY_WINDOW)
        if sampling.repeat_penalty != 1:
            self._penalties = c.llama_sampler_init_penalties(
                vocabulary_size, _PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0
            )
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

    def remember(self, ids: Iterable[int]) -> None:
        """Tell the repeat penalty what stands before the answer."""
        for token in list(ids)[-_PENALTY_WINDOW:]:
            self._c.llama_sampler_accept(self._chain, token)
            self._recent.append(token)

    def sample(self, context: Context, row: int) -> int:
        """The next token after the given row of logits; the chain takes note of it."""
        token = int(self._c.llama_sampler_sample(self._chain, context.handle, row))
        if self._matcher:
            if not self._matcher.allows(token):
                self._take_back()
                self._matcher.apply_mask(self._scores(context, row))
                token = int(self._c.llama_sampler_sample(self._chain, context.handle, row))
            self._matcher.accept(token)
        self._recent.append(token)
        return token

    def forced(self) -> list[int]:
        """Tokens that must come now, by the grammar; they are taken note of."""
        tokens = self._matcher.forced_tokens() if self._matcher else []
        for token in tokens:
            self._c.llama_sampler_accept(self._chain, token)
            self._matcher.accept(token)  # type: ignore[union-attr]
            self._recent.append(token)
        return tokens

    def _scores(self, context: Context, row: int) -> Any:
        """The scores of a row, where llama.cpp's samplers read them."""
        import numpy

        return numpy.ctypeslib.as_array(context.logits(row), (self._size,))

    def _take_back(self) -> None:
        """A token that was sampled is not said; the penalties must not know it."""
        if self._penalties:
            self._c.llama_sampler_reset(self._penalties)
            for token in self._recent:
                self._c.llama_sampler_accept(self._penalties, token)

    def close(self) -> None:
        """Give the memory back."""
        if self._chain:
            self._c.llama_sampler_free(self._chain)
            self._chain = None
