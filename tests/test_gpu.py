"""
Models on a GPU: the real Vulkan backend, on any device that it finds.

`make test-gpu` brings lavapipe, a device in software: slow, but it runs the same shaders.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from checkpoint_files import SMALL, convert_checkpoint
from commands import expect_exit
from conftest import SAYS, Run
from server_process import serving

from qwenlocal.devices import Device
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.device_plan import DraftSpec
from qwenlocal.engine.gpu_offload import GpuOffload, GpuRequest, plan_gpu_offload, read_layer_sizes
from qwenlocal.engine.llama import Model, load_library
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import EngineLoader, LoadedModel, LoadOptions
from qwenlocal.engine.memory import ModelDims, estimate_memory
from qwenlocal.engine.sampling import Sampling
from qwenlocal.machine import power_source, this_machine
from qwenlocal.testing import write_checkpoint, write_model
from qwenlocal.weights.gguf_reader import read_metadata

pytestmark = pytest.mark.gpu

LAYERS = 4
_VISIBLE = "GGML_VK_VISIBLE_DEVICES"
GREEDY = Sampling(temperature=0, repeat_penalty=1)


@pytest.fixture(scope="module")
def gpu() -> Device:
    """The first GPU."""
    gpus = [device for device in load_library().list_devices() if device.is_gpu]
    if not gpus:
        pytest.skip("there is no GPU; make test-gpu brings one in software")
    return gpus[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpu") / "four.gguf", seed=5, layers=LAYERS)


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows all types can divide."""
    config = {**SMALL, "hidden_size": 256, "intermediate_size": 512}
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "Wide-Qwen", config=config)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What llama.cpp logs from now on."""
    lines: list[str] = []
    monkeypatch.setattr(load_library(), "echo", lines.append)
    return lines


def load(path: Path, gpu: GpuRequest) -> LoadedModel:
    options = LoadOptions(LoadRequest(n_ctx=512, threads=1), gpu)
    return EngineLoader().load(path, options, this_machine(), name="x", size=path.stat().st_size)


def answer(path: Path, gpu: GpuRequest, prompt: Sequence[int] = (1, 2, 3, 4, 5)) -> list[int]:
    loaded = load(path, gpu)
    steps = loaded.sequence.generate(prompt, GREEDY, limit=12)
    ids = [step for step in steps if isinstance(step, int)]
    loaded.close()
    return ids


@pytest.mark.parametrize("layers", [1, 2, LAYERS, LAYERS + 1])
def test_answers_are_those_of_the_processor(gpu: Device, model: Path, layers: int) -> None:
    prompt = list(range(1, 200))
    assert answer(model, GpuRequest(layers, (gpu.name,)), prompt) == answer(model, GpuRequest(0), prompt)


@pytest.mark.parametrize("request_", [GpuRequest(layers=0), GpuRequest(devices=())])
def test_no_layer_and_no_device_keep_the_model_from_the_gpu(
    gpu: Device, model: Path, log: list[str], request_: GpuRequest
) -> None:
    loaded = load(model, request_)
    loaded.close()
    assert (loaded.plan.offload.layers, loaded.plan.offload.devices) == (0, ())
    assert "CPU" in "".join(log)
    assert gpu.name not in "".join(log)


@pytest.mark.parametrize("layers", [2, LAYERS + 1])
def test_the_gpu_holds_what_is_planned(gpu: Device, model: Path, log: list[str], layers: int) -> None:
    loaded = load(model, GpuRequest(layers))
    (share,) = loaded.plan.offload.shares
    loaded.close()
    sizes = {
        what: float(size) * 2**20
        for what, size in re.findall(rf"{gpu.name} (\w+) buffer size = *([\d.]+) MiB", "".join(log))
    }
    assert sizes["model"] == pytest.approx(share.weights, rel=0.1, abs=20_000)
    assert sizes["KV"] == pytest.approx(share.kv_cache, rel=0.1, abs=20_000)
    dims = ModelDims.from_metadata(read_metadata(model))
    assert dims
    reserved = estimate_memory(dims, 0, ContextOptions(512, n_ubatch=512, flash_attention=True)).compute
    assert 0 < sizes["compute"] < reserved + (256 << 20)


def test_a_gpu_with_little_room_gets_the_layers_that_fit(gpu: Device, model: Path) -> None:
    dims = ModelDims.from_metadata(read_metadata(model))
    assert dims
    sizes = read_layer_sizes([model])
    options = ContextOptions(512)
    needed = next(
        free
        for free in range(256 << 20, gpu.total, 4096)
        if plan_gpu_offload(dims, sizes, options, [Device("GPU0", "", free, free, gpu.kind)]).layers == 3
    )
    tight = Device(gpu.name, gpu.description, needed, gpu.total, gpu.kind, gpu.backend)
    offload = plan_gpu_offload(dims, sizes, options, [tight])
    assert (offload.layers, offload.total) == (3, LAYERS + 1)


def test_the_cache_of_a_prompt_is_saved_and_restored(gpu: Device, model: Path, tmp_path: Path) -> None:
    options = LoadOptions(
        LoadRequest(n_ctx=512, threads=1), GpuRequest(LAYERS + 1, (gpu.name,)), prompt_caches=tmp_path, lookup=False
    )
    prompt, answers = list(range(1, 200)), []
    for _ in range(2):
        loaded = EngineLoader().load(model, options, this_machine(), name="x", size=model.stat().st_size)
        answers.append([step for step in loaded.sequence.generate(prompt, GREEDY, limit=8) if isinstance(step, int)])
        loaded.sequence.save_prompt_cache()
        loaded.close()
    assert answers[0] == answers[1]


def logits(path: Path, offload: GpuOffload, threads: int = 1) -> numpy.ndarray:
    """Return the logits after each of the last tokens of a prompt."""
    model = Model(path, gpu_layers=offload.layers, devices=offload.devices)
    context = Context(model, ContextOptions(256, threads=threads))
    context.decode([(0, list(range(1, 33)))], all_logits=(0,))
    rows = context.logit_rows(16).copy()
    context.close()
    model.close()
    return rows


@pytest.mark.parametrize("kind", ["f16", "q4_0", "q8_0", "q4_k_m", "q2_k", "q3_k_m", "iq4_nl", "tq1_0"])
def test_every_type_gives_the_logits_of_the_processor(
    gpu: Device, wide_checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    """The processor computes with types that the backend lacks."""
    file = convert_checkpoint(wide_checkpoint, tmp_path / "x.gguf", kind)
    layers = len(read_layer_sizes([file]).layers) + 1
    here, there = logits(file, GpuOffload(0, layers)), logits(file, GpuOffload(layers, layers, (gpu,)))
    assert numpy.isfinite(there).all()
    assert numpy.abs(here - there).max() < 0.05 * numpy.abs(here).max()


TWO_GPUS = """
import json, sys
from pathlib import Path
from qwenlocal.engine.llama import Model, load_library
from qwenlocal.engine.context import Context, ContextOptions
gpus = [device for device in load_library().list_devices() if device.is_gpu]
model = Model(Path(sys.argv[1]), gpu_layers=5, devices=gpus, layers_by_device=(2, 3))
context = Context(model, ContextOptions(256, threads=1))
context.decode([(0, list(range(1, 33)))], all_logits=(0,))
print(json.dumps([model.buffer_sizes, context.logit_rows(16).tolist()]))
"""


def test_two_gpus_share_the_layers(gpu: Device, model: Path) -> None:
    if gpu.backend != "Vulkan":
        pytest.skip("only Vulkan can show one GPU as two")
    command = [sys.executable, "-c", TWO_GPUS, str(model)]
    result = subprocess.run(command, env={**os.environ, _VISIBLE: "0,0"}, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
    sizes, rows = json.loads(result.stdout)
    assert sizes["Vulkan0"] > 0 and sizes["Vulkan1"] > 0
    here = logits(model, GpuOffload(0, LAYERS + 1))
    assert numpy.abs(here - numpy.array(rows)).max() < 0.01 * numpy.abs(here).max()


def test_a_draft_model_on_the_gpu_changes_no_answer(gpu: Device, model: Path, tmp_path: Path) -> None:
    draft = write_model(tmp_path / "draft.gguf", seed=6, layers=1)
    request = GpuRequest(LAYERS + 1, (gpu.name,))
    options = LoadOptions(
        LoadRequest(n_ctx=512, threads=1), request, draft=DraftSpec("draft", draft, draft.stat().st_size)
    )
    loaded = EngineLoader().load(model, options, this_machine(), name="x", size=model.stat().st_size)
    ids = [step for step in loaded.sequence.generate([1, 2, 3, 4, 5], GREEDY, limit=12) if isinstance(step, int)]
    loaded.close()
    assert ids == answer(model, GpuRequest(0))


class TestLittleMemory:
    """With a limit for the size of a buffer, which every tensor of the model exceeds, or only the larger ones."""

    def answer(self, qwenlocal: Run, model: Path, limit: int) -> subprocess.CompletedProcess[str]:
        environment = {_VISIBLE: "0", "GGML_VK_FORCE_MAX_BUFFER_SIZE": str(limit)}
        options = ("-ngl", "all", "--stats", "-n", "4", "--no-server")
        return qwenlocal("run", str(model), "Hi", *options, environment=environment)

    def test_layers_without_room_stay_with_the_processor(self, gpu: Device, model: Path, qwenlocal: Run) -> None:
        result = self.answer(qwenlocal, model, 1000)
        expect_exit(result, 0)
        note = re.search(rf"it holds (\d) of {LAYERS + 1} planned layers", result.stderr)
        assert note
        assert int(note[1]) < 2
        assert f"{LAYERS + 1} of {LAYERS + 1} layers on" not in result.stderr

    def test_a_gpu_that_runs_out_of_memory_later_ends_the_answer(
        self, gpu: Device, model: Path, qwenlocal: Run
    ) -> None:
        results = [self.answer(qwenlocal, model, limit) for limit in range(100_000, 400_000, 50_000)]
        failed = [result for result in results if result.returncode]
        assert failed
        for result in failed:
            assert "The GPU ran out of memory: failed to allocate Vulkan0 buffer" in expect_exit(result, 6)


class TestCommands:
    @pytest.fixture
    def environment(self, environment: dict[str, str]) -> dict[str, str]:
        """That of other tests, in which the same GPU is visible."""
        return {**environment, _VISIBLE: os.environ.get(_VISIBLE, "0")}

    def test_run_uses_the_gpu_and_says_how(self, gpu: Device, speaking_model: Path, qwenlocal: Run) -> None:
        result = qwenlocal("run", str(speaking_model), "Hi", "-ngl", "all", "--stats")
        assert expect_exit(result, 0) is not None
        assert result.stdout.strip() == SAYS
        assert re.search(rf"3 of 3 layers on {gpu.name} \(0\.0 GiB\)", result.stderr)
        assert "ggml" not in result.stderr

    def test_devices_are_chosen_by_name(self, gpu: Device, speaking_model: Path, qwenlocal: Run) -> None:
        result = qwenlocal("run", str(speaking_model), "Hi", "--device", gpu.name.lower(), "-ngl", "2", "--stats")
        assert f"2 of 3 layers on {gpu.name}" in result.stderr
        assert "layers on" not in qwenlocal("run", str(speaking_model), "Hi", "--device", "none", "--stats").stderr
        missing = qwenlocal("run", str(speaking_model), "Hi", "--device", "Vulkan77")
        assert f"There is no GPU named Vulkan77; there is: {gpu.name}" in expect_exit(missing, 2)

    def test_doctor_lists_the_device_and_its_backend(self, gpu: Device, qwenlocal: Run) -> None:
        output = qwenlocal("doctor", "--offline").stdout
        assert f"{gpu.name}: {gpu.description}, driver {gpu.driver}" in output
        assert f"{gpu.backend} uses {gpu.name}" in output

    def test_the_first_run_measures_what_the_gpu_is_good_for(
        self, gpu: Device, speaking_model: Path, qwenlocal: Run, environment: dict[str, str]
    ) -> None:
        result = qwenlocal("run", str(speaking_model), "Hi")
        assert result.stdout.strip() == SAYS
        assert f"Comparing {gpu.description} with the processor" in result.stderr
        (file,) = Path(environment["QWENLOCAL_HOME"], "tuned").iterdir()
        (entry,) = json.loads(file.read_text()).values()
        assert entry["gpu"]["devices"] == [gpu.name]
        for use, said in (("layers", "3 of 3 layers on"), ("prompts", "long prompts on"), ("none", "GiB free\n")):
            settings = {power_source(): {"gpu": {"devices": [gpu.name], "use": use}}}
            file.write_text(json.dumps(settings))
            result = qwenlocal("run", str(speaking_model), "Hi", "--stats")
            assert result.stdout.strip() == SAYS
            assert said in result.stderr
            assert "Comparing" not in result.stderr

    def test_a_driver_that_crashes_while_it_is_measured_is_not_tried_again(
        self, gpu: Device, speaking_model: Path, qwenlocal: Run, environment: dict[str, str]
    ) -> None:
        crash = (
            "import os, sys; from qwenlocal.measure import gpu_use; gpu_use.find_gpu_use = lambda *_: os._exit(3);"
            "from qwenlocal.cli import main; sys.argv = ['qwenlocal', *sys.argv[1:]]; main()"
        )
        command = [sys.executable, "-c", crash, "run", str(speaking_model), "Hi"]
        assert subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=60).returncode == 3
        result = qwenlocal("run", str(speaking_model), "Hi", "--stats")
        assert result.stdout.strip() == SAYS
        assert "Comparing" not in result.stderr
        assert "layers on" not in result.stderr

    def test_serve_uses_the_gpu(self, gpu: Device, speaking_model: Path, tmp_path: Path) -> None:
        with serving(tmp_path, speaking_model, "-ngl", "all") as server:
            assert server.ask().json()["choices"][0]["message"]["content"] == SAYS
            assert f"3 of 3 layers on {gpu.name}" in server.lines[0]

    def test_plan_shows_the_share_of_the_gpu(self, gpu: Device, speaking_model: Path, qwenlocal: Run) -> None:
        assert f"3 of 3 layers on {gpu.name}" in qwenlocal("plan", str(speaking_model)).stdout
        facts = json.loads(qwenlocal("plan", str(speaking_model), "-ngl", "1", "--json").stdout)
        assert (facts["plan"]["gpu_layers"], facts["plan"]["devices"][0]["name"]) == (1, gpu.name)
