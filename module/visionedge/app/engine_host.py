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

from visionedge.app.state import Rooms
from visionedge.camera.camera import Fitting
from visionedge.config.schema import Config, InferenceConfig
from visionedge.engine.interface import AnyEngine, StandIn
from visionedge.engine.lanes import Lineup
from visionedge.engine.local_engine import open_engine
from visionedge.engine.precision_choice import contenders
from visionedge.engine.process.client import EngineProcess
from visionedge.engine.process.shared_memory import Arena, blocks_for
from visionedge.errors import ConfigError, ModelError, VisionedgeError
from visionedge.model.download import Tempo
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.model.supply import LIVE_TRIES, Source, Supply
from visionedge.runtime.threads import Crew, OnDeath, on_thread

# What computes: a model and its engine, and what was made for the two.


@dataclass(slots=True)
class Machinery:
    """A model, its engine once that is open, and what was made for the two. `crew` is the engine's alone.

    `has_contenders`: there are variants that may be faster on the CPU; None: nobody has looked yet.
    """

    source: Source
    model: Model
    selection: Selection
    inference: InferenceConfig
    arena: Arena | None
    crew: Crew
    engine: AnyEngine | None = None
    child: EngineProcess | None = None
    has_contenders: bool | None = None

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


log = logging.getLogger(__name__)

Section = Literal["model", "inference"]
Code = Literal["model-changed", "model-refused", "model-waiting"]

_SETTLE_S = 10.0
_FIRST_S = 10.0

# What an engine cannot take over while it runs: a change of these needs another one.
_OPENED_WITH = ("device", "parity", "max_batch", "precision", "latency_budget_ms", "process")


