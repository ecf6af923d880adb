"""
The settings of a packed checkpoint: how GPTQ or AWQ quantized its weights.

They are in config.json ("quantization_config"), or, in older checkpoints, in a file of their own: AutoGPTQ wrote
quantize_config.json, AutoAWQ quant_config.json. The names of AutoAWQ's own file differ ("w_bit", "q_group_size").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import brief_repr
from qwenlocal.weights.json_files import is_integer, read_optional_json

ORIGINAL_HINT = "Convert the original checkpoint: qwenlocal convert hf:OWNER/REPO"
PACKED_METHODS = {"gptq": "GPTQ", "awq": "AWQ"}
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_GPTQ_BITS = (4, 8)
_BLOCK = 32  # columns per scale in q4_0, q5_0 and q8_0


@dataclass(frozen=True)
class Packing:
    """
    The settings that decide how packed weights are read.

    `layout` is "gptq", "gemm" or "gemv", as in `PackedMatrix`. `group_size` is -1 if a row is one group.
    """

    method: str
    layout: str
    bits: int
    group_size: int
    zero_offset: int = 0
    is_symmetric: bool = False
    has_order: bool = False  # GPTQ's desc_act without static_groups: columns are shuffled between groups

    @property
    def file_type(self) -> str:
        """
        The type of file that holds the weights exactly: q4_0 for Qwen's GPTQ-Int4, q8_0 for GPTQ-Int8, q5_0 for AWQ.

        If there is none, q8_0, which is near.
        """
        is_dequantized = self.group_size != -1 and (self.has_order or self.group_size % _BLOCK)
        if self.bits == 8 or is_dequantized:
            return "q8_0"
        return "q4_0" if self.is_symmetric else "q5_0"

    @property
    def settings(self) -> str:
        """The settings that decide the shapes of the tensors, for errors: "GPTQ, “bits” 4, “group_size” 128"."""
        version = "" if self.method == "gptq" else f" {self.layout}"
        return f"{PACKED_METHODS[self.method]}{version}, “bits” {self.bits}, “group_size” {self.group_size}"

    def __str__(self) -> str:
        """Return the method as repositories write it: "GPTQ-Int4", "AWQ"."""
        return f"GPTQ-Int{self.bits}" if self.method == "gptq" else "AWQ"


def read_packing(folder: Path, config: Mapping[str, Any]) -> Packing | None:
    """
    Return the settings of a packed checkpoint; None if its weights are not quantized.

    Raises
    ------
    BadCheckpoint: a setting is missing or has no valid value.
    UnsupportedCheckpoint: the weights are quantized with another method, or in a way that is not supported.
    """
    path, method, settings = _find_settings(folder, config)
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise BadCheckpoint(path, f"“quantization_config” must be an object, not {brief_repr(settings)}")
    method = _find_method(config, settings) or method
    if method is None:
        raise UnsupportedCheckpoint(
            folder,
            f"{path.name}: its weights are quantized already, but “quant_method” is missing",
            hint="If GPTQ or AWQ packed them, set it to “gptq” or “awq”. Otherwise, convert the original checkpoint.",
        )
    if method not in PACKED_METHODS:
        raise quantized_weights(folder, method)
    reader = _Settings(path, settings)
    return _read_gptq(reader) if method == "gptq" else _read_awq(reader)


def _find_settings(folder: Path, config: Mapping[str, Any]) -> tuple[Path, str | None, Any]:
    """Return the settings, the file they are in, and the method if that file belongs to one."""
    if settings := config.get("quantization_config") or config.get("quantization"):
        return folder / "config.json", None, settings
    for name, method in _OWN_FILES.items():
        if settings := read_optional_json(folder / name):
            return folder / name, method, settings
    return folder, None, None


def _find_method(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    if method := settings.get("quant_method"):
        return str(method).lower()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):  # before transformers wrote "quant_method"
        return "bitsandbytes"
    return "MLX" if config.get("quantization") else None


def quantized_weights(folder: Path, method: str) -> UnsupportedCheckpoint:
    """Return the error for weights that are quantized with a method that is not supported."""
    return UnsupportedCheckpoint(
        folder,
        f"its weights are quantized already ({method}); only GPTQ, AWQ, f32, f16 and bf16 can be converted",
        hint=ORIGINAL_HINT,
    )


class _Settings:
    """The settings in one of the files, with errors that name it."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def integer(self, *names: str) -> int:
        name = next((name for name in names if name in self.values), names[0])
        value = self.values.get(name)
        if not is_integer(value):
            raise BadCheckpoint(self.path, f"“{name}” must be an integer, not {brief_repr(value)}")
        return int(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise BadCheckpoint(self.path, f"“{name}” must be true or false, not {brief_repr(value)}")
        return value

    def group_size(self, *names: str) -> int:
        size = self.integer(*names)
        if size != -1 and size < 1:
            raise BadCheckpoint(self.path, f"“{names[0]}” must be -1 or at least 1, not {size}")
        return size

    def unsupported(self, reason: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(self.path.parent, f"{self.path.name}: {reason}", hint=ORIGINAL_HINT)


def _read_gptq(settings: _Settings) -> Packing:
    bits = settings.integer("bits")
    if bits not in _GPTQ_BITS:
        raise settings.unsupported(f"“bits” is {bits}; GPTQ weights must have 4 or 8")
    if settings.flag("is_marlin_format", default=False):
        raise settings.unsupported("“is_marlin_format” is true; GPTQ weights must be “gptq” or “gptq_v2”")
    form = settings.values.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise settings.unsupported(
            f"“checkpoint_format” is {brief_repr(form)}; GPTQ weights must be “gptq” or “gptq_v2”"
        )
    if settings.values.get("dynamic"):
        raise settings.unsupported("“dynamic” gives modules settings of their own, which is not supported")
    return Packing(
        method="gptq",
        layout="gptq",
        bits=bits,
        group_size=settings.group_size("group_size"),
        zero_offset=1 if form == "gptq" else 0,
        is_symmetric=settings.flag("sym", default=True),
        has_order=settings.flag("desc_act", default=False) and not settings.flag("static_groups", default=False),
    )


def _read_awq(settings: _Settings) -> Packing:
    bits = settings.integer("bits", "w_bit")
    if bits != 4:
        raise settings.unsupported(f"“bits” is {bits}; AWQ weights must have 4")
    version = settings.values.get("version", "gemm")
    layout = version.lower() if isinstance(version, str) else version
    if layout not in ("gemm", "gemv"):
        raise settings.unsupported(f"“version” is {brief_repr(version)}; AWQ weights must be “gemm” or “gemv”")
    if not settings.flag("zero_point", default=True):
        raise settings.unsupported("“zero_point” is false; AWQ weights must have zero points")
    return Packing(method="awq", layout=layout, bits=bits, group_size=settings.group_size("group_size", "q_group_size"))
