"""The very first `qwenlocal run` on a terminal: which model, by what fits this machine."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from dataclasses import dataclass

from qwenlocal.cli.values import bytes_for_people
from qwenlocal.cli.wiring import Program
from qwenlocal.engine.memory import OURSELVES
from qwenlocal.errors import Interrupted
from qwenlocal.i18n import tr
from qwenlocal.library.catalog import Card
from qwenlocal.library.names import CatalogName
from qwenlocal.machine import Machine, this_machine
from qwenlocal.terminal.ansi import padded

_TOKENS = 4096  # of context, for which memory is counted
_PROBE = 64 << 20  # bytes a core reads, again and again, to see how quick memory is
_SECONDS = 0.15
_SHARE = 0.65  # of that is what decoding reaches: starter as Q4_K_M, 491 MB, 23.8 tokens/s where memory gives 18 GB/s


@dataclass(frozen=True)
class Offer:
    """A model, what it takes, whether that is there, and about how many tokens a second it says at most."""

    card: Card
    size: int
    memory: int
    fits: bool
    speed: float


def offers(cards: list[Card], machine: Machine, free_disk: int, bandwidth: float) -> list[Offer]:
    """
    The chat models whose size is known, smallest first.

    Every token reads all weights once, so at most `bandwidth` (bytes a second) over their size can be said a second.
    """
    available, found = machine.memory().available, []
    for card in cards:
        file = card.default_file
        if card.variant != "chat" or file is None or card.kv_bytes_per_token is None:
            continue
        memory = file.size + OURSELVES + card.kv_bytes_per_token * _TOKENS
        fits = memory <= available and file.size <= free_disk
        found.append(Offer(card, file.size, memory, fits, _SHARE * bandwidth / file.size))
    return sorted(found, key=lambda offer: offer.size)


def pick(program: Program) -> str | None:
    """
    The name of the model that the user picks; None for the default, or where nothing is to be asked.

    Raises
    ------
    Interrupted: Ctrl-C.
    """
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    usual = (program.catalog.default, program.catalog.starter)
    if any(program.local.here(CatalogName(card)) for card in usual):
        return None
    machine = this_machine()
    folder = program.folders.home
    while not folder.exists():
        folder = folder.parent
    found = offers(list(program.catalog.cards), machine, shutil.disk_usage(folder).free, bandwidth(machine.cores))
    default = next((place for place, offer in enumerate(found, 1) if offer.card == program.catalog.default), 1)
    program.say(tr("No model is here yet. These answer questions; the larger, the better and the slower.") + "\n")
    for place, offer in enumerate(found, 1):
        program.say(_row(place, offer, is_default=place == default))
    return _answer(found, default)


def _row(place: int, offer: Offer, *, is_default: bool) -> str:
    quick = offer.speed >= 1.5
    speed = tr("up to {speed:.0f} tokens/s", speed=offer.speed) if quick else tr("a token/s or less")
    fit = padded(speed if offer.fits else tr("does not fit here"), 22)
    mark = "  " + tr("(Enter takes this one)") if is_default else ""
    size, memory = bytes_for_people(offer.size), tr("{size:.1f} GiB of memory", size=offer.memory / 2**30)
    return f"{place:>3}  {offer.card.name:<22} {size:>8}  {padded(memory, 19)}  {fit}  {offer.card.licence}{mark}"


def _answer(found: list[Offer], default: int) -> str | None:
    from prompt_toolkit import prompt

    while True:
        try:
            word = prompt(tr("Which one? [{default}] ", default=default)).strip() or str(default)
        except (EOFError, KeyboardInterrupt) as stop:
            raise Interrupted from stop
        if word.isdecimal() and 1 <= int(word) <= len(found):
            return None if int(word) == default else found[int(word) - 1].card.name
        if word and not word.isdecimal():
            return word  # a name; whether there is such a model is seen next


def bandwidth(cores: int) -> float:
    """Bytes a second that all cores read from memory together; takes a sixth of a second."""
    import numpy

    data = numpy.ones(_PROBE // 8)
    read = [0] * cores
    end = time.perf_counter() + _SECONDS

    def work(core: int) -> None:
        while time.perf_counter() < end:
            data.sum()
            read[core] += data.nbytes

    begun = time.perf_counter()
    threads = [threading.Thread(target=work, args=(core,)) for core in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(read) / (time.perf_counter() - begun)
