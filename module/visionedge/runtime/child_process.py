"""Starts child processes of our own: the engine worker, probes, trial runs of models, doctor and bench.

A child may crash on an untrusted model or in a driver, and other processes can read its environment and
command line in `/proc`. So `start_child` gives it an environment that is built from a list of the variables
that children need, without tokens, connection strings and proxies. The child imports the same visionedge as
its parent, and nothing from the working folder, which is the data folder in the images.
"""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal, overload

from visionedge.errors import UnavailableError
from visionedge.runtime.threads import PROCESS_LIMIT

# Prefixes of the variables that a child needs: paths of programs, libraries and caches, locale and time zone,
# settings of the GPU, arithmetic and video libraries, and of Python.
_PASSED_PREFIXES = (
    *("PATH", "HOME", "USER", "LANG", "LC_", "TZ", "TMPDIR", "XDG_", "LD_", "PYTHON", "VIRTUAL_ENV"),
    *(
        "CUDA",
        "CUDNN",
        "CUBLAS",
        "NVIDIA",
        "TENSORRT",
        "ORT_",
        "OMP_",
        "OPENCV_",
        "MALLOC_",
        "SSL_CERT_",
        "STUB_",
    ),
)
# Our own variables that hold no secret; a module that `bench` starts reads them.
_PASSED_NAMES = frozenset(
    f"VISIONEDGE_{name}" for name in ("DATA", "CONFIG", "MODEL", "DEVICE", "LOG_LEVEL", "INJECT_FAULTS")
)
# A name with a passed prefix can still be a secret: NVIDIA_API_KEY.
_SECRET_NAME = re.compile(r"(?i)key|token|secret|passw|credential|signature|auth")

CORE_DUMPS_VARIABLE = "VISIONEDGE_CORE_DUMPS"
"""Set this variable to let a crash write a core dump, for debugging."""

Pipe = int | IO[Any] | None


@overload
def start_child(
    target: str | Path,
    *arguments: str,
    stdin: Pipe = ...,
    stdout: Pipe = ...,
    stderr: Pipe = ...,
    pass_fds: Sequence[int] = ...,
    variables: Mapping[str, str] = ...,
    text: Literal[False] = ...,
) -> subprocess.Popen[bytes]: ...


@overload
def start_child(
    target: str | Path,
    *arguments: str,
    stdin: Pipe = ...,
    stdout: Pipe = ...,
    stderr: Pipe = ...,
    pass_fds: Sequence[int] = ...,
    variables: Mapping[str, str] = ...,
    text: Literal[True],
) -> subprocess.Popen[str]: ...


def start_child(
    target: str | Path,
    *arguments: str,
    stdin: Pipe = subprocess.DEVNULL,
    stdout: Pipe = subprocess.PIPE,
    stderr: Pipe = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
    text: bool = False,
) -> subprocess.Popen[bytes] | subprocess.Popen[str]:
    """Start a module of ours by its name, or by its path a script that imports the standard library alone.

    Every user of the machine can read the command line, so no argument may hold a secret.

    Args:
        target: the name of the module, or the path of the script.
        arguments: its command line.
        stdin: as for `subprocess.Popen`, like `stdout`, `stderr` and `pass_fds`.
        variables: of the environment, in place of ours.
        text: the pipes carry text; bytes that are not UTF-8 are replaced.

    Raises:
        OSError: the process cannot be started.
    """
    return subprocess.Popen(
        _build_command(target, arguments),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        env=build_child_environment({**os.environ, **variables}),
        text=text,
        errors="replace" if text else None,
    )


def run_child(
    target: str, stdin: bytes, timeout_s: float, *, purpose: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a module of ours to its end and return its output and exit code.

    A child that has not ended after `timeout_s` is killed. Its exit code is then -SIGALRM, as if its own
    alarm had ended it (see `limit_this_child`).

    Raises:
        UnavailableError: the process cannot be started; `purpose`, such as "examine the model", completes the
            message.
    """
    try:
        with start_child(target, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            try:
                stdout, stderr = child.communicate(stdin, timeout_s)
            except subprocess.TimeoutExpired:
                return subprocess.CompletedProcess(child.args, -signal.SIGALRM, b"", b"")
            finally:
                child.kill()
    except OSError as error:
        raise UnavailableError(f"cannot {purpose}: no process can be started: {error.strerror}") from None
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def build_child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environ` that a child needs, and the import path of this package."""
    passed_on = {
        name: value
        for name, value in environ.items()
        if name in _PASSED_NAMES or (name.startswith(_PASSED_PREFIXES) and not _SECRET_NAME.search(name))
    }
    # The folder of this package comes first, so that a child of a checkout imports the checkout.
    root = str(Path(__file__).resolve().parents[2])
    given = environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [root, *(path for path in given if os.path.isabs(path))]  # noqa: PTH117 - a text, not a Path
    return {**passed_on, "PYTHONPATH": os.pathsep.join(paths), "ORT_DISABLE_TELEMETRY": "1"}


def _build_command(target: str | Path, arguments: Sequence[str]) -> list[str]:
    # -P: import nothing from the working folder. -I: nor from the folder of the script.
    options = ["-I", str(target)] if isinstance(target, Path) else ["-P", "-m", target]
    return [sys.executable, *options, *arguments]


def forbid_core_dumps(environ: Mapping[str, str]) -> None:
    """Forbid core dumps of this process and its children, because memory holds secrets."""
    if environ.get(CORE_DUMPS_VARIABLE, "") in ("", "0"):
        _, hard_limit = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard_limit))


_MACHINE_LIMITS = {
    "Resource temporarily unavailable": PROCESS_LIMIT,
    "can't start new thread": PROCESS_LIMIT,
    "pthread_create": PROCESS_LIMIT,
    "failed to map segment": "too little memory or address space to load its libraries (ulimit -v)",
    "Cannot allocate memory": "too little memory",
}
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "bad allocation", "Failed to allocate memory")


def check_machine_limit(stderr: bytes, *, purpose: str) -> None:
    """Check that no limit of this machine ended a child; else its failure is the fault of its model.

    Raises:
        UnavailableError: the child reports such a limit on stderr; `purpose` as in `run_child`.
    """
    if (limit := explain_machine_limit(stderr)) is not None:
        raise UnavailableError(f"cannot {purpose}: {limit}")


def explain_machine_limit(stderr: bytes) -> str | None:
    """Return the limit of this machine that a child reports on stderr; None if it reports none."""
    text = stderr.decode(errors="replace")
    for sign, limit in _MACHINE_LIMITS.items():
        if sign in text:
            return limit
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and any(sign in text for sign in _OUT_OF_MEMORY):
        return f"the address space of a process is limited to {soft >> 20} MiB (ulimit -v)"
    return None


_LIBRARY_BYTES = 4 << 30
"""Address space that the libraries of a child map, beside its data."""


def limit_this_child(timeout_s: int) -> None:
    """Limit a child before it handles an untrusted model; called in the child.

    It writes no core dump, its address space is bounded by the machine's memory (or by a lower limit of the
    system), and SIGALRM ends it after `timeout_s`, even in native code.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _LIBRARY_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.alarm(timeout_s)
