"""
Streaming Markdown, rendered to terminal lines: finished lines are final, pending lines may still change.

A block (paragraph, list, table, …) is finished when the next one begins, a line of code when it ends. markdown-it
parses and rich renders one block at a time, so the cost of an update does not depend on the length of the answer.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenlocal.terminal.ansi import dim, escape_controls
from qwenlocal.terminal.highlight import Highlighter
from qwenlocal.terminal.wrapping import BREAK_POINTS

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console
    from rich.segment import Segment

_STYLES = {  # in the terminal's own colors
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
_SELF_CLOSING = ("fence", "heading_open", "hr")
_TRAILING_MARK = re.compile(r"(\*{1,3}|_{1,3}|~~|`+)$")
# rich breaks only at white space, so a control character that counts as white space marks the other places where text
# may break; it is removed afterwards.
_BREAK_MARK = "\x1f"
_ANY_WIDTH = 100_000
_INLINE_CODE = re.compile(r"`[^`]*`")
_EMPHASIS = {  # innermost first; marks that touch a letter, unlike the bullet of a list
    "*": re.compile(r"(?<!\*)\*(?=[^\s*])|(?<=[^\s*])\*(?!\*)"),
    "**": re.compile(r"\*\*(?=\S)|(?<=\S)\*\*"),
    "~~": re.compile(r"~~(?=\S)|(?<=\S)~~"),
}


@dataclass(frozen=True)
class RenderOptions:
    """Line width in columns, and whether to use colors; bold and underlined text does not need them."""

    width: int
    color: bool


@dataclass(frozen=True)
class RenderedLines:
    """Lines with escape sequences for their style: newly `finished` ones, and all that are `pending`."""

    finished: Sequence[str]
    pending: Sequence[str]


class MarkdownStream:
    """
    Renders Markdown that arrives in pieces.

    After `feed("# A\\n\\nb")`, `render(RenderOptions(80, False))` has the heading and an empty line finished, and "b"
    pending.
    """

    def __init__(self) -> None:
        self._rest = ""  # from the start of the first block that is not finished
        self._is_first = True
        self._code: _CodeBlock | None = None

    def feed(self, text: str) -> None:
        """Append text; its control characters are made visible."""
        self._rest += escape_controls(text).replace("\t", "    ")

    def render(self, options: RenderOptions) -> RenderedLines:
        """Return the lines finished since the last call, and the pending ones as they look now."""
        finished = self._pop_finished_blocks(options, at_end=False)
        pending, code_lines = self._render_pending(options)
        return RenderedLines([*finished, *code_lines], pending)

    def finish(self, options: RenderOptions) -> RenderedLines:
        """Return the remaining lines, all finished: no more text follows."""
        finished = [*self._pop_finished_blocks(options, at_end=True), *self._finish_block(self._rest, options)]
        self._rest = ""
        return RenderedLines(finished, [])

    def _pop_finished_blocks(self, options: RenderOptions, *, at_end: bool) -> list[str]:
        finished: list[str] = []
        while (end := _end_of_first_block(self._rest, at_end=at_end)) is not None:
            block, self._rest = self._rest[:end], self._rest[end:]
            finished += self._finish_block(block, options)
        return finished

    def _render_pending(self, options: RenderOptions) -> tuple[list[str], list[str]]:
        """Return the lines of the last block that may change, and those of its code that are final."""
        if not self._rest.strip():
            return [], []
        fence = _parse_fence(self._rest)
        if fence is None:
            return self._with_separator(_render_block(_close_marks(self._rest), options)), []
        opening = self._begin_code(fence, options)
        finished, last = self._code.take_lines(fence.content, is_complete=False) if self._code else ([], [])
        return last, [*opening, *finished]

    def _begin_code(self, fence: Token, options: RenderOptions) -> list[str]:
        """Return the rule above a code block once the line of the fence, and so the language, is complete."""
        if self._code is not None or "\n" not in self._rest.lstrip("\n"):
            return []
        self._code = _CodeBlock(fence.info, options)
        lines = self._with_separator([self._code.top_rule])
        self._is_first = False
        return lines

    def _finish_block(self, block: str, options: RenderOptions) -> list[str]:
        if not block.strip():
            return []
        fence = _parse_fence(block)
        if fence is None:
            lines = self._with_separator(_render_block(block, options))
        else:
            opening = self._begin_code(fence, options)
            code = self._code or _CodeBlock(fence.info, options)
            finished, _ = code.take_lines(fence.content, is_complete=True)
            lines, self._code = [*opening, *finished, code.bottom_rule], None
        self._is_first = False
        return lines

    def _with_separator(self, lines: Sequence[str]) -> list[str]:
        """Put an empty line before every block except the first."""
        return [*([] if self._is_first else [""]), *lines]


class _CodeBlock:
    """The lines of a fenced code block; each is highlighted once."""

    def __init__(self, info: str, options: RenderOptions) -> None:
        self._highlighter, self._taken = Highlighter(info, color=options.color), 0
        name = info.strip().split(" ")[0]
        width = max(8, min(options.width, 60))
        label = f"── {name} " if name else ""
        self.top_rule = dim(label + "─" * max(2, width - len(label)))
        self.bottom_rule = dim("─" * width)

    def take_lines(self, content: str, *, is_complete: bool) -> tuple[list[str], list[str]]:
        """Return the new finished lines, and the last one if it is not finished."""
        lines = content.split("\n")
        last = lines.pop()
        finished = [self._highlighter.highlight_line(line) for line in lines[self._taken :]]
        self._taken = max(self._taken, len(lines))
        if is_complete:
            return [*finished, *([self._highlighter.highlight_line(last)] if last else [])], []
        return finished, [self._highlighter.preview_line(last)] if last else []


def warm_up() -> None:
    """Import the rendering libraries (0.5 s), so that the first answer does not have to wait for them."""
    options = RenderOptions(80, color=True)
    MarkdownStream().finish(options)
    _render_block("- a\n\n|b|\n|-|", options)
    Highlighter("python", color=True).highlight_line("x = 1")


def _end_of_first_block(text: str, *, at_end: bool) -> int | None:
    """
    Return the position of the second block; None if there is none, or if the first may still grow.

    Unless `at_end`, the first line of the second block must be complete: "#" may become a heading or a word, and "2"
    the next item of a list. After a block that closes itself (code, heading, rule) anything starts a new block.
    """
    blocks = [token for token in _parse_blocks(text) if token.map]
    starts = [token.map[0] for token in blocks if token.map]
    if len(starts) < 2:
        return None
    position = 0
    for _ in range(starts[1]):
        position = text.index("\n", position) + 1
    is_finished = at_end or blocks[0].type in _SELF_CLOSING or "\n" in text[position:].lstrip("\n")
    return position if is_finished else None


def _parse_blocks(text: str) -> list[Token]:
    return [token for token in _parser().parse(text) if token.level == 0 and token.nesting >= 0]


def find_code_blocks(text: str) -> list[str]:
    """Return the contents of all blocks of code, also of those in lists, and of a last one that was cut off."""
    return [token.content for token in _parser().parse(text) if token.type in ("fence", "code_block")]


def _parse_fence(text: str) -> Token | None:
    """Return the fence token if the first block is fenced code."""
    blocks = _parse_blocks(text)
    return blocks[0] if blocks and blocks[0].type == "fence" else None


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _close_marks(text: str) -> str:
    """
    Close the emphasis marks that are still open: "a **b" looks as "a **b**" will.

    Marks at the very end, which may open or close something, are hidden until more text follows.
    """
    body, line_break, last = text.rpartition("\n")
    last = _TRAILING_MARK.sub("", last)
    if last.count("`") % 2:
        return f"{body}{line_break}{last}`"
    prose = _INLINE_CODE.sub("", last)
    for mark, pattern in _EMPHASIS.items():
        if len(pattern.findall(prose)) % 2 and not prose.endswith(" "):
            last += mark
    return f"{body}{line_break}{last}"


@functools.cache
def _markdown_class() -> Any:
    """Subclass rich's Markdown: headings left-aligned, numbered items with a dot, tables whose words stay whole."""
    from rich.console import ConsoleOptions, RenderResult
    from rich.markdown import Heading, ListItem, Markdown, TableElement
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

    class LeftHeading(Heading):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            self.text.justify = "left"
            yield self.text

    class NumberedItem(ListItem):
        def render_number(
            self, console: Console, options: ConsoleOptions, number: int, last_number: int
        ) -> RenderResult:
            width = len(str(last_number)) + 2
            inner = options.update(width=max(1, options.max_width - width))
            style = console.get_style("markdown.item.number")
            prefix = Segment(f"{number}. ".rjust(width), style)
            for line in console.render_lines(self.elements, inner, style=self.style):
                yield prefix
                yield from line
                yield Segment("\n")
                prefix = Segment(" " * width)

    class NarrowTable(TableElement):
        """A table that breaks no words; if they do not fit, each row becomes lines of `heading: cell`."""

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            (table,) = super().__rich_console__(console, options)
            assert isinstance(table, Table)
            unlimited = options.update(max_width=_ANY_WIDTH)
            whole = console.measure(table, options=unlimited)
            if whole.minimum > options.max_width:
                yield self._list_rows()
                return
            if whole.maximum > options.max_width:  # rich would shorten the words of wide columns
                spare, wanted = options.max_width - whole.minimum, whole.maximum - whole.minimum
                for column in table.columns:
                    cells = [console.measure(cell, options=unlimited) for cell in (column.header, *column.cells)]
                    shortest, longest = max(cell.minimum for cell in cells), max(cell.maximum for cell in cells)
                    column.width = shortest + spare * (longest - shortest) // wanted
            yield table

        def _list_rows(self) -> Text:
            headings = [cell.content for cell in self.header.row.cells] if self.header and self.header.row else []
            rows = [[cell.content for cell in row.cells] for row in self.body.rows] if self.body else []
            lines = [
                Text("\n").join(Text.assemble(heading, ": ", cell) for heading, cell in zip(headings, row, strict=True))
                for row in rows
            ]
            return Text("\n\n").join(lines) if lines else Text("\n").join(headings)

    kinds = {"heading_open": LeftHeading, "list_item_open": NumberedItem, "table_open": NarrowTable}
    return type("TerminalMarkdown", (Markdown,), {"elements": {**Markdown.elements, **kinds}})


