"""The Ollama API, used by Ollama's own client."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import ollama
import pytest
from http_server import Server, serve, wait_until

from qwenlocal.errors import EngineCrashed
from qwenlocal.server.ollama_models import parse_keep_alive

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model, name="speaking", aliases=["Qwen/Qwen1.5-7B-Chat"], keep_alive=0.2) as server:
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


def test_a_last_message_of_the_assistant_is_continued(client: ollama.Client, server: Server) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Par"}]
    assert client.chat("speaking", begun).message.content == "is, fun"
    assert "".join(part.message.content or "" for part in client.chat("speaking", begun, stream=True)) == "is, fun"
    assert client.chat("speaking", [*begun, *HELLO]).message.content == "Paris, fun"
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("speaking", begun[1:])
    assert caught.value.status_code == 400


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
    assert loaded.expires_at and loaded.expires_at.year > 2100
    for name in ("speaking", "Qwen/Qwen1.5-7B-Chat"):
        shown = client.show(name)
        assert shown.capabilities == ["completion", "embedding"]
        assert shown.modelinfo and shown.modelinfo["qwen2.context_length"] == 2048
    with pytest.raises(ollama.ResponseError, match="Installed: speaking"):
        client.show("nope")


def test_the_version_is_one_that_programs_accept(server: Server) -> None:
    version = httpx.get(f"{server.url}/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


def test_texts_have_vectors(client: ollama.Client) -> None:
    response = client.embed("speaking", ["a", "bc"])
    assert len(response.embeddings) == 2 and response.prompt_eval_count == 3
    assert len(client.embed("speaking", "a").embeddings[0]) == len(response.embeddings[0])


def test_the_older_endpoint_returns_the_same_vector(client: ollama.Client, server: Server) -> None:
    assert client.embeddings("speaking", "a").embedding == client.embed("speaking", "a").embeddings[0]
    assert client.embeddings("speaking", "").embedding == []


def test_a_request_says_how_long_the_model_stays_loaded(client: ollama.Client, server: Server) -> None:
    client.chat("speaking", HELLO)
    assert server.host.keep_alive is None
    client.chat("speaking", HELLO, keep_alive="5m")
    assert server.host.keep_alive == 300
    client.generate("speaking", "Hello", keep_alive=-1)
    assert server.host.keep_alive == math.inf
    client.embed("speaking", "a", keep_alive=7)
    assert server.host.keep_alive == 7
    client.embeddings("speaking", "a", keep_alive="1h")
    assert server.host.keep_alive == 3600
    with pytest.raises(ollama.ResponseError, match=r"keep_alive: .*5m") as caught:
        client.chat("speaking", HELLO, keep_alive="soon")
    assert caught.value.status_code == 400


def test_a_request_without_a_prompt_can_unload_the_model(client: ollama.Client, server: Server) -> None:
    assert client.generate("speaking", keep_alive=0).done_reason == "unload"
    assert server.host.keep_alive == 0
    assert client.chat("speaking", [], keep_alive="0s").done_reason == "unload"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("300ms", 0.3), ("0", 0), ("45", 45), (0, 0), (3.5, 3.5)]
    + [(value, math.inf) for value in (-1, -0.5, "-1", "-1m")],
)
def test_times_are_written_as_in_go(text: str | float, seconds: float) -> None:
    assert parse_keep_alive(text) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "5 minutes", "m", "5x", "1h-30m", "nan", True, [5]])
def test_other_times_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="5m"):
        parse_keep_alive(value)


def test_a_longer_context_than_the_served_one_is_logged_once(
    speaking_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(speaking_model) as server:
        for n_ctx in (1024, 2048, 5000, 6000):
            body = {"model": "tiny", "messages": HELLO, "stream": False, "options": {"num_ctx": n_ctx}}
            response = httpx.post(f"{server.url}/api/chat", json=body)
            assert response.json()["message"]["content"] == "Paris, fun"
    (record,) = [record for record in caplog.records if "num_ctx" in record.message]
    assert "5,000 tokens" in record.message and "2,048" in record.message and "-c 5000" in record.message


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
