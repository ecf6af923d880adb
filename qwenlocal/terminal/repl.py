"""The chat: a line to type in, answers above it, and commands that begin with a slash."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.chat.documents import mentioned, missing, read_document
from qwenlocal.chat.events import Done, Event, Why
from qwenlocal.chat.worker import iterate_in_thread
from qwenlocal.errors import ContextFull, QwenlocalError
from qwenlocal.i18n import tr
from qwenlocal.terminal.ansi import has_colours, obeys
from qwenlocal.terminal.attachments import with_documents
from qwenlocal.terminal.commands.models import prompt_files
from qwenlocal.terminal.commands.table import Leave, find, is_command, unescaped, unknown
from qwenlocal.terminal.markdown import Look, warm_up
from qwenlocal.terminal.screen import Screen, Size
from qwenlocal.terminal.session import Session
from qwenlocal.terminal.tty import quiet
from qwenlocal.terminal.type_ahead import TypedAhead, typing_ahead
from qwenlocal.terminal.view import AnswerView, Progress, show_answer

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import Application
    from prompt_toolkit.formatted_text import StyleAndTextTuples

PROMPT: StyleAndTextTuples = [("bold fg:ansigreen", "> ")]
Answer = Callable[[], Iterator[Event]]


class Chat:
    """One conversation at a terminal."""

    def __init__(
        self,
        session: Session,
        *,
        history: Path | None,
        verdict: Callable[[], str] = lambda: "",
        begin: Callable[[], object] = lambda: None,
    ) -> None:
        """
        What is typed goes into the file `history`, if there is one. `verdict` tells what came out of a trial that goes
        on beside the answers; it is said once. `begin` is called when the input line is there for the first time: the
        model can be loaded behind it.
        """
        from qwenlocal.terminal.input import Pastes

        self._session, self._history = session, history
        self._verdict, self._verdict_said = verdict, ""
        self._begin = begin
        self._app: Application[str] | None = None
        self._typed = TypedAhead()
        self._pastes = Pastes()
        self._trouble = ""
        self._is_warm = False

    def run(self, first: str | None = None) -> None:
        """Until the user leaves; `first` is asked at once."""
        session, line = self._session, self._line()
        self._app = line.app
        line.app.after_render.add_handler(self._rendered)
        session.say(tr("{model}. /help for commands, Ctrl-D to leave.", model=session.model))
        try:
            with quiet(sys.stdin, sys.stdout):
                self._take_lines(line, first)
        except (EOFError, Leave):
            return
        finally:
            if session.keeper:
                session.keeper.close()

    def _take_lines(self, line: PromptSession[str], first: str | None) -> None:
        """One after the other, until Ctrl-C is pressed twice."""
        warned = False
        if first:
            self._said(first)
        while True:
            try:
                self._said(self._next(line))
                warned = False
            except KeyboardInterrupt:
                if self._session.editing:
                    self._session.editing = None
                    self._session.say(tr("Nothing was changed."))
                    continue
                if warned:
                    return
                self._session.say(tr("(Ctrl-C again or Ctrl-D leaves.)"))
                warned = True

    def _warm_up(self) -> None:
        """While the first line is typed, what the first answer will need is imported."""
        if not self._is_warm and obeys(sys.stdout) and self._session.markdown:
            threading.Thread(target=warm_up, daemon=True).start()
        self._is_warm = True

    def model_is_there(self, failure: BaseException | None) -> None:
        """The model is loaded; where that failed, the chat ends with the reason. From any thread."""
        app = self._app
        if failure is not None and app is not None and app.is_running and app.loop is not None:
            app.loop.call_soon_threadsafe(functools.partial(app.exit, exception=failure))

    def _rendered(self, _app: Application[str]) -> None:
        self._begin()
        self._warm_up()

    # --- what is typed

    def _next(self, line: PromptSession[str]) -> str:
        """The next line: one that was sent during the last answer, or one that is typed now."""
        session = self._session
        if self._typed.sent:
            text = self._typed.sent.pop(0)
            sys.stdout.write(f"> {text}\n")
            return text
        if self._typed.leaves:
            raise EOFError
        default = session.default_text or self._typed.text
        session.default_text = self._typed.text = ""
        return self._pastes.unfold(_clean(line.prompt(PROMPT, default=default)))

    def _said(self, line: str) -> None:
        """Do what a line says."""
        session = self._session
        if line.strip() and not is_command(line):
            _ = session.conversation  # where its model cannot be loaded, there is nothing to chat with
        try:
            if session.editing and not (is_command(line) and find(line.split()[0])):
                self._edited(line)
            elif is_command(line):
                session.editing = None
                self._obey(line)
            elif line.strip():
                self._ask(unescaped(line))
        except QwenlocalError as error:
            afresh = tr("/clear starts afresh, /drop leaves a turn out.") if isinstance(error, ContextFull) else ""
            session.say(" ".join(part for part in (str(error), error.hint, afresh) if part))

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        command = find(word.strip())
        if command is None:
            self._session.say(unknown(word.strip()))
            return
        begun = command.action(self._session, rest.strip())
        for answer in [begun] if callable(begun) else begun or ():
            self._show(answer)
            if self._session.last and self._session.last.why is Why.INTERRUPTED:
                break  # those that were still to come are not wanted either

    def _edited(self, line: str) -> None:
        session = self._session
        editing, session.editing = session.editing, None
        if editing is None or not line.strip():
            session.say(tr("Nothing was changed."))
        elif editing.answer:
            session.conversation.replace_answer(editing.turn, line)
            session.say(tr("The model has said that now; what followed is kept: /branch"))
        else:
            whole = self._with_files(unescaped(line))
            if whole is not None:
                self._show(lambda: session.conversation.edit(editing.turn, whole))

    def _ask(self, text: str) -> None:
        whole = self._with_files(text)
        if whole is not None:
            self._show(lambda: self._session.conversation.ask(whole))

    def _with_files(self, text: str) -> str | None:
        """`text` with the files that it mentions, but for those that it has in it already; None to send nothing."""
        documents = [read_document(path) for path in mentioned(text, Path())]
        documents = [document for document in documents if document.as_message() not in text]
        for name in missing(text, Path()):
            self._session.say(tr("There is no file {name}; that is sent as it stands.", name=name))
        return with_documents(self._session, text, documents)

    # --- answers

    def _show(self, begin: Answer) -> None:
        session = self._session
        with iterate_in_thread(begin, session.conversation.stop) as events:
            done = self._draw(events)
        session.answered(done)
        if done.why not in (Why.END, Why.STOP):
            more = " " + tr("/continue goes on.") if done.why in (Why.LENGTH, Why.INTERRUPTED) and done.ids else ""
            session.say(f"[{tr(done.why.value)}]{more}")
        if session.stats:
            session.say(done.stats.sentence(done.why))
        self._say_what_else_happened()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _draw(self, events: Iterator[Event]) -> Done:
        session = self._session
        if not obeys(sys.stdout):
            return show_answer(events, sys.stdout, sys.stderr)
        view = AnswerView(
            Screen(sys.stdout, terminal_size),
            look,
            Progress(session.conversation.n_ctx),
            lambda: self._typed.text,
            markdown=session.markdown,
        )
        with typing_ahead(sys.stdin, self._typed, view.key):
            return view.show(events)

    def _say_what_else_happened(self) -> None:
        session = self._session
        if (verdict := self._verdict()) != self._verdict_said:
            session.say(verdict)
            self._verdict_said = verdict
        trouble = session.keeper.trouble if session.keeper else ""
        if trouble and trouble != self._trouble:
            session.say(tr("What is said cannot be kept at the moment: {trouble}. It is tried again.", trouble=trouble))
        self._trouble = trouble

    # --- the terminal

    def _line(self) -> PromptSession[str]:
        from qwenlocal.terminal.input import ChatCompleter, make_session

        session = self._session
        completer = ChatCompleter(
            session.models.names, lambda: list(prompt_files(session.prompts)), lambda: len(session.thread.turns)
        )
        vi = os.environ.get("QWENLOCAL_KEYS", "").lower() == "vi"
        return make_session(
            completer,
            self._pastes,
            self._history,
            toolbar=self._toolbar,
            is_editing=lambda: session.editing is not None,
            vi=vi,
        )

    def _toolbar(self) -> str:
        """What the line below the input says."""
        session = self._session
        parts = [session.model]
        if session.last:
            stats, n_ctx = session.last.stats, session.conversation.n_ctx
            used = stats.prompt_tokens + stats.answer_tokens
            parts.append(
                tr("{used:,} of {n_ctx:,} tokens", used=used, n_ctx=n_ctx)
                if n_ctx
                else tr("{count:,} tokens", count=used)
            )
            if stats.answer_speed:
                speed, first = stats.answer_speed, stats.first_token
                parts.append(tr("{speed:.1f} tokens/s, first after {first:.1f} s", speed=speed, first=first))
        return " | ".join(parts)


def terminal_size() -> Size:
    """How large the terminal is now."""
    found = shutil.get_terminal_size()
    return Size(max(1, found.columns), max(2, found.lines))


def look() -> Look:
    """How lines look on this terminal now."""
    return Look(max(20, terminal_size().columns), colour=has_colours(sys.stdout))


def _clean(line: str) -> str:
    """What was typed, with bytes that are no text (a terminal hands them on as lone surrogates) replaced."""
    return line.encode("utf-8", errors="replace").decode("utf-8")
