"""
Model names: the forms users can type, and parsing them.

    qwen1.5  qwen1.5:7b  qwen1.5:7b-base  qwen1.5:7b-chat-q5_k_m  codeqwen1.5  starter      catalog names
    hf:owner/repo  hf:owner/repo:q4_0  hf:owner/repo/file.gguf  hf:owner/repo@revision      Hugging Face
    hf:owner/repo:UD-Q4_K_XL                                                                a tag in file names
    ms:owner/repo …                                                                         ModelScope
    https://host/x.gguf                                                                     any web server
    ./x.gguf  /models/x.gguf                                                                a local file
    ./Qwen1.5-0.5B  ./x/model.safetensors                                                   a local checkpoint
    hf:owner/repo@checkpoint                                                                a downloaded checkpoint

Case and separators are ignored in catalog names: `Qwen1.5-7B-Chat-Q5_K_M` is `qwen1.5:7b-chat-q5_k_m`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from qwenlocal.errors import BadWeights, ModelNotFound
from qwenlocal.i18n import tr
from qwenlocal.library.catalog import Catalog, KnownFile, ModelCard
from qwenlocal.model_files import FILE_TYPES, parse_piece
from qwenlocal.weights.other_formats import ADAPTER_CONFIG, adapter_only, distributed_weights, find_inner_checkpoints

_LEVELS = [*FILE_TYPES, "q3_k", "q4_k", "q5_k"]  # as in file names; the last three without S, M or L
_HUB = re.compile(  # repositories and revisions are folders of the Hub's cache, whose names cannot be longer
    r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?:@(?P<revision>[\w./-]{1,200}?))?(?:(?P<mark>[:/])(?P<rest>.+))?"
)
_WEB_HUB = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<rest>[\w.-]+/[\w.-]+.*)")


@dataclass(frozen=True)
class CatalogName:
    """A model of the catalog, and a quantization type of it (None: the default one)."""

    card: ModelCard
    level: str | None = None

    @property
    def known_file(self) -> KnownFile | None:
        """The file, if its digest is in the catalog."""
        level = self.level or self.card.level
        return next((file for file in self.card.files if level_from_filename(file.path) == level), None)

    @property
    def repositories(self) -> Sequence[str]:
        """The repositories of the model, as Hugging Face spells them."""
        return [repo for repo in (self.card.checkpoint, self.card.gguf) if repo]

    def __str__(self) -> str:
        is_default = self.level is None or self.level == self.card.level
        if is_default and self.card.sizes_in_family == 1:
            return self.card.name
        return f"{self.card.name}-{self.level or self.card.level}"


@dataclass(frozen=True)
class HubName:
    """
    A repository on a hub ("hf" or "ms"), and optionally a file or a level in it.

    The level is a quantization type, or another tag that file names have, in lower case: "q4_0", "ud-q4_k_xl".
    """

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
    """The original weights of a repository, as downloaded for conversion and kept."""

    source: HubName

    def __str__(self) -> str:
        return f"{self.source}{CHECKPOINT_SUFFIX}"


@dataclass(frozen=True)
class UrlName:
    """A file on a web server."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def file(self) -> str:
        """The file name in the URL."""
        return PurePosixPath(urlsplit(self.url).path).name or "model.gguf"


@dataclass(frozen=True)
class PathName:
    """A local file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class LocalCheckpointName:
    """A local checkpoint, which must be converted before it can run: its directory, or one file in it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


ModelName = CatalogName | HubName | HubCheckpointName | UrlName | PathName | LocalCheckpointName
CHECKPOINT_SUFFIX = "@checkpoint"


