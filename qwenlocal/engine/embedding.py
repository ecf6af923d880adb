"""
Embeddings: a vector per text, from the hidden states of the model's last layer.

llama.cpp pools the states of a sequence, but only those that it computes at once, and with them it computes the logits
of every token (600 kB each for Qwen). So a long text is computed in parts, which keeps the memory small whatever its
length, and the pooled vectors of the parts are combined here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from qwenlocal.engine.context import ABORTED, AbortFlag, ContextOptions, context_parameters, pad_n_ctx
from qwenlocal.engine.llama import Model, load_library
from qwenlocal.errors import BadWeights, ContextFull, ContextNotCreated, Interrupted, QwenlocalError, UsageError
from qwenlocal.i18n import tr

_MEAN, _CLS, _LAST = 1, 2, 3  # llama.h: enum llama_pooling_type
_PART = 128  # tokens computed at once
_MAX_SEQUENCES = 32  # texts computed at once
_MIN_CONTEXT = 512


class Embedder:
    """
    Computes embeddings with the pooling that the model's file names; without one, the mean over all tokens.

    Its context is created when first needed, and again when a longer text needs a longer one, up to `options.n_ctx`.
    Its methods are called by one thread at a time.
    """

    def __init__(self, model: Model, options: ContextOptions) -> None:
        """
        Prepare contexts like those with `options`.

        Raises
        ------
        UsageError: the model ranks texts, or reads them in both directions at once.
        """
        self._model, self._c = model, load_library().c
        self._options = replace(options, n_batch=_PART, n_ubatch=_PART, n_seq_max=_MAX_SEQUENCES)
        self._pooling = _read_pooling(model)
        self._handle: Any = None
        self._batch = self._c.llama_batch_init(_PART, 0, 1)

    @property
    def size(self) -> int:
        """The number of dimensions of a vector."""
        return int(self._c.llama_model_n_embd_out(self._model.handle))

    @property
    def limit(self) -> int:
        """The most tokens that a text can have."""
        return pad_n_ctx(self._options.n_ctx)

    def encode(self, text: str, *, truncate: bool = False) -> list[int]:
        """
        Return the tokens of `text`, with those that the model expects at its ends; `truncate` omits those over `limit`.

        Raises
        ------
        UsageError: there are none.
        """
        tokenizer, vocab = self._model.tokenizer, self._c.llama_model_get_vocab(self._model.handle)
        ids = tokenizer.tokenize(text, special=False, add_bos=tokenizer.adds_bos)
        ends = [int(self._c.llama_vocab_eos(vocab))] if self._c.llama_vocab_get_add_eos(vocab) else []
        ids = [*(ids[: self.limit - len(ends)] if truncate else ids), *ends]
        if not ids:
            raise UsageError(tr("An empty text has no embedding."), hint=tr("Leave it out."))
        return ids

    def embed(self, texts: Sequence[Sequence[int]], abort: AbortFlag | None = None) -> Iterator[list[float]]:
        """
        Yield the vectors of texts, given as token ids, in their order; each has length 1.

        Setting `abort` ends it within milliseconds, from any thread.

        Raises
        ------
        ContextFull: a text is too long; raised before anything is computed. ContextNotCreated: memory is short.
        BadWeights: the model computes NaN. Interrupted: `abort` was set.
        """
        longest = max(map(len, texts), default=0)
        if longest > self.limit:
            raise ContextFull(longest, self.limit, self._model.n_ctx_train)
        self._ensure_context(longest)
        abort = AbortFlag() if abort is None else abort  # not `or`: an unset flag is false
        for group in _group_texts(texts, self._n_ctx):
            self._c.llama_memory_clear(self._c.llama_get_memory(self._handle), False)
            abort.watch(self._c, self._handle)
            for total in self._embed_group(group):
                yield self._normalize(total)

    def close(self) -> None:
        """Free the memory."""
        self._c.llama_batch_free(self._batch)
        self._free_context()

    # --- the context

    @property
    def _n_ctx(self) -> int:
        return int(self._c.llama_n_ctx(self._handle)) if self._handle else 0

    def _ensure_context(self, n_ctx: int) -> None:
        if n_ctx <= self._n_ctx:
            return
        self._free_context()
        n_ctx = min(max(_MIN_CONTEXT, 1 << (n_ctx - 1).bit_length()), self.limit)
        params = context_parameters(self._c, replace(self._options, n_ctx=n_ctx))
        params.embeddings, params.pooling_type, params.n_outputs_max = True, self._pooling, _PART
        library = load_library()
        library.log.clear()
        self._handle = self._c.llama_init_from_model(self._model.handle, params)
        if not self._handle:
            raise ContextNotCreated(n_ctx, library.first_error() or "no reason given")

    def _free_context(self) -> None:
        if self._handle:
            self._c.llama_free(self._handle)
            self._handle = None

    # --- computing

    def _embed_group(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Compute the pooled vectors of texts that fit into the context together."""
        totals = [[0.0] * self.size for _ in texts]
        for part in _split_parts([len(text) for text in texts]):
            self._decode(texts, part)
            for sequence, start, stop in part:
                vector = self._c.llama_get_embeddings_seq(self._handle, sequence)[: self.size]
                is_end = stop == len(texts[sequence])
                if self._pooling == _MEAN:
                    weight = (stop - start) / len(texts[sequence])
                    totals[sequence] = [a + weight * b for a, b in zip(totals[sequence], vector, strict=True)]
                elif start == 0 if self._pooling == _CLS else is_end:
                    totals[sequence] = vector
        return totals

    def _decode(self, texts: Sequence[Sequence[int]], part: Sequence[tuple[int, int, int]]) -> None:
        batch, count = self._batch, 0
        for sequence, start, stop in part:
            for position in range(start, stop):
                batch.token[count], batch.pos[count] = texts[sequence][position], position
                batch.n_seq_id[count], batch.seq_id[count][0], batch.logits[count] = 1, sequence, True
                count += 1
        batch.n_tokens = count
        code = self._c.llama_decode(self._handle, batch)
        if code == ABORTED:
            raise Interrupted
        if code:
            raise QwenlocalError(
                f"llama.cpp failed to decode (code {code}): {load_library().first_error() or 'no reason given'}",
                hint="This is a bug in qwenlocal or llama.cpp. To see llama.cpp's log, set QWENLOCAL_LLAMA_LOG=1.",
            )

    def _normalize(self, vector: Sequence[float]) -> list[float]:
        length = math.sqrt(math.fsum(value * value for value in vector))
        if not math.isfinite(length):
            raise BadWeights(self._model.path, tr("the model computes NaN; its weights or metadata are damaged"))
        return [value / length for value in vector] if length else list(vector)


