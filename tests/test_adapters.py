"""LoRA adapters in use: while a model answers, in commands, and in a chat."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from adapter_files import (
    EVERYTHING,
    LINEAR,
    convert_adapter,
    write_adapter,
    write_merged,
)
from checkpoint_files import convert_checkpoint
from commands import expect_exit, parse_json
from conftest import Run
from generation import answer, answer_and_count
from oracle import data_of
from packing import write_packed_checkpoint
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from server_process import serving
from terminal import Open, start_chat

import qwenlocal
from qwenlocal.chat.thread import Thread
from qwenlocal.engine.adapters import LoadedAdapters
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import EngineLoader, LoadedModel, LoadOptions
from qwenlocal.engine.prompt_cache import compute_cache_key
from qwenlocal.errors import BadWeights, UsageError
from qwenlocal.library.adapters import AdapterRequest, parse_adapter
from qwenlocal.machine import this_machine
from qwenlocal.terminal.completer import ChatCompleter
from qwenlocal.terminal.session import Session
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights.adapter import read_adapter
from qwenlocal.weights.adapter_merge import WeightedAdapter
from qwenlocal.weights.adapter_spec import AdapterSpec
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.gguf_reader import read_header, read_metadata

PROMPT = [(7 * n) % 250 for n in range(90)]
OPTIONS = ContextOptions(512, threads=1, flash_attention=False)


def logits_of(path: Path, *adapters: AdapterSpec) -> numpy.ndarray:
    """Return the logits after a prompt."""
    with closing(Model(path)) as model:
        LoadedAdapters(model, adapters)
        with closing(Context(model, OPTIONS)) as context:
            (row,) = context.decode([(0, PROMPT)])
            return numpy.array(context.logits(row)[: len(model.tokenizer)])


def load(path: Path, *adapters: AdapterSpec, folder: Path | None = None) -> LoadedModel:
    """Load as commands do, with prompt caches in `folder`."""
    options = LoadOptions(LoadRequest(n_ctx=512, threads=1), prompt_caches=folder, adapters=adapters)
    return EngineLoader().load(path, options, this_machine(), name="x", size=path.stat().st_size)


@pytest.fixture
def load_model() -> Iterator[Callable[..., LoadedModel]]:
    loaded: list[LoadedModel] = []

    def load_(*arguments: Any, **options: Any) -> LoadedModel:
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    yield load_
    for one in loaded:
        one.close()


# --- running


@pytest.fixture(scope="module", params=["dense", "mixture"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of a usual width, and an adapter for all its layers."""
    folder = tmp_path_factory.mktemp("adapted")
    config = {"dense": {}, "mixture": MOE_CONFIG}[request.param]
    source = write_checkpoint(folder / "Base", config=config, dtype="F32")
    return source, write_adapter(folder / "style", source, targets=EVERYTHING, use_rslora=True, size=0.3)


