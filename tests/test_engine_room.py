"""The engine room: model and inference change while cameras run; what cannot be had changes nothing."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from clips import make_clip
from tiny_models import TinyDetector
from visionedge.capture.camera import CameraStatus
from visionedge.config import validate
from visionedge.engine_room import EngineRoom
from visionedge.fleet import Fleet
from visionedge.frames import Result
from visionedge.inference.batcher import Drop
from visionedge.rooms import Rooms
from visionedge.threads import Crew


class Module:
    """Cameras, batcher and engine room, without all that is behind them."""

    def __init__(self, document: dict[str, Any], data: Path) -> None:
        self.document = document
        self.results: list[Result] = []
        self._more = threading.Condition()
        self.crew = Crew(lambda name, error: pytest.fail(f"{name} died: {error}"))
        self.rooms = Rooms.of(validate(document), data, {}, self._collect)
        self.room = EngineRoom(
            self.rooms, data, self.crew, lambda name, error: pytest.fail(f"{name}: {error}")
        )

    def _collect(self) -> None:
        with self._more:
            self.results += [item for item in self.rooms.outbox.drain() if isinstance(item, Result)]
            self._more.notify_all()

    def _until(self, condition: Callable[[list[Result]], bool]) -> None:
        with self._more:
            assert self._more.wait_for(lambda: condition(self.results), 30)

    async def until(self, condition: Callable[[list[Result]], bool]) -> None:
        """Wait until the results are such."""
        await asyncio.to_thread(self._until, condition)

    async def change(self, over: dict[str, Any]) -> dict[Any, str]:
        """Change to the document with these sections."""
        return await self.room.change(validate({**self.document, **over}))


@asynccontextmanager
async def running(document: dict[str, Any], data: Path) -> AsyncIterator[Module]:
    module = Module(document, data)
    rooms = module.rooms

    def ignore(_status: CameraStatus) -> None:
        """Nobody asks."""

    fitting = module.room.load()
    rooms.fleet = Fleet(
        fitting, rooms.batcher, module.crew, first_sequence=lambda _name: 1, on_change=ignore
    )  # fmt: skip
    rooms.fleet.apply(rooms.config.cameras)
    try:
        await module.room.open()
        yield module
    finally:
        module.crew.stopping.set()
        rooms.fleet.stop()
        rooms.batcher.close()
        module.room.lineup.close()
        left = await asyncio.to_thread(module.crew.join, 10)
        await asyncio.to_thread(module.room.close)
        assert left + module.room.left() == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "long.mp4", pictures=1200, fps=20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    TinyDetector().save(folder / "small.onnx")
    TinyDetector(width_px=96, height_px=64, seed=1).save(folder / "large.onnx")
    TinyDetector(poison=float("nan")).save(folder / "poisoned.onnx")
    (folder / "empty.onnx").write_bytes(b"")
    return folder


def document(clip: Path, models: Path, *, process: bool) -> dict[str, Any]:
    return {
        "cameras": {name: {"uri": str(clip)} for name in ("dock", "gate", "yard")},
        "model": {"path": str(models / "small.onnx")},
        "inference": {"device": "cpu", "process": process, "confidence": 0.1},
    }


def of(results: list[Result], camera: str) -> list[Result]:
    return [each for each in results if each.frame.camera == camera]


def play(story: Callable[[Module], Awaitable[None]], start: dict[str, Any], data: Path) -> Module:
    async def told() -> Module:
        async with running(start, data) as module:
            await story(module)
        return module

    return asyncio.run(told())


@pytest.mark.parametrize("process", [False, True], ids=["in-process", "own-process"])
def test_another_model_takes_over_and_no_frame_is_lost(
    tmp_path: Path, clip: Path, models: Path, process: bool
) -> None:
    """Of another size, so that pictures have to be prepared otherwise from one frame to the next."""

    async def story(module: Module) -> None:
        await module.until(lambda r: all(len(of(r, name)) >= 3 for name in ("dock", "gate", "yard")))
        assert await module.change({"model": {"path": str(models / "large.onnx")}}) == {}
        await module.until(
            lambda r: all(any(e.model == "large" for e in of(r, n)[-3:]) for n in ("dock", "gate", "yard"))
        )
        assert module.rooms.loaded is not None
        assert module.rooms.loaded.name == "large"
        assert module.rooms.config.model.path == str(models / "large.onnx")

    module = play(story, document(clip, models, process=process), tmp_path)
    for camera, seen in module.rooms.batcher.statistics().cameras.items():
        assert seen.dropped[Drop.FAILED] == 0
        assert seen.offered == seen.analysed + sum(seen.dropped.values())
        theirs = of(module.results, camera)
        numbers = [each.frame.sequence for each in theirs]
        assert all(before < after for before, after in pairwise(numbers))
        names = [each.model for each in theirs]
        assert names == sorted(names, reverse=True)  # small, and from some frame on large
        assert {each.frame.image.shape[1] for each in theirs if each.model == "large"} == {96}


def test_a_model_that_cannot_be_had_leaves_the_old_one_at_work(
    tmp_path: Path, clip: Path, models: Path
) -> None:
    async def story(module: Module) -> None:
        for name, words in (("gone", "no such model file"), ("empty", "empty"), ("poisoned", "no numbers")):
            refused = await module.change({"model": {"path": str(models / f"{name}.onnx")}})
            assert set(refused) == {"model"}
            assert words in refused["model"].lower()
        count = len(module.results)
        await module.until(lambda r: len(r) >= count + 6)
        assert {each.model for each in module.results} == {"small"}
        assert module.rooms.config.model.path == str(models / "small.onnx")

    module = play(story, document(clip, models, process=True), tmp_path)
    assert all(c.dropped[Drop.FAILED] == 0 for c in module.rooms.batcher.statistics().cameras.values())


def test_what_counts_as_a_detection_changes_without_another_engine(
    tmp_path: Path, clip: Path, models: Path
) -> None:
    start = document(clip, models, process=False)

    async def story(module: Module) -> None:
        await module.until(lambda r: len(r) >= 3)
        engine = module.rooms.engine
        assert await module.change({"inference": {**start["inference"], "confidence": 1.0}}) == {}
        count = len(module.results)
        await module.until(lambda r: len(r) >= count + 9)
        assert module.rooms.engine is engine
        assert {len(each.detections) for each in module.results[-3:]} == {0}

    module = play(story, start, tmp_path)
    assert any(len(each.detections) for each in module.results[:3])


def test_classes_that_the_model_does_not_know_are_a_problem_of_inference(
    tmp_path: Path, clip: Path, models: Path
) -> None:
    start = document(clip, models, process=False)

    async def story(module: Module) -> None:
        refused = await module.change({"inference": {**start["inference"], "classes": ["unicorn"]}})
        assert "unicorn" in refused["inference"]
        assert module.rooms.config.inference.classes is None

    play(story, start, tmp_path)
