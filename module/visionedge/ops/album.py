"""Annotated pictures and videos in a folder: what `detect --annotate` leaves for people to look at."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2

from visionedge.camera.timing import sane_fps
from visionedge.errors import SourceError
from visionedge.frames.drawing import annotate
from visionedge.frames.types import Picture, Result


class Album:
    """A picture keeps its name, a video becomes NAME.mp4 (MPEG-4); a name that is taken gets a number.

    Raises:
        SourceError: from everything here, when the folder or a file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{folder} cannot be made: {error.strerror}") from None
        self._folder = folder
        self._taken: set[str] = set()
        self._video: _Video | None = None

    def __enter__(self) -> "Album":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_video()

    def add(self, source: Path, position_s: float | None, result: Result) -> None:
        """Draw a result on its picture and keep it; `position_s` is None for a still picture."""
        picture = annotate(result.frame.full_picture(), result)
        if position_s is None:
            self._end_video()
            self._keep(self._place(source.name), picture)
            return
        if self._video is None or self._video.source != source:
            self._end_video()
            self._video = _Video(source, self._place(f"{source.stem}.mp4"))
        self._video.add(picture, position_s)

    def _keep(self, place: Path, picture: Picture) -> None:
        try:
            place.write_bytes(cv2.imencode(place.suffix, picture)[1].tobytes())
        except OSError as error:
            raise SourceError(f"{place} cannot be written: {error.strerror}") from None

    def _end_video(self) -> None:
        if self._video is not None:
            self._video.close()
        self._video = None

    def _place(self, name: str) -> Path:
        wanted, count = Path(name), 1
        while name in self._taken:
            count += 1
            name = f"{wanted.stem}-{count}{wanted.suffix}"
        self._taken.add(name)
        return self._folder / name


@dataclass(frozen=True, slots=True)
class _Page:
    picture: Picture
    position_s: float


class _Video:
    """A video that is written. The first picture waits for the second: their distance is the rate."""

    def __init__(self, source: Path, place: Path) -> None:
        self.source = source
        self._place = place
        self._first: _Page | None = None
        self._writer: cv2.VideoWriter | None = None

    def add(self, picture: Picture, position_s: float) -> None:
        page = _Page(picture, position_s)
        if self._writer is not None:
            self._writer.write(picture)
        elif self._first is None:
            self._first = page
        else:
            self._writer = self._open(self._first, position_s - self._first.position_s)
            self._writer.write(picture)

    def close(self) -> None:
        if self._writer is None and self._first is not None:  # a video of one picture
            self._writer = self._open(self._first, 0.0)
        if self._writer is not None:
            self._writer.release()

    def _open(self, first: _Page, step_s: float) -> cv2.VideoWriter:
        height_px, width_px = first.picture.shape[:2]
        rate = sane_fps(1 / step_s if step_s > 0 else 0.0)
        code = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(self._place), code, rate, (width_px, height_px))
        if not writer.isOpened():
            raise SourceError(f"{self._place} cannot be written")
        writer.write(first.picture)
        return writer
