"""A camera: opens its source, reads it, stamps what comes, and tries again when it is lost."""

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, Protocol

from visionedge.camera.freeze_detection import ContentWatch
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.sources.base import Decoded, Limits, Source, waiting_since_s
from visionedge.camera.sources.diagnosis import silent
from visionedge.camera.sources.open import open_source
from visionedge.camera.timing import UNTHROTTLED, Backoff, Counts, Pace, Rate, Ration, Throttle
from visionedge.config.addresses import CameraUri, parse_camera_uri
from visionedge.errors import DamagedError, SourceError, VisionedgeError
from visionedge.frames.types import Frame, InputSpec, Picture, Placement, utc_now
from visionedge.runtime.redaction import masked_address, redact

# What a camera is doing: as it is shown, and as the camera itself keeps it.


State = Literal[
    "connecting",
    "waiting",
    "live",
    "stale",
    "frozen",
    "black",
    "reconnecting",
    "failed",
    "ended",
    "stopped",
]

CONNECTED: frozenset[State] = frozenset({"live", "stale", "frozen", "black"})
"""The states of a camera that is connected, whatever it shows."""

_STALE_NS = 2_000_000_000
_STALE_GAPS = 3
_GAPS = 64
"""Longest of so many distances between pictures: what is usual for a camera."""

_GAPS_KNOWN = 8
"""The first pictures come in a row, as the decoder kept them while it learnt what the stream is."""


@dataclass(frozen=True, slots=True)
class CameraStatus:
    """What a camera is doing, safe to show: `uri` and `last_error` are redacted.

    `state`: `connecting` (first try); `waiting` (a file or folder, until frames can be analysed); when
    connected `live`, `stale` (nothing has come for a while), `frozen` (the picture does not change at all),
    `black`; `reconnecting` (was connected, is lost), `failed` (never was connected yet, is tried again),
    `ended` (a file or folder has been played), `stopped`. `since_ns` is
    monotonic. `epoch` is 0 before the first picture. `frames_read` counts pictures that were read, handed on
    or not; `fps` is the rate of the source over the last 5 s, pictures included that need not be decoded;
    `age_ms` is how long ago the newest came. `width` and `height` are in px, 0 before the first picture.
    `next_try_s` is how long it still waits before it opens its source again, None unless it waits for that.
    """

    name: str
    uri: str
    state: State
    since_ns: int
    epoch: int
    frames_read: int
    fps: float
    age_ms: float | None
    last_error: str | None
    width: int
    height: int
    decoder: str | None
    next_try_s: float | None


@dataclass(slots=True)
class Progress:
    """How far a camera has come; written by its own thread alone."""

    since_ns: int
    epoch: int
    next_sequence: int
    state: State = "connecting"
    connected_ns: int = 0
    frames_read: int = 0
    newest_ns: int | None = None
    heard_ns: int | None = None
    gaps_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_GAPS))
    live: bool = False
    lost_ns: int | None = None
    next_try_ns: int | None = None
    last_error: str | None = None
    size_px: tuple[int, int] = (0, 0)
    decoder: str | None = None
    rate: Rate = field(default_factory=Rate)

    def note(self, decoded: Decoded, now_ns: int) -> None:
        """A picture was read."""
        if self.heard_ns is not None:
            self.gaps_ns.append(now_ns - self.heard_ns)
        self.frames_read += 1
        self.newest_ns = self.heard_ns = now_ns
        self.size_px = (decoded.width_px, decoded.height_px)
        self.rate.add(now_ns, decoded.covers)

    def begin(self) -> None:
        """Another connection begins: what was usual on the one before says nothing about it."""
        self.heard_ns = None
        self.gaps_ns.clear()

    def patience_ns(self, least_ns: int, first_ns: int) -> int:
        """How long a camera may be silent, which is more than its pictures usually lie apart.

        Args:
            least_ns: for a camera of many pictures per second.
            first_ns: while its rate is not known.
        """
        least_ns = least_ns if len(self.gaps_ns) >= _GAPS_KNOWN else first_ns
        return max(least_ns, _STALE_GAPS * max(self.gaps_ns, default=0))

    def stale(self, now_ns: int, first_ns: int) -> bool:
        """Whether a source that sets the pace itself is silent, for longer than its pictures lie apart."""
        if not self.live or self.heard_ns is None or self.state not in CONNECTED:
            return False
        return now_ns - self.heard_ns > self.patience_ns(_STALE_NS, first_ns)

    def shown(self, name: str, uri: str, now_ns: int, *, stale: bool) -> CameraStatus:
        """As it is shown; `uri` without secrets."""
        return CameraStatus(
            name=name,
            uri=uri,
            state="stale" if stale else self.state,
            since_ns=self.since_ns,
            epoch=self.epoch,
            frames_read=self.frames_read,
            fps=round(self.rate.per_s(now_ns), 2),
            age_ms=None if self.newest_ns is None else (now_ns - self.newest_ns) / 1e6,
            last_error=self.last_error,
            width=self.size_px[0],
            height=self.size_px[1],
            decoder=self.decoder,
            next_try_s=None if self.next_try_ns is None else max(0.0, (self.next_try_ns - now_ns) / 1e9),
        )


