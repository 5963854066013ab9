"""The direct methods of IoT Hub: what each one does, and how its answer is kept to the size of the hub."""

import base64
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from visionedge import __version__
from visionedge.app.http_backend import HttpBackend
from visionedge.app.state import SnapshotReader
from visionedge.app.support_bundle import SupportBundle
from visionedge.camera.sources.images import read_picture_size
from visionedge.config.documents import Document
from visionedge.config.schema import Config
from visionedge.errors import BusyError, ConfigError, SourceError
from visionedge.frames.types import FrameResult, format_utc, utc_now
from visionedge.iothub.direct_methods import MAX_RESULT_BYTES, DirectMethod, MethodError, measure_result_bytes
from visionedge.runtime.limits import BoundedExecutor
from visionedge.runtime.redaction import redact, redact_document
from visionedge.web.jpeg import encode_jpeg_within

T = TypeVar("T")

MAX_JPEG_BYTES = 88_000
"""118,000 characters in base64: an answer of 120,000 bytes still holds it."""

_MAX_PROBLEM_CHARACTERS = 500
_MAX_NODES = 20
_CAMERA_FIELD: Mapping[str, type] = {"camera": str}


class DirectMethods:
    """What each method does. For the loop; slow work runs on the threads of `executor`.

    `validate` reads desired properties as the module would, and raises ConfigError with every problem.
    """

    def __init__(
        self,
        snapshot: SnapshotReader,
        backend: HttpBackend,
        executor: BoundedExecutor,
        validate: Callable[[Mapping[str, Any]], Config],
    ) -> None:
        self._snapshot = snapshot
        self._backend = backend
        self._executor = executor
        self._validate = validate
        self._bundle = SupportBundle(self._make_bundle)

    def methods(self) -> dict[str, DirectMethod]:
        """The methods by name, with deadlines below 5 s, the shortest timeout that callers can set."""
        return {
            "ping": DirectMethod(self.ping, 1.0, None),
            "status": DirectMethod(self.status, 4.0, {"doctor": bool}),
            "snapshot": DirectMethod(self.snapshot, 4.5, {**_CAMERA_FIELD, "annotate": bool}),
            "validateConfig": DirectMethod(self.validate_config, 4.0, None),
            "restartCamera": DirectMethod(self.restart_camera, 4.0, _CAMERA_FIELD),
            "bundle": DirectMethod(self.bundle, 4.5, {"id": str, "chunk": int}),
        }

    async def ping(self, _given: Mapping[str, Any]) -> Document:
        """The version of the module, its uptime and its clock."""
        uptime_s = (time.monotonic_ns() - self._snapshot().started_ns) / 1e9
        return {"version": __version__, "at": format_utc(utc_now()), "uptimeSeconds": round(uptime_s, 3)}

    async def status(self, payload: Mapping[str, Any]) -> Document:
        """The status object of HTTP, shortened to the size of an answer; on request with a doctor report."""
        # First, because a report takes seconds: if this call times out, the next one finds the report ready.
        asked = {"doctor": await self._backend.doctor()} if payload.get("doctor", False) else {}
        return await self._run_bounded(partial(fit_status, {**self._backend.status(), **asked}))

    async def snapshot(self, payload: Mapping[str, Any]) -> Document:
        """The newest analysed frame of a camera as JPEG; the name may be left out if there is one camera."""
        name = self._resolve_camera(payload)
        result = self._backend.latest(name)
        if result is None:
            raise MethodError(503, "no_frame_yet", f"camera '{name}' has no analysed frame yet")
        annotated = bool(payload.get("annotate", False))
        try:
            return await self._run_bounded(partial(_build_snapshot, result, annotated))
        except SourceError as error:
            raise MethodError(503, "no_picture", str(error)) from None

    async def validate_config(self, payload: Mapping[str, Any]) -> Document:
        """The problems that a desired document would have; nothing is changed."""
        try:
            await self._run_bounded(partial(self._validate, payload))
        except ConfigError as error:
            return fit_problems([redact(problem) for problem in error.problems])
        return fit_problems([])

    async def restart_camera(self, payload: Mapping[str, Any]) -> Document:
        """Close a camera and open it again."""
        name = self._resolve_camera(payload)
        camera_registry = self._snapshot().camera_registry
        if camera_registry is None or name not in camera_registry.by_name:
            raise MethodError(409, "not_running", f"camera '{name}' does not run: it is disabled")
        camera_registry.restart(name)
        return {"camera": name, "state": camera_registry.by_name[name].status().state}

    async def bundle(self, payload: Mapping[str, Any]) -> Document:
        """A chunk of the support bundle; see `SupportBundle.answer`."""
        try:
            return await self._bundle.answer(payload)
        except BusyError as error:
            raise MethodError(503, "busy", str(error)) from None

    async def _make_bundle(self) -> bytes:
        return await self._backend.bundle()

    def _resolve_camera(self, payload: Mapping[str, Any]) -> str:
        """The name of the camera in a payload.

        Raises:
            MethodError: it is missing, or no camera has it.
        """
        known = self._snapshot().config.cameras
        name = payload.get("camera")
        if name is None and len(known) == 1:
            (name,) = known
        if name is None:
            raise MethodError(400, "bad_payload", "give the name of a camera, such as {'camera': 'dock'}")
        if name not in known:
            raise MethodError(404, "unknown_camera", f"there is no camera '{redact(name)[:64]}'")
        return str(name)

    async def _run_bounded(self, work: Callable[[], T]) -> T:
        try:
            return await self._executor.run(work)
        except BusyError as error:
            raise MethodError(503, "busy", str(error)) from None


