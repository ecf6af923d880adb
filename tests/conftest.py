"""Shared fixtures: separate folders, tiny models, a loopback hub, the program as a process."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import typer.testing
from adapter_files import base, base_gguf, mixture, tied  # noqa: F401 - fixtures
from checkpoint_files import LARGE, SMALL, UNALIGNED, convert_checkpoint, plan_job
from generation import OpenContext
from gguf_files import copy_with_metadata
from hub import HubServer
from hub_checkpoints import HF_NAME, WeightRequests, publish
from interruptions import SLOW_TYPE
from starter import home, starter  # noqa: F401 - fixtures
from typer.testing import CliRunner

from qwenlocal.chat.journal import Journal
from qwenlocal.cli.app import app
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.paths import Folders
from qwenlocal.testing import write_checkpoint, write_model
from qwenlocal.weights.write_workers import run_job

SAYS = "Paris, fun"
# Building all commands from their signatures takes typer 60 ms, at every call.
typer.testing._get_command = functools.cache(typer.testing._get_command)  # type: ignore[attr-defined]


# Tests whose ids hold one of these run in one process: they share half a gigabyte of weights (the starter), Qwen's
# vocabulary, or tables of ggml for the smallest types, which all take seconds to load.
SHARED = ("test_real.py", "test_tokens.py", "test_tensors_with_an_imatrix")


def pytest_configure() -> None:
    """Let Ctrl-C reach the program, and keep parallel test processes off each other's processors."""
    # A shell that starts the tests with `nohup … &` ignores SIGINT for its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Threads of ggml spin while they wait: two processes with two threads each on two cores take twice the time.
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and hasattr(os, "sched_setaffinity"):
        number, cores = int(worker.removeprefix("gw")), sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::count] or [cores[number % len(cores)]])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run two tests per processor: many wait for other processes."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests one by one, those of SHARED together; pytest 9.2 ignores xdist_group (pytest-xdist #1386)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((part for part in SHARED if part in nodeid), nodeid)

    return Scheduler(config, log)


@pytest.fixture(autouse=True)
def _isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees this machine's models, settings, language or proxies."""
    for name in list(os.environ):
        if name.startswith(("HF_", "QWENLOCAL_", "OLLAMA", "LLAMA_", "MODELSCOPE")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "person"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("LANGUAGE", "en")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    person = tmp_path / "person"
    return Folders(person / "qwenlocal", person / "hub", person, person / ".cache")


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers "Paris, fun" to everything."""
    return write_model(tmp_path_factory.mktemp("models") / "speaking.gguf", reply=SAYS)


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends its answer."""
    return write_model(
        tmp_path_factory.mktemp("models") / "endless.gguf", reply="abcdefgh ", ends=False, context=100_000
    )


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every answer depends on every token before it."""
    return write_model(tmp_path_factory.mktemp("models") / "random.gguf", seed=7)


@pytest.fixture
def open_context() -> Iterator[OpenContext]:
    """Opens contexts with options of `ContextOptions`: `open_context(random_model, n_ctx=512)`."""
    contexts: list[Context] = []

    def open_(model: Path, n_ctx: int = 1024, **options: Any) -> Context:
        # Flash attention rounds batches and single tokens further apart: on some processors a token differs.
        settings = {"threads": 1, "flash_attention": False, **options}
        contexts.append(Context(Model(model), ContextOptions(n_ctx, **settings)))
        return contexts[-1]

    yield open_
    for context in contexts:
        context.close()
        context.model.close()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def journal(folders: Folders) -> Callable[[], Journal]:
    """Opens the journal of the user."""
    return lambda: Journal(folders.journal)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(folders: Folders, hub: HubServer) -> dict[str, str]:
    """Environment variables for the program as a process: separate folders, and a network that is only the loopback
    hub."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        **kept,
        "LANG": "C.UTF-8",
        "HOME": str(folders.user),
        "QWENLOCAL_HOME": str(folders.home),
        "HF_HUB_CACHE": str(folders.hub_cache),
        "HF_ENDPOINT": hub.url,
        "MODELSCOPE_DOMAIN": hub.url,
        "PIP_INDEX_URL": f"{hub.url}/simple",
        "NO_COLOR": "1",
        "PYTHONUTF8": "1",
    }


