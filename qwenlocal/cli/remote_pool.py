"""The models of a remote engine, for a chat or a single answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qwenlocal.cli.context import AppContext
from qwenlocal.cli.options import RunOptions
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.remote.endpoints import find_endpoint

if TYPE_CHECKING:
    from qwenlocal.chat.conversation import Conversation, GenerationConfig
    from qwenlocal.chat.thread import Thread
    from qwenlocal.remote.client import RemoteClient

_MAX_NAMES = 20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def open_remote_pool(app: AppContext, options: RunOptions, name: str | None) -> RemotePool | None:
    """
    Return the models at --url, or at the endpoint that the model's `name` begins with; None if it is a local model.

    Raises
    ------
    UsageError: the endpoint is invalid, or an option needs a local model.
    """
    found = find_endpoint(app.library.folders.endpoints, options.url, name, options.api_key_env)
    if found is None:
        if options.api_key_env and (name or options.resume is None):  # a chat to resume has not been found yet
            raise UsageError(tr("--api-key-env needs --url."), hint="--url http://localhost:8000/v1")
        return None
    from qwenlocal.remote.client import RemoteClient

    endpoint, model = found
    if refused := list_local_options(options):
        raise UsageError(
            tr("{options}: only for models on this machine.", options=", ".join(refused)),
            hint=tr("Omit it; set it where the remote engine is started."),
        )
    parts = urlsplit(endpoint.url)
    if endpoint.api_key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        app.say(tr("The API key is sent to {host} without encryption.", host=endpoint.host))
    return RemotePool(RemoteClient(endpoint), options, model)


def list_local_options(options: RunOptions) -> list[str]:
    """List the given options that a remote engine does not support."""
    request = options.load_request
    used = {
        "-c": request.n_ctx,
        "-t": request.threads,
        "-ngl": options.gpu.layers is not None,
        "--device": options.gpu.devices is not None,
        "--kv": request.kv_type,
        "--flash-attention": request.flash_attention is not None,
        "--rope": request.rope,
        "--force": request.force,
        "--no-lookup": not options.lookup,
        "--draft": options.draft,
        "--adapter": options.adapters,
        "--overflow": options.overflow != "shift",
        "--grammar": options.answer_format.grammar is not None and options.answer_format.response_format is None,
        "--raw": options.raw,
        "--batch": options.batch is not None,
    }
    return [option for option, value in used.items() if value]


class RemotePool:
    """The models of a remote engine. Has the attributes of `cli.model_pool.ModelPool` that a chat uses."""

    drafter = None
    adapters = None

    def __init__(self, client: RemoteClient, options: RunOptions, model: str) -> None:
        """`model` is the first model, "" for the only one that the engine has."""
        self._client, self._options, self._model = client, options, model
        self._names: Sequence[str] = ()
        self._config: GenerationConfig | None = None
        self.on_first_loaded: Callable[[BaseException | None], object] = lambda failure: None

    @property
    def notice(self) -> str:
        """The sentence that says where messages go."""
        return tr("Your messages and files are sent to {url}.", url=self._client.endpoint.url)

    @property
    def title(self) -> str:
        """The displayed name of the first model."""
        if not self._model:
            self._model = self._find_only_model()
        return self._model

    @property
    def current(self) -> str:
        """The name of the current model with its endpoint."""
        return self._client.endpoint.full_name(self.title)

    def _find_only_model(self) -> str:
        names, host = self.names(), self._client.endpoint.host
        if len(names) != 1:
            listed = ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
            raise UsageError(
                tr("{host} has several models: {names}", host=host, names=listed)
                if names
                else tr("{host} lists no models.", host=host),
                hint=tr("Name one: -m NAME"),
            )
        return names[0]

    def names(self) -> Sequence[str]:
        """
        List the engine's models.

        Raises
        ------
        RemoteError: it does not list them.
        """
        self._names = self._names or self._client.list_models()
        return self._names

    def nearby_files(self) -> Sequence[str]:
        """Return no files: the models are remote."""
        return ()

    def load_first(self, thread: Thread) -> Conversation:
        """Return the conversation of `thread` with the first model."""
        return self._conversation(self.title, thread)

    def switch(self, name: str, thread: Thread) -> Conversation:
        """
        Continue `thread` with another of the engine's models; the settings of the answers stay.

        Raises
        ------
        RemoteModelNotFound: the engine lists its models, and this one is not among them.
        """
        from qwenlocal.remote.errors import RemoteError, RemoteModelNotFound

        endpoint, names = self._client.endpoint, None
        name = name.removeprefix(endpoint.full_name(""))
        with contextlib.suppress(RemoteError):  # not every engine lists its models
            names = self._client.list_models()
        if names is not None and name not in names:
            raise RemoteModelNotFound(endpoint.host, name, names)
        self._model = name
        return self._conversation(name, thread)

    def resize_context(self, n_ctx: int, thread: Thread) -> Conversation:
        """
        Raises
        ------
        UsageError: always; the context is a setting of the remote engine.
        """
        raise UsageError(tr("The context is a setting of the engine at {host}.", host=self._client.endpoint.host))

    def start_loading(self) -> None:
        """Do nothing: the engine loads its models by itself."""

    def close(self, *, keep: bool) -> None:
        """Do nothing: no connection stays open between two answers."""

    def _conversation(self, model: str, thread: Thread) -> Conversation:
        from qwenlocal.chat.conversation import Conversation
        from qwenlocal.engine.sampling import Sampling
        from qwenlocal.remote.remote_backend import RemoteBackend

        if self._config is None:
            chosen = {name for name, value in self._options.sampling.items() if value is not None}
            self._config = self._options.generation_config(Sampling())
            self._config.unset = frozenset({field.name for field in fields(Sampling)} - chosen | {"overflow"})
        return Conversation(
            RemoteBackend(self._client, model, self._options.answer_format.response_format), self._config, thread
        )
