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
from visionedge.app.engine_host import EngineHost
from visionedge.app.http_backend import HttpBackend
from visionedge.app.hub_bridge import HubBridge
from visionedge.app.metrics import Metrics
from visionedge.app.overload_controller import OverloadController, OverloadEventCode
from visionedge.app.state import AppState
from visionedge.camera.camera import CameraStatus, InputResizer
from visionedge.camera.registry import CameraRegistry, SequencePosition, SequenceStore
from visionedge.config.documents import Document
from visionedge.config.schema import Config
from visionedge.engine.interface import Engine, EngineEvent
from visionedge.errors import UnavailableError, VisionedgeError
from visionedge.frames.types import FrameResult
from visionedge.iothub.client import EXIT_STUCK
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.desired_properties import ConfigurationSources
from visionedge.iothub.identity import Identity
from visionedge.iothub.image_requests import SEQUENCE_NAME
from visionedge.runtime.files import remove_partial_files
from visionedge.runtime.logs import LogLimiter
from visionedge.runtime.process_limits import configure_malloc, raise_descriptor_limit
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import ThreadGroup, TimedJoinExecutor, non_daemon_threads, run_on_thread
from visionedge.web.access_control import own_names
from visionedge.web.server import HttpServer

log = logging.getLogger(__name__)

T = TypeVar("T")

NO_CAMERA_WARNING = (
    "no camera is configured, so nothing is analysed: add one below `cameras` in the configuration file"
    " or in the desired properties, or start with --camera NAME=URI"
)

_TICK_S = 0.2
_SAVE_POSITIONS_EVERY_TICKS = 50
_MEASURE_INTERVAL_RANGE_S = (1.0, 5.0)
_JOIN_TIMEOUT_S = 2.0
_SECOND_JOIN_TIMEOUT_S = 1.0
_FLUSH_TIMEOUT_S = 1.5
_HOUSEKEEPING_THREADS = 8
_STOP_STEP_TIMEOUT_S = 2.0
"""The most that one step of the orderly stop waits for, where nothing else bounds it."""

STOP_TIMEOUT_S = 10.0
"""From the first sign of the stop to the end of the process, whatever hangs."""

_MAX_CONSECUTIVE_FAILURES = 50
"""Failures in a row of the housekeeping or of results on their way: then only a new process may help."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What `visionedge run` was asked for."""

    config_sources: ConfigurationSources
    data: Path
    messages: Path | None = None
    duration_s: float | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    inject: Path | None = None
    reload: Callable[[], Document] | None = None
    """Reads the local document again; None where there is no configuration file."""


def run(options: RunOptions) -> int:
    """Run the module until a signal, the end of its duration, or the death of a thread that must live.

    Returns the exit code.

    Raises:
        ConfigError, ModelError, DeviceError, UnavailableError: it could not be started.
    """
    configure_malloc()
    raise_descriptor_limit()
    before = set(threading.enumerate())
    service = Service(options)
    # Of no crew: it has to outlive them all.
    threading.Thread(target=service.enforce_stop_timeout, name="stop-limit", daemon=True).start()
    try:
        code = asyncio.run(service.main())
    finally:
        # While there is a thread that the interpreter would wait for, the time limit of the stop goes on.
        service.stop_started.set()
        if not non_daemon_threads(before):
            service.stop_finished.set()
    if service.still_running or non_daemon_threads(before):
        # A thread that hangs in a driver or in the SDK would hold the process for ever.
        logging.shutdown()
        os._exit(code)
    return code


