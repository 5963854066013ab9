"""`visionedge scene`: runs videos through the model, the tracker and the rules of a camera.

`run_scene` writes the events, the tracks, and an annotated video. All videos follow each other on one clock.
"""

import json
import logging
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from visionedge.config.schema import CameraConfig, InferenceConfig, list_class_keys
from visionedge.engine.crops import answer_crops, cut_crop
from visionedge.engine.lanes import EngineWithSelection
from visionedge.engine.local_engine import open_engine
from visionedge.errors import ConfigError, SourceError, VisionedgeError
from visionedge.frames.drawing import DrawnRule, DrawnTrack, draw_scene
from visionedge.frames.geometry import Point
from visionedge.frames.types import Frame, FrameResult, Picture
from visionedge.model.model import find_bundled_model, load_model
from visionedge.model.postprocess import Selection, find_unknown_classes
from visionedge.ops.clips import (
    AnnotatedOutput,
    ClipPicture,
    ClipReader,
    VideoProgress,
    analyse,
    json_line,
    printable,
)
from visionedge.scene.camera_scene import AnswerQuestions, CameraScene
from visionedge.scene.events import TOTALS_OF_LINES, TOTALS_OF_ZONES, SceneEvent
from visionedge.scene.scene import SceneChanges
from visionedge.scene.second_stage import CropAnswer, CropQuestion
from visionedge.scene.tracker import Track

_TAIL_S = 2.0
_ACTIVE_S = 0.5
"""A zone or line is drawn thick for so long after its event."""


@dataclass(frozen=True, slots=True)
class SecondModelRequest:
    """The model of the camera's second stage; `path` None is the bundled one.

    `inference` has its confidence and classes, `label_keys` the labels that it must have, by their keys.
    """

    path: Path | None
    inference: InferenceConfig
    label_keys: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class SceneRequest:
    """The arguments of `visionedge scene`. `model` None is the bundled one; `second`: for `then`.

    `name` and `camera`: whose rules; its source, rate and gate do not matter. `start` is the UTC time of the
    first picture. `annotate` and `tracks` are files to be written. `data` is the folder of compiled models.
    """

    paths: tuple[str, ...]
    model: Path | None
    inference: InferenceConfig
    name: str
    camera: CameraConfig
    start: datetime
    as_json: bool = False
    summary: bool = False
    annotate: Path | None = None
    tracks: Path | None = None
    data: Path | None = None
    second: SecondModelRequest | None = None


def run_scene(request: SceneRequest, out: TextIO | None = None) -> int:
    """Write the events of the videos to `out`; returns 1 if a video could not be read completely, else 0.

    Raises:
        ConfigError: a model does not have a class of the camera, or an output is one of the videos.
        ModelError, DeviceError: a model cannot run.
        VisionedgeError: an output cannot be written.
    """
    reader = ClipReader(request.paths, videos_only=True, camera=request.name, start=request.start)
    _check_outputs(request, reader.inputs)
    if not reader.inputs:
        return 1
    model = load_model(request.model or find_bundled_model())
    camera = request.camera.model_copy(update={"tracking": "on"})
    if problems := find_unknown_classes(model, list_class_keys(request.name, camera)):
        raise ConfigError(problems)
    wanted, out = request.inference, out or sys.stdout
    selection = Selection.of(model, wanted.confidence, wanted.iou, wanted.classes)
    selection = selection.for_cameras(model, {request.name: camera})
    scene = CameraScene(request.name, 1, {})
    scene.configure(camera, request.start)
    scene.use_confidence(wanted.confidence)
    with ExitStack() as stack:
        output = _Output(scene, out, stack, request, reader.inputs)
        opened = open_engine(model, wanted, data=request.data, measuring=False, level=logging.DEBUG)
        engine = stack.enter_context(closing(opened))
        answer = None if request.second is None else _open_second_model(request.second, request.data, stack)
        for picture, result in stack.enter_context(closing(analyse(reader.read(engine), engine, selection))):
            if isinstance(result, SourceError):
                output.clear()
                reader.report(result)
            else:
                output.add(picture, result, answer)
        output.end_clip()
        if request.summary:
            output.write_summary()
    return 1 if reader.failed else 0


def _open_second_model(second: SecondModelRequest, data: Path | None, stack: ExitStack) -> AnswerQuestions:
    """What computes the crops of a picture; `stack` closes its engine."""
    model, inference = load_model(second.path or find_bundled_model()), second.inference
    if problems := find_unknown_classes(model, second.label_keys):
        raise ConfigError(problems)
    selection = Selection.of(model, inference.confidence, inference.iou, inference.classes)
    opened = open_engine(model, inference, data=data, measuring=False, level=logging.DEBUG)
    engine = stack.enter_context(closing(opened))
    return partial(_answer_questions, EngineWithSelection.of(engine, selection))


