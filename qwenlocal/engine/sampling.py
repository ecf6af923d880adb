"""Choosing the next token: llama.cpp's own chain of samplers, in llama.cpp's order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwenlocal.engine.context import Context
from qwenlocal.engine.llama import library
from qwenlocal.errors import UsageProblem

_PENALTY_WINDOW = 64


@dataclass(frozen=True)
class Sampling:
    """
    How the next token is chosen from the model's scores.

    `temperature` 0 takes the most likely token each time. `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 are
    off. `seed` None takes a new one each time. The defaults are Qwen1.5's own for its chat models.
    """

    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.8
    min_p: float = 0.0
    repeat_penalty: float = 1.05
    seed: int | None = None

    def __post_init__(self) -> None:
        _within("--temp", self.temperature, 0, 10)
        _within("--top-k", self.top_k, 0, 1_000_000)
        _within("--top-p", self.top_p, 0, 1)
        _within("--min-p", self.min_p, 0, 1)
        _within("--repeat-penalty", self.repeat_penalty, 0.01, 10)
        if self.seed is not None:
            _within("--seed", self.seed, 0, 2**32 - 2)

    def with_known(self, values: Mapping[str, float | int | None]) -> Sampling:
        """This, with every value of `values` that is not None put in its place."""
        known: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(self, **known)


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageProblem(f"{name} must lie between {least:g} and {most:g}; it is {value:g}.")


class Sampler:
    """A sampler chain in llama.cpp: penalties, top-k, top-p, min-p, temperature, then a draw."""

    def __init__(self, sampling: Sampling, vocabulary_size: int) -> None:
        self._c = c = library().c
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        self.seed = int.from_bytes(os.urandom(4), "little") % (2**32 - 1) if sampling.seed is None else sampling.seed
        for link in self._links(sampling, vocabulary_size):
            c.llama_sampler_chain_add(self._chain, link)

    def _links(self, sampling: Sampling, vocabulary_size: int) -> Iterable[Any]:
        c = self._c
        kept = 1 if sampling.temperature == 0 else sampling.top_k
        if sampling.repeat_penalty > 1 and kept:
            # A penalty lowers at most as many tokens as its window holds, so those that can be chosen afterwards are
            # among this many before; penalising 84 candidates instead of 151,936 takes half the time of it all.
            yield c.llama_sampler_init_top_k(kept + _PENALTY_WINDOW)
        if sampling.repeat_penalty != 1:
            yield c.llama_sampler_init_penalties(vocabulary_size, _PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0)
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

    def sample(self, context: Context, row: int) -> int:
        """The next token after the given row of logits; the chain takes note of it."""
        return int(self._c.llama_sampler_sample(self._chain, context.handle, row))

    def close(self) -> None:
        """Give the memory back."""
        if self._chain:
            self._c.llama_sampler_free(self._chain)
            self._chain = None
