"""Text for people: byte counts, one-line excerpts, column widths."""

from __future__ import annotations

import re
from collections.abc import Iterable

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def format_bytes(size: float) -> str:
    """`format_bytes(491400064)` is "491 MB"; units are powers of 1000, as disks and hubs count."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def format_gib(size: float) -> str:
    """`format_gib(805306368)` is "0.75 GiB", for memory; below a tenth of a GiB in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.1f} MiB"


def format_shape(shape: Iterable[int]) -> str:
    """`format_shape((1024, 2816))` is "1024 x 2816"."""
    return " x ".join(map(str, shape))


def shorten(text: str, limit: int = 40) -> str:
    """Collapse white space and cut to `limit` characters: `shorten("a\\n b c", 4)` is "a b…"."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


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
