"""The models of a chat: the current one, and earlier ones while memory allows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.chat.worker import BackgroundTask
from qwenlocal.cli.console import say_dimmed
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.options import RunOptions
from qwenlocal.errors import NotEnoughMemory
from qwenlocal.library.names import PathName
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.model_files import parse_shard
from qwenlocal.terminal.progress import loading_status

if TYPE_CHECKING:
    from qwenlocal.api.model_loader import ModelLoader
    from qwenlocal.chat.chat_model import ChatModel
    from qwenlocal.chat.conversation import Conversation, GenerationConfig
    from qwenlocal.chat.thread import Thread
    from qwenlocal.engine.adapters import LoadedAdapters
    from qwenlocal.engine.draft_model import ModelDrafter
    from qwenlocal.engine.load_plan import LoadNote
    from qwenlocal.weights.adapter_spec import AdapterSpec


class _PooledModel(NamedTuple):
    model: ProvidedModel
    loaded: ChatModel


class ModelPool:
    """
    Loads the models of a chat and keeps them in memory. Implements `terminal.session.ChatModels`.

    The first model loads in the background after `start_loading`, while the user types; what loading needs is imported
    there too. `on_first_loaded` is called in that thread with the exception, or None.
    """

    def __init__(
        self,
        app: AppContext,
        options: RunOptions,
        first: ProvidedModel,
        draft: ProvidedModel | None,
        adapters: Sequence[AdapterSpec] = (),
    ) -> None:
        """`first` is the model that the chat starts with, with `adapters`, `draft` the draft model of all models."""
        self._app, self._options, self._first, self._draft, self._adapters = app, options, first, draft, adapters
        self._current = str(first.name)
        self._pooled: dict[str, _PooledModel] = {}
        self._loader: ModelLoader | None = None
        self._config: GenerationConfig | None = None
        self._fraction = 0.0  # of the first model that is loaded
        self._first_load = BackgroundTask(
            self._load_first, self._stop_first, lambda failure: self.on_first_loaded(failure)
        )
        self.on_first_loaded: Callable[[BaseException | None], object] = lambda failure: None

    # --- the first model

    def start_loading(self) -> None:
        """Start to load the first model in the background."""
        self._first_load.start()

    def load_first(self, thread: Thread) -> Conversation:
        """Return the conversation of `thread` with the first model, once it is loaded; say how it was loaded."""
        from qwenlocal.terminal.load_notes import describe_load, describe_note

        with loading_status(sys.stderr, str(self._first.name)) as show:
            while not self._first_load.is_done:
                self._first_load.start()
                show(self._fraction)
                self._first_load.wait(0.1)
        loaded = self._first_load.result()
        self._pooled[str(self._first.name)] = _PooledModel(self._first, loaded)
        self._config = self._options.generation_config(loaded.sampling)
        conversation = loaded.conversation(self._config, thread)
        for sentence in (describe_load(loaded.plan), *map(describe_note, loaded.notes)):
            say_dimmed(sentence)
        return conversation

    def _load_first(self) -> ChatModel:
        from qwenlocal.huge_pages import collapse_in_background

        def report(fraction: float) -> None:
            self._fraction = fraction

        loaded = self._model_loader.load(self._first, report)
        collapse_in_background(self._first.record.size, lambda: loaded.context.is_computing)
        return loaded

    def _stop_first(self) -> None:
        if self._loader:
            self._loader.stop()

    # --- all models

    @property
    def title(self) -> str:
        """The displayed name of the first model."""
        name = self._first.name
        return name.path.name if isinstance(name, PathName) else str(name)

    @property
    def current(self) -> str:
        """The name of the model that answers."""
        return self._current

    def names(self) -> Sequence[str]:
        """Names of the installed models."""
        return [record.name for record in self._app.library.store.records()]

    def nearby_files(self) -> Sequence[str]:
        """Paths of the GGUF files in the folder of the current model, relative to the working directory if below it."""
        pooled = self._pooled.get(self._current)
        folder = (pooled.model if pooled else self._first).record.path.absolute().parent
        is_below = folder.is_relative_to(Path.cwd())
        paths = [path for path in sorted(folder.glob("*.gguf")) if not _is_later_shard(path)]
        return [f"./{path.relative_to(Path.cwd())}" if is_below else str(path) for path in paths]

    @property
    def drafter(self) -> ModelDrafter | None:
        """The current model's drafter; None without a draft model."""
        pooled = self._pooled.get(self._current)
        return pooled.loaded.drafter if pooled else None

    @property
    def adapters(self) -> LoadedAdapters | None:
        """The adapters of the current model; None until it is loaded."""
        pooled = self._pooled.get(self._current)
        return pooled.loaded.adapters if pooled else None

    def switch(self, name: str, thread: Thread) -> Conversation:
        """
        Continue `thread` with another model, loaded if necessary; the settings of the answers stay.

        Raises
        ------
        QwenlocalError: there is no such model, or it cannot be loaded; the model before stays the current one.
        """
        if not self._pooled:
            self.load_first(thread)
        models = self._app.library.models
        parsed = models.resolve(name)
        key = str(parsed)
        if key not in self._pooled:
            model = ProvidedModel(parsed, models.ensure_model(parsed))
            loaded = self._make_room(lambda: self._load(model))
            self._pooled[key] = _PooledModel(model, loaded)
        loaded = self._pooled[key].loaded
        conversation = self._conversation(loaded, thread)
        self._current = key
        self._say_plan(loaded, loaded.notes)
        return conversation

    def resize_context(self, n_ctx: int, thread: Thread) -> Conversation:
        """
        Load the current model again with a context of `n_ctx` tokens.

        Raises
        ------
        NotEnoughMemory: it does not fit; nothing changes.
        """
        model, before = self._pooled[self._current]
        before.sequence.save_prompt_cache()
        loaded = self._make_room(lambda: self._load(model, n_ctx))
        loaded.adapters.set_scales(before.adapters.scales)
        before.close()
        self._pooled[self._current] = _PooledModel(model, loaded)
        self._say_plan(loaded, [note for note in loaded.notes if note not in before.notes])
        return self._conversation(loaded, thread)

    def _load(self, model: ProvidedModel, n_ctx: int | None = None) -> ChatModel:
        """Load a model; adapters are for the first one only."""
        is_first = str(model.name) == str(self._first.name)
        return self._model_loader.load_in_thread(model, n_ctx=n_ctx, use_adapters=is_first)

    def close(self, *, keep: bool) -> None:
        """Free all memory; with `keep`, save caches first. A model that is still loading is stopped."""
        first = self._first_load.cancel()
        if not self._pooled and first:
            first.close()
        for model, loaded in self._pooled.values():
            self._model_loader.close(loaded, model.record, keep=keep)
        self._pooled.clear()

    @property
    def _model_loader(self) -> ModelLoader:
        from qwenlocal.cli.run_models import create_loader

        if self._loader is None:
            self._loader = create_loader(self._app, self._options, self._draft, self._adapters)
        return self._loader

    def _conversation(self, loaded: ChatModel, thread: Thread) -> Conversation:
        assert self._config is not None  # set with the first model
        return loaded.conversation(self._config, thread)

    def _say_plan(self, loaded: ChatModel, notes: Sequence[LoadNote]) -> None:
        from qwenlocal.terminal.load_notes import describe_load, describe_note

        for sentence in (*map(describe_note, notes), describe_load(loaded.plan)):
            self._app.say(sentence)

    def _make_room(self, load: Callable[[], ChatModel]) -> ChatModel:
        """Load a model; if memory is short, close the models that do not answer and try again."""
        try:
            return load()
        except NotEnoughMemory:
            others = [name for name in self._pooled if name != self._current]
            if not others:
                raise
            for name in others:
                self._pooled.pop(name).loaded.close()
            return load()


def _is_later_shard(path: Path) -> bool:
    shard = parse_shard(path.name)
    return shard is not None and shard.number > 1
