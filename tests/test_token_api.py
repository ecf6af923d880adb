"""The route /v1/tokens, with which `qwenlocal run` uses a server: requests that are not valid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_server import Server, serve


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model) as server:
        yield server


def post(server: Server, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/tokens", json={"ids": [1], "sampling": {}, "limit": 1, **fields})


def test_a_valid_request_is_answered(server: Server) -> None:
    assert "[DONE]" in post(server).text
    assert "[DONE]" in post(server, sampling={"temperature": 0, "seed": None, "answer_prefix": []}).text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", 1),
        ("__class__", 1),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", 11),
        ("top_p", -0.5),
        ("top_k", 1.5),
        ("seed", 2**64),
        ("grammar", 5),
        ("grammar", ""),
        ("grammar", "nonsense"),
        ("logit_bias", [[1]]),
        ("logit_bias", {"1": 2}),
        ("answer_prefix", ["x"]),
    ],
)
def test_the_field_of_the_sampling_that_is_not_valid_is_named(server: Server, name: str, value: object) -> None:
    response = post(server, sampling={name: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(f"sampling.{name}")


@pytest.mark.parametrize(
    ("name", "value"), [("sampling", None), ("sampling", []), ("limit", 0), ("ids", []), ("ids", ["x"]), ("other", 1)]
)
def test_a_field_that_is_not_valid_is_named(server: Server, name: str, value: object) -> None:
    response = post(server, **{name: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(name)
