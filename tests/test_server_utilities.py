"""Health, metrics, tokens, templates and the page /docs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_server import Server, serve

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(speaking_model: Path) -> Iterator[Server]:
    with serve(speaking_model) as server:
        yield server


def post(server: Server, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body)


def test_tokens_become_text_again(server: Server) -> None:
    tokens = post(server, "/tokenize", content="hé<|im_end|>").json()["tokens"]
    assert len(tokens) == 4
    assert post(server, "/detokenize", tokens=tokens).json()["content"] == "hé<|im_end|>"
    assert len(post(server, "/tokenize", content="<|im_end|>", parse_special=False).json()["tokens"]) == 10


def test_tokens_have_the_names_of_vllm_too(server: Server) -> None:
    tokens = post(server, "/tokenize", prompt="hé", add_special_tokens=False).json()["tokens"]
    assert tokens == post(server, "/tokenize", content="hé").json()["tokens"]
    assert post(server, "/detokenize", tokens=tokens).json()["prompt"] == "hé"
    assert post(server, "/tokenize").json()["error"]["param"] == "content"


def test_parts_of_characters_are_bytes(server: Server) -> None:
    tokens = post(server, "/tokenize", content="hé", with_pieces=True).json()["tokens"]
    assert [token["piece"] for token in tokens] == ["h", [0xC3], [0xA9]]


def test_the_template_is_applied(server: Server) -> None:
    prompt = post(server, "/apply-template", messages=HELLO).json()["prompt"]
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert post(server, "/apply-template", messages=[]).status_code == 400
    assert post(server, "/tokenize", content="x", model="nope").status_code == 404
    assert post(server, "/detokenize", tokens=[10**6]).status_code == 400
    assert post(server, "/detokenize", tokens=[-1]).json()["error"]["param"] == "tokens.0"


def read_metrics(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_count_requests_and_tokens(server: Server) -> None:
    before = read_metrics(server)
    post(server, "/v1/chat/completions", messages=HELLO)
    httpx.get(f"{server.url}/some/path/nobody/has")
    after = read_metrics(server)
    added = {name: after[name] - before.get(name, 0) for name in after}
    assert added["qwenlocal_answer_tokens_total"] == len("Paris, fun") + 1
    assert added["qwenlocal_prompt_tokens_total"] > 10
    assert added["qwenlocal_time_to_first_token_seconds_count"] == 1
    assert added["qwenlocal_time_between_tokens_seconds_count"] == len("Paris, fun") - 1
    assert added['qwenlocal_requests_total{route="/v1/chat/completions",status="200"}'] == 1
    assert added['qwenlocal_requests_total{route="",status="404"}'] == 1
    assert after["qwenlocal_answers_running"] == after["qwenlocal_answers_waiting"] == 0


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/docs", "/openapi.json", "/api/version"])
def test_head_returns_the_headers_of_get(server: Server, path: str) -> None:
    head, get = httpx.head(f"{server.url}{path}"), httpx.get(f"{server.url}{path}")
    assert head.status_code == 200 and head.content == b"" and get.content
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_is_refused_if_get_is(server: Server) -> None:
    assert httpx.head(f"{server.url}/v1/chat/completions").status_code == 405
    assert httpx.head(f"{server.url}/v1/nothing").status_code == 404


def test_the_docs_page_loads_nothing_from_other_hosts(server: Server) -> None:
    page = httpx.get(f"{server.url}/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    for link in links:
        assert link.startswith("/") and httpx.get(f"{server.url}{link}").status_code == 200
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/embeddings", "/tokenize", "/health"} <= set(paths)
    assert "$ref" in paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
