"""
Fetch the libraries of the page from the npm registry, and check their hashes.

    python tools/vendor_page.py            check the files in qwenlocal/server/page/vendor
    python tools/vendor_page.py --fetch    download them again with npm, from the versions below

To update one: change its version and its integrity (`npm view NAME@VERSION dist.integrity`), fetch, and run
tests/test_page.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "qwenlocal" / "server" / "page" / "vendor"


@dataclass(frozen=True)
class Package:
    """A package of the npm registry; `files` are names in it and here, with the SHA-256 of their contents."""

    name: str
    version: str
    integrity: str
    files: dict[str, tuple[str, str]]

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


PACKAGES = (
    Package(
        "marked",
        "18.2.1",
        "sha512-ii4bxCTCqqwpT86XZWgJNs+ZnAIZksmLGYMViWA7PDIXYIeNo1x6cDdX3JOip9NM/cI6p8z57FxliACboTruMA==",
        {
            "lib/marked.esm.js": ("marked.esm.js", "c622dc6824a1c92c2d10ea9ede2fc872e46128afcc34b298e6ddee6f387ace8e"),
            "LICENSE": ("marked.LICENSE", "8e3a3f82f59a60958f56ca08f445647c32a4733dc7ca6c2c46f6eb898471ab9c"),
        },
    ),
    Package(
        "dompurify",
        "3.5.0",
        "sha512-LYC0ZkE8P1V42JsRYTwMdme/2ET8SpOc5AA2eOFjP/IadvRd2fwiT4TVz5vkfy0XUx12aS2UaRkTnfVPNOv9vw==",
        {
            "dist/purify.min.js": ("purify.min.js", "1bb69dcd35ac61a515cd876d9f9024b3117c8b7a1725f9b3097782d8d822e8d3"),
            "LICENSE": ("dompurify.LICENSE", "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"),
        },
    ),
    Package(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "sha512-KvOKXODaiFmId9xaq3xc5xCL66wVLUuOngDbO9B/kewbFTqdGbn2nJxNhN3H5R1cgDTVj6R8vH0zgiNDEGjpDw==",
        {
            "es/highlight.min.js": (
                "highlight.min.js",
                "1ed8fc5256b738b8875b74e4d3f0754f60d6411fb034d618dfbc4e6e6c9999d7",
            ),
            "LICENSE": ("highlight.LICENSE", "6c081431591d9df696c82dc598fe1423765b8a299b200ed00b281afd0f64c490"),
        },
    ),
)


def main(arguments: list[str]) -> int:
    if arguments == ["--fetch"]:
        for package in PACKAGES:
            fetch(package)
    problems = find_problems()
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def fetch(package: Package) -> None:
    """
    Download a package and write its files.

    Raises
    ------
    ValueError: it is not the one that was reviewed. CalledProcessError: npm cannot download it.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", "--pack-destination", folder, package.label], check=True)
        (path,) = Path(folder).iterdir()
        data = path.read_bytes()
    if f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}" != package.integrity:
        raise ValueError(f"{package.label} has changed")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for inside, (name, _) in package.files.items():
            member = archive.extractfile(f"package/{inside}")
            assert member is not None
            text = member.read().decode("utf-8").replace("\r\n", "\n")
            lines = [line for line in text.splitlines(keepends=True) if not line.startswith("//# sourceMappingURL=")]
            (FOLDER / name).write_text("".join(lines), encoding="utf-8", newline="\n")


def find_problems() -> list[str]:
    """Return a line for each file that is missing, unknown, or not as it was published."""
    expected = {name: digest for package in PACKAGES for name, digest in package.files.values()}
    problems = [f"{path.name} is not listed" for path in sorted(FOLDER.iterdir()) if path.name not in expected]
    for name, digest in expected.items():
        path = FOLDER / name
        actual = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        if actual != digest:
            problems.append(f"{name}: {actual}, not {digest}")
    return problems


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
