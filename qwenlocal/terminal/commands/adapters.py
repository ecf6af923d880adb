"""The command that lists the LoRA adapters of the model and changes their scales."""

from __future__ import annotations

from qwenlocal.engine.adapters import LoadedAdapters
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.terminal.session import Session
from qwenlocal.weights.adapter_spec import parse_scale


def change_adapters(session: Session, argument: str) -> None:
    """
    Set the scale of an adapter (`/adapter style 0.5`), or switch it or all of them `on` or `off`.

    Without an argument, list the adapters; with a name only, switch that one on.
    """
    adapters = _require_adapters(session)
    words = argument.split()
    names = list(adapters.scales)
    if words and words[0] not in names and words[0].lower() not in ("on", "off"):
        raise UsageError(
            tr("No adapter is called “{name}”.", name=words[0]),
            hint=tr("Available adapters: {names}", names=", ".join(names)),
        )
    if words and words[0] in names:
        names, words = words[:1], words[1:] or ["on"]
    if words:
        scales = _parse_scales(adapters, " ".join(words), names)
        if scales != {name: adapters.scales[name] for name in names}:
            adapters.set_scales(scales)
            session.say(tr("The next answer reads the chat again."))
    for name, scale in adapters.scales.items():
        shown = f"{scale:g}" if scale else tr("off")
        session.say(f"  {name}  {shown}")


def _require_adapters(session: Session) -> LoadedAdapters:
    """
    Return the adapters of the current model, once it is loaded.

    Raises
    ------
    UsageError: it has none.
    """
    _ = session.conversation  # waits until the model is loaded
    adapters = session.models.adapters
    if adapters is None or not adapters.specs:
        raise UsageError(
            tr("This model runs without adapters."),
            hint=tr("To use one, start the chat with it: qwenlocal run MODEL --adapter ADAPTER"),
        )
    return adapters


def _parse_scales(adapters: LoadedAdapters, word: str, names: list[str]) -> dict[str, float]:
    """Return the scale of each of `names`: a number, 0 for "off", the one that it was loaded with for "on"."""
    if word.lower() == "on":
        return {name: adapters.initial_scales[name] for name in names}
    return dict.fromkeys(names, 0.0 if word.lower() == "off" else parse_scale(word, "/adapter"))
