"""Virtual cameras: pictures that come when a camera would send them, whether anybody keeps up or not.

Ages are counted from the moment a picture was due, not from when somebody got round to decoding it: a
pipeline that falls behind cannot hide that by reading later.
"""

import random
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
_DROPOUT_S = (1.0, 3.0)
_MAX_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StampedFrame(Frame):
    """A frame of which is known how long its decoding took, and when it reached the batcher."""

    decode_ns: int
    put_ns: int


class ArrivalSchedule:
    """When the pictures of a camera arrive: evenly, with jitter, in order, and with drop-outs.

    Args:
        seed: another one for each camera; the same one gives the same arrivals.
        jitter_s: each picture comes up to so much early or late.
        dropouts_s: a drop-out begins after so many seconds on average; None: never. It lasts 1 to 3 s, and
            what it held back comes all at once when it ends, as networks do it.
    """

    def __init__(self, seed: int, *, jitter_s: float = 0.0, dropouts_s: float | None = None) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a load that can be repeated, no secret
        self._jitter_s = jitter_s
        self._every_s = dropouts_s
        self._last_s = 0.0
        self._dropout = self._next_dropout(0.0)

    def at_s(self, position_s: float) -> float:
        """When the picture of this media time arrives, in s after the start; never before the last one."""
        due_s = position_s + self._random.uniform(-self._jitter_s, self._jitter_s)
        while self._dropout is not None and due_s >= self._dropout[1]:
            self._dropout = self._next_dropout(self._dropout[1])
        if self._dropout is not None and due_s >= self._dropout[0]:
            due_s = self._dropout[1]
        self._last_s = max(self._last_s, due_s)
        return self._last_s

    def _next_dropout(self, after_s: float) -> tuple[float, float] | None:
        if self._every_s is None:
            return None
        begin_s = after_s + self._random.expovariate(1 / self._every_s)
        return begin_s, begin_s + self._random.uniform(*_DROPOUT_S)


class VirtualCamera:
    """One camera of a load: the `source` it is to play, and the `sink` that its frames go to.

    Without `arrivals` pictures come as the source gives them, and are only stamped. All but `interrupt` is
    called by the camera's thread.
    """

    def __init__(
        self,
        sink: FrameSink,
        arrivals: ArrivalSchedule | None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self.scheduled = arrivals is not None
        self._sink = sink
        self._arrivals = arrivals
        self._clock = clock
        self._wait = wait
        self._start_ns: int | None = None
        self._read_ns = 0
        self._fill_from_ns = 0
        self._due_ns: int | None = None

    def wrap_source(self, source: FrameSource) -> FrameSource:
        """The source as it arrives."""
        return _ScheduledSource(self, source)

    # --- between the source and the camera ------------------------------------------------------------------

    def read_when_due(
        self, read: Callable[[], DecodedPicture | None], stop: threading.Event
    ) -> DecodedPicture | None:
        """Read the next picture, and hold it back until it is due."""
        began_ns = self._clock()
        decoded = read()
        self._fill_from_ns = self._clock()
        self._read_ns = self._fill_from_ns - began_ns
        if decoded is None or self._arrivals is None or decoded.position_s is None:
            self._due_ns = None
            return decoded
        if self._start_ns is None:
            self._start_ns = began_ns - round(decoded.position_s * 1e9)
        self._due_ns = self._start_ns + round(self._arrivals.at_s(decoded.position_s) * 1e9)
        decoded.position_s = None  # the camera is to take it as it comes
        # It was decoded ahead of its time; a camera would have sent it only now, and decoding would follow.
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
    """A source whose pictures come when they are due."""

    def __init__(self, camera: VirtualCamera, source: FrameSource) -> None:
        self._camera = camera
        self._source = source
        self._stop = threading.Event()
        self.live = source.live or camera.scheduled
        self.decoder = source.decoder

    def read(self) -> DecodedPicture | None:
        """See `Source.read`."""
        return self._camera.read_when_due(self._source.read, self._stop)

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `Source.want`."""
        self._source.set_wanted_rate(pictures_per_s)

    def interrupt(self) -> None:
        """See `Source.interrupt`."""
        self._stop.set()
        self._source.interrupt()

    def close(self) -> None:
        """See `Source.close`."""
        self._source.close()


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """A made-up camera: its size in px and its pictures per second."""

    width_px: int
    height_px: int
    fps: float

    @staticmethod
    def parse(text: str) -> "SyntheticSpec | None":
        """Out of ``synthetic:1280x720@30``; None where the text names another kind of source.

        Raises:
            ConfigError: it is meant to be one and is not.
        """
        if not text.startswith("synthetic:"):
            return None
        found = _SYNTHETIC.fullmatch(text)
        if found is None or float(found[3]) <= 0 or int(found[1]) * int(found[2]) > _MAX_PIXELS:
            raise ConfigError([f"--source {text}: a synthetic camera is synthetic:WIDTHxHEIGHT@FPS"])
        return SyntheticSpec(int(found[1]), int(found[2]), float(found[3]))


class SyntheticSource:
    """Pictures that cost nothing to decode: a bright bar that wanders over noise, for ever."""

    live = False
    decoder = "synthetic"

    def __init__(self, spec: SyntheticSpec, pictures: list[Picture] | None = None) -> None:
        self._spec = spec
        self._pictures = pictures or make_synthetic_pictures(spec)
        self._count = 0
        self._ended = False

    def read(self) -> DecodedPicture | None:
        """See `Source.read`."""
        if self._ended:
            return None
        picture = self._pictures[self._count % len(self._pictures)]
        position_s = self._count / self._spec.fps
        self._count += 1
        return WholePicture(lambda: picture, self._spec.width_px, self._spec.height_px, position_s)

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `Source.want`: nothing is decoded anyway."""

    def interrupt(self) -> None:
        """See `Source.interrupt`."""
        self._ended = True

    def close(self) -> None:
        """See `Source.close`."""


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
