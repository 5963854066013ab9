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

from visionedge.camera.freeze_detection import FreezeDetector
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.sources.base import DecodedPicture, FrameSource, SourceLimits, waiting_since_s
from visionedge.camera.sources.diagnosis import no_picture_received
from visionedge.camera.sources.open import open_source
from visionedge.camera.timing import (
    UNTHROTTLED,
    AdmissionCounts,
    FrameAdmission,
    FrameRate,
    PlaybackClock,
    ReconnectBackoff,
    Throttle,
)
from visionedge.config.addresses import CameraUri, parse_camera_uri
from visionedge.errors import DamagedPictureError, SourceError, VisionedgeError
from visionedge.frames.types import Frame, InputSpec, Picture, Placement, utc_now
from visionedge.runtime.redaction import mask_address, redact

# What a camera is doing: as it is shown, and as the camera itself keeps it.


CameraState = Literal[
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

CONNECTED_STATES: frozenset[CameraState] = frozenset({"live", "stale", "frozen", "black"})
"""The states of a camera that is connected, whatever it shows."""

_STALE_NS = 2_000_000_000
_STALE_GAP_FACTOR = 3
_MAX_GAPS = 64
"""Longest of so many distances between pictures: what is usual for a camera."""

_MIN_GAPS = 8
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
    state: CameraState
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
class CameraProgress:
    """How far a camera has come; written by its own thread alone."""

    since_ns: int
    epoch: int
    next_sequence: int
    state: CameraState = "connecting"
    connected_ns: int = 0
    frames_read: int = 0
    newest_ns: int | None = None
    connection_newest_ns: int | None = None
    gaps_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_GAPS))
    live: bool = False
    lost_ns: int | None = None
    next_try_ns: int | None = None
    last_error: str | None = None
    size_px: tuple[int, int] = (0, 0)
    decoder: str | None = None
    rate: FrameRate = field(default_factory=FrameRate)

    def note(self, decoded: DecodedPicture, now_ns: int) -> None:
        """A picture was read."""
        if self.connection_newest_ns is not None:
            self.gaps_ns.append(now_ns - self.connection_newest_ns)
        self.frames_read += 1
        self.newest_ns = self.connection_newest_ns = now_ns
        self.size_px = (decoded.width_px, decoded.height_px)
        self.rate.add(now_ns, decoded.source_frames)

    def begin(self) -> None:
        """Another connection begins: what was usual on the one before says nothing about it."""
        self.connection_newest_ns = None
        self.gaps_ns.clear()

    def silence_limit_ns(self, min_ns: int, first_ns: int) -> int:
        """How long a camera may be silent, which is more than its pictures usually lie apart.

        Args:
            least_ns: for a camera of many pictures per second.
            first_ns: while its rate is not known.
        """
        min_ns = min_ns if len(self.gaps_ns) >= _MIN_GAPS else first_ns
        return max(min_ns, _STALE_GAP_FACTOR * max(self.gaps_ns, default=0))

    def stale(self, now_ns: int, first_ns: int) -> bool:
        """Whether a source that sets the pace itself is silent, for longer than its pictures lie apart."""
        if not self.live or self.connection_newest_ns is None or self.state not in CONNECTED_STATES:
            return False
        return now_ns - self.connection_newest_ns > self.silence_limit_ns(_STALE_NS, first_ns)

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


class ConnectionThread:
    """One connection of a camera. `take` belongs to one thread, `abandon` may be called by any.

    Args:
        name: of its thread.
        work: opens and plays a source; it looks at `left` after each step that may have taken long, and then
            closes what it opened and returns.
    """

    def __init__(self, name: str, work: "Callable[[ConnectionThread], None]") -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._settled = threading.Event()
        self._lock = threading.Lock()
        self._abandoned = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Attempt {self._thread.name} settled={self._settled.is_set()}>"

    @property
    def left(self) -> bool:
        """Whether `take` has returned, or is about to, before the work ended."""
        return self._abandoned

    def take(self) -> None:
        """Do the work and wait for its end, or until it is given up.

        Raises:
            Exception: what the work raised, or what it was given up with.
        """
        self._thread.start()
        self._settled.wait()
        if self._error is not None:
            raise self._error

    def abandon(self, error: Exception | None = None) -> None:
        """Let `take` return at once, or raise this; too late where the work has ended."""
        with self._lock:
            if not self._settled.is_set():
                self._abandoned, self._error = True, error
                self._settled.set()

    def join(self, timeout_s: float) -> None:
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
            if not self._abandoned:
                self._error = error
                self._settled.set()


log = logging.getLogger(__name__)

HEALTHY_NS = 60_000_000_000
"""After so long a time without a loss, waits begin short again."""

