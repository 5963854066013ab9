"""The cameras that run (`CameraRegistry`), and their frame numbers, which never repeat (`SequenceStore`).

The registry opens, changes and closes each camera when the configuration changes, without touching the
others.
"""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from visionedge.camera.camera import Camera, CameraStatus, FrameSink, InputResizer
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.sources.base import SourceLimits, ThreadBudget
from visionedge.camera.timing import UNTHROTTLED, AdmissionCounts, Throttle
from visionedge.config.schema import SCENE_KEYS, CameraConfig, GateConfig, TlsConfig
from visionedge.frames.types import DEFAULT_MODEL
from visionedge.runtime.files import DamagedStateFileError, parse_count
from visionedge.runtime.process_limits import bounded_cores
from visionedge.runtime.state_file import StateFile
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)

FORGET_AFTER_NS = 3600 * 1_000_000_000
"""Counters and metrics of a camera are forgotten this long after it left the configuration."""

MAX_CAMERA_NAMES = 10_000
"""Cameras whose last numbers are stored; those that ran longest ago are dropped first."""

RETENTION_S = 400 * 86_400
"""Last numbers of a camera that does not run are stored this long."""

SEQUENCES_SCHEMA = "visionedge/sequences/2"

_SEQUENCE_MARGIN = 100_000
"""More frames than a camera gives between two calls of `SequenceStore.remember`."""

_MAX_SEQUENCE = 10**14
"""As milliseconds since 1970 this is the year 5138; a larger number in a file is damage."""


@dataclass(frozen=True, slots=True)
class SequencePosition:
    """The number of a camera's next frame, and its epoch."""

    sequence: int
    epoch: int = 0


class FrameSlots(FrameSink, Protocol):
    """Takes frames, with one slot per camera."""

    def open(self, camera: str) -> None:
        """Accept frames of a camera."""

    def close_camera(self, camera: str) -> None:
        """Accept no more frames of a camera."""

    def forget(self, camera: str) -> None:
        """Drop the counters of a closed camera."""


@dataclass(frozen=True, slots=True)
class _ClosedCamera:
    """The position of a camera when it was closed, and the monotonic time."""

    position: SequencePosition
    at_ns: int


