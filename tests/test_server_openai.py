"""The OpenAI API, used by OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import shlex
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pydantic
import pytest
from http_server import Server, serve, wait_until

from qwenlocal.chat.conversation import Conversation, GenerationConfig
from qwenlocal.chat.thread import ASSISTANT, USER, Thread
from qwenlocal.errors import EngineCrashed
from qwenlocal.remote.client import RemoteClient
from qwenlocal.remote.endpoints import Endpoint
from qwenlocal.remote.remote_backend import RemoteBackend

ANNOUNCED = "Qwen/Qwen1.5-7B-Chat"


@pytest.fixture(scope="module")
def speaking(speaking_model: Path) -> Iterator[Server]:
    """A server whose model answers "Paris, fun" to everything."""
    with serve(speaking_model, name="speaking", aliases=[ANNOUNCED], grammar_timeout=0.3) as server:
        yield server


@pytest.fixture(scope="module")
def endless(endless_model: Path) -> Iterator[Server]:
    with serve(endless_model, name="endless", keep_alive=0.1) as server:
        yield server


@pytest.fixture(scope="module")
def random_server(random_model: Path) -> Iterator[Server]:
    with serve(random_model, name="random") as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


HELLO = [{"role": "user", "content": "Hello"}]


def test_a_chat_is_answered(speaking: Server) -> None:
    completion = client(speaking).chat.completions.create(model="speaking", messages=HELLO)
    assert completion.choices[0].message.content == "Paris, fun"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage and completion.usage.completion_tokens == len("Paris, fun") + 1


def test_a_chat_is_streamed_with_its_usage(speaking: Server) -> None:
    stream = client(speaking).chat.completions.create(
        model="speaking", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Paris, fun"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert not last.choices and last.usage and last.usage.total_tokens > 10
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_asynchronous_client_streams(speaking: Server) -> None:
    async def read() -> str:
        async with openai.AsyncOpenAI(base_url=f"{speaking.url}/v1", api_key="none") as asynchronous:
            stream = await asynchronous.chat.completions.create(model="speaking", messages=HELLO, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(read()) == "Paris, fun"


def test_the_curl_command_of_the_announcement_works(speaking: Server) -> None:
    command = f"""curl {speaking.url}/v1/chat/completions \\
        -H "Content-Type: application/json" \\
        -d '{{
        "model": "{ANNOUNCED}",
        "messages": [
        {{"role": "system", "content": "You are a helpful assistant."}},
        {{"role": "user", "content": "Tell me something about large language models."}}
        ]
        }}'"""
    ran = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=20)
    response = json.loads(ran.stdout)
    assert response["choices"][0]["message"]["content"] == "Paris, fun"
    assert response["model"] == ANNOUNCED
    assert [message["role"] for message in speaking.engine.requests[-1].prompt.messages] == ["system", "user"]  # type: ignore[union-attr]


def test_a_stop_string_ends_the_answer(speaking: Server) -> None:
    for stop in (", ", ["x", ", "]):
        completion = client(speaking).chat.completions.create(model="speaking", messages=HELLO, stop=stop)
        assert completion.choices[0].message.content == "Paris"
        assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": None}]
)
def test_a_limit_of_tokens_ends_the_answer(speaking: Server, limits: dict[str, int | None]) -> None:
    completion = client(speaking).chat.completions.create(model="speaking", messages=HELLO, **limits)  # type: ignore[call-overload]
    assert completion.choices[0].message.content == "Paris"
    assert completion.choices[0].finish_reason == "length"


@pytest.mark.parametrize("others", [{}, {"add_generation_prompt": False}])
def test_the_last_message_is_continued_as_sglang_and_vllm_do(speaking: Server, others: dict[str, bool]) -> None:
    completion = client(speaking).chat.completions.create(
        model="speaking",
        messages=[*HELLO, {"role": "assistant", "content": "Par"}],
        extra_body={"continue_final_message": True, **others},
    )
    assert completion.choices[0].message.content == "is, fun"


