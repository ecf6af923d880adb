"""The starter, a real Qwen model from the package index, in a home that all runs of the tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def home() -> dict[str, str]:
    """Variables with a home that all runs of the tests share: the starter has half a gigabyte."""
    folder = Path(os.environ.get("QWENLOCAL_TEST_HOME", ROOT / "build" / "test-home"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "QWENLOCAL_"))}
    return {**kept, "QWENLOCAL_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub"), "NO_COLOR": "1"}


def qwenlocal(home: dict[str, str], *arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "qwenlocal", *arguments],
        **{"env": home, "capture_output": True, "text": True, "timeout": 280, "stdin": subprocess.DEVNULL, **more},
    )


@pytest.fixture(scope="session")
def starter(home: dict[str, str]) -> Path:
    result = qwenlocal(home, "pull", "starter")
    if result.returncode == 4:
        pytest.skip(f"the starter is not on this disk and cannot be had: {result.stderr.splitlines()[-2]}")
    assert result.returncode == 0, result.stderr
    (record,) = [r for r in json.loads(qwenlocal(home, "list", "--json").stdout) if r["name"] == "starter"]
    return Path(record["path"])
