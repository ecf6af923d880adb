"""The input line of the chat: keys, history and pasted text, on top of prompt_toolkit."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession, search
from prompt_toolkit.application import Application, get_app, run_in_terminal
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER, EditingMode
from prompt_toolkit.filters import Condition, emacs_mode, has_focus, is_searching, vi_navigation_mode
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.key_binding.bindings.completion import generate_completions
from prompt_toolkit.keys import Keys
from prompt_toolkit.styles import Style

from qwenlocal.chat.worker import run_alongside
from qwenlocal.errors import NotWritable, UsageError
from qwenlocal.formatting import replace_surrogates
from qwenlocal.hints import describe_error
from qwenlocal.i18n import tr
from qwenlocal.paths import ensure_writable
from qwenlocal.terminal.completer import ChatCompleter
from qwenlocal.terminal.external_editor import edit_text
from qwenlocal.terminal.pastes import InputDisplay, PasteStore
from qwenlocal.terminal.prompting import run_prompt
from qwenlocal.terminal.session import Session
from qwenlocal.terminal.tty import enable_bracketed_paste
from qwenlocal.terminal.type_ahead import LinePreview, clean_paste, collect_keys, is_open_block, press_enter

if TYPE_CHECKING:
    from qwenlocal.terminal.keys import TerminalInput

_PROMPT: StyleAndTextTuples = [("bold fg:ansigreen", "> ")]
_MAX_HISTORY_CHARACTERS = 100_000  # lines with longer pastes can be recalled in the same chat only
_MAX_QUEUE_SHOWN = 3
_VI_ESCAPE_SECONDS = 0.1  # Enter this long after Escape is a key of its own, not Alt-Enter
_SEARCH_ENDS = ("left", "right", "home", "end", "c-a", "c-b", "c-e", "c-f")  # as in readline


class LineEditor:
    """Reads messages and commands. Keys pressed between two messages wait for the next one."""

    def __init__(
        self,
        session: Session,
        pastes: PasteStore,
        *,
        history: Path | None,
        toolbar: Callable[[], str],
        early_bytes: bytes,
    ) -> None:
        """Earlier lines come from the file `history`, if given. `early_bytes` were typed before the chat began."""
        self._session, self._pastes, self._toolbar = session, pastes, toolbar
        self._terminal = _open_terminal(early_bytes)
        self._preview = LinePreview([], pastes.fold)
        self._prompt = self._create_prompt(_open_history(history, pastes))

    def _create_prompt(self, history: History) -> PromptSession[str]:
        is_vi = os.environ.get("QWENLOCAL_KEYS", "").lower() == "vi"
        prompt = PromptSession[str](
            history=history,
            key_bindings=_bind_keys(self._session, self._pastes, self._terminal),
            multiline=True,
            prompt_continuation="  ",
            completer=ChatCompleter(self._session),
            complete_while_typing=False,
            auto_suggest=AutoSuggestFromHistory(),
            enable_suspend=True,
            editing_mode=EditingMode.VI if is_vi else EditingMode.EMACS,
            bottom_toolbar=lambda: [("class:toolbar", self._describe_state())],
            reserve_space_for_menu=4,
            input=self._terminal,
            input_processors=[InputDisplay(self._pastes)],
            style=Style.from_dict({"bottom-toolbar": "noreverse", "toolbar": "noreverse fg:ansibrightblack"}),
        )
        if is_vi:
            prompt.app.ttimeoutlen = _VI_ESCAPE_SECONDS
        return prompt

    @property
    def app(self) -> Application[str]:
        """prompt_toolkit's application, which runs while a message is typed."""
        return self._prompt.app

    def end(self, failure: BaseException) -> None:
        """Raise `failure` from `read_line`; the typed text goes to the history."""
        self._prompt.default_buffer.append_to_history()
        self.app.exit(exception=failure)

    def read_line(self, default: str) -> str:
        """
        Return the next message or command; `default` is its initial text.

        Raises
        ------
        EOFError: Ctrl-D. KeyboardInterrupt: Ctrl-C on an empty line.
        """
        try:
            line, is_interrupted = run_prompt(self._prompt, _PROMPT, self._pastes.collapse(default))
        finally:
            enable_bracketed_paste(sys.stdout)  # prompt_toolkit has disabled it
        line = replace_surrogates(self._pastes.expand(line))
        if is_interrupted:
            self._session.default_text = line
            raise KeyboardInterrupt
        return line

    def ask(self, question: str) -> str:
        """Return the answer to a question, "" for Ctrl-C or Ctrl-D; keys pressed earlier wait for the message."""
        earlier: list[KeyPress] = []
        if self._terminal:
            earlier, self._terminal.waiting = self._terminal.waiting, earlier
        try:
            answer, is_interrupted = run_prompt(PromptSession[str](input=self._terminal), question)
            return "" if is_interrupted else answer.strip()
        except (EOFError, KeyboardInterrupt):
            return ""
        finally:
            if self._terminal:
                self._terminal.waiting = earlier + self._terminal.waiting
            enable_bracketed_paste(sys.stdout)

    @contextlib.contextmanager
    def capture(
        self, on_key: Callable[[], object], is_urgent: Callable[[str], bool], run: Callable[[str], object]
    ) -> Iterator[None]:
        """
        Collect keys during an answer; lines that are urgent do not wait for its end but are passed to `run`.

        `on_key` is called when `describe_typed` changes; it and `run` are called in another thread.
        """
        terminal = self._terminal
        if terminal is None:
            yield
            return
        preview = self._preview = LinePreview(terminal.waiting, self._pastes.fold)

        def press(keys: list[KeyPress]) -> None:
            preview.feed(keys)
            for entry in [entry for entry in preview.queue if is_urgent(entry[0])]:
                preview.queue.remove(entry)
                terminal.waiting = preview.keys
                self._prompt.history.append_string(entry[0])
                run(entry[0])
            on_key()

        with run_alongside(lambda stop: collect_keys(terminal, press, stop)):
            yield

    def describe_typed(self) -> Sequence[str]:
        """Return the last lines typed during the answer: those that wait to be sent, and the one being typed."""
        preview = self._preview
        lines = [*(line for line, _ in preview.queue), *([preview.text] if preview.text else [])]
        return [self._pastes.describe(line) for line in lines[-_MAX_QUEUE_SHOWN:]]

    def drop_queue(self) -> int:
        """Move the lines that wait to be sent to the history, and return their number."""
        if self._terminal is None:
            return 0
        self._terminal.collect()
        preview = LinePreview(self._terminal.waiting, self._pastes.fold)
        for line, _ in preview.queue:
            self._prompt.history.append_string(line)
        self._terminal.waiting = preview.rest
        return len(preview.queue)

    def _describe_state(self) -> str:
        if is_open_block(self._prompt.default_buffer.text):
            return tr('To end the message, end a line with """')
        return self._toolbar()


