"""`qwenlocal doctor`: check this machine, the folders and the sources, and give advice."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from qwenlocal import __version__
from qwenlocal.cli.console import print_json
from qwenlocal.cli.context import AppContext
from qwenlocal.devices import DeviceKind, load_backend_modules
from qwenlocal.errors import QwenlocalError
from qwenlocal.formatting import format_quantity
from qwenlocal.gpu_hardware import find_gpu_vendors
from qwenlocal.huge_pages import huge_page_mode
from qwenlocal.machine import Machine, this_machine
from qwenlocal.paths import Folders, ensure_writable

if TYPE_CHECKING:
    from qwenlocal.devices import Device

# Processor features, and their names in llama.cpp's system info, which lists how it was compiled.
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

_BACKEND_TITLES = {"vulkan": "Vulkan", "cuda": "CUDA"}
_DRIVER_ADVICE = "Install the driver of the GPU. Until then, the processor is used."


@dataclass(frozen=True)
class Check:
    """The result of a check; `advice` is the next step, "" if all is well."""

    subject: str
    state: str
    advice: str = ""


def check_machine(*, as_json: bool, offline: bool) -> None:
    """Run all checks and print them; problems do not change the exit code."""
    app = AppContext(quiet=True)
    machine = this_machine()
    checks = [
        _versions(),
        *_engine(machine),
        _memory(machine),
        *_huge_pages(),
        *_folders(app.library.folders),
        _models(app),
    ]
    if not offline:
        checks += _sources(has_models=any(not record.missing for record in app.library.store.records()))
    if as_json:
        print_json([{**asdict(check), "ok": not check.advice} for check in checks])
        return
    width = max(len(check.subject) for check in checks)
    for check in checks:
        sys.stdout.write(f"{'!' if check.advice else '✓'} {check.subject:<{width}}  {check.state}\n")
        if check.advice:
            sys.stdout.write(f"  {'':<{width}}  → {check.advice}\n")


def _versions() -> Check:
    try:
        bindings = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return Check("versions", f"qwenlocal {__version__}, llama-cpp-python is missing", "Install it: make setup")
    return Check(
        "versions",
        f"qwenlocal {__version__}, llama-cpp-python {bindings}, "
        f"Python {platform.python_version()}, {platform.platform()}",
    )


def _engine(machine: Machine) -> list[Check]:
    try:
        from qwenlocal.engine.llama import load_library

        system_info, devices = load_library().system_info, load_library().list_devices()
    except QwenlocalError as error:
        return [Check("engine", str(error), error.hint)]
    except OSError as error:
        return [Check("engine", f"cannot load llama.cpp: {error}", "Compile it again: make setup")]
    compiled = {
        part.partition("=")[0].strip().rpartition(" ")[2]
        for part in system_info.split("|")
        if part.strip().endswith("1")
    }
    return [_processor(machine, compiled), *map(_device, devices), *_gpu_backends(devices)]


def _processor(machine: Machine, compiled: set[str]) -> Check:
    used = compiled & set(_COMPILED_NAMES.values())
    available = {name for feature, name in _COMPILED_NAMES.items() if feature in machine.features}
    names = ", ".join(sorted(used)) or "no vector units"
    state = f"{machine.processor}, {format_quantity(machine.cores, 'fast core')}; llama.cpp uses {names}"
    advice = ""
    if unused := sorted(available - used):
        advice = f"It could also use {', '.join(unused)}. Compile it for this machine: make setup"
    elif machine.features and (missing := sorted(used - available)):
        advice = f"It was compiled for another processor ({', '.join(missing)}). Compile it again: make setup"
    return Check("processor", state, advice)


def _device(device: Device) -> Check:
    free, total = device.free / 2**30, device.total / 2**30
    title = f"{device.name}: {device.description}"
    if device.driver:
        title += f", driver {device.driver}"
    if device.kind == DeviceKind.INTEGRATED_GPU:
        title += ", uses the memory of the machine"
    return Check("device", f"{title}, {free:.1f} of {total:.1f} GiB free")


def _gpu_backends(devices: list[Device]) -> list[Check]:
    """Check the backends that set-up compiled; without any, check if there is a GPU for one."""
    checks = []
    for module in load_backend_modules():
        title = _BACKEND_TITLES.get(module.name, module.name)
        names = ", ".join(device.name for device in devices if device.backend.lower() == module.name)
        if module.error:
            advice = f"Install the driver of the GPU, or compile the backend again: GPU={module.name} make setup"
            checks.append(Check("GPU backend", f"{title} does not load: {module.error}", advice))
        elif names:
            checks.append(Check("GPU backend", f"{title} uses {names}"))
        else:
            checks.append(Check("GPU backend", f"{title} finds no device", _DRIVER_ADVICE))
    vendors = find_gpu_vendors()
    if vendors and not checks and not any(device.is_gpu for device in devices):
        advice = "To use it, compile a backend: GPU=vulkan make setup"
        checks.append(Check("GPU backend", f"none, although there is an {vendors[0]} GPU", advice))
    return checks


def _memory(machine: Machine) -> Check:
    memory = machine.memory()
    state = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    is_low = memory.available < 1 << 30
    return Check("memory", state, "Close other programs; the smallest model needs about 1 GiB." if is_low else "")


def _huge_pages() -> list[Check]:
    """Return nothing on systems without huge pages."""
    mode = huge_page_mode()
    if mode == "never":
        setting = "/sys/kernel/mm/transparent_hugepage/enabled"
        return [
            Check("huge pages", "off", f"Models can be up to 7% faster with them: echo madvise | sudo tee {setting}")
        ]
    return [Check("huge pages", "used for weights and the KV cache")] if mode else []


def _folders(folders: Folders) -> list[Check]:
    checks = []
    for subject, folder in (("home", folders.home), ("Hub cache", folders.hub_cache)):
        try:
            ensure_writable(folder)
        except QwenlocalError as error:
            checks.append(Check(subject, str(error), error.hint))
            continue
        free = shutil.disk_usage(folder).free
        advice = "Less than 2 GB free: enough for one small model." if free < 2e9 else ""
        checks.append(Check(subject, f"{folder}, {free / 1e9:.0f} GB free", advice))
    return checks


def _models(app: AppContext) -> Check:
    records = [record for record in app.library.store.records() if not record.missing]
    partial = app.library.store.partial_downloads()
    state = f"{len(records)} installed" + (f", {len(partial)} unfinished" if partial else "")
    return Check("models", state, "" if records else "Download the default model: qwenlocal run")


def _sources(*, has_models: bool) -> list[Check]:
    from qwenlocal.library.http import HttpClient, Timeouts, TransferError
    from qwenlocal.library.hubs import HuggingFace, ModelScope
    from qwenlocal.library.package_index import index_url, remove_login

    client = HttpClient(Timeouts(connect=5, stall=5))
    sources: list[tuple[str, Callable[[], str]]] = [
        *((hub.label, functools.partial(str, hub.endpoint)) for hub in (HuggingFace(), ModelScope(client))),
        ("package index", index_url),
    ]

    def check(source: tuple[str, Callable[[], str]]) -> Check:
        label, address = source[0], source[1]()
        shown_address = remove_login(address)
        if not address:
            return Check(label, "not configured", "To download models from there, set PIP_INDEX_URL.")
        try:
            client.close(client.open(address + "/").body)
        except TransferError as error:
            if not error.unreachable and error.retryable is False:
                return Check(label, f"{shown_address} answers")
            advice = "Installed models run without it." if has_models else "Check the network, or set HTTPS_PROXY."
            return Check(label, f"{shown_address} is not reachable: {error}", advice)
        return Check(label, f"{shown_address} answers")

    with ThreadPoolExecutor() as pool:
        return list(pool.map(check, sources))
