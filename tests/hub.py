"""
A server on the loopback interface that speaks like the Hugging Face hub, ModelScope and a package index, and misbehaves
on purpose when it is told to.
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


@dataclass
class Answer:
    """What the server is about to send; a fault changes it."""

    path: str
    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None  # close the connection after so many bytes
    stall: int | None = None  # send nothing more after so many bytes
    pace: float = 0.0  # bytes a second
    start: int = 0  # where in the file the body begins


Fault = Callable[[Answer], None]


@dataclass
class Repository:
    """Files of a repository on both hubs."""

    files: dict[str, bytes] = field(default_factory=dict)
    licence: str = "apache-2.0"
    gated: bool = False


def _sibling(name: str, content: bytes) -> dict[str, object]:
    """Small text files are kept in git itself, which has a digest of its own; all others in LFS."""
    found = {
        "rfilename": name,
        "size": len(content),
        "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }
    if name.endswith((".json", ".md", ".txt", ".jinja")):
        return found
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {**found, "lfs": lfs}


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class HubServer:
    """`with HubServer() as hub: hub.repository("o/r").files["x.gguf"] = b"…"`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, bytes] = {}  # plain files: path: content
        self.wheels: dict[str, bytes] = {}  # file name: content
        self.faults: list[Fault] = []  # each is used up by one answer that carries file bytes
        self.always: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[tuple[int, int]] = []
        self.sent = 0
        self.html_index = False
        self._lock = threading.Lock()
        self._server = _Quiet(("127.0.0.1", 0), self._handler())
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

    def answer(self, target: str, asked_range: str | None) -> Answer:
        path, query = unquote(urlsplit(target).path), parse_qs(urlsplit(target).query)
        with self._lock:
            self.requests.append(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            return self._model_info(path, found[1], found[2])
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            return self._scope_list(path, found[1])
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            return self._file(path, self._content(found[1], query["FilePath"][0]), asked_range)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(path, self._content(found[1], found[3]), asked_range)
        if found := re.fullmatch(r"/simple/([^/]+)/", path):
            return self._index(path, found[1])
        if found := re.fullmatch(r"/wheels/(.+)", path):
            return self._file(path, self.wheels.get(found[1]), asked_range)
        return self._file(path, self.files.get(path), asked_range)

    def _content(self, repo: str, file: str) -> bytes | None:
        repository = self.repositories.get(repo)
        return repository.files.get(file) if repository else None

    def _model_info(self, path: str, repo: str, revision: str | None) -> Answer:
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
            "cardData": {"license": repository.licence},
        }
        return _json(path, data)

    def _scope_list(self, path: str, repo: str) -> Answer:
        repository = self.repositories.get(repo)
        if repository is None:
            return _plain(path, 404, "not found")
        files = [
            {"Path": name, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest(), "Type": "blob"}
            for name, content in repository.files.items()
        ]
        return _json(path, {"Code": 200, "Data": {"Files": files}})

    def _index(self, path: str, project: str) -> Answer:
        begin = project.replace("-", "_")
        found = {name: content for name, content in self.wheels.items() if name.startswith(begin + "-")}
        if not found:
            return _plain(path, 404, "no such project")
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
        if self.html_index:
            links = "".join(f'<a href="../../wheels/{name}#sha256={digests[name]}">{name}</a>' for name in found)
            return Answer(path, 200, {"Content-Type": "text/html"}, f"<html><body>{links}</body></html>".encode())
        files = [{"filename": n, "url": f"../../wheels/{n}", "hashes": {"sha256": digests[n]}} for n in found]
        return _json(path, {"meta": {"api-version": "1.0"}, "name": project, "files": files})

    def _file(self, path: str, content: bytes | None, asked_range: str | None) -> Answer:
        if content is None:
            return _plain(path, 404, "not here")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked_range or "")
        if not found:
            answer = Answer(path, 200, headers, content)
        else:
            start, end = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            answer = Answer(path, 206, headers, content[start : end + 1], start=start)
        if len(answer.body) > 1:  # a probe for the size is not worth a fault
            with self._lock:
                self.ranges.append((answer.start, answer.start + len(answer.body)))
                faults = [*self.always, *([self.faults.pop(0)] if self.faults else [])]
            for fault in faults:
                fault(answer)
        return answer

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are sent apart: TCP would wait 40 ms between them

            def do_GET(self) -> None:
                answer = hub.answer(self.path, self.headers.get("Range"))
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self._send(answer)

            do_HEAD = do_GET

            def _send(self, answer: Answer) -> None:
                body = answer.body if self.command == "GET" else b""
                end = min(n for n in (answer.cut, answer.stall, len(body)) if n is not None)
                at, step = 0, max(1, int(answer.pace * 0.02)) if answer.pace else 1 << 20
                try:
                    while at < end:
                        part = body[at : min(end, at + step)]
                        if answer.pace:
                            time.sleep(len(part) / answer.pace)
                        self.wfile.write(part)
                        at += len(part)
                        hub.sent += len(part)
                    if answer.stall is not None:
                        self.wfile.flush()
                        time.sleep(3)
                except OSError:
                    pass
                if end < len(body):
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        return Handler


def _plain(path: str, status: int, text: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer(path, status, {"Content-Type": "text/plain", **(headers or {})}, text.encode())


def _json(path: str, data: object) -> Answer:
    return Answer(path, 200, {"Content-Type": "application/json"}, json.dumps(data).encode())


# --- faults


def cut(after: int) -> Fault:
    """The connection breaks after so many bytes."""

    def fault(answer: Answer) -> None:
        answer.cut = min(after, len(answer.body) - 1)

    return fault


def stall(after: int) -> Fault:
    """Nothing more comes after so many bytes."""

    def fault(answer: Answer) -> None:
        answer.stall = min(after, len(answer.body) - 1)

    return fault


def refuse(status: int, retry_after: str = "") -> Fault:
    """An error instead of bytes."""

    def fault(answer: Answer) -> None:
        answer.status, answer.body = status, b"no"
        answer.headers = {"Retry-After": retry_after} if retry_after else {}

    return fault


def lie(answer: Answer) -> None:
    """The right number of bytes, but not the right ones."""
    answer.body = bytes(byte ^ 0xFF for byte in answer.body[:100]) + answer.body[100:]


def pace(bytes_a_second: float) -> Fault:
    """Slowly."""

    def fault(answer: Answer) -> None:
        answer.pace = bytes_a_second

    return fault


def only_on(part: str, fault: Fault) -> Fault:
    """The fault, on answers whose path holds `part`."""

    def chosen(answer: Answer) -> None:
        if part in answer.path:
            fault(answer)

    return chosen


def whole_file(content: bytes) -> Fault:
    """Ranges are ignored: the whole file comes, with status 200."""

    def fault(answer: Answer) -> None:
        answer.status, answer.body = 200, content
        answer.headers.pop("Content-Range", None)

    return fault
