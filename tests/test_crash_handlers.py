"""The end of a process that llama.cpp or the C++ runtime ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

CRASH = """
import ctypes, sys
from qwenlocal.engine.llama import load_library
from qwenlocal.errors import EngineCrashed
from qwenlocal.terminal.tty import exit_after_crash
load_library().on_abort = lambda reason: exit_after_crash(EngineCrashed(reason, uses_gpu=True))
ctypes.CDLL("libstdc++.so.6")[sys.argv[1]]()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the functions that throw have other names elsewhere")
@pytest.mark.parametrize(
    ("function", "reason"), [("_ZSt17__throw_bad_allocv", "std::bad_alloc"), ("_ZSt9terminatev", "an unknown error")]
)
def test_an_exception_that_nothing_catches_is_told_in_a_sentence(function: str, reason: str) -> None:
    command = [sys.executable, "-c", CRASH, function]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert result.stderr == (
        f"\nqwenlocal: llama.cpp stopped: {reason}.\n"
        "If a GPU was disconnected or is out of memory, run without it: -ngl 0\n"
    )
