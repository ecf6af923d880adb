"""Fields of requests that are not supported or not valid: each error names the field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest
from http_server import CONTEXT, Server, serve

from qwenlocal.server.anthropic_api import MessagesRequest
from qwenlocal.server.ollama_models import OllamaEmbedRequest
from qwenlocal.server.openai_models import ChatCompletionRequest, CompletionRequest
from qwenlocal.server.responses_api import ResponsesRequest
from qwenlocal.server.utility_api import DetokenizeRequest

HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {"messages": HELLO, "max_tokens": 2},
    "/api/chat": {"model": "tiny", "messages": HELLO, "stream": False},
    "/api/generate": {"model": "tiny", "prompt": "Hello", "stream": False},
    "/apply-template": {"messages": HELLO},
}


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model) as server:
        yield server


def post(server: Server, path: str, **fields: object) -> httpx.Response:
    """Send a request that is valid without `fields`."""
    return httpx.post(f"{server.url}{path}", json={**BODIES.get(path, {}), **fields})


def read_error(response: httpx.Response) -> str:
    """Return the message of an error."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def read_param(response: httpx.Response) -> object:
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"]


# --- unsupported fields

# Values that would change the answer, and values that change nothing.
SAMPLING: dict[str, tuple[object, tuple[object, ...]]] = {
    "min_keep": (2, (0,)),
    "tfs_z": (0.5, (1, 1.0)),
    "logits_processors": (["x"], ([],)),
    "mirostat": (2, (0,)),
    "dry_multiplier": (0.8, (0,)),
}
GENERATION: dict[str, tuple[object, tuple[object, ...]]] = {
    **SAMPLING,
    "include_stop_str_in_output": (True, (False,)),
    "skip_special_tokens": (False, (True,)),
    "t_max_predict_ms": (100, (-1, 0)),
    "n_indent": (4, (0,)),
    "post_sampling_probs": (True, (False,)),
    "return_tokens": (True, (False,)),
    "truncate_prompt_tokens": (5, ()),
    "max_new_tokens": (5, ()),
    "regex": ("a+", ("",)),
    "ebnf": ('root ::= "a"', ("",)),
    "images": (["aGk="], ([],)),
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
OPENAI: dict[str, tuple[object, tuple[object, ...]]] = {
    **SAMPLING,
    "stop": ("a", ([], "")),
    "n": (2, (1,)),
    "response_format": (SCHEMA, ({}, {"type": "text"})),
    "grammar": ('root ::= "a"', ("",)),
    "logit_bias": ({"1": 5}, ({}, [])),
    "logprobs": (True, (False,)),
    "ignore_eos": (True, (False,)),
}
OPTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    **SAMPLING,
    "penalize_newline": (False, (True,)),
    "logit_bias": ({"1": 5}, ({},)),
    "grammar": ('root ::= "a"', ("",)),
}
UNSUPPORTED: dict[str, dict[str, tuple[object, tuple[object, ...]]]] = {
    "/v1/chat/completions": {**GENERATION, "echo": (True, (False,))},
    "/v1/completions": GENERATION,
    "/v1/messages": OPENAI,
    "/v1/responses": {**OPENAI, "reasoning": ({"effort": "low"}, ({}, {"effort": None, "summary": None}))},
    "/apply-template": {
        "tools": ([{"type": "function"}], ([],)),
        "add_generation_prompt": (False, (True,)),
    },
}


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_fields_that_would_change_the_answer_are_refused_by_name(server: Server, path: str) -> None:
    for field, (value, _) in UNSUPPORTED[path].items():
        assert read_error(post(server, path, **{field: value})) == f"“{field}” is not supported."
    defaults = {field: neutral[-1] for field, (_, neutral) in UNSUPPORTED[path].items() if neutral}
    others = {field: neutral[0] for field, (_, neutral) in UNSUPPORTED[path].items() if neutral}
    for fields in (defaults, others, dict.fromkeys(UNSUPPORTED[path])):
        response = post(server, path, **fields)
        assert response.status_code == 200, response.text


def test_ollama_options_that_would_change_the_answer_are_refused_by_name(server: Server) -> None:
    for option, (value, _) in OPTIONS.items():
        assert read_error(post(server, "/api/chat", options={option: value})) == f"“{option}” is not supported."
    for options in ({option: neutral[0] for option, (_, neutral) in OPTIONS.items()}, dict.fromkeys(OPTIONS)):
        assert post(server, "/api/chat", options=options).status_code == 200


# --- invalid fields


