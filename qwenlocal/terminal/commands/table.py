"""The table of slash commands with their usage, help text and handler, and of keys; /help and docs/chat.md show it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwenlocal.i18n import mark, tr
from qwenlocal.terminal.commands import adapters, context, files, models, turns
from qwenlocal.terminal.session import AnswerStarter, Session

Handler = Callable[[Session, str], Sequence[AnswerStarter] | None]


@dataclass(frozen=True)
class Command:
    """
    A slash command.

    `usage` is its name with its arguments. `handler` takes the session and the stripped argument; it may return answers
    that the model is to start. `completes` names the completion of the argument: "model", "adapter", "prompt",
    "setting", "file", "turn", "command", "code" (that word) or "" for none. If it `works_at_once`, it is not queued
    while the model answers: it changes nothing that an answer depends on.
    """

    usage: str
    help: str
    handler: Handler
    completes: str = ""
    works_at_once: bool = False

    @property
    def name(self) -> str:
        return self.usage.split()[0]

    @property
    def takes_argument(self) -> bool:
        return self.usage != self.name


def _exit(session: Session, _argument: str) -> None:
    raise EOFError  # as Ctrl-D does


def _show_help(session: Session, argument: str) -> None:
    name = argument.lstrip("/")
    if name:
        command = find_command(f"/{name}")
        session.say(f"{command.usage}  {tr(command.help)}" if command else describe_unknown(f"/{name}"))
        if aliases := [alias for alias, target in ALIASES.items() if command and target == command.name]:
            session.say(tr("Aliases: {names}", names=", ".join(aliases)))
        return
    width = max(len(command.usage) for command in COMMANDS)
    for group, commands in COMMAND_GROUPS.items():
        session.say(f"{tr(group)}:")
        for command in commands:
            session.say(f"  {command.usage:<{width}}  {tr(command.help)}")
    session.say(tr("Keys:"))
    width = max(len(keys) for keys, _ in KEYS)
    for keys, effect in KEYS:
        session.say(f"  {keys:<{width}}  {tr(effect)}")


COMMAND_GROUPS: Mapping[str, Sequence[Command]] = {
    mark("Turns"): (
        Command("/undo", mark("Take back the last question and edit it"), turns.undo_turn),
        Command("/retry [N]", mark("Give another answer to the last question, or N others"), turns.retry_answer),
        Command("/versions [N]", mark("List all answers to the last question, or use number N"), turns.show_versions),
        Command("/edit [TURN]", mark("Edit a question and ask it again"), turns.edit_question, "turn"),
        Command("/answer [TURN]", mark("Edit an answer of the model"), turns.edit_answer, "turn"),
        Command("/continue", mark("Continue an answer that was cut off"), turns.continue_answer),
        Command("/branch [N]", mark("List the branches of this chat, or switch to number N"), turns.show_branches),
        Command("/fork [TURN]", mark("Start a new chat with the turns up to this one"), turns.fork_chat, "turn"),
        Command("/clear", mark("Start a new chat with the same system prompt"), turns.clear_chat),
    ),
    mark("Context"): (
        Command("/ctx", mark("Show what is in the context, turn by turn"), context.show_context, works_at_once=True),
        Command("/pin [TURN]", mark("Keep a turn when the context is full, or unpin it"), context.toggle_pin, "turn"),
        Command("/drop [TURN]", mark("Remove a turn from the context, or put it back"), context.toggle_drop, "turn"),
        Command(
            "/tokens [TEXT]",
            mark("Count the tokens of a text, or of the chat"),
            context.count_tokens,
            works_at_once=True,
        ),
        Command("/stats", mark("Show or hide statistics after each answer"), context.toggle_stats, works_at_once=True),
    ),
    mark("Model and settings"): (
        Command(
            "/model [NAME]", mark("Switch to another model, or show the current one"), models.switch_model, "model"
        ),
        Command(
            "/adapter [NAME] [SCALE]",
            mark("Scale a LoRA adapter, switch adapters on or off, or list them"),
            adapters.change_adapters,
            "adapter",
        ),
        Command("/system [TEXT]", mark("Set the system prompt, or show it"), models.set_system_prompt),
        Command(
            "/prompt [NAME]",
            mark("Use a system prompt from a file, or list the files"),
            models.use_prompt_file,
            "prompt",
        ),
        Command(
            "/set [NAME VALUE]",
            mark("Change a setting (temperature, seed, …), or show all"),
            models.change_setting,
            "setting",
        ),
    ),
    mark("Files and chats"): (
        Command("/read FILE", mark("Add a file to the next message"), files.attach_file, "file"),
        Command(
            "/copy [code|N]", mark("Copy the last answer, its last code block, or answer N"), files.copy_answer, "code"
        ),
        Command("/save [FILE]", mark("Save the conversation as JSON"), files.save_chat, "file"),
        Command(
            "/load FILE|CHAT", mark("Continue a saved conversation, or a chat by its number"), files.load_chat, "file"
        ),
        Command("/export FILE", mark("Export the chat as .md, .json or .html"), files.export_chat, "file"),
        Command("/title TEXT", mark("Rename this chat"), files.rename_chat),
    ),
    mark("Other"): (
        Command("/markdown", mark("Turn Markdown rendering on or off"), context.toggle_markdown),
        Command("/help [COMMAND]", mark("Show this help"), _show_help, "command", works_at_once=True),
        Command("/exit", mark("Exit (also Ctrl-D)"), _exit),
    ),
}
COMMANDS = [command for group in COMMAND_GROUPS.values() for command in group]

KEYS: Sequence[tuple[str, str]] = (
    ("Enter", mark("Send the message")),
    ("Alt-Enter, Ctrl-J, \\ Enter", mark("Insert a line break")),
    ('"""', mark("Begin and end a message of several lines")),
    ("Ctrl-C", mark("Stop an answer, clear the line, or exit (twice)")),
    ("Ctrl-D", mark("Exit")),
    ("Up, Down", mark("Recall earlier messages, also from other chats")),
    ("Ctrl-R", mark("Search earlier messages")),
    ("Tab", mark("Complete commands, models, settings and files (@path)")),
    ("Right, Ctrl-E", mark("Accept the gray suggestion")),
    ("Ctrl-X Ctrl-E", mark("Edit the message in $EDITOR")),
    ("Ctrl-Z", mark("Suspend; fg resumes")),
    ("@path", mark("Add a file to the message")),
    ("//", mark("Start a message with a slash")),
)