def fit_status(status: Document) -> Document:
    """The status without secrets, in the size of an answer: fewer keys of each camera, then fewer cameras.

    The scenes of the cameras are left out where they are too large.

    The measurements behind the engine's plan are only in `/api/v1/status`.
    """
    document: Document = _drop_tables(redact_document(status))
    if measure_result_bytes(document) <= MAX_RESULT_BYTES:
        return document
    scenes = document.get("scenes")
    if isinstance(scenes, Mapping) and scenes.get("cameras"):
        omitted = len(scenes["cameras"])
        document["scenes"] = {**scenes, "cameras": {}, "camerasOmitted": omitted}
        if measure_result_bytes(document) <= MAX_RESULT_BYTES:
            return document
    cameras = [{"name": camera["name"], "state": camera["state"]} for camera in document["cameras"]]
    # Apart from the cameras and their scenes, only `capacity` grows with their number.
    document |= {"cameras": [], "camerasOmitted": len(cameras), "capacity": None}
    left_bytes = MAX_RESULT_BYTES - measure_result_bytes(document)
    for camera in cameras:
        left_bytes -= measure_result_bytes(camera) + 2
        if left_bytes < 0:
            break
        document["cameras"].append(camera)
        document["camerasOmitted"] -= 1
    return document


def _drop_tables(status: Document) -> Document:
    engine = status.get("engine")
    if not isinstance(engine, Mapping) or "plan" not in engine:
        return status
    plan = {key: value for key, value in engine["plan"].items() if key != "measured"}
    nodes = engine.get("nodesOnCpu", [])
    brief = {**engine, "plan": plan, "nodesOnCpu": nodes[:_MAX_NODES]}
    if len(nodes) > _MAX_NODES:
        brief["nodesOnCpuOmitted"] = len(nodes) - _MAX_NODES
    return {**status, "engine": brief}


def fit_problems(problems: list[str]) -> Document:
    """The answer of `validateConfig`: as many problems as fit, and their number."""
    shown: list[str] = []
    left_bytes = MAX_RESULT_BYTES - 200
    for problem in problems:
        text = problem[:_MAX_PROBLEM_CHARACTERS]
        left_bytes -= measure_result_bytes(text) + 2
        if left_bytes < 0:
            break
        shown.append(text)
    return {"valid": not problems, "count": len(problems), "problems": shown}


def _build_snapshot(result: FrameResult, annotated: bool) -> Document:
    jpeg = encode_jpeg_within(result, MAX_JPEG_BYTES, annotated=annotated)
    width_px, height_px = read_picture_size(jpeg) or (0, 0)
    return {
        "camera": result.frame.camera,
        "sequence": result.frame.sequence,
        "epoch": result.frame.epoch,
        "capturedAt": format_utc(result.frame.captured_utc),
        "width": width_px,
        "height": height_px,
        "contentType": "image/jpeg",
        "jpeg": base64.b64encode(jpeg).decode(),
    }
