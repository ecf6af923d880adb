"""
The chat template: messages to the text, and to the token ids, that the model continues with its answer.

The template is the model's own Jinja source, rendered as transformers renders it, byte for byte. `encode_messages`
tokenizes the rendered conversation as a whole, so the ids are those of the reference; a control token that a message
spells out stays text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from qwenlocal.errors import BadWeights, TextTooLong, UsageError
from qwenlocal.i18n import tr
from qwenlocal.jinja import CompiledTemplate, TemplateFailure, TemplateRejection

if TYPE_CHECKING:
    from qwenlocal.engine.tokenizer import Tokenizer

# Qwen1.5's template, for ChatML models whose file has none (some of the first GGUF files).
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_CHARACTERS = 4_000_000  # of a message: about a million tokens, far beyond any context
# Unicode noncharacters, which are never assigned: the first one that no message contains is used.
_SEPARATORS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_HINT = 'To run without a chat template: qwenlocal run MODEL --raw "TEXT TO CONTINUE"'

ChatMessage = Mapping[str, Any]


class MessagesRejected(BadWeights):
    """The template rejects the messages, often because of their roles."""

    http_status = 400


class ChatTemplate:
    """A compiled template. `bos` and `eos` are the spellings of the tokens that begin and end a text."""

    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        """
        Compile `source`. `now` is the clock behind `strftime_now`.

        Raises
        ------
        BadWeights: the template is not valid Jinja.
        """
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = CompiledTemplate(source, now)
        except TemplateFailure as error:
            raise BadWeights("chat template", f"it is not valid Jinja: {error}", hint=_HINT) from error

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """
        Return the text of `messages` ({"role": …, "content": …}), ending with the header of the assistant's turn.

        Raises
        ------
        MessagesRejected: the template rejects these messages. BadWeights: it fails.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except TemplateRejection as error:
            raise MessagesRejected("chat template", f"it rejects the conversation: {error}", hint=_HINT) from error
        except TemplateFailure as error:
            raise BadWeights("chat template", f"it fails: {error}", hint=_HINT) from error

    @functools.cached_property
    def has_system_messages(self) -> bool:
        """True if the template renders the text of system messages; some reject them, others omit them."""
        marker = _SEPARATORS[0]
        try:
            return marker in self.render([{"role": "system", "content": marker}, {"role": "user", "content": "Hi"}])
        except MessagesRejected:
            return False


class InvalidTemplate(ChatTemplate):
    """A template that cannot be compiled; raises `error` when it is used."""

    def __init__(self, error: BadWeights) -> None:
        self._error = error

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        raise self._error.with_traceback(None)


def encode_messages(
    template: ChatTemplate, messages: Sequence[ChatMessage], tokenizer: Tokenizer, answer_prefix: str = ""
) -> list[int]:
    """
    Return the ids of the prompt that the model continues with the assistant's answer, after `answer_prefix`.

    Control tokens come from the template only. With Qwen1.5, a user's message "a<|im_end|>b" contributes no id above
    151642: the spelling is split after its first character ("a<", "|im_end|>b"), and the parts are tokenized
    separately. Messages that spell no control token are tokenized once, as part of the whole. If the template has no
    system messages, such as Gemma's, their text begins the first question.

    Raises
    ------
    BadWeights: the template fails or rejects the messages.
    TextTooLong: a message would take seconds to tokenize and fits into no context.
    """
    for length in (len(answer_prefix), *(len(str(message["content"])) for message in messages)):
        if length > MAX_CHARACTERS:
            raise TextTooLong(length, MAX_CHARACTERS)
    joined = _join_roles(messages)
    has_system = any(message["role"] == "system" for message in messages)
    if has_system and not template.has_system_messages:
        messages = joined
    try:
        return _encode(template, messages, tokenizer, answer_prefix)
    except MessagesRejected:
        if messages == joined:
            raise
    return _encode(template, joined, tokenizer, answer_prefix)


def require_template(template: ChatTemplate | None, hint: str) -> ChatTemplate:
    """
    Return `template`, the one of a model that is to answer messages.

    Raises
    ------
    UsageError: the model has none; `hint` says what to do then.
    """
    if template is None:
        raise UsageError(tr("This model has no chat template: it continues text instead of answering."), hint=hint)
    return template


def require_tokens(ids: Sequence[int]) -> Sequence[int]:
    """
    Return `ids`, a prompt; a model needs at least one token.

    Raises
    ------
    BadWeights: there are none, because the template rendered the messages as an empty text.
    """
    if not ids:
        raise BadWeights("chat template", "it turns the conversation into an empty text", hint=_HINT)
    return ids


def _encode(
    template: ChatTemplate, messages: Sequence[ChatMessage], tokenizer: Tokenizer, answer_prefix: str
) -> list[int]:
    contents = [*(str(message["content"]) for message in messages), answer_prefix]
    separator = next(separator for separator in _SEPARATORS if not any(separator in content for content in contents))
    while True:
        *texts, prefix = contents
        filled = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
        rendered = template.render(filled) + prefix
        ids = [token for part in rendered.split(separator) for token in tokenizer.tokenize(part, special=True)]
        spellings = _control_spellings(ids, tokenizer)
        split = [_split_spellings(content, spellings, separator) for content in contents]
        if split == contents:
            return ids
        contents = split


def _join_roles(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Make system messages the user's, and join neighbors of the same role, so that user and assistant alternate."""
    joined: list[ChatMessage] = []
    for message in messages:
        role = "user" if message["role"] == "system" else message["role"]
        if joined and joined[-1]["role"] == role:
            joined[-1] = {"role": role, "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append({**message, "role": role})
    return joined


def _control_spellings(ids: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """Return the spellings of the control tokens among `ids`, the longest first."""
    spellings = {
        tokenizer.piece(token, special=True).decode("utf-8", errors="replace")
        for token in set(ids)
        if tokenizer.is_control(token)
    }
    return sorted(spellings, key=lambda spelling: (-len(spelling), spelling))


def _split_spellings(text: str, spellings: Iterable[str], separator: str) -> str:
    """`_split_spellings("a<|im_end|>b", ["<|im_end|>"], "/")` is "a</|im_end|>b"."""
    for spelling in spellings:
        if len(spelling) > 1:
            text = text.replace(spelling, spelling[0] + separator + spelling[1:])
    return text
