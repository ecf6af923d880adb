"""Prompts with placeholders (--template): `Translate to {lang}: {input}`. Not to be confused with `chat_template`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qwenlocal.errors import UsageError

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def fill_placeholders(template: str, values: Mapping[str, str]) -> str:
    """
    `fill_placeholders("To {lang}: {input} {{}}", {"lang": "French", "input": "Hi"})` is "To French: Hi {}".

    Raises
    ------
    UsageError: a placeholder has no value.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in values:
            raise UsageError(
                f"The placeholder {{{match[1]}}} of the template has no value.",
                hint=f"Set it with --var {match[1]}=TEXT, or as a key in each line of the --batch file.",
            )
        return values[match[1]]

    return _PLACEHOLDER.sub(value, template)
