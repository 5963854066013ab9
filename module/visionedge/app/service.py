"""The service behind `visionedge run`: builds the parts of the module, starts them, and stops them in order.

Everything here runs on the asyncio loop of the main thread. Threads put results, camera states and engine
events into one queue (`AppState.loop_queue`); from there each result goes to HTTP, to IoT Hub and to the
metrics. The service is the writer of the sections `cameras`, `overload`, `telemetry` and `http`.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from visionedge.app import status
from visionedge.app.engine_host import EngineHost
from visionedge.app.housekeeping import TICK_S, FailureCounter, Housekeeping, PositionStore
from visionedge.app.http_backend import HttpBackend
from visionedge.app.hub_bridge import HubBridge
from visionedge.app.metrics import Metrics, collect_samples, identity_labels
from visionedge.app.overload_controller import OverloadController, OverloadEventCode
from visionedge.app.scene_host import SceneHost
from visionedge.app.second_stage import CameraAnswers, SecondStageHost
from visionedge.app.state import AppState
from visionedge.camera.camera import CameraStatus
from visionedge.camera.registry import CameraRegistry, SequenceStore
from visionedge.config.documents import Document
from visionedge.config.load import parse_config
from visionedge.config.made_token import MadeToken
from visionedge.config.schema import CameraConfig, Config, HttpConfig
from visionedge.engine.interface import EngineEvent
from visionedge.errors import UnavailableError, VisionedgeError
from visionedge.frames.types import DEFAULT_MODEL, FrameResult
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.desired_properties import ConfigurationSources
from visionedge.iothub.identity import Identity
from visionedge.iothub.image_requests import SEQUENCE_NAME
from visionedge.ops.doctor.host import this_host
from visionedge.ops.doctor.last_start import LAST_START_FILE_NAME, StartHistory
from visionedge.runtime.build_identity import read_build_identity
from visionedge.runtime.files import remove_partial_files
from visionedge.runtime.health_check import keep_address
from visionedge.runtime.logs import configure_logging
from visionedge.runtime.process_limits import configure_malloc, raise_descriptor_limit
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import (
    GROUP_S,
    ThreadGroup,
    TimedJoinExecutor,
    non_daemon_threads,
    run_on_thread,
)
from visionedge.runtime.watchdog import EXIT_HUNG, LoopWatchdog
from visionedge.web.access_control import own_names
from visionedge.web.server import HttpServer

log = logging.getLogger(__name__)

T = TypeVar("T")

NO_CAMERA_WARNING = (
    "no camera is configured, so nothing is analysed: add one below `cameras` in the configuration file"
    " or in the desired properties, or start with --camera NAME=URI"
)

STOP_TIMEOUT_S = 10.0
"""From the begin of the stop to the end of the process, even if a thread hangs."""

_STOP_STEP_TIMEOUT_S = 2.0
"""For each step of the stop that has no other limit."""

_JOIN_TIMEOUT_S = 2.0
_SECOND_JOIN_TIMEOUT_S = 1.0
_FLUSH_TIMEOUT_S = 1.5
_EXECUTOR_THREADS = 8
_SLOW_DISK_S = 10.0


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of `visionedge run`."""

    config_sources: ConfigurationSources
    data: Path
    messages: Path | None = None
    duration_s: float | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    inject: Path | None = None
    reload: Callable[[], Document] | None = None
    """Reads the local document again; None without a configuration file."""
    has_arguments: bool = False
    """Whether arguments of the command line are part of the local document."""


def run(options: RunOptions) -> int:
    """Run the module until a signal, the end of its duration, or the end of a thread that it needs.

    Returns the exit code.

    Raises:
        ConfigError, ModelError, DeviceError, UnavailableError: the module cannot be started.
    """
    configure_malloc()
    raise_descriptor_limit()
    before = set(threading.enumerate())
    service = Service(options)
    service.configure_logging()
    # In no thread group, as it has to outlive them all.
    threading.Thread(target=service.enforce_stop_timeout, name="stop-limit", daemon=True).start()
    try:
        code = asyncio.run(service.main())
    finally:
        # The time limit goes on while the interpreter would wait for a thread at its end.
        service.stop_started.set()
        if not non_daemon_threads(before):
            service.stop_finished.set()
    if service.still_running or non_daemon_threads(before):
        # A thread that hangs in a driver or in the SDK would keep the process alive without limit.
        logging.shutdown()
        os._exit(code)
    return code


