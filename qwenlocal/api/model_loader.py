"""
A loader of installed models, which applies their tuned settings and explains faults of their files.

Imports llama.cpp.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qwenlocal.chat.chat_model import ChatModel, load_chat_model
from qwenlocal.chat.worker import BackgroundTask, iterate_in_thread
from qwenlocal.devices import Device
from qwenlocal.engine.context import Aborted, AbortFlag
from qwenlocal.engine.device_plan import DraftSpec
from qwenlocal.engine.llama import LoadCancelled, load_library
from qwenlocal.engine.loader import EngineLoader, LoadOptions
from qwenlocal.engine.prompt_cache import fingerprint_model
from qwenlocal.engine.tuned_settings import GpuUse, TunedSettings, read_tuned_settings, write_costs, write_gpu_use
from qwenlocal.errors import (
    BadWeights,
    ContextNotCreated,
    EngineCrashed,
    Interrupted,
    NotEnoughMemory,
    NotWritable,
    QwenlocalError,
)
from qwenlocal.ggml import can_dequantize, read_tensor_types, tensor_type_by_number
from qwenlocal.i18n import tr
from qwenlocal.library.names import CatalogName
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.library.store import ModelRecord
from qwenlocal.machine import power_source, this_machine
from qwenlocal.paths import Folders
from qwenlocal.weights.load_errors import check_file
from qwenlocal.weights.split_model import shard_paths


def _find_unusable_types(files: Iterable[Path]) -> list[Path]:
    """List the files that have tensors of types such as i32, which llama.cpp loads but crashes on when it computes."""
    return [file for file in files if any(map(_has_unusable_types, shard_paths(file)))]


def _has_unusable_types(part: Path) -> bool:
    try:
        kinds = [tensor_type_by_number(number) for number in read_tensor_types(part)]
    except ValueError:  # llama.cpp will report why it cannot read the file
        return False
    return not all(kind and can_dequantize(kind) for kind in kinds)


def _find_fault(files: Iterable[Path]) -> BadWeights | None:
    """Return the reason why llama.cpp cannot run one of the files; None if it can run all of them."""
    for file in files:
        try:
            check_file(file)
        except BadWeights as error:
            return error
    return None


class ModelLoader:
    """Loads installed models with the same options, each with the same draft model, and closes them."""

    def __init__(
        self,
        folders: Folders,
        options: LoadOptions,
        draft: ProvidedModel | None = None,
        *,
        raw: bool = False,
        defers_template_errors: bool = False,
        on_crash: Callable[[QwenlocalError], object] = lambda error: None,
        on_measure: Callable[[Sequence[Device]], object] = lambda devices: None,
    ) -> None:
        """
        Prepare to load with `options`, of which `tuned` and `draft` depend on the model and are filled in here.

        `raw` models have no chat template; with `defers_template_errors`, an invalid one raises when it is used. If
        llama.cpp is about to end the process, `on_crash` gets the reason, in a thread of llama.cpp. `on_measure` gets
        the GPUs that are compared with the processor, which is done once per model.
        """
        self._folders, self._options, self._on_crash, self._on_measure = folders, options, on_crash, on_measure
        self._raw, self._defers_template_errors = raw, defers_template_errors
        self._draft = DraftSpec(str(draft.name), draft.record.path, draft.record.size) if draft else None
        self._engine_loader, self._abort_measurement = EngineLoader(), AbortFlag()
        self._loading: Sequence[Path] = ()
        self._loaded: set[Path] = set()
        self._uses_gpu = False

    def load(
        self,
        model: ProvidedModel,
        report: Callable[[float], None] = lambda _: None,
        n_ctx: int | None = None,
        *,
        use_adapters: bool = True,
    ) -> ChatModel:
        """
        Load a model in this thread; `report` gets fractions from 0 to 1, `n_ctx` overrides the context's size.

        Without `use_adapters`, it is loaded as it is.

        Raises
        ------
        BadWeights, NotEnoughMemory, ContextNotCreated: it cannot be loaded. Interrupted: `stop` was called.
        """
        name, record = model
        card = name.card if isinstance(name, CatalogName) else None
        request = self._options.request
        load_options = replace(
            self._options,
            request=replace(request, n_ctx=n_ctx) if n_ctx else request,
            tuned=read_tuned_settings(self._folders.tuned, fingerprint_model(record.path), power_source()),
            draft=self._draft,
            adapters=self._options.adapters if use_adapters else (),
        )
        files = [record.path, *([self._draft.path] if self._draft else [])]
        check = BackgroundTask(lambda: _find_unusable_types(files), lambda: None, lambda _: None)
        self._uses_gpu = not load_options.gpu.is_off and any(device.is_gpu for device in load_library().list_devices())
        with self._explain_bad_files(*files):
            if self._uses_gpu and load_options.gpu.is_auto:
                load_options = replace(load_options, tuned=self._measure_gpus(record, load_options))
            check.start()
            loaded = load_chat_model(
                record.path,
                load_options,
                this_machine(),
                name=str(name),
                size=record.size,
                raw=self._raw or (card is not None and card.variant == "base"),
                defers_template_errors=self._defers_template_errors,
                recommended=card.sampling if card else {},
                report=report,
                loader=self._engine_loader,
            )
            self._uses_gpu = loaded.plan.offload.layers > 0
            if unusable := check.result():
                loaded.close()
                raise BadWeights(unusable[0], tr("it has tensors of a type that llama.cpp cannot compute with"))
            return loaded

    def _measure_gpus(self, record: ModelRecord, options: LoadOptions) -> TunedSettings:
        """Measure the best use of the GPUs with this model and save it, unless it is known."""
        from qwenlocal.measure.gpu_use import measure_gpu_use

        use: GpuUse | None = None
        has_started = False

        def save(use: GpuUse | None) -> None:
            with contextlib.suppress(NotWritable):  # it is measured again next time
                write_gpu_use(self._folders.tuned, fingerprint_model(record.path), power_source(), use)

        def start(devices: Sequence[Device]) -> None:
            nonlocal has_started
            has_started = True
            save(GpuUse(tuple(device.name for device in devices), "none"))  # holds if a driver ends this process
            self._on_measure(devices)

        try:
            use = measure_gpu_use(record.path, record.size, options, this_machine(), self._abort_measurement, start)
        except (Aborted, LoadCancelled) as reason:
            raise Interrupted from reason
        finally:
            if has_started:
                save(use)
        return replace(options.tuned, gpu=use) if use else options.tuned

    @contextlib.contextmanager
    def _explain_bad_files(self, *files: Path) -> Iterator[None]:
        """
        Explain why llama.cpp cannot load a model's files, or ends the process because of them.

        Raises
        ------
        BadWeights: in place of any error that a fault of a file explains.
        """
        self._loading = files
        load_library().on_abort = lambda reason: self._on_crash(
            _find_fault([*self._loading, *self._loaded]) or EngineCrashed(reason, uses_gpu=self._uses_gpu)
        )
        try:
            yield
            self._loaded.update(files)
        except (BadWeights, ContextNotCreated, NotEnoughMemory) as error:
            is_explained = isinstance(error, BadWeights) and error.has_own_hint
            if not is_explained and (fault := _find_fault(files)):
                raise fault from error
            raise
        finally:
            self._loading = ()

    def load_in_thread(
        self,
        model: ProvidedModel,
        report: Callable[[float], None] = lambda _: None,
        n_ctx: int | None = None,
        *,
        use_adapters: bool = True,
    ) -> ChatModel:
        """Load a model like `load` in a worker thread, so that Ctrl-C can stop it."""
        # The ones before may have been cancelled.
        self._engine_loader, self._abort_measurement = EngineLoader(), AbortFlag()
        with iterate_in_thread(
            lambda: iter([self.load(model, report, n_ctx, use_adapters=use_adapters)]), self.stop
        ) as items:
            return next(items)

    def stop(self) -> None:
        """Stop loading, from another thread."""
        self._engine_loader.cancel()
        self._abort_measurement.set()

    def close(self, loaded: ChatModel, record: ModelRecord, *, keep: bool) -> None:
        """Free a model's memory; with `keep`, first save its prompt cache and the decoding costs that it measured."""
        try:
            if keep:
                loaded.sequence.save_prompt_cache()
                if loaded.costs.one is not None:
                    with contextlib.suppress(NotWritable):  # the next run measures them again
                        write_costs(
                            self._folders.tuned, fingerprint_model(record.path), power_source(), loaded.costs.known
                        )
        finally:
            loaded.close()
