"""
GPU offload, tested with an RPC worker on the loopback interface as the GPU.

llama.cpp treats a remote device as a GPU with memory, so the real code offloads real layers to it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenlocal.chat.chat_model import load_chat_model
from qwenlocal.devices import Device, DeviceKind
from qwenlocal.engine import device_plan, loader
from qwenlocal.engine.context import AbortFlag, ContextOptions
from qwenlocal.engine.device_plan import DraftSpec
from qwenlocal.engine.gpu_offload import (
    ALL_LAYERS,
    GpuOffload,
    GpuRequest,
    LayerSizes,
    plan_gpu_offload,
    read_layer_sizes,
)
from qwenlocal.engine.llama import LoadCancelled, Model, load_library
from qwenlocal.engine.load_plan import FewerGpuLayers, LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.memory import ModelDims, estimate_memory
from qwenlocal.errors import BadWeights, ContextNotCreated, GpuOutOfMemory, NotEnoughMemory
from qwenlocal.machine import Memory, this_machine
from qwenlocal.measure.gpu_use import find_gpu_use, measure_gpu_use
from qwenlocal.terminal.load_notes import describe_note
from qwenlocal.testing import write_model
from qwenlocal.weights.gguf_reader import read_metadata

CARD = Device("GPU0", "a card", 8 << 30, 8 << 30, DeviceKind.GPU)
LIBRARIES = """
import ctypes, importlib.util, json, sys
from dataclasses import replace
from pathlib import Path
folder = Path(list(importlib.util.find_spec("llama_cpp").submodule_search_locations)[0]) / "lib"
names = ("libggml-base.so.0", "libggml.so.0", "libggml-rpc.so.0")
base, ggml, rpc = (ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names)
pointer = ctypes.c_void_p
"""
ENDLESS = """
import threading, time
from qwenlocal.engine.llama import load_library
from qwenlocal.errors import EngineCrashed
from qwenlocal.terminal.tty import exit_after_crash
load_library().on_abort = lambda reason: exit_after_crash(EngineCrashed(reason, uses_gpu=True))
print("answering", flush=True)
for step in loaded.sequence.generate([1, 2, 3], Sampling(temperature=0), limit=1 << 30):
    loaded.sequence.adopt([]) if len(loaded.sequence.cached_ids) > 400 else None
    time.sleep(0.005)
"""
WORKER = (
    LIBRARIES
    + """
ggml.ggml_backend_dev_by_name.restype, ggml.ggml_backend_dev_by_name.argtypes = pointer, [ctypes.c_char_p]
cards = (pointer * 1)(ggml.ggml_backend_dev_by_name(b"CPU"))
start = rpc.ggml_backend_rpc_start_server
start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, pointer]
start(sys.argv[1].encode(), None, 1, 1, cards)
"""
)
CLIENT = (
    LIBRARIES
    + """
from qwenlocal.chat import chat_model
from qwenlocal.engine import device_plan, loader
from qwenlocal.engine.llama import load_library
from qwenlocal.engine.gpu_offload import GpuRequest
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.sampling import Sampling
from qwenlocal.machine import this_machine
rpc.ggml_backend_rpc_add_server.restype, rpc.ggml_backend_rpc_add_server.argtypes = pointer, [ctypes.c_char_p]
ggml.ggml_backend_register.argtypes = [pointer]
ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(sys.argv[1].encode()))
path, free = Path(sys.argv[2]), int(sys.argv[4])
library = load_library()
usual = library.list_devices
if free:
    library.list_devices = lambda: [replace(card, free=free) if card.is_gpu else card for card in usual()]
layers = None if sys.argv[3] == "auto" else int(sys.argv[3])
options = loader.LoadOptions(LoadRequest(n_ctx=512, threads=1), GpuRequest(layers))
loaded = chat_model.load_chat_model(path, options, this_machine(), name="x", size=path.stat().st_size)
steps = loaded.sequence.generate([1, 2, 3, 4, 5], Sampling(temperature=0, repeat_penalty=1), limit=12)
said = [line.text for line in load_library().log]
print(json.dumps({"ids": [step for step in steps if isinstance(step, int)], "cards": sum(d.is_gpu for d in usual()),
                  "log": [line for line in said if "KV buffer" in line or "layers to GPU" in line]}))
