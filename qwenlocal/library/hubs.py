"""
Model hubs: the files of a repository with sizes and digests, pinned to a commit.

The Hugging Face Hub is queried through huggingface_hub, which honors `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`;
ModelScope through the two endpoints that its own client uses (modelscope, hub/api.py and hub/file_download.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from qwenlocal.errors import ModelNotFound
from qwenlocal.i18n import tr
from qwenlocal.library.http import HttpClient, TransferError


@dataclass(frozen=True)
class RemoteFile:
    """
    A file in a repository: its path, size and SHA-256 (None for small text files, for which the hub states git's own
    hash, `blob`).
    """

    path: str
    size: int
    sha256: str | None
    blob: str | None = None


@dataclass(frozen=True)
class RepoListing:
    """The files of a repository at `commit`, and the license it states ("" if none)."""

    repo: str
    commit: str
    files: Sequence[RemoteFile]
    license: str = ""


class HuggingFace:
    """The Hugging Face Hub, or the mirror that `HF_ENDPOINT` names."""

    label, scheme = "Hugging Face", "hf"

    def __init__(self, timeout: float = 10.0, environ: Mapping[str, str] = os.environ) -> None:
        self._timeout = timeout
        self.endpoint = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def list_files(self, repo: str, revision: str | None) -> RepoListing:
        """
        List the files of a repository.

        Raises
        ------
        ModelNotFound: the hub has no such repository or revision, or it is gated.
        TransferError: the hub does not respond.
        """
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
            info = HfApi(endpoint=self.endpoint, library_name="qwenlocal").model_info(
                repo, revision=revision, files_metadata=True, timeout=self._timeout
            )
        except OfflineModeIsEnabled as reason:
            raise TransferError("HF_HUB_OFFLINE is set", retryable=False, unreachable=True) from reason
        except GatedRepoError as reason:
            raise ModelNotFound(
                repo,
                reason=tr("{repo} is gated: its owner requires you to accept terms first.", repo=repo),
                hint=tr(
                    "Accept them at {endpoint}/{repo}, then set HF_TOKEN to a token of your account.",
                    endpoint=self.endpoint,
                    repo=repo,
                ),
            ) from reason
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
                hint=tr("Check the spelling. For a private repository, set HF_TOKEN."),
            ) from reason
        except HfHubHTTPError as reason:
            status = reason.response.status_code if reason.response is not None else None
            raise TransferError(
                _first_line(reason), retryable=status in (429, 500, 502, 503, 504), status=status
            ) from reason
        except (httpx2.HTTPError, OSError) as reason:
            raise TransferError(_first_line(reason), retryable=True, unreachable=True) from reason
        except (ValueError, KeyError, TypeError) as reason:  # a captive portal or proxy responded
            raise TransferError(
                f"{self.endpoint} sent an invalid response", retryable=False, unreachable=True
            ) from reason
        files = [
            RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
            for s in info.siblings or []
        ]
        card: dict[str, object] = dict(vars(info.card_data)) if info.card_data else {}
        return RepoListing(repo, info.sha or revision or "main", files, _license_text(card))

    def url(self, repo: str, commit: str, path: str) -> str:
        """Return the download URL of a file."""
        return f"{self.endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(path)}"

    def headers(self) -> Mapping[str, str]:
        """Return request headers, for example with a token."""
        from huggingface_hub import get_token

        token = get_token()
        return {"Authorization": f"Bearer {token}"} if token else {}


class ModelScope:
    """The ModelScope hub, or the mirror that `MODELSCOPE_DOMAIN` names; the methods are those of `HuggingFace`."""

    label, scheme = "ModelScope", "ms"

    def __init__(self, client: HttpClient, environ: Mapping[str, str] = os.environ) -> None:
        domain = environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        self.endpoint = (domain if "://" in domain else f"https://{domain}").rstrip("/")
        self._client = client

    def list_files(self, repo: str, revision: str | None) -> RepoListing:
        revision = revision or "master"
        url = f"{self.endpoint}/api/v1/models/{repo}/repo/files?Revision={quote(revision, safe='')}&Recursive=true"
        try:
            text = self._client.read_text(url)
        except TransferError as error:
            if error.status == 404:
                raise ModelNotFound(
                    repo,
                    reason=tr(
                        "{label} has no repository “{repo}” ({revision}).",
                        label=self.label,
                        repo=repo,
                        revision=revision,
                    ),
                ) from error
            raise
        try:
            entries = json.loads(text)["Data"]["Files"]
            files = [
                RemoteFile(str(e["Path"]), int(e["Size"]), str(e["Sha256"]).lower() if e.get("Sha256") else None)
                for e in entries
                if e.get("Type") != "tree"
            ]
        except (ValueError, KeyError, TypeError) as reason:
            raise TransferError(f"{self.label} sent an invalid file list", retryable=False) from reason
        return RepoListing(repo, revision, files)

    def url(self, repo: str, commit: str, path: str) -> str:
        query = f"Revision={quote(commit, safe='')}&FilePath={quote(path, safe='')}"
        return f"{self.endpoint}/api/v1/models/{repo}/repo?{query}"

    def headers(self) -> Mapping[str, str]:
        return {}


Hub = HuggingFace | ModelScope


def _license_text(card: Mapping[str, object]) -> str:
    name, link = card.get("license_name"), card.get("license_link")
    license = card.get("license") or ""
    if name and license in ("", "other"):
        license = name
    return f"{license} ({link})" if license and link else str(license)


def _first_line(reason: BaseException) -> str:
    text = re.sub(r"\[Errno -?\d+\] ", "", str(reason)).strip().splitlines()
    return (text[0] if text else type(reason).__name__)[:120]