def test_a_chat_of_another_qwenlocal_continues_its_answer(speaking: Server) -> None:
    thread = Thread()
    thread.add(USER, "Hello")
    thread.add(ASSISTANT, "Par")
    backend = RemoteBackend(RemoteClient(Endpoint(f"{speaking.url}/v1")), "speaking")
    list(Conversation(backend, GenerationConfig(), thread).continue_answer())
    assert [message.text for message in thread.path] == ["Hello", "Paris, fun"]


def test_a_seed_repeats_an_answer_and_choices_differ(random_server: Server) -> None:
    def answers(seed: int) -> list[str | None]:
        completion = client(random_server).chat.completions.create(
            model="random", messages=HELLO, n=3, seed=seed, temperature=1, max_tokens=20
        )
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        return [choice.message.content for choice in completion.choices]

    first = answers(-5)
    assert answers(-5) == first
    assert len({*first, *answers(6)}) == 6


def test_streamed_choices_are_told_apart_by_their_index(random_server: Server) -> None:
    arguments = {"model": "random", "messages": HELLO, "n": 2, "seed": 1, "temperature": 1, "max_tokens": 12}
    whole = client(random_server).chat.completions.create(**arguments)  # type: ignore[call-overload]
    texts = ["", ""]
    for chunk in client(random_server).chat.completions.create(**arguments, stream=True):  # type: ignore[call-overload]
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_tokens_have_probabilities(speaking: Server) -> None:
    arguments = {"model": "speaking", "messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    whole = client(speaking).chat.completions.create(**arguments).choices[0].logprobs.content  # type: ignore[call-overload]
    assert "".join(token.token for token in whole) == "Paris"
    assert [len(token.top_logprobs) for token in whole] == [3] * 5
    assert all(token.top_logprobs[0].token == token.token and token.logprob > -1 for token in whole)
    assert bytes(whole[0].bytes) == b"P"
    chunks = list(client(speaking).chat.completions.create(**arguments, stream=True))  # type: ignore[call-overload]
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.logprob for token in streamed] == [token.logprob for token in whole]


def test_a_logit_bias_excludes_a_token(speaking: Server) -> None:
    completion = client(speaking).chat.completions.create(
        model="speaking", messages=HELLO, logit_bias={str(ord("P")): -100}, max_tokens=5
    )
    content = completion.choices[0].message.content or ""
    assert content != "Paris" and "P" not in content


def test_sampling_reaches_the_engine(speaking: Server) -> None:
    client(speaking).chat.completions.create(
        model="speaking",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        max_tokens=1,
        extra_body={"top_k": -1, "min_p": 0.1, "repeat_penalty": 1.2, "ignore_eos": True, "cache_prompt": False},
    )
    request = speaking.engine.requests[-1]
    assert request.sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "top_k": 0,
        "min_p": 0.1,
        "repeat_penalty": 1.2,
        "ignore_eos": True,
    }
    assert not request.cache_prompt
    assert request.client == "127.0.0.1" or len(request.client) == 16


@pytest.mark.parametrize(
    ("fields", "window"), [({"repeat_last_n": 0}, 0), ({"penalty_last_n": 256}, 256), ({"repeat_last_n": -1}, 131_072)]
)
def test_the_window_of_penalties_reaches_the_engine(speaking: Server, fields: dict[str, int], window: int) -> None:
    client(speaking).chat.completions.create(model="speaking", messages=HELLO, max_tokens=1, extra_body=fields)
    assert speaking.engine.requests[-1].sampling == {"repeat_last_n": window}


class City(pydantic.BaseModel):
    is_large: bool
    country: str = pydantic.Field(max_length=3)


def test_an_answer_follows_a_schema(random_server: Server) -> None:
    completion = client(random_server).chat.completions.parse(
        model="random", messages=HELLO, response_format=City, max_tokens=200
    )
    assert isinstance(completion.choices[0].message.parsed, City)


def test_an_answer_follows_a_grammar(random_server: Server) -> None:
    completion = client(random_server).chat.completions.create(
        model="random", messages=HELLO, extra_body={"grammar": 'root ::= "yes" | "no"'}
    )
    assert completion.choices[0].message.content in ("yes", "no")


def test_any_object_can_be_asked_for(random_server: Server) -> None:
    client(random_server).chat.completions.create(
        model="random", messages=HELLO, response_format={"type": "json_object"}, max_tokens=3
    )
    assert "grammar" in random_server.engine.requests[-1].sampling


