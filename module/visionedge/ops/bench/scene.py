"""`visionedge bench scene`: the processor time of tracker and rules for a frame, on recorded boxes.

`bench_scene` returns the report as a JSON document; `format_report` makes text of it. Each round replays the
boxes through the parts (tracker, rules), the scene of a camera, and the scenes of the module as its loop
calls them. The time is that of the calling thread: other processes and the thread that writes do not count.
"""

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydantic import ValidationError

from visionedge.camera.sources.open import DEMO_CLIP
from visionedge.config.documents import read_configuration
from visionedge.config.load import parse_config
from visionedge.config.schema import CameraConfig, InferenceConfig
from visionedge.errors import ConfigError, SourceError
from visionedge.frames.types import Detections, Frame, FrameResult, Picture, Placement, Timing, utc_now
from visionedge.model.postprocess import TRACKED_CONFIDENCE
from visionedge.ops.bench.machine import describe_machine
from visionedge.ops.detect import DetectRequest, run_detect
from visionedge.runtime.installation import find_bundled_file
from visionedge.runtime.measurement import run_in_rounds
from visionedge.scene.camera_scene import CameraScene
from visionedge.scene.events import ScenePicture
from visionedge.web.documents import FrameDocument

CAMERA = "bench"
"""The name of the camera of a load."""

DEFAULT_SCENE = "default"
SYNTHETIC_BOXES = "synthetic"

_DEFAULT_CAMERA = {
    "uri": "demo:",
    "zones": {
        "left": {"polygon": [[0.05, 0.3], [0.05, 0.95], [0.45, 0.95], [0.45, 0.3]]},
        "right": {"polygon": [[0.55, 0.3], [0.55, 0.95], [0.95, 0.95], [0.95, 0.3]]},
    },
    "lines": {"middle": {"start": [0.5, 0.1], "end": [0.5, 1.0]}},
}
_SHARE_CAMERAS, _SHARE_FPS = 16, 10
_SYNTHETIC_FRAMES = 600
_QUANTILES = (50, 95, 99)
_MAX_LABELS = 10_000

OpenHost = Callable[[CameraConfig], AbstractContextManager[Callable[[FrameResult], object]]]
"""Opens the scenes of a module with this camera, named `CAMERA`: the call of its loop for a result."""


@dataclass(frozen=True, slots=True)
class SceneLoad:
    """What to run, each side for `seconds` a round.

    `boxes`: a file of `visionedge detect --json`, `SYNTHETIC_BOXES`, or None: those that `model` finds in the
    bundled clip. Of a recorded frame the `boxes_per_frame` boxes with the highest scores count. `fps` is the
    rate of the recorded frames.
    """

    model: Path
    camera: CameraConfig
    boxes: str | None = None
    boxes_per_frame: int = 10
    fps: float = 10.0
    seconds: float = 1.0
    rounds: int = 5
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class RecordedBoxes:
    """Detections of each frame of a clip, and what its frames have in common."""

    frames: tuple[Detections, ...]
    labels: tuple[str, ...]
    width_px: int
    height_px: int


@dataclass(slots=True)
class SceneTimes:
    """Thread time of each frame in ns, by part. `other_ns`: of the process's other threads, in all."""

    frames_ns: dict[str, list[int]] = field(default_factory=dict)
    other_ns: int = 0
    tracks: int = 0
    events: int = 0


def read_scene(name: str, environ: Mapping[str, str]) -> CameraConfig:
    """`DEFAULT_SCENE` (two zones and a line), or the first camera with tracking of a configuration file.

    Raises:
        ConfigError: the file cannot be read, or has no such camera.
    """
    if name == DEFAULT_SCENE:
        return parse_config({"cameras": {CAMERA: _DEFAULT_CAMERA}}).cameras[CAMERA]
    cameras = parse_config(read_configuration(Path(name), environ)).cameras
    for camera in cameras.values():
        if camera.is_tracked:
            return camera
    raise ConfigError([f"--scene {name}: no camera has zones, lines or tracking"])


