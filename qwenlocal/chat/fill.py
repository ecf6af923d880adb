"""Prompts with places to fill in: `Translate to {lang}: {input}`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qwenlocal.errors import UsageProblem

_PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def filled(template: str, values: Mapping[str, str]) -> str:
    """
    `filled("To {lang}: {input} {{}}", {"lang": "French", "input": "Hi"})` is "To French: Hi {}".

    Raises
    ------
    UsageProblem: a place has no value; which, is said.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in values:
            raise UsageProblem(
                f"The template has a place {{{match[1]}}}, for which there is nothing.",
                hint=f"Give it: --var {match[1]}=TEXT, or as a key of each line of --batch.",
            )
        return values[match[1]]

    return _PLACE.sub(value, template)
