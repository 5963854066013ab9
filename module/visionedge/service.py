"""The composition root: builds the rooms, joins them, starts them in order and stops them in order.

Everything here runs on the asyncio loop of the main thread. What the threads produce comes in through one
door, the outbox; from there a result goes to the board (HTTP), to delivery (IoT Hub) and to the metrics.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionedge import report
from visionedge.capture.camera import CameraStatus, Fitting
from visionedge.config import Config
from visionedge.descriptors import raise_descriptor_limit
from visionedge.edge.delivery import Delivery
from visionedge.edge.desired import Carriers
from visionedge.edge.identity import Identity
from visionedge.edge.ladder import EXIT_STUCK
from visionedge.edge.questions import NUMBERS
from visionedge.engine_room import EngineRoom
from visionedge.errors import UnavailableError, VisionedgeError
from visionedge.facade import Facade
from visionedge.fleet import Fleet
from visionedge.inference.any_engine import AnyEngine, EngineNews
from visionedge.log_limit import LogLimiter
from visionedge.memory import settle_allocator
from visionedge.metrics import Metrics
from visionedge.overload.keeper import Code, Keeper
from visionedge.remote import Remote
from visionedge.rooms import Rooms
from visionedge.sequences import Sequences
from visionedge.threads import Crew, Executor, on_thread, unfinished
from visionedge.uris import redact
from visionedge.web.guard import own_names
from visionedge.web.server import Server

log = logging.getLogger(__name__)

NO_CAMERA = (
    "no camera is configured, so nothing is analysed: add one below `cameras` in the configuration file"
    " or in the desired properties, or start with --camera NAME=URI"
)

_TICK_S = 0.2
_REMEMBER_EVERY_TICKS = 50
_MEASURE_EVERY_S = (1.0, 5.0)
_JOIN_S = 2.0
_JOIN_AGAIN_S = 1.0
_FLUSH_S = 1.5
_HOUSEKEEPING_THREADS = 8


@dataclass(frozen=True, slots=True)
class Options:
    """What `visionedge run` was asked for."""

    carriers: Carriers
    data: Path
    messages: Path | None = None
    duration_s: float | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    inject: Path | None = None


def run(options: Options) -> int:
    """Run the module until a signal, the end of its duration, or the death of a thread that must live.

    Returns the exit code.

    Raises:
        ConfigError, ModelError, DeviceError, UnavailableError: it could not be started.
    """
    settle_allocator()
    raise_descriptor_limit()
    service = Service(options)
    code = asyncio.run(service.main())
    if service.left or unfinished():
        # A thread that hangs in a driver or in the SDK would hold the process for ever.
        logging.shutdown()
        os._exit(code)
    return code


class Service:
    """The life of the module: start, run, stop. Loop only where not said."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rooms = Rooms.of(options.carriers.start.config, options.data, options.environ, self._wake)
        self.left: list[str] = []
        self.executor = Executor(_HOUSEKEEPING_THREADS, "house")
        """For `asyncio.to_thread`: the module's own chores, which the loop would wait for without limit."""
        self._crew = Crew(self._thread_died)
        self._engines = EngineRoom(
            self.rooms, options.data, self._crew, self._thread_died, inject=options.inject
        )
        self._keeper = Keeper(self.rooms, self._engines, self._tell_overload)
        self._hub_crew = Crew(self._thread_died)  # must outlive the others: the last messages go through it
        self._metrics = Metrics(lambda: report.samples(self.rooms))
        self._sequences = Sequences(options.data / "sequences.json")
        self._remote: Remote | None = None
        self._view: Facade | None = None
        self._chores = LogLimiter(log)
        self._remembers = True
        self._ticks = 0
        self._measure_tick = 0
        self._exit_code = 0

    # --- the life of the module -----------------------------------------------------------------------------

    async def main(self) -> int:
        """Start, run until stopped, stop; the exit code."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(self.executor)
        self._stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled, number)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._shut_down)
            rooms = self.rooms
            loading = asyncio.ensure_future(on_thread(self._crew, "loading", self._load))
            if not await self._lasts(loading):
                return self._exit_code  # stopped meanwhile
            carriers, fitting = loading.result()
            view = self._view = Facade(rooms, self._engines.lineup, self._metrics)
            remote = self._remote = self._open_remote(carriers, view)
            # The spool is opened here, and a disk may be slow.
            rooms.delivery = await on_thread(self._crew, "delivery", lambda: self._open_delivery(remote))
            names = own_names(self.options.environ)
            self._server = await Server.start(view, rooms.config.http, names)
            stack.push_async_callback(self._server.close)
            log.info("open %s (warming up: pictures come when the engine is ready)", self._server.url)
            rooms.delivery.start()
            remote.start()
            try:
                await self._run(rooms.delivery, asyncio.ensure_future(self._begin(rooms.delivery, fitting)))
            except VisionedgeError:
                await remote.keep_wish()
                raise
        return self._exit_code

    async def _lasts(self, work: asyncio.Future[Any]) -> bool:
        """Wait for work until the module is stopped; whether the work was done first."""
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not work.done():
            work.cancel()
            return False
        return True

    def _load(self) -> tuple[Carriers, Fitting | None]:
        """Load the model. What was kept of the twin must not keep the twin from mending it. Blocks."""
        carriers, rooms = self.options.carriers, self.rooms
        try:
            return carriers, self._engines.load()
        except VisionedgeError as error:
            if carriers.start.wish is None:
                raise
            log.warning("starting without the last good desired properties: %s", redact(str(error)))
        carriers = carriers.without_wish()
        inference = carriers.start.config.inference
        rooms.config = carriers.start.config
        rooms.batcher.limit(inference.max_batch, int(inference.max_age_seconds * 1e9))
        return carriers, self._engines.load()

    def _open_remote(self, carriers: Carriers, view: Facade) -> Remote:
        remote = Remote(
            self.rooms,
            view,
            self._call_soon,
            carriers,
            apply=self.reconfigure,
            give_way=self._engines.give_way,
            first_sequence=self._sequences.first(NUMBERS),
        )
        self.rooms.asked = remote.statistics
        return remote

    async def _begin(self, delivery: Delivery, fitting: Fitting | None) -> None:
        """Cameras and engine, as soon as the model is there; everything else runs meanwhile."""
        rooms = self.rooms
        if fitting is None:
            log.info("the model has to be fetched first: %sreadyz tells how far it is", self._server.url)
            fitting = await self._engines.fetch()
        rooms.fleet = self._fleet(fitting)
        rooms.fleet.apply(rooms.config.cameras)
        if not rooms.config.cameras:
            log.warning("%s", NO_CAMERA)
        await self._remember()  # where the clock is no help, a kill soon after must not bring these again
        engine = await self._engines.open()
        rooms.fleet.begin()
        words = report.shortened(engine.device.describe())
        delivery.event("engine", engine.device.code, words, report.engine_event(engine))
        log.info("ready: open %s to look", self._server.url)
        self._ticks = 0
        if self.options.duration_s is not None:
            self._loop.call_later(self.options.duration_s, self._stop)

    def _open_delivery(self, listener: Remote) -> Delivery:
        identity = Identity.from_environ(self.options.environ)
        return Delivery.build(
            self.rooms.config.telemetry,
            identity,
            self.options.messages,
            self._hub_crew,
            data=self.options.data,
            on_stuck=self._hub_stuck,
            listener=listener,
        )

    def _fleet(self, fitting: Fitting) -> Fleet:
        return Fleet(
            fitting,
            self.rooms.batcher,
            self._crew,
            first_sequence=self._sequences.first,
            on_change=self.rooms.outbox.put,
            hardware=self.rooms.config.inference.device != "cpu",
            held=True,
        )

    async def reconfigure(self, config: Config) -> dict[str, str]:
        """Make the running module that of another configuration, without disturbing what stays as it is.

        Gives the sections that could not be applied, each with the reason; those stay as they were.
        """
        self._apply_cameras(config)
        self.rooms.config = self.rooms.config.model_copy(update={"overload": config.overload})
        self._apply_telemetry(config)
        refused = await self._apply_http(config)
        return refused | await self._engines.change(config)

    def _apply_cameras(self, config: Config) -> None:
        self.rooms.config = self.rooms.config.model_copy(update={"cameras": config.cameras})
        if self.rooms.fleet is not None:
            self.rooms.fleet.apply(config.cameras)
            for name in self.rooms.board.statistics().cameras.keys() - config.cameras.keys():
                self.rooms.board.forget(name)

    async def _apply_http(self, config: Config) -> dict[str, str]:
        before = self._server.url
        try:
            await self._server.apply(config.http)
        except UnavailableError as error:
            return {"http": str(error)}
        self.rooms.config = self.rooms.config.model_copy(update={"http": config.http})
        if self._server.url != before:
            log.info("open %s to look", self._server.url)
        return {}

    def _apply_telemetry(self, config: Config) -> None:
        if self.rooms.delivery is not None:
            self.rooms.config = self.rooms.config.model_copy(update={"telemetry": config.telemetry})
            self.rooms.delivery.apply(config.telemetry)

    async def _run(self, delivery: Delivery, beginning: asyncio.Future[None]) -> None:
        """Until it is stopped, or could not begin."""
        # What kept it from beginning may come when it is stopped anyway, and nobody asks for it.
        beginning.add_done_callback(lambda done: done.cancelled() or done.exception())
        stopped = asyncio.ensure_future(self._stopped.wait())
        while not self._stopped.is_set():
            waiting: set[asyncio.Future[Any]] = {stopped} if beginning.done() else {stopped, beginning}
            await asyncio.wait(waiting, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
            if beginning.done():
                beginning.result()  # raises what kept it from beginning
            await self._tick(delivery)
        beginning.cancel()

    async def _tick(self, delivery: Delivery) -> None:
        self._ticks += 1
        async with self._chore("the delivery"):
            delivery.tick()
        if self.rooms.fleet is not None:
            async with self._chore("watching the cameras"):
                self.rooms.fleet.watch()
        if self.rooms.engine is not None and self._ticks >= self._measure_tick:
            self._measure_tick = self._ticks + round(self._measure_every_s / _TICK_S)
            async with self._chore("measuring the load"):
                await asyncio.to_thread(self._measure, self.rooms.engine)
                await self._keeper.step()
        if self._ticks % _REMEMBER_EVERY_TICKS == 0:
            async with self._chore("keeping sequence numbers"):
                await self._remember()

    @contextlib.asynccontextmanager
    async def _chore(self, name: str) -> AsyncIterator[None]:
        """A step of housekeeping, which is tried again: nothing that it meets may end the module."""
        try:
            yield
        except OSError as error:
            self._chores.warning(f"{name} failed ({error.strerror or error}); it is tried again")
        except Exception as error:  # noqa: BLE001 - whatever it is, the cameras go on
            self._chores.warning(f"{name} failed; it is tried again", error=error)

    @property
    def _measure_every_s(self) -> float:
        """Three times in what counts as an overload, if that is not too often."""
        shortest_s, longest_s = _MEASURE_EVERY_S
        return min(longest_s, max(shortest_s, self.rooms.config.overload.after_seconds / 3))

    def _measure(self, engine: AnyEngine) -> None:
        """Note what the threads use, and what the cameras demand and get."""
        child = engine.process.pid if engine.process else None
        asked = {} if self.rooms.fleet is None else self.rooms.fleet.counts()
        frames, gpu = self.rooms.batcher.statistics(), engine.device.effective != "cpu"
        self.rooms.meter.note(frames, asked, child=child, gpu=gpu)

    def _tell_overload(self, code: Code, words: str, details: Mapping[str, Any]) -> None:
        if self.rooms.delivery is not None:
            self.rooms.delivery.event("module", code, words, details)

    async def _shut_down(self) -> None:
        """Cameras, lanes, results on their way, messages: in the order of the river."""
        self.rooms.board.close()
        if self._remote is not None:
            await self._remote.close()
        self._crew.stopping.set()  # from here on a lane that ends is no accident
        if self.rooms.fleet is not None:
            self.rooms.fleet.stop()
        self.rooms.batcher.close()
        self._engines.lineup.close()
        await self._keeper.close()
        self.left = await asyncio.to_thread(self._end_threads)
        if self._view is not None:
            self.left += await asyncio.to_thread(self._view.close)
        self._pump()
        if self.rooms.delivery is not None:
            self.rooms.delivery.flush()
            if not await asyncio.to_thread(self.rooms.delivery.close, _FLUSH_S):
                self.left += self._hub_crew.alive() or ["hub"]
        await self._remember()
        if self.left:
            log.warning("left behind at the end: %s", ", ".join(self.left))
        log.info("stopped")

    def _end_threads(self) -> list[str]:
        """Lanes first, then the engine, unless it is still opening or holds a lane; who is left. Blocks."""
        left = self._crew.join(_JOIN_S) if self.rooms.engine is not None else []
        self._engines.close()
        if left or self.rooms.engine is None:
            left = self._crew.join(_JOIN_AGAIN_S)
            self._engines.close()  # also what was loaded while the threads ended
        return left + self._engines.left()

    async def _remember(self) -> None:
        last = {} if self.rooms.fleet is None else self.rooms.fleet.next_sequences()
        last |= {} if self._remote is None else self._remote.next_sequences()
        try:
            await asyncio.to_thread(self._sequences.remember, last)
        except OSError as error:
            # Told once: the clock alone protects the numbers then, which is enough but for a clock set back.
            if self._remembers:
                log.warning("%s", not_written(self.options.data, error))
            self._remembers = False

    def _signalled(self, number: int) -> None:
        if self._stopped.is_set():
            log.warning("asked a second time: ending at once")
            os._exit(128 + number)
        log.info("stopping (%s)", signal.Signals(number).name)
        self._stop()

    def _stop(self) -> None:
        self.rooms.stopping = True
        self._stopped.set()

    def _thread_died(self, name: str, error: BaseException | None) -> None:
        """Called from the dying thread: the module cannot go on without it."""
        self._exit_code = 1
        self.rooms.failed = True
        log.error("the thread %s ended (%s): stopping, to be started again", name, error or "no error")
        self._call_soon(self._stop)

    def _hub_stuck(self) -> None:
        """Called from the thread `hub:client`: only another process can talk to the hub again."""
        if self._exit_code == 0:
            self._exit_code = EXIT_STUCK
            log.error("the IoT Hub SDK hangs for good: ending with %d, to be started again", EXIT_STUCK)
            self._call_soon(self._stop)

    # --- from the threads to the loop -----------------------------------------------------------------------

    def _wake(self) -> None:
        """Called from any thread, once each time the outbox turns non-empty."""
        self._call_soon(self._pump)

    def _call_soon(self, call: Callable[[], None]) -> None:
        # A thread that was left behind may still speak when the loop is closed; nobody listens then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def _engine_changed(self, news: EngineNews, delivery: Delivery) -> None:
        self._engines.lineup.follow()
        details = report.engine_event(self.rooms.engine) if self.rooms.engine else {}
        delivery.event("engine", news.code, report.shortened(news.message), details)
        if self.rooms.engine is None:
            self.rooms.held = news.message  # why there is none yet
        if news.exit_code is not None:
            self._exit_code = news.exit_code
            self._stop()

    def _pump(self) -> None:
        if self.rooms.delivery is None:  # nothing flows before it is there
            return
        for item in self.rooms.outbox.drain():
            if isinstance(item, EngineNews):
                self._engine_changed(item, self.rooms.delivery)
                continue
            if isinstance(item, CameraStatus):
                self.rooms.delivery.event(
                    "camera", item.state, report.camera_sentence(item), {"camera": item.name}
                )
                continue
            self.rooms.board.publish(item)
            self.rooms.delivery.offer(item)
            self._metrics.observe(item)


def not_written(folder: Path, error: OSError) -> str:
    """One line for people about a data folder in which nothing can be kept."""
    text = f"{folder} cannot be written ({error.strerror}): no state is kept"
    if not isinstance(error, PermissionError):
        return text
    owner = f"{os.getuid()}:{os.getgid()}"
    return f"{text}; give the folder that is mounted there to this user: chown {owner} FOLDER"
