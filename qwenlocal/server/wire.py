"""
Messages between a server and the process that runs a model.

Both ends are this program: each message is a pickle, preceded by its length.
"""

from __future__ import annotations

import asyncio
import importlib
import pickle
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenlocal.engine.load_plan import LoadNote, LoadPlan
from qwenlocal.errors import EngineCrashed, QwenlocalError
from qwenlocal.server.engine import EngineEvent, GenerationRequest, ModelInfo


@dataclass(frozen=True)
class Submit:
    """Answer a request; `key` identifies it in all messages."""

    key: int
    request: GenerationRequest


@dataclass(frozen=True)
class Cancel:
    """Cancel a request that nobody waits for."""

    key: int


@dataclass(frozen=True)
class Call:
    """Call a method of `ModelFunctions` and reply with a `Returned`."""

    key: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Quit:
    """Save what is worth saving and end the process."""


@dataclass(frozen=True)
class Failed:
    """The model cannot be loaded, or llama.cpp is about to end the process."""

    error: WireError


@dataclass(frozen=True)
class Loading:
    """The model is loading; `fraction` is from 0 to 1."""

    fraction: float


@dataclass(frozen=True)
class Ready:
    """The model is loaded, according to `plan`."""

    info: ModelInfo
    plan: LoadPlan
    notes: tuple[LoadNote, ...]


@dataclass(frozen=True)
class Emitted:
    """Events of requests, in order; the last one of each is `Done` or an error."""

    items: Sequence[tuple[int, EngineEvent | WireError]]


@dataclass(frozen=True)
class Returned:
    """The result of a `Call`, or its error."""

    key: int
    value: Any


@dataclass(frozen=True)
class WireError:
    """
    An exception in transit: its class, arguments and fields.

    Pickle would call the class with the message as its only argument, but each class has parameters of its own.
    """

    module: str
    name: str
    arguments: tuple[Any, ...]
    fields: Mapping[str, Any]

    @classmethod
    def pack(cls, error: BaseException) -> WireError:
        """Pack an error; if it is not a `QwenlocalError` but a bug, print its traceback and pack an `EngineCrashed`."""
        if not isinstance(error, QwenlocalError):
            traceback.print_exception(error)
            error = EngineCrashed.from_bug(error)
        return cls(type(error).__module__, type(error).__qualname__, error.args, dict(vars(error)))

    def unpack(self) -> QwenlocalError:
        """Create the error again, without calling its constructor."""
        kind = getattr(importlib.import_module(self.module), self.name)
        error: QwenlocalError = kind.__new__(kind)
        error.args = self.arguments
        vars(error).update(self.fields)
        return error


_LENGTH = struct.Struct("<Q")


def encode_message(message: object) -> bytes:
    """Return the bytes to send."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class WorkerConnection:
    """The worker's end: blocks. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._file, self._sending = connection, connection.makefile("rb"), threading.Lock()

    def send(self, message: object) -> None:
        """
        Send a message.

        Raises
        ------
        OSError: the server has ended.
        """
        data = encode_message(message)
        with self._sending:
            self._socket.sendall(data)

    def receive(self) -> object:
        """
        Wait for a message.

        Raises
        ------
        EOFError, OSError: the server has ended.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def _read(self, size: int) -> bytes:
        if len(data := self._file.read(size)) < size:
            raise EOFError
        return data


class MessageProtocol(asyncio.Protocol):
    """The server's end: calls `handle` with each message, and `end` once the worker has closed its end."""

    def __init__(self, handle: Callable[[object], None], end: Callable[[], None]) -> None:
        self._handle, self._end, self._buffer = handle, end, bytearray()
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Receive from now on."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Handle the messages that are complete."""
        self._buffer += data
        start = 0
        while (body := start + _LENGTH.size) <= len(self._buffer):
            stop = body + _LENGTH.unpack_from(self._buffer, start)[0]
            if stop > len(self._buffer):
                break
            with memoryview(self._buffer) as view:
                self._handle(self._decode(view[body:stop]))
            start = stop
        del self._buffer[:start]

    def _decode(self, data: memoryview) -> object:
        try:
            return pickle.loads(data)
        except Exception as error:
            if self._transport:
                self._transport.close()  # the worker ends, too
            return Failed(WireError.pack(error))
        finally:
            data.release()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end."""
        self._end()
