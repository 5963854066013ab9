"""The remote device behind the engine's process: the loss of all servers, the CPU, the return, the counts."""

import logging
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fault_script import FaultScript
from scripted_inference import HttpInferenceServer, InferenceModel
from tiny_models import TinyDetector, pictures
from visionedge.config.load import parse_config
from visionedge.engine.device.faults import RETRIED_FAULTS, EngineError
from visionedge.engine.interface import EngineEvent
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.model.model import Model, load_model

pytestmark = pytest.mark.system

IMAGES = pictures(2)
TOKEN = "t0ken-of-the-remote-device"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(TinyDetector().save(tmp_path_factory.mktemp("model") / "tiny.onnx"))


class RemoteHarness:
    """An engine on two servers of this process, with short waits, and its events."""

    def __init__(self, model: Model, folder: Path, **remote: Any) -> None:
        self.servers = [HttpInferenceServer(InferenceModel(model.path, token=TOKEN)) for _ in range(2)]
        for server in self.servers:
            server.start()
        self._frame_pool = SharedFramePool(model.input, 16)
        self.news: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        given = {"model": "tiny", "insecure": True, "token": TOKEN, **remote}
        given["url"] = [server.url for server in self.servers]
        config = parse_config({"inference": {"device": "remote", "remote": given}})
        self.engine = EngineClient(
            model,
            config.inference,
            self._frame_pool,
            on_change=self.news.put,
            inject=FaultScript(folder).path,  # for its short waits
        )

    def __enter__(self) -> "RemoteHarness":
        self.engine.open()
        return self

    def __exit__(self, *_error: object) -> None:
        self.engine.close()
        self._frame_pool.close()
        for server in self.servers:
            server.stop()
            server.model.close()

    def next_event(self, code: str) -> EngineEvent:
        """Wait for the next event, which must have this code."""
        news = self.news.get(timeout=60)
        assert news.code == code, news
        return news


@pytest.fixture
def harness(model: Model, tmp_path: Path) -> Iterator[RemoteHarness]:
    with RemoteHarness(model, tmp_path) as made:
        yield made


def infer_until_computed(engine: EngineClient) -> str:
    """What a lane does with a batch; the device that computed it."""
    for _ in range(60):
        try:
            return engine.infer(IMAGES).device
        except EngineError as error:
            if error.fault not in RETRIED_FAULTS | {None}:
                raise
    raise AssertionError(engine.info().process)


def test_the_device_is_lost_with_its_last_server_and_comes_back(
    harness: RemoteHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """One server less changes nothing; without any the CPU computes the same rows, until one is back."""
    caplog.set_level(logging.INFO)
    engine, (first, second) = harness.engine, harness.servers
    expected = engine.infer(IMAGES).rows
    first.stop()
    for _ in range(8):
        rows, device = engine.infer(IMAGES)
        assert (device, np.array_equal(rows, expected)) == ("remote", True)
    second.stop()
    assert infer_until_computed(engine) == "cpu"
    assert "no replica is left" in harness.next_event("device-lost").message
    harness.next_event("engine-back")
    assert np.array_equal(engine.infer(IMAGES).rows, expected)
    info = engine.info()
    assert (info.device.requested, info.device.effective) == ("remote", "cpu")
    assert info.device.code == "remote-unreachable"
    assert {replica.state for replica in info.replicas} == {"down"}
    computed = sum(replica.batches for replica in info.replicas)
    assert computed >= 1  # counts are reported once a second
    first.start()
    back = harness.next_event("device-back")
    assert back.message.startswith("remote is back: ")
    rows, device = engine.infer(IMAGES)
    assert (device, np.array_equal(rows, expected)) == ("remote", True)
    info = engine.info()
    assert [replica.state for replica in info.replicas] == ["up", "down"]
    assert sum(replica.batches for replica in info.replicas) >= computed
    assert TOKEN not in caplog.text
    assert TOKEN not in str(info)


def test_every_batch_of_many_lanes_is_computed_while_servers_die(harness: RemoteHarness) -> None:
    """Both die under load: each batch ends on a server or on the CPU, and none is refused."""
    engine, devices = harness.engine, list[str]()
    stop = threading.Event()

    def lane() -> None:
        while not stop.is_set():
            devices.append(infer_until_computed(engine))

    lanes = [threading.Thread(target=lane) for _ in range(4)]
    for thread in lanes:
        thread.start()
    harness.servers[0].stop()
    harness.servers[1].stop()
    harness.next_event("device-lost")
    harness.next_event("engine-back")
    harness.servers[1].start()
    harness.next_event("device-back")
    stop.set()
    for thread in lanes:
        thread.join()
    assert {"cpu", "remote"} <= set(devices)
    assert infer_until_computed(engine) == "remote"


def test_a_server_that_hangs_for_its_whole_limit_does_not_end_the_process(
    model: Model, tmp_path: Path
) -> None:
    """The usual limit of a process is ten times its usual batch, which is less here."""
    with RemoteHarness(model, tmp_path, timeoutSeconds=3) as harness:
        engine = harness.engine
        pid = engine.info().process
        for _ in range(8):
            engine.infer(IMAGES)
        harness.servers[0].model.fault = harness.servers[1].model.fault = "hang"
        with pytest.raises(EngineError, match="no replica computed the batch in time") as caught:
            engine.infer(IMAGES)
        assert caught.value.fault in RETRIED_FAULTS
        for server in harness.servers:
            server.model.fault = None
            server.model.release()
        assert infer_until_computed(engine) == "remote"
        now = engine.info().process
        assert pid is not None
        assert now is not None
        assert now.pid == pid.pid
        assert harness.news.empty()