class CameraRegistry:
    """The cameras, by name. Any thread may call `check_liveness` and `counts`; one thread calls the rest.

    Args:
        resizers: resize pictures to the input of each model; more come with `change_input`.
        slots: takes the frames.
        thread_group: runs a thread for each camera.
        first_sequence: returns the number of a camera's first frame in this run.
        last_epoch: returns the epoch that a camera reached in an earlier run.
        on_change: called at each change of a camera's state, from any thread.
        hardware: videos may be decoded on a GPU.
        start_paused: do not play files and folders before `begin`.
    """

    def __init__(
        self,
        resizers: Iterable[InputResizer],
        slots: FrameSlots,
        thread_group: ThreadGroup,
        *,
        first_sequence: Callable[[str], int],
        on_change: Callable[[CameraStatus], None],
        last_epoch: Callable[[str], int] = lambda _name: 0,
        hardware: bool = False,
        start_paused: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.by_name: dict[str, Camera] = {}
        self._resizers = {resizer.model: resizer for resizer in resizers}
        self._slots, self._thread_group = slots, thread_group
        self._first_sequence = first_sequence
        self._last_epoch = last_epoch
        self._clock = clock
        self._on_change = on_change
        self._hardware = hardware
        self._start_paused = start_paused
        # One per core, however many cameras there are: the cameras' own threads wait most of the time.
        self._spare_threads = ThreadBudget(bounded_cores())
        self._wanted: Mapping[str, CameraConfig] = {}
        self._settings: dict[str, CameraConfig] = {}
        self._throttles: Mapping[str, Throttle] = {}
        self._closed: dict[str, _ClosedCamera] = {}

    def __repr__(self) -> str:
        return f"<CameraRegistry {' '.join(f'{n}={c.status().state}' for n, c in self.by_name.items())}>"

    def apply(self, wanted: Mapping[str, CameraConfig]) -> None:
        """Run exactly these cameras; one whose settings are unchanged is not touched.

        A camera whose model is not loaded yet keeps the model that it has, or is opened when its model comes.
        """
        self._wanted = wanted
        enabled = {name: settings for name, settings in wanted.items() if settings.enabled}
        for name, settings in tuple(self._settings.items()):
            if not _is_unchanged(enabled.get(name), settings):
                self._close(name)
        for name, settings in enabled.items():
            if (resizer := self._resizers.get(settings.model or DEFAULT_MODEL)) is None:
                continue
            if name not in self.by_name:
                self._open(name, settings, resizer)
            elif settings.model != self._settings[name].model:
                self.by_name[name].change_input(resizer)
            self._settings[name] = settings

    def begin(self) -> None:
        """Play files and folders: frames can be analysed now."""
        self._start_paused = False
        for camera in self.by_name.values():
            camera.begin()

    def restart(self, name: str) -> None:
        """Close a camera that runs and open it again; its frame numbers continue.

        Raises:
            KeyError: no camera of this name runs.
        """
        settings = self._settings[name]
        self._close(name)
        self._open(name, settings, self._resizers[settings.model or DEFAULT_MODEL])

    def change_input(self, resizer: InputResizer) -> None:
        """Resize pictures for a new model, or for the new input of one, from the next picture on."""
        self._resizers[resizer.model] = resizer
        for name, settings in self._settings.items():
            if (settings.model or DEFAULT_MODEL) == resizer.model:
                self.by_name[name].change_input(resizer)
        self.apply(self._wanted)  # opens the cameras that have waited for this model

    def forget_model(self, model: str) -> None:
        """No camera may use a model any more; call it when none does."""
        self._resizers.pop(model, None)

    def waits_for_model(self, name: str) -> bool:
        """Whether a camera's model is not loaded yet."""
        settings = self._wanted.get(name)
        return settings is not None and (settings.model or DEFAULT_MODEL) not in self._resizers

    def throttle(self, throttles: Mapping[str, Throttle]) -> None:
        """Throttle exactly these cameras, also after they are opened again; the sources stay open."""
        self._throttles = dict(throttles)
        for name, camera in self.by_name.items():
            camera.throttle(self._throttles.get(name, UNTHROTTLED))

    def counts(self) -> dict[str, AdmissionCounts]:
        """Return the counts of the cameras that run, by name."""
        return {name: camera.counts for name, camera in tuple(self.by_name.items())}

    def check_liveness(self) -> None:
        """Detect stale and lost sources; to be called a few times a second."""
        for camera in tuple(self.by_name.values()):
            camera.check_liveness()

    def stop(self) -> None:
        """Stop all cameras; the thread group joins their threads."""
        for camera in self.by_name.values():
            camera.stop()

    def positions(self) -> dict[str, SequencePosition]:
        """Return epoch and next frame number by name, also of cameras that were closed."""
        closed = {name: one.position for name, one in self._closed.items()}
        running = {name: SequencePosition(one.next_sequence, one.epoch) for name, one in self.by_name.items()}
        return closed | running

    def forget_removed(self, configured: Collection[str]) -> list[str]:
        """Forget the cameras that left the configuration an hour ago, and return their names.

        Their positions are on disk by then: `SequenceStore.remember` stores `positions` every few seconds.
        """
        now_ns = self._clock()
        gone = [
            name
            for name, one in self._closed.items()
            if name not in self.by_name and name not in configured and now_ns - one.at_ns >= FORGET_AFTER_NS
        ]
        for name in gone:
            del self._closed[name]
            self._slots.forget(name)
        return gone

    def _open(self, name: str, settings: CameraConfig, resizer: InputResizer) -> None:
        known = self._closed.get(name)
        first = (
            known.position if known else SequencePosition(self._first_sequence(name), self._last_epoch(name))
        )
        camera = Camera(
            name,
            settings.uri,
            resizer.spec,
            self._slots,
            fps=settings.fps,
            first_sequence=first.sequence,
            last_epoch=first.epoch,
            limits=SourceLimits(
                library=settings.decoder,
                transport=settings.transport,
                certificates=_certificates_file(settings.tls),
                redirects=settings.follow_redirects,
                hardware=self._hardware,
                loop=settings.loop,
                extra_codecs=settings.extra_codecs,
                extra_containers=settings.extra_containers,
                spare_threads=self._spare_threads,
            ),
            gate=_gate_settings(settings.gate),
            allocate=resizer.allocate,
            model=resizer.model,
            throttle=self._throttles.get(name, UNTHROTTLED),
            on_change=lambda status: self._changed(camera, status),
            start_paused=self._start_paused,
        )
        self._slots.open(name)
        self.by_name[name], self._settings[name] = camera, settings
        self._thread_group.start(f"camera:{name}", camera.run, vital=False)

    def _close(self, name: str) -> None:
        camera = self.by_name.pop(name)
        del self._settings[name]
        camera.stop()
        self._slots.close_camera(name)
        self._closed[name] = _ClosedCamera(
            SequencePosition(camera.next_sequence, camera.epoch), self._clock()
        )
        log.info("camera %s: closed (changed, removed or to be opened again)", name)

    def _changed(self, camera: Camera, status: CameraStatus) -> None:
        # The state of a camera that was replaced would be shown as that of the new one.
        if self.by_name.get(camera.name, camera) is camera:
            self._on_change(status)


def _is_unchanged(wanted: CameraConfig | None, settings: CameraConfig) -> bool:
    """Whether a camera can stay open: only keys that its source does not use may have changed."""
    unused = {key: getattr(settings, key) for key in ("priority", "model", *SCENE_KEYS)}
    return wanted is not None and wanted.model_copy(update=unused) == settings


def _certificates_file(tls: TlsConfig | None) -> str | None:
    """Return the file of trusted certificates for a camera; None: its certificate is not checked."""
    if tls is None or not tls.verify:
        return None
    system = ssl.get_default_verify_paths()
    return tls.ca_file or system.cafile or system.openssl_cafile


def _gate_settings(settings: GateConfig | None) -> GateSettings | None:
    if settings is None or not settings.enabled:
        return None
    return GateSettings(every_s=settings.every_seconds, sensitivity=settings.sensitivity)


@dataclass(frozen=True, slots=True)
class _SavedPosition:
    position: SequencePosition
    used_s: int


class SequenceStore:
    """The first frame number of each camera, higher than in every earlier run.

    The first number is the time in milliseconds since 1970: it exceeds all earlier numbers even if nothing
    could be stored, because no camera gives 1,000 frames per second for long. The clock of a virtual machine
    can go back, so the last numbers are also stored in `path`; a run whose clock is behind them starts well
    above them. `file.lost` is the reason why the file was set aside, None if it was not.
    """

    def __init__(self, path: Path, wall_clock_s: Callable[[], float] = time.time) -> None:
        self._lock = threading.Lock()
        self.file = StateFile(path, SEQUENCES_SCHEMA)
        self._wall_clock_s = wall_clock_s
        self._kept = self._read()

    def _read(self) -> dict[str, _SavedPosition]:
        """The highest numbers of all files: other versions of the module may have left some."""
        now_s, highest = int(self._wall_clock_s()), dict[str, _SavedPosition]()
        for document in self.file.read(lambda document: _parse_positions(document, now_s)):
            for name, saved in document.items():
                known = highest.get(name, saved)
                highest[name] = max(known, saved, key=lambda one: (one.position.sequence, one.position.epoch))
        return highest

    def first(self, camera: str) -> int:
        """Return the number of the camera's first frame in this run."""
        kept = self._kept.get(camera)
        now = int(self._wall_clock_s() * 1000)
        # Not the larger of clock and stored number + margin: a run that is killed before it stored anything
        # would get the same first number as the next run.
        if kept is None or now > kept.position.sequence:
            return now
        return kept.position.sequence + _SEQUENCE_MARGIN

    def last_epoch(self, camera: str) -> int:
        """Return the epoch that the camera reached in an earlier run; 0 if none is known."""
        kept = self._kept.get(camera)
        return 0 if kept is None else kept.position.epoch

    def remember(self, last: Mapping[str, SequencePosition]) -> None:
        """Store the positions of the cameras; blocks, called every few seconds.

        Drops cameras that were not used for `RETENTION_S`, and the oldest above `MAX_CAMERA_NAMES`.

        Raises:
            OSError: it cannot be written; then the clock alone keeps the numbers rising.
        """
        with self._lock:  # the last call can come while an earlier one waits for the disk
            self._remember(last, int(self._wall_clock_s()))

    def _remember(self, last: Mapping[str, SequencePosition], now_s: int) -> None:
        kept = {name: one for name, one in self._kept.items() if now_s - one.used_s <= RETENTION_S}
        kept |= {name: _SavedPosition(position, now_s) for name, position in last.items()}
        by_age = sorted(kept, key=lambda name: (name in last, kept[name].used_s), reverse=True)
        self._kept = {name: kept[name] for name in sorted(by_age[:MAX_CAMERA_NAMES])}
        self.file.write({"cameras": {n: _position_document(k) for n, k in self._kept.items()}})


def _position_document(kept: _SavedPosition) -> dict[str, int]:
    return {"next": kept.position.sequence, "epoch": kept.position.epoch, "usedAt": kept.used_s}


def _parse_positions(document: Any, now_s: int) -> dict[str, _SavedPosition]:
    """Parse a sequences file; the first version holds only the numbers, by name.

    Raises:
        DamagedStateFileError: it has neither form.
    """
    if not isinstance(document, dict):
        raise DamagedStateFileError("it is not a mapping")
    if "schema" not in document:
        return {
            name: _SavedPosition(SequencePosition(_parse_sequence(last)), now_s)
            for name, last in document.items()
        }
    cameras = document.get("cameras")
    if not isinstance(cameras, dict):
        raise DamagedStateFileError("it has no cameras")
    return {name: _parse_position(entry, now_s) for name, entry in cameras.items()}


def _parse_position(entry: Any, now_s: int) -> _SavedPosition:
    if not isinstance(entry, dict):
        raise DamagedStateFileError("an entry in it is not a mapping")
    position = SequencePosition(_parse_sequence(entry.get("next")), parse_count(entry.get("epoch"), 10**9))
    # A time in the future would keep an entry without limit.
    return _SavedPosition(position, min(now_s, parse_count(entry.get("usedAt"))))


def _parse_sequence(value: Any) -> int:
    return parse_count(value, _MAX_SEQUENCE)
