"""Joins the running module to IoT Hub: the twin, the direct methods, and images that other modules send.

    desired properties  ──▶ DesiredProperties  ──▶ AppState.apply
    reported properties ◀── ReportedProperties ◀── AppState.snapshot
    direct methods      ◀─▶ MethodDispatcher   ◀─▶ DirectMethods
    input `frames`      ──▶ ImageRequests      ──▶ output `detections`

Calls and messages from the threads of the hub client come to the loop through two bounded queues. Images and
documents are processed on a few threads of the bridge.
"""

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from visionedge import __version__
from visionedge.app.direct_methods import DirectMethods
from visionedge.app.http_backend import HttpBackend
from visionedge.app.state import AppState, InboundStatistics, StateSnapshot
from visionedge.app.status import summarize_scene
from visionedge.config.documents import Document
from visionedge.errors import BusyError, VisionedgeError
from visionedge.frames.types import DEFAULT_MODEL, FrameResult, format_utc, utc_now
from visionedge.iothub.client import LinkTask, TaskOutcome
from visionedge.iothub.desired_properties import ConfigurationSources, DesiredProperties
from visionedge.iothub.direct_methods import MethodDispatcher
from visionedge.iothub.image_requests import (
    IMAGE_INPUT,
    SEQUENCE_NAME,
    ImageDropReason,
    ImageRequestDependencies,
    ImageRequests,
)
from visionedge.iothub.reported_properties import ReportedProperties
from visionedge.iothub.sdk import HubLink, InputMessage, MethodCall
from visionedge.runtime.build_identity import read_build_identity
from visionedge.runtime.limits import BoundedExecutor, MemoryBudget
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import LoopQueue
from visionedge.web.request_body import (
    MEMORY_BYTES,
    MEMORY_WAIT_S,
    decode_upload,
    estimate_decoding_bytes,
    is_supported_image,
)
from visionedge.web.responses import RequestError

log = logging.getLogger(__name__)

MAX_CAMERAS_BYTES = 17_000
"""200 cameras with the longest names; together with the acknowledgement below the 32 KB of a twin."""

MAX_COUNTS_BYTES = 4_000
"""Of the counts of zones and lines, as far as the states of the cameras leave room."""

COUNTS_INTERVAL_S = 60.0
"""Counts in the twin are so old at most: each change of the twin is a write to IoT Hub."""

_HEALTHY_STATES = ("live", "disabled", "ended")

_MORE_BYTES = 40
_POLL_INTERVAL_S = 1.0
_STOP_TIMEOUT_S = 1.0
_MAX_QUEUED_CALLS = 2_000
_MAX_PENDING_ANSWERS = 64
"""Answers on their way to the hub; calls beyond them are answered 503 at once."""

_MAX_QUEUED_MESSAGES = 8


