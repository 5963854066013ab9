"""Requests to a worker: one queue for all, a reply on the channel that asked, one thread a lane."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from engine_infos import make_engine_info
from tiny_models import TinyDetector, pictures
from visionedge.engine.device.faults import EngineError
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.interface import EngineInfo, Inference
from visionedge.engine.process import protocol
from visionedge.engine.process.server import RequestLoop
from visionedge.engine.process.shared_memory import FrameView, SharedFramePool
from visionedge.frames.types import InputSpec
from visionedge.model.model import load_model
from visionedge.model.postprocess import Rows

SPEC = InputSpec(64, 48)
LANES, LINES = 2, 6


class CountingEngine:
    """Gives one row that holds the picture's first value; knows how many compute at a time."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self.most = self.busy = 0
        self.go_on = threading.Event()
        self._lock = threading.Lock()

    def infer(self, images: PictureBatch, min_score: float | None = None) -> Inference:
        """See `Engine.infer`."""
        with self._lock:
            self.busy += 1
            self.most = max(self.most, self.busy)
        assert self.go_on.wait(10)
        with self._lock:
            self.busy -= 1
        if images[0].min() == 255:
            raise EngineError("it is too bright")
        rows = np.array([[[*image[0, 0], 0, 0, min_score]] for image in images], np.float32)
        return Inference(rows, "cpu")

    def info(self) -> EngineInfo:
        return self._info

    def close(self) -> None:
        """Nothing is open."""


class RequestLoopHarness:
    """A request loop with its lanes on threads of this process, and the module's ends of queue and lines."""

    def __init__(self, frame_pool: SharedFramePool, stack: ExitStack, info: EngineInfo) -> None:
        self.engine = CountingEngine(info)
        self.queue, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pairs = [socket.socketpair() for _ in range(LINES)]
        self.lines = [ours for ours, _ in pairs]
        for each in (self.queue, theirs, *self.lines, *(end for _, end in pairs)):
            stack.callback(each.close)
        request_loop = RequestLoop(
            theirs, [end for _, end in pairs], self.engine, FrameView(frame_pool.fd, SPEC), SPEC
        )
        threads = [threading.Thread(target=request_loop.serve) for _ in range(LANES)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(self.queue.shutdown, socket.SHUT_RDWR)

    def ask(self, line: int, blocks: tuple[int, ...]) -> None:
        """Put a request into the queue."""
        self.queue.send(protocol.encode_request(protocol.InferRequest(line, blocks, 0.5)))

    def answer(self, line: int, count: int = 1) -> Rows:
        """What comes on a line."""
        self.lines[line].settimeout(10)
        rows, _ = protocol.receive_rows(self.lines[line], count, 1)
        return rows


@pytest.fixture
def frame_pool() -> Iterator[SharedFramePool]:
    made = SharedFramePool(SPEC, LINES)
    yield made
    made.close()


@pytest.fixture
def child(frame_pool: SharedFramePool, tmp_path: Path) -> Iterator[RequestLoopHarness]:
    info = make_engine_info(load_model(TinyDetector().save(tmp_path / "tiny.onnx")))
    with ExitStack() as stack:
        yield RequestLoopHarness(frame_pool, stack, info)


def test_each_channel_gets_its_own_answer_and_concurrency_is_the_number_of_lanes(
    frame_pool: SharedFramePool, child: RequestLoopHarness
) -> None:
    """Six ask at once; two compute."""
    held = []
    for line in range(LINES):
        picture = frame_pool.allocate()
        assert picture is not None
        picture[:] = line
        held.append(picture)
        block = frame_pool.block_of(picture)
        assert block is not None
        child.ask(line, (block,))
    child.engine.go_on.set()
    answers = [child.answer(line)[0, 0].tolist() for line in range(LINES)]
    assert answers == [[line, line, line, 0, 0, 0.5] for line in range(LINES)]
    assert child.engine.most <= LANES


def test_pictures_outside_the_pool_are_sent_over_the_channel(child: RequestLoopHarness) -> None:
    """As those that come over HTTP do."""
    child.engine.go_on.set()
    loose = pictures(2)
    child.ask(3, (-1, -1))
    protocol.send_pictures(child.lines[3], list(loose))
    assert child.answer(3, 2)[:, 0, :3].tolist() == [image[0, 0].tolist() for image in loose]


def test_a_failure_is_reported_on_its_channel_and_the_lane_continues(child: RequestLoopHarness) -> None:
    """With the words of the engine."""
    child.engine.go_on.set()
    bright = np.full((SPEC.height_px, SPEC.width_px, 3), 255, np.uint8)
    for _ in range(2 * LANES):
        child.ask(0, (-1,))
        protocol.send_pictures(child.lines[0], [bright])
        with pytest.raises(EngineError, match="too bright"):
            child.answer(0)


def test_lanes_end_when_the_module_disconnects(child: RequestLoopHarness) -> None:
    """`serve` returns: the fixture joins its threads."""
    child.queue.shutdown(socket.SHUT_RDWR)
