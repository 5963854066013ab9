"""Pictures in memory that two processes share: written once by a camera thread, read by the engine's child.

The memory is an anonymous file (`memfd_create`): it has no name anywhere, so nothing can be left behind, and
it is gone with the last process that has it open.
"""

import contextlib
import fcntl
import mmap
import os
import threading
import weakref
from collections import deque

import numpy as np

from visionedge.frames.types import InputSpec, Picture

_ALIGNED_BYTES = 4096
"""Blocks begin at pages: no two cameras ever write to one."""

_F_SEAL_FUTURE_WRITE = 0x10
"""Of Linux 5.1 and later; Python has no name for it."""


class SharedFramePool:
    """Blocks of one picture each, uint8 (H, W, 3). `allocate` may be called by any thread.

    A block is free again as soon as nobody holds the picture any more, nor any view of it; so one that is
    waiting, being computed or looked at cannot be handed out a second time. Memory is taken only for blocks
    that were used, and the one given back last is used first.

    `dry` counts the pictures that found no free block.
    """

    def __init__(self, spec: InputSpec, blocks: int) -> None:
        self.spec = spec
        self.blocks = blocks
        self.exhausted_count = 0
        self._shape = (spec.height_px, spec.width_px, 3)
        self._stride_bytes = compute_stride_bytes(spec)
        self.fd = os.memfd_create("visionedge-pictures", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, blocks * self._stride_bytes)
        self._memory = mmap.mmap(self.fd, blocks * self._stride_bytes)
        _seal(self.fd)
        self._first_byte = np.frombuffer(self._memory, np.uint8, 1).__array_interface__["data"][0]
        # A deque needs no lock: a block may come back in the middle of anything, when garbage is collected.
        self._free = deque(reversed(range(blocks)))
        self._counting = threading.Lock()

    def __repr__(self) -> str:
        return f"<Arena {self._shape} free={len(self._free)}/{self.blocks} dry={self.exhausted_count}>"

    @property
    def free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    def allocate(self) -> Picture | None:
        """A picture in a free block, to be written; None where there is none, then any array will do."""
        try:
            block = self._free.pop()
        except IndexError:
            with self._counting:
                self.exhausted_count += 1
            return None
        # Its base is the memory itself, no array: so every view of the picture keeps the picture alive.
        picture: Picture = np.ndarray(self._shape, np.uint8, self._memory, block * self._stride_bytes)
        weakref.finalize(picture, self._free.append, block).atexit = False
        return picture

    def block_of(self, picture: Picture) -> int | None:
        """The block that a picture lies in; None where it lies elsewhere."""
        if picture.shape != self._shape or not picture.flags.c_contiguous:
            return None
        offset = picture.__array_interface__["data"][0] - self._first_byte
        block, within = divmod(offset, self._stride_bytes)
        return block if within == 0 and 0 <= block < self.blocks else None

    def close(self) -> None:
        """Close the file; pictures that are still held stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FrameView:
    """The other end: the blocks of an arena as the child sees them, read only."""

    def __init__(self, fd: int, spec: InputSpec) -> None:
        self._shape = (spec.height_px, spec.width_px, 3)
        self._stride_bytes = compute_stride_bytes(spec)
        self._memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        self._blocks = len(self._memory) // self._stride_bytes

    def picture(self, block: int) -> Picture:
        """The picture in a block.

        Raises:
            IndexError: there is no such block.
        """
        if not 0 <= block < self._blocks:
            raise IndexError(f"there is no block {block}")
        return np.ndarray(self._shape, np.uint8, self._memory, block * self._stride_bytes)


def _seal(fd: int) -> None:
    """Nobody resizes it, as whoever reads past a shorter end dies; and nobody but us writes, now or later."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with contextlib.suppress(OSError):  # an older kernel
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)


def compute_stride_bytes(spec: InputSpec) -> int:
    """From one block to the next."""
    size_bytes = spec.height_px * spec.width_px * 3
    return -(-size_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def compute_block_count(cameras: int) -> int:
    """Enough for so many cameras: each has pictures waiting, being computed, newest, and held by viewers."""
    return 8 * max(8, cameras)
