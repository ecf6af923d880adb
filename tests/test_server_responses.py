"""OpenAI's responses, used by OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pydantic
import pytest
from http_server import Server, serve, wait_until

from qwenlocal.errors import EngineCrashed


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model, name="speaking", keep_alive=0.2) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_text_is_answered(client: openai.OpenAI, server: Server) -> None:
    response = client.responses.create(model="speaking", input="Hello", instructions="Be brief.", temperature=0.5)
    assert response.output_text == "Paris, fun" and response.status == "completed"
    assert response.usage and response.usage.output_tokens == len("Paris, fun") + 1
    request = server.engine.requests[-1]
    assert request.prompt.messages == [  # type: ignore[union-attr]
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert request.sampling == {"temperature": 0.5}


def test_a_chat_is_answered_up_to_a_limit(client: openai.OpenAI, server: Server) -> None:
    response = client.responses.create(
        model="speaking",
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        ],
        max_output_tokens=5,
    )
    assert response.output_text == "Paris" and response.status == "incomplete"
    assert response.incomplete_details and response.incomplete_details.reason == "max_output_tokens"
    assert [message["role"] for message in server.engine.requests[-1].prompt.messages] == ["system", "user"]  # type: ignore[union-attr]


def test_a_response_is_streamed(client: openai.OpenAI) -> None:
    with client.responses.stream(model="speaking", input="Hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Paris, fun"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Paris, fun"
    raw = list(client.responses.create(model="speaking", input="Hello", stream=True))
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    assert raw[0].type == "response.created" and raw[-1].type == "response.completed"
    cut = list(client.responses.create(model="speaking", input="Hello", stream=True, max_output_tokens=2))
    assert cut[-1].type == "response.incomplete"


class City(pydantic.BaseModel):
    is_large: bool


def test_a_response_follows_a_schema(random_model: Path) -> None:
    with serve(random_model) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        response = client.responses.parse(model="tiny", input="Hello", text_format=City, max_output_tokens=100)
    assert isinstance(response.output_parsed, City)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ],
)
def test_a_bad_request_names_its_field(server: Server, fields: dict[str, object], param: str) -> None:
    response = httpx.post(f"{server.url}/v1/responses", json={"input": "Hello", **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_an_error_during_a_stream_is_raised_by_the_client(client: openai.OpenAI, server: Server) -> None:
    server.engine.delay, server.engine.failure = 0.4, EngineCrashed("device lost")
    try:
        with pytest.raises(openai.APIError, match="device lost"):
            list(client.responses.create(model="speaking", input="Hello", stream=True))
    finally:
        server.engine.delay, server.engine.failure = 0.0, None
    wait_until(lambda: server.engine.running == 0)
