"""Pictures of other modules: answered in order, bounded, numbered so that nothing ever repeats."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from telemetry_harness import TelemetryHarness
from visionedge.frames.types import FrameResult
from visionedge.iothub.image_requests import ImageDropReason, ImageRequestDependencies, ImageRequests
from visionedge.iothub.sdk import InputMessage


class FakeDetector:
    """Computes pictures on demand and keeps what is answered and refused."""

    def __init__(self) -> None:
        self.harness = TelemetryHarness()
        self.answers: list[tuple[FrameResult, str]] = []
        self.refusals: list[tuple[ImageDropReason, str]] = []
        self.cameras = {"dock"}
        self.hold: asyncio.Event | None = None
        self.at_once = self.most_at_once = 0
        self.wall_clock_s = 1000.0

    async def analyse(self, body: bytes) -> FrameResult | ImageDropReason:
        """A frame of no camera; what the body says, if it says something else."""
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.hold is not None:
            await self.hold.wait()
        self.at_once -= 1
        if body == b"junk":
            return "bad-picture"
        if body == b"busy":
            return "busy"
        if body == b"crash":
            raise ValueError("what nobody thought of")
        return self.harness.result(camera="")

    def answer(self, result: FrameResult, correlation_id: str) -> bool:
        """Sent, unless the id says otherwise."""
        if correlation_id == "not-delivered":
            return False
        self.answers.append((result, correlation_id))
        return True

    def run_scenario(self, *messages: InputMessage, first: int = 1) -> ImageRequests:
        """Hand in messages and wait until none is left."""

        async def whole() -> ImageRequests:
            dependencies = ImageRequestDependencies(
                self.analyse,
                self.answer,
                lambda: self.cameras,
                lambda reason, camera: self.refusals.append((reason, camera)),
                clock=lambda: self.harness.now_ns,
                wall_clock_s=lambda: self.wall_clock_s,
            )
            questions = ImageRequests(dependencies, first)
            await self.run(questions, lambda: self._put(questions, messages))
            return questions

        return asyncio.run(whole())

    async def _put(self, questions: ImageRequests, messages: tuple[InputMessage, ...]) -> None:
        for message in messages:
            questions.put(message)
        async with asyncio.timeout(10):
            while questions.answered + questions.dropped.total() < len(messages):  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0)

    async def run(self, questions: ImageRequests, scenario: Callable[[], Awaitable[None]]) -> None:
        """With its task beside the story."""
        task = asyncio.create_task(questions.run())
        try:
            await scenario()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def picture(camera: str | None = None, body: bytes = b"", **ids: str) -> InputMessage:
    """A message to the input `frames`."""
    return InputMessage("frames", body, {} if camera is None else {"camera": camera}, **ids)


def test_the_answer_to_a_picture_has_the_id_of_its_request() -> None:
    """The correlation id that was given, else the message's own."""
    module = FakeDetector()
    module.run_scenario(picture(message_id="m1"), picture(message_id="m2", correlation_id="c2"), picture())
    assert [correlation_id for _, correlation_id in module.answers] == ["m1", "c2", ""]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gate-7", "gate-7"),
        (None, "frames"),
        ("", "frames"),
        ("Not A Name", "frames"),
        ("x" * 65, "frames"),
        ("dock", "frames"),
    ],
)
def test_the_name_of_the_camera_comes_from_the_message(given: str | None, expected: str) -> None:
    """Unless it is none, or a real camera's, which numbers its own frames."""
    module = FakeDetector()
    module.run_scenario(picture(given))
    assert module.answers[0][0].frame.camera == expected


def test_a_camera_may_be_named_frames() -> None:
    """Then these frames are called otherwise."""
    module = FakeDetector()
    module.cameras = {"frames", "frames-in"}
    module.run_scenario(picture())
    assert module.answers[0][0].frame.camera == "frames-in-in"


def test_sequence_numbers_rise_over_all_names_and_follow_the_clock() -> None:
    """So that they never repeat for a name, also when it was a real camera's before."""
    module = FakeDetector()
    questions = module.run_scenario(*(picture(name) for name in "aba"))
    assert [result.frame.sequence for result, _ in module.answers] == [1_000_000, 1_000_001, 1_000_002]
    module.wall_clock_s = 5.0
    module.run_scenario(picture("a"), first=questions.next_sequence)
    assert module.answers[-1][0].frame.sequence == 1_000_003


def test_pictures_without_an_answer_are_counted_by_reason() -> None:
    """And none of it keeps the next one from its answer."""
    module = FakeDetector()
    questions = module.run_scenario(
        picture(body=b"junk"),
        picture(body=b"busy"),
        picture(body=b"crash"),
        picture(message_id="not-delivered"),
        InputMessage("others", b"", {}),
        picture("last"),
    )
    assert questions.dropped == {"bad-picture": 1, "busy": 1, "failed": 1, "not-delivered": 1, "input": 1}
    assert [result.frame.camera for result, _ in module.answers] == ["last"]
    assert len(module.refusals) == 5


def test_dropped_images_are_reported_once_a_minute() -> None:
    """Every single one is counted."""
    module = FakeDetector()
    questions = module.run_scenario(*[picture("a", body=b"junk")] * 8)
    assert questions.dropped == {"bad-picture": 8}
    assert module.refusals == [("bad-picture", "a")]


def test_excess_pictures_drop_the_oldest_and_two_are_computed_at_once() -> None:
    """What waits is bounded."""

    async def scenario() -> None:
        module = FakeDetector()
        module.hold = asyncio.Event()
        dependencies = ImageRequestDependencies(module.analyse, module.answer, lambda: (), lambda *_: None)
        questions = ImageRequests(dependencies, 1)

        async def flood() -> None:
            for number in range(20):
                questions.put(picture(message_id=str(number)))
            for _ in range(5):
                await asyncio.sleep(0)
            assert module.hold is not None
            module.hold.set()
            async with asyncio.timeout(10):
                while len(module.answers) < 8:  # noqa: ASYNC110 - no event for it
                    await asyncio.sleep(0)

        await module.run(questions, flood)
        assert sorted(int(correlation_id) for _, correlation_id in module.answers) == [*range(12, 20)]
        assert questions.dropped == {"full": 12}
        assert module.most_at_once == 2

    asyncio.run(scenario())
