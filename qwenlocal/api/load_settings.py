"""Settings for loading a model, checked before anything is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwenlocal.engine.gpu_offload import ALL_LAYERS, GpuRequest
from qwenlocal.engine.load_plan import LoadRequest, check_load_request
from qwenlocal.errors import InvalidChoice, OutOfRange

_RANGES = {"n_ctx": (16, 1 << 24), "threads": (1, 512), "n_ubatch": (1, 4096)}
_ROPE_SCALINGS = ("yarn", "linear", "none")


def create_load_request(
    n_ctx: int | None = None,
    threads: int | None = None,
    kv_type: str | None = None,
    flash_attention: bool | None = None,
    rope: str | None = None,
    n_ubatch: int | None = None,
    *,
    force: bool = False,
    labels: Mapping[str, str] = {},
) -> LoadRequest:
    """
    Check the settings that a load plan must respect; None lets the plan decide.

    Errors refer to a parameter by its label, or else by its name.

    Raises
    ------
    UsageError: a value is out of range, or values contradict each other.
    """
    values = {"n_ctx": n_ctx, "threads": threads, "n_ubatch": n_ubatch}
    for name, value in values.items():
        minimum, maximum = _RANGES[name]
        if value is not None and not minimum <= value <= maximum:
            raise OutOfRange(labels.get(name, name), minimum, maximum, value)
    if rope is not None and rope not in _ROPE_SCALINGS:
        raise InvalidChoice(labels.get("rope", "rope"), _ROPE_SCALINGS, rope)
    normalized_kv_type = kv_type.strip().lower() if kv_type else None
    request = LoadRequest(n_ctx, normalized_kv_type, flash_attention, rope, threads or 0, n_ubatch, force)
    check_load_request(request)
    return request


def create_gpu_request(gpu_layers: int | None, devices: str | Sequence[str] | None) -> GpuRequest:
    """
    Check the number of layers on GPUs; the names of `devices` are checked when the GPUs are known.

    Raises
    ------
    UsageError: the number is out of range.
    """
    if gpu_layers is not None and not 0 <= gpu_layers <= ALL_LAYERS:
        raise OutOfRange("gpu_layers", 0, ALL_LAYERS, gpu_layers)
    names = (devices,) if isinstance(devices, str) else devices
    return GpuRequest(gpu_layers, None if names is None else tuple(names))
