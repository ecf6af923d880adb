"""The chat: a line to type in, answers above it, and commands that begin with a slash."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.chat.background import in_background
from qwenlocal.chat.conversation import Conversation
from qwenlocal.chat.events import Why
from qwenlocal.errors import CannotWrite, ContextFull, QwenlocalError
from qwenlocal.paths import writable
from qwenlocal.terminal.answer import show_answer
from qwenlocal.terminal.plain import harmless, wrapped
from qwenlocal.terminal.typing_ahead import typed_ahead

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

PROMPT: StyleAndTextTuples = [("bold fg:ansigreen", "> ")]


@dataclass(frozen=True)
class Command:
    """A slash command: how it is typed, what it does in words, and what is done (False: leave)."""

    usage: str
    help: str
    action: Callable[[str], bool]

    @property
    def name(self) -> str:
        return self.usage.split()[0]


class Chat:
    """One conversation at a terminal."""

    def __init__(
        self,
        conversation: Conversation,
        *,
        model: str,
        n_ctx: int,
        history: Path,
        chats: Path,
        stats: bool = False,
        verdict: Callable[[], str] = lambda: "",
    ) -> None:
        """`verdict` tells what came out of a trial that goes on beside the answers; it is said once."""
        self._conversation, self._model, self._n_ctx = conversation, model, n_ctx
        self._history, self._chats, self._stats = history, chats, stats
        self._verdict, self._verdict_said = verdict, ""
        self._saved: set[Path] = set()  # may be written again
        self._commands = {command.name: command for command in self._all_commands()}

    def run(self, first: str | None = None) -> None:
        """Until the user leaves; `first` is asked at once."""
        session = self._session()
        self._say(f"{self._model}, room for {self._n_ctx:,} tokens. /help for commands, Ctrl-D to leave.")
        if first:
            self._ask(first)
        while True:
            try:
                line = _clean(session.prompt(PROMPT))
                if line.strip() and not self._handle(line):
                    return
            except KeyboardInterrupt:
                self._say("(Ctrl-D leaves.)")
            except EOFError:
                return

    # --- what is typed

    def _handle(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        if line.startswith("//"):
            self._ask(line[1:])
        elif line.startswith("/"):
            return self._obey(line)
        else:
            self._ask(line)
        return True

    def _obey(self, line: str) -> bool:
        word, _, rest = line.partition(" ")
        command = self._commands.get(word.strip())
        if command:
            return command.action(rest.strip())
        near = difflib.get_close_matches(word, self._commands, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]}?" if near else ""
        self._say(f"There is no command {word}.{guess} /help shows all; // at the start sends a slash.")
        return True

    def _ask(self, text: str) -> None:
        try:
            talk = self._conversation
            with typed_ahead(sys.stdin), in_background(lambda: talk.ask(text), talk.stop) as events:
                done = show_answer(events, sys.stdout, sys.stderr)
        except QwenlocalError as error:
            afresh = " /clear starts afresh." if isinstance(error, ContextFull) else ""
            self._say(f"{error} {error.hint}{afresh}")
            return
        if done.why not in (Why.END, Why.STOP):
            self._say(f"[{done.why.value}]")
        if self._stats:
            self._say(done.stats.sentence(done.why))
        if (verdict := self._verdict()) != self._verdict_said:
            self._say(verdict)
            self._verdict_said = verdict
        sys.stdout.write("\n")
        sys.stdout.flush()

    # --- commands

    def _all_commands(self) -> list[Command]:
        return [
            Command("/help", "show this", self._help),
            Command("/clear", "forget the conversation; the system prompt stays", self._clear),
            Command("/system [TEXT]", "say who the model shall be; without TEXT, show it", self._system),
            Command("/save [FILE]", "write the conversation as JSON", self._save),
            Command("/exit", "leave (also Ctrl-D)", lambda _rest: False),
        ]

    def _help(self, _rest: str) -> bool:
        width = max(len(command.usage) for command in self._commands.values())
        for command in self._commands.values():
            self._say(f"  {command.usage:<{width}}  {command.help}")
        self._say("  Enter sends, Alt-Enter makes a new line, the arrows recall earlier lines,")
        self._say("  Ctrl-C stops an answer and keeps what was said.")
        return True

    def _clear(self, _rest: str) -> bool:
        self._conversation.clear()
        self._say("The conversation is forgotten.")
        return True

    def _system(self, text: str) -> bool:
        if text:
            self._conversation.thread.tell(text)
            self._say("The model is told so from the next message on.")
        else:
            self._say(self._conversation.thread.system or "(the model's own system prompt)")
        return True

    def _save(self, name: str) -> bool:
        try:
            path = self._save_path(name)
            if path.exists() and path not in self._saved:
                self._say(f"There is {path} already; choose another name.")
                return True
            self._conversation.save(path, self._model)
        except CannotWrite as reason:
            self._say(str(reason))
        except OSError as reason:
            self._say(f"It could not be saved there: {reason.strerror}.")
        else:
            self._saved.add(path)
            self._say(f"Saved: {path}")
        return True

    def _save_path(self, name: str) -> Path:
        if name:
            return Path(os.path.expanduser(name)).absolute()
        return writable(self._chats) / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"

    # --- the terminal

    def _say(self, sentence: str) -> None:
        dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
        sys.stderr.write(f"{dim}{wrapped(harmless(sentence), sys.stderr)}{plain}\n")
        sys.stderr.flush()

    def _session(self) -> PromptSession[str]:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        return PromptSession(
            history=self._past(),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="  ",
            completer=WordCompleter(list(self._commands), sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=True,
        )

    def _past(self) -> History:
        """What was typed before, in this and earlier chats; only in this one where the file cannot be written."""
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        try:
            writable(self._history.parent)
            with self._history.open("a"):
                pass
        except (CannotWrite, OSError):
            return InMemoryHistory()
        return FileHistory(str(self._history))


def _clean(line: str) -> str:
    """What was typed, with bytes that are no text (a terminal hands them on as lone surrogates) replaced."""
    return line.encode("utf-8", errors="replace").decode("utf-8")


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter (or Ctrl-J) makes a new line."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
