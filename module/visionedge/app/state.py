"""The rooms of a running module side by side, as far as they are built: what reports and HTTP look at."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionedge.app.load_meter import LoadMeter
from visionedge.app.overload_policy import OverloadStatus
from visionedge.camera.camera import Camera, CameraStatus
from visionedge.camera.registry import CameraRegistry
from visionedge.config.schema import Config
from visionedge.engine.batcher import Batcher
from visionedge.engine.interface import Engine, EngineEvent, EngineInfo
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.frames.types import FrameResult
from visionedge.iothub.delivery import Delivery
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.model.provider import ModelProvider
from visionedge.runtime.threads import LoopQueue
from visionedge.web.latest_results import LatestResults


@dataclass(frozen=True, slots=True)
class InboundStatistics:
    """Counts since the start of what IoT Hub and other modules sent to this module.

    `configurations` by outcome, `patches` of reported properties, `methods` by name and status,
    `calls_dropped` because too many came at once, images of other modules. `config` is the last
    acknowledgement.
    """

    configurations: Mapping[str, int] = field(default_factory=dict)
    patches: int = 0
    methods: Mapping[tuple[str, int], int] = field(default_factory=dict)
    calls_dropped: int = 0
    pictures_answered: int = 0
    pictures_dropped: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class AppState:
    """What the service has built. Loop only; None where a room is not there yet."""

    config: Config
    data: Path
    environ: Mapping[str, str]
    batcher: Batcher
    loop_queue: LoopQueue[FrameResult | CameraStatus | EngineEvent]
    started_ns: int = field(default_factory=time.monotonic_ns)
    latest_results: LatestResults = field(default_factory=LatestResults)
    meter: LoadMeter = field(default_factory=LoadMeter)
    overload_status: OverloadStatus = field(default_factory=OverloadStatus)
    loaded_model: Model | None = None
    selection: Selection | None = None
    frame_pool: SharedFramePool | None = None
    camera_registry: CameraRegistry | None = None
    engine: Engine | None = None
    requested_engine: Engine | None = None
    """The engine of the configuration, while a substitute computes in its place; else None."""
    delivery: Delivery | None = None
    waiting_reason: str | None = None
    inbound_statistics: Callable[[], InboundStatistics] | None = None
    supply: ModelProvider | None = None
    stopping: bool = False
    failed: bool = False

    @staticmethod
    def of(config: Config, data: Path, environ: Mapping[str, str], wake: Callable[[], None]) -> "AppState":
        """The rooms that are there from the beginning; `wake` is the outbox's."""
        inference = config.inference
        batcher = Batcher(inference.max_batch, int(inference.max_age_seconds * 1e9))
        return AppState(config, data, environ, batcher, LoopQueue(wake))

    @property
    def running_cameras(self) -> Mapping[str, Camera]:
        """The cameras that run."""
        return {} if self.camera_registry is None else self.camera_registry.by_name

    @property
    def fetch_progress(self) -> str | None:
        """How far the model is that is being fetched; None where none is."""
        return None if self.supply is None else self.supply.message

    def engine_info(self) -> EngineInfo | None:
        """The engine that computes, with what was requested; None before the first engine is ready."""
        if self.engine is None:
            return None
        info = self.engine.info()
        return info if self.requested_engine is None else info.as_substitute_for(self.requested_engine.info())

    def readiness(self) -> list[str]:
        """Why no frame can be computed now; empty when one can."""
        if self.stopping:
            return ["stopping"]
        info = self.engine_info()
        if info is None:
            return [self.fetch_progress or self.waiting_reason or "the engine is warming up"]
        process = info.process
        return [process.down] if process is not None and process.down else []
