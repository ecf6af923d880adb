"""What is known of a model on this machine: settings that were measured, and what was learnt while it answered."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwenlocal.engine.speculation import USUAL_COSTS


@dataclass(frozen=True)
class Tuned:
    """
    Threads (0: not measured), flash attention (None: not measured), tokens computed together (None: not measured),
    and what decoding several tokens at once takes.
    """

    threads: int = 0
    flash_attention: bool | None = None
    together: int | None = None
    costs: Mapping[int, float] = field(default_factory=lambda: USUAL_COSTS)


def read_tuned(folder: Path, model: str, power: str) -> Tuned:
    """What is known of the model of that digest on mains or on the battery; what is damaged is not known."""
    found = _read(folder / f"{model}.json").get(power)
    try:
        return _checked(found) if isinstance(found, dict) else Tuned()
    except (ValueError, KeyError, TypeError, AttributeError):
        return Tuned()


def _checked(found: Mapping[str, Any]) -> Tuned:
    costs = {int(count): float(cost) for count, cost in found["costs"].items()}
    if set(costs) != set(USUAL_COSTS) or not all(0 < cost < 1000 for cost in costs.values()):
        raise ValueError("costs")
    if "threads" not in found:
        return Tuned(costs=costs)
    tuned = Tuned(int(found["threads"]), bool(found["flash_attention"]), int(found["together"]), costs)
    if not (1 <= tuned.threads <= 512 and tuned.together and 1 <= tuned.together <= 4096):
        raise ValueError("settings")
    return tuned


def write_tuned(folder: Path, model: str, power: str, tuned: Tuned) -> None:
    """
    Remember what was measured, in one step.

    Raises
    ------
    OSError: the folder cannot be written.
    """
    _write(folder / f"{model}.json", power, asdict(tuned))


def remember_costs(folder: Path, model: str, power: str, costs: Mapping[int, float]) -> None:
    """
    Remember what was learnt of the costs; settings that were measured stay as they are.

    Raises
    ------
    OSError: the folder cannot be written.
    """
    rounded = {count: round(cost, 3) for count, cost in costs.items()}
    found = _read(folder / f"{model}.json").get(power)
    _write(folder / f"{model}.json", power, {**(found if isinstance(found, dict) else {}), "costs": rounded})


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _write(path: Path, power: str, known: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({**_read(path), power: known}, indent=1) + "\n")
    draft.replace(path)