@pytest.mark.parametrize(
    ("field", "values", "sentence"),
    [
        ("temperature", ["1", True, [1]], "“temperature” must be a number."),
        ("max_tokens", [True, "5", 1.5], "“max_tokens” must be a whole number."),
        ("n", ["1", True], "“n” must be a whole number."),
        ("stream", ["off", 1, 0], "“stream” must be true or false."),
        ("top_p", [1.5, 2], "“top_p” must be at most 1."),
        ("top_k", [-2], "“top_k” must be at least -1."),
        ("seed", [2**64], "“seed” must be less than 18,446,744,073,709,551,616."),
        ("model", ["x" * 501], "“model” can have at most 500 characters."),
        ("stop", [["a"] * 17], "“stop” can have at most 16 items."),
        ("stop.0", [[""]], "“stop.0” must not be empty."),
        ("grammar", [5], "“grammar” must be a string."),
        ("response_format", [5, []], "“response_format” must be an object."),
        ("response_format.type", [{"type": "xml"}], "“response_format.type” must be 'text', 'json_object' or"),
        ("logit_bias", [{"a": 1}, {"1": "1"}, [[1]], [[True, 1]], 5], "logit_bias: expected token ids with numbers"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused_in_a_sentence(
    server: Server, field: str, values: list[object], sentence: str
) -> None:
    for value in values:
        response = post(server, "/v1/completions", **{field.partition(".")[0]: value})
        assert sentence in read_error(response)
        assert read_param(response) == field


def test_whole_numbers_are_numbers(server: Server) -> None:
    for bias in ({"5": -1}, [[5, False]], [[5, 1.5]]):
        response = post(server, "/v1/completions", temperature=1, top_p=1, repeat_penalty=1, logit_bias=bias)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "fields", "sentence"),
    [
        ("/v1/chat/completions", {"messages": []}, "“messages” must not be empty."),
        ("/v1/chat/completions", {"messages": None}, "“messages” must be a list."),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0: content is missing."),
        ("/v1/chat/completions", {"messages": [{"content": "a"}]}, "“messages.0.role” is missing."),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "“messages.0.content” must be a"),
        ("/v1/completions", {"prompt": ["a"] * 2049}, "“prompt” can have at most 2,048 items."),
        ("/v1/completions", {"prompt": [[1]] * 2049}, "“prompt” can have at most 2,048 items."),
        ("/v1/completions", {"prompt": [1, "a"]}, "“prompt.1” must be a whole number."),
        ("/v1/completions", {"prompt": ["a", 1]}, "“prompt.1” must be a string."),
        ("/v1/embeddings", {"input": []}, "“input” must not be empty."),
        ("/v1/embeddings", {"input": ""}, "“input” must not be empty."),
        ("/v1/responses", {"input": []}, "“input” must not be empty."),
        ("/v1/messages", {"max_tokens": None}, "“max_tokens” must be a whole number."),
        ("/api/chat", {"format": "xml"}, "“format” must be 'json' or ''."),
    ],
)
def test_an_invalid_prompt_is_refused_in_a_sentence(
    server: Server, path: str, fields: dict[str, object], sentence: str
) -> None:
    assert sentence in read_error(post(server, path, **fields))


def test_a_request_without_an_object_is_refused_in_a_sentence(server: Server) -> None:
    for content in (b"", b"[]", b"null", b'"a"'):
        response = httpx.post(f"{server.url}/v1/completions", content=content)
        assert read_error(response) == "The request must be a JSON object."


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [5] * 300_000}]}),
        (ChatCompletionRequest, {"messages": [5] * 300_000}),
        (MessagesRequest, {"messages": HELLO, "max_tokens": 1, "system": [{"type": "text"}] * 300_000}),
        (ResponsesRequest, {"input": [5] * 300_000}),
        (CompletionRequest, {"prompt": ["a", *[5] * 300_000]}),
        (CompletionRequest, {"prompt": [[5], *["a"] * 300_000]}),
        (CompletionRequest, {"prompt": "a", "stop": [5] * 300_000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": [5] * 300_000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"a{number}": 5 for number in range(300_000)}}),
        (DetokenizeRequest, {"tokens": ["a"] * 300_000}),
        (OllamaEmbedRequest, {"model": "tiny", "input": [5] * 300_000}),
    ],
)
def test_only_the_first_invalid_item_is_reported(model: type[pydantic.BaseModel], fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        model.model_validate(fields)
    assert caught.value.error_count() == 1


# --- errors of the model


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 3000}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 4_000_001}]}, "messages"),
        ("/v1/completions", {"prompt": "a" * 3000}, "prompt"),
        ("/v1/completions", {"prompt": [10**6]}, "prompt"),
        ("/v1/responses", {"input": "a" * 3000}, "input"),
        ("/v1/embeddings", {"input": "a" * 3000}, "input"),
        ("/v1/embeddings", {"input": [10**6]}, "input"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/v1/completions", {"grammar": 'root ::= "a"{1000000}'}, "grammar"),
    ],
)
def test_an_error_about_the_prompt_names_its_field(
    server: Server, path: str, fields: dict[str, object], param: str
) -> None:
    assert read_param(post(server, path, **fields)) == param