class TestRunning:
    def test_logits_are_those_of_the_merged_model(self, adapted: tuple[Path, Path], tmp_path: Path) -> None:
        source, folder = adapted
        plain = convert_checkpoint(source, tmp_path / "plain.gguf", "f32")
        path = convert_adapter(folder)
        for scale in (1.0, -0.5):
            expected = logits_of(write_merged(source, folder, weight=scale))
            actual = logits_of(plain, AdapterSpec("style", path, scale))
            assert abs(actual - expected).max() < 2e-3 * abs(expected).max()
            assert abs(actual - logits_of(plain)).max() > 0.1 * abs(expected).max()

    def test_several_adapters_add_up(self, base: Path, base_gguf: Path, tmp_path: Path) -> None:
        folders = [write_adapter(tmp_path / f"style{seed}", base, targets=LINEAR, seed=seed) for seed in (1, 2)]
        specs = [AdapterSpec(str(n), convert_adapter(folder)) for n, folder in enumerate(folders)]
        expected = logits_of(write_merged(base, *folders))
        assert abs(logits_of(base_gguf, *specs) - expected).max() < 2e-3 * abs(expected).max()

    def test_a_scale_of_zero_is_the_model_alone(self, base: Path, base_gguf: Path, tmp_path: Path) -> None:
        path = convert_adapter(write_adapter(tmp_path / "style", base))
        assert (logits_of(base_gguf, AdapterSpec("style", path, 0.0)) == logits_of(base_gguf)).all()

    def test_scales_that_are_too_large_for_numbers_are_reported(
        self, base: Path, base_gguf: Path, tmp_path: Path, load_model: Callable[..., LoadedModel]
    ) -> None:
        path = convert_adapter(write_adapter(tmp_path / "style", base, size=1e30))
        with pytest.raises(BadWeights, match="computes NaN with its adapters"):
            answer(load_model(base_gguf, AdapterSpec("style", path)).sequence, PROMPT, 2)

    def test_a_file_that_llama_cpp_rejects_is_reported(self, base: Path, base_gguf: Path, tmp_path: Path) -> None:
        path = convert_adapter(write_adapter(tmp_path / "style", base))
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(BadWeights, match=r"llama\.cpp cannot load the adapter: .*not within the file bounds"):
            logits_of(base_gguf, AdapterSpec("style", path))

    def test_a_changed_scale_forgets_what_was_computed(
        self, base: Path, base_gguf: Path, tmp_path: Path, load_model: Callable[..., LoadedModel]
    ) -> None:
        spec = AdapterSpec("style", convert_adapter(write_adapter(tmp_path / "style", base, targets=LINEAR)))
        with_adapter, without = (
            answer_and_count(load_model(base_gguf, each).sequence, PROMPT, 12)[1]
            for each in (spec, AdapterSpec("style", spec.path, 0.0))
        )
        assert with_adapter != without
        loaded = load_model(base_gguf, spec)
        for _ in range(2):
            assert answer(loaded.sequence, PROMPT, 12) == with_adapter
            assert answer_and_count(loaded.sequence, PROMPT, 12)[0] > 0
            loaded.adapters.set_scales({"style": 0.0})
            assert answer_and_count(loaded.sequence, PROMPT, 12) == (0, without)
            loaded.adapters.set_scales({"style": 1.0})
            assert answer_and_count(loaded.sequence, PROMPT, 12) == (0, with_adapter)

    def test_abandoned_branches_are_forgotten_too(
        self, base: Path, base_gguf: Path, tmp_path: Path, load_model: Callable[..., LoadedModel]
    ) -> None:
        spec = AdapterSpec("style", convert_adapter(write_adapter(tmp_path / "style", base, targets=LINEAR)))
        loaded, other = load_model(base_gguf, spec), [3, *PROMPT]
        answer(loaded.sequence, PROMPT, 4)
        answer(loaded.sequence, other, 4)  # the first prompt goes to the prefix cache
        loaded.adapters.set_scales({"style": 0.25})
        assert answer_and_count(loaded.sequence, PROMPT, 4)[0] == 0


