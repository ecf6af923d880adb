"""Set-up: its advice when something is missing, the lock files, and repeated runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from tool_modules import ROOT, load_tool

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Version(NamedTuple):
    major: int
    minor: int
    micro: int


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Import tools/setup.py and point it to a folder of the test."""
    module = load_tool("setup")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "COMMANDS", module.CommandRunner(tmp_path / "build" / "setup.log"))
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "GPU_CHOICE", tmp_path / ".venv" / "gpu.choice")
    monkeypatch.delenv("GPU", raising=False)
    monkeypatch.setattr(module, "REQUIREMENTS", tmp_path / "requirements")
    shutil.copytree(ROOT / "requirements", module.REQUIREMENTS)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return module


def test_a_complete_set_up_runs_nothing(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.VENV.mkdir()
    (setup.VENV / "setup.stamp").write_text(setup.fingerprint(False))
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setattr(setup, "COMMANDS", None)
    assert setup.main() == 0


@pytest.mark.parametrize("change", ["pyproject.toml", "lock", "processor", "CMAKE_ARGS", "GPU", "dev"])
def test_set_up_runs_again_when_an_input_changes(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = setup.fingerprint(False)
    if change == "pyproject.toml":
        (setup.ROOT / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n")
    elif change == "lock":
        (setup.REQUIREMENTS / "run.txt").write_text("numpy==0\n")
    elif change == "processor":
        monkeypatch.setattr(setup, "processor", lambda: "another one")
    elif change == "CMAKE_ARGS":
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    elif change == "GPU":
        monkeypatch.setenv("GPU", "vulkan")
    assert setup.fingerprint(change == "dev") != before


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("debian", "sudo apt install build-essential"),
        ("fedora", "sudo dnf install gcc-c++ make"),
        ("darwin", "xcode-select --install"),
        ("win32", "winget install"),
        ("", "On Debian or Ubuntu: sudo apt install build-essential; on Fedora: sudo dnf"),
    ],
)
def test_a_missing_compiler_gives_the_command_that_installs_one(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("system_packages.system_kind", lambda: kind)
    with pytest.raises(setup.SetupFailed, match=r"There is no C\+\+ compiler") as caught:
        setup.check_compiler()
    assert command in str(caught.value)


def test_a_missing_venv_module_gives_the_command_that_installs_it(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setattr("system_packages.system_kind", lambda: "debian")
    with pytest.raises(setup.SetupFailed, match=r"sudo apt install python3\.\d+-venv"):
        setup.check_python()


def test_an_old_python_is_refused(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", Version(3, 8, 0))
    with pytest.raises(setup.SetupFailed, match=r"Python 3\.10 or newer is needed"):
        setup.check_python()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("x.cpp:1: fatal error: bits/c++config.h: No such file", "fatal error: bits"),
        ("No CMAKE_CXX_COMPILER could be found.", "Install it:"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("ERROR: No matching distribution found for x", "Cannot reach the package index"),
    ],
)
def test_a_failed_step_shows_the_relevant_lines(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str, told: str
) -> None:
    monkeypatch.setattr("system_packages.system_kind", lambda: "debian")
    script = f"print('much noise\\n' * 100); print({output!r}); raise SystemExit(1)"
    with pytest.raises(setup.SetupFailed) as caught:
        setup.COMMANDS.run([sys.executable, "-c", script], "compiling")
    message = str(caught.value)
    assert "compiling failed:" in message
    assert output in message
    assert told in message
    assert str(setup.COMMANDS.log) in message
    assert "much noise" not in message


@pytest.mark.parametrize("is_required", [False, True])
def test_a_backend_that_cannot_be_compiled_leaves_the_processor(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_required: bool,
) -> None:
    def fail(name: str) -> None:
        raise setup.SetupFailed(f"Missing to compile it: glslc ({name}).")

    monkeypatch.setattr(setup, "gpu_choice", lambda: setup.GpuChoice("vulkan", "A GPU by Intel.", is_required))
    monkeypatch.setattr(setup, "backends_folder", lambda: tmp_path / "backends")
    monkeypatch.setattr(setup, "check_backend", fail)
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "libggml-vulkan.so").touch()  # of an older llama.cpp
    if is_required:
        with pytest.raises(setup.SetupFailed, match="Missing to compile it"):
            setup.install_gpu_backend()
    else:
        setup.install_gpu_backend()
        said = capsys.readouterr().err
        assert "Missing to compile it: glslc (vulkan)." in said
        assert "The processor will be used. To try again: GPU=vulkan make setup" in said
    assert not (tmp_path / "backends").exists()


def names(lock: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements" / f"{lock}.txt").read_text(), re.M))


@pytest.mark.parametrize("lock", ["run", "dev", "build"])
def test_a_lock_file_pins_every_package_by_hash_and_names_no_index(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    requirements = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.M).strip())
    assert len(requirements) > 5
    for requirement in requirements:
        assert re.match(r"[a-z0-9._-]+==\S+", requirement), requirement
        assert "--hash=sha256:" in requirement, requirement
    assert "://" not in text


def test_the_lock_files_hold_every_dependency_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    for lock, requirements in (
        ("run", project["project"]["dependencies"]),
        ("dev", [*project["project"]["dependencies"], *extras["dev"]]),
        ("build", groups["build"]),
    ):
        wanted = {re.split(r"[\s\[<>=;]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
        assert wanted <= names(lock), f"run: make lock ({wanted - names(lock)})"
    assert names("run") <= names("dev")


def test_the_compiler_gets_the_archive_whose_hash_is_locked(setup: ModuleType) -> None:
    requirement = setup.locked("run", "llama-cpp-python")
    assert requirement.startswith(f"llama-cpp-python=={setup.bindings_version()}")
    assert requirement.count("==") == 1
    assert "--hash=sha256:" in requirement
    with pytest.raises(setup.SetupFailed, match="Run: make lock"):
        setup.locked("run", "no-such-package")


def test_make_setup_does_nothing_in_a_checkout_that_is_set_up() -> None:
    stamp = ROOT / ".venv" / "bindings.stamp"
    if not stamp.exists() or stamp.read_text() != load_tool("setup").bindings_key():
        pytest.skip("this checkout was not set up by make on this processor, and compiling takes minutes")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LATEST", "MAKEFLAGS", "MAKELEVEL")
    }
    command = ["make", "--no-print-directory", "setup-dev"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
