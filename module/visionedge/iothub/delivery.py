"""The delivery: takes results and events from the service, and gives messages to the hub and the messages
file.

Telemetry decides what is sent, the spool keeps it on disk, the hub client sends it. Outside IoT Edge only the
messages file is written, if there is one. Scene events are acknowledged when a kill cannot lose them.
"""

import logging
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionedge.config.schema import TelemetryConfig
from visionedge.frames.types import FrameResult
from visionedge.iothub.client import HubClient, HubListener, HubStatus, LinkTask
from visionedge.iothub.identity import Identity
from visionedge.iothub.telemetry import ResumeState, Telemetry, TelemetryStatistics
from visionedge.outbound.messages import RUN_ID_CHARACTERS, EventKind, Message, Sender
from visionedge.outbound.messages_file import MessageLine, MessagesFile, MessagesFileStatus
from visionedge.outbound.queue_state import QueuedMessage
from visionedge.outbound.spool import SPOOL_FILE_NAME, Spool, SpoolStatus
from visionedge.outbound.sqlite_store import LostRange, SpoolLimits
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)

LOCAL_MODULE_ID = "vision"
"""The module id in messages outside IoT Edge, as in the shipped manifests. The device id is the host name."""

_LOSS_REPORT_INTERVAL_NS = 10_000_000_000
_REWRITE_INTERVAL_NS = 10_000_000_000
_MAX_RANGES_PER_EVENT = 200


@dataclass(frozen=True, slots=True)
class DeliveryStatus:
    """The state of the delivery; `hub` and `spool` are None outside IoT Edge."""

    inside_edge: bool
    device: str
    module: str
    hub: HubStatus | None
    telemetry: TelemetryStatistics
    messages_file: MessagesFileStatus | None
    spool: SpoolStatus | None


@dataclass(slots=True)
class _SceneMessage:
    """A message with scene events on its way to the disk: in the spool, in the messages file, or in both."""

    message: Message
    entry: QueuedMessage | None
    line: MessageLine | None

    @property
    def is_secured(self) -> bool:
        """Whether it is on the disk. While the spool works in memory: whether the hub has it."""
        return all(place is None or place.is_secured for place in (self.entry, self.line))


