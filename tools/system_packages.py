"""Commands that install what set-up needs, on this platform. Uses the standard library only."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"

_COMMANDS = {
    "compiler": {
        "debian": "sudo apt install build-essential",
        "fedora": "sudo dnf install gcc-c++ make",
        "darwin": "xcode-select --install",
        "win32": "winget install Microsoft.VisualStudio.2022.BuildTools (with “Desktop development with C++”)",
    },
    "python3-venv": {
        "debian": f"sudo apt install python{_VERSION}-venv",
        "fedora": "sudo dnf install python3",
        "darwin": "brew install python",
        "win32": "winget install Python.Python.3.12",
    },
    "python3": {
        "debian": "sudo apt install python3 python3-venv",
        "fedora": "sudo dnf install python3",
        "darwin": "brew install python",
        "win32": "winget install Python.Python.3.12",
    },
    "vulkan": {
        "debian": "sudo apt install libvulkan-dev glslc spirv-headers",
        "fedora": "sudo dnf install vulkan-loader-devel vulkan-headers glslc spirv-headers-devel",
        "win32": "winget install KhronosGroup.VulkanSDK",
    },
    "cuda": {
        "debian": "sudo apt install nvidia-cuda-toolkit",
        "fedora": "sudo dnf install cuda-toolkit",
        "win32": "winget install Nvidia.CUDA",
    },
}


def advice(what: str) -> str:
    """Return a sentence with the command that installs `what`: one of the keys above."""
    commands, kind = _COMMANDS[what], system_kind()
    if kind in commands:
        return f"Install it: {commands[kind]}"
    return f"On Debian or Ubuntu: {commands['debian']}; on Fedora: {commands['fedora']}"


def system_kind() -> str:
    """Return "debian" or "fedora" for these and their relatives, "darwin", "win32", or "" for other systems."""
    if sys.platform in ("darwin", "win32"):
        return sys.platform
    try:
        release = Path("/etc/os-release").read_text().lower()
    except OSError:
        return ""
    if re.search(r"^id(_like)?=.*(debian|ubuntu)", release, re.M):
        return "debian"
    return "fedora" if re.search(r"^id(_like)?=.*(fedora|rhel)", release, re.M) else ""
