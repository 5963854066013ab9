"""The models that were fetched, on disk: each under its sha256, whole or not at all.

models/SHA256.onnx      checked, ready to be used
models/SHA256.part      what has arrived so far; a later try goes on from there
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

from visionedge.errors import FetchError
from visionedge.runtime.files import is_special_file, set_aside_damaged

log = logging.getLogger(__name__)

MODELS_FOLDER = "models"

MAX_MODELS = 4
MAX_BYTES = 4 << 30
_SPARE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_FILE_NAME = re.compile(r"[0-9a-f]{64}\.(onnx|part)")


def make_model_path(data: Path, sha256: str) -> Path:
    """Where a model lies in the data folder, if it was fetched."""
    return data / MODELS_FOLDER / f"{sha256.lower()}.onnx"


class PartialModel:
    """A model that arrives: what is there is on disk, and hashed. Used by one thread, in a ``with``.

    Raises:
        FetchError: from any method, when the disk does not take it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._bytes = 0
        with _wrap_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(handle, "r+b", buffering=0)  # so that a full disk is told at once
            while block := self._file.read(_BLOCK_BYTES):
                self._count(block)

    def __enter__(self) -> "PartialModel":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        # What cannot be written any more is fetched again.
        with contextlib.suppress(OSError):
            self._file.close()

    def __repr__(self) -> str:
        return f"<Part {self.path.name} {self._bytes}>"

    @property
    def size_bytes(self) -> int:
        """What has arrived."""
        return self._bytes

    @property
    def sha256(self) -> str:
        """Of what has arrived."""
        return self._hash.hexdigest()

    def write(self, block: bytes) -> None:
        """Take what comes next. When the disk is full, all of it is given back: others need it more."""
        left = memoryview(block)
        try:
            with _wrap_disk_errors(self.path.parent):
                while left:
                    left = left[self._file.write(left) :]
        except FetchError:
            with contextlib.suppress(FetchError):
                self.discard()
            raise
        self._count(block)

    def discard(self) -> None:
        """Forget what has arrived, and give its room back."""
        with _wrap_disk_errors(self.path.parent):
            self._file.seek(0)
            self._file.truncate()
        self._hash, self._bytes = hashlib.sha256(), 0

    def check_free_space(self, more_bytes: int) -> None:
        """See that so much more fits beside what else needs the disk, before the first byte of it comes."""
        with _wrap_disk_errors(self.path.parent):
            free = shutil.disk_usage(self.path.parent).free
        if free < more_bytes + _SPARE_BYTES:
            raise FetchError(
                f"{self.path.parent}: has no room for it: {_megabytes(more_bytes)} MB are needed, "
                f"and 64 MB to spare, but {_megabytes(free)} MB are free",
                permanent=True,
            )

    def finish(self, path: Path) -> None:
        """All is there: have it safe on disk under its own name."""
        with _wrap_disk_errors(path.parent):
            os.fsync(self._file.fileno())
            self.path.replace(path)

    def _count(self, block: bytes) -> None:
        self._hash.update(block)
        self._bytes += len(block)


class ModelStore:
    """The folder of fetched models. Its methods block on the disk: not for the loop."""

    def __init__(self, data: Path, *, max_models: int = MAX_MODELS, max_bytes: int = MAX_BYTES) -> None:
        self._data = data
        self._folder = data / MODELS_FOLDER
        self._most_models = max_models
        self._max_bytes = max_bytes

    def __repr__(self) -> str:
        return f"<Kept {self._folder}>"

    def find(self, sha256: str) -> Path | None:
        """The model with this sum, its bytes checked, or None; a damaged one is thrown away."""
        path = self._path(sha256)
        _set_aside_irregular(path)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == sha256.lower():
                os.utime(path)  # used just now: it goes last
                return path
            log.warning("%s: is damaged and fetched again", path)
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: cannot be used: %s", path, error.strerror)
        return None

    def open_partial(self, sha256: str) -> PartialModel:
        """The part of a model that has arrived so far.

        Raises:
            FetchError: the disk does not take it.
        """
        path = self._path(sha256).with_suffix(".part")
        _set_aside_irregular(path)
        return PartialModel(path)

    def commit(self, part: PartialModel, sha256: str) -> Path:
        """A part that is whole becomes a model.

        Raises:
            FetchError: the disk does not take it.
        """
        path = self._path(sha256)
        part.finish(path)
        return path

    def evict(self, in_use: Collection[str]) -> None:
        """Let go of the longest unused, until the rest is within the bounds; never of those `in_use`.

        Parts count as well, for their models may never come.
        """
        count = total = 0
        wanted = {sha256.lower() for sha256 in in_use}
        with contextlib.suppress(OSError):
            files = sorted(self._files(), key=lambda file: (file[0].stem in wanted, file[1]), reverse=True)
            for path, _, size_bytes in files:
                count, total = count + 1, total + size_bytes
                if path.stem not in wanted and (count > self._most_models or total > self._max_bytes):
                    path.unlink(missing_ok=True)
                    log.info("%s: let go, newer ones take its place", path)

    def _path(self, sha256: str) -> Path:
        return make_model_path(self._data, sha256)

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """(path, last used, bytes) of what is ours in the folder."""
        for path in self._folder.iterdir():
            if _FILE_NAME.fullmatch(path.name):
                status = path.lstat()
                yield path, status.st_mtime, status.st_size


def _set_aside_irregular(path: Path) -> None:
    """Set aside what is no regular file: a pipe would be waited for, and a folder could not be replaced."""
    if is_special_file(path):
        log.warning("%s: is no regular file and set aside", path)
        set_aside_damaged(path)


@contextlib.contextmanager
def _wrap_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        words = "is full" if full else f"cannot be written: {error.strerror or error}"
        raise FetchError(f"{folder}: {words}", permanent=True) from None


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f}"
