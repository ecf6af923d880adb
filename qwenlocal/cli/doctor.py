"""`qwenlocal doctor`: what is well, what is not, and what to do about it."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from qwenlocal import __version__
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import QwenlocalError
from qwenlocal.machine import Machine, this_machine
from qwenlocal.paths import Folders, writable

# What the processor can do, and the word for it in llama.cpp's own account of how it was compiled.
_COMPILED_NAMES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx_vnni": "AVX_VNNI",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `advice` is what to do, "" where all is well."""

    subject: str
    state: str
    advice: str = ""


def examine(*, as_json: bool, offline: bool) -> None:
    """Print every finding; the exit code is 0 all the same, since a doctor that looked has done its work."""
    program = Program(quiet=True)
    machine = this_machine()
    findings = [_versions(), *_engine(machine), _memory(machine), *_folders(program.folders), _models(program)]
    if not offline:
        findings += _sources()
    if as_json:
        sys.stdout.write(
            json.dumps([{**asdict(f), "ok": not f.advice} for f in findings], ensure_ascii=False, indent=1) + "\n"
        )
        return
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        sys.stdout.write(f"{'!' if finding.advice else '✓'} {finding.subject:<{width}}  {finding.state}\n")
        if finding.advice:
            sys.stdout.write(f"  {'':<{width}}  → {finding.advice}\n")


def _versions() -> Finding:
    try:
        bindings = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return Finding("versions", f"qwenlocal {__version__}, llama-cpp-python is missing", "Set it up: make setup")
    return Finding(
        "versions",
        f"qwenlocal {__version__}, llama-cpp-python {bindings}, "
        f"Python {platform.python_version()}, {platform.platform()}",
    )


def _engine(machine: Machine) -> list[Finding]:
    from qwenlocal.ggml import devices

    try:
        from qwenlocal.engine.llama import library

        info, found = library().system_info, devices()
    except QwenlocalError as error:
        return [Finding("engine", str(error), error.hint)]
    except OSError as reason:
        return [Finding("engine", f"llama.cpp cannot be loaded: {reason}", "Compile it again: make setup")]
    compiled = {
        part.partition("=")[0].strip().rpartition(" ")[2] for part in info.split("|") if part.strip().endswith("1")
    }
    return [_processor(machine, compiled), *(_device(d.name, d.description, d.free, d.total) for d in found)]


def _processor(machine: Machine, compiled: set[str]) -> Finding:
    unused = sorted(
        name for feature, name in _COMPILED_NAMES.items() if feature in machine.features and name not in compiled
    )
    missing = sorted(
        name for feature, name in _COMPILED_NAMES.items() if name in compiled and feature not in machine.features
    )
    used = ", ".join(sorted(compiled & set(_COMPILED_NAMES.values()))) or "no vector units"
    state = f"{machine.processor}, {machine.cores} fast cores; llama.cpp uses {used}"
    if unused:
        return Finding(
            "processor", state, f"It could use {', '.join(unused)} too: compile it for this machine with make setup."
        )
    if missing and machine.features:
        return Finding("processor", state, f"It was compiled for another processor ({', '.join(missing)}): make setup.")
    return Finding("processor", state)


def _device(name: str, description: str, free: int, total: int) -> Finding:
    return Finding("device", f"{name}: {description}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _memory(machine: Machine) -> Finding:
    memory = machine.memory()
    state = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    if memory.available < 1 << 30:
        return Finding("memory", state, "Close other programs: the smallest model needs about 1 GiB.")
    return Finding("memory", state)


def _folders(folders: Folders) -> list[Finding]:
    findings = []
    for subject, folder in (("home", folders.home), ("hub cache", folders.hub_cache)):
        try:
            writable(folder)
        except QwenlocalError as error:
            findings.append(Finding(subject, str(error), error.hint))
            continue
        free = shutil.disk_usage(folder).free
        advice = "Less than 2 GB free: room for one small model." if free < 2e9 else ""
        findings.append(Finding(subject, f"{folder}, {free / 1e9:.0f} GB free", advice))
    return findings


def _models(program: Program) -> Finding:
    records = [record for record in program.store.records() if not record.missing]
    coming = program.store.incomplete()
    state = f"{len(records)} here" + (f", {len(coming)} unfinished" if coming else "")
    return Finding("models", state, "" if records else "Fetch the default one: qwenlocal run")


def _sources() -> list[Finding]:
    from qwenlocal.library.http import HttpClient, Timeouts, TransferError
    from qwenlocal.library.hubs import HuggingFace, ModelScope
    from qwenlocal.library.package_index import index_url, without_login

    client = HttpClient(Timeouts(connect=5, stall=5))
    places: list[tuple[str, Callable[[], str]]] = [
        *((hub.label, functools.partial(str, hub.endpoint)) for hub in (HuggingFace(), ModelScope(client))),
        ("package index", index_url),
    ]

    def ask(place: tuple[str, Callable[[], str]]) -> Finding:
        label, address = place[0], place[1]()
        shown = without_login(address)
        if not address:
            return Finding(label, "none is configured", "Set PIP_INDEX_URL, if models shall come from there.")
        try:
            client.close(client.open(address + "/").body)
        except TransferError as trouble:
            if not trouble.unreachable and trouble.retryable is False:
                return Finding(label, f"{shown} answers")
            return Finding(label, f"{shown} is not reachable: {trouble}", "Models that are here run all the same.")
        return Finding(label, f"{shown} answers")

    with ThreadPoolExecutor() as pool:
        return list(pool.map(ask, places))
