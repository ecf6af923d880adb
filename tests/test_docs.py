"""What the documents say is what the program does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from qwenlocal import errors

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/chat.md"])
def test_tables_are_those_of_the_program(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert tool("readme").with_sections(text) == text, "run: python tools/readme.py"


def test_every_exit_code_is_documented() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.QwenlocalError)]
    assert {c.exit_code for c in classes if c is not errors.QwenlocalError} <= documented


def test_every_error_class_stands_in_the_list_at_the_top_of_its_file() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.QwenlocalError)]
    for error in classes:
        assert re.search(rf"{error.__name__} +{error.exit_code} ", str(errors.__doc__)), error.__name__


@pytest.mark.parametrize(
    "path", ["docs/chat.svg", "docs/chat.md", "benchmarks/README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"]
)
def test_what_the_readme_points_at_is_there(path: str) -> None:
    assert (ROOT / path).stat().st_size > 500


def test_every_module_is_in_the_readmes_picture_of_the_house() -> None:
    house = README.partition("## How it is built")[2]
    for path in (ROOT / "qwenlocal").rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py") and (ROOT / "qwenlocal" / "cli") not in path.parents:
            assert re.search(rf"\b{path.stem}\b", house), path.name


def test_imports_point_down_only() -> None:
    """A room may import from rooms on its own floor's list or below, never from above."""
    below = {
        "": set(),
        "weights": {""},
        "library": {"", "weights"},
        "engine": {"", "weights"},
        "measure": {"", "weights", "engine"},
        "chat": {"", "weights", "engine"},
        "terminal": {"", "weights", "engine", "chat"},
        "cli": {"", "weights", "library", "engine", "measure", "chat", "terminal"},
    }
    for path in (ROOT / "qwenlocal").rglob("*.py"):
        parts = path.relative_to(ROOT / "qwenlocal").parts
        room = parts[0] if len(parts) > 1 else ""
        if path.name in ("testing.py", "__main__.py"):
            continue
        for imported in re.findall(r"^\s*(?:from|import) qwenlocal\.(\w+)(?=[.\s])", path.read_text("utf-8"), re.M):
            target = imported if (ROOT / "qwenlocal" / imported).is_dir() else ""
            assert target == room or target in below[room], f"{path.name} imports from {imported}"


def test_nothing_of_a_workplace_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is not a git checkout")
    weights = [name for name in tracked.stdout.splitlines() if name.endswith((".gguf", ".safetensors", ".part"))]
    assert weights == []