def _read_pooling(model: Model) -> int:
    """Return the pooling of a model (llama-arch.cpp: LLM_KV_POOLING_TYPE, LLM_KV_ATTENTION_CAUSAL)."""
    architecture = model.metadata("general.architecture")
    pooling = int(model.metadata(f"{architecture}.pooling_type") or 0) or _MEAN
    if pooling not in (_MEAN, _CLS, _LAST) or model.metadata(f"{architecture}.attention.causal") == "false":
        raise UsageError(
            tr("This is a reranking or bidirectional model; its embeddings are not supported."),
            hint=tr("Use a chat model, or an embedding model such as Qwen3-Embedding."),
        )
    return pooling


def _group_texts(texts: Sequence[Sequence[int]], n_ctx: int) -> Iterator[list[Sequence[int]]]:
    """Group neighboring texts that fit into a context of `n_ctx` tokens together, `_MAX_SEQUENCES` at most."""
    group: list[Sequence[int]] = []
    for text in texts:
        if group and (len(group) == _MAX_SEQUENCES or sum(map(len, group)) + len(text) > n_ctx):
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _split_parts(lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """
    Split texts of these lengths into parts of `_PART` tokens: triples of a text's number, its first token, and the end.

    `_split_parts([100, 200])` yields [(0, 0, 100), (1, 0, 28)], [(1, 28, 156)], [(1, 156, 200)].
    """
    part: list[tuple[int, int, int]] = []
    room = _PART
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            part.append((number, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield part
                part, room = [], _PART
    if part:
        yield part
