"""Loading of models as `qwenlocal run` asks for it. Imports llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwenlocal.api.model_loader import ModelLoader
from qwenlocal.chat.chat_model import ChatModel
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.options import RunOptions
from qwenlocal.devices import Device
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.i18n import tr
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.terminal.progress import loading_status
from qwenlocal.terminal.tty import exit_after_crash
from qwenlocal.weights.adapter_spec import AdapterSpec


def create_loader(
    app: AppContext, options: RunOptions, draft: ProvidedModel | None, adapters: Sequence[AdapterSpec]
) -> ModelLoader:
    """Create the loader of a run; if llama.cpp crashes, the terminal is restored and the reason printed."""
    folders = app.library.folders
    keeps_cache = options.keep_cache and options.journal
    load_options = LoadOptions(
        options.load_request,
        options.gpu,
        lookup=options.lookup,
        prompt_caches=folders.states if keeps_cache else None,
        adapters=adapters,
    )

    def on_measure(devices: Sequence[Device]) -> None:
        names = ", ".join(device.description for device in devices)
        app.say(tr("Comparing {devices} with the processor; this is done once per model.", devices=names))

    return ModelLoader(folders, load_options, draft, raw=options.raw, on_crash=exit_after_crash, on_measure=on_measure)


def load_with_status(loader: ModelLoader, model: ProvidedModel) -> ChatModel:
    """Load a model with a status line on stderr; Ctrl-C stops it."""
    with loading_status(sys.stderr, str(model.name)) as report:
        return loader.load_in_thread(model, report)
