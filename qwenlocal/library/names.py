"""
What people type to name a model, and what it means.

    qwen1.5  qwen1.5:7b  qwen1.5:7b-base  qwen1.5:7b-chat-q5_k_m  codeqwen1.5  starter      the catalog
    hf:owner/repo  hf:owner/repo:q4_0  hf:owner/repo/file.gguf  hf:owner/repo@revision      the Hugging Face hub
    ms:owner/repo …                                                                         ModelScope
    https://host/x.gguf                                                                     anywhere on the web
    ./x.gguf  /models/x.gguf                                                                this disk
    ./Qwen1.5-0.5B  ./x/model.safetensors                                                   a checkpoint on it
    hf:owner/repo@checkpoint                                                                one that was fetched

Case and separators do not matter for catalog names: `Qwen1.5-7B-Chat-Q5_K_M` is `qwen1.5:7b-chat-q5_k_m`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from qwenlocal.errors import BadWeights, ModelNotFound
from qwenlocal.i18n import tr
from qwenlocal.library.catalog import Card, Catalog
from qwenlocal.model_files import FILE_TYPES

LEVELS = [*FILE_TYPES, "q3_k", "q4_k", "q5_k"]  # as they stand in file names; the last three without a size
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?:(?P<mark>[:/])(?P<rest>.+))?")
_WEB_HUB = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<rest>[\w.-]+/[\w.-]+.*)")


@dataclass(frozen=True)
class CatalogName:
    """A card, and a quantization level of it (None: the usual one)."""

    card: Card
    level: str | None = None

    def __str__(self) -> str:
        usual = self.level is None or self.level == self.card.level
        if usual and self.card.sizes_in_family == 1:
            return self.card.name
        return f"{self.card.name}-{self.level or self.card.level}"


@dataclass(frozen=True)
class HubName:
    """A repository on a hub ("hf" or "ms"), and a file or a level in it (neither: the usual one)."""

    hub: str
    repo: str
    revision: str | None = None
    file: str | None = None
    level: str | None = None

    def __str__(self) -> str:
        tail = f"/{self.file}" if self.file else f":{self.level}" if self.level else ""
        return f"{self.hub}:{self.repo}{f'@{self.revision}' if self.revision else ''}{tail}"


@dataclass(frozen=True)
class HubCheckpointName:
    """The original weights of a repository, as they are kept here after they were converted."""

    source: HubName

    def __str__(self) -> str:
        return checkpoint_record(str(self.source))


@dataclass(frozen=True)
class UrlName:
    """A file at an address."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def file(self) -> str:
        """The last part of the path."""
        return PurePosixPath(urlsplit(self.url).path).name or "model.gguf"


@dataclass(frozen=True)
class PathName:
    """A file on this disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class LocalCheckpointName:
    """A checkpoint on this disk: its directory, or the one file in it that is meant. It must be converted to be run."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


Name = CatalogName | HubName | HubCheckpointName | UrlName | PathName | LocalCheckpointName
CHECKPOINT_SUFFIX = "@checkpoint"


def checkpoint_record(repo: str) -> str:
    """The name of a repository's weights in the store: `checkpoint_record("hf:o/r")` is "hf:o/r@checkpoint"."""
    return f"{repo}{CHECKPOINT_SUFFIX}"


