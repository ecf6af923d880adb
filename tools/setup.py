"""
Set up `.venv`: llama.cpp compiled for this processor, then qwenlocal and its dependencies.

    python3 tools/setup.py             dependencies for running, as locked in requirements/run.txt
    python3 tools/setup.py --dev       and those for the tests, from requirements/dev.txt
    python3 tools/setup.py --latest    the newest releases that pyproject.toml allows, in build/latest

Uses the standard library only. Safe to repeat and to interrupt: an interrupted compile continues, and a finished
set-up takes a fraction of a second. `CMAKE_ARGS` is passed to llama.cpp (for example -DGGML_CUDA=ON); pip's own
settings (index, proxy, certificates) apply as usual.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LOG = BUILD / "setup.log"
LATEST = "--latest" in sys.argv[1:]
VENV = BUILD / "latest" if LATEST else ROOT / ".venv"
WINDOWS = sys.platform == "win32"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
REQUIREMENTS = ROOT / "requirements"

# Changes to llama.cpp's own build; the file gives the reasons.
CMAKE_INCLUDE = ROOT / "tools" / "llama.cpp.cmake"
LIBRARY_SOURCES = tuple(sorted(file for file in (ROOT / "tools").iterdir() if file.suffix in (".c", ".cpp", ".h")))
CMAKE_ARGS = "-DGGML_RPC=ON -DLLAVA_BUILD=OFF"


class SetupFailed(Exception):
    """Set-up cannot continue; the text says why and what to do."""


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
        (VENV / "setup.stamp").write_text(fingerprint(dev))
        say(f"Set-up is complete. Run {PYTHON.with_name('qwenlocal').relative_to(ROOT)}")
    except SetupFailed as reason:
        say(f"\nSet-up stopped: {reason}")
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted. Run the same command to continue.")
        return 130
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


def advice(what: str) -> str:
    """Return the command that installs `what` on this platform."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    commands = {
        "compiler": {
            "debian": "sudo apt install build-essential",
            "fedora": "sudo dnf install gcc-c++ make",
            "darwin": "xcode-select --install",
            "win32": "winget install Microsoft.VisualStudio.2022.BuildTools (with “Desktop development with C++”)",
        },
        "python3-venv": {
            "debian": f"sudo apt install python{version}-venv",
            "fedora": "sudo dnf install python3",
            "darwin": "brew install python",
            "win32": "winget install Python.Python.3.12",
        },
        "python3": {
            "debian": "sudo apt install python3 python3-venv",
            "fedora": "sudo dnf install python3",
            "darwin": "brew install python",
            "win32": "winget install Python.Python.3.12",
        },
    }[what]
    kind = system_kind()
    if kind in commands:
        return f"Install it: {commands[kind]}"
    return f"On Debian or Ubuntu: {commands['debian']}; on Fedora: {commands['fedora']}"


def system_kind() -> str:
    if sys.platform in ("darwin", "win32"):
        return sys.platform
    try:
        release = Path("/etc/os-release").read_text().lower()
    except OSError:
        return ""
    if re.search(r"^id(_like)?=.*(debian|ubuntu)", release, re.M):
        return "debian"
    return "fedora" if re.search(r"^id(_like)?=.*(fedora|rhel)", release, re.M) else ""


# --- earlier set-ups


def is_done(dev: bool) -> bool:
    """Return True if this set-up is complete already; a set-up with `--dev` includes one without."""
    stamp = VENV / "setup.stamp"
    return not LATEST and stamp.is_file() and stamp.read_text() in (fingerprint(dev), fingerprint(True))


def fingerprint(dev: bool) -> str:
    """Hash everything the result depends on."""
    locks = [file.read_text() for file in sorted(REQUIREMENTS.glob("*.txt"))]
    ours = [(ROOT / "pyproject.toml").read_text(), Path(__file__).read_text(), str(ROOT)]
    return hashlib.sha256("\0".join([str(dev), bindings_key(), *locks, *ours]).encode()).hexdigest()


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
    run([sys.executable, "-m", "venv", str(VENV)], "creating the virtual environment", venv_hint=True)


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
    run([str(PYTHON), "-m", "pip", "install", "--force-reinstall", "--no-deps", str(wheel)], "installing llama.cpp")
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
    run(command, "compiling llama.cpp for this processor", environment, slow=True)
    draft.replace(wheels)


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
    run([str(PYTHON), "-m", "pip", *command], "fetching the source of llama.cpp (77 MB)", slow=True)
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
        run([*pip, *newest], "installing qwenlocal with the newest dependencies", slow=True)
        return
    install("dev" if dev else "run", "installing dependencies")
    run([*pip, "--no-deps", "--editable", str(ROOT)], "installing qwenlocal", slow=True)


