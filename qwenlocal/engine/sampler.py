"""Choosing the next token: llama.cpp's own chain of samplers, in llama.cpp's order."""

from __future__ import annotations

import collections
import ctypes
import math
import os
from collections.abc import Iterable
from typing import Any

from qwenlocal.engine.constraint import Constraint
from qwenlocal.engine.context import Context
from qwenlocal.engine.llama import load_library
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import UsageError

_PENALTY_WINDOW = 64
_LIKELY = 256  # tokens that a grammar is asked about first


class Sampler:
    """A sampler chain in llama.cpp: penalties, top-k, top-p, min-p, temperature, then a draw."""

    def __init__(self, sampling: Sampling, vocabulary: Tokenizer) -> None:
        """
        Raises
        ------
        UsageError: the grammar cannot be read, or does not allow what was begun.
        """
        self._c = c = load_library().c
        self._constraint = Constraint(sampling.grammar, vocabulary) if sampling.grammar is not None else None
        if self._constraint:
            self._constraint.catch_up(sampling.begun)
        self._penalties: Any = None
        self._recent: collections.deque[int] = collections.deque(maxlen=_PENALTY_WINDOW)
        self._padding = vocabulary.padding
        self._size, self._greedy = len(vocabulary), sampling.temperature == 0
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
        if self._constraint:
            if not self._constraint.allows(token):
                self._take_back()
                token = self._choose_again(context.logits(row), self._constraint)
            self._constraint.accept(token)
        self._recent.append(token)
        return token

    def forced(self) -> list[int]:
        """Tokens that must come now, by the grammar; they are taken note of."""
        tokens = self._constraint.forced_tokens() if self._constraint else []
        for token in tokens:
            self._c.llama_sampler_accept(self._chain, token)
            self._constraint.accept(token)  # type: ignore[union-attr]
            self._recent.append(token)
        return tokens

    def _take_back(self) -> None:
        """A token that was sampled is not said; the penalties must not know it."""
        if self._penalties:
            self._c.llama_sampler_reset(self._penalties)
            for token in self._recent:
                self._c.llama_sampler_accept(self._penalties, token)

    def _choose_again(self, logits: Any, constraint: Constraint) -> int:
        """By the same chain, among what the grammar allows: of the likeliest if any of them will do, or of all."""
        import numpy

        scores = numpy.ctypeslib.as_array(logits, (self._size,))
        likely = numpy.argpartition(scores, -min(_LIKELY, self._size))[-min(_LIKELY, self._size) :]
        allowed = constraint.allowed(likely.tolist())
        if allowed:
            return self._choose(scores, numpy.array(allowed, numpy.int32), None)
        return self._choose(scores, numpy.arange(self._size, dtype=numpy.int32), constraint)

    def _choose(self, scores: Any, tokens: Any, constraint: Constraint | None) -> int:
        import numpy

        kind = numpy.dtype([("id", numpy.int32), ("logit", numpy.float32), ("p", numpy.float32)])
        data = numpy.zeros(len(tokens), kind)
        data["id"], data["logit"] = tokens, scores[tokens]
        pointer = ctypes.cast(data.ctypes.data, self._c.llama_token_data_p)
        array = self._c.llama_token_data_array(pointer, len(tokens), -1, False)
        if constraint:
            constraint.filter(array)
        self._c.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        if constraint and not constraint.allows(token):
            raise UsageError("The grammar leaves nothing that this model could say.", hint="Check the grammar.")
        self._c.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Give the memory back."""
        if self._chain:
            self._c.llama_sampler_free(self._chain)
            self._chain = None
        if self._constraint:
            self._constraint.close()
