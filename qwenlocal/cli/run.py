"""`qwenlocal run`: one answer on standard output, or a chat."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.chat.fill import filled
from qwenlocal.chat.room import OVERFLOWS
from qwenlocal.chat.thread import Thread
from qwenlocal.cli.asked import Asked
from qwenlocal.cli.texts import standard_input, text_of
from qwenlocal.cli.wiring import Program
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import BadWeights, Interrupted, MemoryLow, ModelNotFound, UsageProblem
from qwenlocal.language import tr
from qwenlocal.library.names import Name
from qwenlocal.library.store import Record
from qwenlocal.paths import shipped, typed

if TYPE_CHECKING:
    from qwenlocal.chat.conversation import Manner
    from qwenlocal.chat.events import Event
    from qwenlocal.chat.loading import Loaded


def run_model(asked: Asked) -> None:
    """Do what `qwenlocal run` was asked to."""
    _check(asked)
    if asked.batch is not None:
        _answer_batch(asked)
        return
    prompt, system = _texts(asked)
    if asked.template is not None:
        prompt = filled(asked.template, {**({"input": prompt} if prompt else {}), **asked.values})
    program = Program()
    going_on = None
    if asked.resume is not None:
        from qwenlocal.cli.resuming import chosen_chat

        going_on = chosen_chat(program, asked.resume)
    words = asked.model_name or (going_on.chat.model if going_on else None)
    if not words and prompt is None and not program.store.records():
        from qwenlocal.cli.first_run import pick

        words = pick(program)
    if words:
        name = program.parse(words)
        record = program.have(name, limit_rate=asked.limit_rate)
    else:
        name, record = program.have_default(limit_rate=asked.limit_rate)
    if prompt is None or asked.interactive or going_on:
        from qwenlocal.cli.chatting import chat

        chat(asked, program, name, record, going_on, system, prompt)
        return
    loaded = _load(asked, program, name, record)
    if asked.stats:
        program.say(loaded.plan.sentence())
    for note in loaded.notes:
        program.say(note)
    keep = True
    try:
        _answer(asked, loaded, prompt, system)
    except (MemoryLow, BadWeights):
        keep = False  # there is no memory for it, or nothing worth keeping
        raise
    finally:
        from qwenlocal.cli.opening import close

        close(loaded, record, program, keep=keep)


def _answer_batch(asked: Asked) -> None:
    """Read all there is to answer first: what is wrong in it is said before anything is loaded."""
    from qwenlocal.cli.batch import answer_batch, done_before, read_batch
    from qwenlocal.cli.opening import close

    if asked.interactive or asked.raw or asked.resume or asked.prompt_words:
        raise UsageProblem(
            tr("--batch takes its prompts from a file; no other prompt, -i, --raw or --resume beside it.")
        )
    system = asked.system or (_prompt_file(asked.file).rstrip("\n") if asked.file else "")
    items = read_batch(asked.batch or "", system, asked.template, asked.values)
    output = typed(asked.output) if asked.output else None
    if output and output.exists() and output.samefile(typed(asked.batch or "")):
        raise UsageProblem(tr("{output} is the batch itself.", output=output), hint=tr("Name another file with -o."))
    done = done_before(output)
    left = [item for item in items if item.id not in done]
    program = Program()
    if not left:
        program.say(tr("All {count:,} are answered already.", count=len(items)))
        return
    name = program.parse(asked.model_name) if asked.model_name else None
    if name is None:
        name, record = program.have_default(limit_rate=asked.limit_rate)
    else:
        record = program.have(name, limit_rate=asked.limit_rate)
    loaded = _load(asked, program, name, record)
    try:
        answer_batch(asked, loaded, left, output, len(items) - len(left))
    finally:
        close(loaded, record, program, keep=False)


def _load(asked: Asked, program: Program, name: Name, record: Record) -> Loaded:
    from qwenlocal.chat.background import in_background
    from qwenlocal.cli.opening import Opener
    from qwenlocal.terminal.status import loading_status

    opener = Opener(asked, program)

    def load() -> Iterator[Loaded]:
        yield opener.load(name, record, status)

    with loading_status(sys.stderr, str(name)) as status, in_background(load, opener.loading.stop) as found:
        return next(found)


def _check(asked: Asked) -> None:
    Sampling().with_known(asked.sampling)  # says what is out of range before anything is fetched or loaded
    if asked.limit is not None and asked.limit < 1:
        raise UsageProblem(tr("-n must be at least 1; it is {limit}.", limit=asked.limit))
    if asked.output and asked.batch is None:
        raise UsageProblem(
            tr("-o says where the answers of --batch go."), hint=tr("For one answer: qwenlocal run … > FILE")
        )
    if asked.resume is not None and not _can_chat():
        raise UsageProblem(tr("--resume and --continue go on in a terminal, and this is none."))
    if asked.overflow not in OVERFLOWS:
        raise UsageProblem(
            tr("--overflow is {names}; it is {overflow}.", names=", ".join(OVERFLOWS), overflow=asked.overflow)
        )
    if asked.raw and (asked.system or asked.interactive):
        raise UsageProblem(tr("--raw continues the text as it stands; --system and -i have no place in it."))


def _texts(asked: Asked) -> tuple[str | None, str]:
    """The prompt (None: there is none), and the system prompt."""
    parts = [" ".join(asked.prompt_words)] if asked.prompt_words else []
    system = asked.system or ""
    if asked.file:
        text = _prompt_file(asked.file)
        if asked.interactive:
            system = system or text.rstrip("\n")
        else:
            parts.append(text if asked.raw else text.rstrip("\n"))
    piped = "" if sys.stdin is None or sys.stdin.isatty() else standard_input()
    if piped.strip():
        parts.append(piped if asked.raw else piped.rstrip("\n"))
    parts = [part for part in parts if part.strip()]
    prompt = "\n\n".join(parts) if parts else None
    if asked.raw and prompt is None:
        raise UsageProblem(tr("There is no text to continue."), hint=tr('Give a beginning: --raw "Once upon a time"'))
    if (prompt is not None or asked.template is not None) and not asked.interactive:
        return prompt, system
    if asked.interactive and not _can_chat():
        raise UsageProblem(tr("-i opens a chat, and this is not a terminal to chat in."))
    if not _can_chat():
        raise UsageProblem(
            tr("There is nothing to answer: no prompt was given, and this is not a terminal to chat in."),
            hint=tr('Give a prompt: qwenlocal run MODEL "Why is the sky blue?", or pipe text into it.'),
        )
    return prompt, system


def _can_chat() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _prompt_file(name: str) -> str:
    """A file of the user's, or one of the prompts that come with the program."""
    own = shipped("prompts") / Path(name).name
    if not os.path.exists(typed(name)) and own.is_file():
        return text_of(str(own))
    try:
        return text_of(name)
    except ModelNotFound as absent:
        names = ", ".join(sorted(path.name for path in shipped("prompts").glob("*.txt")))
        hint = tr("Prompts that come with the program: ") + names
        raise ModelNotFound(name, reason=str(absent), hint=hint) from absent


