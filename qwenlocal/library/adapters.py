"""LoRA adapters on this disk: GGUF files, and directories of PEFT, which are converted on first use."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.errors import BadWeights, ModelNotFound, UsageError
from qwenlocal.fileio import fingerprint_file
from qwenlocal.formatting import join_sentences
from qwenlocal.i18n import mark, tr
from qwenlocal.library.conversion_files import conversion_stamp
from qwenlocal.paths import Folders, ensure_writable, parse_path
from qwenlocal.progress import TaskProgress
from qwenlocal.weights.adapter_spec import AdapterSpec, parse_scale
from qwenlocal.weights.other_formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_inner_checkpoints

if TYPE_CHECKING:
    from qwenlocal.library.store import ModelRecord
    from qwenlocal.progress import Say

_WHAT_IT_IS = mark("An adapter is a directory with adapter_config.json, or a .gguf file.")
_DAY = 24 * 3600.0
_KEPT_SECONDS = 30 * _DAY  # for which a converted adapter that nobody reads is kept
_OUTDATED_SECONDS = 2 * _DAY  # the same after its directory changed: a server may load it again

OpenProgress = Callable[[], AbstractContextManager[Callable[[TaskProgress], None]]]


class AdapterRequest(NamedTuple):
    """An adapter that the user named: a directory or a GGUF file, and its scale."""

    path: Path
    scale: float

    @property
    def is_gguf(self) -> bool:
        """True for a GGUF file, False for a directory of PEFT or a file in it."""
        return self.path.suffix.lower() == ".gguf" and self.path.is_file()


def parse_adapter(text: str, option: str = "--adapter") -> AdapterRequest:
    """
    Parse ADAPTER[:SCALE]: `parse_adapter("./style:0.5")` is the path ./style with the scale 0.5.

    A directory is checked at once, before a model is downloaded in vain.

    Raises
    ------
    ModelNotFound: there is no such directory or file. UsageError: the scale is invalid, or it is a model.
    BadWeights: it is damaged, or of a kind that cannot be used.
    """
    path, _, number = text.rpartition(":")
    if os.path.exists(os.path.expanduser(text)):
        request = AdapterRequest(parse_path(text), 1.0)
    elif os.path.exists(os.path.expanduser(path)):
        request = AdapterRequest(parse_path(path), parse_scale(number, option))
    else:
        raise _no_adapter(text, option)
    if not request.is_gguf:
        from qwenlocal.weights.adapter import read_adapter

        read_adapter(find_adapter_folder(request.path))
    return request


def _no_adapter(text: str, option: str) -> ModelNotFound:
    hints = [] if text.startswith("hf:") else [tr(_WHAT_IT_IS)]
    match = re.fullmatch(r"(?:hf:)?(?P<repo>(?P<owner>[\w-][\w.-]*)/(?P<name>[\w.-]+))(:[^:/]*)?", text)
    if match and not os.path.isdir(match["owner"]):
        hints += [
            tr(
                "To download it from Hugging Face: hf download {repo} --local-dir {name}; then: {option} ./{name}",
                repo=match["repo"],
                name=match["name"],
                option=option,
            )
        ]
    reason = tr("There is no adapter {path} on this disk.", path=text)
    return ModelNotFound(text, reason=reason, hint=join_sentences(*hints))


def find_adapter_folder(path: Path) -> Path:
    """
    Return the directory of an adapter; `path` may be one of the files in it.

    Raises
    ------
    UsageError: it is a model. BadWeights: it is something else.
    """
    from qwenlocal.weights.adapter import adapter_folder

    folder = adapter_folder(path)
    if os.path.isfile(folder / ADAPTER_CONFIG):
        return folder
    if os.path.isfile(path / "config.json"):
        raise UsageError(
            tr("{path} is a model, not an adapter.", path=path),
            hint=tr("To run it: qwenlocal run {path}", path=shlex.quote(str(path))),
        )
    inner = find_inner_checkpoints(path)
    hint = tr("Did you mean {path}?", path=inner[0]) if inner else tr(_WHAT_IT_IS)
    raise BadWeights(path, "it is not an adapter", hint=hint)


class AdapterLibrary:
    """Provides adapters as GGUF files for a model; `say` gets sentences, `open_progress` opens a progress display."""

    def __init__(self, folders: Folders, *, say: Say, open_progress: OpenProgress) -> None:
        self._folder, self._say, self._open_progress = folders.files / "adapters", say, open_progress

    def ensure_adapters(self, requests: Sequence[AdapterRequest], model: ModelRecord) -> tuple[AdapterSpec, ...]:
        """
        Return the adapters as files that fit the model; directories are converted unless they were before.

        Raises
        ------
        UsageError: an adapter is a model. BadWeights: an adapter is damaged, of another kind, or for another model.
        DiskFull, NotWritable: it cannot be converted here.
        """
        if not requests:
            return ()
        from qwenlocal.weights.adapter_file import check_adapter_fits
        from qwenlocal.weights.adapter_merge import describe_base
        from qwenlocal.weights.split_model import read_split_model

        self._delete_unread("*", _KEPT_SECONDS)
        split_model, specs = read_split_model(model.path), list[AdapterSpec]()
        header = split_model.header
        for request in requests:
            source = request.path if request.is_gguf else find_adapter_folder(request.path)
            file = source if request.is_gguf else self._convert(source, header.architecture)
            base, name = check_adapter_fits(file, split_model, source), header.metadata.get("general.name")
            for sentence in describe_base(base, str(name)) if name else ():
                self._say(sentence)
            specs.append(AdapterSpec(_unique_name(source, specs), file, request.scale))
        return tuple(specs)

    def _convert(self, folder: Path, architecture: str) -> Path:
        """Return the GGUF file of an adapter: the one of an earlier call, or a new one."""
        from qwenlocal.library.plan_execution import execute_plan
        from qwenlocal.weights.adapter import read_adapter
        from qwenlocal.weights.adapter_file import default_adapter_type, plan_adapter

        adapter, folder = read_adapter(folder, architecture), folder.resolve()
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name) or "adapter"
        prefix = f"{readable}-{zlib.crc32(str(folder).encode(errors='replace')):08x}"
        target = ensure_writable(self._folder) / f"{prefix}-{_stamp(folder, architecture)}.gguf"
        if target.exists():
            return target
        self._say(tr("Converting the adapter {name} once to GGUF.", name=folder.name))
        plan = plan_adapter(adapter, [(target, default_adapter_type())])
        with self._open_progress() as show:
            execute_plan(
                plan,
                replace=True,
                report=lambda done, total: show(TaskProgress(folder.name, done, total, "writing")),
                not_finite_hint="Download or save the adapter again.",
            )
        self._delete_unread(f"{prefix}-*", _OUTDATED_SECONDS)
        return target

    def _delete_unread(self, pattern: str, seconds: float) -> None:
        """Delete files that were not read for some time; reading one sets its time of access, once a day (relatime)."""
        for file in self._folder.glob(pattern):
            with contextlib.suppress(OSError):
                state = file.stat()
                if time.time() - max(state.st_atime, state.st_mtime) > seconds:
                    file.unlink()


def _stamp(folder: Path, architecture: str) -> str:
    """Hash what the conversion of an adapter depends on."""
    try:
        states = [fingerprint_file(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    except OSError as reason:
        raise BadWeights.unreadable(folder, reason) from reason
    return hashlib.sha256(conversion_stamp(f"{architecture} {states}").encode()).hexdigest()[:16]


def _unique_name(path: Path, others: Sequence[AdapterSpec]) -> str:
    """Return the name of a file or folder, with a number if another adapter has it."""
    resolved = path.resolve()
    name = (resolved.stem if path.suffix.lower() == ".gguf" else resolved.name).replace(" ", "-")
    taken = {other.name for other in others}
    return next(each for each in (name, *(f"{name}-{n}" for n in range(2, len(others) + 3))) if each not in taken)
