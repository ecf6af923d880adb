"""Names in requests: which model of this disk they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwenlocal.errors import ModelNotFound, QwenlocalError
from qwenlocal.i18n import tr
from qwenlocal.library.model_library import ModelLibrary
from qwenlocal.library.names import CatalogName, HubName, ModelName, PathName, parse_name
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.server.engine import ModelInfo


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
        for model in self._all():
            if text in (str(model.name), model.record.name) or text in _repositories(model.name):
                return model
        name = self._parse(text)
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
        return ProvidedModel(name, record)

    def infos(self) -> list[ModelInfo]:
        """List all models, each once, those that the server was started with first."""
        infos: dict[str, ModelInfo] = {}
        for name, record in self._all():
            try:
                modified = record.path.stat().st_mtime
            except OSError:  # deleted since
                continue
            digest = record.files[0].sha256
            infos.setdefault(str(name), ModelInfo(str(name), record.size, modified, digest))
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


def _repositories(name: ModelName) -> Sequence[str]:
    """Return the repositories that a model of the catalog comes from, as Hugging Face spells them."""
    if not isinstance(name, CatalogName):
        return ()
    return tuple(repo for repo in (name.card.checkpoint, name.card.gguf) if repo)
