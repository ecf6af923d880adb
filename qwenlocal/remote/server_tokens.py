"""Tokens that a server of this machine computes, for a chat that renders and counts its prompts itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import ContextFull
from qwenlocal.progress import PromptProgress
from qwenlocal.remote.cancellable_stream import CancellableStream
from qwenlocal.remote.client import RemoteClient
from qwenlocal.remote.errors import EngineFailed


class ServerTokens:
    """
    The tokens of `model` on the server of `client`; implements `engine.sequence.TokenGenerator`.

    The server keeps the KV cache. It ends an answer without the token that ends it, so `end_token` is yielded instead.
    """

    def __init__(self, client: RemoteClient, model: str, *, n_ctx: int, n_ctx_train: int, end_token: int) -> None:
        self._client, self._model = client, model
        self._n_ctx, self._n_ctx_train, self._end_token = n_ctx, n_ctx_train, end_token
        self._stream: CancellableStream[dict[str, Any]] | None = None
        self.is_full = self.was_stopped = False

    def stop(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def generate(self, ids: Sequence[int], sampling: Sampling, *, limit: int) -> Iterator[PromptProgress | int]:
        if len(ids) >= self._n_ctx:
            raise ContextFull(len(ids), self._n_ctx, self._n_ctx_train)
        self.is_full = self.was_stopped = False
        request = {"model": self._model, "ids": list(ids), "sampling": asdict(sampling), "limit": limit}
        self._stream = stream = self._client.stream("/tokens", request, _parse)
        try:
            for event in stream:
                if "error" in event:
                    raise EngineFailed(self._client.endpoint.host, 0, str(event["error"].get("message", "")))
                if "progress" in event:
                    yield PromptProgress(*event["progress"])
                yield from event.get("ids", ())
                if event.get("end") == "token":
                    yield self._end_token
                self.is_full = event.get("end") == "full"
            self.was_stopped = stream.is_cancelled
        finally:
            stream.cancel()


def _parse(data: str) -> dict[str, Any]:
    """
    Parse an event.

    Raises
    ------
    ValueError: it is not one that the server sends.
    """
    event = json.loads(data)
    if not isinstance(event, dict):
        raise ValueError("it is not an object")
    return event
