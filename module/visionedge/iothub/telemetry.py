"""Telemetry: which frames and scene events are sent to the hub, and when. For the asyncio loop only.

`offer` takes each result; the change filter and the day's budget decide whether it is sent. `due` gives the
messages to send: frames are collected and packed so that they fill the 4 KB blocks that IoT Hub bills. Scene
events are always sent: without a budget they wait for the next UTC day.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
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
    MAX_DOCUMENT_BYTES,
    SCENE,
    DocumentTooLargeError,
    EncodedDocument,
    Event,
    EventKind,
    Message,
    Sender,
    build_batch_messages,
    build_event_message,
    build_scene_messages,
    count_frames_to_fill,
    encode_frame,
    encode_insights,
    encode_scene_event,
    envelope_bytes,
)
from visionedge.outbound.metering import (
    MAX_PER_DAY,
    S1,
    SCENE_SHARE,
    UNIT_BLOCKS_PER_DAY,
    DayBudget,
    MeteredUsage,
    QuotaForecast,
    UsageMeter,
    count_blocks,
)
from visionedge.runtime.redaction import redact, redact_document
from visionedge.scene.spatial_analysis import build_insights, is_first_count

log = logging.getLogger(__name__)

TelemetryDropReason = Literal["budget", "pending", "oversize", "invalid"]
"""Why a frame was not sent: the day's budget is spent, too many frames waited, the frame is larger than a
message, or it contains NaN or infinity, which JSON does not have."""

TelemetryEventCode = Literal[
    "telemetry-budget-spent",
    "telemetry-budget-at-risk",
    "telemetry-budget-safe",
    "telemetry-frame-oversize",
    "telemetry-frame-invalid",
    "scene-budget-spent",
    "scene-event-invalid",
]
"""Codes of the events of telemetry; their kind is `module`."""

_LIMITED_OUTPUTS = (DETECTIONS, SCENE)
"""The outputs that count for `telemetry.maxPerDay`."""

MAX_PENDING_BYTES = 4 * MAX_BYTES

SCENE_WAIT_S = 0.55
"""A scene event waits so long for others; with 0.05 s on its way to the disk, and one tick of the service
before and after, that is 1 s."""

_FORECAST_INTERVAL_NS = 60_000_000_000
_MAX_REPORTED = 1_024


@dataclass(frozen=True, slots=True)
class TelemetryStatistics:
    """Counts of frames since the start: offered = published + unchanged + muted + waiting + all dropped.

    `messages` counts messages by output; `left_today` are the blocks left in the day's budget.
    """

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
    """Where an earlier run stopped: the last sequence number by output, and the blocks spent by UTC day."""

    last_numbers: Mapping[str, int] = field(default_factory=dict)
    spent: Mapping[str, int] = field(default_factory=dict)


class _WaitingDocuments:
    """Encoded documents in their order, and since when they wait."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._documents: deque[tuple[EncodedDocument, int]] = deque()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._documents)

    def append(self, document: EncodedDocument) -> None:
        self._documents.append((document, self._clock()))
        self.size_bytes += len(document.body)

    def first(self, count: int) -> list[EncodedDocument]:
        """The `count` oldest ones."""
        return [document for document, _ in islice(self._documents, count)]

    def take(self, count: int) -> list[EncodedDocument]:
        """Remove the `count` oldest ones."""
        taken = [self._documents.popleft()[0] for _ in range(count)]
        self.size_bytes -= sum(len(document.body) for document in taken)
        return taken

    def waited_ns(self, now_ns: int) -> int:
        """How long the oldest one has waited; 0 without any."""
        return now_ns - self._documents[0][1] if self._documents else 0


