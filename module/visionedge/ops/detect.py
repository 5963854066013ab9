"""`visionedge detect`: runs pictures, folders and videos through the engine, and writes the results in order.

`run_detect` writes a line of text or a JSON frame object per picture, and annotated pictures into a folder.
"""

import json
import logging
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import cv2

from visionedge.camera.sources.images import PICTURE_SUFFIXES, natural_sort_key, read_picture
from visionedge.camera.sources.open import open_source
from visionedge.camera.timing import plausible_fps
from visionedge.config.addresses import CameraUri
from visionedge.config.schema import InferenceConfig
from visionedge.engine.lanes import infer_frames, make_frame
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.errors import DamagedPictureError, SourceError
from visionedge.frames.drawing import draw_detections
from visionedge.frames.types import FrameResult, Picture, build_frame_document
from visionedge.model.model import find_bundled_model, load_model
from visionedge.model.postprocess import Selection
from visionedge.runtime.redaction import redact

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".ts", ".mpg", ".mpeg", ".mjpg"}
)
"""Suffixes of videos in a folder; a video that is given by its path may have any."""

_PROGRESS_S = 0.5


@dataclass(frozen=True, slots=True)
class DetectRequest:
    """The arguments of `visionedge detect`. `model` None is the bundled one.

    Of a video, the first of every `video_stride` pictures is used. `data` is the folder of compiled models;
    None stores nothing.
    """

    paths: tuple[str, ...]
    model: Path | None
    inference: InferenceConfig
    as_json: bool = False
    annotate: Path | None = None
    video_stride: int = 1
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class _Item:
    """A picture: its path as given by the user, and its number in that file."""

    source: str
    number: int
    picture: Picture
    position_s: float | None = None
    """Time in its video; None for a still picture."""


def run_detect(request: DetectRequest, out: TextIO | None = None) -> int:
    """Write a frame object (or text) per picture to `out`; returns 1 if a picture could not be read, else 0.

    Raises:
        ModelError, DeviceError: the model cannot run.
        SourceError: the folder for annotated pictures cannot be written.
    """
    reader = _Reader(request.paths, request.video_stride)
    if not reader.inputs:  # there is nothing to do, and opening a model takes seconds
        return 1
    model = load_model(request.model or find_bundled_model())
    wanted = request.inference
    selection = Selection.of(model, wanted.confidence, wanted.iou, wanted.classes)
    out = out or sys.stdout
    with ExitStack() as stack:
        progress = stack.enter_context(closing(VideoProgress(sys.stderr, owns_terminal=not out.isatty())))
        annotated_output = (
            stack.enter_context(closing(AnnotatedOutput(request.annotate))) if request.annotate else None
        )
        # Measuring the best plan takes longer than a few pictures.
        opened = open_engine(
            model, request.inference, data=request.data, measuring=False, level=logging.DEBUG
        )
        engine = stack.enter_context(closing(opened))
        for item, result in _results(reader, engine, selection):
            progress.note(item.source, item.number, video=item.position_s is not None)
            _write(item, result, request.as_json, out)
            if annotated_output is not None:
                annotated_output.add(Path(item.source), item.position_s, result)
    return 1 if reader.failed else 0


def _results(
    reader: "_Reader", engine: LocalEngine, selection: Selection
) -> Iterator[tuple[_Item, FrameResult]]:
    """Results in the order of the pictures."""

    def infer(items: list[_Item]) -> list[FrameResult]:
        frames = [make_frame(item.picture, engine, item.number) for item in items]
        return infer_frames(frames, engine, selection)

    plan, pictures = engine.info().plan, reader.read()
    batches = iter(lambda: list(islice(pictures, plan.buckets[-1])), [])
    for items, results in map_ahead(infer, batches, plan.lanes):
        yield from zip(items, results, strict=True)


