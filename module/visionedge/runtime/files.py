"""Reading files that somebody else gives us: a regular file, no larger than its kind can be."""

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """The content of a regular file.

    A FIFO would wait for a writer, a device such as /dev/zero never ends, and a file of gigabytes fills the
    memory before any parser can refuse it; so the kind and the size are looked at before anything is read.

    Raises:
        OSError: it cannot be read, is no regular file or is larger; `strerror` is the reason.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "is no regular file")
            # One byte more than allowed: a file that grows meanwhile is noticed, too.
            content = b"" if found.st_size > most_bytes else file.read(most_bytes + 1)
    except ValueError:  # a null character
        raise OSError(errno.EINVAL, "no file can have this name") from None
    if max(found.st_size, len(content)) > most_bytes:
        raise OSError(errno.EFBIG, f"is larger than {most_bytes / 2**20:.3g} MiB")
    return content


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: the opening of a FIFO blocks until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)
