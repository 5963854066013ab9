"""Files: the one bounded reader, the one atomic writer, and small JSON files of state.

`read_regular_file` reads a file that others supply, `write_atomically` writes a file whole or not at all.
`read_json` and `write_json` do the same for the module's own state. A damaged state file is renamed
(`set_aside`), not deleted, so that its content can still be examined.
"""

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

MAX_SET_ASIDE_FILES = 3
"""Damaged files of one name that are kept in a folder; the oldest is replaced first."""

MAX_BYTES = 4_000_000
"""Largest state file that is read: far more than the module writes into one."""

MAX_DEPTH = 64
"""Deepest nesting that is read: deeper than any document of the module, safe for recursive functions."""

MAX_SAFE_INTEGER = (1 << 53) - 1
"""The largest integer that every JSON parser reads exactly; a larger one in a state file is damage."""

_PART_SUFFIX = ".part"
_BLOCK_BYTES = 1 << 20


class DamagedStateFileError(Exception):
    """A state file exists and cannot be used. The message never quotes the file, which may hold secrets."""


def read_regular_file(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole file, after its kind and its size were checked.

    Opening a FIFO would block until a process writes to it, /dev/zero never ends, and a file of gigabytes
    would fill the memory before a parser can refuse it.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger than `max_bytes`; `strerror` is the
            reason.
    """
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            content = b"" if status.st_size > max_bytes else _read_up_to(file, status.st_size, max_bytes + 1)
    except ValueError:  # a null character
        raise OSError(errno.EINVAL, "not a valid file name") from None
    if max(status.st_size, len(content)) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes / 2**20:.3g} MiB")
    return content


def _read_up_to(file: BinaryIO, expected_bytes: int, most_bytes: int) -> bytes:
    """Read a file whole, or `most_bytes` of it if it grows meanwhile.

    `read(n)` allocates n bytes before it knows how many there are.
    """
    content = file.read(min(expected_bytes + 1, most_bytes))
    while len(content) > expected_bytes and (more := file.read(min(_BLOCK_BYTES, most_bytes - len(content)))):
        content += more
    return content


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def is_special_file(path: Path) -> bool:
    """Whether `path` exists and is not a regular file: opening it could block, reading it never end."""
    return os.path.lexists(path) and not path.is_file()


def write_atomically(path: Path, data: bytes, *, durable: bool = False, mode: int = 0o666) -> None:
    """Write or replace a file: readers see the old content or the new content, never a part of it.

    Args:
        path: in a folder that exists.
        data: the whole content.
        durable: when this returns, the new content survives a power cut (fsync of file and folder).
        mode: permissions of the file, reduced by the umask; 0o600 for a file that may hold secrets.

    Raises:
        OSError: it cannot be written; the old content stays, and no partial file is left.
        ValueError: `path` is not a valid file name.
    """
    # A name of its own for each call: other threads and processes may write the same file.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART_SUFFIX}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Write the new file name to the disk; not every file system supports this."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_partial_files(folder: Path) -> None:
    """Delete the partial files that a killed process left in `folder`; blocks, raises nothing.

    Version 0.1 called them `NAME.new`.
    """
    with contextlib.suppress(OSError):
        for part in (*folder.glob(f".*{_PART_SUFFIX}"), *folder.glob("*.new")):
            with contextlib.suppress(OSError):
                part.unlink()


def write_json(path: Path, document: Any) -> None:
    """Write a state file atomically and durably, readable for its owner only. Makes the folder if needed.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(document).encode(), durable=True, mode=0o600)


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read a state file.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: it cannot be read now; its content may be intact.
        DamagedStateFileError: it is not a regular file, too large, or not JSON.
    """
    if is_special_file(path):
        raise DamagedStateFileError("it is not a regular file")
    try:
        content = read_regular_file(path, max_bytes=max_bytes)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise DamagedStateFileError(f"it is {error.strerror}") from None
        raise
    try:
        document = json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_parse_finite
        )
    except UnicodeDecodeError:
        raise DamagedStateFileError("it is not UTF-8 text") from None
    except RecursionError:
        raise DamagedStateFileError("its values are nested too deeply") from None
    except ValueError:
        raise DamagedStateFileError("it is not JSON") from None
    if _depth(document) > MAX_DEPTH:
        raise DamagedStateFileError("its values are nested too deeply")
    return document


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number")


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _depth(document: Any) -> int:
    """Nesting depth of a JSON value, without recursion; counts no further than `MAX_DEPTH` + 1."""
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


def parse_count(value: object, max_value: int = MAX_SAFE_INTEGER) -> int:
    """Return a count from a state file: an integer from 0 to `max_value`.

    Raises:
        DamagedStateFileError: `value` is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= max_value:
        raise DamagedStateFileError("a count in it is not a plausible whole number")
    return value


def set_aside(path: Path, companions: tuple[str, ...] = (), name: str | None = None) -> None:
    """Rename a damaged file to `NAME.aside`, and older ones to `NAME.aside.1` …

    A folder with such a name that is not empty holds files of others: it stays, and another name is used.

    Args:
        path: the file.
        companions: suffixes of files that belong to it (`NAME` + suffix) and are renamed with it.
        name: used instead of the file's name, for a folder of many files of which few damaged ones are kept.

    Raises:
        OSError: it cannot be renamed.
    """
    stem = f"{name or path.name}.aside"
    for suffix in (*companions, ""):
        old = path.with_name(path.name + suffix)
        if not os.path.lexists(old):
            continue
        names = [f"{stem}{suffix}", *(f"{stem}.{n}{suffix}" for n in range(1, MAX_SET_ASIDE_FILES))]
        targets = [target for each in names if _is_free_for_file(target := path.with_name(each))]
        if not targets:
            raise OSError(errno.ENOTEMPTY, f"folders that are not empty have the names {stem} …")
        for younger, older in reversed(list(itertools.pairwise(targets))):
            if os.path.lexists(younger):
                younger.replace(older)
        targets[0].unlink(missing_ok=True)  # there if it is the only name; a folder could not replace it
        old.replace(targets[0])


def set_aside_special_file(path: Path) -> bool:
    """Rename a file of a cache that is not a regular file, and log it; whether it was one. Raises nothing.

    Opening a pipe would block, and a folder could not be replaced by a file.
    """
    if not is_special_file(path):
        return False
    log.warning("%s: is not a regular file; renamed", path)
    set_aside_damaged(path)
    return True


def set_aside_damaged(path: Path) -> None:
    """Set a damaged file of a cache aside, under one name for its whole folder; raises nothing."""
    with contextlib.suppress(OSError):
        set_aside(path, name="damaged")


def _is_free_for_file(path: Path) -> bool:
    """Whether a file can get this name; an empty folder is removed, because a file cannot replace it."""
    if not path.is_dir() or path.is_symlink():
        return True
    try:
        path.rmdir()
    except OSError:
        return False
    return True
