"""The chat templates of a checkpoint, wherever its files keep them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint
from qwenlocal.weights.checkpoint import optional_json


def chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja goes before tokenizer_config.json, as in transformers; then chat_template.json."""
    file = folder / "chat_template.jinja"
    found: Any = settings.get("chat_template")
    if file.exists():
        found = _read(file)
    elif found is None:
        found = optional_json(folder / "chat_template.json", "").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"": found, **_additional_templates(folder)}
    named = {
        _plain_name(entry["name"]): entry["template"]
        for entry in (found if isinstance(found, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    if not named:
        raise BadCheckpoint(folder / "tokenizer_config.json", "its “chat_template” has the wrong form")
    named[""] = named.pop("default", next(iter(named.values())))
    return dict(sorted(named.items()))


def _additional_templates(folder: Path) -> dict[str, str]:
    """Further ones, a file each, as transformers 5 has them."""
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {_plain_name(file.stem): _read(file) for file in files}


def _read(file: Path) -> str:
    """Byte for byte: line ends stay what they are."""
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise BadCheckpoint(file, f"cannot read it ({reason})") from reason


def _plain_name(name: str) -> str:
    """Letters and digits; it becomes part of a key (gguf-py, gguf_writer.py: add_chat_template)."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)
