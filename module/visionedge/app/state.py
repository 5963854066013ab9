"""The rooms of a running module side by side, as far as they are built: what reports and HTTP look at."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from visionedge.app.load_meter import Meter
from visionedge.app.overload_policy import Promise
from visionedge.camera.camera import Camera, CameraStatus
from visionedge.camera.registry import Fleet
from visionedge.config.schema import Config
from visionedge.engine.batcher import Batcher
from visionedge.engine.interface import AnyEngine, EngineNews
from visionedge.engine.process.shared_memory import Arena
from visionedge.frames.types import Result
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.image_requests import Asked
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.model.supply import Supply
from visionedge.runtime.threads import Outbox
from visionedge.web.results import Board


@dataclass(slots=True)
class Rooms:
    """What the service has built. Loop only; None where a room is not there yet."""

    config: Config
    data: Path
    environ: Mapping[str, str]
    batcher: Batcher
    outbox: Outbox[Result | CameraStatus | EngineNews]
    started_ns: int = field(default_factory=time.monotonic_ns)
    board: Board = field(default_factory=Board)
    meter: Meter = field(default_factory=Meter)
    promise: Promise = field(default_factory=Promise)
    loaded: Model | None = None
    selection: Selection | None = None
    arena: Arena | None = None
    fleet: Fleet | None = None
    engine: AnyEngine | None = None
    delivery: Delivery | None = None
    held: str | None = None
    asked: Callable[[], Asked] | None = None
    supply: Supply | None = None
    stopping: bool = False
    failed: bool = False

    @staticmethod
    def of(config: Config, data: Path, environ: Mapping[str, str], wake: Callable[[], None]) -> "Rooms":
        """The rooms that are there from the beginning; `wake` is the outbox's."""
        inference = config.inference
        batcher = Batcher(inference.max_batch, int(inference.max_age_seconds * 1e9))
        return Rooms(config, data, environ, batcher, Outbox(wake))

    @property
    def cameras_by_name(self) -> Mapping[str, Camera]:
        """The cameras that run."""
        return {} if self.fleet is None else self.fleet.by_name

    @property
    def fetching(self) -> str | None:
        """How far the model is that is being fetched; None where none is."""
        return None if self.supply is None else self.supply.words

    def readiness(self) -> list[str]:
        """Why no frame can be computed now; empty when one can."""
        if self.stopping:
            return ["stopping"]
        if self.engine is None:
            return [self.fetching or self.held or "the engine is warming up"]
        process = self.engine.process
        return [process.down] if process is not None and process.down else []
