"""The state of the running module: one owner, one writer for each part, snapshots for readers.

`AppState` owns the configuration in force and what the service has built. Each section of the configuration
has one writer, which registers once and is the only one that can put the section in force. `apply` asks the
writers to change to another configuration and returns an `Applied`, computed from the configuration that the
writers have put in force, not from the one that was wanted. HTTP, the twin and the metrics read a
`StateSnapshot`, which never changes.
"""

import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visionedge.app.load_meter import LoadMeter
from visionedge.app.overload_policy import OverloadStatus
from visionedge.app.second_stage import CameraAnswers, CropStatistics
from visionedge.camera.camera import Camera, CameraStatus
from visionedge.camera.registry import CameraRegistry
from visionedge.config.applied import Applied, SectionOutcome
from visionedge.config.schema import SECTIONS, Config
from visionedge.engine.batcher import Batcher
from visionedge.engine.interface import Engine, EngineEvent, EngineInfo
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.frames.types import DEFAULT_MODEL, FrameResult
from visionedge.iothub.delivery import Delivery
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.outbound.messages import EventKind
from visionedge.runtime.threads import LoopQueue
from visionedge.scene.writer import SceneStorageStatus
from visionedge.web.latest_results import LatestResults

_WARMING_UP = "the engine is warming up"


@dataclass(frozen=True, slots=True)
class InboundStatistics:
    """Counts since the start of what IoT Hub and other modules sent to this module.

    `configurations` by outcome, `patches` of reported properties, `methods` by name and status,
    `calls_dropped` because too many came at once, images of other modules. `config` is the last
    acknowledgement.
    """

    configurations: Mapping[str, int] = field(default_factory=dict)
    patches: int = 0
    methods: Mapping[tuple[str, int], int] = field(default_factory=dict)
    calls_dropped: int = 0
    pictures_answered: int = 0
    pictures_dropped: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SceneStatistics:
    """The scenes at one moment.

    `cameras`: for each with tracking the answer of `GET /api/v1/cameras/{name}/scene`. `events`: how many
    there were since the start, by camera and type. `storage`: None while there is no file. `second_stage`:
    the questions to each second model in use.
    """

    cameras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    events: Mapping[tuple[str, str], int] = field(default_factory=dict)
    storage: SceneStorageStatus | None = None
    second_stage: Mapping[str, CropStatistics] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model that is loaded, and what computes with it: `engine` is None while it opens.

    `requested`: the engine of the configuration, while a substitute computes in its place; else None.
    """

    model: Model
    selection: Selection
    frame_pool: SharedFramePool | None
    engine: Engine | None = None
    requested: Engine | None = None

    def engine_info(self) -> EngineInfo | None:
        """The engine that computes, with what was requested; None before it is ready."""
        if self.engine is None:
            return None
        info = self.engine.info()
        return info if self.requested is None else info.as_substitute_for(self.requested.info())


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """The module at one moment: its configuration in force, and its parts, None while they are not built yet.

    Parts such as `batcher` and `delivery` go on counting; their own `statistics` and `status` are snapshots.
    """

    config: Config
    data: Path
    environ: Mapping[str, str]
    started_ns: int
    batcher: Batcher
    loop_queue: LoopQueue[FrameResult | CameraAnswers | CameraStatus | EngineEvent]
    latest_results: LatestResults
    meter: LoadMeter
    overload_status: OverloadStatus
    models: Mapping[str, ModelState] = field(default_factory=dict)
    """The models that are loaded, by their name in `models`; that of the section `model` is first."""
    camera_registry: CameraRegistry | None = None
    delivery: Delivery | None = None
    waiting_reason: str | None = None
    read_fetch_progress: Callable[[], str | None] = lambda: None
    inbound_statistics: Callable[[], InboundStatistics] | None = None
    read_scenes: Callable[[], SceneStatistics] = SceneStatistics
    """Loop only, because scenes have no lock."""
    newer_state: tuple[str, ...] = ()
    """What is said of state files that belong to a newer version (`StateFile.newer`)."""
    stopping: bool = False
    failed: bool = False

    @property
    def running_cameras(self) -> Mapping[str, Camera]:
        """The cameras that run."""
        return {} if self.camera_registry is None else self.camera_registry.by_name

    @property
    def fetch_progress(self) -> str | None:
        """How far the download of a model is; None without a download."""
        return self.read_fetch_progress()

    @property
    def no_engine_reason(self) -> str:
        """Why there is no engine yet."""
        return self.fetch_progress or self.waiting_reason or _WARMING_UP

    @property
    def loaded_model(self) -> Model | None:
        """The model of the section `model`; None before it is loaded."""
        state = self.models.get(DEFAULT_MODEL)
        return None if state is None else state.model

    def engine_info(self, model: str = DEFAULT_MODEL) -> EngineInfo | None:
        """The engine of a model; None before it is ready."""
        state = self.models.get(model)
        return None if state is None else state.engine_info()

    def engine_infos(self) -> dict[str, EngineInfo]:
        """The engines that are ready, by the name of their model."""
        found = {name: state.engine_info() for name, state in self.models.items()}
        return {name: info for name, info in found.items() if info is not None}

    def send_event(self, kind: EventKind, code: str, message: str, details: Mapping[str, Any]) -> None:
        """Send an event to the cloud; without a delivery yet it is dropped."""
        if self.delivery is not None:
            self.delivery.event(kind, code, message, details)

    def readiness(self) -> list[str]:
        """Why frames of a model cannot be computed now; empty when all can."""
        if self.stopping:
            return ["stopping"]
        found = {name: self.readiness_of(name) for name in (DEFAULT_MODEL, *self.config.models)}
        return [f"model {name}: {why}" if name else why for name, why in found.items() if why is not None]

    def readiness_of(self, model: str) -> str | None:
        """Why frames of one model cannot be computed now; None when they can."""
        if (info := self.engine_info(model)) is None:
            return _WARMING_UP if model else self.no_engine_reason
        return None if info.process is None else info.process.down


SnapshotReader = Callable[[], StateSnapshot]
"""Returns the module as it is now: `AppState.snapshot`, without the right to write."""

ApplySections = Callable[[Config], Awaitable[Mapping[str, str]]]
"""Puts the writer's sections of a configuration in force; returns the reasons of those that it rejects."""


