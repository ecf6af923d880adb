"""Selection of files in a hub repository: the GGUF files of one model, or the files of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwenlocal.errors import CheckpointOnly, ModelNotFound
from qwenlocal.i18n import tr
from qwenlocal.library.hubs import RemoteFile, RepoListing
from qwenlocal.library.names import HubName, level_from_filename
from qwenlocal.model_files import FILE_TYPE_ALIASES, FILE_TYPES, parse_piece, parse_shard
from qwenlocal.weights.other_formats import (
    ADAPTER_CONFIG,
    PICKLED,
    PICKLED_MODELS,
    find_pickled_model,
    pickled_hint,
    remote_adapter_hint,
    training_step,
)
from qwenlocal.weights.weight_files import INDEX, SINGLE_FILE

_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_PREFERRED_LEVELS = ("q4_k_m", "q4_k_s", "q4_0", "q5_k_m", "q5_0", "q8_0", "f16", "bf16")
# Files of a checkpoint, other than its weights, that the converter reads.
_CHECKPOINT_DOCUMENTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "README.md",
    "model.safetensors.index.json", "quantize_config.json", "quant_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """A model in a repository: one file, its shards, or the pieces of a file, to be joined (`is_cut`)."""

    files: Sequence[RemoteFile]
    is_cut: bool = False

    @property
    def name(self) -> str:
        """The path of the first or only file, or of the file that was cut."""
        first = self.files[0].path
        piece = parse_piece(first) if self.is_cut else None
        return piece.file if piece else first

    @property
    def level(self) -> str | None:
        """The quantization type in the file name."""
        return level_from_filename(self.name)

    @property
    def missing_numbers(self) -> list[int]:
        """The numbers of the shards or pieces that the repository lacks; a lone shard may be a whole file."""
        if len(self.files) == 1 and not self.is_cut:
            return []
        parts = [parse_piece(file.path) if self.is_cut else parse_shard(file.path) for file in self.files]
        numbers = {part.number for part in parts if part}
        total = max(part.total for part in parts if part) or max(numbers)
        return sorted({*range(1, total + 1)} - numbers)


def group_models(files: Sequence[RemoteFile]) -> list[ModelFiles]:
    """Group a repository's files into models, with shards and pieces in order."""
    single_files: list[RemoteFile] = []
    shards, pieces = dict[object, dict[int, RemoteFile]](), dict[object, dict[int, RemoteFile]]()
    for file in sorted(files, key=lambda file: file.path):
        if _NOT_MODELS.search(file.path):
            continue
        if (shard := parse_shard(file.path)) and shard.ending == ".gguf":
            shards.setdefault((shard.stem, shard.total), {})[shard.number] = file
        elif piece := parse_piece(file.path):
            pieces.setdefault((piece.file, piece.total), {})[piece.number] = file
        elif file.path.lower().endswith(".gguf"):
            single_files.append(file)
    models = [ModelFiles([file]) for file in single_files]
    models += [ModelFiles([file for _, file in sorted(group.items())]) for group in shards.values()]
    models += [ModelFiles([file for _, file in sorted(group.items())], is_cut=True) for group in pieces.values()]
    return models


def select_model(listing: RepoListing, name: HubName) -> ModelFiles:
    """
    Return the model that `name` means: by file, by level, the only one, or the first of the usual levels.

    Raises
    ------
    ModelNotFound, CheckpointOnly: the repository does not have it, or the choice is ambiguous.
    """
    model = _select_model(listing, group_models(listing.files), name)
    if missing := model.missing_numbers:
        raise ModelNotFound(
            str(name),
            reason=tr("{repo} lacks part {number} of {file}.", repo=listing.repo, number=missing[0], file=model.name),
            hint=tr("Choose another file or repository."),
        )
    return model


def _select_model(listing: RepoListing, models: Sequence[ModelFiles], name: HubName) -> ModelFiles:
    if name.file:
        return _select_by_file(listing, models, name)
    if not models:
        raise _no_gguf_error(listing)
    if name.level:
        return _select_by_level(listing, models, name.level)
    if len(models) == 1:
        return models[0]
    for level in _PREFERRED_LEVELS:
        if model := _find_level(models, level):
            return model
    raise ModelNotFound(
        str(name),
        reason=tr("{repo} has several models, but none of the usual quantization types.", repo=listing.repo),
        hint=tr("Choose one: ") + ", ".join(f"{name.hub}:{listing.repo}/{model.name}" for model in models[:5]),
    )


