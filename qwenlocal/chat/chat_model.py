"""A loaded model with its chat template, ready for a conversation."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.chat.chat_template import CHATML, ChatTemplate, InvalidTemplate, require_template
from qwenlocal.chat.conversation import Conversation, GenerationConfig
from qwenlocal.chat.local_backend import LocalBackend
from qwenlocal.chat.thread import Thread
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import ChatTemplateMissing, LoadNote
from qwenlocal.engine.loader import EngineLoader, LoadedModel, LoadOptions
from qwenlocal.engine.memory import MemoryCheck
from qwenlocal.engine.memory_cache import MemoryCache, choose_budget
from qwenlocal.engine.prompt_cache import PromptCache
from qwenlocal.engine.scheduler import Scheduler
from qwenlocal.engine.speculation import NoSpeculation, Speculation
from qwenlocal.errors import BadWeights
from qwenlocal.i18n import tr
from qwenlocal.machine import Machine, this_machine


@dataclass(frozen=True)
class ChatModel(LoadedModel):
    """A loaded model and its chat template; without a template it only continues text."""

    template: ChatTemplate | None = None

    def conversation(self, config: GenerationConfig, thread: Thread | None = None) -> Conversation:
        """
        Continue `thread`, or start a new one.

        Raises
        ------
        UsageError: the model has no chat template.
        """
        hint = tr('Pass the beginning of a text: qwenlocal run MODEL --raw "Once upon a time"')
        template = require_template(self.template, hint)
        backend = LocalBackend(self.sequence, self.model.tokenizer, template, n_ctx=self.context.n_ctx, model=self.name)
        return Conversation(backend, config, thread)

    def create_scheduler(
        self, max_running: int, *, uses_lookup: bool = True, prompt_cache: PromptCache | None = None
    ) -> Scheduler:
        """
        Create a scheduler that answers `max_running` prompts at once, in place of conversations.

        Without a draft model, prompt lookup drafts if `uses_lookup`.
        """
        machine, drafter = this_machine(), self.drafter
        lookup = Speculation(self.costs) if uses_lookup and self.model.can_truncate else NoSpeculation()
        memory_cache = MemoryCache(choose_budget(self.plan.memory, machine.memory().available))

        def free_memory() -> bool:
            return memory_cache.clear() or (drafter is not None and drafter.give_up())

        return Scheduler(
            self.context,
            max_running,
            speculation=drafter or lookup,
            memory_cache=memory_cache,
            prompt_cache=prompt_cache,
            check_memory=MemoryCheck(machine.memory, machine.memory_pressure, free_memory),
        )


def load_chat_model(
    path: Path,
    options: LoadOptions,
    machine: Machine,
    *,
    name: str,
    size: int,
    raw: bool = False,
    defers_template_errors: bool = False,
    recommended: Mapping[str, float] = {},
    report: Callable[[float], None] = lambda fraction: None,
    loader: EngineLoader | None = None,
) -> ChatModel:
    """
    Load a model with `loader` and choose its chat template, none if it is `raw`.

    With `defers_template_errors`, an invalid template raises when it is used, so that the model can continue text. The
    other parameters are those of `EngineLoader.load`.

    Raises
    ------
    BadWeights: the template is invalid. The errors of `EngineLoader.load`.
    """
    # Import jinja2 (40 ms) while llama.cpp reads the weights.
    warm_up = threading.Thread(target=importlib.import_module, args=("qwenlocal.jinja_sandbox",), daemon=True)
    warm_up.start()
    loaded = (loader or EngineLoader()).load(
        path, options, machine, name=name, size=size, recommended=recommended, report=report
    )
    try:
        warm_up.join()
        template, notes = (None, ()) if raw else choose_template(loaded.model)
    except BadWeights as error:
        if not defers_template_errors:
            loaded.close()
            raise
        template, notes = InvalidTemplate(error), ()
    except BaseException:
        loaded.close()
        raise
    return ChatModel(**{**vars(loaded), "notes": (*loaded.notes, *notes)}, template=template)


def choose_template(model: Model) -> tuple[ChatTemplate | None, tuple[LoadNote, ...]]:
    """Return the file's template, or Qwen1.5's if the vocabulary has its control tokens."""
    source, tokenizer = model.metadata("tokenizer.chat_template"), model.tokenizer
    if source:
        return ChatTemplate(source, bos=tokenizer.bos, eos=tokenizer.eos), ()
    ids = tokenizer.tokenize("<|im_start|>", special=True)
    if len(ids) == 1 and tokenizer.is_control(ids[0]):
        return ChatTemplate(CHATML), (ChatTemplateMissing(),)
    return None, ()