loaded.close()
"""
)


@pytest.fixture(scope="module")
def worker() -> Iterator[str]:
    with start_worker() as (address, _process):
        yield address


@contextlib.contextmanager
def start_worker() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start an RPC worker; yield its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    nothing = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-c", WORKER, address], stdout=nothing, stderr=nothing)
    host, _, port = address.partition(":")
    for _ in range(200):
        with socket.socket() as client:
            client.settimeout(0.1)
            if client.connect_ex((host, int(port))) == 0:
                break
        if process.poll() is not None:
            pytest.skip("this llama.cpp was compiled without remote devices")
    yield address, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("offload") / "four.gguf", seed=5, layers=4)


def run(worker: str, model: Path, layers: str, free: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-c", CLIENT, worker, str(model), layers, str(free)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
    output: dict[str, Any] = json.loads(result.stdout)
    return output


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries have other names elsewhere")
def test_answers_do_not_depend_on_the_device(worker: str, model: Path) -> None:
    nowhere, some, everywhere = (run(worker, model, layers) for layers in ("0", "2", "5"))
    assert nowhere["cards"] == 1
    assert nowhere["ids"] == some["ids"] == everywhere["ids"]
    assert not any("RPC0" in line for line in nowhere["log"])
    assert any("RPC0" in line for line in some["log"])
    assert any("CPU" in line for line in some["log"])


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries have other names elsewhere")
def test_automatic_offload_follows_the_free_memory(worker: str, model: Path) -> None:
    dims, sizes = ModelDims.from_metadata(read_metadata(model)), read_layer_sizes([model])
    assert dims
    options = ContextOptions(512, n_ubatch=512, flash_attention=True)
    reserve = (256 << 20) + estimate_memory(dims, 0, options).compute
    room = reserve + sizes.output + 2 * max(sizes.layers) + dims.kv_cache_bytes(512) // 2
    assert any("RPC0" in line for line in run(worker, model, "auto", room)["log"])
    assert any("CPU" in line for line in run(worker, model, "auto", room)["log"])
    assert not any("RPC0" in line for line in run(worker, model, "auto", 100 << 20)["log"])
    assert not any("CPU" in line for line in run(worker, model, "auto")["log"])


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries have other names elsewhere")
def test_a_lost_gpu_ends_an_answer_with_an_error_message(model: Path) -> None:
    begin, _, _ = CLIENT.partition("steps =")
    with start_worker() as (address, process):
        command = [sys.executable, "-c", begin + ENDLESS, address, str(model), "5", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            assert client.stdout and client.stdout.readline() == "answering\n"
            process.kill()
            _, said = client.communicate(timeout=30)
    assert client.returncode == 1
    assert "qwenlocal: llama.cpp stopped: Remote RPC server crashed or returned malformed response." in said
    assert "run without it: -ngl 0" in said


def test_a_gpu_with_less_memory_than_reported_gets_fewer_layers_and_a_note(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    class Reluctant(Model):
        def __init__(self, path: Path, *, gpu_layers: int = 0, **more: Any) -> None:
            tried.append(gpu_layers)
            if gpu_layers > 1:
                raise BadWeights(path, "llama.cpp cannot load it: unable to allocate RPC0 buffer")
            super().__init__(path, gpu_layers=0, **more)

    monkeypatch.setattr(loader, "Model", Reluctant)
    monkeypatch.setattr(load_library(), "list_devices", lambda: [CARD])
    options = LoadOptions(gpu=GpuRequest(12))
    loaded = load_chat_model(random_model, options, this_machine(), name="x", size=random_model.stat().st_size)
    loaded.close()
    assert tried == [3, 2, 1]  # there are two layers and the output
    assert loaded.notes == (FewerGpuLayers(1, 3),)
    assert "it holds 1 of 3 planned layers" in describe_note(loaded.notes[0])


def test_a_draft_model_that_does_not_fit_beside_the_model_stays_with_the_processor(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, tried = write_model(tmp_path / "draft.gguf", layers=1), list[int]()

    class Reluctant(Model):
        def __init__(self, path: Path, *, gpu_layers: int = 0, **more: Any) -> None:
            if path == draft:
                tried.append(gpu_layers)
                if gpu_layers:
                    raise BadWeights(path, "llama.cpp cannot load it: unable to allocate GPU0 buffer")
            super().__init__(path, gpu_layers=0, **more)

    monkeypatch.setattr(loader, "Model", Reluctant)
    monkeypatch.setattr(load_library(), "list_devices", lambda: [CARD])
    options = LoadOptions(draft=DraftSpec("draft", draft, draft.stat().st_size))
    loaded = load_chat_model(random_model, options, this_machine(), name="x", size=random_model.stat().st_size)
    loaded.close()
    assert tried == [2, 1, 0]


def test_layers_that_are_not_offloaded_need_memory() -> None:
    seven = ModelDims(32, 32, 128, 32768, 4096, 11008, 32)
    sizes = LayerSizes(487 << 20, (220 << 20,) * 32, 487 << 20)
    size = sizes.input + sum(sizes.layers) + sizes.output
    card = Device("GPU0", "a card", 24 << 30, 24 << 30, DeviceKind.GPU)
    one, all_layers = (plan_gpu_offload(seven, sizes, ContextOptions(4096), [card], count) for count in (1, ALL_LAYERS))
    with pytest.raises(NotEnoughMemory):
        device_plan.plan_load_with_offload("x", seven, size, 3 << 30, LoadRequest(), one)
    plan = device_plan.plan_load_with_offload("x", seven, size, 3 << 30, LoadRequest(), all_layers)
    assert plan.memory and (plan.memory.weights, plan.memory.kv_cache) == (sizes.input, 0)
    assert plan.options.n_ctx == 4096


def test_layers_on_an_integrated_gpu_take_the_memory_of_the_machine() -> None:
    seven = ModelDims(32, 32, 128, 32768, 4096, 11008, 32)
    sizes = LayerSizes(487 << 20, (220 << 20,) * 32, 487 << 20)
    size = sizes.input + sum(sizes.layers) + sizes.output
    chip = Device("GPU0", "a chip", 24 << 30, 24 << 30, DeviceKind.INTEGRATED_GPU)
    offload = plan_gpu_offload(seven, sizes, ContextOptions(4096), [chip])
    assert offload.layers == 33
    with pytest.raises(NotEnoughMemory):
        device_plan.plan_load_with_offload("x", seven, size, 8 << 30, LoadRequest(), offload)
    assert device_plan.plan_load_with_offload("x", seven, size, 12 << 30, LoadRequest(), offload).offload == offload


def test_the_layers_that_a_user_puts_on_an_integrated_gpu_are_counted_even_if_they_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seven = ModelDims(32, 32, 128, 32768, 4096, 11008, 32)
    sizes = LayerSizes(487 << 20, (119 << 20,) * 32, 487 << 20)
    chip = replace(CARD, free=2 << 30, kind=DeviceKind.INTEGRATED_GPU)
    monkeypatch.setattr(load_library(), "list_devices", lambda: [chip])
    offload = device_plan.choose_offload(lambda: sizes, seven, 5 << 30, LoadRequest(), GpuRequest(ALL_LAYERS))
    with pytest.raises(NotEnoughMemory) as error:
        device_plan.plan_load_with_offload("x", seven, 5 << 30, 4 << 30, LoadRequest(), offload)
    assert error.value.available == 4 << 30
    assert error.value.needed > 5 << 30


def test_a_model_that_gpus_hold_in_part_gets_a_shorter_context_if_the_rest_needs_it() -> None:
    seven = ModelDims(32, 32, 128, 32768, 4096, 11008, 32)
    sizes = LayerSizes(487 << 20, (119 << 20,) * 32, 487 << 20)
    offload = plan_gpu_offload(seven, sizes, ContextOptions(4096), [replace(CARD, free=1 << 30)])
    assert 0 < offload.layers < 3
    plan = device_plan.plan_load_with_offload("x", seven, 5 << 30, 5 << 30, LoadRequest(), offload)
    assert plan.options.n_ctx < 4096


@pytest.mark.parametrize(("free", "n_ctx"), [(9, 4096), (13, 8192), (24, 16384), (40, 32768)])
def test_the_context_grows_with_the_room_that_all_layers_leave(
    free: int, n_ctx: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seven = ModelDims(32, 32, 128, 32768, 4096, 11008, 32)
    sizes = LayerSizes(487 << 20, (119 << 20,) * 32, 487 << 20)
    card = Device("GPU0", "a card", free << 30, free << 30, DeviceKind.GPU)
    monkeypatch.setattr(load_library(), "list_devices", lambda: [card])
    offload = device_plan.choose_offload(lambda: sizes, seven, 5 << 30, LoadRequest(), GpuRequest())
    assert (offload.layers, offload.n_ctx) == (33, n_ctx)
    plan = device_plan.plan_load_with_offload("x", seven, 5 << 30, 4 << 30, LoadRequest(), offload)
    assert plan.options.n_ctx == n_ctx


def test_offload_does_not_extend_a_short_context() -> None:
    short = ModelDims(2, 2, 64, 256, 128, 64, 2)
    offload = plan_gpu_offload(short, LayerSizes(9, (9, 9), 9), ContextOptions(256), [CARD])
    plan = device_plan.plan_load_with_offload("x", short, 1 << 20, 8 << 30, LoadRequest(), offload)
    assert (plan.options.n_ctx, plan.options.rope) == (256, None)


def test_a_damaged_file_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Broken(Model):
        def __init__(self, path: Path, *, gpu_layers: int = 0, **more: Any) -> None:
            tried.append(gpu_layers)
            raise BadWeights(path, "llama.cpp cannot load it: tensor data is not within the file bounds")

    monkeypatch.setattr(loader, "Model", Broken)
    with pytest.raises(BadWeights):
        loader.open_model(tmp_path / "x.gguf", ContextOptions(512), GpuOffload(33, 33), {}, lambda _: True)
    assert tried == [33]


def test_the_reason_is_raised_if_no_offload_helps(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(Model):
        def __init__(self, path: Path, **more: Any) -> None:
            raise ContextNotCreated(512, "no room")

    monkeypatch.setattr(loader, "Model", Never)
    with pytest.raises(ContextNotCreated):
        loader.open_model(random_model, ContextOptions(512), GpuOffload(5, 5), {}, lambda _: True)


def test_a_gpu_is_not_compared_with_a_processor_that_cannot_hold_the_model(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_library(), "list_devices", lambda: [CARD])
    small = replace(this_machine(), memory=lambda: Memory(8 << 20, 8 << 20))
    size = random_model.stat().st_size
    assert measure_gpu_use(random_model, size, LoadOptions(), small, AbortFlag()) is None


def test_a_measurement_can_be_stopped(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_library(), "list_devices", lambda: [CARD])
    abort = AbortFlag()
    with pytest.raises(LoadCancelled):
        size = random_model.stat().st_size
        measure_gpu_use(random_model, size, LoadOptions(), this_machine(), abort, lambda devices: abort.set())


@pytest.mark.parametrize(
    "error", [NotEnoughMemory("x", 2, 1, hint=""), GpuOutOfMemory("x"), ContextNotCreated(512, "x")]
)
def test_a_gpu_that_cannot_hold_the_layers_does_not_get_them(random_model: Path, error: Exception) -> None:
    def plan(offload: GpuOffload) -> ContextOptions:
        if offload.layers:
            raise error
        return ContextOptions(512)

    assert find_gpu_use(random_model, GpuOffload(3, 3), plan, AbortFlag()).use != "layers"
