"""The one way to start a process of our own: the worker of the engine, probes, first runs, doctor, loads.

A child may crash on an untrusted model or in a driver, and its environment can be read (`/proc`). So it gets
no secret: its environment is made from a list of what children need, without tokens, connection strings
and proxies. It imports the same visionedge as its parent, and nothing from the folder it happens to start in,
which in the images is the data folder.
"""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# How variables begin that a child needs: where programs, libraries and caches lie, locale and time zone, what
# the libraries of the GPU, of arithmetic and of video read, and Python's own.
_PASSED_PREFIXES = (
    *("PATH", "HOME", "USER", "LANG", "LC_", "TZ", "TMPDIR", "XDG_", "LD_", "PYTHON", "VIRTUAL_ENV"),
    *("CUDA", "CUDNN", "CUBLAS", "NVIDIA", "TENSORRT", "ORT_", "OMP_", "OPENCV_", "MALLOC_", "STUB_"),
)
# Of our own variables those that hold no secret; a module that `bench` starts reads them.
_PASSED_NAMES = frozenset(
    f"VISIONEDGE_{name}" for name in ("DATA", "CONFIG", "MODEL", "DEVICE", "LOG_LEVEL", "INJECT_FAULTS")
)
# Whatever begins like one of the above and is called so is none of them (NVIDIA_API_KEY).
_SECRET_NAME = re.compile(r"(?i)key|token|secret|passw|credential|signature|auth")

CORE_DUMPS_VARIABLE = "VISIONEDGE_CORE_DUMPS"
"""The variable that lets a crash write its memory to a file, for debugging."""

Pipe = int | IO[Any] | None


def build_child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: what it needs of ours, and no more."""
    passed_on = {
        name: value
        for name, value in environ.items()
        if name in _PASSED_NAMES or (name.startswith(_PASSED_PREFIXES) and not _SECRET_NAME.search(name))
    }
    # The folder of this very package first: a child of a checkout finds it, and no other version.
    root = str(Path(__file__).resolve().parents[2])
    given = environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [root, *(path for path in given if os.path.isabs(path))]  # noqa: PTH117 - a text, not a Path
    return {**passed_on, "PYTHONPATH": os.pathsep.join(paths), "ORT_DISABLE_TELEMETRY": "1"}


def start_child(
    target: str | Path,
    *arguments: str,
    stdin: Pipe = subprocess.DEVNULL,
    stdout: Pipe = subprocess.PIPE,
    stderr: Pipe = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a module of ours by its name, or a script that needs the standard library only by its path.

    The command line can be read by everybody on the machine, so no argument may hold a secret.
    """
    return subprocess.Popen(
        _command(target, arguments),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        env=build_child_environment(os.environ),
    )


def start_text_child(
    target: str | Path,
    *arguments: str,
    stdin: Pipe = subprocess.DEVNULL,
    stdout: Pipe = subprocess.PIPE,
    stderr: Pipe = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[str]:
    """The same, with pipes of text."""
    return subprocess.Popen(
        _command(target, arguments),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        env=build_child_environment(os.environ),
        text=True,
        errors="replace",
    )


def run_child(target: str, given: bytes, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """Run a module of ours to its end, `given` on its stdin; what it wrote and its exit code.

    Raises:
        subprocess.TimeoutExpired: it did not end in time, and was killed.
        OSError: it cannot be started.
    """
    with start_child(target, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            out, err = child.communicate(given, timeout_s)
        finally:
            child.kill()
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def _command(target: str | Path, arguments: Sequence[str]) -> list[str]:
    # -P: the working folder is no place for modules. -I: nor is the folder of the script.
    way = ["-I", str(target)] if isinstance(target, Path) else ["-P", "-m", target]
    return [sys.executable, *way, *arguments]


def forbid_core_dumps(environ: Mapping[str, str]) -> None:
    """No crash of this process or of its children leaves its memory, with the secrets in it, in a file."""
    if environ.get(CORE_DUMPS_VARIABLE, "") in ("", "0"):
        _, most = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, most))


_SPARE_BYTES = 4 << 30  # address space for the libraries themselves

_PROCESSES = "too few processes or threads are allowed here (ulimit -u, or the container's pids limit)"
_LIMITS = {
    "Resource temporarily unavailable": _PROCESSES,
    "can't start new thread": _PROCESSES,
    "pthread_create": _PROCESSES,
    "failed to map segment": "too little memory or address space to load its libraries (ulimit -v)",
    "Cannot allocate memory": "too little memory",
}
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "bad allocation", "Failed to allocate memory")


def explain_machine_limit(told: bytes) -> str | None:
    """What a child said that the machine is to blame for, and not the model: a limit was reached.

    None where it said nothing of that kind.
    """
    text = told.decode(errors="replace")
    for sign, words in _LIMITS.items():
        if sign in text:
            return words
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and any(sign in text for sign in _OUT_OF_MEMORY):
        return f"the address space of a process is limited to {soft >> 20} MiB (ulimit -v)"
    return None


def compute_address_space_bytes() -> int:
    """What a child may use at most: the memory that there is, less where this process is limited already."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _SPARE_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    return most if hard == resource.RLIM_INFINITY else min(most, hard)