def bench_scene(load: SceneLoad, progress: Callable[[str], None], open_host: OpenHost) -> dict[str, Any]:
    """Measure, and return the report as a document. `progress` gets a line for each step.

    Raises:
        ConfigError: the file of boxes cannot be used.
        ModelError, DeviceError: the model cannot be run on the clip.
    """
    boxes = _select_boxes(load, progress)
    sides: dict[str, Callable[[], SceneTimes]] = {
        "parts": partial(_run_parts, load, boxes),
        "camera": partial(_run_camera, load, boxes),
        "loop": partial(_run_host, load, boxes, open_host),
    }

    def after_round(number: int, results: Mapping[str, Sequence[SceneTimes]]) -> None:
        mean_ms = np.mean(results["loop"][-1].frames_ns["loop"]) / 1e6
        progress(f"round {number}/{load.rounds}: {mean_ms:.3f} ms for each frame in the loop")

    return _report(load, boxes, run_in_rounds(sides, load.rounds, after_round))


# --- boxes --------------------------------------------------------------------------------------------------


def _select_boxes(load: SceneLoad, progress: Callable[[str], None]) -> RecordedBoxes:
    if load.boxes == SYNTHETIC_BOXES:
        return make_boxes(load.boxes_per_frame, load.fps)
    if load.boxes is None:
        progress(f"running the model on {DEMO_CLIP}")
        lines, name = _record(load), DEMO_CLIP
    else:
        lines, name = _read_lines(load.boxes), load.boxes
    boxes = parse_boxes(lines, name)
    return replace(boxes, frames=tuple(each.first(load.boxes_per_frame) for each in boxes.frames))


def _record(load: SceneLoad) -> list[str]:
    """The frame objects of the bundled clip, with the weak boxes that a tracker uses."""
    out = io.StringIO()
    wanted = load.inference.model_copy(update={"confidence": TRACKED_CONFIDENCE})
    clip = str(find_bundled_file(DEMO_CLIP))
    if run_detect(DetectRequest((clip,), load.model, wanted, as_json=True, data=load.data), out):
        raise SourceError(f"{clip} cannot be read as a whole, so it has no recorded boxes")
    return out.getvalue().splitlines()


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from None
    except ValueError:
        raise ConfigError([f"{path} is not a text file"]) from None


def parse_boxes(lines: Sequence[str], name: str) -> RecordedBoxes:
    """The boxes of frame objects, one as JSON in each line; `name` is for errors.

    Raises:
        ConfigError: there is no line, or one is no frame object.
    """
    frames, labels, size_px = list[Detections](), dict[int, str](), (1, 1)
    for number, line in enumerate(lines, 1):
        try:
            document = FrameDocument.model_validate_json(line)
        except ValidationError:
            document = None
        if document is None or not _is_usable(document):
            raise ConfigError(
                [
                    f"{name}, line {number}: is no frame object; make the file with"
                    f" visionedge detect CLIP --json --confidence {TRACKED_CONFIDENCE}"
                ]
            )
        size_px = document.width, document.height
        rows = sorted(document.detections, key=lambda row: -row.confidence)
        labels |= {row.class_id: row.label for row in rows}
        corners = [
            (row.box.left, row.box.top, row.box.left + row.box.width, row.box.top + row.box.height)
            for row in rows
        ]
        frames.append(_detections(corners, [row.confidence for row in rows], [row.class_id for row in rows]))
    if not frames:
        raise ConfigError([f"{name} has no frame objects"])
    names = tuple(labels.get(index, f"class-{index}") for index in range(max(labels, default=0) + 1))
    return RecordedBoxes(tuple(frames), names, *size_px)


def _is_usable(document: FrameDocument) -> bool:
    return (
        document.width > 0
        and document.height > 0
        and all(row.class_id < _MAX_LABELS for row in document.detections)
    )


def _detections(
    corners: Sequence[tuple[float, ...]], scores: Sequence[float], class_ids: Sequence[int]
) -> Detections:
    boxes = np.array(corners, np.float32).reshape(-1, 4)
    return Detections(boxes, np.array(scores, np.float32), np.array(class_ids, np.int32))


