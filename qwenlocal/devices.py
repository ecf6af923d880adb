"""
The devices that llama.cpp can compute on: the processor, and GPUs through the backends that set-up compiled.

A GPU's backend is compiled into llama.cpp (Metal, or what CMAKE_ARGS selects), or is a module beside it, such as
libggml-vulkan.so, which loads only if the GPU's driver is installed.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwenlocal.ggml_library import base_library, libraries_folder, load_library


class DeviceKind(enum.IntEnum):
    """Kinds of devices (ggml-backend.h: enum ggml_backend_dev_type)."""

    CPU = 0
    GPU = 1
    INTEGRATED_GPU = 2  # its memory is the machine's
    ACCELERATOR = 3  # a library for matrix products on the processor
    META = 4


@dataclass(frozen=True)
class Device:
    """A device, and its memory in bytes."""

    name: str
    description: str
    free: int
    total: int
    kind: DeviceKind = DeviceKind.CPU
    backend: str = ""
    driver: str = ""  # known only for Vulkan

    @property
    def is_gpu(self) -> bool:
        """True for graphics cards and integrated GPUs."""
        return self.kind in (DeviceKind.GPU, DeviceKind.INTEGRATED_GPU)


@dataclass(frozen=True)
class BackendModule:
    """A backend's module; `error` is why it could not be loaded, or ""."""

    name: str
    error: str = ""


@functools.cache
def load_backend_modules() -> tuple[BackendModule, ...]:
    """Load the modules beside llama.cpp, once per process. Vulkan takes 25 ms."""
    load = load_library("ggml").ggml_backend_load
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    modules = []
    for path in sorted((libraries_folder() / "backends").glob("*ggml-*")):
        name, error = path.stem.rpartition("-")[2], ""
        try:
            ctypes.CDLL(str(path))  # raises an error that names what is missing; ggml only logs it
        except OSError as reason:
            error = str(reason)
        if not error and not load(str(path).encode()):
            error = "it does not match this version of llama.cpp"
        modules.append(BackendModule(name, error))
    return tuple(modules)


def list_devices() -> list[Device]:
    """List the devices with their free memory, as llama.cpp numbers them; the processor is one of them."""
    ggml = load_library("ggml")
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype, ggml.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    return [_describe(ggml.ggml_backend_dev_get(index)) for index in range(ggml.ggml_backend_dev_count())]


def find_vulkan_drivers(log: Iterable[str]) -> dict[str, str]:
    """
    Return the drivers of Vulkan's devices by name, from the lines that ggml-vulkan.cpp logs when it is loaded.

    "ggml_vulkan: 0 = Intel(R) Iris(R) Xe Graphics (Intel open-source Mesa driver) | uma: 1 | …" gives
    {"Vulkan0": "Intel open-source Mesa driver"}.
    """
    found = (re.search(r"ggml_vulkan: (\d+) = .* \(([^()]*)\) \| uma: ", line) for line in log)
    return {f"Vulkan{match[1]}": match[2] for match in found if match}


def device_array(devices: Sequence[Device]) -> ctypes.Array[ctypes.c_void_p]:
    """Return llama.cpp's pointers to `devices`, ended by a null pointer (llama.h: llama_model_params)."""
    find = load_library("ggml").ggml_backend_dev_by_name
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    return (ctypes.c_void_p * (len(devices) + 1))(*(find(device.name.encode()) for device in devices))


def _describe(device: int) -> Device:
    base, free, total = base_library(), ctypes.c_size_t(), ctypes.c_size_t()
    base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    name, description = base.ggml_backend_dev_name(device), base.ggml_backend_dev_description(device)
    backend = base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(device))
    kind = DeviceKind(base.ggml_backend_dev_type(device))
    return Device(name.decode(), description.decode(), free.value, total.value, kind, backend.decode())
