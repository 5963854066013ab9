"""The C library's allocator, told what kind of program this is."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def settle_allocator() -> None:
    """Once, at the start of the module: memory that is given back goes back.

    glibc gives each thread a heap of its own, which grows to the most that was ever needed at once and,
    broken up by small things that stay, never shrinks. With a thread for each camera and pictures of
    megabytes that was a seventh of all memory, and rising. So: two heaps, and anything large by itself.
    Other C libraries have no such call, and no such habit.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_ARENA_MAX, 2)
        library.mallopt(_M_MMAP_THRESHOLD, 256 * 1024)
        library.mallopt(_M_TRIM_THRESHOLD, 1024 * 1024)
