"""
Take docs/page.png: a screenshot of the page, with answers of the starter, in Chromium.

    .venv/bin/python tools/page_picture.py        (first: make setup-dev, qwenlocal pull starter)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / ".venv" / "bin" / "qwenlocal"
QUESTIONS = [
    "法国的首都是哪里？",
    "A Markdown table of the capitals of France, Japan and Kenya. Only the table.",
    "Write a Python function that counts the words of a text, and show how to call it.",
]


def main() -> None:
    installed = json.loads(subprocess.run([PROGRAM, "list", "--json"], capture_output=True, check=True).stdout)
    starter = next(model["path"] for model in installed if model["name"] == "starter")
    with tempfile.TemporaryDirectory() as home:
        model = Path(home) / "starter.gguf"
        model.symlink_to(starter)
        command = [PROGRAM, "serve", model, "--port", "0", "-c", "4096"]
        environment = {**os.environ, "QWENLOCAL_HOME": home, "LANGUAGE": "en"}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
            try:
                take_picture(find_address(server))
            finally:
                server.terminate()


def find_address(server: subprocess.Popen[str]) -> str:
    """Return the address of the page, with its key, that the server prints when the model is loaded."""
    assert server.stderr
    for line in server.stderr:
        if match := re.search(r"Web page: (http://\S+)", line):
            return match[1]
    raise SystemExit("the server has ended")


def take_picture(address: str) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 700}, color_scheme="light", locale="en")
        page.goto(address)
        page.locator("body:not([aria-busy])").wait_for()
        for question in QUESTIONS:
            ask(page, question)
        page.locator("#scroll").evaluate("element => element.scrollTop = 0")
        page.screenshot(path=ROOT / "docs" / "page.png")
        browser.close()


def ask(page: Page, question: str) -> None:
    """Ask a question in a new chat, and wait for the answer."""
    page.keyboard.press("Alt+n")
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    page.locator(".assistant [data-action=retry]").wait_for(timeout=120_000)


if __name__ == "__main__":
    main()
