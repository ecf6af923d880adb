"""The socket that a server listens on, and the loop that serves it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import uvicorn
from fastapi import FastAPI

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_DRAIN_SECONDS = 30  # for running requests after SIGTERM
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


class _Server(uvicorn.Server):
    """Uvicorn's server, without the signal that it sends to itself at the end, which would skip what follows."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at Ctrl-C and SIGTERM; a second one does not wait for running requests."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def serve_http(
    app: FastAPI,
    listener: socket.socket,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    on_start: Callable[[], Awaitable[None]],
) -> None:
    """
    Serve `app` until Ctrl-C or SIGTERM, then finish the requests that are running.

    `on_start` runs at the same time; an exception that it raises ends the server.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    server = _Server(config)

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
