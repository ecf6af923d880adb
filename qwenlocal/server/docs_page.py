"""The page /docs: a list of all operations, without resources from other hosts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from qwenlocal.server.page_assets import PAGE_HEADERS

_FOLDER = Path(__file__).parent / "pages"


def create_docs_router() -> APIRouter:
    """Return the routes of the page and its two files."""
    router = APIRouter(include_in_schema=False)
    for path, name in (("/docs", "docs.html"), ("/docs/docs.css", "docs.css"), ("/docs/docs.js", "docs.js")):
        router.add_api_route(path, _file_sender(name), methods=["GET"])
    return router


def _file_sender(name: str) -> Callable[[], Awaitable[Response]]:
    async def send_file() -> Response:
        return FileResponse(_FOLDER / name, headers=PAGE_HEADERS)

    return send_file
