"""What commands that load a model can be told about loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlocal.cli.texts import text_of
from qwenlocal.errors import UsageProblem
from qwenlocal.language import tr

if TYPE_CHECKING:
    from qwenlocal.engine.wanted import Wanted

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
    from qwenlocal.engine.wanted import Wanted, check_wanted

    ranges = (("-c", n_ctx, 16, 1 << 24), ("-t", threads, 1, 512), ("--ubatch", together, 1, 4096))
    for name, value, least, most in ranges:
        if value is not None and not least <= value <= most:
            raise UsageProblem(
                tr(
                    "{name} must lie between {least:,} and {most:,}; it is {value:,}.",
                    name=name,
                    least=least,
                    most=most,
                    value=value,
                )
            )
    if flash_attention not in _ON_OFF:
        raise UsageProblem(
            tr("--flash-attention is auto, on or off; it is {flash_attention}.", flash_attention=flash_attention)
        )
    if rope is not None and rope not in _ROPE:
        raise UsageProblem(tr("--rope is {names}; it is {rope}.", names=", ".join(_ROPE), rope=rope))
    kind = kv_type.strip().lower() if kv_type else None
    found = Wanted(n_ctx, kind, _ON_OFF[flash_attention], rope, threads or 0, together, force)
    check_wanted(found)
    return found


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
    if not word.isdecimal() or int(word) > ALL_LAYERS:
        raise UsageProblem(tr("-ngl is a number of layers, auto or all; it is {text}.", text=text))
    return int(word)


def grammar_from(as_json: bool, schema: str | None, grammar: str | None) -> str | None:
    """
    The grammar that answers shall keep to, from `--json`, `--schema FILE` or `--grammar FILE`; None for none.

    Raises
    ------
    UsageProblem: more than one was given, or what is in the file cannot be kept to. ModelNotFound: there is no file.
    """
    if sum((as_json, schema is not None, grammar is not None)) > 1:
        raise UsageProblem(tr("--json, --schema and --grammar exclude each other."), hint=tr("Give one of them."))
    if grammar is not None:
        return text_of(grammar)
    if schema is None and not as_json:
        return None
    from qwenlocal.engine.schema import ANY_OBJECT, grammar_of_schema

    return grammar_of_schema(ANY_OBJECT if schema is None else text_of(schema))
