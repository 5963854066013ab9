"""The scene of one camera, from its results: masks, the tracker, the second stage, then zones and lines."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType

from visionedge.config.schema import CameraConfig
from visionedge.frames.geometry import PolygonArea
from visionedge.frames.types import Detections, Frame, FrameResult
from visionedge.scene.events import ScenePicture
from visionedge.scene.scene import KeptRule, Scene, SceneChanges
from visionedge.scene.second_stage import CropAnswer, CropQuestion, SecondStage
from visionedge.scene.tracker import BIRTH_SCORE, LOST_S, Track, Tracker

AnswerQuestions = Callable[[Frame, Sequence[CropQuestion]], Iterable[CropAnswer]]
"""Answers the questions about a frame at once."""

_NO_ANSWERS: Mapping[str, str] = MappingProxyType({})

_OFFLINE_S = 2 * LOST_S
"""The tracks of a camera without results end after so long; until then the next picture decides."""


class CameraScene:
    """Masks, tracker, second stage, zones and lines of one camera; `kept` as in `Scene`.

    `tracks`: the confirmed tracks after the last result, hidden ones too. `questions`: what a second model is
    asked about its picture; the answers go to `second_stage`.
    """

    def __init__(self, name: str, first_track_id: int, kept: Mapping[str, KeptRule] | None) -> None:
        self.name = name
        self.tracker = Tracker(next_id=first_track_id)
        self.scene = Scene(name, kept)
        self.second_stage = SecondStage()
        self.tracks: tuple[Track, ...] = ()
        self.questions: tuple[CropQuestion, ...] = ()
        self._config = CameraConfig(uri="demo:")
        self._masks: list[PolygonArea] = []
        self._last_s: float | None = None

    def __repr__(self) -> str:
        return f"<CameraScene {self.scene!r} {self.tracker!r}>"

    def configure(self, config: CameraConfig, now: datetime) -> SceneChanges:
        """Use another configuration of the camera; `now` is the UTC time."""
        self._config = config
        self._masks = [PolygonArea(mask) for mask in config.masks]
        self.second_stage.configure(config.then)
        return self.scene.configure(config, now)

    def use_confidence(self, confidence: float) -> None:
        """The confidence of cameras that have none of their own."""
        own = self._config.confidence
        self.tracker.confidence = confidence if own is None else own
        # Who sets a confidence wants to count what is above it.
        self.tracker.birth_score = max(confidence, BIRTH_SCORE) if own is None else own

    def update(
        self, result: FrameResult, answer: AnswerQuestions | None = None
    ) -> tuple[FrameResult, SceneChanges]:
        """Follow the objects into the next result: the result without what masks cover, with its tracks.

        With `answer` the questions about this picture are answered before its rules decide.
        """
        detections, candidates = result.detections, result.candidates
        if self._masks:
            detections = apply_masks(detections, self._masks)
            candidates = None if candidates is None else apply_masks(candidates, self._masks)
        frame = result.frame
        at_s = self._last_s = frame.captured_ns / 1e9
        tracked = detections if candidates is None else candidates
        update = self.tracker.update(tracked, at_s, result.labels)
        self.tracks = update.tracks
        self.questions = self.second_stage.ask(update.tracks, tracked, frame.sequence, at_s)
        if answer is not None and self.questions:
            self.second_stage.take(answer(frame, self.questions))
        attributes = self.second_stage.attributes
        changes = self.scene.update(ScenePicture.of(result), update.tracks, update.ended, attributes)
        self.second_stage.end(update.ended)
        # The reported detections are the first candidates.
        count, track_labels = len(detections), update.track_labels
        if update.renamed:
            renamed = {row: track_labels[row] for row in update.renamed if row < count}
            detections = _rename(detections, renamed, result.labels)
        reported = replace(
            result,
            detections=detections,
            track_ids=update.track_ids[:count],
            track_labels=track_labels[:count],
            confirmed_tracks=_find_corners(update.tracks),
            attributes=self._list_attributes(update.track_ids[:count]),
        )
        return reported, changes

    def _list_attributes(self, track_ids: Sequence[int | None]) -> tuple[Mapping[str, str], ...] | None:
        """The attributes of tracks, None: no track; None as a whole without a second model."""
        if not self.second_stage.is_used:
            return None
        known = self.second_stage.attributes
        return tuple(_NO_ANSWERS if track is None else known.get(track, _NO_ANSWERS) for track in track_ids)

    def end_if_offline(self, now_s: float) -> SceneChanges:
        """End all tracks once nothing came for long; `now_s` is the time of `time.monotonic`."""
        if self._last_s is None or now_s - self._last_s <= _OFFLINE_S:
            return SceneChanges()
        self._last_s = None
        self.second_stage.end_all()
        return self.scene.end_all()

    def end_all(self) -> SceneChanges:
        """End all tracks, as when the module stops: who is inside is lost. Numbers of tracks go on."""
        tracker = self.tracker
        self.tracker = Tracker(tracker.confidence, tracker.birth_score, tracker.next_id)
        self.tracks, self.questions = (), ()
        self.second_stage.end_all()
        return self.scene.end_all()


def _rename(detections: Detections, names: Mapping[int, str | None], labels: Sequence[str]) -> Detections:
    """The detections with the classes of these names, by row, where this model has classes of these names."""
    class_ids = detections.class_ids.copy()
    for row, name in names.items():
        if name in labels:
            class_ids[row] = labels.index(name)
    return replace(detections, class_ids=class_ids)


def _find_corners(tracks: Sequence[Track]) -> dict[int, tuple[float, float, float, float] | None]:
    """Left, top, right and bottom of each track's box, by its id; None while it is hidden."""
    corners: dict[int, tuple[float, float, float, float] | None] = {}
    for track in tracks:
        left, top, width, height = track.box
        is_seen = track.detection is not None
        corners[track.track_id] = (left, top, left + width, top + height) if is_seen else None
    return corners


def apply_masks(detections: Detections, masks: Sequence[PolygonArea]) -> Detections:
    """The detections whose bottom centre lies in no mask; for the tracker, which must not see the others."""
    if not masks or not len(detections):
        return detections
    keep = [
        number
        for number, (left, _, right, bottom) in enumerate(detections.boxes.tolist())
        if not any(mask.contains((left + right) / 2, bottom) for mask in masks)
    ]
    if len(keep) == len(detections):
        return detections
    return Detections(detections.boxes[keep], detections.scores[keep], detections.class_ids[keep])
