"""How much of the processor other processes used while a benchmark ran.

Make an `OtherProcessesLoad` before the measurement and ask for its `share` afterwards; `describe_other_load`
turns the share in a report into a caution.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

OTHER_PROCESSES_KEY = "otherProcessesShare"
"""Key of every bench report: the share of the cores that this process may use, 0 to 1, or null."""

MAX_IDLE_SHARE = 0.05
"""Up to this share, which a desktop or a monitoring agent needs, a machine counts as idle."""

_IDLE_COLUMNS = (3, 4)
"""Columns of idle and iowait in a line of /proc/stat; guest time is part of user time already."""


class OtherProcessesLoad:
    """The processor time that other processes used since this object was made.

    This process and its descendants do not count; time that a hypervisor takes away (steal) does.

    Args:
        proc: Linux's /proc.
        cores: numbers of the cores that count; None: those that this process may use.
        clock: monotonic seconds.
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
        """Return the share of the cores that others used, 0 to 1; None if /proc cannot be read."""
        now = self._now()
        if self._before is None or now is None:
            return None
        took_s, busy_s, own_s = (after - before for before, after in zip(self._before, now, strict=True))
        others_s = max(0.0, busy_s - own_s)
        return round(min(1.0, others_s / (max(took_s, 1e-9) * len(self._cores))), 3)

    def _now(self) -> tuple[float, float, float] | None:
        """The clock, the busy time of the cores, and our own processor time; all in seconds."""
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
        ticks = sum(int(w) for words in found for place, w in enumerate(words) if place not in _IDLE_COLUMNS)
        return ticks * self._tick_s

    def _own_s(self) -> float:
        """Processor time of this process and its descendants, also of those that have ended."""
        parents: dict[int, int] = {}
        ticks: dict[int, int] = {}
        for folder in self._proc.glob("[0-9]*"):
            try:
                text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # the process ended after the folder was listed
            fields = text.rpartition(")")[2].split()
            number = int(folder.name)
            parents[number] = int(fields[1])
            ticks[number] = sum(map(int, fields[11:15]))  # utime, stime, and the same of children that ended
        ours = {os.getpid()}
        while more := {number for number, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return sum(ticks[number] for number in ours if number in ticks) * self._tick_s


def describe_other_load(report: Mapping[str, Any]) -> str:
    """A caution about the load of other processes during a measurement; empty if the machine was idle."""
    share = report.get(OTHER_PROCESSES_KEY)
    if share is None or share <= MAX_IDLE_SHARE:
        return ""
    return (
        f"Other processes used {share:.0%} of the processor during the measurement: on an otherwise idle"
        " machine the figures are better."
    )
