"""The routes of the page, without a browser: chats of the journal, answers, files, and who may use them."""

from __future__ import annotations

import array
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Run
from http_server import serve, serve_host, wait_until
from scripted_engine import ScriptedEngine, ScriptedHost

from qwenlocal.chat.journal import Journal
from qwenlocal.formatting import shorten
from qwenlocal.i18n import translate
from qwenlocal.paths import Folders
from qwenlocal.server import page_texts
from qwenlocal.server.page_texts import choose_language

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "qwenlocal" / "server" / "page"
CROSS_SITE = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"},
]


class Page:
    """The routes of a page, its engine and its journal."""

    def __init__(self, url: str, engine: ScriptedEngine, folders: Folders) -> None:
        self.url, self.engine, self.folders = url, engine, folders
        self.http = httpx.Client(base_url=f"{url}/page", timeout=20)

    def ask(self, text: str, **fields: Any) -> list[dict[str, Any]]:
        """Ask a question and return all events."""
        response = self.http.post("/answers", json={"key": "12345678", "text": text, **fields})
        assert response.status_code == 200, response.text
        return parse_events(response.text)

    def chats(self) -> list[dict[str, Any]]:
        chats: list[dict[str, Any]] = self.http.get("/chats").json()["chats"]
        return chats

    def chat(self, number: int = 1) -> dict[str, Any]:
        chat: dict[str, Any] = self.http.get(f"/chats/{number}").json()
        return chat

    def texts(self) -> list[str]:
        return [message["text"] for message in self.chat()["path"]]


def parse_events(text: str) -> list[dict[str, Any]]:
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part.startswith("data: ")]


@pytest.fixture
def page(folders: Folders) -> Iterator[Page]:
    engine = ScriptedEngine("scripted", n_ctx=400)
    other = ScriptedEngine("other")
    with serve_host(ScriptedHost(engine, other), folders=folders) as url:
        page = Page(url, engine, folders)
        with page.http:
            yield page


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page with one chat, for tests that change nothing."""
    home, engine = tmp_path_factory.mktemp("page"), ScriptedEngine("scripted", n_ctx=400)
    folders = Folders(home, home / "hub", home, home / "cache")
    with serve_host(ScriptedHost(engine), folders=folders) as url:
        page = Page(url, engine, folders)
        with page.http:
            page.ask("Hello")
            yield page


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A page that needs a key, on a server whose other routes all sites may use."""
    home = tmp_path_factory.mktemp("locked")
    folders = Folders(home, home / "hub", home, home / "cache")
    settings = {"api_keys": ("secret",), "cors_origins": ("https://evil.example", "*")}
    with (
        serve_host(ScriptedHost(ScriptedEngine("scripted")), folders=folders, **settings) as url,
        httpx.Client(base_url=url) as http,
    ):
        yield http


# --- asking


def test_an_answer_is_streamed_and_saved_where_the_terminal_finds_it(page: Page, qwenlocal: Run) -> None:
    start, progress, *texts, done = page.ask("Hello", system="Be brief.")
    assert (start["type"], start["chat"], progress["type"]) == ("start", 1, "progress")
    assert "".join(event["text"] for event in texts) == "Paris, fun"
    assert done["path"][-1]["finish_reason"] == "eos"
    assert done["stats"]["answer_tokens"] == 3 and done["n_ctx"] == 400
    shown = json.loads(qwenlocal("chats", "show", "1", "--json").stdout)
    assert [message["content"] for message in shown["messages"]] == ["Be brief.", "Hello", "Paris, fun"]


def test_a_tiny_model_answers_on_the_page(folders: Folders, speaking_model: Path) -> None:
    with serve(speaking_model, folders=folders) as server, httpx.Client(base_url=f"{server.url}/page") as http:
        events = parse_events(http.post("/answers", json={"key": "12345678", "text": "Hello"}).text)
        assert events[-1]["path"][-1]["text"] == "Paris, fun"
        assert http.post("/tokens", json={"model": "tiny", "chat": 1}).json()["tokens"] > len("HelloParis, fun")


