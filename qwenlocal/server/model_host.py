"""Models in memory: loaded when a request names them, unloaded when nobody has used them for a while."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from qwenlocal.engine.loader import LoadOptions
from qwenlocal.errors import NotEnoughMemory
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.server.engine import Engine, ModelInfo
from qwenlocal.server.engine_process import EngineProcess
from qwenlocal.server.engine_worker import WorkerSpec
from qwenlocal.server.served_models import ServedModels
from qwenlocal.server.wire import Ready


@dataclass(frozen=True)
class HostSettings:
    """
    Settings for loading models: with `options`, each for `parallel` requests at the same time and `max_waiting` others.

    A model that nobody uses for `keep_alive` seconds is unloaded; never, if that is None.
    """

    options: LoadOptions
    parallel: int = 4
    max_waiting: int = 64
    keep_alive: float | None = 300.0


class _HostedModel:
    """A model and its process. `users` are the open blocks of `ProcessHost.open`; without any, `timer` unloads it."""

    def __init__(self, model: ProvidedModel) -> None:
        self.model, self.name = model, str(model.name)
        self.users = 0
        self.timer: asyncio.TimerHandle | None = None
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
    ) -> None:
        """`on_progress` gets the name of a model and the fraction of it that is loaded."""
        self._models, self._settings = models, settings
        self._on_progress, self._on_loaded = on_progress, on_loaded
        self._hosted: dict[str, _HostedModel] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def models(self) -> list[ModelInfo]:
        """All installed models, the loaded ones first."""
        infos = {info.name: info for info in self._models.infos()}
        for name, hosted in self._hosted.items():
            if hosted.ready and name in infos:
                infos[name] = replace(hosted.ready.info, digest=infos[name].digest)
        return sorted(infos.values(), key=lambda info: not info.is_loaded)

    @contextlib.asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Engine]:
        """
        Load the model `name` ("" for the default one) and keep it loaded for the duration of the block.

        Raises
        ------
        ModelNotFound: it is not on this disk. NotEnoughMemory, BadWeights, EngineCrashed: it cannot be loaded.
        """
        hosted = self._host(await asyncio.to_thread(self._models.find, name))
        assert hosted.loading is not None
        hosted.users += 1
        if hosted.timer:
            hosted.timer.cancel()
        try:
            await asyncio.shield(hosted.loading)  # others wait for it as well
            assert hosted.process is not None
            yield hosted.process
        finally:
            hosted.users -= 1
            self._unload_later(hosted)

    async def close(self) -> None:
        """Unload all models."""
        await asyncio.gather(*map(self._unload, list(self._hosted.values())))

    def _host(self, model: ProvidedModel) -> _HostedModel:
        """Return a model that is loaded or loading; start to load it if it is not, or if its process has ended."""
        hosted = self._hosted.get(str(model.name))
        if hosted is None or (hosted.process and not hosted.process.is_alive):
            hosted = _HostedModel(model)
            self._hosted[hosted.name] = hosted
            hosted.loading = asyncio.get_running_loop().create_task(self._load(hosted))
            hosted.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return hosted

    async def _load(self, hosted: _HostedModel) -> Ready:
        """Start the process; if memory is short, unload the models that nobody uses, and try again."""
        try:
            try:
                ready = await self._start(hosted)
            except NotEnoughMemory:
                unused = [other for other in self._hosted.values() if not other.users]
                if not unused:
                    raise
                await asyncio.gather(*map(self._unload, unused))
                ready = await self._start(hosted)
        except BaseException:
            self._forget(hosted)
            raise
        self._on_loaded(hosted.name, ready)
        return ready

    async def _start(self, hosted: _HostedModel) -> Ready:
        settings = self._settings
        hosted.process = EngineProcess(
            WorkerSpec(hosted.model, settings.options, settings.parallel),
            max_waiting=settings.max_waiting,
            report=lambda fraction: self._on_progress(hosted.name, fraction),
        )
        return await hosted.process.start()

    def _unload_later(self, hosted: _HostedModel) -> None:
        """Unload a model after a while, unless somebody uses it until then."""
        keep_alive = self._settings.keep_alive
        if hosted.users or hosted.ready is None or keep_alive is None:
            return
        loop = asyncio.get_running_loop()

        def start() -> None:
            self._forget(hosted)  # before the task begins, so that nobody opens it until then
            task = loop.create_task(self._unload(hosted))
            self._tasks.add(task)  # the event loop keeps only weak references
            task.add_done_callback(self._tasks.discard)

        hosted.timer = loop.call_later(keep_alive, start)

    async def _unload(self, hosted: _HostedModel) -> None:
        self._forget(hosted)
        if hosted.timer:
            hosted.timer.cancel()
        if hosted.loading:
            hosted.loading.cancel()
        if hosted.process:
            await hosted.process.stop()

    def _forget(self, hosted: _HostedModel) -> None:
        if self._hosted.get(hosted.name) is hosted:
            del self._hosted[hosted.name]
