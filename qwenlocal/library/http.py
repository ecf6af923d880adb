"""
HTTP: downloads of byte ranges, and single requests.

urllib3 does the protocol. This module adds the system's proxies and certificates, and maps every failure to a
`TransferError` that says whether a retry can help.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError, InvalidHeader, ReadTimeoutError

from qwenlocal import __version__

T = TypeVar("T")

CHUNK_SIZE = 1 << 18
_MAX_REDIRECTS = 8
_MAX_TEXT_SIZE = 16 << 20
_MAX_RETRY_WAIT = 15.0  # seconds
_KNOWN_CAUSES = (
    "Connection refused", "Name or service not known", "Temporary failure in name resolution",
    "Network is unreachable", "nodename nor servname provided", "timed out", "CERTIFICATE_VERIFY_FAILED",
    "Connection reset by peer", "Remote end closed connection without response",
)  # fmt: skip
_SECRET_HEADERS = ("authorization", "cookie")
_FINAL_PROBLEMS = {
    401: "refuses access",
    403: "refuses access",
    404: "does not have the file",
    410: "does not have the file",
    416: "has a shorter file now",  # the requested range is outside of it
}


class TransferError(Exception):
    """
    A failed transfer from one source.

    `retryable` tells whether the same request may succeed later, `retry_after` how many seconds the server asks to
    wait, `unreachable` whether there was no answer at all, `status` the HTTP status if there was one.
    """

    def __init__(
        self,
        reason: str,
        *,
        retryable: bool,
        retry_after: float = 0.0,
        unreachable: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.retryable, self.retry_after, self.unreachable, self.status = retryable, retry_after, unreachable, status


@dataclass(frozen=True)
class Timeouts:
    """Seconds to wait for a connection, and for the next byte of a running transfer."""

    connect: float = 10.0
    stall: float = 20.0


@dataclass(frozen=True)
class HttpResponse:
    """An open response: its body, the offset of its first byte, the size of the whole file and its ETag (or None)."""

    body: urllib3.BaseHTTPResponse
    start: int
    size: int | None
    etag: str | None


class HttpClient:
    """
    One connection pool for all requests, limited to `limit_rate` bytes per second in total (0: unlimited).

    Proxies come from the environment (`HTTPS_PROXY`, `NO_PROXY`) and the system's settings; the environment can name
    further certificates to trust (`SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`, `PIP_CERT`).
    """

    def __init__(self, timeouts: Timeouts = Timeouts(), *, limit_rate: int = 0) -> None:
        self.timeouts, self._limit_rate, self._next_chunk_time = timeouts, limit_rate, 0.0
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._lock = threading.Lock()
        self._open_responses: set[urllib3.BaseHTTPResponse] = set()
        self._connections: weakref.WeakSet[HTTPConnection] = weakref.WeakSet()

    def open(
        self, url: str, *, headers: Mapping[str, str] = {}, start: int = 0, end: int | None = None
    ) -> HttpResponse:
        """
        Request bytes `start` to `end` (exclusive; None: to the end) of `url`, following redirects.

        A server without range support sends the whole file, and `HttpResponse.start` is 0. Credentials in `headers`
        are not sent on to another host.

        Raises
        ------
        TransferError: no connection, or a status other than 200 and 206.
        """
        request_headers = {"User-Agent": f"qwenlocal/{__version__}", "Accept-Encoding": "identity", **headers}
        if start or end is not None:
            request_headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        response = self._follow(url, request_headers)
        if response.status not in (200, 206):
            error = _status_error(response, urlsplit(url).hostname or url)
            self.close(response)
            raise error
        return _parse_response(response)

    def probe(self, url: str, headers: Mapping[str, str] = {}) -> HttpResponse:
        """
        Request the first byte of `url`, for the size and ETag of the file; the response is closed already.

        Raises
        ------
        TransferError: the request failed, after several attempts if the server is busy.
        """
        response = with_retries(lambda: self.open(url, headers=headers, start=0, end=1))
        self.close(response.body)
        return response

    def _follow(self, url: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        # Not urllib3.Retry: its redirects keep the first host's proxy, and it sleeps instead of failing over.
        for _ in range(_MAX_REDIRECTS):
            response = self.request("GET", url, headers=headers)
            target = response.get_redirect_location()
            if not target:
                return response
            self.close(response)
            target = urljoin(url, target)
            if urlsplit(target).scheme not in ("http", "https"):
                raise TransferError(f"{urlsplit(url).hostname} redirects to {target}", retryable=False)
            if urlsplit(target).netloc != urlsplit(url).netloc:
                headers = {name: value for name, value in headers.items() if name.lower() not in _SECRET_HEADERS}
            url = target
        raise TransferError(f"too many redirects from {urlsplit(url).hostname}", retryable=False)

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None = None
    ) -> urllib3.BaseHTTPResponse:
        """
        Send a request and return the open response, whatever its status; a redirect is not followed.

        Raises
        ------
        TransferError: there is no response, or `close_all` was called meanwhile.
        """
        timeout = urllib3.Timeout(connect=self.timeouts.connect, read=self.timeouts.stall)
        host = urlsplit(url).hostname or url
        try:
            response = self._pool(url).request(
                method,
                url,
                headers=headers,
                body=body,
                preload_content=False,
                redirect=False,
                retries=False,
                timeout=timeout,
            )
        except ReadTimeoutError as reason:
            raise TransferError(f"{host} does not respond", retryable=True) from reason
        except HTTPError as reason:
            raise TransferError(f"{host}: {_short_reason(reason)}", retryable=True, unreachable=True) from reason
        with self._lock:
            self._open_responses.add(response)
        return response

    def read(self, response: HttpResponse) -> Iterator[bytes]:
        """
        Yield the bytes of a response as they arrive.

        Raises
        ------
        TransferError: the connection broke or stalled before the end.
        """
        try:
            while chunk := response.body.read1(CHUNK_SIZE):
                self._wait_for_rate(len(chunk))
                yield chunk
        except ReadTimeoutError as reason:
            raise TransferError(f"no data for {self.timeouts.stall:.0f} s", retryable=True) from reason
        except (HTTPError, OSError, AttributeError, ValueError) as reason:
            # AttributeError and ValueError: another thread closed the socket during the read (`close_all`).
            raise TransferError(f"the connection broke ({_short_reason(reason)})", retryable=True) from reason
        finally:
            self.close(response.body)

    def _wait_for_rate(self, count: int) -> None:
        """Sleep until `count` more bytes are within the rate limit."""
        if not self._limit_rate:
            return
        with self._lock:
            now = time.monotonic()
            start = max(self._next_chunk_time, now)
            self._next_chunk_time = start + count / self._limit_rate
        time.sleep(start - now)

    def read_text(self, url: str, headers: Mapping[str, str] = {}) -> str:
        """
        Return a small document.

        Raises
        ------
        TransferError: the request failed, or the document is longer than 16 MiB.
        """
        response = self.open(url, headers=headers)
        data = bytearray()
        for chunk in self.read(response):
            data += chunk
            if len(data) > _MAX_TEXT_SIZE:
                self.close(response.body)
                host = urlsplit(url).hostname
                raise TransferError(f"the response of {host} is longer than {_MAX_TEXT_SIZE} bytes", retryable=False)
        return data.decode("utf-8", errors="replace")

    def close(self, body: urllib3.BaseHTTPResponse) -> None:
        """Close a response; a half-read connection is not reused."""
        with self._lock:
            self._open_responses.discard(body)
        with contextlib.suppress(Exception):  # closing a broken connection must not hide the first error
            body.close()

    def close_all(self) -> None:
        """Close every connection, which wakes all threads that wait for a response or for its bytes."""
        with self._lock:
            running, connections = list(self._open_responses), list(self._connections)
        for connection in connections:
            with contextlib.suppress(Exception):
                connection.sock.shutdown(socket.SHUT_RDWR)
        for body in running:
            with contextlib.suppress(Exception):
                body.shutdown()
            self.close(body)

    def _pool(self, url: str) -> urllib3.PoolManager:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
        proxies = urllib.request.getproxies()
        proxy = "" if urllib.request.proxy_bypass(host) else proxies.get(scheme) or proxies.get("all") or ""
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = self._create_pool(proxy)
            return self._pools[proxy]

    def _create_pool(self, proxy: str) -> urllib3.PoolManager:
        manager = self._create_manager(proxy)
        manager.pool_classes_by_scheme = {
            scheme: _register_connections(pool, self._add_connection)
            for scheme, pool in manager.pool_classes_by_scheme.items()
        }
        return manager

    def _add_connection(self, connection: HTTPConnection) -> None:
        with self._lock:  # `close_all` looks at all of them meanwhile
            self._connections.add(connection)

    def _create_manager(self, proxy: str) -> urllib3.PoolManager:
        context = self._ssl_context()
        if not proxy:
            return urllib3.PoolManager(maxsize=16, ssl_context=context)
        if proxy.startswith("socks"):
            from urllib3.contrib.socks import SOCKSProxyManager

            return SOCKSProxyManager(proxy, maxsize=16, ssl_context=context)
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        parts = urlsplit(proxy)
        headers = urllib3.make_headers(proxy_basic_auth=find_login(proxy))
        address = f"{parts.scheme}://{parts.hostname}:{parts.port or 80}"
        return urllib3.ProxyManager(address, maxsize=16, proxy_headers=headers, ssl_context=context)

    def _ssl_context(self) -> ssl.SSLContext:
        """Trust the operating system's certificates, including a company proxy's, and those the environment names."""
        import truststore

        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT"):
            path = os.environ.get(name)
            if path and os.path.isfile(path):
                context.load_verify_locations(path)
        return context


def _register_connections(
    pool: type[HTTPConnectionPool], register: Callable[[HTTPConnection], None]
) -> type[HTTPConnectionPool]:
    """Return a class of pools that call `register` with each connection once it is open."""
    base: Any = pool.ConnectionCls

    class Connection(base):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            register(self)

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def find_login(url: str) -> str | None:
    """Return "user:password" of a URL, None if it has no user."""
    parts = urlsplit(url)
    return f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None


def _parse_response(response: urllib3.BaseHTTPResponse) -> HttpResponse:
    etag = response.headers.get("etag")
    if etag and etag.startswith("W/"):
        etag = None  # a weak tag does not identify the bytes
    length = response.headers.get("content-length")
    if response.status == 206:
        content_range = response.headers.get("content-range", "")  # "bytes 0-99/1234"
        span, _, size = content_range.removeprefix("bytes ").partition("/")
        start = span.partition("-")[0]
        if not start.isdigit():
            raise TransferError(f"the server sent an invalid Content-Range “{content_range}”", retryable=False)
        return HttpResponse(response, int(start), int(size) if size.isdigit() else None, etag)
    return HttpResponse(response, 0, int(length) if length and length.isdigit() else None, etag)


def _status_error(response: urllib3.BaseHTTPResponse, host: str) -> TransferError:
    status = response.status
    if status in (408, 425, 429) or status >= 500:
        problem = "is busy" if status in (429, 503) else "failed"
        retry_after = parse_retry_after(response.headers.get("retry-after", ""))
        return TransferError(
            f"{host} {problem} (HTTP {status})", retryable=True, retry_after=retry_after, status=status
        )
    problem = _FINAL_PROBLEMS.get(status, "refuses the request")
    return TransferError(f"{host} {problem} (HTTP {status})", retryable=False, status=status)


def with_retries(request: Callable[[], T]) -> T:
    """
    Return the result of `request`, tried up to three times if the server is busy or the connection breaks.

    An unreachable server raises at once: offline users should not wait.
    """
    for backoff in (0.5, 1.0):
        try:
            return request()
        except TransferError as error:
            wait = error.retry_after or backoff
            if not error.retryable or error.unreachable or wait > _MAX_RETRY_WAIT:
                raise
            time.sleep(wait)
    return request()


def parse_retry_after(header: str) -> float:
    """Return the seconds to wait by a Retry-After header (RFC 9110, 10.2.3), a number or a date; 0 if it is neither."""
    try:
        return float(urllib3.Retry().parse_retry_after(header))
    except (InvalidHeader, ValueError, OverflowError):  # the last two: impossible dates
        return 0.0


def _short_reason(reason: BaseException) -> str:
    """Return the innermost cause in few words: "Connection refused" rather than an object's repr."""
    text = str(reason)
    if known := next((cause for cause in _KNOWN_CAUSES if cause in text), None):
        return known
    if "IncompleteRead" in text:
        return "it ended early"
    return text.splitlines()[0][:120] if text else type(reason).__name__
