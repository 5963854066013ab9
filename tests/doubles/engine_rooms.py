"""Cameras, batcher and engine room of a module, without all that is behind them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from visionedge.app.engine_host import EngineRoom
from visionedge.app.state import Rooms
from visionedge.camera.camera import CameraStatus
from visionedge.camera.registry import Fleet
from visionedge.config.load import validate
from visionedge.engine.interface import EngineNews
from visionedge.frames.types import Result
from visionedge.model.download import Tempo
from visionedge.runtime.threads import Crew


class Module:
    """Cameras, batcher and engine room, without all that is behind them."""

    def __init__(
        self,
        document: dict[str, Any],
        data: Path,
        tempo: Tempo | None = None,
        inject: Path | None = None,
    ) -> None:
        self.document = document
        self.results: list[Result] = []
        self.news: list[EngineNews] = []
        self._more = threading.Condition()
        self.crew = Crew(lambda name, error: pytest.fail(f"{name} died: {error}"))
        self.rooms = Rooms.of(validate(document), data, {}, self._collect)
        self.room = EngineRoom(
            self.rooms,
            data,
            self.crew,
            lambda name, error: pytest.fail(f"{name}: {error}"),
            tempo=tempo,
            inject=inject,
        )

    def _collect(self) -> None:
        with self._more:
            items = self.rooms.outbox.drain()
            self.results += [item for item in items if isinstance(item, Result)]
            self.news += [item for item in items if isinstance(item, EngineNews)]
            self._more.notify_all()

    def _until(self, condition: Callable[[list[Result]], bool]) -> None:
        with self._more:
            assert self._more.wait_for(lambda: condition(self.results), 120), self.news

    async def until(self, condition: Callable[[list[Result]], bool]) -> None:
        """Wait until the results are such."""
        await asyncio.to_thread(self._until, condition)

    async def until_told(self, code: str) -> None:
        """Wait until the engine has told this."""

        def told(_results: list[Result]) -> bool:
            return any(news.code == code for news in self.news)

        await self.until(told)

    async def change(self, over: dict[str, Any]) -> dict[Any, str]:
        """Change to the document with these sections."""
        return await self.room.change(validate({**self.document, **over}))

    async def begin(self) -> None:
        """Cameras and engine, as soon as the model is there."""
        rooms = self.rooms

        def ignore(_status: CameraStatus) -> None:
            """Nobody asks."""

        fitting = self.room.load() or await self.room.fetch()
        rooms.fleet = Fleet(
            fitting, rooms.batcher, self.crew, first_sequence=lambda _name: 1, on_change=ignore
        )
        rooms.fleet.apply(rooms.config.cameras)
        await self.room.open()


@asynccontextmanager
async def running(
    document: dict[str, Any],
    data: Path,
    *,
    tempo: Tempo | None = None,
    begun: bool = True,
    inject: Path | None = None,
) -> AsyncIterator[Module]:
    """A module; not `begun` it waits for its model when the story begins. `inject` is a script of faults."""
    module = Module(document, data, tempo, inject)
    rooms = module.rooms
    beginning = asyncio.ensure_future(module.begin())
    try:
        if begun:
            await beginning
        yield module
    finally:
        beginning.cancel()
        module.crew.stopping.set()
        if rooms.fleet is not None:
            rooms.fleet.stop()
        rooms.batcher.close()
        module.room.lineup.close()
        left = await asyncio.to_thread(module.crew.join, 10)
        await asyncio.to_thread(module.room.close)
        assert left + module.room.left() == []


def document(clip: Path, models: Path, *, process: bool) -> dict[str, Any]:
    """Three cameras that show a clip, and a small model."""
    return {
        "cameras": {name: {"uri": str(clip)} for name in ("dock", "gate", "yard")},
        "model": {"path": str(models / "small.onnx")},
        "inference": {"device": "cpu", "process": process, "confidence": 0.1},
    }


def of(results: list[Result], camera: str) -> list[Result]:
    """The results of one camera."""
    return [each for each in results if each.frame.camera == camera]


def play(
    story: Callable[[Module], Awaitable[None]],
    start: dict[str, Any],
    data: Path,
    *,
    tempo: Tempo | None = None,
    begun: bool = True,
    inject: Path | None = None,
) -> Module:
    """Run a module through a story; the module as it was at the end."""

    async def told() -> Module:
        async with running(start, data, tempo=tempo, begun=begun, inject=inject) as module:
            await story(module)
        return module

    return asyncio.run(told())
