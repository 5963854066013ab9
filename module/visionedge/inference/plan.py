"""The plan: how many lanes call the engine, and with which batch sizes; all are warmed up before ready."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Plan:
    """`buckets` are the only batch sizes that ever run, rising; shorter batches are padded to the next."""

    lanes: int
    buckets: tuple[int, ...]
    reason: str

    @property
    def max_batch(self) -> int:
        """The largest batch worth forming."""
        return self.buckets[-1]

    def bucket(self, count: int) -> int:
        """The smallest bucket that holds so many pictures, or the largest there is."""
        return next((size for size in self.buckets if size >= count), self.buckets[-1])


def make_plan(device: str, max_batch: int, fixed_batch: int | None, cores: int) -> Plan:
    """What suits a device, from what is known of its kind.

    A CPU does best with as many single-threaded lanes as cores and one picture each; a GPU with large
    batches, and a second lane that prepares one while the first is computed.
    """
    on_gpu = device != "cpu"
    lanes = 2 if on_gpu else cores
    why = (
        "a GPU: two lanes, batches in buckets"
        if on_gpu
        else f"{cores} usable cores: a lane each, one picture"
    )
    if fixed_batch is not None:
        return Plan(lanes, (fixed_batch,), f"{why}; the model fixes its batch at {fixed_batch}")
    if not on_gpu:
        return Plan(lanes, (1,), why)
    powers = [1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch]
    return Plan(lanes, (*powers, max_batch), why)


def usable_cores(
    affinity: Callable[[], int] = lambda: len(os.sched_getaffinity(0)), cgroups: Path = _CGROUPS
) -> int:
    """The cores this process may really use: its affinity, or less where a container's quota says so."""
    quota = _quota(cgroups)
    cores = affinity()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(cgroups: Path) -> float | None:
    """Cores by the quota of the control group (version 2, else 1); None where there is no quota."""
    try:
        words = (cgroups / "cpu.max").read_text(encoding="ascii").split()
    except OSError:
        words = _version_1(cgroups / "cpu")
    try:
        quota, period = float(words[0]), float(words[1])
    except (ValueError, IndexError):
        return None  # "max": no quota
    return quota / period if quota > 0 and period > 0 else None


def _version_1(folder: Path) -> list[str]:
    try:
        return [
            (folder / f"cpu.cfs_{word}_us").read_text(encoding="ascii").strip()
            for word in ("quota", "period")
        ]
    except OSError:
        return []
