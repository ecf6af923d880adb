"""The socket that a server listens on, and the loop that serves it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType

import h11
import psutil
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_DRAIN_SECONDS = 30  # for running requests after SIGTERM
_FLUSH_SECONDS = 2  # for the last bytes of responses after that
# Clients close unused connections after a while, httpx after 5 seconds, aiohttp after 15. They should be first: a
# request that is on its way when the server does it gets no response.
_IDLE_SECONDS = 60
_BACKLOG = 256  # connections that are not yet accepted


def open_socket(host: str, port: int) -> socket.socket:
    """
    Listen on an address; port 0 is any free one.

    Raises
    ------
    UsageError: another process holds the port, or the address is not one of this machine.
    """
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With Nagle's algorithm a response takes 40 ms more; asyncio turns it off only where the protocol is named.
        listener = socket.socket(address[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise UsageError(tr("Cannot listen on {host}: {reason}.", host=host, reason=error)) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if holder := _find_holder(port):
            raise UsageError(
                tr("Port {port} is in use by {process}.", port=port, process=holder),
                hint=tr("Choose another port: --port {port}", port=port + 1),
            ) from error
        reason = error.strerror or str(error)
        raise UsageError(
            tr("Cannot listen on {host}, port {port}: {reason}.", host=host, port=port, reason=reason),
            hint=tr("Choose another address or port: --host, --port"),
        ) from error
    return listener


def _find_holder(port: int) -> str:
    """Return the name and number of the process that listens on a port, "" if it is not known."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN
            if is_listening and connection.laddr and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} ({connection.pid})"
    return ""


class _Connection(H11Protocol):
    """Uvicorn's connection; closed if a client is slow to send the header of its next request."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to wait for a request."""
        super().connection_lost(exc)
        self._stop_timer()

    def handle_events(self) -> None:
        """Handle what was received."""
        super().handle_events()
        self._watch_header()

    def _watch_header(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """Uvicorn's server, without the signal that it sends to itself at the end, which would skip what follows."""

    def __init__(
        self, config: uvicorn.Config, end_answers: Callable[[], Awaitable[None]], drain_seconds: float
    ) -> None:
        super().__init__(config)
        self._end_answers, self._drain_seconds = end_answers, drain_seconds

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
        drained = asyncio.ensure_future(super().shutdown(sockets))
        await asyncio.wait({drained}, timeout=self._drain_seconds)
        await self._end_answers()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_FLUSH_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # the client does not read
        await drained


async def serve_http(
    app: FastAPI,
    listener: socket.socket,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    on_start: Callable[[], Awaitable[None]],
    end_answers: Callable[[], Awaitable[None]],
    drain_seconds: float = _DRAIN_SECONDS,
    idle_seconds: int = _IDLE_SECONDS,
) -> None:
    """
    Serve `app` until Ctrl-C or SIGTERM, then finish the requests that are running.

    `on_start` runs at the same time; an exception that it raises ends the server. `end_answers` is called when all
    requests are complete, `drain_seconds` have passed or there is a second signal. A connection is closed
    `idle_seconds` after its last request, unless the header of the next one is complete.

    Raises
    ------
    UsageError: the certificate or its key cannot be used.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        http=_Connection,
        ws="none",
        timeout_keep_alive=idle_seconds,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            tr("Cannot use the certificate {certificate} with the key {key}.", certificate=certificate, key=key),
            hint=tr("Both must be PEM files, and the key must be the certificate's, without a password."),
        ) from error
    server = _Server(config, end_answers, drain_seconds)

    async def start() -> None:
        try:
            await on_start()
        except BaseException:
            server.should_exit = True
            raise

    starting = asyncio.get_running_loop().create_task(start())
    await server.serve(sockets=[listener])
    if not starting.done():
        starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