@pytest.fixture
def qwenlocal(environment: dict[str, str], tmp_path: Path) -> Run:
    """Runs the program: `qwenlocal("list", "--json")`; standard input is empty unless `input` is given."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        extra = options.pop("environment", {})
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [sys.executable, "-m", "qwenlocal", *arguments],
            **{
                "env": {**environment, **extra},  # type: ignore[dict-item]
                "cwd": tmp_path,
                "capture_output": True,
                "text": True,
                "timeout": 60,
                **({} if "input" in options or "stdin" in options else {"stdin": subprocess.DEVNULL}),
                **options,
            },
        )

    return run


@pytest.fixture
def invoke(request: pytest.FixtureRequest, folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `qwenlocal` in this process; unless a test has a hub, no server answers it."""
    url = request.getfixturevalue("hub").url if "hub" in request.fixturenames else "http://127.0.0.1:1"
    kept = {"HOME": folders.user, "QWENLOCAL_HOME": folders.home, "HF_HUB_CACHE": folders.hub_cache}
    for name, value in {**kept, "HF_ENDPOINT": url, "MODELSCOPE_DOMAIN": url, "PIP_INDEX_URL": f"{url}/simple"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.CompletedProcess[str]:
        result = CliRunner().invoke(app, arguments, env=dict(environment))
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def terminal(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the program in a terminal of its own: `terminal("run", "x.gguf")`, a `terminal.Terminal`."""
    from terminal import Terminal

    opened: list[Terminal] = []

    def open_(*arguments: str, term: str = "xterm-256color", **variables: str) -> Terminal:
        command = [sys.executable, "-m", "qwenlocal", *arguments]
        one = Terminal(command, {**environment, "TERM": term, **variables}, tmp_path)
        opened.append(one)
        return one

    yield open_
    for one in opened:
        one.close()


# --- checkpoints, and the GGUF files that they become


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer that no test changes."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "Tiny-Qwen-0.1B", config=SMALL)


@pytest.fixture(scope="session")
def tiny_f32(tiny_checkpoint: Path) -> Path:
    """An undamaged GGUF file, all of it f32."""
    return convert_checkpoint(tiny_checkpoint, tiny_checkpoint.parent / "good.gguf", "f32")


@pytest.fixture(scope="session")
def tiny_bf16(tiny_checkpoint: Path) -> Path:
    """An undamaged GGUF file, its matrices bf16."""
    return convert_checkpoint(tiny_checkpoint, tiny_checkpoint.parent / "half.gguf", "bf16")


@pytest.fixture
def no_rope_base(tiny_f32: Path, tmp_path: Path) -> Path:
    """A file that lacks the rope base."""
    return copy_with_metadata(tiny_f32, tmp_path / "old.gguf", {"qwen2.rope.freq_base": None})


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name))


@pytest.fixture
def hub_checkpoint(hub: HubServer, tiny_checkpoint: Path) -> str:
    """The name of a repository with a checkpoint."""
    publish(hub, tiny_checkpoint)
    return HF_NAME


@pytest.fixture
def weight_requests(hub: HubServer) -> WeightRequests:
    """The byte ranges of safetensors files that are requested."""
    return WeightRequests(hub)


@pytest.fixture(scope="session")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose conversion takes long enough to be interrupted."""
    return write_checkpoint(tmp_path_factory.mktemp("large") / "tiny", config=LARGE)


@pytest.fixture(scope="session")
def large_gguf(large_checkpoint: Path) -> bytes:
    """The uninterrupted conversion of `large_checkpoint`."""
    target = large_checkpoint.parent / f"whole.{SLOW_TYPE}.gguf"
    run_job(plan_job(large_checkpoint, target), threads=2)
    return target.read_bytes()


@pytest.fixture(scope="session")
def unaligned_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with gaps between the tensors of its GGUF file."""
    return write_checkpoint(tmp_path_factory.mktemp("unaligned") / "tiny", config=UNALIGNED)


@pytest.fixture
def slow_output(tmp_path: Path) -> Path:
    """A path for the conversion of `large_checkpoint`."""
    return tmp_path / f"x.{SLOW_TYPE}.gguf"
