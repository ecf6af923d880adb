"""Chats with a remote engine, simulated by a loopback server."""

from __future__ import annotations

import itertools
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_server import ANSWER, EngineServer, Reply, chunk
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlocal.chat.conversation import Conversation, GenerationConfig
from qwenlocal.chat.events import Done, Event, FinishReason, Text
from qwenlocal.chat.thread import Thread
from qwenlocal.chat.worker import iterate_in_thread
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import QwenlocalError, UsageError
from qwenlocal.library.http import Timeouts
from qwenlocal.remote.client import RemoteClient
from qwenlocal.remote.endpoints import KEYRING, Endpoint, find_endpoint, parse_url, read_endpoints
from qwenlocal.remote.errors import (
    AnswerCut,
    ApiKeyRejected,
    EngineFailed,
    EngineUnreachable,
    MalformedAnswer,
    PromptTooLong,
    RateLimited,
    RemoteModelNotFound,
    RequestRejected,
)
from qwenlocal.remote.event_stream import EventTooLarge, parse_events
from qwenlocal.remote.remote_backend import RemoteBackend
from qwenlocal.terminal.view import describe_stats

SAYS = "".join(ANSWER)
KEY = "sk-secret-0123456789"


@pytest.fixture
def engine() -> Iterator[EngineServer]:
    with EngineServer() as server:
        yield server


def open_conversation(
    engine: EngineServer, config: GenerationConfig | None = None, *, key: str = "", stall: float = 20
) -> Conversation:
    endpoint = Endpoint(engine.url, api_key=key, key_source="VARIABLE" if key else "")
    client = RemoteClient(endpoint, Timeouts(connect=2, stall=stall))
    return Conversation(RemoteBackend(client, "tiny-chat"), config or GenerationConfig(), Thread("Be kind."))


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def last_event(events: list[Event]) -> Done:
    done = events[-1]
    assert isinstance(done, Done)
    return done


# --- answers


def test_an_answer_arrives_as_text_with_the_counts_of_the_engine(engine: EngineServer) -> None:
    talk = open_conversation(engine)
    events = list(talk.ask("Hi"))
    done = last_event(events)
    assert (text_of(events), done.finish_reason) == (SAYS, FinishReason.EOS)
    assert (done.stats.prompt_tokens, done.stats.reused_tokens, done.stats.answer_tokens) == (21, 16, 3)
    assert [message.text for message in talk.thread.path] == ["Hi", SAYS]
    assert talk.thread.last and talk.thread.last.model == "tiny-chat"


def test_without_usage_no_tokens_are_shown(engine: EngineServer) -> None:
    engine.replies = [Reply()]
    done = last_event(list(open_conversation(engine).ask("Hi")))
    assert "token" not in describe_stats(done).replace("first token after", "")


def test_the_request_has_the_thread_and_only_the_settings_that_were_chosen(engine: EngineServer) -> None:
    config = GenerationConfig(
        Sampling(temperature=0.5, seed=7),
        max_tokens=9,
        stop_strings=["END"],
        unset=frozenset(
            {"top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "frequency_penalty", "presence_penalty"}
        ),
    )
    talk = open_conversation(engine, config)
    list(talk.ask("Hi"))
    list(talk.retry())
    first, second = engine.requests
    assert first == {
        "model": "tiny-chat",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        "temperature": 0.5,
        "seed": 7,
        "max_tokens": 9,
        "stop": ["END"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert second == {**first, "seed": 8}


def test_text_that_is_not_unicode_is_sent_with_question_marks(engine: EngineServer) -> None:
    list(open_conversation(engine).ask("caf\udce9"))
    assert engine.questions == ["caf?"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(line_end="\r\n"),
        Reply(line_end="\r"),
        Reply(is_compressed=True),
        Reply(events=[chunk(delta={"role": "assistant", "content": None}), chunk(delta={"content": ""})]),
        Reply(events=[chunk(delta={"reasoning_content": "The user wants to know …"})]),
        Reply(raw=b": ping\n\n\xef\xbb\xbfignored\nevent: x\nid: 1\n" + b"".join(Reply().data())),
        Reply(raw=b"".join(Reply().data()).removesuffix(b"data: [DONE]\n\n")),
        Reply(finish_reason=None),
        Reply(events=[json.dumps({"choices": [], "prompt_filter_results": ["x" * 1_000_000]})]),
    ],
    ids=["CRLF", "CR", "gzip", "null", "reasoning", "comments", "no-DONE", "no-reason", "huge-line"],
)
def test_every_dialect_of_the_stream_is_understood(engine: EngineServer, reply: Reply) -> None:
    engine.replies = [reply]
    assert text_of(list(open_conversation(engine).ask("Hi"))) == SAYS


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(finish_reason="length"), FinishReason.LENGTH),
        (Reply(finish_reason="eos"), FinishReason.EOS),
        (Reply(events=[chunk(delta={}, finish_reason="stop", stop_reason="END")]), FinishReason.EOS),
        (
            Reply(raw=f"data: {chunk(delta={'content': 'x'}, finish_reason='stop', stop_reason='END')}\n\n".encode()),
            FinishReason.STOP_STRING,
        ),
    ],
)
def test_finish_reasons_are_translated(engine: EngineServer, reply: Reply, reason: FinishReason) -> None:
    engine.replies = [reply]
    assert last_event(list(open_conversation(engine).ask("Hi"))).finish_reason is reason


