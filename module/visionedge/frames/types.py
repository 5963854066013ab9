"""The data that flows from a camera to the cloud, with shapes and units, and its JSON documents. No I/O."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""A picture: uint8 (height, width, 3), colour order BGR, as in OpenCV."""

DEFAULT_MODEL = ""
"""Stands for the section `model` of the configuration, where others have their name in `models`."""

FitMode = Literal["letterbox", "stretch"]
Anchor = Literal["center", "top-left"]
Resample = Literal["bilinear", "antialias"]
Rounding = Literal["nearest", "down"]


@dataclass(frozen=True, slots=True)
class Placement:
    """The rectangle of the source picture inside the model's input, in input pixels."""

    left_px: float
    top_px: float
    width_px: float
    height_px: float


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The input picture of a model: its size, and how a source of another size is resized to it.

    `fit`: `letterbox` keeps the aspect ratio and fills the rest with `pad` (a grey level 0-255), `stretch`
    does not. `anchor`: position of the picture in the letterbox. `rounding`: of its sides to whole pixels.
    `resample`: interpolation.
    """

    width_px: int
    height_px: int
    fit: FitMode = "letterbox"
    anchor: Anchor = "center"
    pad: int = 114
    resample: Resample = "bilinear"
    rounding: Rounding = "nearest"

    def place(self, width_px: int, height_px: int) -> Placement:
        """Return the placement of a source of this size, in whole pixels."""
        if self.fit == "stretch":
            return Placement(0.0, 0.0, float(self.width_px), float(self.height_px))
        scale = min(self.width_px / width_px, self.height_px / height_px)
        whole = round if self.rounding == "nearest" else int
        width = min(self.width_px, max(1, whole(width_px * scale)))
        height = min(self.height_px, max(1, whole(height_px * scale)))
        if self.anchor == "top-left":
            return Placement(0.0, 0.0, float(width), float(height))
        return Placement(
            float((self.width_px - width) // 2),
            float((self.height_px - height) // 2),
            float(width),
            float(height),
        )


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of one camera on its way to the engine.

    `sequence` never repeats for a camera, not even after a restart; `epoch` grows by one at each reconnect.
    `captured_ns` is monotonic, taken right after decoding; ages are computed from it. `image` is the picture
    at the model's input size, resized as `spec` says, or a function that resizes it: a frame that a newer one
    replaces is never resized. `full_picture()` converts and returns it at the source's size. `model` is the
    name in `models` of the model that is to compute it. `spec` distinguishes its inputs while another file
    replaces it; None fits every one.
    """

    camera: str
    sequence: int
    epoch: int
    captured_ns: int
    captured_utc: datetime
    width_px: int
    height_px: int
    image: Picture | Callable[[], Picture]
    placement: Placement
    full_picture: Callable[[], Picture]
    spec: InputSpec | None = None
    model: str = DEFAULT_MODEL

    def input_picture(self) -> Picture:
        """Return the picture at the model's input size; any thread may call it."""
        return self.image() if callable(self.image) else self.image


