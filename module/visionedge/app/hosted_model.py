"""One of the models that the module serves: its file, its engine, and how others take their place.

Another engine is opened and warmed up beside the one in use, and frames go to it only then; when any step
fails, the old one has never stopped.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from visionedge.app.state import AppState, ModelState
from visionedge.camera.camera import InputResizer
from visionedge.config.label_keys import list_label_keys
from visionedge.config.schema import CameraConfig, Config, InferenceConfig, ModelConfig
from visionedge.engine.candidates import has_candidates
from visionedge.engine.engine_choice import EngineCandidate
from visionedge.engine.interface import Engine, EngineEvent
from visionedge.engine.lanes import LanePool
from visionedge.engine.local_engine import open_engine
from visionedge.engine.memory_estimate import check_fits
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool, compute_block_count
from visionedge.errors import ConfigError, ModelError, VisionedgeError
from visionedge.frames.types import DEFAULT_MODEL
from visionedge.model.download import DownloadRetryPolicy
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection, find_unknown_classes
from visionedge.model.provider import MAX_CHANGE_TRIES, ModelProvider, ModelSource
from visionedge.runtime.process_limits import usable_cores
from visionedge.runtime.threads import OnThreadExit, ThreadGroup, run_on_thread

log = logging.getLogger(__name__)

ModelEventCode = Literal["model-changed", "model-refused", "model-waiting"]

_DRAIN_TIMEOUT_S = 10.0

_KEYS_NEEDING_NEW_ENGINE = (
    "device",
    "runtime",
    "parity",
    "max_batch",
    "precision",
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
    resizer: InputResizer
    frame_pool: SharedFramePool | None
    thread_group: ThreadGroup
    engine: Engine | None = None
    engine_process: EngineClient | None = None
    has_faster_candidates: bool | None = None

    def close(self) -> None:
        """Close the engine, also one that is still opening, and free its memory. Blocks."""
        closing = self.engine_process or self.engine
        if closing is not None:
            closing.close()
        if self.frame_pool is not None:
            self.frame_pool.close()


@dataclass(frozen=True, slots=True)
class EngineResources:
    """What all models share.

    `thread_group`: the threads of the lanes, and those that load and open. `on_thread_exit`: called when a
    thread of an engine has ended. `inject`: a script of faults, for tests.
    """

    state: AppState
    data: Path
    thread_group: ThreadGroup
    on_thread_exit: OnThreadExit
    lanes: LanePool
    retry_policy: DownloadRetryPolicy | None = None
    inject: Path | None = None


class HostedModel:
    """The model of the section `model`, or one of `models`. For the loop, unless a method says otherwise.

    Args:
        name: its name in `models`, or `DEFAULT_MODEL`.
        resources: what all models share.
    """

    def __init__(self, name: str, resources: EngineResources) -> None:
        self.name = name
        self.current: EngineInstance | None = None
        self.first: EngineInstance | None = None
        """The model that was loaded at the start, until its engine is open."""
        self.provider = ModelProvider(
            resources.data,
            resources.thread_group,
            retry_policy=resources.retry_policy,
            on_failure=self._report_download_wait,
        )
        self._candidate: EngineInstance | None = None
        self._substitute: EngineInstance | None = None
        self._thread_groups: list[ThreadGroup] = []
        self._shared, self._state, self._lanes = resources, resources.state, resources.lanes

    def __repr__(self) -> str:
        instance = self.current or self.first
        return f"<HostedModel {self.label}: {instance.model.name if instance else self.provider!r}>"

    # --- what the configuration says of it ------------------------------------------------------------------

    @property
    def label(self) -> str:
        """How texts call it."""
        return f"model {self.name}" if self.name else "the model"

    @property
    def _config(self) -> Config:
        return self._state.snapshot().config

    def is_wanted(self, config: Config) -> bool:
        """Whether a configuration has it."""
        return not self.name or self.name in config.models

    def is_same_file(self, wanted: Config) -> bool:
        """Whether the configuration in force and another one want the same file."""
        if not (self.is_wanted(self._config) and self.is_wanted(wanted)):
            return False
        return _file_keys(self._config.find_model(self.name)) == _file_keys(wanted.find_model(self.name))

    def needs_new_engine(self, wanted: Config) -> bool:
        """Whether another configuration needs another engine than the one that is open or opens."""
        instance = self.current or self.first
        if instance is None:
            return False  # its file is being downloaded; that goes on with the new configuration
        return not self.is_same_file(wanted) or any(
            getattr(instance.inference, key) != getattr(wanted.inference, key)
            for key in _KEYS_NEEDING_NEW_ENGINE
        )

    def find_unknown_labels(self, wanted: Config) -> list[str]:
        """The labels of a configuration that the model does not have; none while it is not loaded."""
        instance = self.current or self.first
        return [] if instance is None else self._find_unknown_labels(instance.model, wanted)

    def _find_unknown_labels(self, model: Model, config: Config) -> list[str]:
        known = {None, *config.models}
        cameras = {
            name: each
            for name, each in config.cameras.items()
            if each.model in known and (each.then is None or each.then.model in known)
        }
        paths = list_label_keys(config.model_copy(update={"cameras": cameras}))
        return find_unknown_classes(model, paths.get(self.name, {}))

    def _own(self, cameras: Mapping[str, CameraConfig]) -> dict[str, CameraConfig]:
        return {name: each for name, each in cameras.items() if (each.model or DEFAULT_MODEL) == self.name}

    # --- start and stop -------------------------------------------------------------------------------------

    def load(self) -> bool:
        """Load the file of the configuration; False if it has to be downloaded first. Blocks.

        Raises:
            ConfigError, ModelError, UnavailableError: the model cannot be used.
        """
        config = self._config
        source = self.provider.local_source(config.find_model(self.name))
        if source is not None:
            self._set_first(self._prepare(source, config))
        return source is not None

    async def fetch(self) -> None:
        """Download the file of the configuration, with no limit of time, and load it.

        Raises:
            ConfigError, ModelError, UnavailableError: as `load`.
        """
        while True:
            config = self._config
            source = await self.provider.fetch(config.find_model(self.name))
            if source is None:
                continue  # stopped, because another configuration came
            prepared = functools.partial(self._prepare, source, config)
            instance = await run_on_thread(self._shared.thread_group, "loading", prepared)
            if self.is_same_file(config) and config.inference == self._config.inference:
                return self._set_first(instance)
            await asyncio.to_thread(instance.close)

    async def open(self) -> None:
        """Open and warm up the engine of the model that was loaded, and start its lanes.

        Raises:
            VisionedgeError: the engine cannot be opened, or it was closed meanwhile.
        """
        instance = self.first
        assert instance is not None  # noqa: S101 - `load` or `fetch` comes first
        try:
            instance.engine = await self._open_engine(instance, wait_for_device=True)
        except VisionedgeError:
            if self.current is None or self.current.engine is None:
                raise
            return  # the engine of a newer configuration was opened first
        self._activate(instance)

    def close(self) -> None:
        """Close the engines, also one that is still opening. Blocks."""
        for instance in (self.first, self._candidate, self._substitute, self.current):
            if instance is not None:
                instance.close()

    def remove(self) -> None:
        """Compute nothing with the model any more, and close it. Blocks."""
        self._lanes.remove(self.name, _DRAIN_TIMEOUT_S)
        self.close()

    def still_running(self) -> list[str]:
        """The threads of engines that still run."""
        return [name for thread_group in self._thread_groups for name in thread_group.alive()]

    # --- changes --------------------------------------------------------------------------------------------

    def apply_fallback(self, wanted: InferenceConfig) -> None:
        """Change the fallback, the one setting that an engine can change while it runs or opens."""
        for instance in (self.first, self.current):
            if instance is not None:
                update = {"fallback": wanted.fallback}
                instance.inference = instance.inference.model_copy(update=update)
                if instance.engine_process is not None:
                    instance.engine_process.set_fallback(wanted.fallback)

    def select(self, wanted: Config) -> None:
        """Use the thresholds and classes of another configuration with the engine in use.

        Raises:
            ConfigError: the model has no such class.
        """
        if (instance := self.current) is None:
            return
        instance.selection = self._make_selection(instance.model, wanted)
        if self._substitute is not None:
            self._substitute.selection = instance.selection
        self._publish_selection(instance.selection)

    def select_cameras(self, cameras: Mapping[str, CameraConfig]) -> None:
        """Use the classes, confidence and tracking of these cameras from the next batch on."""
        for instance in (self.first, self.current, self._substitute):
            if instance is not None:
                instance.selection = instance.selection.for_cameras(instance.model, self._own(cameras))
        running = self._substitute or self.current
        if running is not None:
            self._publish_selection(running.selection)

    async def open_candidate(self, wanted: Config) -> EngineInstance:
        """An engine for another configuration, beside the one in use; `activate` sends frames to it.

        Raises:
            VisionedgeError: it cannot be opened.
        """
        source = await self.provider.fetch(wanted.find_model(self.name), tries=MAX_CHANGE_TRIES)
        if source is None:
            raise VisionedgeError("a newer change of the model came before it was downloaded")
        return await self._open_beside(source, wanted)

    async def activate(self, instance: EngineInstance) -> None:
        """Send frames to a candidate, and close the engine in use."""
        previous, first = self.current, self.first
        leaving = [each for each in (previous or first, self._substitute) if each is not None]
        self._activate(instance)
        await asyncio.to_thread(self._drain_and_close, *leaving)
        if previous is not None:
            self._report_change(previous.model, instance.model)

    # --- a faster engine for a while ------------------------------------------------------------------------

    @property
    def substitute_precision(self) -> str | None:
        """The precision of the substitute engine; None without a substitute."""
        substitute = self._substitute
        return None if substitute is None or substitute.engine is None else _find_precision(substitute.engine)

    async def can_try_faster_variant(self) -> bool:
        """Whether another precision may be faster than the engine in use.

        Only on the CPU, only with `precision: auto`, and only before a first try with this engine.
        """
        instance = self.current
        if instance is None or instance.engine is None or self._substitute is not None:
            return False
        info = instance.engine.info()
        if info.choice.precision != "fp32" or info.device.effective != "cpu":
            return False
        if instance.inference.precision != "auto":
            return False
        if instance.has_faster_candidates is None:
            runtime, data = instance.inference.runtime, self._shared.data
            look = functools.partial(has_candidates, instance.model, info.choice, runtime, data=data)
            instance.has_faster_candidates = await asyncio.to_thread(look)
        return instance.has_faster_candidates

    async def start_substitute(self) -> None:
        """Open the fastest precision on the CPU and send frames to it, if one is faster.

        The engine of the configuration stays open, and goes on probing for a lost device.

        Raises:
            VisionedgeError: the substitute cannot be opened.
        """
        previous = self.current
        if previous is None or previous.engine is None or self._substitute is not None:
            return
        previous.has_faster_candidates = False  # one try for each engine
        inference = self._config.inference.model_copy(update={"device": "cpu"})
        config = self._config.model_copy(update={"inference": inference})
        instance = await self._open_beside(previous.source, config)
        engine, requested = instance.engine, previous.engine
        if engine is None or _find_candidate(engine) == _find_candidate(requested):
            await asyncio.to_thread(instance.close)
            return
        previous.has_faster_candidates = True
        self._substitute = instance
        self._switch_to(instance, engine, in_place_of=requested)
        await asyncio.to_thread(self._lanes.drain_previous, _DRAIN_TIMEOUT_S, self.name)

    async def stop_substitute(self) -> None:
        """Send frames to the engine of the configuration again, and close the substitute."""
        substitute, previous = self._substitute, self.current
        if substitute is None or previous is None or previous.engine is None:
            return
        self._substitute = None
        self._switch_to(previous, previous.engine)
        await asyncio.to_thread(self._drain_and_close, substitute)

    # --- events ---------------------------------------------------------------------------------------------

    def report_refusal(self, error: VisionedgeError) -> None:
        """Send the event that the module goes on with the model it has."""
        running = self.current or self.first
        details = {"name": running.model.name, "sha256": running.model.sha256} if running else {}
        self._event("model-refused", f"{self.label} stays as it was: {error}", {"running": details})

    def _report_change(self, previous: Model, now: Model) -> None:
        if previous.sha256 == now.sha256:
            return
        what = f"{now.path.stem} replaces {previous.path.stem}" if self.name else ""
        message = f"{self.label}: {what}" if self.name else f"{now.name} replaces {previous.name}"
        log.info("model changed: %s", message)
        running, before = ({"name": each.name, "sha256": each.sha256} for each in (now, previous))
        self._event("model-changed", message, {"running": running, "before": before})

    def _report_download_wait(self, message: str) -> None:
        """Send an event at the start only: no frame is analysed before the first model is there."""
        if self.current is None:
            self._event("model-waiting", f"cannot download {self.label}, retrying: {message}", {})

    def _event(self, code: ModelEventCode, message: str, details: Mapping[str, object]) -> None:
        self._state.snapshot().send_event("model", code, message, details)

    # --- steps ----------------------------------------------------------------------------------------------

    async def _open_beside(self, source: ModelSource, config: Config) -> EngineInstance:
        """Another instance with an open engine, beside the one in use."""
        prepared = functools.partial(self._prepare, source, config)
        instance = await run_on_thread(self._shared.thread_group, "loading", prepared)
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
        self._lanes.drain_previous(_DRAIN_TIMEOUT_S, self.name)
        for instance in previous:
            instance.close()

    def _prepare(self, source: ModelSource, config: Config) -> EngineInstance:
        model = source.load()
        if self.name:
            model = replace(model, name=self.name)
        elif model.name in config.models:
            raise ConfigError([f"models.{model.name}: the file of 'model' has this name; choose another one"])
        selection = self._make_selection(model, config)
        frame_pool = (
            SharedFramePool(model.input, compute_block_count(len(config.cameras), usable_cores()))
            if config.inference.process
            else None
        )
        resizer = InputResizer(model.input, model=self.name)
        if frame_pool is not None:
            resizer = replace(resizer, allocate=frame_pool.allocate)
        thread_group = ThreadGroup(self._shared.on_thread_exit)
        self._thread_groups = [old for old in self._thread_groups if old.alive()] + [thread_group]
        return EngineInstance(source, model, selection, config.inference, resizer, frame_pool, thread_group)

    def _make_selection(self, model: Model, config: Config) -> Selection:
        """Which rows of the model become detections, with the cameras in force.

        Raises:
            ConfigError: the model does not have a label of the configuration.
        """
        in_force = self._config.cameras
        if problems := self._find_unknown_labels(model, config.model_copy(update={"cameras": in_force})):
            raise ConfigError(problems)
        inference, cameras = config.find_inference(self.name), self._own(in_force)
        has_own_classes = self.name and config.models[self.name].classes is not None
        # Without cameras its labels are answers about objects, which inference.classes does not name.
        is_filtered = not self.name or cameras or has_own_classes
        classes = inference.classes if is_filtered else None
        selection = Selection.of(model, inference.confidence, inference.iou, classes)
        return selection.for_cameras(model, cameras)

    async def _open_engine(self, instance: EngineInstance, *, wait_for_device: bool) -> Engine:
        is_first = not self._state.snapshot().engine_infos()
        if not is_first:
            check = functools.partial(check_fits, instance.model, instance.inference, self._shared.data)
            await asyncio.to_thread(check)
        try:
            return await run_on_thread(
                self._shared.thread_group,
                "opening",
                self._make_opener(instance, wait_for_device=wait_for_device),
            )
        except ModelError as error:
            raise ModelError(instance.source.message(error)) from None

    def _make_opener(self, instance: EngineInstance, *, wait_for_device: bool) -> Callable[[], Engine]:
        """A function that opens the engine, in a process of its own or in this one; it takes seconds."""
        if instance.frame_pool is None:
            return lambda: open_engine(instance.model, instance.inference, data=self._shared.data)
        # Set before it is open, so that `close` also ends a process that is still starting.
        engine_process = instance.engine_process = EngineClient(
            instance.model,
            instance.inference,
            instance.frame_pool,
            data=self._shared.data,
            thread_group=instance.thread_group,
            on_change=self._put_event,
            # Only the first engine waits for its device; a change is rejected, as the engine in use goes on.
            wait_for_device=wait_for_device,
            inject=self._shared.inject,
        )

        def opened() -> Engine:
            engine_process.open()
            return engine_process

        return opened

    def _put_event(self, event: EngineEvent) -> None:
        """An event of the engine, with the name of the model; from any thread."""
        if self.name:
            event = replace(event, model=self.name, message=f"{self.label}: {event.message}")
        self._state.loop_queue.put(event)

    def _activate(self, instance: EngineInstance) -> None:
        assert instance.engine is not None  # noqa: S101 - it was opened
        self.first, self.current, self._substitute = None, instance, None
        self._switch_to(instance, instance.engine)

    def _switch_to(
        self, instance: EngineInstance, engine: Engine, *, in_place_of: Engine | None = None
    ) -> None:
        """Compute with the engine of this instance from now on; `in_place_of` stays open meanwhile."""
        # The cameras may have changed while it was loaded.
        cameras = self._own(self._config.cameras)
        instance.selection = instance.selection.for_cameras(instance.model, cameras)
        self._lanes.swap_engine(engine, instance.selection, self.name)
        # After the swap: frames that were prepared for the old engine are still analysed there.
        if (registry := self._state.snapshot().camera_registry) is not None:
            registry.change_input(instance.resizer)
        self._publish(instance, engine, in_place_of)

    def _set_first(self, instance: EngineInstance) -> None:
        """Take a model as the first one: `open` opens its engine."""
        self.first = instance
        self._publish(instance, None)

    def _publish(
        self, instance: EngineInstance, engine: Engine | None, requested: Engine | None = None
    ) -> None:
        state = ModelState(instance.model, instance.selection, instance.frame_pool, engine, requested)
        self._state.set_model(self.name, state)

    def _publish_selection(self, selection: Selection) -> None:
        self._state.set_selection(self.name, selection)
        self._lanes.select(selection, self.name)


def _file_keys(settings: ModelConfig) -> tuple[object, ...]:
    return settings.path, settings.url, settings.sha256


def _find_precision(engine: Engine) -> str:
    return engine.info().choice.precision


def _find_candidate(engine: Engine) -> EngineCandidate:
    return engine.info().choice.candidate