def test_messages_for_clients_without_param_name_the_field(server: Server) -> None:
    schema: dict[str, object] = {"not": {}}
    assert read_error(post(server, "/api/chat", format=schema)).startswith("format: The schema is not supported")
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = read_error(post(server, "/v1/messages", output_config=config))
    assert message.startswith("output_config.format.schema: The schema is not supported")


def test_a_response_repeats_its_format(server: Server) -> None:
    form = {"type": "json_schema", "name": "place", "schema": {"type": "object"}, "strict": True}
    assert post(server, "/v1/responses", text={"format": form}).json()["text"] == {"format": form}
    assert post(server, "/v1/responses").json()["text"] == {"format": {"type": "text"}}


def test_tokens_that_a_stop_string_cut_off_have_no_logprobs(server: Server) -> None:
    for stop, text in ((", f", "Paris"), ("is", "Par"), ("P", "")):
        for path, fields in (
            ("/v1/chat/completions", {"logprobs": True, "max_tokens": 20}),
            ("/v1/completions", {"logprobs": 0, "max_tokens": 20}),
        ):
            (choice,) = post(server, path, stop=stop, temperature=0, **fields).json()["choices"]
            answer = choice["message"]["content"] if "message" in choice else choice["text"]
            logprobs = choice["logprobs"]
            tokens = [one["token"] for one in logprobs["content"]] if "content" in logprobs else logprobs["tokens"]
            assert "".join(tokens) == answer == text


# --- Ollama


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/chat", {"options", "format", "keep_alive", "logprobs", "top_logprobs", "tools", "think", "truncate"}),
        ("/api/generate", {"options", "format", "system", "raw", "logprobs", "top_logprobs", "images", "template"}),
        ("/api/embed", {"input", "truncate", "dimensions", "options", "keep_alive"}),
        ("/api/embeddings", {"prompt", "options", "keep_alive"}),
        ("/api/show", {"verbose", "system", "options"}),
    ],
)
def test_null_is_as_good_as_nothing_for_ollama(server: Server, path: str, fields: set[str]) -> None:
    response = post(server, path, **{"model": "tiny", **dict.fromkeys(fields)})
    assert response.status_code == 200, response.text


def test_null_in_options_and_messages_is_as_good_as_nothing_for_ollama(server: Server) -> None:
    options = dict.fromkeys(("num_predict", "num_ctx", "stop", "temperature", "top_k", "seed", "repeat_penalty"))
    message = {"role": "user", "content": None, "images": None, "tool_calls": None, "thinking": None}
    answer = post(server, "/api/chat", options=options, messages=[*HELLO, message]).json()
    assert answer["message"]["content"] == "Paris, fun"
    assert post(server, "/api/generate", prompt=None).json()["done_reason"] == "load"
    assert post(server, "/api/chat", messages=None).json()["done_reason"] == "load"
    lines = post(server, "/api/chat", stream=None)
    assert lines.headers["content-type"] == "application/x-ndjson" and len(lines.text.splitlines()) > 2


def test_ollama_embeds_the_beginning_of_a_text_that_is_too_long(server: Server) -> None:
    def embed(text: str, **fields: object) -> httpx.Response:
        return post(server, "/api/embed", model="tiny", input=text, **fields)

    beginning = embed("a" * CONTEXT).json()
    for truncate in ({}, {"truncate": True}, {"truncate": None}):
        cut = embed("a" * CONTEXT + "b" * 100, **truncate).json()
        assert cut["embeddings"] == beginning["embeddings"] and cut["prompt_eval_count"] == CONTEXT
    assert "context" in read_error(embed("a" * CONTEXT + "b" * 100, truncate=False))
    assert read_param(post(server, "/v1/embeddings", input="a" * CONTEXT + "b" * 100)) == "input"
