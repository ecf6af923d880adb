"""What `pip install .` installs, and how its modules depend on each other."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
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


def test_the_catalog_and_the_prompts_are_shipped(wheel: list[str]) -> None:
    for kind in ("models", "prompts"):
        for path in (ROOT / kind).iterdir():
            if path.suffix in (".toml", ".txt"):
                assert f"qwenlocal/shipped/{kind}/{path.name}" in wheel


def test_the_web_page_is_shipped(wheel: list[str]) -> None:
    files = [path for path in (ROOT / "qwenlocal" / "server" / "page").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(wheel)


def test_no_weights_and_no_tests_are_shipped(wheel: list[str]) -> None:
    assert not [name for name in wheel if name.endswith((".gguf", ".safetensors", ".part"))]
    assert not [name for name in wheel if name.startswith(("tests/", "tools/", "benchmarks/"))]


# --- modules


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in (ROOT / "qwenlocal").rglob("*.py")}


def imported_modules(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the modules of the package that a tree imports when it runs: anywhere but under `if TYPE_CHECKING`."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield from imported_modules(ast.iter_child_nodes(node))


def test_no_modules_import_each_other_in_a_cycle() -> None:
    """
    Imports inside functions count: they avoid the error of Python, not the dependency.

    Annotations may point both ways, so imports under TYPE_CHECKING do not count. A package does not count as a
    dependency of its modules, which Python imports it for.
    """
    graph = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        graph[name] = {other for other in imported_modules([tree]) if other in MODULES and other != name}
    assert "qwenlocal.cli.app" in graph["qwenlocal.cli"]
    assert "qwenlocal.cli.commands.run" in graph["qwenlocal.cli.app"]
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the modules of a cycle


def test_commands_do_not_import_each_other_except_for_the_modes_of_run() -> None:
    """A command is a leaf: what two of them share is in `cli`, or below."""
    imports = {
        (name, other)
        for name, path in MODULES.items()
        for other in imported_modules([ast.parse(path.read_text("utf-8"))])
        if name.startswith("qwenlocal.cli.commands.") and other.startswith("qwenlocal.cli.commands.")
    }
    run = "qwenlocal.cli.commands.run"
    assert imports == {(run, "qwenlocal.cli.commands.batch"), (run, "qwenlocal.cli.commands.chat")}


def test_only_the_server_imports_a_web_framework() -> None:
    """`qwenlocal run` must not pay for importing FastAPI, which takes half a second."""
    frameworks = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "prometheus_client"}
    importers = {
        name
        for name, path in MODULES.items()
        for other in imported_modules([ast.parse(path.read_text("utf-8"))])
        if other.partition(".")[0] in frameworks
    }
    assert "qwenlocal.server.app" in importers
    assert {name for name in importers if not name.startswith("qwenlocal.server.")} == set()
