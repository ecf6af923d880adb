"""
Errors of remote engines.

    RemoteError                    4  base class: a remote engine did not answer
    ├── EngineUnreachable          4  nothing answers at its address
    ├── ApiKeyRejected             4  the API key is missing or refused
    ├── RateLimited                4  it received too many requests
    ├── RequestRejected            4  it refuses the request, or has no such route
    ├── EngineFailed               4  it reports an internal error
    ├── MalformedAnswer            4  it does not implement the OpenAI API
    └── AnswerCut                  4  the connection was lost during an answer
    RemoteModelNotFound            3  it has no such model
    PromptTooLong                  7  the prompt does not fit into its context

No error holds an API key.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from qwenlocal.errors import ModelNotFound, QwenlocalError
from qwenlocal.formatting import shorten
from qwenlocal.i18n import tr

_MAX_NAMES = 20
_EXCERPT = 120  # characters of an engine's message


class RemoteError(QwenlocalError):
    """The engine at `host` did not answer."""

    exit_code, http_status = 4, 502

    def __init__(self, host: str, message: str, *, hint: str = "") -> None:
        self.host = host
        super().__init__(message, hint=hint)


class EngineUnreachable(RemoteError):
    """Nothing answers at `url`; `reason` says why."""

    def __init__(self, host: str, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(
            host,
            tr("Cannot reach {url}: {reason}.", url=url, reason=reason),
            hint=tr("Start the engine there, or check the address: curl {url}/models", url=url),
        )


class ApiKeyRejected(RemoteError):
    """The engine refuses the API key from `source`, or none was sent (`source` is "")."""

    def __init__(self, host: str, source: str, *, hint: str) -> None:
        self.source = source
        message = tr("{host} needs an API key.", host=host)
        if source:
            message = tr("{host} refuses the API key in {source}.", host=host, source=source)
        super().__init__(host, message, hint=hint)


class RateLimited(RemoteError):
    """The engine has received too many requests, and can be asked again in `retry_after` seconds (0: not known)."""

    def __init__(self, host: str, retry_after: float, reason: str) -> None:
        self.retry_after, self.reason = retry_after, reason
        message = tr("{host} has received too many requests", host=host)
        super().__init__(
            host,
            f"{message}: {shorten(reason, _EXCERPT)}" if reason else f"{message}.",
            hint=tr("Try again in {seconds} s.", seconds=math.ceil(retry_after))
            if retry_after
            else tr("Wait a moment, then try again."),
        )


class RequestRejected(RemoteError):
    """The engine answers with the HTTP status `status`; `reason` is its own message."""

    def __init__(self, host: str, status: int, reason: str, *, hint: str = "") -> None:
        self.status, self.reason = status, reason
        reason = shorten(reason, 2 * _EXCERPT) or tr("no reason given")
        super().__init__(
            host,
            tr("{host} refuses the request (HTTP {status}): {reason}", host=host, status=status, reason=reason),
            hint=hint or tr("Omit the option that it names, or use another model: /model"),
        )


class EngineFailed(RemoteError):
    """The engine reports an internal error with the HTTP status `status`, or 0 if it is in the middle of an answer."""

    def __init__(self, host: str, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        kind = f"HTTP {status}" if status else tr("during the answer")
        reason = shorten(reason, 2 * _EXCERPT) or tr("no reason given")
        super().__init__(
            host,
            tr("{host} failed ({kind}): {reason}", host=host, kind=kind, reason=reason),
            hint=tr("Try again; if it keeps failing, check the engine's log."),
        )


class MalformedAnswer(RemoteError):
    """The engine does not implement the OpenAI API; `excerpt` is the beginning of its response."""

    def __init__(self, host: str, excerpt: str) -> None:
        self.excerpt = shorten(excerpt, _EXCERPT)
        super().__init__(
            host,
            tr("{host} does not answer like the OpenAI API: {excerpt}", host=host, excerpt=self.excerpt or "“”"),
            hint=tr("Check the address; it usually ends with /v1."),
        )


class AnswerCut(RemoteError):
    """The answer was cut off because of `reason`; its text so far is kept."""

    def __init__(self, host: str, reason: str) -> None:
        self.reason = reason
        super().__init__(
            host,
            tr("The answer from {host} is incomplete: {reason}.", host=host, reason=reason),
            hint=tr("In a chat, its text is kept, and /continue asks for the rest."),
        )


class RemoteModelNotFound(ModelNotFound):
    """The engine at `host` has no model `name`, but those in `available`."""

    def __init__(self, host: str, name: str, available: Sequence[str]) -> None:
        self.host, self.available = host, tuple(available)
        similar = difflib.get_close_matches(name, available, n=_MAX_NAMES, cutoff=0.4) or list(available)
        names = ", ".join(similar[:_MAX_NAMES]) + (", …" if len(available) > _MAX_NAMES else "")
        super().__init__(
            name,
            reason=tr("{host} has no model “{name}”.", host=host, name=name),
            suggestions=similar[:_MAX_NAMES],
            hint=tr("Available models: {names}", names=names)
            if names
            else tr("It lists no models; load one there first."),
        )


class PromptTooLong(QwenlocalError):
    """The prompt does not fit into the context of the model at `host`; `reason` is the engine's own message."""

    exit_code, http_status = 7, 400

    def __init__(self, host: str, reason: str) -> None:
        self.host, self.reason = host, reason
        super().__init__(
            tr("The text is too long for {host}: {reason}", host=host, reason=shorten(reason, 2 * _EXCERPT)),
            hint=tr("Shorten it; in a chat, leave out a turn (/drop) or start a new one (/clear)."),
        )
