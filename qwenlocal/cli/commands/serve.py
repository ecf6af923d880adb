"""`qwenlocal serve`: answer other programs over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import os
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.context import AppContext
from qwenlocal.engine.gpu_offload import GpuRequest
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.errors import ModelNotFound, NotWritable, OutOfRange, QwenlocalError, UsageError
from qwenlocal.hints import describe_error
from qwenlocal.i18n import tr
from qwenlocal.library.adapters import AdapterRequest
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.library.running_servers import announce_server
from qwenlocal.paths import ensure_writable, parse_path
from qwenlocal.server.listener import is_loopback, open_socket
from qwenlocal.server.model_host import HostSettings, ProcessHost
from qwenlocal.server.served_models import ServedModels
from qwenlocal.server.server_settings import ServerSettings
from qwenlocal.server.wire import Ready
from qwenlocal.terminal.load_notes import describe_note, describe_plan
from qwenlocal.terminal.progress import StatusLine
from qwenlocal.text_encoding import read_text

if TYPE_CHECKING:
    from fastapi import FastAPI

    from qwenlocal.server.engine import ModelHost

_PAGE_KEY = re.compile(r"[\w-]{20,}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")
_HOST = re.compile(r"([a-z]+://)?((?P<name>[a-z0-9._-]+)|\[(?P<address>[0-9a-f:.]+)\])(:[0-9]+)?/?")
_DEFAULT_PORTS = (("http://", ":80"), ("https://", ":443"))
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_PARALLEL = 64
_DEFAULT_PARALLEL = 4


@dataclass(frozen=True)
class ServeOptions:
    """The options of `qwenlocal serve`, as they were given."""

    models: Sequence[str]
    host: str
    port: int
    parallel: str
    max_waiting: int
    keep_alive: str
    api_keys: Sequence[str]
    api_key_file: str | None
    allowed_hosts: Sequence[str]
    cors_origins: Sequence[str]
    certificate: str | None
    key: str | None
    opens_page: bool
    load_request: LoadRequest
    gpu: GpuRequest
    lookup: bool
    keep_cache: bool
    adapters: Sequence[AdapterRequest] = ()


def serve_models(options: ServeOptions, app: AppContext) -> None:
    """
    Serve models until Ctrl-C or SIGTERM.

    Raises
    ------
    UsageError: an option is invalid, the port is in use, or another address than 127.0.0.1 has no key.
    Everything that providing and loading the first model raises.
    """
    folders = app.library.folders
    settings = replace(_server_settings(options), folders=folders, page_key=read_page_key(folders.page_key))
    host_settings = HostSettings(
        LoadOptions(
            options.load_request,
            options.gpu,
            lookup=options.lookup,
            prompt_caches=app.library.folders.states if options.keep_cache else None,
        ),
        parse_parallel(options.parallel),
        options.max_waiting,
        parse_duration(options.keep_alive),
    )
    certificate, key = _tls_files(options)
    listener = open_socket(options.host, options.port)
    models = _provide_models(options.models, app)
    adapters = app.library.adapters.ensure_adapters(options.adapters, models[0].record)
    load_options = replace(host_settings.options, adapters=adapters)
    host_settings = replace(host_settings, options=load_options, adapted_model=str(models[0].name))
    address = _address(options.host, listener.getsockname()[1], is_secure=certificate is not None)
    screen = _ServerScreen(app, address)
    host = ProcessHost(
        ServedModels(app.library, models),
        host_settings,
        on_progress=screen.show_progress,
        on_loaded=screen.show_loaded,
        on_failed=screen.show_failure,
    )

    announcement = contextlib.ExitStack()
    local_key = settings.api_keys[-1] if settings.api_keys else ""

    async def start() -> None:
        async with host.open("") as engine:
            if not is_loopback(options.host):
                screen.warn_of_access(is_secure=certificate is not None)
            path, n_ctx = models[0].record.path, engine.info.n_ctx
            if certificate is None and not adapters:  # `run` trusts no certificate, and would get other answers
                local = _local_address(address)
                announcement.enter_context(announce_server(folders.servers, local, path, n_ctx, local_key))
            page = f"{_local_address(address)}/#key={settings.page_key}"
            app.say(tr("Web page: {url}", url=page))
            if options.opens_page:
                await asyncio.to_thread(_open_browser, page)

    async def run() -> None:
        with announcement:
            starting = asyncio.ensure_future(start())
            try:
                application = await asyncio.to_thread(_create_application, host, settings)
                from qwenlocal.server.http_server import serve_http

                await serve_http(
                    application,
                    listener,
                    certificate=certificate,
                    key=key,
                    starting=starting,
                    end_answers=host.close,
                )
            finally:
                await host.close()

    asyncio.run(run())


def _create_application(host: ModelHost, settings: ServerSettings) -> FastAPI:
    """Import FastAPI and create the application, in a thread: the model's process starts at the same time."""
    import qwenlocal.server.http_server  # noqa: F401 - it takes long, too
    from qwenlocal.server.app import create_app

    return create_app(host, settings)


