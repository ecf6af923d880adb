"""Detection of GPUs without their drivers. Set-up uses it, so it needs only the standard library."""

from __future__ import annotations

from pathlib import Path

_PCI_VENDORS = {"0x8086": "Intel", "0x1002": "AMD", "0x10de": "NVIDIA"}


def find_gpu_vendors(root: Path = Path("/")) -> list[str]:
    """
    Return the vendors of this machine's GPUs, NVIDIA first. Works on Linux only; elsewhere, the list is empty.

    A laptop with integrated graphics by Intel and a card by NVIDIA gives ["NVIDIA", "Intel"]. Virtual GPUs are ignored.
    """
    found = set()
    if (root / "proc/driver/nvidia/gpus").is_dir() or (root / "usr/lib/wsl/lib/libcuda.so").exists():
        found.add("NVIDIA")
    for node in (root / "sys/class/drm").glob("renderD*"):
        try:
            found.add(_PCI_VENDORS.get((node / "device/vendor").read_text().strip(), ""))
        except OSError:
            continue  # not a PCI device
    return sorted(found - {""}, key=lambda vendor: (vendor != "NVIDIA", vendor))
