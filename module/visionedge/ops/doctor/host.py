"""The machine that is examined: its files, its packages, and children that may hang or crash in our stead.

Everything that doctor learns comes through a `Host`, so tests can give it any machine.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from visionedge.engine.device.devices import ProbeRun, run_probe
from visionedge.frames.types import utc_now
from visionedge.runtime.child_process import start_text
from visionedge.runtime.process_limits import cpu_quota

Document = dict[str, Any]

_KILLED_WITHIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child told before it ended: one document for each step it came to.

    `ended` is "late" when its time was up, "died" when a signal or an error ended it; `words` says more.
    """

    steps: Mapping[str, Document]
    ended: Literal["fine", "late", "died"] = "fine"
    words: str = ""

    def step(self, name: str) -> Document:
        """What it told of a step; empty where it never came to it."""
        return self.steps.get(name, {})


@dataclass(frozen=True, slots=True)
class Space:
    """A file system, in bytes."""

    total_bytes: int
    free_bytes: int


Ask = Callable[[str, Document, float], Answer]
"""Puts a question of `ask.py`, with its arguments, to a child that has so many seconds."""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine. `root` is put before every path that is read; `site` is where packages are installed."""

    root: Path
    environ: Mapping[str, str]
    packages: Mapping[str, str]
    site: Path
    system: str
    cores: int
    uid: int
    ask: Ask
    session: ProbeRun
    space: Callable[[Path], Space | None]
    access: Callable[[Path, int], bool]
    utc_now: Callable[[], datetime]
    cpu_quota: float | None = None

    def at(self, path: str | Path) -> Path:
        """Where an absolute path of that machine lies on ours."""
        return self.root / str(path).lstrip("/")

    def exists(self, path: str | Path) -> bool:
        """Whether there is something."""
        # os.path answers False to names that are impossible or lie behind a closed folder; Path raises.
        return os.path.exists(self.at(path))  # noqa: PTH110 - see above

    def text(self, path: str | Path, limit_chars: int = 65536) -> str:
        """The text of a file; empty where it cannot be read."""
        try:
            with self.at(path).open(encoding="utf-8", errors="replace") as file:
                return file.read(limit_chars)
        except OSError:
            return ""

    def names(self, folder: str | Path) -> tuple[str, ...]:
        """What a folder holds, sorted; nothing where it cannot be read."""
        try:
            return tuple(sorted(os.listdir(self.at(folder))))  # noqa: PTH208 - names, not paths
        except OSError:
            return ()


def this_host(environ: Mapping[str, str]) -> Host:
    """The machine we run on."""
    return Host(
        root=Path("/"),
        environ=environ,
        packages=_packages(),
        site=_site(),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cores=len(os.sched_getaffinity(0)),
        uid=os.geteuid(),
        ask=ask_child,
        session=run_probe,
        space=_space,
        access=os.access,
        utc_now=utc_now,
        cpu_quota=cpu_quota(),
    )


def ask_child(question: str, arguments: Document, limit_s: float) -> Answer:
    """Ask in a child of `probe_child.py`, which knows the standard library only and starts in no time."""
    module = "visionedge.engine.device.placement"
    target = module if question == "placement" else Path(__file__).with_name("probe_child.py")
    child = start_text(target, question, json.dumps(arguments), stderr=subprocess.PIPE)
    try:
        told, complaint = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        told = ""
        # A child that hangs inside the driver does not even die; then it is left behind, not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            told, _ = child.communicate(timeout=_KILLED_WITHIN_S)
        return Answer(_steps(told), "late", f"no answer within {limit_s:g} s")
    if child.returncode < 0:
        return Answer(_steps(told), "died", f"signal {-child.returncode}")
    if child.returncode:
        words = complaint.strip().splitlines() or [f"exit code {child.returncode}"]
        return Answer(_steps(told), "died", words[-1][:300])
    return Answer(_steps(told))


def _steps(told: str) -> dict[str, Document]:
    steps: dict[str, Document] = {}
    for line in told.splitlines():
        # A line that was cut off by a crash, or that a library printed, is no step.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            document = json.loads(line)
            steps[str(document["step"])] = document
    return steps


def _packages() -> dict[str, str]:
    """Every installed package and its version, named as people write it."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        # A broken package has no name.
        name = package.metadata["Name"] if package.metadata else None
        if name:
            found.setdefault(name.lower().replace("_", "-"), package.version)
    return found


def _site() -> Path:
    """Where onnxruntime is installed, or would be."""
    for name in ("onnxruntime-gpu", "onnxruntime", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Path(str(importlib.metadata.distribution(name).locate_file("")))
    return Path(__file__).resolve().parents[3]


def _space(path: Path) -> Space | None:
    """The file system of a path, or of its nearest parent that is there."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(place)
            return Space(usage.total, usage.free)
    return None