def parse_parallel(text: str) -> int:
    """
    Parse `--parallel`: a number of requests, or auto.

    Raises
    ------
    UsageError: it is neither.
    """
    if text == "auto":
        return _DEFAULT_PARALLEL
    if not text.isdecimal():
        raise UsageError(tr("--parallel must be a number or auto, not {text}.", text=text))
    if not 1 <= int(text) <= _MAX_PARALLEL:
        raise OutOfRange("--parallel", 1, _MAX_PARALLEL, int(text))
    return int(text)


def parse_duration(text: str) -> float:
    """
    Parse a time: `parse_duration("5m")` is 300 seconds; infinity for "forever".

    Raises
    ------
    UsageError: it is not a number with s, m or h.
    """
    word = text.strip().lower()
    if word in ("forever", "-1"):
        return math.inf
    number, unit = (word[:-1], word[-1:]) if word[-1:] in _UNITS else (word, "")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise UsageError(tr("“{text}” is not a duration.", text=text), hint=tr("For example: 30s, 5m, 1h or forever"))
    return seconds


def parse_origin(text: str) -> str:
    """
    Parse `--allow-origin` as browsers spell it: `parse_origin("HTTPS://Example.org:443/")` is "https://example.org".

    Raises
    ------
    UsageError: no page can have this origin.
    """
    origin = text.strip().lower().removesuffix("/")
    for scheme, port in _DEFAULT_PORTS:
        if origin.startswith(scheme):
            origin = origin.removesuffix(port)
    if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
        raise UsageError(
            tr("“{text}” is not the origin of a web page.", text=text),
            hint=tr("For example: https://example.org, http://localhost:3000, or * for all pages"),
        )
    return origin


def parse_host(text: str) -> str:
    """
    Parse `--allow-host` as the Host header names it without its port: `parse_host("Box.local:8000")` is "box.local".

    Raises
    ------
    UsageError: no computer can have this name.
    """
    name = text.strip().lower()
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name.strip("[]")))
    match = _HOST.fullmatch(name)
    if match is None:
        raise UsageError(tr("“{text}” is not the name of a computer.", text=text), hint=tr("For example: box.local"))
    return (match["name"] or match["address"]).removesuffix(".")


def read_api_keys(path: Path) -> list[str]:
    """
    Read API keys from a file, one per line; empty lines and lines that begin with # are ignored.

    Raises
    ------
    UsageError: a key contains a space, or there is none. ModelNotFound: the file cannot be read.
    """
    hint = tr("Write one key per line. Lines that begin with # are comments.")
    keys = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key.split()) > 1:
            message = tr("The key in line {number} of {path} contains a space.", number=number, path=path)
            raise UsageError(message, hint=hint)
        keys.append(key)
    if not keys:
        raise UsageError(tr("{path} contains no key.", path=path), hint=hint)
    return keys


