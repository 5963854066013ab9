"""The scenes of the running module: results of cameras in, results with tracks out; changes to the disk.

Everything here is for the loop, but `flush` and `close`. The thread `scene` writes what a scene changes.
"""

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from visionedge.app.second_stage import CameraAnswers, SecondStageHost
from visionedge.app.state import SceneStatistics, SnapshotReader
from visionedge.config.schema import CameraConfig, EventsConfig
from visionedge.frames.geometry import PolygonArea
from visionedge.frames.types import FrameResult, utc_now
from visionedge.runtime.threads import ThreadGroup
from visionedge.scene.camera_scene import CameraScene, apply_masks
from visionedge.scene.events import EventFilter
from visionedge.scene.scene import Scene, SceneChanges
from visionedge.scene.totals import SCENE_FILE_NAME, CountRow, EventLimits, UnknownEventError
from visionedge.scene.writer import Deliver, SceneStorageStatus, SceneWriter

_RESERVED_TRACKS = 1_000
"""So many numbers of tracks are reserved on the disk, because a kill leaves no time to store the last one."""

_VISITS_S = 1.0
"""So often is stored what is due for who is inside if the module is killed."""

_NO_RULES = CameraConfig(uri="demo:")


class SceneHost:
    """The scenes of all cameras with tracking, and the masks of the others.

    Args:
        snapshot: the module, for the configuration in force.
        data: the data folder; `scene.db` is opened when the first camera has tracking.
        thread_group: for the thread that writes.
        deliver: takes events that may leave the module (`SceneWriter`); called by the thread that writes.
        second_stage: computes the crops of cameras with a second model; None: tracks get no attributes.
        clock: monotonic seconds.
        now: the UTC time.
    """

    def __init__(
        self,
        snapshot: SnapshotReader,
        data: Path,
        thread_group: ThreadGroup,
        *,
        deliver: Deliver,
        second_stage: SecondStageHost | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._snapshot = snapshot
        self._deliver = deliver
        self._second_stage = second_stage
        self._path = data / SCENE_FILE_NAME
        self._thread_group = thread_group
        self._clock, self._now = clock, now
        self._scenes: dict[str, CameraScene] = {}
        # Not followed: their cameras are without tracking now, or removed.
        self._idle: dict[str, CameraScene] = {}
        self._masks: dict[str, list[PolygonArea]] = {}
        self._writer: SceneWriter | None = None
        self._thread: threading.Thread | None = None
        self._has_looked = False
        self._configuring = asyncio.Lock()
        self._reserved: dict[str, int] = {}
        self._reserving: asyncio.Future[dict[str, int]] | None = None
        self._due_s = 0.0
        self._events: Counter[tuple[str, str]] = Counter()
        self._reported: SceneStorageStatus | None = None

    def __repr__(self) -> str:
        return f"<SceneHost {list(self._scenes.values())}>"

    # --- the configuration --------------------------------------------------------------------------------

    async def configure(self, cameras: Mapping[str, CameraConfig]) -> None:
        """Use these cameras; reads on a thread what the last run has left of new ones."""
        async with self._configuring:
            tracked = {name: camera for name, camera in cameras.items() if camera.is_tracked}
            # What a removed camera has left may still be on its way to the disk.
            self._scenes |= {name: self._idle.pop(name) for name in tracked if name in self._idle}
            new = [name for name in tracked if name not in self._scenes]
            if new or not self._has_looked:
                events = self._snapshot().config.events
                loaded = await asyncio.to_thread(self._load, new, frozenset(tracked), events)
                self._has_looked = True
                self._scenes |= {scene.name: scene for scene in loaded}
            for name in [name for name in self._scenes if name not in tracked]:
                if self._second_stage is not None:
                    self._second_stage.forget(name)
                self._put(self._scenes[name].end_all())
                self._idle[name] = self._scenes.pop(name)
            for name, scene in {**self._scenes, **self._idle}.items():
                # Zones and lines that are not counted now keep their totals.
                self._put(scene.configure(cameras.get(name, _NO_RULES), self._now()))
                scene.use_confidence(self._find_confidence(name))
            if self._second_stage is not None:
                stages = [camera.then for camera in tracked.values() if camera.then is not None]
                self._second_stage.configure({stage.model for stage in stages})
            self._masks = {
                name: [PolygonArea(mask) for mask in camera.masks]
                for name, camera in cameras.items()
                if camera.masks and not camera.is_tracked
            }

    def _load(self, new: Sequence[str], tracked: frozenset[str], events: EventsConfig) -> list[CameraScene]:
        """The scenes of new cameras, at the start also of those that are gone. Blocks."""
        writer = self._writer
        if writer is None:
            # Not Path.exists, which raises an error for a folder that this user may not read.
            if not new and not os.path.lexists(self._path):
                return []
            writer = SceneWriter(self._path, _event_limits(events), self._deliver, now=self._now)
            self._thread = writer.start(self._thread_group)
            self._writer = writer
        gone = [] if self._has_looked else [name for name in writer.cameras() if name not in tracked]
        return [
            CameraScene(name, self._reserve_first(writer, name), writer.load(name)) for name in (*new, *gone)
        ]

    def _reserve_first(self, writer: SceneWriter, camera: str) -> int:
        """The number of the first track; it is at least the time, in case that the file is lost. Blocks.

        In ms, because a camera never has a thousand tracks a second.
        """
        last_id = writer.last_track_id(camera) or 0
        first_id = max(last_id + 1, int(self._now().timestamp() * 1000))
        reserved_id = first_id + _RESERVED_TRACKS
        self._reserved[camera] = reserved_id if writer.reserve_track_ids(camera, reserved_id) else 0
        return first_id

    async def apply_events(self, events: EventsConfig) -> None:
        """Use another bound of the log of events."""
        if self._writer is not None:
            await asyncio.to_thread(self._writer.set_limits, _event_limits(events))

    # --- the log ------------------------------------------------------------------------------------------

    def read_events(
        self, wanted: EventFilter, *, before: str | None, after: str | None, limit: int
    ) -> list[dict[str, Any]]:
        """As `SceneWriter.events`; without a file there are none. Blocks; from any thread."""
        if self._writer is None:
            if unknown := before or after:
                raise UnknownEventError(unknown)
            return []
        return self._writer.events(wanted, before=before, after=after, limit=limit)

    def read_counts(
        self, camera: str, begin: datetime, end: datetime, by: Literal["hour", "day"], limit: int
    ) -> list[CountRow]:
        """As `SceneWriter.counts`; without a file there are none. Blocks; from any thread."""
        return [] if self._writer is None else self._writer.counts(camera, begin, end, by, limit)

    # --- results ------------------------------------------------------------------------------------------

    def update(self, result: FrameResult) -> FrameResult:
        """A result without what masks cover; for a camera with tracking with its tracks."""
        name = result.frame.camera
        scene = self._scenes.get(name)
        if scene is None:
            masks = self._masks.get(name)
            if masks is None:
                return result
            return replace(result, detections=apply_masks(result.detections, masks))
        scene.use_confidence(self._find_confidence(name))
        scene.scene.keeps_context = self._snapshot().config.telemetry.format == "spatial-analysis"
        result, changes = scene.update(result)
        self._put(changes)
        if scene.questions and self._second_stage is not None:
            for failed in self._second_stage.ask(result.frame, scene.questions):
                self.take_answers(failed)
        if first_counts := scene.scene.take_first_counts():
            self._deliver(first_counts)
        return result

    def _find_confidence(self, camera: str) -> float:
        """The confidence of a camera's model, for cameras without one of their own."""
        config = self._snapshot().config
        settings = config.cameras.get(camera)
        model = None if settings is None or settings.model is None else config.models.get(settings.model)
        own = None if model is None else model.confidence
        return config.inference.confidence if own is None else own

    def take_answers(self, answers: CameraAnswers) -> None:
        """What a second model says of tracks; those of a camera that is gone are ignored."""
        if (scene := self._scenes.get(answers.camera)) is not None:
            scene.second_stage.take(answers.answers)

    def document(self, camera: str) -> dict[str, Any]:
        """The tracks, zones and lines of a camera; without tracking the totals of before."""
        found = self._scenes.get(camera) or self._idle.get(camera)
        return (Scene(camera) if found is None else found.scene).document()

    def statistics(self) -> SceneStatistics:
        """Tracks, totals and counts of events of all cameras with tracking, and the state of the file."""
        return SceneStatistics(
            {name: scene.scene.document() for name, scene in self._scenes.items()},
            {key: count for key, count in self._events.items() if key[0] in self._scenes},
            None if self._writer is None else self._writer.status(),
            {} if self._second_stage is None else self._second_stage.statistics(),
        )

    def _report_storage(self, storage: SceneStorageStatus) -> None:
        """Send an event when the file was set aside, is that of a newer version, or cannot be used."""
        before, self._reported = self._reported, storage
        send, name = partial(self._snapshot().send_event, "storage"), self._path.name
        if storage.lost is not None and (before is None or storage.lost != before.lost):
            text = f"{name} cannot be used ({storage.lost}) and was set aside; a new file begins"
            send("state-lost", text, {"file": name, "reason": storage.lost})
        if storage.newer is not None and (before is None or storage.newer != before.newer):
            send("state-newer", storage.newer, {"file": name})
        was_on_disk = before is None or before.mode == "disk"
        if storage.mode == "memory" and was_on_disk:
            text = f"{name} cannot be used ({storage.reason}); zones and lines count in memory, retrying"
            send("scene-memory", text, {"file": name, "reason": storage.reason})
        elif storage.mode == "disk" and not was_on_disk:
            send("scene-disk", f"{name} can be used again", {"file": name})

    def tick(self) -> None:
        """Once a second: end the tracks of cameras that are offline, store what a kill would lose."""
        now_s = self._clock()
        if now_s < self._due_s or self._writer is None:
            return
        self._due_s = now_s + _VISITS_S
        self._report_storage(self._writer.status())
        self._agree_with_file(self._writer)
        for scene in self._scenes.values():
            self._put(scene.end_if_offline(now_s))
            self._put(scene.scene.open_visits())
        if self._reserving is not None and self._reserving.done():
            self._reserved |= self._reserving.result()
            self._reserving = None
        if self._reserving is None and (wanted := self._find_reservations()):
            reserve = partial(_reserve, self._writer, wanted)
            self._reserving = asyncio.get_running_loop().run_in_executor(None, reserve)

    def _agree_with_file(self, writer: SceneWriter) -> None:
        """Add what a file that came late had, and store everything in one that replaced a damaged one."""
        scenes = {**self._scenes, **self._idle}
        for start in writer.take_found_states():
            if start.camera in scenes:
                scenes[start.camera].scene.adopt(start.rule, start.kept)
        if writer.take_replaced():
            for scene in scenes.values():
                self._put(scene.scene.states())
            self._reserved.clear()

    def _find_reservations(self) -> dict[str, int]:
        """The cameras whose reserved numbers are nearly used, and up to which to reserve."""
        return {
            name: scene.tracker.next_id + _RESERVED_TRACKS
            for name, scene in self._scenes.items()
            if scene.tracker.next_id + _RESERVED_TRACKS // 2 > self._reserved.get(name, 0)
        }

    def _put(self, changes: SceneChanges) -> None:
        self._events.update((event.camera, event.type) for event in changes.events)
        # Live viewers get an event at once, before the disk has it.
        self._snapshot().latest_results.publish_events(changes.events)
        if self._writer is not None:
            self._writer.put(changes)

    def acknowledge(self, event_ids: Sequence[str]) -> None:
        """The delivery has secured these events (`SceneWriter.acknowledge`)."""
        if self._writer is not None:
            self._writer.acknowledge(event_ids)

    def flush(self, timeout_s: float) -> bool:
        """Store who is inside and deliver the last events; whether it was done in time. Blocks."""
        if self._writer is None:
            return True
        for scene in self._scenes.values():
            self._put(scene.scene.open_visits())
        return self._writer.flush(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Store what was acknowledged and end the thread; whether it ended in time. Blocks."""
        if self._writer is None or self._thread is None:
            return True
        self._writer.close()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _reserve(writer: SceneWriter, wanted: Mapping[str, int]) -> dict[str, int]:
    """The reservations that are on the disk. Blocks."""
    return {name: last_id for name, last_id in wanted.items() if writer.reserve_track_ids(name, last_id)}


def _event_limits(events: EventsConfig) -> EventLimits:
    return EventLimits(events.keep.megabytes * 1_000_000, events.keep.days)
