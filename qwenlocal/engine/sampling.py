"""Sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr


@dataclass(frozen=True)
class Sampling:
    """
    Parameters for choosing the next token; the defaults are Qwen1.5's for its chat models.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 are off. `seed` None is random.
    `grammar` (of `grammar_from_schema` or `grammar_from_gbnf`) constrains the answer, including `answer_prefix`: the
    tokens at the end of the prompt with which the answer starts.
    """

    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.8
    min_p: float = 0.0
    repeat_penalty: float = 1.05
    seed: int | None = None
    grammar: str | None = None
    answer_prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0, 10)
        _check_range("top_k", self.top_k, 0, 1_000_000)
        _check_range("top_p", self.top_p, 0, 1)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repeat_penalty", self.repeat_penalty, 0.01, 10)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, 2**32 - 2)

    def with_overrides(self, values: Mapping[str, float | int | None]) -> Sampling:
        """Return a copy with the values that are not None."""
        overrides: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(self, **overrides)


def _check_range(name: str, value: float, minimum: float, maximum: float) -> None:
    if not minimum <= value <= maximum:
        raise UsageError(
            tr(
                "{name} must be between {minimum:g} and {maximum:g}, not {value:g}.",
                name=name,
                minimum=minimum,
                maximum=maximum,
                value=value,
            )
        )
