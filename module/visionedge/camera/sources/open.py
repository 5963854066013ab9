"""From a camera URI to an open source of pictures, whatever its kind."""

import os
from collections.abc import Callable
from pathlib import Path

from visionedge.camera.sources.base import Decoded, Limits, Source
from visionedge.camera.sources.folder import open_folder, open_picture
from visionedge.camera.sources.images import SUFFIXES, decode_picture, read_picture
from visionedge.camera.sources.opencv import open_device
from visionedge.camera.sources.video import LoopedSource, open_stream, open_video
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError
from visionedge.runtime.installation import bundled

__all__ = ["Decoded", "Limits", "Source", "decode_picture", "open_source", "read_picture"]

DEMO_CLIP = "media/demo.mp4"


def open_source(uri: CameraUri, limits: Limits | None = None) -> Source:
    """Open what a URI names; blocks no longer than the open limit, but for name resolution and dead mounts.

    A still picture is a folder of one: it is given once.

    Raises:
        SourceError: it cannot be opened; one line with the reason and the remedy, without secrets.
        UnavailableError: `demo:` without the bundled clip.
    """
    try:
        return _open(uri, limits or Limits())
    except OSError as error:
        raise SourceError(f"{uri} cannot be opened: {error.strerror or error}") from None


def _open(uri: CameraUri, limits: Limits) -> Source:
    match uri.kind:
        case "rtsp" | "http":
            return open_stream(uri, limits)
        case "v4l2":
            return open_device(Path(uri.target), limits)
        case "folder":
            return _repeated(lambda: open_folder(Path(uri.target), limits), limits)
        case "demo":
            clip = bundled(DEMO_CLIP)
            return LoopedSource(lambda: open_video(clip, limits))
        case "file":
            return _repeated(lambda: _open_file(Path(uri.target), limits), limits)


def _repeated(opener: Callable[[], Source], limits: Limits) -> Source:
    """The source, begun again at its end where that is wanted."""
    return LoopedSource(opener) if limits.loop else opener()


def _open_file(path: Path, limits: Limits) -> Source:
    if not path.exists():
        raise SourceError(f"{path} does not exist; check the path")
    if path.is_dir():
        return open_folder(path, limits)
    # Opening a pipe or a device would wait for ever.
    if not path.is_file():
        raise SourceError(f"{path} is no regular file")
    if not os.access(path, os.R_OK):
        raise SourceError(f"{path} may not be read by this user; change its permissions")
    if path.suffix.lower() in SUFFIXES:
        return open_picture(path, limits)
    return open_video(path, limits)