# --- failures


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (Reply(status=401, body=f'{{"error":{{"message":"Incorrect key {KEY}"}}}}'), ApiKeyRejected, "VARIABLE"),
        (Reply(status=403), ApiKeyRejected, "refuses the API key"),
        (Reply(status=404, body='{"error":{"message":"no such model"}}'), RemoteModelNotFound, "tiny-chat"),
        (
            Reply(status=400, body='{"error":{"message":"no", "code":"model_not_found"}}'),
            RemoteModelNotFound,
            "has no model",
        ),
        (Reply(status=429, headers={"Retry-After": "60"}, body='{"error":"slow down"}'), RateLimited, "slow down"),
        (
            Reply(status=400, body='{"error":{"message":"This model\'s maximum context length is 4096 tokens."}}'),
            PromptTooLong,
            "4096",
        ),
        (
            Reply(status=400, body='{"error":{"code":400,"message":"too large","type":"exceed_context_size_error"}}'),
            PromptTooLong,
            "too large",
        ),
        (Reply(status=403, body='{"detail":"not for you"}'), RequestRejected, r"HTTP 403\): not for you$"),
        (Reply(status=402, body='{"message":"no credit"}'), RequestRejected, "no credit"),
        (Reply(status=413, body="<html><title>413 Too Large</title>"), PromptTooLong, "413 Too Large"),
        (Reply(status=400, body=f'{{"detail":[{{"msg":"extra {KEY}"}}]}}'), RequestRejected, "extra …"),
        (
            Reply(
                status=422, body='{"detail":[{"loc":["body","messages",0,"role"],"msg":"Field required"},{"msg":3}]}'
            ),
            RequestRejected,
            r'messages\.0\.role: Field required; \{"msg": 3\}$',
        ),
        (Reply(status=422, body="<html>no <b>way</b></html>"), RequestRejected, r"\): no way$"),
        (
            Reply(status=500, body="<!doctype HTML>\n<head><title>\n500 it&#39;s me </title></head><h1>x</h1>"),
            EngineFailed,
            r"HTTP 500\): 500 it's me$",
        ),
        (Reply(status=400, body='{"error":"no such field"}'), RequestRejected, r"\): no such field$"),
        (Reply(status=400, body='{"error":null,"message":"no field"}'), RequestRejected, r"\): no field$"),
        (Reply(raw=f'{{"error":{{"message":"lost {KEY}"}}}}'.encode()), EngineFailed, r"HTTP 200\): lost …$"),
        (Reply(texts=(), events=['{"object":"error","message":"GPU lost","code":500}']), EngineFailed, r": GPU lost$"),
        (Reply(status=307, headers={"Location": "/v2/chat"}), RequestRejected, "HTTP 307"),
        (Reply(status=500, body='{"message":"CUDA out of memory"}'), EngineFailed, "CUDA out of memory"),
        (Reply(raw=b"<!DOCTYPE html><title>Welcome</title>"), MalformedAnswer, "Welcome"),
        (Reply(raw=b'data: {"choices": 3}\n\n'), MalformedAnswer, "choices"),
        (Reply(raw=b"data: [1, 2]\n\n"), MalformedAnswer, "1, 2"),
        (Reply(raw=f"data: not JSON {KEY}\n\n".encode()), MalformedAnswer, "not JSON …"),
        (Reply(raw=b"data: " + b"[" * 100_000 + b"\n\n"), MalformedAnswer, r"\[\["),
        (Reply(raw=b""), AnswerCut, "ended early"),
        (Reply(hangs_up=True), EngineUnreachable, r"/v1: Remote end closed connection without response\.$"),
        (Reply(texts=(), events=[json.dumps({"error": {"message": "GPU lost"}})]), EngineFailed, "GPU lost"),
    ],
)
def test_a_failure_before_the_answer_is_an_error_and_takes_the_question_back(
    engine: EngineServer, reply: Reply, error: type[QwenlocalError], words: str
) -> None:
    engine.replies = [reply]
    talk = open_conversation(engine, key=KEY)
    with pytest.raises(error, match=words) as caught:
        list(talk.ask("Hi"))
    assert KEY not in f"{caught.value} {caught.value.hint} {vars(caught.value)}"
    assert caught.value.hint
    assert talk.thread.path == []
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("", "--api-key-env VARIABLE"),
        ("MY_KEY", "export MY_KEY=KEY"),
        (KEYRING, r"keyring set qwenlocal 127\.0\.0\.1:\d+"),
    ],
)
def test_a_rejected_key_says_where_to_set_another_one(engine: EngineServer, source: str, hint: str) -> None:
    engine.replies = [Reply(status=401)]
    client = RemoteClient(Endpoint(engine.url, api_key=KEY if source else "", key_source=source))
    with pytest.raises(ApiKeyRejected) as caught:
        list(Conversation(RemoteBackend(client, "m"), GenerationConfig()).ask("Hi"))
    assert re.search(hint, caught.value.hint)


