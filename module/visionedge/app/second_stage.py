"""The second stage of the running module: a thread for each second model computes the crops of all cameras.

The loop asks; a question waits in a bounded queue, where a newer one about the same track takes its place.
What is dropped there, or fails, goes back as a failed answer, so that the scene asks again.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from visionedge.engine.crops import answer_crops, cut_crop
from visionedge.engine.device.faults import EngineError
from visionedge.engine.lanes import EngineWithSelection
from visionedge.frames.types import Frame, Picture
from visionedge.runtime.threads import ThreadGroup
from visionedge.scene.second_stage import CropAnswer, CropQuestion

log = logging.getLogger(__name__)

MAX_WAITING_CROPS = 256
_MAX_WAITING_PICTURES = 4
"""Of each camera: a waiting question keeps its picture in memory."""

_RETRY_S = 1.0
"""After a failure the thread computes nothing for so long; meanwhile newer questions come."""


@dataclass(frozen=True, slots=True)
class CameraAnswers:
    """Answers about tracks of a camera, on their way to the loop."""

    camera: str
    answers: tuple[CropAnswer, ...]


@dataclass(frozen=True, slots=True)
class CropStatistics:
    """The questions to one model since it is used: `unsure` were computed and gave no label.

    asked = answered + unsure + dropped + waiting + those in progress
    """

    asked: int
    answered: int
    unsure: int
    dropped: int
    waiting: int


UseModel = Callable[[str], AbstractContextManager[EngineWithSelection]]
"""The engine of the model of this name, kept open meanwhile; raises EngineError if there is none now."""

ChargeCamera = Callable[[str, int], None]
"""Called with a camera and the time in ns that an engine has spent on its crops."""


class _FullPicture:
    """A frame's picture, converted once for all its crops. For one thread."""

    __slots__ = ("_frame", "_picture")

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._picture: Picture | None = None

    def cut(self, question: CropQuestion) -> Picture:
        if self._picture is None:
            self._picture = self._frame.full_picture()
        return cut_crop(self._picture, question.corners)


class WaitingCrop(NamedTuple):
    """A question about a camera's picture that waits for the thread of its model."""

    camera: str
    question: CropQuestion
    picture: _FullPicture