def map_ahead(
    work: Callable[[ItemT], ResultT], items: Iterable[ItemT], threads: int
) -> Iterator[tuple[ItemT, ResultT]]:
    """Each item with its result, in order, while `threads` threads work on the next items."""
    waiting: deque[tuple[ItemT, Future[ResultT]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="lane") as pool:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            # One more item than threads keeps all of them busy; more items would only take memory.
            if len(waiting) > threads:
                first, result = waiting.popleft()
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()


# --- reading pictures ---------------------------------------------------------------------------------------


class _Reader:
    """The pictures of all paths, in order; unreadable ones are reported on stderr and counted in `failed`.

    Missing paths are reported at once; `inputs` are the files that remain.
    """

    def __init__(self, paths: tuple[str, ...], video_stride: int) -> None:
        self.failed = 0
        self._stride = video_stride
        self.inputs: list[str] = []
        for path in paths:
            try:
                self.inputs += _list_inputs(path)
            except SourceError as error:
                self._report_error(error)

    def read(self) -> Iterator[_Item]:
        """The pictures."""
        for source in self.inputs:
            try:
                if Path(source).suffix.lower() in PICTURE_SUFFIXES:
                    yield _Item(source, 1, read_picture(Path(source)))
                else:
                    yield from _video(source, self._stride)
            except SourceError as error:
                self._report_error(error)

    def _report_error(self, error: SourceError) -> None:
        self.failed += 1
        sys.stderr.write(f"visionedge: {_printable(redact(str(error)), sys.stderr)}\n")


def _list_inputs(source: str) -> list[str]:
    """The pictures and videos of a folder in natural order, without hidden ones; else the path itself.

    Raises:
        SourceError: the folder cannot be listed or has no pictures or videos, or the path is a URI.
    """
    if "://" in source:
        raise SourceError(
            f"{source} is a URI, but detect reads files; for a camera use run --camera NAME=URI"
        )
    folder = Path(source)
    if not _is_folder(source):
        return [source]
    try:
        entries = [entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    except OSError as error:
        raise SourceError(f"{source} cannot be listed: {error.strerror}") from None
    names = [entry.name for entry in entries if entry.suffix.lower() in PICTURE_SUFFIXES | _VIDEO_SUFFIXES]
    if not names:
        raise SourceError(f"{source} has no pictures and no videos")
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


def _video(path: str, stride: int) -> Iterator[_Item]:
    source = open_source(CameraUri("file", path))
    number, looked_at, damaged = 0, 0, 0
    reason = ""
    try:
        while (decoded := source.read()) is not None:
            number += 1
            if (number - 1) % stride:
                continue
            looked_at += 1
            try:
                picture = decoded.picture()
            except DamagedPictureError as error:
                damaged, reason = damaged + 1, reason or str(error)
                continue
            yield _Item(path, number, picture, decoded.position_s)
    finally:
        source.close()
    if damaged:
        raise SourceError(f"{path}: {damaged} of {looked_at} pictures cannot be decoded: {reason}")


# --- the output ---------------------------------------------------------------------------------------------


def _printable(text: str, out: TextIO) -> str:
    """A text without control characters and without characters that the stream cannot encode."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    encoding = out.encoding or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def _json_line(document: dict[str, Any], out: TextIO) -> str:
    line = json.dumps(document, ensure_ascii=False)
    try:
        line.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:  # JSON escapes every character in ASCII
        line = json.dumps(document)
    return line


def _format_box_px(box: dict[str, float], width_px: int, height_px: int) -> str:
    """A box of a frame object (relative to the picture) in pixels."""
    left, width = round(box["left"] * width_px), round(box["width"] * width_px)
    top, height = round(box["top"] * height_px), round(box["height"] * height_px)
    return f"left {left}, top {top}, {width}x{height} px"


def _write(item: _Item, result: FrameResult, as_json: bool, out: TextIO) -> None:
    document = build_frame_document(result, source=item.source)
    if as_json:
        out.write(_json_line(document, out) + "\n")
        return
    where = item.source
    if item.position_s is not None:
        where += f"#{item.number} at {item.position_s:.2f} s"
    took = f"{document['timing']['inferMs']:.1f} ms on {result.device}"
    out.write(f"{_printable(where, out)}: {result.frame.width_px}x{result.frame.height_px}, {took}\n")
    for row in document["detections"]:
        place = _format_box_px(row["box"], result.frame.width_px, result.frame.height_px)
        out.write(f"  {_printable(row['label'], out):<16} {row['confidence']:.2f}  {place}\n")
    if not document["detections"]:
        out.write("  no detections\n")


class AnnotatedOutput:
    """A folder of annotated pictures (same name) and videos (NAME.mp4, MPEG-4); a used name gets a number.

    Every method raises SourceError if the folder or a file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{folder} cannot be created: {error.strerror}") from None
        self._folder = folder
        self._taken: set[str] = set()
        self._video: _Video | None = None

    def add(self, source: Path, position_s: float | None, result: FrameResult) -> None:
        """Draw a result on its picture and write it; `position_s` is None for a still picture."""
        picture = draw_detections(result.frame.full_picture(), result)
        if position_s is None:
            self.close()
            path = self._output_path(source.name)
            try:
                path.write_bytes(cv2.imencode(path.suffix, picture)[1].tobytes())
            except OSError as error:
                raise SourceError(f"{path} cannot be written: {error.strerror}") from None
            return
        if self._video is None or self._video.source != source:
            self.close()
            self._video = _Video(source, self._output_path(f"{source.stem}.mp4"))
        self._video.add(picture, position_s)

    def close(self) -> None:
        """End the present video."""
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


class _Video:
    """A video that is written. Its first picture waits for the second, because their distance is the rate."""

    def __init__(self, source: Path, path: Path) -> None:
        self.source = source
        self._path = path
        self._first: tuple[Picture, float] | None = None
        self._writer: cv2.VideoWriter | None = None

    def add(self, picture: Picture, position_s: float) -> None:
        """Write the next picture."""
        if self._first is None:
            self._first = picture, position_s
            return
        if self._writer is None:
            self._writer = self._open(self._first[0], position_s - self._first[1])
        self._writer.write(picture)

    def close(self) -> None:
        """Complete the file."""
        if self._writer is None and self._first is not None:  # a video of one picture
            self._writer = self._open(self._first[0], 0.0)
        if self._writer is not None:
            self._writer.release()

    def _open(self, first: Picture, step_s: float) -> cv2.VideoWriter:
        height_px, width_px = first.shape[:2]
        rate = plausible_fps(1 / step_s if step_s > 0 else 0.0)
        code = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(self._path), code, rate, (width_px, height_px))
        if not writer.isOpened():
            raise SourceError(f"{self._path} cannot be written")
        writer.write(first)
        return writer


class VideoProgress:
    """The progress of a video: one line on a terminal that is overwritten, and one at its end.

    Args:
        stream: nothing is written if it is not a terminal.
        owns_terminal: no results are written to the terminal at the same time.
    """

    def __init__(
        self, stream: TextIO, *, owns_terminal: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._clock = stream, clock
        self._is_terminal, self._alone = stream.isatty(), owns_terminal
        self._video: str | None = None
        self._count, self._number, self._began_s, self._printed_s = 0, 0, 0.0, 0.0

    def note(self, source: str, number: int, *, video: bool) -> None:
        """Count a picture; `number` is its number in the video."""
        now_s = self._clock()
        if source != self._video:
            self.close()
            self._video = source if video and self._is_terminal else None
            self._count, self._began_s, self._printed_s = 0, now_s, now_s
        self._count, self._number = self._count + 1, number
        if self._video is not None and self._alone and now_s - self._printed_s >= _PROGRESS_S:
            self._printed_s = now_s
            self._stream.write(f"\r{self._line(now_s)}\x1b[K")
            self._stream.flush()

    def close(self) -> None:
        """End the line of the present video."""
        if self._video is not None:
            self._stream.write("\r" if self._alone else "")
            self._stream.write(f"{self._line(self._clock())}\x1b[K\n")
            self._video = None

    def _line(self, now_s: float) -> str:
        rate = self._count / max(now_s - self._began_s, 1e-3)
        # With a stride, the count is not the position in the video.
        reached = f" (up to number {self._number})" if self._number > self._count else ""
        video = _printable(self._video or "", self._stream)
        return f"{video}: {self._count} frames{reached}, {rate:.1f} frames/s"