class HubBridge:
    """The `HubListener` of the hub client. Those methods are called on any thread, all others on the loop.

    `desired` applies desired properties and the local document.

    Args:
        state: what desired properties are applied to, and what is reported.
        backend: answers direct methods and analyses images.
        call_soon: runs a function on the loop, from any thread.
        config_sources: where the configuration comes from.
        cancel_pending_model: cancels the download of a model for an earlier configuration.
        first_sequence: the sequence number of the first image of another module.
    """

    def __init__(
        self,
        state: AppState,
        backend: HttpBackend,
        call_soon: Callable[[Callable[[], None]], None],
        config_sources: ConfigurationSources,
        *,
        cancel_pending_model: Callable[[], None],
        first_sequence: int,
    ) -> None:
        self._state = state
        self._backend = backend
        self._call_soon = call_soon
        self._executor = BoundedExecutor(threads=2, limit=16, name="remote")
        # A message of 256 KB may hold an image of 40 megapixels.
        self._memory = MemoryBudget(MEMORY_BYTES, MEMORY_WAIT_S, "too many large pictures at once")
        self._calls: LoopQueue[MethodCall] = LoopQueue(
            lambda: call_soon(self._handle_calls), _MAX_QUEUED_CALLS
        )
        self._messages: LoopQueue[InputMessage] = LoopQueue(
            lambda: call_soon(self._handle_messages), _MAX_QUEUED_MESSAGES
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._started_utc = utc_now()
        self._connection_number = 0
        self._pending_answers = 0
        self._reported = ReportedProperties()
        self._counts = ReportedCounts()
        self.desired = DesiredProperties(
            config_sources, state, self._event, cancel_pending_model=cancel_pending_model
        )
        self._methods = MethodDispatcher(
            DirectMethods(state.snapshot, backend, self._executor, self.desired.validate_desired).methods()
        )
        dependencies = ImageRequestDependencies(
            self._analyse, self._send_result, lambda: state.snapshot().config.cameras, self._report_unanswered
        )
        self._image_requests = ImageRequests(dependencies, first_sequence)

    def __repr__(self) -> str:
        return f"<HubBridge {self.desired!r} {self._reported!r} {self._methods!r} {self._image_requests!r}>"

    # --- from the threads of the hub client and the SDK (`client.HubListener`) ------------------------------

    def twin(self, twin: Mapping[str, Any] | None, connection_number: int) -> None:
        """The twin was read."""
        self._call_soon(lambda: self._on_twin(twin, connection_number))

    def on_method_call(self, call: MethodCall) -> None:
        """A direct method was called."""
        self._calls.put(call)

    def on_message(self, message: InputMessage) -> None:
        """A message came to an input."""
        self._messages.put(message)

    # --- start and stop -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Report, answer and apply desired properties from now on; the delivery is in the state."""
        self._start_task(self._report())
        self._start_task(self._run_forever("applying desired properties", self.desired.run))
        self._start_task(self._run_forever("answering images of other modules", self._image_requests.run))

    async def close(self) -> None:
        """Cancel what is under way; open method calls get no answer."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_TIMEOUT_S)
        # Decoding an image can take seconds; the stop does not wait for it.
        self._executor.close(wait=False)

    def next_sequences(self) -> dict[str, int]:
        """The sequence number to store, so that numbers of images never repeat (`SequenceStore`)."""
        return {SEQUENCE_NAME: self._image_requests.next_sequence}

    def statistics(self) -> InboundStatistics:
        """The counts since the start."""
        return InboundStatistics(
            configurations=dict(self.desired.counts),
            patches=self._reported.patches,
            methods=dict(self._methods.counts),
            calls_dropped=self._calls.dropped,
            pictures_answered=self._image_requests.answered,
            pictures_dropped=dict(self._image_requests.dropped) | {"full": self._count_full()},
            config=self.desired.acknowledgement,
        )

    def _count_full(self) -> int:
        return self._image_requests.dropped["full"] + self._messages.dropped

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    async def _run_forever(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run work as long as the module runs, and start it again after an error."""
        while True:
            try:
                await work()
            except Exception:
                log.exception("%s failed; retrying in %g s", what, _POLL_INTERVAL_S)
            await asyncio.sleep(_POLL_INTERVAL_S)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task for IoT Hub ended with an error", exc_info=error)

    # --- the twin -------------------------------------------------------------------------------------------

    def _on_twin(self, twin: Mapping[str, Any] | None, connection_number: int) -> None:
        if connection_number != self._connection_number:
            self._connection_number = connection_number
            known = None if twin is None else twin.get("reported")
            self._reported.on_connected(known if isinstance(known, Mapping) else {})
        if twin is not None:
            self.desired.on_twin(twin)

    async def _report(self) -> None:
        failed = False
        while True:
            await asyncio.sleep(_POLL_INTERVAL_S)
            try:
                if self._reported.due():
                    self._report_now()
                failed = False
            except Exception:  # an error must not end the reports; log it once until one succeeds
                if not failed:
                    log.exception("reporting properties failed; retrying every %g s", _POLL_INTERVAL_S)
                failed = True

    def _report_now(self) -> None:
        state = self._state.snapshot()
        wanted = build_reported_properties(
            state, self.desired.acknowledgement, self._started_utc, self._counts.read(state)
        )
        patch = self._reported.next_patch(wanted)
        if patch is not None:
            self._submit_link_task(
                LinkTask(
                    "reporting", self._connection_number, partial(_send_patch, patch), self._on_report_settled
                )
            )

    def _on_report_settled(self, outcome: TaskOutcome) -> None:
        self._call_soon(lambda: self._reported.settle(outcome))

    def _event(self, code: str, text: str, details: Mapping[str, Any]) -> None:
        self._state.snapshot().send_event("module", code, text, details)

    # --- direct methods -------------------------------------------------------------------------------------

    def _handle_calls(self) -> None:
        for call in self._calls.drain():
            self._start_task(self._answer_call(call))

    async def _answer_call(self, call: MethodCall) -> None:
        if self._pending_answers >= _MAX_PENDING_ANSWERS:
            answer = self._methods.busy(call.name)
        else:
            answer = await self._methods.answer(call.name, call.payload)

        def send(link: HubLink) -> bool:
            link.answer(call.request_id, answer.status, answer.document)
            return True

        self._pending_answers += 1
        self._submit_link_task(
            LinkTask("answering a direct method", call.connection_number, send, self._on_answered)
        )

    def _on_answered(self, _outcome: TaskOutcome) -> None:
        """Called from any thread."""
        self._call_soon(self._release_answer_slot)

    def _release_answer_slot(self) -> None:
        self._pending_answers -= 1

    def _submit_link_task(self, link_task: LinkTask) -> None:
        if (delivery := self._state.snapshot().delivery) is not None:
            delivery.submit(link_task)
        else:
            link_task.done("lost")

    # --- images of other modules ----------------------------------------------------------------------------

    def _handle_messages(self) -> None:
        for message in self._messages.drain():
            self._image_requests.put(message)

    async def _analyse(self, body: bytes) -> FrameResult | ImageDropReason:
        if not is_supported_image(body):
            return "bad-picture"
        try:
            async with self._memory.hold(estimate_decoding_bytes(body)):
                picture = await self._executor.run(partial(decode_upload, body))
                return await self._backend.detect(picture)
        except RequestError:
            return "bad-picture"
        except BusyError:
            return "busy"
        except VisionedgeError as error:
            log.warning("an image of another module cannot be analysed: %s", redact(str(error)))
            return "failed"

    def _send_result(self, result: FrameResult, correlation_id: str) -> bool:
        delivery = self._state.snapshot().delivery
        return delivery is not None and delivery.answer(result, correlation_id)

    def _report_unanswered(self, reason: ImageDropReason, camera: str) -> None:
        camera = redact(camera)  # text of another module, which may hold secrets
        text = f"an image on input {IMAGE_INPUT} for {camera} got no answer: {reason}"
        log.warning("%s", text)
        self._event("input-picture-refused", text, {"camera": camera, "reason": reason})


class ReportedCounts:
    """The counts of zones and lines for the twin, read anew once every `COUNTS_INTERVAL_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due_s = -math.inf
        self._counts: Document = {}

    def read(self, state: StateSnapshot) -> Document:
        """For each camera with zones or lines its tracks, zones and lines, over all labels."""
        now_s = self._clock()
        scenes = state.read_scenes().cameras
        known = {name for name, scene in scenes.items() if scene["zones"] or scene["lines"]}
        if now_s >= self._due_s or known != self._counts.keys():
            self._due_s = now_s + COUNTS_INTERVAL_S
            self._counts = {name: _build_counts(scenes[name]) for name in sorted(known)}
        return self._counts


def _build_counts(scene: Mapping[str, Any]) -> Document:
    summary = summarize_scene(scene).dump()
    for rules in ("zones", "lines"):
        keys = _make_twin_keys(summary[rules])
        summary[rules] = {keys[name]: counts for name, counts in summary[rules].items()}
    return {key: value for key, value in summary.items() if value != {}}


def _make_twin_keys(names: Iterable[str]) -> dict[str, str]:
    """A key for each name: IoT Hub takes no '.', '$' or blank in one. Two names get two keys."""
    taken: dict[str, str] = {}
    # A name that needs no change keeps it, whatever else is configured.
    for name in sorted(names, key=lambda each: (bool(re.search(r"[.$ ]", each)), each)):
        key = base = re.sub(r"[.$ ]", "_", name)
        number = 2
        while key in taken:
            key, number = f"{base}_{number}", number + 1
        taken[key] = name
    return {name: key for key, name in taken.items()}


def fit_counts(counts: Mapping[str, Document], limit_bytes: int) -> Document:
    """The counts by camera within a limit; the rest is counted."""
    left_bytes = min(limit_bytes, MAX_COUNTS_BYTES)
    kept: Document = {}
    for name, scene in counts.items():
        left_bytes -= len(json.dumps({name: scene}))
        if left_bytes < _MORE_BYTES:
            more = {"_more": f"{len(counts) - len(kept)} cameras more"}
            return {**kept, **more} if limit_bytes >= _MORE_BYTES else {}
        kept[name] = scene
    return kept


def build_reported_properties(
    state: StateSnapshot,
    acknowledgement: Mapping[str, Any],
    started: datetime,
    counts: Mapping[str, Document],
) -> Document:
    """The reported properties; without nulls, which would delete keys in the twin."""
    cameras = fit_camera_states(_camera_states(state))
    document: Document = {
        "config": dict(acknowledgement),
        "engine": _build_engine_properties(state),
        "cameras": cameras,
        "module": {
            "version": __version__,
            "build": str(read_build_identity()),
            "started": format_utc(started),
        },
    }
    if fitting := fit_counts(counts, MAX_CAMERAS_BYTES - len(json.dumps(cameras))):
        document["counts"] = fitting
    if state.loaded_model is not None:
        document["model"] = {"name": state.loaded_model.name[:256], "sha256": state.loaded_model.sha256}
    if named := {name: loaded for name, loaded in state.models.items() if name}:
        document["models"] = {
            name: {
                "file": loaded.model.path.stem[:256],
                "sha256": loaded.model.sha256,
                "engine": _build_engine_properties(state, name),
            }
            for name, loaded in named.items()
        }
    return document


def _build_engine_properties(state: StateSnapshot, model: str = DEFAULT_MODEL) -> Document:
    info = state.engine_info(model)
    if info is None:
        return {"requested": state.config.inference.device, "reasonCode": "warming-up"}
    device = info.device
    return {
        "requested": device.requested,
        "effective": device.effective,
        "precision": info.choice.precision,
        "reasonCode": device.code,
        "since": format_utc(device.since_utc),
    }


def _camera_states(state: StateSnapshot) -> dict[str, str]:
    running = state.running_cameras
    return {
        name: running[name].status().state if name in running else "disabled" for name in state.config.cameras
    }


def fit_camera_states(states: Mapping[str, str]) -> Document:
    """The states by name, within `MAX_CAMERAS_BYTES`: unhealthy cameras first, the rest is counted."""
    left_bytes = MAX_CAMERAS_BYTES
    kept: Document = {}
    for name in sorted(states, key=lambda name: (states[name] in _HEALTHY_STATES, name)):
        left_bytes -= len(json.dumps({name: states[name]}))
        if left_bytes < 0:
            kept["_more"] = f"{len(states) - len(kept)} cameras more"
            break
        kept[name] = states[name]
    return dict(sorted(kept.items()))


def _send_patch(patch: Mapping[str, Any], link: HubLink) -> bool:
    return link.report(patch)
