"""`qwenlocal run --batch`: reading prompts, answering several at once, continuing an earlier run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from conftest import SAYS, Run
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.cli.commands.batch import read_finished_ids


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_line_is_answered(invoke: Run, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        'plain text\n"a JSON text"\n\n{"prompt": "x", "id": "mine"}\n'
        '{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]}\n'
    )
    result = invoke("run", "-m", str(speaking_model), "--batch", "in.jsonl")
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["id"] for line in found} == {1, 2, "mine", 5}
    assert {(line["answer"], line["why"], line["answer_tokens"]) for line in found} == {(SAYS, "end of answer", 10)}


def test_finished_answers_are_not_repeated(invoke: Run, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("one\ntwo\nthree\n")
    (tmp_path / "out.jsonl").write_text('{"id": 2, "answer": "before"}\n{"id": 3, "ans')
    result = invoke("run", "-m", str(speaking_model), "--batch", "in.jsonl", "-o", "out.jsonl")
    assert (result.returncode, result.stdout) == (0, "")
    assert {line["id"]: line["answer"] for line in lines(tmp_path / "out.jsonl")} == {2: "before", 1: SAYS, 3: SAYS}
    again = invoke("run", "-m", str(speaking_model), "--batch", "in.jsonl", "-o", "out.jsonl")
    assert "All prompts are already answered (3)." in again.stderr


def test_an_answer_ends_before_a_stop_string(invoke: Run, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("one\n")
    result = invoke("run", "-m", str(speaking_model), "--batch", "in.jsonl", "--stop", "is,")
    (line,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert (line["answer"], line["why"]) == ("Par", "stop string")


def test_only_line_feeds_separate_lines(invoke: Run, speaking_model: Path, tmp_path: Path) -> None:
    odd = "one\u2028two\x85three"
    (tmp_path / "in.jsonl").write_bytes(f'{{"prompt": "{odd}", "id": "{odd}"}}\r\nplain\r\n'.encode())
    (tmp_path / "out.jsonl").write_text(f'{{"id": "{odd}", "answer": "{odd}"}}\n', "utf-8")
    result = invoke("run", "-m", str(speaking_model), "--batch", "in.jsonl", "-o", "out.jsonl")
    assert result.returncode == 0, result.stderr
    _, second, _ = (tmp_path / "out.jsonl").read_text("utf-8").split("\n")
    assert json.loads(second)["id"] == 2


def test_a_template_is_filled_from_each_line(invoke: Run, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"input": "Hi", "lang": "French"}\n"Bye"\n')
    more = ("--template", "Translate to {lang}: {input}", "--var", "lang=Spanish")
    result = invoke("run", "-m", str(speaking_model), "--batch", "in.jsonl", *more)
    assert result.returncode == 0, result.stderr
    counts = {json.loads(line)["id"]: json.loads(line)["prompt_tokens"] for line in result.stdout.splitlines()}
    assert counts[1] - counts[2] == len("Translate to French: Hi") - len("Translate to Spanish: Bye")


def test_a_template_without_a_batch_takes_the_prompt(invoke: Run, speaking_model: Path) -> None:
    one = invoke("run", "-m", str(speaking_model), "hello", "--template", "Say {input}", "--stats")
    assert one.stdout == f"{SAYS}\n"
    whole = invoke("run", "-m", str(speaking_model), "--template", "Say {what}", "--var", "what=hello")
    assert (whole.returncode, whole.stdout) == (0, f"{SAYS}\n")
    missing = invoke("run", "-m", str(speaking_model), "hello", "--template", "Say {input} in {lang}")
    assert (missing.returncode, "placeholder {lang} of the template has no value" in missing.stderr) == (2, True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no prompts"),
        ('{"prompt": }\n', "Line 1 of the batch is not JSON"),
        ('ok\n{"other": "x"}\n', "Line 2 of the batch has no prompt"),
        ('{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n', "have the id 1"),
        ('{"id": [], "prompt": "x"}\n', "neither text nor a number"),
        ('{"prompt": null}\n', "Line 1 of the batch has no prompt"),
        ('{"prompt": ["x"]}\n', "Line 1 of the batch has no prompt"),
        ('{"a":' * 100_000, "Line 1 of the batch is not JSON"),
        ('{"messages": [3]}\n', "are not a list of roles and contents"),
    ],
)
def test_a_batch_is_checked_before_a_model_is_loaded(content: str, said: str, invoke: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    result = invoke("run", "-m", "./nothing.gguf", "--batch", "in.jsonl")
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr


def test_missing_files_and_other_outputs_are_reported(invoke: Run, speaking_model: Path, tmp_path: Path) -> None:
    assert invoke("run", "-m", str(speaking_model), "--batch", "none.jsonl").returncode == 3
    (tmp_path / "in.jsonl").write_text("one\n")
    (tmp_path / "out.jsonl").write_text("something else\n")
    other = invoke("run", "-m", str(speaking_model), "--batch", "in.jsonl", "-o", "out.jsonl")
    assert (other.returncode, "is not the output of a batch" in other.stderr) == (2, True)
    assert (tmp_path / "out.jsonl").read_text() == "something else\n"


@pytest.mark.parametrize(
    "text",
    [
        "all that there is, without an end of line",
        '{"id": 5, "name": "my only settings"}',
        '{"id": 5, "na',
        '{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y"}',
        '{"id": 1, "answer": "ours"}\nsomething else\n',
        '{"id": 1, "answer": "ours"}\nsomething',
    ],
)
def test_a_file_that_is_not_a_batch_output_stays_unchanged(text: str, invoke: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("one\n")
    (tmp_path / "mine").write_text(text)
    result = invoke("run", "-m", "./nothing.gguf", "--batch", "in.jsonl", "-o", "mine")
    assert (result.returncode, "is not the output of a batch" in result.stderr) == (2, True)
    assert (tmp_path / "mine").read_text() == text


def test_a_batch_is_not_its_own_output(invoke: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    result = invoke("run", "-m", "./nothing.gguf", "--batch", "in.jsonl", "-o", "./in.jsonl")
    assert (result.returncode, "is both input and output" in result.stderr) == (2, True)


def test_a_cut_structure_is_answered_again(tmp_path: Path) -> None:
    fields = [{"id": 1, "complete": True}, {"id": 2, "complete": False}, {"id": 3}]
    output = tmp_path / "out.jsonl"
    output.write_text("".join(json.dumps({**line, "answer": "{", "why": "token limit"}) + "\n" for line in fields))
    assert read_finished_ids(output) == {1, 3}


@given(st.text() | st.integers(), st.text(), st.integers(0, 400))
def test_an_incomplete_line_is_recognized_wherever_it_ends(id: str | int, answer: str, length: int) -> None:
    line = json.dumps({"id": id, "answer": answer, "why": "x"}, ensure_ascii=False).encode("utf-8", "replace")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        output.write_bytes(b'{"id": "whole", "answer": ""}\n' + line[:length])
        assert read_finished_ids(output) == {"whole"}
        assert output.read_bytes() == b'{"id": "whole", "answer": ""}\n'


def test_a_prompt_that_is_too_long_has_an_empty_answer_and_an_exit_code(
    invoke: Run, speaking_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text("short\n" + "x" * 5000 + "\n")
    result = invoke("run", "-m", str(speaking_model), "--batch", "in.jsonl", "-c", "512", "-o", "out.jsonl")
    assert result.returncode == 7
    assert {line["id"]: line["why"] for line in lines(tmp_path / "out.jsonl")} == {
        1: "end of answer",
        2: "context full",
    }
