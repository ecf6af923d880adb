"""What the user asked a plan to keep to."""

from __future__ import annotations

from dataclasses import dataclass

from qwenlocal.errors import UsageProblem

KV_TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@dataclass(frozen=True)
class Wanted:
    """What the user asked for; None leaves it to the plan. `force` takes what does not seem to fit."""

    n_ctx: int | None = None
    kv_type: str | None = None
    flash_attention: bool | None = None
    rope: str | None = None
    threads: int = 0
    together: int | None = None
    force: bool = False


def check_wanted(wanted: Wanted) -> None:
    """
    What can be seen of the wishes alone.

    Raises
    ------
    UsageProblem: keys and values cannot be kept so.
    """
    if wanted.kv_type is not None and wanted.kv_type not in KV_TYPES:
        raise UsageProblem(
            f"Keys and values cannot be kept as “{wanted.kv_type}”.", hint="There are: " + ", ".join(KV_TYPES)
        )
    quantized = wanted.kv_type not in (None, "f16", "bf16")
    if quantized and wanted.flash_attention is False:
        raise UsageProblem(
            f"Values as {wanted.kv_type} need flash attention.", hint="Leave --flash-attention off away, or --kv."
        )
