"""The table of slash commands: how they are typed, what they do, and by which function. /help and docs come from it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qwenlocal.chat.events import Event
from qwenlocal.i18n import mark, tr
from qwenlocal.terminal.commands import context, files, models, turns
from qwenlocal.terminal.session import Session


class Leave(Exception):
    """The chat ends."""


Answer = Callable[[], Iterator[Event]]
Action = Callable[[Session, str], "Answer | Sequence[Answer] | None"]


@dataclass(frozen=True)
class Command:
    """
    A slash command. `usage` is how it is typed; `action` may give answers for the model to begin.

    `completes` says what its argument is completed with: "model", "prompt", "setting", "file", "turn", "chat" or "".
    """

    usage: str
    help: str
    action: Action
    group: str
    completes: str = ""

    @property
    def name(self) -> str:
        return self.usage.split()[0]


def _leave(session: Session, _rest: str) -> None:
    raise Leave


def _help(session: Session, rest: str) -> None:
    wanted = rest.strip().lstrip("/")
    if wanted:
        command = find(f"/{wanted}")
        session.say(f"{command.usage}  {tr(command.help)}" if command else unknown(f"/{wanted}"))
        return
    width = max(len(command.usage) for command in COMMANDS)
    for group in dict.fromkeys(command.group for command in COMMANDS):
        session.say(f"{tr(group)}:")
        for command in COMMANDS:
            if command.group == group:
                session.say(f"  {command.usage:<{width}}  {tr(command.help)}")
    session.say(tr("Keys:"))
    width = max(len(keys) for keys, _ in KEYS)
    for keys, what in KEYS:
        session.say(f"  {keys:<{width}}  {tr(what)}")


_TALK, _CONTEXT, _MODEL = mark("Say it anew"), mark("What is read"), mark("Model and manner")
_FILES, _ELSE = mark("Files and chats"), mark("Besides")

COMMANDS: Sequence[Command] = (
    Command("/undo", mark("go back before the last question, which can be edited then"), turns.undo, _TALK),
    Command(
        "/retry [N]",
        mark("answer the last question again, N times; the answers before are kept"),
        turns.retry,
        _TALK,
    ),
    Command("/versions [N]", mark("show all answers to the last question, or take number N"), turns.versions, _TALK),
    Command("/edit [TURN]", mark("change a question of yours, and ask it from there"), turns.edit, _TALK, "turn"),
    Command("/answer [TURN]", mark("change what the model said"), turns.edit_answer, _TALK, "turn"),
    Command("/continue", mark("go on with an answer that was cut"), turns.go_on, _TALK),
    Command("/branch [N]", mark("show all ends that this chat has, or go to number N"), turns.branch, _TALK),
    Command("/fork [TURN]", mark("begin another chat with what was said up to a turn"), turns.fork, _TALK, "turn"),
    Command("/clear", mark("begin anew; the system prompt stays, the chat is kept"), turns.clear, _TALK),
    Command("/ctx", mark("what is in the context: a bar, and a line for each turn"), context.context, _CONTEXT),
    Command("/pin [TURN]", mark("keep a turn in a full context, or not any more"), context.pin, _CONTEXT, "turn"),
    Command("/drop [TURN]", mark("do not read a turn any more, or read it again"), context.drop, _CONTEXT, "turn"),
    Command("/tokens [TEXT]", mark("how many tokens a text is, or the whole chat"), context.tokens, _CONTEXT),
    Command("/stats", mark("say how quick each answer was, or not any more"), context.stats, _CONTEXT),
    Command("/model [NAME]", mark("go on with another model, or show which"), models.model, _MODEL, "model"),
    Command("/system [TEXT]", mark("say who the model shall be; without TEXT, show it"), models.system, _MODEL),
    Command("/prompt [NAME]", mark("take a system prompt from a file, or show which"), models.prompt, _MODEL, "prompt"),
    Command("/set [NAME VALUE]", mark("temperature, top_p, seed, …; alone, show them"), models.set_, _MODEL, "setting"),
    Command("/read FILE", mark("put a file's text into the next message"), files.read, _FILES, "file"),
    Command("/copy [code|N]", mark("copy the last answer, its last code, or the answer of turn N"), files.copy, _FILES),
    Command("/save [FILE]", mark("write the conversation as JSON"), files.save, _FILES, "file"),
    Command(
        "/load FILE|CHAT",
        mark("go on with a saved conversation, or a chat by its number"),
        files.load,
        _FILES,
        "file",
    ),
    Command("/export FILE", mark("write the chat as .md, .json or .html"), files.export, _FILES, "file"),
    Command("/title TEXT", mark("give this chat a title"), files.title, _FILES),
    Command("/markdown", mark("lay answers out, or show them as they are"), context.markdown, _ELSE),
    Command("/help [COMMAND]", mark("show this"), _help, _ELSE),
    Command("/exit", mark("leave (also Ctrl-D)"), _leave, _ELSE),
)

KEYS: Sequence[tuple[str, str]] = (
    ("Enter", mark("send")),
    ("Alt-Enter, Ctrl-J, \\ Enter", mark("new line")),
    (
        "Ctrl-C",
        mark("stop an answer and keep what was said, or take the line away; on an empty line twice, leave"),
    ),
    ("Ctrl-D", mark("leave")),
    ("Up, Down", mark("earlier lines, those of earlier chats too")),
    ("Ctrl-R", mark("search earlier lines")),
    ("Tab", mark("complete commands, models, files (@path), settings")),
    ("Right, Ctrl-E", mark("take the grey suggestion")),
    ("Ctrl-X Ctrl-E", mark("edit the line in $EDITOR")),
    ("Ctrl-Z", mark("suspend; fg comes back")),
    ("@path", mark("a file's text goes with the message")),
    ("//", mark("at the beginning: a slash that is no command")),
)

_OTHER_NAMES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help", "/new": "/clear", "/regen": "/retry", "/q": "/exit"}


def is_command(line: str) -> bool:
    """Whether a line is meant as a command: `/help`, but not `//help`, `/etc/fstab` or `/* a comment */`."""
    return re.match(r"/[A-Za-z?]+(\s|$)", line) is not None


def unescaped(line: str) -> str:
    """The line as it is sent: of two slashes, one; but not where they begin a comment, `// why`, or lines of code."""
    escaped = re.match(r"/(/[^\s/]\S*)", line)
    return line[1:] if escaped and ("\n" not in line or find(escaped[1])) else line


def find(word: str) -> Command | None:
    """The command of that name, or of another program's name for it."""
    name = _OTHER_NAMES.get(word, word)
    return next((command for command in COMMANDS if command.name == name), None)


def unknown(word: str) -> str:
    """What is said of a command that there is not."""
    near = difflib.get_close_matches(word, [command.name for command in COMMANDS], n=1, cutoff=0.5)
    guess = [tr("Did you mean {name}?", name=near[0])] if near else []
    rest = tr("/help shows all; // at the start sends a slash.")
    return " ".join([tr("There is no command {word}.", word=word), *guess, rest])
