"""The Anthropic API, used by Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import pytest
from http_server import Server, serve, wait_until

from qwenlocal.errors import EngineCrashed

HELLO = [{"role": "user", "content": "Hello"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "Par"}]


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model, name="speaking", keep_alive=0.2) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_is_answered(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="speaking", messages=HELLO, max_tokens=100)  # type: ignore[arg-type]
    assert message.content[0].text == "Paris, fun"  # type: ignore[union-attr]
    assert message.stop_reason == "end_turn" and message.role == "assistant"
    again = client.messages.create(model="speaking", messages=HELLO, max_tokens=100)  # type: ignore[arg-type]
    total = client.messages.count_tokens(model="speaking", messages=HELLO).input_tokens  # type: ignore[arg-type]
    assert again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0) == total
    assert again.usage.output_tokens == len("Paris, fun") + 1


def test_a_message_is_streamed(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="speaking", messages=HELLO, max_tokens=5) as stream:  # type: ignore[arg-type]
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].text == "Paris" and final.stop_reason == "max_tokens"  # type: ignore[union-attr]
    assert final.usage.output_tokens == 5 and final.usage.input_tokens >= 1
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert {"content_block_start", "content_block_delta", "content_block_stop", "message_delta"} <= set(kinds)


def test_the_asynchronous_client_streams(server: Server) -> None:
    async def read() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none") as client,
            client.messages.stream(model="speaking", messages=HELLO, max_tokens=50) as stream,  # type: ignore[arg-type]
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(read()) == "Paris, fun"


def test_the_system_prompt_and_parts_reach_the_model(server: Server, client: anthropic.Anthropic) -> None:
    client.messages.create(
        model="speaking",
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
        max_tokens=1,
        extra_body={"temperature": 0.5, "top_k": 7},
    )
    request = server.engine.requests[-1]
    assert request.prompt.messages == [{"role": "system", "content": "Be brief."}, *HELLO]  # type: ignore[union-attr]
    assert request.sampling == {"temperature": 0.5, "top_k": 7}


def test_an_answer_continues_the_last_message_and_contains_only_the_new_text(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="speaking", messages=BEGUN, max_tokens=100)  # type: ignore[arg-type]
    assert message.content[0].text == "is, fun"  # type: ignore[union-attr]
    assert message.usage.output_tokens == len("is, fun") + 1
    with client.messages.stream(model="speaking", messages=BEGUN, max_tokens=100) as stream:  # type: ignore[arg-type]
        assert stream.get_final_text() == "is, fun"
    plain, begun = (
        client.messages.count_tokens(model="speaking", messages=messages).input_tokens  # type: ignore[arg-type]
        for messages in (HELLO, BEGUN)
    )
    assert begun == plain + len("Par")


def test_a_stop_sequence_is_reported(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="speaking", messages=HELLO, max_tokens=50, stop_sequences=[", "])  # type: ignore[arg-type]
    assert message.content[0].text == "Paris"  # type: ignore[union-attr]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", ")


def test_an_answer_follows_a_schema(random_model: Path) -> None:
    schema = {"type": "object", "properties": {"is_large": {"type": "boolean"}}, "required": ["is_large"]}
    with serve(random_model) as server, anthropic.Anthropic(base_url=server.url, api_key="none") as client:
        message = client.messages.create(
            model="tiny",
            messages=HELLO,  # type: ignore[arg-type]
            max_tokens=100,
            output_config={"format": {"type": "json_schema", "schema": schema}},
        )
    assert json.loads(message.content[0].text).keys() == {"is_large"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Well "}]}, "space"),
        ({"messages": [{"role": "assistant", "content": "Well"}]}, "question"),
        ({"messages": BEGUN, "output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_config"),
        ({"tools": [{"name": "x"}]}, "tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ],
)
def test_an_invalid_request_gets_an_error_in_anthropics_format(
    server: Server, fields: dict[str, object], named: str
) -> None:
    body = {"model": "speaking", "messages": HELLO, "max_tokens": 5, **fields}
    response = httpx.post(f"{server.url}/v1/messages", json=body)
    assert response.status_code == 400
    error = response.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert named in error["error"]["message"]


def test_an_unknown_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="speaking"):
        client.messages.create(model="nope", messages=HELLO, max_tokens=5)  # type: ignore[arg-type]


def test_an_error_during_a_stream_is_an_event(server: Server, client: anthropic.Anthropic) -> None:
    server.engine.delay, server.engine.failure = 0.4, EngineCrashed("device lost")
    try:
        with pytest.raises(anthropic.APIStatusError, match="device lost"):
            list(client.messages.create(model="speaking", messages=HELLO, max_tokens=5, stream=True))  # type: ignore[arg-type]
    finally:
        server.engine.delay, server.engine.failure = 0.0, None
    wait_until(lambda: server.engine.running == 0)


def test_models_are_listed_for_its_clients(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.type) == ("speaking", "speaking", "model")
