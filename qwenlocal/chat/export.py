"""Export a thread as Markdown, JSON or an HTML page."""

from __future__ import annotations

import html
import json
from datetime import datetime, timezone

from qwenlocal.chat.thread import USER, Message, Thread
from qwenlocal.formatting import format_model_name, format_time

FORMATS = ("md", "json", "html")
_STYLE = (
    "body{max-width:46rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}"
    "pre{overflow-x:auto;padding:.7rem;background:#8881;border-radius:.4rem}"
    "section{margin:1.2rem 0}h2{font-size:.85rem;color:#777;margin:0}table{border-collapse:collapse}"
    "td,th{border:1px solid #8885;padding:.2rem .5rem}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
)


def export_thread(thread: Thread, title: str, model: str, format: str) -> str:
    """Return the thread in one of the `FORMATS`."""
    if format == "json":
        return export_json(thread, title, model)
    return export_html(thread, title) if format == "html" else export_markdown(thread, title)


def export_markdown(thread: Thread, title: str) -> str:
    """Return the path as Markdown, a heading for each message. Texts are copied as they are: most are Markdown."""
    parts = [f"# {title}"]
    if thread.system:
        parts.append(f"*System prompt:* {thread.system}")
    parts += [f"## {_heading(message)}\n\n{message.text.rstrip()}" for message in thread.path]
    return "\n\n".join(parts) + "\n"


def export_json(thread: Thread, title: str, model: str) -> str:
    """
    Return the thread as JSON: the path as chat APIs represent it ("messages"), and all versions ("tree").

    Each message of the tree has its number, its parent's number (0: none), and the reason why an answer ended ("why").
    """
    tree = [
        {
            "number": message.number,
            "parent": message.parent,
            **message.to_dict(),
            "why": message.finish_reason,
            "model": message.model,
            "pinned": message.pinned,
            "dropped": message.dropped,
            "created": datetime.fromtimestamp(message.created, timezone.utc).isoformat(timespec="seconds"),
        }
        for message in thread.messages.values()
    ]
    data = {"title": title, "model": model, "messages": thread.prompt_messages, "tree": tree}
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def export_messages(thread: Thread, model: str) -> str:
    """Return the path as JSON, {"model", "messages"} as in chat APIs."""
    data = {"model": model, "messages": thread.prompt_messages}
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def export_html(thread: Thread, title: str) -> str:
    """Return the path as a self-contained HTML page. HTML in messages is escaped."""
    from markdown_it import MarkdownIt

    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    sections = [f"<section><h2>{html.escape(_heading(m))}</h2>{render(m.text)}</section>" for m in thread.path]
    system = f"<section><h2>System prompt</h2>{render(thread.system)}</section>" if thread.system else ""
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{system}{''.join(sections)}</body></html>\n"
    )


def _heading(message: Message) -> str:
    author = "You" if message.role == USER else format_model_name(message.model) or "Model"
    return f"{author}, {format_time(message.created)}"
