"""One measured run of `bench pipeline`: real cameras, batcher, engine and lanes, and what the run costs.

`open_engine_setup` opens the engine in its own process, as the module does. `run_pipeline` runs a load on it
for some seconds and returns the figures.
"""

import logging
import os
import re
import resource
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

from visionedge.camera.camera import Camera, CameraDependencies, FrameSink
from visionedge.camera.sources.base import DecodedPicture, FrameSource, SourceLimits, WholePicture
from visionedge.camera.sources.open import LoopedSource, open_source
from visionedge.config.addresses import CameraUri
from visionedge.config.schema import InferenceConfig
from visionedge.engine.batcher import Batcher
from visionedge.engine.interface import Engine
from visionedge.engine.lanes import LanePool
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool, compute_block_count
from visionedge.errors import ConfigError, SourceError, VisionedgeError
from visionedge.frames.types import Frame, FrameResult, Picture
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.runtime.threads import ThreadGroup

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


STAGES = ("late", "decode", "wait", "infer", "deliver")
_QUANTILES = (50, 95, 99)
_WARM_UP_S = 1.0
_STOP_S = 5.0
_PROGRESS_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class PipelineLoad:
    """What to run. Without `fps` each camera reads as fast as its frames are taken.

    With `fps` the pictures of files and synthetic cameras come at their own rate, and each camera hands on
    `fps` of them per second. A frame whose result comes within `slo_ms` counts as goodput. `data` is the
    folder of compiled graphs and measured plans; without it the engine uses the default plan of its device.
    """

    model: Path
    source: str
    cameras: int = 4
    fps: float | None = None
    slo_ms: float = 500.0
    seconds: float = 8.0
    rounds: int = 3
    baseline: bool = False
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """An open engine in its own process, and the shared memory of its frames."""

    engine: EngineClient
    frame_pool: SharedFramePool

    def close(self) -> None:
        """Close both."""
        self.engine.close()
        self.frame_pool.close()


def open_engine_setup(load: PipelineLoad, model: Model) -> EngineSetup:
    """Open an engine for a load.

    Raises:
        ModelError, DeviceError: the engine cannot be opened.
    """
    frame_pool = SharedFramePool(model.input, compute_block_count(load.cameras))
    engine = EngineClient(model, load.inference, frame_pool, data=load.data)
    try:
        engine.open()
    except BaseException:
        frame_pool.close()
        raise
    return EngineSetup(engine, frame_pool)


def run_pipeline(
    load: PipelineLoad, setup: EngineSetup, selection: Selection, progress: Callable[[str], None]
) -> "PipelineRun":
    """Run the load for its seconds, after 1 s of warm-up; `progress` gets a line every 2 s.

    Raises:
        SourceError: no frame came through.
        VisionedgeError: a thread failed, or did not end.
    """
    recorder = ResultRecorder()
    with _quiet_cameras(), _run_cameras(load, setup, selection, recorder) as (batcher, failed):
        failed.wait(_WARM_UP_S)
        recorder.take()
        before, cpu, began_s = _dropped(batcher), cpu_s(setup.engine), time.monotonic()
        while not failed.is_set() and (left_s := began_s + load.seconds - time.monotonic()) > 0:
            failed.wait(min(left_s, _PROGRESS_INTERVAL_S))
            if left_s > _PROGRESS_INTERVAL_S:
                progress(recorder.progress_line(time.monotonic() - began_s, load.seconds))
        rows, took_s, cpu = recorder.take(), time.monotonic() - began_s, cpu_s(setup.engine) - cpu
        dropped, rss = _dropped(batcher) - before, rss_mib(setup.engine)
    return summarize_run(rows, RunCost(took_s, cpu, dropped, rss), load.slo_ms, load.cameras)


# --- results and figures ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResultRecord:
    """One result. `captured_ns` (when the picture was due) and `delivered_ns` are monotonic times in ns."""

    camera: str
    captured_ns: int
    delivered_ns: int
    infer_ns: int
    found: int
    late_ns: int = 0
    decode_ns: int = 0
    wait_ns: int = 0
    deliver_ns: int = 0

    @property
    def total_ns(self) -> int:
        """From capture to delivery."""
        return self.delivered_ns - self.captured_ns


@dataclass(frozen=True, slots=True)
class RunCost:
    """The cost of a run: seconds, processor seconds, dropped frames by reason, and memory at its end."""

    took_s: float
    cpu_s: float
    dropped: Mapping[str, int]
    rss_mib: float


