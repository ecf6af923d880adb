"""Settings that `qwenlocal tune` measured for a model on this machine, and decoding costs learned while it answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenlocal.engine.speculation import DEFAULT_COSTS
from qwenlocal.fileio import replace_text
from qwenlocal.paths import ensure_writable


@dataclass(frozen=True)
class GpuUse:
    """The best use of the GPUs `devices` with a model: "layers" (as many as fit), "prompts" only, or "none"."""

    devices: tuple[str, ...]
    use: str

    def to_json(self) -> dict[str, Any]:
        """Convert to the entry of the settings file."""
        return {"devices": list(self.devices), "use": self.use}


@dataclass(frozen=True)
class TunedSettings:
    """
    Threads (0: not measured), flash attention, `n_ubatch` and `gpu` (None: not measured), and the costs of batches.

    `costs` are t(k) / t(1), the times to decode k tokens at once (see `CostCurve`).
    """

    threads: int = 0
    flash_attention: bool | None = None
    n_ubatch: int | None = None
    costs: Mapping[int, float] = field(default_factory=lambda: DEFAULT_COSTS)
    gpu: GpuUse | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to the entry of the settings file, which calls `n_ubatch` "together"."""
        return {
            "threads": self.threads,
            "flash_attention": self.flash_attention,
            "together": self.n_ubatch,
            "costs": dict(self.costs),
            **({"gpu": self.gpu.to_json()} if self.gpu else {}),
        }


def read_tuned_settings(folder: Path, model: str, power: str) -> TunedSettings:
    """Read the settings for the model with fingerprint `model` on `power`; the defaults if missing or damaged."""
    entry = _read(folder / f"{model}.json").get(power)
    try:
        return _parse(entry) if isinstance(entry, dict) else TunedSettings()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return TunedSettings()


def _parse(entry: Mapping[str, Any]) -> TunedSettings:
    costs = {int(count): float(cost) for count, cost in entry.get("costs", DEFAULT_COSTS).items()}
    if set(costs) != set(DEFAULT_COSTS) or not all(0 < cost < 1000 for cost in costs.values()):
        raise ValueError("costs")
    gpu = _parse_gpu(entry["gpu"]) if entry.get("gpu") else None
    if "threads" not in entry:
        return TunedSettings(costs=costs, gpu=gpu)
    settings = TunedSettings(int(entry["threads"]), bool(entry["flash_attention"]), int(entry["together"]), costs, gpu)
    if not (1 <= settings.threads <= 512 and settings.n_ubatch and 1 <= settings.n_ubatch <= 4096):
        raise ValueError("settings")
    return settings


def _parse_gpu(entry: Mapping[str, Any]) -> GpuUse:
    use = GpuUse(tuple(map(str, entry["devices"])), str(entry["use"]))
    if use.use not in ("layers", "prompts", "none"):
        raise ValueError("gpu")
    return use


def write_tuned_settings(folder: Path, model: str, power: str, settings: TunedSettings) -> None:
    """
    Save the settings atomically.

    Raises
    ------
    NotWritable: the folder cannot be written.
    """
    _update(folder / f"{model}.json", power, settings.to_json())


def write_costs(folder: Path, model: str, power: str, costs: Mapping[int, float]) -> None:
    """
    Save the costs, and leave measured settings unchanged.

    Raises
    ------
    NotWritable: the folder cannot be written.
    """
    rounded = {count: round(cost, 3) for count, cost in costs.items()}
    _update(folder / f"{model}.json", power, {"costs": rounded})


def write_gpu_use(folder: Path, model: str, power: str, gpu: GpuUse | None) -> None:
    """
    Save the best use of the GPUs, and leave other settings unchanged.

    Raises
    ------
    NotWritable: the folder cannot be written.
    """
    _update(folder / f"{model}.json", power, {"gpu": gpu and gpu.to_json()})


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(path.read_text())
        return entries if isinstance(entries, dict) else {}
    return {}


def _update(path: Path, power: str, values: Mapping[str, Any]) -> None:
    entries = _read(path)
    entry = entries.get(power)
    entries[power] = {**(entry if isinstance(entry, dict) else {}), **values}
    ensure_writable(path.parent)
    replace_text(path, json.dumps(entries, indent=1) + "\n")