def test_the_names_of_the_models_are_listed_if_one_is_unknown(engine: EngineServer) -> None:
    engine.replies = [Reply(status=404)]
    with pytest.raises(RemoteModelNotFound) as caught:
        list(open_conversation(engine).ask("Hi"))
    assert caught.value.available == ("tiny-chat", "large-chat")
    assert "large-chat" in caught.value.hint


def test_a_404_without_a_list_of_models_questions_the_address(engine: EngineServer) -> None:
    engine.models, engine.replies = None, [Reply(status=404)]
    with pytest.raises(RequestRejected) as caught:
        list(open_conversation(engine).ask("Hi"))
    assert "/v1" in caught.value.hint


def test_a_rate_limit_says_when_to_try_again(engine: EngineServer) -> None:
    engine.replies = [Reply(status=429, headers={"Retry-After": "60"})]
    with pytest.raises(RateLimited) as caught:
        list(open_conversation(engine).ask("Hi"))
    assert (caught.value.retry_after, caught.value.hint) == (60, "Try again in 60 s.")


def test_a_busy_engine_is_asked_again(engine: EngineServer) -> None:
    engine.replies = [Reply(status=503), Reply()]
    assert text_of(list(open_conversation(engine).ask("Hi"))) == SAYS
    assert len(engine.requests) == 2


def test_an_address_where_nothing_answers_is_named(engine: EngineServer) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    talk = Conversation(RemoteBackend(RemoteClient(Endpoint(url)), "m"), GenerationConfig())
    with pytest.raises(EngineUnreachable, match=f"{url}: Connection refused"):
        list(talk.ask("Hi"))


def test_an_answer_that_breaks_off_is_kept_and_can_be_continued(engine: EngineServer) -> None:
    engine.replies = [Reply(cut=True)]
    talk, events = open_conversation(engine), list[Event]()
    with pytest.raises(AnswerCut):
        events.extend(talk.ask("Hi"))
    answer = talk.thread.last
    assert answer and (answer.text, answer.finish_reason) == (SAYS, FinishReason.INTERRUPTED.value)
    engine.replies = [Reply((" and", " food"))]
    list(talk.continue_answer())
    assert (answer.text, answer.finish_reason) == (f"{SAYS} and food", FinishReason.EOS.value)
    request = engine.requests[-1]
    assert request["messages"][-1] == {"role": "assistant", "content": SAYS, "partial": True}
    assert (request["continue_final_message"], request["add_generation_prompt"]) == (True, False)


def test_a_stream_that_stalls_is_cut(engine: EngineServer) -> None:
    engine.replies = [Reply(pause=5)]
    talk = open_conversation(engine, stall=0.2)
    with pytest.raises(AnswerCut, match="no data"):
        list(talk.ask("Hi"))
    assert talk.thread.last and talk.thread.last.text == ANSWER[0]


@pytest.mark.parametrize(
    ("last", "error", "words"),
    [
        ('{"error": {"message": "GPU lost"}}', EngineFailed, "GPU lost"),
        (f'{{"choices": "and a key: {KEY} {KEY}"', AnswerCut, r"malformed data \(.*…"),
    ],
)
def test_an_error_in_the_middle_of_an_answer_keeps_its_text(
    engine: EngineServer, last: str, error: type[QwenlocalError], words: str
) -> None:
    engine.replies = [Reply((), events=[chunk(delta={"content": "Half"}), last])]
    talk = open_conversation(engine, key=KEY)
    with pytest.raises(error, match=words) as caught:
        list(talk.ask("Hi"))
    assert KEY[:8] not in f"{caught.value} {vars(caught.value)}"
    assert talk.thread.last and talk.thread.last.text == "Half"


# --- stopping


