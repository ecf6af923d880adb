"""
The door to libggml, below llama.cpp: devices and their memory, tensor types, and the functions that quantize rows.

The libraries are opened by soname, as llama.cpp itself opens them: the copies without a version are separate files,
and a second ggml in the process would have a device list of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Address = int

_TYPE_COUNT = 43  # ggml.h: GGML_TYPE_COUNT of the pinned llama.cpp
_INFINITE = 0x7F800000  # the bits of a float from which on it is infinite or NaN
_GPU_TYPES = (1, 2)  # ggml-backend.h: GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU


@dataclass(frozen=True)
class Device:
    """Something that computes: its memory in bytes."""

    name: str
    description: str
    free: int
    total: int
    is_gpu: bool = False


class TensorType(NamedTuple):
    """
    How ggml lays out numbers: `block` of them take `width` bytes.

    `tensor_type("q4_k")` is TensorType(12, "q4_k", 256, 144): 4.5 bits a number. GGUF files say `number`.
    """

    number: int
    name: str
    block: int
    width: int

    @property
    def is_quantized(self) -> bool:
        """Whether numbers share scales; False for f32, f16 and bf16."""
        return self.block > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; `columns` must be a multiple of `block`."""
        return columns // self.block * self.width


def tensor_types() -> dict[str, TensorType]:
    """Every type that this ggml knows, by its name in small letters."""
    return _tensor_types()


def tensor_type(name: str) -> TensorType:
    """The type of that name, for example "f32" or "q4_k". KeyError where ggml has none."""
    return _tensor_types()[name]


def tensor_type_numbered(number: int) -> TensorType | None:
    """The type with that number in GGUF files; None where this ggml does not know it."""
    return next((kind for kind in _tensor_types().values() if kind.number == number), None)


def needs_importance(kind: TensorType) -> bool:
    """Whether ggml refuses to quantize to `kind` without an importance matrix."""
    return bool(_base().ggml_quantize_requires_imatrix(kind.number))


def is_float_like(kind: TensorType) -> bool:
    """Whether `to_float` can read `kind`: floats, and all quantized types but those that exist for a moment only."""
    return kind.name in ("f32", "f16", "bf16") or bool(_base().ggml_get_type_traits(kind.number).contents.to_float)


def to_float(kind: TensorType, source: Address, target: Address, count: int) -> None:
    """
    Write `count` numbers of type `kind` at `source` as float32 to `target`. The lock of Python is not held.

    ValueError where ggml cannot read `kind`.
    """
    if kind.name == "f32":
        ctypes.memmove(target, source, count * 4)
    elif kind.name == "bf16":
        _base().ggml_bf16_to_fp32_row(source, target, count)
    elif kind.name == "f16":
        _base().ggml_fp16_to_fp32_row(source, target, count)
    else:
        traits = _base().ggml_get_type_traits(kind.number).contents
        if not traits.to_float:
            raise ValueError(f"ggml cannot read {kind.name}")
        traits.to_float(source, target, count)


def quantize(
    kind: TensorType, source: Address, target: Address, rows: int, columns: int, importance: Address = 0
) -> None:
    """
    Write `rows` x `columns` float32 numbers at `source` as `kind` to `target`, which has room for them.

    Splitting rows over several calls gives the same bytes as one call (ggml.c: ggml_quantize_chunk). `importance` is
    the address of `columns` float32 weights, 0 for none. The lock of Python is not held.
    """
    count = rows * columns if not importance or ignores_importance(kind) else -1
    if count < 0 or quantize_quickly(tensor_type("f32"), source, kind, target, count) is None:
        quantize_with_ggml(kind, source, target, rows, columns, importance)


def ignores_importance(kind: TensorType) -> bool:
    """Whether ggml gives every number of such a type the same importance, whatever it is told."""
    return kind.name == "q8_0"


def quantize_quickly(kind: TensorType, source: Address, into: TensorType, target: Address, count: int) -> float | None:
    """
    Have our own code (tools/quantizers.cpp) write the bytes that ggml would, two to seven times as fast.

    Returns the largest magnitude among the numbers; infinity where one is not finite, and then what was written is
    worth nothing. None, and nothing is written, where `kind` is not f32 or bf16, `into` not q4_k, q5_k, q6_k or q8_0,
    and where libggml was compiled without it: a wheel from elsewhere, another compiler than GCC and clang.
    """
    ours = _quantizers()
    bits = ours(kind.number, source, into.number, target, count) if ours else -1
    if bits < 0:
        return None
    return float(struct.unpack("<f", struct.pack("<I", bits))[0]) if bits < _INFINITE else math.inf


def can_quantize_quickly(kind: TensorType, into: TensorType) -> bool:
    """Whether `quantize_quickly` knows the way from `kind` to `into`."""
    return quantize_quickly(kind, 0, into, 0, 0) is not None


def quantize_with_ggml(
    kind: TensorType, source: Address, target: Address, rows: int, columns: int, importance: Address = 0
) -> None:
    """`quantize`, by ggml's own code for every type."""
    _base().ggml_quantize_chunk(kind.number, source, target, 0, rows, columns, importance or None)


def is_valid(kind: TensorType, data: Address, size: int) -> bool:
    """Whether no scale in `size` bytes of quantized data is NaN or infinite."""
    return bool(_base().ggml_validate_row_data(kind.number, data, size))


