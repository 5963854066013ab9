"""The composition root: builds the rooms, joins them, starts them in order and stops them in order.

Everything here runs on the asyncio loop of the main thread. What the threads produce comes in through one
door, the outbox; from there a result goes to the board (HTTP), to delivery (IoT Hub) and to the metrics.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from visionedge.app import status
from visionedge.app.engine_host import EngineRoom
from visionedge.app.http_backend import Facade
from visionedge.app.hub_bridge import Remote
from visionedge.app.metrics import Metrics
from visionedge.app.overload_controller import Code, Keeper
from visionedge.app.state import Rooms
from visionedge.camera.camera import CameraStatus, Fitting
from visionedge.camera.registry import Fleet, Position, Sequences
from visionedge.config.documents import Document
from visionedge.config.schema import Config
from visionedge.engine.interface import AnyEngine, EngineNews
from visionedge.errors import UnavailableError, VisionedgeError
from visionedge.frames.types import Result
from visionedge.iothub.deadlines import EXIT_STUCK
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.desired import Carriers
from visionedge.iothub.identity import Identity
from visionedge.iothub.image_requests import NUMBERS
from visionedge.runtime.files import sweep
from visionedge.runtime.logs import LogLimiter
from visionedge.runtime.process_limits import raise_descriptor_limit, settle_allocator
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import Crew, Executor, on_thread, unfinished
from visionedge.web.guard import own_names
from visionedge.web.server import Server

log = logging.getLogger(__name__)

T = TypeVar("T")

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
_STEP_S = 2.0
"""The most that one step of the orderly stop waits for, where nothing else bounds it."""

STOP_WITHIN_S = 10.0
"""From the first sign of the stop to the end of the process, whatever hangs."""

_MOST_FAILED = 50
"""Failures in a row of the housekeeping or of results on their way: then only a new process may help."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `visionedge run` was asked for."""

    carriers: Carriers
    data: Path
    messages: Path | None = None
    duration_s: float | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    inject: Path | None = None
    reload: Callable[[], Document] | None = None
    """Reads the local document again; None where there is no configuration file."""


