"""Snapshots of the KV cache on disk: never wrong, and never required."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run
from generation import OpenContext, answer, answer_and_count
from gguf_files import split_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlocal.engine.context import Context, ContextOptions, RopeScaling
from qwenlocal.engine.llama import Model
from qwenlocal.engine.prefix_cache import PrefixCache
from qwenlocal.engine.prompt_cache import PromptCache, compute_cache_key, delete_prompt_caches
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.testing import write_model

OPTIONS = ContextOptions(1024, threads=1, flash_attention=False)
PROMPT = [(7 * n) % 250 for n in range(300)]


@pytest.fixture
def open_random(random_model: Path, open_context: OpenContext) -> OpenContext:
    """Opens contexts with `OPTIONS`."""
    return functools.partial(open_context, random_model)


@pytest.fixture
def cache(tmp_path: Path, random_model: Path) -> PromptCache:
    return PromptCache(tmp_path / "states", compute_cache_key(random_model, OPTIONS))


def saved_files(folder: Path) -> list[Path]:
    return sorted((folder / "states").glob("*/*"))


def answer_and_save(context: Context, cache: PromptCache, prompt: list[int] = PROMPT, limit: int = 20) -> list[int]:
    sequence = TokenSequence(context, prompt_cache=cache)
    ids = answer(sequence, prompt, limit)
    sequence.save_prompt_cache()
    return ids


def answer_again(context: Context, cache: PromptCache | None, prompt: list[int]) -> tuple[int, list[int]]:
    return answer_and_count(TokenSequence(context, prompt_cache=cache), prompt, 20)


def test_a_saved_chat_computes_only_new_tokens_and_gives_the_same_answer(
    open_random: OpenContext, cache: PromptCache, tmp_path: Path
) -> None:
    first = answer_and_save(open_random(), cache)
    more = [*PROMPT, *first, 9, 10, 11]
    reused, again = answer_again(open_random(), cache, more)
    assert reused == len(PROMPT) + len(first) - 1
    assert again == answer_again(open_random(), None, more)[1]
    (file,) = saved_files(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_common_prefix_is_reused(open_random: OpenContext, cache: PromptCache) -> None:
    answer_and_save(open_random(), cache)
    other = [*PROMPT[:200], *[249] * 80]
    reused, again = answer_again(open_random(), cache, other)
    assert reused == 200
    assert again == answer_again(open_random(), None, other)[1]


def test_a_longer_conversation_replaces_its_prefix(
    open_random: OpenContext, cache: PromptCache, tmp_path: Path
) -> None:
    first = answer_and_save(open_random(), cache)
    answer_and_save(open_random(), cache, [*PROMPT, *first, *range(100)])
    assert len(saved_files(tmp_path)) == 1
    answer_and_save(open_random(), cache, [3] * 200)
    assert len(saved_files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "tokens", "nonsense", "empty", "not json", "huge"])
def test_a_damaged_file_is_deleted_and_its_tokens_are_computed(
    damage: str, open_random: OpenContext, cache: PromptCache, tmp_path: Path
) -> None:
    answer_and_save(open_random(), cache)
    (file,) = saved_files(tmp_path)
    data = bytearray(file.read_bytes())
    head = data.index(b"\n")
    if damage == "flipped":
        data[-100] ^= 1
    elif damage == "tokens":
        data[head + 1 + 4 * 290] ^= 1
    elif damage == "huge":
        changed = {**json.loads(data[:head]), "size": 1 << 50}
        data = bytearray(json.dumps(changed).encode()) + data[head:]
    else:
        data = {"cut": data[:-10], "nonsense": b"{}\n", "empty": b"", "not json": b"\xff" * 500}[damage]
    file.write_bytes(data)
    reused, again = answer_again(open_random(), cache, [*PROMPT, 1])
    assert reused == 0
    assert again == answer_again(open_random(), None, [*PROMPT, 1])[1]
    assert saved_files(tmp_path) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_always_detected(
    data: st.DataObject, open_random: OpenContext, cache: PromptCache, tmp_path: Path
) -> None:
    if not (tmp_path / "whole").exists():
        answer_and_save(open_random(), cache, PROMPT[:80], 2)
        shutil.copy(saved_files(tmp_path)[0], tmp_path / "whole")
    for file in saved_files(tmp_path):
        file.unlink()
    whole = bytearray((tmp_path / "whole").read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    (folder,) = (tmp_path / "states").iterdir()
    (folder / "x.kv").write_bytes(whole)
    cached = cache.find_longest_prefix(PROMPT[:80], 10)
    assert cached is None or not cache.load(cached, open_random(), 0)


def test_the_key_depends_on_the_model_and_the_layout(random_model: Path, speaking_model: Path) -> None:
    keys = {
        compute_cache_key(random_model, OPTIONS),
        compute_cache_key(speaking_model, OPTIONS),
        compute_cache_key(random_model, replace(OPTIONS, key_type="q8_0")),
        compute_cache_key(random_model, replace(OPTIONS, flash_attention=True)),
        compute_cache_key(random_model, replace(OPTIONS, rope=RopeScaling("yarn", 2.0, 4096))),
    }
    assert len(keys) == 5
    assert compute_cache_key(random_model, replace(OPTIONS, n_ctx=512, threads=7)) in keys


def test_the_key_changes_when_the_model_file_is_repaired(random_model: Path, tmp_path: Path) -> None:
    path = shutil.copy(random_model, tmp_path / "x.gguf")
    before = compute_cache_key(path, OPTIONS)
    os.utime(path, (1, 1))
    assert compute_cache_key(path, OPTIONS) != before


def test_the_key_changes_with_the_content_of_any_shard(random_model: Path, tmp_path: Path) -> None:
    split_gguf(random_model, tmp_path)
    first, second = (tmp_path / f"x-0000{number}-of-00002.gguf" for number in (1, 2))
    before, state = compute_cache_key(first, OPTIONS), second.stat()
    with second.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"other")
    os.utime(second, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert compute_cache_key(first, OPTIONS) != before


def test_the_oldest_files_are_deleted_to_stay_within_the_share(
    open_random: OpenContext, cache: PromptCache, random_model: Path, tmp_path: Path
) -> None:
    answer_and_save(open_random(), cache, [5] * 100)
    (first,) = saved_files(tmp_path)
    os.utime(first, (1, 1))
    answer_and_save(open_random(), cache, [6] * 100)
    size = first.stat().st_size
    free = shutil.disk_usage(tmp_path).free
    tight = PromptCache(tmp_path / "states", compute_cache_key(random_model, OPTIONS), share=2.5 * size / free)
    answer_and_save(open_random(), tight, [7] * 100)
    assert len(saved_files(tmp_path)) == 2
    assert first not in saved_files(tmp_path)


def test_a_share_of_zero_saves_nothing(open_random: OpenContext, tmp_path: Path) -> None:
    answer_and_save(open_random(), PromptCache(tmp_path / "states", "k", share=0.0))
    assert saved_files(tmp_path) == []


def test_an_unwritable_folder_only_prevents_saving(open_random: OpenContext, tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file")
    assert len(answer_and_save(open_random(), PromptCache(tmp_path / "states", "k"))) == 20


def test_short_prompts_are_not_saved(open_random: OpenContext, cache: PromptCache, tmp_path: Path) -> None:
    answer_and_save(open_random(), cache, PROMPT[:20], 2)
    assert saved_files(tmp_path) == []


@pytest.mark.slow
def test_a_kill_while_saving_leaves_no_damaged_file(tmp_path: Path) -> None:
    """After kill -9 at any moment there is a complete file, or none."""
    model = write_model(tmp_path / "m.gguf", seed=3, layers=8, context=8192)
    code = (
        "import sys; from pathlib import Path\n"
        "from qwenlocal.engine.context import Context, ContextOptions\n"
        "from qwenlocal.engine.llama import Model\n"
        "from qwenlocal.engine.prompt_cache import PromptCache\n"
        "c = Context(Model(Path(sys.argv[1])), ContextOptions(4096, threads=1)); ids = [n % 200 for n in range(512)]\n"
        "for at in range(0, 3584, 512): c.decode([(0, ids)])\n"
        "s = PromptCache(Path(sys.argv[2]), 'k'); print('go', flush=True)\n"
        "for n in range(10 ** 6):\n"
        "    c.truncate(0, 3000 - n % 7); s.save(c, 0, (ids * 7)[:3000 - n % 7], 1.0)\n"
    )
    folder = tmp_path / "states"
    for wait in (0.0, 0.01, 0.03, 0.07, 0.12):
        process = subprocess.Popen([sys.executable, "-c", code, str(model), str(folder)], stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = PromptCache(folder, "k")
        context = Context(Model(model), ContextOptions(4096, threads=1))
        cached = cache.find_longest_prefix(([n % 200 for n in range(512)] * 7)[:3000], 10)
        before = len(list(folder.glob("k/*.kv")))
        assert cached is None or cache.load(cached, context, 0)
        assert len(list(folder.glob("k/*.kv"))) == before
        context.close()
        context.model.close()


def test_run_saves_the_prompt_cache_and_the_next_run_reuses_it(random_model: Path, invoke: Run) -> None:
    text = "word " * 60
    command = ("run", str(random_model), "--raw", text, "-n", "4", "--stats", "--seed", "1")
    first, second = invoke(*command), invoke(*command)
    assert "reused" not in first.stderr
    assert re.search(r"prompt 300 tokens \(299 reused\)", second.stderr)
    assert first.stdout == second.stdout
    assert "reused" not in invoke(*command, "--no-keep-cache").stderr


def test_deleting_removes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "x.kv").write_bytes(b"words")
    delete_prompt_caches(folder)
    delete_prompt_caches(folder)  # nothing is left
    assert not folder.exists()


def test_the_prefix_cache_makes_room_for_a_saved_state(
    open_random: OpenContext, cache: PromptCache, tmp_path: Path
) -> None:
    answer_and_save(open_random(), cache)
    context = open_random(n_ctx=512, n_seq_max=4)
    sequence = TokenSequence(context, prefix_cache=PrefixCache(context), prompt_cache=cache)
    for other in (200, 201, 202):
        answer(sequence, [other] * 150, 2)
    assert answer_and_count(sequence, [*PROMPT, 1], 20) == (300, answer_again(open_random(), None, [*PROMPT, 1])[1])
    assert len(saved_files(tmp_path)) == 1