# Work of a decoder on a thread that can be left behind, because a decoder cannot be interrupted.


class Attempt:
    """One connection of a camera. `take` belongs to one thread, `give_up` may be called by any.

    Args:
        name: of its thread.
        work: opens and plays a source; it looks at `left` after each step that may have taken long, and then
            closes what it opened and returns.
    """

    def __init__(self, name: str, work: "Callable[[Attempt], None]") -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._settled = threading.Event()
        self._lock = threading.Lock()
        self._left = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Attempt {self._thread.name} settled={self._settled.is_set()}>"

    @property
    def left(self) -> bool:
        """Whether `take` has returned, or is about to, before the work ended."""
        return self._left

    def take(self) -> None:
        """Do the work and wait for its end, or until it is given up.

        Raises:
            Exception: what the work raised, or what it was given up with.
        """
        self._thread.start()
        self._settled.wait()
        if self._error is not None:
            raise self._error

    def give_up(self, error: Exception | None = None) -> None:
        """Let `take` return at once, or raise this; too late where the work has ended."""
        with self._lock:
            if not self._settled.is_set():
                self._left, self._error = True, error
                self._settled.set()

    def linger(self, timeout_s: float) -> None:
        """After it was given up: wait for the work to end, so that a source that answers is closed."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._work(self)
        except Exception as caught:  # noqa: BLE001 - raised again in the thread that waits
            error = caught
        with self._lock:
            if not self._left:
                self._error = error
                self._settled.set()


__all__ = ["Allocate", "Camera", "CameraStatus", "Fitting", "FrameSink", "Means", "State"]

log = logging.getLogger(__name__)

HEALTHY_NS = 60_000_000_000
"""After so long a time without a loss, waits begin short again."""

_ERROR_CHARACTERS = 400

_LINGER_S = 0.3
"""A source that still answers takes no longer to end; one that hangs is left behind."""


class FrameSink(Protocol):
    """Where frames go."""

    def put(self, frame: Frame) -> None:
        """Take a frame; never blocks."""

    def gate(self, camera: str) -> None:
        """Count a picture on which nothing moved, and which is therefore no frame; never blocks."""

    def wait_taken(self, camera: str, timeout_s: float) -> bool:
        """Whether the last frame of the camera has been taken, waiting up to `timeout_s` for it."""


def _ignore(_status: CameraStatus) -> None:
    """Nobody wants to hear of changes."""


Allocate = Callable[[], Picture | None]
"""Gives an array of the model's input size to write the next picture into; None where there is none."""


