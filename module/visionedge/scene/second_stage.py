"""Second stage: about which tracks of a camera a second model is asked, and what it has answered. No I/O."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from visionedge.config.schema import SecondStageConfig
from visionedge.frames.types import Detections
from visionedge.scene.trail import ConfirmedTrack

_GIVEN_UP_S = 30.0
"""A question without an answer for so long is lost, and is asked again."""


@dataclass(frozen=True, slots=True)
class CropQuestion:
    """What does the second model `model` say of a part of the picture `sequence`?

    `corners`: left, top, right and bottom, 0-1 of the picture.
    """

    model: str
    track_id: int
    sequence: int
    corners: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class CropAnswer:
    """The answer to a question; `label` None: the model is not sure. `failed`: it was not computed."""

    question: CropQuestion
    label: str | None = None
    failed: bool = False


@dataclass(slots=True)
class _TrackQuestions:
    """The last question about a track: the number of its picture, when, and its sequence while it is open.

    `answered`: the sequence of the picture of the answer that counts.
    """

    asked: int = 0
    asked_s: float = 0.0
    open_sequence: int | None = None
    failed: bool = False
    answered: int | None = None


class SecondStage:
    """The questions and answers about the tracks of one camera.

    Attributes:
        attributes: the answers that are known, by track and by the name of the model. The inner mappings
            never change.
    """

    def __init__(self) -> None:
        self.attributes: dict[int, Mapping[str, str]] = {}
        self._config: SecondStageConfig | None = None
        self._tracks: dict[int, _TrackQuestions] = {}
        self._pictures = 0

    def __repr__(self) -> str:
        is_open = sum(track.open_sequence is not None for track in self._tracks.values())
        return f"<SecondStage tracks={len(self._tracks)} open={is_open} answered={len(self.attributes)}>"

    @property
    def is_used(self) -> bool:
        """Whether the camera has a second model."""
        return self._config is not None

    def configure(self, config: SecondStageConfig | None) -> None:
        """Use another second stage, or none; answers of another model are forgotten."""
        before, self._config = self._config, config
        if config is None or before is None or config.model != before.model:
            self.end_all()

    def ask(
        self, tracks: Iterable[ConfirmedTrack], detections: Detections, sequence: int, at_s: float
    ) -> tuple[CropQuestion, ...]:
        """The questions about the tracks in the next picture of the camera.

        `detections` are those to which the tracks refer; `at_s` is monotonic.
        """
        config = self._config
        if config is None:
            return ()
        self._pictures += 1
        questions: list[CropQuestion] = []
        for track in tracks:
            if config.classes is not None and track.label not in config.classes:
                self._forget(track.track_id)
            elif track.detection is not None:
                state = self._tracks.setdefault(track.track_id, _TrackQuestions())
                if self._is_due(state, config, at_s):
                    state.asked, state.asked_s = self._pictures, at_s
                    state.open_sequence, state.failed = sequence, False
                    corners = _widen(detections.boxes[track.detection].tolist(), config.margin)
                    questions.append(CropQuestion(config.model, track.track_id, sequence, corners))
        return tuple(questions)

    def _is_due(self, state: _TrackQuestions, config: SecondStageConfig, at_s: float) -> bool:
        if state.asked == 0 or state.failed:
            return True
        if config.every != "track":
            return self._pictures - state.asked >= config.every
        if state.open_sequence is not None:
            return at_s - state.asked_s > _GIVEN_UP_S
        return state.answered is None

    def take(self, answers: Iterable[CropAnswer]) -> None:
        """Take answers; those about tracks that have ended, and of a former model, are ignored."""
        for answer in answers:
            question, config = answer.question, self._config
            state = self._tracks.get(question.track_id)
            if state is None or config is None or question.model != config.model:
                continue
            if question.sequence == state.open_sequence:
                state.open_sequence, state.failed = None, answer.failed
            if answer.label is None:
                continue
            is_first = state.answered is None
            # With `every: track` the first answer stays, else the newest picture counts.
            if is_first or (config.every != "track" and question.sequence > (state.answered or 0)):
                state.answered = question.sequence
                self.attributes[question.track_id] = {question.model: answer.label}

    def end(self, track_ids: Iterable[int]) -> None:
        """Forget tracks that have ended."""
        for track_id in track_ids:
            self._forget(track_id)

    def end_all(self) -> None:
        """Forget all tracks."""
        self._tracks.clear()
        self.attributes.clear()

    def _forget(self, track_id: int) -> None:
        self._tracks.pop(track_id, None)
        self.attributes.pop(track_id, None)


def _widen(corners: Sequence[float], margin: float) -> tuple[float, float, float, float]:
    """The corners of a box that is larger by this part of its size on each side, inside the picture."""
    left, top, right, bottom = corners
    across, down = margin * (right - left), margin * (bottom - top)
    return max(0.0, left - across), max(0.0, top - down), min(1.0, right + across), min(1.0, bottom + down)
