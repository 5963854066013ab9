"""A folder of pictures as a source: each once, in natural order, at a steady rate."""

import logging
from pathlib import Path

from visionedge.camera.sources.base import DecodedPicture, SourceLimits, WholePicture
from visionedge.camera.sources.images import PICTURE_SUFFIXES, list_pictures, read_picture
from visionedge.errors import SourceError
from visionedge.frames.types import Picture

log = logging.getLogger(__name__)


_PICTURES_PER_S = 1.0
"""A folder has no rate of its own."""


class FolderSource:
    """Pictures from files; unreadable ones are left out and counted in `skipped`. See `Source`."""

    live = False
    decoder = "opencv"

    def __init__(self, name: str, paths: list[Path], limits: SourceLimits) -> None:
        self.skipped = 0
        self.step_s = 1 / (limits.pictures_per_s or _PICTURES_PER_S)
        self._name = name
        self._limits = limits
        self._left = paths[::-1]
        self._given = 0

    def __repr__(self) -> str:
        return f"<PicturesSource {self._name} left={len(self._left)} skipped={self.skipped}>"

    def read(self) -> DecodedPicture | None:
        """See `Source.read`."""
        while self._left:
            try:
                picture = read_picture(self._left.pop(), max_pixels=self._limits.max_pixels)
            except SourceError as error:
                self._skip(error)
                continue
            return self._decoded(picture)
        self._judge_end()
        return None

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `Source.want`: they are played at the rate they began with."""

    def interrupt(self) -> None:
        """See `Source.interrupt`: reading a picture is quick."""

    def close(self) -> None:
        """See `Source.close`."""
        self._left.clear()

    def _decoded(self, picture: Picture) -> DecodedPicture:
        position_s = self._given * self.step_s
        self._given += 1
        return WholePicture(lambda: picture, picture.shape[1], picture.shape[0], position_s)

    def _skip(self, error: SourceError) -> None:
        self.skipped += 1
        if self.skipped == 1:
            log.warning("%s; it is left out, and so are others like it", error)

    def _judge_end(self) -> None:
        if self._given == 0:
            raise SourceError(f"none of the {self.skipped} pictures in {self._name} can be read")
        if self.skipped > 1:
            log.warning("%d pictures of %s could not be read", self.skipped, self._name)


def open_folder(folder: Path, limits: SourceLimits) -> FolderSource:
    """Open a folder of pictures.

    Raises:
        SourceError: it cannot be listed or holds no picture.
    """
    paths = list_pictures(folder)
    if not paths:
        raise SourceError(
            f"{folder} holds no pictures ({', '.join(sorted(s[1:] for s in PICTURE_SUFFIXES))})"
        )
    return FolderSource(str(folder), paths, limits)


def open_picture(path: Path, limits: SourceLimits) -> FolderSource:
    """Open one picture: a folder of one.

    Raises:
        SourceError: it is no picture; read at once, so that the reason names it.
    """
    read_picture(path, max_pixels=limits.max_pixels)
    return FolderSource(str(path), [path], limits)
