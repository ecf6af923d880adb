"""The page in a real browser: typed, streamed, stopped, reloaded, attacked; by keyboard, on a phone, in Chinese."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import serve, serve_host, wait_until
from scripted_engine import ScriptedEngine, ScriptedHost
from test_page_api import HOLD

from qwenlocal.chat.journal import Journal
from qwenlocal.i18n import translate
from qwenlocal.paths import Folders

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

Tab = Any  # a playwright page; the package is not installed everywhere
OpenTab = Callable[..., Tab]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Site:
    """A server with two scripted models, and its journal."""

    def __init__(self, url: str, engine: ScriptedEngine, folders: Folders) -> None:
        self.url, self.engine, self.folders = url, engine, folders

    def texts(self, chat: int) -> list[str]:
        """The path of a chat on the disk."""
        with contextlib.closing(Journal(self.folders.journal)) as journal:
            return [message.text for message in journal.load_thread(chat).path]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home, engine = tmp_path_factory.mktemp("page"), ScriptedEngine("scripted")
    folders = Folders(home, home / "hub", home, home / "cache")
    with serve_host(ScriptedHost(engine, ScriptedEngine("other")), folders=folders) as url:
        yield Site(url, engine, folders)


@pytest.fixture
def engine(site: Site) -> ScriptedEngine:
    """The engine, as it is at first."""
    site.engine.reset()
    return site.engine


@pytest.fixture
def url(site: Site, engine: ScriptedEngine) -> str:
    """The address of a page without chats."""
    with httpx.Client(base_url=f"{site.url}/page") as http:
        for chat in http.get("/chats").json()["chats"]:
            wait_until(lambda id=chat["id"]: http.delete(f"/chats/{id}").is_success)
    return site.url


@pytest.fixture
def problems() -> Iterator[list[str]]:
    """Errors that the browser logs, and addresses of other servers that it asks; there must be none in the end."""
    problems: list[str] = []
    yield problems
    assert problems == []


@pytest.fixture
def open_tab(browser: Any, problems: list[str]) -> Iterator[OpenTab]:
    """Opens an address in a browser of its own."""
    contexts = []

    def open_(url: str, *, width: int = 1280, height: int = 800, **options: Any) -> Tab:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(8000)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: message.type == "error" and problems.append(message.text))
        tab.on("request", lambda request: request.url.startswith((url, "blob:")) or problems.append(request.url))
        tab.goto(url)
        tab.locator("body:not([aria-busy])").wait_for()
        return tab

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture
def tab(open_tab: OpenTab, url: str) -> Tab:
    return open_tab(url)


def ask(tab: Tab, text: str) -> None:
    tab.locator("#question").fill(text)
    tab.locator("#question").press("Enter")


def wait_for_answer(tab: Tab) -> None:
    tab.locator("#send:not([hidden])").wait_for()
    tab.locator(".growing").wait_for(state="detached")


def answers(tab: Tab) -> list[str]:
    texts: list[str] = tab.locator(".assistant .body").all_inner_texts()
    return texts


def chat_number(tab: Tab) -> int:
    return int(tab.url.rpartition("#")[2])


def focused(tab: Tab) -> str:
    identity: str = tab.evaluate("document.activeElement.id || document.activeElement.tagName")
    return identity


# --- answers


def test_a_typed_question_is_answered(tab: Tab, site: Site) -> None:
    ask(tab, "Hello")
    wait_for_answer(tab)
    assert answers(tab) == ["Paris, fun"]
    assert tab.locator(".user .words").inner_text() == "Hello"
    tab.locator("#chat-list a[aria-current=page]", has_text="Hello").wait_for()
    assert tab.title() == "Hello – qwenlocal"
    assert focused(tab) == "question"
    assert site.texts(chat_number(tab)) == ["Hello", "Paris, fun"]


def test_a_tiny_model_answers_in_the_browser(open_tab: OpenTab, folders: Folders, speaking_model: Path) -> None:
    with serve(speaking_model, folders=folders) as server:
        tab = open_tab(server.url)
        ask(tab, "Hello")
        wait_for_answer(tab)
        assert answers(tab) == ["Paris, fun"]
        assert re.fullmatch(r"\d+ of 2,048 tokens", tab.locator("#context-text").inner_text())


def test_an_answer_is_shown_while_it_grows_and_stops_with_escape(tab: Tab, engine: ScriptedEngine) -> None:
    engine.reply, engine.hold_at = "**Bold** and more " * 20, 8
    ask(tab, "Hello")
    tab.locator(".growing strong", has_text="Bold").first.wait_for()
    assert tab.locator("#messages").get_attribute("aria-busy") == "true"
    tab.keyboard.press("Escape")
    wait_for_answer(tab)
    assert answers(tab) == ["Bold and more Bold a"]
    assert "Stopped." in tab.locator(".assistant .tools").inner_text()
    assert tab.locator("#status").inner_text() == "Stopped."
    assert engine.running == 0


def test_a_stopped_answer_is_continued_with_the_mouse_or_a_key(tab: Tab, engine: ScriptedEngine, site: Site) -> None:
    engine.reply, engine.hold_at = "abcd" * 6, 4
    ask(tab, "Hello")
    tab.locator(".growing", has_text="abcd" * 3).wait_for()
    tab.keyboard.press("Escape")
    wait_for_answer(tab)
    tab.locator(".assistant .continue").click()
    tab.locator(".growing", has_text="abcd" * 6).wait_for()
    tab.keyboard.press("Escape")
    wait_for_answer(tab)
    engine.release()
    tab.keyboard.press("Alt+c")
    wait_for_answer(tab)
    assert answers(tab) == ["abcd" * 12]
    assert tab.locator(".continue").count() == 0
    assert site.texts(chat_number(tab)) == ["Hello", "abcd" * 12]


def test_the_summary_of_turns_that_left_the_context_is_shown(tab: Tab, engine: ScriptedEngine) -> None:
    tab.locator("#show-settings").click()
    tab.locator("#overflow-choice").select_option(label="Summarize the oldest turns")
    tab.keyboard.press("Escape")
    ask(tab, "x" * 8000)
    wait_for_answer(tab)
    engine.replies = ["They met in Rome.", "Yes"]
    ask(tab, "y" * 8000)
    wait_for_answer(tab)
    tab.locator("#toast", has_text="the oldest turn, “xxx").wait_for()
    assert tab.locator(".outside").count() == 2
    assert tab.locator(".outside + .summary p").inner_text() == ""  # closed
    tab.locator(".summary summary").press("Enter")
    assert tab.locator(".summary p").inner_text() == "They met in Rome."
    tab.reload()
    tab.locator(".outside + .summary").wait_for()


def test_two_tabs_with_the_same_chat_answer_in_turn(
    open_tab: OpenTab, tab: Tab, engine: ScriptedEngine, problems: list[str]
) -> None:
    ask(tab, "One")
    wait_for_answer(tab)
    other = open_tab(tab.url.partition("#")[0])
    other.goto(tab.url)
    other.locator(".assistant", has_text="Paris").wait_for()
    engine.reply, engine.hold_at = "abcd" * 4, 3
    ask(tab, "Two")
    tab.locator(".growing", has_text="abcd").wait_for()
    ask(other, "Three")
    other.locator("#notice", has_text="another tab").wait_for()
    assert other.locator("#question").input_value() == "Three"
    engine.release()
    other.locator("#notice").wait_for(state="hidden")
    assert answers(other) == answers(tab) == ["Paris, fun", "abcd" * 4]
    other.locator("#question").press("Enter")
    other.locator(".assistant").nth(2).wait_for()
    wait_for_answer(other)
    tab.evaluate("window.dispatchEvent(new Event('focus'))")  # the other window covered this one
    tab.locator(".user", has_text="Three").wait_for()
    ask(tab, "Four")
    tab.locator(".assistant").nth(3).wait_for()
    wait_for_answer(tab)
    assert tab.locator(".user .words").all_inner_texts() == ["One", "Two", "Three", "Four"]
    problems.clear()  # the question that was refused


def test_an_answer_stops_also_while_answers_take_all_connections_of_the_browser(
    tab: Tab, engine: ScriptedEngine
) -> None:
    engine.reply, engine.hold_at = "abcd" * 4, 3
    for number in range(6):
        tab.keyboard.press("Alt+n")
        ask(tab, f"Question {number}")
        wait_until(lambda count=number + 1: engine.running == count)
    tab.keyboard.press("Escape")
    tab.locator(".assistant", has_text="Stopped.").wait_for()
    assert engine.running == 5
    engine.release()


def test_a_question_without_an_answer_can_be_answered_later(tab: Tab, engine: ScriptedEngine) -> None:
    engine.hold_at = 1
    ask(tab, "Hello")
    tab.locator("#chat-list a", has_text="Hello").wait_for()
    tab.keyboard.press("Escape")
    wait_for_answer(tab)
    engine.release()
    tab.reload()
    tab.locator("#notice button", has_text="Retry").click()
    tab.locator(".assistant", has_text="Paris, fun").wait_for()
    wait_for_answer(tab)
    assert tab.locator("#notice").is_hidden()


def test_a_reloaded_page_shows_the_chat_again(tab: Tab, engine: ScriptedEngine) -> None:
    engine.reply, engine.hold_at = "abcd" * 20, 5
    ask(tab, "Hello")
    tab.locator(".growing", has_text="abcd").wait_for()
    tab.reload()
    tab.locator(".assistant", has_text="Stopped.").wait_for()
    assert answers(tab) == ["abcd" * 4]
    wait_until(lambda: engine.running == 0)


def test_questions_are_edited_answers_retried_and_versions_switched(tab: Tab, engine: ScriptedEngine) -> None:
    engine.replies = ["first", "second", "third"]
    ask(tab, "Hello")
    wait_for_answer(tab)
    tab.locator(".assistant [data-action=retry]").click()
    tab.locator(".assistant", has_text="second").wait_for()
    wait_for_answer(tab)
    assert tab.locator(".assistant .versions").inner_text().startswith("2/2")
    tab.locator(".assistant [data-action=previous]").click()
    tab.locator(".assistant", has_text="first").wait_for()
    tab.locator(".user").hover()
    tab.locator(".user [data-action=edit]").click()
    tab.keyboard.type(" again")
    tab.keyboard.press("Enter")
    tab.locator(".assistant", has_text="third").wait_for()
    wait_for_answer(tab)
    assert tab.locator(".user .words").inner_text() == "Hello again"
    tab.locator(".user [data-action=previous]").click()
    tab.locator(".assistant", has_text="second").wait_for()


def test_a_question_that_fails_is_put_back(tab: Tab, problems: list[str]) -> None:
    ask(tab, "x" * 20_000)
    tab.locator("#notice", has_text="4,096").wait_for()
    assert tab.locator("#question").input_value() == "x" * 20_000
    assert tab.locator(".message").count() == 0
    ask(tab, "Hello")
    wait_for_answer(tab)
    assert answers(tab) == ["Paris, fun"]
    problems.clear()  # a refused request is an error in the console


def test_another_chat_can_be_read_while_an_answer_grows(tab: Tab, engine: ScriptedEngine) -> None:
    ask(tab, "First")
    wait_for_answer(tab)
    tab.keyboard.press("Alt+n")
    engine.reply, engine.hold_at = "abcd" * 10, 5
    ask(tab, "Second")
    tab.locator(".growing", has_text="abcd").wait_for()
    tab.locator("#chat-list a", has_text="First").click()
    tab.locator(".assistant", has_text="Paris").wait_for()
    tab.locator("#send").wait_for()
    tab.locator("#chat-list a", has_text="Second").click()
    tab.locator(".growing", has_text="abcd" * 4).wait_for()
    engine.release()
    wait_for_answer(tab)
    assert answers(tab) == ["abcd" * 10]


def test_model_prompt_and_sampling_are_sent(tab: Tab, engine: ScriptedEngine) -> None:
    tab.locator("#show-settings").click()
    tab.locator("#prompt-choice").select_option(label="translator")
    tab.get_by_label("Temperature").fill("0.3")
    tab.get_by_label("Answer limit in tokens").fill("2")
    tab.locator("#settings .primary").click()
    ask(tab, "Hello")
    wait_for_answer(tab)
    request = engine.requests[0]
    assert request.prompt.messages[0]["content"].startswith("You are a translator.")  # type: ignore[union-attr]
    assert (request.sampling, request.max_tokens) == ({"temperature": 0.3}, 2)
    assert "token limit" in tab.locator(".assistant .tools").inner_text()
    tab.locator("#model").select_option("other")
    ask(tab, "Hello")
    wait_for_answer(tab)
    assert len(engine.requests) == 1


def test_a_file_is_attached_with_its_price(tab: Tab, engine: ScriptedEngine) -> None:
    file = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"some words\n" * 90}
    tab.locator("#file-input").set_input_files(files=[file])
    tab.locator("#files li", has_text="tokens, 7% of the free context").wait_for()
    ask(tab, "Summarise")
    wait_for_answer(tab)
    assert "notes.txt:\n```txt\nsome words" in engine.requests[0].prompt.messages[-1]["content"]  # type: ignore[union-attr]
    assert tab.locator(".user summary").inner_text() == "notes.txt"
    assert tab.locator(".user .words").inner_text() == "Summarise"
    tab.locator("#chat-list a", has_text="Summarise").wait_for()
    tab.keyboard.press("ArrowUp")
    assert tab.locator(".editor textarea").input_value() == "Summarise"
    tab.keyboard.type(" it")
    tab.keyboard.press("Enter")
    tab.locator(".user .versions").wait_for()
    wait_for_answer(tab)
    sent = [request.prompt.messages[-1]["content"] for request in engine.requests]  # type: ignore[union-attr]
    assert sent[1] == f"{sent[0]} it"


def test_the_time_to_read_a_file_is_shown_once_the_speed_is_known(tab: Tab, engine: ScriptedEngine) -> None:
    engine.first_token = 10
    ask(tab, "word " * 240)  # about 300 tokens
    wait_for_answer(tab)
    tab.locator("#file-input").set_input_files(
        files=[{"name": "notes.txt", "mimeType": "text/plain", "buffer": b"some words\n" * 200}]
    )
    tab.locator("#files li", has_text=re.compile(r"of the free context, about (17|18|19) s to read")).wait_for()


def test_a_chat_that_is_open_in_a_terminal_continues_as_a_copy(tab: Tab, site: Site) -> None:
    ask(tab, "Hello")
    wait_for_answer(tab)
    chat = chat_number(tab)
    command = [sys.executable, "-c", HOLD, str(site.folders.journal), str(chat)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as terminal:
        assert terminal.stdout and terminal.stdout.readline() == "held\n"
        tab.reload()
        tab.locator("#notice", has_text="open in another window").wait_for()
        ask(tab, "Again")
        tab.locator(".assistant").nth(1).wait_for()
        wait_for_answer(tab)
        assert chat_number(tab) == chat + 1
        tab.go_back()
        tab.locator("#notice", has_text="open in another window").wait_for()
        terminal.communicate()
        tab.evaluate("window.dispatchEvent(new Event('focus'))")  # back from the terminal's window
        tab.locator("#notice").wait_for(state="hidden")
    assert len(site.texts(chat)) == 2 and len(site.texts(chat + 1)) == 4


def test_chats_are_renamed_searched_exported_and_deleted(tab: Tab) -> None:
    ask(tab, "Hello")
    wait_for_answer(tab)

    def choose(label: str) -> None:
        tab.locator("#chat-list li.current .icon-button").click()
        tab.get_by_role("menuitem", name=label).click()

    choose("Rename")
    tab.locator("#prompt-input").fill("Greetings")
    tab.keyboard.press("Enter")
    tab.locator("#chat-list a", has_text="Greetings").wait_for()
    with tab.expect_download() as download:
        choose("Export as Markdown")
    assert download.value.suggested_filename == "Greetings.md"
    assert Path(download.value.path()).read_text("utf-8").startswith("# Greetings")
    tab.locator("#search").fill("paris")
    assert tab.locator(".hit mark").inner_text() == "Paris"
    tab.locator("#search").fill("")
    tab.locator("#chat-list li.current").wait_for()
    choose("Delete")
    tab.locator("#prompt-accept").click()
    tab.locator("#chat-list", has_text="No chats yet.").wait_for()
    assert tab.locator(".message").count() == 0


# --- attacks


ATTACK = """\
<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"><svg onload="window.hacked = 3">
<iframe srcdoc="<script>parent.hacked = 4</script>"></iframe><style>body{display:none}</style>

