"""
What the model hubs have: the files of a repository with sizes and digests, pinned to one commit.

The Hugging Face hub is asked through huggingface_hub, which honours `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`;
ModelScope through the two addresses of its own client (modelscope, hub/api.py and hub/file_download.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote

from qwenlocal.errors import ModelNotFound, QwenlocalError
from qwenlocal.i18n import tr
from qwenlocal.library.http import HttpClient, TransferError


@dataclass(frozen=True)
class RemoteFile:
    """
    A file in a repository: its path there, its size, and the sha256 the hub states (None for small text files, of which
    it states git's own digest, `blob`).
    """

    path: str
    size: int
    sha256: str | None
    blob: str | None = None


@dataclass(frozen=True)
class Listing:
    """A repository as it is at `commit`. `licence` is what the repository itself states, "" where it says nothing."""

    repo: str
    commit: str
    files: Sequence[RemoteFile]
    licence: str = ""


class Hub(Protocol):
    """A place with repositories of models."""

    label: str
    scheme: str

    def list(self, repo: str, revision: str | None) -> Listing:
        """
        Raises
        ------
        ModelNotFound: the hub has no such repository or revision, or keeps it behind an agreement.
        TransferError: the hub does not answer.
        """
        ...

    def url(self, repo: str, commit: str, path: str) -> str:
        """Where the bytes of a file are."""
        ...

    def headers(self) -> Mapping[str, str]:
        """What to send along, for example a token."""
        ...


class HuggingFace:
    """The Hugging Face hub, or what `HF_ENDPOINT` names instead."""

    label, scheme = "Hugging Face", "hf"

    def __init__(self, timeout: float = 10.0, environ: Mapping[str, str] = os.environ) -> None:
        self._timeout = timeout
        self._endpoint = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    @property
    def endpoint(self) -> str:
        """The address of the hub."""
        return self._endpoint

    def list(self, repo: str, revision: str | None) -> Listing:
        import httpx2
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            info = HfApi(endpoint=self._endpoint, library_name="qwenlocal").model_info(
                repo, revision=revision, files_metadata=True, timeout=self._timeout
            )
        except OfflineModeIsEnabled as reason:
            raise TransferError("HF_HUB_OFFLINE is set", retryable=False, unreachable=True) from reason
        except GatedRepoError as reason:
            raise _gated(repo, self._endpoint) from reason
        except RevisionNotFoundError as reason:
            raise ModelNotFound(
                repo,
                reason=tr(
                    "{repo} has no revision “{revision}” on {label}.", repo=repo, revision=revision, label=self.label
                ),
            ) from reason
        except (RepositoryNotFoundError, HFValidationError) as reason:
            raise ModelNotFound(
                repo,
                reason=tr("{label} has no repository “{repo}”, or it is private.", label=self.label, repo=repo),
                hint=tr("Check the spelling; for a private one set HF_TOKEN."),
            ) from reason
        except HfHubHTTPError as reason:
            status = reason.response.status_code if reason.response is not None else None
            raise TransferError(
                _in_few_words(reason), retryable=status in (429, 500, 502, 503, 504), status=status
            ) from reason
        except (httpx2.HTTPError, OSError) as reason:
            raise TransferError(_in_few_words(reason), retryable=True, unreachable=True) from reason
        except (ValueError, KeyError, TypeError) as reason:  # something in between answered instead of the hub
            raise TransferError(
                f"{self._endpoint} sent what is no answer of a hub", retryable=False, unreachable=True
            ) from reason
        files = [
            RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
            for s in info.siblings or []
        ]
        card: dict[str, object] = dict(vars(info.card_data)) if info.card_data else {}
        return Listing(repo, info.sha or revision or "main", files, _licence(card))

    def url(self, repo: str, commit: str, path: str) -> str:
        return f"{self._endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(path)}"

    def headers(self) -> Mapping[str, str]:
        from huggingface_hub import get_token

        token = get_token()
        return {"Authorization": f"Bearer {token}"} if token else {}


class ModelScope:
    """The ModelScope hub, or what `MODELSCOPE_DOMAIN` names instead."""

    label, scheme = "ModelScope", "ms"

    def __init__(self, client: HttpClient, environ: Mapping[str, str] = os.environ) -> None:
        domain = environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        self._endpoint = domain.rstrip("/") if "://" in domain else f"https://{domain.rstrip('/')}"
        self._client = client

    @property
    def endpoint(self) -> str:
        """The address of the hub."""
        return self._endpoint

    def list(self, repo: str, revision: str | None) -> Listing:
        wanted = revision or "master"
        address = f"{self._endpoint}/api/v1/models/{repo}/repo/files?Revision={quote(wanted, safe='')}&Recursive=true"
        try:
            text = self._client.read_text(address)
        except TransferError as trouble:
            if trouble.status == 404:
                raise ModelNotFound(
                    repo,
                    reason=tr(
                        "{label} has no repository “{repo}” ({wanted}).", label=self.label, repo=repo, wanted=wanted
                    ),
                ) from trouble
            raise
        try:
            entries = json.loads(text)["Data"]["Files"]
            files = [
                RemoteFile(str(e["Path"]), int(e["Size"]), str(e["Sha256"]).lower() if e.get("Sha256") else None)
                for e in entries
                if e.get("Type") != "tree"
            ]
        except (ValueError, KeyError, TypeError) as reason:
            raise TransferError(f"{self.label} sent a list that cannot be read", retryable=False) from reason
        return Listing(repo, wanted, files)

    def url(self, repo: str, commit: str, path: str) -> str:
        query = f"Revision={quote(commit, safe='')}&FilePath={quote(path, safe='')}"
        return f"{self._endpoint}/api/v1/models/{repo}/repo?{query}"

    def headers(self) -> Mapping[str, str]:
        return {}


def _licence(card: Mapping[str, object]) -> str:
    name, link = card.get("license_name"), card.get("license_link")
    licence = card.get("license") or ""
    if name and licence in ("", "other"):
        licence = name
    return f"{licence} ({link})" if licence and link else str(licence)


def _gated(repo: str, endpoint: str) -> QwenlocalError:
    return ModelNotFound(
        repo,
        reason=tr("{repo} is there, but its owner asks you to agree to something first.", repo=repo),
        hint=tr(
            "Open {endpoint}/{repo}, agree, and set HF_TOKEN to a token of your account.", endpoint=endpoint, repo=repo
        ),
    )


def _in_few_words(reason: BaseException) -> str:
    text = re.sub(r"\[Errno -?\d+\] ", "", str(reason)).strip().splitlines()
    return (text[0] if text else type(reason).__name__)[:120]
