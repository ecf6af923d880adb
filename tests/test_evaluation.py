"""lm-evaluation-harness rates models through `qwenlocal serve`; `make test-clients` installs it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generation import OpenContext
from server_process import Server, serving
from tool_modules import ROOT

from qwenlocal.engine.context import Context
from qwenlocal.engine.logprobs import log_softmax

pytestmark = pytest.mark.clients

EVALUATION_SECONDS = 120.0  # a deadline for hangs; it takes 8
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " made of cheese"], "answer": 0},
    {"question": "天空是", "choices": ["蓝色的", "红色的"], "answer": 1},
    {"question": "Two and two are", "choices": [" four", " five", " many"], "answer": 0},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "What is the capital of France?"
doc_to_target: "Paris"
generation_kwargs:
  until: [","]
  max_gen_toks: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def server(random_model: Path, speaking_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: make test-clients installs it")
    with serving(tmp_path_factory.mktemp("home"), random_model, speaking_model) as server:
        yield server


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in (("choice", CHOICE), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def evaluate(tasks: Path, task: str, kind: str, *options: str, **settings: object) -> list[dict[str, Any]]:
    """Run lm_eval without a network; return its samples, each with a question, the responses and the metrics."""
    output = tasks.parent / "output"
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--tasks", task),
            *("--include_path", str(tasks), "--output_path", str(output), "--log_samples", *options),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks.parent / "hub"), "COLUMNS": "200"},
        cwd=tasks.parent,
        capture_output=True,
        text=True,
        timeout=EVALUATION_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = output.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def rate(context: Context, start: str, end: str) -> float:
    """Return the log-likelihood of `end` after `start`, token by token."""
    tokenizer = context.model.tokenizer
    first, second = (tokenizer.tokenize(text, special=True) for text in (start, end))
    context.truncate(0, 0)
    (row,) = context.decode([(0, first)])
    total = 0.0
    for id in second:
        total += float(log_softmax(context, row)[id])
        (row,) = context.decode([(0, [id])])
    return total


@pytest.mark.parametrize("settings", [{"num_concurrent": 4}, {"tokenized_requests": False}])
def test_log_likelihoods_are_those_of_the_engine(
    server: Server, random_model: Path, tasks: Path, open_context: OpenContext, settings: dict[str, object]
) -> None:
    url = f"{server.url}/v1/completions"
    samples = evaluate(tasks, "tiny_choice", "local-completions", model=random_model, base_url=url, **settings)
    context = open_context(random_model)
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        question = sample["doc"]
        actual = [float(log_likelihood) for log_likelihood, _ in sample["filtered_resps"]]
        expected = [rate(context, question["question"], choice) for choice in question["choices"]]
        assert actual == pytest.approx(expected, abs=1e-3)
        assert sample["acc"] == (max(actual) == actual[question["answer"]])


@pytest.mark.parametrize(
    ("kind", "path", "options"),
    [
        ("local-completions", "completions", ()),
        ("local-chat-completions", "chat/completions", ("--apply_chat_template",)),
    ],
)
def test_answers_are_generated(
    server: Server, speaking_model: Path, tasks: Path, kind: str, path: str, options: tuple[str, ...]
) -> None:
    url = f"{server.url}/v1/{path}"
    samples = evaluate(tasks, "tiny_generation", kind, *options, model=speaking_model, base_url=url)
    assert [sample["filtered_resps"] for sample in samples] == [["Paris"]] * len(QUESTIONS)
    assert [sample["exact_match"] for sample in samples] == [1.0] * len(QUESTIONS)


@pytest.mark.filterwarnings("ignore")
def test_the_tasks_in_the_documentation_exist() -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed: make test-clients installs it")
    known = set(tasks.TaskManager().all_tasks)
    page = (ROOT / "docs" / "evaluate.md").read_text("utf-8")
    names = {name for names in re.findall(r"--tasks ([\w,-]+)", page) for name in names.split(",")}
    for first, others in re.findall(r"\| `(\w+)`((?:, `_\w+`)+)", page):  # `xcopa_vi`, `_id`
        suffixes = re.findall(r"_\w+", others)
        prefix = first.rsplit("_", suffixes[0].count("_"))[0]
        names |= {first, *(prefix + suffix for suffix in suffixes)}
    assert len(names) > 40
    assert names <= known