def parse_name(text: str, load_catalog: Callable[[], Catalog]) -> ModelName:
    """
    Parse a model name as typed. Asks no network; a path must exist, a catalog name must be known.

    `load_catalog` is called only if the name may be in the catalog: a broken catalog file must not prevent running
    a model given by path.

    Raises
    ------
    ModelNotFound: the name means nothing; the error suggests similar names.
    BadWeights: it is a directory without a checkpoint.
    BadCatalog: the catalog is needed and cannot be read.
    """
    if text != text.strip() and os.path.lexists(os.path.expanduser(text)):  # the spaces are part of the file's name
        return _parse_path(text)
    text = text.strip()
    if not text or "\0" in text:
        raise ModelNotFound(text.replace("\0", "?"), reason=tr("The model name is empty or has a null character."))
    if remote := _parse_remote(text.removesuffix(CHECKPOINT_SUFFIX)):
        if text.endswith(CHECKPOINT_SUFFIX) and isinstance(remote, HubName):
            return HubCheckpointName(remote)
        return remote
    if _looks_like_path(text) and (os.path.exists(os.path.expanduser(text)) or text != Path(text).name):
        return _parse_path(text)
    if os.path.isfile(os.path.join(text, "config.json")):  # noqa: PTH118 - never raises
        return _parse_path(text)
    try:
        return _parse_catalog_name(text, load_catalog())
    except ModelNotFound:
        if os.path.exists(text) or _first_locked_folder(Path(text)) is not None:
            return _parse_path(text)
        if text.lower().endswith((".gguf", ".safetensors")):
            similar = _suggest_names(text, load_catalog())
            if not similar:
                raise ModelNotFound.unreadable(text) from None
            raise ModelNotFound(text, reason=tr("There is no file {path}.", path=text), suggestions=similar) from None
        if text.count("/") == 1 and _HUB.fullmatch(text) and ".." not in text:
            return _parse_hub_name("hf", text)
        raise


def normalize_name(text: str) -> str:
    """
    Remove case and separators from a name: `normalize_name("Qwen1_5-7B_Chat")` is "qwen1.57bchat".

    A dot between two digits stays, since 1.4b is not 14b; file names write it as an underscore.
    """
    text = re.sub(r"(?<=\d)[._](?=\d)", "\u00b7", text.casefold())
    return re.sub(r"[-_.:\s]", "", text).replace("\u00b7", ".")


def level_from_filename(file: str) -> str | None:
    """Return the quantization type in a file name: `level_from_filename("x-q4_k_m.gguf")` is "q4_k_m"."""
    piece = parse_piece(file)
    stem = re.sub(r"(-\d{5}-of-\d{5})?(\.gguf)?$", "", (piece.file if piece else file).casefold())
    matching = [level for level in _LEVELS if re.search(rf"(^|[-_.]){level}$", stem)]
    return max(matching, key=len, default=None)


def _suggest_names(text: str, catalog: Catalog) -> list[str]:
    spellings = {normalize_name(alias): alias for alias in catalog.aliases}
    similar = difflib.get_close_matches(normalize_name(text), spellings, n=9, cutoff=0.6)
    return list(dict.fromkeys(catalog.aliases[spellings[match]].name for match in similar))[:3]


def _parse_remote(text: str) -> ModelName | None:
    scheme, colon, rest = text.partition(":")
    if web_hub := _WEB_HUB.fullmatch(text.partition("?")[0]):
        inside = re.sub(r"/(?:resolve|blob|tree)/([^/]+)(/|$)", r"@\1\2", web_hub["rest"], count=1)
        return _parse_hub_name("hf", inside.rstrip("/"))
    if scheme.lower() in ("http", "https") and rest.startswith("//"):
        return _parse_url(text)
    if scheme.lower() in ("hf", "ms") and colon:
        return _parse_hub_name(scheme.lower(), rest)
    return None


def _parse_url(text: str) -> UrlName:
    try:
        host = urlsplit(text).hostname
    except ValueError:
        host = None
    if not host:
        raise ModelNotFound(
            text,
            reason=tr("“{text}” is not a valid URL.", text=text),
            hint=tr("URLs look like https://host/model.gguf"),
        )
    return UrlName(text)


def _looks_like_path(text: str) -> bool:
    return (
        text in (".", "..")
        or text.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or re.match(r"[A-Za-z]:[\\/]", text) is not None
        or text.lower().endswith((".gguf", ".safetensors"))
    )