class TestCaches:
    def test_the_key_of_a_saved_state_depends_on_adapters_and_scales(
        self, base: Path, base_gguf: Path, tmp_path: Path
    ) -> None:
        first, second = (
            AdapterSpec(str(seed), convert_adapter(write_adapter(tmp_path / str(seed), base, seed=seed)))
            for seed in (1, 2)
        )

        def key(*specs: AdapterSpec) -> str:
            return compute_cache_key(base_gguf, OPTIONS, specs)

        def scaled(spec: AdapterSpec, scale: float) -> AdapterSpec:
            return AdapterSpec(spec.name, spec.path, scale)

        keys = [key(), key(first), key(second), key(first, second), key(scaled(first, 0.5)),
                key(scaled(first, 0.5), second), key(first, scaled(second, 0.5))]  # fmt: skip
        assert len(set(keys)) == len(keys)
        assert key(scaled(first, 0.0)) == key() == compute_cache_key(base_gguf, OPTIONS)
        assert key(first, second) == key(second, first)

    def test_states_on_disk_are_not_shared(
        self, base: Path, base_gguf: Path, tmp_path: Path, load_model: Callable[..., LoadedModel]
    ) -> None:
        spec = AdapterSpec("style", convert_adapter(write_adapter(tmp_path / "style", base, targets=LINEAR)))
        prompt = [*PROMPT, *PROMPT]
        for specs in ((), (spec,)):
            loaded = load_model(base_gguf, *specs, folder=tmp_path / "states")
            assert answer_and_count(loaded.sequence, prompt, 4)[0] == 0, specs
            loaded.sequence._seconds = 1e6  # such a short prompt is faster computed than read
            assert loaded.sequence.save_prompt_cache()
        loaded = load_model(base_gguf, spec, folder=tmp_path / "states")
        assert answer_and_count(loaded.sequence, prompt, 4)[0] > 64
        loaded.adapters.set_scales({"style": 0.5})
        assert answer_and_count(loaded.sequence, prompt, 4)[0] == 0
        loaded.adapters.set_scales({"style": 0.0})
        assert answer_and_count(loaded.sequence, prompt, 4)[0] > 64  # the state of the model alone


# --- commands


def use_adapter(run: Run, model: Path, adapter: Path) -> str:
    """Return what the command says when an adapter is used."""
    return expect_exit(run("run", str(model), "--raw", "Hi", "-n", "1", "--adapter", str(adapter)), 0)


def _make_unread(folder: Path, *, days: int) -> None:
    """Set the times of files as if nobody had read them for some days."""
    then = time.time() - days * 24 * 3600
    for file in folder.iterdir():
        os.utime(file, (then, then))


def ask(run: Run, model: Path, *arguments: str) -> str:
    """Return the answer to a question, without leaving traces."""
    result = run("run", str(model), "--raw", "Once upon", "-n", "8", "--temp", "0", *arguments)
    expect_exit(result, 0)
    return str(result.stdout)


