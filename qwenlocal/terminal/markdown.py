"""
Markdown as it comes, as lines for a terminal: what is finished once, what may still change again and again.

A block (paragraph, list, table, …) is finished when another one begins; a line of code when the next one does. Parsing
is markdown-it's, laying out is rich's; both see one block at a time, so an answer of any length costs the same.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenlocal.terminal.ansi import harmless
from qwenlocal.terminal.highlight import Highlighter

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console
    from rich.segment import Segment

_STYLES = {  # the terminal's own colours
    "markdown.code": "cyan",
    "markdown.code_block": "",
    "markdown.h1": "bold underline",
    "markdown.h2": "bold underline",
    "markdown.h3": "bold",
    "markdown.h4": "bold",
    "markdown.h5": "bold",
    "markdown.h6": "bold dim",
    "markdown.h7": "dim",
    "markdown.hr": "dim",
    "markdown.item.bullet": "bold",
    "markdown.item.number": "bold",
    "markdown.block_quote": "dim",
    "markdown.link": "underline",
    "markdown.link_url": "dim",
    "markdown.table.border": "dim",
    "markdown.table.header": "bold",
}
_END_THEMSELVES = ("fence", "heading_open", "hr")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_OPEN_MARK = re.compile(r"(\*{1,3}|_{1,3}|~~|`+)$")
# Chinese and Japanese lines may be broken between letters, but not before a closing mark or behind an opening one. rich
# breaks at white space only, so a control character that counts as such marks these places, and is taken out again.
_WIDE = "\u2e80-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_CLOSING, _OPENING = "、。〉》」』】〕！），．：；？］｝”’…", "〈《「『【〔（［｛“‘"
_BREAK = "\x1f"
_BREAKS = re.compile(
    f"(?<=[{_WIDE}])(?<![{_OPENING}])(?=[{_WIDE}\\w])(?![{_CLOSING}])|(?<=[^\\W_])(?=[{_WIDE}])(?![{_CLOSING}])"
)
_CODE = re.compile(r"`[^`]*`")
_MARKS = {  # innermost first: marks with a letter beside them, which a list's bullet has not
    "*": re.compile(r"(?<!\*)\*(?=[^\s*])|(?<=[^\s*])\*(?!\*)"),
    "**": re.compile(r"\*\*(?=\S)|(?<=\S)\*\*"),
    "~~": re.compile(r"~~(?=\S)|(?<=\S)~~"),
}


@dataclass(frozen=True)
class Look:
    """How wide lines are, and whether they have colours; without, there are still bold and underlined words."""

    width: int
    colour: bool


@dataclass(frozen=True)
class Lines:
    """Lines with escape sequences for their looks: `finished` ones since the last time, and those `open` now."""

    finished: Sequence[str]
    open: Sequence[str]


class MarkdownStream:
    """
    Feed it text, ask it for lines.

    After `feed("# A\\n\\nb")`, `lines(Look(80, False))` has the heading and an empty line finished, and "b" open.
    """

    def __init__(self) -> None:
        self._rest = ""  # from the beginning of the block that is not finished
        self._is_first = True
        self._code: _Code | None = None

    def feed(self, text: str) -> None:
        """More of the text; control characters in it are made visible."""
        self._rest += harmless(text).replace("\t", "    ")

    def lines(self, look: Look) -> Lines:
        """What became finished since the last call, and how the rest looks now."""
        finished = self._finished_blocks(look, ended=False)
        open_, more = self._open(look)
        return Lines([*finished, *more], open_)

    def end(self, look: Look) -> Lines:
        """No more text comes."""
        finished = [*self._finished_blocks(look, ended=True), *self._finish(self._rest, look)]
        self._rest = ""
        return Lines(finished, [])

    def _finished_blocks(self, look: Look, *, ended: bool) -> list[str]:
        finished: list[str] = []
        while (cut := _first_block(self._rest, ended=ended)) is not None:
            block, self._rest = self._rest[:cut], self._rest[cut:]
            finished += self._finish(block, look)
        return finished

    def _open(self, look: Look) -> tuple[list[str], list[str]]:
        """The open block's lines that may change, and those of its code that will not."""
        if not self._rest.strip():
            return [], []
        fence = _fence(self._rest)
        if fence is None:
            return self._spaced(_laid_out(_completed(self._rest), look)), []
        begun = self._begin_code(fence, look)
        finished, last = self._code.take(fence.content, whole=False) if self._code else ([], [])
        return last, [*begun, *finished]

    def _begin_code(self, fence: Token, look: Look) -> list[str]:
        """The line above code, once its language is known: the line of the fence has ended."""
        if self._code is not None or "\n" not in self._rest.lstrip("\n"):
            return []
        self._code = _Code(fence.info, look)
        lines = self._spaced([self._code.rule])
        self._is_first = False
        return lines

    def _finish(self, block: str, look: Look) -> list[str]:
        if not block.strip():
            return []
        fence = _fence(block)
        if fence is None:
            lines = self._spaced(_laid_out(block, look))
        else:
            begun = self._begin_code(fence, look)
            code = self._code or _Code(fence.info, look)
            finished, _ = code.take(fence.content, whole=True)
            lines, self._code = [*begun, *finished, code.end], None
        self._is_first = False
        return lines

    def _spaced(self, lines: Sequence[str]) -> list[str]:
        return [*([] if self._is_first else [""]), *lines]


