"""
SHA-256 digests that can be continued in another process.

hashlib does not export the state of a digest. OpenSSL, which it is built on, does: `SHA256_CTX` (openssl/sha.h) is a
structure of 112 bytes without pointers. It is used if Python loads OpenSSL as a library; in builds that contain it, and
on Windows, digests start from the first byte.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from typing import Any

_STATE = struct.Struct("28I")
_STATE_SIZE = _STATE.size
_PROBE = b"qwenlocal" * 20


class ResumableSha256:
    """The SHA-256 of bytes that are added in order; `state` is that of an earlier digest to continue."""

    def __init__(self, state: bytes | None = None) -> None:
        self._openssl: Any = _load_openssl()
        self._fallback = None if self._openssl else hashlib.sha256()
        self._context = ctypes.create_string_buffer(state or b"", 2 * _STATE_SIZE)
        if self._openssl and state is None:
            self._openssl.SHA256_Init(self._context)

    @property
    def state(self) -> bytes | None:
        """The state, to continue from later; None if it cannot be exported."""
        return self._context.raw[:_STATE_SIZE] if self._openssl else None

    def update(self, data: memoryview) -> None:
        """Add bytes, which must be writable: ctypes takes the address of no others."""
        if self._fallback:
            self._fallback.update(data)
        elif data:
            self._openssl.SHA256_Update(self._context, (ctypes.c_char * len(data)).from_buffer(data), len(data))

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far; more may follow."""
        if self._fallback:
            return self._fallback.hexdigest()
        context, digest = ctypes.create_string_buffer(self._context.raw), ctypes.create_string_buffer(32)
        self._openssl.SHA256_Final(digest, context)
        return digest.raw.hex()


def can_export_state() -> bool:
    """Return True if the state of a digest can be exported here."""
    return _load_openssl() is not None


def is_state_after(state: bytes, size: int) -> bool:
    """Return True if `state` can be that of a digest of `size` bytes; with another, OpenSSL could exceed its buffer."""
    numbers = _STATE.unpack(state)  # h[8], Nl, Nh, data[16], num, md_len
    bits, buffered, digest_size = numbers[8] | numbers[9] << 32, numbers[26], numbers[27]
    return (bits, buffered, digest_size) == (8 * size, size % 64, 32)


@functools.cache
def _load_openssl() -> Any | None:
    """Return the functions of the OpenSSL library, if a state of them gives the same digest as hashlib."""
    try:
        import _hashlib

        library = ctypes.CDLL(_hashlib.__file__)
        for name, arguments in (
            ("SHA256_Init", [ctypes.c_void_p]),
            ("SHA256_Update", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
            ("SHA256_Final", [ctypes.c_void_p, ctypes.c_void_p]),
        ):
            getattr(library, name).argtypes = arguments
    except (ImportError, OSError, AttributeError):
        return None
    context, digest = ctypes.create_string_buffer(2 * _STATE_SIZE), ctypes.create_string_buffer(32)
    library.SHA256_Init(context)
    library.SHA256_Update(context, _PROBE, len(_PROBE))
    copy = ctypes.create_string_buffer(context.raw[:_STATE_SIZE], 2 * _STATE_SIZE)
    library.SHA256_Update(copy, _PROBE, len(_PROBE))
    library.SHA256_Final(digest, copy)
    return library if digest.raw == hashlib.sha256(_PROBE + _PROBE).digest() else None
