"""How the next token is chosen from a model's scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr


@dataclass(frozen=True)
class Sampling:
    """
    How the next token is chosen from the model's scores.

    `temperature` 0 takes the most likely token each time. `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 are
    off. `seed` None takes a new one each time. Answers keep to `grammar` (GBNF), if there is one; where a prompt ends
    with the beginning of such an answer, `begun` are its tokens. The defaults are Qwen1.5's own for its chat models.
    """

    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.8
    min_p: float = 0.0
    repeat_penalty: float = 1.05
    seed: int | None = None
    grammar: str | None = None
    begun: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 10)
        _within("top_k", self.top_k, 0, 1_000_000)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("repeat_penalty", self.repeat_penalty, 0.01, 10)
        if self.seed is not None:
            _within("seed", self.seed, 0, 2**32 - 2)

    def with_known(self, values: Mapping[str, float | int | None]) -> Sampling:
        """This, with every value of `values` that is not None put in its place."""
        known: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(self, **known)


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageError(
            tr(
                "{name} must lie between {least:g} and {most:g}; it is {value:g}.",
                name=name,
                least=least,
                most=most,
                value=value,
            )
        )
