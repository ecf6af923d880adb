"""
Qwen1.5 on your laptop: download a model once, then chat with it offline.

    import qwenlocal

    with qwenlocal.load("qwen1.5") as model:
        print(model.chat("Why is the sky blue?"))

Everything public is in `__all__`, and imported when first used; the errors are in `qwenlocal.errors`. More:
docs/python.md.
"""

TYPE_CHECKING = False  # as in typing, which takes 5 ms to import
if TYPE_CHECKING:
    from qwenlocal.api.answer import Answer
    from qwenlocal.api.local_model import LocalModel
    from qwenlocal.api.models import convert, download, load, plan
    from qwenlocal.api.text_stream import TextStream
    from qwenlocal.chat.events import FinishReason
    from qwenlocal.errors import QwenlocalError
    from qwenlocal.library.store import ModelRecord

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "FinishReason",
    "LocalModel",
    "ModelRecord",
    "QwenlocalError",
    "TextStream",
    "convert",
    "download",
    "load",
    "plan",
]

_MODULES = {
    "Answer": "api.answer",
    "FinishReason": "chat.events",
    "LocalModel": "api.local_model",
    "ModelRecord": "library.store",
    "QwenlocalError": "errors",
    "TextStream": "api.text_stream",
    "convert": "api.models",
    "download": "api.models",
    "load": "api.models",
    "plan": "api.models",
}


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
