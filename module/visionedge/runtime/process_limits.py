"""Processor cores that the module plans for."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MOST_LANES = 128
"""Each lane has a socket to the engine's process, and one message can hand over 253 at most."""
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores(
    affinity: Callable[[], int] = lambda: len(os.sched_getaffinity(0)),
    cgroups: Path = _CGROUPS,
    membership: Path = _MEMBERSHIP,
) -> int:
    """The cores this process may really use: its affinity, or less where the CPU quota says so."""
    quota = cpu_quota(cgroups, membership)
    cores = affinity()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def bounded_cores(cores: int | None = None) -> int:
    """How many threads that each fill a core are worth having: the usable cores, `MOST_LANES` at most."""
    return min(usable_cores() if cores is None else cores, MOST_LANES)


def cpu_quota(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """The cores that the quota of the control groups (version 2, else 1) allows; None without a quota.

    A container sees its own group at the root. Outside one, as for a service of systemd, `membership` names
    the group, and the smallest quota of it and of its ancestors counts.
    """
    found = [
        quota
        for version_2, folder in _groups(cgroups, membership)
        if (quota := _quota(_version_2(folder) if version_2 else _version_1(folder))) is not None
    ]
    return min(found, default=None)


def _groups(cgroups: Path, membership: Path) -> Iterator[tuple[bool, Path]]:
    """The folders of this process's groups and of their ancestors, and whether they are of version 2."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    roots = {True: cgroups, False: cgroups / "cpu"}
    yield from roots.items()
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers or "cpu" in controllers.split(","):
            root = roots[not controllers]
            parts = [part for part in path.split("/") if part and part != ".."]
            yield from ((not controllers, root.joinpath(*parts[:end])) for end in range(1, len(parts) + 1))


def _quota(words: Sequence[str]) -> float | None:
    """Cores, of a quota and a period in microseconds."""
    try:
        quota, period = float(words[0]), float(words[1])
    except (ValueError, IndexError):
        return None  # "max": no quota
    return quota / period if quota > 0 and period > 0 else None


def _version_2(folder: Path) -> list[str]:
    try:
        return (folder / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


def _version_1(folder: Path) -> list[str]:
    try:
        return [
            (folder / f"cpu.cfs_{word}_us").read_text(encoding="ascii").strip()
            for word in ("quota", "period")
        ]
    except OSError:
        return []
