"""The housekeeping of the module, several times a second: no error in it may end the module."""

import asyncio
import errno
import logging
import resource
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from engine_infos import make_engine_info
from visionedge.app.housekeeping import FailureCounter, Housekeeping, PositionStore
from visionedge.app.http_backend import HttpBackend
from visionedge.app.load_meter import LoadMeter
from visionedge.app.metrics import Metrics
from visionedge.app.overload_controller import OverloadController
from visionedge.app.scene_host import SceneHost
from visionedge.app.service import RunOptions, Service
from visionedge.app.state import AppState, ModelState
from visionedge.app.status import build_status
from visionedge.camera.registry import SequencePosition, SequenceStore
from visionedge.config.load import parse_config
from visionedge.engine.batcher import BatcherStatistics
from visionedge.engine.interface import Engine, EngineInfo
from visionedge.engine.lanes import LanePool
from visionedge.engine.plan import Plan
from visionedge.frames.types import DEFAULT_MODEL
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.desired_properties import ConfigurationSources
from visionedge.model.model import Model, find_bundled_model, load_model
from visionedge.model.postprocess import Selection
from visionedge.runtime.process_limits import descriptor_limit, raise_descriptor_limit
from visionedge.runtime.threads import ThreadGroup


class FailingDelivery:
    """A delivery whose housekeeping meets an error each time."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.ticks = 0

    def tick(self) -> None:
        self.ticks += 1
        raise self.error

    def take_acknowledged(self) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("error", "traceback"),
    [
        (OSError(errno.EMFILE, "Too many open files"), False),
        (MemoryError(), False),
        (RuntimeError("can't start new thread"), True),
    ],
)
def test_a_repeated_housekeeping_error_is_logged_rarely_and_the_module_runs_on(
    error: Exception, traceback: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(RunOptions(ConfigurationSources.read({}, None), tmp_path, environ={}))
    delivery = FailingDelivery(error)

    async def scenario() -> None:
        for _ in range(30):
            await service.housekeeping.tick(cast("Delivery", delivery))

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert delivery.ticks == 30
    assert len(caplog.records) == 1
    assert "the delivery failed" in caplog.text
    assert "retrying" in caplog.text
    assert (caplog.records[0].exc_info is not None) == traceback
    service.executor.shutdown(wait=True)


class HangingStore(SequenceStore):
    """Sequence numbers on a disk that hangs until `answers` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.answers = threading.Event()

    def remember(self, last: Mapping[str, SequencePosition]) -> None:
        """Wait for the disk."""
        self.answers.wait(20)
        super().remember(last)


def test_a_disk_that_hangs_is_logged_after_ten_seconds_once_and_when_it_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Housekeeping goes on meanwhile: it looks 50 times in 10 s."""
    service = Service(RunOptions(ConfigurationSources.read({}, None), tmp_path, environ={}))
    store = HangingStore(tmp_path / "sequences.json")
    group = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
    housekeeping = Housekeeping(
        service.state,
        group,
        controller=cast("OverloadController", None),
        positions=PositionStore(store, service.state, dict, tmp_path),
        metrics=service._metrics,
        scene_host=service._scene_host,
        failures=FailureCounter(lambda what, error: pytest.fail(f"{what}: {error}")),
    )
    delivery = cast("Delivery", QuietDelivery())

    async def scenario() -> None:
        for _ in range(99):
            await housekeeping.tick(delivery)
        assert caplog.text == ""
        for _ in range(200):
            await housekeeping.tick(delivery)
        store.answers.set()
        assert housekeeping._saving is not None
        await housekeeping._saving

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: the disk has not answered for 10 s; frames go on, but no state is kept;"
        f" check the disk and its driver",
        f"{tmp_path}: the disk answers again",
    ]
    assert group.join(5) == []
    service.executor.shutdown(wait=True)


class QuietDelivery:
    """A delivery that has nothing to do."""

    def tick(self) -> None:
        """Nothing is due."""

    def take_acknowledged(self) -> list[str]:
        """There are no scene events."""
        return []


def test_without_a_descriptor_for_the_list_of_threads_nothing_is_measured(tmp_path: Path) -> None:
    """With invented figures the module could remove cameras; the caller retries."""
    meter = LoadMeter(tmp_path / "nothing")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            LoadMeter().take_sample(BatcherStatistics({}, {}), {}, children=(), gpu=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert meter.measurement is None


def test_the_limit_of_descriptors_is_raised_to_the_hard_one_and_not_beyond_a_bound() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(512, soft)
    try:
        for most, wanted in ((few + 100, min(few + 100, hard)), (few - 100, few)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
            assert raise_descriptor_limit(most) == wanted
            assert descriptor_limit() == wanted
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def app_state_of(tmp_path: Path) -> AppState:
    return AppState.of(parse_config({}), tmp_path, {}, lambda: None)


def test_the_status_has_the_reason_before_the_engine_is_open(tmp_path: Path) -> None:
    engine = build_status(app_state_of(tmp_path).snapshot())["engine"]
    assert engine["reasonCode"] == "warming-up"
    assert "code" not in engine
    assert engine["reason"] == "the engine is warming up"


def test_request_work_keeps_its_permit_until_it_ends_and_uses_separate_threads(
    tmp_path: Path,
) -> None:
    """Forty disconnected clients must not block the threads of the module."""
    state = app_state_of(tmp_path)
    lanes = LanePool(state.batcher, ThreadGroup(lambda *_: None), lambda _: None)
    backend = HttpBackend(
        state.snapshot,
        lanes,
        Metrics(lambda: ()),
        SceneHost(state.snapshot, tmp_path, ThreadGroup(lambda *_: None), deliver=lambda _: None),
    )
    release = threading.Event()

    async def scenario() -> None:
        clients = [asyncio.create_task(backend._executor.run(release.wait)) for _ in range(40)]
        await asyncio.sleep(0)
        for client in clients:
            client.cancel()
        refused = await asyncio.gather(*clients, return_exceptions=True)
        assert sum(not isinstance(each, asyncio.CancelledError) for each in refused) == 36
        assert backend._executor.is_full
        assert await asyncio.to_thread(lambda: "free") == "free"
        release.set()
        assert backend.close() == []

    asyncio.run(scenario())


class OneAtATime:
    """An engine whose plan takes one picture at once, as on a CPU with few cores."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def info(self) -> EngineInfo:
        return make_engine_info(self._model, Plan(1, (1,), "one picture"))


def test_clients_may_send_the_configured_batch_with_any_plan(tmp_path: Path) -> None:
    """A client that works beside a GPU must not break when the CPU takes over; the engine splits batches."""
    state = AppState.of(parse_config({"inference": {"maxBatch": 6}}), tmp_path, {}, lambda: None)
    model = load_model(find_bundled_model())
    selection = Selection.of(model, 0.3, 0.5)
    engine = cast("Engine", OneAtATime(model))
    state.set_model(DEFAULT_MODEL, ModelState(model, selection, None, engine))
    backend = HttpBackend(
        state.snapshot,
        LanePool(state.batcher, ThreadGroup(lambda *_: None), lambda _: None),
        Metrics(lambda: ()),
        SceneHost(state.snapshot, tmp_path, ThreadGroup(lambda *_: None), deliver=lambda _: None),
    )
    (facts,) = backend.models()
    assert facts.max_batch == 6
    backend.close()
