"""HTTP settings of a server: its address, access and limits."""

from __future__ import annotations

from dataclasses import dataclass

from qwenlocal.paths import Folders


@dataclass(frozen=True)
class ServerSettings:
    """
    Settings of `create_app`.

    `host` is the address that the server listens on. Without `api_keys`, anyone who can reach it may use it.
    `allowed_hosts` are additional names in the Host header, `cors_origins` the web sites whose pages may send requests
    ("https://example.org", as browsers spell it; "*" for all). `max_body` is in bytes; a body must arrive within
    `body_timeout` seconds. While a response waits for the model, a keep-alive is sent every `keep_alive` seconds.
    Schemas and grammars that take more than `grammar_timeout` seconds to compile are refused. The page at / shows the
    chats in `folders`; without `folders`, there is no page. Only `page_key` gives access to the chats; if it is empty,
    the `api_keys` do.
    """

    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body: int = 16 << 20
    body_timeout: float = 60.0
    keep_alive: float = 10.0
    grammar_timeout: float = 3.0
    folders: Folders | None = None
    page_key: str = ""
