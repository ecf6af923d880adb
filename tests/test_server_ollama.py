"""Ollama's interface, used by Ollama's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import ollama
import pytest
from http_server import Server, serve, wait_until

from qwenlocal.errors import EngineCrashed

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model, name="speaking", keep_alive=0.2) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[ollama.Client]:
    client = ollama.Client(server.url)
    yield client
    client._client.close()


def test_a_chat_is_answered_with_counts_and_times(client: ollama.Client) -> None:
    response = client.chat("speaking", HELLO)
    assert response.message.content == "Paris, fun"
    assert response.done and response.done_reason == "stop" and response.model == "speaking"
    assert response.eval_count == len("Paris, fun") + 1 and (response.prompt_eval_count or 0) > 10
    assert response.total_duration and response.eval_duration and response.prompt_eval_duration
    assert response.total_duration >= response.eval_duration + response.prompt_eval_duration
    assert response.load_duration is not None


def test_a_chat_is_streamed_unless_told_otherwise(client: ollama.Client, server: Server) -> None:
    parts = list(client.chat("speaking:latest", HELLO, stream=True))
    assert "".join(part.message.content or "" for part in parts) == "Paris, fun"
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    lines = httpx.post(f"{server.url}/api/chat", content=json.dumps({"model": "speaking", "messages": HELLO}))
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert len(lines.text.splitlines()) == len(parts)


def test_the_asynchronous_client_streams(server: Server) -> None:
    async def read() -> str:
        client = ollama.AsyncClient(server.url)
        try:
            parts = await client.chat("speaking", HELLO, stream=True)
            return "".join([part.message.content or "" async for part in parts])
        finally:
            await client._client.aclose()

    assert asyncio.run(read()) == "Paris, fun"


def test_options_reach_the_engine(client: ollama.Client, server: Server) -> None:
    options = {"temperature": 0.5, "seed": 3, "num_predict": 5, "stop": ["x"], "num_ctx": 4096}
    response = client.chat("speaking", HELLO, options=options)
    assert response.message.content == "Paris" and response.done_reason == "length"
    request = server.engine.requests[-1]
    assert request.sampling == {"temperature": 0.5, "seed": 3} and request.stop == ("x",)
    client.generate("speaking", "Hi", options={"num_predict": -1})
    assert server.engine.requests[-1].max_tokens is None


def test_a_prompt_is_answered_or_continued(client: ollama.Client, server: Server) -> None:
    assert client.generate("speaking", "Hello", system="Be brief.").response == "Paris, fun"
    assert server.engine.requests[-1].prompt.messages == [{"role": "system", "content": "Be brief."}, *HELLO]  # type: ignore[union-attr]
    client.generate("speaking", "Once upon", raw=True, options={"num_predict": 1})
    assert server.engine.requests[-1].prompt.text == "Once upon"  # type: ignore[union-attr]
    assert "".join(part.response or "" for part in client.generate("speaking", "Hello", stream=True)) == "Paris, fun"


def test_a_request_without_a_prompt_only_loads_the_model(client: ollama.Client, server: Server) -> None:
    before = len(server.engine.requests)
    assert client.generate("speaking").done_reason == "load"
    assert client.chat("speaking", []).done_reason == "load"
    assert len(server.engine.requests) == before


def test_an_answer_follows_a_schema(random_model: Path) -> None:
    schema = {"type": "object", "properties": {"is_large": {"type": "boolean"}}, "required": ["is_large"]}
    with serve(random_model) as server:
        client = ollama.Client(server.url)
        answer = client.chat("tiny", HELLO, format=schema, options={"num_predict": 100})
        assert json.loads(answer.message.content or "").keys() == {"is_large"}
        client.generate("tiny", "Hello", format="json", options={"num_predict": 2})
        assert "grammar" in server.engine.requests[-1].sampling
        client._client.close()


def test_tokens_have_probabilities(client: ollama.Client) -> None:
    response = client.chat("speaking", HELLO, logprobs=True, top_logprobs=2)
    assert response.logprobs and "".join(token.token for token in response.logprobs) == "Paris, fun"
    assert all(len(token.top_logprobs or ()) == 2 for token in response.logprobs)


def test_models_are_described(client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == "speaking" and model.size and model.details
    assert model.details.quantization_level == "f32"
    (loaded,) = client.ps().models
    assert loaded.model == "speaking" and loaded.context_length == 2048
    assert client.show("speaking").capabilities == ["completion", "embedding"]
    with pytest.raises(ollama.ResponseError, match="Installed: speaking"):
        client.show("nope")


def test_the_version_is_one_that_programs_accept(server: Server) -> None:
    version = httpx.get(f"{server.url}/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


def test_texts_have_vectors(client: ollama.Client) -> None:
    response = client.embed("speaking", ["a", "bc"])
    assert len(response.embeddings) == 2 and response.prompt_eval_count == 3
    assert len(client.embed("speaking", "a").embeddings[0]) == len(response.embeddings[0])


def test_errors_have_the_shape_of_ollama(client: ollama.Client, server: Server) -> None:
    with pytest.raises(ollama.ResponseError, match="speaking") as caught:
        client.chat("nope", HELLO)
    assert caught.value.status_code == 404
    for field in ("tools", "images"):
        body = {"model": "speaking", "messages": HELLO, field: [{}]}
        response = httpx.post(f"{server.url}/api/chat", json=body)
        assert response.status_code == 400 and field in response.json()["error"]
    image = {"role": "user", "content": "What is this?", "images": ["aGk="]}
    assert httpx.post(f"{server.url}/api/chat", json={"model": "speaking", "messages": [image]}).status_code == 400


def test_an_error_during_a_stream_is_its_last_line(client: ollama.Client, server: Server) -> None:
    server.engine.delay, server.engine.failure = 0.4, EngineCrashed("device lost")
    try:
        with pytest.raises(ollama.ResponseError, match="device lost"):
            list(client.chat("speaking", HELLO, stream=True))
    finally:
        server.engine.delay, server.engine.failure = 0.0, None
    wait_until(lambda: server.engine.running == 0)
