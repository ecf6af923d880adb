"""`qwenlocal run` with a remote engine: single answers, pipes, and the chat in a real pseudo-terminal."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import expect_exit
from conftest import Run
from engine_server import ANSWER, USAGE, EngineServer, Reply
from terminal import Open, save_messages, start_chat

from qwenlocal.chat.journal import Journal
from qwenlocal.paths import Folders

SAYS = "".join(ANSWER)
KEY = "sk-secret-0123456789"


@pytest.fixture
def engine() -> Iterator[EngineServer]:
    with EngineServer() as server:
        yield server


def name_endpoint(folders: Folders, engine: EngineServer, *lines: str) -> None:
    folders.home.mkdir(parents=True, exist_ok=True)
    folders.endpoints.write_text("\n".join(["[vllm]", f'url = "{engine.url}"', *lines]))


# --- single answers


def test_one_answer_is_printed(qwenlocal: Run, engine: EngineServer) -> None:
    result = qwenlocal("run", "--url", engine.url, "-m", "large-chat", "Hi", "there", "--temp", "0")
    expect_exit(result, 0)
    assert (result.stdout, result.stderr) == (f"{SAYS}\n", "")
    (request,) = engine.requests
    assert (request["model"], request["temperature"]) == ("large-chat", 0.0)
    assert request["messages"] == [{"role": "user", "content": "Hi there"}]
    assert "top_k" not in request


def test_text_from_a_pipe_is_appended_and_a_system_prompt_sent(qwenlocal: Run, engine: EngineServer) -> None:
    result = qwenlocal("run", "--url", engine.url, "-m", "m", "Sum up:", "--system", "Be brief.", input="a\nb\n")
    expect_exit(result, 0)
    system, question = engine.requests[0]["messages"]
    assert (system["content"], question["content"]) == ("Be brief.", "Sum up:\n\na\nb")


def test_statistics_are_those_of_the_engine(qwenlocal: Run, engine: EngineServer) -> None:
    result = qwenlocal("run", "--url", engine.url, "-m", "m", "Hi", "--stats")
    assert re.search(r"^prompt 21 tokens \(16 reused\), .*answer 3 tokens.*end of answer$", result.stderr)
    engine.replies = [Reply()]
    result = qwenlocal("run", "--url", engine.url, "-m", "m", "Hi", "--stats")
    assert re.fullmatch(r"first token after \d\.\d\d s \| end of answer\n", result.stderr)


def test_the_only_model_needs_no_name_and_one_of_several_does(qwenlocal: Run, engine: EngineServer) -> None:
    error = expect_exit(qwenlocal("run", "--url", engine.url, "Hi"), 2)
    assert "tiny-chat, large-chat" in error and "-m NAME" in error
    engine.models = ["only-one"]
    expect_exit(qwenlocal("run", "--url", engine.url, "Hi"), 0)
    assert engine.requests[0]["model"] == "only-one"


def test_an_unknown_model_exits_with_3_and_lists_the_known_ones(qwenlocal: Run, engine: EngineServer) -> None:
    engine.replies = [Reply(status=404, body='{"error":{"message":"no"}}')]
    error = expect_exit(qwenlocal("run", "--url", engine.url, "-m", "tiny", "Hi"), 3)
    assert "has no model “tiny”" in error and "tiny-chat" in error


def test_json_answers_are_asked_for_and_checked(qwenlocal: Run, engine: EngineServer, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    engine.replies = [Reply(('{"city": ', '"Paris"}')), Reply(('{"city": ',), finish_reason="length"), Reply()]
    result = qwenlocal("run", "--url", engine.url, "-m", "m", "Where?", "--schema", "s.json")
    expect_exit(result, 0)
    assert json.loads(result.stdout) == {"city": "Paris"}
    assert engine.requests[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    assert "token limit" in expect_exit(qwenlocal("run", "--url", engine.url, "-m", "m", "Where?", "--json"), 8)
    assert engine.requests[1]["response_format"] == {"type": "json_object"}
    assert "not complete JSON" in expect_exit(qwenlocal("run", "--url", engine.url, "-m", "m", "Where?", "--json"), 8)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["-c", "4096"], "-c"),
        (["-ngl", "0", "--no-lookup"], "-ngl, --no-lookup"),
        (["--draft", "starter"], "--draft"),
        (["--overflow", "stop"], "--overflow"),
        (["--raw"], "--raw"),
        (["--batch", "x.txt"], "--batch"),
    ],
)
def test_options_of_local_models_are_refused_by_name(
    qwenlocal: Run, engine: EngineServer, options: list[str], named: str
) -> None:
    words = [] if "--batch" in options else ["Hi"]
    error = expect_exit(qwenlocal("run", "--url", engine.url, "-m", "m", *words, *options), 2)
    assert f"{named}: only for models on this machine" in error
    assert not engine.requests


def test_a_broken_answer_is_printed_and_exits_with_4(qwenlocal: Run, engine: EngineServer) -> None:
    engine.replies = [Reply(cut=True)]
    result = qwenlocal("run", "--url", engine.url, "-m", "m", "Hi")
    assert "is incomplete" in expect_exit(result, 4)
    assert result.stdout == f"{SAYS}\n"


def test_ctrl_c_ends_a_single_answer_and_the_connection(
    engine: EngineServer, environment: dict[str, str], tmp_path: Path
) -> None:
    engine.replies = [Reply(wait=60)]
    command = [sys.executable, "-m", "qwenlocal", "run", "--url", engine.url, "-m", "m", "Hi"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE) as program:
        deadline = time.monotonic() + 30
        while not engine.requests:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.send_signal(signal.SIGINT)
        assert program.wait(10) == 130
    assert engine.hung_up.wait(5)


# --- keys and names


def test_a_key_reaches_the_engine_and_nothing_else(
    qwenlocal: Run, engine: EngineServer, folders: Folders, tmp_path: Path
) -> None:
    options = ("--url", engine.url, "-m", "m", "--api-key-env", "MY_KEY", "Hi")
    variables = {"MY_KEY": KEY}
    expect_exit(qwenlocal("run", *options, environment=variables), 0)
    assert engine.keys == [f"Bearer {KEY}"]
    engine.replies = [Reply(status=401, body=f'{{"error":{{"message":"bad key {KEY}"}}}}')]
    error = expect_exit(qwenlocal("run", *options, environment=variables), 4)
    assert "refuses the API key in MY_KEY" in error and KEY not in error
    assert "MY_KEY is not set" in expect_exit(qwenlocal("run", *options), 2)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert written == []


def test_without_a_key_an_engine_that_wants_one_names_the_option(qwenlocal: Run, engine: EngineServer) -> None:
    engine.replies = [Reply(status=401)]
    error = expect_exit(qwenlocal("run", "--url", engine.url, "-m", "m", "Hi"), 4)
    assert "needs an API key" in error and "--api-key-env VARIABLE" in error


def test_a_named_endpoint_wins_over_the_catalog_only_if_it_is_defined(
    qwenlocal: Run, engine: EngineServer, folders: Folders
) -> None:
    result = qwenlocal("run", "vllm:Qwen/Qwen1.5-72B-Chat", "Hi")
    assert "No model is called" in expect_exit(result, 3)
    name_endpoint(folders, engine, 'api_key_env = "MY_KEY"')
    expect_exit(qwenlocal("run", "vllm:Qwen/Qwen1.5-72B-Chat", "Hi", environment={"MY_KEY": KEY}), 0)
    assert (engine.requests[0]["model"], engine.keys[-1]) == ("Qwen/Qwen1.5-72B-Chat", f"Bearer {KEY}")


def test_api_key_env_without_an_endpoint_is_refused(qwenlocal: Run, speaking_model: Path) -> None:
    error = expect_exit(qwenlocal("run", str(speaking_model), "Hi", "--api-key-env", "K"), 2)
    assert "--api-key-env needs --url" in error


# --- chats


def test_questions_are_typed_stopped_edited_and_saved(
    terminal: Open, engine: EngineServer, journal: Callable[[], Journal], tmp_path: Path
) -> None:
    engine.replies = [Reply(usage=USAGE), Reply(itertools.repeat("more "), pause=0.02), Reply((" enough",)), Reply()]
    chat = start_chat(terminal, "--url", engine.url, "-m", "tiny-chat")
    assert f"Your messages and files are sent to {engine.url}" in chat.text
    chat.enter("First", re.escape(SAYS))
    chat.wait_for_prompt(2)
    chat.enter("Second", "more more more")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\] Type /continue for more")
    assert engine.hung_up.wait(5)
    chat.enter("/continue", "enough")
    chat.enter("/edit 1", r"Edit it below.*^> First$")
    chat.enter("!", r"^> First!$.*" + re.escape(SAYS))
    chat.enter("/branch", r"^  2 ")
    assert engine.questions[-1] == "First!"
    assert [message["content"] for message in save_messages(chat, tmp_path)] == ["First!", SAYS]
    assert chat.exit() == 0
    thread = journal().load_thread(1)
    texts = [message.text for message in thread.messages.values()]
    assert texts[:2] == ["First", SAYS] and texts[2] == "Second"
    assert texts[3].startswith("more more") and texts[3].endswith(" enough")
    assert journal().get_chat(1).model == f"{engine.url}#tiny-chat"
    assert all(message.finish_reason != "" for message in thread.messages.values() if message.role == "assistant")


def test_a_chat_continues_with_the_same_engine(terminal: Open, engine: EngineServer, folders: Folders) -> None:
    first = start_chat(terminal, "--url", engine.url, "-m", "tiny-chat")
    first.enter("Remember me", re.escape(SAYS))
    first.wait_for_prompt(2)
    assert first.exit() == 0
    second = terminal("run", "--continue")
    second.wait_for("Continuing chat 1")
    second.wait_for(r"^>$")
    second.enter("And me", re.escape(SAYS) + ".*" + re.escape(SAYS))
    request = engine.requests[-1]
    assert request["model"] == "tiny-chat"
    assert [message["content"] for message in request["messages"]] == ["Remember me", SAYS, "And me"]


def test_models_are_listed_and_switched(terminal: Open, engine: EngineServer, folders: Folders) -> None:
    name_endpoint(folders, engine, 'model = "tiny-chat"')
    chat = start_chat(terminal, "vllm:")
    chat.enter("/model", "Current model: tiny-chat.*large-chat")
    chat.enter("/model huge-chat", "has no model “huge-chat”. Available models: .*large-chat")
    chat.enter("/model large-chat", r"Switched to large-chat\.$")
    chat.enter("Hi", re.escape(SAYS))
    chat.wait_for_prompt(5)
    chat.type("/model ti\t")
    chat.wait_for("^> /model tiny-chat")
    assert engine.requests[0]["model"] == "large-chat"


def test_data_that_the_engine_does_not_report_is_not_shown(
    terminal: Open, engine: EngineServer, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("The password is swordfish.")
    chat = start_chat(terminal, "--url", engine.url, "-m", "tiny-chat")
    chat.enter("What does @notes.txt say?", r"notes.txt: 26 characters.*" + re.escape(SAYS))
    assert "swordfish" in engine.questions[0]
    chat.wait_for_prompt(2)
    assert not re.search(r"of [\d,]+ tokens", chat.text)
    for command in ("/ctx", "/tokens", "/pin", "/set overflow stop"):
        chat.enter(f"\x15{command}", f"{command.removesuffix(' stop')} needs token counts, which tiny-chat does not")
    chat.enter("/set", r"temperature +default .*presence_penalty +default ")
    assert not re.search("^  overflow ", chat.text, re.M)
    chat.enter("/set presence_penalty 0.5", "presence_penalty is now 0.5")
    chat.enter("/set temperature 0.3", "temperature is now 0.3")
    chat.enter("/set temperature", "temperature is 0.3")
    chat.enter("/drop 1", "Dropped")
    chat.enter("Hi", r"^> Hi$.*" + re.escape(SAYS))
    request = engine.requests[-1]
    assert (request["temperature"], request["presence_penalty"], len(request["messages"])) == (0.3, 0.5, 1)
    assert "frequency_penalty" not in request


def test_a_question_that_fails_is_the_text_of_the_next_line(terminal: Open, engine: EngineServer) -> None:
    engine.replies = [Reply(status=500, body='{"error":{"message":"CUDA out of memory"}}'), Reply()]
    chat = start_chat(terminal, "--url", engine.url, "-m", "tiny-chat")
    chat.enter("Hi there", r"CUDA out of memory.*^> Hi there$")
    chat.enter("", re.escape(SAYS))
    assert engine.questions == ["Hi there", "Hi there"]


def test_a_broken_answer_stays_on_the_screen_and_can_be_continued(terminal: Open, engine: EngineServer) -> None:
    engine.replies = [Reply(cut=True), Reply((" and food",))]
    chat = start_chat(terminal, "--url", engine.url, "-m", "tiny-chat")
    chat.enter("Hi", re.escape(SAYS) + r".*is incomplete.*/continue")
    chat.wait_for_prompt(2)
    chat.enter("/continue", "and food")


def test_escape_sequences_of_an_engine_never_reach_the_terminal(terminal: Open, engine: EngineServer) -> None:
    engine.models = ["a\x1b]0;pwn\x07b", "c"]
    engine.replies = [Reply(("a\x1b]0;pwn\x07b",)), Reply(status=500, body='{"error":"a\\u001b]0;pwn\\u0007b"}')]
    chat = start_chat(terminal, "--url", engine.url, "-m", "tiny-chat")
    chat.enter("Hi", "a␛]0;pwn␇b")
    chat.enter("Again", r"failed.*pwn")
    chat.enter("\x15/model", "Current model")
    assert b"\x1b]0;pwn" not in chat.raw
