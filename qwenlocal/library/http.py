"""
Reading byte ranges over HTTP, with every way of failing told apart.

urllib3 does the protocol; this file adds what it leaves to its users: the system's proxies and certificates, and one
exception, `Trouble`, that says whether asking again can help.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, ReadTimeoutError

from qwenlocal import __version__

T = TypeVar("T")

CHUNK = 1 << 18  # bytes handed on at once
_MOST_REDIRECTS = 8
_SECRET_HEADERS = ("authorization", "cookie")


class Trouble(Exception):
    """
    A place did not deliver. `again` tells whether it may later; `wait` is how long it asked us to leave it alone.
    """

    def __init__(
        self, reason: str, *, again: bool, wait: float = 0.0, unreachable: bool = False, status: int | None = None
    ) -> None:
        super().__init__(reason)
        self.again, self.wait, self.unreachable, self.status = again, wait, unreachable, status


@dataclass(frozen=True)
class Timeouts:
    """Seconds to wait for a connection, and for the next byte of a running transfer."""

    connect: float = 10.0
    stall: float = 20.0


@dataclass(frozen=True)
class Opened:
    """An answer being read: its bytes, where they start, the file's whole size and its entity tag (None: unknown)."""

    body: urllib3.BaseHTTPResponse
    start: int
    size: int | None
    etag: str | None


class _Throttle:
    """At most `rate` bytes a second over all threads; 0 is as fast as it goes."""

    def __init__(self, rate: int) -> None:
        self._rate, self._lock, self._next = rate, threading.Lock(), time.monotonic()

    def take(self, count: int) -> None:
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(self._next, now)
            self._next = begin + count / self._rate
        time.sleep(begin - now)


