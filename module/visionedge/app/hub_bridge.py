"""What IoT Hub and other modules see of the running module, and what they may ask of it.

twin ──▶ Desired ──▶ another configuration        status, snapshot, … ◀──▶ Methods
     ◀── Reported ◀── properties of the rooms     input `frames` ──▶ Questions ──▶ output `detections`

What comes from the threads of the hub client goes through two bounded boxes to the loop, and everything here
happens there; pictures and documents are worked on by a few threads of its own.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from visionedge import __version__
from visionedge.app.direct_methods import Calls
from visionedge.app.http_backend import Facade
from visionedge.app.state import Rooms
from visionedge.config.documents import Document
from visionedge.config.schema import Config
from visionedge.errors import VisionedgeError
from visionedge.frames.types import Result, utc_now, utc_text
from visionedge.iothub.client import Errand, Outcome
from visionedge.iothub.desired import Carriers, Desired
from visionedge.iothub.direct_methods import Methods
from visionedge.iothub.image_requests import INPUT, NUMBERS, Asked, Drop, Means, Questions
from visionedge.iothub.reported import Reported
from visionedge.iothub.sdk import InputMessage, Link, MethodCall
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import Outbox
from visionedge.web.backend import Busy
from visionedge.web.jpeg import MEMORY_BYTES, MEMORY_WAIT_S, Budget, Desk, is_picture
from visionedge.web.requests import decode_upload, decoding_bytes
from visionedge.web.responses import RequestError

# The reported properties: what the twin says of the module, cut to what a twin may hold. Pure.


MAX_CAMERAS_BYTES = 17_000
"""200 cameras with the longest names; with the acknowledgement still below the 32 KB of a twin."""

_CALM = ("live", "disabled", "ended")


def properties(rooms: Rooms, acknowledgement: Mapping[str, Any], started: datetime) -> Document:
    """All that is reported; without nulls, which would take keys away."""
    document: Document = {
        "config": dict(acknowledgement),
        "engine": _engine(rooms),
        "cameras": camera_states(_states(rooms)),
        "module": {"version": __version__, "started": utc_text(started)},
    }
    if rooms.loaded is not None:
        document["model"] = {"name": rooms.loaded.name[:256], "sha256": rooms.loaded.sha256}
    return document


def _engine(rooms: Rooms) -> Document:
    if rooms.engine is None:
        return {"requested": rooms.config.inference.device, "reasonCode": "warming-up"}
    device = rooms.engine.device
    return {
        "requested": device.requested,
        "effective": device.effective,
        "precision": rooms.engine.precision.precision,
        "reasonCode": device.code,
        "since": utc_text(device.since_utc),
    }


def _states(rooms: Rooms) -> dict[str, str]:
    running = rooms.cameras_by_name
    return {
        name: running[name].status().state if name in running else "disabled" for name in rooms.config.cameras
    }


def camera_states(states: Mapping[str, str]) -> Document:
    """The states by name; of more than fit those that are in trouble are kept, and the rest is counted."""
    left_bytes = MAX_CAMERAS_BYTES
    kept: Document = {}
    for name in sorted(states, key=lambda name: (states[name] in _CALM, name)):
        left_bytes -= len(json.dumps({name: states[name]}))
        if left_bytes < 0:
            kept["_more"] = f"{len(states) - len(kept)} cameras more"
            break
        kept[name] = states[name]
    return dict(sorted(kept.items()))


log = logging.getLogger(__name__)

_LOOK_S = 1.0
_END_S = 1.0
_CALLS = 2_000
_MOST_ANSWERS = 64
"""Answers of full size on their way to the hub; the calls behind them are told at once to come again."""

_MESSAGES = 8


class Remote:
    """A `Listener` for the hub client; everything that it does not inherit from there belongs to the loop.

    Args:
        rooms: what is reported, and whom answers go through.
        view: what methods and pictures ask.
        call_soon: runs something on the loop, from any thread.
        carriers: where the configuration comes from.
        apply: makes the module that of another configuration.
        give_way: lets a model be that is still being fetched for an earlier configuration.
        first_sequence: the number of the first picture of another module.
    """

    def __init__(
        self,
        rooms: Rooms,
        view: Facade,
        call_soon: Callable[[Callable[[], None]], None],
        carriers: Carriers,
        *,
        apply: Callable[[Config], Awaitable[Mapping[str, str]]],
        give_way: Callable[[], None],
        first_sequence: int,
    ) -> None:
        self._rooms = rooms
        self._view = view
        self._call_soon = call_soon
        self._desk = Desk(threads=2, limit=16, name="remote")
        # A message of 256 KB may hold a picture of 40 megapixels.
        self._memory = Budget(MEMORY_BYTES, MEMORY_WAIT_S, "too many large pictures at once")
        self._calls: Outbox[MethodCall] = Outbox(lambda: call_soon(self._take_calls), _CALLS)
        self._messages: Outbox[InputMessage] = Outbox(lambda: call_soon(self._take_messages), _MESSAGES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._started_utc = utc_now()
        self._line = 0
        self._answering = 0
        self._reported = Reported()
        self._desired = Desired(carriers, apply, self._event, give_way=give_way)
        self._methods = Methods(Calls(rooms, view, self._desk, self._desired.judge).methods())
        means = Means(self._analyse, self._send_result, lambda: rooms.config.cameras, self._refused)
        self._questions = Questions(means, first_sequence)

    def __repr__(self) -> str:
        return f"<Remote {self._desired!r} {self._reported!r} {self._methods!r} {self._questions!r}>"

    # --- from the threads of the hub client and the SDK (`line.Listener`) -----------------------------------

    def twin(self, twin: Mapping[str, Any] | None, line: int) -> None:
        """The twin was read."""
        self._call_soon(lambda: self._seen(twin, line))

    def called(self, call: MethodCall) -> None:
        """A direct method is called."""
        self._calls.put(call)

    def received(self, message: InputMessage) -> None:
        """A message has come to an input."""
        self._messages.put(message)

    # --- the life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Report, answer and take wishes from now on; the delivery is there."""
        self._begin(self._report())
        self._begin(self._again("taking desired properties", self._desired.run))
        self._begin(self._again("answering pictures of other modules", self._questions.run))

    async def close(self) -> None:
        """End what is under way; whoever called a method hears nothing more."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_S)
        # A picture that is worked on may take its time, and the stop does not wait for it.
        self._desk.close(wait=False)

    def reload(self, read: Callable[[], Document]) -> None:
        """Take the local document anew, as `read` gives it."""
        self._desired.reload(read)

    def retry(self) -> None:
        """Something that was refused may be possible now: try it at once."""
        self._desired.retry()

    def next_sequences(self) -> dict[str, int]:
        """What has to be remembered, so that the numbers of pictures never repeat (`sequences`)."""
        return {NUMBERS: self._questions.next_sequence}

    async def keep_wish(self) -> None:
        """The module could not be started as it was wished before: keep what is wished now for next time."""
        await self._desired.keep_waiting()

    def statistics(self) -> Asked:
        """The counts so far."""
        return Asked(
            wishes=dict(self._desired.counts),
            patches=self._reported.patches,
            methods=dict(self._methods.counts),
            calls_dropped=self._calls.dropped,
            pictures_answered=self._questions.answered,
            pictures_dropped=dict(self._questions.dropped) | {"full": self._full()},
            config=self._desired.acknowledgement,
        )

    def _full(self) -> int:
        return self._questions.dropped["full"] + self._messages.dropped

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _again(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Work that must go on as long as the module does: begun again after an error that it let through."""
        while True:
            try:
                await work()
            except Exception:
                log.exception("%s failed; starting it again", what)
            await asyncio.sleep(_LOOK_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task for IoT Hub ended with an error", exc_info=error)

    # --- the twin -------------------------------------------------------------------------------------------

    def _seen(self, twin: Mapping[str, Any] | None, line: int) -> None:
        if line != self._line:
            self._line = line
            known = None if twin is None else twin.get("reported")
            self._reported.linked(known if isinstance(known, Mapping) else {})
        if twin is not None:
            self._desired.seen(twin)

    async def _report(self) -> None:
        failed = False
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if self._reported.due():
                    self._report_now()
                failed = False
            except Exception:  # the next report must go out; the same failure is told once
                if not failed:
                    log.exception("reporting properties failed; trying again")
                failed = True

    def _report_now(self) -> None:
        wanted = properties(self._rooms, self._desired.acknowledgement, self._started_utc)
        patch = self._reported.next_patch(wanted)
        if patch is not None:
            self._errand(Errand("reporting", self._line, partial(_send_patch, patch), self._settled))

    def _settled(self, outcome: Outcome) -> None:
        self._call_soon(lambda: self._reported.settle(outcome))

    def _event(self, code: str, text: str, details: Mapping[str, Any]) -> None:
        if self._rooms.delivery is not None:
            self._rooms.delivery.event("module", code, text, details)

    # --- direct methods -------------------------------------------------------------------------------------

    def _take_calls(self) -> None:
        for call in self._calls.drain():
            self._begin(self._answer_call(call))

    async def _answer_call(self, call: MethodCall) -> None:
        if self._answering >= _MOST_ANSWERS:
            answer = self._methods.busy(call.name)
        else:
            answer = await self._methods.answer(call.name, call.payload)

        def send(link: Link) -> bool:
            link.answer(call.request_id, answer.status, answer.document)
            return True

        self._answering += 1
        self._errand(Errand("answering a direct method", call.line, send, self._answered))

    def _answered(self, _outcome: Outcome) -> None:
        """Called from any thread."""
        self._call_soon(self._one_answer_less)

    def _one_answer_less(self) -> None:
        self._answering -= 1

    def _errand(self, errand: Errand) -> None:
        if self._rooms.delivery is not None:
            self._rooms.delivery.errand(errand)
        else:
            errand.done("lost")

    # --- pictures of other modules --------------------------------------------------------------------------

    def _take_messages(self) -> None:
        for message in self._messages.drain():
            self._questions.put(message)

    async def _analyse(self, body: bytes) -> Result | Drop:
        if not is_picture(body):
            return "bad-picture"
        try:
            async with self._memory.hold(decoding_bytes(body)):
                picture = await self._desk.run(partial(decode_upload, body))
                return await self._view.detect(picture)
        except RequestError:
            return "bad-picture"
        except Busy:
            return "busy"
        except VisionedgeError as error:
            log.warning("a picture of another module: %s", redact(str(error)))
            return "failed"

    def _send_result(self, result: Result, correlation_id: str) -> bool:
        delivery = self._rooms.delivery
        return delivery is not None and delivery.answer(result, correlation_id)

    def _refused(self, reason: Drop, camera: str) -> None:
        camera = redact(camera)  # whatever another module wrote there
        text = f"a picture on input {INPUT} for {camera} got no answer: {reason}"
        log.warning("%s", text)
        self._event("input-picture-refused", text, {"camera": camera, "reason": reason})


def _send_patch(patch: Mapping[str, Any], link: Link) -> bool:
    return link.report(patch)