def make_boxes(boxes_per_frame: int, fps: float) -> RecordedBoxes:
    """Persons who walk to and fro over the whole picture; equal arguments give equal boxes."""
    random = np.random.default_rng(1)
    number = np.arange(boxes_per_frame)
    period_s, start = 8 + random.random(boxes_per_frame) * 8, random.random(boxes_per_frame)
    frames = []
    for frame in range(_SYNTHETIC_FRAMES):
        left = np.abs((frame / fps / period_s + start) % 1 * 2 - 1) * 0.95
        top = 0.1 + 0.7 * number / max(1, boxes_per_frame)
        corners = np.stack([left, top, left + 0.05, top + 0.15], axis=1)
        corners += random.normal(0, 0.002, corners.shape)
        scores = np.sort(random.uniform(0.7, 0.95, boxes_per_frame))[::-1]
        ids = np.zeros(boxes_per_frame, np.int32)
        boxes = np.clip(corners, 0, 1).astype(np.float32)
        frames.append(Detections(boxes, scores.astype(np.float32), ids))
    return RecordedBoxes(tuple(frames), ("person",), 1280, 720)


# --- runs ---------------------------------------------------------------------------------------------------


def make_results(boxes: RecordedBoxes, fps: float, confidence: float) -> Iterator[FrameResult]:
    """Results of a camera that plays the boxes again and again, as the engine's lanes give them."""
    began_ns, began_utc, empty = time.monotonic_ns(), utc_now(), np.zeros((1, 1, 3), np.uint8)

    def full_picture() -> Picture:
        return empty

    for sequence in count(1):
        candidates = boxes.frames[(sequence - 1) % len(boxes.frames)]
        frame = Frame(
            camera=CAMERA,
            sequence=sequence,
            epoch=1,
            captured_ns=began_ns + round(sequence * 1e9 / fps),
            captured_utc=began_utc + timedelta(seconds=sequence / fps),
            width_px=boxes.width_px,
            height_px=boxes.height_px,
            image=empty,
            placement=Placement(0.0, 0.0, 1.0, 1.0),
            full_picture=full_picture,
        )
        reported = candidates.first(int((candidates.scores >= confidence).sum()))
        yield FrameResult(frame, reported, Timing(0, 0, 0, 1), "cpu", "bench", boxes.labels, candidates)


def _confidence(load: SceneLoad) -> float:
    own = load.camera.confidence
    return load.inference.confidence if own is None else own


def _open_scene(load: SceneLoad) -> CameraScene:
    scene = CameraScene(CAMERA, 1, {})
    scene.configure(load.camera, utc_now())
    scene.use_confidence(load.inference.confidence)
    return scene


def _replay(
    load: SceneLoad,
    boxes: RecordedBoxes,
    step: Callable[[FrameResult], None],
    after_warm_up: Callable[[], None],
) -> None:
    """Call `step` with all frames once, so that there are tracks, and then for the seconds of the load."""
    results = make_results(boxes, load.fps, _confidence(load))
    for _ in boxes.frames:
        step(next(results))
    after_warm_up()
    until_s = time.monotonic() + load.seconds
    while time.monotonic() < until_s:
        step(next(results))


def _run_parts(load: SceneLoad, boxes: RecordedBoxes) -> SceneTimes:
    """Tracker and rules one after the other, as `CameraScene.update` calls them."""
    scene, clock = _open_scene(load), time.thread_time_ns
    times = SceneTimes({"tracker": [], "rules": []})

    def step(result: FrameResult) -> None:
        candidates = result.detections if result.candidates is None else result.candidates
        picture = ScenePicture.of(result)
        began_ns = clock()
        update = scene.tracker.update(candidates, picture.at_s, result.labels)
        between_ns = clock()
        changes = scene.scene.update(picture, update.tracks, update.ended)
        times.frames_ns["rules"].append(clock() - between_ns)
        times.frames_ns["tracker"].append(between_ns - began_ns)
        times.tracks += len(update.tracks)
        times.events += len(changes.events)

    def forget() -> None:
        nonlocal times
        times = SceneTimes({"tracker": [], "rules": []})

    _replay(load, boxes, step, forget)
    return times


def _run_camera(load: SceneLoad, boxes: RecordedBoxes) -> SceneTimes:
    """`CameraScene.update`: masks, tracker, rules, and the result with its tracks."""
    return _run_whole("camera", load, boxes, _open_scene(load).update)


def _run_host(load: SceneLoad, boxes: RecordedBoxes, open_host: OpenHost) -> SceneTimes:
    """What the loop of the module calls: the same, and the changes for the thread that writes."""
    with open_host(load.camera) as update:
        return _run_whole("loop", load, boxes, update)


