"""
Jinja for chat templates, with the sandbox and the settings of transformers.

Source: transformers, utils/chat_template_utils.py, `_compile_jinja_template`. Templates come from untrusted files, so
they run in a sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template


def compile_template(source: str, now: Callable[[], datetime] = datetime.now) -> Template:
    """
    Compile a chat template.

    Raises
    ------
    jinja2.TemplateError: `source` is not valid Jinja.
    """
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)
    return environment.from_string(source)


def find_template_error(source: str) -> str:
    """
    Return the syntax error in a template; "" if there is none.

    `find_template_error("{% for message in messages %}")` is "line 1: Unexpected end of template. …".
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        compile_template(source)
    except TemplateSyntaxError as reason:
        return f"line {reason.lineno}: {reason.message}"
    except (TemplateError, RecursionError) as reason:
        return str(reason)
    return ""


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert to JSON like transformers; Jinja's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
