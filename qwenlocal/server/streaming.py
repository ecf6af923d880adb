"""
Long responses: they end when the client leaves, and send keep-alives while the model is busy.

Tasks are asyncio's own: cancelling them once lets their `finally` blocks wait, as closing an iterator needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwenlocal.server.http_errors import report_error

_T = TypeVar("_T")

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
END_OF_STREAM = b"data: [DONE]\n\n"  # of OpenAI's streams
_COMMENT = b": waiting for the model\n\n"  # a line that clients of server-sent events ignore


def format_event(data: Any, name: str = "") -> bytes:
    """Return a server-sent event with JSON in it."""
    line = f"event: {name}\n" if name else ""
    return b"%sdata: %s\n\n" % (line.encode(), _encode(data))


async def respond_with_list(
    name: str, slices: AsyncIterable[Sequence[Any]], fields: Mapping[str, Any] = MappingProxyType({})
) -> Response:
    """
    Return a response with a long list, the field `name` of an object that also has `fields`.

    The list comes in slices, none of them empty; other requests continue between them.
    """
    parts = []
    async for items in slices:
        parts.append(_encode(items)[1:-1])
        await asyncio.sleep(0)
    start = _encode({**fields, name: []})[:-2]
    return Response(start + b",".join(parts) + b"]}", media_type="application/json")


def _encode(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


async def run_while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """
    Return the result of `work`; cancel it when the client leaves.

    Raises
    ------
    ClientDisconnect: the client has left.
    """
    task = asyncio.ensure_future(work)
    async with _watch_disconnect(request.receive, task):
        await asyncio.wait({task})
    if task.cancelled():
        raise ClientDisconnect
    return task.result()


async def stream_while_connected(
    request: Request,
    chunks: AsyncGenerator[bytes, None],
    *,
    keep_alive: float,
    encode_error: Callable[[Any], bytes] = format_event,
    media_type: str = SSE,
) -> Response:
    """
    Return a response that sends `chunks`.

    The status is sent with the first chunk, or after `keep_alive` seconds, so that an error before it has its own
    status. A later error is sent as a chunk: `encode_error` of the body that it would have as a response. A stream of
    events gets a comment after every `keep_alive` seconds without a chunk.
    """
    first = asyncio.ensure_future(anext(chunks, b""))
    async with _watch_disconnect(request.receive, first):
        await asyncio.wait({first}, timeout=keep_alive)
    if first.cancelled():
        raise ClientDisconnect
    if first.done() and first.exception():
        first.result()

    def describe(error: Exception) -> bytes:
        return encode_error(report_error(error, request).body(request.url.path))

    return ChunkResponse(_prepend(first, chunks), media_type, describe, keep_alive)


async def _prepend(first: asyncio.Future[bytes], rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(rest):
        try:
            yield await first
        finally:
            await _cancel(first)
        async for chunk in rest:
            yield chunk


class ChunkResponse(Response):
    """A response that sends the chunks of an iterator, and closes it when the client leaves."""

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        media_type: str,
        describe: Callable[[Exception], bytes],
        keep_alive: float,
    ) -> None:
        self._chunks, self._describe, self._keep_alive = chunks, describe, keep_alive
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # nginx would buffer chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        task = asyncio.ensure_future(self._send_all(send))
        async with _watch_disconnect(receive, task):
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def _send_all(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()

        async def send_chunk(chunk: bytes) -> None:
            nonlocal last
            last = loop.time()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

        async def send_comments() -> None:
            while True:
                await asyncio.sleep(self._keep_alive + last - loop.time())
                if loop.time() >= last + self._keep_alive:
                    await send_chunk(_COMMENT)

        comments = asyncio.ensure_future(send_comments() if self.media_type == SSE else asyncio.sleep(0))
        try:
            async with contextlib.aclosing(self._chunks):
                async for chunk in self._chunks:
                    await send_chunk(chunk)
        except Exception as error:
            await send_chunk(self._describe(error))
        finally:
            await _cancel(comments)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.asynccontextmanager
async def _watch_disconnect(receive: Receive, task: asyncio.Future[Any]) -> AsyncGenerator[None, None]:
    """Cancel `task` when the client leaves during the block; if the block is cancelled, `task` is, too."""
    watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
    watcher.add_done_callback(lambda watcher: None if watcher.cancelled() else task.cancel())
    try:
        yield
    except asyncio.CancelledError:
        await _cancel(task)
        raise
    finally:
        await _cancel(watcher)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: Awaitable[Any]) -> None:
    """Cancel a task and wait for its end."""
    future = asyncio.ensure_future(task)
    future.cancel()
    await asyncio.wait({future})
