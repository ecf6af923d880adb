"""
Prepare `make test-gpu`: a GPU in software, lavapipe of Mesa, and llama.cpp's Vulkan backend for it.

    .venv/bin/python tools/gpu_tests.py

Installs packages of Debian or Ubuntu with apt-get (through sudo if this is not root). If the Vulkan headers of this
release are too old, takes those of a newer one, and unpacks them into build/vulkan without installing them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "vulkan"
SDK = FOLDER / "sdk" / "usr"
PACKAGES = ("libvulkan-dev", "glslc", "mesa-vulkan-drivers")
HEADERS = ("libvulkan-dev", "spirv-headers")
HEADER = Path("/usr/include/vulkan/vulkan_core.h")
NEWER_RELEASE = "trixie"  # Debian 13
SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list.d/ubuntu.sources", "/etc/apt/sources.list")


def main() -> int:
    if not shutil.which("apt-get"):
        print("test-gpu installs packages with apt-get, which is not here.", file=sys.stderr)
        return 1
    install(PACKAGES)
    if "VK_EXT_layer_settings" in HEADER.read_text():  # as in tools/vulkan_check
        install(["spirv-headers"])
    elif not (SDK / "include" / "vulkan").is_dir():
        unpack_headers()
    return 0


def install(packages: Sequence[str]) -> None:
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        apt = [*(["sudo"] if os.geteuid() else []), "apt-get", "--quiet"]
        subprocess.run([*apt, "update"], check=True, stdout=subprocess.DEVNULL)
        command = [*apt, "install", "--yes", "--no-install-recommends", *missing]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def is_installed(package: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${Status}", package]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.returncode == 0 and result.stdout.endswith(" installed")


def unpack_headers() -> None:
    """Unpack the headers of Debian's `NEWER_RELEASE`, from the mirror that this system uses."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for folder in ("sources", "lists/partial", "cache/archives/partial"):
        (FOLDER / folder).mkdir(parents=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    line = f"deb [signed-by={keyring}] {debian_mirror()} {NEWER_RELEASE} main\n"
    (FOLDER / "sources" / "newer.list").write_text(line)
    options = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": FOLDER / "sources",
        "Dir::State::Lists": FOLDER / "lists",
        "Dir::Cache": FOLDER / "cache",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "--quiet", *(f"--option={name}={value}" for name, value in options.items())]
    subprocess.run([*apt, "update"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*apt, "download", *HEADERS], check=True, stdout=subprocess.DEVNULL, cwd=FOLDER)
    for package in FOLDER.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, SDK.parent], check=True)
        package.unlink()
    for library in SDK.glob("lib/*/libvulkan.so"):
        library.unlink()  # it points to a loader that was not unpacked; that of this release is used
    shutil.rmtree(FOLDER / "lists")
    shutil.rmtree(FOLDER / "cache")


def debian_mirror() -> str:
    """Return the address that this system gets Debian's packages from."""
    for source in SOURCES:
        try:
            text = Path(source).read_text()
        except OSError:
            continue
        if match := re.search(r"(?:^URIs:\s*|^deb (?:\[.*\] )?)(\S+/debian)/?(?:\s|$)", text, re.M):
            return match[1]
    raise SystemExit("The sources of apt name no mirror of Debian.")


if __name__ == "__main__":
    sys.exit(main())
