"""
The limits of this machine, and what a token demands of them (the roofline model of Williams et al., 2009).

Decoding reads every weight once per token, so the memory limits it. Prefilling multiplies each weight that was read
with many tokens, so the processor's multiply-accumulate instructions limit it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from qwenlocal.ggml import integer_operations
from qwenlocal.weights.gguf_reader import Header, TensorInfo

_BUFFER_SIZE = 512 << 20  # more than any processor's cache
_ROUNDS = 32_000_000  # about 50 ms
_REPETITIONS = 5


class MachineLimits(NamedTuple):
    """
    Rates that programs cannot exceed: memory reads in bytes per second, and 8-bit integer operations per second.

    A multiplication and an addition are two operations. `operations` is None if llama.cpp was not compiled by this
    project, or if the processor has no instruction for them.
    """

    bandwidth: float
    operations: float | None


class TokenWork(NamedTuple):
    """The demand of one token: the bytes of weights to read, and the operations to multiply them."""

    bytes: int
    operations: int


def measure_limits(threads: int) -> MachineLimits:
    """Measure the limits of `threads` threads, the best of a few runs; takes about a second and 512 MB."""
    operations = None
    if integer_operations(1):
        operations = _best_rate(threads, lambda _: integer_operations(_ROUNDS))
    return MachineLimits(_measure_bandwidth(threads), operations)


def _measure_bandwidth(threads: int) -> float:
    """Search memory for a byte that is not there, with the C library's vectorized memchr."""
    memchr = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).memchr
    memchr.restype, memchr.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    share = _BUFFER_SIZE // threads
    with mmap.mmap(-1, _BUFFER_SIZE) as buffer:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        ctypes.memset(start, 0, _BUFFER_SIZE)  # until they are written, all pages are the same one

        def read(thread: int) -> int:
            memchr(start + thread * share, 1, share)
            return share

        return _best_rate(threads, read)


def _best_rate(threads: int, work: Callable[[int], int]) -> float:
    """Run `work(0)`, `work(1)`, … at the same time, and return their combined rate per second."""
    done = [0] * threads

    def run(thread: int) -> None:
        done[thread] = work(thread)

    rates = []
    for _ in range(_REPETITIONS):
        workers = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates.append(sum(done) / (time.perf_counter() - started))
    return max(rates)


def token_work(header: Header) -> TokenWork:
    """
    Add up the weights that a token uses; of a mixture of experts, those of the experts that are active at once.

    Of the token embeddings one row is read, unless they are the output matrix as well. Prefilling needs the output
    matrix for the last token only. Qwen1.5-0.5B as Q4_0 reads 302 MB per token.
    """
    has_output = any(tensor.name == "output.weight" for tensor in header.tensors)
    size = operations = 0.0
    for tensor in header.tensors:
        share = _active_share(header, tensor)
        if has_output and tensor.name == "token_embd.weight":
            continue
        size += tensor.size * share
        if len(tensor.shape) > 1 and tensor.name not in ("token_embd.weight", "output.weight"):
            operations += 2 * tensor.elements * share
    return TokenWork(round(size), round(operations))


def _active_share(header: Header, tensor: TensorInfo) -> float:
    """Return the share of a tensor's experts that a token uses; 1 for all other tensors."""
    if "_exps." not in tensor.name:
        return 1.0
    return float(header.dimension("expert_used_count", 1) / max(1, header.dimension("expert_count", 1)))
