"""
The door to libggml, below llama.cpp: devices and their memory.

The libraries are opened by soname, as llama.cpp itself opens them: the copies without a version are separate files,
and a second ggml in the process would have a device list of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GPU_TYPES = (1, 2)  # ggml-backend.h: GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU


@dataclass(frozen=True)
class Device:
    """Something that computes: its memory in bytes."""

    name: str
    description: str
    free: int
    total: int
    is_gpu: bool = False


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
