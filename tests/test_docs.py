"""Documentation: generated tables, links, exit codes, and the layers of the package."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tool_modules import ROOT, load_tool
from typer.main import get_command

from qwenlocal import errors
from qwenlocal.cli.app import app

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


@pytest.mark.parametrize("page", ["README.md", "docs/chat.md"])
def test_generated_tables_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert load_tool("readme").update_tables(text) == text, "run: .venv/bin/python tools/readme.py"


def test_every_exit_code_is_documented() -> None:
    documented = {
        int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/scripting.md").read_text("utf-8"), re.M)
    }
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.QwenlocalError)]
    assert {c.exit_code for c in classes if c is not errors.QwenlocalError} <= documented


def test_every_error_class_is_in_the_list_at_the_top_of_its_module() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.QwenlocalError)]
    for error in classes:
        assert re.search(rf"{error.__name__} +{error.exit_code} ", str(errors.__doc__)), error.__name__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_the_documentation_has_its_options(page: Path) -> None:
    calls = re.findall(r"(?:`|^\$ (?:.*\| )?)qwenlocal ([a-z][^`\n|#]*)", page.read_text("utf-8"), re.MULTILINE)
    for call in calls:
        words, command = call.split(), get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
        assert command.name, f"there is no such command: qwenlocal {call}"
        options = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= options | {"--help"}, call


def test_the_readme_fits_on_one_page() -> None:
    assert len(README.splitlines()) <= 130


def test_imports_point_down_only() -> None:
    """A package imports from the packages listed for it, and from the modules at the top of qwenlocal/."""
    below = {
        "": set(),
        "weights": {""},
        "library": {"", "weights"},
        "engine": {"", "weights"},
        "measure": {"", "weights", "engine"},
        "chat": {"", "weights", "engine"},
        "api": {"", "weights", "library", "engine", "measure", "chat"},
        "server": {"", "weights", "library", "engine", "chat", "api"},
        "remote": {"", "library", "engine", "chat"},
        "terminal": {"", "weights", "engine", "chat"},
        "cli": {"", "weights", "library", "engine", "measure", "chat", "api", "remote", "server", "terminal"},
    }
    for path in (ROOT / "qwenlocal").rglob("*.py"):
        parts = path.relative_to(ROOT / "qwenlocal").parts
        package = parts[0] if len(parts) > 1 else ""
        if path.name in ("testing.py", "__main__.py") or (len(parts) == 1 and path.name == "__init__.py"):
            continue  # the package itself offers what is above
        for imported in re.findall(r"^\s*(?:from|import) qwenlocal\.(\w+)(?=[.\s])", path.read_text("utf-8"), re.M):
            target = imported if (ROOT / "qwenlocal" / imported).is_dir() else ""
            assert target == package or target in below[package], f"{path.name} imports from {imported}"


def test_no_weights_are_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is not a git checkout")
    weights = [name for name in tracked.stdout.splitlines() if name.endswith((".gguf", ".safetensors", ".part"))]
    assert weights == []
