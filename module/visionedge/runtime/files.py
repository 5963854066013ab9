"""Reading files that somebody else gives us: a regular file, no larger than its kind can be."""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visionedge.errors import ConfigError, VisionedgeError


def read_regular_file(path: Path, *, max_bytes: int) -> bytes:
    """The content of a regular file.

    A FIFO would wait for a writer, a device such as /dev/zero never ends, and a file of gigabytes fills the
    memory before any parser can refuse it; so the kind and the size are looked at before anything is read.

    Raises:
        OSError: it cannot be read, is no regular file or is larger; `strerror` is the reason.
    """
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "is no regular file")
            # One byte more than allowed: a file that grows meanwhile is noticed, too.
            content = b"" if found.st_size > max_bytes else file.read(max_bytes + 1)
    except ValueError:  # a null character
        raise OSError(errno.EINVAL, "no file can have this name") from None
    if max(found.st_size, len(content)) > max_bytes:
        raise OSError(errno.EFBIG, f"is larger than {max_bytes / 2**20:.3g} MiB")
    return content


def _open_nonblocking(path: str, flags: int) -> int:
    """Open without waiting: the opening of a FIFO blocks until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


# Small files of state: read within bounds, written whole or not at all, set aside when they are damaged.
#
# A damaged file is renamed, not deleted, so that its content can still be examined; `MAX_SET_ASIDE_FILES` are
# kept.


MAX_SET_ASIDE_FILES = 3
"""Damaged files of one name that stay in the folder; the oldest goes first."""

MAX_BYTES = 4_000_000
"""Far above anything that the module itself writes into a small file of state."""

MAX_DEPTH = 64
"""Deeper than any document of the module, and far from what a recursive walk can take."""

MAX_SAFE_INTEGER = (1 << 53) - 1
"""The largest integer that JSON carries everywhere; a larger one in a state file is damage."""


class DamagedStateFileError(Exception):
    """A state file is there and makes no sense; the message never quotes the file, which may hold secrets."""


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON document in a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read now; that says nothing about its content.
        DamagedError: it is no regular file, too large, or no JSON.
    """
    with contextlib.closing(_RegularFile(path)) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DamagedStateFileError(f"it is larger than {max_bytes} bytes")
    try:
        document = json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_parse_finite
        )
    except UnicodeDecodeError:
        raise DamagedStateFileError("it is no UTF-8 text") from None
    except RecursionError:
        raise DamagedStateFileError("its values are nested too deeply") from None
    except ValueError:
        raise DamagedStateFileError("it is no JSON") from None
    if _depth(document) > MAX_DEPTH:
        raise DamagedStateFileError("its values are nested too deeply")
    return document


def parse_count(value: object, most: int = MAX_SAFE_INTEGER) -> int:
    """A number that counts something.

    Raises:
        DamagedError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise DamagedStateFileError("a count in it is not a plausible whole number")
    return value


def write_json(path: Path, document: Any) -> None:
    """Replace a file, readable for its owner alone. When this returns, the content outlives a power cut.

    Raises:
        OSError: it cannot be written; what was there stays, and nothing half-written is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)  # one that was left half-written may have other rights
    try:
        made = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(made, "w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Have the new name on disk; a file system that cannot do that is no reason to fail."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_partial_files(folder: Path) -> None:
    """Remove what a kill or a full disk left half-written; blocks, raises nothing."""
    with contextlib.suppress(OSError):
        for left in folder.glob("*.new"):
            with contextlib.suppress(OSError):
                left.unlink()


def set_aside(path: Path, companions: tuple[str, ...] = (), name: str | None = None) -> None:
    """Rename a file to `NAME.aside`, and older ones to `NAME.aside.1` …; with files named `NAME` + companion.

    `name`: instead of the file's own, for many files of which only a few damaged ones are worth keeping.

    Raises:
        OSError: it stays where it is.
    """
    for end in (*companions, ""):
        old = path.with_name(path.name + end)
        if not os.path.lexists(old):
            continue
        stem = f"{name or path.name}.aside"
        names = [f"{stem}{end}", *(f"{stem}.{n}{end}" for n in range(1, MAX_SET_ASIDE_FILES))]
        places = [path.with_name(name) for name in names]
        for younger, older in reversed(list(itertools.pairwise(places))):
            if os.path.lexists(younger):
                _remove_empty_folder(older)
                younger.replace(older)
        _remove_empty_folder(places[0])
        old.replace(places[0])


def set_aside_damaged(path: Path) -> None:
    """Set a damaged file of a cache aside, under one name for its whole folder; raises nothing."""
    with contextlib.suppress(OSError):
        set_aside(path, name="damaged")


def is_special_file(path: Path) -> bool:
    """Whether something lies there that is no regular file: opening it could block or never end."""
    return os.path.lexists(path) and not path.is_file()


class _RegularFile:
    """An open regular file; a pipe or a device is refused instead of waited for."""

    def __init__(self, path: Path) -> None:
        if is_special_file(path):
            raise DamagedStateFileError("it is no regular file")
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            self.close()
            raise DamagedStateFileError("it is no regular file")

    def read(self, limit_bytes: int) -> bytes:
        parts: list[bytes] = []
        while limit_bytes > 0 and (part := os.read(self._handle, min(limit_bytes, 1 << 20))):
            parts.append(part)
            limit_bytes -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._handle)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _depth(document: Any) -> int:
    """How deep values are nested; without recursion, and no deeper than it has to look."""
    depth, level = 0, [document]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return depth


def _remove_empty_folder(path: Path) -> None:
    """A directory cannot be replaced by a file; one that was set aside before has to go first."""
    if path.is_dir() and not path.is_symlink():
        # Only an empty one can go: whatever lies in it is not ours.
        path.rmdir()


# Folders of a cache: bounded, the least recently used files are deleted first.


def evict_least_recently_used(
    folder: Path,
    names: re.Pattern[str],
    *,
    max_files: int,
    max_bytes: int,
    keep: Callable[[Path], bool],
) -> list[Path]:
    """Delete the least recently used files of a folder until it is within its limits; which were deleted.

    Only files whose name matches `names` count. Their modification time is the time of last use. Files for
    which `keep` is true are counted and never deleted. Errors end the work silently: another process may
    delete too.
    """
    deleted, count, total_bytes = list[Path](), 0, 0
    with contextlib.suppress(OSError):
        found = [
            (keep(path), status.st_mtime, path, status.st_size)
            for path in folder.iterdir()
            if names.fullmatch(path.name) and (status := _status(path)) is not None
        ]
        for is_kept, _, path, size_bytes in sorted(found, reverse=True):
            count, total_bytes = count + 1, total_bytes + size_bytes
            if not is_kept and (count > max_files or total_bytes > max_bytes):
                path.unlink(missing_ok=True)
                deleted.append(path)
    return deleted


def _status(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat()
    return None


# Files that are written whole or not at all.


def write_text_atomically(path: Path, text: str, *, replace: bool, secret: bool) -> None:
    """Write a text file at once; one that is `secret` can be read by its owner only.

    Raises:
        ConfigError: there is one already, and `replace` is not wanted.
        VisionedgeError: it cannot be written; nothing is left behind.
    """
    if os.path.lexists(path) and not replace:
        raise ConfigError([f"{path}: is there already; --force replaces it"])
    try:
        fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
        made = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o666)
        try:
            with os.fdopen(made, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its name or text cannot be written"
        raise VisionedgeError(f"{path}: cannot be written: {reason}") from None