def parse(text: str, catalog: Callable[[], Catalog]) -> Name:
    """
    What `text` names. No network is asked; a path must exist, a catalog name must be known.

    `catalog` is called only if the name may be one of the catalog: a file in it that cannot be read does not
    concern a model given by path.

    Raises
    ------
    ModelNotFound: it names nothing; names that look alike are in the error.
    BadWeights: it is a directory without a checkpoint.
    BadCatalog: the catalog is needed and cannot be read.
    """
    text = text.strip()
    if not text or "\0" in text:
        raise ModelNotFound(text.replace("\0", "?"), reason=tr("A model needs a name."))
    if elsewhere := _hub_or_web(text.removesuffix(CHECKPOINT_SUFFIX)):
        return (
            HubCheckpointName(elsewhere)
            if text.endswith(CHECKPOINT_SUFFIX) and isinstance(elsewhere, HubName)
            else elsewhere
        )
    if _looks_like_a_path(text) and (os.path.exists(_expanded(text)) or text != Path(text).name):
        return _path_name(text)
    if os.path.isfile(os.path.join(text, "config.json")):  # noqa: PTH118 - never raises
        return _path_name(text)
    try:
        return _catalogue_name(text, catalog())
    except ModelNotFound:
        if os.path.exists(text) or _locked_folder(Path(text)) is not None:
            return _path_name(text)
        if text.lower().endswith((".gguf", ".safetensors")):
            close = suggestions(text, catalog())
            raise ModelNotFound(text, reason=tr("There is no file {text}.", text=text), suggestions=close) from None
        if text.count("/") == 1 and _HUB.fullmatch(text) and ".." not in text:
            return _hub_name("hf", text)
        raise


def squeeze(text: str) -> str:
    """
    A name without what does not matter in it: `squeeze("Qwen1_5-7B_Chat")` is "qwen1.57bchat".

    A dot between two digits does: 1.4b is not 14b. Files write it as an underscore.
    """
    text = re.sub(r"(?<=\d)[._](?=\d)", "\u00b7", text.casefold())
    return re.sub(r"[-_.:\s]", "", text).replace("\u00b7", ".")


def level_of(file: str) -> str | None:
    """The quantization level that a file name states: `level_of("x-q4_k_m.gguf")` is "q4_k_m"."""
    stem = re.sub(r"(\.gguf)?(\.[a-z]|-\d{5}-of-\d{5}(\.gguf)?)?$", "", file.casefold())
    found = [level for level in LEVELS if re.search(rf"(^|[-_.]){level}$", stem)]
    return max(found, key=len, default=None)


def suggestions(text: str, catalog: Catalog, most: int = 3) -> list[str]:
    """Names that look like `text`."""
    spellings = {squeeze(alias): alias for alias in catalog.aliases}
    close = difflib.get_close_matches(squeeze(text), spellings, n=most * 3, cutoff=0.6)
    return list(dict.fromkeys(catalog.aliases[spellings[match]] for match in close))[:most]


def _hub_or_web(text: str) -> Name | None:
    scheme, colon, rest = text.partition(":")
    if web_hub := _WEB_HUB.fullmatch(text.partition("?")[0]):
        inside = re.sub(r"/(?:resolve|blob|tree)/([^/]+)(/|$)", r"@\1\2", web_hub["rest"], count=1)
        return _hub_name("hf", inside.rstrip("/"))
    if scheme.lower() in ("http", "https") and rest.startswith("//"):
        return _web_name(text)
    if scheme.lower() in ("hf", "ms") and colon:
        return _hub_name(scheme.lower(), rest)
    return None


def _web_name(text: str) -> UrlName:
    try:
        host = urlsplit(text).hostname
    except ValueError:
        host = None
    if not host:
        raise ModelNotFound(
            text, reason=tr("“{text}” is not an address.", text=text), hint=tr("Write it like https://host/model.gguf")
        )
    return UrlName(text)


def _looks_like_a_path(text: str) -> bool:
    return (
        text in (".", "..")
        or text.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or re.match(r"[A-Za-z]:[\\/]", text) is not None
        or text.lower().endswith((".gguf", ".safetensors"))
    )


def _expanded(text: str) -> str:
    return os.path.expanduser(text)


