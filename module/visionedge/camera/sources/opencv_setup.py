"""OpenCV and its FFmpeg, brought to behave: options that only the environment can give, silence, a check."""

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from visionedge.camera.sources.base import SourceLimits
from visionedge.frames.types import Picture

# Read by OpenCV's FFmpeg each time a stream is opened, for the whole process: so one set for all kinds.
# TCP: UDP loses packets and stops at firewalls. fpsprobesize 0: a rate is not needed, and counting pictures
# for it takes 3 s at 10 fps. analyzeduration: still time for a late key picture, within the open limit.
_CAPTURE_OPTIONS = "rtsp_transport;tcp|fpsprobesize;0|analyzeduration;2000000"
_MAX_ALLOCATION_BYTES = 96 << 20
"""A plane of 100 megapixels, the most that is decoded at all."""

_UTIL_LIBRARY = re.compile(r"(/\S*/libavutil[^/\s]*)$", re.MULTILINE)

_limited_libraries: set[str] = set()
_lock = threading.Lock()
_is_configured = False


def configure_opencv() -> None:
    """Once, before OpenCV first opens or decodes: our FFmpeg options, one thread, and silence.

    Silence, because both libraries print URIs with the passwords in them. What the user has set in the
    environment stays.
    """
    global _is_configured  # noqa: PLW0603 - the environment is process-wide, and so is this flag
    with _lock:
        if _is_configured:
            return
        # Cameras are many, each with a thread: more of them for a small resize cost more than they bring.
        cv2.setNumThreads(1)
        os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", _CAPTURE_OPTIONS)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
        os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", f"{SourceLimits().silence_s:.0f}")
        if "OPENCV_LOG_LEVEL" not in os.environ:
            # Typed as if levels were an enumeration; they are plain numbers.
            cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        _is_configured = True


def limit_ffmpeg() -> None:
    """Before each opening: no FFmpeg that is loaded believes what a camera claims, or asks a proxy for it.

    A length of 2 GB in an answer is one line for a camera to write, and FFmpeg would take so much memory.
    FFmpeg reads `http_proxy` of the environment, for TLS as well; cameras are in the local network. It is
    taken out of the environment that libraries see; Python's own (`os.environ`) keeps it.
    """
    with _lock:
        os.unsetenv("http_proxy")
        for path in set(_UTIL_LIBRARY.findall(Path("/proc/self/maps").read_text())) - _limited_libraries:
            ctypes.CDLL(path).av_max_alloc(ctypes.c_size_t(_MAX_ALLOCATION_BYTES))
            _limited_libraries.add(path)


_LOG_ERROR = 16
_PYAV_FOLDER = "/av.libs/"
_callback_lock = threading.Lock()
_erring_threads: set[int] = set()


def _note_error(_source: int | None, level: int, _text: int | None, _arguments: int | None) -> None:
    if level & 0xFF <= _LOG_ERROR:  # a colour for terminals may stand above the level
        _erring_threads.add(threading.get_ident())


# Kept for good: another thread may still be within it when FFmpeg's own is set again.
_on_message = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(
    _note_error
)


def reports_error(action: Callable[[], object]) -> bool:
    """Whether OpenCV's FFmpeg reports an error in this thread while `action` runs; call `limit_ffmpeg` first.

    The report is the only trace of some errors: OpenCV ignores what FFmpeg's converter returns. FFmpeg calls
    for each message, printed or not, so this is for the few pictures about which there is a doubt.
    """
    with _lock:
        # PyAV brings an FFmpeg of its own, in which it may have set a callback of its own.
        paths = [path for path in sorted(_limited_libraries) if _PYAV_FOLDER not in path]
    with _callback_lock:
        libraries = [ctypes.CDLL(path) for path in paths]
        _erring_threads.discard(threading.get_ident())
        for library in libraries:
            library.av_log_set_callback(_on_message)
        try:
            action()
        finally:
            for library in libraries:
                library.av_log_set_callback(ctypes.cast(library.av_log_default_callback, ctypes.c_void_p))
        return threading.get_ident() in _erring_threads


_M_PERTURB = -6
_MARK = 0xA5
_MIN_UNWRITTEN_SHARE = 0.99
_fill_lock = threading.Lock()


@contextlib.contextmanager
def fill_new_memory() -> Iterator[None]:
    """Memory that any thread gets in the body is filled with a mark, where the C library can do so (glibc).

    OpenCV says that a picture was retrieved although its FFmpeg refused to convert it; then what it gives is
    memory that nobody has written. It reserves that memory when the first picture is retrieved, so marked
    memory shows it: see `is_unwritten`.
    """
    with _fill_lock:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is None:
            yield
            return
        mallopt(_M_PERTURB, _MARK ^ 0xFF)  # the C library fills with the complement
        try:
            yield
        finally:
            mallopt(_M_PERTURB, 0)


def is_unwritten(picture: Picture) -> bool:
    """Whether a picture that was retrieved within `fill_new_memory` is nothing but marked memory.

    Not each byte: the allocator keeps notes of its own at the ends.
    """
    return float(np.mean(picture == _MARK)) > _MIN_UNWRITTEN_SHARE