class Service:
    """The life of the module: start, run, stop. Loop only where not said."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.state = AppState.of(
            options.config_sources.start.config, options.data, options.environ, self._wake
        )
        self.still_running: list[str] = []
        self.executor = TimedJoinExecutor(_HOUSEKEEPING_THREADS, "house")
        """For `asyncio.to_thread`: the module's own chores, which the loop would wait for without limit."""
        self._thread_group = ThreadGroup(self._on_thread_exit)
        self._engine_host = EngineHost(
            self.state, options.data, self._thread_group, self._on_thread_exit, inject=options.inject
        )
        self._overload_controller = OverloadController(
            self.state, self._engine_host, self._send_overload_event
        )
        self._hub_threads = ThreadGroup(
            self._on_thread_exit
        )  # must outlive the others: the last messages go through it
        self._metrics = Metrics(lambda: status.collect_samples(self.state))
        for folder in (options.data, options.data / "plans"):
            remove_partial_files(folder)
        self._sequences = SequenceStore(options.data / "sequences.json")
        self._hub_bridge: HubBridge | None = None
        self._backend = HttpBackend(self.state, self._engine_host.lineup, self._metrics)
        self._failure_log = LogLimiter(log)
        self._saving_works = True
        self._saving_positions: asyncio.Task[None] | None = None
        self._ends_at: asyncio.TimerHandle | None = None
        self._consecutive_failures = 0
        self.stop_started, self.stop_finished = threading.Event(), threading.Event()
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
            self._loop.add_signal_handler(number, self._on_stop_signal, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_sighup)
        await self._serve_http()
        return self._exit_code

    async def _serve_http(self) -> None:
        state = self.state
        # Before anything that takes its time: a port in use is told at once.
        self._server = await HttpServer.start(
            self._backend, state.config.http, own_names(self.options.environ)
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._shut_down)
            log.info("open %s (warming up: pictures come when the engine is ready)", self._server.url)
            stack.push_async_callback(self._run_stop_step, _STOP_STEP_TIMEOUT_S, "http", self._server.close)
            try:
                await self._start_and_run()
            except BaseException as error:
                # Known before the stop begins: it may be cut short.
                self._exit_code = error.exit_code if isinstance(error, VisionedgeError) else 1
                raise

    async def _start_and_run(self) -> None:
        state = self.state
        loaded = await self._unless_stopped(run_on_thread(self._thread_group, "loading", self._load_model))
        if loaded is None:
            return
        config_sources, resizer = loaded
        await self._server.apply(state.config.http)  # of the local document, if the kept one was of no use
        hub_bridge = self._hub_bridge = self._open_hub_bridge(config_sources)
        # The spool is opened here, and a disk may be slow.
        opening = run_on_thread(self._thread_group, "delivery", lambda: self._open_delivery(hub_bridge))
        delivery = state.delivery = await self._unless_stopped(opening)
        if delivery is None:
            return
        delivery.start()
        hub_bridge.start()
        self._report_lost_state(delivery, config_sources)
        try:
            await self._run_until_stopped(
                delivery, asyncio.ensure_future(self._start_cameras_and_engine(delivery, resizer))
            )
        except VisionedgeError:
            await hub_bridge.save_desired()
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

    def _report_lost_state(self, delivery: Delivery, config_sources: ConfigurationSources) -> None:
        """Tell the cloud of state files that were set aside."""
        kept = config_sources.last_good
        lost = {
            self._sequences.path.name: self._sequences.lost,
            "desired.json": None if kept is None else kept.lost,
        }
        for name, why in lost.items():
            if why is not None:
                text = f"{name} cannot be used ({why}) and was set aside; the module goes on without it"
                delivery.event("storage", "state-lost", text, {"file": name, "reason": why})

    def _load_model(self) -> tuple[ConfigurationSources, InputResizer | None]:
        """Load the model. What was kept of the twin must not keep the twin from mending it. Blocks."""
        config_sources, state = self.options.config_sources, self.state
        try:
            return config_sources, self._engine_host.load()
        except VisionedgeError as error:
            if config_sources.start.desired is None:
                raise
            log.warning("starting without the last good desired properties: %s", redact(str(error)))
        config_sources = config_sources.without_desired()
        inference = config_sources.start.config.inference
        state.config = config_sources.start.config
        state.batcher.limit(inference.max_batch, int(inference.max_age_seconds * 1e9))
        return config_sources, self._engine_host.load()

    def _open_hub_bridge(self, config_sources: ConfigurationSources) -> HubBridge:
        hub_bridge = HubBridge(
            self.state,
            self._backend,
            self._call_soon,
            config_sources,
            apply=self.reconfigure,
            cancel_pending_model=self._engine_host.cancel_pending_model,
            first_sequence=self._sequences.first(SEQUENCE_NAME),
        )
        self.state.inbound_statistics = hub_bridge.statistics
        return hub_bridge

    async def _start_cameras_and_engine(self, delivery: Delivery, resizer: InputResizer | None) -> None:
        """Cameras and engine, as soon as the model is there; everything else runs meanwhile."""
        state = self.state
        if resizer is None:
            self._limit_duration()
            log.info("the model has to be fetched first: %sreadyz tells how far it is", self._server.url)
            resizer = await self._engine_host.fetch()
        state.camera_registry = self._make_camera_registry(resizer)
        state.camera_registry.apply(state.config.cameras)
        if not state.config.cameras:
            log.warning("%s", NO_CAMERA_WARNING)
        # Where the clock is no help, a kill soon after must not bring these numbers again.
        await self._save_positions(self._thread_group)
        engine = await self._engine_host.open()
        state.camera_registry.begin()
        device = engine.info().device
        words = status.shorten(device.describe())
        delivery.event("engine", device.code, words, status.build_engine_event(engine.info()))
        if self._hub_bridge is not None:
            self._hub_bridge.retry()  # what waited for an engine can be in force now
        log.info("ready: open %s to look", self._server.url)
        self._ticks = 0
        self._limit_duration()

    def _limit_duration(self) -> None:
        """The duration runs from now on: the module is ready, or waits for its model or its device."""
        if self.options.duration_s is not None and self._ends_at is None:
            self._ends_at = self._loop.call_later(self.options.duration_s, self._on_duration_elapsed)

    def _on_duration_elapsed(self) -> None:
        if reasons := self.state.readiness():
            log.warning("the duration is over, and the module was not ready: %s", "; ".join(reasons))
        self._stop()

    def _open_delivery(self, listener: HubBridge) -> Delivery:
        identity = Identity.from_environ(self.options.environ)
        return Delivery.build(
            self.state.config.telemetry,
            identity,
            self.options.messages,
            self._hub_threads,
            data=self.options.data,
            on_stuck=self._on_hub_stuck,
            listener=listener,
        )

    def _make_camera_registry(self, resizer: InputResizer) -> CameraRegistry:
        return CameraRegistry(
            resizer,
            self.state.batcher,
            self._thread_group,
            first_sequence=self._sequences.first,
            last_epoch=self._sequences.last_epoch,
            on_change=self.state.loop_queue.put,
            hardware=self.state.config.inference.device != "cpu",
            held=True,
        )

    async def reconfigure(self, config: Config) -> dict[str, str]:
        """Make the running module that of another configuration, without disturbing what stays as it is.

        Gives the sections that could not be applied, each with the reason; those stay as they were.
        """
        self._apply_cameras(config)
        self.state.config = self.state.config.model_copy(update={"overload": config.overload})
        self._apply_telemetry(config)
        refused = await self._apply_http(config)
        return refused | await self._engine_host.apply(config)

    def _apply_cameras(self, config: Config) -> None:
        self.state.config = self.state.config.model_copy(update={"cameras": config.cameras})
        if self.state.camera_registry is not None:
            self.state.camera_registry.apply(config.cameras)
            for name in self.state.latest_results.statistics().cameras.keys() - config.cameras.keys():
                self.state.latest_results.forget(name)

    async def _apply_http(self, config: Config) -> dict[str, str]:
        before = self._server.url
        try:
            await self._server.apply(config.http)
        except UnavailableError as error:
            return {"http": str(error)}
        self.state.config = self.state.config.model_copy(update={"http": config.http})
        if self._server.url != before:
            log.info("open %s to look", self._server.url)
        return {}

    def _apply_telemetry(self, config: Config) -> None:
        if self.state.delivery is not None:
            self.state.config = self.state.config.model_copy(update={"telemetry": config.telemetry})
            self.state.delivery.apply(config.telemetry)

    async def _run_until_stopped(self, delivery: Delivery, starting: asyncio.Future[None]) -> None:
        """Until it is stopped, or could not begin."""
        # What kept it from beginning may come when it is stopped anyway, and nobody asks for it.
        starting.add_done_callback(lambda done: done.cancelled() or done.exception())
        stopped = asyncio.ensure_future(self._stopped.wait())
        ticking: asyncio.Future[None] | None = None
        while not self._stopped.is_set():
            if ticking is None or ticking.done():
                ticking = asyncio.ensure_future(self._tick(delivery))
            waiting: set[asyncio.Future[Any]] = {stopped} if starting.done() else {stopped, starting}
            # Not for the tick: whatever that hangs in, a stop is noticed.
            await asyncio.wait(waiting, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # raises what kept it from beginning
        starting.cancel()
        if ticking is not None:
            ticking.cancel()

    async def _tick(self, delivery: Delivery) -> None:
        """One round of what is done a few times a second; an error in it is no end, unless it stays."""
        before = self._consecutive_failures
        self._ticks += 1
        with self._housekeeping_step("the delivery"):
            delivery.tick()
        if self.state.camera_registry is not None:
            with self._housekeeping_step("watching the cameras"):
                self.state.camera_registry.check_liveness()
        if self._ticks % _SAVE_POSITIONS_EVERY_TICKS == 0:
            with self._housekeeping_step("forgetting cameras that are gone"):
                self._forget_removed_cameras()
            if self._saving_positions is None or self._saving_positions.done():
                self._saving_positions = asyncio.ensure_future(self._save_positions(self._thread_group))
        engine = self.state.engine
        if engine is not None and self._ticks >= self._measure_tick:
            self._measure_tick = self._ticks + round(self._measure_every_s / _TICK_S)
            with self._housekeeping_step("measuring the load"):
                await run_on_thread(self._thread_group, "measuring", lambda: self._measure(engine))
                await self._overload_controller.step()
        if self._consecutive_failures == before:
            self._consecutive_failures = 0

    @contextlib.contextmanager
    def _housekeeping_step(self, name: str) -> Iterator[None]:
        """A step of housekeeping, which is tried again."""
        try:
            yield
        except (OSError, MemoryError) as error:
            # The machine is short of something, which may pass and which a new process would lack as well.
            why = getattr(error, "strerror", None) or type(error).__name__
            self._failure_log.warning(f"{name} failed ({why}); trying again")
        except Exception as error:  # noqa: BLE001 - counted, and the end where it fails every time
            self._count_failure(name, error)

    def _count_failure(self, what: str, error: Exception) -> None:
        """Something unexpected; one that comes again and again ends the module, to be started again."""
        self._consecutive_failures += 1
        if self._consecutive_failures == _MAX_CONSECUTIVE_FAILURES:
            self._fail(f"{what} failed {_MAX_CONSECUTIVE_FAILURES} times in a row", error)
        else:
            self._failure_log.warning(f"{what} failed; trying again", error=error)

    def _forget_removed_cameras(self) -> None:
        """Cameras that left the configuration long ago leave the metrics and everything else in memory."""
        if self.state.camera_registry is not None:
            for name in self.state.camera_registry.forget_removed(self.state.config.cameras):
                self._metrics.forget(name)
                self.state.latest_results.forget(name)

    @property
    def _measure_every_s(self) -> float:
        """Three times in what counts as an overload, if that is not too often."""
        shortest_s, longest_s = _MEASURE_INTERVAL_RANGE_S
        return min(longest_s, max(shortest_s, self.state.config.overload.after_seconds / 3))

    def _measure(self, engine: Engine) -> None:
        """Note what the threads use, and what the cameras demand and get."""
        info = engine.info()
        child = info.process.pid if info.process else None
        asked = {} if self.state.camera_registry is None else self.state.camera_registry.counts()
        frames, gpu = self.state.batcher.statistics(), info.device.effective != "cpu"
        self.state.meter.take_sample(frames, asked, child=child, gpu=gpu)

    def _send_overload_event(self, code: OverloadEventCode, words: str, details: Mapping[str, Any]) -> None:
        if self.state.delivery is not None:
            self.state.delivery.event("module", code, words, details)

    async def _shut_down(self) -> None:
        """Stop cameras, lanes, results and messages, in the order in which data flows."""
        self.stop_started.set()
        self.state.stopping = True
        self.state.latest_results.close()
        if self._hub_bridge is not None:
            await self._run_stop_step(_STOP_STEP_TIMEOUT_S, "hub", self._hub_bridge.close)
        self._thread_group.stopping.set()  # from here on a lane that ends is no accident
        if self.state.camera_registry is not None:
            self.state.camera_registry.stop()
        self.state.batcher.close()
        self._engine_host.lineup.close()
        await self._run_stop_step(_STOP_STEP_TIMEOUT_S, "overload", self._overload_controller.close)
        # The crew of the hub, as the other one is stopping.
        self.still_running += await run_on_thread(self._hub_threads, "ending", self._close_engines)
        self.still_running += await run_on_thread(self._hub_threads, "ending", self._backend.close)
        self._drain_outbox()
        delivery = self.state.delivery
        if delivery is not None:
            delivery.flush()
            if not await run_on_thread(
                self._hub_threads, "closing", lambda: delivery.close(_FLUSH_TIMEOUT_S)
            ):
                self.still_running += self._hub_threads.alive() or ["hub"]
        await self._run_stop_step(
            _STOP_STEP_TIMEOUT_S, "sequences.json", lambda: self._save_positions(self._hub_threads)
        )
        if self.still_running:
            log.warning("left behind at the end: %s", ", ".join(self.still_running))
        log.info("stopped")

    async def _run_stop_step(self, seconds: float, what: str, step: Callable[[], Awaitable[Any]]) -> None:
        """A step of the stop, given up when it takes longer: the steps behind it still send and write."""
        try:
            async with asyncio.timeout(seconds):
                await step()
        except TimeoutError:
            self.still_running.append(what)
        except Exception:
            log.exception("stopping: the step '%s' failed", what)

    def enforce_stop_timeout(self) -> None:
        """End the process `STOP_TIMEOUT_S` after the stop began, whatever hangs; a thread of its own."""
        self.stop_started.wait()
        if not self.stop_finished.wait(STOP_TIMEOUT_S):
            log.warning("the stop took longer than %g s: ending at once", STOP_TIMEOUT_S)
            logging.shutdown()
            os._exit(self._exit_code)

    def _close_engines(self) -> list[str]:
        """Lanes first, then the engine, unless it is still opening or holds a lane; who is left. Blocks."""
        still_running = self._thread_group.join(_JOIN_TIMEOUT_S) if self.state.engine is not None else []
        self._engine_host.close()
        if still_running or self.state.engine is None:
            still_running = self._thread_group.join(_SECOND_JOIN_TIMEOUT_S)
            self._engine_host.close()  # also what was loaded while the threads ended
        return still_running + self._engine_host.still_running()

    async def _save_positions(self, thread_group: ThreadGroup) -> None:
        """Keep where the cameras are on disk, on a thread of the crew."""
        last: dict[str, SequencePosition] = {}
        if self.state.camera_registry is not None:
            last |= self.state.camera_registry.positions()
        if self._hub_bridge is not None:
            last |= {
                name: SequencePosition(number) for name, number in self._hub_bridge.next_sequences().items()
            }
        try:
            await run_on_thread(thread_group, "remembering", lambda: self._sequences.remember(last))
        except OSError as error:
            # Told once: the clock alone protects the numbers then, which is enough but for a clock set back.
            if self._saving_works:
                log.warning("%s", describe_unwritable_folder(self.options.data, error))
            self._saving_works = False
        else:
            self._saving_works = True

    def _on_stop_signal(self, number: int) -> None:
        if self._stopped.is_set():
            log.warning("asked a second time: ending at once")
            os._exit(128 + number)
        log.info("stopping (%s)", signal.Signals(number).name)
        self._stop()

    def _on_sighup(self) -> None:
        """SIGHUP: read the configuration file again."""
        if self.options.reload is None:
            log.warning("SIGHUP: there is no configuration file to read again; the module goes on")
        elif self._hub_bridge is None:
            log.warning("SIGHUP: the module is still starting; send it again when it is ready")
        else:
            log.info("SIGHUP: reading the configuration file again")
            self._hub_bridge.reload(self.options.reload)

    def _stop(self) -> None:
        self.state.stopping = True
        self.stop_started.set()
        self._stopped.set()

    def _on_thread_exit(self, name: str, error: BaseException | None) -> None:
        """Called from the dying thread: the module cannot go on without it."""
        self._fail(f"the thread {name} ended", error)

    def _fail(self, why: str, error: BaseException | None) -> None:
        """Stop with an exit code that makes the supervisor start a new process; from any thread."""
        self._exit_code = 1
        self.state.failed = True
        log.error("%s (%s): stopping, to be started again", why, error or "no error")
        self._call_soon(self._stop)

    def _on_hub_stuck(self) -> None:
        """Called from the thread `hub:client`: only another process can talk to the hub again."""
        if self._exit_code == 0:
            self._exit_code = EXIT_STUCK
            log.error("the IoT Hub SDK hangs for good: ending with %d, to be started again", EXIT_STUCK)
            self._call_soon(self._stop)

    # --- from the threads to the loop -----------------------------------------------------------------------

    def _wake(self) -> None:
        """Called from any thread, once each time the outbox turns non-empty."""
        self._call_soon(self._drain_outbox)

    def _call_soon(self, call: Callable[[], None]) -> None:
        # A thread that was left behind may still speak when the loop is closed; nobody listens then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def _on_engine_news(self, news: EngineEvent, delivery: Delivery) -> None:
        self._engine_host.lineup.start_lanes()
        info = self.state.engine_info()
        details = status.build_engine_event(info) if info else {}
        delivery.event("engine", news.code, status.shorten(news.message), details)
        if self.state.engine is None:
            self.state.waiting_reason = news.message  # why there is none yet
            self._limit_duration()
        if news.exit_code is not None:
            self._exit_code = news.exit_code
            self._stop()

    def _drain_outbox(self) -> None:
        if self.state.delivery is None:  # nothing flows before it is there
            return
        for item in self.state.loop_queue.drain():
            try:
                self._handle_item(item, self.state.delivery)
            except Exception as error:  # noqa: BLE001 - one item must not cost those behind it
                self._count_failure("delivering a result", error)

    def _handle_item(self, item: FrameResult | CameraStatus | EngineEvent, delivery: Delivery) -> None:
        if isinstance(item, EngineEvent):
            self._on_engine_news(item, delivery)
        elif isinstance(item, CameraStatus):
            delivery.event("camera", item.state, status.describe_camera(item), {"camera": item.name})
        else:
            self.state.latest_results.publish(item)
            delivery.offer(item)
            self._metrics.observe(item)


def describe_unwritable_folder(folder: Path, error: OSError) -> str:
    """One line for people about a data folder in which nothing can be kept."""
    text = f"{folder} cannot be written ({error.strerror}): no state is kept"
    if not isinstance(error, PermissionError):
        return text
    owner = f"{os.getuid()}:{os.getgid()}"
    return f"{text}; give the folder that is mounted there to this user: chown {owner} FOLDER"