@dataclass(frozen=True, slots=True)
class Detections:
    """Detected objects as columns of length n, sorted by descending score.

    `boxes` float32 (n, 4): left, top, right, bottom, relative to the source picture, clipped to 0-1. `scores`
    float32 (n,) in 0-1. `class_ids` int32 (n,), indices into the labels.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int32]

    def __post_init__(self) -> None:
        n = len(self.scores)
        if self.boxes.shape != (n, 4) or self.class_ids.shape != (n,):
            raise ValueError(
                f"columns differ: boxes {self.boxes.shape}, scores {n}, ids {self.class_ids.shape}"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def first(self, count: int) -> "Detections":
        """The `count` detections with the highest scores."""
        return Detections(self.boxes[:count], self.scores[:count], self.class_ids[:count])


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of a frame in ns: waiting in its slot, in the engine, and from capture to result."""

    wait_ns: int
    infer_ns: int
    total_ns: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class FrameResult:
    """A frame and its detections; `device` is the device that computed them.

    `candidates`: for the tracker of the camera, `detections` and weaker ones; None: it has none. `track_ids`
    is parallel to the detections, None for those without a confirmed track; None: the camera has no tracking.
    `track_labels`: the labels of those tracks, parallel too. `attributes`: what second models say of those
    tracks, their answers by the name of the model, parallel too; None: no second model looks at this camera.
    `confirmed_tracks`: the confirmed tracks by id, hidden ones too, each with its smoothed box (left, top,
    right, bottom, 0-1 of the picture) or None while it is hidden. `precision` is that of the engine.
    """

    frame: Frame
    detections: Detections
    timing: Timing
    device: str
    model: str
    labels: tuple[str, ...]
    candidates: Detections | None = None
    track_ids: tuple[int | None, ...] | None = None
    track_labels: tuple[str | None, ...] | None = None
    confirmed_tracks: Mapping[int, tuple[float, float, float, float] | None] | None = None
    precision: str | None = None
    attributes: tuple[Mapping[str, str], ...] | None = None

    def label_detections(self) -> list[str]:
        """The label of each detection: that of its track, else that of its class."""
        found = [label_of(self.labels, class_id) for class_id in self.detections.class_ids.tolist()]
        if self.track_labels is None:
            return found
        return [kept or label for label, kept in zip(found, self.track_labels, strict=True)]


def utc_now() -> datetime:
    """Return the wall-clock time, for display and the cloud; durations use monotonic clocks."""
    return datetime.now(UTC)


def format_utc(moment: datetime) -> str:
    """Return ``2026-11-22T10:00:00.123Z``: UTC with milliseconds, the format of all documents."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def label_of(labels: Sequence[str], class_id: int) -> str:
    """Return the name of a class; ``class-7`` where the model names none."""
    return labels[class_id] if 0 <= class_id < len(labels) else f"class-{class_id}"


def _build_detection_documents(detections: Detections, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the `detections` key of a frame object; `labels` is parallel to the detections."""
    rows = []
    for box, score, class_id, label in zip(
        detections.boxes.tolist(),
        detections.scores.tolist(),
        detections.class_ids.tolist(),
        labels,
        strict=True,
    ):
        left, top, right, bottom = box
        rows.append(
            {
                "label": label,
                "classId": class_id,
                "confidence": round(score, 5),
                "box": {
                    "left": round(left, 6),
                    "top": round(top, 6),
                    "width": round(right - left, 6),
                    "height": round(bottom - top, 6),
                },
            }
        )
    return rows


def build_frame_document(result: FrameResult, *, source: str | None = None) -> dict[str, Any]:
    """Return the frame object, the same in HTTP, telemetry and files.

    Its schema is ``visionedge/frame/1``, for a camera with tracking ``visionedge/frame/2``. With `source`
    (the path of a picture or video) the key `source` replaces `camera`.
    """
    frame, timing, track_ids = result.frame, result.timing, result.track_ids
    detections = _build_detection_documents(result.detections, result.label_detections())
    if track_ids is not None:
        answers = result.attributes or ({},) * len(track_ids)
        for row, track_id, attributes in zip(detections, track_ids, answers, strict=True):
            row |= {"trackId": track_id, "attributes": dict(attributes)}
    return {
        "schema": f"visionedge/frame/{1 if track_ids is None else 2}",
        **({"camera": frame.camera} if source is None else {"source": source}),
        "sequence": frame.sequence,
        "epoch": frame.epoch,
        "capturedAt": format_utc(frame.captured_utc),
        "width": frame.width_px,
        "height": frame.height_px,
        "model": result.model,
        "device": result.device,
        **({} if track_ids is None else {"precision": result.precision}),
        "timing": {
            "waitMs": round(timing.wait_ns / 1e6, 3),
            "inferMs": round(timing.infer_ns / 1e6, 3),
            "totalMs": round(timing.total_ns / 1e6, 3),
            "batchSize": timing.batch_size,
        },
        "detections": detections,
    }
