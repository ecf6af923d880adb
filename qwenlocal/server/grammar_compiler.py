"""
Grammars of requests, compiled in a process of their own.

The time does not depend on the size: llguidance needs half a minute for `{"allOf": […]}` of 900 characters with 22
patterns, and nothing stops it. A process can be ended.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from qwenlocal.engine.gbnf import grammar_from_gbnf
from qwenlocal.engine.grammar import require_valid_grammar
from qwenlocal.engine.json_schema import ANY_OBJECT, grammar_from_schema
from qwenlocal.errors import EngineCrashed, UsageError
from qwenlocal.i18n import tr
from qwenlocal.server.http_errors import BadField
from qwenlocal.server.wire import WireError

_MAX_CHARACTERS = 100_000  # of a schema or grammar; ordinary ones of this size take 0.1 s


class GrammarCompiler:
    """Compiles schemas and grammars, one after the other, each for `limit` seconds at most."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")  # asyncio's are shared
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    async def compile_schema(self, schema: Mapping[str, Any] | None, param: str) -> str:
        """
        Return the grammar of a JSON schema (None: of any object), the value of the field `param`.

        Raises
        ------
        BadField: the schema is not supported, or too large.
        """
        text = ANY_OBJECT if schema is None else json.dumps(schema)
        return await self._compile(grammar_from_schema, text, param, "invalid_schema")

    async def compile_gbnf(self, text: str) -> str:
        """
        Return the grammar of a text in GBNF, the value of the field `grammar`.

        Raises
        ------
        BadField: the text is not valid, or too large.
        """
        return await self._compile(grammar_from_gbnf, text, "grammar", "invalid_grammar")

    async def check(self, grammar: str, param: str) -> None:
        """
        Check a grammar in llguidance's format.

        Raises
        ------
        BadField: it is not valid, or too large.
        """
        await self._compile(require_valid_grammar, grammar, param, "invalid_grammar")

    async def _compile(self, function: Callable[[str], str], text: str, param: str, code: str) -> str:
        if len(text) > _MAX_CHARACTERS:
            message = tr(
                "“{field}” has {count:,} characters; the limit is {limit:,}.",
                field=param,
                count=len(text),
                limit=_MAX_CHARACTERS,
            )
            raise BadField(param, message, code=code)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, function, text)
        except TimeoutError:
            message = tr("“{field}” takes more than {seconds:g} s to compile.", field=param, seconds=self._limit)
            hint = tr("Use fewer patterns, number ranges, “multipleOf” and combined schemas.")
            raise BadField(param, message, code=code, hint=hint) from None
        except UsageError as error:
            raise BadField(param, str(error), code=code, hint=error.hint) from error

    def _call(self, function: Callable[[str], str], text: str) -> str:
        """Call a function in the process; runs in a thread."""
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._process and self._connection
        try:
            self._connection.send((function, text))
            is_done = self._connection.poll(self._limit)
            reply = self._connection.recv() if is_done else None
        except (EOFError, OSError) as error:  # out of memory, for instance
            raise EngineCrashed("", message=tr("The process that compiles grammars has ended.")) from error
        if reply is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError
        if isinstance(reply, WireError):
            raise reply.unpack()
        return str(reply)

    def _start(self) -> None:
        processes = multiprocessing.get_context("spawn")
        self._connection, theirs = processes.Pipe()
        self._process = processes.Process(target=_run, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # it has started; the limit does not include that


def _run(connection: Connection) -> None:
    """Call functions until the server ends. Ctrl-C is the server's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_server, daemon=True).start()
    with suppress(EOFError, OSError):
        connection.send(None)
        while True:
            function, text = connection.recv()
            try:
                reply = function(text)
            except Exception as error:
                reply = WireError.pack(error)
            connection.send(reply)


def _exit_with_server() -> None:
    """End the process if the server is killed during a compilation; nothing else would stop it."""
    if server := multiprocessing.parent_process():
        server.join()
    os._exit(1)
