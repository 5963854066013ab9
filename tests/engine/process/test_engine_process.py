"""The engine in its own process: equal rows, and its death, hang or refusal."""

import logging
import os
import pickle
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.faults import EngineError, EngineUnavailableError
from visionedge.engine.interface import EngineEvent, EngineSettings, ProcessStatus
from visionedge.engine.lanes import count_lanes
from visionedge.engine.local_engine import open_engine
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.protocol import StartRequest
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.engine.process.worker import WorkerLimits
from visionedge.errors import DeviceError, ModelError
from visionedge.frames.types import Picture
from visionedge.model.model import Model, load_model
from visionedge.runtime import child_process
from visionedge.runtime.threads import ThreadGroup

pytestmark = pytest.mark.system

CPU = InferenceConfig(device="cpu")
SHM = Path("/dev/shm")  # noqa: S108 - looked at only


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(TinyDetector().save(tmp_path / "tiny.onnx"))


@pytest.fixture
def frame_pool(model: Model) -> Iterator[SharedFramePool]:
    made = SharedFramePool(model.input, 16)
    yield made
    made.close()


class EngineHarness:
    """An engine process and its events; closed at the end of the test."""

    def __init__(
        self, model: Model, frame_pool: SharedFramePool, inference: InferenceConfig = CPU, **limits: float
    ) -> None:
        self.news: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self.engine = EngineClient(
            model, inference, frame_pool, limits=WorkerLimits(**limits), on_change=self.news.put
        )

    def __enter__(self) -> "EngineHarness":
        self.engine.open()
        return self

    def __exit__(self, *_error: object) -> None:
        self.engine.close()

    @property
    def process(self) -> ProcessStatus:
        process = self.engine.info().process
        assert process is not None
        return process

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    def next_event(self) -> EngineEvent:
        """Wait for the next event."""
        return self.news.get(timeout=30)


@pytest.fixture
def opened(model: Model, frame_pool: SharedFramePool) -> Iterator[EngineHarness]:
    with EngineHarness(model, frame_pool) as made:
        yield made


def placed(frame_pool: SharedFramePool, images: np.ndarray) -> list[Picture]:
    """Pictures written into shared memory, as a camera does."""
    found = []
    for image in images:
        picture = frame_pool.allocate()
        assert picture is not None
        picture[:] = image
        found.append(picture)
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# --- the same engine ----------------------------------------------------------------------------------------


def test_rows_equal_those_of_this_process_bit_for_bit(
    opened: EngineHarness, model: Model, frame_pool: SharedFramePool
) -> None:
    """From shared memory, from anywhere else, mixed, one array, none; and with a least score."""
    here, images = open_engine(model, CPU), pictures(5)
    expected = here.infer(images).rows
    shared = placed(frame_pool, images)
    ways = (shared, list(images), [shared[0], images[1], shared[2], images[3], shared[4]], images)
    for way in ways:
        np.testing.assert_array_equal(opened.engine.infer(way).rows, expected)
    assert opened.engine.infer([]).rows.shape == (0, here.info().max_rows, 6)
    score = float(expected[2, 3, 4])
    few = opened.engine.infer(shared, score).rows
    np.testing.assert_array_equal(few, here.infer(images, score).rows)
    assert 0 < few.shape[1] < here.info().max_rows
    assert opened.engine.infer(shared, 2.0).rows.shape == (5, 0, 6)


def test_rows_at_the_minimum_score_are_included(opened: EngineHarness, frame_pool: SharedFramePool) -> None:
    shared = placed(frame_pool, pictures(4))
    whole = opened.engine.infer(shared).rows
    for score in (0.0, 0.2, 0.5, 0.9):
        few = opened.engine.infer(shared, score).rows
        np.testing.assert_array_equal(few[few[..., 4] >= score], whole[whole[..., 4] >= score])


def test_an_engine_process_reports_like_an_engine(opened: EngineHarness, model: Model) -> None:
    here, there = open_engine(model, CPU).info(), opened.engine.info()
    assert (there.max_rows, there.plan, there.node_placement) == (
        here.max_rows,
        here.plan,
        here.node_placement,
    )
    assert there.device.describe() == here.device.describe()
    assert there.unplanned_shapes == 0
    assert (opened.process.restarts, opened.process.down) == (0, None)
    assert here.process is None
    assert "tiny ready" in repr(opened.engine)


