"""Text for people: counts, byte counts, times, model names, one-line excerpts, column widths."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qwenlocal.i18n import mark, tr

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_LONG_WORD = re.compile(r"[!-.0-\[\]-~]{151,}|\S{1000,}")  # the first without slashes and backslashes
_UNITS = {
    "character": (mark("1 character"), mark("{count:,} characters")),
    "chat": (mark("1 chat"), mark("{count:,} chats")),
    "line": (mark("1 line"), mark("{count:,} lines")),
    "message": (mark("1 message"), mark("{count:,} messages")),
    "token": (mark("1 token"), mark("{count:,} tokens")),
    "turn": (mark("1 turn"), mark("{count:,} turns")),
    "word": (mark("1 word"), mark("{count:,} words")),
}


def format_count(count: int, unit: str) -> str:
    """`format_count(1200, "token")` is "1,200 tokens", `format_count(1, "token")` "1 token", both translated."""
    one, other = _UNITS[unit]
    return tr(one) if count == 1 else tr(other, count=count)


def format_quantity(count: int, noun: str, plural: str = "") -> str:
    """`format_quantity(1, "tensor")` is "1 tensor", `format_quantity(2, "entry", "entries")` "2 entries" (English)."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def join_sentences(*sentences: str) -> str:
    """Join sentences with spaces, after a Chinese full stop without; empty ones are left out."""
    text = ""
    for sentence in filter(None, sentences):
        text += f"{'' if not text or text.endswith('。') else ' '}{sentence}"
    return text


def format_model_name(name: str) -> str:
    """`format_model_name("/models/tiny.gguf")` is "tiny.gguf"; names other than paths stay."""
    return Path(name).name if Path(name).is_absolute() else name


def format_bytes(size: float) -> str:
    """`format_bytes(491400064)` is "491 MB"; units are powers of 1000, as disks and hubs count."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    if size >= 1e6:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e3:.0f} kB" if size >= 1e3 else f"{size:.0f} B"


def format_gib(size: float) -> str:
    """`format_gib(805306368)` is "0.75 GiB", for memory; below a tenth of a GiB in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.1f} MiB"


def format_percent(share: float) -> str:
    """`format_percent(0.0747)` is "7.47%", `format_percent(3.1e-8)` "3.1e-06%"."""
    return f"{100 * share:.3g}%"


def format_shape(shape: Iterable[int]) -> str:
    """`format_shape((1024, 2816))` is "1024 x 2816"."""
    return " x ".join(map(str, shape))


def format_time(seconds: float) -> str:
    """Format seconds since 1970 as the local "2024-02-05 12:30"."""
    from datetime import datetime

    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def format_duration(seconds: float) -> str:
    """`format_duration(95)` is "1 min 35 s", `format_duration(7500)` "2 h 5 min"."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min {whole % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shorten(text: str, limit: int = 40) -> str:
    """Collapse white space and cut to `limit` characters: `shorten("a\\n b c", 4)` is "a b…"."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def brief_repr(value: object) -> str:
    """`brief_repr("x")` is "'x'"; values from files may be long, so it is cut to 80 characters."""
    return shorten(repr(value), 80)


def cut_long_words(text: str) -> str:
    """
    Cut words of more than 150 ASCII characters, as only damaged or malicious input has them.

    Paths stay whole, and so do Chinese sentences, unless they have 1,000 characters.
    """
    return _LONG_WORD.sub(lambda match: f"{match[0][:60]}…", text)


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, a terminal's bytes that are not UTF-8, by question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def display_width(text: str) -> int:
    """Count the terminal columns of a line: color escapes take none, Chinese characters two."""
    text = _ESCAPES.sub("", text)
    if text.isascii():
        return len(text)
    import wcwidth  # 50 ms, only for text that is not ASCII

    width: int = wcwidth.wcswidth(text)
    return width if width >= 0 else len(text)


def pad(text: str, width: int) -> str:
    """Append spaces until `text` is `width` columns wide."""
    return text + " " * (width - display_width(text))