[one](javascript:window.hacked=5) [two](JaVaScRiPt&colon;window.hacked=6) [three](data:text/html,<script>1</script>)
[four](https://example.org/"onmouseover="window.hacked=7) ![pixel](https://tracker.example/pixel.png)
<a href="https://evil.example" onclick="window.hacked=8" id="send" name="body">five</a> <https://good.example/>

<details open ontoggle="window.hacked=9">x</details><form action=https://evil.example><input name=x></form>

```"><img src=x onerror=window.hacked=10>
</code></pre><script>window.hacked = 11</script>
```

```python
print("</code></pre><img src=x onerror=window.hacked=12>")
```

| <img src=x onerror=window.hacked=13> | `<script>` |
|---|---|
| <math><mtext><table><mglyph><style><img src=x onerror=window.hacked=14> | x |
"""


def test_scripts_in_an_answer_do_nothing(tab: Tab, engine: ScriptedEngine) -> None:
    engine.reply = ATTACK
    ask(tab, "<img src=x onerror='window.hacked = 20'><script>window.hacked = 21</script>")
    wait_for_answer(tab)
    for link in tab.locator(".assistant .body a").all():
        link.dispatch_event("mouseover")
    assert tab.evaluate("window.hacked") is None
    body = tab.locator(".assistant .body")
    assert body.locator("script, img, svg:not(.copy-code svg), iframe, style, form, input, [id], [name]").count() == 0
    attributes = body.evaluate("e => [...e.querySelectorAll('*')].flatMap(one => one.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on") or name == "style"]
    links = body.locator("a[href]").evaluate_all("all => all.map(a => [a.protocol, a.target, a.rel])")
    assert links and all(link == ["https:", "_blank", "noopener noreferrer nofollow"] for link in links)
    assert "<script>window.hacked = 1</script>" in body.inner_text()  # shown as it was written
    assert "Image: pixel" in body.inner_text()


def test_markdown_that_is_not_an_attack_is_rendered(tab: Tab, engine: ScriptedEngine) -> None:
    engine.reply = (
        "# Title\n\n- [x] done\n- *open*\n\n```python\ndef f(): return 'x'\n```\n\n"
        "| a | b |\n|:--|--:|\n| 1 | 2 |\n\n3. three\n\n> quote\n\n[link](https://example.org)\n"
    )
    ask(tab, "Hello")
    wait_for_answer(tab)
    body = tab.locator(".assistant .body")
    assert body.locator("h1").inner_text() == "Title"
    assert "☑ done" in body.locator("ul").inner_text()
    assert body.locator(".hljs-keyword").first.inner_text() == "def"
    assert body.locator("td[align=right]").inner_text() == "2"
    assert body.locator("ol").get_attribute("start") == "3"
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.get_by_role("button", name="Copy code").click()
    tab.get_by_role("button", name="Copy code", exact=True).filter(has_text="Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == "def f(): return 'x'"


def test_a_huge_table_does_not_block_the_page(tab: Tab, engine: ScriptedEngine) -> None:
    row = "|" + "|".join(f" cell {column} " for column in range(12)) + "|\n"
    engine.reply = row + "|---" * 12 + "|\n" + row * 600
    ask(tab, "Hello")
    wait_for_answer(tab)
    assert tab.locator(".assistant tr").count() == 601
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("text", [">" * 5000 + " deep", "- " * 3000 + "deep", "**a_b*c_" * 9000 + "deep"])
def test_markdown_that_would_take_minutes_or_too_much_memory_is_shown_as_text(
    tab: Tab, engine: ScriptedEngine, text: str
) -> None:
    engine.reply = text
    ask(tab, "Hello")
    tab.locator(".assistant [data-action=retry]").wait_for()
    assert tab.locator(".assistant .body").inner_text() == text
    engine.reply = "**next**"
    ask(tab, "Again")
    tab.locator(".assistant strong", has_text="next").wait_for()


def test_the_policy_stops_scripts_that_a_bug_would_let_through(tab: Tab, problems: list[str]) -> None:
    """A second wall: neither inline scripts, nor other servers, nor text that becomes HTML without DOMPurify."""
    assert tab.evaluate("fetch('https://example.org').then(() => 'sent', () => 'stopped')") == "stopped"
    script = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    for attempt in (script, "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')"):
        with pytest.raises(playwright.Error, match="Trusted"):
            tab.evaluate(attempt)
    assert tab.evaluate("window.hacked") is None
    problems.clear()


# --- people


def test_everything_is_reached_by_keyboard(tab: Tab, engine: ScriptedEngine) -> None:
    assert focused(tab) == "question"
    tab.keyboard.type("one")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("two")
    tab.keyboard.press("Enter")
    wait_for_answer(tab)
    assert engine.requests[0].prompt.messages[-1]["content"] == "one\ntwo"  # type: ignore[union-attr]
    tab.keyboard.press("Alt+r")
    tab.locator(".assistant .versions").wait_for()
    wait_for_answer(tab)
    tab.keyboard.press("Alt+Comma")
    tab.locator(".assistant .versions", has_text="1/2").wait_for()
    tab.keyboard.press("ArrowUp")
    assert tab.locator(".editor textarea").is_visible()
    tab.keyboard.press("Escape")
    tab.keyboard.press("Escape")
    tab.keyboard.press("/")
    assert focused(tab) == "search"
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.textContent").startswith("one")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert tab.locator("#chat-menu").is_visible()
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.textContent") == "Export as Markdown"
    tab.keyboard.press("Escape")
    tab.keyboard.press("?")
    assert tab.locator("#shortcuts").is_visible()
    tab.keyboard.press("Escape")
    tab.keyboard.press("Alt+n")
    assert focused(tab) == "question"
    assert tab.locator(".message").count() == 0


def test_every_control_has_a_name_and_every_text_has_contrast(open_tab: OpenTab, url: str) -> None:
    for scheme in ("light", "dark"):
        tab = open_tab(url, color_scheme=scheme)
        ask(tab, "Hello")
        wait_for_answer(tab)
        controls = tab.locator("button, input:not([hidden]), select, textarea, [role=region], nav, dialog")
        nameless = controls.evaluate_all(
            """all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent ||
            e.ariaLabelledByElements?.length)).map(e => e.outerHTML)"""
        )
        assert nameless == []
        colors = tab.evaluate(
            """["--text", "--muted", "--accent", "--danger", "--code-comment", "--code-keyword", "--code-string",
            "--code-number", "--code-title"].flatMap(text => ["--page", "--side", "--sunken", "--raised"].map(back => {
            const style = getComputedStyle(document.documentElement);
            return [text, style.getPropertyValue(text).trim(), back, style.getPropertyValue(back).trim()]; }))"""
        )
        for text, front, back, behind in colors:
            assert contrast(front, behind) >= 4.5, (scheme, text, back)


def contrast(first: str, second: str) -> float:
    """The contrast of two colors, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)


