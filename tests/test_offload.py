"""
Layers on a graphics card: a card stood in for by a worker on the loopback, through llama.cpp's own remote device.

A remote device counts as a graphics card, with memory; so the real code puts real layers on it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenlocal.chat import loading
from qwenlocal.chat.loading import Loading, LoadOptions
from qwenlocal.engine.context import ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import Offload
from qwenlocal.engine.memory import ModelDims
from qwenlocal.engine.wanted import Wanted
from qwenlocal.errors import BadWeights, ContextNotCreated, NotEnoughMemory
from qwenlocal.ggml import Device
from qwenlocal.machine import this_machine
from qwenlocal.testing import write_model

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
from qwenlocal.engine.llama import library
from qwenlocal.terminal.tty import say_last_words
library().last_words = say_last_words
print("answering", flush=True)
for step in loaded.sequence.generate([1, 2, 3], Sampling(temperature=0), limit=1 << 30):
    loaded.sequence.adopt([]) if len(loaded.sequence.held) > 400 else None
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
from qwenlocal.chat import loading
from qwenlocal.engine.llama import library
from qwenlocal.engine.wanted import Wanted
from qwenlocal.engine.sampling import Sampling
from qwenlocal.machine import this_machine
rpc.ggml_backend_rpc_add_server.restype, rpc.ggml_backend_rpc_add_server.argtypes = pointer, [ctypes.c_char_p]
ggml.ggml_backend_register.argtypes = [pointer]
ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(sys.argv[1].encode()))
path, free = Path(sys.argv[2]), int(sys.argv[4])
usual = loading.devices
if free:
    loading.devices = lambda: [replace(card, free=free) if card.is_gpu else card for card in usual()]
layers = None if sys.argv[3] == "auto" else int(sys.argv[3])
options = loading.LoadOptions(Wanted(n_ctx=512, threads=1), layers)
loaded = loading.Loading().load(path, options, this_machine(), name="x", size=path.stat().st_size)
steps = loaded.sequence.generate([1, 2, 3, 4, 5], Sampling(temperature=0, repeat_penalty=1), limit=12)
said = [line.text for line in library().log]
print(json.dumps({"ids": [step for step in steps if isinstance(step, int)], "cards": sum(d.is_gpu for d in usual()),
                  "log": [line for line in said if "KV buffer" in line or "layers to GPU" in line]}))
loaded.close()
"""
)


@pytest.fixture(scope="module")
def worker() -> Iterator[str]:
    with start_worker() as (place, _process):
        yield place


@contextlib.contextmanager
def start_worker() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A remote device, and the process that it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    nothing = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-c", WORKER, place], stdout=nothing, stderr=nothing)
    host, _, port = place.partition(":")
    for _ in range(200):
        with socket.socket() as client:
            client.settimeout(0.1)
            if client.connect_ex((host, int(port))) == 0:
                break
        if process.poll() is not None:
            pytest.skip("this llama.cpp was compiled without remote devices")
    yield place, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("offload") / "four.gguf", seed=5, layers=4)