ALIASES = {"/quit": "/exit", "/bye": "/exit", "/q": "/exit", "/?": "/help", "/new": "/clear", "/regen": "/retry"}


def is_command(line: str) -> bool:
    """Return True for a line such as `/help`, but not for `//help`, `/etc/fstab` or `/* a comment */`."""
    return re.match(r"/[A-Za-z?]+(\s|$)", line) is not None


def unescape_slashes(line: str) -> str:
    """Replace two slashes at the start by one, unless they begin a comment (`// why`) or several lines of code."""
    escaped = re.match(r"/(/[^\s/]\S*)", line)
    return line[1:] if escaped and ("\n" not in line or find_command(escaped[1])) else line


def find_command(name: str) -> Command | None:
    """Return the command with this name or alias; case is ignored."""
    name = ALIASES.get(name.lower(), name.lower())
    return next((command for command in COMMANDS if command.name == name), None)


def works_during_answer(line: str) -> bool:
    """Return True for a command that need not wait until the answer ends."""
    command = find_command(line.split()[0]) if is_command(line) else None
    return command is not None and command.works_at_once


def describe_unknown(name: str) -> str:
    """Return the error for an unknown command, with a suggestion if a similar one exists."""
    similar = difflib.get_close_matches(name.lower(), [command.name for command in COMMANDS], n=1, cutoff=0.6)
    suggestion = [tr("Did you mean {name}?", name=similar[0])] if similar else []
    return " ".join([tr("There is no command {name}.", name=name), *suggestion])
