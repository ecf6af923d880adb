"""A connection to a client: refuses malformed HTTP, and closes if the client neither sends nor reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qwenlocal.i18n import tr
from qwenlocal.server.http_errors import ErrorReport

STALL_SECONDS = 60.0
_MAX_HEADER = 16 << 10  # bytes
_DISCARD_SECONDS = 1.0  # for the rest of a body that nobody reads


class HttpConnection(H11Protocol):
    """
    Uvicorn's connection, which is closed if its client is idle.

    A client is idle if it does not send the complete header of its next request within uvicorn's `timeout_keep_alive`,
    or if it reads nothing for `stall_seconds` (at most twice as long) although data is waiting. Its running answers are
    cancelled.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = self._parser = _Parser(h11.SERVER, _MAX_HEADER)
        self._application: Any = self.app
        self.app = self._run_application
        self._stall_seconds, self._n_read = stall_seconds, 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start waiting for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch_header()
        self._stall_timer = self.loop.call_later(self._stall_seconds, self._check_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop_header_timer()
        if self._stall_timer:
            self._stall_timer.cancel()

    def handle_events(self) -> None:
        """Handle received data."""
        super().handle_events()
        self._watch_header()

    def shutdown(self) -> None:
        """Close the connection after its response; asyncio cannot abort a TLS connection that is closed twice."""
        if not self.transport.is_closing():
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse malformed HTTP, unless a response has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(format_response(self._parser.describe_error()))
        self.transport.close()

    def _watch_header(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _stop_header_timer(self) -> None:
        if self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None

    def _check_reading(self) -> None:
        """Close the connection if the client has read nothing since the last check, and there is something to read."""
        n_unread = self.transport.get_write_buffer_size()
        n_read = self._parser.n_sent - n_unread
        if n_unread and n_read <= self._n_read:
            self.transport.abort()
            return
        self._n_read = n_read
        self._stall_timer = self.loop.call_later(self._stall_seconds, self._check_reading)

    async def _run_application(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = self.cycle

        async def send_if_open(message: Message) -> None:
            if self.transport.is_closing():
                # Uvicorn notices it in the next round of the loop; asyncio prints warnings if data is sent until then.
                cycle.disconnected = True
                await asyncio.sleep(0)
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                self.flow.resume_reading()  # asyncio does not close a TLS connection while reading is paused
            await send(message)

        body = _RequestBody(scope, receive, send_if_open)
        await self._application(scope, body.receive, body.send)


class _Parser(h11.Connection):
    """h11's connection; also refuses some requests that h11 accepts, and counts the bytes sent."""

    n_sent = 0
    _error_status = 400

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_header(event)
        except h11.RemoteProtocolError as error:
            self._error_status = error.error_status_hint
            raise
        return event

    def send(self, event: Any) -> Any:
        data = super().send(event)
        self.n_sent += len(data or b"")
        return data

    def describe_error(self) -> ErrorReport:
        """Describe the error that `next_event` has raised."""
        if self._error_status == 431:
            return ErrorReport(
                431,
                tr("The header of the request is longer than {limit:,} bytes.", limit=_MAX_HEADER),
                "header_too_long",
            )
        return ErrorReport(400, tr("The request is not valid HTTP."), "invalid_http")


def _check_header(request: h11.Request) -> None:
    """
    Check the header for faults that h11 accepts.

    h11 limits the header's size only while a part of it is missing. If there are two lengths, it ignores
    Content-Length; a proxy that ignores Transfer-Encoding would take a part of the body for another request
    (https://www.rfc-editor.org/rfc/rfc9112#section-6.3).
    """
    if len(request.target) + sum(len(name) + len(value) for name, value in request.headers) > _MAX_HEADER:
        raise h11.RemoteProtocolError("long header", error_status_hint=431)
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
        raise h11.RemoteProtocolError("two lengths")


class _RequestBody:
    """
    The body of a request. If a response begins before the application has read all of it, the rest is discarded.

    The connection is then closed, so that no part of the body is taken for the next request. Before that, the rest is
    read for a while: closing a socket with unread data resets the connection, and the client loses the response.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        has_body = headers.get(b"content-length", b"0").strip(b"0") or b"transfer-encoding" in headers
        self._receive, self._send, self._is_read, self._closes = receive, send, not has_body, False

    async def receive(self) -> Message:
        """Receive a part of the body."""
        message = await self._receive()
        self._is_read = self._is_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start" and not self._is_read:
            self._closes = True
            message = {**message, "headers": [*message.get("headers", ()), CLOSE_HEADER]}
        elif self._closes and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._discard_rest()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard_rest(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._read_rest(), _DISCARD_SECONDS)

    async def _read_rest(self) -> None:
        while not self._is_read:
            await self.receive()


def format_response(report: ErrorReport) -> bytes:
    """Return the bytes of a response that is sent without the application; close the connection after it."""
    body = json.dumps(report.body("")).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **report.headers,
    }
    lines = [f"HTTP/1.1 {report.status} {HTTPStatus(report.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
