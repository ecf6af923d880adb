"""`qwenlocal serve`: from the command to an answer over HTTP, and to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from server_process import DEADLINE, Server, serving

from qwenlocal.chat.journal import Journal
from qwenlocal.cli.commands.serve import (
    parse_duration,
    parse_host,
    parse_origin,
    parse_parallel,
    read_api_keys,
    read_page_key,
)
from qwenlocal.errors import OutOfRange, UsageError
from qwenlocal.server.listener import is_loopback, open_socket


def fail(home: Path, *arguments: object) -> tuple[int, str]:
    """Return the exit code and the message of a server that does not start."""
    command = [sys.executable, "-m", "qwenlocal", "serve", *map(str, arguments)]
    env = {**os.environ, "QWENLOCAL_HOME": str(home), "LC_ALL": "C.UTF-8"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stderr


def wait_for_line(server: Server, text: str) -> str:
    """Return the first line of a server's terminal that contains `text`."""
    end = time.monotonic() + DEADLINE
    while not (lines := [line for line in server.lines if text in line]):
        assert time.monotonic() < end
        time.sleep(0.01)
    return lines[0]


def test_the_first_line_names_address_model_and_memory(speaking_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, speaking_model) as server:
        assert server.ask().json()["choices"][0]["message"]["content"] == "Paris, fun"
        assert server.lines[0].startswith(f"{server.url} serves {speaking_model}: weights ")
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_tokenizer_is_described(speaking_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, speaking_model) as server:
        tokenizer = httpx.get(f"{server.url}/tokenizer_info", timeout=DEADLINE).json()
        assert tokenizer == {"bos_token": None, "eos_token": "<|im_end|>"}


def test_the_curl_command_of_the_announcement_works(speaking_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, speaking_model) as server:
        data = {
            "model": str(speaking_model),
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "Tell me something about large language models."},
            ],
        }
        command = ["curl", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
        result = subprocess.run([*command, "-d", json.dumps(data)], capture_output=True, check=True)
        assert json.loads(result.stdout)["choices"][0]["message"]["content"] == "Paris, fun"


def test_sigterm_lets_answers_finish(endless_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, endless_model) as server:
        server.ask(max_tokens=1)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        assert server.process.wait(DEADLINE) == 0


def workers(server: psutil.Process) -> set[psutil.Process]:
    return {child for child in server.children() if "spawn_main" in " ".join(child.cmdline())}


def test_a_server_that_is_killed_leaves_no_process_that_compiles_a_grammar(
    speaking_model: Path, tmp_path: Path
) -> None:
    patterns = [{"type": "string", "pattern": f"a{{{number}}}"} for number in range(30)]  # takes hours
    form = {"type": "json_object", "schema": {"allOf": patterns}}
    with serving(tmp_path, speaking_model) as server, ThreadPoolExecutor() as threads:
        server.ask(max_tokens=1)
        process = psutil.Process(server.process.pid)
        (model,) = workers(process)
        asked = threads.submit(server.ask, response_format=form)
        while not (compilers := workers(process) - {model}):
            time.sleep(0.01)
        (compiler,) = compilers
        while compiler.cpu_times().user < 0.8:  # it compiles
            time.sleep(0.01)
        process.kill()
        assert isinstance(asked.exception(DEADLINE), httpx.HTTPError)
        assert not psutil.wait_procs([model, compiler], DEADLINE)[1]


def test_ctrl_c_ends_the_server_and_the_processes_of_its_models(endless_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, endless_model) as server:
        server.ask(max_tokens=1)
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(DEADLINE) == 0
        _, alive = psutil.wait_procs(children, timeout=DEADLINE)
        assert not alive


def test_a_killed_server_leaves_no_process(endless_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, endless_model) as server:
        server.ask(max_tokens=1)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=DEADLINE)
        assert not alive


def test_a_client_that_disconnects_frees_its_slot(endless_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, endless_model, "--parallel", "1", "-c", "8192") as server:
        server.ask(max_tokens=1)
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
        for _ in range(3):
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE) as response:
                next(response.iter_lines())
        started = time.monotonic()
        assert server.ask(max_tokens=3).status_code == 200
        assert time.monotonic() - started < DEADLINE / 2


