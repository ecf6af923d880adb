"""A model in a process of its own: its answers, its errors, its end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import psutil
import pytest
from http_server import serve_host
from llguidance import LLMatcher

from qwenlocal.chat.events import Done, FinishReason, PromptLogprobs, Text
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.errors import (
    BadWeights,
    ContextFull,
    EngineCrashed,
    ModelNotFound,
    OutOfRange,
    ServerBusy,
    ServerStopped,
    UsageError,
)
from qwenlocal.library.model_library import ModelLibrary
from qwenlocal.library.names import PathName, parse_name
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.library.store import ModelRecord, StoredFile
from qwenlocal.server.engine import ChatPrompt, EngineEvent, GenerationRequest, TextPrompt, TokenPrompt
from qwenlocal.server.engine_process import EngineProcess
from qwenlocal.server.engine_worker import WorkerSpec
from qwenlocal.server.model_host import HostSettings, ProcessHost
from qwenlocal.server.served_models import ServedModels
from qwenlocal.server.wire import Call, MessageProtocol, WireError
from qwenlocal.testing import write_model

HELLO = ChatPrompt([{"role": "user", "content": "Hello"}])
DEADLINE = 60.0


def provided(path: Path) -> ProvidedModel:
    record = ModelRecord(str(path), [StoredFile.from_path(path, "")], "a file on this disk", owned=False)
    return ProvidedModel(PathName(path), record)


def options(n_ctx: int = 512) -> LoadOptions:
    return LoadOptions(LoadRequest(n_ctx=n_ctx, threads=1, flash_attention=False))


@contextlib.asynccontextmanager
async def running(
    path: Path, parallel: int = 2, n_ctx: int = 512, max_waiting: int = 8
) -> AsyncIterator[EngineProcess]:
    process = EngineProcess(WorkerSpec(provided(path), options(n_ctx), parallel), max_waiting=max_waiting)
    await process.start()
    try:
        yield process
    finally:
        await process.stop()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE))


async def answer(process: EngineProcess, request: GenerationRequest) -> tuple[str, Done]:
    events = [event async for event in process.generate(request)]
    assert isinstance(events[-1], Done)
    return "".join(event.text for event in events if isinstance(event, Text)), events[-1]


def test_answers_come_from_another_process(speaking_model: Path) -> None:
    async def test() -> None:
        async with running(speaking_model) as process:
            text, done = await answer(process, GenerationRequest(HELLO, {"temperature": 0}))
            assert (text, done.finish_reason) == ("Paris, fun", FinishReason.EOS)
            assert process.info.n_ctx == 512 and process.info.is_loaded

    run(test)


def test_several_requests_are_answered_at_once(random_model: Path) -> None:
    requests = [
        GenerationRequest(TextPrompt(f"{key} " * 20), {"temperature": 0, "repeat_penalty": 1}, max_tokens=20)
        for key in range(5)
    ]

    async def test() -> None:
        async with running(random_model, parallel=3) as process:
            together = await asyncio.gather(*(answer(process, request) for request in requests))
            for request, (text, done) in zip(requests, together, strict=True):
                assert (await answer(process, request))[0] == text
                assert done.finish_reason is FinishReason.LENGTH and done.stats.answer_tokens == 20

    run(test)


def test_an_answer_continues_after_its_first_tokens(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model) as process:
            greedy = {"temperature": 0.0}
            whole, end = await answer(process, GenerationRequest(HELLO, greedy, 20))
            _, cut = await answer(process, GenerationRequest(HELLO, greedy, 7))
            begun = ChatPrompt(HELLO.messages, cut.ids)
            rest, done = await answer(process, GenerationRequest(begun, greedy, 13))
            assert (done.ids, len(cut.ids), len(done.ids)) == (end.ids, 7, 20)
            assert whole.endswith(rest)
            assert done.stats.prompt_tokens == end.stats.prompt_tokens + 7

    run(test)


def test_a_stop_string_ends_an_answer(speaking_model: Path) -> None:
    async def test() -> None:
        async with running(speaking_model) as process:
            text, done = await answer(process, GenerationRequest(HELLO, {"temperature": 0}, stop=(", f",)))
            assert (text, done.finish_reason) == ("Paris", FinishReason.STOP_STRING)

    run(test)


def test_probabilities_of_prompt_and_answer(random_model: Path) -> None:
    request = GenerationRequest(TokenPrompt([40, 41, 42]), max_tokens=2, top_logprobs=2, prompt_logprobs=True)

    async def test() -> None:
        async with running(random_model) as process:
            events = [event async for event in process.generate(request)]
            (prompt,) = [event for event in events if isinstance(event, PromptLogprobs)]
            assert [token.id for token in prompt.tokens] == [40, 41, 42]
            tokens = [token for event in events if isinstance(event, Text) for token in event.logprobs]
            assert len(tokens) == 2 and all(len(token.alternatives) == 2 for token in tokens)

    run(test)


def test_probabilities_of_a_prompt_that_is_computed_twice_are_its_own(random_model: Path) -> None:
    """Six growing answers fill the context while the prompt is computed: it has to wait, and begins again."""
    prompt = [7 * number * number % 200 for number in range(150)]
    rated = GenerationRequest(TokenPrompt(prompt), max_tokens=1, top_logprobs=0, prompt_logprobs=True)
    sampling = {"temperature": 0, "repeat_penalty": 1, "ignore_eos": True}
    limits = [48, *[70] * 6]  # the first one ends early, and the prompt takes its place
    growing = [
        GenerationRequest(TokenPrompt([9 * key + 1] * 10), sampling, max_tokens=limit)
        for key, limit in enumerate(limits)
    ]

    async def rate(process: EngineProcess) -> PromptLogprobs:
        return [event async for event in process.generate(rated) if isinstance(event, PromptLogprobs)][-1]

    async def test() -> None:
        async with running(random_model, parallel=len(growing)) as process:
            alone = await rate(process)
            answers = asyncio.gather(*(answer(process, request) for request in growing))
            await asyncio.sleep(0)
            busy = await rate(process)
            await answers
        assert [token.id for token in busy.tokens] == prompt
        logprobs = [[token.logprob for token in one.tokens[1:]] for one in (alone, busy)]
        assert logprobs[1] == pytest.approx(logprobs[0], abs=1e-2)

    run(test)


def test_an_abandoned_request_frees_its_place(endless_model: Path) -> None:
    async def test() -> None:
        async with running(endless_model, parallel=1, n_ctx=8192) as process:
            events = process.generate(GenerationRequest(HELLO))
            assert await anext(events)
            await events.aclose()
            text, _ = await answer(process, GenerationRequest(HELLO, max_tokens=3))
            assert len(text) == 3
            assert process.n_requests == 0

    run(test)


def test_a_request_that_is_cancelled_while_it_waits_is_forgotten(endless_model: Path) -> None:
    async def test() -> None:
        async with running(endless_model, parallel=1, n_ctx=8192) as process:
            first = process.generate(GenerationRequest(HELLO))
            assert await anext(first)
            waiting = asyncio.create_task(answer(process, GenerationRequest(HELLO, max_tokens=3)))
            await asyncio.sleep(0.1)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            assert process.n_requests == 1
            await first.aclose()

    run(test)


def test_a_slow_grammar_delays_no_answer_without_one(random_model: Path) -> None:
    patterns = [{"type": "string", "pattern": f"a{{{number}}}"} for number in range(19)]  # takes a second
    grammar = LLMatcher.grammar_from_json_schema({"allOf": patterns})

    async def test() -> None:
        async with running(random_model) as process:
            slow, abandoned = (
                asyncio.create_task(answer(process, GenerationRequest(HELLO, {"grammar": grammar}))) for _ in range(2)
            )
            await asyncio.sleep(0)
            abandoned.cancel()
            assert (await answer(process, GenerationRequest(HELLO, max_tokens=1)))[1].stats.answer_tokens == 1
            assert len(await process.tokenize("x")) == 1
            assert not slow.done()
            with pytest.raises(UsageError):
                await slow
            assert process.n_requests == 0

    run(test)


def test_functions_of_a_model(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model) as process:
            ids = await process.tokenize("Hello")
            assert b"".join(await process.pieces(ids)) == b"Hello"
            assert (await process.apply_template(HELLO.messages)).endswith("<|im_start|>assistant\n")
            assert await process.count_tokens(HELLO) > await process.count_tokens(TextPrompt("Hello"))

    run(test)


def test_embeddings_of_texts_and_tokens(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model) as process:
            text, tokens, other = await process.embed(
                [TextPrompt("Hello"), TokenPrompt(await process.tokenize("Hello")), TextPrompt("Good bye")]
            )
            assert text.vector == tokens.vector != other.vector
            assert text.tokens == 5
            assert sum(value * value for value in other.vector) == pytest.approx(1)

    run(test)


def test_embeddings_that_nobody_waits_for_delay_no_others(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model) as process:
            abandoned = asyncio.create_task(process.embed([TextPrompt("x" * 500)] * 20_000))  # would take minutes
            await asyncio.sleep(0.1)
            abandoned.cancel()
            assert len(await process.embed([TextPrompt("Hello")])) == 1

    run(test)


# --- errors


def test_errors_keep_their_class_and_fields(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model) as process:
            with pytest.raises(ContextFull) as raised:
                await answer(process, GenerationRequest(TextPrompt("x" * 600)))
            assert (raised.value.n_prompt, raised.value.n_ctx) == (600, 512)
            with pytest.raises(OutOfRange):
                await answer(process, GenerationRequest(HELLO, {"logit_bias": ((999_999, 1.0),)}))
            with pytest.raises(OutOfRange):
                await answer(process, GenerationRequest(HELLO, {"top_p": 3}))
            with pytest.raises(UsageError, match="no token with the id 5000"):
                await answer(process, GenerationRequest(TokenPrompt([5000])))
            assert (await answer(process, GenerationRequest(HELLO, max_tokens=1)))[1].stats.answer_tokens == 1

    run(test)


def test_a_damaged_file_says_why_it_cannot_be_loaded(random_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(random_model.read_bytes()[:2000])

    async def test() -> None:
        with pytest.raises(BadWeights) as raised:
            await EngineProcess(WorkerSpec(provided(path), options(), 1)).start()
        assert raised.value.hint and str(path) in str(raised.value)

    run(test)


def test_a_file_that_was_deleted_says_so(speaking_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "deleted.gguf"
    path.write_bytes(speaking_model.read_bytes())
    spec = WorkerSpec(provided(path), options(), 1)
    path.unlink()

    async def test() -> None:
        with pytest.raises(BadWeights, match=r"There is no file .*deleted\.gguf"):
            await EngineProcess(spec).start()

    run(test)


def test_requests_beyond_the_queue_are_refused(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model, parallel=1, max_waiting=1) as process:
            with process.admit(), process.admit():
                with pytest.raises(ServerBusy) as raised, process.admit():
                    pass
                assert raised.value.n_waiting == 1 and raised.value.retry_after > 0
            with process.admit():
                pass

    run(test)


def test_several_answers_to_one_request_need_one_place_in_the_queue(random_model: Path) -> None:
    settings = HostSettings(options(), parallel=1, max_waiting=0)
    models = ProcessHost(ServedModels(open_library(), [provided(random_model)]), settings)
    with serve_host(models) as url:
        body = {"prompt": "Hello", "max_tokens": 1, "n": 12}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE)
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(12))


def test_a_bug_in_the_thread_that_receives_messages_ends_requests_with_a_reason(endless_model: Path) -> None:
    async def test() -> None:
        models, others = host(endless_model), worker_processes()
        async with models.open("") as engine:
            assert isinstance(engine, EngineProcess)
            events = engine.generate(GenerationRequest(HELLO))
            assert await anext(events)
            engine._send(Call(999, "no_such_method", ()))
            with pytest.raises(EngineCrashed, match="A bug in qwenlocal: AttributeError"):
                async for _ in events:
                    pass
            while worker_processes() - others:
                await asyncio.sleep(0.01)
        assert len(await first_text(models, "")) == 5
        await models.close()

    run(test)


def test_a_message_that_cannot_be_read_ends_requests_with_a_reason(endless_model: Path) -> None:
    async def test() -> None:
        async with running(endless_model, n_ctx=8192) as process:
            events = process.generate(GenerationRequest(HELLO))
            assert await anext(events)
            protocol = process._transport.get_protocol()
            assert isinstance(protocol, MessageProtocol)
            protocol.data_received((8).to_bytes(8, "little") + b"nonsense")
            with pytest.raises(EngineCrashed, match="A bug in qwenlocal: UnpicklingError"):
                async for _ in events:
                    pass
            await asyncio.to_thread(process._process.join, DEADLINE / 3)
            assert not process.is_alive and not process._process.is_alive()

    run(test)


def test_tokens_that_the_model_does_not_have_are_refused(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model) as process:
            for id in (-1, 10**6, 10**12):
                with pytest.raises(UsageError, match=f"no token with the id {id}"):
                    await answer(process, GenerationRequest(TokenPrompt([1]), {"answer_prefix": (id,)}, 1))

    run(test)


def test_a_model_with_an_invalid_chat_template_continues_text(tmp_path: Path) -> None:
    model = write_model(tmp_path / "invalid.gguf", template="{% for message in messages %}")

    async def test() -> None:
        async with running(model) as process:
            assert (await answer(process, GenerationRequest(TextPrompt("Hi"), max_tokens=2)))[1].stats.answer_tokens
            for _ in range(2):
                with pytest.raises(BadWeights, match="not valid Jinja"):
                    await answer(process, GenerationRequest(HELLO))
            with pytest.raises(BadWeights, match="not valid Jinja"):
                await process.apply_template(HELLO.messages)

    run(test)


def test_a_result_that_cannot_be_sent_ends_its_request_with_a_reason(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model) as process:
            with pytest.raises(EngineCrashed, match="A bug in qwenlocal"):
                await process._call("__getattribute__", "tokenize")  # a method of an object that cannot be pickled

    run(test)


def test_embeddings_beyond_the_queue_are_refused_and_answers_are_not(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model, max_waiting=1) as process:
            long = [asyncio.create_task(process.embed([TextPrompt("x" * 500)] * 3_000)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(ServerBusy) as raised:
                await process.embed([TextPrompt("Hello")])
            assert raised.value.n_waiting == 1 and raised.value.retry_after > 0
            assert (await answer(process, GenerationRequest(HELLO, max_tokens=2)))[1].stats.answer_tokens == 2
        for task in long:
            with pytest.raises(ServerStopped):
                await task
        assert process._process.exitcode == 0  # it did not have to be killed

    run(test)


def test_calls_beyond_the_queue_are_refused(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model, max_waiting=1) as process:
            results = await asyncio.gather(*(process.tokenize("x") for _ in range(4)), return_exceptions=True)
            assert [type(result) for result in results] == [list, list, ServerBusy, ServerBusy]
            assert await process.tokenize("x") == results[0]

    run(test)


def test_a_killed_process_ends_its_requests_with_a_reason(endless_model: Path) -> None:
    async def test() -> None:
        async with running(endless_model, n_ctx=8192) as process:
            events = process.generate(GenerationRequest(HELLO))
            assert await anext(events)
            assert process._process.pid is not None
            os.kill(process._process.pid, signal.SIGKILL)
            with pytest.raises(EngineCrashed, match=r"SIGKILL\. Out of memory\?") as raised:
                async for _ in events:
                    pass
            assert "-c" in raised.value.hint and "-ngl" not in raised.value.hint
            assert not process.is_alive
            with pytest.raises(EngineCrashed):
                await process.tokenize("x")

    run(test)


def test_the_reason_of_an_end_is_the_signal_and_a_gpu_only_if_one_was_used() -> None:
    without, with_gpu = (EngineCrashed.from_exit_code(-signal.SIGSEGV, uses_gpu=gpu) for gpu in (False, True))
    assert "SIGSEGV" in str(without) and "GPU" not in without.hint
    assert "SIGSEGV" in str(with_gpu) and "-ngl 0" in with_gpu.hint
    assert "with code 3" in str(EngineCrashed.from_exit_code(3))


def test_requests_that_are_running_when_the_process_is_stopped_are_interrupted(endless_model: Path) -> None:
    async def test() -> None:
        async with running(endless_model, n_ctx=8192) as process:
            events = process.generate(GenerationRequest(HELLO))
            assert await anext(events)
            stopping = asyncio.create_task(process.stop())
            last = [event async for event in events][-1]
            assert isinstance(last, Done) and last.finish_reason is FinishReason.INTERRUPTED
            await stopping
            assert process.n_requests == 0 and not process.is_alive

    run(test)


def test_a_process_whose_server_was_killed_completes_nothing(random_model: Path) -> None:
    async def test() -> None:
        async with running(random_model) as process:
            embedding = asyncio.create_task(process.embed([TextPrompt("x" * 500)] * 20_000))  # takes minutes
            await asyncio.sleep(0)
            process._transport.abort()
            with pytest.raises(EngineCrashed):
                await embedding
            await asyncio.to_thread(process._process.join, DEADLINE / 3)
            assert not process._process.is_alive()

    run(test)


def test_a_start_that_is_cancelled_leaves_no_process(random_model: Path) -> None:
    async def test() -> None:
        process = EngineProcess(WorkerSpec(provided(random_model), options(), 1))
        starting = asyncio.create_task(process.start())
        await asyncio.sleep(0)  # the process is being created
        starting.cancel()
        await process.stop()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert process._process.exitcode is not None

    run(test)


# --- models that are loaded on demand


def open_library() -> ModelLibrary:
    return ModelLibrary(
        say=lambda sentence: None,
        on_download=lambda model: None,
        open_progress=lambda: contextlib.nullcontext(lambda progress: None),
        report_hashing=lambda file, done, total: None,
    )


def host(*paths: Path, keep_alive: float = 300.0, loaded: list[str] | None = None) -> ProcessHost:
    names = loaded if loaded is not None else []
    return ProcessHost(
        ServedModels(open_library(), [provided(path) for path in paths]),
        HostSettings(options(), parallel=2, keep_alive=keep_alive),
        on_loaded=lambda name, ready: names.append(name),
    )


async def first_text(models: ProcessHost, name: str) -> str:
    async with models.open(name) as engine:
        events: list[EngineEvent] = [event async for event in engine.generate(GenerationRequest(HELLO, max_tokens=5))]
        return "".join(event.text for event in events if isinstance(event, Text))


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLOCAL_HOME", str(tmp_path / "home"))


def test_a_model_is_loaded_once_for_all_who_ask(speaking_model: Path) -> None:
    async def test() -> None:
        loaded: list[str] = []
        models = host(speaking_model, loaded=loaded)
        assert await asyncio.gather(*(first_text(models, "") for _ in range(3))) == ["Paris"] * 3
        assert loaded == [str(speaking_model)]
        assert [info.is_loaded for info in models.models()] == [True]
        await models.close()

    run(test)


def test_two_models_at_once(speaking_model: Path, endless_model: Path) -> None:
    async def test() -> None:
        models = host(speaking_model, endless_model)
        texts = await asyncio.gather(first_text(models, str(speaking_model)), first_text(models, str(endless_model)))
        assert texts[0] == "Paris" and texts[1] != "Paris"
        await models.close()

    run(test)


def test_an_unused_model_is_unloaded_and_loaded_again(speaking_model: Path) -> None:
    async def test() -> None:
        loaded: list[str] = []
        models = host(speaking_model, keep_alive=0.05, loaded=loaded)
        assert await first_text(models, "") == "Paris"
        while any(info.is_loaded for info in models.models()):
            await asyncio.sleep(0.02)
        assert await first_text(models, "") == "Paris"
        assert len(loaded) == 2
        await models.close()

    run(test)


def test_a_model_that_is_opened_when_its_time_is_over_answers(speaking_model: Path) -> None:
    async def test() -> None:
        models = host(speaking_model, keep_alive=0.05)
        assert await first_text(models, "") == "Paris"
        opened = asyncio.create_task(first_text(models, ""))
        await asyncio.sleep(0)  # its name is being looked up in a thread
        time.sleep(0.2)  # both are due now
        assert await opened == "Paris"
        await models.close()

    run(test)


def test_a_model_whose_process_was_killed_is_loaded_again(speaking_model: Path) -> None:
    async def test() -> None:
        models = host(speaking_model)
        async with models.open("") as engine:
            assert isinstance(engine, EngineProcess) and engine._process.pid is not None
            os.kill(engine._process.pid, signal.SIGKILL)
            while engine.is_alive:
                await asyncio.sleep(0.01)
        assert await first_text(models, "") == "Paris"
        await models.close()

    run(test)


def test_a_bug_while_answers_are_computed_ends_them_with_a_reason(endless_model: Path) -> None:
    async def test() -> None:
        models, others = host(endless_model), worker_processes()
        async with models.open("") as engine:
            events = engine.generate(GenerationRequest(HELLO))
            assert await anext(events)
            faulty = GenerationRequest(HELLO, max_tokens="many")  # type: ignore[arg-type]  # no interface sends that
            with pytest.raises(EngineCrashed, match="A bug in qwenlocal: TypeError"):
                await anext(engine.generate(faulty))
            with pytest.raises(EngineCrashed, match="A bug in qwenlocal: TypeError"):
                async for _ in events:
                    pass
            while worker_processes() - others:  # it frees the model's memory
                await asyncio.sleep(0.01)
        assert len(await first_text(models, "")) == 5
        await models.close()

    run(test)


def worker_processes() -> set[psutil.Process]:
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child)
    return found


def test_a_model_is_loaded_again_only_when_its_old_process_has_ended(speaking_model: Path) -> None:
    async def test() -> None:
        models, others = host(speaking_model), worker_processes()
        assert await first_text(models, "") == "Paris"
        (old,) = worker_processes() - others
        old.suspend()
        await models.unload("")
        while any(info.is_loaded for info in models.models()):
            await asyncio.sleep(0.01)
        opened = asyncio.create_task(first_text(models, ""))
        await asyncio.sleep(0.3)
        assert worker_processes() - others == {old}
        old.resume()
        assert await opened == "Paris"
        assert not old.is_running()
        await models.close()

    run(test)


def test_a_request_can_say_how_long_its_model_stays_loaded(speaking_model: Path) -> None:
    async def test() -> None:
        models = host(speaking_model, keep_alive=0.05)
        async with models.open("", math.inf):
            pass
        await asyncio.sleep(0.1)
        assert [(info.is_loaded, info.expires) for info in models.models()] == [(True, math.inf)]
        async with models.open("", 100.0):
            pass
        assert 90 < models.models()[0].expires - time.time() <= 100
        async with models.open(""):  # as before
            pass
        assert 90 < models.models()[0].expires - time.time() <= 100
        async with models.open("", 0.0):
            assert models.models()[0].is_loaded
        while models.models()[0].is_loaded:
            await asyncio.sleep(0.01)
        await models.close()

    run(test)


def test_a_model_whose_only_reader_left_while_it_was_loading_is_unloaded(speaking_model: Path) -> None:
    async def test() -> None:
        loaded: list[str] = []
        models, others = host(speaking_model, keep_alive=0.0, loaded=loaded), worker_processes()
        reading = asyncio.create_task(first_text(models, ""))
        while not worker_processes() - others:
            await asyncio.sleep(0.01)
        reading.cancel()
        while not loaded or worker_processes() - others:
            await asyncio.sleep(0.01)
        await models.close()

    run(test)


def test_a_file_has_one_name_however_a_request_names_it(speaking_model: Path) -> None:
    async def test() -> None:
        library = open_library()
        name = parse_name("qwen1.5:7b", lambda: library.catalog)
        record = ModelRecord(str(name), [StoredFile.from_path(speaking_model, "")], "a file on this disk")
        models = ProcessHost(ServedModels(library, [ProvidedModel(name, record)]), HostSettings(options()))
        for text in ("", "qwen1.5:7b", "Qwen/Qwen1.5-7B-Chat", "Qwen1.5-7B-Chat", str(name)):
            assert (await models.find(text)).name == str(name)
        (info,) = models.models()
        assert (info.name, info.architecture) == (str(name), "qwen2") and info.n_ctx_train > 0
        with pytest.raises(ModelNotFound):
            await models.find("qwen1.5:14b")

    run(test)


def test_requests_cannot_name_files(speaking_model: Path, random_model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        models = host(speaking_model)
        outside = ["/etc/passwd", str(random_model), "../models0/random.gguf", "~/x.gguf", "https://example.org/x.gguf"]
        for name in (*outside, "nonsense", "gpt-4", "qwen1.5:7b", "Qwen/Qwen1.5-7B-Chat"):
            with pytest.raises(ModelNotFound) as raised:
                async with models.open(name):
                    pass
            assert str(speaking_model) in raised.value.hint
        await models.close()

    run(test)


def test_a_model_that_cannot_be_loaded_stays_unloaded(random_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(random_model.read_bytes()[:2000])

    async def test() -> None:
        models = host(path)
        for _ in range(2):
            with pytest.raises(BadWeights):
                await first_text(models, "")
        assert [info.is_loaded for info in models.models()] == [False]
        await models.close()

    run(test)


def test_options_of_the_server_that_do_not_suit_a_model_are_no_fault_of_the_client(speaking_model: Path) -> None:
    models = ProcessHost(ServedModels(open_library(), [provided(speaking_model)]), HostSettings(options(1 << 20)))
    with serve_host(models) as url:
        body = {"messages": HELLO.messages}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE)
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "model_not_loaded" and "On the server: Use at most -c" in error["message"]


def test_a_bug_in_the_process_of_a_model_prints_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("a bug")
    except ValueError as error:
        assert "a bug" in str(WireError.pack(error).unpack())
    assert "Traceback" in capsys.readouterr().err
