"""Requests for many answers or with long replies, which must not stop the server for others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import httpx
import pytest
from http_server import Server, serve

from qwenlocal.server.streaming import respond_with_list

LONG = "hé" * 5_000


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model) as server:
        yield server


def post(server: Server, path: str, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=fields, timeout=60)


@pytest.mark.parametrize(("prompts", "n"), [(2048, 2), (33, 64)])
def test_a_request_for_too_many_answers_is_refused(server: Server, prompts: int, n: int) -> None:
    response = post(server, "/v1/completions", prompt=["a"] * prompts, n=n, max_tokens=1)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "n" and f"{prompts * n:,}; the limit is 2,048" in error["message"]


def test_prompts_of_one_request_have_several_answers_each(server: Server) -> None:
    choices = post(server, "/v1/completions", prompt=["a", "b"], n=3, max_tokens=1).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))


def test_a_long_text_becomes_tokens_and_text_again(server: Server) -> None:
    ids = post(server, "/tokenize", content=LONG).json()["tokens"]
    tokens = post(server, "/tokenize", content=LONG, with_pieces=True).json()["tokens"]
    assert [token["id"] for token in tokens] == ids and len(ids) == len(LONG.encode())
    assert [token["piece"] for token in tokens] == ["h", [0xC3], [0xA9]] * 5_000
    assert post(server, "/detokenize", tokens=ids).json()["content"] == LONG
    assert post(server, "/tokenize", content="").json() == {"tokens": []}


def test_other_requests_continue_while_a_long_list_is_encoded() -> None:
    turns = 0

    async def slices() -> AsyncGenerator[list[int], None]:
        for number in range(20):
            yield [number, number]

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def test() -> bytes:
        other = asyncio.create_task(count_turns())
        try:
            return bytes((await respond_with_list("numbers", slices(), {"object": "list"})).body)
        finally:
            other.cancel()

    numbers = [number for number in range(20) for _ in range(2)]
    assert json.loads(asyncio.run(test())) == {"object": "list", "numbers": numbers}
    assert turns >= 19
