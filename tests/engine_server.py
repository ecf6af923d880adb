"""
A loopback server that speaks the OpenAI API as vLLM and llama-server do, with faults on demand.
"""

from __future__ import annotations

import gzip
import json
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

ANSWER = ("Paris", ", ", "fun")
USAGE = {"prompt_tokens": 21, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}


@dataclass
class Reply:
    """
    A response: the events of an answer, `raw` bytes in place of them, or an error with its `status` and `body`.

    The connection breaks after the events if it is `cut`. `pause` is in seconds between two events, `wait` before the
    head.
    """

    texts: Iterable[str] = ANSWER
    finish_reason: str | None = "stop"
    usage: Mapping[str, Any] | None = None
    events: Sequence[str] = ()  # before the texts
    raw: bytes | None = None
    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    line_end: str = "\n"
    cut: bool = False
    pause: float = 0.0
    wait: float = 0.0
    is_compressed: bool = False
    hangs_up: bool = False  # without a response

    def data(self) -> Iterator[bytes]:
        """Yield the parts of the body."""
        if self.raw is not None:
            yield self.raw
            return
        if self.status != 200:
            yield self.body.encode()
            return
        for event in self.events:
            yield self._event(event)
        for text in self.texts:
            yield self._event(chunk(delta={"content": text}))
        if self.cut:
            return
        yield self._event(chunk(delta={}, finish_reason=self.finish_reason))
        if self.usage:
            yield self._event(json.dumps({"choices": [], "usage": self.usage}))
        yield self._event("[DONE]")

    def _event(self, data: str) -> bytes:
        return f"data: {data}{self.line_end * 2}".encode()


def chunk(**choice: Any) -> str:
    """Return the JSON of a chunk with one choice."""
    return json.dumps({"object": "chat.completion.chunk", "choices": [{"index": 0, **choice}]})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up."""


class EngineServer:
    """
    `with EngineServer() as engine: engine.replies.append(Reply(status=401))`; without replies it gives `ANSWER`.

    `requests` are the bodies of requests for answers, `keys` their Authorization headers. `hung_up` is set once a
    client closes a connection before its end.
    """

    def __init__(self) -> None:
        self.models: list[str] | None = ["tiny-chat", "large-chat"]  # None: /models does not exist
        self.replies: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hung_up = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}/v1"

    def __enter__(self) -> EngineServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def questions(self) -> list[str]:
        """The last message of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                engine.keys.append(self.headers.get("Authorization"))
                if self.path != "/v1/models" or engine.models is None:
                    self._send(Reply(status=404, body='{"detail":"Not Found"}'))
                    return
                models = [{"id": name, "object": "model"} for name in engine.models]
                self._send(Reply(raw=json.dumps({"object": "list", "data": models}).encode()))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path != "/v1/chat/completions":
                    self._send(Reply(status=404, body='{"detail":"Not Found"}'))
                    return
                engine.requests.append(json.loads(body))
                engine.keys.append(self.headers.get("Authorization"))
                self._send(engine.replies.pop(0) if engine.replies else Reply(usage=USAGE))

            def _send(self, reply: Reply) -> None:
                if reply.hangs_up:
                    self.close_connection = True
                    return
                try:
                    self._wait(reply.wait)
                    self._send_head(reply)
                    for part in self._parts(reply):
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                        self._wait(reply.pause)
                    if not reply.cut:
                        self.wfile.write(b"0\r\n\r\n")
                    else:
                        self.close_connection = True
                except OSError:
                    engine.hung_up.set()
                    self.close_connection = True

            def _send_head(self, reply: Reply) -> None:
                self.send_response(reply.status)
                headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", **reply.headers}
                if reply.is_compressed:
                    headers["Content-Encoding"] = "gzip"
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def _parts(self, reply: Reply) -> Iterator[bytes]:
                if reply.is_compressed:
                    data = gzip.compress(b"".join(reply.data()))
                    return iter([data[:20], data[20:40], data[40:]])
                return (part for part in reply.data() if part)

            def _wait(self, seconds: float) -> None:
                """Sleep, but notice at once if the client hangs up."""
                end = time.monotonic() + seconds
                while (left := end - time.monotonic()) > 0:
                    readable, _, _ = select.select([self.connection], [], [], left)
                    if readable and not self.connection.recv(1, socket.MSG_PEEK):
                        raise ConnectionResetError

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        return Handler
