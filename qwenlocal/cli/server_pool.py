"""The model that a running server has loaded, for a chat or a single answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qwenlocal.cli.context import AppContext
from qwenlocal.cli.options import RunOptions
from qwenlocal.cli.remote_pool import list_local_options
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.library.names import CatalogName, PathName
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.library.running_servers import RunningServer, find_running_servers

if TYPE_CHECKING:
    from qwenlocal.chat.conversation import Conversation
    from qwenlocal.chat.local_backend import LocalBackend
    from qwenlocal.chat.thread import Thread
    from qwenlocal.engine.llama import Model
    from qwenlocal.engine.sampling import Sampling

_LOCAL_ONLY = {"--grammar", "--overflow"}  # options that our own server supports, but a remote engine does not


def find_usable_servers(app: AppContext, options: RunOptions) -> Sequence[RunningServer]:
    """
    Return the running servers; none if an option prevents their use, such as -c, which only affects this process.

    Raises
    ------
    UsageError: --server was given, but there are none.
    """
    if options.server is False:
        return []
    refused = [option for option in list_local_options(options) if option not in _LOCAL_ONLY]
    if refused and options.server:
        raise UsageError(tr("{options} cannot be combined with --server.", options=", ".join(refused)))
    servers = [] if refused else find_running_servers(app.library.folders.servers)
    if options.server and not servers:
        raise _no_server()
    return servers


def open_server_pool(servers: Sequence[RunningServer], model: ProvidedModel, options: RunOptions) -> ServerPool | None:
    """
    Return `model` on the first of the servers that has loaded it; None if none has.

    Raises
    ------
    UsageError: --server was given, but none has.
    """
    path = os.path.realpath(model.record.path)
    for server in servers:
        if server.model == path:
            return ServerPool(server, model, options)
    if options.server:
        raise _no_server()
    return None


def _no_server() -> UsageError:
    return UsageError(tr("No running server has loaded this model."), hint=tr("Start one: qwenlocal serve MODEL"))


class ServerPool:
    """A model of a server. Has the attributes of `cli.model_pool.ModelPool` that a chat uses."""

    drafter = None
    adapters = None

    def __init__(self, server: RunningServer, model: ProvidedModel, options: RunOptions) -> None:
        self._server, self._model, self._options = server, model, options
        self._vocabulary: Model | None = None
        self.on_first_loaded: Callable[[BaseException | None], object] = lambda failure: None

    @property
    def notice(self) -> str:
        """The sentence that says where the answers come from."""
        return tr("Using the server at {url}. To load the model here: --no-server", url=self._server.url)

    @property
    def title(self) -> str:
        """The displayed name of the model."""
        name = self._model.name
        return name.path.name if isinstance(name, PathName) else str(name)

    @property
    def current(self) -> str:
        """The name of the model."""
        return str(self._model.name)

    def names(self) -> Sequence[str]:
        """Return the only model."""
        return [self.current]

    def nearby_files(self) -> Sequence[str]:
        """Return no files: another model would have to be loaded."""
        return ()

    def start_loading(self) -> None:
        """Do nothing: the model is loaded."""

    def load_first(self, thread: Thread) -> Conversation:
        """
        Return the conversation of `thread`. The vocabulary is read here, so that prompts are counted as usual.

        Raises
        ------
        BadWeights: the file has changed since the server was started.
        """
        from qwenlocal.chat.conversation import Conversation

        backend, sampling = self._open_backend()
        return Conversation(backend, self._options.generation_config(sampling), thread)

    def _open_backend(self) -> tuple[LocalBackend, Sampling]:
        from qwenlocal.chat.chat_model import choose_template
        from qwenlocal.chat.chat_template import require_template
        from qwenlocal.chat.local_backend import LocalBackend
        from qwenlocal.engine.llama import Model
        from qwenlocal.engine.loader import recommend_sampling
        from qwenlocal.remote.client import RemoteClient
        from qwenlocal.remote.endpoints import Endpoint
        from qwenlocal.remote.server_tokens import ServerTokens
        from qwenlocal.weights.gguf_reader import read_metadata

        name, record = self._model
        self._vocabulary = model = Model(record.path, vocab_only=True)
        template, _ = choose_template(model)
        template = require_template(template, tr("Omit --server."))
        tokenizer, n_ctx = model.tokenizer, self._server.n_ctx
        tokens = ServerTokens(
            RemoteClient(Endpoint(f"{self._server.url}/v1", api_key=self._server.key)),
            self.current,
            n_ctx=n_ctx,
            n_ctx_train=model.n_ctx_train,
            end_token=next(iter(tokenizer.ends()), 0),
        )
        recommended = name.card.sampling if isinstance(name, CatalogName) else {}
        sampling, _ = recommend_sampling(read_metadata(record.path), recommended)
        return LocalBackend(tokens, tokenizer, template, n_ctx=n_ctx, model=self.current), sampling

    def switch(self, name: str, thread: Thread) -> Conversation:
        """
        Raises
        ------
        UsageError: always; another model would have to be loaded.
        """
        raise UsageError(
            tr("This chat uses the model of the server at {url}.", url=self._server.url),
            hint=tr("To switch models, start the chat with --no-server."),
        )

    def resize_context(self, n_ctx: int, thread: Thread) -> Conversation:
        """
        Raises
        ------
        UsageError: always; the context is the server's.
        """
        raise UsageError(
            tr("The context is a setting of the server at {url}.", url=self._server.url),
            hint=tr("To choose another one, start the chat with --no-server."),
        )

    def close(self, *, keep: bool) -> None:
        """Free the memory of the vocabulary."""
        if self._vocabulary:
            self._vocabulary.close()
