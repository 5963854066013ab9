"""One measured stretch of a load: real cameras, batcher, engine and lanes, and what it cost."""

import logging
import os
import resource
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from visionedge.camera.camera import Camera, CameraDependencies
from visionedge.camera.sources.base import FrameSource, SourceLimits
from visionedge.camera.sources.open import LoopedSource, open_source
from visionedge.config.addresses import CameraUri
from visionedge.config.schema import InferenceConfig
from visionedge.engine.batcher import Batcher
from visionedge.engine.interface import Engine
from visionedge.engine.lanes import LanePool
from visionedge.engine.local_engine import open_engine
from visionedge.engine.plan import Plan
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool, compute_block_count
from visionedge.errors import SourceError, VisionedgeError
from visionedge.frames.types import FrameResult
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.virtual_cameras import (
    ArrivalSchedule,
    StampedFrame,
    SyntheticSource,
    SyntheticSpec,
    VirtualCamera,
    make_synthetic_pictures,
)
from visionedge.runtime.threads import ThreadGroup

# What a measured stretch gave: every result noted as it is delivered, and the figures made of them.


_QUANTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class ResultRecord:
    """One result. Times in ns: `captured_ns` (when it was due) and `delivered_ns` are monotonic."""

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
    """What a stretch took: seconds, processor seconds, frames let go by reason, and memory at its end."""

    took_s: float
    cpu_s: float
    dropped: Mapping[str, int]
    rss_mib: float


@dataclass(frozen=True, slots=True)
class PipelineRun:
    """The figures of one measured stretch.

    Latency is from capture to result, in ms. Age is how old the newest result of a camera has become when the
    next one takes its place: it grows with latency and with every frame that was let go. Goodput are the
    frames per second whose latency met the objective. Fairness is Jain's index of what the cameras got: 1
    when all got the same, 1/n when one got everything.
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
    """Collects results; lanes deliver, the measurer takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[ResultRecord] = []

    def deliver(self, result: FrameResult) -> None:
        """Note a result, now."""
        row = make_record(result, time.monotonic_ns())
        with self._lock:
            self._rows.append(row)

    def take(self) -> list[ResultRecord]:
        """Everything since the last time."""
        with self._lock:
            rows, self._rows = self._rows, []
        return rows

    def progress_line(self, elapsed_s: float, seconds: float) -> str:
        """How it goes, in a line."""
        with self._lock:
            rows = list(self._rows)
        p99_ms = np.percentile([row.total_ns for row in rows], 99) / 1e6 if rows else float("nan")
        return (
            f"  {elapsed_s:.0f} of {seconds:g} s: {len(rows) / elapsed_s:.1f} frames/s, p99 {p99_ms:.0f} ms"
        )


def make_record(result: FrameResult, now_ns: int) -> ResultRecord:
    """A result with its stages: late, decode, wait, infer, deliver; together they are its latency."""
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
        # Of a frame that is not on a schedule decoding came before its capture: nothing was late then.
        late_ns=max(0, put_ns - frame.captured_ns - decode_ns),
        decode_ns=decode_ns,
        wait_ns=max(0, taken_ns - put_ns),
        deliver_ns=max(0, now_ns - taken_ns - timing.infer_ns),
    )


def summarize_run(
    rows: Sequence[ResultRecord], cost: RunCost, slo_ms: float, cameras: int = 1
) -> PipelineRun:
    """The figures of a stretch with so many cameras.

    Raises:
        SourceError: there is no result.
    """
    if not rows:
        raise SourceError("no frame came through in the time given; give --seconds more, or another --source")
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
    """Jain's index of these shares; who is not among them got nothing."""
    return sum(shares) ** 2 / (max(among, len(shares)) * sum(share**2 for share in shares))


STAGES = ("late", "decode", "wait", "infer", "deliver")


def compute_ages_ns(rows: Sequence[ResultRecord]) -> list[int]:
    """How old each camera's newest result was each time that the next one came."""
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
    """The frames that were let go in all of them, by reason."""
    return dict(sum((Counter(run.dropped) for run in runs), Counter()))


_WARM_UP_S = 1.0
_STOP_S = 5.0
_PROGRESS_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class PipelineLoad:
    """What to run: `fps` None is flat out, each camera as fast as its frames are taken.

    With `fps` the pictures of files and synthetic cameras come at their own rate, `jitter_ms` early or late,
    with a drop-out every `dropouts_s` on average, and each camera hands on `fps` a second of them. Frames
    whose results come within `slo_ms` are goodput. With `saturate` the number of cameras is looked for, up to
    `most`.

    The engine runs in a process of its own unless `in_process`; with `compare_process` it is measured in both
    ways. `data` is the folder of compiled graphs and measured plans; without it the plan is that of a rule.
    """

    model: Path
    source: str
    cameras: int = 4
    fps: float | None = None
    jitter_ms: float = 0.0
    dropouts_s: float | None = None
    slo_ms: float = 500.0
    saturate: bool = False
    max_cameras: int = 64
    seconds: float = 8.0
    rounds: int = 3
    baseline: bool = False
    in_process: bool = False
    compare_process: bool = False
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """An engine that is open, in its own process where there is an arena."""

    engine: Engine
    frame_pool: SharedFramePool | None = None

    def close(self) -> None:
        """Let go of both."""
        self.engine.close()
        if self.frame_pool is not None:
            self.frame_pool.close()


