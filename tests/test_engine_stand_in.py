"""A faster precision stands in for the engine of the configuration and goes again; no frame is lost by it."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from clips import make_clip
from engine_rooms import Module, document, of, play
from tiny_models import TinyDetector
from tiny_slow import save_slow, store_quick_variant
from visionedge.inference.batcher import Drop
from visionedge.inference.stand_in import StandIn
from visionedge.inference.variants import FOLDER

ROUNDS = 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "long.mp4", pictures=1500, fps=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_slow(folder / "small.onnx", ROUNDS)
    TinyDetector(seed=1).save(folder / "other.onnx")
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder for all: what was compiled and measured for one test serves the next."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def data(kept: Path) -> Iterator[Path]:
    """The data folder; variants are for one test alone."""
    yield kept
    shutil.rmtree(kept / FOLDER, ignore_errors=True)


def store(module: Module, data: Path) -> None:
    assert module.rooms.loaded is not None
    store_quick_variant(module.rooms.loaded, data)


async def some_more(module: Module) -> None:
    """Wait until every camera has more results."""
    counts = {name: len(of(module.results, name)) for name in ("dock", "gate", "yard")}
    await module.until(lambda r: all(len(of(r, name)) >= count + 3 for name, count in counts.items()))


def test_the_faster_precision_computes_and_the_engine_before_it_comes_back(
    data: Path, clip: Path, models: Path
) -> None:
    async def story(module: Module) -> None:
        room, rooms = module.room, module.rooms
        await some_more(module)
        engine = rooms.engine
        assert engine is not None
        store(module, data)
        assert await room.could_be_faster()

        assert await room.call_stand_in() == "int8"
        assert isinstance(rooms.engine, StandIn)
        assert rooms.engine.precision.precision == room.stand_in == "int8"
        assert (rooms.engine.device.requested, rooms.engine.device.code) == ("auto", engine.device.code)
        assert rooms.engine.device.effective == "cpu"
        assert not await room.could_be_faster()
        await some_more(module)

        await room.dismiss_stand_in()
        assert rooms.engine is engine
        assert room.stand_in is None
        await some_more(module)
        assert await room.could_be_faster()  # and may be called again

    start = document(clip, models, process=True)
    start["inference"]["device"] = "auto"
    module = play(story, start, data)
    for camera, seen in module.rooms.batcher.statistics().cameras.items():
        assert seen.dropped[Drop.FAILED] == 0
        assert seen.offered == seen.analysed + sum(seen.dropped.values())
        numbers = [each.frame.sequence for each in of(module.results, camera)]
        assert all(before < after for before, after in pairwise(numbers))
    assert {each.model for each in module.results} == {"small"}


def test_without_a_variant_there_is_nobody_to_call(data: Path, clip: Path, models: Path) -> None:
    async def story(module: Module) -> None:
        await some_more(module)
        engine = module.rooms.engine
        assert not await module.room.could_be_faster()
        assert await module.room.call_stand_in() is None
        assert module.rooms.engine is engine
        await some_more(module)

    play(story, document(clip, models, process=False), data)


def test_a_precision_that_was_asked_for_outright_is_kept(data: Path, clip: Path, models: Path) -> None:
    async def story(module: Module) -> None:
        await some_more(module)
        store(module, data)
        assert not await module.room.could_be_faster()

    start = document(clip, models, process=False)
    start["inference"]["precision"] = "fp32"
    play(story, start, data)


def test_a_change_of_the_model_dismisses_it_and_one_of_the_classes_does_not(
    data: Path, clip: Path, models: Path
) -> None:
    async def story(module: Module) -> None:
        await some_more(module)
        store(module, data)
        assert await module.room.call_stand_in() == "int8"
        start["inference"]["confidence"] = 0.99
        assert await module.change({"inference": start["inference"]}) == {}
        assert module.room.stand_in == "int8"
        await some_more(module)
        await module.room.dismiss_stand_in()
        await some_more(module)
        assert module.rooms.selection is not None
        assert module.rooms.selection.confidence == 0.99

        assert await module.room.call_stand_in() == "int8"
        assert await module.change({"model": {"path": str(models / "other.onnx")}}) == {}
        assert module.room.stand_in is None
        await module.until(lambda r: r[-1].model == "other")

    start = document(clip, models, process=False)
    play(story, start, data)
