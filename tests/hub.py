"""
A loopback server that implements the Hugging Face Hub, ModelScope and a package index, with faults on demand.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_DOMAIN": "http://127.0.0.1:9"}  # variables; nobody answers


@dataclass
class Response:
    """A response about to be sent; faults modify it."""

    path: str
    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None  # close the connection after this many bytes
    stall: int | None = None  # send nothing more after this many bytes
    pace: float = 0.0  # bytes per second
    start: int = 0  # offset of the body in the file


Fault = Callable[[Response], None]


@dataclass
class Repository:
    """The files of a repository, served by both hubs."""

    files: dict[str, bytes] = field(default_factory=dict)
    license: str = "apache-2.0"
    gated: bool = False


def _sibling(name: str, content: bytes) -> dict[str, object]:
    """Describe a file as the Hugging Face Hub does: small text files have a git hash only, others are in LFS."""
    entry = {
        "rfilename": name,
        "size": len(content),
        "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }
    if name.endswith((".json", ".md", ".txt", ".jinja")):
        return entry
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {**entry, "lfs": lfs}


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up."""


class HubServer:
    """`with HubServer() as hub: hub.repository("o/r").files["x.gguf"] = b"…"`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, bytes] = {}  # plain files, by path
        self.wheels: dict[str, bytes] = {}  # by file name
        self.faults: list[Fault] = []  # each applies to one response with file content
        self.always: list[Fault] = []
        self.requests: list[str] = []
        self.authorizations: list[str | None] = []  # the header of each request
        self.ranges: list[tuple[int, int]] = []
        self.sent = 0
        self.html_index = False
        self._lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def add_wheel(self, project: str, version: str, members: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        self.wheels[f"{project.replace('-', '_')}-{version}-py3-none-any.whl"] = buffer.getvalue()

    # --- answering

    def respond(self, target: str, range_header: str | None) -> Response:
        path, query = unquote(urlsplit(target).path), parse_qs(urlsplit(target).query)
        with self._lock:
            self.requests.append(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            return self._model_info(path, match[1], match[2])
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            return self._modelscope_list(path, match[1])
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            return self._file(path, self._content(match[1], query["FilePath"][0]), range_header)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(path, self._content(match[1], match[3]), range_header)
        if match := re.fullmatch(r"/simple/([^/]+)/", path):
            return self._index(path, match[1])
        if match := re.fullmatch(r"/wheels/(.+)", path):
            return self._file(path, self.wheels.get(match[1]), range_header)
        return self._file(path, self.files.get(path), range_header)

    def _content(self, repo: str, file: str) -> bytes | None:
        repository = self.repositories.get(repo)
        return repository.files.get(file) if repository else None

    def _model_info(self, path: str, repo: str, revision: str | None) -> Response:
        repository = self.repositories.get(repo)
        if repository is None:
            return _plain(path, 404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", COMMIT):
            return _plain(path, 404, "Revision not found", {"X-Error-Code": "RevisionNotFound"})
        if repository.gated:
            return _plain(path, 403, "Access is restricted", {"X-Error-Code": "GatedRepo"})
        siblings = [_sibling(name, content) for name, content in repository.files.items()]
        data = {
            "_id": "1",
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
            "cardData": {"license": repository.license},
        }
        return _json(path, data)

    def _modelscope_list(self, path: str, repo: str) -> Response:
        repository = self.repositories.get(repo)
        if repository is None:
            return _plain(path, 404, "not found")
        files = [
            {"Path": name, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest(), "Type": "blob"}
            for name, content in repository.files.items()
        ]
        return _json(path, {"Code": 200, "Data": {"Files": files}})

    def _index(self, path: str, project: str) -> Response:
        prefix = project.replace("-", "_")
        wheels = {name: content for name, content in self.wheels.items() if name.startswith(prefix + "-")}
        if not wheels:
            return _plain(path, 404, "no such project")
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in wheels.items()}
        if self.html_index:
            links = "".join(f'<a href="../../wheels/{name}#sha256={digests[name]}">{name}</a>' for name in wheels)
            return Response(path, 200, {"Content-Type": "text/html"}, f"<html><body>{links}</body></html>".encode())
        files = [{"filename": n, "url": f"../../wheels/{n}", "hashes": {"sha256": digests[n]}} for n in wheels]
        return _json(path, {"meta": {"api-version": "1.0"}, "name": project, "files": files})

    def _file(self, path: str, content: bytes | None, range_header: str | None) -> Response:
        if content is None:
            return _plain(path, 404, "not found")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", range_header or "")
        if not match:
            response = Response(path, 200, headers, content)
        else:
            start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            response = Response(path, 206, headers, content[start : end + 1], start=start)
        if len(response.body) > 1:  # requests for the size alone have no faults
            with self._lock:
                self.ranges.append((response.start, response.start + len(response.body)))
                faults = [*self.always, *([self.faults.pop(0)] if self.faults else [])]
            for fault in faults:
                fault(response)
        return response

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are sent apart: TCP would wait 40 ms between them

            def do_GET(self) -> None:
                hub.authorizations.append(self.headers.get("Authorization"))
                response = hub.respond(self.path, self.headers.get("Range"))
                self.send_response(response.status)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(response.body)))
                self.end_headers()
                self._send(response)

            do_HEAD = do_GET

            def _send(self, response: Response) -> None:
                body = response.body if self.command == "GET" else b""
                end = min(n for n in (response.cut, response.stall, len(body)) if n is not None)
                offset, step = 0, max(1, int(response.pace * 0.02)) if response.pace else 1 << 20
                try:
                    while offset < end:
                        part = body[offset : min(end, offset + step)]
                        if response.pace:
                            time.sleep(len(part) / response.pace)
                        self.wfile.write(part)
                        offset += len(part)
                        hub.sent += len(part)
                    if response.stall is not None:
                        self.wfile.flush()
                        time.sleep(3)
                except OSError:
                    pass
                if end < len(body):
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        return Handler


def _plain(path: str, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return Response(path, status, {"Content-Type": "text/plain", **(headers or {})}, text.encode())


def _json(path: str, data: object) -> Response:
    return Response(path, 200, {"Content-Type": "application/json"}, json.dumps(data).encode())


# --- faults


def cut(after: int) -> Fault:
    """Break the connection after this many bytes."""

    def fault(response: Response) -> None:
        response.cut = min(after, len(response.body) - 1)

    return fault


def stall(after: int) -> Fault:
    """Send nothing more after this many bytes."""

    def fault(response: Response) -> None:
        response.stall = min(after, len(response.body) - 1)

    return fault


def refuse(status: int, retry_after: str = "") -> Fault:
    """Send an error status instead of the file."""

    def fault(response: Response) -> None:
        response.status, response.body = status, b"no"
        response.headers = {"Retry-After": retry_after} if retry_after else {}

    return fault


def corrupt_bytes(response: Response) -> None:
    """Send the right number of bytes, but wrong ones."""
    response.body = bytes(byte ^ 0xFF for byte in response.body[:100]) + response.body[100:]


def pace(bytes_per_second: float) -> Fault:
    """Send slowly."""

    def fault(response: Response) -> None:
        response.pace = bytes_per_second

    return fault


def only_on(part: str, fault: Fault) -> Fault:
    """Apply the fault only to responses whose path contains `part`."""

    def filtered(response: Response) -> None:
        if part in response.path:
            fault(response)

    return filtered


def whole_file(content: bytes) -> Fault:
    """Ignore ranges: send the whole file, with status 200."""

    def fault(response: Response) -> None:
        response.status, response.body = 200, content
        response.headers.pop("Content-Range", None)

    return fault
