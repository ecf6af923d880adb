"""
Checks of every request before anything else reads it: host, origin, key, size. Each is ASGI middleware.

A web page can send requests to 127.0.0.1 from the browser of anyone who opens it. Two checks stop that: browsers name
the page's site in `Origin` and its relation to this server in `Sec-Fetch-Site` (https://www.w3.org/TR/fetch-metadata/),
and a page whose own name resolves to 127.0.0.1 (DNS rebinding) is recognized by its name in `Host`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from abc import ABC, abstractmethod
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenlocal.i18n import tr
from qwenlocal.server.http_errors import HttpError, respond_to_error

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
# No key is needed for /health, which load balancers request; the page, which asks for the key; and the description of
# the API, which is the same for every server of this version.
_OPEN_PATHS = frozenset({"/health", "/", "/docs", "/openapi.json"})
_OPEN_FOLDERS = ("/page/assets/", "/docs/")
_PAGE_FOLDER = "/page/"


class RequestCheck(ABC):
    """Base class: ASGI middleware that answers requests which `check` rejects by raising `HttpError`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    @abstractmethod
    def check(self, request: Request) -> None:
        """
        Check a request by its headers.

        Raises
        ------
        HttpError: it is rejected.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                self.check(request)
            except HttpError as error:
                response = await respond_to_error(request, error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class HostCheck(RequestCheck):
    """Rejects requests whose Host header names another computer."""

    def __init__(self, app: ASGIApp, bound: str, allowed: Sequence[str]) -> None:
        """
        Allow this machine's own names, the address `bound` and the names `allowed`.

        If the server listens on all addresses (0.0.0.0, ::), it is also reached by the machine's addresses in its
        networks. An IP address cannot be rebound, so all IP addresses are then allowed.
        """
        super().__init__(app)
        self._allowed = {name.lower().strip("[]") for name in (*_LOCAL_HOSTS, bound, *allowed)}
        self._allows_addresses = _is_wildcard(bound)

    def check(self, request: Request) -> None:
        values = request.headers.getlist("host")
        host = _host_name(values[0]) if len(values) == 1 else ""
        if host not in self._allowed and not (self._allows_addresses and _is_address(host)):
            raise HttpError(
                403,
                tr("Requests for the host “{name}” are not allowed.", name=host),
                code="host_not_allowed",
                hint=tr("To allow that name, on the server: --allow-host NAME"),
            )


def _host_name(value: str) -> str:
    """`_host_name("[::1]:8000")` is "::1"; "" if the value is not a host name."""
    try:
        return (urlsplit(f"//{value}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_wildcard(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified


class OriginCheck(RequestCheck):
    """Rejects requests that a page on another site sends."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        """Allow requests of pages from the origins `allowed` ("*" for all), besides those of this server."""
        super().__init__(app)
        self._allowed = frozenset(allowed)

    def check(self, request: Request) -> None:
        is_allowed = not self._allowed.isdisjoint(("*", request.headers.get("origin", "").lower()))
        if is_allowed or is_from_own_page(request):
            return
        raise HttpError(
            403,
            tr("Pages on other sites may not send requests to this server."),
            code="origin_not_allowed",
            hint=tr("To allow a site, on the server: --allow-origin https://SITE"),
        )


def is_from_own_page(request: Request) -> bool:
    """Return True if no page, a page of this server, or a person who follows a link sends the request."""
    headers = request.headers
    if origin := headers.get("origin"):
        return origin.lower().partition("://")[2] == headers.get("host", "").lower()
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return True
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return request.method == "GET" and is_link


class ApiKeyCheck(RequestCheck):
    """
    Rejects requests without one of the keys, in `Authorization: Bearer KEY` or in `x-api-key`.

    The page's own routes, which read and delete saved chats, need one of `page_keys` instead.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], page_keys: Sequence[str]) -> None:
        super().__init__(app)
        self._digests, self._page_digests = [_digest(key) for key in keys], [_digest(key) for key in page_keys]

    def check(self, request: Request) -> None:
        path = request.url.path
        if path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS):
            return
        digests = self._page_digests if path.startswith(_PAGE_FOLDER) else self._digests
        if not digests:
            return
        key = read_api_key(request.headers)
        # All keys are compared, in constant time, so that the time does not tell how much of a key was right.
        if not sum([hmac.compare_digest(_digest(key), digest) for digest in digests]):
            raise HttpError(
                401,
                tr("The API key is wrong.") if key else tr("An API key is missing."),
                code="invalid_api_key",
                hint=tr("Send it in the header “Authorization: Bearer KEY”."),
            )


def read_api_key(headers: Headers) -> str:
    """Return the key that a request carries; "" if there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def identify_client(request: Request) -> str:
    """Return a name for the client that sends a request: the digest of its key, or else its address."""
    key = read_api_key(request.headers)
    return _digest(key).hex()[:16] if key else (request.client.host if request.client else "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


class BodyLimit:
    """ASGI middleware that rejects bodies that are too large, whatever their Content-Length, or arrive too slowly."""

    def __init__(self, app: ASGIApp, limit: int, timeout: float) -> None:
        """Allow `limit` bytes, which must arrive within `timeout` seconds."""
        self._app, self._limit, self._timeout = app, limit, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._limit:
            request = Request(scope)
            response = await respond_to_error(request, self._too_large())
            await response(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        size, is_complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout

        async def receive_limited() -> Message:
            nonlocal size, is_complete
            if is_complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                raise HttpError(408, tr("The request did not arrive in time."), code="request_timeout") from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self._limit:
                raise self._too_large()
            return message

        return receive_limited

    def _too_large(self) -> HttpError:
        message = tr("The request is larger than {limit:,} bytes.", limit=self._limit)
        return HttpError(413, message, code="request_too_large")
