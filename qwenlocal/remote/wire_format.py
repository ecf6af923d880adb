"""
The JSON of the OpenAI API (https://platform.openai.com/docs/api-reference/chat) as other engines write it.

Parsers accept what vLLM, SGLang, llama-server, Ollama, DashScope and together.ai send, and skip fields that they do not
know, such as `reasoning_content`.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from typing import Any

from qwenlocal.formatting import replace_surrogates

_HTML = re.compile(r"\s*<(!doctype html|html|head|body)\b", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>\s*([^<]*\S)\s*</title>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>?")


@dataclass(frozen=True)
class TokenUsage:
    """Numbers of tokens, counted by the engine; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class AnswerChunk:
    """
    A piece of an answer.

    `is_thinking` if it has text that is not part of the answer. `finish_reason` is "" until the last text; `error` is
    the engine's message if it fails in the middle of an answer.
    """

    text: str = ""
    is_thinking: bool = False
    finish_reason: str = ""
    is_stop_string: bool = False
    usage: TokenUsage | None = None
    error: str = ""


def parse_chunk(data: str) -> AnswerChunk:
    """
    Parse the data of an event.

    Raises
    ------
    ValueError: it is not a chunk of an answer.
    """
    chunk = _parse_object(data)
    if chunk.get("error") or chunk.get("object") == "error":
        return AnswerChunk(error=parse_error(data)[0] or "?")
    usage = _parse_usage(chunk.get("usage"))
    choices = chunk.get("choices")
    if not choices and (usage or choices == []):
        return AnswerChunk(usage=usage)
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise ValueError("it has no choices")
    choice = choices[0]
    delta = choice.get("delta")
    delta = delta if isinstance(delta, dict) else {}
    text, thoughts = delta.get("content"), delta.get("reasoning_content") or delta.get("reasoning")
    return AnswerChunk(
        replace_surrogates(text) if isinstance(text, str) else "",
        bool(thoughts),
        str(choice.get("finish_reason") or ""),
        isinstance(choice.get("stop_reason"), str),  # vLLM: the stop string, or the id of a token
        usage,
    )


def _parse_usage(usage: Any) -> TokenUsage | None:
    if not isinstance(usage, dict):
        return None
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    if not isinstance(prompt, int) or not isinstance(answer, int) or min(prompt, answer) < 0:
        return None
    return TokenUsage(prompt, answer, cached if isinstance(cached, int) else 0)


def parse_models(data: str) -> list[str]:
    """
    Return the names in a list of models.

    Raises
    ------
    ValueError: it is not such a list.
    """
    models = _parse_object(data).get("data")
    if not isinstance(models, list) and models is not None:  # Ollama without models sends null
        raise ValueError("it has no data")
    return [str(model["id"]) for model in models or () if isinstance(model, dict) and model.get("id")]


def parse_error(data: str) -> tuple[str, str]:
    """
    Return an error's message and its code or type, from any of the shapes that engines use; else the text itself.

    OpenAI, vLLM, llama-server, Ollama, DashScope and together.ai send {"error": {"message": "no", "code": 1}}, others
    {"error": "no"}, SGLang {"object": "error", "message": "no"}, FastAPI {"detail": "no"} or {"detail": [{"loc": …,
    "msg": "no"}]}, and proxies HTML, of which the title is returned.
    """
    try:
        body = _parse_object(data)
    except ValueError:
        return html_to_text(data), ""
    error = body.get("error") or body
    if isinstance(error, str):
        return error, ""
    if not isinstance(error, dict):
        return data.strip(), ""
    message = error.get("message") or error.get("detail") or data.strip()
    if isinstance(message, list):
        message = "; ".join(map(_describe_field, message))
    code = f"{error.get('code') or ''} {error.get('type') or ''}"
    return message if isinstance(message, str) else json.dumps(message, ensure_ascii=False), code


def _describe_field(problem: Any) -> str:
    """Describe a problem of FastAPI's validation: "messages.0.content: Field required"."""
    if not isinstance(problem, dict) or not isinstance(problem.get("msg"), str):
        return json.dumps(problem, ensure_ascii=False)
    place = problem.get("loc")
    names = [str(name) for name in place if name != "body"] if isinstance(place, list) else []
    return ": ".join([*([".".join(names)] if names else []), problem["msg"]])


def html_to_text(text: str) -> str:
    """Return the title of an HTML page, or its words if it has none; other text as it is."""
    if not _HTML.match(text):
        return text.strip()
    title = _TITLE.search(text)
    return html.unescape(title[1] if title else " ".join(_TAG.sub(" ", text).split()))


def _parse_object(data: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("it is not an object")
    return parsed
