"""The loop that serves HTTP: its end, what is not HTTP, too many connections, and those on which nothing happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from scripted_engine import ScriptedEngine, ScriptedHost
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qwenlocal.server.app import create_app
from qwenlocal.server.http_server import HttpLimits, serve_http
from qwenlocal.server.listener import open_socket
from qwenlocal.server.server_settings import ServerSettings

DEADLINE = 30.0


async def nothing() -> None:
    pass


def run_with_server(
    app: FastAPI,
    test: Callable[[int], Awaitable[None]],
    *,
    end_answers: Callable[[], Awaitable[None]] = nothing,
    certificate: Path | None = None,
    **limits: Any,
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
            certificate=certificate,
            key=certificate,
            starting=asyncio.ensure_future(nothing()),
            end_answers=end_answers,
            limits=HttpLimits(**{"drain_seconds": DEADLINE, "idle_seconds": 30, **limits}),
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


# --- the application


@pytest.mark.parametrize("n_signals", [1, 2])
def test_the_application_ends_with_the_server(n_signals: int) -> None:
    states: list[str] = []

    @contextlib.asynccontextmanager
    async def note_states(_app: FastAPI) -> AsyncIterator[None]:
        states.append("begun")
        yield
        states.append("ended")

    async def test(port: int) -> None:
        await ask(port)
        assert states == ["begun"]
        for _ in range(n_signals - 1):
            os.kill(os.getpid(), signal.SIGTERM)  # and `run_with_server` sends the last one

    run_with_server(FastAPI(lifespan=note_states), test)
    assert states == ["begun", "ended"]


def test_an_unexpected_error_is_logged_once_with_the_id_that_the_client_gets(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(ScriptedHost(ScriptedEngine("scripted")), ServerSettings())

    @app.get("/bug")
    async def fail() -> None:
        raise RuntimeError("a bug")

    async def test(port: int) -> None:
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            response = await client.get(f"http://127.0.0.1:{port}/bug")
            metrics = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        assert response.status_code == 500
        (record,) = caplog.records
        id = record.getMessage().split()[1]
        assert id in response.json()["error"]["message"] and response.json()["error"]["code"] == "internal_error"
        assert record.exc_info and "a bug" in str(record.exc_info[1])
        assert 'status="500"} 1.0' in metrics

    run_with_server(app, test)
    assert len(caplog.records) == 1


def test_an_unexpected_error_in_a_response_that_has_begun_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(ScriptedHost(ScriptedEngine("scripted")), ServerSettings())

    @app.get("/bug")
    async def fail() -> StreamingResponse:
        async def texts() -> AsyncIterator[bytes]:
            yield b"begun"
            raise RuntimeError("a bug")

        return StreamingResponse(texts())

    async def test(port: int) -> None:
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(f"http://127.0.0.1:{port}/bug")

    run_with_server(app, test)
    assert len(caplog.records) == 1


# --- what is not HTTP

POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
SMUGGLED = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def reading_app() -> FastAPI:
    """Create an application that reads the body of each request."""
    app = FastAPI()

    @app.post("/")
    async def read(request: Request) -> int:
        return len(await request.body())

    @app.exception_handler(ClientDisconnect)
    async def respond_to_nobody(_request: Request, _error: Exception) -> Response:
        return Response()

    return app


async def exchange(port: int, *parts: bytes) -> bytes:
    """Send bytes, and return all that comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    received = await reader.read()
    writer.close()
    return received


