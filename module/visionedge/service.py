"""The composition root: builds the rooms, joins them, starts them in order and stops them in order.

Everything here runs on the asyncio loop of the main thread. What the threads produce comes in through one
door, the outbox; from there a result goes to the board (HTTP), to delivery (IoT Hub) and to the metrics.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from visionedge import logs, report
from visionedge.capacity import Meter
from visionedge.capture.camera import Camera, CameraStatus
from visionedge.config import Config
from visionedge.edge.delivery import Delivery
from visionedge.edge.identity import Identity
from visionedge.edge.ladder import EXIT_STUCK
from visionedge.errors import ConfigError
from visionedge.fleet import Fleet
from visionedge.frames import Picture, Result
from visionedge.inference.any_engine import AnyEngine
from visionedge.inference.batcher import Batcher
from visionedge.inference.detections import Selection
from visionedge.inference.engine import open_engine
from visionedge.inference.lanes import Lane
from visionedge.inference.model import Model, bundled_model_path, load_model
from visionedge.inference.process import EngineNews, EngineProcess
from visionedge.inference.shared import Arena, blocks_for
from visionedge.metrics import Metrics
from visionedge.ops.doctor.gather import Request, Running
from visionedge.ops.doctor.host import this_host
from visionedge.ops.doctor.report import examine
from visionedge.ops.doctor.visit import Visits
from visionedge.outbox import Outbox
from visionedge.sequences import Sequences
from visionedge.single import analyse, frame_of
from visionedge.threads import Crew
from visionedge.web.board import Board, Subscription
from visionedge.web.server import Server
from visionedge.web.view import Busy, Document, ModelFacts

log = logging.getLogger(__name__)

T = TypeVar("T")

_TICK_S = 0.2
_REMEMBER_EVERY_TICKS = 50
_MEASURE_EVERY_TICKS = 25
_JOIN_S = 2.0
_JOIN_AGAIN_S = 1.0
_FLUSH_S = 1.5
_DETECT_PERMITS = 4


@dataclass(frozen=True, slots=True)
class Options:
    """What `visionedge run` was asked for."""

    config: Config
    data: Path
    messages: Path | None = None
    duration_s: float | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


def run(options: Options) -> int:
    """Run the module until a signal, the end of its duration, or the death of a thread that must live.

    Returns the exit code.

    Raises:
        ConfigError, ModelError, DeviceError, UnavailableError: it could not be started.
    """
    service = Service(options)
    code = asyncio.run(service.main())
    if service.left:
        # A thread that hangs in a driver or in the SDK would hold the process for ever.
        logging.shutdown()
        os._exit(code)
    return code


class Service:
    """The running module, and what HTTP sees of it (`web.view.ModuleView`). Loop only where not said."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = options.config
        self.started_ns = time.monotonic_ns()
        self.fleet: Fleet | None = None
        self.engine: AnyEngine | None = None
        self.arena: Arena | None = None
        self.loaded: Model | None = None
        self.delivery: Delivery | None = None
        self.board = Board()
        inference = options.config.inference
        self.batcher = Batcher(inference.max_batch, int(inference.max_age_seconds * 1e9))
        self.outbox: Outbox[Result | CameraStatus | EngineNews] = Outbox(self._wake)
        self._crew = Crew(self._thread_died)
        self._child: EngineProcess | None = None
        self._engine_crew = Crew(self._thread_died)
        self._hub_crew = Crew(self._thread_died)  # must outlive the others: the last messages go through it
        self.left: list[str] = []
        self.meter = Meter()
        self._metrics = Metrics(lambda: report.samples(self))
        self._sequences = Sequences(options.data / "sequences.json")
        self._remembers = True
        self._permits = _DETECT_PERMITS
        self._visits = Visits(self._examine)
        self._exit_code = 0

    # --- the life of the module -----------------------------------------------------------------------------

    async def main(self) -> int:
        """Start, run until stopped, stop; the exit code."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled, number)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._shut_down)
            self.loaded = self._load()
            if self.config.inference.process:
                self.arena = Arena(self.loaded.input, blocks_for(len(self.config.cameras)))
            # The spool is opened here, and a disk may be slow.
            self.delivery = await self._on_thread("delivery", self._open_delivery)
            self._server = await Server.start(self, self.config.http)
            stack.push_async_callback(self._server.close)
            self.delivery.start()
            self.fleet = self._fleet(self.loaded)
            self.fleet.apply(self.config.cameras)
            engine = await self._open_engine(self.loaded)
            if engine is not None:
                await self._run(engine, self.delivery)
        return self._exit_code

    def _load(self) -> Model:
        model = load_model(self._model_path())
        inference = self.config.inference
        self.selection = Selection.of(model, inference.confidence, inference.iou, inference.classes)
        return model

    def _model_path(self) -> Path:
        model = self.config.model
        if model.url is not None:
            raise ConfigError(
                ["model.url: models are not fetched yet; put the file there and give model.path"]
            )
        return Path(model.path) if model.path is not None else bundled_model_path()

    def _open_delivery(self) -> Delivery:
        identity = Identity.from_environ(self.options.environ)
        return Delivery.build(
            self.config.telemetry,
            identity,
            self.options.messages,
            self._hub_crew,
            data=self.options.data,
            on_stuck=self._hub_stuck,
        )

    def _fleet(self, model: Model) -> Fleet:
        return Fleet(
            model.input,
            self.batcher,
            self._crew,
            first_sequence=self._sequences.first,
            on_change=self.outbox.put,
            allocate=self.arena.allocate if self.arena else None,
            hardware=self.config.inference.device != "cpu",
        )

    @property
    def cameras_by_name(self) -> Mapping[str, Camera]:
        """The cameras that run."""
        return {} if self.fleet is None else self.fleet.by_name

    def apply_cameras(self, config: Config) -> None:
        """Make the cameras those of another configuration; nothing else of it is looked at."""
        if self.fleet is not None:
            self.config = self.config.model_copy(update={"cameras": config.cameras})
            self.fleet.apply(config.cameras)

    async def _open_engine(self, model: Model) -> AnyEngine | None:
        """Build and warm the engine off the loop, start its lanes; None if stopped meanwhile."""
        opening = asyncio.ensure_future(self._on_thread("opening", self._opener(model)))
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait((opening, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not opening.done():
            opening.cancel()
            return None
        engine = self.engine = opening.result()
        for number in range(engine.plan.lanes):
            lane = Lane(self.batcher, engine, self.selection, self.outbox.put)
            self._crew.start(f"lane:{number}", lane.run, vital=True)
        return engine

    def _opener(self, model: Model) -> Callable[[], AnyEngine]:
        """What opens the engine, in a process of its own or in this one; slow."""
        inference, data = self.config.inference, self.options.data
        if self.arena is None:
            return lambda: open_engine(model, inference, data=data)
        # Kept from now on: a child is ended also while it opens.
        child = self._child = EngineProcess(
            model, inference, self.arena, data=data, crew=self._engine_crew, on_change=self.outbox.put
        )

        def opened() -> AnyEngine:
            child.open()
            return child

        return opened

    async def _run(self, engine: AnyEngine, delivery: Delivery) -> None:
        device = engine.device
        delivery.event("engine", device.code, device.describe(), report.engine(engine))
        log.info("ready: open %s to look", self._server.url)
        if self.options.duration_s is not None:
            self._loop.call_later(self.options.duration_s, self._stopped.set)
        ticks = 0
        while not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), _TICK_S)
            delivery.tick()
            if self.fleet is not None:
                self.fleet.watch()
            ticks += 1
            if ticks % _MEASURE_EVERY_TICKS == 1:
                await asyncio.to_thread(self._measure, engine)
            if ticks % _REMEMBER_EVERY_TICKS == 0:
                await self._remember()

    def _measure(self, engine: AnyEngine) -> None:
        """Note what the threads use, and what the cameras demand and get."""
        child = engine.process.pid if engine.process else None
        self.meter.note(self.batcher.statistics(), child=child, gpu=engine.device.effective != "cpu")

    async def _shut_down(self) -> None:
        """Cameras, lanes, results on their way, messages: in the order of the river."""
        self.board.close()
        self._crew.stopping.set()  # from here on a lane that ends is no accident
        if self.fleet is not None:
            self.fleet.stop()
        self.batcher.close()
        self.left = await asyncio.to_thread(self._end_threads)
        self._pump()
        if self.delivery is not None:
            self.delivery.flush()
            if not await asyncio.to_thread(self.delivery.close, _FLUSH_S):
                self.left += self._hub_crew.alive() or ["hub"]
        await self._remember()
        if self.left:
            log.warning("left behind at the end: %s", ", ".join(self.left))
        log.info("stopped")

    def _end_threads(self) -> list[str]:
        """Lanes first, then the engine, unless it is still opening or holds a lane; who is left. Blocks."""
        left = self._crew.join(_JOIN_S) if self.engine is not None else []
        engine = self._child or self.engine
        if engine is not None:
            engine.close()
        if left or self.engine is None:
            left = self._crew.join(_JOIN_AGAIN_S)
        return left + self._engine_crew.alive()

    async def _remember(self) -> None:
        last = {} if self.fleet is None else self.fleet.next_sequences()
        try:
            await asyncio.to_thread(self._sequences.remember, last)
        except OSError as error:
            # Told once: the clock alone protects the numbers then, which is enough but for a clock set back.
            if self._remembers:
                log.warning("%s cannot be written (%s): no state is kept", self.options.data, error.strerror)
            self._remembers = False

    def _signalled(self, number: int) -> None:
        if self._stopped.is_set():
            log.warning("asked a second time: ending at once")
            os._exit(128 + number)
        log.info("stopping (%s)", signal.Signals(number).name)
        self._stopped.set()

    def _thread_died(self, name: str, error: BaseException | None) -> None:
        """Called from the dying thread: the module cannot go on without it."""
        self._exit_code = 1
        log.error("the thread %s ended (%s): stopping, to be started again", name, error or "no error")
        self._call_soon(self._stopped.set)

    def _hub_stuck(self) -> None:
        """Called from the thread `hub:client`: only another process can talk to the hub again."""
        if self._exit_code == 0:
            self._exit_code = EXIT_STUCK
            log.error("the IoT Hub SDK hangs for good: ending with %d, to be started again", EXIT_STUCK)
            self._call_soon(self._stopped.set)

    # --- from the threads to the loop -----------------------------------------------------------------------

    def _wake(self) -> None:
        """Called from any thread, once each time the outbox turns non-empty."""
        self._call_soon(self._pump)

    def _call_soon(self, call: Callable[[], None]) -> None:
        # A thread that was left behind may still speak when the loop is closed; nobody listens then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def _pump(self) -> None:
        if self.delivery is None:  # nothing flows before it is there
            return
        for item in self.outbox.drain():
            if isinstance(item, EngineNews):
                details = report.engine(self.engine) if self.engine else {}
                self.delivery.event("engine", item.code, item.message, details)
                continue
            if isinstance(item, CameraStatus):
                self.delivery.event("camera", item.state, report.camera_sentence(item), {"camera": item.name})
                continue
            self.board.publish(item)
            self.delivery.offer(item)
            self._metrics.observe(item)

    async def _on_thread(self, name: str, work: Callable[[], T]) -> T:
        """Run blocking work on a thread of its own, which the module can end without."""
        done: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]  # work gave it

        def target() -> None:
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                caught = error
                self._call_soon(lambda: settle(None, caught))
            else:
                self._call_soon(lambda: settle(result, None))

        self._crew.start(name, target)
        return await done

    # --- what HTTP sees -------------------------------------------------------------------------------------

    def health(self) -> list[str]:
        """Why the module is not healthy."""
        return ["a thread that must live has died"] if self._exit_code else []

    def readiness(self) -> list[str]:
        """Why it cannot answer yet."""
        if self._stopped.is_set():
            return ["stopping"]
        if self.engine is None:
            return ["the engine is warming up"]
        process = self.engine.process
        return [process.down] if process is not None and process.down else []

    def status(self) -> Document:
        """Version, uptime, engine, model, cameras, hub."""
        return report.status(self)

    def cameras(self) -> list[Document]:
        """One object per configured camera."""
        return report.cameras(self)

    def camera(self, name: str) -> Document | None:
        """One camera's object."""
        return next((document for document in report.cameras(self) if document["name"] == name), None)

    def latest(self, name: str) -> Result | None:
        """The newest result of a camera."""
        return self.board.latest(name)

    async def newer(self, name: str, after: int | None, timeout_s: float) -> Result | None:
        """The newest result above `after`, waited for."""
        return await self.board.newer(name, after, timeout_s)

    def subscribe(self, camera: str | None) -> Subscription:
        """Every result from now on."""
        return self.board.subscribe(camera)

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._metrics.render()

    async def doctor(self) -> Document:
        """The way to the GPU, examined at most once a minute."""
        return await self._visits.report()

    async def _examine(self) -> Document:
        running = Running(self.engine.device, self.engine.places) if self.engine else None
        request = Request(self.config.inference.device, self.config, self.options.data, running)
        environ = self.options.environ
        return await self._on_thread("doctor", lambda: examine(request, this_host(environ)).document())

    def log(self) -> str:
        """The newest lines of the log."""
        return logs.recent()

    def model(self) -> ModelFacts | None:
        """The loaded model, for the Open Inference Protocol."""
        return None if self.engine is None else report.model_facts(self.engine)

    async def detect(self, picture: Picture) -> Result:
        """Analyse one picture of a request."""
        engine = self._admit()
        return await self._with_permit(
            lambda: analyse([frame_of(picture, engine)], engine, self.selection)[0]
        )

    async def infer_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the compiled model on pictures at its own size."""
        engine = self._admit()
        return await self._with_permit(lambda: engine.infer(images))

    def _admit(self) -> AnyEngine:
        if self.engine is None:
            raise Busy("the engine is warming up")
        process = self.engine.process
        if process is not None and process.down:
            raise Busy(process.down)
        if self._permits == 0:
            raise Busy("too many pictures at once")
        return self.engine

    async def _with_permit(self, work: Callable[[], T]) -> T:
        """Run work of a request off the loop, at most `_DETECT_PERMITS` at once."""
        self._permits -= 1
        try:
            return await asyncio.to_thread(work)
        finally:
            self._permits += 1