class AppState:
    """Owns the state. `register`, `apply` and `compare` are for the loop, everything else for any thread.

    `batcher`, `loop_queue`, `latest_results` and `meter` exist from the beginning and are never replaced.
    """

    def __init__(self, initial: StateSnapshot) -> None:
        self.batcher, self.loop_queue = initial.batcher, initial.loop_queue
        self.latest_results, self.meter = initial.latest_results, initial.meter
        self._now = initial
        self._lock = threading.Lock()
        self._writers: list[SectionWriter] = []

    def __repr__(self) -> str:
        return f"<AppState {'; '.join(self._now.readiness()) or 'ready'}>"

    @staticmethod
    def of(config: Config, data: Path, environ: Mapping[str, str], wake: Callable[[], None]) -> "AppState":
        """The state before anything is built; `wake` is called when `loop_queue` turns non-empty."""
        inference = config.inference
        return AppState(
            StateSnapshot(
                config=config,
                data=data,
                environ=environ,
                started_ns=time.monotonic_ns(),
                batcher=Batcher(inference.max_batch, int(inference.max_age_seconds * 1e9)),
                loop_queue=LoopQueue(wake),
                latest_results=LatestResults(),
                meter=LoadMeter(),
                overload_status=OverloadStatus(),
            )
        )

    def snapshot(self) -> StateSnapshot:
        """The module as it is now."""
        return self._now

    # --- the configuration in force -------------------------------------------------------------------------

    def register(
        self, *sections: str, apply: ApplySections, pending: Callable[[], str | None] = lambda: None
    ) -> "SectionWriter":
        """Make the caller the writer of these sections (keys of `SECTIONS`).

        `pending` returns the reason why what they configure does not run yet, or None.

        Raises:
            ValueError: a section does not exist, or has a writer.
        """
        for section in sections:
            if section not in SECTIONS or any(section in writer.sections for writer in self._writers):
                raise ValueError(f"section '{section}' does not exist or has a writer")
        writer = SectionWriter(sections, apply, pending, self._adopt)
        self._writers.append(writer)
        return writer

    async def apply(self, wanted: Config) -> Applied:
        """Make the running module that of another configuration, without disturbing what stays as it is.

        Sections that are rejected stay as they were. When a writer raises an error, its sections count as
        rejected until it has applied a configuration.
        """
        reasons: dict[str, str] = {}
        for writer in self._writers:
            try:
                reasons |= await writer.apply(wanted)
            except BaseException:
                writer.failed = True
                raise
            writer.failed = False
        return self._compare(wanted, reasons)

    def compare(self, wanted: Config) -> Applied:
        """What of a configuration is in force now; changes nothing."""
        return self._compare(wanted, {})

    def _compare(self, wanted: Config, reasons: Mapping[str, str]) -> Applied:
        return Applied(
            {section: self._outcome(section, wanted, reasons.get(section)) for section in SECTIONS}
        )

    def _outcome(self, section: str, wanted: Config, reason: str | None) -> SectionOutcome:
        writer = next((each for each in self._writers if section in each.sections), None)
        if reason is not None:
            return SectionOutcome("rejected", reason)
        if writer is not None and writer.failed:
            return SectionOutcome("rejected", "its last change failed halfway")
        if writer is not None and (why := writer.pending()) is not None:
            return SectionOutcome("pending", why)
        field = SECTIONS[section]
        if getattr(self._now.config, field) != getattr(wanted, field):
            return SectionOutcome("rejected", "it is not in force")
        return SectionOutcome("applied")

    def _adopt(self, sections: tuple[str, ...], wanted: Config) -> None:
        fields = (SECTIONS[section] for section in sections)
        update = {field: getattr(wanted, field) for field in fields}
        with self._lock:
            self._now = replace(self._now, config=self._now.config.model_copy(update=update))

    def restart_with(self, config: Config) -> None:
        """Begin with another configuration, as the one that the start began with cannot be used."""
        self._update(config=config)

    # --- the parts, each with its writer --------------------------------------------------------------------

    def set_model(self, name: str, state: ModelState) -> None:
        """A model and its engine. Written by `EngineHost`."""
        with self._lock:
            models = {**self._now.models, name: state}
            self._now = replace(self._now, models=dict(sorted(models.items())))

    def remove_model(self, name: str) -> None:
        """A model is not served any more. Written by `EngineHost`."""
        with self._lock:
            models = {each: state for each, state in self._now.models.items() if each != name}
            self._now = replace(self._now, models=models)

    def set_selection(self, name: str, selection: Selection) -> None:
        """What counts as a detection of a model. Written by `EngineHost`."""
        with self._lock:
            if (state := self._now.models.get(name)) is not None:
                models = {**self._now.models, name: replace(state, selection=selection)}
                self._now = replace(self._now, models=models)

    def set_fetch_progress(self, read: Callable[[], str | None]) -> None:
        """What reports how far a download is. Written by `EngineHost`."""
        self._update(read_fetch_progress=read)

    def set_overload_status(self, status: OverloadStatus) -> None:
        """How the load is reduced in an overload. Written by `OverloadController`."""
        self._update(overload_status=status)

    def set_waiting_reason(self, reason: str) -> None:
        """Why the engine that is being opened waits. Written by `Service`."""
        self._update(waiting_reason=reason)

    def set_camera_registry(self, registry: CameraRegistry) -> None:
        """The cameras. Written by `Service`."""
        self._update(camera_registry=registry)

    def set_delivery(self, delivery: Delivery | None) -> None:
        """The way to IoT Hub. Written by `Service`."""
        self._update(delivery=delivery)

    def set_inbound_statistics(self, read: Callable[[], InboundStatistics]) -> None:
        """What counts the requests of the cloud and of other modules. Written by `Service`."""
        self._update(inbound_statistics=read)

    def set_scenes(self, read: Callable[[], SceneStatistics]) -> None:
        """What reads the scenes. Written by `Service`."""
        self._update(read_scenes=read)

    def set_newer_state(self, sentences: tuple[str, ...]) -> None:
        """The state files that belong to a newer version. Written by `Service`."""
        self._update(newer_state=sentences)

    def mark_stopping(self) -> None:
        """The module stops. Written by `Service`."""
        self._update(stopping=True)

    def mark_failed(self) -> None:
        """A thread that the module cannot do without has ended. Written by `Service`, from any thread."""
        self._update(failed=True)

    def _update(self, **changes: Any) -> None:
        with self._lock:
            self._now = replace(self._now, **changes)


class SectionWriter:
    """The only one that can put its sections in force; made by `AppState.register`."""

    def __init__(
        self,
        sections: tuple[str, ...],
        apply: ApplySections,
        pending: Callable[[], str | None],
        adopt: Callable[[tuple[str, ...], Config], None],
    ) -> None:
        self.sections = sections
        self.apply = apply
        self.pending = pending
        self.failed = False
        self._adopt = adopt

    def adopt(self, wanted: Config) -> None:
        """Record that the writer's sections of a configuration are in force from now on."""
        self._adopt(self.sections, wanted)