def _open_terminal(early_bytes: bytes) -> TerminalInput | None:
    """Return the keys of standard input; None where prompt_toolkit reads them by itself."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        return None
    from qwenlocal.terminal.keys import TerminalInput

    return TerminalInput(sys.stdin, early_bytes)


def _bind_keys(session: Session, pastes: PasteStore, terminal: TerminalInput | None) -> KeyBindings:
    """
    Bind Enter (send), Tab, Alt-Enter and Ctrl-J (new line), Ctrl-C (clear the line), pastes (fold), and the editor.

    Ctrl-C saves the line in the history and clears it. On an empty line, and during /edit and /answer, it raises
    KeyboardInterrupt.
    """
    keys = KeyBindings()
    is_typing = has_focus(DEFAULT_BUFFER)  # not searching the history

    @keys.add("enter", filter=is_typing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and len(buffer.complete_state.completions) > 1:  # Enter accepts the selected one
            buffer.complete_state = None
        elif press_enter(buffer):
            buffer.validate_and_handle()

    @keys.add("tab", filter=is_typing)
    def _complete(event: KeyPressEvent) -> None:
        state = event.current_buffer.complete_state
        if state and len(state.completions) == 1 and state.current_completion:
            event.current_buffer.complete_state = (
                None  # it is accepted: complete what follows, such as files in a folder
            )
        generate_completions(event)

    @keys.add("escape", "enter", filter=is_typing & emacs_mode)  # Alt-Enter on Windows
    @keys.add("c-j", filter=is_typing)
    def _insert_line_break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=is_typing & Condition(lambda: bool(get_app().current_buffer.text)))
    def _clear_line(event: KeyPressEvent) -> None:
        event.current_buffer.append_to_history()
        if session.pending_edit is None:
            event.current_buffer.reset()
            event.current_buffer.load_history_if_not_yet_loaded()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    @keys.add(Keys.BracketedPaste)
    def _paste(event: KeyPressEvent) -> None:
        text = clean_paste(event.data)
        event.current_buffer.insert_text(text.split("\n")[0] if is_searching() else pastes.fold(text))

    _bind_search_keys(keys)
    _bind_editor(keys, session, pastes, terminal)
    return keys


def _bind_search_keys(keys: KeyBindings) -> None:
    """Bind the keys that end a history search: they take the line that was found, and move the cursor in it."""

    def end_search(event: KeyPressEvent) -> None:
        search.accept_search()
        event.key_processor.feed(event.key_sequence[0], first=True)

    for name in _SEARCH_ENDS:
        keys.add(name, filter=is_searching)(end_search)


def _bind_editor(keys: KeyBindings, session: Session, pastes: PasteStore, terminal: TerminalInput | None) -> None:
    """Bind the keys that edit the message, with its pastes, in $EDITOR; it is sent if the editor has changed it."""
    is_typing = has_focus(DEFAULT_BUFFER)

    @keys.add("c-x", "c-e", filter=is_typing & emacs_mode)
    @keys.add("v", filter=is_typing & vi_navigation_mode)
    async def _edit(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = pastes.expand(buffer.text)
        with terminal.hold_keys() if terminal else contextlib.nullcontext():
            try:
                text = await run_in_terminal(lambda: edit_text(before), in_executor=True)
            except UsageError as error:
                message = describe_error(error)
                await run_in_terminal(lambda: session.say(message))
                return
            if text != before.removesuffix("\n"):
                buffer.document = Document(pastes.collapse(text))
                buffer.validate_and_handle()


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
            text = pastes.expand(string)
            if text == string or len(text) <= _MAX_HISTORY_CHARACTERS:
                with contextlib.suppress(OSError):  # disk full: the line can still be recalled in this chat
                    super().store_string(replace_surrogates(text))

    return ExpandedHistory(str(path))