def test_the_model_gets_the_whole_path_and_only_the_chosen_settings(page: Page) -> None:
    page.ask("One", system="Be brief.")
    page.ask("Two", chat=1, sampling={"temperature": 0, "top_k": 5}, max_tokens=2)
    request = page.engine.requests[-1]
    assert [message["content"] for message in request.prompt.messages] == ["Be brief.", "One", "Paris, fun", "Two"]  # type: ignore[union-attr]
    assert request.sampling == {"temperature": 0, "top_k": 5}
    assert page.chat()["path"][-1]["finish_reason"] == "length"


def test_a_growing_answer_is_in_the_journal_before_it_ends(page: Page) -> None:
    page.engine.reply, page.engine.hold_at = "abcd" * 50, 40
    page.engine.pause = 0.02  # the journal gets a growing answer every half second
    with page.http.stream("POST", "/answers", json={"key": "12345678", "text": "Hello"}) as response:
        lines = response.iter_lines()
        while "abcd" not in next(lines):
            pass
        wait_until(lambda: len(page.texts()) == 2 and len(page.texts()[1]) > 40)
        assert page.chat()["state"] == "answering"
        page.engine.release()
        assert [line for line in lines if line][-1].startswith('data: {"type":"done"')
    assert page.chat()["state"] == "free"


def test_the_text_of_a_stopped_answer_is_kept(page: Page) -> None:
    page.engine.reply, page.engine.hold_at = "abcd" * 50, 3
    with page.http.stream("POST", "/answers", json={"key": "12345678", "text": "Hello"}) as response:
        lines = response.iter_lines()
        while '"tokens":2' not in next(lines):
            pass
        assert httpx.delete(f"{page.url}/page/answers/12345678").json() == {"stopped": True}
        done = json.loads([line for line in lines if line][-1].removeprefix("data: "))
    assert done["path"][-1]["text"] == "abcdabcd"
    assert done["path"][-1]["finish_reason"] == "interrupted"
    assert page.engine.running == 0
    assert page.http.delete("/answers/12345678").json() == {"stopped": False}


def test_a_reader_who_leaves_stops_the_answer(page: Page) -> None:
    page.engine.reply, page.engine.hold_at = "abcd" * 50, 3
    with page.http.stream("POST", "/answers", json={"key": "12345678", "text": "Hello"}) as response:
        lines = response.iter_lines()
        while '"tokens":2' not in next(lines):
            pass
    wait_until(lambda: page.engine.running == 0)
    wait_until(lambda: page.chat()["state"] == "free")
    assert page.texts() == ["Hello", "abcdabcd"]


def test_editing_and_retrying_keep_the_earlier_versions(page: Page) -> None:
    page.engine.replies = ["first", "second", "third"]
    page.ask("Hello")
    page.ask("", kind="retry", chat=1)
    assert [one["versions"] for one in page.chat()["path"]] == [[1], [2, 3]]
    page.ask("Hi", kind="edit", chat=1, message=1)
    assert page.texts() == ["Hi", "third"]
    assert page.chat()["path"][0]["versions"] == [1, 4]
    page.http.patch("/chats/1", json={"version": 1})
    assert page.texts() == ["Hello", "second"]
    page.http.patch("/chats/1", json={"version": 2})
    assert page.texts() == ["Hello", "first"]


def test_an_answer_in_the_middle_is_retried(page: Page) -> None:
    page.engine.replies = ["a", "b", "c"]
    page.ask("One")
    page.ask("Two", chat=1)
    page.ask("", kind="retry", chat=1, message=2)
    assert page.texts() == ["One", "c"]


