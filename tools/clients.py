"""
Create build/clients: programs that people use a server with, and qwenlocal, for tests that connect them.

    .venv/bin/python tools/clients.py

Installs the bindings from the wheel that `make setup` compiled. Does nothing if the environment is up to date.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements" / "clients.txt"
VENV = ROOT / "build" / "clients"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
STAMP = VENV / "stamp"

NODE_PACKAGE = "openai@7.59.0"


def main() -> int:
    wheels = sorted(ROOT.glob("build/wheels-*/llama_cpp_python-*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    if not wheels:
        print("The bindings are not compiled yet. Run: make setup", file=sys.stderr)
        return 1
    npm = shutil.which("npm")
    inputs = (
        REQUIREMENTS.read_bytes(),
        (ROOT / "pyproject.toml").read_bytes(),
        wheels[-1].parent.name,
        NODE_PACKAGE,
        bool(npm),
    )
    fingerprint = hashlib.sha256(repr(inputs).encode()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == fingerprint:
        return 0
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    bindings = ["--force-reinstall", "--no-deps", str(wheels[-1])]  # its version may be that of an earlier build
    for packages in (["-r", str(REQUIREMENTS)], bindings, ["-e", str(ROOT)]):
        subprocess.run([*pip, *packages], check=True)
    if npm:
        options = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(VENV / "node")]
        subprocess.run([npm, "install", *options, NODE_PACKAGE], check=True)
    else:
        print("npm is not installed; tests of the Node package are skipped.", file=sys.stderr)
    STAMP.write_text(fingerprint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
