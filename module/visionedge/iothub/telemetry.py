"""What goes to the hub and when: frames become batch documents under a policy. For the asyncio loop only."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal

from visionedge.config.schema import TelemetryConfig
from visionedge.frames.types import FrameResult, build_frame_document, utc_now
from visionedge.iothub.change_filter import ChangeFilter
from visionedge.outbound.messages import (
    CORRELATION_ID,
    DETECTIONS,
    EVENTS,
    MAX_BYTES,
    MAX_CAMERAS_BYTES,
    MAX_FRAME_BYTES,
    MAX_LABELS_BYTES,
    EncodedFrame,
    Event,
    EventKind,
    FrameTooLargeError,
    Message,
    Sender,
    build_batch_messages,
    build_event_message,
    encode_frame,
    envelope_bytes,
)
from visionedge.outbound.metering import (
    BLOCK_BYTES,
    MAX_PER_DAY,
    S1,
    UNIT_BLOCKS_PER_DAY,
    DayBudget,
    MeteredUsage,
    QuotaForecast,
    UsageMeter,
    blocks,
)
from visionedge.runtime.redaction import redact, redact_document

# How many of the waiting frames make a document that fills its blocks. Pure.


MIN_FILL_RATIO = 0.9
"""A document is well filled when its frames use this much of the blocks it is metered as."""

# What IoT Hub may add to the size of a message on its way: names of device, module and hub.
_MARGIN_BYTES = 96


class BatchSizeEstimator:
    """The size of a batch message while frames are added to it."""

    def __init__(self, envelope_bytes: int) -> None:
        self._bodies = 0
        self._count = 0
        self._envelope = envelope_bytes + _MARGIN_BYTES
        self._cameras: set[str] = set()
        self._labels: set[str] = set()
        self._cameras_bytes = 0
        self._labels_bytes = 0

    def add(self, frame: EncodedFrame) -> None:
        """One more frame."""
        self._bodies += len(frame.body) + 1
        self._count += 1
        if frame.camera not in self._cameras:
            self._cameras.add(frame.camera)
            self._cameras_bytes += len(frame.camera) + 1
        for label in frame.labels - self._labels:
            self._labels.add(label)
            self._labels_bytes += len(label) + 1

    @property
    def size_bytes(self) -> int:
        """What the message would weigh."""
        lists = self._cameras_bytes + min(self._labels_bytes, MAX_LABELS_BYTES)
        return self._envelope + self._bodies + lists

    @property
    def fits(self) -> bool:
        """Whether it may still be one message (a single frame always is)."""
        return self._count <= 1 or (
            self._bodies <= MAX_FRAME_BYTES
            and self._cameras_bytes <= MAX_CAMERAS_BYTES
            and self._labels_bytes <= MAX_LABELS_BYTES
        )

    @property
    def is_well_filled(self) -> bool:
        """Whether its blocks are used well enough."""
        return self.size_bytes >= MIN_FILL_RATIO * BLOCK_BYTES * blocks(self.size_bytes)


def count_frames_to_fill(frames: Sequence[EncodedFrame], envelope_bytes: int) -> int:
    """How many of the first frames make the largest well-filled message; 0 when none does yet.

    When they are more than one message can carry, the message ends there, filled or not.
    """
    weigher, best = BatchSizeEstimator(envelope_bytes), 0
    for count, frame in enumerate(frames, 1):
        weigher.add(frame)
        if not weigher.fits:
            return best or count - 1
        if weigher.is_well_filled:
            best = count
    return best


log = logging.getLogger(__name__)

TelemetryDropReason = Literal["budget", "pending", "oversize", "invalid"]
"""Why a frame that should have been told was not: the day's budget is spent, too many waited, it fits in no
message, or it holds a number that JSON cannot carry."""

TelemetryEventCode = Literal[
    "telemetry-budget-spent",
    "telemetry-budget-at-risk",
    "telemetry-budget-safe",
    "telemetry-frame-oversize",
    "telemetry-frame-invalid",
]
"""Codes of the events that this makes; their kind is `module`."""

MAX_PENDING_BYTES = 4 * MAX_BYTES
_FORECAST_INTERVAL_NS = 60_000_000_000


@dataclass(frozen=True, slots=True)
class TelemetryStatistics:
    """Counts since the start: offered = told + unchanged + muted + waiting + all dropped."""

    offered: int
    published: int
    unchanged: int
    muted: int
    waiting: int
    dropped: Mapping[str, int]
    messages: Mapping[str, int]
    left_today: int
    usage: MeteredUsage


@dataclass(frozen=True, slots=True)
class ResumeState:
    """Where an earlier run stopped: the last number of each output, and the blocks sent on each UTC day."""

    last_numbers: Mapping[str, int] = field(default_factory=dict)
    spent: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _PendingFrame:
    frame: EncodedFrame
    since_ns: int


class Telemetry:
    """Gathers frames and makes messages of them.

    `intervalSeconds` after a frame began to wait, as many as fill the blocks that IoT Hub meters become batch
    documents; `fillSeconds` later at the latest all do, and at once when they fill a message. Events are due
    at once. `messageSequence` rises by one with each message of an output, restarts included.
    """

    def __init__(
        self,
        policy: TelemetryConfig,
        sender: Sender,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        utc: Callable[[], datetime] = utc_now,
        resume_state: ResumeState | None = None,
    ) -> None:
        resume_state = resume_state or ResumeState()
        self._sender = sender
        self._clock = clock
        self._utc = utc
        self._changes = ChangeFilter()
        self._budget = DayBudget(policy.max_per_day, utc, resume_state.spent, clock)
        self._waiting: deque[_PendingFrame] = deque()
        self._waiting_bytes = 0
        self._ready: list[Message] = []
        self._numbers: Counter[str] = Counter(resume_state.last_numbers)
        self._meter = UsageMeter(clock)
        self._forecast = QuotaForecast()
        self._forecast_ns = clock() + _FORECAST_INTERVAL_NS
        self._is_budget_spent = False
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._reported: set[object] = set()
        self.apply(policy)

    def __repr__(self) -> str:
        return f"<Telemetry mode={self._policy.mode} waiting={len(self._waiting)} {self._budget!r}>"

    def apply(self, policy: TelemetryConfig) -> None:
        """Go on under another policy; what waits, what was told and what was spent today stays."""
        self._policy = policy
        self._interval_ns = round(policy.interval_seconds * 1e9)
        self._max_wait_ns = self._interval_ns + round(policy.fill_seconds * 1e9)
        self._changes.apply(
            move_threshold=policy.move_threshold,
            heartbeat_s=policy.heartbeat_seconds,
            change_s=policy.change_seconds,
        )
        if self._budget.limit != policy.max_per_day:
            self._budget.limit = policy.max_per_day
            self._reported.discard(("budget", self._budget.day))

    def offer(self, result: FrameResult) -> None:
        """A frame was analysed; whether it is told is decided here."""
        self._counts["offered"] += 1
        if self._policy.mode == "none":
            self._counts["muted"] += 1
        elif self._policy.mode == "changes" and not self._changes.observe(result):
            self._counts["unchanged"] += 1
        elif self._budget.left() == 0:
            self._drop("budget")
            self._report_spent()
        else:
            self._gather(result)

    def event(
        self, kind: EventKind, code: str, message: str, details: Mapping[str, Any] | None = None
    ) -> Message:
        """The message that tells a change of state; secrets in its texts become ``***``."""
        event = Event(
            kind, code, redact(message), self._utc(), redact_document(_to_json_value(details or {}))
        )
        made = build_event_message(self._sender, self._number(EVENTS), event)
        self._meter.count(EVENTS, made.size_bytes)
        return made

    def answer(self, result: FrameResult, correlation_id: str) -> Message | None:
        """The message that answers another module's picture, whatever the mode; None when it cannot be told.

        It counts for the day's budget.
        """
        self._counts["offered"] += 1
        if self._budget.left() == 0:
            self._drop("budget")
            self._report_spent()
            return None
        frame = self._encoded(result)
        if frame is None:
            return None
        (made,) = build_batch_messages(self._sender, self._numbers[DETECTIONS] + 1, [frame])
        if correlation_id:
            made = replace(made, properties={**made.properties, CORRELATION_ID: correlation_id})
        return made if self._charge_budget([made]) else None

    def due(self, now_ns: int) -> list[Message]:
        """The messages that shall go out now, oldest first."""
        self._watch_forecast(now_ns)
        while (count := self._count_due(now_ns)) > 0:
            self._pack(count)
        ready, self._ready = self._ready, []
        return ready

    def flush(self) -> list[Message]:
        """All that waits, whatever the interval says; for the end."""
        if self._waiting:
            self._pack(len(self._waiting))
        ready, self._ready = self._ready, []
        return ready

    def _count_due(self, now_ns: int) -> int:
        """How many of the waiting frames shall go now."""
        if not self._waiting:
            return 0
        waited_ns = now_ns - self._waiting[0].since_ns
        if waited_ns >= self._max_wait_ns:
            return len(self._waiting)
        if waited_ns < self._interval_ns and self._waiting_bytes < MAX_FRAME_BYTES:
            return 0
        frames = [waiting.frame for waiting in self._waiting]
        return count_frames_to_fill(frames, envelope_bytes(self._sender, self._numbers[DETECTIONS] + 1))

    def spent(self) -> Mapping[str, int]:
        """What was spent of the budget, by UTC day, to be stored; from any thread."""
        return self._budget.spent

    def statistics(self) -> TelemetryStatistics:
        """The counts so far."""
        usage = self._meter.usage()
        return TelemetryStatistics(
            offered=self._counts["offered"],
            published=self._counts["told"],
            unchanged=self._counts["unchanged"],
            muted=self._counts["muted"],
            waiting=len(self._waiting),
            dropped=MappingProxyType(dict(self._dropped)),
            messages=usage.messages,
            left_today=self._budget.left(),
            usage=usage,
        )

    def _gather(self, result: FrameResult) -> None:
        frame = self._encoded(result)
        if frame is None:
            return
        if self._policy.mode == "changes":
            self._changes.sent(result)
        self._waiting.append(_PendingFrame(frame, self._clock()))
        self._waiting_bytes += len(frame.body)
        while self._waiting_bytes > MAX_PENDING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft().frame.body)
            self._drop("pending")

    def _encoded(self, result: FrameResult) -> EncodedFrame | None:
        """The frame object as JSON; None, and told, where there can be none."""
        try:
            return encode_frame(build_frame_document(result))
        except FrameTooLargeError as error:
            self._drop_invalid("oversize", result.frame.camera, str(error))
        except ValueError as error:
            self._drop_invalid("invalid", result.frame.camera, f"a frame object is no JSON: {error}")
        return None

    def _pack(self, count: int) -> None:
        frames = [self._waiting.popleft().frame for _ in range(count)]
        self._waiting_bytes -= sum(len(frame.body) for frame in frames)
        self._ready += self._charge_budget(
            build_batch_messages(self._sender, self._numbers[DETECTIONS] + 1, frames)
        )

    def _charge_budget(self, made: Sequence[Message]) -> list[Message]:
        """The messages that the day's budget has blocks for, counted; the first that it has not ends it."""
        going: list[Message] = []
        for message in made:
            if (size := blocks(message.size_bytes)) > self._budget.left():
                break
            self._budget.spend(size)
            self._numbers[DETECTIONS] += 1
            self._counts["told"] += message.frames
            self._meter.count(DETECTIONS, message.size_bytes)
            going.append(message)
        for message in made[len(going) :]:
            # A smaller message might still fit, but then the moment at which detections stop is unclear.
            self._budget.spend(self._budget.left())
            self._drop("budget", message.frames)
            self._report_spent()
        return going

    def _report_spent(self) -> None:
        limit = self._policy.max_per_day
        self._report_once(
            ("budget", self._budget.day),
            "telemetry-budget-spent",
            f"telemetry.maxPerDay: the {limit} blocks of 4 KB of this UTC day are spent;"
            " detections are sent again tomorrow",
            {"maxPerDay": limit},
        )

    def _watch_forecast(self, now_ns: int) -> None:
        """Report once a day, and when it changes, that the projected day passes a limit."""
        if now_ns < self._forecast_ns:
            return
        self._forecast_ns = now_ns + _FORECAST_INTERVAL_NS
        stopped, self._is_budget_spent = self._is_budget_spent, self._budget.left() == 0
        if self._is_budget_spent:
            return  # while detections are held back, the projection falls for the wrong reason
        if stopped:
            self._meter.restart_projection()
        usage, limit = self._meter.usage(), self._policy.max_per_day
        limited = usage.per_day.get(DETECTIONS, 0.0)
        if self._forecast.update(usage, limited, limit, self._budget.day):
            self._report_forecast(usage, limited)

    def _report_forecast(self, usage: MeteredUsage, limited: float) -> None:
        limit, exceeded = self._policy.max_per_day, self._forecast.exceeded
        details = {
            "exceeded": list(exceeded),
            "blocksPerDay": round(usage.blocks_per_day),
            "detectionsPerDay": round(limited),
            "maxPerDay": limit,
            "unitBlocks": UNIT_BLOCKS_PER_DAY[S1],
        }
        text = (
            f"telemetry: the last {usage.span_s / 60:.0f} minutes project a day of {round(limited):,} blocks"
            f" of 4 KB on output detections, {round(usage.blocks_per_day):,} in all"
        )
        if not exceeded:
            log.info("%s; that is within its limits again", text)
            self._ready.append(self.event("module", "telemetry-budget-safe", text, details))
            return
        if MAX_PER_DAY in exceeded:
            text += f"; telemetry.maxPerDay is {limit:,}, so detections will stop before the day ends"
        if S1 in exceeded:
            text += f"; one S1 unit of IoT Hub takes {UNIT_BLOCKS_PER_DAY[S1]:,} a day"
        log.warning("%s; send less (mode, changeSeconds, moveThreshold, fps) or allow more", text)
        self._ready.append(self.event("module", "telemetry-budget-at-risk", text, details))

    def _drop_invalid(self, reason: TelemetryDropReason, camera: str, text: str) -> None:
        self._drop(reason)
        self._report_once(
            (reason, camera), f"telemetry-frame-{reason}", f"camera {camera}: {text}", {"camera": camera}
        )

    def _report_once(self, once: object, code: str, text: str, details: Mapping[str, Any]) -> None:
        if once in self._reported:
            return
        if len(self._reported) >= 1024:
            self._reported.clear()
        self._reported.add(once)
        log.warning("%s", redact(text))
        self._ready.append(self.event("module", code, text, details))

    def _number(self, output: str) -> int:
        self._numbers[output] += 1
        return self._numbers[output]

    def _drop(self, reason: TelemetryDropReason, frames: int = 1) -> None:
        self._dropped[reason] += frames


def _to_json_value(value: Any) -> Any:
    """Details as they may leave the machine: JSON values only."""
    match value:
        case str() | bool() | int() | None:
            return value
        case float():
            return value if value - value == 0 else None
        case Mapping():
            return {str(key): _to_json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_to_json_value(item) for item in value]
        case _:
            return redact(str(value))
