"""The engine room: which model and engine compute, and how others take their place while the module runs.

Another engine is opened and warmed up beside the one in use, and only then changed over to; when any step
fails, the old one has never stopped.
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
from visionedge.config.schema import Config, InferenceConfig
from visionedge.engine.interface import Engine, SubstituteEngine
from visionedge.engine.lanes import LanePool
from visionedge.engine.local_engine import open_engine
from visionedge.engine.precision_choice import list_eligible_variants
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool, compute_block_count
from visionedge.errors import ConfigError, ModelError, VisionedgeError
from visionedge.model.download import DownloadRetryPolicy
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.model.provider import MAX_CHANGE_TRIES, ModelProvider, ModelSource
from visionedge.runtime.threads import OnThreadExit, ThreadGroup, run_on_thread

# What computes: a model and its engine, and what was made for the two.


@dataclass(slots=True)
class EngineInstance:
    """A model, its engine once that is open, and what was made for the two. `crew` is the engine's alone.

    `has_candidate_variants`: there are variants that may be faster on the CPU; None: nobody has looked yet.
    """

    source: ModelSource
    model: Model
    selection: Selection
    inference: InferenceConfig
    frame_pool: SharedFramePool | None
    thread_group: ThreadGroup
    engine: Engine | None = None
    engine_process: EngineClient | None = None
    has_candidate_variants: bool | None = None

    @property
    def resizer(self) -> InputResizer:
        """How cameras prepare pictures for it."""
        spec = self.model.input
        return InputResizer(spec) if self.frame_pool is None else InputResizer(spec, self.frame_pool.allocate)

    def close(self) -> None:
        """End the engine, also one that still opens, and give its memory back. Blocks."""
        closing = self.engine_process or self.engine
        if closing is not None:
            closing.close()
        if self.frame_pool is not None:
            self.frame_pool.close()


log = logging.getLogger(__name__)

ConfigSection = Literal["model", "inference"]
ModelEventCode = Literal["model-changed", "model-refused", "model-waiting"]

_DRAIN_TIMEOUT_S = 10.0
_FIRST_ENGINE_TIMEOUT_S = 10.0

# What an engine cannot take over while it runs: a change of these needs another one.
_KEYS_NEEDING_NEW_ENGINE = ("device", "parity", "max_batch", "precision", "latency_budget_ms", "process")


class EngineHost:
    """Loads models and opens engines off the loop; everything else belongs to the loop.

    `crew` runs the lanes and what is opened; `on_thread_exit` is told of a thread of an engine that ended.
    `tempo` is for models that are fetched, `inject` a script of faults, for tests.
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
        self.lineup = LanePool(state.batcher, thread_group, state.loop_queue.put)
        self._supply = state.supply = ModelProvider(
            data, thread_group, retry_policy=retry_policy, on_failure=self._report_download_wait
        )

    def load(self) -> InputResizer | None:
        """Load the model of the configuration; how cameras prepare pictures for it. Blocks.

        None if it has to be fetched first.

        Raises:
            ConfigError, ModelError, UnavailableError: it cannot be had.
        """
        source = self._supply.local_source(self._state.config.model)
        return None if source is None else self._set_first_instance(self._prepare(source, self._state.config))

    async def fetch(self) -> InputResizer:
        """Fetch the model of the configuration, however long that takes, and load it.

        Raises:
            ConfigError, ModelError, UnavailableError: as `load`.
        """
        while True:
            config = self._state.config
            source = await self._supply.fetch(config.model)
            if source is None:
                continue  # stopped: another configuration came
            prepared = functools.partial(self._prepare, source, config)
            instance = await run_on_thread(self._thread_group, "loading", prepared)
            if (config.model, config.inference) == (self._state.config.model, self._state.config.inference):
                return self._set_first_instance(instance)
            await asyncio.to_thread(instance.close)

    async def open(self) -> Engine:
        """Open and warm the engine of the model that was loaded, and start its lanes.

        Raises:
            VisionedgeError: as `startup.open_engine`, or it was closed meanwhile.
        """
        assert self._first_instance is not None  # noqa: S101 - `load` comes first
        instance = self._first_instance
        try:
            engine = instance.engine = await self._open_engine(instance, wait_for_device=True)
        except VisionedgeError:
            if self._current is None or self._current.engine is None:
                raise
            return self._current.engine  # one of another configuration came first and took its place
        self._activate(instance)
        await run_on_thread(
            self._thread_group, "tidying", lambda: self._supply.evict([instance.model.sha256])
        )
        return engine

    async def apply(self, wanted: Config) -> dict[str, str]:
        """Make model and inference those of another configuration; what could not be done, and why.

        A section that is refused stays as it was.
        """
        if wanted.model != self._state.config.model:
            self._supply.stop()  # what is being fetched for an earlier change is not wanted any more
        first = self._first_instance if self._current is None else None
        if first is not None:
            waits_for_device = self._state.waiting_reason is not None
            if wanted.model == self._state.config.model and not _needs_new_engine(
                first.inference, wanted.inference
            ):
                _apply_fallback(
                    first, wanted.inference
                )  # it may wait for its device because of what is changed here
                waits_for_device = False
            if not waits_for_device and (late := await self._wait_for_first_engine()):
                return late
        async with self._change_lock:
            try:
                await self._apply(wanted)
            except VisionedgeError as error:
                return self._report_refusal(wanted, error)
            self._last_refusal = None
        return await self._wait_for_first_engine()

    def cancel_pending_model(self) -> None:
        """Let a model be that is still being fetched for a change: another change is to come."""
        self._supply.stop()

    def close(self) -> None:
        """End the engines, also one that still opens. Blocks."""
        self.lineup.close()
        for instance in (self._first_instance, self._candidate, self._substitute, self._current):
            if instance is not None:
                instance.close()

    def still_running(self) -> list[str]:
        """The threads of engines that still run."""
        return [name for thread_group in self._thread_groups for name in thread_group.alive()]

    # --- a faster engine for a while (`overload.keeper.Engines`) --------------------------------------------

    @property
    def substitute_precision(self) -> str | None:
        """The precision that computes in place of the one of the configuration; None: that one does."""
        substitute = self._substitute
        return (
            None if substitute is None or substitute.engine is None else substitute.engine.precision.precision
        )

    async def can_try_faster_variant(self) -> bool:
        """Whether another precision might compute more than the engine in use.

        Only on the CPU, only where any precision will do, and only where none was tried here yet.
        """
        instance = self._current
        if instance is None or instance.engine is None or self._substitute is not None:
            return False
        precision = instance.engine.precision
        if precision.precision != "fp32" or precision.ms or instance.engine.device.effective != "cpu":
            return False
        if instance.inference.precision != "auto":
            return False
        if instance.has_candidate_variants is None:
            look = functools.partial(list_eligible_variants, instance.model, device="cpu", data=self._data)
            instance.has_candidate_variants = bool(await asyncio.to_thread(look))
        return instance.has_candidate_variants

    async def start_substitute(self) -> str | None:
        """Open the fastest precision on the CPU and let it compute; None where that is no other one.

        The engine in use stays open, and goes on looking for a device that was lost.

        Raises:
            VisionedgeError: it cannot be opened.
        """
        async with self._change_lock:
            previous = self._current
            if previous is None or previous.engine is None or self._substitute is not None:
                return self.substitute_precision
            previous.has_candidate_variants = False  # one try for each engine
            inference = self._state.config.inference.model_copy(update={"device": "cpu"})
            config = self._state.config.model_copy(update={"inference": inference})
            instance = await self._open_candidate(previous.source, config)
            engine = instance.engine
            if engine is None or engine.precision.precision == previous.engine.precision.precision:
                await asyncio.to_thread(instance.close)
                return None
            previous.has_candidate_variants = True
            self._substitute = instance
            self._switch_to(instance, SubstituteEngine(engine, previous.engine))
            await asyncio.to_thread(self.lineup.drain_previous, _DRAIN_TIMEOUT_S)
            return self.substitute_precision

    async def stop_substitute(self) -> None:
        """Let the engine of the configuration compute again, and close the one that stood in."""
        async with self._change_lock:
            substitute, previous = self._substitute, self._current
            if substitute is None or previous is None or previous.engine is None:
                return
            self._substitute = None
            self._switch_to(previous, previous.engine)
            await asyncio.to_thread(self._drain_and_close, substitute)

    async def _wait_for_first_engine(self) -> dict[str, str]:
        """Nothing when an engine computes; before the first one does, wait for it a while."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._first_engine_ready.wait(), _FIRST_ENGINE_TIMEOUT_S)
        if self._first_engine_ready.is_set():
            return {}
        why = self._state.fetch_progress or self._state.waiting_reason or "the engine is warming up"
        return dict.fromkeys(("model", "inference"), f"not in use yet: {why}")

    # --- what is told ---------------------------------------------------------------------------------------

    def _report_refusal(self, wanted: Config, error: VisionedgeError) -> dict[str, str]:
        """The section that stays as it was, and why."""
        changes = wanted.model != self._state.config.model
        section: ConfigSection = "model" if changes and not isinstance(error, ConfigError) else "inference"
        # Whoever tries it again need not hear it again.
        news, self._last_refusal = (section, str(error)) != self._last_refusal, (section, str(error))
        if news:
            log.warning("%s stays as it was: %s", section, error)
        if news and section == "model":
            running = self._state.loaded_model
            details = {"name": running.name, "sha256": running.sha256} if running else {}
            self._event("model-refused", f"the model stays as it was: {error}", {"running": details})
        return {section: str(error)}

    def _report_model_change(self, previous: Model, now: Model) -> None:
        if previous.sha256 != now.sha256:
            log.info("the model is changed: %s computes instead of %s", now.name, previous.name)
            self._event(
                "model-changed",
                f"{now.name} computes instead of {previous.name}",
                {
                    "running": {"name": now.name, "sha256": now.sha256},
                    "before": {"name": previous.name, "sha256": previous.sha256},
                },
            )

    def _report_download_wait(self, words: str) -> None:
        """At the start nothing computes before the model is there: somebody should hear why it is not."""
        if self._current is None:
            self._event("model-waiting", f"cannot download the model, retrying: {words}", {})

    def _event(self, code: ModelEventCode, message: str, details: Mapping[str, object]) -> None:
        if self._state.delivery is not None:
            self._state.delivery.event("model", code, message, details)

    # --- steps ----------------------------------------------------------------------------------------------

    async def _apply(self, wanted: Config) -> None:
        state, instance = self._state, self._current
        inference = wanted.inference
        if instance is None and self._first_instance is None:
            # The first model is still being fetched; from now on it may be another one.
            if wanted.model != state.config.model:
                self._supply.stop()
            state.config = state.config.model_copy(update={"model": wanted.model, "inference": inference})
            return
        if instance is None or (
            wanted.model != state.config.model or _needs_new_engine(instance.inference, inference)
        ):
            await self._replace_engine(wanted)
        else:
            _apply_fallback(instance, inference)
            state.selection = instance.selection = _make_selection(instance.model, inference)
            self.lineup.select(instance.selection)
            if self._substitute is not None:
                self._substitute.selection = instance.selection
        state.batcher.limit(inference.max_batch, int(inference.max_age_seconds * 1e9))
        state.config = state.config.model_copy(update={"model": wanted.model, "inference": inference})

    async def _replace_engine(self, wanted: Config) -> None:
        """Open another engine beside the one in use, change over to it, and close the old one."""
        previous = self._current
        first = self._first_instance if previous is None else None
        source = await self._supply.fetch(wanted.model, tries=MAX_CHANGE_TRIES)
        if source is None:
            raise VisionedgeError("another change of the model came before it was fetched")
        instance = await self._open_candidate(source, wanted)
        previous = self._current  # a first one may have come meanwhile
        leaving = [
            each for each in (previous, self._substitute, None if previous else first) if each is not None
        ]
        self._activate(instance)
        await asyncio.to_thread(self._drain_and_close, *leaving)
        await asyncio.to_thread(self._supply.evict, [instance.model.sha256])
        if previous is not None:
            self._report_model_change(previous.model, instance.model)

    async def _open_candidate(self, source: ModelSource, config: Config) -> EngineInstance:
        """Another machinery, its engine open, beside the one in use."""
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
        self.lineup.drain_previous(_DRAIN_TIMEOUT_S)
        for instance in previous:
            instance.close()

    def _prepare(self, source: ModelSource, config: Config) -> EngineInstance:
        model = source.load()
        selection = _make_selection(model, config.inference)
        frame_pool = (
            SharedFramePool(model.input, compute_block_count(len(config.cameras)))
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
        """What opens the engine, in a process of its own or in this one; slow."""
        if instance.frame_pool is None:
            return lambda: open_engine(instance.model, instance.inference, data=self._data)
        # Kept from now on: a child is ended also while it opens.
        engine_process = instance.engine_process = EngineClient(
            instance.model,
            instance.inference,
            instance.frame_pool,
            data=self._data,
            thread_group=instance.thread_group,
            on_change=self._state.loop_queue.put,
            # One in use goes on meanwhile, and whoever wants another shall hear that it cannot be had.
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

    def _switch_to(self, instance: EngineInstance, engine: Engine) -> None:
        """Compute with this engine, which is that of the machinery or stands in with it, from now on."""
        self.lineup.swap_engine(engine, instance.selection)
        # From here on: pictures that were prepared for the old one are still computed there.
        if self._state.camera_registry is not None:
            self._state.camera_registry.change_input(instance.resizer)
        self._publish_state(instance, engine)

    def _set_first_instance(self, instance: EngineInstance) -> InputResizer:
        """A first model: what is to be opened next."""
        self._first_instance = instance
        self._publish_state(instance, None)
        return instance.resizer

    def _publish_state(self, instance: EngineInstance, engine: Engine | None) -> None:
        state = self._state
        state.loaded_model, state.selection, state.frame_pool = (
            instance.model,
            instance.selection,
            instance.frame_pool,
        )
        state.engine = engine


def _make_selection(model: Model, inference: InferenceConfig) -> Selection:
    return Selection.of(model, inference.confidence, inference.iou, inference.classes)


def _apply_fallback(instance: EngineInstance, wanted: InferenceConfig) -> None:
    """Take over what an engine can take over while it runs, or while it opens."""
    instance.inference = instance.inference.model_copy(update={"fallback": wanted.fallback})
    if instance.engine_process is not None:
        instance.engine_process.set_fallback(wanted.fallback)


def _needs_new_engine(now: InferenceConfig, wanted: InferenceConfig) -> bool:
    return any(getattr(now, key) != getattr(wanted, key) for key in _KEYS_NEEDING_NEW_ENGINE)