@dataclass(frozen=True, slots=True)
class PipelineRun:
    """The figures of one run.

    Latency is from capture to result, in ms. Age is the age of a camera's newest result when the next one
    replaces it, in ms: it grows with latency and with every dropped frame. Goodput is the number of frames
    per second whose latency met the objective. Fairness is Jain's index of the cameras' frame counts: 1 if
    all are equal, 1/n if one camera has all of them.
    """

    frames_per_s: float
    goodput_per_s: float
    cpu_ms_per_frame: float
    latency_ms: Mapping[str, float]
    age_ms: Mapping[str, float]
    stages_ms: Mapping[str, float]
    dropped: Mapping[str, int]
    detections_per_frame: float
    rss_mib: float
    fairness: float


class ResultRecorder:
    """Collects results: the lanes call `deliver`, the benchmark calls `take`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[ResultRecord] = []

    def deliver(self, result: FrameResult) -> None:
        """Record a result with the present time."""
        row = make_record(result, time.monotonic_ns())
        with self._lock:
            self._rows.append(row)

    def take(self) -> list[ResultRecord]:
        """The results since the last call."""
        with self._lock:
            rows, self._rows = self._rows, []
        return rows

    def progress_line(self, elapsed_s: float, seconds: float) -> str:
        """Frames per second and latency so far, in one line."""
        with self._lock:
            rows = list(self._rows)
        p99_ms = np.percentile([row.total_ns for row in rows], 99) / 1e6 if rows else float("nan")
        return (
            f"  {elapsed_s:.0f} of {seconds:g} s: {len(rows) / elapsed_s:.1f} frames/s, p99 {p99_ms:.0f} ms"
        )


def make_record(result: FrameResult, now_ns: int) -> ResultRecord:
    """A result with the durations of its `STAGES`; their sum is its latency."""
    frame, timing = result.frame, result.timing
    taken_ns = frame.captured_ns + timing.wait_ns
    put_ns, decode_ns = frame.captured_ns, 0
    if isinstance(frame, StampedFrame):
        put_ns, decode_ns = frame.put_ns, frame.decode_ns
    return ResultRecord(
        camera=frame.camera,
        captured_ns=frame.captured_ns,
        delivered_ns=now_ns,
        infer_ns=timing.infer_ns,
        found=len(result.detections),
        # A frame without a schedule is captured after it was decoded, so it cannot be late.
        late_ns=max(0, put_ns - frame.captured_ns - decode_ns),
        decode_ns=decode_ns,
        wait_ns=max(0, taken_ns - put_ns),
        deliver_ns=max(0, now_ns - taken_ns - timing.infer_ns),
    )


def summarize_run(
    rows: Sequence[ResultRecord], cost: RunCost, slo_ms: float, cameras: int = 1
) -> PipelineRun:
    """The figures of a run with `cameras` cameras.

    Raises:
        SourceError: there are no results.
    """
    if not rows:
        raise SourceError("no frame was analysed; give more --seconds or another --source")
    total_ms = np.array([row.total_ns for row in rows]) / 1e6
    stages = {name: [getattr(row, f"{name}_ns") for row in rows] for name in STAGES}
    return PipelineRun(
        frames_per_s=len(rows) / cost.took_s,
        goodput_per_s=float((total_ms <= slo_ms).sum()) / cost.took_s,
        cpu_ms_per_frame=cost.cpu_s * 1000 / len(rows),
        latency_ms=_percentiles(total_ms),
        age_ms=_percentiles(np.array(compute_ages_ns(rows) or [0]) / 1e6),
        stages_ms={name: float(np.median(each)) / 1e6 for name, each in stages.items()},
        dropped={reason: count for reason, count in sorted(cost.dropped.items()) if count},
        detections_per_frame=float(np.mean([row.found for row in rows])),
        rss_mib=cost.rss_mib,
        fairness=fairness(list(Counter(row.camera for row in rows).values()), cameras),
    )


def fairness(shares: Sequence[int], among: int) -> float:
    """Jain's index of the shares of `among` cameras; a camera without a share got 0."""
    return sum(shares) ** 2 / (max(among, len(shares)) * sum(share**2 for share in shares))


