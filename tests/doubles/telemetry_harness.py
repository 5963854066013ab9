"""Telemetry with a fake clock and fake detections."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from visionedge.config.schema import TelemetryConfig
from visionedge.frames.types import Detections, Frame, FrameResult, InputSpec, Timing
from visionedge.iothub.telemetry import Telemetry
from visionedge.outbound.messages import Message, Sender

LABELS = ("person", "car", "person")
SECOND_NS = 1_000_000_000
Box = tuple[float, float, float, float]
PERSON_BOX: Box = (0.1, 0.1, 0.3, 0.9)


class TelemetryHarness:
    """Both clocks, and results and telemetry that use them."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.utc = datetime(2026, 11, 22, 12, tzinfo=UTC)

    def advance_s(self, seconds: float) -> int:
        """Advance both clocks; returns the monotonic time in ns."""
        self.now_ns += round(seconds * SECOND_NS)
        self.utc += timedelta(seconds=seconds)
        return self.now_ns

    def result(
        self,
        boxes: Sequence[Box] = (),
        *,
        camera: str = "dock",
        ids: Sequence[int] | None = None,
        labels: tuple[str, ...] = LABELS,
        score: float = 0.87,
        epoch: int = 1,
    ) -> FrameResult:
        """A frame captured now, with these boxes (of persons, unless `ids` says otherwise)."""
        frame = Frame(
            camera=camera,
            sequence=self.now_ns,
            epoch=epoch,
            captured_ns=self.now_ns,
            captured_utc=self.utc,
            width_px=64,
            height_px=48,
            image=np.zeros((8, 8, 3), np.uint8),
            placement=InputSpec(8, 8).place(64, 48),
            full_picture=lambda: np.zeros((48, 64, 3), np.uint8),
        )
        found = Detections(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.full(len(boxes), score, np.float32),
            np.array(ids if ids is not None else [0] * len(boxes), np.int32),
        )
        return FrameResult(frame, found, Timing(1, 2, 3, 1), "cpu", "tiny", labels)

    def telemetry(self, **policy: Any) -> Telemetry:
        """Telemetry with this clock and policy; it does not wait to fill blocks."""
        return Telemetry(
            TelemetryConfig.model_validate({"fillSeconds": 0, **policy}),
            Sender("press-7", "vision", "run"),
            clock=lambda: self.now_ns,
            utc=lambda: self.utc,
        )


def scene_event(number: int = 0, *, size: int = 0, **keys: Any) -> dict[str, Any]:
    """A scene event; with a size its JSON has at least so many bytes."""
    event: dict[str, Any] = {
        "id": f"{number:032x}",
        "camera": "dock",
        "type": "zone-entered",
        "zone": "queue",
        "label": "person",
        "trackId": 1_795_356_748 + number,
        "at": "2026-11-22T12:00:00.000Z",
        "sequence": number,
        "epoch": 1,
        "evidence": {"firstSequence": number, "lastSequence": number, "path": [[number, 0.5, 0.5]]},
        **keys,
    }
    return event | {"model": "x" * size} if size else event


def documents(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The bodies of messages, decoded."""
    return [json.loads(message.body) for message in messages]
