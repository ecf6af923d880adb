"""Metrics of a server in the format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenlocal.chat.events import Done, Text
from qwenlocal.server.engine import EngineEvent

_FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80)  # seconds
_GAP_BUCKETS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1, 2)


class ServerMetrics:
    """Counters of requests and tokens, and distributions of times, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "qwenlocal_requests", "HTTP requests by route and status.", ["route", "status"], registry=registry
        )
        self._waiting = Gauge("qwenlocal_answers_waiting", "Answers without a first token.", registry=registry)
        self._running = Gauge("qwenlocal_answers_running", "Answers that are being generated.", registry=registry)
        self._prompt_tokens = Counter("qwenlocal_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached_tokens = Counter(
            "qwenlocal_cached_prompt_tokens", "Tokens of prompts that were in the KV cache.", registry=registry
        )
        self._answer_tokens = Counter("qwenlocal_answer_tokens", "Tokens of answers.", registry=registry)
        self._first_token = Histogram(
            "qwenlocal_time_to_first_token_seconds",
            "Time from the request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._gap = Histogram(
            "qwenlocal_time_between_tokens_seconds",
            "Time between two texts of a stream.",
            buckets=_GAP_BUCKETS,
            registry=registry,
        )

    def render(self) -> bytes:
        """Return the text for Prometheus."""
        return bytes(generate_latest(self._registry))

    def count_request(self, route: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(route, str(status)).inc()

    async def measure(self, events: AsyncGenerator[EngineEvent, None]) -> AsyncGenerator[EngineEvent, None]:
        """Pass on the events of an answer and count its tokens."""
        start, last = time.monotonic(), 0.0
        state = self._waiting
        state.inc()
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Text):
                        now = time.monotonic()
                        if last:
                            self._gap.observe(now - last)
                        else:
                            self._first_token.observe(now - start)
                            state.dec()
                            state = self._running
                            state.inc()
                        last = now
                    elif isinstance(event, Done):
                        self._prompt_tokens.inc(event.stats.prompt_tokens)
                        self._cached_tokens.inc(event.stats.reused_tokens)
                        self._answer_tokens.inc(event.stats.answer_tokens)
                    yield event
        finally:
            state.dec()


class RequestCounter:
    """ASGI middleware that counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Paths without a route are counted together, or each request of a scanner would add a label.
                self._metrics.count_request(getattr(scope.get("route"), "path", ""), message["status"])
            await send(message)

        await self._app(scope, receive, send_and_count)
