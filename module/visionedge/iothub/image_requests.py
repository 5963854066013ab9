"""Pictures that other modules send to the input `frames`: bounded, numbered, answered on `detections`."""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from visionedge.config.schema import CAMERA_NAME_PATTERN
from visionedge.frames.types import FrameResult
from visionedge.iothub.sdk import InputMessage

log = logging.getLogger(__name__)

IMAGE_INPUT = "frames"
SEQUENCE_NAME = "<frames>"
"""Under this name, which no camera can have, the last number is kept."""

ImageDropReason = Literal["full", "busy", "bad-picture", "failed", "input", "not-delivered"]
"""Why a picture got no answer: too many waited, the engine had no room for it or was not ready, it is no
picture, it could not be computed, it came to an input that there is not, or the answer could not be sent
(`maxPerDay`, or its size)."""

_MAX_WAITING = 8
_MAX_CONCURRENT = 2
_REPORT_INTERVAL_NS = 60_000_000_000


@dataclass(frozen=True, slots=True)
class ImageRequestDependencies:
    """What answering needs of the module.

    `analyse` computes a picture's result, or says why there is none; `answer` sends it with the id of the
    question, or says that it cannot; `cameras` are the names that are taken; `refused` tells of a picture
    without an answer, with the reason and the camera's name.
    """

    analyse: Callable[[bytes], Awaitable[FrameResult | ImageDropReason]]
    answer: Callable[[FrameResult, str], bool]
    cameras: Callable[[], Collection[str]]
    on_dropped: Callable[[ImageDropReason, str], None]
    clock: Callable[[], int] = time.monotonic_ns
    wall_clock_s: Callable[[], float] = time.time


class ImageRequests:
    """Takes pictures and answers them, the oldest first; `run` is the task that does. Loop only.

    Numbers of these frames rise over all names together and are never below the time in milliseconds, so
    that none repeats for a camera, whichever name a picture is given (`sequences`).
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
        return f"<Questions waiting={len(self._waiting)} answered={self.answered} {dict(self.dropped)}>"

    @property
    def next_sequence(self) -> int:
        """The least that the next number can be."""
        return self._next

    def put(self, message: InputMessage) -> None:
        """A message has come; when too many wait, the oldest goes unanswered."""
        if message.input != IMAGE_INPUT:
            self._drop("input", message)
            return
        self._waiting.append(message)
        if len(self._waiting) > _MAX_WAITING:
            self._drop("full", self._waiting.popleft())
        self._wake.set()

    async def run(self) -> None:
        """Answer until cancelled, a few at once."""
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
            except Exception:  # the next one must be answered
                log.exception("a picture of another module could not be answered")
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
        """The camera that the message names, unless that is a real one, which numbers its own frames."""
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
        # A module that sends nonsense all the time is told of now and then.
        if now_ns - self._reported_ns.get(reason, now_ns - _REPORT_INTERVAL_NS) >= _REPORT_INTERVAL_NS:
            self._reported_ns[reason] = now_ns
            self._dependencies.on_dropped(reason, self._choose_camera_name(message))


def _read_correlation_id(message: InputMessage) -> str:
    """What the answer is told by; IoT Hub's ids have 128 characters at most."""
    return (message.correlation_id or message.message_id)[:128]


# What IoT Hub and other modules have asked of this one, in numbers.


@dataclass(frozen=True, slots=True)
class InboundStatistics:
    """Counts since the start: wishes by outcome, patches of reported properties, methods by name and status,
    calls that came too many at once, pictures of other modules. `config` is the last acknowledgement.
    """

    configurations: Mapping[str, int] = field(default_factory=dict)
    patches: int = 0
    methods: Mapping[tuple[str, int], int] = field(default_factory=dict)
    calls_dropped: int = 0
    pictures_answered: int = 0
    pictures_dropped: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