def test_content_may_be_a_list_of_texts(speaking: Server) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    client(speaking).chat.completions.create(model="speaking", messages=[{"role": "user", "content": parts}])  # type: ignore[list-item]
    assert speaking.engine.requests[-1].prompt.messages == HELLO  # type: ignore[union-attr]


# --- completions


def test_several_prompts_are_completed_at_once(speaking: Server) -> None:
    completion = client(speaking).completions.create(model="speaking", prompt=["a", "b"], n=2, max_tokens=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in completion.choices} == {"length"}
    assert completion.usage and completion.usage.prompt_tokens == 2 and completion.usage.completion_tokens == 12


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [65, 66, 67], [[65, 66, 67]]])
def test_prompts_may_be_texts_or_tokens_and_are_repeated_with_probabilities(
    random_server: Server, prompt: list[str]
) -> None:
    tokens = httpx.post(f"{random_server.url}/v1/completions", json={"prompt": prompt, "max_tokens": 0, "echo": True})
    text = tokens.json()["choices"][0]["text"]
    assert len(text) == 3
    completion = client(random_server).completions.create(
        model="random", prompt=prompt, max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    (choice,) = completion.choices
    assert choice.text.startswith(text) and choice.logprobs
    logprobs = choice.logprobs
    assert logprobs.token_logprobs and logprobs.top_logprobs and logprobs.tokens
    assert len(logprobs.tokens) == len(logprobs.text_offset or ()) == 4
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    for token, logprob, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert top[token] == logprob <= 0 and len(top) in (2, 3)


def test_probabilities_of_a_prompt_are_those_of_generating_it(random_server: Server) -> None:
    arguments = {"model": "random", "logprobs": 1, "temperature": 0}
    generated = client(random_server).completions.create(**arguments, prompt="abc", max_tokens=4)  # type: ignore[call-overload]
    logprobs = generated.choices[0].logprobs
    # The tiny model has one token for each byte, with its number.
    ids = [int(token[-2:], 16) if token.startswith("bytes:") else ord(token) for token in logprobs.tokens]
    scored = client(random_server).completions.create(  # type: ignore[call-overload]
        **arguments, prompt=[*b"abc", *ids], max_tokens=0, echo=True
    )
    assert scored.choices[0].logprobs.token_logprobs[3:] == pytest.approx(logprobs.token_logprobs, abs=1e-3)
    assert scored.choices[0].finish_reason == "length"


def test_a_completion_is_streamed_with_its_prompt(speaking: Server) -> None:
    arguments = {"model": "speaking", "prompt": "Hi", "max_tokens": 4, "echo": True, "logprobs": 0}
    whole = client(speaking).completions.create(**arguments)  # type: ignore[call-overload]
    chunks = list(client(speaking).completions.create(**arguments, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    offsets = [
        offset for chunk in chunks if chunk.choices[0].logprobs for offset in chunk.choices[0].logprobs.text_offset
    ]
    assert offsets == whole.choices[0].logprobs.text_offset


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", 1], [-1], [10**6], {"a": 1}])
def test_prompts_without_tokens_of_the_model_are_refused(speaking: Server, prompt: object) -> None:
    for path, field in (("completions", "prompt"), ("embeddings", "input")):
        response = httpx.post(f"{speaking.url}/v1/{path}", json={field: prompt})
        assert response.status_code == 400, response.text


def test_timings_come_with_each_token_if_requested(speaking: Server) -> None:
    body = {"messages": HELLO, "stream": True, "timings_per_token": True}
    lines = httpx.post(f"{speaking.url}/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    counts = [chunk["timings"]["predicted_n"] for chunk in chunks if "timings" in chunk]
    assert counts == [*range(1, len("Paris, fun") + 1), len("Paris, fun") + 1]
    first, last = chunks[1]["timings"], chunks[-1]["timings"]
    assert last["prompt_n"] + last["cache_n"] == first["prompt_n"] + first["cache_n"] > 0


# --- models and embeddings


def test_models_are_listed(speaking: Server) -> None:
    (model,) = client(speaking).models.list()
    assert client(speaking).models.retrieve("speaking") == model
    with pytest.raises(openai.NotFoundError, match="Installed: speaking"):
        client(speaking).models.retrieve("a/b")


def test_texts_have_vectors(random_server: Server) -> None:
    arguments = {"model": "random", "input": ["a", "b c"]}
    packed = client(random_server).embeddings.create(**arguments)  # type: ignore[arg-type]
    plain = client(random_server).embeddings.create(**arguments, encoding_format="float")  # type: ignore[arg-type]
    assert packed.usage.prompt_tokens == 4
    for first, second in zip(packed.data, plain.data, strict=True):
        assert first.embedding == pytest.approx(second.embedding, abs=1e-6)
        assert math.hypot(*second.embedding) == pytest.approx(1, abs=1e-5)
    raw = httpx.post(f"{random_server.url}/v1/embeddings", json={"input": [97], "encoding_format": "base64"}).json()
    data = base64.b64decode(raw["data"][0]["embedding"])
    assert len(struct.unpack(f"<{len(data) // 4}f", data)) == len(plain.data[0].embedding)


# --- errors


def test_an_unknown_model_is_an_error_with_a_list(speaking: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client(speaking).chat.completions.create(model="nope", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert "speaking" in caught.value.message and "on the server: qwenlocal pull" in caught.value.message


def test_a_model_is_described_under_each_of_its_names(speaking: Server) -> None:
    for name in ("speaking", ANNOUNCED):
        assert client(speaking).models.retrieve(name).id == "speaking"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_an_error_with_numbers(speaking: Server, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(speaking).chat.completions.create(
            model="speaking", messages=[{"role": "user", "content": "x" * 5000}], stream=stream
        )
    assert caught.value.code == "context_length_exceeded"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["n_prompt_tokens"] > 5000 and caught.value.body["n_ctx"] == 2048


# llguidance takes minutes for these 900 characters
ENDLESS_PATTERNS = [{"type": "string", "pattern": f"a{{{number}}}"} for number in range(26)]
BAD_REQUESTS = [
    ({"messages": []}, "messages"),
    ({}, "messages"),
    ({"messages": [{"role": "pope", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": "hello"}, "messages"),
    ({"messages": HELLO, "temperature": "hot"}, "temperature"),
    ({"messages": HELLO, "temperature": -1}, "temperature"),
    ({"messages": HELLO, "n": 0}, "n"),
    ({"messages": HELLO, "stop": ["x"] * 17}, "stop"),
    ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": HELLO, "tool_choice": "required", "tools": [{"type": "function"}]}, "tools"),
    ({"messages": HELLO, "functions": [{}]}, "functions"),
    ({"messages": HELLO, "audio": {}}, "audio"),
    ({"messages": HELLO, "continue_final_message": True}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}], "continue_final_message": True}, "messages"),
    ({"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt"),
    ({"messages": HELLO, "add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
    ({"messages": HELLO, "best_of": 2}, "best_of"),
    ({"messages": HELLO, "grammar": "root ::= ("}, "grammar"),
    ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
    ({"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
     "response_format.json_schema.schema"),
    ({"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {"999999": 1}}, "logit_bias"),
    ({"messages": HELLO, "grammar": f'root ::= "{"x" * 100_000}"'}, "grammar"),
    ({"messages": HELLO, "response_format": {"type": "json_object", "schema": {"enum": ["x" * 100_000]}}},
     "response_format.schema"),
    ({"messages": HELLO, "response_format": {"type": "json_object", "schema": {"allOf": ENDLESS_PATTERNS}}},
     "response_format.schema"),
    ([1], ""),
    ("text", ""),
    (None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD_REQUESTS)
def test_a_bad_request_names_its_field(speaking: Server, body: object, param: str) -> None:
    response = httpx.post(f"{speaking.url}/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"] or "") == param, error
    assert error["type"] == "invalid_request_error" and error["message"]


def test_a_slow_grammar_does_not_delay_requests_without_one(speaking: Server) -> None:
    endless = {"messages": HELLO, "response_format": {"type": "json_object", "schema": {"allOf": ENDLESS_PATTERNS}}}
    with ThreadPoolExecutor() as threads:
        url = f"{speaking.url}/v1/chat/completions"
        slow = [threads.submit(httpx.post, url, json=endless, timeout=60) for _ in range(3)]
        assert client(speaking).chat.completions.create(model="speaking", messages=HELLO).choices[0].message.content
        assert not all(future.done() for future in slow)
        assert {future.result().status_code for future in slow} == {400}


@pytest.mark.parametrize(
    "body", [b"{", b"", b"\xff\xfe", b'{"messages": "\xff"}', b"[" * 100_000, b'{"messages": NaN}', b'{"a": "\\ud800"}']
)
def test_malformed_json_is_a_bad_request(speaking: Server, body: bytes) -> None:
    response = httpx.post(f"{speaking.url}/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_fields_that_change_nothing_are_ignored(speaking: Server) -> None:
    body = {"messages": HELLO, "user": "me", "store": False, "tools": [], "tool_choice": "none", "nonsense": 1}
    assert httpx.post(f"{speaking.url}/v1/chat/completions", json=body).status_code == 200


def test_a_crash_is_reported_with_a_time_to_try_again(speaking: Server) -> None:
    speaking.engine.failure = EngineCrashed("device lost")
    try:
        for stream in (False, True):
            response = httpx.post(f"{speaking.url}/v1/chat/completions", json={"messages": HELLO, "stream": stream})
            assert response.status_code == 503 and response.headers["retry-after"]
            assert "device lost" in response.json()["error"]["message"]
    finally:
        speaking.engine.failure = None


def test_a_bug_has_an_id_in_the_response_and_in_the_log(speaking: Server, caplog: pytest.LogCaptureFixture) -> None:
    speaking.engine.failure = ZeroDivisionError("secret")
    try:
        response = httpx.post(f"{speaking.url}/v1/chat/completions", json={"messages": HELLO})
    finally:
        speaking.engine.failure = None
    assert response.status_code == 500 and "secret" not in response.text
    (id,) = re.findall(r"\b[0-9a-f]{8}\b", response.json()["error"]["message"])
    assert id in caplog.text


def test_an_unknown_path_is_an_error_of_the_same_shape(speaking: Server) -> None:
    unknown = httpx.get(f"{speaking.url}/v1/nothing")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "unknown_url"
    assert "/v1/nothing" in unknown.json()["error"]["message"] and "/docs" in unknown.json()["error"]["message"]
    wrong = httpx.get(f"{speaking.url}/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["message"] == "/v1/chat/completions accepts only POST."


# --- clients that wait or leave


def test_a_client_that_leaves_a_stream_ends_the_computation(endless: Server) -> None:
    body = {"messages": HELLO, "stream": True, "n": 2}
    with httpx.stream("POST", f"{endless.url}/v1/chat/completions", json=body) as response:
        chunks = response.iter_raw()  # httpx closes the connection with the iterator
        next(chunks)
        assert endless.engine.running == 1
    wait_until(lambda: endless.engine.running == 0)


def test_a_client_that_leaves_before_the_answer_ends_the_computation(endless: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endless.url}/v1/chat/completions", json={"messages": HELLO, "n": 2}, timeout=0.3)
    assert endless.engine.requests[-1].prompt.messages == HELLO  # type: ignore[union-attr]
    wait_until(lambda: endless.engine.running == 0)


def test_a_client_that_waits_for_a_model_gets_comments(endless: Server) -> None:
    endless.host.delay = 0.35
    try:
        body = {"messages": HELLO, "stream": True, "max_tokens": 2}
        response = httpx.post(f"{endless.url}/v1/chat/completions", json=body)
    finally:
        endless.host.delay = 0.0
    first, *_ = response.text.split("\n\n")
    assert first.startswith(":")
    assert response.text.endswith("data: [DONE]\n\n")


def test_an_error_after_a_stream_has_begun_is_an_event(endless: Server) -> None:
    endless.engine.delay, endless.engine.failure = 0.25, EngineCrashed("device lost")
    try:
        with pytest.raises(openai.APIError, match="device lost"):
            list(client(endless).chat.completions.create(model="", messages=HELLO, stream=True))
    finally:
        endless.engine.delay, endless.engine.failure = 0.0, None
