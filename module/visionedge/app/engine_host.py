"""The model and the engine in use, and how others take their place while the module runs.

Another engine is opened and warmed up beside the one in use, and frames go to it only then; when any step
fails, the old one has never stopped. `EngineHost` is the writer of the sections `model` and `inference`.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visionedge.app.state import AppState
from visionedge.camera.camera import InputResizer
from visionedge.config.schema import CameraConfig, Config, InferenceConfig, list_class_keys
from visionedge.engine.candidates import has_candidates
from visionedge.engine.engine_choice import EngineCandidate
from visionedge.engine.interface import Engine
from visionedge.engine.lanes import LanePool
from visionedge.engine.local_engine import open_engine
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool, compute_block_count
from visionedge.errors import ConfigError, ModelError, VisionedgeError
from visionedge.model.download import DownloadRetryPolicy
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection, find_unknown_classes
from visionedge.model.provider import MAX_CHANGE_TRIES, ModelProvider, ModelSource
from visionedge.runtime.process_limits import usable_cores
from visionedge.runtime.threads import OnThreadExit, ThreadGroup, run_on_thread

log = logging.getLogger(__name__)

ModelEventCode = Literal["model-changed", "model-refused", "model-waiting"]

_DRAIN_TIMEOUT_S = 10.0
_FIRST_ENGINE_TIMEOUT_S = 10.0

_KEYS_NEEDING_NEW_ENGINE = (
    "device",
    "runtime",
    "parity",
    "max_batch",
    "precision",
    "runtime",
    "latency_budget_ms",
    "process",
    "remote",
)
"""Fields of `InferenceConfig` that an open engine cannot change."""


@dataclass(slots=True)
class EngineInstance:
    """A model, its engine once that is open, and what was made for the two.

    `thread_group` is for the engine alone. `has_faster_candidates`: some may be faster on the CPU; None: not
    looked up yet.
    """

    source: ModelSource
    model: Model
    selection: Selection
    inference: InferenceConfig
    frame_pool: SharedFramePool | None
    thread_group: ThreadGroup
    engine: Engine | None = None
    engine_process: EngineClient | None = None
    has_faster_candidates: bool | None = None

    @property
    def resizer(self) -> InputResizer:
        """How cameras prepare frames for the model."""
        spec = self.model.input
        return InputResizer(spec) if self.frame_pool is None else InputResizer(spec, self.frame_pool.allocate)

    def close(self) -> None:
        """Close the engine, also one that is still opening, and free its memory. Blocks."""
        closing = self.engine_process or self.engine
        if closing is not None:
            closing.close()
        if self.frame_pool is not None:
            self.frame_pool.close()


class EngineHost:
    """Loads models and opens engines on threads; every other method is for the loop.

    Args:
        state: what the host publishes the engine and its sections to.
        data: the data folder.
        thread_group: the threads of the lanes, and those that load and open.
        on_thread_exit: called when a thread of an engine has ended.
        retry_policy: the pauses between tries of a download.
        inject: a script of faults, for tests.
    """

    def __init__(
        self,
        state: AppState,
        data: Path,
        thread_group: ThreadGroup,
        on_thread_exit: OnThreadExit,
        *,
        retry_policy: DownloadRetryPolicy | None = None,
        inject: Path | None = None,
    ) -> None:
        self._state = state
        self._data = data
        self._thread_group = thread_group
        self._on_thread_exit = on_thread_exit
        self._inject = inject
        self._change_lock = asyncio.Lock()
        self._current: EngineInstance | None = None
        self._first_instance: EngineInstance | None = None
        self._candidate: EngineInstance | None = None
        self._substitute: EngineInstance | None = None
        self._thread_groups: list[ThreadGroup] = []
        self._first_engine_ready = asyncio.Event()
        self._last_refusal: tuple[str, str] | None = None
        self.lanes = LanePool(state.batcher, thread_group, state.loop_queue.put)
        self._provider = ModelProvider(
            data, thread_group, retry_policy=retry_policy, on_failure=self._report_download_wait
        )
        state.set_fetch_progress(lambda: self._provider.message)
        self._sections = state.register("model", "inference", apply=self.apply, pending=self._pending_reason)

    @property
    def _config(self) -> Config:
        return self._state.snapshot().config

    def load(self) -> InputResizer | None:
        """Load the model of the configuration; return how cameras prepare frames for it. Blocks.

        None if the model has to be downloaded first.

        Raises:
            ConfigError, ModelError, UnavailableError: the model cannot be used.
        """
        source = self._provider.local_source(self._config.model)
        return None if source is None else self._set_first_instance(self._prepare(source, self._config))

    async def fetch(self) -> InputResizer:
        """Download the model of the configuration, with no limit of time, and load it.

        Raises:
            ConfigError, ModelError, UnavailableError: as `load`.
        """
        while True:
            config = self._config
            source = await self._provider.fetch(config.model)
            if source is None:
                continue  # stopped, because another configuration came
            prepared = functools.partial(self._prepare, source, config)
            instance = await run_on_thread(self._thread_group, "loading", prepared)
            if (config.model, config.inference) == (self._config.model, self._config.inference):
                return self._set_first_instance(instance)
            await asyncio.to_thread(instance.close)

    async def open(self) -> Engine:
        """Open and warm up the engine of the model that was loaded, and start its lanes.

        Raises:
            VisionedgeError: the engine cannot be opened, or it was closed meanwhile.
        """
        assert self._first_instance is not None  # noqa: S101 - `load` comes first
        instance = self._first_instance
        try:
            engine = instance.engine = await self._open_engine(instance, wait_for_device=True)
        except VisionedgeError:
            if self._current is None or self._current.engine is None:
                raise
            return self._current.engine  # the engine of a newer configuration was opened first
        self._activate(instance)
        await run_on_thread(
            self._thread_group, "tidying", lambda: self._provider.evict([instance.model.sha256])
        )
        return engine

    async def apply(self, wanted: Config) -> dict[str, str]:
        """Make model and inference those of another configuration; the section that is rejected, and why.

        Waits a while for the first engine where there is none yet; the sections are pending after that.
        """
        if wanted.model != self._config.model:
            self._provider.stop()  # a newer change supersedes a download for an older one
        first = self._first_instance if self._current is None else None
        if first is not None:
            waits_for_device = self._state.snapshot().waiting_reason is not None
            if wanted.model == self._config.model and not _needs_new_engine(
                first.inference, wanted.inference
            ):
                # The engine may be waiting for its device only because of the fallback that changes here.
                _apply_fallback(first, wanted.inference)
                waits_for_device = False
            if not waits_for_device and not await self._wait_for_first_engine():
                return {}
        async with self._change_lock:
            try:
                await self._apply(wanted)
            except VisionedgeError as error:
                return self._report_refusal(wanted, error)
            self._last_refusal = None
        await self._wait_for_first_engine()
        return {}

    def find_unknown_classes(self, wanted: Config) -> list[str]:
        """The classes of cameras that the model does not have; none while another model is wanted."""
        model = self._state.snapshot().loaded_model
        if model is None or wanted.model != self._config.model:
            return []
        return _find_classes_of_cameras(model, wanted.cameras)

    def select_cameras(self, cameras: Mapping[str, CameraConfig]) -> None:
        """Use the classes, confidence and tracking of these cameras from the next batch on."""
        for instance in (self._first_instance, self._current, self._substitute):
            if instance is not None:
                instance.selection = instance.selection.for_cameras(instance.model, cameras)
        running = self._substitute or self._current
        if running is not None:
            self._state.set_selection(running.selection)
            self.lanes.select(running.selection)

    def cancel_pending_model(self) -> None:
        """Cancel the download of a pending model change; a newer change supersedes it."""
        self._provider.stop()

    def close(self) -> None:
        """Close the engines, also one that is still opening. Blocks."""
        self.lanes.close()
        for instance in (self._first_instance, self._candidate, self._substitute, self._current):
            if instance is not None:
                instance.close()

    def still_running(self) -> list[str]:
        """The threads of engines that still run."""
        return [name for thread_group in self._thread_groups for name in thread_group.alive()]

    # --- a faster engine for a while (`overload_controller.VariantSwitcher`) --------------------------------

    @property
    def substitute_precision(self) -> str | None:
        """The precision of the substitute engine; None without a substitute."""
        substitute = self._substitute
        return None if substitute is None or substitute.engine is None else _find_precision(substitute.engine)

    async def can_try_faster_variant(self) -> bool:
        """Whether another precision may be faster than the engine in use.

        Only on the CPU, only with `precision: auto`, and only before a first try with this engine.
        """
        instance = self._current
        if instance is None or instance.engine is None or self._substitute is not None:
            return False
        info = instance.engine.info()
        if info.choice.precision != "fp32" or info.device.effective != "cpu":
            return False
        if instance.inference.precision != "auto":
            return False
        if instance.has_faster_candidates is None:
            runtime = instance.inference.runtime
            look = functools.partial(has_candidates, instance.model, info.choice, runtime, data=self._data)
            instance.has_faster_candidates = await asyncio.to_thread(look)
        return instance.has_faster_candidates

    async def start_substitute(self) -> str | None:
        """Open the fastest precision on the CPU and send frames to it; None if no other one is faster.

        The engine of the configuration stays open, and goes on probing for a lost device.

        Raises:
            VisionedgeError: the substitute cannot be opened.
        """
        async with self._change_lock:
            previous = self._current
            if previous is None or previous.engine is None or self._substitute is not None:
                return self.substitute_precision
            previous.has_faster_candidates = False  # one try for each engine
            inference = self._config.inference.model_copy(update={"device": "cpu"})
            config = self._config.model_copy(update={"inference": inference})
            instance = await self._open_candidate(previous.source, config)
            engine, requested = instance.engine, previous.engine
            if engine is None or _find_candidate(engine) == _find_candidate(requested):
                await asyncio.to_thread(instance.close)
                return None
            previous.has_faster_candidates = True
            self._substitute = instance
            self._switch_to(instance, engine, in_place_of=requested)
            await asyncio.to_thread(self.lanes.drain_previous, _DRAIN_TIMEOUT_S)
            return self.substitute_precision

    async def stop_substitute(self) -> None:
        """Send frames to the engine of the configuration again, and close the substitute."""
        async with self._change_lock:
            substitute, previous = self._substitute, self._current
            if substitute is None or previous is None or previous.engine is None:
                return
            self._substitute = None
            self._switch_to(previous, previous.engine)
            await asyncio.to_thread(self._drain_and_close, substitute)

    async def _wait_for_first_engine(self) -> bool:
        """Wait for the first engine, `_FIRST_ENGINE_TIMEOUT_S` at most; whether there is one."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._first_engine_ready.wait(), _FIRST_ENGINE_TIMEOUT_S)
        return self._first_engine_ready.is_set()

    def _pending_reason(self) -> str | None:
        if self._first_engine_ready.is_set():
            return None
        return f"not in use yet: {self._state.snapshot().no_engine_reason}"

    # --- log and events -------------------------------------------------------------------------------------

    def _report_refusal(self, wanted: Config, error: VisionedgeError) -> dict[str, str]:
        """Log a change that failed; the section that stays as it was, and why."""
        changes = wanted.model != self._config.model
        section = "model" if changes and not isinstance(error, ConfigError) else "inference"
        # A rejected change is tried again every few minutes, with the same result: log it once.
        news, self._last_refusal = (section, str(error)) != self._last_refusal, (section, str(error))
        if news:
            log.warning("%s stays as it was: %s", section, error)
        if news and section == "model":
            running = self._state.snapshot().loaded_model
            details = {"name": running.name, "sha256": running.sha256} if running else {}
            self._event("model-refused", f"the model stays as it was: {error}", {"running": details})
        return {section: str(error)}

    def _report_model_change(self, previous: Model, now: Model) -> None:
        if previous.sha256 != now.sha256:
            log.info("model changed: %s replaces %s", now.name, previous.name)
            self._event(
                "model-changed",
                f"{now.name} replaces {previous.name}",
                {
                    "running": {"name": now.name, "sha256": now.sha256},
                    "before": {"name": previous.name, "sha256": previous.sha256},
                },
            )

    def _report_download_wait(self, message: str) -> None:
        """Send an event at the start only: no frame is analysed before the first model is there."""
        if self._current is None:
            self._event("model-waiting", f"cannot download the model, retrying: {message}", {})

    def _event(self, code: ModelEventCode, message: str, details: Mapping[str, object]) -> None:
        self._state.snapshot().send_event("model", code, message, details)

    # --- steps ----------------------------------------------------------------------------------------------

    async def _apply(self, wanted: Config) -> None:
        state, instance = self._state, self._current
        inference = wanted.inference
        if instance is None and self._first_instance is None:
            # The first model is still being downloaded, and `fetch` goes on with the new configuration.
            if wanted.model != self._config.model:
                self._provider.stop()
            self._sections.adopt(wanted)
            return
        if instance is None or (
            wanted.model != self._config.model or _needs_new_engine(instance.inference, inference)
        ):
            await self._replace_engine(wanted)
        else:
            _apply_fallback(instance, inference)
            instance.selection = _make_selection(instance.model, inference, self._config.cameras)
            state.set_selection(instance.selection)
            self.lanes.select(instance.selection)
            if self._substitute is not None:
                self._substitute.selection = instance.selection
        state.batcher.limit(inference.max_batch, int(inference.max_age_seconds * 1e9))
        self._sections.adopt(wanted)

    async def _replace_engine(self, wanted: Config) -> None:
        """Open another engine beside the one in use, send frames to it, and close the old one."""
        previous = self._current
        first = self._first_instance if previous is None else None
        source = await self._provider.fetch(wanted.model, tries=MAX_CHANGE_TRIES)
        if source is None:
            raise VisionedgeError("a newer change of the model came before it was downloaded")
        instance = await self._open_candidate(source, wanted)
        previous = self._current  # the first engine may have been opened meanwhile
        leaving = [
            each for each in (previous, self._substitute, None if previous else first) if each is not None
        ]
        self._activate(instance)
        await asyncio.to_thread(self._drain_and_close, *leaving)
        await asyncio.to_thread(self._provider.evict, [instance.model.sha256])
        if previous is not None:
            self._report_model_change(previous.model, instance.model)

    async def _open_candidate(self, source: ModelSource, config: Config) -> EngineInstance:
        """Another instance with an open engine, beside the one in use."""
        prepared = functools.partial(self._prepare, source, config)
        instance = await run_on_thread(self._thread_group, "loading", prepared)
        self._candidate = instance
        try:
            instance.engine = await self._open_engine(instance, wait_for_device=False)
        except BaseException:
            await asyncio.to_thread(instance.close)
            raise
        finally:
            self._candidate = None
        return instance

    def _drain_and_close(self, *previous: EngineInstance) -> None:
        self.lanes.drain_previous(_DRAIN_TIMEOUT_S)
        for instance in previous:
            instance.close()

    def _prepare(self, source: ModelSource, config: Config) -> EngineInstance:
        model = source.load()
        cameras = self._config.cameras
        selection = _make_selection(model, config.inference, cameras)
        if problems := _find_classes_of_cameras(model, cameras):
            raise ConfigError(problems)
        frame_pool = (
            SharedFramePool(model.input, compute_block_count(len(config.cameras), usable_cores()))
            if config.inference.process
            else None
        )
        thread_group = ThreadGroup(self._on_thread_exit)
        self._thread_groups = [old for old in self._thread_groups if old.alive()] + [thread_group]
        return EngineInstance(source, model, selection, config.inference, frame_pool, thread_group)

    async def _open_engine(self, instance: EngineInstance, *, wait_for_device: bool) -> Engine:
        try:
            return await run_on_thread(
                self._thread_group, "opening", self._make_opener(instance, wait_for_device=wait_for_device)
            )
        except ModelError as error:
            raise ModelError(instance.source.message(error)) from None

    def _make_opener(self, instance: EngineInstance, *, wait_for_device: bool) -> Callable[[], Engine]:
        """A function that opens the engine, in a process of its own or in this one; it takes seconds."""
        if instance.frame_pool is None:
            return lambda: open_engine(instance.model, instance.inference, data=self._data)
        # Set before it is open, so that `close` also ends a process that is still starting.
        engine_process = instance.engine_process = EngineClient(
            instance.model,
            instance.inference,
            instance.frame_pool,
            data=self._data,
            thread_group=instance.thread_group,
            on_change=self._state.loop_queue.put,
            # Only the first engine waits for its device; a change is rejected, as the engine in use goes on.
            wait_for_device=wait_for_device,
            inject=self._inject,
        )

        def opened() -> Engine:
            engine_process.open()
            return engine_process

        return opened

    def _activate(self, instance: EngineInstance) -> None:
        assert instance.engine is not None  # noqa: S101 - it was opened
        self._first_instance, self._current, self._substitute = None, instance, None
        self._first_engine_ready.set()
        self._switch_to(instance, instance.engine)

    def _switch_to(
        self, instance: EngineInstance, engine: Engine, *, in_place_of: Engine | None = None
    ) -> None:
        """Compute with the engine of this instance from now on; `in_place_of` stays open meanwhile."""
        # The cameras may have changed while it was loaded.
        instance.selection = instance.selection.for_cameras(instance.model, self._config.cameras)
        self.lanes.swap_engine(engine, instance.selection)
        # After the swap: frames that were prepared for the old engine are still analysed there.
        if (registry := self._state.snapshot().camera_registry) is not None:
            registry.change_input(instance.resizer)
        self._publish_state(instance, engine, in_place_of)

    def _set_first_instance(self, instance: EngineInstance) -> InputResizer:
        """Take a model as the first one: `open` opens its engine."""
        self._first_instance = instance
        self._publish_state(instance, None)
        return instance.resizer

    def _publish_state(
        self, instance: EngineInstance, engine: Engine | None, requested: Engine | None = None
    ) -> None:
        self._state.set_engine(engine, instance.model, instance.selection, instance.frame_pool, requested)


def _find_precision(engine: Engine) -> str:
    return engine.info().choice.precision


def _find_candidate(engine: Engine) -> EngineCandidate:
    return engine.info().choice.candidate


def _make_selection(
    model: Model, inference: InferenceConfig, cameras: Mapping[str, CameraConfig]
) -> Selection:
    selection = Selection.of(model, inference.confidence, inference.iou, inference.classes)
    return selection.for_cameras(model, cameras)


def _find_classes_of_cameras(model: Model, cameras: Mapping[str, CameraConfig]) -> list[str]:
    return [
        problem
        for name, camera in cameras.items()
        for problem in find_unknown_classes(model, list_class_keys(name, camera))
    ]


def _apply_fallback(instance: EngineInstance, wanted: InferenceConfig) -> None:
    """Change the fallback, the one setting that an engine can change while it runs or opens."""
    instance.inference = instance.inference.model_copy(update={"fallback": wanted.fallback})
    if instance.engine_process is not None:
        instance.engine_process.set_fallback(wanted.fallback)


def _needs_new_engine(now: InferenceConfig, wanted: InferenceConfig) -> bool:
    return any(getattr(now, key) != getattr(wanted, key) for key in _KEYS_NEEDING_NEW_ENGINE)