def _no_place() -> None:
    """Every picture gets an array of its own."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """The input that pictures are brought to, and where they are written then."""

    spec: InputSpec
    allocate: Allocate = _no_place

    def fill(self, decoded: Decoded) -> tuple[Picture, Placement]:
        """The decoded picture at the model's size, and where it lies in there.

        Raises:
            DamagedError: it cannot be converted.
        """
        return decoded.fill(self.spec, self.allocate())


@dataclass(frozen=True, slots=True)
class Means:
    """What a camera needs of the world beside its clock; a test brings its own.

    `opener` opens the source, `wait` waits for an event up to so many seconds, `chance` is in 0-1.
    """

    opener: Callable[[CameraUri, Limits], Source] = open_source
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    chance: Callable[[], float] = random.random


class _Showing:
    """What is remembered from picture to picture of one connection."""

    def __init__(self, attempt: Attempt, source: Source, ration: Ration) -> None:
        self.attempt = attempt
        self.source = source
        self.ration = ration
        self.content = ContentWatch()
        self.connected = False
        self.damaged: DamagedError | None = None
        self.damaged_since_ns: int | None = None

    def damaged_for_ns(self, now_ns: int) -> int:
        """A picture is damaged: for how long no other has come."""
        if self.damaged_since_ns is None:
            self.damaged_since_ns = now_ns
        return now_ns - self.damaged_since_ns


class Camera:
    """One camera, run by one thread (`run`); `begin`, `stop`, `watch` and `status` may be called by any.

    Each connection has a thread of its own, which is left behind where a decoder hangs in it.

    Args:
        name: as in the configuration.
        uri: any camera URI of the contract; understood when it is opened, so a folder may be mounted later.
        spec: the model's input.
        sink: takes the frames.
        fps: hand on so many pictures per second at most; None: all. For pictures of a folder, their rate.
        first_sequence: the number of the first frame; they rise by one, over reconnects too.
        last_epoch: the epoch before the first connection.
        paced: play files at their own rate. Without it a frame of a file waits until the sink has taken the
            one before, so that none is replaced.
        clock: monotonic ns.
        limits: time and size limits, and how to open.
        gate: hand on only pictures on which something moves; None: all.
        allocate: where the pictures at the model's size are to be written.
        throttle: hand on less than that, for a while; see `ease`.
        on_change: told of each change of state, once, from the camera's thread or that of `watch`.
        means: how to open, wait and throw dice.
        held: what has an end (a file, a folder) is not played before `begin`.
    """

    def __init__(
        self,
        name: str,
        uri: str,
        spec: InputSpec,
        sink: FrameSink,
        *,
        fps: float | None = None,
        first_sequence: int = 1,
        last_epoch: int = 0,
        paced: bool = True,
        clock: Callable[[], int] = time.monotonic_ns,
        limits: Limits | None = None,
        gate: GateSettings | None = None,
        allocate: Allocate | None = None,
        throttle: Throttle = UNTHROTTLED,
        on_change: Callable[[CameraStatus], None] = _ignore,
        means: Means | None = None,
        held: bool = False,
    ) -> None:
        self.name = name
        self._uri, self._sink = uri, sink
        self._fps = fps
        self._paced = paced
        self._clock = clock
        limits = limits or Limits()
        self._limits = limits if fps is None else replace(limits, pictures_per_s=fps)
        self._gate = gate
        self._throttle = throttle
        self._fitting = Fitting(spec, allocate or _no_place)
        self._on_change = on_change
        self._means = means or Means()
        self._backoff = Backoff(chance=self._means.chance)
        self._attempt: Attempt | None = None
        self._source: Source | None = None
        self._stop, self._begun = threading.Event(), threading.Event()
        if not held:
            self._begun.set()
        self._lock = threading.Lock()
        self._handing = threading.Lock()
        self._now = Progress(clock(), last_epoch, first_sequence)
        self.counts = Counts()

    def __repr__(self) -> str:
        return (
            f"<Camera {self.name} {self._now.state} epoch={self._now.epoch} read={self._now.frames_read} "
            f"next={self._now.next_sequence} error={self._now.last_error!r}>"
        )

    @property
    def next_sequence(self) -> int:
        """The number that the next frame gets: where a camera that takes over goes on."""
        return self._now.next_sequence

    @property
    def epoch(self) -> int:
        """The epoch now: where a camera that takes over goes on."""
        return self._now.epoch

    def run(self) -> None:
        """Play the source, again after each loss, until `stop` or the end of a file; a thread's target."""
        while not self._stop.is_set():
            if self._play():
                break
            self._wait_for_next_try()
        if self._stop.is_set():
            self._enter("stopped")
            if self._attempt is not None:
                self._attempt.linger(_LINGER_S)

    def _wait_for_next_try(self) -> None:
        wait_s = self._backoff.next_s()
        with self._lock:
            self._now.next_try_ns = self._clock() + round(wait_s * 1e9)
        self._means.wait(self._stop, wait_s)
        with self._lock:
            self._now.next_try_ns = None

    def begin(self) -> None:
        """Frames can be analysed now: play what was held."""
        self._begun.set()

    def stop(self) -> None:
        """End `run` at once, whatever the source does; what opens or is read later is closed again.

        When this returns, no frame is handed on any more, and `next_sequence` and `epoch` are final.
        """
        with self._handing:
            self._stop.set()
        self._begun.set()
        if self._attempt is not None:
            self._attempt.give_up()
        if self._source is not None:
            self._source.interrupt()

    def refit(self, fitting: Fitting) -> None:
        """Bring pictures to another model's input; once this returns, no frame comes for the one before."""
        with self._handing:
            self._fitting = fitting

    def ease(self, throttle: Throttle) -> None:
        """Hand on no more than this lets in, from one of the next pictures on; the source stays open."""
        self._throttle = throttle

    def watch(self) -> None:
        """Notice that nothing comes, which the source's own thread cannot as it waits; to be called often."""
        now_ns = self._clock()
        if self._stale(now_ns):
            self._enter("stale")
        attempt, source = self._attempt, self._source
        since_s = None if source is None else waiting_since_s(source)
        if attempt is None or since_s is None:
            return
        with self._lock:
            patience_ns = self._now.patience_ns(
                round(self._limits.silence_s * 1e9), round(self._limits.first_picture_s * 1e9)
            )
        if now_ns - round(since_s * 1e9) > patience_ns:
            with self._handing:  # from here on nothing comes from this connection
                attempt.give_up(SourceError(silent(masked_address(self._uri), round(patience_ns / 1e9, 1))))

    def status(self) -> CameraStatus:
        """What it is doing now."""
        now_ns = self._clock()
        stale = self._stale(now_ns)
        with self._lock:
            return self._now.shown(self.name, masked_address(self._uri), now_ns, stale=stale)

    def _stale(self, now_ns: int) -> bool:
        with self._lock:
            return self._now.stale(now_ns, round(self._limits.first_picture_s * 1e9))

    def _play(self) -> bool:
        """Open and read until the end (True) or a loss (False)."""
        self._source = None
        with self._lock:
            self._now.begin()
        self._attempt = attempt = Attempt(f"source:{self.name}", self._connection)
        # Looked at after the attempt can be seen: `stop` sets its event first and then gives up the attempt.
        if self._stop.is_set():
            return True
        try:
            attempt.take()
        except Exception as error:  # noqa: BLE001 - whatever a decoder raises is a lost source, no dead thread
            self._lose(error)
            return False
        if not self._stop.is_set():
            self._enter("ended")
        return True

    def _connection(self, attempt: Attempt) -> None:
        """One connection from opening to closing; in the thread of the attempt."""
        with contextlib.closing(self._open()) as source:
            if attempt.left:
                return
            if not (source.live or self._begun.is_set()):
                self._enter("waiting")
                self._begun.wait()
            self._source = source
            self._read(source, attempt)

    def _open(self) -> Source:
        began_ns = self._clock()
        limits = self._limits
        try:
            return self._means.opener(parse_camera_uri(self._uri), limits)
        except SourceError:
            if (self._clock() - began_ns) / 1e9 >= limits.open_timeout_s:
                self._limits = replace(limits, open_timeout_s=limits.open_timeout_most_s)
            raise

    def _read(self, source: Source, attempt: Attempt) -> None:
        ration = Ration(self._fps, self._gate, self.counts)
        showing = _Showing(attempt, source, ration)
        pace: Pace | None = None
        while not self._stop.is_set():
            if ration.follow(self._throttle):
                source.want(ration.fps)
            decoded = source.read()
            if attempt.left:
                return
            if decoded is None:
                break
            at_s = decoded.position_s
            if at_s is not None and self._paced:
                pace = pace or Pace(at_s, self._clock())
                self._means.wait(self._stop, pace.delay_s(at_s, self._clock()))
            if self._stop.is_set():
                return
            if self._show(decoded, showing) and not (self._paced or source.live):
                self._wait_taken()
        if showing.damaged is not None and not showing.connected:
            raise showing.damaged  # it had pictures, and none of them could be shown

    def _show(self, decoded: Decoded, showing: _Showing) -> bool:
        """Take note of a picture, and hand it on if it is due; whether it was."""
        captured_ns, captured_utc = self._clock(), utc_now()
        with self._lock:
            self._now.note(decoded, captured_ns)
        watched = showing.content.note(captured_ns, key=decoded.key)
        at_s = captured_ns / 1e9 if decoded.position_s is None else decoded.position_s
        if showing.ration.take(at_s, decoded.covers):
            return self._hand_on(decoded, showing, captured_ns, captured_utc)
        if watched:
            self._look_on(decoded, showing, captured_ns)
        if self._now.state == "stale":
            self._enter("live")
        return False

    def _hand_on(self, decoded: Decoded, showing: _Showing, captured_ns: int, captured_utc: datetime) -> bool:
        """Make a frame of what was decoded and give it to the sink; False where there is no frame."""
        fitting = self._fitting
        filled = self._filled(decoded, showing, fitting, captured_ns)
        if filled is None:
            return False
        image, placement = filled
        shown = _window(image, placement)
        self._enter(showing.content.look(shown, captured_ns, key=decoded.key))
        if not showing.ration.opens(shown, captured_ns):
            self._sink.gate(self.name)
            return False
        with self._handing:
            if self._stop.is_set() or showing.attempt.left:
                return False
            if fitting is not self._fitting:  # another model has come since: its pictures are others
                fitting = self._fitting
                image, placement = fitting.fill(decoded)
            frame = Frame(
                camera=self.name,
                sequence=self._now.next_sequence,
                epoch=self._now.epoch,
                captured_ns=captured_ns,
                captured_utc=captured_utc,
                width_px=decoded.width_px,
                height_px=decoded.height_px,
                image=image,
                placement=placement,
                full_picture=decoded.picture,
                spec=fitting.spec,
            )
            self._now.next_sequence += 1
            self._sink.put(frame)
        return True

    def _filled(
        self, decoded: Decoded, showing: _Showing, fitting: Fitting, captured_ns: int
    ) -> tuple[Picture, Placement] | None:
        """The picture at the model's size, with which the connection counts as one; None where it is damaged.

        Raises:
            DamagedError: as others have been for long.
        """
        try:
            filled = fitting.fill(decoded)
        except DamagedError as error:
            showing.damaged = error
            if showing.damaged_for_ns(captured_ns) > self._limits.picture_timeout_s * 1e9:
                raise
            return None
        showing.damaged_since_ns = None
        if not showing.connected:
            self._connect(showing.source)
            showing.connected = True
        return filled

    def _look_on(self, decoded: Decoded, showing: _Showing, captured_ns: int) -> None:
        """Look at a picture that is not handed on."""
        with contextlib.suppress(DamagedError):
            image, placement = decoded.fill(self._fitting.spec)
            showing.content.look(_window(image, placement), captured_ns, key=True)

    def _wait_taken(self) -> None:
        while not self._stop.is_set() and not self._sink.wait_taken(self.name, 0.2):
            pass

    def _connect(self, source: Source) -> None:
        """The first picture of a connection can be shown: only now it counts as one."""
        with self._lock:
            self._now.epoch += 1
            self._now.last_error = None
            self._now.decoder = source.decoder
            self._now.live = source.live
            self._now.connected_ns = self._clock()
            width, height = self._now.size_px
        again = ""
        if self._now.lost_ns is not None:
            again = " again" if self._now.state == "reconnecting" else ""
            again += f" after {(self._clock() - self._now.lost_ns) / 1e9:.1f} s"
            self._now.lost_ns = None
        log.info(
            "camera %s is live%s: %d x %d px, %s", self.name, again, width, height, masked_address(self._uri)
        )
        self._enter("live")

    def _lose(self, error: Exception) -> None:
        if self._stop.is_set():
            return
        text = _one_line(error)
        now_ns = self._clock()
        was_live = self._now.state in CONNECTED
        if was_live and now_ns - self._now.connected_ns >= HEALTHY_NS:
            self._backoff.reset()
        if self._now.lost_ns is None:
            self._now.lost_ns = now_ns
        with self._lock:
            self._now.last_error = text
        state: State = "reconnecting" if was_live or self._now.state == "reconnecting" else "failed"
        if state != self._now.state:
            log.warning("camera %s is %s: %s; trying again until it connects", self.name, state, text)
        self._enter(state)

    def _enter(self, state: State) -> None:
        with self._lock:
            if state == self._now.state:
                return
            self._now.state = state
            self._now.since_ns = self._clock()
        if state in ("ended", "stopped"):
            log.info("camera %s has %s", self.name, state)
        try:
            self._on_change(self.status())
        except Exception:
            log.exception("telling of a change of camera %s failed", self.name)


def _window(image: Picture, placement: Placement) -> Picture:
    """The part of the model's input that shows the source."""
    left, top = int(placement.left_px), int(placement.top_px)
    return image[top : top + int(placement.height_px), left : left + int(placement.width_px)]


def _one_line(error: Exception) -> str:
    """What to show of an error: ours as they are, others with their kind; one line, no secret."""
    text = str(error) if isinstance(error, VisionedgeError) else f"{type(error).__name__}: {error}"
    return " ".join(redact(text).split())[:_ERROR_CHARACTERS]
