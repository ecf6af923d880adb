"""
Handlers for llama.cpp ending the process, through ggml's abort or an uncaught C++ exception.

The process cannot be saved, but the terminal can be restored and the reason printed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from qwenlocal.ggml_library import base_library

_RUNTIMES = {"linux": "libstdc++.so.6", "darwin": "libc++.1.dylib"}
_SET_TERMINATE, _TYPE, _DEMANGLE = "_ZSt13set_terminatePFvvE", "__cxa_current_exception_type", "__cxa_demangle"


def set_crash_handler(on_crash: Callable[[str], object]) -> object:
    """
    Have ggml and the C++ runtime call `on_crash` with the reason before they end the process.

    ggml aborts if a remote device is gone or a call was wrong; the reason begins with the file and line:
    "ggml-rpc.cpp:547: Remote RPC server crashed". If a GPU stops responding, Vulkan throws an exception that nothing
    catches; the reason is its type: "vk::DeviceLostError". `on_crash` may end the process itself. Keep a reference to
    the returned object as long as the handlers are in use.
    """
    on_abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda reason: on_crash(reason.decode(errors="replace")))
    base_library().ggml_set_abort_callback(on_abort)
    try:
        runtime = ctypes.CDLL(_RUNTIMES[sys.platform])
    except (KeyError, OSError):
        return on_abort
    on_terminate = ctypes.CFUNCTYPE(None)(lambda: on_crash(_exception_type(runtime)))
    runtime[_SET_TERMINATE](on_terminate)
    return on_abort, on_terminate


def _exception_type(runtime: ctypes.CDLL) -> str:
    """Return the type of the exception that is being handled (Itanium C++ ABI, 2.9.5: std::type_info)."""
    current = runtime[_TYPE]
    current.restype = ctypes.POINTER(ctypes.c_char_p)  # a type_info: its table of functions, then its name
    info = current()
    if not info:
        return "an unknown error"
    demangle = runtime[_DEMANGLE]
    demangle.restype, demangle.argtypes = ctypes.c_char_p, [ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    name = info[1] or b""
    return str((demangle(name, None, None, None) or name).decode(errors="replace"))