_MAX_ERROR_CHARACTERS = 400

_JOIN_TIMEOUT_S = 0.3
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


AllocatePicture = Callable[[], Picture | None]
"""Gives an array of the model's input size to write the next picture into; None where there is none."""


def _allocate_none() -> None:
    """Every picture gets an array of its own."""


@dataclass(frozen=True, slots=True)
class InputResizer:
    """The input that pictures are brought to, and where they are written then."""

    spec: InputSpec
    allocate: AllocatePicture = _allocate_none

    def fit_to_input(self, decoded: DecodedPicture) -> tuple[Picture, Placement]:
        """The decoded picture at the model's size, and where it lies in there.

        Raises:
            DamagedError: it cannot be converted.
        """
        return decoded.fit_to_input(self.spec, self.allocate())


@dataclass(frozen=True, slots=True)
class CameraDependencies:
    """What a camera needs of the world beside its clock; a test brings its own.

    `opener` opens the source, `wait` waits for an event up to so many seconds, `chance` is in 0-1.
    """

    opener: Callable[[CameraUri, SourceLimits], FrameSource] = open_source
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    random_fraction: Callable[[], float] = random.random


class _ConnectionState:
    """What is remembered from picture to picture of one connection."""

    def __init__(self, attempt: ConnectionThread, source: FrameSource, admission: FrameAdmission) -> None:
        self.attempt = attempt
        self.source = source
        self.admission = admission
        self.content = FreezeDetector()
        self.connected = False
        self.damaged: DamagedPictureError | None = None
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
        limits: SourceLimits | None = None,
        gate: GateSettings | None = None,
        allocate: AllocatePicture | None = None,
        throttle: Throttle = UNTHROTTLED,
        on_change: Callable[[CameraStatus], None] = _ignore,
        dependencies: CameraDependencies | None = None,
        held: bool = False,
    ) -> None:
        self.name = name
        self._uri, self._sink = uri, sink
        self._fps = fps
        self._paced = paced
        self._clock = clock
        limits = limits or SourceLimits()
        self._limits = limits if fps is None else replace(limits, pictures_per_s=fps)
        self._gate = gate
        self._throttle = throttle
        self._resizer = InputResizer(spec, allocate or _allocate_none)
        self._on_change = on_change
        self._dependencies = dependencies or CameraDependencies()
        self._backoff = ReconnectBackoff(random_fraction=self._dependencies.random_fraction)
        self._attempt: ConnectionThread | None = None
        self._source: FrameSource | None = None
        self._stop, self._released = threading.Event(), threading.Event()
        if not held:
            self._released.set()
        self._lock = threading.Lock()
        self._handover_lock = threading.Lock()
        self._progress = CameraProgress(clock(), last_epoch, first_sequence)
        self.counts = AdmissionCounts()

    def __repr__(self) -> str:
        return (
            f"<Camera {self.name} {self._progress.state} epoch={self._progress.epoch} "
            f"read={self._progress.frames_read} "
            f"next={self._progress.next_sequence} error={self._progress.last_error!r}>"
        )

    @property
    def next_sequence(self) -> int:
        """The number that the next frame gets: where a camera that takes over goes on."""
        return self._progress.next_sequence

    @property
    def epoch(self) -> int:
        """The epoch now: where a camera that takes over goes on."""
        return self._progress.epoch

    def run(self) -> None:
        """Play the source, again after each loss, until `stop` or the end of a file; a thread's target."""
        while not self._stop.is_set():
            if self._connect_and_read():
                break
            self._wait_for_next_try()
        if self._stop.is_set():
            self._set_state("stopped")
            if self._attempt is not None:
                self._attempt.join(_JOIN_TIMEOUT_S)

    def _wait_for_next_try(self) -> None:
        wait_s = self._backoff.next_s()
        with self._lock:
            self._progress.next_try_ns = self._clock() + round(wait_s * 1e9)
        self._dependencies.wait(self._stop, wait_s)
        with self._lock:
            self._progress.next_try_ns = None

    def begin(self) -> None:
        """Frames can be analysed now: play what was held."""
        self._released.set()

    def stop(self) -> None:
        """End `run` at once, whatever the source does; what opens or is read later is closed again.

        When this returns, no frame is handed on any more, and `next_sequence` and `epoch` are final.
        """
        with self._handover_lock:
            self._stop.set()
        self._released.set()
        if self._attempt is not None:
            self._attempt.abandon()
        if self._source is not None:
            self._source.interrupt()

    def change_input(self, resizer: InputResizer) -> None:
        """Bring pictures to another model's input; once this returns, no frame comes for the one before."""
        with self._handover_lock:
            self._resizer = resizer

    def throttle(self, throttle: Throttle) -> None:
        """Hand on no more than this lets in, from one of the next pictures on; the source stays open."""
        self._throttle = throttle

    def check_liveness(self) -> None:
        """Notice that nothing comes, which the source's own thread cannot as it waits; to be called often."""
        now_ns = self._clock()
        if self._stale(now_ns):
            self._set_state("stale")
        attempt, source = self._attempt, self._source
        since_s = None if source is None else waiting_since_s(source)
        if attempt is None or since_s is None:
            return
        with self._lock:
            silence_limit_ns = self._progress.silence_limit_ns(
                round(self._limits.silence_s * 1e9), round(self._limits.first_picture_s * 1e9)
            )
        if now_ns - round(since_s * 1e9) > silence_limit_ns:
            with self._handover_lock:  # from here on nothing comes from this connection
                attempt.abandon(
                    SourceError(
                        no_picture_received(mask_address(self._uri), round(silence_limit_ns / 1e9, 1))
                    )
                )

    def status(self) -> CameraStatus:
        """What it is doing now."""
        now_ns = self._clock()
        stale = self._stale(now_ns)
        with self._lock:
            return self._progress.shown(self.name, mask_address(self._uri), now_ns, stale=stale)

    def _stale(self, now_ns: int) -> bool:
        with self._lock:
            return self._progress.stale(now_ns, round(self._limits.first_picture_s * 1e9))

    def _connect_and_read(self) -> bool:
        """Open and read until the end (True) or a loss (False)."""
        self._source = None
        with self._lock:
            self._progress.begin()
        self._attempt = attempt = ConnectionThread(f"source:{self.name}", self._run_connection)
        # Looked at after the attempt can be seen: `stop` sets its event first and then gives up the attempt.
        if self._stop.is_set():
            return True
        try:
            attempt.take()
        except Exception as error:  # noqa: BLE001 - whatever a decoder raises is a lost source, no dead thread
            self._handle_loss(error)
            return False
        if not self._stop.is_set():
            self._set_state("ended")
        return True

    def _run_connection(self, attempt: ConnectionThread) -> None:
        """One connection from opening to closing; in the thread of the attempt."""
        with contextlib.closing(self._open()) as source:
            if attempt.left:
                return
            if not (source.live or self._released.is_set()):
                self._set_state("waiting")
                self._released.wait()
            self._source = source
            self._read(source, attempt)

    def _open(self) -> FrameSource:
        began_ns = self._clock()
        limits = self._limits
        try:
            return self._dependencies.opener(parse_camera_uri(self._uri), limits)
        except SourceError:
            if (self._clock() - began_ns) / 1e9 >= limits.open_timeout_s:
                self._limits = replace(limits, open_timeout_s=limits.max_open_timeout_s)
            raise

    def _read(self, source: FrameSource, attempt: ConnectionThread) -> None:
        admission = FrameAdmission(self._fps, self._gate, self.counts)
        connection = _ConnectionState(attempt, source, admission)
        pace: PlaybackClock | None = None
        while not self._stop.is_set():
            if admission.set_throttle(self._throttle):
                source.set_wanted_rate(admission.fps)
            decoded = source.read()
            if attempt.left:
                return
            if decoded is None:
                break
            at_s = decoded.position_s
            if at_s is not None and self._paced:
                pace = pace or PlaybackClock(at_s, self._clock())
                self._dependencies.wait(self._stop, pace.delay_s(at_s, self._clock()))
            if self._stop.is_set():
                return
            if self._process(decoded, connection) and not (self._paced or source.live):
                self._wait_taken()
        if connection.damaged is not None and not connection.connected:
            raise connection.damaged  # it had pictures, and none of them could be shown

    def _process(self, decoded: DecodedPicture, connection: _ConnectionState) -> bool:
        """Take note of a picture, and hand it on if it is due; whether it was."""
        captured_ns, captured_utc = self._clock(), utc_now()
        with self._lock:
            self._progress.note(decoded, captured_ns)
        watched = connection.content.note(captured_ns, key=decoded.key)
        at_s = captured_ns / 1e9 if decoded.position_s is None else decoded.position_s
        if connection.admission.take(at_s, decoded.source_frames):
            return self._emit(decoded, connection, captured_ns, captured_utc)
        if watched:
            self._inspect(decoded, connection, captured_ns)
        if self._progress.state == "stale":
            self._set_state("live")
        return False

    def _emit(
        self, decoded: DecodedPicture, connection: _ConnectionState, captured_ns: int, captured_utc: datetime
    ) -> bool:
        """Make a frame of what was decoded and give it to the sink; False where there is no frame."""
        resizer = self._resizer
        resized = self._resize(decoded, connection, resizer, captured_ns)
        if resized is None:
            return False
        image, placement = resized
        shown = _content_region(image, placement)
        self._set_state(connection.content.inspect(shown, captured_ns, key=decoded.key))
        if not connection.admission.passes(shown, captured_ns):
            self._sink.gate(self.name)
            return False
        with self._handover_lock:
            if self._stop.is_set() or connection.attempt.left:
                return False
            if resizer is not self._resizer:  # another model has come since: its pictures are others
                resizer = self._resizer
                image, placement = resizer.fit_to_input(decoded)
            frame = Frame(
                camera=self.name,
                sequence=self._progress.next_sequence,
                epoch=self._progress.epoch,
                captured_ns=captured_ns,
                captured_utc=captured_utc,
                width_px=decoded.width_px,
                height_px=decoded.height_px,
                image=image,
                placement=placement,
                full_picture=decoded.picture,
                spec=resizer.spec,
            )
            self._progress.next_sequence += 1
            self._sink.put(frame)
        return True

    def _resize(
        self, decoded: DecodedPicture, connection: _ConnectionState, resizer: InputResizer, captured_ns: int
    ) -> tuple[Picture, Placement] | None:
        """The picture at the model's size, with which the connection counts as one; None where it is damaged.

        Raises:
            DamagedError: as others have been for long.
        """
        try:
            resized = resizer.fit_to_input(decoded)
        except DamagedPictureError as error:
            connection.damaged = error
            if connection.damaged_for_ns(captured_ns) > self._limits.picture_timeout_s * 1e9:
                raise
            return None
        connection.damaged_since_ns = None
        if not connection.connected:
            self._mark_connected(connection.source)
            connection.connected = True
        return resized

    def _inspect(self, decoded: DecodedPicture, connection: _ConnectionState, captured_ns: int) -> None:
        """Look at a picture that is not handed on."""
        with contextlib.suppress(DamagedPictureError):
            image, placement = decoded.fit_to_input(self._resizer.spec)
            connection.content.inspect(_content_region(image, placement), captured_ns, key=True)

    def _wait_taken(self) -> None:
        while not self._stop.is_set() and not self._sink.wait_taken(self.name, 0.2):
            pass

    def _mark_connected(self, source: FrameSource) -> None:
        """The first picture of a connection can be shown: only now it counts as one."""
        with self._lock:
            self._progress.epoch += 1
            self._progress.last_error = None
            self._progress.decoder = source.decoder
            self._progress.live = source.live
            self._progress.connected_ns = self._clock()
            width, height = self._progress.size_px
        again = ""
        if self._progress.lost_ns is not None:
            again = " again" if self._progress.state == "reconnecting" else ""
            again += f" after {(self._clock() - self._progress.lost_ns) / 1e9:.1f} s"
            self._progress.lost_ns = None
        log.info(
            "camera %s is live%s: %d x %d px, %s", self.name, again, width, height, mask_address(self._uri)
        )
        self._set_state("live")

    def _handle_loss(self, error: Exception) -> None:
        if self._stop.is_set():
            return
        text = _one_line(error)
        now_ns = self._clock()
        was_live = self._progress.state in CONNECTED_STATES
        if was_live and now_ns - self._progress.connected_ns >= HEALTHY_NS:
            self._backoff.reset()
        if self._progress.lost_ns is None:
            self._progress.lost_ns = now_ns
        with self._lock:
            self._progress.last_error = text
        state: CameraState = (
            "reconnecting" if was_live or self._progress.state == "reconnecting" else "failed"
        )
        if state != self._progress.state:
            log.warning("camera %s is %s: %s; trying again until it connects", self.name, state, text)
        self._set_state(state)

    def _set_state(self, state: CameraState) -> None:
        with self._lock:
            if state == self._progress.state:
                return
            self._progress.state = state
            self._progress.since_ns = self._clock()
        if state in ("ended", "stopped"):
            log.info("camera %s has %s", self.name, state)
        try:
            self._on_change(self.status())
        except Exception:
            log.exception("telling of a change of camera %s failed", self.name)


def _content_region(image: Picture, placement: Placement) -> Picture:
    """The part of the model's input that shows the source."""
    left, top = int(placement.left_px), int(placement.top_px)
    return image[top : top + int(placement.height_px), left : left + int(placement.width_px)]


def _one_line(error: Exception) -> str:
    """What to show of an error: ours as they are, others with their kind; one line, no secret."""
    text = str(error) if isinstance(error, VisionedgeError) else f"{type(error).__name__}: {error}"
    return " ".join(redact(text).split())[:_MAX_ERROR_CHARACTERS]