def test_other_addresses_need_a_key(speaking_model: Path, tmp_path: Path) -> None:
    code, message = fail(tmp_path, speaking_model, "--host", "0.0.0.0")
    assert code == 2 and "needs a key" in message and "--api-key-file" in message


def test_keys_from_a_file_are_required(speaking_model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# my laptop\nfirst-key\n\n  # phone\n  second-key \r\n")
    with serving(tmp_path, speaking_model, "--api-key-file", keys) as server:
        assert server.ask().status_code == 401
        for other in ("#", "my", "laptop"):
            assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": other}).status_code == 401
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        url = f"{server.url}/v1/chat/completions"
        assert httpx.post(url, json=body, headers={"Authorization": "Bearer second-key"}).status_code == 200


def test_keys_are_read_from_lines_without_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# my laptop\nfirst#key\n\n  second-key \n")
    assert read_api_keys(path) == ["first#key", "second-key"]


@pytest.mark.parametrize(
    ("text", "reason"), [("a\nkey # laptop\n", "line 2"), ("# only a comment\n", "no key"), ("", "no key")]
)
def test_files_with_spaces_in_keys_or_without_keys_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UsageError, match=reason) as caught:
        read_api_keys(path)
    assert "one key per line" in caught.value.hint


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.255.255.254", "localhost", "::1"])
def test_addresses_of_this_machine_need_no_key(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "2001:db8::1"])
def test_addresses_that_others_can_reach_are_no_loopback_addresses(host: str) -> None:
    assert not is_loopback(host)


def test_a_server_for_other_machines_says_after_its_address_who_can_use_it(
    speaking_model: Path, tmp_path: Path
) -> None:
    with serving(tmp_path, speaking_model, "--host", "0.0.0.0", "--api-key", "k") as server:
        wait_for_line(server, "#key=")
        assert server.lines[0].startswith("http://0.0.0.0:")
        assert "has a key" in server.lines[1] and "--tls-cert" in server.lines[2]


def test_a_port_in_use_names_its_holder(speaking_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        code, message = fail(tmp_path, speaking_model, "--port", holder.getsockname()[1])
    assert code == 2 and f"({os.getpid()})" in message and "--port" in message


def test_responses_do_not_wait_for_acknowledgements() -> None:
    async def read_option() -> int:
        option = asyncio.get_running_loop().create_future()

        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            option.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = open_socket("127.0.0.1", 0)
        async with await asyncio.start_server(answer, sock=listener):
            with socket.create_connection(listener.getsockname()):
                return int(await option)

    assert asyncio.run(read_option())


def test_a_model_that_cannot_be_loaded_ends_the_server(random_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(random_model.read_bytes()[:2000])
    code, message = fail(tmp_path, path, "--port", "0")
    assert code == 5 and str(path) in message


def test_a_model_that_cannot_be_loaded_later_is_reported_on_the_terminal(
    speaking_model: Path, random_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "second.gguf"
    path.write_bytes(random_model.read_bytes())
    with serving(tmp_path, speaking_model, path) as server:
        assert server.ask(max_tokens=1).status_code == 200
        path.write_bytes(random_model.read_bytes()[:2000])
        assert server.ask(model=str(path)).status_code >= 400
        assert str(path) in wait_for_line(server, "Cannot load")
        assert server.ask(max_tokens=1).status_code == 200


def test_a_damaged_certificate_is_refused(speaking_model: Path, tmp_path: Path) -> None:
    certificate = tmp_path / "server.crt"
    certificate.write_text("not a certificate")
    files = ("--tls-cert", certificate, "--tls-key", certificate)
    code, message = fail(tmp_path, speaking_model, "--port", "0", *files)
    assert code == 2 and str(certificate) in message and "PEM" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("--parallel", "0"),
        ("--parallel", "many"),
        ("--keep-alive", "soon"),
        ("--port", "70000"),
        ("--tls-cert", "x.pem"),
        ("--host", "256.1.1.1", "--api-key", "k"),
        ("--host", ""),
        ("--api-key", ""),
        ("--allow-origin", "foo"),
        ("--api-key-file", "/nonexistent/file"),
    ],
)
def test_invalid_options_are_refused(speaking_model: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, message = fail(tmp_path, speaking_model, *arguments)
    assert code in (2, 3) and message


def test_durations() -> None:
    assert [parse_duration(text) for text in ("30s", "5m", "1h", "45", "forever")] == [30, 300, 3600, 45, math.inf]
    with pytest.raises(UsageError):
        parse_duration("-3m")


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("http://localhost:3000/", "http://localhost:3000"),
        ("HTTPS://Example.ORG:443", "https://example.org"),
        ("http://example.org:80/", "http://example.org"),
        ("http://[::1]:80", "http://[::1]"),
        ("https://example.org:80", "https://example.org:80"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("*", "*"),
    ],
)
def test_origins_are_spelled_as_browsers_do(text: str, origin: str) -> None:
    assert parse_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    ["foo", "localhost:3000", "http://", "https://a.example/page", "https://*.example", "https://me@a.example", ""],
)
def test_what_cannot_be_the_origin_of_a_page_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="origin"):
        parse_origin(text)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("box", "box"),
        ("Box.Local.", "box.local"),
        ("box:8000", "box"),
        ("http://box:8000/", "box"),
        ("192.168.1.7:8000", "192.168.1.7"),
        ("[fe80::1]:8000", "fe80::1"),
        ("FE80::0:1", "fe80::1"),
    ],
)
def test_allowed_hosts_are_those_of_the_header(text: str, host: str) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize("text", ["", "*", "a b", "box/page", "http://", ":8000", "me@box"])
def test_what_cannot_be_the_name_of_a_computer_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not the name of a computer"):
        parse_host(text)


