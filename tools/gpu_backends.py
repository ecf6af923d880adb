"""
The choice of the GPU backend that set-up compiles, and what is missing to compile it.

A backend is a module, which llama.cpp loads if the GPU's driver is installed. On a Mac, llama.cpp contains Metal. Uses
the standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from system_packages import advice

sys.path.append(str(Path(__file__).resolve().parent.parent))
from qwenlocal.gpu_hardware import find_gpu_vendors

CHOICES = ("auto", "vulkan", "cuda", "off")
TITLES = {"vulkan": "Vulkan", "cuda": "CUDA"}

# Names for what tools/*_check find missing.
_PARTS = {
    "loader": "the Vulkan loader",
    "headers": "Vulkan's headers",
    "glslc": "the shader compiler glslc",
    "spirv-headers": "SPIR-V's headers",
    "nvcc": "CUDA's compiler nvcc",
    "cublas": "cuBLAS",
    "cuda-driver": "the library of the driver (libcuda)",
}

# A second configuration of llama.cpp, for the module alone; it needs no processor backend.
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")),
)


@dataclass(frozen=True)
class GpuChoice:
    """The backend to compile ("vulkan", "cuda" or None), and the reason as a line for the user."""

    backend: str | None
    reason: str
    is_required: bool = False


class UnknownChoice(Exception):
    """The variable GPU has a value that set-up does not know."""


def choose_backend(
    environment: Mapping[str, str] = os.environ, root: Path = Path("/"), *, earlier: str = ""
) -> GpuChoice:
    """
    Choose by the variable GPU, by its `earlier` value, or by the GPUs of the system in `root`.

    Raises
    ------
    UnknownChoice: GPU is none of `CHOICES`.
    """
    given = environment.get("GPU", "")
    wanted = given or earlier or "auto"
    if wanted not in CHOICES:
        raise UnknownChoice(f"GPU={wanted} is unknown. Use one of: {', '.join(CHOICES)}.")
    if wanted == "off":
        return GpuChoice(None, "GPU=off: only the processor will be used.")
    if wanted != "auto":
        reason = f"GPU={wanted}: using llama.cpp's {TITLES[wanted]} backend."
        return GpuChoice(wanted, reason, is_required=bool(given))
    if sys.platform == "darwin":
        return GpuChoice(None, "llama.cpp uses the GPU through Metal.")
    if sys.platform == "win32" and "VULKAN_SDK" in environment:
        return GpuChoice("vulkan", "Found the Vulkan SDK: using llama.cpp's Vulkan backend.")
    vendors = find_gpu_vendors(root)
    if not vendors:
        return GpuChoice(None, "No GPU was found: only the processor will be used.")
    backend = "cuda" if vendors[0] == "NVIDIA" and find_nvcc(environment) else "vulkan"
    return GpuChoice(backend, f"Found an {vendors[0]} GPU: using llama.cpp's {TITLES[backend]} backend.")


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the path of CUDA's compiler, or None."""
    folders = (environment.get("PATH", ""), f"{environment.get('CUDA_PATH', '/usr/local/cuda')}/bin")
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def describe_missing(backend: str, missing: str) -> str:
    """
    Explain what tools/vulkan_check or tools/cuda_check found missing; "" if nothing is.

    `missing` is its list, such as "glslc;headers=1.3.239": there is no shader compiler, and the headers are too old.
    """
    parts = [part for part in missing.strip().split(";") if part]
    old = [part.partition("=")[2] for part in parts if part.startswith("headers=")]
    if old:
        return (
            f"The Vulkan headers here ({old[0]}) are too old for llama.cpp: they lack VK_EXT_layer_settings.\n"
            "Set VULKAN_SDK to a newer Vulkan SDK: https://vulkan.lunarg.com/sdk/home"
        )
    listed = ", ".join(_PARTS[part] for part in parts)
    return f"Missing to compile it: {listed}.\n{advice(backend)}" if parts else ""
