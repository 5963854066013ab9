"""One camera: opens its source, reads pictures, stamps and offers them as frames, reconnects after a loss.

`Camera.run` is the loop. Every connection runs on a thread of its own (`ConnectionThread`), because a decoder
that hangs cannot be interrupted: the camera leaves that thread behind and opens the source again. The state
that users see is a `CameraStatus`.
"""

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Literal, Protocol

from visionedge.camera.freeze_detection import FreezeDetector
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.sources.base import DecodedPicture, FrameSource, SourceLimits, waiting_since_s
from visionedge.camera.sources.diagnosis import SourceFault
from visionedge.camera.sources.open import open_source
from visionedge.camera.timing import (
    UNTHROTTLED,
    AdmissionCounts,
    FrameAdmission,
    FrameRate,
    PlaybackClock,
    Throttle,
)
from visionedge.config.addresses import CameraUri, parse_camera_uri
from visionedge.errors import DamagedPictureError, SourceError, UnsupportedFormatError, VisionedgeError
from visionedge.frames.types import DEFAULT_MODEL, Frame, InputSpec, Picture, Placement, utc_now
from visionedge.runtime.redaction import mask_address, redact
from visionedge.runtime.retry import Backoff, RetryPolicy

log = logging.getLogger(__name__)

RECONNECT_POLICY = RetryPolicy(first_wait_s=1.0, max_wait_s=30.0, jitter=0.25)

HEALTHY_NS = 60_000_000_000
"""A connection that lasted this long resets the backoff: the first wait is short again."""

_STALE_NS = 2_000_000_000
"""A camera of many pictures per second is stale after this silence."""

_STALE_GAP_FACTOR = 3
"""A slower camera is stale after this many times its longest usual gap."""

_MAX_GAPS = 64
"""Gaps between pictures that are remembered; the longest of them is the usual one."""

_MIN_GAPS = 8
"""Gaps before the rate counts as known: a decoder gives the first pictures, which it buffered, at once."""

_JOIN_TIMEOUT_S = 0.3
"""How long to wait for an abandoned connection thread, so that a source that responds is closed."""

_MAX_ERROR_CHARACTERS = 400


# --- state --------------------------------------------------------------------------------------------------

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
"""The states of a camera that is connected."""


