"""LoRA adapters on this disk: GGUF files, and directories of PEFT, which are converted on first use."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.errors import BadWeights, ModelNotFound, OutOfRange, UsageError
from qwenlocal.fileio import fingerprint_file
from qwenlocal.i18n import tr
from qwenlocal.library.conversion_files import conversion_stamp
from qwenlocal.paths import Folders, ensure_writable, parse_path
from qwenlocal.progress import TaskProgress
from qwenlocal.weights.adapter_spec import MAX_ADAPTER_SCALE, AdapterSpec

if TYPE_CHECKING:
    from qwenlocal.library.store import ModelRecord
    from qwenlocal.progress import Say
    from qwenlocal.weights.gguf_reader import Header

OpenProgress = Callable[[], AbstractContextManager[Callable[[TaskProgress], None]]]


class AdapterRequest(NamedTuple):
    """An adapter that the user named: a directory or a GGUF file, and its scale."""

    path: Path
    scale: float


def parse_adapter(text: str, option: str = "--adapter") -> AdapterRequest:
    """
    Parse ADAPTER[:SCALE]: `parse_adapter("./style:0.5")` is the path ./style with the scale 0.5.

    Raises
    ------
    ModelNotFound: there is no such directory or file. OutOfRange: the scale is too large.
    """
    path, scale = text, 1.0
    match = re.fullmatch(r"(?P<path>.+):(?P<scale>[-+]?(\d+(\.\d*)?|\.\d+))", text)
    if match and not os.path.exists(os.path.expanduser(text)):
        path, scale = match["path"], float(match["scale"])
    if abs(scale) > MAX_ADAPTER_SCALE:
        raise OutOfRange(tr("The scale of {option}", option=option), -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE, scale)
    found = parse_path(path)
    if not os.path.exists(found):
        hint = tr("An adapter is a directory with adapter_config.json, or a .gguf file.")
        raise ModelNotFound(text, reason=tr("There is no adapter {path}.", path=path), hint=hint)
    return AdapterRequest(found, scale)


class AdapterLibrary:
    """Provides adapters as GGUF files for a model; `say` gets sentences, `open_progress` opens a progress display."""

    def __init__(self, folders: Folders, *, say: Say, open_progress: OpenProgress) -> None:
        self._folders, self._say, self._open_progress = folders, say, open_progress

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
        from qwenlocal.weights.gguf_reader import read_header
        from qwenlocal.weights.split_model import shard_paths

        headers = [read_header(path) for path in shard_paths(model.path)]
        tensors = [tensor for header in headers for tensor in header.tensors]
        specs = list[AdapterSpec]()
        for request in requests:
            path = self._ensure_file(request.path, headers[0])
            check_adapter_fits(path, model.path, tensors, headers[0].architecture)
            self._mention_base(path, headers[0])
            specs.append(AdapterSpec(_unique_name(request.path, specs), path, request.scale))
        return tuple(specs)

    def _ensure_file(self, path: Path, model: Header) -> Path:
        from qwenlocal.weights.adapter import is_adapter

        if path.is_file() and path.suffix.lower() == ".gguf":
            return path
        if path.is_dir() and os.path.isfile(path / "config.json") and not os.path.isfile(path / "adapter_config.json"):
            raise UsageError(
                tr("{path} is a model, not an adapter.", path=path),
                hint=tr("To run it: qwenlocal run {path}", path=shlex.quote(str(path))),
            )
        return self._convert(path.parent if path.is_file() and is_adapter(path) else path, model.architecture)

    def _convert(self, folder: Path, architecture: str) -> Path:
        from qwenlocal.library.plan_execution import execute_plan
        from qwenlocal.weights.adapter import read_adapter
        from qwenlocal.weights.adapter_file import default_adapter_type, plan_adapter

        adapter = read_adapter(folder, architecture)
        target = self._target(folder.resolve(), architecture)
        if target.exists():
            return target
        self._say(tr("Converting the adapter {name} once to GGUF.", name=folder.resolve().name))
        plan = plan_adapter(adapter, [(target, default_adapter_type())])
        with self._open_progress() as show:
            execute_plan(
                plan,
                replace=True,
                report=lambda done, total: show(TaskProgress(folder.name, done, total, "writing")),
            )
        for old in target.parent.glob("*.gguf"):
            if old != target:
                old.unlink(missing_ok=True)
        return target

    def _target(self, folder: Path, architecture: str) -> Path:
        """Return the path for an adapter, which differs as soon as its files do."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name) or "adapter"
        key = f"{zlib.crc32(str(folder).encode(errors='replace')):08x}"
        try:
            states = [fingerprint_file(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
        except OSError as reason:
            raise BadWeights.unreadable(folder, reason) from reason
        stamp = hashlib.sha256(conversion_stamp(f"{architecture} {states}").encode()).hexdigest()[:16]
        parent = ensure_writable(self._folders.files / "adapters" / f"{readable}-{key}")
        return parent / f"{readable}-{stamp}.gguf"

    def _mention_base(self, path: Path, model: Header) -> None:
        from qwenlocal.weights.adapter_merge import describe_base
        from qwenlocal.weights.gguf_reader import read_metadata

        base, name = read_metadata(path).get("general.base_model.0.name"), model.metadata.get("general.name")
        if base and name:
            for sentence in describe_base(str(base), str(name)):
                self._say(sentence)


def _unique_name(path: Path, others: Sequence[AdapterSpec]) -> str:
    """Return the name of a file or folder, with a number if another adapter has it."""
    resolved = path.resolve()
    name = (resolved.stem if path.suffix.lower() == ".gguf" else resolved.name).replace(" ", "-")
    taken = {other.name for other in others}
    return next(each for each in (name, *(f"{name}-{n}" for n in range(2, len(others) + 3))) if each not in taken)
