"""Limits of this process: usable processor cores, file descriptors, and the memory allocator's settings."""

import contextlib
import ctypes
import math
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MAX_LANES = 128
"""Each lane has a socket to the engine's process, and one message can carry at most 253 of them."""

MAX_DESCRIPTORS = 65_536
"""More would slow down the start of children, which close all descriptors that they could inherit."""

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores(
    affinity: Callable[[], int] = lambda: len(os.sched_getaffinity(0)),
    cgroups: Path = _CGROUPS,
    membership: Path = _MEMBERSHIP,
) -> int:
    """Return the cores that this process can use: its affinity, or less under a CPU quota."""
    quota = cpu_quota(cgroups, membership)
    cores = affinity()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def bounded_cores(cores: int | None = None) -> int:
    """Return how many compute-bound threads are useful: the usable cores, `MAX_LANES` at most."""
    return min(usable_cores() if cores is None else cores, MAX_LANES)


def cpu_quota(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """Return the cores that the quota of the control groups (version 1 or 2) allows; None without a quota.

    A container sees its own group at the root. Elsewhere, such as in a systemd service, `membership` names
    the group, and the smallest quota of the group and its ancestors counts.
    """
    found = [
        quota
        for version_2, folder in _cgroup_folders(cgroups, membership)
        if (quota := _parse_quota(_read_cgroup_v2(folder) if version_2 else _read_cgroup_v1(folder)))
        is not None
    ]
    return min(found, default=None)


def _cgroup_folders(cgroups: Path, membership: Path) -> Iterator[tuple[bool, Path]]:
    """Yield the folders of this process's groups and their ancestors, and whether they are of version 2."""
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


def _parse_quota(words: Sequence[str]) -> float | None:
    """Return the cores of a quota and a period, both in microseconds."""
    try:
        quota, period = float(words[0]), float(words[1])
    except (ValueError, IndexError):
        return None  # "max": no quota
    return quota / period if quota > 0 and period > 0 else None


def _read_cgroup_v2(folder: Path) -> list[str]:
    try:
        return (folder / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


def _read_cgroup_v1(folder: Path) -> list[str]:
    try:
        return [
            (folder / f"cpu.cfs_{word}_us").read_text(encoding="ascii").strip()
            for word in ("quota", "period")
        ]
    except OSError:
        return []


def raise_descriptor_limit(limit: int = MAX_DESCRIPTORS) -> int:
    """Raise the soft limit of file descriptors to the hard one, at most to `limit`; return the new limit.

    The soft limit of most shells and services is 1024. Each camera, connection and file takes one descriptor.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limit if hard == resource.RLIM_INFINITY else min(hard, limit)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return descriptor_limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def descriptor_limit() -> int:
    """Return the soft limit of file descriptors; 2**31 if there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else soft


def configure_malloc() -> None:
    """Make glibc return freed memory to the system; to be called once, at the start of the module.

    glibc gives each thread its own heap, which grows to its peak and does not shrink, because small blocks
    that stay fragment it. With a thread per camera and pictures of megabytes this was a seventh of all
    memory, and rising. So two heaps are used, and large blocks are mapped one by one. Other C libraries
    neither need nor have this call.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_ARENA_MAX, 2)
        library.mallopt(_M_MMAP_THRESHOLD, 256 * 1024)
        library.mallopt(_M_TRIM_THRESHOLD, 1024 * 1024)