class CropQueue:
    """The questions to one model, from all cameras in turns. Any thread may call it; `put` never blocks."""

    def __init__(self, limit: int = MAX_WAITING_CROPS) -> None:
        self._limit = limit
        # In the order of turns; of each camera by track, the oldest question first.
        self._cameras: dict[str, dict[int, WaitingCrop]] = {}
        self._counts: Counter[str] = Counter()
        self._closed = False
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<CropQueue cameras={len(self._cameras)} {self.statistics()}>"

    def put(self, frame: Frame, questions: Sequence[CropQuestion]) -> list[WaitingCrop]:
        """Add the questions about a frame; returns those that are dropped by that."""
        picture = _FullPicture(frame)
        with self._changed:
            self._counts["asked"] += len(questions)
            dropped: list[WaitingCrop] = []
            for question in questions:
                crops = self._cameras.setdefault(frame.camera, {})
                if (older := crops.get(question.track_id)) is not None:
                    dropped.append(older)
                crops[question.track_id] = WaitingCrop(frame.camera, question, picture)
            dropped += self._drop_pictures(frame.camera)
            while self._count_waiting() > self._limit:
                camera = max(self._cameras, key=lambda name: len(self._cameras[name]))
                dropped.append(self._take_first(camera))
            self._counts["dropped"] += len(dropped)
            self._changed.notify()
        return dropped

    def _drop_pictures(self, camera: str) -> list[WaitingCrop]:
        """Drop the questions about the oldest pictures of a camera that has too many."""
        crops = self._cameras.get(camera, {})
        sequences = sorted({crop.question.sequence for crop in crops.values()})
        old = set(sequences[:-_MAX_WAITING_PICTURES])
        return [crops.pop(id_) for id_, crop in [*crops.items()] if crop.question.sequence in old]

    def wait(self) -> bool:
        """Wait for a question; False once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._cameras)
            return not self._closed

    def take(self, count: int | None = None) -> list[WaitingCrop]:
        """Up to `count` questions (None: all), one camera after the other; does not wait."""
        with self._changed:
            waiting = self._count_waiting()
            wanted = waiting if count is None else min(count, waiting)
            return [self._take_first(next(iter(self._cameras))) for _ in range(wanted)]

    def forget(self, camera: str) -> None:
        """Drop the questions of a camera that is gone."""
        with self._changed:
            self._counts["dropped"] += len(self._cameras.pop(camera, ()))

    def pause(self, seconds: float) -> None:
        """Wait for a while, or until the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def count(self, answers: Iterable[CropAnswer]) -> None:
        """Count what has become of questions that were taken."""
        with self._changed:
            for answer in answers:
                given = "unsure" if answer.label is None else "answered"
                self._counts["dropped" if answer.failed else given] += 1

    def close(self) -> None:
        """Drop all questions and wake the threads that wait."""
        with self._changed:
            self._closed = True
            self._counts["dropped"] += self._count_waiting()
            self._cameras.clear()
            self._changed.notify_all()

    def statistics(self) -> CropStatistics:
        """A consistent snapshot."""
        with self._changed:
            counts, waiting = self._counts, self._count_waiting()
            return CropStatistics(
                counts["asked"], counts["answered"], counts["unsure"], counts["dropped"], waiting
            )

    # --- with the lock held ---------------------------------------------------------------------------------

    def _count_waiting(self) -> int:
        return sum(map(len, self._cameras.values()))

    def _take_first(self, camera: str) -> WaitingCrop:
        """The oldest question of a camera, whose next turn comes after all others."""
        crops = self._cameras.pop(camera)
        first = crops.pop(next(iter(crops)))
        if crops:
            self._cameras[camera] = crops
        return first


