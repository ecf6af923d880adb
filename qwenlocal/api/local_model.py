"""A model in memory, for programs in Python."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, overload

from qwenlocal.api.answer import Answer
from qwenlocal.api.answer_options import AnswerOptions, ChatInput, parse_messages, parse_options
from qwenlocal.api.answer_thread import AnswerThread
from qwenlocal.api.text_embedder import TextEmbedder
from qwenlocal.api.text_stream import TextStream
from qwenlocal.chat.chat_model import ChatModel
from qwenlocal.chat.chat_template import encode_messages, require_template
from qwenlocal.engine.load_plan import LoadNote, LoadPlan
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PARALLEL = 8  # prompts that are answered at the same time
_PARKED = 4  # prompts whose keys and values stay in the KV cache
N_SEQUENCES = _PARALLEL + _PARKED
"""The sequences of the context that a `LocalModel` needs."""


class LocalModel:
    """
    A model in memory, from `load`. Its methods can be called from any thread; up to eight prompts are answered at the
    same time, in a context that they share, and more wait for their turn.

        with qwenlocal.load("qwen1.5") as model:
            print(model.chat("Why is the sky blue?"))

    Prompts with the same beginning as earlier ones are processed faster: pass the whole conversation each time.
    """

    def __init__(self, loaded: ChatModel, path: Path, close: Callable[[], object]) -> None:
        """`close` frees the memory of `loaded`, the model of the file `path`, with `N_SEQUENCES` in its context."""
        self._loaded, self._tokenizer = loaded, loaded.model.tokenizer
        self._embedder = TextEmbedder(loaded.model, loaded.context.options)
        on_end = functools.partial(_free, self._embedder, close)
        self._thread = AnswerThread(loaded.create_scheduler(_PARALLEL), self._tokenizer, on_end)
        self.path = path
        self.n_ctx = loaded.context.n_ctx
        """The context: how many tokens a prompt and its answer may have together."""
        self._finalizer = weakref.finalize(self, self._thread.close)

    @property
    def name(self) -> str:
        """The model's name, with its variant and quantization type."""
        return self._loaded.name

    @property
    def plan(self) -> LoadPlan:
        """The load plan: context, KV cache types, threads, and the memory for them."""
        return self._loaded.plan

    @property
    def notes(self) -> Sequence[LoadNote]:
        """Faults of the file that loading works around, and other things that a user may want to know."""
        return self._loaded.notes

    # --- answers

    def chat(self, prompt: ChatInput, *, system: str | None = None, **options: Unpack[AnswerOptions]) -> Answer:
        """
        Answer a question, or the last of several messages ({"role": …, "content": text}).

        Raises
        ------
        UsageError: an option is invalid, or the model has no chat template. ContextFull: the prompt is too long.
        LowMemory: memory runs out. BadWeights: the model computes NaN, or its template rejects the messages.
        """
        return _read_all(self.stream(prompt, system=system, **options))

    async def achat(self, prompt: ChatInput, *, system: str | None = None, **options: Unpack[AnswerOptions]) -> Answer:
        """
        Do what `chat` does, for asyncio: other tasks run while the model computes, and cancelling stops it.

        Raises
        ------
        Everything that `chat` raises.
        """
        async with await asyncio.to_thread(self.stream, prompt, system=system, **options) as stream:
            async for _ in stream:
                pass
        return stream.answer

    def stream(self, prompt: ChatInput, *, system: str | None = None, **options: Unpack[AnswerOptions]) -> TextStream:
        """
        Answer as `chat` does, piece by piece: iterate over the text with `for` or `async for`.

        Raises
        ------
        Everything that `chat` raises; the iterator raises errors that occur while the model computes.
        """
        return self._stream(self._encode(prompt, system), options)

    def complete(self, text: str, **options: Unpack[AnswerOptions]) -> Answer:
        """
        Continue `text` without a chat template; control tokens spelled in it are parsed, as with `--raw`.

        Raises
        ------
        UsageError: an option is invalid, or there is no text. ContextFull, LowMemory, BadWeights: as for `chat`.
        """
        self._check_open()
        ids = self._tokenizer.tokenize(text, special=True, add_bos=self._tokenizer.adds_bos)
        if not ids:
            raise UsageError(tr("There is no text to continue."), hint=tr("Pass the beginning of a text."))
        return _read_all(self._stream(ids, options))

    def stop(self) -> None:
        """
        End all answers that are being computed or are waiting, from any thread.

        Their finish reason is INTERRUPTED; the text so far is kept. `embed` raises Interrupted.
        """
        self._thread.stop_all()
        self._embedder.stop()

    # --- text and tokens

    @overload
    def embed(self, texts: str) -> list[float]: ...  # type: ignore[overload-overlap]

    @overload
    def embed(self, texts: Sequence[str]) -> list[list[float]]: ...

    def embed(self, texts: str | Sequence[str]) -> list[float] | list[list[float]]:
        """
        Return the vector of a text, or those of several, which is faster. Vectors have length 1.

        The similarity of two texts is therefore the dot product of their vectors.

        Raises
        ------
        UsageError: a text is empty, or the model has no embeddings. ContextFull: a text has more tokens than `n_ctx`.
        ContextNotCreated: there is no memory for another context. Interrupted: `stop` was called.
        """
        self._check_open()
        vectors = self._embedder.embed([texts] if isinstance(texts, str) else list(texts))
        return vectors[0] if isinstance(texts, str) else vectors

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text; control tokens spelled in it stay text."""
        self._check_open()
        return self._tokenizer.tokenize(text, special=False)

    def count(self, prompt: ChatInput, *, system: str | None = None) -> int:
        """
        Return how many tokens a question or messages take in the context, with the chat template.

        Raises
        ------
        UsageError: the model has no chat template. BadWeights: it rejects the messages.
        """
        return len(self._encode(prompt, system))

    # --- the end

    def close(self) -> None:
        """Free the memory; answers that are being computed are stopped."""
        self._finalizer()

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"n_ctx={self.n_ctx}" if self._finalizer.alive else "closed"
        return f"<LocalModel {self.name}, {state}>"

    # --- parts of the above

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise UsageError(tr("The model is closed."), hint=tr("Load it again with qwenlocal.load()."))

    def _encode(self, prompt: ChatInput, system: str | None) -> list[int]:
        self._check_open()
        hint = tr("Pass the beginning of a text to complete().")
        template = require_template(self._loaded.template, hint)
        return encode_messages(template, parse_messages(prompt, system), self._tokenizer)

    def _stream(self, ids: Sequence[int], options: AnswerOptions) -> TextStream:
        settings = parse_options(options, self._loaded.sampling)
        return TextStream(self._thread, ids, settings, self.n_ctx, owner=self)


def _read_all(stream: TextStream) -> Answer:
    with stream:
        for _ in stream:
            pass
    return stream.answer


def _free(embedder: TextEmbedder, close: Callable[[], object]) -> None:
    embedder.close()
    close()