def _server_settings(options: ServeOptions) -> ServerSettings:
    if not 0 <= options.port <= 65535:
        raise OutOfRange("--port", 0, 65535, options.port)
    if not options.host:
        raise UsageError(
            tr("--host must not be empty."),
            hint=tr("For this machine only: --host 127.0.0.1. For other machines as well: --host 0.0.0.0"),
        )
    origins = tuple(map(parse_origin, options.cors_origins))
    keys = list(options.api_keys)
    if not all(keys):
        raise UsageError(tr("--api-key must not be empty."))
    if options.api_key_file:
        keys += read_api_keys(parse_path(options.api_key_file))
    keys += [key] if (key := os.environ.get("QWENLOCAL_API_KEY")) else []
    if not keys and not is_loopback(options.host):
        raise UsageError(
            tr("{host} can be reached from other machines, so the server needs a key.", host=options.host),
            hint=tr("Choose one: --api-key-file FILE, or QWENLOCAL_API_KEY in the environment."),
        )
    if keys:
        keys.append(secrets.token_urlsafe(32))  # for `qwenlocal run`, which finds it in a file of this user
    return ServerSettings(options.host, tuple(keys), tuple(map(parse_host, options.allowed_hosts)), origins)


def read_page_key(path: Path) -> str:
    """Return the key of the web page from its file; create it, readable by this user only, at the first start."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if _PAGE_KEY.fullmatch(key := path.read_text("utf-8").strip()):
            return key
    key = secrets.token_urlsafe(24)
    with contextlib.suppress(OSError, NotWritable):  # the next start has another key then
        ensure_writable(path.parent)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key + "\n")
    return key


def _tls_files(options: ServeOptions) -> tuple[Path | None, Path | None]:
    if (options.certificate is None) != (options.key is None):
        raise UsageError(tr("--tls-cert and --tls-key must be used together."))
    if options.certificate is None or options.key is None:
        return None, None
    certificate, key = parse_path(options.certificate), parse_path(options.key)
    for path in (certificate, key):
        if not path.is_file():
            raise ModelNotFound.unreadable(path)
    return certificate, key


def _provide_models(names: Sequence[str], app: AppContext) -> list[ProvidedModel]:
    """Return the models to serve, downloaded if necessary; the default model if none is named."""
    return [app.library.models.ensure_models(name, None)[0] for name in names or (None,)]


def _address(host: str, port: int, *, is_secure: bool) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if is_secure else 'http'}://{name}:{port}"


def _local_address(address: str) -> str:
    """Return the address for programs on this machine: a server on all addresses is also on 127.0.0.1."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _open_browser(url: str) -> None:
    import webbrowser

    webbrowser.open(url)


class _ServerScreen:
    """The lines on the terminal: the address, and each model when it is loaded or cannot be loaded."""

    def __init__(self, app: AppContext, address: str) -> None:
        self._app, self._address, self._is_serving = app, address, False
        self._line = StatusLine(sys.stderr)

    def show_progress(self, name: str, fraction: float) -> None:
        """Show how much of a model is loaded."""
        self._line.show(tr("{address}: loading {name}: {done:.0%}", address=self._address, name=name, done=fraction))

    def show_loaded(self, name: str, ready: Ready) -> None:
        """Say that a model is loaded, and how."""
        self._is_serving = True
        self._line.clear()
        plan = describe_plan(ready.plan)
        self._app.say(tr("{address} serves {name}: {plan}", address=self._address, name=name, plan=plan))
        for note in ready.notes:
            self._app.say(describe_note(note))

    def show_failure(self, name: str, error: BaseException) -> None:
        """Say why a model cannot be loaded, unless it is the first one, whose error ends the server."""
        self._line.clear()
        if self._is_serving:
            reason = describe_error(error) if isinstance(error, QwenlocalError) else str(error)
            self._app.say(tr("Cannot load {name}: {reason}", name=name, reason=reason))

    def warn_of_access(self, *, is_secure: bool) -> None:
        """Say who can use a server that other machines can reach."""
        self._app.say(tr("Anyone who can reach {address} and has a key can use the models.", address=self._address))
        if not is_secure:
            self._app.say(
                tr("Keys and texts cross the network unencrypted. To encrypt them: --tls-cert FILE --tls-key FILE")
            )
