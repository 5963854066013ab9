"""Compiled graphs on disk, so that a model is compiled once: found again by all that went into them.

An entry is a file ``KEY.graph``: 32 bytes of check, then the graph. A damaged entry, or one that belongs
elsewhere, is made again. The folder keeps to a size; what was used longest ago goes first.
"""

import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path

import onnx

from visionedge import __version__
from visionedge.model.compiler.build import build, with_batch
from visionedge.model.compiler.compile import ROWS, compile_model
from visionedge.model.model import Model
from visionedge.runtime.files import drop_damaged, is_odd
from visionedge.runtime.ort import wheel

log = logging.getLogger(__name__)

FOLDER = "compiled"
SUFFIX = ".graph"

MOST_BYTES = 2 << 30
MOST_ENTRIES = 32
_CHECK_BYTES = 32


def compiled(model: Model, folder: Path | None, *, rows: int = ROWS) -> bytes:
    """The compiled graph of a model: from the data folder `folder` if it is there, else built and kept.

    A folder that cannot be written costs a warning and the time to build it again. None keeps nothing and
    tries nothing: the model is compiled as it is, as suits tests and models that are known.

    Raises:
        ModelError: the model cannot be compiled, or its first run does not end well.
        UnavailableError: onnxruntime cannot be used.
    """
    if folder is None:
        return compile_model(model, rows)
    entry = folder / FOLDER / f"{key_of(model, rows)}{SUFFIX}"
    graph = _read(entry)
    if graph is None:
        log.info("compiling %s and trying it in a process of its own: some seconds, once", model.name)
        graph = build(model, rows)
        if _write(entry, graph):
            _tidy(entry)
    return graph


def ready(model: Model, folder: Path | None, *, rows: int = ROWS) -> tuple[Model, bytes]:
    """The model with the batch that its compiled graph has, and that graph (see `compiled`)."""
    graph = compiled(model, folder, rows=rows)
    if folder is None:
        return model, graph
    dims = onnx.load_model_from_string(graph).graph.input[0].type.tensor_type.shape.dim
    return with_batch(model, dims[0].dim_value or None), graph


def key_of(model: Model, rows: int) -> str:
    """What tells one entry from another: the model and how it is understood, and all that compiles it."""
    reading = (model.sha256, model.name, model.labels, model.reading, rows)
    versions = (__version__, onnx.__version__, wheel(), _compiler())
    parts = (*(repr(part) for part in reading), *versions)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


@functools.cache
def _compiler() -> str:
    """The version of this very compiler: its source, which changes more often than the release does."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _check(entry: Path, graph: bytes) -> bytes:
    """Bound to the name too, so that an entry that was moved is not taken for another."""
    return hashlib.sha256(entry.name.encode() + graph).digest()


def _read(entry: Path) -> bytes | None:
    if is_odd(entry):  # a pipe would be waited for
        log.warning("%s: is no regular file and set aside", entry)
        drop_damaged(entry)
        return None
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    check, graph = content[:_CHECK_BYTES], content[_CHECK_BYTES:]
    if check != _check(entry, graph):
        log.warning("%s: is damaged and made again", entry)
        return None
    try:
        os.utime(entry)  # used just now: it goes last
    except OSError:
        log.debug("%s: cannot be touched", entry)
    return graph


def _write(entry: Path, graph: bytes) -> bool:
    """Whole or not at all: readers see the old entry or the new one. Whether it is there."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=entry.parent, suffix=".part")
    except OSError as error:
        log.warning("%s: compiled models cannot be kept there: %s", entry.parent, error.strerror)
        return False
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_check(entry, graph))
            file.write(graph)
        part.replace(entry)
    except OSError as error:
        log.warning("%s: compiled models cannot be kept there: %s", entry.parent, error.strerror)
        part.unlink(missing_ok=True)
        return False
    return True


def _tidy(newest: Path) -> None:
    """Let go of what was used longest ago, until the folder is within its bounds again."""
    total, count = 0, 0
    for age, path, size in sorted(_entries(newest.parent), key=lambda entry: entry[0], reverse=True):
        count, total = count + 1, total + size
        if path != newest and (count > MOST_ENTRIES or total > MOST_BYTES):
            path.unlink(missing_ok=True)
            log.info("%s: let go, last used at %d", path, age)


def _entries(folder: Path) -> list[tuple[float, Path, int]]:
    """(last used, path, bytes) of each entry, and of parts that a process left when it died."""
    found = []
    for path in folder.iterdir():
        if path.suffix in (SUFFIX, ".part"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process tidies too
            found.append((status.st_mtime, path, status.st_size))
    return found