def run(worker: str, model: Path, layers: str, free: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-c", CLIENT, worker, str(model), layers, str(free)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries have other names elsewhere")
def test_answers_are_the_same_wherever_the_layers_are(worker: str, model: Path) -> None:
    nowhere, some, everywhere = (run(worker, model, layers) for layers in ("0", "2", "5"))
    assert nowhere["cards"] == 1
    assert nowhere["ids"] == some["ids"] == everywhere["ids"]
    assert not any("RPC0" in line for line in nowhere["log"])
    assert any("RPC0" in line for line in some["log"])
    assert any("CPU" in line for line in some["log"])


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries have other names elsewhere")
def test_as_many_layers_go_there_as_its_memory_holds(worker: str, model: Path) -> None:
    size = model.stat().st_size
    room = (512 << 20) + size // 2  # half of the model above the margin
    assert any("RPC0" in line for line in run(worker, model, "auto", room)["log"])
    assert any("CPU" in line for line in run(worker, model, "auto", room)["log"])
    assert not any("RPC0" in line for line in run(worker, model, "auto", 100 << 20)["log"])
    assert not any("CPU" in line for line in run(worker, model, "auto")["log"])


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries have other names elsewhere")
def test_a_card_that_vanishes_in_the_middle_of_an_answer_ends_it_with_a_sentence(model: Path) -> None:
    begin, _, _ = CLIENT.partition("steps =")
    with start_worker() as (place, process):
        command = [sys.executable, "-c", begin + ENDLESS, place, str(model), "5", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            assert client.stdout and client.stdout.readline() == "answering\n"
            process.kill()
            _, said = client.communicate(timeout=30)
    assert client.returncode == 1
    assert "qwenlocal: llama.cpp stopped: Remote RPC server crashed or returned malformed response." in said
    assert "run without it: -ngl 0" in said


def test_a_card_with_less_room_than_it_said_gets_fewer_layers_and_that_is_said(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    class Reluctant(Model):
        def __init__(self, path: Path, *, gpu_layers: int = 0, **more: Any) -> None:
            tried.append(gpu_layers)
            if gpu_layers > 1:
                raise BadWeights(path, "llama.cpp cannot load it: unable to allocate RPC0 buffer")
            super().__init__(path, gpu_layers=0, **more)

    monkeypatch.setattr(loading, "Model", Reluctant)
    card = Device("GPU0", "a card", 8 << 30, 8 << 30, is_gpu=True)
    monkeypatch.setattr(loading, "devices", lambda: [card])
    options = LoadOptions(gpu_layers=12)
    loaded = Loading().load(random_model, options, this_machine(), name="x", size=random_model.stat().st_size)
    loaded.close()
    assert tried == [3, 2, 1]  # there are two layers and the output
    assert any("1 layers are there, not 3" in note for note in loaded.notes)


def test_what_is_not_on_the_card_needs_memory_here() -> None:
    seven = ModelDims(32, 32, 128, 32768, 4096, 11008, 32)
    card = Device("GPU0", "a card", 24 << 30, 24 << 30, is_gpu=True)
    offload = loading._offload(seven, 8 << 30, Wanted(), [card], 1)
    assert offload == Offload(1, 33)
    with pytest.raises(NotEnoughMemory):
        loading._plan("x", seven, 8 << 30, 3 << 30, Wanted(), offload)
    everything = loading._offload(seven, 8 << 30, Wanted(), [card], loading.ALL_LAYERS)
    assert everything == Offload(33, 33)
    assert loading._plan("x", seven, 8 << 30, 6 << 30, Wanted(), everything).options.n_ctx == 4096


def test_a_model_of_a_short_context_is_not_stretched_for_a_card() -> None:
    short = ModelDims(2, 2, 64, 256, 128, 64, 2)
    plan = loading._plan("x", short, 1 << 20, 8 << 30, Wanted(), Offload(3, 3))
    assert (plan.options.n_ctx, plan.options.rope) == (256, None)


def test_a_damaged_file_is_not_tried_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Broken(Model):
        def __init__(self, path: Path, *, gpu_layers: int = 0, **more: Any) -> None:
            tried.append(gpu_layers)
            raise BadWeights(path, "llama.cpp cannot load it: tensor data is not within the file bounds")

    monkeypatch.setattr(loading, "Model", Broken)
    with pytest.raises(BadWeights):
        loading._open(tmp_path / "x.gguf", ContextOptions(512), Offload(33, 33), {}, lambda _: True)
    assert tried == [33]


def test_where_even_no_layer_helps_the_reason_is_said(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(Model):
        def __init__(self, path: Path, **more: Any) -> None:
            raise ContextNotCreated(512, "no room")

    monkeypatch.setattr(loading, "Model", Never)
    with pytest.raises(ContextNotCreated):
        loading._open(random_model, ContextOptions(512), Offload(5, 5), {}, lambda _: True)
