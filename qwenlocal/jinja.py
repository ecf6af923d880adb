"""Chat templates as Jinja: compiled and rendered as in transformers, within limits of time and memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

_MAX_REASON = 300  # characters


class TemplateFailure(Exception):
    """A template cannot be compiled or rendered; `str(error)` says why, as part of a sentence."""


class TemplateRejection(TemplateFailure):
    """A template rejects its input with `raise_exception`; `str(error)` is its message."""


class CompiledTemplate:
    """A template that can be rendered."""

    def __init__(self, source: str, now: Callable[[], datetime] = datetime.now) -> None:
        """
        Compile a chat template. `now` is the clock behind `strftime_now`.

        Raises
        ------
        TemplateFailure: `source` is not valid Jinja, or too long or nested too deeply.
        """
        from qwenlocal.jinja_sandbox import compile_source

        self._now = now
        try:
            self._code = compile_source(source)
        except Exception as error:  # besides Jinja's errors, those of Python's compiler
            raise TemplateFailure(_describe(error)) from error

    def render(self, **variables: Any) -> str:
        """
        Return the text that the template makes of `variables`.

        Raises
        ------
        TemplateRejection: the template rejects them.
        TemplateFailure: it fails, or takes too much time or memory.
        """
        from qwenlocal.jinja_sandbox import InputRejected, render_code

        try:
            return render_code(self._code, variables, self._now)
        except Exception as error:  # a template can raise whatever Python's operators and methods raise
            kind = TemplateRejection if isinstance(error, InputRejected) else TemplateFailure
            raise kind(_describe(error)) from error


def find_template_error(source: str) -> str:
    """
    Return why a template cannot be compiled; "" if it can.

    `find_template_error("{% for message in messages %}")` is "line 1: Unexpected end of template. …".
    """
    try:
        CompiledTemplate(source)
    except TemplateFailure as error:
        return str(error)
    return ""


def _describe(error: Exception) -> str:
    """Describe an error in one line."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, (RecursionError, SyntaxError)):  # Python's compiler allows 20 nested loops
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return " ".join(str(error).split())[:_MAX_REASON].rstrip(".") or type(error).__name__
