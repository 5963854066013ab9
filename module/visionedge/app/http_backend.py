"""What HTTP sees of the running module: `web.view.ModuleView` over its rooms."""

import numpy as np
from numpy.typing import NDArray

from visionedge.app import status as report
from visionedge.app.metrics import Metrics
from visionedge.app.state import Rooms
from visionedge.engine.interface import AnyEngine
from visionedge.engine.lanes import Lineup
from visionedge.engine.one_shot import analyse, frame_of
from visionedge.frames.types import Picture, Result
from visionedge.ops.doctor.gather import Request, Running
from visionedge.ops.doctor.host import this_host
from visionedge.ops.doctor.report import Visits, examine
from visionedge.runtime import logs
from visionedge.web.backend import Busy, Document, ModelFacts
from visionedge.web.jpeg import Desk
from visionedge.web.results import Subscription

_DETECT_PERMITS = 4


class Facade:
    """Answers for HTTP; every method is called on the loop and returns at once or is awaited."""

    def __init__(self, rooms: Rooms, lineup: Lineup, metrics: Metrics) -> None:
        self._rooms = rooms
        self._lineup = lineup
        self._metrics = metrics
        # Of their own: what requests take must not be taken from the module's housekeeping.
        self._desk = Desk(threads=_DETECT_PERMITS, limit=_DETECT_PERMITS, name="request")
        self._examining = Desk(threads=1, limit=1, name="doctor")
        self._visits = Visits(self._examine)

    def health(self) -> list[str]:
        """Why the module is not healthy."""
        return ["a thread that must live has died"] if self._rooms.failed else []

    def readiness(self) -> list[str]:
        """Why it cannot answer yet."""
        return self._rooms.readiness()

    def status(self) -> Document:
        """Version, uptime, engine, model, cameras, hub."""
        return report.status(self._rooms)

    def cameras(self) -> list[Document]:
        """One object per configured camera."""
        return report.cameras(self._rooms)

    def camera(self, name: str) -> Document | None:
        """One camera's object."""
        return report.camera(self._rooms, name)

    def knows(self, name: str) -> bool:
        """Whether a camera is configured under this name."""
        return name in self._rooms.config.cameras

    def latest(self, name: str) -> Result | None:
        """The newest result of a camera."""
        return self._rooms.board.latest(name)

    async def newer(self, name: str, after: int | None, timeout_s: float) -> Result | None:
        """The newest result above `after`, waited for."""
        return await self._rooms.board.newer(name, after, timeout_s)

    def subscribe(self, camera: str | None) -> Subscription:
        """Every frame object from now on."""
        return self._rooms.board.subscribe(camera)

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._metrics.render()

    async def doctor(self) -> Document:
        """The way to the GPU, examined at most once a minute."""
        return await self._visits.report()

    async def _examine(self) -> Document:
        rooms = self._rooms
        running = _running(rooms.engine) if rooms.engine else None
        request = Request(rooms.config.inference.device, rooms.config, rooms.data, running)
        return await self._examining.run(lambda: examine(request, this_host(rooms.environ)).document())

    def log(self) -> str:
        """The newest lines of the log."""
        return logs.recent()

    def model(self) -> ModelFacts | None:
        """The loaded model, for the Open Inference Protocol."""
        engine = self._rooms.engine
        if engine is None:
            return None
        return report.model_facts(engine, self._rooms.config.inference.max_batch)

    async def detect(self, picture: Picture) -> Result:
        """Analyse one picture of a request."""
        self._admit()

        def analysed() -> Result:
            with self._lineup.using() as running:
                frame = frame_of(picture, running.engine)
                return analyse([frame], running.engine, running.selection)[0]

        return await self._desk.run(analysed)

    async def infer_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the compiled model on pictures at its own size."""
        self._admit()

        def inferred() -> NDArray[np.float32]:
            with self._lineup.using() as running:
                return running.engine.infer(images)

        return await self._desk.run(inferred)

    def _admit(self) -> None:
        if reasons := self._rooms.readiness():
            raise Busy("; ".join(reasons))
        if self._desk.is_full:
            raise Busy("too many pictures at once")

    def close(self) -> list[str]:
        """End the threads; the names of those that hang. Blocks for a bounded time."""
        return self._desk.close() + self._examining.close()


def _running(engine: AnyEngine) -> Running:
    """The engine, as the doctor looks at it."""
    device, pace = engine.device, engine.proof.pace
    return Running(device, engine.places, pace.doubt(device.effective) if pace else None)
