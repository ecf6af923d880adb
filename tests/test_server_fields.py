"""Fields of requests that are not supported or not valid: each error names the field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import Server, serve

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
GENERATION: dict[str, tuple[object, tuple[object, ...]]] = {
    "repeat_last_n": (0, (64,)),
    "penalty_last_n": (-1, (64,)),
    "include_stop_str_in_output": (True, (False,)),
    "skip_special_tokens": (False, (True,)),
    "t_max_predict_ms": (100, (-1, 0)),
    "n_indent": (4, (0,)),
    "min_keep": (2, (0,)),
    "post_sampling_probs": (True, (False,)),
    "return_tokens": (True, (False,)),
    "truncate_prompt_tokens": (5, ()),
    "max_new_tokens": (5, ()),
    "regex": ("a+", ("",)),
    "ebnf": ('root ::= "a"', ("",)),
    "tfs_z": (0.5, (1, 1.0)),
    "logits_processors": (["x"], ([],)),
    "images": (["aGk="], ([],)),
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
OPENAI: dict[str, tuple[object, tuple[object, ...]]] = {
    "stop": ("a", ([], "")),
    "n": (2, (1,)),
    "response_format": (SCHEMA, ({}, {"type": "text"})),
    "grammar": ('root ::= "a"', ("",)),
    "logit_bias": ({"1": 5}, ({}, [])),
    "logprobs": (True, (False,)),
    "ignore_eos": (True, (False,)),
}
OPTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "repeat_last_n": (0, (64,)),
    "penalize_newline": (False, (True,)),
    "logit_bias": ({"1": 5}, ({},)),
    "grammar": ('root ::= "a"', ("",)),
}
UNSUPPORTED = {
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
