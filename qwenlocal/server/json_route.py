"""Routes whose requests are JSON, whatever their Content-Type says; curl and Ollama's clients often send none."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from qwenlocal.i18n import tr
from qwenlocal.server.http_errors import HttpError


class JsonRequest(Request):
    """A request whose body was parsed as JSON."""

    def __init__(self, request: Request, body: bytes, value: Any) -> None:
        others = [header for header in request.scope["headers"] if header[0] != b"content-type"]
        headers = [*others, (b"content-type", b"application/json")]
        super().__init__({**request.scope, "headers": headers}, request.receive)
        self._body, self._json = body, value


class JsonRoute(APIRoute):
    """A route that answers malformed JSON, invalid UTF-8 and nesting of more than 200 levels with 400."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def parse_and_handle(request: Request) -> Response:
            body = await request.body()
            return await handle(JsonRequest(request, body, _parse_json(body)) if body else request)

        return parse_and_handle


def _parse_json(body: bytes) -> Any:
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HttpError(
            400, tr("The request is not valid JSON: {reason}.", reason=error), code="invalid_json"
        ) from error
