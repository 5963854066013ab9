"""The vocabulary: what travels from a camera to the cloud, with shapes and units. No I/O, no vendor names."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""A picture: uint8 (height, width, 3), colour order BGR, as OpenCV has it."""

FitMode = Literal["letterbox", "stretch"]
Anchor = Literal["center", "top-left"]
Resample = Literal["bilinear", "antialias"]
Rounding = Literal["nearest", "down"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the whole source picture lies inside the model's input, in input pixels."""

    left_px: float
    top_px: float
    width_px: float
    height_px: float


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The picture a model wants: its size and how a source of another shape is brought to it.

    `letterbox` keeps the aspect ratio and fills the rest with `pad` (a grey level 0-255); `stretch` does not.
    `anchor` says where the scaled picture lies in the letterbox, `rounding` what becomes of a side of 233.6
    pixels there. `resample`: how pixels are combined where the picture gets smaller.
    """

    width_px: int
    height_px: int
    fit: FitMode = "letterbox"
    anchor: Anchor = "center"
    pad: int = 114
    resample: Resample = "bilinear"
    rounding: Rounding = "nearest"

    def place(self, width_px: int, height_px: int) -> Placement:
        """Where a source of this size lies in the input. Whole pixels, as resizing can only make those."""
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

    `sequence` never repeats for a camera, restarts included; `epoch` grows by one at each reconnect.
    `captured_ns` is monotonic and taken right after decode: ages come from it alone.
    `image` is the picture at the model's input size, brought to it as `spec` says; `full_picture()` gives it
    at the source's size (converted only when somebody asks). `spec` tells models apart while one takes over
    from another; None fits whichever there is.
    """

    camera: str
    sequence: int
    epoch: int
    captured_ns: int
    captured_utc: datetime
    width_px: int
    height_px: int
    image: Picture
    placement: Placement
    full_picture: Callable[[], Picture]
    spec: InputSpec | None = None


@dataclass(frozen=True, slots=True)
class Detections:
    """What was found, as columns of one length n, sorted by falling score.

    `boxes` float32 (n, 4): left, top, right, bottom, relative to the source picture, clipped to 0-1.
    `scores` float32 (n,) in 0-1. `class_ids` int32 (n,); words are put to them only in sinks.
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

    @staticmethod
    def none() -> "Detections":
        """No detection at all."""
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a frame took: waiting in its slot, in the engine, and from capture to result; in ns."""

    wait_ns: int
    infer_ns: int
    total_ns: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class FrameResult:
    """A frame and what was found on it; `device` is where it was really computed."""

    frame: Frame
    detections: Detections
    timing: Timing
    device: str
    model: str
    labels: tuple[str, ...]


def utc_now() -> datetime:
    """The wall clock, for people and the cloud only."""
    return datetime.now(UTC)


def format_utc(moment: datetime) -> str:
    """``2026-11-22T10:00:00.123Z``: UTC with milliseconds, as every document has it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def build_detection_documents(detections: Detections, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of the `detections` key of a frame object."""
    rows = []
    for box, score, class_id in zip(
        detections.boxes.tolist(), detections.scores.tolist(), detections.class_ids.tolist(), strict=True
    ):
        left, top, right, bottom = box
        label = labels[class_id] if class_id < len(labels) else f"class-{class_id}"
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
    """The frame object of the contract (``visionedge/frame/1``): the same in HTTP, telemetry, files.

    With `source` (the picture or video as it was given) the `camera` key is left out.
    """
    frame, timing = result.frame, result.timing
    return {
        "schema": "visionedge/frame/1",
        **({"camera": frame.camera} if source is None else {"source": source}),
        "sequence": frame.sequence,
        "epoch": frame.epoch,
        "capturedAt": format_utc(frame.captured_utc),
        "width": frame.width_px,
        "height": frame.height_px,
        "model": result.model,
        "device": result.device,
        "timing": {
            "waitMs": round(timing.wait_ns / 1e6, 3),
            "inferMs": round(timing.infer_ns / 1e6, 3),
            "totalMs": round(timing.total_ns / 1e6, 3),
            "batchSize": timing.batch_size,
        },
        "detections": build_detection_documents(result.detections, result.labels),
    }
