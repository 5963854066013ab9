"""The engine room: which model and engine compute, and how others take their place while the module runs.

Another engine is opened and warmed up beside the one in use, and only then changed over to; when any step
fails, the old one has never stopped.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visionedge.capture.camera import Fitting
from visionedge.config import Config, InferenceConfig, ModelConfig
from visionedge.errors import ConfigError, VisionedgeError
from visionedge.inference.any_engine import AnyEngine
from visionedge.inference.detections import Selection
from visionedge.inference.lineup import Lineup
from visionedge.inference.model import Model, bundled_model_path, load_model
from visionedge.inference.process import EngineProcess
from visionedge.inference.shared import Arena, blocks_for
from visionedge.inference.startup import open_engine
from visionedge.rooms import Rooms
from visionedge.threads import Crew, OnDeath, on_thread

log = logging.getLogger(__name__)

Section = Literal["model", "inference"]

_SETTLE_S = 10.0

# What an engine cannot take over while it runs: a change of these needs another one.
_OPENED_WITH = ("device", "fallback", "max_batch", "precision", "latency_budget_ms", "process")


@dataclass(slots=True)
class Machinery:
    """A model, its engine once that is open, and what was made for the two. `crew` is the engine's alone."""

    model: Model
    selection: Selection
    inference: InferenceConfig
    arena: Arena | None
    crew: Crew
    engine: AnyEngine | None = None
    child: EngineProcess | None = None

    @property
    def fitting(self) -> Fitting:
        """How cameras prepare pictures for it."""
        spec = self.model.input
        return Fitting(spec) if self.arena is None else Fitting(spec, self.arena.allocate)

    def close(self) -> None:
        """End the engine, also one that still opens, and give its memory back. Blocks."""
        closing = self.child or self.engine
        if closing is not None:
            closing.close()
        if self.arena is not None:
            self.arena.close()


