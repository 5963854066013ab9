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
from visionedge.frames.types import FrameResult, Picture
from visionedge.ops.doctor.bundle import pack_bundle
from visionedge.ops.doctor.facts import DoctorRequest, RunningEngine
from visionedge.ops.doctor.host import this_host
from visionedge.ops.doctor.report import CachedReport, examine
from visionedge.runtime import logs
from visionedge.runtime.limits import BoundedExecutor
from visionedge.runtime.redaction import redact_document
from visionedge.scene.events import EventFilter
from visionedge.scene.totals import CountRow
from visionedge.web.backend import ModelMetadata
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

    def model(self) -> ModelMetadata | None:
        """The loaded model, for the Open Inference Protocol."""
        state = self._snapshot()
        if (info := state.engine_info()) is None:
            return None
        return documents.build_model_facts(info, state.config.inference.max_batch)

    async def detect(self, picture: Picture) -> FrameResult:
        """Analyse one picture of a request.

        Raises:
            BusyError: the engine is not ready, or too many pictures are in work.
        """
        self._admit()

        def analyse() -> FrameResult:
            with self._lanes.use() as running:
                frame = make_frame(picture, running.engine)
                return infer_frames([frame], running.engine, running.selection)[0]

        return await self._executor.run(analyse)

    async def infer_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the compiled model on uint8 images (n, H, W, 3) of its input size; float32 rows (n, k, 6).

        Raises:
            BusyError: as `detect`.
        """
        self._admit()

        def infer() -> NDArray[np.float32]:
            with self._lanes.use() as running:
                return running.engine.infer(images).rows

        return await self._executor.run(infer)

    def _admit(self) -> None:
        if reasons := self._snapshot().readiness():
            raise BusyError("; ".join(reasons))
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
