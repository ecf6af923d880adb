"""What `pip install .` installs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in the wheel, built from a copy in which weights lie about."""
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is not a git checkout")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "models" / "big.gguf").write_bytes(b"GGUF")
    (source / "models" / "big.gguf.part").write_bytes(b"GGUF")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_the_catalogue_and_the_prompts_are_shipped(wheel: list[str]) -> None:
    for kind in ("models", "prompts"):
        for path in (ROOT / kind).iterdir():
            if path.suffix in (".toml", ".txt"):
                assert f"qwenlocal/shipped/{kind}/{path.name}" in wheel


def test_no_weights_and_no_tests_are_shipped(wheel: list[str]) -> None:
    assert not [name for name in wheel if name.endswith((".gguf", ".safetensors", ".part"))]
    assert not [name for name in wheel if name.startswith(("tests/", "tools/", "benchmarks/"))]
