"""
The chat template: messages in, the text that the model was trained to continue out.

It is the model's own Jinja template, run in the sandbox and with the settings that transformers uses
(transformers, utils/chat_template_utils.py: `_compile_jinja_template`), so that the result is the same to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from qwenlocal.errors import BadWeights

# Qwen1.5's own, for files of ChatML models that carry no template (some of the first GGUF files do not).
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template. `bos` and `eos` are the spellings of the tokens that begin and end a text."""

    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        """
        Raises
        ------
        BadWeights: the template is not valid Jinja.
        """
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self.source, self._tokens = source, {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except TemplateError as reason:
            raise BadWeights("the chat template", f"it cannot be read: {reason}", hint=_WITHOUT) from reason

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **more: Any) -> str:
        """
        The text for `messages` ({"role": …, "content": …}), ending where the assistant begins to speak.

        Raises
        ------
        BadWeights: the template refuses these messages, or fails.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens, **more
            )
        except TemplateError as reason:
            raise BadWeights("the chat template", f"it refuses the conversation: {reason}", hint=_WITHOUT) from reason
        except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as reason:
            raise BadWeights("the chat template", f"it fails: {reason}", hint=_WITHOUT) from reason


_WITHOUT = "Without a template: qwenlocal run MODEL --raw “text to continue”"


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
