"""`qwenlocal run` uses the model that a running server has loaded; otherwise, servers make no difference."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import expect_exit
from conftest import Run
from server_process import DEADLINE, Server, serving
from terminal import Open, start_chat

from qwenlocal.library.running_servers import RunningServer, announce_server, find_running_servers
from qwenlocal.library.store import ModelRecord, Store, StoredFile
from qwenlocal.paths import Folders

NOTICE = "Using the server at"


def wait_until_loaded(folders: Folders) -> None:
    """Wait until `run` can find a server."""
    end = time.monotonic() + DEADLINE
    while not find_running_servers(folders.servers):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def server(speaking_model: Path, folders: Folders) -> Iterator[Server]:
    with serving(folders.home, speaking_model) as server:
        wait_until_loaded(folders)
        yield server


def test_an_answer_comes_from_the_server(server: Server, qwenlocal: Run, speaking_model: Path) -> None:
    result = qwenlocal("run", str(speaking_model), "Hello", "--stats")
    assert expect_exit(result, 0).startswith(f"{NOTICE} {server.url}")
    assert result.stdout == "Paris, fun\n"
    assert "answer 11 tokens" in result.stderr and "weights" not in result.stderr


def test_the_model_is_loaded_here_on_request(server: Server, qwenlocal: Run, speaking_model: Path) -> None:
    for options in (("--no-server",), ("-c", "1024"), ("--no-lookup",)):
        result = qwenlocal("run", str(speaking_model), "Hello", "--stats", *options)
        assert result.stdout == "Paris, fun\n"
        assert NOTICE not in result.stderr and "weights" in result.stderr


def test_other_models_are_loaded_here(server: Server, qwenlocal: Run, endless_model: Path) -> None:
    result = qwenlocal("run", str(endless_model), "Hello", "-n", "3", "--stats")
    assert NOTICE not in expect_exit(result, 0)


def test_the_meaning_of_a_name_is_said_once(
    server: Server, qwenlocal: Run, folders: Folders, speaking_model: Path, endless_model: Path
) -> None:
    for size, model in (("1.8b", endless_model), ("4b", speaking_model)):
        files = [StoredFile.from_path(model, "")]
        Store(folders).add(ModelRecord(f"qwen1.5:{size}-chat-q4_k_m", files, "a file on this disk", owned=False))
        errors = expect_exit(qwenlocal("run", f"qwen1.5:{size}", "Hello", "-n", "3", "--stats"), 0)
        assert errors.count(f"qwen1.5:{size} is ") == 1
        assert (NOTICE in errors) is (model == speaking_model)


def test_grammars_and_stop_strings_work_as_without_a_server(
    server: Server, qwenlocal: Run, speaking_model: Path, tmp_path: Path
) -> None:
    assert qwenlocal("run", str(speaking_model), "Hello", "--stop", ", f").stdout == "Paris\n"
    grammar = tmp_path / "answer.gbnf"
    grammar.write_text('root ::= "yes" | "no"')
    assert qwenlocal("run", str(speaking_model), "Hello", "--grammar", str(grammar)).stdout in ("yes\n", "no\n")


def test_a_chat_counts_its_tokens_and_keeps_its_branches(server: Server, terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hello", "Paris, fun")
    chat.enter("/ctx", "512")
    chat.enter("/retry", "Paris, fun")
    chat.enter("/model qwen1.5:7b", "--no-server")
    chat.wait_for(NOTICE)


def test_a_long_chat_loses_its_oldest_turns(server: Server, terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    for number in range(4):
        chat.enter(f"{number} " + "x" * 120, "Paris, fun")
    chat.wait_for("oldest")


def test_ctrl_c_stops_an_answer_of_the_server(
    endless_model: Path, folders: Folders, environment: dict[str, str]
) -> None:
    with serving(folders.home, endless_model, "-c", "8192"):
        wait_until_loaded(folders)
        command = [sys.executable, "-m", "qwenlocal", "run", str(endless_model), "Hello", "--server"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 130 and "Traceback" not in errors


def test_a_server_with_keys_lets_its_own_user_in(speaking_model: Path, folders: Folders, qwenlocal: Run) -> None:
    with serving(folders.home, speaking_model, "--api-key", "secret-key") as server:
        wait_until_loaded(folders)
        result = qwenlocal("run", str(speaking_model), "Hello", "--server")
        expect_exit(result, 0)
        assert result.stdout == "Paris, fun\n"
        (path,) = folders.servers.glob("*.json")
        assert path.stat().st_mode & 0o077 == 0
        key = json.loads(path.read_text())["key"]
        assert key and key != "secret-key"
        assert server.ask().status_code == 401


def test_a_server_that_ends_leaves_no_trace(speaking_model: Path, folders: Folders, qwenlocal: Run) -> None:
    with serving(folders.home, speaking_model):
        wait_until_loaded(folders)
    assert find_running_servers(folders.servers) == []
    result = qwenlocal("run", str(speaking_model), "Hello", "--server")
    assert "No running server" in expect_exit(result, 2) and "qwenlocal serve" in result.stderr
    assert qwenlocal("run", str(speaking_model), "Hello").stdout == "Paris, fun\n"


def test_files_of_servers_that_were_killed_are_deleted(tmp_path: Path) -> None:
    with announce_server(tmp_path, "http://127.0.0.1:1", tmp_path / "x.gguf", 512, ""):
        (server,) = find_running_servers(tmp_path)
        assert server.pid == os.getpid() and server.started == psutil.Process().create_time()
    assert find_running_servers(tmp_path) == []
    (tmp_path / "1.json").write_text("{nonsense")
    (tmp_path / "2.json").write_text(json.dumps({**vars(server), "started": 0.0}))
    (tmp_path / "3.json").write_text(json.dumps({**vars(server), "pid": 2**22 + 1}))
    assert find_running_servers(tmp_path) == []
    assert list(tmp_path.glob("*.json")) == []
    assert isinstance(server, RunningServer)


def test_options_for_loading_cannot_be_combined_with_a_server(
    server: Server, qwenlocal: Run, speaking_model: Path
) -> None:
    result = qwenlocal("run", str(speaking_model), "Hello", "--server", "-c", "1024")
    assert "-c cannot be combined with --server" in expect_exit(result, 2)
