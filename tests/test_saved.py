"""What a sequence held is kept on disk, and found again: never wrong, and never needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlocal.engine.context import Context, ContextOptions, RopeScaling
from qwenlocal.engine.llama import Model
from qwenlocal.engine.parking import Parking
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.saved import SavedStates, forget_all, key_of
from qwenlocal.engine.sequence import Prefill, TokenSequence
from qwenlocal.testing import write_model

GREEDY = Sampling(temperature=0, repeat_penalty=1)
OPTIONS = ContextOptions(1024, threads=1, flash_attention=False)
PROMPT = [(7 * n) % 250 for n in range(300)]


@pytest.fixture
def opened(random_model: Path) -> Iterator[Callable[..., Context]]:
    contexts: list[Context] = []

    def open_(**changes: object) -> Context:
        contexts.append(Context(Model(random_model), replace(OPTIONS, **changes)))  # type: ignore[arg-type]
        return contexts[-1]

    yield open_
    for context in contexts:
        context.close()
        context.model.close()


@pytest.fixture
def kept(tmp_path: Path, random_model: Path) -> SavedStates:
    return SavedStates(tmp_path / "states", key_of(random_model, OPTIONS))


def states_in(folder: Path) -> list[Path]:
    return sorted((folder / "states").glob("*/*"))


def read_and_leave(context: Context, kept: SavedStates, prompt: list[int] = PROMPT, limit: int = 20) -> list[int]:
    sequence = TokenSequence(context, saved=kept)
    answer = [step for step in sequence.generate(prompt, GREEDY, limit=limit) if isinstance(step, int)]
    sequence.remember()
    return answer


def come_back(context: Context, kept: SavedStates | None, prompt: list[int]) -> tuple[int, list[int]]:
    """How many tokens were not computed again, and the answer."""
    steps = list(TokenSequence(context, saved=kept).generate(prompt, GREEDY, limit=20))
    assert isinstance(steps[0], Prefill)
    return steps[0].reused, [step for step in steps if isinstance(step, int)]


def test_who_comes_back_computes_only_what_is_new_and_gets_the_same_answer(
    opened: Callable[..., Context], kept: SavedStates, tmp_path: Path
) -> None:
    answer = read_and_leave(opened(), kept)
    more = [*PROMPT, *answer, 9, 10, 11]
    reused, again = come_back(opened(), kept, more)
    assert reused == len(PROMPT) + len(answer) - 1
    assert again == come_back(opened(), None, more)[1]
    (file,) = states_in(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_common_beginning_is_enough(opened: Callable[..., Context], kept: SavedStates) -> None:
    read_and_leave(opened(), kept)
    other = [*PROMPT[:200], *[249] * 80]
    reused, answer = come_back(opened(), kept, other)
    assert reused == 200
    assert answer == come_back(opened(), None, other)[1]


def test_a_longer_conversation_replaces_its_own_beginning(
    opened: Callable[..., Context], kept: SavedStates, tmp_path: Path
) -> None:
    answer = read_and_leave(opened(), kept)
    read_and_leave(opened(), kept, [*PROMPT, *answer, *range(100)])
    assert len(states_in(tmp_path)) == 1
    read_and_leave(opened(), kept, [3] * 200)
    assert len(states_in(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "tokens", "nonsense", "empty", "not json", "huge"])
def test_a_damaged_file_is_forgotten_and_the_tokens_computed(
    damage: str, opened: Callable[..., Context], kept: SavedStates, tmp_path: Path
) -> None:
    read_and_leave(opened(), kept)
    (file,) = states_in(tmp_path)
    data = bytearray(file.read_bytes())
    head = data.index(b"\n")
    if damage == "flipped":
        data[-100] ^= 1
    elif damage == "tokens":
        data[head + 1 + 4 * 290] ^= 1
    elif damage == "huge":
        said = {**json.loads(data[:head]), "size": 1 << 50}
        data = bytearray(json.dumps(said).encode()) + data[head:]
    else:
        data = {"cut": data[:-10], "nonsense": b"{}\n", "empty": b"", "not json": b"\xff" * 500}[damage]
    file.write_bytes(data)
    reused, answer = come_back(opened(), kept, [*PROMPT, 1])
    assert reused == 0
    assert answer == come_back(opened(), None, [*PROMPT, 1])[1]
    assert states_in(tmp_path) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happens_to_a_file_the_answer_is_the_same(
    data: st.DataObject, opened: Callable[..., Context], kept: SavedStates, tmp_path: Path
) -> None:
    if not (tmp_path / "whole").exists():
        read_and_leave(opened(), kept, PROMPT[:80], 2)
        shutil.copy(states_in(tmp_path)[0], tmp_path / "whole")
        (tmp_path / "context").touch()
    for file in states_in(tmp_path):
        file.unlink()
    whole = bytearray((tmp_path / "whole").read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    folder = tmp_path / "states" / key_folder(kept)
    (folder / "x.kv").write_bytes(whole)
    found = kept.best(PROMPT[:80], 10)
    assert found is None or not kept.restore(found, opened(), 0)


def key_folder(kept: SavedStates) -> str:
    return kept._folder.name


def test_another_layout_another_model_and_another_rope_have_files_of_their_own(
    random_model: Path, speaking_model: Path
) -> None:
    keys = {
        key_of(random_model, OPTIONS),
        key_of(speaking_model, OPTIONS),
        key_of(random_model, replace(OPTIONS, key_type="q8_0")),
        key_of(random_model, replace(OPTIONS, flash_attention=True)),
        key_of(random_model, replace(OPTIONS, rope=RopeScaling("yarn", 2.0, 4096))),
    }
    assert len(keys) == 5
    assert key_of(random_model, replace(OPTIONS, n_ctx=512, threads=7)) in keys


def test_what_a_file_said_before_it_was_mended_is_not_used(random_model: Path, tmp_path: Path) -> None:
    path = shutil.copy(random_model, tmp_path / "x.gguf")
    before = key_of(path, OPTIONS)
    os.utime(path, (1, 1))
    assert key_of(path, OPTIONS) != before


def test_files_take_no_more_than_their_share_and_the_oldest_goes_first(
    opened: Callable[..., Context], kept: SavedStates, tmp_path: Path
) -> None:
    read_and_leave(opened(), kept, [5] * 100)
    (first,) = states_in(tmp_path)
    os.utime(first, (1, 1))
    read_and_leave(opened(), kept, [6] * 100)
    size = first.stat().st_size
    free = shutil.disk_usage(tmp_path).free
    tight = SavedStates(tmp_path / "states", key_folder(kept), share=2.5 * size / free)
    read_and_leave(opened(), tight, [7] * 100)
    assert len(states_in(tmp_path)) == 2
    assert first not in states_in(tmp_path)


def test_a_budget_of_nothing_keeps_nothing(opened: Callable[..., Context], random_model: Path, tmp_path: Path) -> None:
    read_and_leave(opened(), SavedStates(tmp_path / "states", "k", share=0.0))
    assert states_in(tmp_path) == []


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_saving(
    opened: Callable[..., Context], tmp_path: Path
) -> None:
    (tmp_path / "states").write_text("a file")
    assert len(read_and_leave(opened(), SavedStates(tmp_path / "states", "k"))) == 20


def test_what_is_computed_in_a_moment_is_not_kept(
    opened: Callable[..., Context], kept: SavedStates, tmp_path: Path
) -> None:
    read_and_leave(opened(), kept, PROMPT[:20], 2)
    assert states_in(tmp_path) == []


@pytest.mark.slow
def test_who_is_killed_while_saving_leaves_no_file_that_counts(tmp_path: Path) -> None:
    """kill -9 at any moment: afterwards there is a whole file, or none."""
    model = write_model(tmp_path / "m.gguf", seed=3, layers=8, context=8192)
    code = (
        "import sys; from pathlib import Path\n"
        "from qwenlocal.engine.context import Context, ContextOptions\n"
        "from qwenlocal.engine.llama import Model\n"
        "from qwenlocal.engine.saved import SavedStates\n"
        "c = Context(Model(Path(sys.argv[1])), ContextOptions(4096, threads=1)); ids = [n % 200 for n in range(512)]\n"
        "for at in range(0, 3584, 512): c.decode([(0, ids)])\n"
        "s = SavedStates(Path(sys.argv[2]), 'k'); print('go', flush=True)\n"
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
        kept = SavedStates(folder, "k")
        context = Context(Model(model), ContextOptions(4096, threads=1))
        found = kept.best(([n % 200 for n in range(512)] * 7)[:3000], 10)
        before = len(list(folder.glob("k/*.kv")))
        assert found is None or kept.restore(found, context, 0)
        assert len(list(folder.glob("k/*.kv"))) == before
        context.close()
        context.model.close()


def test_run_keeps_what_it_read_and_the_next_run_reuses_it(random_model: Path, invoke: Run, tmp_path: Path) -> None:
    text = "word " * 60
    command = ("run", str(random_model), "--raw", text, "-n", "4", "--stats", "--seed", "1")
    first, second = invoke(*command), invoke(*command)
    assert "reused" not in first.stderr
    assert re.search(r"prompt 300 tokens \(299 reused\)", second.stderr)
    assert first.stdout == second.stdout
    assert "reused" not in invoke(*command, "--no-keep-cache").stderr


def test_forgetting_deletes_what_was_kept(tmp_path: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "x.kv").write_bytes(b"words")
    forget_all(folder)
    forget_all(folder)  # there is nothing any more
    assert not folder.exists()


def test_what_is_parked_does_not_keep_a_saved_state_out(
    opened: Callable[..., Context], kept: SavedStates, tmp_path: Path
) -> None:
    read_and_leave(opened(), kept)
    context = opened(n_ctx=512, sequences=4)
    sequence = TokenSequence(context, parking=Parking(context), saved=kept)
    for other in (200, 201, 202):
        list(sequence.generate([other] * 150, GREEDY, limit=2))
    steps = list(sequence.generate([*PROMPT, 1], GREEDY, limit=20))
    assert steps[0] == Prefill(300, 301, 300)
    assert [step for step in steps if isinstance(step, int)] == come_back(opened(), None, [*PROMPT, 1])[1]
    assert len(states_in(tmp_path)) == 1
