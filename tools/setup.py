"""
Set up `.venv`: llama.cpp compiled for this processor, then qwenlocal and its dependencies.

    python3 tools/setup.py             dependencies for running, as locked in requirements/run.txt
    python3 tools/setup.py --dev       and those for the tests, from requirements/dev.txt
    python3 tools/setup.py --latest    the newest releases that pyproject.toml allows, in build/latest

Uses the standard library only. Safe to repeat and to interrupt: an interrupted compile continues, and a finished
set-up takes a fraction of a second. If there is a GPU, its backend is compiled, too: GPU=vulkan, GPU=cuda and GPU=off
decide otherwise. `CMAKE_ARGS` is passed to llama.cpp; pip's own settings (index, proxy, certificates) apply as usual.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

from gpu_backends import (
    CMAKE_OPTIONS,
    TITLES,
    GpuChoice,
    UnknownChoice,
    choose_backend,
    describe_missing,
)
from setup_commands import CommandRunner, SetupFailed, say
from system_packages import advice

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LATEST = "--latest" in sys.argv[1:]
VENV = BUILD / "latest" if LATEST else ROOT / ".venv"
WINDOWS = sys.platform == "win32"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
REQUIREMENTS = ROOT / "requirements"
SCRIPTS = ("setup", "setup_commands", "system_packages", "gpu_backends")

# Changes to llama.cpp's own build; the file gives the reasons.
CMAKE_INCLUDE = ROOT / "tools" / "llama.cpp.cmake"
LIBRARY_SOURCES = tuple(sorted(file for file in (ROOT / "tools").iterdir() if file.suffix in (".c", ".cpp", ".h")))
GPU_CHOICE = VENV / "gpu.choice"
COMMANDS = CommandRunner(BUILD / "setup.log")
CMAKE_ARGS = "-DGGML_RPC=ON -DLLAVA_BUILD=OFF"


def main() -> int:
    dev = LATEST or "--dev" in sys.argv[1:]
    for name in ("SIGTERM", "SIGHUP"):  # closing the window stops the compiler, too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        check_python()
        if is_done(dev):
            return 0
        BUILD.mkdir(exist_ok=True)
        make_venv()
        install_build_tools()
        install_bindings()
        install_program(dev)
        install_gpu_backend()
        (VENV / "setup.stamp").write_text(fingerprint(dev))
        say(f"Set-up is complete. Run {PYTHON.with_name('qwenlocal').relative_to(ROOT)}")
    except SetupFailed as reason:
        say(f"\nSet-up stopped: {reason}")
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted. Run the same command to continue.")
        return 130
    return 0


# --- prerequisites


def check_python() -> None:
    if sys.version_info < (3, 10):
        raise SetupFailed(f"Python 3.10 or newer is needed; this is {platform.python_version()}.\n{advice('python3')}")
    try:
        import ensurepip
        import venv
    except ImportError:
        raise SetupFailed(f"Python's “venv” module is missing.\n{advice('python3-venv')}") from None
    del ensurepip, venv


def check_compiler() -> None:
    names = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    if not any(name and shutil.which(name.split()[0]) for name in names):
        raise SetupFailed(f"There is no C++ compiler.\n{advice('compiler')}")
    if sys.platform == "darwin" and subprocess.run(["xcode-select", "-p"], capture_output=True).returncode != 0:
        raise SetupFailed(f"The command line tools of Xcode are missing.\n{advice('compiler')}")


# --- earlier set-ups


def is_done(dev: bool) -> bool:
    """Return True if this set-up is complete already; a set-up with `--dev` includes one without."""
    stamp = VENV / "setup.stamp"
    return not LATEST and stamp.is_file() and stamp.read_text() in (fingerprint(dev), fingerprint(True))


def fingerprint(dev: bool) -> str:
    """Hash everything the result depends on."""
    locks = [file.read_text() for file in sorted(REQUIREMENTS.glob("*.txt"))]
    scripts = [Path(__file__).with_name(f"{name}.py").read_text() for name in SCRIPTS]
    ours = [(ROOT / "pyproject.toml").read_text(), *scripts, str(ROOT)]
    return hashlib.sha256("\0".join([str(dev), bindings_key(), str(gpu_choice()), *locks, *ours]).encode()).hexdigest()


def bindings_key() -> str:
    """Hash the bindings' version, their build options, the processor and the version of Python."""
    ours = [file.read_text() for file in (CMAKE_INCLUDE, *LIBRARY_SOURCES)]
    parts = [bindings_version(), cmake_args(), *ours, processor(), platform.python_version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def bindings_version() -> str:
    match = re.search(r'"llama-cpp-python==([^"]+)"', (ROOT / "pyproject.toml").read_text())
    if not match:
        raise SetupFailed("pyproject.toml does not pin llama-cpp-python.")
    return match[1]


def cmake_args() -> str:
    return f"{CMAKE_ARGS} {os.environ.get('CMAKE_ARGS', '')}".strip()


def processor() -> str:
    """Return the processor's features: code for a newer one ends with “illegal instruction” on an older one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


# --- installation


def make_venv() -> None:
    if PYTHON.exists() and subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    say(f"Creating {VENV.relative_to(ROOT)} …")
    shutil.rmtree(VENV, ignore_errors=True)
    COMMANDS.run([sys.executable, "-m", "venv", str(VENV)], "creating the virtual environment", venv_hint=True)


def install_build_tools() -> None:
    """Install pip, cmake, ninja and the build backends, so that no build fetches its own."""
    install("build", "installing build tools")


def install_bindings() -> None:
    stamp, key = VENV / "bindings.stamp", bindings_key()
    if stamp.is_file() and stamp.read_text() == key:
        return
    wheels = BUILD / f"wheels-{key}"
    if not list(wheels.glob("*.whl")):
        check_compiler()
        compile_bindings(wheels, key)
    (wheel,) = wheels.glob("*.whl")
    pip = [str(PYTHON), "-m", "pip", "install", "--force-reinstall", "--no-deps", str(wheel)]
    COMMANDS.run(pip, "installing llama.cpp")
    stamp.write_text(key)


def compile_bindings(wheels: Path, key: str) -> None:
    source = unpack_source()
    draft = BUILD / "wheels-draft"
    shutil.rmtree(draft, ignore_errors=True)
    command = [
        *(str(PYTHON), "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(draft)),
        f"--config-settings=build-dir={BUILD / f'cmake-{key}'}",
        str(source),
    ]
    environment = {
        **os.environ,
        "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}",  # the cmake and ninja of the lock file
        "CMAKE_ARGS": f"{cmake_args()} -DCMAKE_PROJECT_llama.cpp_INCLUDE={CMAKE_INCLUDE.as_posix()}",
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1)),
    }
    COMMANDS.run(command, "compiling llama.cpp for this processor", environment, slow=True)
    draft.replace(wheels)


def install_gpu_backend() -> None:
    """
    Compile the backend of the GPU that is here into a module beside llama.cpp.

    Raises
    ------
    SetupFailed: the user asked for a backend that cannot be compiled.
    """
    choice = gpu_choice()
    say(choice.reason)
    if given := os.environ.get("GPU"):
        GPU_CHOICE.write_text(given)  # holds until another one is given
    folder = backends_folder()
    shutil.rmtree(folder, ignore_errors=True)
    if choice.backend is None:
        return
    try:
        module = compile_backend(choice.backend)
        folder.mkdir()
        shutil.copy2(module, folder)
    except SetupFailed as reason:
        if choice.is_required:
            raise
        say(f"{reason}\nThe processor will be used. To try again: GPU={choice.backend} make setup")


def gpu_choice() -> GpuChoice:
    earlier = GPU_CHOICE.read_text() if GPU_CHOICE.is_file() else ""
    try:
        return choose_backend(earlier=earlier)
    except UnknownChoice as reason:
        raise SetupFailed(str(reason)) from None


def backends_folder() -> Path:
    """Return the folder beside llama.cpp's libraries from which qwenlocal loads backends."""
    code = "import importlib.util; print(importlib.util.find_spec('llama_cpp').submodule_search_locations[0])"
    output = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout
    return Path(output.strip(), "lib", "backends")


def compile_backend(name: str) -> Path:
    """Compile the module of a GPU backend, unless it was compiled before. Takes three to ten minutes."""
    arguments = [*CMAKE_OPTIONS, f"-DGGML_{name.upper()}=ON", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    key = hashlib.sha256("\0".join([bindings_version(), *arguments]).encode()).hexdigest()[:16]
    folder = BUILD / f"{name}-{key}"
    built = folder / "module.txt"  # written when the module is complete
    if built.is_file():
        return Path(built.read_text())
    check_backend(name)
    environment = {**os.environ, "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    source = unpack_source() / "vendor" / "llama.cpp"
    configure = [*cmake_command(), "-S", str(source), "-B", str(folder), *arguments]
    COMMANDS.run(configure, f"configuring the {TITLES[name]} backend", environment)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    build = ["cmake", "--build", str(folder), "--config", "Release", "--target", f"ggml-{name}", "--parallel", jobs]
    COMMANDS.run(build, f"compiling the {TITLES[name]} backend", environment, slow=True)
    (module,) = (file for file in folder.rglob(f"*ggml-{name}.*") if file.suffix in (".so", ".dll", ".dylib"))
    built.write_text(str(module))
    return module


def cmake_command() -> list[str]:
    return ["cmake"] if WINDOWS else ["cmake", "-G", "Ninja"]


def check_backend(name: str) -> None:
    """
    Check that what a backend is compiled with is here.

    Raises
    ------
    SetupFailed: something is missing or too old.
    """
    folder = BUILD / f"{name}-check"
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [*cmake_command(), "-S", str(ROOT / "tools" / f"{name}_check"), "-B", str(folder)]
    COMMANDS.run(command, f"looking for what {TITLES[name]} is compiled with", environment)
    if text := describe_missing(name, (folder / "missing.txt").read_text()):
        raise SetupFailed(text)


def unpack_source() -> Path:
    """Unpack the bindings' source archive into a permanent folder, so that an interrupted compile can continue."""
    version = bindings_version()
    source = BUILD / f"llama_cpp_python-{version}"
    if source.is_dir():
        return source
    archives = BUILD / "archives"
    requirement = BUILD / "llama-cpp-python.txt"
    requirement.write_text(locked("run", "llama-cpp-python"))
    command = ["download", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
    command += ["--require-hashes", "--requirement", str(requirement), "--dest", str(archives)]
    COMMANDS.run([str(PYTHON), "-m", "pip", *command], "fetching the source of llama.cpp (77 MB)", slow=True)
    draft = BUILD / "source-draft"
    shutil.rmtree(draft, ignore_errors=True)
    with tarfile.open(next(archives.glob(f"*{version}.tar.gz"))) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(draft, filter="data")
        else:
            archive.extractall(draft)
    (draft / source.name).replace(source)
    shutil.rmtree(draft)
    return source


def install_program(dev: bool) -> None:
    pip = [str(PYTHON), "-m", "pip", "install", "--no-build-isolation"]
    if LATEST:
        newest = ["--upgrade", "--upgrade-strategy", "eager", "--editable", f"{ROOT}[dev]"]
        COMMANDS.run([*pip, *newest], "installing qwenlocal with the newest dependencies", slow=True)
        return
    install("dev" if dev else "run", "installing dependencies")
    COMMANDS.run([*pip, "--no-deps", "--editable", str(ROOT)], "installing qwenlocal", slow=True)


def install(lock: str, doing: str) -> None:
    """Install everything in requirements/`lock`.txt, checked against the hashes in it."""
    file = REQUIREMENTS / f"{lock}.txt"
    pip = [str(PYTHON), "-m", "pip", "install", "--require-hashes", "--requirement", str(file)]
    COMMANDS.run(pip, doing, slow=True)


def locked(lock: str, package: str) -> str:
    """Return the lines that lock `package`: its version and hashes."""
    text = (REQUIREMENTS / f"{lock}.txt").read_text()
    match = re.search(rf"^{re.escape(package)}==.*(?:\n[ \t]+--hash=.*)+$", text, re.M)
    if not match:
        raise SetupFailed(f"requirements/{lock}.txt has no hashes for {package}. Run: make lock")
    return match[0] + "\n"


if __name__ == "__main__":
    sys.exit(main())
