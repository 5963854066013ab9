"""A spool on a real file system that hangs: a process of its own, in a mount namespace of its own.

    unshare --mount sh -c 'mount -o loop IMAGE FOLDER && exec python frozen_disk.py FOLDER'

It writes one JSON document to stdout: what the spool reports while the file system is frozen, and after.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool
from visionedge.runtime.threads import ThreadGroup

_SECOND_NS = 1_000_000_000
_PATIENCE_S = 20.0


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """No write to the file system returns in the body."""
    subprocess.run(["fsfreeze", "--freeze", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", folder], check=True)


class HangingDisk:
    """The spool with its thread, and a clock that only this file moves."""

    def __init__(self, folder: Path) -> None:
        self.now_ns = 0
        self.changed = threading.Event()
        self.group = ThreadGroup(lambda name, error: sys.exit(f"{name}: {error}"))
        self.spool = Spool(folder / "spool.db", "me", self.group, clock=lambda: self.now_ns)
        self.spool.attach(self.changed.set)
        self.spool.start()

    def put(self, number: int) -> None:
        """A new message."""
        self.spool.put(Message("detections", b"x" * 5000, f"d-{number}", {"schema": "s"}, number, frames=1))

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the thread."""
        for _ in range(int(_PATIENCE_S / 0.05)):
            if condition():
                return
            self.changed.wait(0.05)
            self.changed.clear()
        raise TimeoutError

    def take(self) -> list[int]:
        """What the hub can have now."""
        numbers: list[int] = []
        while (following := self.spool.peek()) is not None:
            numbers.append(following.sequence_number)
            self.spool.settle(following)
        return numbers


def _main(folder: Path) -> None:
    disk = HangingDisk(folder)
    disk.put(1)
    disk.until(lambda: disk.spool.unwritten == 0)
    got = [disk.take()]
    with frozen(folder):
        disk.put(2)
        disk.until(lambda: disk.spool._busy_since_ns is not None)
        disk.now_ns += 9 * _SECOND_NS
        events = [[event.code for event in disk.spool.take_events()]]
        disk.now_ns += 2 * _SECOND_NS
        events.append([event.code for event in disk.spool.take_events()])
        disk.put(3)
        got.append(disk.take())
        mode = disk.spool.status().mode
    disk.until(lambda: disk.spool.status().mode == "disk")
    disk.until(lambda: disk.spool.peek() is not None)
    got.append(disk.take())
    events.append([event.code for event in disk.spool.take_events()])
    clean = disk.spool.close(_PATIENCE_S)
    json.dump({"got": got, "events": events, "mode": mode, "clean": clean}, sys.stdout)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
