"""
The libraries of ggml that llama-cpp-python brings, and the signatures of their functions.

They are opened by soname, as llama.cpp opens them: the copies without a version are separate files, and a second ggml
in the process would have a device list of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any


class GgufParams(ctypes.Structure):
    """gguf.h: struct gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class TypeTraits(ctypes.Structure):
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


@functools.cache
def libraries_folder() -> Path:
    """
    Return the folder of llama.cpp's libraries.

    Raises
    ------
    OSError: llama-cpp-python is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise OSError("llama-cpp-python is not installed")
    return Path(spec.submodule_search_locations[0], "lib")


@functools.cache
def load_library(name: str) -> ctypes.CDLL:
    """
    Load one of the libraries: "ggml", "ggml-base", "ggml-cpu".

    Raises
    ------
    OSError: it is missing.
    """
    names = {"win32": (f"{name}.dll",), "darwin": (f"lib{name}.0.dylib", f"lib{name}.dylib")}
    for file in names.get(sys.platform, (f"lib{name}.so.0", f"lib{name}.so")):
        if (path := libraries_folder() / file).exists():
            return ctypes.CDLL(str(path))
    raise OSError(f"lib{name} is missing from llama-cpp-python")


@functools.cache
def base_library() -> ctypes.CDLL:
    """Load libggml-base and declare the signatures of ggml.h."""
    base, pointer, i64, size = load_library("ggml-base"), ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_get_type_traits", ctypes.POINTER(TypeTraits), [ctypes.c_int]),
        ("ggml_quantize_chunk", size, [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]),
        ("ggml_quantize_requires_imatrix", ctypes.c_bool, [ctypes.c_int]),
        ("ggml_validate_row_data", ctypes.c_bool, [ctypes.c_int, pointer, size]),
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_op_name", ctypes.c_char_p, [ctypes.c_int]),
        ("ggml_backend_buffer_is_host", ctypes.c_bool, [pointer]),
        ("ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
        ("gguf_init_from_file", pointer, [ctypes.c_char_p, GgufParams]),
        ("gguf_free", None, [pointer]),
        ("gguf_get_n_tensors", i64, [pointer]),
        ("gguf_get_tensor_type", ctypes.c_int, [pointer, i64]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [pointer, i64]),
        ("gguf_get_tensor_size", size, [pointer, i64]),
        ("ggml_set_abort_callback", pointer, [pointer]),
        ("ggml_backend_dev_name", ctypes.c_char_p, [pointer]),
        ("ggml_backend_dev_description", ctypes.c_char_p, [pointer]),
        ("ggml_backend_dev_memory", None, [pointer, ctypes.POINTER(size), ctypes.POINTER(size)]),
        ("ggml_backend_dev_type", ctypes.c_int, [pointer]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_name", ctypes.c_char_p, [pointer]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return base


@functools.cache
def find_kernel(name: str) -> Any | None:
    """Return a function that tools/llama.cpp.cmake adds to libggml-base; None if it was compiled without them."""
    pointer, i64, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "qwenlocal_quantize_blocks": (i64, [number, pointer, number, pointer, i64]),
        "qwenlocal_quantize_weighted": (i64, [number, pointer, number, pointer, i64, i64, pointer]),
        "qwenlocal_pack_rows": (
            ctypes.c_bool,
            [pointer, i64, i64, ctypes.c_bool, i64, i64, number, pointer, pointer, pointer, pointer],
        ),
        "qwenlocal_integer_peak": (i64, [i64]),
    }
    function = getattr(base_library(), name, None)
    if function is not None:
        function.restype, function.argtypes = signatures[name]
    return function