def _answer_questions(
    running: EngineWithSelection, frame: Frame, questions: Sequence[CropQuestion]
) -> Iterator[CropAnswer]:
    picture, largest = frame.full_picture(), running.engine.info().plan.max_batch
    for first in range(0, len(questions), largest):
        batch = questions[first : first + largest]
        labels = answer_crops(running, [cut_crop(picture, question.corners) for question in batch])
        yield from map(CropAnswer, batch, labels)


def _check_outputs(request: SceneRequest, inputs: Iterable[str]) -> None:
    """Refuse outputs that cannot be files, or would overwrite a video.

    Raises:
        ConfigError: one is a video that is read, or both are the same file.
        VisionedgeError: one is a folder, or in a folder that cannot be written.
    """
    given = {"--annotate": request.annotate, "--tracks": request.tracks}
    outputs = {option: path for option, path in given.items() if path is not None}
    for option, path in outputs.items():
        try:
            if any(path.exists() and path.samefile(source) for source in inputs):
                raise ConfigError(
                    [f"{option} {path}: is one of the videos that are read; choose another name"]
                )
            if path.is_dir():
                raise VisionedgeError(f"{path}: cannot be written: it is a folder")
            if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
                raise VisionedgeError(f"{path}: cannot be written: no permission in its folder")
        except OSError as error:  # such as a folder whose files this user may not see
            raise VisionedgeError(f"{path}: cannot be written: {error.strerror}") from None
    if len({path.absolute() for path in outputs.values()}) < len(outputs):
        raise ConfigError([f"--tracks {request.tracks}: is the file of --annotate; choose another name"])


class _TracksFile:
    """A text file; every method raises VisionedgeError if it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._reporting():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def write(self, text: str) -> None:
        with self._reporting():
            self._file.write(text)

    def close(self) -> None:
        with self._reporting():
            self._file.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise VisionedgeError(f"{self._path}: cannot be written: {error.strerror}") from None


class _Output:
    """What is written of the pictures of all videos."""

    def __init__(
        self, scene: CameraScene, out: TextIO, stack: ExitStack, request: SceneRequest, inputs: Iterable[str]
    ) -> None:
        """`stack` closes the outputs."""
        self._scene, self._out, self._as_json = scene, out, request.as_json
        self._progress = stack.enter_context(closing(VideoProgress(sys.stderr, owns_terminal=True)))
        self._tracks = stack.enter_context(closing(_TracksFile(request.tracks))) if request.tracks else None
        self._drawing: _Drawing | None = None
        if (path := request.annotate) is not None:
            annotated = stack.enter_context(AnnotatedOutput(path.parent, inputs))
            self._drawing = _Drawing(annotated, path.name, request.camera)
        self._last: ClipPicture | None = None
        self._pictures, self._events = 0, 0
        self._track_ids: set[int] = set()

    def add(self, picture: ClipPicture, result: FrameResult, answer: AnswerQuestions | None) -> None:
        """Follow the objects into the next picture; `answer` computes its crops before the rules decide."""
        if self._last is not None and self._last.input_number != picture.input_number:
            self.end_clip()
        self._progress.note(picture.source, picture.number, video=True, expected=picture.expected)
        self._last, self._pictures = picture, self._pictures + 1
        result, changes = self._scene.update(result, answer)
        seen = [track for track in self._scene.tracks if track.detection is not None]
        self._track_ids.update(track.track_id for track in seen)
        self._write_events(changes, picture)
        if self._tracks is not None:
            self._tracks.write("".join(_format_track(track, result.frame) for track in seen))
        if self._drawing is not None:
            self._drawing.add(picture, result.frame, seen, changes, self._scene)

    def clear(self) -> None:
        """Make place for a line on the terminal that also shows the progress."""
        if self._out.isatty():
            self._progress.clear()

    def end_clip(self) -> None:
        """End the tracks of the present video: who is inside is lost."""
        if self._last is None:
            return
        self._write_events(self._scene.end_all(), self._last)
        self._progress.close()
        if not self._as_json:
            counts = f"{self._pictures} pictures, {len(self._track_ids)} tracks, {self._events} events"
            self._out.write(f"{printable(self._last.source, self._out)}: {counts}\n")
        self._last, self._pictures, self._events = None, 0, 0
        self._track_ids.clear()

    def write_summary(self) -> None:
        """Write the totals of all videos, as `GET /api/v1/cameras/{name}/scene` answers."""
        document = self._scene.scene.document()
        self._out.write(json_line(document, self._out) if self._as_json else json.dumps(document, indent=1))
        self._out.write("\n")

    def _write_events(self, changes: SceneChanges, picture: ClipPicture) -> None:
        self._events += len(changes.events)
        if changes.events:
            self.clear()
        for event in changes.events:
            line = json_line(event.document(), self._out) if self._as_json else _format_event(event, picture)
            self._out.write(f"{line}\n")


def _format_event(event: SceneEvent, picture: ClipPicture) -> str:
    """``  12.300 s  line-crossed   door  person 7  left-to-right``"""
    who = f"{event.label} {event.track_id}" if event.track_id is not None else f"{event.count} inside"
    more = event.direction or ("" if event.dwell_s is None else f"{event.dwell_s:.1f} s")
    line = f"{picture.position_s or 0.0:9.3f} s  {event.type:<13}  {event.rule:<12}  {who:<14}  {more}"
    return line.rstrip()


def _format_track(track: Track, frame: Frame) -> str:
    """A line of MOTChallenge's text, in pixels."""
    width_px, height_px = frame.width_px, frame.height_px
    left, top, width, height = track.box
    sides = (left * width_px, top * height_px, width * width_px, height * height_px)
    box = ",".join(f"{side:.2f}" for side in sides)
    return f"{frame.sequence},{track.track_id},{box},{track.confidence:.5f},-1,-1,-1\n"


