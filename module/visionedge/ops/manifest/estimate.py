"""`visionedge manifest estimate`: the messages and units per day in IoT Hub, from real messages.

The messages come from a file of `run --messages`, or from the status of a running module.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from visionedge.errors import ConfigError, VisionedgeError
from visionedge.ops.module_client import fetch_status
from visionedge.outbound.messages import DETECTIONS, MAX_BYTES, SCENE, Message, parse_message
from visionedge.outbound.metering import BLOCK_BYTES, DAY_S, SCENE_SHARE, UNIT_BLOCKS_PER_DAY, count_blocks

_SHORT_S = 600.0
_BUDGET_SPENT = "telemetry-budget-spent"


@dataclass(frozen=True, slots=True)
class MeasuredMessages:
    """The messages of `seconds` s by output; `frames` by camera, empty if unknown."""

    source: str
    seconds: float
    messages: Mapping[str, int]
    blocks: Mapping[str, float]
    size_bytes: float
    frames: Mapping[str, int] = field(default_factory=dict)

    def blocks_per_day(self, output: str) -> float:
        """The blocks of an output per day."""
        return self.blocks.get(output, 0) * DAY_S / self.seconds


@dataclass(frozen=True, slots=True)
class Estimate:
    """The messages of a day, without and with the limit `telemetry.maxPerDay`."""

    measured: MeasuredMessages
    max_per_day: int

    @property
    def blocks_per_day(self) -> float:
        """The blocks per day of all outputs, without the limit."""
        return sum(self.measured.blocks_per_day(output) for output in self.measured.blocks)

    @property
    def kept(self) -> float:
        """The share of the detections' blocks within the limit, in which scene events come first."""
        detections, scene = self._limited_blocks()
        left = self.max_per_day - max(scene, self.max_per_day / SCENE_SHARE) if scene else self.max_per_day
        return min(1.0, max(0.0, left) / detections) if detections else 1.0

    @property
    def billed_blocks(self) -> float:
        """The blocks per day that are sent; the limit does not apply to events."""
        detections, scene = self._limited_blocks()
        return self.blocks_per_day - (1 - self.kept) * detections - max(0.0, scene - self.max_per_day)

    def _limited_blocks(self) -> tuple[float, float]:
        return self.measured.blocks_per_day(DETECTIONS), self.measured.blocks_per_day(SCENE)

    def units(self, tier: str) -> tuple[float, int]:
        """The share of one unit's daily quota, and the number of units."""
        share = self.billed_blocks / UNIT_BLOCKS_PER_DAY[tier]
        return share, max(1, -int(-share // 1))

    def document(self) -> dict[str, Any]:
        """As JSON."""
        measured, scale = self.measured, DAY_S / self.measured.seconds
        units = {tier: self.units(tier) for tier in UNIT_BLOCKS_PER_DAY}
        counted = sum(measured.blocks.values())
        return {
            "source": measured.source,
            "measuredSeconds": round(measured.seconds, 3),
            "measuredMessages": dict(measured.messages),
            "measuredFrames": dict(measured.frames),
            "messagesPerDay": round(sum(measured.messages.values()) * scale),
            "blocksPerDay": round(self.blocks_per_day),
            "bytesPerDay": round(measured.size_bytes * scale),
            "blockFill": round(measured.size_bytes / (counted * BLOCK_BYTES), 3) if counted else 0.0,
            "maxPerDay": self.max_per_day,
            "budgetLastsHours": None if self.kept == 1 else round(24 * self.kept, 1),
            "billedBlocksPerDay": round(self.billed_blocks),
            "units": {
                tier: {"share": round(share, 4), "units": count} for tier, (share, count) in units.items()
            },
        }


def to_text(estimate: Estimate) -> str:
    """The estimate as text."""
    document, measured = estimate.document(), estimate.measured
    frames = "".join(f", {count} frames of {camera}" for camera, count in measured.frames.items())
    lines = [
        f"{measured.source}: {sum(measured.messages.values())} messages in {measured.seconds:.0f} s{frames}",
        f"  per day: {document['messagesPerDay']:,} messages, {document['bytesPerDay'] / 1e6:,.1f} MB,"
        f" {document['blocksPerDay']:,} blocks of 4 KB ({document['blockFill']:.0%} full)",
    ]
    if estimate.kept < 1:
        lines.append(
            f"  telemetry.maxPerDay ({estimate.max_per_day:,}) is used up after "
            f"{document['budgetLastsHours']} h:"
            f" {document['billedBlocksPerDay']:,} blocks are sent"
        )
    for tier, need in document["units"].items():
        units = "1 unit" if need["units"] == 1 else f"{need['units']:,} units"
        digits = 1 if need["share"] >= 0.01 else 2
        lines.append(f"  {tier}: {need['share']:.{digits}%} of a unit's daily quota: {units}")
    if measured.seconds < _SHORT_S:
        lines.append(
            "note: measured for less than 10 minutes; an hour of typical traffic gives a better estimate"
        )
    return "\n".join(lines) + "\n"


# --- from a file --------------------------------------------------------------------------------------------


def measure_messages_file(path: Path) -> MeasuredMessages:
    """Count the messages of a file that `run --messages` wrote, from the first frame in it to the last.

    Each run in the file counts on its own, up to the message that reports the end of its daily budget.

    Raises:
        ConfigError: the file cannot be read, has other content, or too few messages.
    """
    counter = _MessageCounter()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                try:
                    counter.add(line)
                except ValueError as error:
                    raise ConfigError(
                        [f"{path}: line {number} is not a message of this module: {str(error)[:200]}"]
                    ) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    if counter.seconds <= 0:
        raise ConfigError(
            [f"{path}: has fewer than two messages with frames, which are needed to measure time"]
        )
    return MeasuredMessages(
        str(path),
        counter.seconds,
        counter.messages,
        counter.blocks,
        counter.size_bytes,
        dict(sorted(counter.frames.items())),
    )


def _lines(file: BinaryIO) -> Iterable[bytes]:
    """The complete lines; an incomplete last line is left out."""
    while (line := file.readline(MAX_BYTES + 1)).endswith(b"\n"):
        yield line[:-1]
    if len(line) > MAX_BYTES:
        yield line  # too long for a message: the caller reports it


class _MessageCounter:
    """Counts messages and their time, run by run."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.blocks: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()
        self.size_bytes = 0
        self.seconds = 0.0
        self._numbers: dict[str, int] = {}
        self._last: datetime | None = None
        self._spent = False
        self._events: list[Message] = []

    def add(self, body: bytes) -> None:
        """Count the next line of the file.

        Raises:
            ValueError: the line is not a message.
        """
        message, document = parse_message(body), json.loads(body)
        now = max((_captured_at(frame) for frame in document.get("frames", ())), default=None)
        if message.sequence_number <= self._numbers.get(message.output, 0):
            # A new run begins; the events after the last frame belong to the end of the earlier run.
            self._numbers, self._last, self._spent, self._events = {}, None, False, []
        self._numbers[message.output] = message.sequence_number
        if now is not None:
            self._pass_time(now, message, document)
        elif document.get("code") == _BUDGET_SPENT:
            self._spent = True
        elif self._last is not None:
            self._events.append(message)

    def _pass_time(self, now: datetime, message: Message, document: Mapping[str, Any]) -> None:
        """Add the time since the last message with frames; the first one of a run only starts the clock."""
        before, self._last = self._last, now
        events, self._events = self._events, []
        if before is None or self._spent:
            return
        self.seconds += max(0.0, (now - before).total_seconds())
        for counted in (*events, message):
            self._count(counted)
        self.frames.update(frame["camera"] for frame in document["frames"])

    def _count(self, message: Message) -> None:
        self.messages[message.output] += 1
        self.blocks[message.output] += count_blocks(message.size_bytes)
        self.size_bytes += message.size_bytes


def _captured_at(frame: Mapping[str, Any]) -> datetime:
    """The time of capture of a frame.

    Raises:
        ValueError: the frame has none.
    """
    moment = datetime.fromisoformat(str(frame.get("capturedAt")))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


# --- from a running module ----------------------------------------------------------------------------------


def measure_running_module(url: str, token: str | None) -> MeasuredMessages:
    """The projection of a running module from its last hour (`hub.metering` of its status).

    Raises:
        ConfigError: the URL is not valid.
        VisionedgeError: the module cannot be reached, or sends no messages.
    """
    hub = fetch_status(url, token).get("hub")
    bill = hub.get("metering") if isinstance(hub, dict) else None
    if not isinstance(hub, dict) or not isinstance(bill, dict):
        raise VisionedgeError(f"{url}: the module has counted no messages yet; try again when it is ready")
    if hub.get("state") == "local" and "messagesFile" not in hub:
        raise VisionedgeError(
            f"{url}: the module runs outside IoT Edge and sends no messages; start it with --messages FILE"
        )
    try:
        return _from_projection(url, bill)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        raise VisionedgeError(
            f"{url}: its status has an unknown form; check that it is the same version of visionedge"
        ) from None


def _from_projection(url: str, bill: Mapping[str, Any]) -> MeasuredMessages:
    """The messages of a projection: its blocks, with the total number of messages per block."""
    seconds = float(bill["projectedFromSeconds"])
    if seconds < 1:
        raise ValueError("nothing was measured")
    counted = {output: per_day * seconds / DAY_S for output, per_day in bill["blocksPerDayByOutput"].items()}
    messages = {
        output: round(metered * bill["messages"][output] / bill["blocks"][output])
        for output, metered in counted.items()
    }
    size_bytes = sum(counted.values()) * BLOCK_BYTES * float(bill["blockFill"])
    return MeasuredMessages(url, seconds, messages, counted, size_bytes)
