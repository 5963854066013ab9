"""The cameras that run: opened, changed, disabled and removed as the configuration says, each by itself."""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from visionedge.camera.camera import Camera, CameraStatus, FrameSink, InputResizer
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.sources.base import SourceLimits, ThreadBudget
from visionedge.camera.timing import UNTHROTTLED, AdmissionCounts, Throttle
from visionedge.config.schema import CameraConfig, GateConfig, TlsConfig
from visionedge.runtime.files import DamagedStateFileError, parse_count, read_json, set_aside, write_json
from visionedge.runtime.process_limits import bounded_cores
from visionedge.runtime.threads import ThreadGroup

# Sequence numbers and epochs that never repeat for a camera, whatever happened to the module before.


log = logging.getLogger(__name__)

MAX_CAMERA_NAMES = 10_000
"""Cameras whose last numbers are kept; those that ran longest ago go first."""

RETENTION_S = 400 * 86_400

_MAX_SEQUENCE = 10**14
"""As milliseconds the year 5138; a larger number is damage, and would soon be more than JSON carries."""

_SCHEMA = "visionedge/sequences/2"
_SEQUENCE_MARGIN = 100_000
"""More frames than a camera gives between two calls of `remember`."""


@dataclass(frozen=True, slots=True)
class SequencePosition:
    """Where a camera is: the number of its next frame, and its epoch."""

    sequence: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class _SavedPosition:
    position: SequencePosition
    used_s: int


class SequenceStore:
    """Where each camera's numbers start.

    The first number of a run is the time in milliseconds since 1970, so that it rises above all earlier runs
    even where nothing could be kept (no camera gives 1,000 frames a second for ever). The clock of a virtual
    machine can go back, so the last numbers are kept in `path` as well: where the clock is behind them, a run
    starts well above them. `lost` says why the file was set aside, None where it was not.
    """

    def __init__(self, path: Path, wall_clock_s: Callable[[], float] = time.time) -> None:
        self.lost: str | None = None
        self._lock = threading.Lock()
        self.path = path
        self._wall_clock_s = wall_clock_s
        self._kept = self._read()

    def _read(self) -> dict[str, _SavedPosition]:
        try:
            return _parse_positions(read_json(self.path), int(self._wall_clock_s()))
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("%s cannot be read (%s): numbers start from the clock", self.path, error.strerror)
        except DamagedStateFileError as error:
            self._set_aside(str(error))
        return {}

    def _set_aside(self, why: str) -> None:
        self.lost = why
        try:
            set_aside(self.path)
        except OSError as error:
            self.lost = f"{why}; it cannot be moved: {error.strerror or error}"
        log.warning("%s is damaged (%s): numbers start from the clock", self.path, self.lost)

    def first(self, camera: str) -> int:
        """The number of the camera's first frame in this run."""
        kept = self._kept.get(camera)
        now = int(self._wall_clock_s() * 1000)
        # Not the larger of the two: a run that is killed before it could keep anything would be given the
        # same number above the kept one as the next run.
        if kept is None or now > kept.position.sequence:
            return now
        return kept.position.sequence + _SEQUENCE_MARGIN

    def last_epoch(self, camera: str) -> int:
        """The epoch that the camera reached before; 0 where nothing is known."""
        kept = self._kept.get(camera)
        return 0 if kept is None else kept.position.epoch

    def remember(self, last: Mapping[str, SequencePosition]) -> None:
        """Keep where the cameras are on disk (atomically); called off the loop, every few seconds.

        What has not been used for `RETENTION_S` goes, and the oldest of more than `MAX_CAMERA_NAMES`.

        Raises:
            OSError: the folder cannot be written; the clock alone protects the numbers then.
        """
        with self._lock:  # the last call may come while one before it still waits for the disk
            self._remember(last, int(self._wall_clock_s()))

    def _remember(self, last: Mapping[str, SequencePosition], now_s: int) -> None:
        kept = {name: one for name, one in self._kept.items() if now_s - one.used_s <= RETENTION_S}
        kept |= {name: _SavedPosition(position, now_s) for name, position in last.items()}
        by_age = sorted(kept, key=lambda name: (name in last, kept[name].used_s), reverse=True)
        self._kept = {name: kept[name] for name in sorted(by_age[:MAX_CAMERA_NAMES])}
        write_json(
            self.path,
            {"schema": _SCHEMA, "cameras": {n: _position_document(k) for n, k in self._kept.items()}},
        )


