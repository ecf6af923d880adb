"""Exit codes, output and JSON of qwenlocal commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Run


def expect_exit(result: subprocess.CompletedProcess[str], code: int) -> str:
    """Check the exit code, and that there is no traceback; returns the error output."""
    assert "Traceback" not in result.stderr + result.stdout
    assert result.returncode == code, result.stderr + result.stdout
    return result.stderr


def expect_error(result: subprocess.CompletedProcess[str]) -> str:
    """Check that a command failed with an exit code of ours; returns the error output."""
    assert result.returncode in (2, 3, 5), result.stderr
    return expect_exit(result, result.returncode)


def parse_json(text: str) -> Any:
    """Parse JSON strictly: NaN and Infinity are not allowed."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def parse_plan(text: str) -> dict[str, Any]:
    """Parse the plan of --json, without the time and sizes that depend on the source."""
    plan = parse_json(text)
    del plan["seconds"]
    for file in plan["files"]:
        del file["size"]  # the header holds the address of the source
    return dict(plan)


def list_models(run: Run) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in parse_json(run("list", "--json").stdout)}


def model_states(run: Run) -> dict[str, str]:
    """Return the state of every listed model by its name."""
    return {name: str(entry["state"]) for name, entry in list_models(run).items()}


def installed_path(run: Run) -> str:
    """Return the path of the only installed model."""
    (path,) = (entry["path"] for entry in parse_json(run("list", "--json").stdout) if entry["state"] == "here")
    return str(path)


def convert_pure(invoke: Run, source: Path, folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.gguf"
    expect_exit(invoke("convert", str(source), "--type", kind, "--pure", "-o", str(path)), 0)
    return path


TENSOR_COUNT = 15