def test_an_answer_that_was_cut_is_continued_exactly_where_it_ended(folders: Folders, speaking_model: Path) -> None:
    with serve(speaking_model, folders=folders) as server, httpx.Client(base_url=f"{server.url}/page") as http:
        question = {"key": "12345678", "text": "Hello", "max_tokens": 3}
        cut = parse_events(http.post("/answers", json=question).text)[-1]["path"][-1]
        assert "Paris, fun".startswith(cut["text"]) and cut["text"] not in ("", "Paris, fun")
        assert (cut["finish_reason"], cut["can_continue"]) == ("length", True)
        proceed = {"key": "12345678", "kind": "continue", "chat": 1}
        start, *rest, done = parse_events(http.post("/answers", json=proceed).text)
        assert (start["text"], [message["text"] for message in start["path"]]) == (cut["text"], ["Hello"])
        assert cut["text"] + "".join(event.get("text", "") for event in rest) == "Paris, fun"
        answer = done["path"][-1]
        assert (answer["number"], answer["text"], answer["versions"]) == (cut["number"], "Paris, fun", [2])
        assert (answer["finish_reason"], answer["can_continue"]) == ("eos", False)
        refused = http.post("/answers", json=proceed)
        assert (refused.status_code, http.get("/chats/1").json()["path"][-1]) == (400, answer)


def test_a_stopped_answer_is_continued(page: Page) -> None:
    page.engine.reply, page.engine.hold_at = "abcd" * 3, 3
    with page.http.stream("POST", "/answers", json={"key": "12345678", "text": "Hello"}) as response:
        lines = response.iter_lines()
        while '"tokens":2' not in next(lines):
            pass
        assert page.chat()["path"][-1]["can_continue"] is False  # it still grows
        httpx.delete(f"{page.url}/page/answers/12345678")
        list(lines)
    assert page.chat()["path"][-1]["can_continue"]
    page.engine.release()
    page.ask("", kind="continue", chat=1)
    assert page.engine.requests[-1].prompt.prefix_ids == (0, 0)  # type: ignore[union-attr]  # the tokens that were kept
    assert page.texts() == ["Hello", "abcd" * 5]


def test_the_half_of_a_character_at_the_end_of_an_answer_is_completed(page: Page) -> None:
    page.ask("Hello")
    with contextlib.closing(Journal(page.folders.journal)) as journal, journal.transaction() as database:
        ids = array.array("i", [7, 8]).tobytes()
        cut = "UPDATE messages SET text = 'caf\ufffd', ids = ?, why = 'token limit' WHERE role = 'assistant'"
        database.execute(cut, (ids,))

    async def pieces(ids: Sequence[int]) -> list[bytes]:
        return [{7: b"caf", 8: b"\xc3"}[token] for token in ids]

    page.engine.pieces = pieces  # type: ignore[method-assign]
    page.engine.reply = "é!"
    page.ask("", kind="continue", chat=1)
    assert page.engine.requests[-1].prompt.prefix_ids == (7, 8)  # type: ignore[union-attr]
    assert page.texts() == ["Hello", "café!"]


def test_an_answer_of_another_model_is_continued_as_text(page: Page) -> None:
    page.ask("Hello", max_tokens=2)
    page.ask("", kind="continue", chat=1, model="other")
    assert page.texts() == ["Hello", "Paris, fParis, fun"]


def test_an_answer_that_filled_the_context_continues_without_the_oldest_turns(page: Page) -> None:
    page.ask("x" * 600)
    page.engine.reply = "abcd" * 60
    page.ask("y" * 560, chat=1, max_tokens=50)
    events = page.ask("", kind="continue", chat=1)
    (evicted,) = [event for event in events if event["type"] == "evicted"]
    assert (evicted["turns"], evicted["first"]) == (1, shorten("x" * 600))
    assert [message["content"] for message in page.engine.requests[-1].prompt.messages] == ["y" * 560]  # type: ignore[union-attr]
    assert page.texts()[-1] == "abcd" * 110


def test_an_answer_that_fills_the_context_alone_is_not_offered_to_be_continued(page: Page) -> None:
    page.ask("One")
    page.ask("Two", chat=1)
    with contextlib.closing(Journal(page.folders.journal)) as journal, journal.transaction() as database:
        database.execute("UPDATE messages SET why = 'context full' WHERE role = 'assistant'")
    assert page.chat()["path"][-1]["can_continue"]
    page.ask("Three", kind="edit", chat=1, message=1)
    with contextlib.closing(Journal(page.folders.journal)) as journal, journal.transaction() as database:
        database.execute("UPDATE messages SET why = 'context full' WHERE role = 'assistant'")
    assert not page.chat()["path"][-1]["can_continue"]