@dataclass(frozen=True, slots=True)
class CameraStatus:
    """The state of a camera, safe to show: `uri` and `last_error` are redacted.

    `state`: `connecting` (first attempt); `waiting` (a file or folder, until frames can be analysed); when
    connected `live`, `stale` (no picture has come for a while), `frozen` (the picture does not change at
    all), `black`; `reconnecting` (was connected, is lost), `failed` (was never connected, is tried again),
    `ended` (a file or folder was played to its end), `stopped`. `since_ns` is monotonic. `epoch` is 0 before
    the first picture. `frames_read` counts pictures that were read, analysed or not; `fps` is the rate of the
    source over the last 5 s, with pictures that were not decoded; `age_ms` is the age of the newest picture.
    `width` and `height` are in px, 0 before the first picture. `next_try_s` is the time until the next
    attempt to open the source, None while the camera does not wait for one.
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
    """The mutable state behind `CameraStatus`; written by the threads of one camera, one at a time."""

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

    def begin_connection(self) -> None:
        """Forget the gaps of the last connection: they say nothing about the next one."""
        self.connection_newest_ns = None
        self.gaps_ns.clear()

    def note(self, decoded: DecodedPicture, now_ns: int) -> None:
        """Count a picture that was read."""
        if self.connection_newest_ns is not None:
            self.gaps_ns.append(now_ns - self.connection_newest_ns)
        self.frames_read += 1
        self.newest_ns = self.connection_newest_ns = now_ns
        self.size_px = (decoded.width_px, decoded.height_px)
        self.rate.add(now_ns, decoded.source_frames)

    def silence_limit_ns(self, min_ns: int, first_ns: int) -> int:
        """Return how long the camera may be silent: three times its longest usual gap, at least `min_ns`.

        While its rate is not known, at least `first_ns`.
        """
        min_ns = min_ns if len(self.gaps_ns) >= _MIN_GAPS else first_ns
        return max(min_ns, _STALE_GAP_FACTOR * max(self.gaps_ns, default=0))

    def is_stale(self, now_ns: int, first_ns: int) -> bool:
        """Whether a live source has been silent for longer than its usual gaps."""
        if not self.live or self.connection_newest_ns is None or self.state not in CONNECTED_STATES:
            return False
        return now_ns - self.connection_newest_ns > self.silence_limit_ns(_STALE_NS, first_ns)

    def to_status(self, name: str, masked_uri: str, now_ns: int, *, stale: bool) -> CameraStatus:
        """Return a snapshot."""
        return CameraStatus(
            name=name,
            uri=masked_uri,
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


# --- the thread of a connection -----------------------------------------------------------------------------


class ConnectionThread:
    """Runs one connection of a camera, and can be abandoned while a decoder hangs in it.

    `run` belongs to the camera's thread; any thread may call `abandon`.

    Args:
        name: of the thread.
        work: opens and reads a source. After each step that may take long it checks `is_abandoned`; if true,
        it
            closes the source and returns.
    """

    def __init__(self, name: str, work: "Callable[[ConnectionThread], None]") -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run_work, name=name, daemon=True)
        self._settled = threading.Event()
        self._lock = threading.Lock()
        self._abandoned = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<ConnectionThread {self._thread.name} settled={self._settled.is_set()}>"

    @property
    def is_abandoned(self) -> bool:
        """Whether `abandon` ended `run` before the work ended."""
        return self._abandoned

    def run(self) -> None:
        """Start the work and wait until it ends or is abandoned.

        Raises:
            Exception: the error of the work, or the one given to `abandon`.
        """
        self._thread.start()
        self._settled.wait()
        if self._error is not None:
            raise self._error

    def abandon(self, error: Exception | None = None) -> None:
        """Let `run` return at once, or raise `error`. No effect if the work has ended."""
        with self._lock:
            if not self._settled.is_set():
                self._abandoned, self._error = True, error
                self._settled.set()

    def join(self, timeout_s: float) -> None:
        """Wait for abandoned work to end, so that a source that still responds is closed."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run_work(self) -> None:
        error: Exception | None = None
        try:
            self._work(self)
        except Exception as caught:  # noqa: BLE001 - raised again in the thread that waits
            error = caught
        with self._lock:
            if not self._abandoned:
                self._error = error
                self._settled.set()


# --- what a camera needs ------------------------------------------------------------------------------------


class FrameSink(Protocol):
    """Takes the frames of cameras."""

    def put(self, frame: Frame) -> bool:
        """Take a frame; never blocks. Return whether it replaced one that waited."""

    def count_gated(self, camera: str) -> None:
        """Count a picture that the motion gate held back; never blocks."""

    def wait_taken(self, camera: str, timeout_s: float) -> bool:
        """Wait up to `timeout_s` until the camera's last frame is taken; return whether it is."""


AllocatePicture = Callable[[], Picture | None]
"""Returns an array of the model's input size for the next picture; None: the picture gets a new array."""


def _allocate_none() -> None:
    """See `AllocatePicture`."""


def _ignore(_status: CameraStatus) -> None:
    """An `on_change` that does nothing."""


@dataclass(frozen=True, slots=True)
class InputResizer:
    """Resizes pictures to the input of a model, into memory from `allocate`."""

    spec: InputSpec
    allocate: AllocatePicture = _allocate_none
    model: str = DEFAULT_MODEL

    def resize(self, decoded: DecodedPicture) -> Picture:
        """Return the picture, which is loaded, at the model's input size."""
        return decoded.fit_to_input(self.spec, self.allocate())[0]


@dataclass(frozen=True, slots=True)
class CameraDependencies:
    """Functions that a test replaces.

    `opener` opens the source, `wait` waits for an event for at most so many seconds, `random_fraction`
    returns a random number from 0 to 1 for the jitter of reconnects.
    """

    opener: Callable[[CameraUri, SourceLimits], FrameSource] = open_source
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    random_fraction: Callable[[], float] = random.random


