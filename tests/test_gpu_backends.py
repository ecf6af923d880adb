"""Set-up's choice of a GPU backend, on systems laid out in a folder, and what it says about missing packages."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import load_tool

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="GPUs are looked for in the file system of Linux")


@pytest.fixture
def backends() -> ModuleType:
    return load_tool("gpu_backends")


@pytest.fixture
def without_nvcc(monkeypatch: pytest.MonkeyPatch, backends: ModuleType) -> None:
    monkeypatch.setattr(backends, "find_nvcc", lambda environment: None)


def add_gpu(root: Path, vendor: str, number: int = 128) -> None:
    """Add a GPU with the PCI vendor number `vendor` to the system below `root`."""
    device = root / f"sys/class/drm/renderD{number}/device"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")


@linux_only
@pytest.mark.usefixtures("without_nvcc")
@pytest.mark.parametrize(("vendor", "name"), [("0x8086", "Intel"), ("0x1002", "AMD"), ("0x10de", "NVIDIA")])
def test_a_gpu_gets_the_vulkan_backend(backends: ModuleType, tmp_path: Path, vendor: str, name: str) -> None:
    add_gpu(tmp_path, vendor)
    choice = backends.choose_backend({}, tmp_path)
    assert choice.backend == "vulkan"
    assert name in choice.reason
    assert not choice.is_required


@linux_only
def test_a_gpu_by_nvidia_gets_cuda_if_its_compiler_is_there(backends: ModuleType, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(0o755)
    add_gpu(tmp_path, "0x8086")
    add_gpu(tmp_path, "0x10de", 129)
    environment = {"PATH": os.fspath(nvcc.parent), "CUDA_PATH": "/nowhere"}
    assert backends.choose_backend(environment, tmp_path).backend == "cuda"


@linux_only
@pytest.mark.parametrize("vendor", ["0x1af4", "", "nonsense"])
def test_a_virtual_or_unknown_gpu_is_not_used(backends: ModuleType, tmp_path: Path, vendor: str) -> None:
    add_gpu(tmp_path, vendor)
    choice = backends.choose_backend({}, tmp_path)
    assert (choice.backend, choice.reason) == (None, "No GPU was found: only the processor will be used.")


def test_the_variable_decides_otherwise(backends: ModuleType, tmp_path: Path) -> None:
    add_gpu(tmp_path, "0x8086")
    assert backends.choose_backend({"GPU": "off"}, tmp_path).backend is None
    choice = backends.choose_backend({"GPU": "cuda"}, tmp_path)
    assert (choice.backend, choice.is_required) == ("cuda", True)


def test_a_decision_holds_until_another_one_is_given(backends: ModuleType, tmp_path: Path) -> None:
    choice = backends.choose_backend({}, tmp_path, earlier="vulkan")
    assert (choice.backend, choice.is_required) == ("vulkan", False)
    assert backends.choose_backend({"GPU": "auto"}, tmp_path, earlier="vulkan").backend is None


def test_an_unknown_choice_lists_the_known_ones(backends: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(backends.UnknownChoice, match=r"GPU=metal is unknown\. Use one of: auto, vulkan, cuda, off\."):
        backends.choose_backend({"GPU": "metal"}, tmp_path)


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("", ""),
        ("glslc", "Missing to compile it: the shader compiler glslc.\nInstall it: sudo apt install"),
        ("loader;headers;spirv-headers", "the Vulkan loader, Vulkan's headers, SPIR-V's headers"),
        ("headers=1.3.239", "headers here (1.3.239) are too old"),
        ("headers=1.3.239;glslc", "Set VULKAN_SDK"),
        ("cublas;cuda-driver", "Missing to compile it: cuBLAS, the library of the driver (libcuda).\n"),
    ],
)
def test_missing_packages_are_named_with_the_command_that_installs_them(
    backends: ModuleType, monkeypatch: pytest.MonkeyPatch, missing: str, told: str
) -> None:
    monkeypatch.setattr("system_packages.system_kind", lambda: "debian")
    assert told in backends.describe_missing("vulkan", missing)
    assert bool(backends.describe_missing("vulkan", missing)) == bool(missing)
