"""A thread as a file for people and programs: Markdown, JSON, or a page of HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from datetime import datetime, timezone

from qwenlocal.chat.thread import USER, Message, Thread

_NAMES: Mapping[bool, str] = {True: "You", False: "Model"}
_STYLE = (
    "body{max-width:46rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}"
    "pre{overflow-x:auto;padding:.7rem;background:#8881;border-radius:.4rem}"
    "section{margin:1.2rem 0}h2{font-size:.85rem;color:#777;margin:0}table{border-collapse:collapse}"
    "td,th{border:1px solid #8885;padding:.2rem .5rem}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
)


def as_markdown(thread: Thread, title: str) -> str:
    """A heading for each message; what was said stands as it is, since it is Markdown mostly."""
    parts = [f"# {title}"]
    if thread.system:
        parts.append(f"*System prompt:* {thread.system}")
    parts += [f"## {_heading(message)}\n\n{message.text.rstrip()}" for message in thread.path]
    return "\n\n".join(parts) + "\n"


def as_json(thread: Thread, title: str, model: str) -> str:
    """
    What was read, in the form that chat APIs use ("messages"), and every version that there was ("tree").

    Each of the tree has its number, its parent's (0: none), and how an answer ended.
    """
    system = [{"role": "system", "content": thread.system}] if thread.system else []
    tree = [
        {
            "number": message.number,
            "parent": message.parent,
            "role": message.role,
            "content": message.text,
            "why": message.why,
            "model": message.model,
            "pinned": message.pinned,
            "dropped": message.dropped,
            "created": _iso(message.created),
        }
        for message in thread.messages.values()
    ]
    messages = [*system, *({"role": message.role, "content": message.text} for message in thread.path)]
    data = {"title": title, "model": model, "messages": messages, "tree": tree}
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def as_html(thread: Thread, title: str) -> str:
    """A page that stands alone; HTML that somebody typed or the model said is shown, not obeyed."""
    from markdown_it import MarkdownIt

    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    sections = [f"<section><h2>{html.escape(_heading(m))}</h2>{render(m.text)}</section>" for m in thread.path]
    system = f"<section><h2>System prompt</h2>{render(thread.system)}</section>" if thread.system else ""
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{system}{''.join(sections)}</body></html>\n"
    )


def _heading(message: Message) -> str:
    who = message.model if message.role != USER and message.model else _NAMES[message.role == USER]
    return f"{who}, {datetime.fromtimestamp(message.created):%Y-%m-%d %H:%M}"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