def _path_name(text: str) -> Name:
    path = Path(_expanded(text))
    if os.path.isdir(path) and _locked_folder(path) is None:
        if os.path.isfile(path / "config.json"):
            return LocalCheckpointName(path.resolve())
        raise _is_a_directory(path)
    if (locked := _locked_folder(path)) is not None:
        raise ModelNotFound(
            text,
            reason=tr("The folder {locked} may not be looked into.", locked=locked),
            hint=tr("Allow it: chmod u+rx {locked}", locked=locked),
        )
    if os.path.exists(path):
        is_checkpoint = path.name.lower().endswith(".safetensors")
        if path.name.lower().endswith(".part"):
            raise BadWeights(
                path, "this file is not finished", hint=tr("Run the command that was writing it once more.")
            )
        whole = path.parent.resolve() / path.name  # a link keeps its name: in the hub's cache it leads to a digest
        return LocalCheckpointName(whole) if is_checkpoint else PathName(path.absolute())
    raise ModelNotFound(
        text, reason=tr("There is no file {path}, or it may not be read.", path=path), hint=tr("Check the path.")
    )


def _locked_folder(path: Path) -> Path | None:
    """The first folder on the way to `path` that this person may not look into."""
    folders = [parent for parent in (*reversed(path.parents), path) if os.path.isdir(parent)]
    return next((folder for folder in folders if not os.access(folder, os.X_OK)), None)


def _is_a_directory(path: Path) -> BadWeights:
    try:
        inside = sorted(file.name for file in path.iterdir())
    except OSError as reason:
        return BadWeights(path, f"this is a directory that cannot be read ({reason.strerror})")
    models = [name for name in inside if name.endswith(".gguf")]
    if any(name.endswith(".safetensors") for name in inside):
        what, hint = "it has weights, but no config.json that says what they are", "Fetch the checkpoint again, whole."
    else:
        what, hint = (
            "this is a directory, and no checkpoint",
            "A model is a .gguf file, or a directory with config.json.",
        )
    return BadWeights(path, what, hint=tr("Did you mean {path}?", path=path / models[0]) if models else hint)


def _hub_name(hub: str, text: str) -> HubName:
    match = _HUB.fullmatch(text)
    if not match or ".." in text:
        raise ModelNotFound(
            f"{hub}:{text}",
            reason=tr("“{hub}:{text}” is not a repository.", hub=hub, text=text),
            hint=tr("Write {hub}:owner/repo, {hub}:owner/repo:q4_k_m or {hub}:owner/repo/file.gguf", hub=hub),
        )
    rest = match["rest"]
    if match["mark"] == "/" and rest:
        return HubName(hub, match["repo"], match["revision"], file=rest)
    return HubName(hub, match["repo"], match["revision"], level=_level(rest) if rest else None)


def _squeezed_levels() -> dict[str, str]:
    return {form: level for level in LEVELS for form in (squeeze(level), level.replace("_", ""))}


def _level(text: str) -> str:
    level = _squeezed_levels().get(squeeze(text))
    if level is None:
        close = difflib.get_close_matches(text.casefold(), LEVELS, n=3)
        raise ModelNotFound(
            text,
            reason=tr("“{text}” is not a quantization level.", text=text),
            suggestions=close,
            hint="" if close else tr("Levels look like q4_k_m, q8_0, f16."),
        )
    return level


def _catalogue_name(text: str, catalog: Catalog) -> CatalogName:
    stem = text[: -len(".gguf")] if text.lower().endswith(".gguf") else text
    if not re.fullmatch(r"[\w.:\s-]+", stem):
        raise ModelNotFound(text, suggestions=suggestions(text, catalog))
    wanted = squeeze(stem)
    spellings, levels = {squeeze(alias): card for alias, card in catalog.aliases.items()}, _squeezed_levels()
    for end in range(len(wanted), 0, -1):  # the longest beginning that is a model; a level may follow
        name, level = spellings.get(wanted[:end]), wanted[end:]
        if name and (not level or level in levels):
            card = catalog.card(name)
            if card:
                return CatalogName(card, levels.get(level))
    raise ModelNotFound(text, suggestions=suggestions(stem, catalog))
