"""Settings and checks of OpenCV and its FFmpeg that are process-wide: environment, logging, memory limits.

Call `configure_opencv` before the first use of OpenCV, and `limit_ffmpeg` before each opening.
"""

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from visionedge.camera.sources.base import SourceLimits
from visionedge.frames.types import Picture

# OpenCV's FFmpeg reads these options at each opening, for the whole process, so all kinds of streams share
# them. TCP: UDP loses packets and is blocked by firewalls. fpsprobesize 0: the rate is not needed, and
# measuring it takes 3 s at 10 fps. analyzeduration 2 s: enough for a late key picture, within the open limit.
_OPTIONS_VARIABLE = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_CAPTURE_OPTIONS = "rtsp_transport;tcp|fpsprobesize;0|analyzeduration;2000000"
_MAX_ALLOCATION_BYTES = 96 << 20
"""Largest allocation of FFmpeg: a plane of 100 megapixels, the limit of a picture."""

_UTIL_LIBRARY = re.compile(r"(/\S*/libavutil[^/\s]*)$", re.MULTILINE)

_limited_libraries: set[str] = set()
_lock = threading.Lock()
_options_lock = threading.Lock()
_is_configured = False


def configure_opencv() -> None:
    """Set FFmpeg's options, one thread and no logging, before OpenCV first opens or decodes.

    Logging is off because both libraries print URIs with passwords. Variables that the user has set are kept.
    """
    global _is_configured  # noqa: PLW0603 - the environment is process-wide, and so is this flag
    with _lock:
        if _is_configured:
            return
        # Each camera has a thread; more threads for a small resize cost more than they save.
        cv2.setNumThreads(1)
        os.environ.setdefault(_OPTIONS_VARIABLE, _CAPTURE_OPTIONS)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
        os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", f"{SourceLimits().silence_s:.0f}")
        if "OPENCV_LOG_LEVEL" not in os.environ:
            # Typed as an enumeration, but the levels are plain numbers.
            cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        _is_configured = True


def limit_ffmpeg() -> None:
    """Bound the memory of every loaded FFmpeg, and keep it from using a proxy. Call it before each opening.

    A camera can claim a length of 2 GB, and FFmpeg would allocate it. FFmpeg uses `http_proxy` of the
    environment, for TLS as well, but cameras are in the local network. The variable is removed from the
    environment that libraries see; Python's `os.environ` keeps it.
    """
    with _lock:
        os.unsetenv("http_proxy")
        for path in set(_UTIL_LIBRARY.findall(Path("/proc/self/maps").read_text())) - _limited_libraries:
            ctypes.CDLL(path).av_max_alloc(ctypes.c_size_t(_MAX_ALLOCATION_BYTES))
            _limited_libraries.add(path)


@contextlib.contextmanager
def capture_options(options: Mapping[str, str]) -> Iterator[None]:
    """Add options to those of `configure_opencv` for the opening in the body; one thread at a time.

    OpenCV reads them from the environment, which the whole process shares.
    """
    with _options_lock:
        own = os.environ[_OPTIONS_VARIABLE]
        os.environ[_OPTIONS_VARIABLE] = "|".join((own, *(f"{key};{value}" for key, value in options.items())))
        try:
            yield
        finally:
            os.environ[_OPTIONS_VARIABLE] = own


_LOG_ERROR = 16
_MAX_MESSAGE_BYTES = 1024
_MAX_MESSAGES = 100
_PYAV_FOLDER = "/av.libs/"
_callback_lock = threading.Lock()
_callback_users = 0
_messages: dict[int, list[str]] = {}
"""The error messages of each thread that collects them."""


def _note_error(source: int | None, level: int, text: int | None, arguments: int | None) -> None:
    found = _messages.get(threading.get_ident())
    # The higher bits of the level can hold a terminal colour.
    if found is None or level & 0xFF > _LOG_ERROR or len(found) >= _MAX_MESSAGES:
        return
    line, prefix = ctypes.create_string_buffer(_MAX_MESSAGE_BYTES), ctypes.c_int(0)
    _opencv_libraries()[0].av_log_format_line(
        *map(ctypes.c_void_p, (source,)),
        level,
        *map(ctypes.c_void_p, (text, arguments)),
        line,
        _MAX_MESSAGE_BYTES,
        ctypes.byref(prefix),
    )
    found.append(line.value.decode(errors="replace"))


# Never freed: another thread may still run it after FFmpeg's own callback is set again.
_on_message = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(
    _note_error
)


def _opencv_libraries() -> list[ctypes.CDLL]:
    with _lock:
        # PyAV has its own FFmpeg, in which it may have set its own callback.
        paths = [path for path in sorted(_limited_libraries) if _PYAV_FOLDER not in path]
    return [ctypes.CDLL(path) for path in paths]


@contextlib.contextmanager
def ffmpeg_errors() -> Iterator[list[str]]:
    """Collect the errors that OpenCV's FFmpeg reports in this thread; call `limit_ffmpeg` first.

    They can hold addresses with their secrets. FFmpeg calls back for every message of every thread, printed
    or not, so use this only while a source is opened, and for the few doubtful pictures.
    """
    global _callback_users  # noqa: PLW0603 - the callback is process-wide, and so is the number of its users
    libraries, thread = _opencv_libraries(), threading.get_ident()
    with _callback_lock:
        _callback_users += 1
        if _callback_users == 1:
            for library in libraries:
                library.av_log_set_callback(_on_message)
    try:
        yield _messages.setdefault(thread, [])
    finally:
        with _callback_lock:
            _callback_users -= 1
            del _messages[thread]
            if _callback_users == 0:
                for library in libraries:
                    library.av_log_set_callback(ctypes.cast(library.av_log_default_callback, ctypes.c_void_p))


def reports_error(action: Callable[[], object]) -> bool:
    """Whether OpenCV's FFmpeg reports an error in this thread while `action` runs; call `limit_ffmpeg` first.

    The report is the only sign of some errors, because OpenCV ignores the return value of FFmpeg's converter.
    """
    with ffmpeg_errors() as messages:
        action()
        return messages != []


_M_PERTURB = -6
_MARK = 0xA5
_MIN_UNWRITTEN_SHARE = 0.99
_fill_lock = threading.Lock()


@contextlib.contextmanager
def fill_new_memory() -> Iterator[None]:
    """Fill memory that any thread allocates in the body with a mark, if the C library supports it (glibc).

    If FFmpeg refuses to convert a picture, OpenCV reports success and returns memory that was not written. It
    allocates that memory for the first picture, so the mark shows the error: see `is_unwritten`.
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
    """Whether a picture that was retrieved within `fill_new_memory` is only marked memory.

    The allocator writes its own data at the ends, so a share of 99 % is enough.
    """
    return float(np.mean(picture == _MARK)) > _MIN_UNWRITTEN_SHARE
