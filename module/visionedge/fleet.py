"""The cameras that run: opened, changed, disabled and removed as the configuration says, each by itself."""

import logging
import os
import ssl
from collections.abc import Callable, Mapping
from typing import Protocol

from visionedge.capture.budget import ThreadBudget
from visionedge.capture.camera import Camera, CameraStatus, Fitting, FrameSink
from visionedge.capture.decoded import Limits
from visionedge.capture.gate import GateSettings
from visionedge.capture.ration import UNTHROTTLED, Counts, Throttle
from visionedge.config import CameraConfig, GateConfig, TlsConfig
from visionedge.threads import Crew

log = logging.getLogger(__name__)


class Slots(FrameSink, Protocol):
    """Where frames go, camera by camera."""

    def open(self, camera: str) -> None:
        """Take frames of a camera from now on."""

    def close_camera(self, camera: str) -> None:
        """Take no more frames of a camera."""


class Fleet:
    """The cameras, by name. `watch` and `counts` may be called by any thread, all else belongs to one.

    Args:
        fitting: the model's input, and where pictures of its size are written.
        slots: take the frames.
        crew: runs a thread for each camera.
        first_sequence: the number of a camera's first frame in this run.
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
        hardware: bool = False,
        held: bool = False,
    ) -> None:
        self.by_name: dict[str, Camera] = {}
        self._fitting, self._slots, self._crew = fitting, slots, crew
        self._first_sequence = first_sequence
        self._on_change = on_change
        self._hardware = hardware
        self._held = held
        # One more thread for each core, whatever the cameras: theirs are waiting most of the time.
        self._spare_threads = ThreadBudget(len(os.sched_getaffinity(0)))
        self._settings: dict[str, CameraConfig] = {}
        self._throttles: Mapping[str, Throttle] = {}
        self._last: dict[str, tuple[int, int]] = {}

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

    def next_sequences(self) -> dict[str, int]:
        """By name, the number that the next frame gets, or would get if the camera still ran."""
        closed = {name: sequence for name, (sequence, _) in self._last.items()}
        return closed | {name: camera.next_sequence for name, camera in self.by_name.items()}

    def _open(self, name: str, settings: CameraConfig) -> None:
        next_sequence, epoch = self._last.get(name, (0, 0))
        camera = Camera(
            name,
            settings.uri,
            self._fitting.spec,
            self._slots,
            fps=settings.fps,
            first_sequence=next_sequence or self._first_sequence(name),
            last_epoch=epoch,
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
        self._last[name] = (camera.next_sequence, camera.epoch)
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
