"""
Addresses of remote engines, and names for them.

The names are in a TOML file, a table for each:

    [vllm]
    url = "http://gpu-server:8000/v1"
    api_key_env = "VLLM_API_KEY"         # optional: the environment variable with the API key
    model = "Qwen/Qwen1.5-72B-Chat"      # optional: the model of `qwenlocal run vllm`

API keys are never in it: they come from the environment, or from the system's keyring if `keyring` is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qwenlocal.errors import UsageError
from qwenlocal.i18n import mark, tr
from qwenlocal.text_encoding import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_RESERVED = ("hf", "ms", "http", "https")  # prefixes of other model names
_FIELDS = ("url", "api_key_env", "model")
_KEYRING_SERVICE = "qwenlocal"
KEYRING = mark("the keyring")  # as a source of keys; all others are names of environment variables


@dataclass(frozen=True)
class Endpoint:
    """
    The address of an engine, without a slash at the end.

    `name` is "" for one that has no name, `key_source` is the environment variable of the API key, `KEYRING`, or "" if
    there is no key, and `model` is its default model.
    """

    url: str
    name: str = ""
    api_key: str = field(default="", repr=False)
    key_source: str = ""
    model: str = ""

    @property
    def host(self) -> str:
        """The host and port."""
        return urlsplit(self.url).netloc

    @property
    def keyring_user(self) -> str:
        """The name under which the keyring has the API key."""
        return self.name or self.host

    def full_name(self, model: str) -> str:
        """Return a model's name as `find_endpoint` takes it: "vllm:MODEL", or "http://host/v1#MODEL"."""
        return f"{self.name}:{model}" if self.name else f"{self.url}#{model}"


def parse_url(text: str) -> str:
    """
    Check the URL of an engine, and return it without a slash at the end.

    Raises
    ------
    UsageError: it is not an http or https URL, or has a password in it.
    """
    try:
        parts = urlsplit(text.strip())
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UsageError(tr("“{text}” is not the URL of an engine.", text=text), hint="--url http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            tr("The URL of an engine must not contain a user name or a password."),
            hint=tr("Name the environment variable that holds the API key: --api-key-env VARIABLE"),
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return parts._replace(path=path, query="", fragment="").geturl()


def read_endpoints(path: Path) -> dict[str, Endpoint]:
    """
    Read the endpoints of a file by name, without their API keys; none if there is no file.

    Raises
    ------
    UsageError: the file is invalid.
    """
    if not os.path.exists(path):
        return {}
    try:
        tables = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise _invalid(path, str(error)) from error
    return {name: _parse_table(path, name, table) for name, table in tables.items()}


def _parse_table(path: Path, name: str, table: Any) -> Endpoint:
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise _invalid(path, tr("“{name}” cannot be the name of an endpoint", name=name))
    if not isinstance(table, dict) or not isinstance(table.get("url"), str):
        raise _invalid(path, tr("[{name}] has no url", name=name))
    if "api_key" in table:
        raise _invalid(path, tr("[{name}] has an API key in it; name its variable in api_key_env", name=name))
    if unknown := [key for key in table if key not in _FIELDS or not isinstance(table[key], str)]:
        raise _invalid(path, tr("[{name}] has an unknown field or value: {key}", name=name, key=unknown[0]))
    return Endpoint(
        parse_url(table["url"]), name, key_source=table.get("api_key_env", ""), model=table.get("model", "")
    )


def _invalid(path: Path, reason: str) -> UsageError:
    return UsageError(
        tr("Cannot use the endpoints in {path}: {reason}.", path=path, reason=reason),
        hint=tr('Each one looks like this: [vllm], and below it: url = "http://localhost:8000/v1"'),
    )


def find_endpoint(
    path: Path, url: str | None, name: str | None, variable: str | None, environ: Mapping[str, str] = os.environ
) -> tuple[Endpoint, str] | None:
    """
    Return the endpoint of `url`, or of a model's `name`, with its API key, and the model there ("" if none is named).

    None if `url` is None and the name is not that of a remote model. The file `path` has the names; the environment
    variable `variable` replaces the endpoint's own.

    Raises
    ------
    UsageError: the URL or the file is invalid, or the variable is not set.
    """
    if url is not None:
        endpoint, model = Endpoint(parse_url(url)), name or ""
    elif name and "#" in name and name.startswith(("http://", "https://")):  # how the journal names it
        address, _, model = name.partition("#")
        endpoint = Endpoint(parse_url(address))
    else:
        prefix, _, model = (name or "").partition(":")
        named = read_endpoints(path).get(prefix)
        if named is None:
            return None
        endpoint = named
    return _with_key(endpoint, variable or endpoint.key_source, environ), model or endpoint.model


def _with_key(endpoint: Endpoint, variable: str, environ: Mapping[str, str]) -> Endpoint:
    key, source = environ.get(variable, "").strip() if variable else "", variable
    if not key:
        key, source = _key_from_keyring(endpoint.keyring_user), KEYRING
    if not key and variable:
        raise UsageError(
            tr("The environment variable {variable} is not set.", variable=variable),
            hint=tr("Set it to the API key: export {variable}=KEY", variable=variable),
        )
    if not re.fullmatch(r"[!-~]*", key):  # HTTP libraries quote invalid headers in their errors
        raise UsageError(tr("The API key in {source} contains invalid characters.", source=tr(source)))
    return replace(endpoint, api_key=key, key_source=source if key else "")


def _key_from_keyring(user: str) -> str:
    """Return the password of `keyring set qwenlocal NAME`; "" if there is none or `keyring` is not installed."""
    with contextlib.suppress(Exception):  # every platform's keyring has its own errors
        return str(importlib.import_module("keyring").get_password(_KEYRING_SERVICE, user) or "").strip()
    return ""
