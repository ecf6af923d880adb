"""Settings that were measured for a model on this machine, one set for mains and one for the battery."""

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
    """Threads, flash attention, tokens computed together, and what decoding several tokens at once takes."""

    threads: int
    flash_attention: bool
    together: int
    costs: Mapping[int, float] = field(default_factory=lambda: USUAL_COSTS)


def read_tuned(folder: Path, model: str, power: str) -> Tuned | None:
    """What was measured for the model of that digest; None where nothing was, or the file is damaged."""
    try:
        found = json.loads((folder / f"{model}.json").read_text())[power]
        costs = {int(count): float(cost) for count, cost in found["costs"].items()}
        tuned = Tuned(int(found["threads"]), bool(found["flash_attention"]), int(found["together"]), costs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    fits = 1 <= tuned.threads <= 512 and 1 <= tuned.together <= 4096 and set(costs) == set(USUAL_COSTS)
    return tuned if fits and all(0 < cost < 1000 for cost in costs.values()) else None


def write_tuned(folder: Path, model: str, power: str, tuned: Tuned) -> None:
    """
    Remember it, in one step.

    Raises
    ------
    OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model}.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        known = found if isinstance(found, dict) else {}
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({**known, power: asdict(tuned)}, indent=1) + "\n")
    draft.replace(path)
