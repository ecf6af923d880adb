"""Names of models in requests, and the installed models that they mean."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwenlocal.errors import BadWeights, ModelNotFound, QwenlocalError
from qwenlocal.i18n import tr
from qwenlocal.library.model_library import ModelLibrary
from qwenlocal.library.names import CatalogName, HubName, ModelName, PathName, level_from_filename, parse_name
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.server.engine import ModelInfo
from qwenlocal.weights.file_types import file_type_name
from qwenlocal.weights.gguf_reader import read_metadata


class ServedModels:
    """
    The installed models, and those that the server was started with, `first`, of which the first one is the default.

    A request can name a model as the catalog does, as its record does, or by the repository of its checkpoint:
    "qwen1.5:7b", "hf:Qwen/Qwen1.5-7B-Chat-GGUF/….gguf", "Qwen/Qwen1.5-7B-Chat". It cannot name a path of the file
    system, unless the server was started with it.
    """

    def __init__(self, library: ModelLibrary, first: Sequence[ProvidedModel]) -> None:
        self._library, self._first = library, tuple(first)

    def find(self, text: str) -> ProvidedModel:
        """
        Return the model that a request names; the default one for "".

        Raises
        ------
        ModelNotFound: no installed model has this name.
        """
        if not text:
            return self._first[0]
        name = self._parse(text)
        for model in self._all():
            repositories = model.name.repositories if isinstance(model.name, CatalogName) else ()
            spellings = (str(model.name), model.record.name, *repositories)
            if text in spellings or str(name) in spellings:
                return model
        record = self._library.local.find_offline(name) if name else None
        if name is None or record is None:
            names = [info.name for info in self.infos()]
            raise ModelNotFound(
                text,
                suggestions=names,
                hint=tr(
                    "Installed models: {names}. To install another one: qwenlocal pull NAME", names=", ".join(names)
                ),
            )
        others = (model for model in self._all() if model.record.path == record.path)
        return next(others, ProvidedModel(name, record))  # one file has one name, or it would be loaded twice

    def infos(self) -> list[ModelInfo]:
        """List all models, each once, those that the server was started with first."""
        infos: dict[str, ModelInfo] = {}
        for model in self._all():
            with contextlib.suppress(BadWeights):  # deleted in the meantime
                info = describe_model(model)
                infos.setdefault(info.name, info)
        return list(infos.values())

    def _all(self) -> Iterator[ProvidedModel]:
        yield from self._first
        known = {record.name for _, record in self._first}
        for record in self._library.store.records():
            if record.name not in known and not record.is_checkpoint and not record.missing:
                yield ProvidedModel(self._parse(record.name) or PathName(record.path), record)

    def _parse(self, text: str) -> ModelName | None:
        """Parse a name that does not lead outside of the library; return None for any other."""
        if text.startswith((".", "/", "~", "\\")) or "\0" in text:
            return None
        try:
            name = parse_name(text, lambda: self._library.catalog)
        except QwenlocalError:
            return None
        return name if isinstance(name, (CatalogName, HubName)) else None


def describe_model(model: ProvidedModel) -> ModelInfo:
    """
    Describe an installed model by its record and the header of its file; a damaged header is ignored.

    Raises
    ------
    BadWeights: the file was deleted.
    """
    name, record = model
    try:
        modified = record.path.stat().st_mtime
    except OSError as error:
        raise BadWeights.unreadable(record.path, error) from error
    metadata: Mapping[str, Any] = {}
    with contextlib.suppress(BadWeights):  # loading it reports the fault
        metadata = read_metadata(record.path)
    architecture = str(metadata.get("general.architecture", ""))
    n_ctx_train = metadata.get(f"{architecture}.context_length")
    quantization = file_type_name(metadata.get("general.file_type")) or level_from_filename(record.path.name) or ""
    return ModelInfo(
        str(name),
        record.size,
        modified,
        record.files[0].sha256,
        quantization,
        architecture,
        str(metadata.get("general.size_label", "")),
        n_ctx_train=n_ctx_train if isinstance(n_ctx_train, int) else 0,
    )
