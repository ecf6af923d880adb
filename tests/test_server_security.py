"""Requests that a server must refuse: from other web sites, without a key, too large, too slow."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from http_server import Server, serve

from qwenlocal.cli.commands.serve import parse_origin

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model, max_body=MEGABYTE, body_timeout=0.5, allowed_hosts=("box.lan",)) as server:
        yield server


@pytest.fixture(scope="module")
def locked(speaking_model: Path) -> Iterator[Server]:
    """A server with two keys, whose pages on one site may be used."""
    with serve(speaking_model, api_keys=("first-key", "zweiter"), cors_origins=("https://app.example",)) as server:
        yield server


def send(server: Server, data: bytes) -> bytes:
    """Send bytes as they are, and return all that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


# --- names


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST.", "box.lan:80"])
def test_names_of_this_machine_are_allowed(server: Server, host: str) -> None:
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "localhost:80@evil", "192.168.0.7", "[", ""]
)
def test_other_names_are_refused(server: Server, host: str) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
    assert response.status_code in (400, 403)
    assert "tiny" not in response.text


def test_two_host_headers_are_refused(server: Server) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert send(server, head).split(b" ", 2)[1] in (b"400", b"403")


def test_a_server_on_all_addresses_is_reached_by_any_address_but_by_no_other_name(speaking_model: Path) -> None:
    with serve(speaking_model, host="0.0.0.0") as server:
        for host, status in {"192.168.0.7:8000": 200, "[fe80::1]": 200, "evil.example": 403}.items():
            assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == status


# --- pages on other sites


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_on_other_sites_are_refused(server: Server, headers: dict[str, str]) -> None:
    before = len(server.engine.requests)
    response = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    assert len(server.engine.requests) == before


def test_a_form_on_another_site_cannot_send_a_chat(server: Server) -> None:
    headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=headers).status_code == 403


def test_its_own_page_and_links_to_it_are_allowed(server: Server) -> None:
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=own).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert httpx.get(f"{server.url}/v1/models", headers=link).status_code == 200
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=link).status_code == 403


def test_only_sites_that_are_configured_may_ask(locked: Server) -> None:
    url = f"{locked.url}/v1/chat/completions"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = httpx.options(url, headers={"Origin": "https://app.example", **preflight})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in allowed.headers
    headers = {"Origin": "https://app.example", "Authorization": "Bearer first-key", "Sec-Fetch-Site": "cross-site"}
    answer = httpx.post(url, json=CHAT, headers=headers)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    assert httpx.options(url, headers={"Origin": "https://evil.example", **preflight}).status_code == 403


def test_an_origin_may_be_given_as_it_is_copied_from_a_browser(speaking_model: Path) -> None:
    with serve(speaking_model, cors_origins=(parse_origin("HTTP://LocalHost:3000/"),)) as server:
        response = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://localhost:3000"})
        assert response.headers["access-control-allow-origin"] == "http://localhost:3000"


# --- keys


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer first-key"}, {"authorization": "bearer zweiter"}, {"x-api-key": "zweiter"}],
)
def test_each_key_opens_the_server(locked: Server, headers: dict[str, str]) -> None:
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer first-ke"},
        {"Authorization": "Bearer first-key2"},
        {"Authorization": "Basic first-key"},
        {"x-api-key": ""},
        {"x-api-key": "first-key, zweiter"},
    ],
)
def test_everything_else_does_not(locked: Server, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/v1/nothing", "/health/../v1/models", "/metrics", "/docs/../metrics", "/tokenize"):
        response = httpx.get(f"{locked.url}{path}", headers=headers)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_health_needs_no_key(locked: Server) -> None:
    assert httpx.get(f"{locked.url}/health").json() == {"status": "ok"}


def test_a_browser_opens_the_description_of_the_interface_without_a_key(locked: Server) -> None:
    for path in ("/docs", "/docs/docs.js", "/docs/docs.css", "/openapi.json"):
        response = httpx.get(f"{locked.url}{path}")
        assert response.status_code == 200
        assert "tiny" not in response.text, "the models are nobody's business"
    link = {"Origin": "https://evil.example"}
    assert httpx.get(f"{locked.url}/openapi.json", headers=link).status_code == 403


# --- sizes


def test_a_body_that_announces_too_much_is_refused_unread(server: Server) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n"
    assert b" 413 " in send(server, head)


def test_a_body_that_turns_out_too_large_is_refused(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (MEGABYTE // 32)

    response = httpx.post(f"{server.url}/v1/chat/completions", content=chunks())
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_a_body_within_the_limit_is_read(server: Server) -> None:
    text = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "user": "x" * (MEGABYTE - 100)})
    assert text.status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(server: Server) -> None:
    started = time.monotonic()
    data = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
    assert b" 408 " in send(server, data)
    assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Authorization": "Bearer wrong"},
        {"Content-Length": "100000000", "Authorization": "Bearer first-key"},
    ],
    ids=["host", "origin", "key", "size"],
)
def test_the_body_of_a_refused_request_is_not_taken_for_a_request(locked: Server, headers: dict[str, str]) -> None:
    smuggled = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    headers = {"Host": "localhost", "Content-Length": str(len(smuggled)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    received = send(locked, f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n{smuggled}".encode())
    assert received.count(b"HTTP/1.1") == 1
    assert received.split(b" ")[1] in (b"401", b"403", b"413")
    assert b"\r\nconnection: close\r\n" in received.lower()