def _run_whole(
    name: str, load: SceneLoad, boxes: RecordedBoxes, update: Callable[[FrameResult], object]
) -> SceneTimes:
    taken_ns: list[int] = []
    clock = time.thread_time_ns

    def step(result: FrameResult) -> None:
        began_ns = clock()
        update(result)
        taken_ns.append(clock() - began_ns)

    other_ns = 0

    def forget() -> None:
        nonlocal other_ns
        taken_ns.clear()
        other_ns = time.process_time_ns() - clock()

    _replay(load, boxes, step, forget)
    return SceneTimes({name: taken_ns}, time.process_time_ns() - clock() - other_ns)


# --- figures ------------------------------------------------------------------------------------------------


def _report(
    load: SceneLoad, boxes: RecordedBoxes, results: Mapping[str, Sequence[SceneTimes]]
) -> dict[str, Any]:
    parts, loop = results["parts"], results["loop"]
    frames = sum(len(times.frames_ns["rules"]) for times in parts)
    in_loop = _summarize(loop, "loop")
    other_ms = [times.other_ns / 1e6 / len(times.frames_ns["loop"]) for times in loop]
    return {
        "schema": "visionedge/bench-scene/1",
        "machine": describe_machine(),
        "load": {
            "boxes": load.boxes or DEMO_CLIP,
            "boxesPerFrame": round(float(np.mean([len(each) for each in boxes.frames])), 2),
            "zones": len(load.camera.zones),
            "lines": len(load.camera.lines),
            "fps": load.fps,
            "seconds": load.seconds,
            "rounds": load.rounds,
        },
        "model": None if load.boxes else load.model.stem,
        "frames": frames,
        "tracksPerFrame": round(sum(times.tracks for times in parts) / frames, 2),
        "eventsPerFrame": round(sum(times.events for times in parts) / frames, 4),
        "tracker": _summarize(parts, "tracker"),
        "rules": _summarize(parts, "rules"),
        "camera": _summarize(results["camera"], "camera"),
        "loop": in_loop,
        "otherThreadsMs": round(median(other_ms), 4),
        "coreShare": {
            "cameras": _SHARE_CAMERAS,
            "fps": _SHARE_FPS,
            "loop": round(_SHARE_CAMERAS * _SHARE_FPS * in_loop["meanMs"] / 1000, 4),
            "allThreads": round(
                _SHARE_CAMERAS * _SHARE_FPS * (in_loop["meanMs"] + median(other_ms)) / 1000, 4
            ),
        },
    }


def _summarize(rounds: Sequence[SceneTimes], name: str) -> dict[str, Any]:
    """The medians over the rounds of the mean and the percentiles, in ms of a frame."""
    times_ms = [np.array(each.frames_ns[name]) / 1e6 for each in rounds]
    means = [float(each.mean()) for each in times_ms]
    quantiles = {f"p{q}": median(float(np.percentile(each, q)) for each in times_ms) for q in _QUANTILES}
    return {
        "meanMs": round(median(means), 4),
        **{f"{key}Ms": round(value, 4) for key, value in quantiles.items()},
        "framesPerSecond": round(1000 / median(means), 1),
        "framesPerSecondAll": [round(1000 / mean, 1) for mean in means],
    }


_TITLES = {
    "tracker": "tracker",
    "rules": "zones and lines",
    "camera": "a camera's scene",
    "loop": "in the loop",
}


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    load, share = report["load"], report["coreShare"]
    lines = [
        f"{load['boxesPerFrame']:g} boxes and {report['tracksPerFrame']:g} tracks in a frame of"
        f" {load['boxes']}, zones: {load['zones']}, lines: {load['lines']}; ms of thread time for each frame"
    ]
    for key, title in _TITLES.items():
        figures = report[key]
        quantiles = "  ".join(f"p{q} {figures[f'p{q}Ms']:.3f}" for q in _QUANTILES)
        lines.append(
            f"  {title:<18} mean {figures['meanMs']:.3f}  {quantiles}"
            f"  {figures['framesPerSecond']:.0f} frames/s"
        )
    lines.append(
        f"{share['cameras']} cameras with {share['fps']} frames/s need {share['loop']:.1%} of a core in the"
        f" loop, {share['allThreads']:.1%} with the thread that writes"
    )
    return "\n".join(lines) + "\n"
