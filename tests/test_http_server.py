"""The loop that serves HTTP: its end, and connections on which nothing happens."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse

from qwenlocal.server.http_server import open_socket, serve_http

DEADLINE = 30.0


async def nothing() -> None:
    pass


def run_with_server(
    app: FastAPI,
    test: Callable[[int], Awaitable[None]],
    *,
    end_answers: Callable[[], Awaitable[None]] = nothing,
    drain_seconds: float = DEADLINE,
    idle_seconds: int = 30,
) -> None:
    """Run `test` with the port of a server, which then gets SIGTERM; both must end."""

    async def test_and_stop(port: int) -> None:
        try:
            await test(port)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    async def run() -> None:
        listener = open_socket("127.0.0.1", 0)
        server = serve_http(
            app,
            listener,
            on_start=nothing,
            end_answers=end_answers,
            drain_seconds=drain_seconds,
            idle_seconds=idle_seconds,
        )
        await asyncio.gather(test_and_stop(listener.getsockname()[1]), server)

    asyncio.run(asyncio.wait_for(run(), DEADLINE))


def endless_app(begun: asyncio.Event, ended: asyncio.Event) -> FastAPI:
    """Create an application whose requests last until `ended` is set."""
    app = FastAPI()

    @app.get("/")
    async def wait() -> PlainTextResponse:
        begun.set()
        await ended.wait()
        return PlainTextResponse("the server stops", 503)

    return app


async def ask(port: int) -> httpx.Response:
    async with httpx.AsyncClient(timeout=DEADLINE) as client:
        return await client.get(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(("n_signals", "drain_seconds"), [(1, 0.1), (2, DEADLINE)], ids=["late", "second signal"])
def test_requests_that_the_server_does_not_wait_for_get_a_reason(n_signals: int, drain_seconds: float) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()
    responses: list[asyncio.Task[httpx.Response]] = []

    async def test(port: int) -> None:
        responses.append(asyncio.create_task(ask(port)))
        await begun.wait()
        for _ in range(n_signals - 1):
            os.kill(os.getpid(), signal.SIGTERM)  # and `run_with_server` sends the last one

    async def end_answers() -> None:
        ended.set()
        response = await responses[0]
        assert (response.status_code, response.text) == (503, "the server stops")

    run_with_server(endless_app(begun, ended), test, end_answers=end_answers, drain_seconds=drain_seconds)
    assert ended.is_set()


def test_a_client_that_does_not_read_does_not_keep_the_server_from_stopping(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    @app.get("/")
    async def send() -> PlainTextResponse:
        return PlainTextResponse("x" * 50_000_000)

    clients: list[socket.socket] = []

    async def test(port: int) -> None:
        clients.append(await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port)))
        clients[0].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await asyncio.to_thread(clients[0].recv, 1)

    run_with_server(app, test, drain_seconds=0.1)
    clients[0].close()
    assert not caplog.records


def test_a_header_that_does_not_arrive_in_time_closes_the_connection() -> None:
    app = FastAPI()

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        closed = asyncio.create_task(reader.read())
        while not closed.done():  # each byte arrives within the time, but not all of them
            writer.write(b"X")
            await asyncio.sleep(0.1)
        writer.close()

    run_with_server(app, test, idle_seconds=1)


def test_a_connection_is_used_for_a_second_request_and_for_long_responses() -> None:
    app = FastAPI()

    @app.get("/")
    async def wait() -> str:
        await asyncio.sleep(1.2)  # longer than a connection may be idle
        return "done"

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert await reader.readuntil(b'"done"')
        writer.close()

    run_with_server(app, test, idle_seconds=1)