def test_old_turns_are_summarized_before_they_leave_the_context(page: Page) -> None:
    page.ask("x" * 600)
    page.engine.replies = ["They met in Rome.", "Yes"]
    _, *events, done = page.ask("y" * 1000, chat=1, overflow="summarize")
    kinds = [event["type"] for event in events]
    assert {"summarizing", "evicted", "text"} <= set(kinds)
    assert next(event for event in events if event["type"] == "evicted")["summary"] == "They met in Rome."
    assert done["summary"] == page.chat()["summary"] == "They met in Rome."
    assert "They met in Rome." in page.engine.requests[-1].prompt.messages[0]["content"]  # type: ignore[union-attr]


def test_a_full_context_refuses_the_question_if_no_turns_may_leave_it(page: Page) -> None:
    page.ask("x" * 600)
    question = {"key": "12345678", "text": "y" * 1000, "chat": 1, "overflow": "stop"}
    refused = page.http.post("/answers", json=question)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert len(page.chat()["path"]) == 2


def test_a_question_that_cannot_be_answered_leaves_nothing_behind(page: Page) -> None:
    response = page.http.post("/answers", json={"key": "12345678", "text": "x" * 4000})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert page.chats() == []
    chat = page.ask("Hello")[-1]["chat"]
    response = page.http.post("/answers", json={"key": "12345678", "text": "x" * 4000, "chat": chat})
    assert response.status_code == 400
    assert [message["text"] for message in page.chat(chat)["path"]] == ["Hello", "Paris, fun"]


def test_old_turns_leave_a_full_context(page: Page) -> None:
    for number in range(5):
        events = page.ask(f"{number}" * 280, chat=1 if number else None)
    assert any(event["type"] == "evicted" for event in events)
    assert [message["is_in_context"] for message in page.chat()["path"]][:2] == [False, False]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"text": " "}, 400),
        ({"text": "x", "chat": 99}, 404),
        ({"text": "x", "model": "unknown"}, 404),
        ({"text": "x", "kind": "edit", "chat": 1, "message": 2}, 400),
        ({"kind": "retry"}, 400),
        ({"kind": "retry", "chat": 1, "message": 99}, 404),
        ({"text": "x", "sampling": {"temperature": 99}}, 400),
        ({"text": "x", "key": "short"}, 400),
        ({"text": "x", "chat": 2**40}, 400),
    ],
)
def test_impossible_questions_are_refused(shared: Page, fields: dict[str, Any], status: int) -> None:
    response = shared.http.post("/answers", json={"key": "12345678", **fields})
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert len(shared.chats()) == 1 and shared.texts() == ["Hello", "Paris, fun"]


# --- chats


def test_chats_are_listed_searched_renamed_exported_and_deleted(page: Page) -> None:
    page.ask("Hello")
    page.ask("你好")
    assert [chat["title"] for chat in page.chats()] == ["你好", "Hello"]
    page.http.patch("/chats/1", json={"title": " Greetings "})
    assert page.chat()["title"] == "Greetings"
    (hit,) = page.http.get("/chats", params={"search": "好"}).json()["hits"]
    assert (hit["chat"], hit["found"]) == (2, "好")
    exported = page.http.get("/chats/1/export", params={"format": "md"})
    assert exported.text.startswith("# Greetings")
    assert exported.headers["content-disposition"] == 'attachment; filename="chat-1.md"'
    assert page.http.get("/chats/1/export", params={"format": "exe"}).status_code == 400
    assert page.http.delete("/chats/1").status_code == 200
    assert [chat["id"] for chat in page.chats()] == [2]
    assert page.http.get("/chats/1").status_code == 404


