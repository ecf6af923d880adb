"""What `qwenlocal run` was asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenlocal.engine.wanted import Wanted


@dataclass(frozen=True)
class Asked:
    """What the command line said."""

    words: Sequence[str]
    model: str | None
    file: str | None
    interactive: bool
    system: str | None
    limit: int | None
    wanted: Wanted
    gpu_layers: str
    lookup: bool
    draft: str | None
    keep_cache: bool
    grammar: str | None
    overflow: str
    sampling: Mapping[str, float | int | None]
    stops: Sequence[str]
    raw: bool
    template: str | None
    values: Mapping[str, str]
    batch: str | None
    output: str | None
    resume: str | None
    journal: bool
    markdown: bool
    stats: bool
    limit_rate: int

    @property
    def model_name(self) -> str | None:
        """The model, from -m or the first word; None for the default one."""
        return self.model or (None if self._only_a_prompt else self.words[0])

    @property
    def prompt_words(self) -> Sequence[str]:
        """The prompt's words."""
        return self.words if self.model or self._only_a_prompt else self.words[1:]

    @property
    def _only_a_prompt(self) -> bool:
        """One argument with a space in it is a sentence, not a model."""
        return not self.words or (
            len(self.words) == 1 and " " in self.words[0].strip() and not os.path.exists(self.words[0])
        )