class EngineRoom:
    """Loads models and opens engines off the loop; everything else belongs to the loop.

    `crew` runs the lanes and what is opened; `on_death` is told of a thread of an engine that ended.
    """

    def __init__(self, rooms: Rooms, data: Path, crew: Crew, on_death: OnDeath) -> None:
        self._rooms = rooms
        self._data = data
        self._crew = crew
        self._on_death = on_death
        self._changing = asyncio.Lock()
        self._machinery: Machinery | None = None
        self._opening: Machinery | None = None
        self._crews: list[Crew] = []
        self.lineup = Lineup(rooms.batcher, crew, rooms.outbox.put)

    def load(self) -> Fitting:
        """Load the model of the configuration; how cameras prepare pictures for it. Blocks.

        Raises:
            ConfigError, ModelError, UnavailableError: it cannot be had.
        """
        self._opening = self._prepared(self._rooms.config)
        self._show(self._opening)
        return self._opening.fitting

    async def open(self) -> AnyEngine:
        """Open and warm the engine of the model that was loaded, and start its lanes.

        Raises:
            VisionedgeError: as `startup.open_engine`, or it was closed meanwhile.
        """
        assert self._opening is not None  # noqa: S101 - `load` comes first
        machinery = self._opening
        engine = await self._opened(machinery)
        self._take_over(machinery, engine)
        return engine

    async def change(self, wanted: Config) -> dict[str, str]:
        """Make model and inference those of another configuration; what could not be done, and why.

        A section that is refused stays as it was.
        """
        async with self._changing:
            try:
                await self._change(wanted)
            except VisionedgeError as error:
                section: Section = "inference"
                if wanted.model != self._rooms.config.model and not isinstance(error, ConfigError):
                    section = "model"
                log.warning("%s stays as it was: %s", section, error)
                return {section: str(error)}
        return {}

    def close(self) -> None:
        """End the engines, also one that still opens. Blocks."""
        self.lineup.close()
        for machinery in (self._opening, self._machinery):
            if machinery is not None:
                machinery.close()

    def left(self) -> list[str]:
        """The threads of engines that still run."""
        return [name for crew in self._crews for name in crew.alive()]

    # --- steps ----------------------------------------------------------------------------------------------

    async def _change(self, wanted: Config) -> None:
        rooms, machinery = self._rooms, self._machinery
        if machinery is None:
            raise VisionedgeError("the first engine is still warming up")
        inference = wanted.inference
        if wanted.model != rooms.config.model or _needs_another(machinery.inference, inference):
            await self._exchange(wanted)
        else:
            rooms.selection = machinery.selection = _selection(machinery.model, inference)
            self.lineup.select(machinery.selection)
        rooms.batcher.limit(inference.max_batch, int(inference.max_age_seconds * 1e9))
        rooms.config = rooms.config.model_copy(update={"model": wanted.model, "inference": inference})

    async def _exchange(self, wanted: Config) -> None:
        """Open another engine beside the one in use, change over to it, and close the old one."""
        former = self._machinery
        machinery = self._opening = await on_thread(self._crew, "loading", lambda: self._prepared(wanted))
        try:
            engine = await self._opened(machinery)
        except BaseException:
            self._opening = None
            await asyncio.to_thread(machinery.close)
            raise
        self._take_over(machinery, engine)
        if former is not None:
            await asyncio.to_thread(self._leave, former)

    def _leave(self, former: Machinery) -> None:
        self.lineup.settle(_SETTLE_S)
        former.close()

    def _prepared(self, config: Config) -> Machinery:
        model = load_model(model_path(config.model))
        selection = _selection(model, config.inference)
        arena = Arena(model.input, blocks_for(len(config.cameras))) if config.inference.process else None
        crew = Crew(self._on_death)
        self._crews = [old for old in self._crews if old.alive()] + [crew]
        return Machinery(model, selection, config.inference, arena, crew)

    async def _opened(self, machinery: Machinery) -> AnyEngine:
        return await on_thread(self._crew, "opening", self._opener(machinery))

    def _opener(self, machinery: Machinery) -> Callable[[], AnyEngine]:
        """What opens the engine, in a process of its own or in this one; slow."""
        if machinery.arena is None:
            return lambda: open_engine(machinery.model, machinery.inference, data=self._data)
        # Kept from now on: a child is ended also while it opens.
        child = machinery.child = EngineProcess(
            machinery.model,
            machinery.inference,
            machinery.arena,
            data=self._data,
            crew=machinery.crew,
            on_change=self._rooms.outbox.put,
        )

        def opened() -> AnyEngine:
            child.open()
            return child

        return opened

    def _take_over(self, machinery: Machinery, engine: AnyEngine) -> None:
        machinery.engine = engine
        self._opening, self._machinery = None, machinery
        self.lineup.adopt(engine, machinery.selection)
        # From here on: pictures that were prepared for the old one are still computed there.
        if self._rooms.fleet is not None:
            self._rooms.fleet.refit(machinery.fitting)
        self._show(machinery)

    def _show(self, machinery: Machinery) -> None:
        rooms = self._rooms
        rooms.loaded, rooms.selection, rooms.arena = machinery.model, machinery.selection, machinery.arena
        rooms.engine = machinery.engine


def model_path(model: ModelConfig) -> Path:
    """Where the model of a configuration lies.

    Raises:
        ConfigError: it is none that can be had.
    """
    if model.url is not None:
        raise ConfigError(["model.url: models are not fetched yet; put the file there and give model.path"])
    return Path(model.path) if model.path is not None else bundled_model_path()


def _selection(model: Model, inference: InferenceConfig) -> Selection:
    return Selection.of(model, inference.confidence, inference.iou, inference.classes)


def _needs_another(now: InferenceConfig, wanted: InferenceConfig) -> bool:
    return any(getattr(now, key) != getattr(wanted, key) for key in _OPENED_WITH)
