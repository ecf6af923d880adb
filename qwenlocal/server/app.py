"""The HTTP application of `qwenlocal serve`."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from qwenlocal import __version__
from qwenlocal.errors import QwenlocalError
from qwenlocal.server.answering import AnswerService
from qwenlocal.server.anthropic_api import AnthropicApi
from qwenlocal.server.docs_page import create_docs_router
from qwenlocal.server.engine import ModelHost
from qwenlocal.server.grammar_compiler import GrammarCompiler
from qwenlocal.server.http_errors import ErrorResponder, respond_to_error
from qwenlocal.server.ollama_api import OllamaApi
from qwenlocal.server.openai_api import OpenAiApi
from qwenlocal.server.page_api import create_page_router
from qwenlocal.server.responses_api import ResponsesApi
from qwenlocal.server.security import ApiKeyCheck, BodyLimit, HostCheck, OriginCheck
from qwenlocal.server.server_metrics import RequestCounter, ServerMetrics
from qwenlocal.server.server_settings import ServerSettings
from qwenlocal.server.token_api import TokenApi
from qwenlocal.server.utility_api import UtilityApi

_CLIENT_LEFT = 499  # nginx's status for a client that has left; only metrics see it


def create_app(host: ModelHost, settings: ServerSettings) -> FastAPI:
    """Create the application that answers with the models of `host`."""
    app = FastAPI(title="qwenlocal", version=__version__, docs_url=None, redoc_url=None)
    metrics = ServerMetrics()
    service = AnswerService(host, metrics, GrammarCompiler(settings.grammar_timeout))
    for api in (OpenAiApi, ResponsesApi, AnthropicApi, OllamaApi, TokenApi):
        app.include_router(api(service, keep_alive=settings.keep_alive).router())
    app.include_router(UtilityApi(service, metrics).router())
    app.include_router(create_docs_router())
    app.include_router(create_page_router(service, settings.folders, keep_alive=settings.keep_alive))
    _handle_errors(app)
    _add_checks(app, settings)
    app.add_middleware(ErrorResponder)
    app.add_middleware(RequestCounter, metrics=metrics)
    app.add_middleware(HeadRouter)
    return app


class HeadRouter:
    """
    ASGI middleware that routes HEAD, which load balancers and Ollama's clients send, as GET.

    FastAPI's routes for GET refuse it. Uvicorn, which still knows the method, sends the response without its body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


def _handle_errors(app: FastAPI) -> None:
    for error in (QwenlocalError, RequestValidationError, HTTPException):
        app.add_exception_handler(error, respond_to_error)
    app.add_exception_handler(ClientDisconnect, _respond_to_disconnect)


async def _respond_to_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


def _add_checks(app: FastAPI, settings: ServerSettings) -> None:
    """Add the checks; the one that is added last runs first."""
    app.add_middleware(BodyLimit, limit=settings.max_body, timeout=settings.body_timeout)
    if settings.api_keys or settings.page_key:
        page_keys = (settings.page_key,) if settings.page_key else settings.api_keys
        app.add_middleware(ApiKeyCheck, keys=settings.api_keys, page_keys=page_keys)
    if settings.cors_origins:
        # Before the keys, because browsers ask for permission (OPTIONS) without one.
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(OriginCheck, allowed=settings.cors_origins)
    app.add_middleware(HostCheck, bound=settings.host, allowed=settings.allowed_hosts)