def test_the_system_prompt_of_a_chat_changes(page: Page) -> None:
    page.ask("Hello")
    page.http.patch("/chats/1", json={"system": "Rhyme."})
    page.ask("Again", chat=1)
    assert page.engine.requests[-1].prompt.messages[0] == {"role": "system", "content": "Rhyme."}  # type: ignore[union-attr]


HOLD = """
import sys
from pathlib import Path
from qwenlocal.chat.journal import Journal
assert Journal(Path(sys.argv[1])).acquire(int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_chat_that_is_open_in_a_terminal_is_not_written_from_two_places(page: Page) -> None:
    page.ask("Hello")
    command = [sys.executable, "-c", HOLD, str(page.folders.journal), "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as terminal:
        assert terminal.stdout and terminal.stdout.readline() == "held\n"
        assert page.chat()["state"] == "elsewhere"
        refused = page.http.post("/answers", json={"key": "12345678", "text": "Again", "chat": 1})
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "chat_open_elsewhere"
        assert page.http.delete("/chats/1").status_code == 409
        copied = page.ask("Again", chat=1, copies=True)[-1]
        assert copied["chat"] == 2
        assert terminal.stdin
        terminal.stdin.close()
    assert page.texts() == ["Hello", "Paris, fun"]
    assert len(page.chat(2)["path"]) == 4
    assert page.chat()["state"] == "free"


def test_two_tabs_do_not_write_one_chat(page: Page) -> None:
    page.ask("Hello")
    page.engine.reply, page.engine.hold_at = "abcd" * 50, 3
    question = {"key": "12345678", "text": "Again", "chat": 1}
    with page.http.stream("POST", "/answers", json=question) as response:
        lines = response.iter_lines()
        next(lines)
        for copies in (False, True):
            second = httpx.post(f"{page.url}/page/answers", json={**question, "key": "87654321", "copies": copies})
            assert second.status_code == 409
            assert second.json()["error"]["code"] == "chat_answering"
        page.engine.release()
        list(lines)
    assert len(page.chat()["path"]) == 4


# --- files


def test_a_file_is_read_like_one_that_the_terminal_attaches(page: Page) -> None:
    html = b"<h1>Notes</h1><p>Some <b>words</b></p><script>alert(1)</script>"
    read = page.http.post("/files", params={"name": "notes.html"}, content=html).json()
    assert read["name"] == "notes.html" and "# Notes" in read["text"] and "**words**" in read["text"]
    assert read["tokens"] > 5
    page.ask("Summarise", files=[{"name": read["name"], "text": read["text"]}])
    message = page.engine.requests[-1].prompt.messages[-1]["content"]  # type: ignore[union-attr]
    assert message.startswith("notes.html:\n```html\n# Notes") and message.endswith("```\n\nSummarise")
    assert page.chats()[0]["title"] == "Summarise"


@pytest.mark.parametrize("cut", ["head", "passages"])
def test_a_file_that_does_not_fit_is_cut(page: Page, cut: str) -> None:
    text = "\n\n".join(
        f"Paragraph {number} about {'tokens' if number == 30 else 'nothing'}." * 5 for number in range(60)
    )
    events = page.ask("tokens?", files=[{"name": "long.txt", "text": text}], cut=cut)
    sent = page.engine.requests[-1].prompt.messages[-1]["content"]  # type: ignore[union-attr]
    assert events[-1]["stats"]["prompt_tokens"] < 400
    assert ("Paragraph 30" in sent) == (cut == "passages")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini", "~/.ssh/id_rsa"])
def test_a_file_name_reaches_no_path(shared: Page, name: str) -> None:
    read = shared.http.post("/files", params={"name": name}, content=b"mine").json()
    assert read["text"] == "mine"
    assert not re.search(r"[/\\]", read["name"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("", b"x"),
        ("..", b"x"),
        ("a/", b"x"),
        ("x.txt", b""),
        ("x.pdf", b"%PDF"),
        ("x.txt", b"caf\xe9 \xff\xfe\x00\x81"),
        ("x.bin", b"\x00" * 99),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(shared: Page, name: str, content: bytes) -> None:
    response = shared.http.post("/files", params={"name": name}, content=content)
    assert response.status_code == 400
    assert not re.search("/tmp|upload", response.text)


# --- who may use it


ROUTES = [
    ("GET", "/settings"),
    ("GET", "/chats"),
    ("GET", "/chats/1"),
    ("PATCH", "/chats/1"),
    ("DELETE", "/chats/1"),
    ("GET", "/chats/1/export"),
    ("POST", "/tokens"),
    ("POST", "/answers"),
    ("DELETE", "/answers/12345678"),
    ("POST", "/files?name=x"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key_and_refuses_other_sites(locked: httpx.Client, method: str, path: str) -> None:
    """Also a site that may use the server's other routes."""
    assert locked.request(method, f"/page{path}", json={}).status_code == 401
    for headers in CROSS_SITE:
        headers = {**headers, "Authorization": "Bearer secret"}
        assert locked.request(method, f"/page{path}", json={}, headers=headers).status_code == 403, headers
    allowed = locked.request(method, f"/page{path}", json={}, headers={"Authorization": "Bearer secret"})
    assert allowed.status_code not in (401, 403)


