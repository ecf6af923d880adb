"""The header of a model, for plans before the model is downloaded or loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.engine.memory import ModelDims
from qwenlocal.errors import SourceUnreachable, UnsupportedCheckpoint
from qwenlocal.library.model_library import ModelLibrary
from qwenlocal.library.names import ModelName
from qwenlocal.weights.gguf_reader import Header, read_header
from qwenlocal.weights.load_errors import check_file

_HEADER_BYTES = 8 << 20  # larger than the header of any Qwen model


@dataclass(frozen=True)
class ModelOutline:
    """A model's header, its dimensions and the size of its weights, installed or not."""

    name: str
    header: Header
    dims: ModelDims
    size: int
    is_installed: bool

    @property
    def has_known_mixes(self) -> bool:
        """True if the size of its weights in other types can be estimated."""
        return self.header.architecture in ("qwen2", "qwen2moe")


def read_outline(library: ModelLibrary, name: ModelName) -> ModelOutline:
    """
    Read the header of the installed file, or from the first bytes of the file on a hub.

    Raises
    ------
    ModelNotFound, SourceUnreachable: there is no such file, or no hub answers.
    UnsupportedCheckpoint: the header lacks the model's dimensions.
    """
    record = library.local.find(name)
    if record is None:
        try:
            with tempfile.TemporaryDirectory() as folder, library.open_puller() as puller:
                path, size = puller.download_prefix(name, Path(folder), _HEADER_BYTES)
                header = read_header(path)
        except SourceUnreachable:
            record = library.local.find_offline(name)
            if record is None:
                raise
    if record is not None:
        header = check_file(record.path).header
        size = header.weights_size or record.size
    dims = ModelDims.from_metadata(header.metadata)
    if dims is None:
        raise UnsupportedCheckpoint(
            str(name), "the header lacks the dimensions of the model", hint="Try to run it: qwenlocal run"
        )
    return ModelOutline(str(name), header, dims, size, record is not None)
