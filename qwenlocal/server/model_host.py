"""Models in memory: loaded when a request names them, unloaded when they have been idle for a while."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from qwenlocal.engine.loader import LoadOptions
from qwenlocal.errors import NotEnoughMemory
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.server.engine import Engine, ModelInfo
from qwenlocal.server.engine_process import EngineProcess
from qwenlocal.server.engine_worker import WorkerSpec
from qwenlocal.server.served_models import ServedModels, describe_model
from qwenlocal.server.wire import Ready


@dataclass(frozen=True)
class HostSettings:
    """
    Settings for loading models. Each runs `parallel` requests at the same time, and `max_waiting` others wait.

    A model is unloaded after `keep_alive` seconds without a request; never, if that is infinite. The adapters in
    `options` are for the model called `adapted_model` only.
    """

    options: LoadOptions
    parallel: int = 4
    max_waiting: int = 64
    keep_alive: float = 300.0
    adapted_model: str = ""


class _HostedModel:
    """
    A model and its process.

    `users` counts the open blocks of `ProcessHost.open`. After `keep_alive` seconds without any, at the time `expires`
    (in seconds since 1970), `timer` unloads the model.
    """

    def __init__(self, model: ProvidedModel, keep_alive: float) -> None:
        self.model, self.name, self.keep_alive = model, str(model.name), keep_alive
        self.users = 0
        self.timer: asyncio.TimerHandle | None = None
        self.expires = math.inf
        self.process: EngineProcess | None = None  # None until it is started
        self.loading: asyncio.Task[Ready] | None = None

    @property
    def ready(self) -> Ready | None:
        """The message of the process once the model is loaded; None before that."""
        is_loaded = self.loading and self.loading.done() and not self.loading.cancelled()
        return self.loading.result() if self.loading and is_loaded and not self.loading.exception() else None


class ProcessHost:
    """Runs each model in a process of its own. Implements `ModelHost`."""

    def __init__(
        self,
        models: ServedModels,
        settings: HostSettings,
        *,
        on_progress: Callable[[str, float], None] = lambda name, fraction: None,
        on_loaded: Callable[[str, Ready], None] = lambda name, ready: None,
        on_failed: Callable[[str, BaseException], None] = lambda name, error: None,
    ) -> None:
        """`on_progress` gets the name of a model and the fraction of it that is loaded."""
        self._models, self._settings = models, settings
        self._on_progress, self._on_loaded, self._on_failed = on_progress, on_loaded, on_failed
        self._hosted: dict[str, _HostedModel] = {}
        self._loading = asyncio.Lock()  # each load plan counts on the memory that is free when it is made
        self._unloading: set[asyncio.Task[None]] = set()

    def models(self) -> list[ModelInfo]:
        """All installed models, the loaded ones first."""
        infos = map(self._add_state, self._models.infos())
        return sorted(infos, key=lambda info: not info.is_loaded)

    async def find(self, name: str) -> ModelInfo:
        """
        Describe the model that `open` would load.

        Raises
        ------
        ModelNotFound: it is not on this disk.
        """
        return self._add_state(describe_model(await asyncio.to_thread(self._models.find, name)))

    def _add_state(self, info: ModelInfo) -> ModelInfo:
        hosted = self._hosted.get(info.name)
        if hosted is None or hosted.ready is None or not (hosted.process and hosted.process.is_alive):
            return info
        loaded = hosted.ready.info
        return replace(
            info,
            is_loaded=True,
            expires=time.time() + hosted.keep_alive if hosted.users else hosted.expires,
            n_ctx=loaded.n_ctx,
            n_ctx_train=loaded.n_ctx_train,
            has_template=loaded.has_template,
            bos_token=loaded.bos_token,
            eos_token=loaded.eos_token,
        )

    @contextlib.asynccontextmanager
    async def open(self, name: str, keep_alive: float | None = None) -> AsyncIterator[Engine]:
        """
        Load the model `name` ("" for the default one) and keep it loaded for the duration of the block.

        It stays loaded for `keep_alive` seconds after the last block; None keeps the time that was set before.

        Raises
        ------
        ModelNotFound: it is not on this disk. NotEnoughMemory, BadWeights, EngineCrashed: it cannot be loaded.
        """
        hosted = self._host(await asyncio.to_thread(self._models.find, name))
        assert hosted.loading is not None
        hosted.users += 1
        if hosted.timer:
            hosted.timer.cancel()
        if keep_alive is not None:
            hosted.keep_alive = keep_alive
        try:
            await asyncio.shield(hosted.loading)  # others wait for it as well
            assert hosted.process is not None
            yield hosted.process
        finally:
            hosted.users -= 1
            self._unload_later(hosted)

    async def unload(self, name: str) -> None:
        """
        Unload a model as soon as it is idle; do nothing if it is not loaded.

        Raises
        ------
        ModelNotFound: it is not on this disk.
        """
        model = await asyncio.to_thread(self._models.find, name)
        if hosted := self._hosted.get(str(model.name)):
            hosted.keep_alive = 0.0
            self._unload_later(hosted)

    async def close(self) -> None:
        """Unload all models."""
        for hosted in list(self._hosted.values()):
            self._unload(hosted)
        await self._wait_for_unloading()

    def _host(self, model: ProvidedModel) -> _HostedModel:
        """Return a model that is loaded or loading; start to load it if it is not, or if its process has ended."""
        hosted = self._hosted.get(str(model.name))
        if hosted and hosted.process and not hosted.process.is_alive:
            self._unload(hosted)
            hosted = None
        if hosted is None:
            hosted = _HostedModel(model, self._settings.keep_alive)
            self._hosted[hosted.name] = hosted
            hosted.loading = asyncio.get_running_loop().create_task(self._load(hosted))
            hosted.loading.add_done_callback(functools.partial(self._finish_loading, hosted))
        return hosted

    def _finish_loading(self, hosted: _HostedModel, task: asyncio.Task[Ready]) -> None:
        if task.cancelled():
            self._forget(hosted)
        elif error := task.exception():
            self._forget(hosted)
            self._on_failed(hosted.name, error)
        else:
            self._on_loaded(hosted.name, task.result())
            self._unload_later(hosted)  # its clients may have left

    async def _load(self, hosted: _HostedModel) -> Ready:
        """Start the process; if memory is short, unload idle models and try again."""
        async with self._loading:
            await self._wait_for_unloading()
            try:
                return await self._start(hosted)
            except NotEnoughMemory:
                unused = [other for other in self._hosted.values() if other.ready and not other.users]
                if not unused:
                    raise
                for other in unused:
                    self._unload(other)
                await self._wait_for_unloading()
                return await self._start(hosted)

    async def _start(self, hosted: _HostedModel) -> Ready:
        settings = self._settings
        is_adapted = hosted.name == settings.adapted_model
        options = settings.options if is_adapted else replace(settings.options, adapters=())
        hosted.process = EngineProcess(
            WorkerSpec(hosted.model, options, settings.parallel),
            max_waiting=settings.max_waiting,
            report=lambda fraction: self._on_progress(hosted.name, fraction),
        )
        return await hosted.process.start()

    def _unload_later(self, hosted: _HostedModel) -> None:
        """Unload a model after `keep_alive` seconds, unless it is used before."""
        if hosted.timer:
            hosted.timer.cancel()
        if hosted.users or hosted.ready is None:
            return
        hosted.expires = time.time() + hosted.keep_alive
        if hosted.keep_alive < math.inf:
            hosted.timer = asyncio.get_running_loop().call_later(hosted.keep_alive, self._unload, hosted)

    def _unload(self, hosted: _HostedModel) -> None:
        """Start unloading a model; it cannot be opened any more."""
        self._forget(hosted)
        task = asyncio.get_running_loop().create_task(self._stop(hosted))
        self._unloading.add(task)  # the event loop keeps only weak references
        task.add_done_callback(self._unloading.discard)

    async def _stop(self, hosted: _HostedModel) -> None:
        if hosted.timer:
            hosted.timer.cancel()
        if hosted.loading:
            hosted.loading.cancel()
        if hosted.process:
            await hosted.process.stop()

    async def _wait_for_unloading(self) -> None:
        """Wait until the processes of all models that are being unloaded have ended and their memory is free."""
        while self._unloading:
            await asyncio.wait(self._unloading)

    def _forget(self, hosted: _HostedModel) -> None:
        if self._hosted.get(hosted.name) is hosted:
            del self._hosted[hosted.name]
