"""Space on the disk that is given up when the disk is full, so that messages can still be deleted.

SQLite needs free space even to delete. Without a reserve, a disk that the spool itself has filled stays full
after all its messages were sent.
"""

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

RESERVE_BYTES = 4 << 20
"""More than the write-ahead log grows to between two checkpoints, which is what a checkpoint may need."""


class DiskReserve:
    """A file of `size_bytes` that has no content."""

    def __init__(self, path: Path, size_bytes: int = RESERVE_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def __repr__(self) -> str:
        return f"<DiskReserve {self._path.name}>"

    def hold(self, *, again: bool = False) -> None:
        """Allocate the space if it is free, and as much again, so that others can use the disk; blocks.

        `again`: it was just released, so it need not leave any.
        """
        try:
            if self._is_held():
                return
            disk = os.statvfs(self._path.parent)
            if disk.f_bavail * disk.f_frsize >= self._size_bytes * (1 if again else 2):
                self._allocate()
        except OSError as error:
            log.debug("%s: %s; no space is reserved", self._path, error.strerror)

    def release(self) -> bool:
        """Give the space up; returns whether there was any. Blocks."""
        try:
            held = self._is_held()
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.debug("%s: %s", self._path, error.strerror)
            return False
        return held

    def _is_held(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self._path.stat().st_blocks * 512 >= self._size_bytes
        return False

    def _allocate(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._size_bytes)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
