"""The line to type in: keys, completion, history, pastes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from qwenlocal.errors import NotWritable
from qwenlocal.paths import writable
from qwenlocal.terminal.ansi import harmless
from qwenlocal.terminal.commands.models import SETTINGS
from qwenlocal.terminal.commands.table import COMMANDS, find

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
from prompt_toolkit.input import Input
from prompt_toolkit.input.vt100_parser import Vt100Parser

_LONG_LINES, _LONG_TEXT = 8, 1000  # a paste of so many lines or letters is folded
_LONGEST_KEPT = 100_000  # letters of a paste in the history
_CHIP = re.compile(r"\[paste (\d+): [\d,]+ (?:lines|letters)\]")
_WORD = re.compile(r'(?<!\S)@("?)([^"\s]*)$')


@dataclass
class Pastes:
    """Long pastes, which the line shows folded: `[paste 1: 240 lines]`; by what stands for them there."""

    texts: dict[str, str] = field(default_factory=dict)

    def fold(self, text: str) -> str:
        """What stands for a paste in the line: itself, where it is short."""
        lines = text.count("\n") + 1
        if lines < _LONG_LINES and len(text) < _LONG_TEXT:
            return text
        size = f"{lines:,} lines" if lines > 1 else f"{len(text):,} letters"
        chip = f"[paste {len(self.texts) + 1}: {size}]"
        self.texts[chip] = text
        return chip

    def unfold(self, line: str) -> str:
        """The line with the pastes in their places."""
        return _CHIP.sub(lambda chip: self.texts.get(chip[0], chip[0]), line)

    def remembered(self, line: str) -> str:
        """What the history keeps of a line: pastes in their places, but for those that are too long for a line."""
        return _CHIP.sub(lambda chip: self._kept(chip[0]), line)

    def _kept(self, chip: str) -> str:
        text = self.texts.get(chip, chip)
        return text if len(text) <= _LONGEST_KEPT else f"[a {chip[1:]}"


class ChatCompleter(Completer):
    """Commands at the beginning of a line, their arguments behind them, and files behind an @."""

    def __init__(
        self, models: Callable[[], Sequence[str]], prompts: Callable[[], Sequence[str]], turns: Callable[[], int]
    ) -> None:
        self._models, self._prompts, self._turns = models, prompts, turns
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if before.startswith("/") and not before.startswith("//") and "\n" not in before:
            word, space, rest = before.partition(" ")
            if space:
                yield from self._argument(word, rest, complete_event)
            else:
                yield from _from(((command.name, command.help) for command in COMMANDS), before)
        elif match := _WORD.search(before):
            yield from self._files(match[2], complete_event)

    def _argument(self, word: str, rest: str, event: CompleteEvent) -> Iterator[Completion]:
        command = find(word)
        kind = command.completes if command else ""
        if kind == "file":
            yield from self._files(rest, event)
        elif kind == "setting":
            yield from _from(SETTINGS.items(), rest) if " " not in rest else ()
        elif kind == "turn":
            yield from _from(((str(number + 1), "") for number in range(self._turns())), rest)
        elif kind in ("model", "prompt"):
            names = self._models() if kind == "model" else self._prompts()
            yield from _from(((name, "") for name in names), rest)
        elif word == "/copy":
            yield from _from((("code", "the last code of the last answer"),), rest)
        elif word == "/help":
            yield from _from(((command.name, command.help) for command in COMMANDS), rest)

    def _files(self, typed: str, event: CompleteEvent) -> Iterable[Completion]:
        return self._paths.get_completions(Document(typed, len(typed)), event)


def _from(words: Iterable[tuple[str, str]], typed: str) -> Iterator[Completion]:
    for word, meaning in words:
        if word.startswith(typed):
            yield Completion(word, start_position=-len(typed), display_meta=meaning)


def make_session(
    completer: Completer,
    pastes: Pastes,
    history: Path | None,
    *,
    toolbar: Callable[[], str],
    is_editing: Callable[[], bool],
    vi: bool,
) -> PromptSession[str]:
    """
    A line editor over the terminal; lines of earlier chats are in the file `history`, if there is one.

    While `is_editing`, Ctrl-C raises KeyboardInterrupt also where something is typed.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.enums import EditingMode
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.input import create_input
    from prompt_toolkit.styles import Style

    from qwenlocal.terminal.input import takes_large_pastes

    def bottom() -> FormattedText:
        return FormattedText([("class:toolbar", toolbar())])

    return PromptSession(
        history=_past(history, pastes),
        key_bindings=_keys(pastes, is_editing),
        multiline=True,
        prompt_continuation="  ",
        completer=completer,
        complete_while_typing=False,
        auto_suggest=AutoSuggestFromHistory(),
        enable_open_in_editor=True,
        enable_suspend=True,
        tempfile_suffix=".md",
        editing_mode=EditingMode.VI if vi else EditingMode.EMACS,
        bottom_toolbar=bottom,
        reserve_space_for_menu=4,
        input=takes_large_pastes(create_input()),
        style=Style.from_dict({"bottom-toolbar": "noreverse", "toolbar": "noreverse fg:ansibrightblack"}),
    )


def _past(path: Path | None, pastes: Pastes) -> History:
    """What was typed before, in this and earlier chats; only in this one without a file that can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if path is None:
        return InMemoryHistory()
    try:
        writable(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.close(descriptor)
    except (NotWritable, OSError):
        return InMemoryHistory()

    class WithPastes(FileHistory):
        def store_string(self, string: str) -> None:
            super().store_string(pastes.remembered(string))

    return WithPastes(str(path))


def _is_typing() -> bool:
    return bool(get_app().current_buffer.text) and not is_searching()


def _keys(pastes: Pastes, is_editing: Callable[[], bool]) -> KeyBindings:
    """
    Enter sends; Alt-Enter, Ctrl-J and a backslash before Enter make a new line; pastes are folded.

    Ctrl-C takes a line away, but for the history; on an empty one prompt_toolkit raises KeyboardInterrupt.
    """
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state:  # a completion is being chosen: Enter takes it
            buffer.complete_state = None
        elif buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=Condition(lambda: _is_typing() and not is_editing()))
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.append_to_history()
        event.current_buffer.reset()

    @keys.add(Keys.BracketedPaste)
    def _paste(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        event.current_buffer.insert_text(pastes.fold(harmless(text)))

    return keys


_END = "\x1b[201~"


class PasteParser(Vt100Parser):
    """
    prompt_toolkit's parser looks through all of a paste for its end whenever a kilobyte more of it comes, which takes
    5 s for 4 MB; this one looks at what is new.
    """

    def reset(self, request: bool = False) -> None:
        super().reset(request)
        self._pieces: list[str] = []
        self._tail = ""

    def feed(self, data: str) -> None:
        if not self._in_bracketed_paste:
            super().feed(data)
            return
        self._pieces.append(data)
        recent = self._tail + data
        self._tail = recent[1 - len(_END) :]
        if _END in recent:
            whole, self._pieces, self._tail = "".join(self._pieces), [], ""
            super().feed(whole)


def takes_large_pastes(line_input: Input) -> Input:
    """`line_input`, quick with them where it is a terminal's."""
    old = getattr(line_input, "vt100_parser", None)
    if isinstance(old, Vt100Parser):
        line_input.vt100_parser = PasteParser(old.feed_key_callback)  # type: ignore[attr-defined]
    return line_input
