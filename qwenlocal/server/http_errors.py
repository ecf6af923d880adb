"""
Errors as HTTP responses, in the form that the clients of each API expect.

OpenAI: {"error": {"message", "type", "param", "code"}}, https://platform.openai.com/docs/guides/error-codes.
Anthropic: {"type": "error", "error": {"type", "message"}}, https://docs.anthropic.com/en/api/errors.
Ollama: {"error": message}, https://docs.ollama.com/api/errors.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenlocal.chat.chat_template import MessagesRejected
from qwenlocal.errors import ContextFull, OutOfRange, QwenlocalError, ServerBusy, TextTooLong, UnknownToken
from qwenlocal.hints import join_hint
from qwenlocal.i18n import mark, tr
from qwenlocal.server.client_hints import find_client_hint

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_NUMBER = mark("“{field}” must be a number.")
_WHOLE_NUMBER = mark("“{field}” must be a whole number.")
_BOOLEAN = mark("“{field}” must be true or false.")
_OBJECT = mark("“{field}” must be an object.")
_NOT_EMPTY = mark("“{field}” must not be empty.")
# Sentences for pydantic's types of errors.
_SENTENCES = {
    "missing": mark("“{field}” is missing."),
    "too_short": _NOT_EMPTY,
    "string_too_short": _NOT_EMPTY,
    "string_type": mark("“{field}” must be a string."),
    "list_type": mark("“{field}” must be a list."),
    "tuple_type": mark("“{field}” must be a list."),
    "dict_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "int_type": _WHOLE_NUMBER,
    "int_parsing": _WHOLE_NUMBER,
    "int_parsing_size": _WHOLE_NUMBER,
    "int_from_float": _WHOLE_NUMBER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": _NUMBER,
    "bool_type": _BOOLEAN,
    "bool_parsing": _BOOLEAN,
}
# The field of each API of OpenAI or llama-server that becomes the prompt.
_PROMPT_FIELDS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
    "/apply-template": "messages",
    "/tokenize": "content",
    "/detokenize": "tokens",
}
_RETRY_AFTER = 5  # seconds: a model that crashed is loaded again in that time, a queue has moved on
_log = logging.getLogger(__name__)


class HttpError(QwenlocalError):
    """
    A request that is answered with the status `http_status`.

    `code` names the error for programs, `param` the field of the request that causes it.
    """

    def __init__(self, http_status: int, message: str, *, code: str = "", param: str = "", hint: str = "") -> None:
        self.http_status, self.code, self.param = http_status, code, param
        super().__init__(message, hint=hint)


class BadField(HttpError):
    """The field `param` of a request has a value that cannot be used."""

    def __init__(self, param: str, message: str, *, code: str = "invalid_value", hint: str = "") -> None:
        super().__init__(400, message, code=code, param=param, hint=hint)


@dataclass(frozen=True)
class ErrorReport:
    """
    An error for the clients of any API.

    `details` are additional fields for OpenAI's clients, `retry_after` the seconds to wait if that may help.
    """

    status: int
    message: str
    code: str = ""
    param: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    retry_after: int = _RETRY_AFTER

    @property
    def type(self) -> str:
        """Anthropic's name for the status, which OpenAI's clients do not read."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the status needs."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(self.retry_after)} if self.status in (429, 503) else {}

    def body(self, path: str) -> dict[str, Any]:
        """Return the body of the response to a request of `path`; the message names the field if nothing else does."""
        message = self.message if self.param in self.message else f"{self.param}: {self.message}"
        if path.startswith("/api/"):
            return {"error": message}
        if path.startswith("/v1/messages"):
            return {"type": "error", "error": {"type": self.type, "message": message}}
        code, param = self.code or None, self.param or None
        return {"error": {"message": self.message, "type": self.type, "param": param, "code": code, **self.details}}


def report_error(error: Exception, request: Request) -> ErrorReport:
    """Describe an error; a bug is logged with an id that the client also gets."""
    if isinstance(error, QwenlocalError):
        return _report_known(error, request.url.path)
    if isinstance(error, RequestValidationError):
        return _report_invalid(error)
    if isinstance(error, HTTPException):
        return _report_unrouted(error, request)
    id = secrets.token_hex(4)
    _log.error("Error %s in %s %s", id, request.method, request.url.path, exc_info=error)
    return ErrorReport(
        500, tr("Internal error; its details are in the server's log, as error {id}.", id=id), "internal_error"
    )