class Telemetry:
    """Collects frames and makes messages of them.

    `intervalSeconds` after the oldest frame was taken, as many frames as fill their blocks well are due. All
    frames are due `fillSeconds` after that, or at once if they fill a message. Scene events are due together
    `SCENE_WAIT_S` after the first one, or at once if they fill a message. Events are due at once.
    `messageSequence` rises by one with each message of an output, over all starts of the module.
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
        self._waiting = _WaitingDocuments(clock)
        self._scene = _WaitingDocuments(clock)
        self._scene_blocked_at: int | None = None
        self._has_scene = False
        self._refused: list[str] = []
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
        waiting = f"waiting={len(self._waiting)} events={len(self._scene)}"
        return f"<Telemetry mode={self._policy.mode} {waiting} {self._budget!r}>"

    def apply(self, policy: TelemetryConfig) -> None:
        """Use another policy from now on; waiting frames and the blocks spent today stay."""
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
            self._reported -= {("budget", self._budget.day), ("scene-budget", self._budget.day)}

    def expect_scene(self, has_scene: bool) -> None:
        """Whether any camera has zones or lines: then detections leave a share of the day's budget."""
        self._has_scene = has_scene

    def offer(self, result: FrameResult) -> None:
        """Take the result of a frame, and decide whether it is sent."""
        self._counts["offered"] += 1
        if self._policy.mode == "none":
            self._counts["muted"] += 1
        elif self._policy.mode == "changes" and not self._changes.observe(result):
            self._counts["unchanged"] += 1
        elif self._left_for_frames() == 0:
            self._drop("budget")
            self._report_spent()
        else:
            self._gather(result)

    def offer_scene(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Take scene events, in every mode. The caller bounds how many wait here."""
        for document in documents:
            try:
                encoded = self._encode_scene(document)
                if encoded is None:
                    self._refused.append(document["id"])
                else:
                    self._scene.append(encoded)
            except ValueError as error:
                self._refused.append(document["id"])
                camera = document["camera"]
                text = f"camera {camera}: a scene event cannot be sent: {error}"
                self._report_once(
                    ("scene", camera), "scene-event-invalid", text, {"camera": camera, "id": document["id"]}
                )

    def _encode_scene(self, document: Mapping[str, Any]) -> EncodedDocument | None:
        """A scene event in the format of messages; None: it has no counterpart there."""
        if self._policy.format == "spatial-analysis":
            insights = build_insights(document)
            return None if insights is None else encode_insights(insights, document)
        plain = {key: value for key, value in document.items() if key != "context"}
        return None if is_first_count(document) else encode_scene_event(plain)

    def take_refused(self) -> list[str]:
        """The ids of scene events that no message can carry, since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def event(
        self, kind: EventKind, code: str, message: str, details: Mapping[str, Any] | None = None
    ) -> Message:
        """Make the message of an event; secrets in its texts become ``***``."""
        event = Event(
            kind, code, redact(message), self._utc(), redact_document(_to_json_value(details or {}))
        )
        made = build_event_message(self._sender, self._number(EVENTS), event)
        self._meter.count(EVENTS, made.size_bytes)
        return made

    def answer(self, result: FrameResult, correlation_id: str) -> Message | None:
        """Make the answer to an image of another module, in every mode; it counts for the day's budget.

        None if the budget is spent, or if the frame fits into no message.
        """
        self._counts["offered"] += 1
        if self._left_for_frames() == 0:
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
        """The messages to send now, oldest first."""
        self._watch_forecast(now_ns)
        is_late = self._scene.waited_ns(now_ns) >= SCENE_WAIT_S * 1e9
        if (is_late or self._scene.size_bytes >= MAX_DOCUMENT_BYTES) and not self._is_scene_blocked():
            self._pack_scene(is_late=is_late)
        while (count := self._count_due(now_ns)) > 0:
            self._pack(count)
        ready, self._ready = self._ready, []
        return ready

    def flush(self) -> list[Message]:
        """Messages of all that waits, before its time; for the end of the module."""
        if self._scene:
            self._pack_scene(is_late=True)
        if self._waiting:
            self._pack(len(self._waiting))
        ready, self._ready = self._ready, []
        return ready

    def _count_due(self, now_ns: int) -> int:
        """How many of the waiting frames are due."""
        if not self._waiting:
            return 0
        waited_ns = self._waiting.waited_ns(now_ns)
        if waited_ns >= self._max_wait_ns:
            return len(self._waiting)
        if waited_ns < self._interval_ns and self._waiting.size_bytes < MAX_DOCUMENT_BYTES:
            return 0
        frames = self._waiting.first(len(self._waiting))
        return count_frames_to_fill(frames, envelope_bytes(self._sender, self._numbers[DETECTIONS] + 1))

    def spent(self) -> Mapping[str, int]:
        """The blocks spent of the budget by UTC day, to be stored; may be called from any thread."""
        return self._budget.spent

    def statistics(self) -> TelemetryStatistics:
        """The counts so far."""
        usage = self._meter.usage()
        return TelemetryStatistics(
            offered=self._counts["offered"],
            published=self._counts["published"],
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
        self._waiting.append(frame)
        while self._waiting.size_bytes > MAX_PENDING_BYTES:
            self._waiting.take(1)
            self._drop("pending")

    def _encoded(self, result: FrameResult) -> EncodedDocument | None:
        """The frame object as JSON; None if it cannot be sent, which is reported once for a camera."""
        try:
            return encode_frame(build_frame_document(result))
        except DocumentTooLargeError as error:
            self._drop_invalid("oversize", result.frame.camera, str(error))
        except ValueError as error:
            self._drop_invalid("invalid", result.frame.camera, f"frame object is not valid JSON: {error}")
        return None

    def _pack(self, count: int) -> None:
        frames = self._waiting.take(count)
        self._ready += self._charge_budget(
            build_batch_messages(self._sender, self._numbers[DETECTIONS] + 1, frames)
        )

    def _pack_scene(self, *, is_late: bool) -> None:
        """Send scene events as far as the day's budget goes; unless `is_late`, only in full messages."""
        made = self._scene_messages(len(self._scene))
        if not is_late:
            made = made[:-1]  # it still has room
        for message in made:
            if not self._send_scene(message):
                self._fill_budget(len(message.event_ids))
                return

    def _scene_messages(self, count: int) -> list[Message]:
        """Messages of the first `count` scene events: the only place where documents become messages.

        Each message names its events in `event_ids`.
        """
        return build_scene_messages(self._sender, self._numbers[SCENE] + 1, self._scene.first(count))

    def _send_scene(self, message: Message) -> bool:
        """Send a message of the first scene events, unless it needs more blocks than are left today."""
        if (size := count_blocks(message.size_bytes)) > self._budget.left():
            return False
        self._budget.spend(size)
        self._numbers[SCENE] += 1
        self._meter.count(SCENE, message.size_bytes)
        self._ready.append(message)
        self._scene.take(len(message.event_ids))
        return True

    def _fill_budget(self, count: int) -> None:
        """Send fewer scene events, as a message of `count` does not fit into the budget; the rest waits."""
        while (count := count // 2) > 0:
            for message in self._scene_messages(count)[:1]:
                self._send_scene(message)
        limit = self._policy.max_per_day
        self._scene_blocked_at = self._budget.left()
        self._report_once(
            ("scene-budget", self._budget.day),
            "scene-budget-spent",
            f"telemetry.maxPerDay: of {limit} blocks of 4 KB of this UTC day too few are left for scene"
            " events; they wait on the disk, within events.keep, and are sent on the next UTC day",
            {"maxPerDay": limit},
        )

    def _is_scene_blocked(self) -> bool:
        """Whether the budget has not grown since a scene event did not fit into it."""
        if self._scene_blocked_at is not None and self._budget.left() > self._scene_blocked_at:
            self._scene_blocked_at = None
        return self._scene_blocked_at is not None

    def _left_for_frames(self) -> int:
        """The blocks that detections may still use today."""
        kept = self._budget.limit // SCENE_SHARE if self._has_scene else 0
        return max(0, self._budget.left() - kept)

    def _charge_budget(self, made: Sequence[Message]) -> list[Message]:
        """The messages that fit into the day's budget; the first one that does not fit ends the budget."""
        charged: list[Message] = []
        for message in made:
            if (size := count_blocks(message.size_bytes)) > self._left_for_frames():
                break
            self._budget.spend(size)
            self._numbers[DETECTIONS] += 1
            self._counts["published"] += message.frames
            self._meter.count(DETECTIONS, message.size_bytes)
            charged.append(message)
        for message in made[len(charged) :]:
            # A smaller message might still fit, but then it would be unclear when detections stopped.
            self._budget.spend(self._left_for_frames())
            self._drop("budget", message.frames)
            self._report_spent()
        return charged

    def _report_spent(self) -> None:
        limit = self._policy.max_per_day
        self._report_once(
            ("budget", self._budget.day),
            "telemetry-budget-spent",
            f"telemetry.maxPerDay: of {limit} blocks of 4 KB of this UTC day none is left for detections;"
            " they are sent again on the next UTC day",
            {"maxPerDay": limit},
        )

    def _watch_forecast(self, now_ns: int) -> None:
        """Report that the projected day exceeds a limit: once a day, and when the exceeded limits change."""
        if now_ns < self._forecast_ns:
            return
        self._forecast_ns = now_ns + _FORECAST_INTERVAL_NS
        stopped, self._is_budget_spent = self._is_budget_spent, self._left_for_frames() == 0
        if self._is_budget_spent:
            return  # the projection falls now, but only because detections are not sent
        if stopped:
            self._meter.restart_projection()
        usage, limit = self._meter.usage(), self._policy.max_per_day
        limited = sum(usage.per_day.get(output, 0.0) for output in _LIMITED_OUTPUTS)
        if self._forecast.update(usage, limited, limit, self._budget.day):
            self._report_forecast(usage)

    def _report_forecast(self, usage: MeteredUsage) -> None:
        detections, scene = (usage.per_day.get(output, 0.0) for output in _LIMITED_OUTPUTS)
        limit, exceeded = self._policy.max_per_day, self._forecast.exceeded
        details = {
            "exceeded": list(exceeded),
            "blocksPerDay": round(usage.blocks_per_day),
            "detectionsPerDay": round(detections),
            "scenePerDay": round(scene),
            "maxPerDay": limit,
            "unitBlocks": UNIT_BLOCKS_PER_DAY[S1],
        }
        text = (
            f"telemetry: at the rate of the last {usage.span_s / 60:.0f} minutes a day has"
            f" {round(detections):,} blocks of 4 KB on output detections, {round(scene):,} on scene,"
            f" {round(usage.blocks_per_day):,} on all"
        )
        if not exceeded:
            log.info("%s; this is within the limits again", text)
            self._ready.append(self.event("module", "telemetry-budget-safe", text, details))
            return
        if MAX_PER_DAY in exceeded:
            text += f"; telemetry.maxPerDay is {limit:,}, so detections stop before the day ends"
        if S1 in exceeded:
            text += f"; the quota of one S1 unit of IoT Hub is {UNIT_BLOCKS_PER_DAY[S1]:,} a day"
        log.warning("%s; send less (mode, changeSeconds, moveThreshold, fps) or raise the limit", text)
        self._ready.append(self.event("module", "telemetry-budget-at-risk", text, details))

    def _drop_invalid(self, reason: TelemetryDropReason, camera: str, text: str) -> None:
        self._drop(reason)
        self._report_once(
            (reason, camera), f"telemetry-frame-{reason}", f"camera {camera}: {text}", {"camera": camera}
        )

    def _report_once(self, once: object, code: str, text: str, details: Mapping[str, Any]) -> None:
        if once in self._reported:
            return
        if len(self._reported) >= _MAX_REPORTED:
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
    """Details of an event as JSON values; other values become redacted texts, NaN becomes null."""
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
