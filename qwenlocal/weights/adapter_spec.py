"""Adapters to load together with a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.errors import OutOfRange, UsageError
from qwenlocal.i18n import tr

_MAX_SCALE = 100


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter to load: its displayed name, its GGUF file, and its scale (1: as it was trained, 0: off)."""

    name: str
    path: Path
    scale: float = 1.0


def parse_scale(text: str, option: str) -> float:
    """
    Parse the scale that was given with `option`.

    Raises
    ------
    UsageError: it is not a number. OutOfRange: it is too large.
    """
    try:
        scale = float(text.replace(",", "."))
    except ValueError:
        scale = math.nan
    if math.isnan(scale):
        raise UsageError(tr("“{text}” is not a scale.", text=text), hint=tr("A scale is a number, such as 0.5."))
    if abs(scale) > _MAX_SCALE:
        raise OutOfRange(tr("The scale of {option}", option=option), -_MAX_SCALE, _MAX_SCALE, scale)
    return scale
