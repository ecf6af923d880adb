"""The input line of the chat: keys, completion, history and pasted text, on top of prompt_toolkit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.styles import Style

from qwenlocal.errors import NotWritable
from qwenlocal.paths import ensure_writable
from qwenlocal.terminal.ansi import escape_controls
from qwenlocal.terminal.commands.models import SETTINGS, find_prompt_files
from qwenlocal.terminal.commands.table import COMMANDS, find_command
from qwenlocal.terminal.session import Session

_FOLD_LINES, _FOLD_CHARACTERS = 8, 1000  # fold a paste from this size on
_MAX_HISTORY_CHARACTERS = 100_000  # longer pastes are not written to the history
_PLACEHOLDER = re.compile(r"\[paste (\d+): [\d,]+ (?:lines|characters)\]")
_MENTION = re.compile(r'(?<!\S)@("?)([^"\s]*)$')
_PASTE_END = "\x1b[201~"


def create_line_editor(
    session: Session, pastes: PasteStore, history: Path | None, toolbar: Callable[[], str]
) -> PromptSession[str]:
    """Create the line editor; earlier lines come from the file `history`, if given."""
    is_vi = os.environ.get("QWENLOCAL_KEYS", "").lower() == "vi"
    return PromptSession(
        history=_open_history(history, pastes),
        key_bindings=_bind_keys(session, pastes),
        multiline=True,
        prompt_continuation="  ",
        completer=ChatCompleter(session),
        complete_while_typing=False,
        auto_suggest=AutoSuggestFromHistory(),
        enable_open_in_editor=True,
        enable_suspend=True,
        tempfile_suffix=".md",
        editing_mode=EditingMode.VI if is_vi else EditingMode.EMACS,
        bottom_toolbar=lambda: [("class:toolbar", toolbar())],
        reserve_space_for_menu=4,
        input=_with_paste_parser(create_input()),
        style=Style.from_dict({"bottom-toolbar": "noreverse", "toolbar": "noreverse fg:ansibrightblack"}),
    )


def _bind_keys(session: Session, pastes: PasteStore) -> KeyBindings:
    """
    Bind Enter (send), Alt-Enter, Ctrl-J and backslash Enter (new line), Ctrl-C (clear the line), and pastes (fold).

    On an empty line, and during /edit and /answer, Ctrl-C is left to prompt_toolkit, which raises KeyboardInterrupt.
    """
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state:  # Enter accepts the selected completion
            buffer.complete_state = None
        elif buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _insert_line_break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    def can_clear() -> bool:
        return bool(get_app().current_buffer.text) and not is_searching() and session.pending_edit is None

    @keys.add("c-c", filter=Condition(can_clear))
    def _clear_line(event: KeyPressEvent) -> None:
        event.current_buffer.append_to_history()
        event.current_buffer.reset()

    @keys.add(Keys.BracketedPaste)
    def _paste(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        event.current_buffer.insert_text(pastes.fold(escape_controls(text)))

    return keys


def _open_history(path: Path | None, pastes: PasteStore) -> History:
    """Return the history in `path`; one in memory if there is no path or the file is not writable."""
    if path is None:
        return InMemoryHistory()
    try:
        ensure_writable(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.close(descriptor)
    except (NotWritable, OSError):
        return InMemoryHistory()

    class ExpandedHistory(FileHistory):
        def store_string(self, string: str) -> None:
            super().store_string(pastes.expand_for_history(string))

    return ExpandedHistory(str(path))


class ChatCompleter(Completer):
    """Completes commands at the start of a line, their arguments, and files after an @."""

    def __init__(self, session: Session) -> None:
        self._session, self._paths = session, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if before.startswith("/") and not before.startswith("//") and "\n" not in before:
            name, space, argument = before.partition(" ")
            command = find_command(name)
            kind = (command.completes if command else "") if space else "command"
            if kind == "file":
                yield from self._complete_path(argument, complete_event)
            else:
                yield from self._complete_word(kind, argument if space else name)
        elif match := _MENTION.search(before):
            yield from self._complete_path(match[2], complete_event)

    def _complete_word(self, kind: str, typed: str) -> Iterator[Completion]:
        for word, description in self._words(kind):
            if word.startswith(typed):
                yield Completion(word, start_position=-len(typed), display_meta=description)

    def _words(self, kind: str) -> Iterable[tuple[str, str]]:
        """Return words with their descriptions; `kind` is that of `Command.completes`."""
        match kind:
            case "command":
                return [(command.name, command.help) for command in COMMANDS]
            case "setting":
                return SETTINGS.items()
            case "turn":
                return [(str(number), "") for number in range(1, len(self._session.thread.turns) + 1)]
            case "model":
                return [(name, "") for name in self._session.models.names()]
            case "prompt":
                return [(name, "") for name in find_prompt_files(self._session.prompt_folders)]
            case "code":
                return [("code", "the last code block of the last answer")]
        return []

    def _complete_path(self, typed: str, event: CompleteEvent) -> Iterable[Completion]:
        return self._paths.get_completions(Document(typed, len(typed)), event)


@dataclass
class PasteStore:
    """Long pastes by the placeholders that the input line shows for them, such as `[paste 1: 240 lines]`."""

    texts: dict[str, str] = field(default_factory=dict)

    def fold(self, text: str) -> str:
        """Store a long paste and return its placeholder; return a short one unchanged."""
        lines = text.count("\n") + 1
        if lines < _FOLD_LINES and len(text) < _FOLD_CHARACTERS:
            return text
        size = f"{lines:,} lines" if lines > 1 else f"{len(text):,} characters"
        placeholder = f"[paste {len(self.texts) + 1}: {size}]"
        self.texts[placeholder] = text
        return placeholder

    def expand(self, line: str) -> str:
        """Replace the placeholders in `line` by the pastes."""
        return _PLACEHOLDER.sub(lambda match: self.texts.get(match[0], match[0]), line)

    def expand_for_history(self, line: str) -> str:
        """Replace the placeholders in `line`, except those of pastes that are too long for the history."""
        return _PLACEHOLDER.sub(lambda match: self._expand_short(match[0]), line)

    def _expand_short(self, placeholder: str) -> str:
        text = self.texts.get(placeholder, placeholder)
        return text if len(text) <= _MAX_HISTORY_CHARACTERS else f"[omitted {placeholder[1:]}"


class PasteParser(Vt100Parser):
    """
    Finds the end of a paste in linear time.

    prompt_toolkit's parser searches the whole paste again for every kilobyte that arrives, which takes 5 s for 4 MB.
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
        self._tail = recent[1 - len(_PASTE_END) :]
        if _PASTE_END in recent:
            paste, self._pieces, self._tail = "".join(self._pieces), [], ""
            super().feed(paste)


def _with_paste_parser(line_input: Input) -> Input:
    """Give a terminal's `line_input` the faster parser; leave other inputs alone."""
    parser = getattr(line_input, "vt100_parser", None)
    if isinstance(parser, Vt100Parser):
        line_input.vt100_parser = PasteParser(parser.feed_key_callback)  # type: ignore[attr-defined]
    return line_input
