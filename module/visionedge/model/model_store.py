"""Downloaded models in the data folder. The methods block on the disk: do not call them in an event loop.

models/SHA256.onnx      complete and checked
models/SHA256.part      what has arrived so far; the next attempt of a download resumes there
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

from visionedge.errors import DownloadError
from visionedge.runtime.files import evict_least_recently_used, set_aside_special_file

log = logging.getLogger(__name__)

MODELS_FOLDER = "models"
MAX_MODELS = 4
MAX_BYTES = 4 << 30

_SPARE_BYTES = 64_000_000
_BLOCK_BYTES = 1 << 20
_FILE_NAME = re.compile(r"[0-9a-f]{64}\.(onnx|part)")


def make_model_path(data: Path, sha256: str) -> Path:
    """The path of a downloaded model in the data folder."""
    return data / MODELS_FOLDER / f"{sha256.lower()}.onnx"


class ModelStore:
    """The folder of downloaded models."""

    def __init__(self, data: Path) -> None:
        self._data = data

    def find(self, sha256: str) -> Path | None:
        """The model with this sum, after reading all its bytes; None if it is missing.

        A damaged one is deleted.
        """
        path = make_model_path(self._data, sha256)
        set_aside_special_file(path)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == sha256.lower():
                os.utime(path)  # the modification time is the time of last use, see `evict`
                return path
            log.warning("%s: is damaged; it is downloaded again", path)
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: cannot be used: %s; it is downloaded again", path, error.strerror)
        return None

    def open_partial(self, sha256: str) -> "PartialModel":
        """The part of a model that has arrived so far.

        Raises:
            DownloadError: it cannot be written.
        """
        return PartialModel(make_model_path(self._data, sha256).with_suffix(".part"))

    def evict(self, in_use: Collection[str]) -> None:
        """Delete the least recently used models until the limits are met, but none of `in_use` (by sha256).

        Partial models count too, because they may never be completed.
        """
        kept = {sha256.lower() for sha256 in in_use}
        deleted = evict_least_recently_used(
            self._data / MODELS_FOLDER,
            _FILE_NAME,
            max_files=MAX_MODELS,
            max_bytes=MAX_BYTES,
            keep=lambda path: path.stem in kept,
        )
        for path in deleted:
            log.info("%s: deleted, as the store is full", path)


class PartialModel(contextlib.AbstractContextManager["PartialModel"]):
    """A model that is not complete yet: a file, and the hash of its content. For one thread, in a ``with``.

    Raises:
        DownloadError: from any method, if the disk is full or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        set_aside_special_file(path)
        with _wrap_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(handle, "r+b", buffering=0)  # unbuffered: `write` notices a full disk
            while block := self._file.read(_BLOCK_BYTES):
                self._count(block)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the next attempt reads what was really written
            self._file.close()

    @property
    def sha256(self) -> str:
        """The sum of the bytes that have arrived."""
        return self._hash.hexdigest()

    def write(self, block: bytes) -> None:
        """Append a block. If the disk is full, the file is emptied, because others need the space."""
        left = memoryview(block)
        try:
            with _wrap_disk_errors(self.path.parent):
                while left:
                    left = left[self._file.write(left) :]
        except DownloadError:
            with contextlib.suppress(DownloadError):
                self.discard()
            raise
        self._count(block)

    def _count(self, block: bytes) -> None:
        self._hash.update(block)
        self.size_bytes += len(block)

    def discard(self) -> None:
        """Empty the file."""
        with _wrap_disk_errors(self.path.parent):
            self._file.seek(0)
            self._file.truncate()
        self._hash, self.size_bytes = hashlib.sha256(), 0

    def check_free_space(self, more_bytes: int) -> None:
        """Check before the first byte that so many more fit, and 64 MB for other files."""
        with _wrap_disk_errors(self.path.parent):
            free_bytes = shutil.disk_usage(self.path.parent).free
        if free_bytes < more_bytes + _SPARE_BYTES:
            needed, spare, free = (f"{size / 1e6:,.0f} MB" for size in (more_bytes, _SPARE_BYTES, free_bytes))
            raise DownloadError(
                f"{self.path.parent}: too little space: {needed} are needed, with {spare} to spare, but only"
                f" {free} are free",
                permanent=True,
            )

    def commit(self) -> Path:
        """Write the content to the disk (fsync), then give the file the name of a complete model."""
        path = self.path.with_suffix(".onnx")
        with _wrap_disk_errors(path.parent):
            os.fsync(self._file.fileno())
            self.path.replace(path)
        return path


@contextlib.contextmanager
def _wrap_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if is_full else f"cannot be written: {error.strerror or error}"
        raise DownloadError(f"{folder}: {reason}", permanent=True) from None
