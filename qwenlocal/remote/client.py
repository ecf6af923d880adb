"""A client of the OpenAI API: lists models and streams answers."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3

from qwenlocal import __version__
from qwenlocal.errors import QwenlocalError
from qwenlocal.formatting import shorten
from qwenlocal.i18n import tr
from qwenlocal.library.http import (
    HttpClient,
    HttpResponse,
    Timeouts,
    TransferError,
    parse_retry_after,
    with_retries,
)
from qwenlocal.remote.cancellable_stream import CancellableStream
from qwenlocal.remote.endpoints import KEYRING, Endpoint
from qwenlocal.remote.errors import (
    AnswerCut,
    ApiKeyRejected,
    EngineFailed,
    EngineUnreachable,
    MalformedAnswer,
    PromptTooLong,
    RateLimited,
    RemoteError,
    RemoteModelNotFound,
    RequestRejected,
)
from qwenlocal.remote.event_stream import EventTooLarge, parse_events
from qwenlocal.remote.wire_format import AnswerChunk, html_to_text, parse_chunk, parse_error, parse_models

ANSWER_TIMEOUTS = Timeouts(connect=10, stall=600)  # a long prompt on a slow machine takes minutes
LIST_TIMEOUTS = Timeouts(connect=5, stall=10)
_BUSY = (408, 429, 502, 503, 504)
_MAX_DOCUMENT = 4 << 20  # bytes
_EXCERPT = 400
# As vLLM, SGLang, llama-server, OpenAI, DashScope and together.ai word it.
_TOO_LONG = re.compile(
    r"context[_ ](length|size|window)|exceed_context|input length|longer than the model|prompt is too long|"
    r"too many tokens|max_model_len|inputs. tokens",
    re.IGNORECASE,
)


T = TypeVar("T")


class _BadStatus(TransferError):
    """An answer with a status other than 200; `text` is its body."""

    def __init__(self, status: int, text: str, retry_after: float, location: str) -> None:
        self.text, self.location = text, location
        super().__init__(f"HTTP {status}", retryable=status in _BUSY, retry_after=retry_after, status=status)


class RemoteClient:
    """Requests to the engine at `endpoint`."""

    def __init__(self, endpoint: Endpoint, timeouts: Timeouts = ANSWER_TIMEOUTS) -> None:
        self.endpoint, self._timeouts = endpoint, timeouts

    def list_models(self) -> list[str]:
        """
        Return the names of the engine's models.

        Raises
        ------
        RemoteError: it does not answer, or its answer is malformed.
        """
        http = HttpClient(LIST_TIMEOUTS)
        try:
            response = self._open(http, "GET", "/models")
        except _BadStatus as status:
            raise self._explain(status) from None  # its text may quote the API key
        data = _read_text(http, response)
        try:
            return parse_models(data)
        except ValueError:
            raise self._explain_body(data) from None

    def stream_chat(self, request: Mapping[str, Any]) -> CancellableStream[AnswerChunk]:
        """
        Request a chat completion, with the fields of the OpenAI API; retry if the engine is busy.

        Iterating the stream raises

        RemoteError, PromptTooLong, RemoteModelNotFound: before the first chunk.
        AnswerCut: the connection broke before the end of the answer.
        """
        return self.stream(
            "/chat/completions", {**request, "stream": True, "stream_options": {"include_usage": True}}, parse_chunk
        )

    def stream(self, path: str, request: Mapping[str, Any], parse: Callable[[str], T]) -> CancellableStream[T]:
        """Send a request and parse the data of each event of the response; raises as `stream_chat`."""
        http = HttpClient(self._timeouts)  # of its own, so that closing its connections ends no other answer
        is_cancelled = threading.Event()

        def disconnect() -> None:
            is_cancelled.set()
            http.close_all()

        return CancellableStream(lambda: self._read_events(http, path, request, parse, is_cancelled), disconnect)

    def _read_events(
        self,
        http: HttpClient,
        path: str,
        request: Mapping[str, Any],
        parse: Callable[[str], T],
        is_cancelled: threading.Event,
    ) -> Iterator[T]:
        try:
            response = self._open(http, "POST", path, json.dumps(request).encode(), is_cancelled)
        except _BadStatus as status:
            raise self._explain(status, str(request["model"])) from None
        host, head = self.endpoint.host, bytearray()

        def read() -> Iterator[bytes]:
            for data in http.read(response):
                if len(head) < _EXCERPT:
                    head.extend(data[:_EXCERPT])
                yield data

        is_answer, problem = False, tr("it ended early")
        try:
            for data in parse_events(read()):
                if data == "[DONE]":
                    return
                yield parse(data)
                is_answer = True
        except TransferError as error:
            problem = str(error)
        except EventTooLarge as error:
            raise self._explain_body(head.decode(errors="replace")) from error
        except ValueError:
            if not is_answer:
                raise self._explain_body(data) from None
            problem = tr("it sent malformed data ({excerpt})", excerpt=shorten(self._without_key(data)))
        if not is_answer and head:
            raise self._explain_body(head.decode(errors="replace"))
        raise AnswerCut(host, problem)

    # --- requests

    def _open(
        self,
        http: HttpClient,
        method: str,
        path: str,
        body: bytes | None = None,
        is_cancelled: threading.Event | None = None,
    ) -> HttpResponse:
        """
        Send a request, retry if the engine is busy, and return the open response.

        Raises
        ------
        _BadStatus: it has another status than 200. EngineUnreachable: there is no response.
        """
        url = self.endpoint.url + path
        headers = {"User-Agent": f"qwenlocal/{__version__}", "Accept-Encoding": "identity"}
        if body is not None:
            headers |= {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.endpoint.api_key:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"

        def attempt() -> HttpResponse:
            if is_cancelled and is_cancelled.is_set():
                raise TransferError("cancelled", retryable=False)
            try:
                response = http.request(method, url, headers=headers, body=body)
            except TransferError as error:
                reason = str(error).removeprefix(f"{urlsplit(url).hostname}: ")
                raise EngineUnreachable(self.endpoint.host, self.endpoint.url, reason) from error
            if response.status == 200:
                return HttpResponse(response, 0, None, None)
            raise _bad_status(http, response)

        return with_retries(attempt)

    def _explain(self, refusal: _BadStatus, model: str = "") -> QwenlocalError:
        """Return the error for a status; `model` is the one that was asked for."""
        endpoint, status = self.endpoint, refusal.status or 0
        host, (message, code) = endpoint.host, parse_error(refusal.text)
        message = self._without_key(message)
        if status == 401 or (status == 403 and not message):
            return ApiKeyRejected(host, tr(endpoint.key_source), hint=self._key_hint())
        if status == 403:  # the key may be right, but not for this model
            return RequestRejected(host, status, message, hint=self._key_hint())
        if status == 429:
            return RateLimited(host, refusal.retry_after, message)
        if status == 413 or (status in (400, 422) and _TOO_LONG.search(f"{code} {message}")):
            return PromptTooLong(host, message)
        if model and (status == 404 or "model_not_found" in code):
            return self._explain_missing(model, status, message)
        if status >= 500:
            return EngineFailed(host, status, message)
        return RequestRejected(host, status, message, hint=self._refusal_hint(refusal))

    def _refusal_hint(self, refusal: _BadStatus) -> str:
        """Return the next step after a refusal; "" for the usual one."""
        if refusal.location:
            url = urljoin(self.endpoint.url, refusal.location)
            return tr("It redirects to {url}; use that address.", url=url)
        if refusal.status == 402:
            return tr("Check your account there.")
        return tr("Check the address; it usually ends with /v1.") if refusal.status == 404 else ""

    def _explain_body(self, text: str) -> RemoteError:
        """Return the error for a body that is no answer, although its status is 200."""
        message, _ = parse_error(text)
        if message != html_to_text(text):  # it is JSON with a message
            return EngineFailed(self.endpoint.host, 200, self._without_key(message))
        return MalformedAnswer(self.endpoint.host, self._without_key(message))

    def _key_hint(self) -> str:
        """Return how to send another API key."""
        endpoint = self.endpoint
        if endpoint.key_source == KEYRING:
            return tr("Set another API key: keyring set qwenlocal {user}", user=endpoint.keyring_user)
        if endpoint.key_source:
            return tr("Set another API key: export {variable}=KEY", variable=endpoint.key_source)
        return tr("Name the environment variable that holds it: --api-key-env VARIABLE")

    def _explain_missing(self, model: str, status: int, message: str) -> QwenlocalError:
        """Return the error for a request whose model or address does not exist."""
        try:
            names = self.list_models()
        except RemoteError:  # the address is wrong, or the engine lists no models: only its own message helps
            hint = tr("Check the address, which usually ends with /v1, and the name of the model.")
            return RequestRejected(self.endpoint.host, status, message, hint=hint)
        return RemoteModelNotFound(self.endpoint.host, model, names)

    def _without_key(self, text: str) -> str:
        """Replace the API key in an engine's message."""
        return text.replace(self.endpoint.api_key, "…") if self.endpoint.api_key else text


def _bad_status(http: HttpClient, response: urllib3.BaseHTTPResponse) -> _BadStatus:
    headers = response.headers
    location = headers.get("location", "") if 300 <= response.status < 400 else ""
    text = _read_text(http, HttpResponse(response, 0, None, None))
    return _BadStatus(response.status, text, parse_retry_after(headers.get("retry-after", "")), location)


def _read_text(http: HttpClient, response: HttpResponse) -> str:
    """Return the body of a response, or only its beginning if it is long or broken."""
    data = bytearray()
    try:
        for chunk in http.read(response):
            data += chunk
            if len(data) > _MAX_DOCUMENT:
                break
    except TransferError:
        pass
    http.close(response.body)
    return data.decode("utf-8", errors="replace")
