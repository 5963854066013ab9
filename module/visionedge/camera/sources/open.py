"""Opens a camera URI of any kind as a `FrameSource` (`open_source`).

Videos and streams go to PyAV or OpenCV, HTTP addresses first to `http_camera`, pictures to `images`.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from visionedge.camera.sources import opencv
from visionedge.camera.sources.allowed_formats import PROBE_BYTES, check_container
from visionedge.camera.sources.base import DecodedPicture, DecoderLibrary, FrameSource, SourceLimits
from visionedge.camera.sources.http_camera import open_http
from visionedge.camera.sources.images import PICTURE_SUFFIXES, FolderSource, open_folder, open_picture
from visionedge.camera.sources.opencv import open_device
from visionedge.camera.timing import plausible_fps
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError
from visionedge.runtime.installation import describe_extra, find_bundled_file

DEMO_CLIP = "media/demo.mp4"

_NO_PYAV = f"decoder 'pyav' is not installed; install {describe_extra('av')}, or use 'opencv'"


def open_source(uri: CameraUri, limits: SourceLimits | None = None) -> FrameSource:
    """Open a camera URI. Blocks for the open limit at most, except for name resolution and dead mounts.

    Raises:
        SourceError: it cannot be opened; one line with the reason and the remedy, without secrets.
        UnavailableError: the clip of `demo:` is missing.
    """
    try:
        return _open(uri, limits or SourceLimits())
    except OSError as error:
        raise SourceError(f"{uri}: cannot be opened: {error.strerror or error}") from None


def _open(uri: CameraUri, limits: SourceLimits) -> FrameSource:
    match uri.kind:
        case "rtsp" | "http":
            return open_stream(uri, limits)
        case "v4l2":
            return open_device(Path(uri.target), limits)
        case "folder":
            return _open_looped(lambda: open_folder(Path(uri.target), limits), limits)
        case "demo":
            clip = find_bundled_file(DEMO_CLIP)
            return LoopedSource(lambda: open_video(clip, limits))
        case "file":
            return _open_looped(lambda: _open_file(Path(uri.target), limits), limits)


def _open_looped(opener: Callable[[], FrameSource], limits: SourceLimits) -> FrameSource:
    """Open the source, as a loop if configured."""
    return LoopedSource(opener) if limits.loop else opener()


def _open_file(path: Path, limits: SourceLimits) -> FrameSource:
    if not path.exists():
        raise SourceError(f"{path}: does not exist; check the path")
    if path.is_dir():
        return open_folder(path, limits)
    # Opening a pipe would block.
    if not path.is_file():
        raise SourceError(f"{path}: not a regular file")
    if not os.access(path, os.R_OK):
        raise SourceError(f"{path}: no read permission; change its permissions")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return open_picture(path, limits)
    return open_video(path, limits)


def choose_library(wanted: DecoderLibrary) -> DecoderLibrary:
    """Return the decoder: PyAV, unless OpenCV is configured or PyAV is not installed.

    Raises:
        SourceError: PyAV is configured and not installed.
    """
    installed = importlib.util.find_spec("av") is not None
    if wanted == "pyav" and not installed:
        raise SourceError(_NO_PYAV)
    return "pyav" if installed and wanted != "opencv" else "opencv"


def open_video(path: Path, limits: SourceLimits) -> FrameSource:
    """Open a video file; `path` exists and is a regular file.

    Raises:
        SourceError: it cannot be decoded as video, is too large, or its container or codec is not allowed.
    """
    with path.open("rb") as file:
        check_container(file.read(PROBE_BYTES), str(path), limits, path)
    if choose_library(limits.library) == "opencv":
        return opencv.open_video(path, limits)
    from visionedge.camera.sources import pyav

    return pyav.open_video(path, limits)


def open_stream(uri: CameraUri, limits: SourceLimits) -> FrameSource:
    """Open an RTSP or HTTP address.

    Raises:
        SourceError: it cannot be opened; the server is asked for the reason.
    """
    if uri.kind == "http":
        return open_http(uri, limits, _open_media)
    if choose_library(limits.library) == "opencv":
        if limits.transport != "tcp" and uri.kind == "rtsp":
            raise SourceError(
                f"{uri}: only PyAV supports RTSP over UDP; install the extra 'av', or set transport: tcp"
            )
        opencv.refuse_certificate_check(uri.target, limits)
        return opencv.open_stream(uri, limits)
    from visionedge.camera.sources import pyav

    return pyav.open_stream(uri, limits)


def _open_media(target: str, limits: SourceLimits, playlist: bool) -> FrameSource:
    """Open a video file, a playlist or a stream over HTTP."""
    if choose_library(limits.library) == "opencv":
        opencv.refuse_certificate_check(target, limits)
        return opencv.open_media(target, limits, playlist=playlist)
    from visionedge.camera.sources import pyav

    return pyav.open_media(target, limits, playlist=playlist)


class LoopedSource:
    """A source that begins again at its end, with media times that keep rising."""

    live = False

    def __init__(self, opener: Callable[[], FrameSource]) -> None:
        self._opener = opener
        self._source = opener()
        self.decoder = self._source.decoder
        self._begin_s = 0.0
        self._last_s = 0.0
        self._step_s = (
            self._source.step_s if isinstance(self._source, FolderSource) else 1.0 / plausible_fps(0.0)
        )
        self._wanted: tuple[float | None] | None = None
        self._interrupted = False

    def __repr__(self) -> str:
        return f"<LoopedSource {self._source!r}>"

    def read(self) -> DecodedPicture | None:
        """See `FrameSource.read`; None only if the source has no picture at all."""
        decoded = self._source.read()
        if decoded is None:
            if self._interrupted:
                return None
            self._source.close()
            self._source = self._opener()
            if self._wanted is not None:
                self._source.set_wanted_rate(*self._wanted)
            # The last picture of a round is shown as long as the one before it.
            self._begin_s = self._last_s + self._step_s
            decoded = self._source.read()
            if decoded is None:
                return None  # a source without a picture would be opened again without end
        position_s = self._begin_s + (decoded.position_s or 0.0)
        if position_s > self._last_s:
            self._step_s = position_s - self._last_s
        self._last_s = position_s
        decoded.position_s = position_s
        return decoded

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `FrameSource.set_wanted_rate`; also for later rounds."""
        self._wanted = (pictures_per_s,)
        self._source.set_wanted_rate(pictures_per_s)

    def interrupt(self) -> None:
        """See `FrameSource.interrupt`."""
        self._interrupted = True
        self._source.interrupt()

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._source.close()