class _Connection:
    """State of one connection, from picture to picture."""

    def __init__(self, thread: ConnectionThread, source: FrameSource, admission: FrameAdmission) -> None:
        self.thread = thread
        self.source = source
        self.admission = admission
        self.freeze_detector = FreezeDetector()
        self.has_picture = False
        self.damaged: DamagedPictureError | None = None
        self.damaged_since_ns: int | None = None

    def looks_at(self, now_ns: int, *, key: bool) -> bool:
        """Whether freeze detector or motion gate look at a picture of this time."""
        return self.admission.has_gate or self.freeze_detector.is_due(now_ns, key=key)

    def passes(self, content: Picture, now_ns: int, *, key: bool) -> bool:
        """Let both look at a picture, and return whether the motion gate lets it pass."""
        self.freeze_detector.inspect(content, now_ns, key=key)
        return self.admission.passes_gate(content, now_ns)

    def damaged_for_ns(self, now_ns: int) -> int:
        """Return for how long every picture has been damaged; called for a damaged one."""
        if self.damaged_since_ns is None:
            self.damaged_since_ns = now_ns
        return now_ns - self.damaged_since_ns


# --- the camera ---------------------------------------------------------------------------------------------


class Camera:
    """One camera. One thread calls `run`; any thread may call the other methods.

    Args:
        name: the camera's name in the configuration.
        uri: any camera URI of the contract; parsed at each opening, so a folder may be mounted later.
        spec: the model's input.
        sink: takes the frames.
        fps: pictures per second that become frames, at most; None: all. For a folder, its rate.
        first_sequence: the number of the first frame; numbers rise by one, over reconnects too.
        last_epoch: the epoch before the first connection.
        paced: play files at their own rate. If false, a frame of a file waits until the sink has taken the
            frame before it, so that none is replaced.
        clock: monotonic ns.
        limits: time and size limits, and how to open the source.
        gate: only pictures with motion become frames; None: all.
        allocate: returns memory for pictures at the model's input size.
        model: the model of the frames (`Frame.model`).
        throttle: a limit below `fps`; see the method `throttle`.
        on_change: called once for each change of state, by the camera's threads or by that of
        `check_liveness`. dependencies: functions that a test replaces. start_paused: do not play a file or
        folder before `begin`.
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
        model: str = DEFAULT_MODEL,
        throttle: Throttle = UNTHROTTLED,
        on_change: Callable[[CameraStatus], None] = _ignore,
        dependencies: CameraDependencies | None = None,
        start_paused: bool = False,
    ) -> None:
        self.name = name
        self.counts = AdmissionCounts()
        self._uri, self._sink = uri, sink
        self._fps, self._gate, self._throttle = fps, gate, throttle
        self._paced = paced
        self._clock = clock
        limits = limits or SourceLimits()
        self._limits = limits if fps is None else replace(limits, pictures_per_s=fps)
        self._resizer = InputResizer(spec, allocate or _allocate_none, model)
        self._on_change = on_change
        self._dependencies = dependencies or CameraDependencies()
        self._backoff = Backoff(RECONNECT_POLICY, self._dependencies.random_fraction)
        self._thread: ConnectionThread | None = None
        self._source: FrameSource | None = None
        self._stop, self._released = threading.Event(), threading.Event()
        if not start_paused:
            self._released.set()
        self._lock = threading.Lock()
        self._handover_lock = threading.Lock()
        self._progress = CameraProgress(clock(), last_epoch, first_sequence)

    def __repr__(self) -> str:
        return (
            f"<Camera {self.name} {self._progress.state} epoch={self._progress.epoch} "
            f"read={self._progress.frames_read} "
            f"next={self._progress.next_sequence} error={self._progress.last_error!r}>"
        )

    @property
    def next_sequence(self) -> int:
        """The number of the next frame; a camera that replaces this one continues from it."""
        return self._progress.next_sequence

    @property
    def epoch(self) -> int:
        """The number of the current connection; a camera that replaces this one continues from it."""
        return self._progress.epoch

    def status(self) -> CameraStatus:
        """Return the state now."""
        now_ns = self._clock()
        stale = self._is_stale(now_ns)
        with self._lock:
            return self._progress.to_status(self.name, mask_address(self._uri), now_ns, stale=stale)

    def begin(self) -> None:
        """Play the file or folder that was paused: frames can be analysed now."""
        self._released.set()

    def stop(self) -> None:
        """End `run` at once, even if the source hangs; a source that opens later is closed again.

        When this returns, no more frames are offered, and `next_sequence` and `epoch` are final.
        """
        with self._handover_lock:
            self._stop.set()
        self._released.set()
        if self._thread is not None:
            self._thread.abandon()
        if self._source is not None:
            self._source.interrupt()

    def change_input(self, resizer: InputResizer) -> None:
        """Resize pictures for another model; when this returns, no frame comes for the model before it."""
        with self._handover_lock:
            self._resizer = resizer

    def throttle(self, throttle: Throttle) -> None:
        """Offer no more frames than `throttle` admits, from one of the next pictures on."""
        self._throttle = throttle

    # --- open, read, retry: the camera's thread -------------------------------------------------------------

    def run(self) -> None:
        """Read the source, and open it again after each loss, until `stop` or the end of a file."""
        while not self._stop.is_set():
            try:
                self._run_connection()
            except Exception as error:  # noqa: BLE001 - any exception of a decoder is a lost source
                self._wait_for_retry(error)
            else:
                break
        if self._stop.is_set():
            self._set_state("stopped")
            if self._thread is not None:
                self._thread.join(_JOIN_TIMEOUT_S)

    def _run_connection(self) -> None:
        """Run one connection on a thread of its own until its end; raises what ended it if it is a loss."""
        self._source = None
        with self._lock:
            self._progress.begin_connection()
        self._thread = thread = ConnectionThread(f"source:{self.name}", self._open_and_read)
        # Checked after `stop` can see the thread: `stop` sets the event first and then abandons the thread.
        if self._stop.is_set():
            return
        thread.run()
        if not self._stop.is_set():
            self._set_state("ended")

    def _wait_for_retry(self, error: Exception) -> None:
        """Report a loss and wait before the next attempt."""
        if self._stop.is_set():
            return
        now_ns = self._clock()
        was_connected = self._progress.state in CONNECTED_STATES
        if was_connected and now_ns - self._progress.connected_ns >= HEALTHY_NS:
            self._backoff.reset()
        wait_s = self._backoff.next_wait_s()
        if isinstance(error, UnsupportedFormatError):  # only another setting or another stream helps
            wait_s = RECONNECT_POLICY.max_wait_s
        if self._progress.lost_ns is None:
            self._progress.lost_ns = now_ns
        reason = _one_line(error)
        with self._lock:
            self._progress.last_error = reason
        was_connected = was_connected or self._progress.state == "reconnecting"
        state: CameraState = "reconnecting" if was_connected else "failed"
        if state != self._progress.state:  # later attempts that fail are not logged
            short = reason.removeprefix(f"{mask_address(self._uri)}: ")
            log.warning("camera %s: %s; retrying in %.0f s", self.name, short, wait_s)
        self._set_state(state)
        with self._lock:
            self._progress.next_try_ns = self._clock() + round(wait_s * 1e9)
        self._dependencies.wait(self._stop, wait_s)
        with self._lock:
            self._progress.next_try_ns = None

    # --- open, read, stamp, offer: the connection's thread --------------------------------------------------

    def _open_and_read(self, thread: ConnectionThread) -> None:
        with contextlib.closing(self._open()) as source:
            if thread.is_abandoned:
                return
            if not (source.live or self._released.is_set()):
                self._set_state("waiting")
                self._released.wait()
            self._source = source
            self._read(source, thread)

    def _open(self) -> FrameSource:
        began_ns = self._clock()
        limits = self._limits
        try:
            return self._dependencies.opener(parse_camera_uri(self._uri), limits)
        except SourceError:
            if (self._clock() - began_ns) / 1e9 >= limits.open_timeout_s:
                self._limits = replace(limits, open_timeout_s=limits.max_open_timeout_s)
            raise

    def _read(self, source: FrameSource, thread: ConnectionThread) -> None:
        """Read pictures until the end of the source, `stop`, or a loss (raised)."""
        admission = FrameAdmission(self._fps, self._gate, self.counts)
        connection = _Connection(thread, source, admission)
        playback: PlaybackClock | None = None
        while not self._stop.is_set():
            if admission.set_throttle(self._throttle):
                self._set_wanted_rate(connection)
            decoded = source.read()
            if thread.is_abandoned:
                return
            if decoded is None:
                break
            position_s = decoded.position_s
            if position_s is not None and self._paced:
                playback = playback or PlaybackClock(position_s, self._clock())
                self._dependencies.wait(self._stop, playback.delay_s(position_s, self._clock()))
            if self._stop.is_set():
                return
            if self._process(decoded, connection) and not (self._paced or source.live):
                self._wait_taken()
        if connection.damaged is not None and not connection.has_picture:
            raise connection.damaged  # the source had pictures, and none could be decoded

    def _process(self, decoded: DecodedPicture, connection: _Connection) -> bool:
        """Stamp a picture, and offer it if it is due; return whether it became a frame."""
        captured_ns, captured_utc = self._clock(), utc_now()
        with self._lock:
            self._progress.note(decoded, captured_ns)
        is_checked = connection.freeze_detector.note(captured_ns, key=decoded.key)
        at_s = captured_ns / 1e9 if decoded.position_s is None else decoded.position_s
        if connection.admission.admits(at_s, decoded.source_frames):
            return self._offer(decoded, connection, captured_ns, captured_utc)
        if is_checked:
            self._check_freeze(decoded, connection, captured_ns)
        if self._progress.state == "stale":
            self._set_state("live")
        return False

    def _offer(
        self, decoded: DecodedPicture, connection: _Connection, captured_ns: int, captured_utc: datetime
    ) -> bool:
        """Put a picture into the sink as a frame; False if it is damaged, gated or too late."""
        if not self._load(decoded, connection, captured_ns):
            return False
        resizer, resized, is_held_back = self._resizer, None, False
        if connection.looks_at(captured_ns, key=decoded.key):
            picture = resizer.resize(decoded)
            content = _content_region(picture, resizer.spec.place(decoded.width_px, decoded.height_px))
            is_held_back = not connection.passes(content, captured_ns, key=decoded.key)
            resized = resizer, picture
        self._set_state(connection.freeze_detector.content)
        if is_held_back:
            self._sink.count_gated(self.name)
            return False
        return self._put(decoded, connection, resized, captured_ns, captured_utc)

    def _put(
        self,
        decoded: DecodedPicture,
        connection: _Connection,
        resized: tuple[InputResizer, Picture] | None,
        captured_ns: int,
        captured_utc: datetime,
    ) -> bool:
        """Put a frame into the sink unless it is too late.

        Its picture is resized when a lane takes it, because a newer frame may replace it before; `resized` is
        the picture if it was resized already, and for which input.
        """
        with self._handover_lock:
            if self._stop.is_set() or connection.thread.is_abandoned:
                return False
            resizer = self._resizer
            image: Picture | Callable[[], Picture] = partial(resizer.resize, decoded)
            if resized is not None and resized[0] is resizer:  # else the model changed meanwhile
                image = resized[1]
            frame = Frame(
                camera=self.name,
                sequence=self._progress.next_sequence,
                epoch=self._progress.epoch,
                captured_ns=captured_ns,
                captured_utc=captured_utc,
                width_px=decoded.width_px,
                height_px=decoded.height_px,
                image=image,
                placement=resizer.spec.place(decoded.width_px, decoded.height_px),
                full_picture=decoded.picture,
                spec=resizer.spec,
                model=resizer.model,
            )
            self._progress.next_sequence += 1
            replaced = self._sink.put(frame)
        if connection.admission.note_offered(replaced=replaced):
            self._set_wanted_rate(connection)
        return True

    def _set_wanted_rate(self, connection: _Connection) -> None:
        source_fps = self._progress.rate.per_s(self._clock())
        connection.source.set_wanted_rate(connection.admission.wanted_rate(source_fps))

    def _load(self, decoded: DecodedPicture, connection: _Connection, captured_ns: int) -> bool:
        """Decode the picture; return whether it is whole.

        The first picture that can be decoded completes the connection.

        Raises:
            DamagedPictureError: all pictures of the last `picture_timeout_s` were damaged.
        """
        try:
            decoded.load()
        except DamagedPictureError as error:
            connection.damaged = error
            if connection.damaged_for_ns(captured_ns) > self._limits.picture_timeout_s * 1e9:
                raise
            return False
        connection.damaged_since_ns = None
        if not connection.has_picture:
            self._mark_connected(connection.source)
            connection.has_picture = True
        return True

    def _check_freeze(self, decoded: DecodedPicture, connection: _Connection, captured_ns: int) -> None:
        """Pass a key picture that does not become a frame to the freeze detector."""
        with contextlib.suppress(DamagedPictureError):
            image, placement = decoded.fit_to_input(self._resizer.spec)
            connection.freeze_detector.inspect(_content_region(image, placement), captured_ns, key=True)

    def _wait_taken(self) -> None:
        while not self._stop.is_set() and not self._sink.wait_taken(self.name, 0.2):
            pass

    # --- state changes --------------------------------------------------------------------------------------

    def check_liveness(self) -> None:
        """Detect a stale or lost source while its thread waits for data; to be called every few 100 ms."""
        now_ns = self._clock()
        if self._is_stale(now_ns):
            self._set_state("stale")
        thread, source = self._thread, self._source
        since_s = None if source is None else waiting_since_s(source)
        if thread is None or since_s is None:
            return
        with self._lock:
            silence_limit_ns = self._progress.silence_limit_ns(
                round(self._limits.silence_s * 1e9), round(self._limits.first_picture_s * 1e9)
            )
        if now_ns - round(since_s * 1e9) > silence_limit_ns:
            silence_s = round(silence_limit_ns / 1e9, 1)
            with self._handover_lock:  # afterwards no frame comes from this connection
                thread.abandon(
                    SourceFault.NO_PICTURE_RECEIVED.error(mask_address(self._uri), limit_s=silence_s)
                )

    def _is_stale(self, now_ns: int) -> bool:
        with self._lock:
            return self._progress.is_stale(now_ns, round(self._limits.first_picture_s * 1e9))

    def _mark_connected(self, source: FrameSource) -> None:
        """Count a connection, at its first picture that can be decoded."""
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
            "camera %s: live%s, %d x %d px, %s", self.name, again, width, height, mask_address(self._uri)
        )
        self._set_state("live")

    def _set_state(self, state: CameraState) -> None:
        with self._lock:
            if state == self._progress.state:
                return
            self._progress.state = state
            self._progress.since_ns = self._clock()
        if state in ("ended", "stopped"):
            log.info("camera %s: %s", self.name, state)
        try:
            self._on_change(self.status())
        except Exception:
            log.exception("camera %s: reporting the state %s failed", self.name, state)


def _content_region(image: Picture, placement: Placement) -> Picture:
    """Return the part of the model's input that shows the source, without the padding."""
    left, top = int(placement.left_px), int(placement.top_px)
    return image[top : top + int(placement.height_px), left : left + int(placement.width_px)]


def _one_line(error: Exception) -> str:
    """Return the text of an error in one line without secrets; foreign errors with their type."""
    text = str(error) if isinstance(error, VisionedgeError) else f"{type(error).__name__}: {error}"
    return " ".join(redact(text).split())[:_MAX_ERROR_CHARACTERS]
