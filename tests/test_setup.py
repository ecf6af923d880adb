"""Set-up: what it says when something is missing, and that it does nothing twice."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest


class Version(NamedTuple):
    major: int
    minor: int
    micro: int


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/setup.py, writing its log to a folder of the test's own."""
    spec = importlib.util.spec_from_file_location("qwenlocal_setup", ROOT / "tools" / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOG", tmp_path / "setup.log")
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    return module


def test_a_set_up_that_is_in_place_does_nothing(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (setup.VENV).mkdir()
    (setup.VENV / "setup.stamp").write_text(setup.fingerprint(False))
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setattr(setup, "run", lambda *_: pytest.fail("something was run"))
    assert setup.main() == 0


@pytest.mark.parametrize("change", ["pyproject.toml", "processor", "CMAKE_ARGS", "dev"])
def test_what_the_result_depends_on_makes_it_run_again(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = setup.fingerprint(False)
    if change == "pyproject.toml":
        (setup.ROOT / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n")
    elif change == "processor":
        monkeypatch.setattr(setup, "processor", lambda: "another one")
    elif change == "CMAKE_ARGS":
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
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
def test_a_missing_compiler_is_said_with_what_to_install(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup, "system_kind", lambda: kind)
    with pytest.raises(setup.Failed, match=r"There is no C\+\+ compiler") as caught:
        setup.check_compiler()
    assert command in str(caught.value)


def test_a_missing_venv_module_is_said_with_what_to_install(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setattr(setup, "system_kind", lambda: "debian")
    with pytest.raises(setup.Failed, match=r"sudo apt install python3\.\d+-venv"):
        setup.check_python()


def test_an_old_python_is_said(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", Version(3, 8, 0))
    with pytest.raises(setup.Failed, match=r"Python 3\.10 or newer is needed"):
        setup.check_python()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("x.cpp:1: fatal error: bits/c++config.h: No such file", "fatal error: bits"),
        ("No CMAKE_CXX_COMPILER could be found.", "Install it:"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("ERROR: No matching distribution found for x", "package index cannot be reached"),
    ],
)
def test_a_failed_step_shows_the_lines_that_matter(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str, told: str
) -> None:
    monkeypatch.setattr(setup, "system_kind", lambda: "debian")
    script = f"print('much noise\\n' * 100); print({output!r}); raise SystemExit(1)"
    with pytest.raises(setup.Failed) as caught:
        setup.run([sys.executable, "-c", script], "compiling")
    message = str(caught.value)
    assert "compiling failed:" in message
    assert output in message
    assert told in message
    assert str(setup.LOG) in message
    assert "much noise" not in message


def test_the_makefile_finds_set_up_in_place_within_a_moment() -> None:
    """In a checkout that is set up, `make setup` runs nothing and prints nothing."""
    if not (ROOT / ".venv" / "setup.stamp").exists():
        pytest.skip("this checkout was not set up by make")
    result = subprocess.run(
        ["make", "--no-print-directory", "setup-dev"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
