"""A module process under remote control: the real delivery with the real SDK.

The SDK leaves threads in its process, so its tests run in this child process. Commands are JSON lines on
stdin, answered by one line each on stdout; the log goes to stderr. The process ends like a module: normally
if all threads have ended, else by `os._exit`.
"""

import dataclasses
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visionedge.config.schema import TelemetryConfig
from visionedge.frames.types import Detections, Frame, FrameResult, InputSpec, Timing, utc_now
from visionedge.iothub.client import Deadlines, HubClient, LinkTask
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.identity import Identity
from visionedge.iothub.sdk import HubLink, InputMessage, MethodCall
from visionedge.outbound.messages_file import MessagesFile
from visionedge.outbound.spool import SPOOL_FILE_NAME, Spool, SpoolOptions
from visionedge.outbound.sqlite_store import SpoolLimits
from visionedge.runtime.threads import ThreadGroup
from visionedge.runtime.watchdog import EXIT_HUNG

LABELS = ("person", "car")
POLICY = TelemetryConfig.model_validate({"mode": "all", "intervalSeconds": 0.1})

log = logging.getLogger(__name__)


def result(camera: str, sequence: int, *, score: float = 0.87) -> FrameResult:
    """A frame with one person, whose position depends on the sequence number."""
    left = sequence % 5 / 10
    frame = Frame(
        camera=camera,
        sequence=sequence,
        epoch=1,
        captured_ns=time.monotonic_ns(),
        captured_utc=utc_now(),
        width_px=64,
        height_px=48,
        image=np.zeros((8, 8, 3), np.uint8),
        placement=InputSpec(8, 8).place(64, 48),
        full_picture=lambda: np.zeros((48, 64, 3), np.uint8),
    )
    found = Detections(
        np.array([[left, 0.1, left + 0.2, 0.9]], np.float32),
        np.array([score], np.float32),
        np.zeros(1, np.int32),
    )
    return FrameResult(frame, found, Timing(1_000_000, 8_000_000, 12_000_000, 1), "cpu", "tiny", LABELS)


class EchoListener:
    """A `HubListener` that answers every direct method with its payload, and records everything."""

    def __init__(self) -> None:
        self.delivery: Delivery | None = None
        self.twins: list[int] = []
        self.desired: dict[str, Any] = {}
        self.inputs: list[str] = []
        self.outcomes: list[str] = []
        self.connection_number = 0
        self.news = 0
        self.changed = threading.Condition()
        self._settled = threading.Event()

    def twin(self, twin: Mapping[str, Any] | None, connection_number: int) -> None:
        """Record the desired properties."""
        self.connection_number = connection_number
        self.twins.append(connection_number)
        self.desired = dict((twin or {}).get("desired", {}))
        self._notify()

    def on_method_call(self, call: MethodCall) -> None:
        """Answer at once."""

        def send(link: HubLink) -> bool:
            link.answer(call.request_id, 200, {"name": call.name, "payload": call.payload})
            return True

        assert self.delivery is not None
        self.delivery.submit(LinkTask("an answer", call.connection_number, send))

    def on_message(self, message: InputMessage) -> None:
        """Record a message."""
        self.inputs.append(f"{message.input} {message.message_id} {message.body.decode()}")
        self._notify()

    def report(self, patch: dict[str, Any]) -> str:
        """Report properties over the newest connection; returns the outcome."""
        assert self.delivery is not None
        self._settled.clear()
        self.delivery.submit(
            LinkTask("a report", self.connection_number, lambda link: link.report(patch), self._settle)
        )
        self._settled.wait()
        return self.outcomes[-1]

    def _notify(self) -> None:
        with self.changed:
            self.news += 1
            self.changed.notify_all()

    def _settle(self, outcome: str) -> None:
        self.outcomes.append(outcome)
        self._settled.set()


class Driver:
    """One delivery and the commands to it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._thread_group = ThreadGroup(lambda name, error: log.error("%s died: %s", name, error))
        identity = Identity.from_environ(os.environ)
        deadlines = Deadlines(**options.get("deadlines", {}))
        self._written = threading.Event()
        self._echo = EchoListener()
        spool = hub = None
        if identity:
            spool = self._open_spool(identity, options)
            hub = HubClient(
                identity,
                self._thread_group,
                spool,
                deadlines=deadlines,
                listener=self._echo if options.get("listen") else None,
                on_stuck=lambda: os._exit(EXIT_HUNG),
            )
        messages_file = MessagesFile(Path(options["file"]), self._thread_group) if "file" in options else None
        self._spool = spool
        self._delivery = Delivery(POLICY, identity, hub=hub, messages_file=messages_file, spool=spool)
        self._echo.delivery = self._delivery
        self._delivery.start()
        self._sequence = time.time_ns() // 1_000_000
        self.clean = True

    def _open_spool(self, identity: Identity, options: dict[str, Any]) -> Spool:
        limits = SpoolLimits(**options.get("limits", {}))
        path = Path(options["data"]) / SPOOL_FILE_NAME
        return Spool(
            path, identity.owner, self._thread_group, limits=limits, spool_options=SpoolOptions(retry_s=0.2)
        )

    def frames(self, camera: str, count: int) -> dict[str, Any]:
        """Offer frames and send them without waiting for the interval."""
        for _ in range(count):
            self._sequence += 1
            self._delivery.offer(result(camera, self._sequence))
        self._delivery.flush()
        return {}

    def tick(self) -> dict[str, Any]:
        """Do the periodic work of the delivery."""
        self._delivery.tick()
        return {}

    def settle(self) -> dict[str, Any]:
        """Wait until all messages so far are on disk; returns the status."""
        spool = self._spool
        while spool is not None and spool.unwritten:
            self._written.wait(0.05)
            self._written.clear()
        return self.status()

    def event(self, code: str) -> dict[str, Any]:
        """Send an event."""
        self._delivery.event("module", code, f"the driver says {code}", {"by": "driver"})
        return {}

    def heard(self, after: int = 0) -> dict[str, Any]:
        """What the listener recorded: the connections of the twins, the desired properties, the inputs.

        Waits up to a second until there are more than `after` changes (`news`).
        """
        echo = self._echo
        with echo.changed:
            echo.changed.wait_for(lambda: echo.news > after, 1.0)
        return {"news": echo.news, "twins": echo.twins, "desired": echo.desired, "inputs": echo.inputs}

    def report(self, patch: dict[str, Any]) -> dict[str, Any]:
        """Report properties; returns the outcome."""
        return {"outcome": self._echo.report(patch)}

    def status(self) -> dict[str, Any]:
        """The delivery's status."""
        return dict(plain(self._delivery.status()))

    def close(self, deadline_s: float) -> dict[str, Any]:
        """Close; returns how long it took, and the names of the threads that are left."""
        began_s = time.monotonic()
        self.clean = self._delivery.close(deadline_s)
        took_s = time.monotonic() - began_s
        left = self._thread_group.join(0.5) if self.clean else self._thread_group.alive()
        return {
            "clean": self.clean,
            "took_s": took_s,
            "left": left,
            "threads": [thread.name for thread in threading.enumerate()],
            **self.status(),
        }


def plain(value: Any) -> Any:
    """A frozen status as JSON values."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return dict(value) if hasattr(value, "items") else value


def main() -> None:
    """Run commands until `close` or the end of stdin."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    driver = Driver(json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        answer = getattr(driver, name)(**command)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if name == "close":
            break
    if not driver.clean:
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