def _report_unrouted(error: HTTPException, request: Request) -> ErrorReport:
    """Describe the error of a request that no route accepts; Starlette's detail does not name the path."""
    path = request.url.path
    if error.status_code == 404:
        message = tr("This server has no path {path}. For all paths, see /docs", path=path)
        return ErrorReport(404, message, "unknown_url")
    if error.status_code == 405:
        methods = (error.headers or {}).get("Allow", "")
        message = tr("{path} accepts only {methods}.", path=path, methods=methods)
        return ErrorReport(405, message, "method_not_allowed")
    return ErrorReport(error.status_code, str(error.detail))


def _report_known(error: QwenlocalError, path: str) -> ErrorReport:
    if isinstance(error, HttpError):
        return ErrorReport(error.http_status, join_hint(error, error.hint), error.code, error.param)
    message = join_hint(error, find_client_hint(error))
    prompt = _PROMPT_FIELDS.get(path, "")
    if isinstance(error, ContextFull):
        details = {"n_prompt_tokens": error.n_prompt, "n_ctx": error.n_ctx}
        return ErrorReport(error.http_status, message, "context_length_exceeded", prompt, details)
    if isinstance(error, (TextTooLong, UnknownToken, MessagesRejected)):
        return ErrorReport(error.http_status, message, "invalid_value", prompt)
    if isinstance(error, OutOfRange):
        return ErrorReport(error.http_status, message, "invalid_value", error.option)
    retry_after = error.retry_after if isinstance(error, ServerBusy) else _RETRY_AFTER
    return ErrorReport(error.http_status, message, retry_after=retry_after)


def _report_invalid(error: RequestValidationError) -> ErrorReport:
    """Describe the first invalid field; if a value could have several types, the part of it that is wrong."""
    errors = error.errors()
    params = [_find_param(one["loc"], error.body, is_missing=one["type"] == "missing") for one in errors]
    inner = [number for number, param in enumerate(params) if param.startswith(f"{params[0]}.")]
    number = inner[0] if params[0] and inner else 0
    message = _explain_invalid(errors[number], params[number])
    return ErrorReport(400, message, "invalid_value", params[number])


def _explain_invalid(error: Mapping[str, Any], field: str) -> str:
    """Describe pydantic's error in a sentence (https://docs.pydantic.dev/latest/errors/validation_errors)."""
    if not field:
        return tr("The request must be a JSON object.")
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return f"{field}: {context['error']}."
    if kind in ("too_long", "string_too_long"):
        limit = context["max_length"]
        if kind == "too_long":
            return tr("“{field}” can have at most {limit:,} items.", field=field, limit=limit)
        return tr("“{field}” can have at most {limit:,} characters.", field=field, limit=limit)
    if kind == "greater_than_equal":
        return tr("“{field}” must be at least {limit}.", field=field, limit=_format_limit(context["ge"]))
    if kind == "less_than_equal":
        return tr("“{field}” must be at most {limit}.", field=field, limit=_format_limit(context["le"]))
    if kind == "less_than":
        return tr("“{field}” must be less than {limit}.", field=field, limit=_format_limit(context["lt"]))
    if kind == "literal_error":
        return tr("“{field}” must be {values}.", field=field, values=context["expected"])
    sentence = _SENTENCES.get(kind)
    return tr(sentence, field=field) if sentence else f"{field}: {error['msg']}."


def _format_limit(limit: float) -> str:
    """`_format_limit(10.0)` is "10"."""
    return f"{int(limit) if limit == int(limit) else limit:,}"


def _find_param(location: tuple[int | str, ...], body: Any, *, is_missing: bool) -> str:
    """
    Return the path of a field; pydantic's location also has the names of the types in unions.

    `("body", "messages", 0, "content", "str")` becomes "messages.0.content".
    """
    path: list[str] = []
    value = body
    for step in location[1:]:
        try:
            value = value[step]
        except (LookupError, TypeError):
            if not (is_missing and step == location[-1]):
                continue
        path.append(str(step))
    return ".".join(path)


async def respond_to_error(request: Request, error: Exception) -> JSONResponse:
    """Return the response to a request that failed."""
    report = report_error(error, request)
    headers = {**report.headers, **(getattr(error, "headers", None) or {})}
    return JSONResponse(report.body(request.url.path), report.status, headers)


class ErrorResponder:
    """
    ASGI middleware that responds to errors that nothing else handles, after `report_error` has logged them.

    A handler for `Exception` would do the same, but Starlette raises the error again after it, and uvicorn would log it
    once more. An error in a response that has begun is raised, so that uvicorn logs it and closes the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            await (await respond_to_error(Request(scope), error))(scope, receive, send)