class Service:
    """One run of the module: start, run, stop. For the loop, unless a method says otherwise."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.state = AppState.of(
            options.config_sources.start.config, options.data, options.environ, self._wake
        )
        self.still_running: list[str] = []
        self.executor = TimedJoinExecutor(_EXECUTOR_THREADS, "house")
        """For `asyncio.to_thread`; asyncio's own executor would be joined without a time limit."""
        self.stop_started, self.stop_finished = threading.Event(), threading.Event()
        self.failures = FailureCounter(self._fail)
        self._thread_group = ThreadGroup(self._on_thread_exit)
        # The last messages are sent through these threads when all others have ended.
        self._hub_threads = ThreadGroup(self._on_thread_exit)
        self._register_sections()
        self._engine_host = EngineHost(
            self.state, options.data, self._thread_group, self._on_thread_exit, inject=options.inject
        )
        self._overload_controller = OverloadController(
            self.state, self._engine_host, self._send_overload_event
        )
        self._second_stage = SecondStageHost(
            self._thread_group,
            lambda model: self._engine_host.lanes.use(model=model),
            self.state.loop_queue.put,
            self.state.batcher.charge,
        )
        self._scene_host = SceneHost(
            self.state.snapshot,
            options.data,
            self._hub_threads,
            deliver=lambda documents: self._call_soon(partial(self._offer_scene, documents)),
            second_stage=self._second_stage,
        )
        self._metrics = Metrics(
            lambda: collect_samples(self.state.snapshot()),
            identity_labels(Identity.from_environ(options.environ)),
        )
        self._backend = HttpBackend(
            self.state.snapshot, self._engine_host.lanes, self._metrics, self._scene_host
        )
        self.state.set_scenes(self._scene_host.statistics)
        for folder in (options.data, options.data / "plans"):
            remove_partial_files(folder)
        self._sequences = SequenceStore(options.data / "sequences.json")
        self._positions = PositionStore(self._sequences, self.state, self._hub_sequences, options.data)
        self.housekeeping = Housekeeping(
            self.state,
            self._thread_group,
            controller=self._overload_controller,
            positions=self._positions,
            metrics=self._metrics,
            scene_host=self._scene_host,
            failures=self.failures,
        )
        local = None if options.has_arguments else parse_config(options.config_sources.local)
        self._start_history = StartHistory(options.data / LAST_START_FILE_NAME, local)
        self._made_token, self._token_announced = MadeToken(options.data), False
        self._hub_bridge: HubBridge | None = None
        self._ends_at: asyncio.TimerHandle | None = None
        self._exit_code = 0

    # --- start ----------------------------------------------------------------------------------------------

    async def main(self) -> int:
        """Start, run until stopped, stop; the exit code."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(self.executor)
        self._stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_stop_signal, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_sighup)
        watchdog = LoopWatchdog()
        watchdog.start(self._loop)
        try:
            await self._serve_http()
        finally:
            watchdog.close()
        return self._exit_code

    async def _serve_http(self) -> None:
        # Before the slow parts, so that a port in use is reported at once.
        http = await self._with_token(self.state.snapshot().config.http)
        self._server = await HttpServer.start(self._backend, http, own_names(self.options.environ))
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._shut_down)
            await self._keep_address()
            log.info("open %s (warming up: pictures come when the engine is ready)", self._server.url)
            log.info("visionedge %s", await asyncio.to_thread(read_build_identity))
            stack.push_async_callback(self._run_stop_step, _STOP_STEP_TIMEOUT_S, "http", self._server.close)
            try:
                await self._start_and_run()
            except BaseException as error:
                # Set before the stop, which may be cut short.
                self._exit_code = error.exit_code if isinstance(error, VisionedgeError) else 1
                raise

    async def _start_and_run(self) -> None:
        loaded = await self._unless_stopped(run_on_thread(self._thread_group, "loading", self._load_models))
        if loaded is None:
            return
        config_sources, is_complete = loaded
        # The section of the local document, if the last good desired properties could not be used.
        await self._server.apply(await self._with_token(self.state.snapshot().config.http))
        hub_bridge = self._hub_bridge = self._make_hub_bridge(config_sources)
        # On a thread, as it opens the spool, and a disk may be slow.
        opening = run_on_thread(self._thread_group, "delivery", lambda: self._open_delivery(hub_bridge))
        slow = self._loop.call_later(
            _SLOW_DISK_S, log.warning, "the spool does not open: the disk of the data folder hangs; waiting"
        )
        delivery = await self._unless_stopped(opening)
        slow.cancel()
        if delivery is None:
            return
        self.state.set_delivery(delivery)
        delivery.start()
        self._drain_until_empty()
        hub_bridge.start()
        self._report_state_files(delivery, config_sources)
        try:
            await self._run_until_stopped(
                delivery, asyncio.ensure_future(self._start_cameras_and_engines(delivery, is_complete))
            )
        except VisionedgeError:
            # For the next start, as this one has failed with older ones.
            await hub_bridge.desired.save_pending()
            raise

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of the work, or None if the module was stopped before."""
        working: asyncio.Future[T] = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopped.wait())
        both: set[asyncio.Future[Any]] = {working, stopped}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if working.done():
            return working.result()
        working.cancel()
        return None

    def _load_models(self) -> tuple[ConfigurationSources, bool]:
        """Load the models; with the local configuration alone if the last good desired properties fail.

        The module has to start so that the twin can correct them. False: some are downloaded later. Blocks.
        """
        config_sources = self.options.config_sources
        self._start_history.log_changes(this_host(self.options.environ), config_sources.start.config)
        try:
            return config_sources, self._engine_host.load()
        except VisionedgeError as error:
            if config_sources.start.desired is None:
                raise
            log.warning("starting without the last good desired properties: %s", redact(str(error)))
        config_sources = config_sources.without_desired()
        config = config_sources.start.config
        self.state.restart_with(config)
        self.configure_logging()
        self.state.batcher.limit(config.inference.max_batch, int(config.inference.max_age_seconds * 1e9))
        return config_sources, self._engine_host.load()

    def _make_hub_bridge(self, config_sources: ConfigurationSources) -> HubBridge:
        hub_bridge = HubBridge(
            self.state,
            self._backend,
            self._call_soon,
            config_sources,
            cancel_pending_model=self._engine_host.cancel_pending_model,
            first_sequence=self._sequences.first(SEQUENCE_NAME),
        )
        self.state.set_inbound_statistics(hub_bridge.statistics)
        return hub_bridge

    def _hub_sequences(self) -> Mapping[str, int]:
        return {} if self._hub_bridge is None else self._hub_bridge.next_sequences()

    def _open_delivery(self, listener: HubBridge) -> Delivery:
        identity = Identity.from_environ(self.options.environ)
        return Delivery.build(
            self.state.snapshot().config.telemetry,
            identity,
            self.options.messages,
            self._hub_threads,
            data=self.options.data,
            on_stuck=self._on_hub_stuck,
            listener=listener,
        )

    def _report_state_files(self, delivery: Delivery, config_sources: ConfigurationSources) -> None:
        """Send an event for each state file that was set aside, or that a newer version owns."""
        last_good = config_sources.last_good
        files = [self._sequences.file, *([] if last_good is None else [last_good.file])]
        for file in files:
            name = file.path.name
            if file.lost is not None:
                text = f"{name} cannot be used ({file.lost}) and was set aside; the module goes on without it"
                delivery.event("storage", "state-lost", text, {"file": name, "reason": file.lost})
            if file.newer is not None:
                delivery.event("storage", "state-newer", file.newer, {"file": name})
        self.state.set_newer_state(tuple(file.newer for file in files if file.newer is not None))

    async def _start_cameras_and_engines(self, delivery: Delivery, is_complete: bool) -> None:
        """Start cameras and engines as soon as the models are there; everything else runs meanwhile."""
        if not is_complete:
            self._limit_duration()
            log.info("a model is downloaded first; %sreadyz shows the progress", self._server.url)
        registry = self._make_camera_registry()
        self.state.set_camera_registry(registry)
        cameras = self.state.snapshot().config.cameras
        await self._configure_scenes(cameras, delivery)
        registry.apply(cameras)
        if not cameras:
            log.warning("%s", NO_CAMERA_WARNING)
        # A kill soon after the start, with a clock that was set back, must not repeat these numbers.
        await self._positions.save(self._thread_group)
        await self._engine_host.open_loaded()
        registry.begin()
        await self._engine_host.open_missing()
        infos = self.state.snapshot().engine_infos()
        for name, info in infos.items():
            text = status.shorten(info.device.describe())
            text = f"model {name}: {text}" if name else text
            delivery.event("engine", info.device.code, text, status.build_engine_event(info, name))
        if self._hub_bridge is not None:
            self._hub_bridge.desired.retry()  # sections that waited for the engine can be applied now
        log.info("ready: open %s to look", self._server.url)
        self._limit_duration()
        config = self.state.snapshot().config
        keep = partial(self._start_history.keep, config, infos[DEFAULT_MODEL].device)
        await run_on_thread(self._thread_group, "remembering", keep)

    def _make_camera_registry(self) -> CameraRegistry:
        return CameraRegistry(
            self._engine_host.resizers(),
            self.state.batcher,
            self._thread_group,
            first_sequence=self._sequences.first,
            last_epoch=self._sequences.last_epoch,
            on_change=self.state.loop_queue.put,
            hardware=self.state.snapshot().config.inference.device != "cpu",
            start_paused=True,
        )

    def _limit_duration(self) -> None:
        """Begin to count the duration: the module is ready, or waits for its model or its device."""
        if self.options.duration_s is not None and self._ends_at is None:
            self._ends_at = self._loop.call_later(self.options.duration_s, self._on_duration_elapsed)

    def _on_duration_elapsed(self) -> None:
        if reasons := self.state.snapshot().readiness():
            log.warning("the duration is over, and the module was not ready: %s", "; ".join(reasons))
        self._stop()

    # --- sections of the configuration ----------------------------------------------------------------------

    def _register_sections(self) -> None:
        """Become the writer of the sections that need no engine."""
        register = self.state.register
        self._camera_sections = register(
            "cameras",
            "cameraDefaults",
            apply=self._apply_cameras,
            pending=self._describe_waiting_cameras,
        )
        self._overload_section = register("overload", apply=self._apply_overload)
        self._telemetry_section = register("telemetry", apply=self._apply_telemetry)
        self._http_section = register("http", apply=self._apply_http)
        self._events_section = register("events", apply=self._apply_events)
        self._log_section = register("log", apply=self._apply_log)

    def _describe_waiting_cameras(self) -> str | None:
        return self._engine_host.describe_waiting_cameras()

    async def _apply_cameras(self, config: Config) -> Mapping[str, str]:
        if problems := self._engine_host.find_unknown_labels(config):
            return {"cameras": "; ".join(problems)}
        self._camera_sections.adopt(config)
        self._engine_host.select_cameras(config.cameras)
        now = self.state.snapshot()
        if (registry := now.camera_registry) is not None and now.delivery is not None:
            await self._configure_scenes(config.cameras, now.delivery)
            registry.apply(config.cameras)
            results = self.state.latest_results
            for name in results.statistics().cameras.keys() - config.cameras.keys():
                results.forget(name)
        return {}

    async def _configure_scenes(self, cameras: Mapping[str, CameraConfig], delivery: Delivery) -> None:
        delivery.expect_scene(any(camera.zones or camera.lines for camera in cameras.values()))
        await self._scene_host.configure(cameras)

    async def _apply_overload(self, config: Config) -> Mapping[str, str]:
        self._overload_section.adopt(config)  # the controller reads it at its next step
        return {}

    async def _apply_telemetry(self, config: Config) -> Mapping[str, str]:
        if (delivery := self.state.snapshot().delivery) is not None:
            delivery.apply(config.telemetry)
            self._telemetry_section.adopt(config)
        return {}

    async def _apply_http(self, config: Config) -> Mapping[str, str]:
        before = self._server.url
        try:
            await self._server.apply(await self._with_token(config.http))
        except UnavailableError as error:
            return {"http": str(error)}
        self._http_section.adopt(config)
        await self._keep_address()
        if self._server.url != before:
            log.info("open %s to look", self._server.url)
        return {}

    async def _keep_address(self) -> None:
        """Write down the address, which the health check of a container reads."""
        await asyncio.to_thread(keep_address, self.options.data, self._server.url)

    async def _with_token(self, http: HttpConfig) -> HttpConfig:
        completed = await asyncio.to_thread(self._made_token.lay_under, http, make=True)
        if http.lacks_token and not self._token_announced:
            self._token_announced = True
            log.info(
                "HTTP on %s asks for a token, made at the first start: `visionedge token` prints it"
                " (in a container: docker exec NAME visionedge token)",
                http.host,
            )
        return completed

    async def _apply_events(self, config: Config) -> Mapping[str, str]:
        self._events_section.adopt(config)
        await self._scene_host.apply_events(config.events)
        return {}

    async def _apply_log(self, config: Config) -> Mapping[str, str]:
        if config.log != self.state.snapshot().config.log:
            self._log_section.adopt(config)
            self.configure_logging()
        return {}

    def configure_logging(self) -> None:
        """Log as the configuration in force says."""
        wanted = self.state.snapshot().config.log
        inside_iot_edge = Identity.from_environ(self.options.environ) is not None
        configure_logging(wanted.level, wanted.format or ("iotedge" if inside_iot_edge else "text"))

    # --- run ------------------------------------------------------------------------------------------------

    async def _run_until_stopped(self, delivery: Delivery, starting: asyncio.Future[None]) -> None:
        """Tick until the module is stopped.

        Raises:
            VisionedgeError: cameras and engine cannot be started.
        """
        # An error of the start that comes after the stop is not raised; mark it as retrieved.
        starting.add_done_callback(lambda done: done.cancelled() or done.exception())
        stopped = asyncio.ensure_future(self._stopped.wait())
        ticking: asyncio.Future[None] | None = None
        while not self._stopped.is_set():
            if ticking is None or ticking.done():
                ticking = asyncio.ensure_future(self.housekeeping.tick(delivery))
            waiting: set[asyncio.Future[Any]] = {stopped} if starting.done() else {stopped, starting}
            # The tick is not waited for, so that a stop is noticed even if a tick hangs.
            await asyncio.wait(waiting, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # raises the error of the start
        starting.cancel()
        if ticking is not None:
            ticking.cancel()

    def _wake(self) -> None:
        """Called from any thread when results wait and no drain is scheduled."""
        self._call_soon(self._drain_until_empty)

    def _call_soon(self, call: Callable[[], None]) -> None:
        # A thread that outlived the stop may still call when the loop is closed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def _drain_until_empty(self) -> None:
        if self.drain_queue(stay_awake=True):
            self._loop.call_later(GROUP_S, self._drain_until_empty)

    def drain_queue(self, *, stay_awake: bool = False) -> bool:
        """Pass on what the threads have put into the queue, once there is a delivery; whether it was any."""
        delivery = self.state.snapshot().delivery
        if delivery is None:
            return False
        items = self.state.loop_queue.drain(stay_awake=stay_awake)
        for item in items:
            try:
                self._handle_item(item, delivery)
            except Exception as error:  # noqa: BLE001 - an item that fails must not stop those behind it
                self.failures.record("delivering a result", error)
        return bool(items)

    def _handle_item(
        self, item: FrameResult | CameraAnswers | CameraStatus | EngineEvent, delivery: Delivery
    ) -> None:
        if isinstance(item, EngineEvent):
            self._handle_engine_event(item, delivery)
        elif isinstance(item, CameraAnswers):
            self._scene_host.take_answers(item)
        elif isinstance(item, CameraStatus):
            delivery.event("camera", item.state, status.describe_camera(item), {"camera": item.name})
        else:
            result = self._scene_host.update(item)
            self.state.latest_results.publish(result)
            delivery.offer(result)
            self._metrics.observe(result)

    def _offer_scene(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Scene events are stored: give them to the delivery, which is there before the first camera."""
        if (delivery := self.state.snapshot().delivery) is not None:
            with self.failures.step("delivering scene events"):
                delivery.offer_scene(documents)

    def _handle_engine_event(self, event: EngineEvent, delivery: Delivery) -> None:
        self._engine_host.lanes.start_lanes()
        info = self.state.snapshot().engine_info(event.model)
        details = status.build_engine_event(info, event.model) if info else {}
        delivery.event("engine", event.code, status.shorten(event.message), details)
        if info is None:
            self.state.set_waiting_reason(event.message)
            self._limit_duration()
        if event.exit_code is not None:
            self._exit_code = event.exit_code
            self._stop()

    def _send_overload_event(self, code: OverloadEventCode, message: str, details: Mapping[str, Any]) -> None:
        self.state.snapshot().send_event("module", code, message, details)

    # --- signals and failures -------------------------------------------------------------------------------

    def _on_stop_signal(self, number: int) -> None:
        if self._stopped.is_set():
            log.warning("%s again: ending at once", signal.Signals(number).name)
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
            self._hub_bridge.desired.reload(self.options.reload)

    def _stop(self) -> None:
        self.state.mark_stopping()
        self.stop_started.set()
        self._stopped.set()

    def _on_thread_exit(self, name: str, error: BaseException | None) -> None:
        """Called on the thread that ends: the module cannot go on without it."""
        self._fail(f"the thread {name} ended", error)

    def _fail(self, why: str, error: BaseException | None) -> None:
        """Stop with an exit code that makes the supervisor start a new process. From any thread."""
        self._exit_code = 1
        self.state.mark_failed()
        log.error("%s (%s): stopping, to be started again", why, error or "no error")
        self._call_soon(self._stop)

    def _on_hub_stuck(self) -> None:
        """Called on the thread `hub:client`: only a new process can connect to the hub again."""
        if self._exit_code == 0:
            self._exit_code = EXIT_HUNG
            log.error("the IoT Hub SDK hangs: stopping with exit code %d, to be started again", EXIT_HUNG)
            self._call_soon(self._stop)

    # --- stop -----------------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """Stop cameras, lanes, results and messages, in the order in which data flows."""
        self.stop_started.set()
        self.state.mark_stopping()
        self.state.latest_results.close()
        if self._hub_bridge is not None:
            await self._run_stop_step(_STOP_STEP_TIMEOUT_S, "hub", self._hub_bridge.close)
        self._thread_group.stopping.set()  # a lane that ends from here on is not a failure
        now = self.state.snapshot()
        if now.camera_registry is not None:
            now.camera_registry.stop()
        self.state.batcher.close()
        self._second_stage.close()
        self._engine_host.lanes.close()
        await self._run_stop_step(_STOP_STEP_TIMEOUT_S, "overload", self._overload_controller.close)
        # On the threads of the hub, as the other group takes no new threads while it stops.
        self.still_running += await run_on_thread(self._hub_threads, "ending", self._close_engines)
        self.still_running += await run_on_thread(self._hub_threads, "ending", self._backend.close)
        self.drain_queue()
        # Its last events come to the loop before this returns, so the delivery has them.
        await run_on_thread(self._hub_threads, "ending", lambda: self._scene_host.flush(_STOP_STEP_TIMEOUT_S))
        is_clean = now.delivery is None or await self._close_delivery(now.delivery)
        is_clean &= await run_on_thread(
            self._hub_threads, "ending", lambda: self._scene_host.close(_STOP_STEP_TIMEOUT_S)
        )
        if not is_clean:
            self.still_running += self._hub_threads.alive() or ["hub"]
        await self._run_stop_step(
            _STOP_STEP_TIMEOUT_S, "sequences.json", lambda: self._positions.save(self._hub_threads)
        )
        if self.still_running:
            log.warning("still running at the end: %s", ", ".join(self.still_running))
        log.info("stopped")

    async def _close_delivery(self, delivery: Delivery) -> bool:
        """Send what waits, within a limit of time; False if a thread of the delivery hangs."""
        delivery.flush()
        closed = await run_on_thread(self._hub_threads, "closing", lambda: delivery.close(_FLUSH_TIMEOUT_S))
        self._scene_host.acknowledge(delivery.take_acknowledged())
        return closed

    async def _run_stop_step(self, seconds: float, what: str, step: Callable[[], Awaitable[Any]]) -> None:
        """Run a step of the stop, and cancel it after its time, as later steps have to send and to write."""
        try:
            async with asyncio.timeout(seconds):
                await step()
        except TimeoutError:
            self.still_running.append(what)
        except Exception:
            log.exception("stopping: the step '%s' failed", what)

    def _close_engines(self) -> list[str]:
        """Close the lanes, then the engine, unless it is still opening or a lane uses it. Blocks.

        Returns the names of the threads that still run.
        """
        opened = bool(self.state.snapshot().engine_infos())
        still_running = self._thread_group.join(_JOIN_TIMEOUT_S) if opened else []
        self._engine_host.close()
        if still_running or not opened:
            still_running = self._thread_group.join(_SECOND_JOIN_TIMEOUT_S)
            self._engine_host.close()  # also an engine that was loaded while the threads ended
        return still_running + self._engine_host.still_running()

    def enforce_stop_timeout(self) -> None:
        """End the process `STOP_TIMEOUT_S` after the stop began, even if a thread hangs. On a thread."""
        self.stop_started.wait()
        if not self.stop_finished.wait(STOP_TIMEOUT_S):
            log.warning("the stop took longer than %g s: ending at once", STOP_TIMEOUT_S)
            logging.shutdown()
            os._exit(self._exit_code)