def test_the_theme_follows_the_system_until_it_is_switched(open_tab: OpenTab, url: str) -> None:
    tab = open_tab(url, color_scheme="dark")

    def background() -> str:
        color: str = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        return color

    dark = background()
    assert max(map(int, re.findall(r"\d+", dark))) < 60
    tab.locator("#switch-theme").click()
    assert background() == "rgb(255, 255, 255)"
    tab.reload()
    assert background() == "rgb(255, 255, 255)"
    tab.locator("#switch-theme").click()
    assert background() == dark


def test_the_page_fits_a_phone(open_tab: OpenTab, url: str, engine: ScriptedEngine) -> None:
    engine.reply = (
        "| a | b | c |\n|--|--|--|\n" + f"| {'wide ' * 9} | {'w' * 90} | x |\n\n```\n{'long ' * 60}\n```\n" + "y" * 200
    )
    tab = open_tab(url, width=360, height=640, is_mobile=True, has_touch=True)
    assert not tab.locator("#new-chat").is_visible()
    ask(tab, "x" * 200)
    wait_for_answer(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    outside = tab.evaluate(
        "[...document.querySelectorAll('.body')].filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert outside == 0
    buttons = tab.locator("header button:visible, header select, footer button:visible")
    small = buttons.evaluate_all("all => all.filter(e => e.getBoundingClientRect().height < 36).length")
    assert small == 0
    tab.locator("#show-menu").tap()
    tab.locator("#chat-list a", has_text="xxx").wait_for()
    tab.locator("#new-chat").tap()
    tab.locator("#new-chat").wait_for(state="hidden")
    assert tab.locator(".message").count() == 0


def test_the_page_is_chinese_for_a_chinese_browser(open_tab: OpenTab, url: str) -> None:
    tab = open_tab(url, locale="zh-CN")
    assert tab.evaluate("document.documentElement.lang") == "zh"
    assert tab.locator("#new-chat span").inner_text() == translate("New chat", "zh")
    tab.locator("#search").fill("龙")
    found = tab.locator("#chat-list .empty")
    found.filter(has_text="龙").wait_for()
    assert found.inner_text() == translate("No message contains “{words}”.", "zh").format(words="龙")
    tab.locator("#search").fill("")
    tab.keyboard.press("Escape")
    tab.locator("#show-settings").click()
    tab.locator("#language-choice").select_option("en")
    tab.locator("#new-chat", has_text="New chat").wait_for()


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, folders: Folders, engine: ScriptedEngine) -> None:
    with serve_host(ScriptedHost(engine), folders=folders, api_keys=("secret",)) as url:
        tab = browser.new_context().new_page()
        tab.goto(url)
        for key in ("wrong", "secret"):
            tab.locator("#prompt[open]").wait_for()
            tab.locator("#prompt-input").fill(key)
            tab.keyboard.press("Enter")
        tab.locator("#chat-list", has_text="No chats yet.").wait_for()
        ask(tab, "Hello")
        wait_for_answer(tab)
        tab.reload()
        tab.locator(".assistant", has_text="Paris").wait_for()
        assert tab.evaluate("JSON.stringify(localStorage)").count("secret") == 0
        assert tab.evaluate("document.cookie") == ""
        tab.context.close()


def test_the_key_in_the_address_opens_the_page_and_disappears(
    browser: Any, folders: Folders, engine: ScriptedEngine
) -> None:
    with serve_host(ScriptedHost(engine), folders=folders, page_key="page-secret") as url:
        tab = browser.new_context().new_page()
        tab.goto(f"{url}/#key=page-secret")
        tab.locator("#chat-list", has_text="No chats yet.").wait_for()
        assert "secret" not in tab.url
        assert not tab.locator("#prompt[open]").count()
        tab.context.close()