def _answer(asked: Asked, loaded: Loaded, prompt: str, system: str) -> None:
    from qwenlocal.chat.background import in_background
    from qwenlocal.chat.conversation import Manner
    from qwenlocal.chat.events import Why
    from qwenlocal.terminal.answer import show_answer

    manner = Manner(_sampling(asked, loaded), asked.limit, asked.stops, asked.overflow)
    if loaded.template is None:
        if system:
            raise UsageProblem(tr("A base model continues text; a system prompt has no place in it."))
        begin, stop = _continuation(loaded, prompt, manner, special=asked.raw), loaded.sequence.stop
    else:
        conversation = loaded.conversation(manner, Thread(system))
        begin, stop = functools.partial(conversation.ask, prompt), conversation.stop
    with in_background(begin, stop) as events:
        done = show_answer(events, sys.stdout, sys.stderr)
    if asked.stats:
        sys.stderr.write(done.stats.sentence(done.why) + "\n")
        if loaded.trial:
            sys.stderr.write((loaded.trial.verdict or tr("The draft model is still being tried.")) + "\n")
    if done.why is Why.INTERRUPTED:
        raise Interrupted
    if done.why is Why.CONTEXT:
        full = tr("the answer stopped because the context of {n_ctx:,} tokens is full.", n_ctx=loaded.context.n_ctx)
        sys.stderr.write(f"qwenlocal: {full}\n")


def _sampling(asked: Asked, loaded: Loaded) -> Sampling:
    return replace(loaded.sampling.with_known(asked.sampling), grammar=asked.grammar)


def _continuation(loaded: Loaded, text: str, manner: Manner, *, special: bool) -> Callable[[], Iterator[Event]]:
    """What follows `text`; with `special`, control tokens spelt in it are control tokens, as --raw wants it."""
    from qwenlocal.chat.turn import answer

    vocabulary = loaded.model.vocabulary
    ids = vocabulary.tokenize(text, special=special, add_bos=vocabulary.adds_bos)
    if not ids:
        raise UsageProblem(tr("There is no text to continue."), hint=tr('Give a beginning: --raw "Once upon a time"'))
    return lambda: answer(loaded.sequence, vocabulary, ids, manner.sampling, limit=manner.limit, stops=manner.stops)