def test_numbers_of_parallel_requests() -> None:
    assert parse_parallel("3") == 3 and parse_parallel("auto") >= 1
    with pytest.raises(OutOfRange):
        parse_parallel("65")


def test_saved_chats_need_the_key_in_the_printed_address(speaking_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, speaking_model, "--api-key", "for-programs") as server:
        key = wait_for_line(server, "#key=").strip().partition("#key=")[2]
        assert key == read_page_key(tmp_path / "page-key")
        for headers, status in (({}, 401), ({"x-api-key": "for-programs"}, 401), ({"x-api-key": key}, 200)):
            request = {**headers, "Sec-Fetch-Site": "same-origin"}
            assert httpx.get(f"{server.url}/page/chats", headers=request).status_code == status
        assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": key}).status_code == 401
        assert httpx.get(server.url).status_code == 200


def test_the_key_of_the_page_stays_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "home" / "page-key"
    key = read_page_key(path)
    assert read_page_key(path) == key and path.stat().st_mode & 0o077 == 0
    path.write_text("short")
    assert read_page_key(path) != key


@pytest.mark.parametrize("n_signals", [1, 2])
def test_the_journal_of_the_page_is_closed_at_the_end(endless_model: Path, tmp_path: Path, n_signals: int) -> None:
    with serving(tmp_path, endless_model, "-c", "50000") as server:
        server.ask(max_tokens=1)
        headers = {"x-api-key": read_page_key(tmp_path / "page-key"), "Sec-Fetch-Site": "same-origin"}
        question = {"key": "12345678", "text": "Hello", "max_tokens": 300 if n_signals == 1 else None}
        body = {"headers": headers, "json": question, "timeout": DEADLINE}
        with httpx.stream("POST", f"{server.url}/page/answers", **body) as response:
            lines = response.iter_lines()
            assert '"start"' in next(lines) and (tmp_path / "chats.db-wal").exists()
            for _ in range(n_signals):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.2)  # or the second one would be lost
            list(lines)
        assert server.process.wait(DEADLINE) == 0
    assert not (tmp_path / "chats.db-wal").exists()  # SQLite deletes it when the last connection is closed
    with contextlib.closing(Journal(tmp_path / "chats.db")) as journal:
        assert journal.load_thread(1).path[1].text.startswith("abcd")