def _position_document(kept: _SavedPosition) -> dict[str, int]:
    return {"next": kept.position.sequence, "epoch": kept.position.epoch, "usedAt": kept.used_s}


def _parse_positions(document: Any, now_s: int) -> dict[str, _SavedPosition]:
    """What a file says; one of an earlier version has only the numbers, by name.

    Raises:
        DamagedError: it is neither.
    """
    if not isinstance(document, dict):
        raise DamagedStateFileError("it is no mapping")
    if "schema" not in document:
        return {
            name: _SavedPosition(SequencePosition(_parse_sequence(last)), now_s)
            for name, last in document.items()
        }
    cameras = document.get("cameras")
    if document["schema"] != _SCHEMA or not isinstance(cameras, dict):
        raise DamagedStateFileError("its schema is not known here")
    return {name: _parse_position(entry, now_s) for name, entry in cameras.items()}


def _parse_position(entry: Any, now_s: int) -> _SavedPosition:
    if not isinstance(entry, dict):
        raise DamagedStateFileError("an entry in it is no mapping")
    position = SequencePosition(_parse_sequence(entry.get("next")), parse_count(entry.get("epoch"), 10**9))
    # A time in the future would keep an entry for ever.
    return _SavedPosition(position, min(now_s, parse_count(entry.get("usedAt"))))


def _parse_sequence(value: Any) -> int:
    return parse_count(value, _MAX_SEQUENCE)


FORGET_AFTER_NS = 3600 * 1_000_000_000
"""So long after it left the configuration a camera's counters and metrics go."""


class FrameSlots(FrameSink, Protocol):
    """Where frames go, camera by camera."""

    def open(self, camera: str) -> None:
        """Take frames of a camera from now on."""

    def close_camera(self, camera: str) -> None:
        """Take no more frames of a camera."""

    def forget(self, camera: str) -> None:
        """Let go of a closed camera's counters."""


@dataclass(frozen=True, slots=True)
class _ClosedCamera:
    """A camera that was closed: where it was, and the monotonic time."""

    position: SequencePosition
    at_ns: int


