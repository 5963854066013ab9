"""How much of the processor other processes used while a benchmark ran."""

import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

FIELD = "otherProcessesShare"
"""The key of every report of bench: a share of the cores that this process may use, 0 to 1, or null."""

QUIET = 0.05
"""Up to this share, which a desktop or a monitoring agent needs, a machine counts as idle."""

_IDLE = (3, 4)
"""The places of idle and iowait in a line of /proc/stat; guest time is part of user time already."""


class OtherProcesses:
    """The processor time of everything but this process and its descendants, from now on.

    Time that a hypervisor takes away (steal) counts too. `proc` is Linux's, `cores` are the cores to look at.
    """

    def __init__(
        self,
        proc: Path = Path("/proc"),
        cores: Collection[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proc = proc
        self._cores = os.sched_getaffinity(0) if cores is None else cores
        self._clock = clock
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")
        self._before = self._now()

    def share(self) -> float | None:
        """The share of the cores that others used since the start, 0 to 1; None where /proc does not tell."""
        now = self._now()
        if self._before is None or now is None:
            return None
        took_s, busy_s, own_s = (after - before for before, after in zip(self._before, now, strict=True))
        others_s = max(0.0, busy_s - own_s)
        return round(min(1.0, others_s / (max(took_s, 1e-9) * len(self._cores))), 3)

    def _now(self) -> tuple[float, float, float] | None:
        """The time, the processor time of the cores, and ours; all in seconds."""
        try:
            return self._clock(), self._busy_s(), self._own_s()
        except (OSError, ValueError, IndexError):
            return None

    def _busy_s(self) -> float:
        wanted = {f"cpu{core}" for core in self._cores}
        lines = (line.split() for line in (self._proc / "stat").read_text(encoding="ascii").splitlines())
        found = [words[1:9] for words in lines if words and words[0] in wanted]
        if len(found) != len(wanted):
            raise ValueError("not all cores are listed")
        ticks = sum(int(w) for words in found for place, w in enumerate(words) if place not in _IDLE)
        return ticks * self._tick_s

    def _own_s(self) -> float:
        """Of this process and its descendants, those that have ended included."""
        parents: dict[int, int] = {}
        ticks: dict[int, int] = {}
        for folder in self._proc.glob("[0-9]*"):
            try:
                text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # it ended between the listing and the reading
            fields = text.rpartition(")")[2].split()
            number = int(folder.name)
            parents[number] = int(fields[1])
            ticks[number] = sum(map(int, fields[11:15]))  # utime, stime, and both of the children waited for
        ours = {os.getpid()}
        while more := {number for number, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return sum(ticks[number] for number in ours if number in ticks) * self._tick_s


def caution(report: Mapping[str, Any]) -> str:
    """A sentence about the load of others in a report; empty where the machine was idle otherwise."""
    share = report.get(FIELD)
    if share is None or share <= QUIET:
        return ""
    return (
        f"Other processes used {share:.0%} of the processor during the measurement: on an otherwise idle"
        " machine the figures are better."
    )
