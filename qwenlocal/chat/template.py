"""
The chat template: messages in, the text that the model was trained to continue out.

It is the model's own Jinja template, run as transformers runs it, so that the result is the same to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from qwenlocal.errors import BadWeights
from qwenlocal.jinja import compile_template

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

        self.source, self._tokens = source, {"bos_token": bos, "eos_token": eos}
        try:
            self._template = compile_template(source, now)
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