@functools.lru_cache(maxsize=4)
def _console(options: RenderOptions) -> Console:
    from rich.console import Console
    from rich.theme import Theme

    return Console(
        file=io.StringIO(),
        width=options.width,
        force_terminal=True,
        color_system="standard",
        theme=Theme(_STYLES),
        highlight=False,
        legacy_windows=False,
    )


def _render_block(block: str, options: RenderOptions) -> list[str]:
    console = _console(options)
    element = _markdown_class()(BREAK_POINTS.sub(_BREAK_MARK, block), hyperlinks=False)
    rows = console.render_lines(element, console.options, pad=False)
    while rows and _is_blank(rows[-1]):
        rows.pop()
    while rows and _is_blank(rows[0]):
        rows.pop(0)
    lines = ("".join(_render_segment(part, options) for part in row if not part.control) for row in rows)
    return [line.replace(_BREAK_MARK, "").rstrip() for line in lines]


def _is_blank(row: Sequence[Segment]) -> bool:
    return not any(part.text.strip() for part in row if not part.control)


def _render_segment(segment: Segment, options: RenderOptions) -> str:
    from rich.color import ColorSystem

    if segment.style is None:
        return segment.text
    style = segment.style if options.color else segment.style.without_color
    return style.render(segment.text, color_system=ColorSystem.STANDARD)
