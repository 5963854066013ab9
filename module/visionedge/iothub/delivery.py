"""What the service talks to: results and events go in, messages come out to the hub and the messages file."""

import logging
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionedge.config.schema import TelemetryConfig
from visionedge.errors import ConfigError
from visionedge.frames.types import FrameResult
from visionedge.iothub.client import HubClient, HubListener, LinkTask
from visionedge.iothub.identity import Identity
from visionedge.iothub.sdk_calls import HubStatus
from visionedge.iothub.telemetry import ResumeState, Telemetry, TelemetryStatistics
from visionedge.outbound.messages import RUN_ID_CHARACTERS, EventKind, Message, Sender
from visionedge.outbound.spool import SPOOL_FILE_NAME, Spool, SpoolStatus
from visionedge.outbound.sqlite_store import LostRange, SpoolLimits
from visionedge.runtime.threads import ThreadGroup

# The messages file: every outgoing message's body as one line of a JSON Lines file, written off the loop.


log = logging.getLogger(__name__)

MAX_WAITING_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class MessagesFileStatus:
    """Lines written; `dropped` = those that waited too long behind a slow disk; `failed` = write errors."""

    path: str
    written: int
    waiting: int
    dropped: int
    failed: int
    last_error: str | None


class MessagesFile:
    """Appends bodies to a file from its own thread; `put` never blocks, it drops the oldest if many wait.

    Raises:
        ConfigError: the file cannot be opened for appending.
    """

    def __init__(self, path: Path, thread_group: ThreadGroup) -> None:
        try:
            # Unbuffered: a line is in the file as soon as it is written, for whoever follows it.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError([f"--messages {path}: cannot be opened: {error.strerror or error}"]) from None
        self._path = path
        self._thread_group = thread_group
        self._wake = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._closing = False
        self._written = 0
        self._dropped = 0
        self._failed = 0
        self._last_error: str | None = None
        self._finished = threading.Event()
        self._started = False

    def __repr__(self) -> str:
        return f"<MessagesFile {self._path} written={self._written} waiting={len(self._lines)}>"

    def start(self) -> None:
        """Begin to write; once."""
        self._started = True
        self._thread_group.start("messages-file", self._run, vital=True, may_return=True)

    def put(self, message: Message) -> None:
        """Have a message's body written."""
        line = message.body + b"\n"
        with self._wake:
            self._lines.append(line)
            self._bytes += len(line)
            while self._bytes > MAX_WAITING_BYTES:
                self._bytes -= len(self._lines.popleft())
                self._dropped += 1
            self._wake.notify()

    def status(self) -> MessagesFileStatus:
        """What was written so far."""
        with self._wake:
            return MessagesFileStatus(
                path=str(self._path),
                written=self._written,
                waiting=len(self._lines),
                dropped=self._dropped,
                failed=self._failed,
                last_error=self._last_error,
            )

    def close(self, deadline_s: float) -> bool:
        """Write what waits and close the file; False when the disk did not take it in time. Blocks."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if not self._started:
            self._file.close()
            return True
        return self._finished.wait(deadline_s)

    def _run(self) -> None:
        try:
            while lines := self._take():
                self._write(lines)
        finally:
            self._file.close()
            self._finished.set()

    def _take(self) -> list[bytes]:
        """All lines that wait; empty only when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._lines or self._closing)
            lines = list(self._lines)
            self._lines.clear()
            self._bytes = 0
        return lines

    def _write(self, lines: list[bytes]) -> None:
        text = memoryview(b"".join(lines))
        error: OSError | None = None
        try:
            while text:
                text = text[self._file.write(text) or 0 :]
        except OSError as caught:
            error = caught
        with self._wake:
            if error is None:
                self._written += len(lines)
                return
            first = self._failed == 0
            self._failed += len(lines)
            self._last_error = error.strerror or str(error)
        if first:
            log.error(
                "--messages %s: cannot be written: %s; lines are lost until it can be",
                self._path,
                error.strerror,
            )


LOCAL_MODULE_ID = "vision"
"""The module id in messages outside IoT Edge, as in the shipped manifests; the device id is the host name."""

_LOSS_REPORT_INTERVAL_NS = 10_000_000_000
_MAX_RANGES = 200


@dataclass(frozen=True, slots=True)
class DeliveryStatus:
    """What goes out, and whether it arrives; `hub` is None outside IoT Edge, `journal` without a file.

    `spool` is None where no message has to outlive the process.
    """

    inside_edge: bool
    device: str
    module: str
    hub: HubStatus | None
    telemetry: TelemetryStatistics
    messages_file: MessagesFileStatus | None
    spool: SpoolStatus | None


