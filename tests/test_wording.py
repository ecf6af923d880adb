"""Plain English in everything that users and maintainers read; CONTRIBUTING.md has the glossary."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "qwenlocal").rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]

# Each entry was in this project once and had to be read twice.
UNCLEAR = re.compile(
    r"\b(anew|shall|all the same|as it stands|put right|mended?|anybody|"
    r"is said|are said|was said|be said|on (its|their) way|in common not|not in common|goes on|go on with|leave away|"
    r"there is no making|of its own accord|what (comes|came) out|have it ended)\b",
    re.IGNORECASE,
)
DOCSTRING_START = re.compile(r"\s*(What|Whether|Where|How|Which|Who)\b")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def sentences(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every string literal with a space that is not a docstring: most of them are printed."""
    inside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and " " in node.value
            and id(node) not in inside
        ):
            yield node.lineno, node.value


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_messages_avoid_unclear_phrases(module: Path) -> None:
    tree = ast.parse(module.read_text("utf-8"))
    found = [
        f"line {line}: “{match[0]}” in “{text[max(0, match.start() - 30) : match.end() + 30]}”"
        for line, text in (*docstrings(tree), *sentences(tree))
        for match in UNCLEAR.finditer(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(module: Path) -> None:
    tree = ast.parse(module.read_text("utf-8"))
    assert not [(line, text.splitlines()[0]) for line, text in docstrings(tree) if DOCSTRING_START.match(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_documentation_avoids_unclear_phrases(page: Path) -> None:
    found = [match[0] for match in UNCLEAR.finditer(page.read_text("utf-8"))]
    assert not found, found


def test_class_names_are_unique_in_the_package() -> None:
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.parse(module.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(module.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
