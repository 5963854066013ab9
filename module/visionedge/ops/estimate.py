"""What a configuration will cost in IoT Hub: the module's own telemetry, run on a made-up scene and clock."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from visionedge.config import Config
from visionedge.edge.billing import BLOCK_BYTES, UNITS
from visionedge.edge.messages import Message, Sender
from visionedge.edge.telemetry import Telemetry
from visionedge.errors import ConfigError
from visionedge.frames import Detections, Frame, InputSpec, Result, Timing

_DAY_S = 86_400
_TICK_S = 0.2
_FRAMES = 12_000
_SECONDS = (30.0, 3_600.0)
_LABELS = ("person", "car", "bicycle", "backpack", "traffic light", "dog")


@dataclass(frozen=True, slots=True)
class Assumed:
    """What no configuration says: rate of cameras without `fps`, objects on a picture, scene changes."""

    fps: float = 10.0
    detections: int = 3
    changes_per_minute: float = 6.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a day comes to; before and after `telemetry.maxPerDay`."""

    cameras: int
    frames_per_second: float
    mode: str
    messages_per_day: float
    blocks_per_day: float
    bytes_per_day: float
    max_per_day: int
    assumed: Assumed

    @property
    def kept(self) -> float:
        """The share of the messages that the day's budget lets through."""
        return min(1.0, self.max_per_day / self.messages_per_day) if self.messages_per_day else 1.0

    @property
    def billed_blocks(self) -> float:
        """Blocks a day that are really sent."""
        return self.blocks_per_day * self.kept

    def units(self, tier: str) -> tuple[float, int]:
        """The share of one unit's daily quota, and how many units that takes."""
        share = self.billed_blocks / UNITS[tier]
        return share, max(1, -int(-share // 1))

    def document(self) -> dict[str, Any]:
        """One JSON document."""
        units = {tier: self.units(tier) for tier in UNITS}
        blocks = self.blocks_per_day * BLOCK_BYTES
        return {
            "cameras": self.cameras,
            "framesPerSecond": round(self.frames_per_second, 3),
            "mode": self.mode,
            "messagesPerDay": round(self.messages_per_day),
            "blocksPerDay": round(self.blocks_per_day),
            "bytesPerDay": round(self.bytes_per_day),
            "blockFill": round(self.bytes_per_day / blocks, 3) if blocks else 0.0,
            "maxPerDay": self.max_per_day,
            "budgetLastsHours": None if self.kept == 1 else round(24 * self.kept, 1),
            "billedBlocksPerDay": round(self.billed_blocks),
            "units": {
                tier: {"share": round(share, 4), "units": count} for tier, (share, count) in units.items()
            },
            "assumed": {
                "fps": self.assumed.fps,
                "detections": self.assumed.detections,
                "changesPerMinute": self.assumed.changes_per_minute,
            },
        }


def estimate(config: Config, assumed: Assumed) -> Estimate:
    """Run the telemetry of a configuration over made-up frames, a day's worth scaled from some minutes.

    Raises:
        ConfigError: no camera is configured, so nothing would be sent.
    """
    rates = {name: camera.fps or assumed.fps for name, camera in config.cameras.items() if camera.enabled}
    if not rates:
        raise ConfigError(["cameras: none is configured, so nothing would be sent; give --config FILE"])
    total = sum(rates.values())
    policy = config.telemetry
    longest_s = max(_SECONDS[0], min(_SECONDS[1], _FRAMES / total), 4 * policy.interval_seconds)
    scene = _Scene(rates, assumed)
    unlimited = policy.model_copy(update={"max_per_day": 10**12})
    telemetry = Telemetry(
        unlimited, Sender("edge-device-1", "vision", "0123456789ab"), clock=scene.clock, utc=scene.utc
    )
    messages = scene.play(telemetry, longest_s)
    bill = telemetry.statistics().bill
    scale = _DAY_S / longest_s
    return Estimate(
        cameras=len(rates),
        frames_per_second=total,
        mode=policy.mode,
        messages_per_day=len(messages) * scale,
        blocks_per_day=sum(bill.blocks.values()) * scale,
        bytes_per_day=sum(message.size_bytes for message in messages) * scale,
        max_per_day=policy.max_per_day,
        assumed=assumed,
    )


def words(made: Estimate) -> str:
    """The estimate for people."""
    document = made.document()
    assumed = made.assumed
    lines = [
        f"{made.cameras} cameras, {made.frames_per_second:g} frames/s, telemetry.mode {made.mode}",
        f"  {document['messagesPerDay']:,} messages a day, {made.bytes_per_day / 1e6:,.1f} MB,"
        f" {document['blocksPerDay']:,} blocks of 4 KB ({document['blockFill']:.0%} full)",
    ]
    if made.kept < 1:
        lines.append(
            f"  telemetry.maxPerDay ({made.max_per_day:,}) is spent after {document['budgetLastsHours']} h:"
            f" {document['billedBlocksPerDay']:,} blocks are sent"
        )
    for tier, need in document["units"].items():
        lines.append(f"  {tier}: {need['share']:.1%} of a unit's day, {need['units']} unit(s)")
    lines.append(
        f"assumed: {assumed.fps:g} frames/s where a camera has no fps, {assumed.detections} objects a"
        f" picture, {assumed.changes_per_minute:g} changes a minute and camera; events are not counted"
    )
    return "\n".join(lines) + "\n"


class _Scene:
    """Cameras that see some objects, which stand still between changes; its own clock, the same each time."""

    def __init__(self, rates: dict[str, float], assumed: Assumed) -> None:
        self._rates = rates
        self._assumed = assumed
        self._random = random.Random(1)  # noqa: S311 - a scene, no secret
        self._now_s = 0.0
        self._started = datetime(2026, 1, 1, tzinfo=UTC)
        self._image = np.zeros((1, 1, 3), np.uint8)

    def clock(self) -> int:
        """Nanoseconds of the scene."""
        return round(self._now_s * 1e9)

    def utc(self) -> datetime:
        """Its wall clock."""
        return self._started + timedelta(seconds=self._now_s)

    def play(self, telemetry: Telemetry, seconds: float) -> list[Message]:
        """Offer all frames of so many seconds; what is sent."""
        messages: list[Message] = []
        views = {name: self._look() for name in self._rates}
        changes = {name: self._next_change() for name in self._rates}
        taken = dict.fromkeys(self._rates, 0)
        while self._now_s < seconds:
            self._now_s += _TICK_S
            for name, rate in self._rates.items():
                if self._now_s >= changes[name]:
                    views[name], changes[name] = self._look(), self._next_change()
                while taken[name] < rate * self._now_s:
                    taken[name] += 1
                    telemetry.offer(self._result(name, taken[name], views[name]))
            messages += telemetry.due(self.clock())
        return messages

    def _next_change(self) -> float:
        rate = self._assumed.changes_per_minute / 60
        return self._now_s + (self._random.expovariate(rate) if rate else float("inf"))

    def _look(self) -> Detections:
        count = self._assumed.detections
        place: Callable[[], float] = self._random.random
        rows = [
            [place() * 0.6, place() * 0.6, 0.7 + place() * 0.3, 0.7 + place() * 0.3] for _ in range(count)
        ]
        scores = sorted((0.4 + 0.6 * place() for _ in range(count)), reverse=True)
        return Detections(
            np.array(rows, np.float32).reshape(-1, 4),
            np.array(scores, np.float32),
            np.array([self._random.randrange(len(_LABELS)) for _ in range(count)], np.int32),
        )

    def _result(self, camera: str, sequence: int, view: Detections) -> Result:
        frame = Frame(
            camera=camera,
            sequence=1_795_356_748_000 + sequence,
            epoch=1,
            captured_ns=self.clock(),
            captured_utc=self.utc(),
            width_px=1920,
            height_px=1080,
            image=self._image,
            placement=InputSpec(1, 1).place(1920, 1080),
            full_picture=lambda: self._image,
        )
        return Result(
            frame, view, Timing(3_123_000, 7_987_000, 12_456_000, 4), "cuda", "yolox-nano-416", _LABELS
        )