class CropWorker:
    """Computes the crops of one model; `run` is a thread's target and ends when the queue is closed.

    `deliver` is called with the answers about each camera; it must not block.
    """

    def __init__(
        self,
        model: str,
        queue: CropQueue,
        use: UseModel,
        deliver: Callable[[CameraAnswers], None],
        charge: ChargeCamera,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        retry_s: float = _RETRY_S,
    ) -> None:
        self._model = model
        self._queue = queue
        self._use = use
        self._deliver = deliver
        self._charge = charge
        self._clock = clock
        self._retry_s = retry_s
        self._is_failing = False

    def run(self) -> None:
        """Take, cut, infer, deliver, until closed. What fails is given back as failed, for another try."""
        while self._queue.wait():
            if not self._compute_batch():
                self._queue.pause(self._retry_s)

    def _compute_batch(self) -> bool:
        """Take and compute a batch; False: it failed. Its pictures are free when this returns."""
        crops: list[WaitingCrop] = []
        try:
            with self._use(self._model) as running:
                crops = self._queue.take(running.engine.info().plan.max_batch)
                answers = self._compute(running, crops)
        except EngineError as error:
            crops = crops or self._queue.take()
            self._hand_on(crops, [CropAnswer(crop.question, failed=True) for crop in crops])
            self._report_failure(error)
            return False
        self._hand_on(crops, answers)
        self._report_success()
        return True

    def _compute(self, running: EngineWithSelection, crops: Sequence[WaitingCrop]) -> list[CropAnswer]:
        pictures = [_cut(crop) for crop in crops]
        cut = [picture for picture in pictures if picture is not None]
        started_ns = self._clock()
        labels = iter(answer_crops(running, cut) if cut else ())
        infer_ns = self._clock() - started_ns
        shares = Counter(
            crop.camera for crop, picture in zip(crops, pictures, strict=True) if picture is not None
        )
        for camera, count in shares.items():
            self._charge(camera, infer_ns * count // len(cut))
        return [
            CropAnswer(crop.question, failed=True)
            if picture is None
            else CropAnswer(crop.question, next(labels))
            for crop, picture in zip(crops, pictures, strict=True)
        ]

    def _hand_on(self, crops: Sequence[WaitingCrop], answers: Sequence[CropAnswer]) -> None:
        self._queue.count(answers)
        for answers_of_camera in _group(crops, answers):
            self._deliver(answers_of_camera)

    def _report_failure(self, error: EngineError) -> None:
        if not self._is_failing:
            self._is_failing = True
            text = "second model '%s': crops cannot be computed (%s); they are asked again every %g s"
            log.warning(text, self._model, error, self._retry_s)

    def _report_success(self) -> None:
        if self._is_failing:
            self._is_failing = False
            log.info("second model '%s': crops are computed again", self._model)


class SecondStageHost:
    """The second models in use, each with its queue and its thread. For the loop.

    Args:
        thread_group: for the threads `second:NAME`.
        use: the engine of a model.
        deliver: takes answers on the threads; usually `LoopQueue.put`.
        charge: the engine time of a camera's crops.
    """

    def __init__(
        self,
        thread_group: ThreadGroup,
        use: UseModel,
        deliver: Callable[[CameraAnswers], None],
        charge: ChargeCamera = lambda _camera, _engine_ns: None,
    ) -> None:
        self._thread_group = thread_group
        self._use, self._deliver, self._charge = use, deliver, charge
        self._queues: dict[str, CropQueue] = {}

    def __repr__(self) -> str:
        return f"<SecondStageHost {self._queues}>"

    def configure(self, models: Collection[str]) -> None:
        """Ask these models from now on; the threads of others end after the crops that they compute.

        Raises:
            UnavailableError: the machine or the container allows no more threads.
        """
        for model in self._queues.keys() - set(models):
            self._queues.pop(model).close()
        for model in sorted(set(models) - self._queues.keys()):
            queue = CropQueue()
            worker = CropWorker(model, queue, self._use, self._deliver, self._charge)
            self._thread_group.start(f"second:{model}", worker.run, vital=True, may_return=True)
            self._queues[model] = queue

    def ask(self, frame: Frame, questions: Sequence[CropQuestion]) -> list[CameraAnswers]:
        """Put questions about a frame into the queue of their model; returns what fails by that at once."""
        by_model: dict[str, list[CropQuestion]] = {}
        for question in questions:
            by_model.setdefault(question.model, []).append(question)
        failed: list[CameraAnswers] = []
        for model, asked in by_model.items():
            if (queue := self._queues.get(model)) is not None:
                dropped = queue.put(frame, asked)
                failed += _group(dropped, [CropAnswer(crop.question, failed=True) for crop in dropped])
            else:
                answers = tuple(CropAnswer(question, failed=True) for question in asked)
                failed.append(CameraAnswers(frame.camera, answers))
        return failed

    def forget(self, camera: str) -> None:
        """Drop the questions of a camera that is gone."""
        for queue in self._queues.values():
            queue.forget(camera)

    def statistics(self) -> Mapping[str, CropStatistics]:
        """The counts of each model in use."""
        return {model: queue.statistics() for model, queue in self._queues.items()}

    def close(self) -> None:
        """Let all threads end; the thread group joins them."""
        self.configure(())


def _cut(crop: WaitingCrop) -> Picture | None:
    """The crop; None if its picture cannot be had any more."""
    try:
        return crop.picture.cut(crop.question)
    except Exception as error:  # noqa: BLE001 - whatever a picture raises must not end the thread
        log.debug("a picture of %s has no crop: %s: %s", crop.camera, type(error).__name__, error)
        return None


def _group(crops: Sequence[WaitingCrop], answers: Sequence[CropAnswer]) -> list[CameraAnswers]:
    """The answers by camera; `answers` is parallel to the crops."""
    by_camera: dict[str, list[CropAnswer]] = {}
    for crop, answer in zip(crops, answers, strict=True):
        by_camera.setdefault(crop.camera, []).append(answer)
    return [CameraAnswers(camera, tuple(found)) for camera, found in by_camera.items()]