class Client:
    """
    One connection pool for everything the library fetches, at most `limit_rate` bytes a second altogether.

    Proxies are those of the process's environment (`HTTPS_PROXY`, `NO_PROXY`) and of the system's settings; `environ`
    names more certificates than the system trusts (`SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`, `PIP_CERT`).
    """

    def __init__(
        self, timeouts: Timeouts = Timeouts(), *, limit_rate: int = 0, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.timeouts, self._throttle = timeouts, _Throttle(limit_rate)
        self._environ = environ
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._lock = threading.Lock()
        self._open: set[urllib3.BaseHTTPResponse] = set()

    def open(self, url: str, *, headers: Mapping[str, str] = {}, start: int = 0, end: int | None = None) -> Opened:
        """
        Ask for bytes `start` to `end` (not included; None: to the last) of `url`, following redirects.

        A server that ignores ranges answers with the whole file; `Opened.start` is 0 then. Secrets in `headers` are
        not sent on to another host.

        Raises
        ------
        Trouble: no connection, or a status other than 200 and 206.
        """
        asked = {"User-Agent": f"qwenlocal/{__version__}", "Accept-Encoding": "identity", **headers}
        if start or end is not None:
            asked["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        response = self._follow(url, asked)
        if response.status not in (200, 206):
            trouble = _status_trouble(response, urlsplit(url).hostname or url)
            self.close(response)
            raise trouble
        return _opened(response)

    def _follow(self, url: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        for _ in range(_MOST_REDIRECTS):
            response = self._request(url, headers)
            target = response.get_redirect_location()
            if not target:
                return response
            self.close(response)
            target = urljoin(url, target)
            if urlsplit(target).scheme not in ("http", "https"):
                raise Trouble(f"{urlsplit(url).hostname} points at {target}", again=False)
            if urlsplit(target).netloc != urlsplit(url).netloc:
                headers = {name: value for name, value in headers.items() if name.lower() not in _SECRET_HEADERS}
            url = target
        raise Trouble(f"{urlsplit(url).hostname} redirects in a circle", again=False)

    def _request(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        timeout = urllib3.Timeout(connect=self.timeouts.connect, read=self.timeouts.stall)
        host = urlsplit(url).hostname or url
        try:
            response = self._pool(url).request(
                "GET", url, headers=headers, preload_content=False, redirect=False, retries=False, timeout=timeout
            )
        except ReadTimeoutError as reason:
            raise Trouble(f"{host} does not answer", again=True) from reason
        except HTTPError as reason:
            raise Trouble(f"{host}: {_plain(reason)}", again=True, unreachable=True) from reason
        with self._lock:
            self._open.add(response)
        return response

    def read(self, opened: Opened) -> Iterator[bytes]:
        """
        The bytes of an answer as they arrive.

        Raises
        ------
        Trouble: the connection broke or stalled before the promised end.
        """
        try:
            while chunk := opened.body.read1(CHUNK):
                self._throttle.take(len(chunk))
                yield chunk
        except ReadTimeoutError as reason:
            raise Trouble(f"no data for {self.timeouts.stall:.0f} s", again=True) from reason
        except (HTTPError, OSError, AttributeError, ValueError) as reason:
            # AttributeError and ValueError: another thread closed the socket under us (`close_all`).
            raise Trouble(f"the connection broke ({_plain(reason)})", again=True) from reason
        finally:
            self.close(opened.body)

    def text(self, url: str, *, headers: Mapping[str, str] = {}, most: int = 16 << 20) -> str:
        """The whole of a small document."""
        opened = self.open(url, headers=headers)
        data = bytearray()
        for chunk in self.read(opened):
            data += chunk
            if len(data) > most:
                self.close(opened.body)
                raise Trouble(f"the answer of {urlsplit(url).hostname} is longer than {most} bytes", again=False)
        return data.decode("utf-8", errors="replace")

    def close(self, response: urllib3.BaseHTTPResponse) -> None:
        """Be done with an answer; a half-read connection is not used again."""
        with self._lock:
            self._open.discard(response)
        with contextlib.suppress(Exception):  # closing what is broken already must not hide why
            response.close()

    def close_all(self) -> None:
        """Wake every thread that waits for bytes, by closing its connection."""
        with self._lock:
            running = list(self._open)
        for response in running:
            with contextlib.suppress(Exception):
                response.shutdown()
            self.close(response)

    def _pool(self, url: str) -> urllib3.PoolManager:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
        proxies = urllib.request.getproxies()
        proxy = "" if urllib.request.proxy_bypass(host) else proxies.get(scheme) or proxies.get("all") or ""
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = self._new_pool(proxy)
            return self._pools[proxy]

    def _new_pool(self, proxy: str) -> urllib3.PoolManager:
        context = self._certificates()
        if not proxy:
            return urllib3.PoolManager(maxsize=16, ssl_context=context)
        if proxy.startswith("socks"):
            from urllib3.contrib.socks import SOCKSProxyManager

            return SOCKSProxyManager(proxy, maxsize=16, ssl_context=context)
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
        headers = urllib3.make_headers(proxy_basic_auth=login) if login else None
        address = f"{parts.scheme}://{parts.hostname}:{parts.port or 80}"
        return urllib3.ProxyManager(address, maxsize=16, proxy_headers=headers, ssl_context=context)

    def _certificates(self) -> ssl.SSLContext:
        """What the operating system trusts, so that a company's own proxy works, and what the environment adds."""
        import truststore

        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT"):
            path = self._environ.get(name)
            if path and os.path.isfile(path):
                context.load_verify_locations(path)
        return context


def _opened(response: urllib3.BaseHTTPResponse) -> Opened:
    etag = response.headers.get("etag")
    if etag and etag.startswith("W/"):
        etag = None  # a weak tag promises nothing about bytes
    length = response.headers.get("content-length")
    if response.status == 206:
        span = response.headers.get("content-range", "")  # "bytes 0-99/1234"
        first, _, size = span.removeprefix("bytes ").partition("/")
        start = first.partition("-")[0]
        if not start.isdigit():
            raise Trouble(f"the server sent the strange range “{span}”", again=False)
        return Opened(response, int(start), int(size) if size.isdigit() else None, etag)
    return Opened(response, 0, int(length) if length and length.isdigit() else None, etag)


def _status_trouble(response: urllib3.BaseHTTPResponse, host: str) -> Trouble:
    status = response.status
    if status in (408, 425, 429) or status >= 500:
        wait = retry_after(response.headers.get("retry-after", ""), time.time)
        word = "is busy" if status in (429, 503) else "failed"
        return Trouble(f"{host} {word} (HTTP {status})", again=True, wait=wait, status=status)
    if status in (401, 403):
        return Trouble(f"{host} refuses access (HTTP {status})", again=False, status=status)
    if status in (404, 410):
        return Trouble(f"{host} does not have the file (HTTP {status})", again=False, status=status)
    return Trouble(f"{host} answered HTTP {status}", again=False, status=status)


def patiently(ask: Callable[[], T], tries: int = 3, longest: float = 15.0) -> T:
    """
    What `ask` returns; passing trouble (a busy server, a broken connection) is waited out a little.

    Nobody answering is not: whoever is offline wants to know at once.
    """
    for attempt in range(1, tries + 1):
        try:
            return ask()
        except Trouble as trouble:
            wait = trouble.wait or 0.5 * attempt
            if not trouble.again or trouble.unreachable or attempt == tries or wait > longest:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def retry_after(header: str, now: Callable[[], float]) -> float:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3): a number, or a date; 0 where it says nothing."""
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now())
    except (TypeError, ValueError):
        return 0.0


def _plain(reason: BaseException) -> str:
    """The innermost cause in few words: "Connection refused", not an object's repr."""
    text = str(reason)
    for known in (
        "Connection refused",
        "Name or service not known",
        "Temporary failure in name resolution",
        "Network is unreachable",
        "nodename nor servname provided",
        "timed out",
        "CERTIFICATE_VERIFY_FAILED",
        "Connection reset by peer",
        "IncompleteRead",
    ):
        if known in text:
            return {"IncompleteRead": "it ended early"}.get(known, known)
    return text.splitlines()[0][:120] if text else type(reason).__name__
