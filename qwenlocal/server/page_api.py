"""The page at / and the routes that it uses, under /page: chats of the journal, answers, files, settings."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.requests import Request

from qwenlocal import __version__
from qwenlocal.chat.chat_template import MAX_CHARACTERS
from qwenlocal.chat.context_window import select_messages
from qwenlocal.chat.documents import ANSWER_SHARE, Document, read_document
from qwenlocal.chat.export import FORMATS
from qwenlocal.chat.prompt_files import read_prompt_files
from qwenlocal.chat.thread import Thread
from qwenlocal.errors import InvalidChoice, UsageError
from qwenlocal.i18n import tr
from qwenlocal.paths import Folders, bundled_folder
from qwenlocal.server.answering import AnswerService
from qwenlocal.server.engine import ChatPrompt
from qwenlocal.server.http_errors import BadField, HttpError
from qwenlocal.server.json_route import JsonRoute
from qwenlocal.server.page_answers import PageAnswers, PageQuestion
from qwenlocal.server.page_assets import PAGE_HEADERS, PageAssets
from qwenlocal.server.page_chats import PageChats
from qwenlocal.server.page_texts import translate_page
from qwenlocal.server.request_fields import SamplingFields
from qwenlocal.server.security import identify_client, is_from_own_page
from qwenlocal.server.streaming import format_event, stream_while_connected

_EXPORT_TYPES = {"md": "text/markdown", "json": "application/json", "html": "text/html"}
_MAX_NAME = 200  # characters of a file's name


class FileText(BaseModel):
    """A file whose text `POST /page/files` has returned."""

    name: str = Field(min_length=1, max_length=_MAX_NAME)
    text: str


class QuestionRequest(BaseModel):
    """`POST /page/answers`; see `PageQuestion`. Without `chat`, it starts a new one with the system prompt `system`."""

    key: str = Field(min_length=8, max_length=64)
    kind: Literal["ask", "edit", "retry", "continue"] = "ask"
    chat: int | None = Field(None, ge=1, lt=2**31)
    message: int | None = Field(None, ge=1, lt=2**31)
    text: str = ""
    files: list[FileText] = Field(default=[], max_length=50)
    cut: Literal["", "head", "passages"] = ""
    model: str = ""
    system: str = ""
    sampling: SamplingFields = Field(default_factory=lambda: SamplingFields.model_validate({}))
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    overflow: Literal["shift", "summarize", "stop"] = "shift"
    copies: bool = False

    def to_question(self) -> PageQuestion:
        """
        Return the question.

        Raises
        ------
        BadField: it is empty.
        """
        if self.kind in ("ask", "edit") and not self.text.strip() and not self.files:
            raise BadField("text", tr("The question is empty."))
        return PageQuestion(
            self.key,
            self.kind,
            self.text,
            self.chat,
            self.message,
            self.system,
            [Document(file.name, file.text) for file in self.files],
            self.cut,
            self.sampling.sampling(),
            self.max_tokens,
            self.overflow,
            self.copies,
        )


class ChatChange(BaseModel):
    """`PATCH /page/chats/{id}`: a new title, another system prompt, or the version of a message to show."""

    title: str | None = Field(None, max_length=500)
    system: str | None = None
    version: int | None = Field(None, ge=1, lt=2**31)


class CountRequest(BaseModel):
    """`POST /page/tokens`: the tokens of a chat, or of a new one, in the context of a model."""

    model: str = ""
    chat: int | None = Field(None, ge=1, lt=2**31)
    system: str = ""


class PageApi:
    """Routes of the page, for the chats in `folders`; while an answer waits, something is sent each `keep_alive` s."""

    def __init__(self, service: AnswerService, folders: Folders, *, keep_alive: float) -> None:
        self._service, self._folders, self._keep_alive = service, folders, keep_alive
        self._chats, self._assets = PageChats(folders), PageAssets()
        self._answers = PageAnswers(service, self._chats)

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(route_class=JsonRoute, include_in_schema=False, lifespan=self._close_journal_at_the_end)
        router.add_api_route("/", self.send_page, methods=["GET"])
        router.add_api_route("/page/assets/texts.json", self.send_texts, methods=["GET"])
        router.add_api_route("/page/assets/{name:path}", self.send_asset, methods=["GET"])
        own = APIRouter(prefix="/page", dependencies=[Depends(check_own_page)], route_class=JsonRoute)
        own.add_api_route("/settings", self.list_settings, methods=["GET"])
        own.add_api_route("/chats", self.list_chats, methods=["GET"])
        own.add_api_route("/chats/{chat}", self.read_chat, methods=["GET"])
        own.add_api_route("/chats/{chat}", self.change_chat, methods=["PATCH"])
        own.add_api_route("/chats/{chat}", self.delete_chat, methods=["DELETE"])
        own.add_api_route("/chats/{chat}/export", self.export_chat, methods=["GET"])
        own.add_api_route("/tokens", self.count_tokens, methods=["POST"])
        own.add_api_route("/answers", self.answer, methods=["POST"])
        own.add_api_route("/answers/{key}", self.stop_answer, methods=["DELETE"])
        files = APIRouter(prefix="/page", dependencies=[Depends(check_own_page)])
        files.add_api_route("/files", self.read_file, methods=["POST"])
        router.include_router(own)
        router.include_router(files)
        return router

    @contextlib.asynccontextmanager
    async def _close_journal_at_the_end(self, _app: object) -> AsyncIterator[None]:
        yield
        self._chats.close()

    # --- files that need no key

    async def send_page(self, request: Request) -> Response:
        """Return the page."""
        return self._assets.respond(request, "index.html")

    async def send_asset(self, request: Request, name: str) -> Response:
        """Return a file of the page."""
        return self._assets.respond(request, name)

    async def send_texts(self, request: Request, language: str = "") -> Response:
        """Return the texts of the page in a language."""
        texts = translate_page(language, request.headers.get("accept-language", ""))
        return JSONResponse(texts, headers={**PAGE_HEADERS, "Cache-Control": "no-cache"})

    # --- chats

    async def list_settings(self) -> Response:
        """Return the models and system prompts to choose from."""
        models = [
            {"name": one.name, "size": one.size, "is_loaded": one.is_loaded, "n_ctx": one.n_ctx}
            for one in self._service.models()
            if one.has_template
        ]
        folders = [bundled_folder("prompts"), self._folders.home / "prompts"]
        prompts = await asyncio.to_thread(read_prompt_files, folders)
        return _respond({"version": __version__, "models": models, "prompts": prompts, "answer_share": ANSWER_SHARE})

    async def list_chats(self, search: str = "") -> Response:
        """Return all chats, or the messages that contain all words of `search`."""
        if search.strip():
            return _respond({"hits": await asyncio.to_thread(self._chats.search, search)})
        return _respond({"chats": await asyncio.to_thread(self._chats.list_chats)})

    async def read_chat(self, chat: int) -> Response:
        """Return a chat and its messages."""
        return _respond(await asyncio.to_thread(self._chats.read, chat))

    async def change_chat(self, chat: int, body: ChatChange) -> Response:
        """Change a chat and return it."""
        if body.title is not None:
            await asyncio.to_thread(self._chats.rename, chat, body.title)
        if body.system is not None:
            await asyncio.to_thread(self._chats.set_system_prompt, chat, body.system)
        if body.version is not None:
            await asyncio.to_thread(self._chats.select_version, chat, body.version)
        return await self.read_chat(chat)

    async def delete_chat(self, chat: int) -> Response:
        """Delete a chat."""
        await asyncio.to_thread(self._chats.delete, chat)
        return _respond({})

    async def export_chat(self, chat: int, format: str = "md") -> Response:
        """Return a chat as a file to save."""
        if format not in FORMATS:
            raise InvalidChoice("format", FORMATS, format)
        content = await asyncio.to_thread(self._chats.export, chat, format)
        disposition = f'attachment; filename="chat-{chat}.{format}"'
        headers = {**_PRIVATE, "Content-Disposition": disposition}
        return Response(content, headers=headers, media_type=_EXPORT_TYPES[format])

    # --- answers

    async def answer(self, request: Request, body: QuestionRequest) -> Response:
        """Ask or edit a question, retry or continue an answer, and stream the answer."""
        events = self._answers.stream(body.to_question(), body.model, identify_client(request))
        return await stream_while_connected(
            request,
            (format_event(event) async for event in events),
            keep_alive=self._keep_alive,
            encode_error=lambda body: format_event({**body["error"], "type": "error"}),
        )

    async def stop_answer(self, key: str) -> Response:
        """Stop an answer; the text so far stays in the chat."""
        return _respond({"stopped": self._answers.stop(key)})

    async def count_tokens(self, body: CountRequest) -> Response:
        """Return the number of tokens of a chat if the model is loaded: viewing a chat does not load one."""
        info = next((one for one in self._service.models() if one.name == body.model and one.is_loaded), None)
        if info is None:
            return _respond({"tokens": None, "n_ctx": None})
        thread = await asyncio.to_thread(self._chats.load_thread, body.chat) if body.chat else Thread(body.system)
        messages = select_messages(thread)
        async with self._service.open(body.model) as engine:
            tokens = await engine.count_tokens(ChatPrompt(messages)) if messages else 0
            return _respond({"tokens": tokens, "n_ctx": engine.info.n_ctx})

    async def read_file(self, request: Request, name: str, model: str = "") -> Response:
        """Return the text of the file in the body, and how many tokens of the model it has (null: too many)."""
        document = await asyncio.to_thread(read_upload, name, await request.body())
        tokens = None
        if len(document.text) <= MAX_CHARACTERS:
            async with self._service.open(model) as engine:
                tokens = len(await engine.tokenize(document.to_markdown(), special=False))
        return _respond({"name": document.name, "text": document.text, "tokens": tokens})


def check_own_page(request: Request) -> None:
    """
    Reject requests from other sites, even those that may use the server's other routes: chats are private.

    Raises
    ------
    HttpError: another site's page sends the request.
    """
    if not is_from_own_page(request):
        raise HttpError(403, tr("This page may only be used from its own address."), code="origin_not_allowed")


def read_upload(name: str, data: bytes) -> Document:
    """
    Read the text of a file that was sent, with the readers of `@file`, which need it on the disk.

    Only the last part of its name is used, and only inside a folder that is deleted afterwards.

    Raises
    ------
    BadField: it has no name, contains no text, or cannot be read.
    """
    name = name.replace("\\", "/").rpartition("/")[2].replace("\0", "").strip()[-_MAX_NAME:]
    if name in ("", ".", ".."):
        raise BadField("name", tr("A file needs a name."))
    with tempfile.TemporaryDirectory(prefix="qwenlocal-") as folder:
        suffix = Path(name).suffix.lower()
        path = Path(folder) / f"upload{suffix if suffix[1:].isalnum() and suffix.isascii() else ''}"
        path.write_bytes(data)
        try:
            return Document(name, read_document(path).text)
        except UsageError as error:  # it names the copy, which the client does not know
            message, hint = (
                text.replace(str(path), name).replace(path.name, name) for text in (str(error), error.hint)
            )
            raise BadField("file", message, hint=hint) from error


_PRIVATE = {**PAGE_HEADERS, "Cache-Control": "no-store"}


def _respond(content: Any) -> Response:
    return JSONResponse(content, headers=_PRIVATE)


def create_page_router(service: AnswerService, folders: Folders | None, *, keep_alive: float) -> APIRouter:
    """Return the routes of the page; without the user's folders there are none."""
    return PageApi(service, folders, keep_alive=keep_alive).router() if folders else APIRouter()