def test_two_extra_lanes_hide_the_transfer_to_the_child(opened: EngineHarness, model: Model) -> None:
    """And the child has channels for them, beside those for pictures over HTTP."""
    here, there = open_engine(model, CPU).info(), opened.engine.info()
    assert count_lanes(here) == here.plan.lanes
    assert count_lanes(there) == there.plan.lanes + 2


def test_concurrent_lanes_get_their_own_rows(
    opened: EngineHarness, model: Model, frame_pool: SharedFramePool
) -> None:
    """More threads than there are lines."""
    images = pictures(8)
    expected, shared = open_engine(model, CPU).infer(images).rows, placed(frame_pool, images)
    wrong: list[int] = []

    def lane(index: int) -> None:
        found = [opened.engine.infer([shared[index]]).rows[0] for _ in range(30)]
        wrong.extend(index for rows in found if not np.array_equal(rows, expected[index]))

    threads = [threading.Thread(target=lane, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pictures_of_another_shape_never_reach_the_child(opened: EngineHarness) -> None:
    with pytest.raises(EngineError, match="takes uint8 pictures of 64 x 48"):
        opened.engine.infer(pictures(1, 32, 32))
    assert opened.engine.infer(pictures(1)).rows.shape[0] == 1


def test_the_log_of_the_child_appears_in_the_log_of_the_module(
    model: Model, frame_pool: SharedFramePool, caplog: pytest.LogCaptureFixture
) -> None:
    """With its level, and once."""
    caplog.set_level(logging.INFO)
    with EngineHarness(model, frame_pool):
        pass
    lines = [r for r in caplog.records if r.getMessage().startswith("engine ready: tiny on cpu")]
    assert [record.levelno for record in lines] == [logging.INFO]


def test_the_child_gets_the_needed_environment_and_no_secret() -> None:
    ours = {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/lib",
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTHONPATH": "/more",
        "VISIONEDGE_HTTP_TOKEN": "hunter2",
        "IOTEDGE_WORKLOADURI": "unix:///x",
        "EdgeHubConnectionString": "SharedAccessKey=hunter2",
    }
    theirs = child_process.build_child_environment(ours)
    assert "hunter2" not in "".join(theirs.values())
    assert {"PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "ORT_DISABLE_TELEMETRY"} == set(
        theirs
    )
    assert theirs["PYTHONPATH"].endswith(":/more")


def test_the_child_inherits_only_its_own_socket(opened: EngineHarness) -> None:
    """A listening socket in a child would keep the port after the end of the module."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        os.kill(opened.pid, signal.SIGKILL)  # the next child is started while it listens
        assert [opened.next_event().code, opened.next_event().code] == ["engine-lost", "engine-back"]
        ours = Path(f"/proc/self/fd/{listening.fileno()}").readlink()
        theirs = [entry.readlink() for entry in Path(f"/proc/{opened.pid}/fd").iterdir()]
    assert any(str(link).startswith("socket:") for link in theirs)
    assert ours not in theirs


def test_the_child_starts_without_pydantic_and_opencv(model: Model) -> None:
    """They would take a quarter of the time before it can open anything, and 18 MiB."""
    request = pickle.dumps(StartRequest(model, EngineSettings.of(CPU), None, logging.INFO))
    code = """
import pickle, sys
import visionedge.engine.process.server
pickle.loads(sys.stdin.buffer.read())
assert not {"pydantic", "cv2"} & set(sys.modules)
"""
    environ = child_process.build_child_environment(os.environ)
    subprocess.run([sys.executable, "-c", code], input=request, env=environ, check=True)


# --- how it can go wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_dies_is_replaced_at_once(
    opened: EngineHarness,
    frame_pool: SharedFramePool,
    number: signal.Signals,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Reported once, with the reason; the next child gives the same rows from the same memory."""
    shared = placed(frame_pool, pictures(2))
    before, first = opened.engine.infer(shared).rows, opened.pid
    os.kill(first, number)
    lost, back = opened.next_event(), opened.next_event()
    assert (lost.code, back.code) == ("engine-lost", "engine-back")
    assert f"process {first} died of signal {int(number)} ({number.name})" in lost.message
    assert opened.pid != first
    assert not alive(first)
    assert opened.process.restarts == 1
    np.testing.assert_array_equal(opened.engine.infer(shared).rows, before)
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert [f"process {first} died" in r.getMessage() for r in errors] == [True]


def test_batches_in_progress_fail_and_those_after_wait_for_the_next_child(
    model: Model, frame_pool: SharedFramePool
) -> None:
    shared = placed(frame_pool, pictures(1))
    with EngineHarness(model, frame_pool, worker_wait_s=30.0) as opened:
        failed, stop = [0], threading.Event()

        def lane() -> None:
            while not stop.is_set():
                try:
                    opened.engine.infer(shared)
                except EngineError:
                    failed[0] += 1

        lanes = [threading.Thread(target=lane) for _ in range(3)]
        for thread in lanes:
            thread.start()
        os.kill(opened.pid, signal.SIGKILL)
        assert opened.next_event().code == "engine-lost"
        assert opened.next_event().code == "engine-back"
        stop.set()
        for thread in lanes:
            thread.join()
        assert 1 <= failed[0] <= 50, "nobody spins while there is no engine"
        assert opened.engine.infer(shared).rows.shape[0] == 1


def stop_child(child: int) -> None:
    """Send SIGSTOP to a child process, and wait until all its threads have stopped."""
    pidfd = os.pidfd_open(child)
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PIDFD, pidfd, os.WSTOPPED | os.WNOWAIT)
    os.close(pidfd)


def test_a_hanging_child_is_killed_and_replaced(model: Model, frame_pool: SharedFramePool) -> None:
    """A stopped child does not answer; the timeout of a batch detects it."""
    with EngineHarness(model, frame_pool, run_s=0.5) as opened:
        first = opened.pid
        stop_child(first)
        with pytest.raises(EngineError, match=f"process {first} was lost"):
            opened.engine.infer(pictures(1))
        assert "gave no answer within 0.5 s" in opened.next_event().message
        assert opened.next_event().code == "engine-back"
        assert not alive(first)
        assert opened.engine.infer(pictures(1)).rows.shape[0] == 1


def test_without_a_child_a_batch_fails_soon_with_the_reason(
    model: Model, frame_pool: SharedFramePool, tmp_path: Path
) -> None:
    """The model's file is gone, so no child can open it again; when it is back, so is the engine."""
    path = tmp_path / "tiny.onnx"
    with EngineHarness(model, frame_pool, worker_wait_s=0.1) as opened:
        content = path.read_bytes()
        path.unlink()
        os.kill(opened.pid, signal.SIGKILL)
        assert opened.next_event().code == "engine-lost"
        with pytest.raises(EngineError, match=r"restarting: its process died of signal 9"):
            opened.engine.infer(pictures(1))
        down = opened.process.down
        assert down is not None
        assert "restarting" in down
        path.write_bytes(content)
        assert opened.next_event().code == "engine-back"
        assert opened.process.down is None


def test_a_hanging_child_is_detected_long_before_the_maximum_batch_time(
    model: Model, frame_pool: SharedFramePool
) -> None:
    """By the duration of its earlier batches."""
    with EngineHarness(model, frame_pool) as opened:
        for _ in range(10):
            opened.engine.infer(pictures(1))
        stop_child(opened.pid)
        with pytest.raises(EngineUnavailableError):
            opened.engine.infer(pictures(1))
        found = re.search(r"gave no answer within ([\d.]+) s", opened.next_event().message)
        assert found is not None
        assert float(found[1]) < WorkerLimits().run_s / 2


def test_close_ends_child_threads_and_waiting_batches(model: Model, frame_pool: SharedFramePool) -> None:
    """A closed engine raises an error."""
    with EngineHarness(model, frame_pool) as opened:
        pid = opened.pid
    assert not alive(pid)
    with pytest.raises(EngineError, match="closed"):
        opened.engine.infer(pictures(1))
    assert opened.news.empty(), "an end that was asked for is no news"


class InterruptingThreadGroup(ThreadGroup):
    """Calls a function with each new child."""

    def __init__(self, act: Callable[[int], None]) -> None:
        super().__init__(lambda _name, _error: None)
        self._act = act

    def start(
        self, name: str, target: Callable[[], None], *, vital: bool = False, may_return: bool = False
    ) -> threading.Thread:
        if name.startswith("engine-log:"):
            self._act(int(name.partition(":")[2]))
        return super().start(name, target, vital=vital, may_return=may_return)


def test_close_during_the_opening_ends_at_once(model: Model, frame_pool: SharedFramePool) -> None:
    """As Ctrl-C during a long warm-up."""
    seen: list[int] = []

    def stop(pid: int) -> None:
        seen.append(pid)
        stop_child(pid)  # it will not be ready by chance
        closing.start()

    engine = EngineClient(model, CPU, frame_pool, thread_group=InterruptingThreadGroup(stop))
    closing = threading.Thread(target=engine.close)
    with pytest.raises(EngineError):
        engine.open()
    closing.join()
    assert not alive(seen[0])


def test_a_killed_first_child_is_started_once_more(model: Model, frame_pool: SharedFramePool) -> None:
    """By the kernel for lack of memory, for example: the second child opens the same model and computes."""
    seen: list[int] = []

    def kill(pid: int) -> None:
        seen.append(pid)
        if len(seen) == 1:
            os.kill(pid, signal.SIGKILL)

    engine = EngineClient(model, CPU, frame_pool, thread_group=InterruptingThreadGroup(kill))
    engine.open()
    assert len(seen) == 2
    process = engine.info().process
    assert process is not None
    assert process.down is None
    engine.close()


def test_close_before_the_opening_leaves_nothing_to_open(model: Model, frame_pool: SharedFramePool) -> None:
    engine = EngineClient(model, CPU, frame_pool)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.open()


# --- what it refuses to open --------------------------------------------------------------------------------


def test_a_model_that_cannot_be_opened_gives_the_error_of_a_local_engine(tmp_path: Path) -> None:
    model = load_model(TinyDetector(poison=float("nan")).save(tmp_path / "nan.onnx"))
    frame_pool = SharedFramePool(model.input, 1)
    with pytest.raises(ModelError, match=r"nan\.onnx: .*NaN or infinity") as caught:
        EngineClient(model, CPU, frame_pool).open()
    assert caught.value.exit_code == 2
    frame_pool.close()


def test_a_missing_demanded_device_gives_the_error_of_a_local_engine(
    model: Model, frame_pool: SharedFramePool
) -> None:
    """Exit 3, with its reason code."""
    config = InferenceConfig(device="cuda", fallback="exit")
    with pytest.raises(DeviceError) as caught:
        EngineClient(model, config, frame_pool).open()
    assert caught.value.exit_code == 3
    assert caught.value.code in str(caught.value)


def test_a_child_that_a_model_kills_blames_the_model(model: Model, frame_pool: SharedFramePool) -> None:
    """When nothing was ever opened, there is nothing to try again."""
    thread_group = InterruptingThreadGroup(lambda pid: os.kill(pid, signal.SIGSEGV))
    with pytest.raises(ModelError, match=r"tiny\.onnx: the engine's process died of signal 11 \(SIGSEGV\)"):
        EngineClient(model, CPU, frame_pool, thread_group=thread_group).open()


# --- nothing stays behind -----------------------------------------------------------------------------------


PARENT = """
import sys, time
from pathlib import Path
from visionedge.config.schema import InferenceConfig
from visionedge.model.model import load_model
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.protocol import StartRequest
from visionedge.engine.process.shared_memory import SharedFramePool
model = load_model(Path(sys.argv[1]))
engine = EngineClient(model, InferenceConfig(device="cpu"), SharedFramePool(model.input, 4))
engine.open()
print(engine.info().process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_module_leaves_no_child(model: Model, stopped: bool) -> None:
    """Even a child that hangs."""
    environ = child_process.build_child_environment(os.environ)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        handle = os.pidfd_open(child)
        if stopped:
            os.kill(child, signal.SIGSTOP)
        parent.kill()
        parent.wait()
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    assert poll.poll(5000), "a pidfd is readable once its process has ended"
    os.close(handle)


def test_shared_memory_has_no_name_that_could_remain(
    opened: EngineHarness, frame_pool: SharedFramePool
) -> None:
    before = set(SHM.iterdir())
    placed(frame_pool, pictures(3))
    assert set(SHM.iterdir()) == before
    maps = Path(f"/proc/{opened.pid}/maps").read_text()
    assert re.search(r"r--s .*/memfd:visionedge-pictures", maps), "mapped by the child, read only"
