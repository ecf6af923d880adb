"""Embeddings of texts, for several threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

from qwenlocal.chat.worker import BackgroundTask
from qwenlocal.engine.context import AbortFlag, ContextOptions
from qwenlocal.engine.embedding import Embedder
from qwenlocal.engine.llama import Model
from qwenlocal.errors import Interrupted


class TextEmbedder:
    """The embeddings of a model, alongside its answers. Calls from several threads wait for each other."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self._model, self._options = model, options
        self._embedder: Embedder | None = None  # created on first use
        self._computing, self._is_closed = threading.Lock(), False
        self._calls: set[AbortFlag] = set()  # of calls that have not returned

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """
        Return the vectors of texts; Ctrl-C ends the computation.

        Raises
        ------
        Everything that `Embedder` raises. Interrupted: `stop` was called.
        """
        abort = AbortFlag()
        self._calls.add(abort)
        try:
            return BackgroundTask(
                functools.partial(self._embed, texts, abort), abort.set, lambda exception: None
            ).result()
        finally:
            self._calls.discard(abort)

    def _embed(self, texts: Sequence[str], abort: AbortFlag) -> list[list[float]]:
        with self._computing:
            if self._is_closed or abort:
                raise Interrupted
            self._embedder = embedder = self._embedder or Embedder(self._model, self._options)
            return list(embedder.embed([embedder.encode(text) for text in texts], abort))

    def stop(self) -> None:
        """End all calls, from any thread."""
        for abort in self._calls.copy():
            abort.set()

    def close(self) -> None:
        """End all calls and free the memory."""
        self._is_closed = True
        self.stop()
        with self._computing:
            if self._embedder:
                self._embedder.close()