def run(options: Options) -> int:
    """Run the module until a signal, the end of its duration, or the death of a thread that must live.

    Returns the exit code.

    Raises:
        ConfigError, ModelError, DeviceError, UnavailableError: it could not be started.
    """
    settle_allocator()
    raise_descriptor_limit()
    before = set(threading.enumerate())
    service = Service(options)
    # Of no crew: it has to outlive them all.
    threading.Thread(target=service.end_in_time, name="stop-limit", daemon=True).start()
    try:
        code = asyncio.run(service.main())
    finally:
        # While there is a thread that the interpreter would wait for, the time limit of the stop goes on.
        service.ending.set()
        if not unfinished(before):
            service.ended.set()
    if service.left or unfinished(before):
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
        self._metrics = Metrics(lambda: status.samples(self.rooms))
        for folder in (options.data, options.data / "plans"):
            sweep(folder)
        self._sequences = Sequences(options.data / "sequences.json")
        self._remote: Remote | None = None
        self._view = Facade(self.rooms, self._engines.lineup, self._metrics)
        self._chores = LogLimiter(log)
        self._remembers = True
        self._remembering: asyncio.Task[None] | None = None
        self._ends_at: asyncio.TimerHandle | None = None
        self._failed_in_a_row = 0
        self.ending, self.ended = threading.Event(), threading.Event()
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
        self._loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        await self._live()
        return self._exit_code

    async def _live(self) -> None:
        rooms = self.rooms
        # Before anything that takes its time: a port in use is told at once.
        self._server = await Server.start(self._view, rooms.config.http, own_names(self.options.environ))
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._shut_down)
            log.info("open %s (warming up: pictures come when the engine is ready)", self._server.url)
            stack.push_async_callback(self._within, _STEP_S, "http", self._server.close)
            try:
                await self._work()
            except BaseException as error:
                # Known before the stop begins: it may be cut short.
                self._exit_code = error.exit_code if isinstance(error, VisionedgeError) else 1
                raise

    async def _work(self) -> None:
        rooms = self.rooms
        loaded = await self._unless_stopped(on_thread(self._crew, "loading", self._load))
        if loaded is None:
            return
        carriers, fitting = loaded
        await self._server.apply(rooms.config.http)  # of the local document, if the kept one was of no use
        remote = self._remote = self._open_remote(carriers)
        # The spool is opened here, and a disk may be slow.
        opening = on_thread(self._crew, "delivery", lambda: self._open_delivery(remote))
        delivery = rooms.delivery = await self._unless_stopped(opening)
        if delivery is None:
            return
        delivery.start()
        remote.start()
        self._tell_lost(delivery, carriers)
        try:
            await self._run(delivery, asyncio.ensure_future(self._begin(delivery, fitting)))
        except VisionedgeError:
            await remote.keep_wish()
            raise

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """What the work gives, or None when the module was stopped before."""
        working: asyncio.Future[T] = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopped.wait())
        both: set[asyncio.Future[Any]] = {working, stopped}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if working.done():
            return working.result()
        working.cancel()
        return None

    def _tell_lost(self, delivery: Delivery, carriers: Carriers) -> None:
        """Tell the cloud of state files that were set aside."""
        kept = carriers.last_good
        lost = {
            self._sequences.path.name: self._sequences.lost,
            "desired.json": None if kept is None else kept.lost,
        }
        for name, why in lost.items():
            if why is not None:
                text = f"{name} cannot be used ({why}) and was set aside; the module goes on without it"
                delivery.event("storage", "state-lost", text, {"file": name, "reason": why})

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

    def _open_remote(self, carriers: Carriers) -> Remote:
        remote = Remote(
            self.rooms,
            self._view,
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
            self._limit_duration()
            log.info("the model has to be fetched first: %sreadyz tells how far it is", self._server.url)
            fitting = await self._engines.fetch()
        rooms.fleet = self._fleet(fitting)
        rooms.fleet.apply(rooms.config.cameras)
        if not rooms.config.cameras:
            log.warning("%s", NO_CAMERA)
        # Where the clock is no help, a kill soon after must not bring these numbers again.
        await self._remember(self._crew)
        engine = await self._engines.open()
        rooms.fleet.begin()
        words = status.shortened(engine.device.describe())
        delivery.event("engine", engine.device.code, words, status.engine_event(engine))
        if self._remote is not None:
            self._remote.retry()  # what waited for an engine can be in force now
        log.info("ready: open %s to look", self._server.url)
        self._ticks = 0
        self._limit_duration()

    def _limit_duration(self) -> None:
        """The duration runs from now on: the module is ready, or waits for its model or its device."""
        if self.options.duration_s is not None and self._ends_at is None:
            self._ends_at = self._loop.call_later(self.options.duration_s, self._over)

    def _over(self) -> None:
        if reasons := self.rooms.readiness():
            log.warning("the duration is over, and the module was not ready: %s", "; ".join(reasons))
        self._stop()

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
            last_epoch=self._sequences.last_epoch,
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
        ticking: asyncio.Future[None] | None = None
        while not self._stopped.is_set():
            if ticking is None or ticking.done():
                ticking = asyncio.ensure_future(self._tick(delivery))
            waiting: set[asyncio.Future[Any]] = {stopped} if beginning.done() else {stopped, beginning}
            # Not for the tick: whatever that hangs in, a stop is noticed.
            await asyncio.wait(waiting, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
            if beginning.done():
                beginning.result()  # raises what kept it from beginning
        beginning.cancel()
        if ticking is not None:
            ticking.cancel()

    async def _tick(self, delivery: Delivery) -> None:
        """One round of what is done a few times a second; an error in it is no end, unless it stays."""
        before = self._failed_in_a_row
        self._ticks += 1
        with self._chore("the delivery"):
            delivery.tick()
        if self.rooms.fleet is not None:
            with self._chore("watching the cameras"):
                self.rooms.fleet.watch()
        if self._ticks % _REMEMBER_EVERY_TICKS == 0:
            with self._chore("forgetting cameras that are gone"):
                self._forget_gone()
            if self._remembering is None or self._remembering.done():
                self._remembering = asyncio.ensure_future(self._remember(self._crew))
        engine = self.rooms.engine
        if engine is not None and self._ticks >= self._measure_tick:
            self._measure_tick = self._ticks + round(self._measure_every_s / _TICK_S)
            with self._chore("measuring the load"):
                await on_thread(self._crew, "measuring", lambda: self._measure(engine))
                await self._keeper.step()
        if self._failed_in_a_row == before:
            self._failed_in_a_row = 0

    @contextlib.contextmanager
    def _chore(self, name: str) -> Iterator[None]:
        """A step of housekeeping, which is tried again."""
        try:
            yield
        except (OSError, MemoryError) as error:
            # The machine is short of something, which may pass and which a new process would lack as well.
            why = getattr(error, "strerror", None) or type(error).__name__
            self._chores.warning(f"{name} failed ({why}); trying again")
        except Exception as error:  # noqa: BLE001 - counted, and the end where it fails every time
            self._accident(name, error)

    def _accident(self, what: str, error: Exception) -> None:
        """Something unexpected; one that comes again and again ends the module, to be started again."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row == _MOST_FAILED:
            self._give_up(f"{what} failed {_MOST_FAILED} times in a row", error)
        else:
            self._chores.warning(f"{what} failed; trying again", error=error)

    def _forget_gone(self) -> None:
        """Cameras that left the configuration long ago leave the metrics and everything else in memory."""
        if self.rooms.fleet is not None:
            for name in self.rooms.fleet.forget_gone(self.rooms.config.cameras):
                self._metrics.forget(name)
                self.rooms.board.forget(name)

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
        """Stop cameras, lanes, results and messages, in the order in which data flows."""
        self.ending.set()
        self.rooms.stopping = True
        self.rooms.board.close()
        if self._remote is not None:
            await self._within(_STEP_S, "hub", self._remote.close)
        self._crew.stopping.set()  # from here on a lane that ends is no accident
        if self.rooms.fleet is not None:
            self.rooms.fleet.stop()
        self.rooms.batcher.close()
        self._engines.lineup.close()
        await self._within(_STEP_S, "overload", self._keeper.close)
        # The crew of the hub, as the other one is stopping.
        self.left += await on_thread(self._hub_crew, "ending", self._end_threads)
        self.left += await on_thread(self._hub_crew, "ending", self._view.close)
        self._pump()
        delivery = self.rooms.delivery
        if delivery is not None:
            delivery.flush()
            if not await on_thread(self._hub_crew, "closing", lambda: delivery.close(_FLUSH_S)):
                self.left += self._hub_crew.alive() or ["hub"]
        await self._within(_STEP_S, "sequences.json", lambda: self._remember(self._hub_crew))
        if self.left:
            log.warning("left behind at the end: %s", ", ".join(self.left))
        log.info("stopped")

    async def _within(self, seconds: float, what: str, step: Callable[[], Awaitable[Any]]) -> None:
        """A step of the stop, given up when it takes longer: the steps behind it still send and write."""
        try:
            async with asyncio.timeout(seconds):
                await step()
        except TimeoutError:
            self.left.append(what)
        except Exception:
            log.exception("stopping: the step '%s' failed", what)

    def end_in_time(self) -> None:
        """End the process `STOP_WITHIN_S` after the stop began, whatever hangs; a thread of its own."""
        self.ending.wait()
        if not self.ended.wait(STOP_WITHIN_S):
            log.warning("the stop took longer than %g s: ending at once", STOP_WITHIN_S)
            logging.shutdown()
            os._exit(self._exit_code)

    def _end_threads(self) -> list[str]:
        """Lanes first, then the engine, unless it is still opening or holds a lane; who is left. Blocks."""
        left = self._crew.join(_JOIN_S) if self.rooms.engine is not None else []
        self._engines.close()
        if left or self.rooms.engine is None:
            left = self._crew.join(_JOIN_AGAIN_S)
            self._engines.close()  # also what was loaded while the threads ended
        return left + self._engines.left()

    async def _remember(self, crew: Crew) -> None:
        """Keep where the cameras are on disk, on a thread of the crew."""
        last: dict[str, Position] = {}
        if self.rooms.fleet is not None:
            last |= self.rooms.fleet.positions()
        if self._remote is not None:
            last |= {name: Position(number) for name, number in self._remote.next_sequences().items()}
        try:
            await on_thread(crew, "remembering", lambda: self._sequences.remember(last))
        except OSError as error:
            # Told once: the clock alone protects the numbers then, which is enough but for a clock set back.
            if self._remembers:
                log.warning("%s", not_written(self.options.data, error))
            self._remembers = False
        else:
            self._remembers = True

    def _signalled(self, number: int) -> None:
        if self._stopped.is_set():
            log.warning("asked a second time: ending at once")
            os._exit(128 + number)
        log.info("stopping (%s)", signal.Signals(number).name)
        self._stop()

    def _hung_up(self) -> None:
        """SIGHUP: read the configuration file again."""
        if self.options.reload is None:
            log.warning("SIGHUP: there is no configuration file to read again; the module goes on")
        elif self._remote is None:
            log.warning("SIGHUP: the module is still starting; send it again when it is ready")
        else:
            log.info("SIGHUP: reading the configuration file again")
            self._remote.reload(self.options.reload)

    def _stop(self) -> None:
        self.rooms.stopping = True
        self.ending.set()
        self._stopped.set()

    def _thread_died(self, name: str, error: BaseException | None) -> None:
        """Called from the dying thread: the module cannot go on without it."""
        self._give_up(f"the thread {name} ended", error)

    def _give_up(self, why: str, error: BaseException | None) -> None:
        """Stop with an exit code that makes the supervisor start a new process; from any thread."""
        self._exit_code = 1
        self.rooms.failed = True
        log.error("%s (%s): stopping, to be started again", why, error or "no error")
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
        details = status.engine_event(self.rooms.engine) if self.rooms.engine else {}
        delivery.event("engine", news.code, status.shortened(news.message), details)
        if self.rooms.engine is None:
            self.rooms.held = news.message  # why there is none yet
            self._limit_duration()
        if news.exit_code is not None:
            self._exit_code = news.exit_code
            self._stop()

    def _pump(self) -> None:
        if self.rooms.delivery is None:  # nothing flows before it is there
            return
        for item in self.rooms.outbox.drain():
            try:
                self._take(item, self.rooms.delivery)
            except Exception as error:  # noqa: BLE001 - one item must not cost those behind it
                self._accident("delivering a result", error)

    def _take(self, item: Result | CameraStatus | EngineNews, delivery: Delivery) -> None:
        if isinstance(item, EngineNews):
            self._engine_changed(item, delivery)
        elif isinstance(item, CameraStatus):
            delivery.event("camera", item.state, status.camera_sentence(item), {"camera": item.name})
        else:
            self.rooms.board.publish(item)
            delivery.offer(item)
            self._metrics.observe(item)


def not_written(folder: Path, error: OSError) -> str:
    """One line for people about a data folder in which nothing can be kept."""
    text = f"{folder} cannot be written ({error.strerror}): no state is kept"
    if not isinstance(error, PermissionError):
        return text
    owner = f"{os.getuid()}:{os.getgid()}"
    return f"{text}; give the folder that is mounted there to this user: chown {owner} FOLDER"
