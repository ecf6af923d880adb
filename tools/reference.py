"""
Create build/reference: a virtual environment with qwenlocal and the programs that tests compare it with.

These are torch, transformers and PEFT, and the packers AutoGPTQ and AutoAWQ, whose layers are plain PyTorch.

    .venv/bin/python tools/reference.py

Installs the bindings from the wheel that `make setup` compiled. Does nothing if the environment is up to date.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build" / "reference"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
STAMP = VENV / "stamp"

# torch is pinned: without a version, pip picks the CUDA build, several GB.
PACKAGES = ("torch==2.13.0", "transformers>=5", "safetensors", "tokenizers", "sentencepiece", "protobuf",
            "peft==0.21.2", "accelerate", "setuptools", "wheel")  # fmt: skip
# Installed without their dependencies and without CUDA kernels: only single modules of them are imported.
PACKERS = ("auto-gptq==0.7.1", "autoawq==0.2.9")


def main() -> int:
    wheels = sorted(ROOT.glob("build/wheels-*/llama_cpp_python-*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    if not wheels:
        print("The bindings are not compiled yet. Run: make setup", file=sys.stderr)
        return 1
    fingerprint = hashlib.sha256(
        repr((PACKAGES, PACKERS, wheels[-1].parent.name, (ROOT / "pyproject.toml").read_bytes())).encode()
    ).hexdigest()
    if STAMP.exists() and STAMP.read_text() == fingerprint:
        return 0
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    bindings = ["--force-reinstall", "--no-deps", str(wheels[-1])]  # its version may be that of an earlier build
    for packages in ([PACKAGES[0]], list(PACKAGES[1:]), bindings, ["-e", f"{ROOT}[dev]"]):
        subprocess.run([*pip, *packages], check=True)
    packers = [*pip, "--no-deps", "--no-build-isolation", *PACKERS]
    subprocess.run(packers, check=True, env={**os.environ, "BUILD_CUDA_EXT": "0"})
    STAMP.write_text(fingerprint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
