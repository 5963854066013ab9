"""What the HTTP handlers ask of the running module: `web.backend.Backend`, answered from its state."""

import json
from datetime import datetime
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionedge.app import status as documents
from visionedge.app.metrics import Metrics
from visionedge.app.scene_host import SceneHost
from visionedge.app.state import SnapshotReader
from visionedge.config.documents import Document
from visionedge.engine.interface import EngineInfo
from visionedge.engine.lanes import LanePool, infer_frames, make_frame
from visionedge.errors import BusyError
from visionedge.frames.types import DEFAULT_MODEL, FrameResult, Picture
from visionedge.ops.doctor.bundle import pack_bundle
from visionedge.ops.doctor.facts import DoctorRequest, RunningEngine
from visionedge.ops.doctor.host import this_host
from visionedge.ops.doctor.report import CachedReport, examine
from visionedge.runtime import logs
from visionedge.runtime.limits import BoundedExecutor
from visionedge.runtime.redaction import redact_document
from visionedge.scene.events import EventFilter
from visionedge.scene.totals import CountRow
from visionedge.web.backend import ModelMetadata, UnknownModelError
from visionedge.web.latest_results import Subscription

_MAX_CONCURRENT_REQUESTS = 4
_MAX_LOG_READERS = 16


class HttpBackend:
    """Answers HTTP requests. Every method is for the loop; it returns at once or is awaited."""

    def __init__(
        self,
        snapshot: SnapshotReader,
        lanes: LanePool,
        metrics: Metrics,
        scene_host: SceneHost,
    ) -> None:
        self._snapshot = snapshot
        self._scene_host = scene_host
        self._lanes = lanes
        self._metrics = metrics
        # Threads of their own, so that requests take none from the module's housekeeping.
        self._executor = BoundedExecutor(
            threads=_MAX_CONCURRENT_REQUESTS, limit=_MAX_CONCURRENT_REQUESTS, name="request"
        )
        self._doctor_executor = BoundedExecutor(threads=1, limit=1, name="doctor")
        self._doctor_report = CachedReport(self._examine)
        # One thread, as the log is read by one at a time; its own, as a disk may hang.
        self._log_executor = BoundedExecutor(
            threads=1, limit=_MAX_LOG_READERS, name="scene-log", busy="too many requests read the scenes' log"
        )

    def health(self) -> list[str]:
        """Why the module is not healthy; empty when it is."""
        return ["a thread that the module cannot do without has ended"] if self._snapshot().failed else []

    def readiness(self) -> list[str]:
        """Why the module is not ready."""
        return self._snapshot().readiness()

    def status(self) -> Document:
        """Version, uptime, engine, model, cameras, hub."""
        return documents.build_status(self._snapshot())

    def cameras(self) -> list[Document]:
        """One object per configured camera."""
        return documents.build_cameras(self._snapshot())

    def camera(self, name: str) -> Document | None:
        """One camera's object."""
        return documents.build_camera(self._snapshot(), name)

    def scene(self, name: str) -> Document | None:
        """The tracks, zones and lines of a camera."""
        return self._scene_host.document(name) if self.has_camera(name) else None

    def rules(self, camera: str | None) -> list[str]:
        """The zones and lines of a camera, or of all."""
        configured = self._snapshot().config.cameras
        wanted = configured.values() if camera is None else [configured[camera]]
        return list(dict.fromkeys(name for each in wanted for name in (*each.zones, *each.lines)))

    async def scene_events(
        self, wanted: EventFilter, *, before: str | None = None, after: str | None = None, limit: int
    ) -> list[Document]:
        """The newest scene events first, from the log."""
        read = partial(self._scene_host.read_events, wanted, before=before, after=after, limit=limit)
        return await self._log_executor.run(read)

    async def scene_counts(
        self, camera: str, begin: datetime, end: datetime, by: Literal["hour", "day"], *, limit: int
    ) -> list[CountRow]:
        """What was counted in each hour or day."""
        read = partial(self._scene_host.read_counts, camera, begin, end, by, limit)
        return await self._log_executor.run(read)

    def has_camera(self, name: str) -> bool:
        """Whether a camera is configured under this name."""
        return name in self._snapshot().config.cameras

    def latest(self, name: str) -> FrameResult | None:
        """The newest result of a camera."""
        return self._snapshot().latest_results.latest(name)

    async def wait_for_newer(self, name: str, after: int | None, timeout_s: float) -> FrameResult | None:
        """Wait for a result with a sequence above `after`; None after `timeout_s`."""
        return await self._snapshot().latest_results.wait_for_newer(name, after, timeout_s)

    def subscribe(self, camera: str | None, *, with_events: bool = False) -> Subscription:
        """The results from now on, of one camera or of all; also their scene events."""
        return self._snapshot().latest_results.subscribe(camera, with_events=with_events)

    def subscribe_events(self, wanted: EventFilter) -> Subscription:
        """The scene events from now on."""
        return self._snapshot().latest_results.subscribe_events(wanted)

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._metrics.render()

    async def doctor(self) -> Document:
        """The report of `doctor`, made at most once a minute."""
        return await self._doctor_report.report()

    async def bundle(self) -> bytes:
        """The support bundle, a zip without secrets.

        Raises:
            BusyError: a report of `doctor` is being made.
        """
        state, request = self._snapshot(), self._doctor_request()
        module = {
            "module/status.json": json.dumps(redact_document(self.status())),
            "module/cameras.json": json.dumps(redact_document({"cameras": self.cameras()})),
            "module/ready.json": json.dumps({"reasons": self.readiness()}),
            "module/metrics.txt": self.metrics().decode(),
            "module/log.txt": self.log(),
        }

        def make() -> bytes:
            host = this_host(state.environ)
            return pack_bundle(examine(request, host), state.config, host, module)

        return await self._doctor_executor.run(make)

    async def _examine(self) -> Document:
        request, environ = self._doctor_request(), self._snapshot().environ
        return await self._doctor_executor.run(lambda: examine(request, this_host(environ)).document())

    def _doctor_request(self) -> DoctorRequest:
        state = self._snapshot()
        info = state.engine_info()
        running = _describe_running_engine(info) if info else None
        return DoctorRequest(state.config.inference.device, state.config, state.data, running)

    def log(self) -> str:
        """The newest lines of the log."""
        return logs.read_recent_log()

    def models(self) -> list[ModelMetadata]:
        """The models with an engine, for the Open Inference Protocol."""
        state = self._snapshot()
        max_batch = state.config.inference.max_batch
        return [documents.build_model_metadata(info, max_batch) for info in state.engine_infos().values()]

    def model_readiness(self, name: str) -> str | None:
        """Why a model does not answer now."""
        return self._snapshot().readiness_of(self._find_model(name))

    async def detect(self, picture: Picture, model: str | None = None) -> FrameResult:
        """Analyse one picture of a request.

        Raises:
            UnknownModelError: no model has this name.
            BusyError: the engine is not ready, or too many pictures are in work.
        """
        key = self._find_model(model)
        self._admit(key)

        def analyse() -> FrameResult:
            with self._lanes.use(model=key) as running:
                frame = make_frame(picture, running.engine)
                return infer_frames([frame], running.engine, running.selection)[0]

        return await self._executor.run(analyse)

    async def infer_rows(self, images: NDArray[np.uint8], model: str) -> NDArray[np.float32]:
        """Run a compiled model on uint8 images (n, H, W, 3) of its input size; float32 rows (n, k, 6).

        Raises:
            UnknownModelError, BusyError: as `detect`.
        """
        key = self._find_model(model)
        self._admit(key)

        def infer() -> NDArray[np.float32]:
            with self._lanes.use(model=key) as running:
                return running.engine.infer(images).rows

        return await self._executor.run(infer)

    def _find_model(self, name: str | None) -> str:
        """The key of the model that a request names: its name in `models`, or `DEFAULT_MODEL`."""
        state = self._snapshot()
        default = state.loaded_model
        if name is None or (default is not None and name == default.name):
            return DEFAULT_MODEL
        if name in state.config.models:
            return name
        known = [] if default is None else [default.name]
        raise UnknownModelError(
            f"no model is called '{name[:100]}'; there are: {', '.join([*known, *state.config.models])}"
        )

    def _admit(self, model: str) -> None:
        state = self._snapshot()
        if state.stopping:
            raise BusyError("stopping")
        if (reason := state.readiness_of(model)) is not None:
            raise BusyError(reason)
        if self._executor.is_full:
            raise BusyError("too many pictures at once")

    def close(self) -> list[str]:
        """End the threads; returns the names of those that hang. Blocks for a bounded time."""
        executors = (self._executor, self._doctor_executor, self._log_executor)
        return [name for executor in executors for name in executor.close()]


def _describe_running_engine(info: EngineInfo) -> RunningEngine:
    """What the doctor reports of the engine in use."""
    device, speed_check = info.device, info.device_check.speed_check
    return RunningEngine(
        device,
        info.node_placement,
        speed_check.doubt(device.effective) if speed_check else None,
        info.replicas,
    )