class TensorInMemory(NamedTuple):
    """A tensor that llama.cpp asks somebody to fill: its name, type and size in bytes."""

    handle: Address
    name: str
    type: TensorType
    size: int

    @classmethod
    def at(cls, handle: Address) -> TensorInMemory:
        """The tensor behind a pointer of ggml's; its type is the first field of the structure (ggml.h)."""
        number = ctypes.c_int.from_address(handle).value
        kind = tensor_type_numbered(number)
        if kind is None:
            raise ValueError(f"type {number} is not known")
        return cls(handle, _base().ggml_get_name(handle).decode(), kind, _base().ggml_nbytes(handle))

    def put(self, data: Address, offset: int, size: int) -> None:
        """Copy `size` bytes at `data` to byte `offset` of the tensor, wherever its memory is."""
        _base().ggml_backend_tensor_set(self.handle, data, offset, size)


class GgufHeader:
    """The header of a GGUF file, as ggml itself reads it; the weights behind it need not be there."""

    def __init__(self, path: Path) -> None:
        """ValueError where ggml cannot read it."""
        self.handle: Address | None = _base().gguf_init_from_file(os.fsencode(path), _GgufParams(True, None))
        if not self.handle:
            raise ValueError(f"ggml cannot read {path}")

    def close(self) -> None:
        """Give the memory back."""
        if self.handle:
            _base().gguf_free(self.handle)
            self.handle = None


def devices() -> list[Device]:
    """Every device that the compiled libraries found: the processor, and graphics cards where there are any."""
    ggml = _library("ggml")
    count = ggml.ggml_backend_dev_count
    count.restype = ctypes.c_size_t
    get = ggml.ggml_backend_dev_get
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    return [_describe(get(index)) for index in range(count())]


def _describe(device: Any) -> Device:
    base = _library("ggml-base")
    name, description, memory = (
        base.ggml_backend_dev_name,
        base.ggml_backend_dev_description,
        base.ggml_backend_dev_memory,
    )
    for function in (name, description):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    memory.restype, memory.argtypes = None, [ctypes.c_void_p, size, size]
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    memory(device, ctypes.byref(free), ctypes.byref(total))
    kind = base.ggml_backend_dev_type
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    is_gpu = kind(device) in _GPU_TYPES
    return Device(name(device).decode(), description(device).decode(), free.value, total.value, is_gpu)


class _GgufParams(ctypes.Structure):
    """gguf.h: struct gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class _Traits(ctypes.Structure):
    """ggml.h: struct ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


def on_giving_up(last_words: Callable[[str], object]) -> object:
    """
    Have `last_words` called with ggml's reason where it would end the process: a device that is gone, a wrong call.

    Whether the process ends is up to `last_words`; where it returns, ggml ends it (abort). The reason begins with the
    file and line that gave up: "ggml-rpc.cpp:547: Remote RPC server crashed". What is returned has to be kept for as
    long as that shall be so.
    """
    made = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda reason: last_words(reason.decode(errors="replace")))
    _base().ggml_set_abort_callback(made)
    return made


@functools.cache
def _base() -> ctypes.CDLL:
    """libggml-base with the signatures of ggml.h declared."""
    base, pointer, i64, size = _library("ggml-base"), ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_bf16_to_fp32_row", None, [pointer, pointer, i64]),
        ("ggml_fp16_to_fp32_row", None, [pointer, pointer, i64]),
        ("ggml_get_type_traits", ctypes.POINTER(_Traits), [ctypes.c_int]),
        ("ggml_quantize_chunk", size, [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]),
        ("ggml_quantize_requires_imatrix", ctypes.c_bool, [ctypes.c_int]),
        ("ggml_validate_row_data", ctypes.c_bool, [ctypes.c_int, pointer, size]),
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
        ("gguf_init_from_file", pointer, [ctypes.c_char_p, _GgufParams]),
        ("gguf_free", None, [pointer]),
        ("ggml_set_abort_callback", pointer, [pointer]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return base


@functools.cache
def _quantizers() -> Any | None:
    """`qwenlocal_quantize_blocks` of this libggml, if it has one."""
    function = getattr(_base(), "qwenlocal_quantize_blocks", None)
    if function is not None:
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64]
    return function


@functools.cache
def _tensor_types() -> dict[str, TensorType]:
    found: dict[str, TensorType] = {}
    for number in range(_TYPE_COUNT):
        traits = _base().ggml_get_type_traits(number).contents
        if traits.type_name and traits.type_size and traits.blck_size:  # numbers of types that were removed are empty
            name = traits.type_name.decode().lower()
            found[name] = TensorType(number, name, traits.blck_size, traits.type_size)
    return found


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    folders = [Path(place) / "lib" for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for file in _file_names(name):
            if (folder / file).exists():
                return ctypes.CDLL(str(folder / file))
    raise OSError(f"lib{name} is not beside llama-cpp-python")


def _file_names(name: str) -> list[str]:
    if sys.platform == "win32":
        return [f"{name}.dll"]
    if sys.platform == "darwin":
        return [f"lib{name}.0.dylib", f"lib{name}.dylib"]
    return [f"lib{name}.so.0", f"lib{name}.so"]
