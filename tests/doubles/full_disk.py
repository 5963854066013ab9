"""A spool on a file system that it fills itself: a process of its own, in a mount namespace of its own.

    unshare --mount sh -c 'mount -t tmpfs -o size=14m none FOLDER && exec python full_disk.py FOLDER'

It writes one JSON document per line: what the spool reports while it is filled and drained.
"""

import json
import os
import sys
from pathlib import Path

from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool, SpoolOptions
from visionedge.runtime.threads import ThreadGroup

_CYCLES = 3
_PER_CYCLE = 2_000
_RETRY_NS = 10_100_000_000


class FilledDisk:
    """The spool, its clock, and the numbers that the hub got."""

    def __init__(self, folder: Path) -> None:
        self.now_ns = 0
        self.number = 0
        self.got: list[int] = []
        self.spool = Spool(
            folder / "spool.db",
            "me",
            ThreadGroup(lambda name, error: sys.exit(f"{name}: {error}")),
            spool_options=SpoolOptions(memory_bytes=2_000_000),
            clock=lambda: self.now_ns,
        )

    def turn(self) -> None:
        """A round of the thread, after the time in which a disk is tried again."""
        self.now_ns += _RETRY_NS
        self.spool._write_and_refill()

    def put(self, count: int) -> None:
        """New messages of 8 KB that cannot be compressed."""
        for _ in range(count):
            self.number += 1
            body = os.urandom(4000).hex().encode()
            self.spool.put(
                Message("detections", body, f"d-{self.number}", {"schema": "s"}, self.number, frames=1)
            )

    def drain(self) -> None:
        """The hub takes all that can be read."""
        while (following := self.spool.peek()) is not None:
            self.got.append(following.sequence_number)
            self.spool.settle(following)

    def report(self, step: str) -> None:
        """Write the state to stdout."""
        status = self.spool.status()
        document = {"step": step, "mode": status.mode, "waiting": status.waiting, "got": len(self.got)}
        sys.stdout.write(json.dumps(document) + "\n")


def _main(folder: Path) -> None:
    disk = FilledDisk(folder)
    for _ in range(_CYCLES):
        for _ in range(_PER_CYCLE // 50):
            disk.put(50)
            disk.turn()
        disk.report("filled")
        for _ in range(12):
            disk.drain()
            disk.turn()
        disk.report("drained")
        for _ in range(60):
            disk.put(1)
            disk.turn()
            disk.drain()
            if disk.spool.status().mode != "disk":
                break
        disk.turn()
        disk.report("used")
    assert disk.got == sorted(set(disk.got)), "the order, and none twice"
    dropped = disk.spool.status().dropped
    assert len(disk.got) + sum(dropped.values()) == disk.number, f"{len(disk.got)} {dropped} {disk.number}"


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
