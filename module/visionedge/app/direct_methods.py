"""The direct methods of the contract, over the rooms of the running module."""

import base64
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from visionedge import __version__
from visionedge.app.http_backend import Facade
from visionedge.app.state import Rooms
from visionedge.camera.sources.images import picture_size
from visionedge.config.documents import Document
from visionedge.config.schema import Config
from visionedge.errors import ConfigError, SourceError
from visionedge.frames.types import Result, utc_now, utc_text
from visionedge.iothub.direct_methods import MAX_ANSWER_BYTES, Method, MethodError, answer_bytes
from visionedge.runtime.redaction import redact, redact_document
from visionedge.web.backend import Busy
from visionedge.web.jpeg import Desk, pack_within

T = TypeVar("T")

MAX_JPEG_BYTES = 88_000
"""As base64 in an answer below 120,000 bytes."""

_MOST_PROBLEM_CHARACTERS = 500
_MOST_NODES = 20
_CAMERA: Mapping[str, type] = {"camera": str}


class Calls:
    """What each method does. On the loop; what takes long is done at the desk.

    `judge` reads a desired document as the module would, and raises ConfigError with every problem.
    """

    def __init__(
        self, rooms: Rooms, view: Facade, desk: Desk, judge: Callable[[Mapping[str, Any]], Config]
    ) -> None:
        self._rooms = rooms
        self._view = view
        self._desk = desk
        self._judge = judge

    def methods(self) -> dict[str, Method]:
        """The methods by name, with deadlines below the least time that IoT Hub lets callers wait (5 s)."""
        return {
            "ping": Method(self.ping, 1.0, None),
            "status": Method(self.status, 4.0, {"doctor": bool}),
            "snapshot": Method(self.snapshot, 4.5, {**_CAMERA, "annotate": bool}),
            "validateConfig": Method(self.validate_config, 4.0, None),
            "restartCamera": Method(self.restart_camera, 4.0, _CAMERA),
        }

    async def ping(self, _given: Mapping[str, Any]) -> Document:
        """The module lives: its version, and the time as it knows it."""
        uptime_s = (time.monotonic_ns() - self._rooms.started_ns) / 1e9
        return {"version": __version__, "at": utc_text(utc_now()), "uptimeSeconds": round(uptime_s, 3)}

    async def status(self, given: Mapping[str, Any]) -> Document:
        """The status object of HTTP, cut where there are very many cameras; the doctor's report if asked."""
        # First, as it may take its time: a call that comes too early finds it done when it is repeated.
        asked = {"doctor": await self._view.doctor()} if given.get("doctor", False) else {}
        return await self._at_desk(partial(fitted_status, {**self._view.status(), **asked}))

    async def snapshot(self, given: Mapping[str, Any]) -> Document:
        """The picture of the newest frame of a camera; without a name, of the only one."""
        name = self._camera(given)
        result = self._view.latest(name)
        if result is None:
            raise MethodError(503, "no_frame_yet", f"camera '{name}' has no analysed frame yet")
        annotated = bool(given.get("annotate", False))
        try:
            return await self._at_desk(partial(_snapshot, result, annotated))
        except SourceError as error:
            raise MethodError(503, "no_picture", str(error)) from None

    async def validate_config(self, given: Mapping[str, Any]) -> Document:
        """What would become of a desired document; nothing is changed."""
        try:
            await self._at_desk(partial(self._judge, given))
        except ConfigError as error:
            return fitted_problems([redact(problem) for problem in error.problems])
        return fitted_problems([])

    async def restart_camera(self, given: Mapping[str, Any]) -> Document:
        """Close a camera and open it anew."""
        name = self._camera(given)
        fleet = self._rooms.fleet
        if fleet is None or name not in fleet.by_name:
            raise MethodError(409, "not_running", f"camera '{name}' does not run; it is disabled")
        fleet.restart(name)
        return {"camera": name, "state": fleet.by_name[name].status().state}

    def _camera(self, given: Mapping[str, Any]) -> str:
        """The camera that is meant."""
        known = self._rooms.config.cameras
        name = given.get("camera")
        if name is None and len(known) == 1:
            (name,) = known
        if name is None:
            raise MethodError(400, "bad_payload", "give the name of a camera, such as {'camera': 'dock'}")
        if name not in known:
            raise MethodError(404, "unknown_camera", f"there is no camera '{redact(name)[:64]}'")
        return str(name)

    async def _at_desk(self, work: Callable[[], T]) -> T:
        try:
            return await self._desk.run(work)
        except Busy as error:
            raise MethodError(503, "busy", str(error)) from None


def fitted_status(status: Document) -> Document:
    """The status without secrets, in the size of an answer: less of each camera, then fewer cameras.

    The tables behind the engine's plan stay at `/api/v1/status`, for people at the device.
    """
    document: Document = _without_tables(redact_document(status))
    if answer_bytes(document) <= MAX_ANSWER_BYTES:
        return document
    cameras = [{"name": camera["name"], "state": camera["state"]} for camera in document["cameras"]]
    # Beside the cameras only the loads by camera can be long.
    document |= {"cameras": [], "camerasOmitted": len(cameras), "capacity": None}
    left_bytes = MAX_ANSWER_BYTES - answer_bytes(document)
    for camera in cameras:
        left_bytes -= answer_bytes(camera) + 2
        if left_bytes < 0:
            break
        document["cameras"].append(camera)
        document["camerasOmitted"] -= 1
    return document


def _without_tables(status: Document) -> Document:
    engine = status.get("engine")
    if not isinstance(engine, Mapping) or "plan" not in engine:
        return status
    plan = {key: value for key, value in engine["plan"].items() if key != "measured"}
    nodes = engine.get("nodesOnCpu", [])
    brief = {**engine, "plan": plan, "nodesOnCpu": nodes[:_MOST_NODES]}
    if len(nodes) > _MOST_NODES:
        brief["nodesOnCpuOmitted"] = len(nodes) - _MOST_NODES
    return {**status, "engine": brief}


def fitted_problems(problems: list[str]) -> Document:
    """The answer of `validateConfig`; of very many problems the first ones, and how many there are."""
    told: list[str] = []
    left_bytes = MAX_ANSWER_BYTES - 200
    for problem in problems:
        text = problem[:_MOST_PROBLEM_CHARACTERS]
        left_bytes -= answer_bytes(text) + 2
        if left_bytes < 0:
            break
        told.append(text)
    return {"valid": not problems, "count": len(problems), "problems": told}


def _snapshot(result: Result, annotated: bool) -> Document:
    jpeg = pack_within(result, MAX_JPEG_BYTES, annotated=annotated)
    width_px, height_px = picture_size(jpeg) or (0, 0)
    return {
        "camera": result.frame.camera,
        "sequence": result.frame.sequence,
        "epoch": result.frame.epoch,
        "capturedAt": utc_text(result.frame.captured_utc),
        "width": width_px,
        "height": height_px,
        "contentType": "image/jpeg",
        "jpeg": base64.b64encode(jpeg).decode(),
    }
