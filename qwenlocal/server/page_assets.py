"""The files of the page, and the headers that keep it from loading or running anything else."""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from qwenlocal.i18n import tr
from qwenlocal.server.http_errors import HttpError

_FOLDER = Path(__file__).parent / "page"
# Only DOMPurify may turn text into HTML (https://www.w3.org/TR/trusted-types/), and no script or style is inline.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types dompurify"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".svg": "image/svg+xml"}  # Windows may have others


class PageAssets:
    """The files in `server/page`, read once; a request names one of them, never a path."""

    def __init__(self) -> None:
        paths = (path for path in sorted(_FOLDER.rglob("*")) if path.is_file())
        self._files = {path.relative_to(_FOLDER).as_posix(): path.read_bytes() for path in paths}

    def respond(self, request: Request, name: str) -> Response:
        """
        Return a file, or 304 if the browser has it.

        Raises
        ------
        HttpError: there is no such file.
        """
        data = self._files.get(name)
        if data is None:
            raise HttpError(404, tr("The page has no file “{name}”.", name=name), code="file_not_found")
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {**PAGE_HEADERS, "ETag": tag, "Cache-Control": "no-cache"}  # revalidate each time
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=_media_type(name))


def _media_type(name: str) -> str:
    return _TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "text/plain"
