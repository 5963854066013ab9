"""Runs pictures and videos through the engine, in order and at full speed, for `detect` and `scene`.

    a thread reads and resizes ──▶ a thread per lane computes ──▶ the caller ──▶ a thread draws and encodes

Each stage holds a bounded number of pictures, and waits for the next stage instead of dropping any.
`ClipReader` reads, `analyse` gives the results in order, `AnnotatedOutput` draws, `VideoProgress` shows how
far it is.
"""

import json
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, Self, TextIO, TypeVar

import cv2

from visionedge.camera.sources.base import expected_pictures
from visionedge.camera.sources.images import PICTURE_SUFFIXES, natural_sort_key, read_picture
from visionedge.camera.sources.open import open_source
from visionedge.camera.timing import plausible_fps
from visionedge.config.addresses import CameraUri
from visionedge.engine.interface import Engine
from visionedge.engine.lanes import infer_frames, make_frame
from visionedge.errors import DamagedPictureError, SourceError
from visionedge.frames.types import Frame, FrameResult, Picture
from visionedge.model.postprocess import Selection
from visionedge.ops.video_file import VideoFile
from visionedge.runtime.redaction import redact

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".ts", ".mpg", ".mpeg", ".mjpg"})
"""Suffixes of videos in a folder; a video that is given by its path may have any."""

_PROGRESS_S = 0.5
_MAX_UNDRAWN = 8
"""So many pictures wait for the thread that draws, at most."""


@dataclass(frozen=True, slots=True)
class ClipPicture:
    """A picture of an input: `source` is its path as given by the user, `number` its place in that file.

    `input_number` counts the inputs from 0. `position_s` is the time in its video, None for a still picture.
    `expected` is about the number of pictures of the video, None if that is not known. `load` makes the frame
    on any thread, and raises SourceError if the picture cannot be read.
    """

    input_number: int
    source: str
    number: int
    position_s: float | None
    expected: int | None
    load: Callable[[], Frame]


# --- the stages ---------------------------------------------------------------------------------------------


def analyse(
    pictures: Generator[ClipPicture], engine: Engine, selection: Selection
) -> Generator[tuple[ClipPicture, FrameResult | SourceError]]:
    """Each picture in order, with its result, or with the reason why it cannot be read.

    To be closed, which ends all threads.
    """
    plan = engine.info().plan

    def infer(batch: list[ClipPicture]) -> list[FrameResult | SourceError]:
        loaded = [_load(picture) for picture in batch]
        frames = [each for each in loaded if isinstance(each, Frame)]
        results = iter(infer_frames(frames, engine, selection) if frames else ())
        return [next(results) if isinstance(each, Frame) else each for each in loaded]

    with closing(read_ahead(pictures, max(2, plan.max_batch))) as ahead:
        batches = iter(lambda: list(islice(ahead, plan.max_batch)), [])
        with closing(map_ahead(infer, batches, plan.lanes)) as results:
            for batch, outcomes in results:
                yield from zip(batch, outcomes, strict=True)


def _load(picture: ClipPicture) -> Frame | SourceError:
    try:
        return picture.load()
    except SourceError as error:
        return error


def read_ahead(items: Generator[ItemT], most: int) -> Generator[ItemT]:
    """The items, of which a thread makes up to `most` in advance. To be closed, which ends the thread."""
    made: SimpleQueue[tuple[ItemT] | None] = SimpleQueue()
    free, stopped = threading.Semaphore(most), threading.Event()

    def make() -> None:
        try:
            with closing(items):
                for item in items:
                    free.acquire()
                    if stopped.is_set():
                        return
                    made.put((item,))
        finally:
            made.put(None)

    with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        reading = pool.submit(make)
        try:
            while (item := made.get()) is not None:
                free.release()
                yield item[0]
            reading.result()
        finally:
            stopped.set()
            free.release()


