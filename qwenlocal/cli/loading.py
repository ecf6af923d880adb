"""What commands that load a model can be told about loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlocal.errors import UsageProblem

if TYPE_CHECKING:
    from qwenlocal.engine.plan import Wanted

_ON_OFF = {"auto": None, "on": True, "off": False}
_ROPE = ("yarn", "linear", "none")


def wanted(
    n_ctx: int | None = None,
    threads: int | None = None,
    kv_type: str | None = None,
    flash_attention: str = "auto",
    rope: str | None = None,
    together: int | None = None,
    *,
    force: bool = False,
) -> Wanted:
    """
    The options as the plan takes them.

    Raises
    ------
    UsageProblem: one is out of its range.
    """
    from qwenlocal.engine.plan import Wanted

    ranges = (("-c", n_ctx, 16, 1 << 24), ("-t", threads, 1, 512), ("--ubatch", together, 1, 4096))
    for name, value, least, most in ranges:
        if value is not None and not least <= value <= most:
            raise UsageProblem(f"{name} must lie between {least:,} and {most:,}; it is {value:,}.")
    if flash_attention not in _ON_OFF:
        raise UsageProblem(f"--flash-attention is auto, on or off; it is {flash_attention}.")
    if rope is not None and rope not in _ROPE:
        raise UsageProblem(f"--rope is {', '.join(_ROPE)}; it is {rope}.")
    kind = kv_type.strip().lower() if kv_type else None
    return Wanted(n_ctx, kind, _ON_OFF[flash_attention], rope, threads or 0, together, force)


def gpu_layers(text: str) -> int | None:
    """
    `-ngl`: None for auto, a large number for all.

    Raises
    ------
    UsageProblem: it is none of these, and no number.
    """
    from qwenlocal.chat.loading import ALL_LAYERS

    word = text.strip().lower()
    if word in ("auto", ""):
        return None
    if word == "all":
        return ALL_LAYERS
    if not word.isdigit() or int(word) > ALL_LAYERS:
        raise UsageProblem(f"-ngl is a number of layers, auto or all; it is {text}.")
    return int(word)