def open_engine_setup(
    load: PipelineLoad, model: Model, *, own_process: bool, like: Engine | None = None
) -> EngineSetup:
    """Open an engine for a load, on the plan of another one where that is given.

    Raises:
        ModelError, DeviceError: it cannot be had.
    """
    plans: dict[str, Plan] = {like.info().device.effective: like.info().plan} if like else {}
    if not own_process:
        return EngineSetup(open_engine(model, load.inference, data=load.data, plans=plans))
    frame_pool = SharedFramePool(model.input, compute_block_count(load.cameras))
    engine = EngineClient(model, load.inference, frame_pool, data=load.data)
    try:
        engine.open()
    except BaseException:
        frame_pool.close()
        raise
    return EngineSetup(engine, frame_pool)


def run_pipeline(
    load: PipelineLoad,
    setup: EngineSetup,
    selection: Selection,
    progress: Callable[[str], None] | None = None,
) -> PipelineRun:
    """Let the load run for its seconds; `tell` hears how it goes every other second.

    Raises:
        SourceError: no frame came through.
        VisionedgeError: a thread died, or did not end.
    """
    recorder = ResultRecorder()
    with _quiet_cameras(), _run_cameras(load, setup, selection, recorder) as (batcher, failed):
        failed.wait(_WARM_UP_S)
        recorder.take()
        before, cpu, began_s = _dropped(batcher), cpu_s(setup.engine), time.monotonic()
        while not failed.is_set() and (left_s := began_s + load.seconds - time.monotonic()) > 0:
            failed.wait(min(left_s, _PROGRESS_INTERVAL_S))
            if progress is not None and left_s > _PROGRESS_INTERVAL_S:
                progress(recorder.progress_line(time.monotonic() - began_s, load.seconds))
        rows, took_s, cpu = recorder.take(), time.monotonic() - began_s, cpu_s(setup.engine) - cpu
        dropped, rss = _dropped(batcher) - before, rss_mib(setup.engine)
    return summarize_run(rows, RunCost(took_s, cpu, dropped, rss), load.slo_ms, load.cameras)


@contextmanager
def _run_cameras(
    load: PipelineLoad, setup: EngineSetup, selection: Selection, recorder: ResultRecorder
) -> Iterator[tuple[Batcher, threading.Event]]:
    """Cameras, batcher and lanes at work, and an event that tells of a death; all are gone afterwards."""
    failed, engine = threading.Event(), setup.engine
    thread_group = ThreadGroup(lambda _name, _error: failed.set())
    batcher = Batcher(engine.info().plan.max_batch, int(load.inference.max_age_seconds * 1e9))
    made_up = SyntheticSpec.parse(load.source)
    pictures = make_synthetic_pictures(made_up) if made_up else None

    def opener(uri: CameraUri, limits: SourceLimits) -> FrameSource:
        return SyntheticSource(made_up, pictures) if made_up else _open_looped(uri, limits)

    cameras = [_camera(load, number, setup, batcher, opener) for number in range(load.cameras)]
    lineup = LanePool(batcher, thread_group, recorder.deliver)
    lineup.swap_engine(engine, selection)
    for camera in cameras:
        batcher.open(camera.name)
        thread_group.start(f"camera:{camera.name}", camera.run)
    try:
        yield batcher, failed
    finally:
        thread_group.stopping.set()  # from here on a lane that ends is no accident
        for camera in cameras:
            camera.stop()
        lineup.close()
        batcher.close()
        left = thread_group.join(_STOP_S)
    if failed.is_set() or left:
        raise VisionedgeError(f"the bench broke; see the log ({', '.join(left) or 'a thread died'})")


@contextmanager
def _quiet_cameras() -> Iterator[None]:
    """Cameras log only what goes wrong, except at the level debug.

    A search for the most cameras opens and closes hundreds, and its few lines of progress would be lost.
    """
    cameras = logging.getLogger(Camera.__module__)
    before = cameras.level
    if not cameras.isEnabledFor(logging.DEBUG):
        cameras.setLevel(logging.WARNING)
    try:
        yield
    finally:
        cameras.setLevel(before)


OpenSource = Callable[[CameraUri, SourceLimits], FrameSource]


def _camera(
    load: PipelineLoad, number: int, setup: EngineSetup, batcher: Batcher, opener: OpenSource
) -> Camera:
    """One camera of the load; every one of them has its own jitter and drop-outs, the same in each run."""
    arrivals = ArrivalSchedule(number, jitter_s=load.jitter_ms / 1000, dropouts_s=load.dropouts_s)
    virtual = VirtualCamera(batcher, None if load.fps is None else arrivals)
    return Camera(
        f"bench-{number}",
        load.source if SyntheticSpec.parse(load.source) is None else "demo:",
        setup.engine.info().model.input,
        virtual,
        fps=load.fps,
        paced=load.fps is not None,
        allocate=setup.frame_pool.allocate if setup.frame_pool else None,
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


def cpu_s(engine: Engine | None = None) -> float:
    """The processor time of this process so far, with that of an engine's own."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    child = engine.info().process if engine else None
    return used.ru_utime + used.ru_stime + (_child_s(child.pid) if child and child.pid else 0.0)


def _child_s(pid: int) -> float:
    """User and system time of a process, as the kernel tells it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(engine: Engine | None = None) -> float:
    """The memory of this process that is resident now, with that of an engine's own."""
    child = engine.info().process if engine else None
    pids = [os.getpid(), *([child.pid] if child and child.pid else [])]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
