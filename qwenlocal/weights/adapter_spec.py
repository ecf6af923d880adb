"""Adapters to load together with a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_ADAPTER_SCALE = 100


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter to load: its displayed name, its GGUF file, and its scale (1: as it was trained, 0: off)."""

    name: str
    path: Path
    scale: float = 1.0
