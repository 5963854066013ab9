"""Limits of this process: processor cores, memory, file descriptors, and the allocator's settings."""

import contextlib
import ctypes
import math
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
_MEMINFO = Path("/proc/meminfo")


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
        for version_2, folder in _cgroup_folders(cgroups, membership, "cpu")
        if (quota := _parse_quota(_read_cgroup_v2(folder) if version_2 else _read_cgroup_v1(folder)))
        is not None
    ]
    return min(found, default=None)


def _cgroup_folders(cgroups: Path, membership: Path, controller: str) -> Iterator[tuple[bool, Path]]:
    """Yield the folders of this process's groups and their ancestors, and whether they are of version 2."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    roots = {True: cgroups, False: cgroups / controller}
    yield from roots.items()
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers or controller in controllers.split(","):
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


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """The memory that more processes can take: `left_bytes` of `total_bytes`, swap included.

    `is_limited`: by a control group, such as that of a container, and not by the machine.
    """

    left_bytes: int
    total_bytes: int
    is_limited: bool


def read_memory_room(
    cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP, meminfo: Path = _MEMINFO
) -> MemoryRoom | None:
    """Return what is left in the machine and in the control groups, where it is least; None: unknown.

    Files in memory count as free, because the kernel drops them when a process needs memory. The groups are
    those of `cpu_quota`.
    """
    machine = _read_numbers(meminfo)
    total, left = (1024 * machine.get(name, 0) for name in ("MemTotal", "MemAvailable"))
    if not total:
        return None
    free_swap = 1024 * machine.get("SwapFree", 0)
    rooms = [MemoryRoom(left + free_swap, total, is_limited=False)]
    for version_2, folder in _cgroup_folders(cgroups, membership, "memory"):
        room = (_read_room_v2 if version_2 else _read_room_v1)(folder, free_swap)
        if room is not None and room.total_bytes < total:
            rooms.append(room)
    return min(rooms, key=lambda room: room.left_bytes)


def _read_room_v2(folder: Path, free_swap_bytes: int) -> MemoryRoom | None:
    limit, used = _read_number(folder / "memory.max"), _read_number(folder / "memory.current")
    if limit is None or used is None:  # "max": no limit
        return None
    stat = _read_numbers(folder / "memory.stat")
    cached = sum(stat.get(name, 0) for name in ("active_file", "inactive_file", "slab_reclaimable"))
    swap_limit, swapped = (_read_number(folder / f"memory.swap.{word}") for word in ("max", "current"))
    swap = free_swap_bytes if swap_limit is None else min(free_swap_bytes, swap_limit - (swapped or 0))
    return MemoryRoom(max(0, limit - used + cached + max(0, swap)), limit, is_limited=True)


def _read_room_v1(folder: Path, free_swap_bytes: int) -> MemoryRoom | None:
    limit, used = (_read_number(folder / f"memory.{word}_in_bytes") for word in ("limit", "usage"))
    if limit is None or used is None:
        return None
    stat = _read_numbers(folder / "memory.stat")
    cached = stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0)
    with_swap = _read_number(folder / "memory.memsw.limit_in_bytes")  # of memory and swap together
    swap = free_swap_bytes if with_swap is None else min(free_swap_bytes, with_swap - limit)
    return MemoryRoom(max(0, limit - used + cached + max(0, swap)), limit, is_limited=True)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _read_numbers(path: Path) -> dict[str, int]:
    """Return the numbers of lines such as ``active_file 4096`` and ``MemTotal:  1024 kB``."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {each[0].rstrip(":"): int(each[1]) for each in words if len(each) > 1 and each[1].isdigit()}


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