def compute_ages_ns(rows: Sequence[ResultRecord]) -> list[int]:
    """The age of each camera's newest result every time the next result replaced it."""
    by_camera: dict[str, list[ResultRecord]] = defaultdict(list)
    for row in rows:
        by_camera[row.camera].append(row)
    return [
        after.delivered_ns - before.captured_ns
        for given in by_camera.values()
        for before, after in pairwise(sorted(given, key=lambda row: row.delivered_ns))
    ]


def _percentiles(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in _QUANTILES}


def sum_dropped(runs: Sequence[PipelineRun]) -> dict[str, int]:
    """The dropped frames of all runs, by reason."""
    return dict(sum((Counter(run.dropped) for run in runs), Counter()))


# --- cameras and threads ------------------------------------------------------------------------------------


@contextmanager
def _run_cameras(
    load: PipelineLoad, setup: EngineSetup, selection: Selection, recorder: ResultRecorder
) -> Iterator[tuple[Batcher, threading.Event]]:
    """Running cameras, batcher and lanes, and an event that is set when a thread fails; ends all of them."""
    failed, engine = threading.Event(), setup.engine
    thread_group = ThreadGroup(lambda _name, _error: failed.set())
    batcher = Batcher(engine.info().plan.max_batch, int(load.inference.max_age_seconds * 1e9))
    synthetic = SyntheticSpec.parse(load.source)
    pictures = make_synthetic_pictures(synthetic) if synthetic else None

    def opener(uri: CameraUri, limits: SourceLimits) -> FrameSource:
        return SyntheticSource(synthetic, pictures) if synthetic else _open_looped(uri, limits)

    cameras = [_camera(load, number, setup, batcher, opener) for number in range(load.cameras)]
    lane_pool = LanePool(batcher, thread_group, recorder.deliver)
    lane_pool.swap_engine(engine, selection)
    for camera in cameras:
        batcher.open(camera.name)
        thread_group.start(f"camera:{camera.name}", camera.run)
    try:
        yield batcher, failed
    finally:
        thread_group.stopping.set()  # a lane that ends from now on has not failed
        for camera in cameras:
            camera.stop()
        lane_pool.close()
        batcher.close()
        left = thread_group.join(_STOP_S)
    if failed.is_set() or left:
        names = ", ".join(left) or "a thread"
        raise VisionedgeError(f"the benchmark failed, see the log: {names} did not end normally")


@contextmanager
def _quiet_cameras() -> Iterator[None]:
    """Cameras log only warnings and errors (all at level debug): each round opens and closes all of them."""
    cameras = logging.getLogger(Camera.__module__)
    before = cameras.level
    if not cameras.isEnabledFor(logging.DEBUG):
        cameras.setLevel(logging.WARNING)
    try:
        yield
    finally:
        cameras.setLevel(before)


def _camera(
    load: PipelineLoad,
    number: int,
    setup: EngineSetup,
    batcher: Batcher,
    opener: Callable[[CameraUri, SourceLimits], FrameSource],
) -> Camera:
    """One camera of the load."""
    virtual = VirtualCamera(batcher, scheduled=load.fps is not None)
    return Camera(
        f"bench-{number}",
        load.source if SyntheticSpec.parse(load.source) is None else "demo:",
        setup.engine.info().model.input,
        virtual,
        fps=load.fps,
        paced=load.fps is not None,
        allocate=setup.frame_pool.allocate,
        dependencies=CameraDependencies(opener=lambda uri, limits: virtual.wrap_source(opener(uri, limits))),
    )


def _open_looped(uri: CameraUri, limits: SourceLimits) -> FrameSource:
    source = open_source(uri, limits)
    if source.live:
        return source
    source.close()
    return LoopedSource(lambda: open_source(uri, limits))


def _dropped(batcher: Batcher) -> Counter[str]:
    total: Counter[str] = Counter()
    for camera in batcher.statistics().cameras.values():
        total.update({str(reason): count for reason, count in camera.dropped.items()})
    return total


# --- processor time and memory ------------------------------------------------------------------------------


def cpu_s(engine: Engine | None = None) -> float:
    """The processor time of this process and of the engine's process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    child = engine.info().process if engine else None
    return used.ru_utime + used.ru_stime + (_child_s(child.pid) if child and child.pid else 0.0)


def _child_s(pid: int) -> float:
    """User and system time of a process, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(engine: Engine | None = None) -> float:
    """The resident memory of this process and of the engine's process."""
    child = engine.info().process if engine else None
    pids = [os.getpid(), *([child.pid] if child and child.pid else [])]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
