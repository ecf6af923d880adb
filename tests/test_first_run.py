"""The very first start on a terminal: models to choose from, with what they take here."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import SAYS
from terminal import Open

from qwenlocal.cli.first_run import list_choices, measure_bandwidth
from qwenlocal.library.catalog import Catalog
from qwenlocal.machine import Machine, Memory
from qwenlocal.paths import bundled_folder

GIB = 1 << 30


def test_models_are_offered_with_what_they_take_and_about_how_quick_they_are() -> None:
    cards = list(Catalog.read(bundled_folder("models")).cards)
    found = list_choices(cards, Machine(4, lambda: Memory(16 * GIB, 8 * GIB)), 100 * GIB, 20e9)
    assert [choice.size for choice in found] == sorted(choice.size for choice in found)
    by_name = {choice.card.name: choice for choice in found}
    small, large = by_name["qwen1.5:0.5b-chat"], found[-1]
    assert small.fits and not large.fits
    assert small.speed > 20 > large.speed > 0.1
    assert large.memory > large.size


def test_what_the_disk_has_no_room_for_does_not_fit() -> None:
    cards = list(Catalog.read(bundled_folder("models")).cards)
    assert not any(o.fits for o in list_choices(cards, Machine(4, lambda: Memory(16 * GIB, 8 * GIB)), 1000, 20e9))


def test_memory_is_read_at_some_speed() -> None:
    assert measure_bandwidth(1) > 1e8


def test_whoever_starts_for_the_first_time_picks_a_model(terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run")
    text = chat.wait_for(r"Which one\? \[\d+\]")
    assert re.search(r"^ +1  \S+ .* GiB of memory", text, re.M)
    assert "Enter takes this one" in text.replace("\n", " ")
    chat.type(f"{speaking_model}\r")
    chat.wait_for("/help for commands")
    chat.wait_for_prompt()
    chat.type("Hi\r")
    chat.wait_for(re.escape(SAYS))


def test_ctrl_c_at_the_choice_ends_it(terminal: Open) -> None:
    chat = terminal("run")
    chat.wait_for(r"Which one\?")
    chat.type("\x03")
    assert chat.ended() == 130
