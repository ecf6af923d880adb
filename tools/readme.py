"""
Keeps the parts of README.md and docs/chat.md that are made from the program itself: tables of models, commands, keys.

    .venv/bin/python tools/readme.py         writes them; a test fails where they are out of date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from typer.main import get_command

from qwenlocal.cli.app import app
from qwenlocal.engine.memory import PROCESS_OVERHEAD
from qwenlocal.library.catalog import Catalog, ModelCard
from qwenlocal.terminal.commands.models import SETTINGS
from qwenlocal.terminal.commands.table import COMMANDS, KEYS

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "chat.md")


def models() -> str:
    rows = [
        "| name | Q4_K_M file | memory with 2,048 / 8,192 tokens | licence |",
        "|---|---|---|---|",
    ]
    for card in Catalog.read(ROOT / "models").cards:
        if card.variant == "chat":
            rows.append(
                f"| `{card.name.removesuffix('-chat')}` | {file_size(card)} | {memory(card)} | {card.licence} |"
            )
    return "\n".join(rows)


def file_size(card: ModelCard) -> str:
    if card.default_file:
        return f"{card.default_file.size / 1e9:.2f} GB"
    return "several files, size asked at the hub" if card.gguf else "made from the checkpoint when first used"


def memory(card: ModelCard) -> str:
    if not card.default_file or not card.kv_bytes_per_token:
        return "–"
    sizes = [card.default_file.size + PROCESS_OVERHEAD + card.kv_bytes_per_token * tokens for tokens in (2048, 8192)]
    return " / ".join(f"{size / 2**30:.1f} GiB" for size in sizes)


def commands() -> str:
    group = get_command(app)
    names = getattr(group, "commands")  # noqa: B009 - typer's own group class
    rows = ["| command | what it does |", "|---|---|"]
    rows += [f"| `qwenlocal {name}` | {(command.help or '').splitlines()[0]} |" for name, command in names.items()]
    return "\n".join(rows)


def chat_commands() -> str:
    parts = []
    for group in dict.fromkeys(command.group for command in COMMANDS):
        rows = [f"| `{command.usage}` | {command.help} |" for command in COMMANDS if command.group == group]
        parts.append("\n".join([f"### {group}", "", "| command | what it does |", "|---|---|", *rows]))
    return "\n\n".join(parts).replace("FILE|CHAT", "FILE\\|CHAT").replace("[code|N]", "[code\\|N]")


def chat_keys() -> str:
    return "\n".join(["| keys | what they do |", "|---|---|", *(f"| {keys} | {what} |" for keys, what in KEYS)])


def chat_settings() -> str:
    return "\n".join(
        ["| setting | values |", "|---|---|", *(f"| `{name}` | {what} |" for name, what in SETTINGS.items())]
    )


def with_sections(text: str) -> str:
    """`text` with every part between `<!-- name -->` and `<!-- end -->` made anew."""
    made = {
        "models": models,
        "commands": commands,
        "chat_commands": chat_commands,
        "chat_keys": chat_keys,
        "chat_settings": chat_settings,
    }

    def replace(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{made[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_sections(page.read_text("utf-8")), "utf-8")
        print(f"{page.name} is up to date.", file=sys.stderr)