class _Code:
    """Lines of a fenced block, each coloured once."""

    def __init__(self, info: str, look: Look) -> None:
        self._highlighter, self._taken = Highlighter(info, colour=look.colour), 0
        name = info.strip().split(" ")[0]
        width = max(8, min(look.width, 60))
        label = f"── {name} " if name else ""
        self.rule = _dim(label + "─" * max(2, width - len(label)))
        self.end = _dim("─" * width)

    def take(self, content: str, *, whole: bool) -> tuple[list[str], list[str]]:
        """The lines that are new and finished, and the one that is not."""
        lines = content.split("\n")
        last = lines.pop()
        finished = [self._highlighter.line(line) for line in lines[self._taken :]]
        self._taken = max(self._taken, len(lines))
        if whole:
            return [*finished, *([self._highlighter.line(last)] if last else [])], []
        return finished, [self._highlighter.peek(last)] if last else []


def warm_up() -> None:
    """Have the libraries imported that lay text out: half a second that an answer need not wait for."""
    MarkdownStream().end(Look(80, colour=True))
    _laid_out("- a\n\n|b|\n|-|", Look(80, colour=True))
    Highlighter("python", colour=True).line("x = 1")


def _first_block(text: str, *, ended: bool) -> int | None:
    """
    Where the second block begins, if there is one: the first is finished then.

    As long as text comes, the second one's first line must be whole: "#" may become a heading or a word, and "2" the
    next item of a list. Behind what ends by itself (code, headings, lines) anything is another block.
    """
    blocks = [token for token in _blocks(text) if token.map]
    starts = [token.map[0] for token in blocks if token.map]
    if len(starts) < 2:
        return None
    place = 0
    for _ in range(starts[1]):
        place = text.index("\n", place) + 1
    return place if ended or blocks[0].type in _END_THEMSELVES or "\n" in text[place:].lstrip("\n") else None


def _blocks(text: str) -> list[Token]:
    return [token for token in _parser().parse(text) if token.level == 0 and token.nesting >= 0]


def _fence(text: str) -> Token | None:
    """The fenced code that a block is, None for all others."""
    blocks = _blocks(text)
    return blocks[0] if blocks and blocks[0].type == "fence" else None


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _completed(text: str) -> str:
    """
    A block whose last marks are not closed yet, with them closed: "a **b" looks like "a **b**" will.

    Marks at the very end, which may open or close something, are not shown until it is known.
    """
    body, line_break, last = text.rpartition("\n")
    last = _OPEN_MARK.sub("", last)
    if last.count("`") % 2:
        return f"{body}{line_break}{last}`"
    prose = _CODE.sub("", last)
    for mark, opened in _MARKS.items():
        if len(opened.findall(prose)) % 2 and not prose.endswith(" "):
            last += mark
    return f"{body}{line_break}{last}"


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m"


@functools.cache
def _element() -> Any:
    """rich's Markdown, with headings at the left, and numbers of lists with a dot."""
    from rich.console import ConsoleOptions, RenderResult
    from rich.markdown import Heading, ListItem, Markdown
    from rich.segment import Segment

    class LeftHeading(Heading):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            self.text.justify = "left"
            yield self.text

    class DottedItem(ListItem):
        def render_number(
            self, console: Console, options: ConsoleOptions, number: int, last_number: int
        ) -> RenderResult:
            width = len(str(last_number)) + 2
            inside = options.update(width=max(1, options.max_width - width))
            style = console.get_style("markdown.item.number")
            lead = Segment(f"{number}. ".rjust(width), style)
            for line in console.render_lines(self.elements, inside, style=self.style):
                yield lead
                yield from line
                yield Segment("\n")
                lead = Segment(" " * width)

    return type(
        "Plain",
        (Markdown,),
        {"elements": {**Markdown.elements, "heading_open": LeftHeading, "list_item_open": DottedItem}},
    )


@functools.lru_cache(maxsize=4)
def _console(look: Look) -> Console:
    from rich.console import Console
    from rich.theme import Theme

    return Console(
        file=io.StringIO(),
        width=look.width,
        force_terminal=True,
        color_system="standard",
        theme=Theme(_STYLES),
        highlight=False,
        legacy_windows=False,
    )


def _laid_out(block: str, look: Look) -> list[str]:
    console = _console(look)
    element = _element()(_BREAKS.sub(_BREAK, block), hyperlinks=False)
    lines = console.render_lines(element, console.options, pad=False)
    found = ["".join(_ansi(part, look) for part in line if not part.control) for line in lines]
    found = [line.replace(_BREAK, "").rstrip() for line in found]
    while found and _is_blank(found[-1]):
        found.pop()
    while found and _is_blank(found[0]):
        found.pop(0)
    return found


def _is_blank(line: str) -> bool:
    return not _ESCAPES.sub("", line).strip()


def _ansi(part: Segment, look: Look) -> str:
    from rich.color import ColorSystem

    if part.style is None:
        return part.text
    style = part.style if look.colour else part.style.without_color
    return style.render(part.text, color_system=ColorSystem.STANDARD)
