"""
Messages between a server and the process that runs a model.

Both ends are this program: the messages are pickled by `multiprocessing.connection`.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Mapping, Sequence
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