class _Drawing:
    """An annotated video: zones and lines with their counts, tracks with their tails.

    Each further video that is read makes a file of its own: NAME-2.mp4 and so on.
    """

    def __init__(self, output: AnnotatedOutput, name: str, camera: CameraConfig) -> None:
        self._output, self._name, self._camera = output, name, camera
        self._tails: dict[int, deque[tuple[float, Point]]] = {}
        self._active_until_s: dict[str, float] = {}

    def add(
        self,
        picture: ClipPicture,
        frame: Frame,
        seen: Sequence[Track],
        changes: SceneChanges,
        scene: CameraScene,
    ) -> None:
        """Draw the next picture; `scene` has the counts, and what second models say of the tracks."""
        at_s = frame.captured_ns / 1e9
        self._active_until_s |= {event.rule: at_s + _ACTIVE_S for event in changes.events}
        rules = self._rules(scene.scene.document(), at_s)
        attributes = scene.second_stage.attributes
        tracks = [self._track(track, attributes.get(track.track_id, {}), at_s) for track in seen]
        self._tails = {
            track_id: tail for track_id, tail in self._tails.items() if tail[-1][0] > at_s - _TAIL_S
        }
        self._output.add(picture, self._name, partial(_draw, frame, rules, tracks))

    def _track(self, track: Track, attributes: Mapping[str, str], at_s: float) -> DrawnTrack:
        left, top, width, height = track.box
        tail = self._tails.setdefault(track.track_id, deque())
        tail.append((at_s, (left + width / 2, top + height)))
        while tail[0][0] < at_s - _TAIL_S:
            tail.popleft()
        points = tuple(point for _, point in tail)
        return DrawnTrack(track.track_id, track.label, track.box, points, attributes)

    def _rules(self, document: Mapping[str, Any], at_s: float) -> list[DrawnRule]:
        def count(zone: str, total: str) -> int:
            return sum(document["zones"][zone][total].values())

        shapes: list[tuple[str, tuple[Point, ...], tuple[str, ...]]] = []
        for name, zone in self._camera.zones.items():
            inside, entered, left, lost = (count(name, total) for total in ("inside", *TOTALS_OF_ZONES))
            texts = (f"{name}: {inside} inside", f"{entered} in, {left} out, {lost} lost")
            shapes.append((name, zone.polygon, texts))
        for name, line in self._camera.lines.items():
            there, back = (document["lines"][name][total] for total in TOTALS_OF_LINES)
            texts = (f"{name}: L>R {_count_labels(there)}", f"R>L {_count_labels(back)}")
            shapes.append((name, (line.start, line.end), texts))
        return [
            DrawnRule(points, texts, at_s < self._active_until_s.get(name, 0.0))
            for name, points, texts in shapes
        ]


def _draw(frame: Frame, rules: Sequence[DrawnRule], tracks: Sequence[DrawnTrack]) -> Picture:
    return draw_scene(frame.full_picture(), rules, tracks)


def _count_labels(counts: Mapping[str, int]) -> str:
    """``4 ok, 2 ng``, or ``0``."""
    return ", ".join(f"{count} {label}" for label, count in counts.items()) or "0"
