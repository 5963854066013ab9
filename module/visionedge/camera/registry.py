"""The cameras that run: opened, changed, disabled and removed as the configuration says, each by itself."""

import logging
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from visionedge.camera.camera import Camera, CameraStatus, Fitting, FrameSink
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.ration import UNTHROTTLED, Counts, Throttle
from visionedge.camera.sequences import Position
from visionedge.camera.sources.base import Limits
from visionedge.camera.sources.budget import ThreadBudget
from visionedge.config.schema import CameraConfig, GateConfig, TlsConfig
from visionedge.runtime.process_limits import bounded_cores
from visionedge.runtime.threads import Crew

log = logging.getLogger(__name__)

GONE_NS = 3600 * 1_000_000_000
"""So long after it left the configuration a camera's counters and metrics go."""


class Slots(FrameSink, Protocol):
    """Where frames go, camera by camera."""

    def open(self, camera: str) -> None:
        """Take frames of a camera from now on."""

    def close_camera(self, camera: str) -> None:
        """Take no more frames of a camera."""

    def forget(self, camera: str) -> None:
        """Let go of a closed camera's counters."""


@dataclass(frozen=True, slots=True)
class _Closed:
    """A camera that was closed: where it was, and the monotonic time."""

    position: Position
    at_ns: int


class Fleet:
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
        fitting: Fitting,
        slots: Slots,
        crew: Crew,
        *,
        first_sequence: Callable[[str], int],
        on_change: Callable[[CameraStatus], None],
        last_epoch: Callable[[str], int] = lambda _name: 0,
        hardware: bool = False,
        held: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.by_name: dict[str, Camera] = {}
        self._fitting, self._slots, self._crew = fitting, slots, crew
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
        self._closed: dict[str, _Closed] = {}

    def __repr__(self) -> str:
        return f"<Fleet {' '.join(f'{n}={c.status().state}' for n, c in self.by_name.items())}>"

    def apply(self, wanted: Mapping[str, CameraConfig]) -> None:
        """Run these cameras and no others; one whose settings stay as they are is not touched."""
        enabled = {name: settings for name, settings in wanted.items() if settings.enabled}
        for name in [n for n, settings in self._settings.items() if not _same(enabled.get(n), settings)]:
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

    def refit(self, fitting: Fitting) -> None:
        """Bring the pictures of all cameras to the input of another model, from the next one on."""
        self._fitting = fitting
        for camera in self.by_name.values():
            camera.refit(fitting)

    def ease(self, throttles: Mapping[str, Throttle]) -> None:
        """Throttle these cameras and no others, also when they are opened again; none is opened for that."""
        self._throttles = dict(throttles)
        for name, camera in self.by_name.items():
            camera.ease(self._throttles.get(name, UNTHROTTLED))

    def counts(self) -> dict[str, Counts]:
        """By name, how many pictures a camera that runs was asked for since it was opened."""
        return {name: camera.counts for name, camera in tuple(self.by_name.items())}

    def watch(self) -> None:
        """Let each camera notice what its own thread cannot; to be called a few times a second."""
        for camera in tuple(self.by_name.values()):
            camera.watch()

    def stop(self) -> None:
        """Let all cameras end; their threads are the crew's."""
        for camera in self.by_name.values():
            camera.stop()

    def positions(self) -> dict[str, Position]:
        """By name, the epoch and the number of the next frame, also of cameras that were closed."""
        closed = {name: one.position for name, one in self._closed.items()}
        running = {name: Position(one.next_sequence, one.epoch) for name, one in self.by_name.items()}
        return closed | running

    def forget_gone(self, configured: Collection[str]) -> list[str]:
        """Let go of the cameras that left the configuration an hour ago; which ones these are.

        Where they were is on disk by then (`positions` was remembered while they were known here).
        """
        now_ns = self._clock()
        gone = [
            name
            for name, one in self._closed.items()
            if name not in self.by_name and name not in configured and now_ns - one.at_ns >= GONE_NS
        ]
        for name in gone:
            del self._closed[name]
            self._slots.forget(name)
        return gone

    def _open(self, name: str, settings: CameraConfig) -> None:
        known = self._closed.get(name)
        first = known.position if known else Position(self._first_sequence(name), self._last_epoch(name))
        camera = Camera(
            name,
            settings.uri,
            self._fitting.spec,
            self._slots,
            fps=settings.fps,
            first_sequence=first.sequence,
            last_epoch=first.epoch,
            limits=Limits(
                library=settings.decoder,
                transport=settings.transport,
                certificates=_certificates(settings.tls),
                redirects=settings.follow_redirects,
                hardware=self._hardware,
                loop=settings.loop,
                spare_threads=self._spare_threads,
            ),
            gate=_gate(settings.gate),
            allocate=self._fitting.allocate,
            throttle=self._throttles.get(name, UNTHROTTLED),
            on_change=lambda status: self._changed(camera, status),
            held=self._held,
        )
        self._slots.open(name)
        self.by_name[name], self._settings[name] = camera, settings
        self._crew.start(f"camera:{name}", camera.run, vital=False)

    def _close(self, name: str) -> None:
        camera = self.by_name.pop(name)
        del self._settings[name]
        camera.stop()
        self._slots.close_camera(name)
        self._closed[name] = _Closed(Position(camera.next_sequence, camera.epoch), self._clock())
        log.info("camera %s is closed: it was changed, taken away or is to be opened anew", name)

    def _changed(self, camera: Camera, status: CameraStatus) -> None:
        # The end of one that has a successor would be read as the end of that.
        if self.by_name.get(camera.name, camera) is camera:
            self._on_change(status)


def _same(wanted: CameraConfig | None, settings: CameraConfig) -> bool:
    """Whether a camera can stay open; its priority is nothing that it knows of."""
    return wanted is not None and wanted.model_copy(update={"priority": settings.priority}) == settings


def _certificates(tls: TlsConfig | None) -> str | None:
    """The file with the certificates that a camera's has to come from; None: it is not checked."""
    if tls is None or not tls.verify:
        return None
    system = ssl.get_default_verify_paths()
    return tls.ca_file or system.cafile or system.openssl_cafile


def _gate(settings: GateConfig | None) -> GateSettings | None:
    if settings is None or not settings.enabled:
        return None
    return GateSettings(every_s=settings.every_seconds, sensitivity=settings.sensitivity)