class Delivery:
    """Telemetry, spool, hub client and messages file with one interface.

    `close` blocks and is called from a thread. All other methods are called on the asyncio loop and never
    block.
    """

    def __init__(
        self,
        policy: TelemetryConfig,
        identity: Identity | None,
        *,
        hub: HubClient | None = None,
        messages_file: MessagesFile | None = None,
        spool: Spool | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        device, module = socket.gethostname(), LOCAL_MODULE_ID
        if identity is not None:
            device, module = identity.device, identity.module
        self._identity = identity
        self._sender = Sender(device, module, uuid.uuid4().hex[:RUN_ID_CHARACTERS])
        self._clock = clock
        resume_state = ResumeState(spool.last_numbers, spool.spent) if spool is not None else None
        self._telemetry = Telemetry(policy, self._sender, clock=clock, resume_state=resume_state)
        if spool is not None:
            spool.set_spent_source(self._telemetry.spent)
        self._hub = hub
        self._messages_file = messages_file
        self._spool = spool
        self._losses_ns = self._rewrite_ns = clock()
        self._scene_messages: list[_SceneMessage] = []
        self._acknowledged: list[str] = []

    @staticmethod
    def build(
        policy: TelemetryConfig,
        identity: Identity | None,
        messages_path: Path | None,
        thread_group: ThreadGroup,
        *,
        data: Path,
        on_stuck: Callable[[], None] = lambda: None,
        listener: HubListener | None = None,
    ) -> "Delivery":
        """Build the delivery of a module: with a hub client inside IoT Edge, with a messages file on request.

        Messages for the hub wait in a spool in the folder `data`; opening it may block for some seconds.
        `on_stuck` and `listener` are called from threads of the hub client.

        Raises:
            ConfigError: the messages file cannot be opened.
        """
        messages_file = MessagesFile(messages_path, thread_group) if messages_path else None
        if identity is None:
            return Delivery(policy, None, messages_file=messages_file)
        spool = Spool(data / SPOOL_FILE_NAME, identity.owner, thread_group, limits=_spool_limits(policy))
        hub = HubClient(identity, thread_group, spool, listener=listener, on_stuck=on_stuck)
        return Delivery(policy, identity, hub=hub, messages_file=messages_file, spool=spool)

    def __repr__(self) -> str:
        return f"<Delivery {self._sender.device}/{self._sender.module} hub={self._hub!r}>"

    def start(self) -> None:
        """Start the threads. Outside IoT Edge, log once that no message is sent."""
        if self._messages_file is not None:
            self._messages_file.start()
        if self._spool is not None:
            self._spool.start()
        if self._hub is not None:
            self._hub.start()
        else:
            log.info(
                "not inside IoT Edge: running locally, no message is sent%s",
                " but written to the messages file" if self._messages_file else "",
            )

    @property
    def inside_edge(self) -> bool:
        """Whether the module runs inside IoT Edge, so that messages go to a hub."""
        return self._identity is not None

    def offer(self, result: FrameResult) -> None:
        """Take the result of a frame; telemetry decides whether it is sent."""
        # Without a hub and a file, encoding frames would only cost CPU time.
        if self._hub is not None or self._messages_file is not None:
            self._telemetry.offer(result)

    def expect_scene(self, has_scene: bool) -> None:
        """As `Telemetry.expect_scene`."""
        self._telemetry.expect_scene(has_scene)

    def offer_scene(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Take scene events; `take_acknowledged` says when the caller may forget them."""
        if self._hub is not None or self._messages_file is not None:
            self._telemetry.offer_scene(documents)
        else:
            self._acknowledged += [document["id"] for document in documents]

    def take_acknowledged(self) -> list[str]:
        """The ids of scene events that are secured since the last call: in the spool's file, or at the hub,
        and in the messages file, as far as there are these. At once without both, and without a message that
        could carry the event.
        """
        acknowledged = self._acknowledged + self._telemetry.take_refused()
        self._acknowledged = []
        waiting = []
        for each in self._scene_messages:
            if each.is_secured:
                acknowledged += each.message.event_ids
            else:
                waiting.append(each)
        self._scene_messages = waiting
        return acknowledged

    def event(
        self, kind: EventKind, code: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        """Send an event at once."""
        self._dispatch(self._telemetry.event(kind, code, message, details))

    def answer(self, result: FrameResult, correlation_id: str) -> bool:
        """Answer a picture of another module; False if the answer cannot be sent (budget, size)."""
        message = self._telemetry.answer(result, correlation_id)
        if message is not None:
            self._dispatch(message)
        return message is not None

    def apply(self, policy: TelemetryConfig) -> None:
        """Use another policy from now on; waiting messages stay, except those beyond smaller limits."""
        self._telemetry.apply(policy)
        if self._spool is not None:
            self._spool.set_limits(_spool_limits(policy))

    def submit(self, link_task: LinkTask) -> None:
        """Do a task over the connection that it names (`HubClient.submit`)."""
        if self._hub is not None:
            self._hub.submit(link_task)
        else:
            link_task.done("lost")

    def tick(self) -> None:
        """Send due messages; to be called about every 0.1 s."""
        now_ns = self._clock()
        for message in self._telemetry.due(now_ns):
            self._dispatch(message)
        if self._spool is not None:
            for event in self._spool.take_events():
                self.event("storage", event.code, event.text, event.details)
            self._report_losses(self._spool, now_ns)
        if self._messages_file is not None and now_ns >= self._rewrite_ns:
            self._rewrite_ns = now_ns + _REWRITE_INTERVAL_NS
            self._write_lost_lines(self._messages_file)

    def _write_lost_lines(self, messages_file: MessagesFile) -> None:
        """Write scene events again that the disk did not take."""
        for each in self._scene_messages:
            if each.line is not None and each.line.state == "lost":
                each.line = messages_file.put(each.message)

    def status(self) -> DeliveryStatus:
        """The counts so far, and the state of each part."""
        return DeliveryStatus(
            inside_edge=self._identity is not None,
            device=self._sender.device,
            module=self._sender.module,
            hub=self._hub.status() if self._hub else None,
            telemetry=self._telemetry.statistics(),
            messages_file=self._messages_file.status() if self._messages_file else None,
            spool=self._spool.status() if self._spool is not None else None,
        )

    def flush(self) -> None:
        """Send the frames and scene events that still wait; called right before `close`."""
        for message in self._telemetry.flush():
            self._dispatch(message)

    def close(self, deadline_s: float) -> bool:
        """Send and write all waiting messages within the deadline. Blocks.

        False if a thread of the SDK or of the disk still hangs: then the process must end with `os._exit`.
        """
        until_ns = time.monotonic_ns() + round(deadline_s * 1e9)
        clean = self._hub.close(deadline_s) if self._hub else True
        for writer in (self._spool, self._messages_file):
            if writer is not None:
                left_s = max(0.1, (until_ns - time.monotonic_ns()) / 1e9)
                clean = writer.close(left_s) and clean
        return clean

    def _report_losses(self, spool: Spool, now_ns: int) -> None:
        """Report to the cloud the sequence numbers that it will never get, at most every 10 s."""
        if self._hub is None or not self._hub.connected or now_ns < self._losses_ns:
            return
        lost_ranges = spool.take_lost_ranges()
        if not lost_ranges:
            return
        self._losses_ns = now_ns + _LOSS_REPORT_INTERVAL_NS
        for first in range(0, len(lost_ranges), _MAX_RANGES_PER_EVENT):
            reported = tuple(lost_ranges[first : first + _MAX_RANGES_PER_EVENT])
            text, details = _loss_text(reported)
            event = self._telemetry.event("storage", "spool-dropped", text, details)
            if self._messages_file is not None:
                self._messages_file.put(event)
            spool.put(event, reported)

    def _dispatch(self, message: Message) -> None:
        line = None if self._messages_file is None else self._messages_file.put(message)
        entry = None if self._hub is None else self._hub.send(message)
        if message.event_ids:
            self._scene_messages.append(_SceneMessage(message, entry, line))


def _spool_limits(policy: TelemetryConfig) -> SpoolLimits:
    return SpoolLimits(policy.spool_megabytes * 1_000_000, policy.spool_hours * 3600.0)


def _loss_text(lost_ranges: tuple[LostRange, ...]) -> tuple[str, dict[str, Any]]:
    """The text and the details of the event `spool-dropped`."""
    ranges = [
        {"output": loss.output, "from": loss.first, "to": loss.last, "reason": loss.reason}
        for loss in lost_ranges
    ]
    count = sum(loss.last - loss.first + 1 for loss in lost_ranges)
    reasons = ", ".join(sorted({loss.reason for loss in lost_ranges}))
    text = f"{count} messages were dropped before the hub received them ({reasons})"
    return text, {"messages": count, "ranges": ranges}
