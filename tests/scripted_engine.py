"""An engine whose answers and speed are scripted, for texts that no tiny model can generate."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

from qwenlocal.chat.events import Done, FinishReason, GenerationStats, Text
from qwenlocal.errors import ContextFull, ModelNotFound
from qwenlocal.progress import PromptProgress
from qwenlocal.server.engine import (
    ChatPrompt,
    Embedding,
    EngineEvent,
    GenerationRequest,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

_PIECE = 4  # characters of a token


class ScriptedEngine:
    """
    Implements `Engine`: answers with the next one of `replies`, or with `reply`; a token has four characters.

    `pause` is in seconds between two tokens, `first_token` the time to the first one that is reported. Answers wait
    before their token `hold_at` until `release` is called.
    """

    def __init__(self, name: str, *, n_ctx: int = 4096) -> None:
        self.info = ModelInfo(name, 1000, 0.0, is_loaded=True, n_ctx=n_ctx, n_ctx_train=n_ctx)
        self.running = 0
        self.reset()

    def reset(self) -> None:
        """Forget requests and replies."""
        self.reply, self.replies = "Paris, fun", list[str]()
        self.pause, self.hold_at, self.first_token = 0.0, -1, 0.01
        self.requests: list[GenerationRequest] = []
        self._is_released = False

    def release(self) -> None:
        """Let answers that wait continue."""
        self._is_released = True

    def admit(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
        self.requests.append(request)
        text, total = self.replies.pop(0) if self.replies else self.reply, await self.count_tokens(request.prompt)
        if total >= self.info.n_ctx:
            raise ContextFull(total, self.info.n_ctx, self.info.n_ctx_train)
        self.running += 1
        start, count = time.monotonic(), 0
        try:
            yield PromptProgress(total, total, 0)
            pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
            for count, piece in enumerate(pieces[: request.max_tokens], 1):
                await self._wait(count)
                yield Text(piece, count, ids=(0,))
            is_cut = request.max_tokens is not None and len(pieces) > request.max_tokens
            reason = FinishReason.LENGTH if is_cut else FinishReason.EOS
            yield Done(reason, GenerationStats(total, 0, count, self.first_token, time.monotonic() - start))
        finally:
            self.running -= 1

    async def _wait(self, count: int) -> None:
        await asyncio.sleep(self.pause)
        while count == self.hold_at and not self._is_released:
            await asyncio.sleep(0.005)

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        return [0] * -(-len(text) // _PIECE)

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        return [b"abcd"] * len(ids)

    async def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    async def count_tokens(self, prompt: Prompt) -> int:
        if isinstance(prompt, TokenPrompt):
            return len(prompt.ids)
        text = await self.apply_template(prompt.messages) if isinstance(prompt, ChatPrompt) else prompt.text
        return len(await self.tokenize(text))

    async def embed(self, prompts: Sequence[TextPrompt | TokenPrompt]) -> list[Embedding]:
        return [Embedding([1.0], 1) for _ in prompts]


class ScriptedHost:
    """Implements `ModelHost` with scripted engines; the first one is the default."""

    def __init__(self, *engines: ScriptedEngine) -> None:
        self._engines = engines

    def models(self) -> list[ModelInfo]:
        return [engine.info for engine in self._engines]

    async def find(self, name: str) -> ModelInfo:
        return self._find(name).info

    @contextlib.asynccontextmanager
    async def open(self, name: str, keep_alive: float | None = None) -> AsyncIterator[ScriptedEngine]:
        yield self._find(name)

    async def unload(self, name: str) -> None:
        self._find(name)

    def _find(self, name: str) -> ScriptedEngine:
        engine = next((one for one in self._engines if name in ("", one.info.name)), None)
        if engine is None:
            raise ModelNotFound(name)
        return engine