class EngineRoom:
    """Loads models and opens engines off the loop; everything else belongs to the loop.

    `crew` runs the lanes and what is opened; `on_death` is told of a thread of an engine that ended. `tempo`
    is for models that are fetched, `inject` a script of faults, for tests.
    """

    def __init__(
        self,
        rooms: Rooms,
        data: Path,
        crew: Crew,
        on_death: OnDeath,
        *,
        tempo: Tempo | None = None,
        inject: Path | None = None,
    ) -> None:
        self._rooms = rooms
        self._data = data
        self._crew = crew
        self._on_death = on_death
        self._inject = inject
        self._changing = asyncio.Lock()
        self._machinery: Machinery | None = None
        self._opening: Machinery | None = None
        self._beside: Machinery | None = None
        self._standing: Machinery | None = None
        self._crews: list[Crew] = []
        self._first = asyncio.Event()
        self._refusal: tuple[str, str] | None = None
        self.lineup = Lineup(rooms.batcher, crew, rooms.outbox.put)
        self._supply = rooms.supply = Supply(data, crew, tempo=tempo, on_trouble=self._waits)

    def load(self) -> Fitting | None:
        """Load the model of the configuration; how cameras prepare pictures for it. Blocks.

        None if it has to be fetched first.

        Raises:
            ConfigError, ModelError, UnavailableError: it cannot be had.
        """
        source = self._supply.at_hand(self._rooms.config.model)
        return None if source is None else self._loaded(self._prepared(source, self._rooms.config))

    async def fetch(self) -> Fitting:
        """Fetch the model of the configuration, however long that takes, and load it.

        Raises:
            ConfigError, ModelError, UnavailableError: as `load`.
        """
        while True:
            config = self._rooms.config
            source = await self._supply.fetched(config.model)
            if source is None:
                continue  # stopped: another configuration came
            prepared = functools.partial(self._prepared, source, config)
            machinery = await on_thread(self._crew, "loading", prepared)
            if (config.model, config.inference) == (self._rooms.config.model, self._rooms.config.inference):
                return self._loaded(machinery)
            await asyncio.to_thread(machinery.close)

    async def open(self) -> AnyEngine:
        """Open and warm the engine of the model that was loaded, and start its lanes.

        Raises:
            VisionedgeError: as `startup.open_engine`, or it was closed meanwhile.
        """
        assert self._opening is not None  # noqa: S101 - `load` comes first
        machinery = self._opening
        try:
            engine = machinery.engine = await self._opened(machinery, waits=True)
        except VisionedgeError:
            if self._machinery is None or self._machinery.engine is None:
                raise
            return self._machinery.engine  # one of another configuration came first and took its place
        self._take_over(machinery)
        await on_thread(self._crew, "tidying", lambda: self._supply.tidy([machinery.model.sha256]))
        return engine

    async def change(self, wanted: Config) -> dict[str, str]:
        """Make model and inference those of another configuration; what could not be done, and why.

        A section that is refused stays as it was.
        """
        if wanted.model != self._rooms.config.model:
            self._supply.stop()  # what is being fetched for an earlier change is not wanted any more
        first = self._opening if self._machinery is None else None
        if first is not None:
            waits_for_device = self._rooms.held is not None
            if wanted.model == self._rooms.config.model and not _needs_another(
                first.inference, wanted.inference
            ):
                _follow(first, wanted.inference)  # it may wait for its device because of what is changed here
                waits_for_device = False
            if not waits_for_device and (late := await self._first_is_there()):
                return late
        async with self._changing:
            try:
                await self._change(wanted)
            except VisionedgeError as error:
                return self._refused(wanted, error)
            self._refusal = None
        return await self._first_is_there()

    def give_way(self) -> None:
        """Let a model be that is still being fetched for a change: another change is to come."""
        self._supply.stop()

    def close(self) -> None:
        """End the engines, also one that still opens. Blocks."""
        self.lineup.close()
        for machinery in (self._opening, self._beside, self._standing, self._machinery):
            if machinery is not None:
                machinery.close()

    def left(self) -> list[str]:
        """The threads of engines that still run."""
        return [name for crew in self._crews for name in crew.alive()]

    # --- a faster engine for a while (`overload.keeper.Engines`) --------------------------------------------

    @property
    def stand_in(self) -> str | None:
        """The precision that computes in place of the one of the configuration; None: that one does."""
        standing = self._standing
        return None if standing is None or standing.engine is None else standing.engine.precision.precision

    async def could_be_faster(self) -> bool:
        """Whether another precision might compute more than the engine in use.

        Only on the CPU, only where any precision will do, and only where none was tried here yet.
        """
        machinery = self._machinery
        if machinery is None or machinery.engine is None or self._standing is not None:
            return False
        precision = machinery.engine.precision
        if precision.precision != "fp32" or precision.ms or machinery.engine.device.effective != "cpu":
            return False
        if machinery.inference.precision != "auto":
            return False
        if machinery.has_contenders is None:
            look = functools.partial(contenders, machinery.model, device="cpu", data=self._data)
            machinery.has_contenders = bool(await asyncio.to_thread(look))
        return machinery.has_contenders

    async def call_stand_in(self) -> str | None:
        """Open the fastest precision on the CPU and let it compute; None where that is no other one.

        The engine in use stays open, and goes on looking for a device that was lost.

        Raises:
            VisionedgeError: it cannot be opened.
        """
        async with self._changing:
            former = self._machinery
            if former is None or former.engine is None or self._standing is not None:
                return self.stand_in
            former.has_contenders = False  # one try for each engine
            inference = self._rooms.config.inference.model_copy(update={"device": "cpu"})
            config = self._rooms.config.model_copy(update={"inference": inference})
            machinery = await self._opened_beside(former.source, config)
            engine = machinery.engine
            if engine is None or engine.precision.precision == former.engine.precision.precision:
                await asyncio.to_thread(machinery.close)
                return None
            former.has_contenders = True
            self._standing = machinery
            self._use(machinery, StandIn(engine, former.engine))
            await asyncio.to_thread(self.lineup.settle, _SETTLE_S)
            return self.stand_in

    async def dismiss_stand_in(self) -> None:
        """Let the engine of the configuration compute again, and close the one that stood in."""
        async with self._changing:
            standing, former = self._standing, self._machinery
            if standing is None or former is None or former.engine is None:
                return
            self._standing = None
            self._use(former, former.engine)
            await asyncio.to_thread(self._leave, standing)

    async def _first_is_there(self) -> dict[str, str]:
        """Nothing when an engine computes; before the first one does, wait for it a while."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._first.wait(), _FIRST_S)
        if self._first.is_set():
            return {}
        why = self._rooms.fetching or self._rooms.held or "the engine is warming up"
        return dict.fromkeys(("model", "inference"), f"not in use yet: {why}")

    # --- what is told ---------------------------------------------------------------------------------------

    def _refused(self, wanted: Config, error: VisionedgeError) -> dict[str, str]:
        """The section that stays as it was, and why."""
        changes = wanted.model != self._rooms.config.model
        section: Section = "model" if changes and not isinstance(error, ConfigError) else "inference"
        # Whoever tries it again need not hear it again.
        news, self._refusal = (section, str(error)) != self._refusal, (section, str(error))
        if news:
            log.warning("%s stays as it was: %s", section, error)
        if news and section == "model":
            running = self._rooms.loaded
            details = {"name": running.name, "sha256": running.sha256} if running else {}
            self._event("model-refused", f"the model stays as it was: {error}", {"running": details})
        return {section: str(error)}

    def _tell_changed(self, former: Model, now: Model) -> None:
        if former.sha256 != now.sha256:
            log.info("the model is changed: %s computes instead of %s", now.name, former.name)
            self._event(
                "model-changed",
                f"{now.name} computes instead of {former.name}",
                {
                    "running": {"name": now.name, "sha256": now.sha256},
                    "before": {"name": former.name, "sha256": former.sha256},
                },
            )

    def _waits(self, words: str) -> None:
        """At the start nothing computes before the model is there: somebody should hear why it is not."""
        if self._machinery is None:
            self._event("model-waiting", f"the model cannot be fetched, and is tried again: {words}", {})

    def _event(self, code: Code, message: str, details: Mapping[str, object]) -> None:
        if self._rooms.delivery is not None:
            self._rooms.delivery.event("model", code, message, details)

    # --- steps ----------------------------------------------------------------------------------------------

    async def _change(self, wanted: Config) -> None:
        rooms, machinery = self._rooms, self._machinery
        inference = wanted.inference
        if machinery is None and self._opening is None:
            # The first model is still being fetched; from now on it may be another one.
            if wanted.model != rooms.config.model:
                self._supply.stop()
            rooms.config = rooms.config.model_copy(update={"model": wanted.model, "inference": inference})
            return
        if machinery is None or (
            wanted.model != rooms.config.model or _needs_another(machinery.inference, inference)
        ):
            await self._exchange(wanted)
        else:
            _follow(machinery, inference)
            rooms.selection = machinery.selection = _selection(machinery.model, inference)
            self.lineup.select(machinery.selection)
            if self._standing is not None:
                self._standing.selection = machinery.selection
        rooms.batcher.limit(inference.max_batch, int(inference.max_age_seconds * 1e9))
        rooms.config = rooms.config.model_copy(update={"model": wanted.model, "inference": inference})

    async def _exchange(self, wanted: Config) -> None:
        """Open another engine beside the one in use, change over to it, and close the old one."""
        former = self._machinery
        first = self._opening if former is None else None
        source = await self._supply.fetched(wanted.model, tries=LIVE_TRIES)
        if source is None:
            raise VisionedgeError("another change of the model came before it was fetched")
        machinery = await self._opened_beside(source, wanted)
        former = self._machinery  # a first one may have come meanwhile
        leaving = [each for each in (former, self._standing, None if former else first) if each is not None]
        self._take_over(machinery)
        await asyncio.to_thread(self._leave, *leaving)
        await asyncio.to_thread(self._supply.tidy, [machinery.model.sha256])
        if former is not None:
            self._tell_changed(former.model, machinery.model)

    async def _opened_beside(self, source: Source, config: Config) -> Machinery:
        """Another machinery, its engine open, beside the one in use."""
        prepared = functools.partial(self._prepared, source, config)
        machinery = await on_thread(self._crew, "loading", prepared)
        self._beside = machinery
        try:
            machinery.engine = await self._opened(machinery, waits=False)
        except BaseException:
            await asyncio.to_thread(machinery.close)
            raise
        finally:
            self._beside = None
        return machinery

    def _leave(self, *former: Machinery) -> None:
        self.lineup.settle(_SETTLE_S)
        for machinery in former:
            machinery.close()

    def _prepared(self, source: Source, config: Config) -> Machinery:
        model = source.load()
        selection = _selection(model, config.inference)
        arena = Arena(model.input, blocks_for(len(config.cameras))) if config.inference.process else None
        crew = Crew(self._on_death)
        self._crews = [old for old in self._crews if old.alive()] + [crew]
        return Machinery(source, model, selection, config.inference, arena, crew)

    async def _opened(self, machinery: Machinery, *, waits: bool) -> AnyEngine:
        try:
            return await on_thread(self._crew, "opening", self._opener(machinery, waits=waits))
        except ModelError as error:
            raise ModelError(machinery.source.words(error)) from None

    def _opener(self, machinery: Machinery, *, waits: bool) -> Callable[[], AnyEngine]:
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
            # One in use goes on meanwhile, and whoever wants another shall hear that it cannot be had.
            waits=waits,
            inject=self._inject,
        )

        def opened() -> AnyEngine:
            child.open()
            return child

        return opened

    def _take_over(self, machinery: Machinery) -> None:
        assert machinery.engine is not None  # noqa: S101 - it was opened
        self._opening, self._machinery, self._standing = None, machinery, None
        self._first.set()
        self._use(machinery, machinery.engine)

    def _use(self, machinery: Machinery, engine: AnyEngine) -> None:
        """Compute with this engine, which is that of the machinery or stands in with it, from now on."""
        self.lineup.adopt(engine, machinery.selection)
        # From here on: pictures that were prepared for the old one are still computed there.
        if self._rooms.fleet is not None:
            self._rooms.fleet.refit(machinery.fitting)
        self._show(machinery, engine)

    def _loaded(self, machinery: Machinery) -> Fitting:
        """A first model: what is to be opened next."""
        self._opening = machinery
        self._show(machinery, None)
        return machinery.fitting

    def _show(self, machinery: Machinery, engine: AnyEngine | None) -> None:
        rooms = self._rooms
        rooms.loaded, rooms.selection, rooms.arena = machinery.model, machinery.selection, machinery.arena
        rooms.engine = engine


def _selection(model: Model, inference: InferenceConfig) -> Selection:
    return Selection.of(model, inference.confidence, inference.iou, inference.classes)


def _follow(machinery: Machinery, wanted: InferenceConfig) -> None:
    """Take over what an engine can take over while it runs, or while it opens."""
    machinery.inference = machinery.inference.model_copy(update={"fallback": wanted.fallback})
    if machinery.child is not None:
        machinery.child.follow(wanted.fallback)


def _needs_another(now: InferenceConfig, wanted: InferenceConfig) -> bool:
    return any(getattr(now, key) != getattr(wanted, key) for key in _OPENED_WITH)
