"""The socket that a server listens on. Imports nothing slow: it is opened before FastAPI is imported."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Any

import psutil

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_BACKLOG = 256  # connections that are not yet accepted


def open_socket(host: str, port: int) -> socket.socket:
    """
    Listen on an address; port 0 is any free one.

    Raises
    ------
    UsageError: another process holds the port, or the address is not one of this machine.
    """
    try:
        family, address = _resolve(host, port)
        # With Nagle's algorithm a response takes 40 ms more; asyncio turns it off only where the protocol is named.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise _bad_host(host, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
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


def is_loopback(host: str) -> bool:
    """
    Return True if only programs on this machine can reach an address: 127.0.0.0/8, ::1 and names for them.

    Raises
    ------
    UsageError: the name cannot be resolved.
    """
    try:
        return ipaddress.ip_address(_resolve(host, 0)[1][0]).is_loopback
    except (OSError, UnicodeError) as error:
        raise _bad_host(host, error) from error


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return the family of an address and the tuple that `bind` takes."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address


def _bad_host(host: str, error: Exception) -> UsageError:
    return UsageError(tr("Cannot listen on {host}: {reason}.", host=host, reason=error))


def _find_holder(port: int) -> str:
    """Return the name and number of the process that listens on a port, "" if it is not known."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN
            if is_listening and connection.laddr and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} ({connection.pid})"
    return ""
