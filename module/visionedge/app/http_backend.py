"""What HTTP sees of the running module: `web.view.ModuleView` over its rooms."""

import numpy as np
from numpy.typing import NDArray

from visionedge.app import status as report
from visionedge.app.metrics import Metrics
from visionedge.app.state import AppState
from visionedge.engine.interface import EngineInfo
from visionedge.engine.lanes import LanePool, infer_frames, make_frame
from visionedge.frames.types import FrameResult, Picture
from visionedge.ops.doctor.facts import DoctorRequest, RunningEngine
from visionedge.ops.doctor.host import this_host
from visionedge.ops.doctor.report import CachedReport, examine
from visionedge.runtime import logs
from visionedge.web.backend import BusyError, Document, ModelMetadata
from visionedge.web.jpeg import BoundedExecutor
from visionedge.web.latest_results import Subscription

_MAX_CONCURRENT_REQUESTS = 4


class HttpBackend:
    """Answers for HTTP; every method is called on the loop and returns at once or is awaited."""

    def __init__(self, state: AppState, lineup: LanePool, metrics: Metrics) -> None:
        self._state = state
        self._lineup = lineup
        self._metrics = metrics
        # Of their own: what requests take must not be taken from the module's housekeeping.
        self._executor = BoundedExecutor(
            threads=_MAX_CONCURRENT_REQUESTS, limit=_MAX_CONCURRENT_REQUESTS, name="request"
        )
        self._doctor_executor = BoundedExecutor(threads=1, limit=1, name="doctor")
        self._doctor_report = CachedReport(self._examine)

    def health(self) -> list[str]:
        """Why the module is not healthy."""
        return ["a thread that must live has died"] if self._state.failed else []

    def readiness(self) -> list[str]:
        """Why it cannot answer yet."""
        return self._state.readiness()

    def status(self) -> Document:
        """Version, uptime, engine, model, cameras, hub."""
        return report.build_status(self._state)

    def cameras(self) -> list[Document]:
        """One object per configured camera."""
        return report.build_cameras(self._state)

    def camera(self, name: str) -> Document | None:
        """One camera's object."""
        return report.build_camera(self._state, name)

    def has_camera(self, name: str) -> bool:
        """Whether a camera is configured under this name."""
        return name in self._state.config.cameras

    def latest(self, name: str) -> FrameResult | None:
        """The newest result of a camera."""
        return self._state.latest_results.latest(name)

    async def wait_for_newer(self, name: str, after: int | None, timeout_s: float) -> FrameResult | None:
        """The newest result above `after`, waited for."""
        return await self._state.latest_results.wait_for_newer(name, after, timeout_s)

    def subscribe(self, camera: str | None) -> Subscription:
        """Every frame object from now on."""
        return self._state.latest_results.subscribe(camera)

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._metrics.render()

    async def doctor(self) -> Document:
        """The way to the GPU, examined at most once a minute."""
        return await self._doctor_report.report()

    async def _examine(self) -> Document:
        state = self._state
        info = state.engine_info()
        running = _describe_running_engine(info) if info else None
        request = DoctorRequest(state.config.inference.device, state.config, state.data, running)
        return await self._doctor_executor.run(lambda: examine(request, this_host(state.environ)).document())

    def log(self) -> str:
        """The newest lines of the log."""
        return logs.read_recent_log()

    def model(self) -> ModelMetadata | None:
        """The loaded model, for the Open Inference Protocol."""
        info = self._state.engine_info()
        if info is None:
            return None
        return report.build_model_facts(info, self._state.config.inference.max_batch)

    async def detect(self, picture: Picture) -> FrameResult:
        """Analyse one picture of a request."""
        self._admit()

        def analysed() -> FrameResult:
            with self._lineup.use() as running:
                frame = make_frame(picture, running.engine)
                return infer_frames([frame], running.engine, running.selection)[0]

        return await self._executor.run(analysed)

    async def infer_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the compiled model on pictures at its own size."""
        self._admit()

        def inferred() -> NDArray[np.float32]:
            with self._lineup.use() as running:
                return running.engine.infer(images).rows

        return await self._executor.run(inferred)

    def _admit(self) -> None:
        if reasons := self._state.readiness():
            raise BusyError("; ".join(reasons))
        if self._executor.is_full:
            raise BusyError("too many pictures at once")

    def close(self) -> list[str]:
        """End the threads; the names of those that hang. Blocks for a bounded time."""
        return self._executor.close() + self._doctor_executor.close()


def _describe_running_engine(info: EngineInfo) -> RunningEngine:
    """The engine, as the doctor looks at it."""
    device, speed_check = info.device, info.device_check.speed_check
    return RunningEngine(
        device, info.node_placement, speed_check.doubt(device.effective) if speed_check else None
    )
