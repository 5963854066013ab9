"""The models that the module serves, each with its engine, and how a configuration changes them.

`EngineHost` is the writer of the sections `model`, `models` and `inference`. Each model has an engine of its
own. They are opened one after the other, because an engine at work disturbs the measurements of a plan.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

from visionedge.app.hosted_model import EngineInstance, EngineResources, HostedModel
from visionedge.app.state import AppState
from visionedge.camera.camera import InputResizer
from visionedge.config.schema import CameraConfig, Config
from visionedge.engine.lanes import LanePool
from visionedge.errors import ConfigError, VisionedgeError
from visionedge.frames.types import DEFAULT_MODEL
from visionedge.model.download import DownloadRetryPolicy
from visionedge.runtime.threads import OnThreadExit, ThreadGroup, run_on_thread

log = logging.getLogger(__name__)

_FIRST_ENGINE_TIMEOUT_S = 10.0


class EngineHost:
    """Loads models and opens engines on threads; every other method is for the loop.

    Args:
        state: what the host publishes the models and its sections to.
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
        self._thread_group = thread_group
        self._change_lock = asyncio.Lock()
        self._all_open = asyncio.Event()
        self._last_refusal: tuple[str, str] | None = None
        self.lanes = LanePool(state.batcher, thread_group, state.loop_queue.put)
        self._resources = EngineResources(
            state, data, thread_group, on_thread_exit, self.lanes, retry_policy, inject
        )
        self._models: dict[str, HostedModel] = {}
        state.set_fetch_progress(self._describe_downloads)
        self._sections = state.register(
            "model", "models", "inference", apply=self.apply, pending=self._pending_reason
        )

    @property
    def _config(self) -> Config:
        return self._state.snapshot().config

    # --- start and stop -------------------------------------------------------------------------------------

    def load(self) -> bool:
        """Load the models of the configuration; False if some have to be downloaded first. Blocks.

        Raises:
            ConfigError, ModelError, UnavailableError: one of them cannot be used.
        """
        for hosted in self._models.values():
            hosted.close()  # of a configuration that could not be used
        self._models = {
            name: HostedModel(name, self._resources) for name in (DEFAULT_MODEL, *self._config.models)
        }
        is_complete, problems = True, list[str]()
        for hosted in self._models.values():
            try:
                is_complete &= hosted.load()
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return is_complete

    def resizers(self) -> list[InputResizer]:
        """How cameras prepare frames for each model that is loaded."""
        instances = (hosted.current or hosted.first for hosted in self._models.values())
        return [instance.resizer for instance in instances if instance is not None]

    async def open_loaded(self) -> None:
        """Open and warm up the engines of the models that are loaded, and start their lanes.

        Raises:
            VisionedgeError: one cannot be opened, or it was closed meanwhile.
        """
        loaded = [hosted for hosted in self._models.values() if hosted.first is not None]
        for number, hosted in enumerate(loaded, 1):
            if len(loaded) > 1:
                log.info("opening the engine of %s (%d of %d)", hosted.label, number, len(loaded))
            if hosted.first is not None:  # else a newer configuration was faster
                await hosted.open()
        self._note_open()

    async def open_missing(self) -> None:
        """Download the other models, with no limit of time, and open their engines.

        Raises:
            ConfigError, ModelError, UnavailableError, VisionedgeError: one of them cannot be used.
        """
        missing = [hosted for hosted in self._models.values() if hosted.current is None]
        opening = asyncio.gather(*(self._fetch_and_open(hosted) for hosted in missing))
        try:
            await opening
        finally:
            opening.cancel()
        await run_on_thread(self._thread_group, "tidying", self._evict_unused)

    def _evict_unused(self) -> None:
        """Delete downloads that no model uses. Blocks."""
        hosted_models = tuple(self._models.values())
        in_use = [hosted.current.model.sha256 for hosted in hosted_models if hosted.current is not None]
        self._models[DEFAULT_MODEL].provider.evict(in_use)

    async def _fetch_and_open(self, hosted: HostedModel) -> None:
        await hosted.fetch()
        if hosted.current is None:  # else a newer configuration was faster
            await hosted.open()
        self._note_open()

    def _note_open(self) -> None:
        if all(hosted.current is not None for hosted in self._models.values()):
            self._all_open.set()

    def close(self) -> None:
        """Close the engines, also those that are still opening. Blocks."""
        self.lanes.close()
        for hosted in tuple(self._models.values()):
            hosted.close()

    def still_running(self) -> list[str]:
        """The threads of engines that still run."""
        return [name for hosted in self._models.values() for name in hosted.still_running()]

    # --- changes --------------------------------------------------------------------------------------------

    async def apply(self, wanted: Config) -> dict[str, str]:
        """Make models and inference those of another configuration; the section that is rejected, and why.

        Waits a while for the first engines where there are none yet; the sections are pending after that.
        """
        self._stop_downloads(wanted)
        changed = [hosted for hosted in self._models.values() if hosted.needs_new_engine(wanted)]
        for hosted in self._models.values():
            if hosted.current is None and hosted not in changed:
                # The engine may be waiting for its device only because of the fallback that changes here.
                hosted.apply_fallback(wanted.inference)
        is_opening = any(hosted.first is not None for hosted in self._models.values())
        waits_for_device = self._state.snapshot().waiting_reason is not None
        if is_opening and not (changed and waits_for_device) and not await self._wait_for_first_engines():
            return {}
        async with self._change_lock:
            try:
                await self._apply(wanted)
            except VisionedgeError as error:
                return self._report_refusal(wanted, error)
            self._last_refusal = None
        await self._wait_for_first_engines()
        return {}

    async def _apply(self, wanted: Config) -> None:
        """Open what is new beside what is in use; only when all of it is open, send frames to it."""
        new = [HostedModel(name, self._resources) for name in wanted.models if name not in self._models]
        changed = [hosted for hosted in self._models.values() if hosted.needs_new_engine(wanted)]
        opened: list[tuple[HostedModel, EngineInstance]] = []
        try:
            for hosted in (*(each for each in changed if each.is_wanted(wanted)), *new):
                instance = await hosted.open_candidate(wanted)
                opened.append((hosted, instance))
            for hosted in self._models.values():
                if hosted not in changed:
                    hosted.apply_fallback(wanted.inference)
                    hosted.select(wanted)
        except BaseException:
            for _, instance in opened:
                await asyncio.to_thread(instance.close)
            raise
        inference = wanted.inference
        self._state.batcher.limit(inference.max_batch, int(inference.max_age_seconds * 1e9))
        for hosted, instance in opened:
            self._models[hosted.name] = hosted
            await hosted.activate(instance)
        self._sections.adopt(wanted)
        self._note_open()
        await self._remove_unused()
        if opened:
            await asyncio.to_thread(self._evict_unused)

    async def _remove_unused(self) -> None:
        """Close the models that are not configured any more, and that no camera uses."""
        config = self._config
        needed = {DEFAULT_MODEL, *config.models, *list_used_models(config.cameras)}
        for name in self._models.keys() - needed:
            hosted = self._models.pop(name)
            registry = self._state.snapshot().camera_registry
            if registry is not None:
                registry.forget_model(name)
            self._state.remove_model(name)
            await asyncio.to_thread(hosted.remove)
            log.info("%s is not used any more: closed", hosted.label)

    def find_unknown_labels(self, wanted: Config) -> list[str]:
        """The labels of cameras that their models do not have; none while other files are wanted."""
        return [
            problem
            for hosted in self._models.values()
            if hosted.is_same_file(wanted)
            for problem in hosted.find_unknown_labels(wanted)
            if problem.startswith("cameras.")
        ]

    def select_cameras(self, cameras: Mapping[str, CameraConfig]) -> None:
        """Use the classes, confidence and tracking of these cameras from the next batch on."""
        for hosted in self._models.values():
            hosted.select_cameras(cameras)

    def describe_waiting_cameras(self) -> str | None:
        """The cameras whose model is not loaded yet; None without such cameras."""
        state = self._state.snapshot()
        if (registry := state.camera_registry) is None or not self._all_open.is_set():
            return None
        waiting = [name for name in state.config.cameras if registry.waits_for_model(name)]
        return f"their model is not in use: {', '.join(waiting)}" if waiting else None

    def cancel_pending_model(self) -> None:
        """Cancel the downloads of a pending change; a newer change supersedes them."""
        for hosted in self._models.values():
            hosted.provider.stop()

    # --- a faster engine for a while (`overload_controller.VariantSwitcher`) --------------------------------

    @property
    def substitute_precision(self) -> str | None:
        """The precision of the substitute engines; None without one."""
        found = (hosted.substitute_precision for hosted in self._models.values())
        return next((precision for precision in found if precision is not None), None)

    async def can_try_faster_variant(self) -> bool:
        """Whether another precision may be faster than an engine in use."""
        if self.substitute_precision is not None:
            return False
        return any([await hosted.can_try_faster_variant() for hosted in self._models.values()])

    async def start_substitute(self) -> str | None:
        """Open the fastest precision on the CPU and send frames to it; None if no other one is faster.

        The engines of the configuration stay open, and go on probing for a lost device.

        Raises:
            VisionedgeError: a substitute cannot be opened.
        """
        async with self._change_lock:
            for hosted in tuple(self._models.values()):
                await hosted.start_substitute()
        return self.substitute_precision

    async def stop_substitute(self) -> None:
        """Send frames to the engines of the configuration again, and close the substitutes."""
        async with self._change_lock:
            for hosted in tuple(self._models.values()):
                await hosted.stop_substitute()

    # --- waiting, log and events ----------------------------------------------------------------------------

    def _stop_downloads(self, wanted: Config) -> None:
        """Stop the downloads of files that are not wanted any more."""
        for hosted in self._models.values():
            if not hosted.is_same_file(wanted):
                hosted.provider.stop()

    async def _wait_for_first_engines(self) -> bool:
        """Wait for the first engines, `_FIRST_ENGINE_TIMEOUT_S` at most; whether all are there."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_open.wait(), _FIRST_ENGINE_TIMEOUT_S)
        return self._all_open.is_set()

    def _pending_reason(self) -> str | None:
        if self._all_open.is_set():
            return None
        return f"not in use yet: {self._state.snapshot().no_engine_reason}"

    def _describe_downloads(self) -> str | None:
        """How far the downloads are; None without one."""
        found = [
            f"{hosted.label}: {message}" if hosted.name else message
            for hosted in tuple(self._models.values())
            if (message := hosted.provider.message) is not None
        ]
        return "; ".join(found) or None

    def _report_refusal(self, wanted: Config, error: VisionedgeError) -> dict[str, str]:
        """Log a change that failed; the section that stays as it was, and why."""
        changed = [hosted for hosted in self._models.values() if not hosted.is_same_file(wanted)]
        section = "model" if any(not hosted.name for hosted in changed) else "models"
        if not changed and not wanted.models.keys() - self._models.keys():
            section = "inference"
        if isinstance(error, ConfigError):
            section = str(error).partition(".")[0] if str(error).startswith("models.") else "inference"
        # A rejected change is tried again every few minutes, with the same result: log it once.
        news, self._last_refusal = (section, str(error)) != self._last_refusal, (section, str(error))
        if news:
            log.warning("%s stays as it was: %s", section, error)
        if news and section != "inference":
            for hosted in changed:
                hosted.report_refusal(error)
        return {section: str(error)}


def list_used_models(cameras: Mapping[str, CameraConfig]) -> set[str]:
    """The names in `models` that cameras use, for their pictures or for what they find."""
    found = {camera.model for camera in cameras.values()}
    found |= {camera.then.model for camera in cameras.values() if camera.then is not None}
    return {name for name in found if name is not None}