class CameraRegistry:
    """The cameras, by name. `watch` and `counts` may be called by any thread, all else belongs to one.

    Args:
        fitting: the model's input, and where pictures of its size are written.
        slots: take the frames.
        crew: runs a thread for each camera.
        first_sequence: the number of a camera's first frame in this run.
        last_epoch: the epoch that a camera reached in an earlier run.
        on_change: told of each change of a camera's state, from any thread.
        hardware: videos may be decoded on a GPU.
        held: files and folders are not played before `begin`.
    """

    def __init__(
        self,
        resizer: InputResizer,
        slots: FrameSlots,
        thread_group: ThreadGroup,
        *,
        first_sequence: Callable[[str], int],
        on_change: Callable[[CameraStatus], None],
        last_epoch: Callable[[str], int] = lambda _name: 0,
        hardware: bool = False,
        held: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.by_name: dict[str, Camera] = {}
        self._resizer, self._slots, self._thread_group = resizer, slots, thread_group
        self._first_sequence = first_sequence
        self._last_epoch = last_epoch
        self._clock = clock
        self._on_change = on_change
        self._hardware = hardware
        self._held = held
        # One more thread for each core, whatever the cameras: theirs are waiting most of the time.
        self._spare_threads = ThreadBudget(bounded_cores())
        self._settings: dict[str, CameraConfig] = {}
        self._throttles: Mapping[str, Throttle] = {}
        self._closed: dict[str, _ClosedCamera] = {}

    def __repr__(self) -> str:
        return f"<Fleet {' '.join(f'{n}={c.status().state}' for n, c in self.by_name.items())}>"

    def apply(self, wanted: Mapping[str, CameraConfig]) -> None:
        """Run these cameras and no others; one whose settings stay as they are is not touched."""
        enabled = {name: settings for name, settings in wanted.items() if settings.enabled}
        for name in [
            n for n, settings in self._settings.items() if not _is_unchanged(enabled.get(n), settings)
        ]:
            self._close(name)
        for name, settings in enabled.items():
            if name not in self.by_name:
                self._open(name, settings)

    def begin(self) -> None:
        """Frames can be analysed now: files and folders begin to play."""
        self._held = False
        for camera in self.by_name.values():
            camera.begin()

    def restart(self, name: str) -> None:
        """Close a camera that runs and open it anew, as if it had been lost; its numbers go on.

        Raises:
            KeyError: no such camera runs.
        """
        settings = self._settings[name]
        self._close(name)
        self._open(name, settings)

    def change_input(self, resizer: InputResizer) -> None:
        """Bring the pictures of all cameras to the input of another model, from the next one on."""
        self._resizer = resizer
        for camera in self.by_name.values():
            camera.change_input(resizer)

    def throttle(self, throttles: Mapping[str, Throttle]) -> None:
        """Throttle these cameras and no others, also when they are opened again; none is opened for that."""
        self._throttles = dict(throttles)
        for name, camera in self.by_name.items():
            camera.throttle(self._throttles.get(name, UNTHROTTLED))

    def counts(self) -> dict[str, AdmissionCounts]:
        """By name, how many pictures a camera that runs was asked for since it was opened."""
        return {name: camera.counts for name, camera in tuple(self.by_name.items())}

    def check_liveness(self) -> None:
        """Let each camera notice what its own thread cannot; to be called a few times a second."""
        for camera in tuple(self.by_name.values()):
            camera.check_liveness()

    def stop(self) -> None:
        """Let all cameras end; their threads are the crew's."""
        for camera in self.by_name.values():
            camera.stop()

    def positions(self) -> dict[str, SequencePosition]:
        """By name, the epoch and the number of the next frame, also of cameras that were closed."""
        closed = {name: one.position for name, one in self._closed.items()}
        running = {name: SequencePosition(one.next_sequence, one.epoch) for name, one in self.by_name.items()}
        return closed | running

    def forget_removed(self, configured: Collection[str]) -> list[str]:
        """Let go of the cameras that left the configuration an hour ago; which ones these are.

        Where they were is on disk by then (`positions` was remembered while they were known here).
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

    def _open(self, name: str, settings: CameraConfig) -> None:
        known = self._closed.get(name)
        first = (
            known.position if known else SequencePosition(self._first_sequence(name), self._last_epoch(name))
        )
        camera = Camera(
            name,
            settings.uri,
            self._resizer.spec,
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
                spare_threads=self._spare_threads,
            ),
            gate=_gate_settings(settings.gate),
            allocate=self._resizer.allocate,
            throttle=self._throttles.get(name, UNTHROTTLED),
            on_change=lambda status: self._changed(camera, status),
            held=self._held,
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
        log.info("camera %s is closed: it was changed, taken away or is to be opened anew", name)

    def _changed(self, camera: Camera, status: CameraStatus) -> None:
        # The end of one that has a successor would be read as the end of that.
        if self.by_name.get(camera.name, camera) is camera:
            self._on_change(status)


def _is_unchanged(wanted: CameraConfig | None, settings: CameraConfig) -> bool:
    """Whether a camera can stay open; its priority is nothing that it knows of."""
    return wanted is not None and wanted.model_copy(update={"priority": settings.priority}) == settings


def _certificates_file(tls: TlsConfig | None) -> str | None:
    """The file with the certificates that a camera's has to come from; None: it is not checked."""
    if tls is None or not tls.verify:
        return None
    system = ssl.get_default_verify_paths()
    return tls.ca_file or system.cafile or system.openssl_cafile


def _gate_settings(settings: GateConfig | None) -> GateSettings | None:
    if settings is None or not settings.enabled:
        return None
    return GateSettings(every_s=settings.every_seconds, sensitivity=settings.sensitivity)