def test_the_page_itself_needs_no_key_and_loads_nothing_from_other_hosts(locked: httpx.Client) -> None:
    names = [f"page/assets/{path.relative_to(PAGE).as_posix()}" for path in PAGE.rglob("*") if path.is_file()]
    for name in ["", *names, "page/assets/texts.json"]:
        response = locked.get(f"/{name}")
        assert response.status_code == 200, name
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
    for name in ("../page_api.py", "..%2fpage_api.py", "%2e%2e/app.py", "vendor", "/etc/passwd", ""):
        assert locked.get(f"/page/assets/{name}").status_code in (401, 404), name


def test_an_unchanged_file_is_not_sent_again(shared: Page) -> None:
    first = shared.http.get("/assets/main.js")
    again = shared.http.get("/assets/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_there_is_no_page_without_a_journal() -> None:
    with serve_host(ScriptedHost(ScriptedEngine("scripted"))) as url:
        assert httpx.get(f"{url}/").status_code == 404
        assert httpx.get(f"{url}/page/chats").status_code == 404


# --- texts and files of the page


def test_texts_are_in_the_language_of_the_browser(shared: Page) -> None:
    chinese = shared.http.get("/assets/texts.json", headers={"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.8"}).json()
    english = shared.http.get("/assets/texts.json", params={"language": "en"}, headers={"Accept-Language": "zh"}).json()
    assert (chinese["language"], english["language"]) == ("zh", "en")
    assert english["languages"] == ["en", "zh"]
    assert chinese["texts"]["search_none"] == translate(english["texts"]["search_none"], "zh")
    assert re.search("[\u4e00-\u9fff]", chinese["texts"]["search_none"])


@pytest.mark.parametrize(
    ("wanted", "language"),
    [(["de", "zh-CN"], "zh"), (["en-GB", "zh"], "en"), (["../../etc"], "en"), ([""], "en"), (["ZH_hans"], "en")],
)
def test_a_language_without_a_catalog_is_english(wanted: list[str], language: str) -> None:
    assert choose_language(wanted, ["en", "zh"]) == language


def test_the_page_uses_exactly_the_texts_that_exist() -> None:
    source = "".join(path.read_text("utf-8") for path in (*PAGE.glob("*.js"), PAGE / "index.html"))
    used = set(re.findall(r'\bt\("(\w+)"', source)) | set(
        re.findall(r'data-(?:text|label|placeholder)="(\w+)"', source)
    )
    assert used <= set(page_texts._TEXTS)
    for key in set(page_texts._TEXTS) - used:
        prefix = key.split("_")[0]
        assert f'"{key}"' in source or f"t(`{prefix}_${{" in source, key


def test_the_page_is_small_and_its_libraries_are_those_that_were_published() -> None:
    assert sum(path.stat().st_size for path in PAGE.rglob("*") if path.is_file()) < 400_000
    checked = subprocess.run([sys.executable, "tools/vendor_page.py"], cwd=ROOT, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