@pytest.mark.parametrize("reply", [Reply(itertools.repeat("more "), pause=0.01), Reply(wait=30)], ids=["text", "head"])
def test_stopping_closes_the_connection(engine: EngineServer, reply: Reply) -> None:
    """Both while the answer comes, and while the engine reads the prompt and has not sent anything."""
    engine.replies = [reply]
    talk = open_conversation(engine)
    with iterate_in_thread(lambda: talk.ask("Hi"), talk.stop) as events:
        if not reply.wait:
            next(events)
        while not engine.requests:
            time.sleep(0.01)
        talk.stop()
        done = last_event(list(events))
    assert done.finish_reason is FinishReason.INTERRUPTED
    assert engine.hung_up.wait(10)


def test_connecting_can_be_cancelled() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        client = RemoteClient(Endpoint(f"http://127.0.0.1:{full.getsockname()[1]}/v1"), Timeouts(30, 30))
        talk = Conversation(RemoteBackend(client, "m"), GenerationConfig())
        start = time.monotonic()
        with iterate_in_thread(lambda: talk.ask("Hi"), talk.stop) as events:
            time.sleep(0.2)
            talk.stop()
            assert last_event(list(events)).finish_reason is FinishReason.INTERRUPTED
        assert time.monotonic() - start < 10
        for one in waiting:
            one.close()


# --- server-sent events


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40).map(str.encode), st.lists(st.integers(0, 60), max_size=6))
def test_events_do_not_depend_on_how_the_bytes_are_split(text: bytes, places: list[int]) -> None:
    stream = b"data: a\r\n\r\ndata:b\rdata: c\r\r" + text + b"\n\ndata: d\n\n"
    cuts = sorted({0, len(stream), *(place for place in places if place < len(stream))})
    pieces = [stream[start:end] for start, end in itertools.pairwise(cuts)]
    assert list(parse_events(pieces)) == list(parse_events([stream]))


def test_an_endless_event_is_refused() -> None:
    with pytest.raises(EventTooLarge):
        list(parse_events(itertools.chain([b"data: "], itertools.repeat(b"x" * (1 << 20)))))
    with pytest.raises(EventTooLarge):
        list(parse_events(itertools.repeat(b"data: " + b"x" * (1 << 20) + b"\n")))


# --- endpoints


def test_endpoints_have_names_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.toml"
    path.write_text('[vllm]\nurl = "http://gpu:8000/v1/"\napi_key_env = "K"\nmodel = "Qwen/Qwen1.5-72B-Chat"\n')
    found = find_endpoint(path, None, "vllm:other:7b", None, {"K": KEY})
    assert found and found[0].url == "http://gpu:8000/v1" and found[0].api_key == KEY and found[1] == "other:7b"
    assert KEY not in repr(found)
    for name in ("vllm", "vllm:"):
        found = find_endpoint(path, None, name, None, {"K": KEY})
        assert found and found[1] == "Qwen/Qwen1.5-72B-Chat"
    for name in ("qwen1.5:7b", "hf:owner/repo", "./vllm:x", None, "https://host/model.gguf"):
        assert find_endpoint(path, None, name, None, {}) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[vllm", "Cannot use the endpoints"),
        ("x = 1", "has no url"),
        ("[vllm]\nmodel = 'm'", "has no url"),
        ("[vllm]\nurl = 'http://h/v1'\napi_key = 'sk-1'", "has an API key in it"),
        ("[vllm]\nurl = 'http://h/v1'\nkey = 'x'", "unknown field or value: key"),
        ("[vllm]\nurl = 'http://h/v1'\nmodel = 3", "unknown field or value: model"),
        ("[hf]\nurl = 'http://h/v1'", "cannot be the name"),
        ("[vllm]\nurl = 'gpu:8000'", "is not the URL"),
    ],
)
def test_a_wrong_file_of_endpoints_is_explained(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "endpoints.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=problem) as caught:
        read_endpoints(path)
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "gpu:8000", "ftp://h/v1", "http://", "http://h:x/v1", "http://[::1/v1"])
def test_invalid_addresses_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not the URL"):
        parse_url(url)


def test_a_password_in_an_address_is_refused_without_repeating_it() -> None:
    with pytest.raises(UsageError) as caught:
        parse_url("http://me:secret@h/v1")
    assert "secret" not in f"{caught.value} {caught.value.hint}"


def test_a_key_comes_from_the_environment_or_the_keyring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, url = tmp_path / "endpoints.toml", "http://gpu:8000/v1"
    with pytest.raises(UsageError, match="variable K is not set"):
        find_endpoint(path, url, "m", "K", {})
    with pytest.raises(UsageError, match="contains invalid characters") as caught:
        find_endpoint(path, url, "m", "K", {"K": "sk\nsecret"})
    assert "secret" not in str(caught.value)
    (tmp_path / "keyring.py").write_text(f"def get_password(service, user): return {KEY!r} + service + user")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "keyring", raising=False)
    found = find_endpoint(path, url, "m", None, {})
    monkeypatch.delitem(sys.modules, "keyring")
    assert found and found[0].api_key == f"{KEY}qwenlocalgpu:8000"
