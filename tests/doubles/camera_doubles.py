"""Doubles for camera tests: a frame recorder, a status recorder, a scripted source and a fake clock."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from clips import numbered_picture
from visionedge.camera.camera import Camera, CameraStatus
from visionedge.camera.sources.base import DecodedPicture, SourceLimits, WholePicture
from visionedge.config.addresses import CameraUri
from visionedge.frames.types import Frame, InputSpec, Picture

SPEC = InputSpec(64, 64)


class FrameRecorder:
    """Records every frame; `taken` is the answer of `wait_taken`, `answer` gives that of `put`."""

    def __init__(self, taken: Callable[[str], bool] = lambda _camera: True) -> None:
        self.answer: Callable[[list[Frame]], bool] = lambda _frames: False
        self.frames: list[Frame] = []
        self.asked = 0
        self.gated = 0
        self._taken = taken
        self._changed = threading.Condition()

    def put(self, frame: Frame) -> bool:
        with self._changed:
            self.frames.append(frame)
            self._changed.notify_all()
        return self.answer(self.frames)

    def count_gated(self, camera: str) -> None:  # noqa: ARG002 - the protocol's
        with self._changed:
            self.gated += 1
            self._changed.notify_all()

    def wait_taken(self, camera: str, timeout_s: float) -> bool:  # noqa: ARG002 - the protocol's
        self.asked += 1
        return self._taken(camera)

    def wait_for(self, wanted: Callable[[list[Frame]], bool], timeout_s: float = 15.0) -> list[Frame]:
        """Wait until the frames meet a condition; returns them."""
        with self._changed:
            assert self._changed.wait_for(lambda: wanted(self.frames), timeout_s), (
                f"the condition was not met within {timeout_s} s: {len(self.frames)} frames"
            )
            return list(self.frames)


class StatusRecorder:
    """An `on_change` callback that records every status."""

    def __init__(self) -> None:
        self.statuses: list[CameraStatus] = []
        self._changed = threading.Condition()

    def __call__(self, status: CameraStatus) -> None:
        with self._changed:
            self.statuses.append(status)
            self._changed.notify_all()

    @property
    def states(self) -> list[str]:
        return [status.state for status in self.statuses]

    def wait_for(self, state: str, timeout_s: float = 15.0) -> CameraStatus:
        """Wait for the first status with this state."""
        with self._changed:
            assert self._changed.wait_for(lambda: state in self.states, timeout_s), self.states
            return next(status for status in self.statuses if status.state == state)


class FakeClock:
    """A monotonic clock in ns that only `wait` advances; `waits_s` records every wait."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000
        self.waits_s: list[float] = []
        self.stop_after_waits: int | None = None

    def __call__(self) -> int:
        return self.now_ns

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Advance the clock at once; sets the event after `stop_after_waits` waits."""
        self.waits_s.append(timeout_s)
        self.now_ns += round(timeout_s * 1e9)
        if self.stop_after_waits is not None and len(self.waits_s) >= self.stop_after_waits:
            event.set()
        return event.is_set()


Step = float | None | Exception
"""A step of a scripted source: a picture of this media time (live: after so many s), its end, or a loss."""


class ScriptedSource:
    """A source that plays steps and then ends."""

    decoder = "scripted"

    def __init__(self, steps: Sequence[Step], *, live: bool = False, clock: FakeClock | None = None) -> None:
        self.live = live
        self.closed = False
        self.converted = 0
        self.wanted: list[float | None] = []
        self._steps = list(steps)
        self._clock = clock
        self._number = 0

    def read(self) -> DecodedPicture | None:
        step = self._steps.pop(0) if self._steps else None
        if step is None:
            return None
        if isinstance(step, Exception):
            raise step
        if self.live and self._clock is not None:
            self._clock.now_ns += round(step * 1e9)
        number, self._number = self._number, self._number + 1

        def picture() -> Picture:
            self.converted += 1
            return numbered_picture(number)

        return WholePicture(picture, 160, 120, None if self.live else step)

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        self.wanted.append(pictures_per_s)

    def interrupt(self) -> None:
        self._steps.clear()

    def close(self) -> None:
        self.closed = True


class ScriptedOpener:
    """Returns prepared sources in turn; raises those that are exceptions."""

    def __init__(self, *sources: ScriptedSource | Exception) -> None:
        self.opened = 0
        self._sources = list(sources)

    def __call__(self, uri: CameraUri, limits: SourceLimits) -> ScriptedSource:  # noqa: ARG002 - the opener's form
        self.opened += 1
        source = self._sources.pop(0)
        if isinstance(source, Exception):
            raise source
        return source


@contextmanager
def running(camera: Camera, end_limit_s: float = 5.0) -> Iterator[Camera]:
    """Run the camera in its own thread; it must end within the limit after `stop`."""
    thread = threading.Thread(target=camera.run, name=f"camera:{camera.name}", daemon=True)
    thread.start()
    try:
        yield camera
    finally:
        camera.stop()
        began_s = time.monotonic()
        thread.join(end_limit_s)
        assert not thread.is_alive(), f"{camera!r} runs on {time.monotonic() - began_s:.1f} s after stop"