def _parse_path(text: str) -> ModelName:
    path = Path(os.path.expanduser(text))
    if (locked := _first_locked_folder(path)) is not None:
        raise ModelNotFound(
            text,
            reason=tr("The folder {folder} is not accessible.", folder=locked),
            hint=tr("Grant access: chmod u+rx {folder}", folder=locked),
        )
    if os.path.isdir(path):
        if os.path.isfile(path / "config.json"):
            return LocalCheckpointName(path.resolve())
        raise _not_a_checkpoint(path)
    if os.path.exists(path):
        is_checkpoint = path.name.lower().endswith(".safetensors")
        if path.name.lower().endswith(".part"):
            raise BadWeights(path, "the file is unfinished", hint=tr("Run the command that was writing it again."))
        resolved = path.parent.resolve() / path.name  # a link keeps its name: in the Hub's cache it points to a digest
        return LocalCheckpointName(resolved) if is_checkpoint else PathName(path.absolute())
    raise ModelNotFound.unreadable(path)


def _first_locked_folder(path: Path) -> Path | None:
    """Return the first folder on the path that the user may not enter."""
    folders = [parent for parent in (*reversed(path.parents), path) if os.path.isdir(parent)]
    return next((folder for folder in folders if not os.access(folder, os.X_OK)), None)


def _not_a_checkpoint(path: Path) -> BadWeights:
    try:
        names = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    except OSError as reason:
        return BadWeights.unreadable(path, reason)
    if ADAPTER_CONFIG in names:
        return adapter_only(path)
    if error := distributed_weights(path):
        return error
    models = [path / name for name in names if name.endswith(".gguf")] + find_inner_checkpoints(path)
    hint = "A model is a .gguf file, or a directory with config.json."
    if any(name.endswith(".safetensors") for name in names):
        hint = "Download the whole checkpoint again."
    return BadWeights(
        path,
        "it has no config.json",
        hint=tr("Did you mean {path}?", path=models[0]) if models else hint,
        message=tr("{path} is not a checkpoint: it has no config.json.", path=path),
    )


def _parse_hub_name(hub: str, text: str) -> HubName:
    match = _HUB.fullmatch(text)
    if not match or ".." in text or (match["mark"] == ":" and not re.fullmatch(r"[\w.-]+", match["rest"])):
        raise ModelNotFound(
            f"{hub}:{text}",
            reason=tr("“{hub}:{text}” is not a valid repository name.", hub=hub, text=text),
            hint=tr("Valid forms: {hub}:owner/repo, {hub}:owner/repo:q4_k_m, {hub}:owner/repo/file.gguf", hub=hub),
        )
    rest = match["rest"]
    if match["mark"] == "/" and rest:
        return HubName(hub, match["repo"], match["revision"], file=rest)
    level = _levels_by_spelling().get(normalize_name(rest), rest.casefold()) if rest else None
    return HubName(hub, match["repo"], match["revision"], level=level)


def _levels_by_spelling() -> dict[str, str]:
    return {form: level for level in _LEVELS for form in (normalize_name(level), level.replace("_", ""))}


def parse_level(text: str) -> str:
    """
    Return the quantization type that `text` spells.

    Raises
    ------
    ModelNotFound: there is no such type.
    """
    level = _levels_by_spelling().get(normalize_name(text))
    if level is None:
        similar = difflib.get_close_matches(text.casefold(), _LEVELS, n=3)
        raise ModelNotFound(
            text,
            reason=tr("There is no quantization type {type}.", type=text),
            suggestions=similar,
            hint="" if similar else tr("Known types: ") + ", ".join(FILE_TYPES),
        )
    return level


def _parse_catalog_name(text: str, catalog: Catalog) -> CatalogName:
    stem = text[: -len(".gguf")] if text.lower().endswith(".gguf") else text
    if not re.fullmatch(r"[\w.:\s-]+", stem):
        raise ModelNotFound(text, suggestions=_suggest_names(text, catalog))
    normalized = normalize_name(stem)
    spellings, levels = {normalize_name(alias): card for alias, card in catalog.aliases.items()}, _levels_by_spelling()
    for end in range(len(normalized), 0, -1):  # the longest prefix that is a model; a level may follow
        card, level = spellings.get(normalized[:end]), normalized[end:]
        if card and (not level or level in levels):
            return CatalogName(card, levels.get(level))
    typed = re.fullmatch(r"(?P<model>.+)[-:](?P<type>(?:i?q|b?f)\d\w*)", stem, re.IGNORECASE)
    if typed and normalize_name(typed["model"]) in spellings:
        parse_level(typed["type"])
    raise ModelNotFound(text, suggestions=_suggest_names(stem, catalog))