def select_checkpoint_files(listing: RepoListing) -> list[RemoteFile]:
    """
    Return the files that a conversion needs, small ones first.

    Raises
    ------
    ModelNotFound: there are no safetensors weights or no config.json.
    """
    by_path = {file.path: file for file in listing.files}
    weights = [file for file in listing.files if re.fullmatch(r"(?!adapter_)[^/]+\.safetensors", file.path)]
    is_pickled = not by_path.keys() & {SINGLE_FILE, INDEX} and by_path.keys() & set(PICKLED_MODELS)
    if not weights or is_pickled or "config.json" not in by_path:
        raise _no_checkpoint_error(listing)
    vocabulary = () if "tokenizer.json" in by_path else ("vocab.json", "merges.txt")
    templates = [path for path in by_path if re.fullmatch(r"additional_chat_templates/[\w.-]+\.jinja", path)]
    documents = [by_path[path] for path in (*_CHECKPOINT_DOCUMENTS, *vocabulary, *templates) if path in by_path]
    return [*documents, *sorted(weights, key=lambda file: file.path)]


def _no_checkpoint_error(listing: RepoListing) -> ModelNotFound:
    """Return the error for a repository without the files of a checkpoint, after what it has instead."""
    repo, paths = listing.repo, {file.path for file in listing.files}
    folders = [path.removesuffix("/config.json") for path in sorted(paths) if path.endswith("/config.json")]
    if ADAPTER_CONFIG in paths:
        return ModelNotFound(
            repo, reason=tr("{repo} is a LoRA adapter, not a model.", repo=repo), hint=remote_adapter_hint(repo)
        )
    if folders and "config.json" not in paths:
        name, folder = repo.rpartition("/")[2], max(folders, key=training_step)
        return ModelNotFound(
            repo,
            reason=tr(
                "{repo} has its checkpoints in folders ({folders}), which cannot be selected by name.",
                repo=repo,
                folders=", ".join(folders[:5]),
            ),
            hint=tr(
                "Download one with Hugging Face's hf command: hf download {repo} --include '{folder}/*' "
                "--local-dir {name}; then: qwenlocal convert {name}/{folder}",
                repo=repo,
                folder=folder,
                name=name,
            ),
        )
    if any(path.lower().endswith(".gguf") for path in paths):
        return ModelNotFound(
            repo,
            reason=tr("{repo} has GGUF files, but no checkpoint.", repo=repo),
            hint=tr("To use one of the GGUF files, name its type, for example: hf:{repo}:f16", repo=repo),
        )
    if pickled := find_pickled_model(path for path in paths if "/" not in path):
        reason = tr(
            "{repo} has no safetensors files, only pickled weights ({pickled}), which can run arbitrary code.",
            repo=repo,
            pickled=pickled,
        )
        return ModelNotFound(repo, reason=reason, hint=pickled_hint(repo))
    if "config.json" not in paths:
        return ModelNotFound(repo, reason=tr("{repo} is not a checkpoint: it has no config.json.", repo=repo))
    return ModelNotFound(
        repo,
        reason=tr("{repo} has no weights.", repo=repo),
        hint=tr("Choose a repository with safetensors or GGUF files."),
    )


def _select_by_file(listing: RepoListing, models: Sequence[ModelFiles], name: HubName) -> ModelFiles:
    for model in models:
        if name.file in (model.name, *(file.path for file in model.files)):
            return model
    raise ModelNotFound(
        str(name),
        reason=tr("{repo} has no file {file}.", repo=listing.repo, file=name.file),
        hint=tr("Available: ") + (", ".join(model.name for model in models) or tr("no GGUF file")),
    )


def _select_by_level(listing: RepoListing, models: Sequence[ModelFiles], level: str) -> ModelFiles:
    if model := _find_level(models, level):
        return model
    raise ModelNotFound(
        f"{listing.repo}:{level}",
        reason=tr("{repo} has no {level} file.", repo=listing.repo, level=level),
        hint=tr("Available: ") + ", ".join(sorted({model.level or model.name for model in models})),
    )


def _find_level(models: Sequence[ModelFiles], level: str) -> ModelFiles | None:
    """Return the model with this quantization type or tag; of several, the one with the shortest name."""
    matching = [model for model in models if model.level in (level, FILE_TYPE_ALIASES.get(level, level))]
    if level not in FILE_TYPES:
        spelling = re.sub(r"[-_.]", "[-_.]", level)
        tag = re.compile(rf"(?<![a-z0-9]){spelling}(?![a-z0-9_])")
        matching += [model for model in models if tag.search(model.name.casefold())]
    return min(matching, key=lambda model: len(model.name), default=None)


def _no_gguf_error(listing: RepoListing) -> ModelNotFound:
    if any(file.path.endswith((".safetensors", *PICKLED, ".safetensors.index.json")) for file in listing.files):
        return CheckpointOnly(listing.repo, listing.repo)
    return ModelNotFound(
        listing.repo,
        reason=tr("{repo} has no GGUF file.", repo=listing.repo),
        hint=tr("Choose a repository with GGUF files."),
    )