def install(lock: str, doing: str) -> None:
    """Install everything in requirements/`lock`.txt, checked against the hashes in it."""
    file = REQUIREMENTS / f"{lock}.txt"
    run([str(PYTHON), "-m", "pip", "install", "--require-hashes", "--requirement", str(file)], doing, slow=True)


def locked(lock: str, package: str) -> str:
    """Return the lines that lock `package`: its version and hashes."""
    text = (REQUIREMENTS / f"{lock}.txt").read_text()
    match = re.search(rf"^{re.escape(package)}==.*(?:\n[ \t]+--hash=.*)+$", text, re.M)
    if not match:
        raise SetupFailed(f"requirements/{lock}.txt has no hashes for {package}. Run: make lock")
    return match[0] + "\n"


# --- commands


def run(
    command: list[str],
    doing: str,
    environment: dict[str, str] | None = None,
    *,
    slow: bool = False,
    venv_hint: bool = False,
) -> None:
    """Run a command with its output in the log; show the elapsed time and, if it fails, the relevant lines."""
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        begin = LOG.stat().st_size
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=not WINDOWS,
        )
        try:
            wait(child, doing, begin, slow)
        except BaseException:
            end(child)
            raise
    if child.returncode != 0:
        explain(doing, begin, venv_hint)


def wait(child: subprocess.Popen[bytes], doing: str, begin: int, slow: bool) -> None:
    started, shown = time.monotonic(), ""
    every = 0.5 if sys.stderr.isatty() else 20
    due = started + every
    while child.poll() is None:
        time.sleep(0.1)
        if slow and time.monotonic() >= due:
            due += every
            seconds = int(time.monotonic() - started)
            line = f"{doing}: {seconds // 60}:{seconds % 60:02}{compiled(begin)}, log in {LOG.relative_to(ROOT)}"
            shown = show(line, shown)
    if shown and sys.stderr.isatty():
        sys.stderr.write("\n")


def show(line: str, before: str) -> str:
    if sys.stderr.isatty():
        sys.stderr.write("\r" + line + " " * max(0, len(before) - len(line)))
        sys.stderr.flush()
    else:
        say(line)
    return line


def compiled(begin: int) -> str:
    """Read the compiler's progress from the last “[12/345]” in the log."""
    steps = re.findall(r"\[(\d+)/(\d+)\]", read_log(max(begin, LOG.stat().st_size - 4000)))
    return f", {steps[-1][0]} of {steps[-1][1]} steps" if steps else ""


def read_log(begin: int) -> str:
    with LOG.open("rb") as log:
        log.seek(begin)
        return log.read().decode("utf-8", errors="replace")


def end(child: subprocess.Popen[bytes]) -> None:
    """Stop a command and the processes it started."""
    if WINDOWS:
        child.terminate()
    else:
        os.killpg(child.pid, signal.SIGTERM)
    child.wait()


def explain(doing: str, begin: int, venv_hint: bool) -> None:
    lines = [line.rstrip() for line in read_log(begin).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fatal|not found|could be found|No space|killed", line, re.I)]
    shown = "\n".join(f"  {line[:160]}" for line in (telling or lines)[-8:])
    text = "\n".join(lines)
    hint = ""
    if venv_hint or "ensurepip" in text:
        hint = advice("python3-venv")
    elif re.search(r"CMAKE_CXX_COMPILER|No CMAKE_C_COMPILER|compiler identification is unknown", text):
        hint = advice("compiler")
    elif re.search(r"Temporary failure|Name or service|Connection refused|ProxyError|No matching distribution", text):
        hint = "Cannot reach the package index. Check the network, or set PIP_INDEX_URL and HTTPS_PROXY."
    elif re.search(r"Killed|out of memory|cannot allocate", text, re.I):
        hint = "The compiler ran out of memory. Try again with CMAKE_BUILD_PARALLEL_LEVEL=1."
    raise SetupFailed(f"{doing} failed:\n{shown}\n{hint}\nFull log: {LOG}".replace("\n\n", "\n"))


if __name__ == "__main__":
    sys.exit(main())
