"""Pictures in memory that two processes share: written once by a camera thread, read by the engine's process.

The memory is an anonymous file (`memfd_create`): it has no name, so nothing can be left behind, and the
kernel frees it with the last process that has it open.
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
"""Blocks begin at pages, so that no two cameras write to the same page."""

_F_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1 and later; Python has no name for it."""


class SharedFramePool:
    """Blocks of one picture each, uint8 (H, W, 3). `allocate` may be called by any thread.

    A block is free again as soon as the picture and all views of it are garbage: a picture that waits, is
    computed or is shown cannot be overwritten. Only blocks that were used need memory, and the one that was
    freed last is used first.

    `exhausted_count` counts the pictures for which no block was free.
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
        # A deque needs no lock: garbage collection may free a block at any moment.
        self._free = deque(reversed(range(blocks)))
        self._counting = threading.Lock()

    def __repr__(self) -> str:
        blocks = f"free={len(self._free)}/{self.blocks} exhausted={self.exhausted_count}"
        return f"<SharedFramePool {self._shape} {blocks}>"

    @property
    def free(self) -> int:
        """The number of free blocks."""
        return len(self._free)

    def allocate(self) -> Picture | None:
        """A picture in a free block, to be written; None if no block is free: then use any array."""
        try:
            block = self._free.pop()
        except IndexError:
            with self._counting:
                self.exhausted_count += 1
            return None
        # Its base is the memory itself, not an array: so every view of the picture keeps the picture alive.
        picture: Picture = np.ndarray(self._shape, np.uint8, self._memory, block * self._stride_bytes)
        weakref.finalize(picture, self._free.append, block).atexit = False
        return picture

    def block_of(self, picture: Picture) -> int | None:
        """The block of a picture; None if it is not in this memory."""
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
    """The blocks of a pool in the engine's process, read only."""

    def __init__(self, fd: int, spec: InputSpec) -> None:
        self._shape = (spec.height_px, spec.width_px, 3)
        self._stride_bytes = compute_stride_bytes(spec)
        self._memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        self._blocks = len(self._memory) // self._stride_bytes

    def picture(self, block: int) -> Picture:
        """The picture in a block.

        Raises:
            IndexError: the number is invalid.
        """
        if not 0 <= block < self._blocks:
            raise IndexError(f"there is no block {block}")
        return np.ndarray(self._shape, np.uint8, self._memory, block * self._stride_bytes)


def _seal(fd: int) -> None:
    """Forbid resizing, because reading past a shorter end kills a process, and writing by others."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with contextlib.suppress(OSError):  # an older kernel
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)


def compute_stride_bytes(spec: InputSpec) -> int:
    """The distance from one block to the next."""
    size_bytes = spec.height_px * spec.width_px * 3
    return -(-size_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def compute_block_count(cameras: int, lanes: int) -> int:
    """Enough blocks for the cameras and as many lanes as there may be.

    Each camera has pictures that wait or are held by viewers, each lane one that is computed, and one whose
    result waits for an earlier one.
    """
    return 8 * max(8, cameras) + 2 * lanes
