"""
Jinja as chat templates want it: the sandbox and the settings that transformers uses.

Source: transformers, utils/chat_template_utils.py, `_compile_jinja_template`. Templates come from strangers' files, so
they run where they can reach nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template


def compile_template(source: str, now: Callable[[], datetime] = datetime.now) -> Template:
    """`source`, ready to be rendered. Raises jinja2.TemplateError where it is not valid Jinja."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment.from_string(source)


def fault_in(source: str) -> str:
    """
    Why `source` cannot be read as a template; "" where it can.

    `fault_in("{% for message in messages %}")` is "line 1: Unexpected end of template. …".
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        compile_template(source)
    except TemplateSyntaxError as reason:
        return f"line {reason.lineno}: {reason.message}"
    except (TemplateError, RecursionError) as reason:
        return str(reason)
    return ""


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: Jinja's own escapes characters that HTML does not like."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
