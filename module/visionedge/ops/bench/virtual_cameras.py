"""Virtual cameras: a file or a synthetic source whose pictures arrive when a camera would send them.

The age of a result counts from the moment when its picture was due, not from the moment when the picture was
decoded. So a pipeline that falls behind cannot hide its delay by reading later.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from visionedge.camera.camera import FrameSink
from visionedge.camera.sources.base import DecodedPicture, FrameSource, WholePicture
from visionedge.errors import ConfigError
from visionedge.frames.types import Frame, Picture

_SYNTHETIC = re.compile(r"synthetic:(\d{2,5})x(\d{2,5})@(\d+(?:\.\d+)?)")
_SYNTHETIC_PICTURES = 8
_MAX_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StampedFrame(Frame):
    """A frame with the duration of its decoding and the time when it reached the batcher."""

    decode_ns: int
    put_ns: int


class VirtualCamera:
    """One camera of a load: wraps the source that it plays, and is the sink of its frames.

    With `scheduled` a picture is held back until its media time; else pictures come as the source gives them
    and are only stamped. The camera's thread calls everything but `interrupt`.
    """

    def __init__(
        self,
        sink: FrameSink,
        *,
        scheduled: bool,
        clock: Callable[[], int] = time.monotonic_ns,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self.scheduled = scheduled
        self._sink = sink
        self._clock = clock
        self._wait = wait
        self._start_ns: int | None = None
        self._read_ns = 0
        self._fill_from_ns = 0
        self._due_ns: int | None = None

    def wrap_source(self, source: FrameSource) -> FrameSource:
        """The source, with the schedule of this camera."""
        return _ScheduledSource(self, source)

    # --- between the source and the camera ------------------------------------------------------------------

    def read_when_due(
        self, read: Callable[[], DecodedPicture | None], stop: threading.Event
    ) -> DecodedPicture | None:
        """Read the next picture and hold it back until it is due; None when the source ended or stopped."""
        began_ns = self._clock()
        decoded = read()
        self._fill_from_ns = self._clock()
        self._read_ns = self._fill_from_ns - began_ns
        if decoded is None or not self.scheduled or decoded.position_s is None:
            self._due_ns = None
            return decoded
        if self._start_ns is None:
            self._start_ns = began_ns - round(decoded.position_s * 1e9)
        self._due_ns = self._start_ns + round(decoded.position_s * 1e9)
        decoded.position_s = None  # else the camera would hold the picture back once more
        # The picture is decoded already, but a camera would have sent it at `due` and decoding would follow.
        early_ns = self._due_ns + self._read_ns - self._clock()
        if early_ns > 0:
            self._wait(stop, early_ns / 1e9)
        self._fill_from_ns = self._clock()
        return None if stop.is_set() else decoded

    # --- between the camera and the batcher -----------------------------------------------------------------

    def put(self, frame: Frame) -> None:
        """See `FrameSink.put`."""
        now_ns = self._clock()
        values = {each.name: getattr(frame, each.name) for each in fields(Frame)}
        if self._due_ns is not None:
            values["captured_ns"] = self._due_ns
        decode_ns = self._read_ns + now_ns - self._fill_from_ns
        self._sink.put(StampedFrame(**values, decode_ns=decode_ns, put_ns=now_ns))

    def count_gated(self, camera: str) -> None:
        """See `FrameSink.gate`."""
        self._sink.count_gated(camera)

    def wait_taken(self, camera: str, timeout_s: float) -> bool:
        """See `FrameSink.wait_taken`."""
        return self._sink.wait_taken(camera, timeout_s)


class _ScheduledSource:
    """A source that holds each picture back until the camera's schedule releases it."""

    def __init__(self, camera: VirtualCamera, source: FrameSource) -> None:
        self._camera = camera
        self._source = source
        self._stop = threading.Event()
        self.live = source.live or camera.scheduled
        self.decoder = source.decoder

    def read(self) -> DecodedPicture | None:
        """See `FrameSource.read`."""
        return self._camera.read_when_due(self._source.read, self._stop)

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `FrameSource.set_wanted_rate`."""
        self._source.set_wanted_rate(pictures_per_s)

    def interrupt(self) -> None:
        """See `FrameSource.interrupt`."""
        self._stop.set()
        self._source.interrupt()

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._source.close()


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """The size of a synthetic camera in px and its pictures per second."""

    width_px: int
    height_px: int
    fps: float

    @staticmethod
    def parse(text: str) -> "SyntheticSpec | None":
        """Parse ``synthetic:1280x720@30``; None if the text does not begin with ``synthetic:``.

        Raises:
            ConfigError: the text after ``synthetic:`` is not valid.
        """
        if not text.startswith("synthetic:"):
            return None
        found = _SYNTHETIC.fullmatch(text)
        if found is None or float(found[3]) <= 0 or int(found[1]) * int(found[2]) > _MAX_PIXELS:
            raise ConfigError([f"--source {text}: write a synthetic camera as synthetic:WIDTHxHEIGHT@FPS"])
        return SyntheticSpec(int(found[1]), int(found[2]), float(found[3]))


class SyntheticSource:
    """An endless source without decoding cost: a bright bar that moves over noise."""

    live = False
    decoder = "synthetic"

    def __init__(self, spec: SyntheticSpec, pictures: list[Picture] | None = None) -> None:
        self._spec = spec
        self._pictures = pictures or make_synthetic_pictures(spec)
        self._count = 0
        self._ended = False

    def read(self) -> DecodedPicture | None:
        """See `FrameSource.read`."""
        if self._ended:
            return None
        picture = self._pictures[self._count % len(self._pictures)]
        position_s = self._count / self._spec.fps
        self._count += 1
        return WholePicture(lambda: picture, self._spec.width_px, self._spec.height_px, position_s)

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `FrameSource.set_wanted_rate`: there is no decoding to save."""

    def interrupt(self) -> None:
        """See `FrameSource.interrupt`."""
        self._ended = True

    def close(self) -> None:
        """See `FrameSource.close`."""


def make_synthetic_pictures(spec: SyntheticSpec) -> list[Picture]:
    """The pictures of a synthetic camera; all cameras of a load may share them."""
    return list(_pictures(spec))


def _pictures(spec: SyntheticSpec) -> Iterator[Picture]:
    noise = np.random.default_rng(1).integers(0, 64, (spec.height_px, spec.width_px, 3), np.uint8)
    step_px = max(1, spec.width_px // _SYNTHETIC_PICTURES)
    for number in range(_SYNTHETIC_PICTURES):
        picture = noise.copy()
        picture[:, number * step_px : (number + 1) * step_px] = 230
        yield picture
