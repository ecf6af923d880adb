"""The loop that serves HTTP on a socket."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.server.http_connection import STALL_SECONDS, HttpConnection, format_response
from qwenlocal.server.http_errors import ErrorReport

_FLUSH_SECONDS = 2  # for the last bytes of responses when the server stops
_CLOSE_SECONDS = 0.5  # for a client to confirm the end of a TLS connection when the server stops
_MAX_CONNECTIONS = 1024
_MAX_REFUSALS = 32  # at the same time; further connections are closed without a response
_REFUSAL_SECONDS = 1
_ACCEPT_DELAY = 0.1  # seconds until the next try when no connection can be accepted


@dataclass(frozen=True)
class HttpLimits:
    """
    Limits of `serve_http`.

    `drain_seconds` are for running requests after SIGTERM. A connection is closed if the header of its next request is
    not complete within `idle_seconds`. Clients close unused connections themselves, httpx after 5 seconds, aiohttp
    after 15; the server waits longer, because a request that crosses its close gets no response. A client must read
    something of a response within `stall_seconds`. `max_connections` is half of the file descriptors if it is None.
    """

    drain_seconds: float = 30.0
    idle_seconds: int = 60
    stall_seconds: float = STALL_SECONDS
    max_connections: int | None = None


class _Server(uvicorn.Server):
    """
    Uvicorn's server with a limit of connections.

    Uvicorn sends itself the signal again at the end, which would skip later steps; this class does not.
    """

    def __init__(self, config: uvicorn.Config, end_answers: Callable[[], Awaitable[None]], limits: HttpLimits) -> None:
        super().__init__(config)
        self._end_answers, self._limits = end_answers, limits
        self._max_connections = limits.max_connections or _max_connections()
        self._open: set[socket.socket] = set()
        self._refused: set[socket.socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """
        Accept connections.

        asyncio's servers have no limit of connections, so uvicorn gets no sockets, and this class accepts connections
        itself. A connection counts as long as it has a file descriptor, even before its TLS handshake.
        """
        await super().startup(sockets=[])
        for listener in sockets or []:
            self._start(self._accept(listener))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError:  # the client has left already, or other files use all descriptors
                await asyncio.sleep(_ACCEPT_DELAY)
                continue
            self._open, self._refused = _keep_open(self._open), _keep_open(self._refused)
            if len(self._open) < self._max_connections:
                self._open.add(connection)
                self._start(self._connect(connection))
            elif len(self._refused) < _MAX_REFUSALS:
                self._refused.add(connection)
                self._start(self._refuse(connection))
            else:
                connection.close()
                await asyncio.sleep(0)  # for the other connections, while more of these are waiting

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._create_protocol, connection, ssl=self.config.ssl
            )
        except OSError:  # not TLS, or the client has left
            connection.close()

    def _create_protocol(self) -> HttpConnection:
        return HttpConnection(
            self.config, self.server_state, self.lifespan.state, stall_seconds=self._limits.stall_seconds
        )

    async def _refuse(self, connection: socket.socket) -> None:
        """Respond, and close when the client does: closing while its request is unread would lose the response."""
        try:
            if not self.config.is_ssl:
                message = tr("The server has too many connections.")
                connection.send(format_response(ErrorReport(503, message, "too_many_connections")))
                connection.shutdown(socket.SHUT_WR)
                await asyncio.wait_for(_read_all(connection), _REFUSAL_SECONDS)
        except (OSError, asyncio.TimeoutError):
            pass  # the client has left, or does not read
        finally:
            connection.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at Ctrl-C and SIGTERM; a second one does not wait for running requests."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests, then end their answers, so that their clients get a reason."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        drained = asyncio.ensure_future(super().shutdown(sockets))
        aborting = asyncio.ensure_future(self._abort_closed())
        await asyncio.wait({drained}, timeout=self._limits.drain_seconds)
        await self._end_answers()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_FLUSH_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # the client does not read
        await drained
        aborting.cancel()

    async def _abort_closed(self) -> None:
        """
        Abort the connections that the server has closed.

        asyncio waits up to 30 seconds until the client confirms the end of a TLS connection, but a client that keeps
        the connection for its next request does not read, and so does not confirm.
        """
        while True:
            connections = self.server_state.connections
            closed = [connection for connection in connections if connection.transport.is_closing()]
            await asyncio.sleep(_CLOSE_SECONDS)
            for connection in closed:
                if connection in connections and not connection.transport.get_write_buffer_size():
                    connection.transport.abort()


def _keep_open(connections: set[socket.socket]) -> set[socket.socket]:
    return {connection for connection in connections if connection.fileno() >= 0}


async def _read_all(connection: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(connection, 1 << 16):
        pass


def _max_connections() -> int:
    """Return a number of connections that leaves half of the file descriptors to models and files."""
    if sys.platform == "win32":
        return _MAX_CONNECTIONS
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else min(_MAX_CONNECTIONS, limit // 2)


async def serve_http(
    app: FastAPI,
    listener: socket.socket,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    starting: asyncio.Future[None],
    end_answers: Callable[[], Awaitable[None]],
    limits: HttpLimits = HttpLimits(),
) -> None:
    """
    Serve `app` until Ctrl-C or SIGTERM, then finish the requests that are running.

    An exception of `starting`, which runs at the same time, ends the server; it is cancelled if the server ends before.
    `end_answers` is called when all requests are complete, the time for that has passed or there is a second signal.

    Raises
    ------
    UsageError: the certificate or its key cannot be used.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",  # no line for each malformed request
        access_log=False,
        lifespan="off",  # `app` starts and stops below, where a second signal cannot skip the stop
        server_header=False,
        ws="none",
        timeout_keep_alive=limits.idle_seconds,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            tr("Cannot use the certificate {certificate} with the key {key}.", certificate=certificate, key=key),
            hint=tr("Both must be PEM files, and the key must belong to the certificate and have no password."),
        ) from error
    server = _Server(config, end_answers, limits)

    def stop_after_error(starting: asyncio.Future[None]) -> None:
        server.should_exit |= starting.cancelled() or starting.exception() is not None

    async with app.router.lifespan_context(app):
        starting.add_done_callback(stop_after_error)
        await server.serve(sockets=[listener])
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