def map_ahead(
    work: Callable[[ItemT], ResultT], items: Iterable[ItemT], threads: int
) -> Generator[tuple[ItemT, ResultT]]:
    """Each item with its result, in order, while `threads` threads work on the next items.

    To be closed, which ends the threads.
    """
    waiting: deque[tuple[ItemT, Future[ResultT]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="lane") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                # One more item than threads keeps all of them busy; more items would only take memory.
                if len(waiting) > threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# --- reading ------------------------------------------------------------------------------------------------


class ClipReader:
    """The pictures of all paths, in order. Missing paths are reported at once; `inputs` are the others.

    Args:
        paths: pictures, videos, and folders of them.
        video_stride: of a video, the first of every `video_stride` pictures is read.
        videos_only: still pictures are refused, and left out of folders.
        camera: the camera of the frames. Then all videos follow each other on one clock, which is 0 at the
            first picture, and each of them is an epoch; numbers of frames go on from video to video.
        start: the UTC time of the first picture, for a camera.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        video_stride: int = 1,
        videos_only: bool = False,
        camera: str = "",
        start: datetime | None = None,
    ) -> None:
        self.failed = 0
        self._stride, self._camera, self._start = video_stride, camera, start
        self._clock_s, self._sequence = 0.0, 0
        self.inputs: list[str] = []
        for path in paths:
            try:
                self.inputs += _list_inputs(path, videos_only=videos_only)
            except SourceError as error:
                self.report(error)

    def report(self, error: SourceError) -> None:
        """Report an input that cannot be read, or not completely."""
        self.failed += 1
        sys.stderr.write(f"visionedge: {printable(redact(str(error)), sys.stderr)}\n")

    def read(self, engine: Engine) -> Generator[ClipPicture]:
        """The pictures for an engine; the `load` of the last one of an unreadable input raises the error."""
        for input_number, source in enumerate(self.inputs):
            try:
                if Path(source).suffix.lower() in PICTURE_SUFFIXES:
                    load = partial(_load_still, Path(source), engine)
                    yield ClipPicture(input_number, source, 1, None, None, load)
                else:
                    yield from self._video(input_number, source, engine)
            except SourceError as error:
                yield ClipPicture(input_number, source, 0, None, None, partial(_raise, error))

    def _video(self, input_number: int, path: str, engine: Engine) -> Generator[ClipPicture]:
        epoch, first_sequence, clock_s = input_number + 1, self._sequence, self._clock_s
        number, looked_at, damaged, reason, last_s = 0, 0, 0, "", 0.0
        with closing(open_source(CameraUri("file", path))) as source:
            expected = expected_pictures(source)
            while (decoded := source.read()) is not None:
                number, position_s = number + 1, decoded.position_s or 0.0
                # The last picture of a video is shown as long as the one before it.
                step_s, last_s = (position_s - last_s) or 1 / plausible_fps(0.0), position_s
                self._clock_s = clock_s + position_s + step_s
                self._sequence = first_sequence + number
                if (number - 1) % self._stride:
                    continue
                looked_at += 1
                try:
                    picture = decoded.picture()
                except DamagedPictureError as error:
                    damaged, reason = damaged + 1, reason or str(error)
                    continue
                load = partial(make_frame, picture, engine, number)
                if self._start is not None:
                    at_s, now = clock_s + position_s, self._start + timedelta(seconds=clock_s + position_s)
                    stamp = _Stamp(self._camera, self._sequence, epoch, round(at_s * 1e9), now)
                    load = partial(_make_stamped_frame, picture, engine, stamp)
                yield ClipPicture(input_number, path, number, position_s, expected, load)
        if damaged:
            raise SourceError(f"{path}: {damaged} of {looked_at} pictures cannot be decoded: {reason}")


class _Stamp(NamedTuple):
    """The fields of a camera's frame that the frame of a file lacks."""

    camera: str
    sequence: int
    epoch: int
    captured_ns: int
    captured_utc: datetime


def _make_stamped_frame(picture: Picture, engine: Engine, stamp: _Stamp) -> Frame:
    return replace(make_frame(picture, engine), **stamp._asdict())


def _load_still(path: Path, engine: Engine) -> Frame:
    return make_frame(read_picture(path), engine)


def _raise(error: SourceError) -> NoReturn:
    raise error


def _list_inputs(source: str, *, videos_only: bool) -> list[str]:
    """The pictures and videos of a folder in natural order, without hidden ones; else the path itself.

    Raises:
        SourceError: the folder cannot be listed or has nothing of this kind, or the path is a URI or a
            picture where videos are wanted.
    """
    if "://" in source:
        raise SourceError(f"{source} is a URI, and files are needed; for a camera use run --camera NAME=URI")
    folder = Path(source)
    if not _is_folder(source):
        if videos_only and folder.suffix.lower() in PICTURE_SUFFIXES:
            raise SourceError(f"{source} is a picture, and a video is needed")
        return [source]
    try:
        entries = [entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    except OSError as error:
        raise SourceError(f"{source} cannot be listed: {error.strerror}") from None
    suffixes = VIDEO_SUFFIXES if videos_only else VIDEO_SUFFIXES | PICTURE_SUFFIXES
    names = [entry.name for entry in entries if entry.suffix.lower() in suffixes]
    if not names:
        raise SourceError(f"{source} has no {'videos' if videos_only else 'pictures and no videos'}")
    # Joined as text, because a Path would drop a leading './'.
    return [f"{source.rstrip('/')}/{name}" for name in sorted(names, key=natural_sort_key)]


def _is_folder(source: str) -> bool:
    """Whether a path is a folder; else it is a readable file.

    Raises:
        SourceError: it is neither.
    """
    try:
        seen = Path(source).stat()
    except FileNotFoundError:
        raise SourceError(f"{source} does not exist; check the path") from None
    except OSError as error:
        raise SourceError(f"{source} cannot be opened: {error.strerror}") from None
    except ValueError:
        raise SourceError(f"{source!r} is not a valid file name") from None
    if stat.S_ISDIR(seen.st_mode):
        return True
    if not stat.S_ISREG(seen.st_mode):
        raise SourceError(f"{source}: not a regular file")
    if seen.st_size == 0:
        raise SourceError(f"{source}: empty file")
    if not os.access(source, os.R_OK):
        raise SourceError(f"{source} cannot be read by this user; change its permissions")
    return False


# --- the output ---------------------------------------------------------------------------------------------


def printable(text: str, out: TextIO) -> str:
    """A text without control characters and without characters that the stream cannot encode."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    encoding = out.encoding or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def json_line(document: dict[str, Any], out: TextIO) -> str:
    """A document as one line of JSON, in the encoding of the stream."""
    line = json.dumps(document, ensure_ascii=False)
    try:
        line.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:  # JSON escapes every character in ASCII
        line = json.dumps(document)
    return line


class AnnotatedOutput:
    """A folder of annotated pictures and videos (MP4), which a thread draws.

    A name that is used gets a number, also that of an input in this folder. To be used in a `with` statement:
    its end waits for the thread, and completes the present video. Every method raises SourceError if the
    folder or a file cannot be written.
    """

    def __init__(self, folder: Path, inputs: Iterable[str] = ()) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{folder} cannot be created: {error.strerror}") from None
        self._folder = folder
        paths, here = map(Path, inputs), folder.resolve()
        self._taken = {path.name for path in paths if path.parent.resolve() == here}
        self._input_number: int | None = None
        self._video: VideoFile | None = None
        self._waiting: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="drawing")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            while exc_type is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._end_video()

    def add(self, picture: ClipPicture, name: str, draw: Callable[[], Picture]) -> None:
        """Write a picture that `draw` makes on the thread: a file, or the next one of the video `name`."""
        self._waiting.append(self._pool.submit(self._add, picture, name, draw))
        if len(self._waiting) > _MAX_UNDRAWN:
            self._waiting.popleft().result()

    def _add(self, picture: ClipPicture, name: str, draw: Callable[[], Picture]) -> None:
        canvas = draw()
        if picture.input_number != self._input_number:
            self._input_number = picture.input_number
            self._end_video()
            path = self._output_path(name)
            if picture.position_s is None:
                _write_picture(path, canvas)
                return
            self._video = VideoFile(path)
        if self._video is not None and picture.position_s is not None:
            self._video.add(canvas, picture.position_s)

    def _end_video(self) -> None:
        if self._video is not None:
            self._video.close()
        self._video = None

    def _output_path(self, name: str) -> Path:
        wanted, count = Path(name), 1
        while name in self._taken:
            count += 1
            name = f"{wanted.stem}-{count}{wanted.suffix}"
        self._taken.add(name)
        return self._folder / name


def _write_picture(path: Path, picture: Picture) -> None:
    try:
        path.write_bytes(cv2.imencode(path.suffix, picture)[1].tobytes())
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None


class VideoProgress:
    """The progress of a video: one line on a terminal that is overwritten, and one at its end.

    Args:
        stream: nothing is written if it is not a terminal.
        owns_terminal: nothing is written to the terminal at the same time, but after `clear`.
    """

    def __init__(
        self, stream: TextIO, *, owns_terminal: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._clock = stream, clock
        self._is_terminal, self._alone = stream.isatty(), owns_terminal
        self._video: str | None = None
        self._count, self._number, self._began_s, self._printed_s = 0, 0, 0.0, 0.0
        self._expected: int | None = None

    def note(self, source: str, number: int, *, video: bool, expected: int | None = None) -> None:
        """Count a picture; `number` is its number in the video, which has about `expected` pictures."""
        now_s = self._clock()
        if source != self._video:
            self.close()
            self._video = source if video and self._is_terminal else None
            self._count, self._began_s, self._printed_s = 0, now_s, now_s
        self._count, self._number, self._expected = self._count + 1, number, expected
        if self._video is not None and self._alone and now_s - self._printed_s >= _PROGRESS_S:
            self._printed_s = now_s
            self._stream.write(f"\r{self._line(now_s)}\x1b[K")
            self._stream.flush()

    def clear(self) -> None:
        """Make place for a line of text, if there is one terminal for both."""
        if self._video is not None and self._alone:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def close(self) -> None:
        """End the line of the present video."""
        if self._video is not None:
            self._stream.write("\r" if self._alone else "")
            self._expected = None
            self._stream.write(f"{self._line(self._clock())}\x1b[K\n")
            self._video = None

    def _line(self, now_s: float) -> str:
        took_s = max(now_s - self._began_s, 1e-3)
        of_all, left = "", ""
        if self._expected is not None and self._expected >= self._number:
            of_all = f" of {self._expected}"
            left = f", {(self._expected - self._number) * took_s / self._number:.0f} s left"
        # With a stride, the count is not the position in the video.
        if self._number > self._count:
            count = f"{self._count} frames (up to number {self._number}{of_all})"
        else:
            count = f"{self._count}{of_all} frames"
        video = printable(self._video or "", self._stream)
        return f"{video}: {count}, {self._count / took_s:.1f} frames/s{left}"
