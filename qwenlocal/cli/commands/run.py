"""`qwenlocal run`: one answer on standard output, a chat, or a batch."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from qwenlocal.cli.console import can_chat
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.options import RunOptions
from qwenlocal.cli.remote_pool import RemotePool, open_remote_pool
from qwenlocal.cli.server_pool import ServerPool, find_usable_servers, open_server_pool
from qwenlocal.cli.text_input import fill_placeholders, read_prompt_file, read_stdin
from qwenlocal.errors import (
    BadWeights,
    IncompleteAnswer,
    Interrupted,
    InvalidChoice,
    JournalError,
    LowMemory,
    UsageError,
)
from qwenlocal.formatting import join_sentences
from qwenlocal.i18n import tr
from qwenlocal.terminal.tty import disable_echo

_LONG_ANSWER = 8192  # tokens
_TEMPLATE_TOKENS = 1024  # more than what chat templates add to a prompt

if TYPE_CHECKING:
    from qwenlocal.chat.chat_model import ChatModel
    from qwenlocal.chat.conversation import GenerationConfig
    from qwenlocal.chat.events import Done, Event
    from qwenlocal.engine.draft_model import ModelDrafter
    from qwenlocal.library.provider import ProvidedModel


def run_model(options: RunOptions, app: AppContext, early_bytes: bytes | None) -> None:
    """
    Answer a prompt, answer a batch of prompts, or open a chat.

    `early_bytes` have been typed before the terminal's echo was turned off; None if it is still on.

    Raises
    ------
    UsageError: the options contradict each other, or there is nothing to answer.
    Everything that finding, loading and running a model raises.
    """
    _check_options(options)
    remote = open_remote_pool(app, options, options.model_name)
    if options.batch is not None:
        from qwenlocal.cli.commands.batch import run_batch

        run_batch(app, options)
        return
    prompt, system = _read_prompts(options)
    if prompt is None or options.interactive or options.resume is not None:
        _chat(app, options, remote, prompt, system, early_bytes)
    elif remote:
        _answer_elsewhere(app, options, remote, prompt, system)
    else:
        servers = find_usable_servers(app, options)
        model, draft = app.library.models.ensure_models(options.model_name, options.draft)
        if pool := open_server_pool(servers, model, options):
            _answer_elsewhere(app, options, pool, prompt, system)
        else:
            _answer_once(app, options, model, draft, prompt, system)


def _chat(
    app: AppContext,
    options: RunOptions,
    remote: RemotePool | None,
    prompt: str | None,
    system: str,
    early_bytes: bytes | None,
) -> None:
    resumed = None
    if options.resume is not None:
        from qwenlocal.cli.commands.chat import select_chat

        try:
            resumed = select_chat(app, options.resume)
        except JournalError as error:
            consequence = tr("A new chat starts; it is not saved.")
            app.say(join_sentences(str(error), consequence, error.hint))
            options = replace(options, journal=False)
    model_name = options.model_name or (resumed.info.model if resumed else None)
    elsewhere: RemotePool | ServerPool | None = remote or open_remote_pool(app, options, model_name)
    if elsewhere is None:
        servers = find_usable_servers(app, options)
        if model_name is None and prompt is None and not app.library.store.records():
            from qwenlocal.cli.first_run import choose_model

            model_name = choose_model(app)
        model, draft = app.library.models.ensure_models(model_name, options.draft)
        elsewhere = open_server_pool(servers, model, options)
        adapters = app.library.adapters.ensure_adapters(options.adapters, model.record)
    if elsewhere:
        app.say(elsewhere.notice)
    keys_kept = disable_echo(sys.stdin, sys.stdout) if early_bytes is None else contextlib.nullcontext(early_bytes)
    with keys_kept as typed:  # before the imports: keys typed during them count
        from qwenlocal.cli.commands.chat import run_chat
        from qwenlocal.cli.model_pool import ModelPool

        pool = elsewhere or ModelPool(app, options, model, draft, adapters)
        run_chat(app, options, pool, resumed, system, prompt, typed)


# --- options and prompts


def _check_options(options: RunOptions) -> None:
    """Refuse values and combinations that cannot work, before anything is downloaded or loaded."""
    from qwenlocal.chat.context_window import OVERFLOW_POLICIES
    from qwenlocal.engine.sampling import Sampling

    options.merge_sampling(Sampling())
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UsageError(tr("-n must be at least 1, not {limit}.", limit=options.max_tokens))
    if options.output and options.batch is None:
        raise UsageError(
            tr("-o is only for --batch."), hint=tr("To save one answer: qwenlocal run MODEL PROMPT > FILE")
        )
    if options.overflow not in OVERFLOW_POLICIES:
        raise InvalidChoice("--overflow", OVERFLOW_POLICIES, options.overflow)
    if options.raw and (options.system or options.interactive):
        raise UsageError(tr("--raw continues plain text, so it cannot be combined with --system or -i."))
    if options.batch is not None and (
        options.interactive or options.raw or options.resume is not None or options.prompt_words
    ):
        raise UsageError(
            tr("--batch reads its prompts from a file, so it cannot be combined with a prompt, -i, --raw or --resume.")
        )
    if options.resume is not None and not can_chat():
        raise UsageError(tr("--resume and --continue need a terminal."))
    if options.interactive and not can_chat():
        raise UsageError(tr("-i needs a terminal."))


def _read_prompts(options: RunOptions) -> tuple[str | None, str]:
    """
    Return the prompt (None: there is none) and the system prompt, from arguments, files and standard input.

    Raises
    ------
    UsageError: there is no prompt, and no terminal to chat in.
    """
    parts = [" ".join(options.prompt_words)] if options.prompt_words else []
    system = options.system or ""
    if options.file:
        text = read_prompt_file(options.file)
        if options.interactive:
            system = system or text.rstrip("\r\n")
        else:
            parts.append(text if options.raw else text.rstrip("\r\n"))
    if sys.stdin is not None and not sys.stdin.isatty():
        piped = read_stdin(is_optional=any(part.strip() for part in parts))
        parts.append(piped if options.raw else piped.rstrip("\r\n"))
    parts = [part for part in parts if part.strip()]
    prompt = "\n\n".join(parts) if parts else None
    if options.raw and prompt is None:
        raise _no_text()
    if options.template is not None:
        prompt = fill_placeholders(options.template, {**({"input": prompt} if prompt else {}), **options.variables})
    if prompt is None and not can_chat():
        raise UsageError(
            tr("There is no prompt, and no terminal to chat in."),
            hint=tr('Pass a prompt: qwenlocal run MODEL "Why is the sky blue?", or pipe text into it.'),
        )
    return prompt, system


def _no_text() -> UsageError:
    return UsageError(tr("There is no text to continue."), hint=tr('Pass some: --raw "Once upon a time"'))


# --- one answer


def _answer_elsewhere(
    app: AppContext, options: RunOptions, pool: RemotePool | ServerPool, prompt: str, system: str
) -> None:
    from qwenlocal.chat.thread import Thread

    conversation = pool.load_first(Thread(system))
    if options.stats and isinstance(pool, ServerPool):
        app.say(pool.notice)
    done = _show_answer(options, functools.partial(conversation.ask, prompt), conversation.stop)
    if done.is_incomplete:
        raise IncompleteAnswer(
            tr("The answer is not complete JSON ({reason}).", reason=tr(done.finish_reason.value)),
            hint=tr("Allow more tokens (-n), or use a model and an engine with structured outputs."),
        )


def _answer_once(
    app: AppContext, options: RunOptions, model: ProvidedModel, draft: ProvidedModel | None, prompt: str, system: str
) -> None:
    enough = _enough_context(prompt + system, options.max_tokens)
    options = replace(options, load_request=replace(options.load_request, max_n_ctx=enough))

    from qwenlocal.cli.run_models import create_loader, load_with_status  # imports llama.cpp, once there is a model
    from qwenlocal.terminal.load_notes import describe_load, describe_note

    adapters = app.library.adapters.ensure_adapters(options.adapters, model.record)
    loader = create_loader(app, options, draft, adapters)
    loaded = load_with_status(loader, model)
    for sentence in (*([describe_load(loaded.plan)] if options.stats else []), *map(describe_note, loaded.notes)):
        app.say(sentence)
    keep = True
    try:
        _print_answer(options, loaded, prompt, system)
    except (LowMemory, BadWeights):
        keep = False  # no memory to save the prompt cache with, or nothing worth saving
        raise
    finally:
        loader.close(loaded, model.record, keep=keep)


def _enough_context(text: str, max_tokens: int | None) -> int:
    """Return a context, in steps of 1,024 tokens, that holds the prompt `text` and a long answer, or `max_tokens`."""
    tokens = len(text.encode(errors="replace")) + (max_tokens or _LONG_ANSWER) + _TEMPLATE_TOKENS
    return -(-tokens // 1024) * 1024  # a token has at least one byte


def _print_answer(options: RunOptions, loaded: ChatModel, prompt: str, system: str) -> None:
    from qwenlocal.api.answer import incomplete_answer
    from qwenlocal.chat.events import FinishReason
    from qwenlocal.chat.thread import Thread

    config = options.generation_config(loaded.sampling)
    if loaded.template is None:
        if system:
            raise UsageError(tr("A base model continues text; it cannot use a system prompt."))
        begin, stop = _continuation(loaded, prompt, config, special=options.raw), loaded.sequence.stop
    else:
        conversation = loaded.conversation(config, Thread(system))
        begin, stop = functools.partial(conversation.ask, prompt), conversation.stop
    done = _show_answer(options, begin, stop, loaded.drafter)
    if done.is_incomplete:
        raise incomplete_answer(done.finish_reason, config.max_tokens, loaded.context.n_ctx)
    if done.finish_reason is FinishReason.CONTEXT_FULL:
        full = tr("the answer stopped because the context of {n_ctx:,} tokens is full.", n_ctx=loaded.context.n_ctx)
        sys.stderr.write(f"qwenlocal: {full}\n")


def _show_answer(
    options: RunOptions,
    begin: Callable[[], Iterator[Event]],
    stop: Callable[[], None],
    drafter: ModelDrafter | None = None,
) -> Done:
    from qwenlocal.chat.events import FinishReason
    from qwenlocal.chat.worker import iterate_in_thread
    from qwenlocal.terminal.view import DRAFT_UNLOADED, describe_drafting, describe_stats, print_answer

    with iterate_in_thread(begin, stop) as events:
        done = print_answer(events, sys.stdout, sys.stderr)
    if options.stats:
        sys.stderr.write(describe_stats(done) + "\n")
        if drafter:
            sys.stderr.write(describe_drafting(drafter) + "\n")
    if drafter and drafter.has_given_up:
        sys.stderr.write(f"qwenlocal: {tr(DRAFT_UNLOADED)}\n")
    if done.finish_reason is FinishReason.INTERRUPTED:
        raise Interrupted
    return done


def _continuation(
    loaded: ChatModel, text: str, config: GenerationConfig, *, special: bool
) -> Callable[[], Iterator[Event]]:
    """Return a function that continues `text`; with `special` (--raw), control tokens spelled in it are parsed."""
    from qwenlocal.chat.generate import stream_answer

    tokenizer = loaded.model.tokenizer
    ids = tokenizer.tokenize(text, special=special, add_bos=tokenizer.adds_bos)
    if not ids:
        raise _no_text()
    return lambda: stream_answer(
        loaded.sequence,
        tokenizer,
        ids,
        config.sampling,
        max_tokens=config.max_tokens,
        stop_strings=config.stop_strings,
    )
