"""The choice of a model at the first `qwenlocal run` on a terminal."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qwenlocal.cli.console import can_ask, choose_number
from qwenlocal.cli.context import AppContext
from qwenlocal.engine.memory import PROCESS_OVERHEAD
from qwenlocal.formatting import format_bytes, pad
from qwenlocal.i18n import tr
from qwenlocal.library.catalog import ModelCard
from qwenlocal.library.names import CatalogName, parse_name
from qwenlocal.machine import Machine, this_machine

_N_CTX = 4096  # tokens of context in the memory estimate
_PROBE_BYTES = 64 << 20  # that each core reads repeatedly to measure the memory bandwidth
_PROBE_SECONDS = 0.15
_DECODE_SHARE = 0.65  # of the bandwidth that decoding uses: starter, Q4_K_M, 491 MB, 23.8 tokens/s at 18 GB/s


@dataclass(frozen=True)
class ModelChoice:
    """A model to choose: bytes of its file and in memory, whether it fits this machine, tokens/s at most."""

    card: ModelCard
    size: int
    memory: int
    fits: bool
    speed: float


def list_choices(cards: list[ModelCard], machine: Machine, free_disk: int, bandwidth: float) -> list[ModelChoice]:
    """
    Return the chat models whose size is known, smallest first.

    Decoding a token reads all weights once, so `bandwidth` (bytes per second) over their size limits tokens/s.
    """
    available, choices = machine.memory().available, []
    for card in cards:
        file = CatalogName(card).known_file
        if card.variant != "chat" or file is None or card.kv_bytes_per_token is None:
            continue
        memory = file.size + PROCESS_OVERHEAD + card.kv_bytes_per_token * _N_CTX
        fits = memory <= available and file.size <= free_disk
        choices.append(ModelChoice(card, file.size, memory, fits, _DECODE_SHARE * bandwidth / file.size))
    return sorted(choices, key=lambda choice: choice.size)


def choose_model(app: AppContext) -> str | None:
    """
    Let the user choose a model; None stands for the default, also if there is no terminal or nothing to choose.

    Raises
    ------
    Interrupted: Ctrl-C or Ctrl-D.
    """
    if not can_ask():
        return None
    preferred = (app.library.catalog.default, app.library.catalog.starter)
    if any(app.library.local.find(CatalogName(card)) for card in preferred):
        return None
    machine = this_machine()
    folder = app.library.folders.home
    while not folder.exists():
        folder = folder.parent
    bandwidth = measure_bandwidth(machine.cores)
    choices = list_choices(list(app.library.catalog.cards), machine, shutil.disk_usage(folder).free, bandwidth)
    default = next(
        (number for number, choice in enumerate(choices, 1) if choice.card == app.library.catalog.default), 1
    )
    app.say(tr("No model is installed. Choose one; larger models answer better, but slower.") + "\n")
    for number, choice in enumerate(choices, 1):
        app.say(_describe(number, choice, is_default=number == default))
    answer = choose_number(
        range(1, len(choices) + 1), default, check_text=lambda text: parse_name(text, lambda: app.library.catalog)
    )
    if isinstance(answer, str):
        return answer
    return None if answer == default else choices[answer - 1].card.name


def _describe(number: int, choice: ModelChoice, *, is_default: bool) -> str:
    is_fast = choice.speed >= 1.5
    speed = tr("up to {speed:.0f} tokens/s", speed=choice.speed) if is_fast else tr("1 token/s or less")
    fit = pad(speed if choice.fits else tr("does not fit here"), 22)
    mark = "  " + tr("(default: press Enter)") if is_default else ""
    size, memory = format_bytes(choice.size), tr("{size:.1f} GiB of memory", size=choice.memory / 2**30)
    return f"{number:>3}  {choice.card.name:<22} {size:>8}  {pad(memory, 19)}  {fit}  {choice.card.license}{mark}"


def measure_bandwidth(cores: int) -> float:
    """Measure the bytes per second that all cores together read from memory; takes a sixth of a second."""
    import numpy

    data = numpy.ones(_PROBE_BYTES // 8)
    begin = time.perf_counter()

    def read(_core: int) -> int:
        bytes_read = 0
        while time.perf_counter() < begin + _PROBE_SECONDS:
            data.sum()
            bytes_read += data.nbytes
        return bytes_read

    with ThreadPoolExecutor(cores) as pool:
        total = sum(pool.map(read, range(cores)))
    return total / (time.perf_counter() - begin)
