"""Image requests: images that other modules send to the input `frames`, answered on the output `detections`.

The queue is bounded, and the answers have sequence numbers like the frames of a camera.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from visionedge.config.schema import CAMERA_NAME_PATTERN
from visionedge.frames.types import FrameResult
from visionedge.iothub.sdk import InputMessage

log = logging.getLogger(__name__)

IMAGE_INPUT = "frames"
SEQUENCE_NAME = "<frames>"
"""The name under which the last sequence number is stored; no camera can have this name."""

ImageDropReason = Literal["full", "busy", "bad-picture", "failed", "input", "not-delivered"]
"""Why an image got no answer: too many waited; the engine was busy or not ready; the data is not an image;
the inference failed; the input does not exist; or the answer cannot be sent (`maxPerDay`, or its size)."""

_MAX_WAITING = 8
_MAX_CONCURRENT = 2
_REPORT_INTERVAL_NS = 60_000_000_000


@dataclass(frozen=True, slots=True)
class ImageRequestDependencies:
    """The parts of the module that image requests need.

    Attributes:
        analyse: detects objects in an image; returns the result or the reason why there is none.
        answer: sends a result with a correlation id; returns False if it cannot be sent.
        cameras: the names of the configured cameras.
        on_dropped: reports an image without an answer: the reason and the camera name.
        clock: monotonic nanoseconds.
        wall_clock_s: seconds since 1970.
    """

    analyse: Callable[[bytes], Awaitable[FrameResult | ImageDropReason]]
    answer: Callable[[FrameResult, str], bool]
    cameras: Callable[[], Collection[str]]
    on_dropped: Callable[[ImageDropReason, str], None]
    clock: Callable[[], int] = time.monotonic_ns
    wall_clock_s: Callable[[], float] = time.time


class ImageRequests:
    """Queues images and answers them, the oldest first, in the task `run`. For the asyncio loop only.

    Sequence numbers rise over all camera names together and are never below the time in milliseconds. So no
    number repeats for a camera name, even if the stored number is lost.
    """

    def __init__(self, dependencies: ImageRequestDependencies, first_sequence: int) -> None:
        self._dependencies = dependencies
        self._next = first_sequence
        self._waiting: deque[InputMessage] = deque()
        self._wake = asyncio.Event()
        self._reported_ns: dict[ImageDropReason, int] = {}
        self.answered = 0
        self.dropped: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<ImageRequests waiting={len(self._waiting)} answered={self.answered} {dict(self.dropped)}>"

    @property
    def next_sequence(self) -> int:
        """The smallest possible next sequence number."""
        return self._next

    def put(self, message: InputMessage) -> None:
        """Queue a message; if too many wait, the oldest is dropped."""
        if message.input != IMAGE_INPUT:
            self._drop("input", message)
            return
        self._waiting.append(message)
        if len(self._waiting) > _MAX_WAITING:
            self._drop("full", self._waiting.popleft())
        self._wake.set()

    async def run(self) -> None:
        """Answer until cancelled, two images at once."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_MAX_CONCURRENT):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            if not self._waiting:
                self._wake.clear()
                continue
            message = self._waiting.popleft()
            try:
                await self._answer(message)
            except Exception:  # the next image must be answered
                log.exception("input %s: answering an image failed", IMAGE_INPUT)
                self._drop("failed", message)

    async def _answer(self, message: InputMessage) -> None:
        result = await self._dependencies.analyse(message.body)
        if not isinstance(result, FrameResult):
            self._drop(result, message)
        elif self._dependencies.answer(self._renumber(result, message), _read_correlation_id(message)):
            self.answered += 1
        else:
            self._drop("not-delivered", message)

    def _renumber(self, result: FrameResult, message: InputMessage) -> FrameResult:
        sequence = max(self._next, round(self._dependencies.wall_clock_s() * 1000))
        self._next = sequence + 1
        frame = replace(result.frame, camera=self._choose_camera_name(message), sequence=sequence)
        return replace(result, frame=frame)

    def _choose_camera_name(self, message: InputMessage) -> str:
        """The camera that the message names, unless it is a configured one, which numbers its own frames."""
        taken = self._dependencies.cameras()
        name = message.properties.get("camera", "")
        if not CAMERA_NAME_PATTERN.fullmatch(name) or name in taken:
            name = IMAGE_INPUT
        while name in taken:
            name += "-in"
        return name

    def _drop(self, reason: ImageDropReason, message: InputMessage) -> None:
        self.dropped[reason] += 1
        now_ns = self._dependencies.clock()
        # Each reason is reported at most once a minute.
        if now_ns - self._reported_ns.get(reason, now_ns - _REPORT_INTERVAL_NS) >= _REPORT_INTERVAL_NS:
            self._reported_ns[reason] = now_ns
            self._dependencies.on_dropped(reason, self._choose_camera_name(message))


def _read_correlation_id(message: InputMessage) -> str:
    """The id that links the answer to its request; ids of IoT Hub have at most 128 characters."""
    return (message.correlation_id or message.message_id)[:128]