class Delivery:
    """Telemetry, the hub client and the messages file behind one door.

    `close` blocks up to its deadline and belongs on a thread; all else belongs to the asyncio loop and never
    blocks.
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
        device, module = (
            (identity.device, identity.module) if identity else (socket.gethostname(), LOCAL_MODULE_ID)
        )
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
        self._losses_ns = clock()

    @staticmethod
    def build(
        policy: TelemetryConfig,
        identity: Identity | None,
        messages_path: Path | None,
        thread_group: ThreadGroup,
        *,
        data: Path | None = None,
        on_change: Callable[[HubStatus], None] = lambda _status: None,
        on_stuck: Callable[[], None] = lambda: None,
        listener: HubListener | None = None,
    ) -> "Delivery":
        """The delivery of a module: a hub client inside IoT Edge, a messages file where one is asked for.

        Messages for the hub wait in a spool in the folder `data`, whose opening may block for some seconds;
        without a folder in memory. The callbacks and the `listener` are called from threads of
        the hub client.

        Raises:
            ConfigError: the messages file cannot be opened.
        """
        messages_file = MessagesFile(messages_path, thread_group) if messages_path else None
        if identity is None:
            return Delivery(policy, None, messages_file=messages_file)
        spool = None
        if data is not None:
            spool = Spool(data / SPOOL_FILE_NAME, identity.owner, thread_group, limits=_spool_limits(policy))
        hub = HubClient(
            identity,
            thread_group,
            message_queue=spool,
            listener=listener,
            on_change=on_change,
            on_stuck=on_stuck,
        )
        return Delivery(policy, identity, hub=hub, messages_file=messages_file, spool=spool)

    def __repr__(self) -> str:
        return f"<Delivery {self._sender.device}/{self._sender.module} hub={self._hub!r}>"

    def start(self) -> None:
        """Begin to connect and to write; outside IoT Edge, say once that messages go nowhere."""
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
        """Whether there is a hub that messages go to."""
        return self._identity is not None

    def offer(self, result: FrameResult) -> None:
        """A frame was analysed."""
        # With nowhere to go, encoding frames would only cost.
        if self._hub is not None or self._messages_file is not None:
            self._telemetry.offer(result)

    def event(
        self, kind: EventKind, code: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        """Tell a change of state, at once."""
        self._dispatch(self._telemetry.event(kind, code, message, details))

    def answer(self, result: FrameResult, correlation_id: str) -> bool:
        """Answer a picture that another module has sent; False when that is not told."""
        message = self._telemetry.answer(result, correlation_id)
        if message is not None:
            self._dispatch(message)
        return message is not None

    def apply(self, policy: TelemetryConfig) -> None:
        """Go on under another policy; nothing that waits is touched, but what exceeds smaller bounds."""
        self._telemetry.apply(policy)
        if self._spool is not None:
            self._spool.set_limits(_spool_limits(policy))

    def link_task(self, link_task: LinkTask) -> None:
        """Have something done over the link that the errand names (`HubClient.errand`)."""
        if self._hub is not None:
            self._hub.link_task(link_task)
        else:
            link_task.done("lost")

    def tick(self) -> None:
        """Send what is due; to be called every tenth of a second or so."""
        now_ns = self._clock()
        for message in self._telemetry.due(now_ns):
            self._dispatch(message)
        if self._spool is not None:
            for news in self._spool.take_events():
                self.event("storage", news.code, news.text, news.details)
            self._report_losses(self._spool, now_ns)

    def status(self) -> DeliveryStatus:
        """What went out so far, and what waits."""
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
        """Hand on the frames that still wait for their interval; on the loop, right before `close`."""
        for message in self._telemetry.flush():
            self._dispatch(message)

    def close(self, deadline_s: float) -> bool:
        """Send and write what waits, within the deadline. Blocks; touches nothing of the loop's.

        False when a thread of the SDK (or the disk) is left hanging: then leave the process with `os._exit`.
        """
        until_ns = time.monotonic_ns() + round(deadline_s * 1e9)
        clean = self._hub.close(deadline_s) if self._hub else True
        for last in (self._spool, self._messages_file):
            if last is not None:
                left_s = max(0.1, (until_ns - time.monotonic_ns()) / 1e9)
                clean = last.close(left_s) and clean
        return clean

    def _report_losses(self, spool: Spool, now_ns: int) -> None:
        """Tell the cloud which numbers it will never get, while it listens; not at every tick."""
        if self._hub is None or not self._hub.connected or now_ns < self._losses_ns:
            return
        lost_ranges = spool.take_lost_ranges()
        if not lost_ranges:
            return
        self._losses_ns = now_ns + _LOSS_REPORT_INTERVAL_NS
        for first in range(0, len(lost_ranges), _MAX_RANGES):
            reported = tuple(lost_ranges[first : first + _MAX_RANGES])
            text, details = _loss_text(reported)
            event = self._telemetry.event("storage", "spool-dropped", text, details)
            if self._messages_file is not None:
                self._messages_file.put(event)
            spool.put(event, reported)

    def _dispatch(self, message: Message) -> None:
        if self._messages_file is not None:
            self._messages_file.put(message)
        if self._hub is not None:
            self._hub.send(message)


def _spool_limits(policy: TelemetryConfig) -> SpoolLimits:
    return SpoolLimits(policy.spool_megabytes * 1_000_000, policy.spool_hours * 3600.0)


def _loss_text(lost_ranges: tuple[LostRange, ...]) -> tuple[str, dict[str, Any]]:
    """The words and the details of the event that tells of messages that were dropped."""
    ranges = [
        {"output": loss.output, "from": loss.first, "to": loss.last, "reason": loss.reason}
        for loss in lost_ranges
    ]
    count = sum(loss.last - loss.first + 1 for loss in lost_ranges)
    reasons = ", ".join(sorted({loss.reason for loss in lost_ranges}))
    return f"{count} messages were dropped before the hub had them ({reasons})", {
        "messages": count,
        "ranges": ranges,
    }
