"""
Update the tables in README.md and docs/chat.md that are generated from the code: models, commands, keys, settings.

    .venv/bin/python tools/readme.py

A table stands between `<!-- name -->` and `<!-- end -->`. A test fails if one is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from typer.main import get_command

from qwenlocal.cli.app import app
from qwenlocal.engine.memory import PROCESS_OVERHEAD
from qwenlocal.library.catalog import Catalog, ModelCard
from qwenlocal.library.names import CatalogName
from qwenlocal.terminal.commands.models import SETTINGS
from qwenlocal.terminal.commands.table import ALIASES, COMMAND_GROUPS, KEYS

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "chat.md")


def main() -> None:
    for page in PAGES:
        page.write_text(update_tables(page.read_text("utf-8")), "utf-8")
        print(f"{page.relative_to(ROOT)} is up to date.", file=sys.stderr)


def update_tables(text: str) -> str:
    """Replace everything between `<!-- name -->` and `<!-- end -->` with the table of that name."""
    tables = {
        "models": models_table,
        "commands": commands_table,
        "chat_commands": chat_commands_tables,
        "chat_keys": chat_keys_table,
        "chat_settings": chat_settings_table,
    }

    def replace(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{tables[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def models_table() -> str:
    rows = [
        (f"`{card.name.removesuffix('-chat')}`", file_size(card), memory(card), card.license)
        for card in Catalog.read(ROOT / "models").cards
        if card.variant == "chat"
    ]
    return format_table(("name", "Q4_K_M file", "memory with 2,048 / 8,192 tokens", "license"), rows)


def file_size(card: ModelCard) -> str:
    if file := CatalogName(card).known_file:
        return f"{file.size / 1e9:.2f} GB"
    return "several files" if card.gguf else "converted from the checkpoint on first use"


def memory(card: ModelCard) -> str:
    """Format the memory for the file and a KV cache of 2,048 and 8,192 tokens."""
    file = CatalogName(card).known_file
    if not file or not card.kv_bytes_per_token:
        return "–"
    sizes = [file.size + PROCESS_OVERHEAD + card.kv_bytes_per_token * tokens for tokens in (2048, 8192)]
    return " / ".join(f"{size / 2**30:.1f} GiB" for size in sizes)


def commands_table() -> str:
    group = get_command(app)
    commands = getattr(group, "commands")  # noqa: B009 - typer's own group class
    rows = [(f"`qwenlocal {name}`", (command.help or "").splitlines()[0]) for name, command in commands.items()]
    return format_table(("command", "what it does"), rows)


def chat_commands_tables() -> str:
    sections = []
    for group, commands in COMMAND_GROUPS.items():
        rows = [(f"`{escape(command.usage)}`", command.help) for command in commands]
        sections.append(f"### {group}\n\n{format_table(('command', 'what it does'), rows)}")
    aliases = ", ".join(f"`{alias}` ({name})" for alias, name in ALIASES.items())
    return "\n\n".join([*sections, f"Aliases: {aliases}."])


def chat_keys_table() -> str:
    return format_table(("keys", "what they do"), KEYS)


def chat_settings_table() -> str:
    return format_table(("setting", "values"), [(f"`{name}`", values) for name, values in SETTINGS.items()])


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def escape(cell: str) -> str:
    """Escape the bars of a table cell."""
    return cell.replace("|", "\\|")


if __name__ == "__main__":
    main()