MALFORMED = (
    (400, CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED),
    (400, POST + b"Content-Length: 60\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
    (400, POST + b"Content-Length: 0\r\nContent-Length: 36\r\n\r\n" + SMUGGLED),
    (400, POST + b"Content-Length: +4\r\n\r\nabcd"),
    (400, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
    (400, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
    (400, POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
    (400, CHUNKED + b"\r\n-1\r\n" + SMUGGLED),
    (400, CHUNKED + b"\r\n0x4\r\nabcd\r\n0\r\n\r\n"),
    (400, CHUNKED + b"\r\n2\r\nabcd\r\n0\r\n\r\n"),
    (400, CHUNKED + b"\r\n" + b"f" * 40 + b"\r\n"),
    (400, POST + b"X: a\0b\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\n X: folded\r\nHost: localhost\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\0\x01\0\x01"),
    (431, POST + b"X: " + b"x" * 20_000),
    (431, POST + b"X: " + b"x" * 20_000 + b"\r\n\r\n"),
    (431, b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
)


def test_malformed_http_is_refused_at_once(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    async def test(port: int) -> None:
        for status, request in MALFORMED:
            head, _, body = (await exchange(port, request)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status), request
            assert b"\r\nConnection: close" in head
            error = json.loads(body)["error"]
            assert error["type"] == "invalid_request_error" and error["message"] and error["code"]

    run_with_server(reading_app(), test)
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_a_chunk_that_is_damaged_during_the_response_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    @app.post("/")
    async def respond_early() -> StreamingResponse:
        async def wait() -> AsyncIterator[bytes]:
            yield b"begun"
            await asyncio.Event().wait()

        return StreamingResponse(wait())

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHUNKED + b"\r\n")
        await reader.readuntil(b"begun")
        writer.write(b"no number\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()

    run_with_server(app, test)
    assert not caplog.records


def streaming_app(texts: Callable[[], AsyncIterator[bytes]], ended: asyncio.Event) -> FastAPI:
    """Create an application that streams texts, and then sets `ended`."""
    app = FastAPI()

    class Stream(StreamingResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                ended.set()

    @app.get("/")
    async def stream() -> Stream:
        return Stream(texts(), headers={"Connection": "close"})

    return app


def test_clients_that_vanish_print_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ended = asyncio.Event()

    async def count() -> AsyncIterator[bytes]:
        while True:
            for _ in range(50):
                yield b"x"
            await asyncio.sleep(0)

    async def test(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(SMUGGLED)
            assert await asyncio.to_thread(client.recv, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
        await ended.wait()

    run_with_server(streaming_app(count, ended), test)
    assert not caplog.records


# --- bodies that nobody reads


def refusing_app() -> FastAPI:
    """Create an application that refuses each request unread."""
    app = FastAPI()

    @app.api_route("/", methods=["GET", "POST"])
    async def refuse() -> PlainTextResponse:
        return PlainTextResponse("refused", 401)

    return app


@pytest.fixture
def certificate(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """A certificate and its key in one file; None for HTTP."""
    if request.param == "http":
        return None
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    path = tmp_path / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", path, "-out", tmp_path / "server.crt"], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (tmp_path / "server.crt").read_bytes())
    return path


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("certificate", ["http", "https"], indirect=True)
def test_a_client_that_is_still_sending_gets_the_response(framing: str, certificate: Path | None) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(80):
            yield b"x" * 100_000

    async def test(port: int) -> None:
        async with httpx.AsyncClient(timeout=DEADLINE, verify=False) as client:
            content = b"x" * 8_000_000 if framing == "length" else chunks()
            response = await client.post(f"{'https' if certificate else 'http'}://127.0.0.1:{port}/", content=content)
        assert (response.status_code, response.text) == (401, "refused")
        assert response.headers["connection"] == "close"

    run_with_server(refusing_app(), test, certificate=certificate)  # which waits until the connection is closed


def test_a_body_that_never_ends_does_not_keep_a_refused_connection_open() -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHUNKED + b"\r\n")
        closed = asyncio.create_task(reader.read())
        while not closed.done():
            writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.05)
        writer.close()

    run_with_server(refusing_app(), test)


def test_a_refused_request_without_a_body_keeps_its_connection() -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for head in (SMUGGLED, POST + b"Content-Length: 0\r\n\r\n"):
            writer.write(head)
            assert await reader.readuntil(b"refused")
        writer.close()

    run_with_server(refusing_app(), test)


@pytest.mark.parametrize("certificate", ["https"], indirect=True)
@pytest.mark.parametrize("is_answered", [True, False], ids=["idle", "waiting"])
def test_clients_that_keep_their_tls_connections_do_not_keep_the_server_from_stopping(
    certificate: Path | None, is_answered: bool
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    clients: list[ssl.SSLSocket] = []

    def connect_and_ask(port: int) -> None:
        clients.append(context.wrap_socket(socket.create_connection(("127.0.0.1", port), DEADLINE)))
        clients[0].sendall(SMUGGLED)

    async def test(port: int) -> None:
        await asyncio.to_thread(connect_and_ask, port)
        await begun.wait()
        if is_answered:
            ended.set()
            assert await asyncio.to_thread(clients[0].recv, 12) == b"HTTP/1.1 503"
        else:
            asyncio.get_running_loop().call_later(0.3, ended.set)  # after SIGTERM

    run_with_server(endless_app(begun, ended), test, certificate=certificate)
    received = b""
    while part := clients[0].recv(65536):
        received += part
    clients[0].close()
    assert received.endswith(b"the server stops")


# --- too many connections, and clients that do not read


def test_a_connection_too_many_is_refused_until_another_one_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def test(port: int) -> None:
        (_, idle), (reader, writer) = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        url = f"http://127.0.0.1:{port}/"
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            refused = await client.post(url, content=b"x")
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "too_many_connections"
            writer.write(POST + b"Content-Length: 3\r\n\r\nabc")
            assert await reader.readuntil(b"\r\n3")
            idle.close()
            while (await client.post(url, content=b"x")).status_code == 503:
                pass
        writer.close()

    run_with_server(reading_app(), test, max_connections=2)
    assert not caplog.records


@pytest.mark.parametrize("length", ["endless", "complete"])
def test_a_client_that_does_not_read_loses_its_answer(length: str, caplog: pytest.LogCaptureFixture) -> None:
    ended, size = asyncio.Event(), 20_000_000  # bytes, more than the system buffers
    clients: list[socket.socket] = []

    async def texts() -> AsyncIterator[bytes]:
        yield b"x" * size
        while length == "endless":
            yield b"x" * 1000

    async def test(port: int) -> None:
        clients.append(await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port)))
        clients[0].sendall(SMUGGLED)
        await ended.wait()

    run_with_server(
        streaming_app(texts, ended), test, stall_seconds=0.1
    )  # the server ends in time only if it does not wait for the client
    with clients[0] as client:
        assert sum(iter(lambda: len(client.recv(1 << 20)), 0)) < size
    assert not caplog.records


def test_a_client_that_reads_slowly_gets_all() -> None:
    app, size = FastAPI(), 20_000_000

    @app.get("/")
    async def send() -> PlainTextResponse:
        return PlainTextResponse("x" * size, headers={"Connection": "close"})

    async def test(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(SMUGGLED)
            n_received = 0
            while part := await asyncio.to_thread(client.recv, 1 << 20):
                n_received += len(part)
                await asyncio.sleep(0.1 if n_received < size // 2 else 0)
        assert n_received > size

    run_with_server(app, test, stall_seconds=0.5)