class TestCommands:
    @pytest.fixture
    def style(self, base: Path, tmp_path: Path) -> Path:
        """An adapter that changes answers."""
        return write_adapter(tmp_path / "style", base, targets=LINEAR)

    def test_convert_writes_an_adapter(self, style: Path, invoke: Run, tmp_path: Path) -> None:
        message = expect_exit(invoke("convert", str(style)), 0)
        assert "The adapter is for models of the architecture qwen2." in message
        assert "Wrote style-f32.gguf" in message
        assert read_metadata(tmp_path / "style-f32.gguf")["general.type"] == "adapter"
        expect_exit(invoke("convert", f"{style}/adapter_model.safetensors", "-o", "x.gguf", "--type", "f16"), 0)
        assert read_header(tmp_path / "x.gguf").tensors[0].type.name == "f16"
        plan = parse_json(invoke("convert", str(style), "--dry-run", "--json").stdout)
        assert len(plan["files"][0]["tensors"]) == 14

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("--type", "q4_k_m"), "The type of an adapter must be f32, f16, bf16 or q8_0, not q4_k_m."),
            (("--ends", "q8_0"), "--ends cannot be used with an adapter, and "),
            (("--merge", "{}", "--name", "x"), "--merge and --name cannot be used with an adapter, and "),
        ],
    )
    def test_convert_refuses_what_adapters_do_not_have(
        self, arguments: tuple[str, ...], sentence: str, style: Path, invoke: Run
    ) -> None:
        words = [word.replace("{}", str(style)) for word in arguments]
        assert sentence in expect_exit(invoke("convert", str(style), *words), 2)

    @pytest.mark.parametrize(
        "command",
        [("run", "{}", "Hi"), ("verify", "{}"), ("quantize", "{}", "x.gguf", "q8_0"), ("bench", "{}"), ("plan", "{}")],
        ids=lambda words: words[0],
    )
    def test_an_adapter_file_given_as_a_model_says_how_to_use_it(
        self, command: tuple[str, ...], base: Path, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_adapter(tmp_path / "style", base, base_model_name_or_path="Qwen/Qwen1.5-0.5B")
        path = convert_adapter(folder)
        message = expect_exit(invoke(*(word.replace("{}", str(path)) for word in command)), 5)
        assert "it is an adapter, not a model" in message
        assert f"qwenlocal run hf:Qwen/Qwen1.5-0.5B --adapter {path}" in message

    def test_inspect_says_that_a_file_is_an_adapter(self, style: Path, invoke: Run) -> None:
        result = invoke("inspect", str(convert_adapter(style)))
        expect_exit(result, 5)
        assert "it is an adapter, not a model" in result.stdout
        assert "RoPE" not in result.stdout
        assert "chat template" not in result.stdout

    def test_run_uses_directories_and_files_with_scales(
        self, style: Path, base: Path, base_gguf: Path, invoke: Run, tmp_path: Path
    ) -> None:
        merged = ask(invoke, write_merged(base, style))
        assert ask(invoke, base_gguf, "--adapter", str(style)) == merged != ask(invoke, base_gguf)
        path = convert_adapter(style)
        assert ask(invoke, base_gguf, "--adapter", f"{path}:1") == merged
        assert ask(invoke, base_gguf, "--adapter", f"{path}:0.75", "--adapter", f"{style}:0.25") == merged
        assert ask(invoke, base_gguf, "--adapter", f"{path}:0") == ask(invoke, base_gguf)

    def test_a_directory_is_converted_once_and_again_when_it_changes(
        self, style: Path, base: Path, base_gguf: Path, invoke: Run
    ) -> None:
        assert "Converting the adapter style once" in use_adapter(invoke, base_gguf, style)
        assert "Converting" not in use_adapter(invoke, base_gguf, style)
        write_adapter(style, base, seed=5)
        assert "Converting the adapter style once" in use_adapter(invoke, base_gguf, style)

    def test_conversions_that_nobody_uses_are_deleted(
        self, style: Path, base: Path, base_gguf: Path, invoke: Run, tmp_path: Path
    ) -> None:
        conversions = tmp_path / "person" / "qwenlocal" / "files" / "adapters"
        use_adapter(invoke, base_gguf, style)
        _make_unread(conversions, days=1)
        write_adapter(style, base, seed=5)
        use_adapter(invoke, base_gguf, style)
        assert len([*conversions.iterdir()]) == 2  # a running server may load the outdated one again
        _make_unread(conversions, days=3)
        write_adapter(style, base, seed=6)
        use_adapter(invoke, base_gguf, style)
        (kept,) = conversions.iterdir()
        _make_unread(conversions, days=29)
        assert "Converting" not in use_adapter(invoke, base_gguf, style)
        kept.with_suffix(".gguf.part").touch()
        _make_unread(conversions, days=31)
        use_adapter(invoke, base_gguf, write_adapter(tmp_path / "tone", base))
        assert [file.name[:5] for file in conversions.iterdir()] == ["tone-"]

    @pytest.mark.parametrize(
        ("adapter", "code", "sentence"),
        [
            ("style/nothing", 3, "\n  An adapter is a directory with adapter_config.json, or a .gguf file.\n"),
            ("hf:owner/style:0.5", 3, "hf download owner/style --local-dir style; then: --adapter ./style"),
            ("owner/style", 3, "hf download owner/style --local-dir style"),
            ("./style:much", 2, "“much” is not a scale."),
            ("./style/adapter_config.json:nan", 2, "“nan” is not a scale."),
            ("./style:1000", 2, "The scale of --adapter must be between -100 and 100, not 1,000."),
            ("{base}", 2, "is a model, not an adapter."),
            ("{gguf}", 5, "base.gguf: it is not a LoRA adapter"),
            (".", 5, "Did you mean style?"),
            ("./settings.json", 5, "settings.json: it is not an adapter"),
        ],
    )
    def test_other_things_are_refused(
        self, adapter: str, code: int, sentence: str, style: Path, base: Path, base_gguf: Path, invoke: Run
    ) -> None:
        Path("settings.json").touch()  # in the working directory of the command
        adapter = adapter.format(base=base, gguf=base_gguf)
        message = expect_exit(invoke("run", str(base_gguf), "--raw", "Hi", "--adapter", adapter), code)
        assert sentence in message

    def test_an_adapter_is_checked_before_the_model_is_downloaded(
        self, base: Path, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_adapter(tmp_path / "style", base, use_dora=True)
        message = expect_exit(invoke("run", "hf:owner/repo", "Hi", "--adapter", str(folder)), 5)
        assert "the adapter uses DoRA" in message

    def test_run_with_a_remote_engine_has_no_adapters(self, style: Path, invoke: Run) -> None:
        message = expect_exit(invoke("run", "--url", "http://127.0.0.1:1/v1", "Hi", "--adapter", str(style)), 2)
        assert "--adapter" in message

    def test_a_batch_uses_adapters(self, style: Path, base: Path, invoke: Run, tmp_path: Path) -> None:
        chat, merged = (convert_checkpoint(base, tmp_path / "chat.gguf", "f32"), write_merged(base, style))
        (tmp_path / "prompts.txt").write_text("One\nTwo\n")

        def answers(model: Path, *arguments: str) -> list[str]:
            result = invoke("run", str(model), "--batch", "prompts.txt", "-n", "6", "--temp", "0", *arguments)
            expect_exit(result, 0)
            lines = [parse_json(line) for line in result.stdout.splitlines()]
            return [line["answer"] for line in sorted(lines, key=lambda line: line["id"])]

        assert answers(chat, "--adapter", str(style)) == answers(merged) != answers(chat)

    def test_convert_merges_before_quantizing(self, style: Path, base: Path, invoke: Run, tmp_path: Path) -> None:
        command = ("convert", str(base), "--type", "q8_0", "-o")
        message = expect_exit(invoke(*command, "a.gguf", "--merge", f"{style}:0.5"), 0)
        assert "Merged style: 7 matrices, rank 4." in message
        assert data_of(tmp_path / "a.gguf") == data_of(write_merged(base, style, kind="q8_0", weight=0.5))
        expect_exit(invoke(*command, "b.gguf"), 0)
        assert data_of(tmp_path / "a.gguf") != data_of(tmp_path / "b.gguf")
        message = expect_exit(invoke(*command, "c.gguf", "--merge", str(convert_adapter(style))), 2)
        assert "only directories of PEFT can be merged" in message
        assert "There is no adapter ./x on this disk." in expect_exit(invoke(*command, "c.gguf", "--merge", "./x"), 3)

    def test_quantized_checkpoints_are_not_merged(self, tmp_path: Path, style: Path, invoke: Run) -> None:
        packed = tmp_path / "Packed"
        write_packed_checkpoint(packed, "gptq")
        message = expect_exit(invoke("convert", str(packed), "--merge", str(style)), 2)
        assert "An adapter cannot be merged into quantized weights (GPTQ-Int4)." in message
        assert f"qwenlocal run {packed} --adapter {style}; or merge it into the original" in message
        repo = ConversionOptions(repo="Qwen/Qwen1.5-0.5B-GPTQ-Int4", merges=[WeightedAdapter(read_adapter(style))])
        with pytest.raises(UsageError) as caught:
            plan_conversion(Checkpoint.open(packed), [(tmp_path / "x.gguf", file_type("q4_0"))], repo)
        assert f"qwenlocal convert hf:Qwen/Qwen1.5-0.5B --merge {style}" in caught.value.hint

    def test_the_python_api_takes_adapters(
        self, style: Path, base: Path, base_gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("QWENLOCAL_HOME", str(tmp_path / "home"))

        def complete(model: Path, adapters: str | tuple[str | Path, ...] = ()) -> str:
            with qwenlocal.load(model, n_ctx=512, adapters=adapters) as loaded:
                return str(loaded.complete("Once upon", max_tokens=8, temperature=0))

        merged = complete(write_merged(base, style))
        assert complete(base_gguf, (style,)) == complete(base_gguf, str(style)) == merged != complete(base_gguf)
        assert complete(base_gguf, (f"{style}:0.5", convert_adapter(style), f"{style}:-0.5")) == merged

    @pytest.mark.slow
    def test_serve_uses_adapters_for_its_first_model(self, style: Path, base: Path, tmp_path: Path) -> None:
        chat = convert_checkpoint(base, tmp_path / "chat.gguf", "f32")

        def ask_server(model: Path, *arguments: object) -> str:
            with serving(tmp_path / "home", model, "-c", 512, *arguments) as server:
                assert not list((tmp_path / "home" / "servers").glob("*")) or not arguments
                answer_ = server.ask(temperature=0, max_tokens=8).json()
                return str(answer_["choices"][0]["message"]["content"])

        assert ask_server(chat, "--adapter", style) == ask_server(write_merged(base, style)) != ask_server(chat)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("a", "a", 1.0), ("a:0.5", "a", 0.5), ("a:-2", "a", -2.0), ("a:.5", "a", 0.5), ("b:2", "b:2", 1.0)],
)
def test_a_scale_follows_a_colon(
    text: str, path: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a")
    write_adapter(tmp_path / "b:2")
    assert parse_adapter(text) == AdapterRequest(Path(path), scale)


# --- the chat


def test_adapters_are_listed_scaled_and_switched_in_a_chat(terminal: Open, base: Path, tmp_path: Path) -> None:
    chat_model = convert_checkpoint(base, tmp_path / "chat.gguf", "f32")
    for name in ("style", "tone"):
        write_adapter(tmp_path / name, base, targets=LINEAR, seed=len(name))
    chat = start_chat(terminal, chat_model, "--adapter", "./style", "--adapter", "./tone:0.5", "-n", "4")
    chat.enter("/adapter", r"^  style  1\s*\n  tone  0\.5$")
    chat.enter("/adapter style 0.25", r"The next answer reads the chat again.*^  style  0\.25$")
    chat.enter("/adapter off", r"^  style  off\s*\n  tone  off$")
    chat.enter("/adapter tone", r"^  style  off\s*\n  tone  0\.5$")
    chat.enter("/adapter on", r"^  style  1\s*\n  tone  0\.5$")
    chat.enter("/adapter other", "No adapter is called “other”.*style, tone")
    chat.enter("/adapter style much", "“much” is not a scale")
    chat.enter("/adapter style 1e9", "The scale of /adapter must be between -100 and 100")
    chat.enter("Hi", "token limit")
    assert chat.exit() == 0


def test_names_of_adapters_are_completed() -> None:
    models: Any = SimpleNamespace(adapters=SimpleNamespace(scales={"style": 0.5, "tone": 0.0}))
    session = Session(Thread(), "m", models, lambda sentence: None, lambda question: "", [], Path())

    def complete(text: str) -> list[str]:
        return [each.text for each in ChatCompleter(session).get_completions(Document(text), CompleteEvent())]

    assert complete("/adap") == ["/adapter"]
    assert complete("/adapter ") == ["style", "tone", "off", "on"]
    assert complete("/adapter t") == ["tone"]
    models.adapters = None
    assert complete("/adapter ") == ["off", "on"]


def test_a_chat_without_adapters_says_how_to_use_one(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("/adapter", r"This model runs without adapters.*--adapter ADAPTER")
