"""The scene of one camera, from its results: masks, then the tracker, then zones and lines."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from visionedge.config.schema import CameraConfig
from visionedge.frames.types import Detections, FrameResult, label_of
from visionedge.scene.events import ScenePicture
from visionedge.scene.scene import KeptRule, Scene, SceneChanges, apply_masks
from visionedge.scene.tracker import BIRTH_SCORE, LOST_S, Track, Tracker

_OFFLINE_S = 2 * LOST_S
"""The tracks of a camera without results end after so long; until then the next picture decides."""


class CameraScene:
    """Masks, tracker, zones and lines of one camera; `kept` as in `Scene`.

    `tracks`: the confirmed tracks after the last result, hidden ones too.
    """

    def __init__(self, name: str, first_track_id: int, kept: Mapping[str, KeptRule] | None) -> None:
        self.name = name
        self.tracker = Tracker(next_id=first_track_id)
        self.scene = Scene(name, kept)
        self.tracks: tuple[Track, ...] = ()
        self._config = CameraConfig(uri="demo:")
        self._last_s: float | None = None

    def __repr__(self) -> str:
        return f"<CameraScene {self.scene!r} {self.tracker!r}>"

    def configure(self, config: CameraConfig, now: datetime) -> SceneChanges:
        """Use another configuration of the camera; `now` is the UTC time."""
        self._config = config
        return self.scene.configure(config, now)

    def use_confidence(self, confidence: float) -> None:
        """The confidence of cameras that have none of their own."""
        own = self._config.confidence
        self.tracker.confidence = confidence if own is None else own
        # Who sets a confidence wants to count what is above it.
        self.tracker.birth_score = max(confidence, BIRTH_SCORE) if own is None else own

    def update(self, result: FrameResult) -> tuple[FrameResult, SceneChanges]:
        """Follow the objects into the next result: the result without what masks cover, with its tracks."""
        detections = apply_masks(result.detections, self._config.masks)
        candidates = detections
        if result.candidates is not None:
            candidates = apply_masks(result.candidates, self._config.masks)
        frame = result.frame
        at_s = self._last_s = frame.captured_ns / 1e9
        update = self.tracker.update(candidates, at_s, result.labels)
        self.tracks = update.tracks
        picture = ScenePicture(
            sequence=frame.sequence,
            epoch=frame.epoch,
            at_s=at_s,
            captured_at=frame.captured_utc,
            aspect=frame.width_px / frame.height_px,
            model=result.model,
            device=result.device,
            width_px=frame.width_px,
            height_px=frame.height_px,
        )
        changes = self.scene.update(picture, update.tracks, update.ended)
        # The reported detections are the first candidates.
        labels = update.track_labels[: len(detections)]
        reported = replace(
            result,
            detections=_name_by_tracks(detections, labels, result.labels),
            track_ids=update.track_ids[: len(detections)],
            track_labels=labels,
            confirmed_tracks={track.track_id: _find_corners(track) for track in update.tracks},
        )
        return reported, changes

    def end_if_offline(self, now_s: float) -> SceneChanges:
        """End all tracks once nothing came for long; `now_s` is the time of `time.monotonic`."""
        if self._last_s is None or now_s - self._last_s <= _OFFLINE_S:
            return SceneChanges()
        self._last_s = None
        return self.scene.end_all()

    def end_all(self) -> SceneChanges:
        """End all tracks, as when the module stops: who is inside is lost. Numbers of tracks go on."""
        tracker = self.tracker
        self.tracker = Tracker(tracker.confidence, tracker.birth_score, tracker.next_id)
        self.tracks = ()
        return self.scene.end_all()


def _name_by_tracks(
    detections: Detections, track_labels: Sequence[str | None], labels: Sequence[str]
) -> Detections:
    """The detections with the classes of their tracks, where this model has classes of these names."""
    changed = {
        row: labels.index(label)
        for row, (label, class_id) in enumerate(zip(track_labels, detections.class_ids.tolist(), strict=True))
        if label is not None and label != label_of(labels, class_id) and label in labels
    }
    if not changed:
        return detections
    class_ids = detections.class_ids.copy()
    for row, class_id in changed.items():
        class_ids[row] = class_id
    return replace(detections, class_ids=class_ids)


def _find_corners(track: Track) -> tuple[float, float, float, float] | None:
    """Left, top, right and bottom of a track's box; None while it is hidden."""
    left, top, width, height = track.box
    return None if track.detection is None else (left, top, left + width, top + height)
