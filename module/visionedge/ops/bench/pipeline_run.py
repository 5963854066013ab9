"""One measured run of `bench pipeline`: real cameras, batcher, engine and lanes, and what the run costs.

`open_engine_process` opens the engine in its own process, as the module does. `run_pipeline` runs a load on
it for some seconds and returns the figures. With a scene, tracker, zones and lines also take the results.
"""

import logging
import os
import re
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from visionedge.camera.camera import Camera, CameraDependencies, FrameSink
from visionedge.camera.sources.base import DecodedPicture, FrameSource, SourceLimits, WholePicture
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.config.schema import CameraConfig, InferenceConfig
from visionedge.engine.batcher import Batcher
from visionedge.engine.interface import Engine
from visionedge.engine.lanes import LanePool
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool, compute_block_count
from visionedge.errors import ConfigError, SourceError, VisionedgeError
from visionedge.frames.types import Frame, FrameResult, Picture, utc_now
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.machine import TICK_S
from visionedge.runtime.process_limits import usable_cores
from visionedge.runtime.threads import GROUP_S, LoopQueue, ThreadGroup
from visionedge.scene.camera_scene import CameraScene
from visionedge.scene.totals import SCENE_FILE_NAME, EventLimits
from visionedge.scene.writer import SceneWriter
from visionedge.web.documents import JsonDocument

_SYNTHETIC = re.compile(r"synthetic:(\d{2,5})x(\d{2,5})@(\d+(?:\.\d+)?)")
_SYNTHETIC_PICTURES = 8
_MAX_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StampedFrame(Frame):
    """A frame with the duration of its decoding and the time when it reached the batcher."""

    decode_ns: int
    put_ns: int


class VirtualCamera:
    """One camera of a load: the source that its `Camera` reads, and the sink of its frames.

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
        self._scheduled = scheduled
        self._sink = sink
        self._clock = clock
        self._wait = wait
        self._stop = threading.Event()
        self._start_ns: int | None = None
        self._read_ns = 0
        self._fill_from_ns = 0
        self._due_ns: int | None = None
        self.count_gated = sink.count_gated
        self.wait_taken = sink.wait_taken

    def wrap_source(self, source: FrameSource) -> FrameSource:
        """The source, with the schedule of this camera; a camera has one source at a time."""
        self._source = source
        self.live, self.decoder = source.live or self._scheduled, source.decoder
        self.set_wanted_rate, self.close = source.set_wanted_rate, source.close
        return self

    def read(self) -> DecodedPicture | None:
        """See `FrameSource.read`: hold the picture back until it is due."""
        began_ns = self._clock()
        decoded = self._source.read()
        self._fill_from_ns = self._clock()
        self._read_ns = self._fill_from_ns - began_ns
        if decoded is None or not self._scheduled or decoded.position_s is None:
            self._due_ns = None
            return decoded
        if self._start_ns is None:
            self._start_ns = began_ns - round(decoded.position_s * 1e9)
        self._due_ns = self._start_ns + round(decoded.position_s * 1e9)
        decoded.position_s = None  # else the camera would hold the picture back once more
        # The picture is decoded already, but a camera would have sent it at `due` and decoding would follow.
        early_ns = self._due_ns + self._read_ns - self._clock()
        if early_ns > 0:
            self._wait(self._stop, early_ns / 1e9)
        self._fill_from_ns = self._clock()
        return None if self._stop.is_set() else decoded

    def interrupt(self) -> None:
        """See `FrameSource.interrupt`."""
        self._stop.set()
        self._source.interrupt()

    def put(self, frame: Frame) -> bool:
        """See `FrameSink.put`: stamp the frame."""
        now_ns = self._clock()
        values = {each.name: getattr(frame, each.name) for each in fields(Frame)}
        if self._due_ns is not None:
            values["captured_ns"] = self._due_ns
        decode_ns = self._read_ns + now_ns - self._fill_from_ns
        return self._sink.put(StampedFrame(**values, decode_ns=decode_ns, put_ns=now_ns))


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

    def __init__(self, spec: SyntheticSpec, pictures: Sequence[Picture]) -> None:
        self._spec = spec
        self._pictures = pictures
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
    """The pictures of a synthetic camera; all cameras of a load share them."""
    noise = np.random.default_rng(1).integers(0, 64, (spec.height_px, spec.width_px, 3), np.uint8)
    step_px = max(1, spec.width_px // _SYNTHETIC_PICTURES)
    pictures = [noise.copy() for _ in range(_SYNTHETIC_PICTURES)]
    for number, picture in enumerate(pictures):
        picture[:, number * step_px : (number + 1) * step_px] = 230
    return pictures


STAGES = ("late", "decode", "wait", "infer", "deliver")
_QUANTILES = (50, 95, 99)
_WARM_UP_S = 1.0
_STOP_S = 5.0
_EVENT_LIMITS = EventLimits(64_000_000, 31)


@dataclass(frozen=True, slots=True)
class PipelineLoad:
    """What to run. Without `fps` each camera reads as fast as its frames are taken.

    With `fps` the pictures of files and synthetic cameras come at their own rate, and each camera hands on
    `fps` of them per second. A frame whose result comes within `slo_ms` counts as goodput. `scene`: the
    zones and lines of each camera for a second run in each round. `data` is the folder of compiled graphs and
    measured plans; without it the engine uses the default plan of its device.
    """

    model: Path
    source: str
    cameras: int = 4
    fps: float | None = None
    slo_ms: float = 500.0
    seconds: float = 8.0
    rounds: int = 3
    baseline: bool = False
    scene: CameraConfig | None = None
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    data: Path | None = None

    @property
    def camera_names(self) -> list[str]:
        """The names of its cameras."""
        return [f"bench-{number}" for number in range(self.cameras)]


@contextmanager
def open_engine_process(load: PipelineLoad, model: Model) -> Iterator[tuple[EngineClient, SharedFramePool]]:
    """An open engine in its own process, and the shared memory of its frames; both are closed afterwards.

    Raises:
        ModelError, DeviceError: the engine cannot be opened.
    """
    frame_pool = SharedFramePool(model.input, compute_block_count(load.cameras, usable_cores()))
    with (
        closing(frame_pool),
        closing(EngineClient(model, load.inference, frame_pool, data=load.data)) as engine,
    ):
        engine.open()
        yield engine, frame_pool


def run_pipeline(
    load: PipelineLoad,
    engine: EngineClient,
    frame_pool: SharedFramePool,
    selection: Selection,
    *,
    with_scene: bool = False,
) -> "PipelineRun":
    """Run the load for its seconds, after 1 s of warm-up; `with_scene`: with the zones and lines of the load.

    Raises:
        SourceError: no frame came through.
        VisionedgeError: a thread failed, or did not end.
    """
    rows: list[ResultRecord] = []

    def add(result: FrameResult) -> None:
        rows.append(make_record(result, time.monotonic_ns()))

    with ExitStack() as stack:
        stack.enter_context(_quiet_cameras())
        handle: Callable[[FrameResult], None] = _ignore
        if with_scene and load.scene is not None:
            cameras = dict.fromkeys(load.camera_names, load.scene)
            selection = selection.for_cameras(engine.info().model, cameras)
            handle = stack.enter_context(_open_scenes(cameras, load.inference.confidence))
        queue = stack.enter_context(_run_result_loop(handle))

        def deliver(result: FrameResult) -> None:
            add(result)
            queue.put(result)

        batcher, failed = stack.enter_context(_run_cameras(load, engine, frame_pool, selection, deliver))
        failed.wait(_WARM_UP_S)
        rows.clear()
        before, used_s, began_s = _dropped(batcher), cpu_s(engine), time.monotonic()
        failed.wait(load.seconds)
        in_time, took_s, used_s = rows.copy(), time.monotonic() - began_s, cpu_s(engine) - used_s
        cost = RunCost(took_s, used_s, _dropped(batcher) - before, rss_mib(engine))
    return summarize_run(in_time, cost, load.slo_ms, load.cameras)


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


class PipelineRun(JsonDocument):
    """The figures of one run, and their medians over several runs.

    Latency is from capture to result, in ms. Age is the age of a camera's newest result when the next one
    replaces it, in ms: it grows with latency and with every dropped frame. Goodput is the number of frames
    per second whose latency met the objective. Fairness is Jain's index of the cameras' frame counts: 1 if
    all are equal, 1/n if one camera has all of them.
    """

    frames_per_second: float
    cpu_ms_per_frame: float
    latency_ms: dict[str, float]
    age_ms: dict[str, float]
    goodput_per_second: float
    stages_ms: dict[str, float]
    dropped: dict[str, int]
    rss_mib: float = Field(alias="rssMiB")
    detections_per_frame: float
    fairness: float


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
        frames_per_second=len(rows) / cost.took_s,
        cpu_ms_per_frame=cost.cpu_s * 1000 / len(rows),
        latency_ms=_percentiles(total_ms),
        age_ms=_percentiles(np.array(compute_ages_ns(rows) or [0]) / 1e6),
        goodput_per_second=float((total_ms <= slo_ms).sum()) / cost.took_s,
        stages_ms={name: float(np.median(each)) / 1e6 for name, each in stages.items()},
        dropped={reason: count for reason, count in sorted(cost.dropped.items()) if count},
        rssMiB=cost.rss_mib,
        detections_per_frame=float(np.mean([row.found for row in rows])),
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


# --- cameras and threads ------------------------------------------------------------------------------------


@contextmanager
def _run_cameras(
    load: PipelineLoad,
    engine: EngineClient,
    frame_pool: SharedFramePool,
    selection: Selection,
    deliver: Callable[[FrameResult], None],
) -> Iterator[tuple[Batcher, threading.Event]]:
    """Running cameras, batcher and lanes, and an event that is set when a thread fails; ends all of them."""
    failed = threading.Event()
    thread_group = ThreadGroup(lambda _name, _error: failed.set())
    batcher = Batcher(engine.info().plan.max_batch, int(load.inference.max_age_seconds * 1e9))
    synthetic = SyntheticSpec.parse(load.source)
    pictures = make_synthetic_pictures(synthetic) if synthetic else []

    def make_camera(name: str) -> Camera:
        virtual = VirtualCamera(batcher, scheduled=load.fps is not None)

        def opener(uri: CameraUri, limits: SourceLimits) -> FrameSource:
            if synthetic is not None:
                return virtual.wrap_source(SyntheticSource(synthetic, pictures))
            return virtual.wrap_source(open_source(uri, replace(limits, loop=True)))

        return Camera(
            name,
            "demo:" if synthetic else load.source,
            engine.info().model.input,
            virtual,
            fps=load.fps,
            paced=load.fps is not None,
            allocate=frame_pool.allocate,
            dependencies=CameraDependencies(opener=opener),
        )

    cameras = [make_camera(name) for name in load.camera_names]
    lane_pool = LanePool(batcher, thread_group, deliver)
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


def _ignore(_result: FrameResult) -> None:
    """What a run without a scene does with a result."""


@contextmanager
def _run_result_loop(handle: Callable[[FrameResult], None]) -> Iterator[LoopQueue[FrameResult]]:
    """A thread that handles results in groups, as the loop of the module does."""
    awake, stopping = threading.Event(), threading.Event()
    queue: LoopQueue[FrameResult] = LoopQueue(awake.set)

    def run() -> None:
        while not stopping.is_set():
            awake.wait()
            awake.clear()
            while results := queue.drain(stay_awake=True):
                for result in results:
                    handle(result)
                stopping.wait(GROUP_S)

    errors: list[BaseException | None] = []
    thread_group = ThreadGroup(lambda _name, error: errors.append(error))
    thread_group.start("results", run, vital=True, may_return=True)
    try:
        yield queue
    finally:
        stopping.set()
        awake.set()
        left = thread_group.join(_STOP_S)
    if left or errors:
        raise VisionedgeError("the benchmark failed, see the log: its results could not be handled")


@contextmanager
def _open_scenes(
    cameras: Mapping[str, CameraConfig], confidence: float
) -> Iterator[Callable[[FrameResult], None]]:
    """The scenes of cameras, with the thread that writes them into a file: a call for each result."""
    with tempfile.TemporaryDirectory() as folder:
        writer = SceneWriter(Path(folder) / SCENE_FILE_NAME, _EVENT_LIMITS, lambda _documents: None)
        thread = writer.start(ThreadGroup(lambda _name, _error: None))
        scenes = {name: CameraScene(name, 1, {}) for name in cameras}
        for name, scene in scenes.items():
            writer.put(scene.configure(cameras[name], utc_now()))
            scene.use_confidence(confidence)
        try:
            yield lambda result: writer.put(scenes[result.frame.camera].update(result)[1])
        finally:
            writer.close()
            thread.join(_STOP_S)


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


def _dropped(batcher: Batcher) -> Counter[str]:
    total: Counter[str] = Counter()
    for camera in batcher.statistics().cameras.values():
        total.update({str(reason): count for reason, count in camera.dropped.items()})
    return total


# --- processor time and memory ------------------------------------------------------------------------------


def cpu_s(engine: Engine | None = None) -> float:
    """The processor time of this process and of the engine's process so far."""
    used_s = time.process_time()
    for pid in _child(engine):
        columns = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        used_s += (int(columns[11]) + int(columns[12])) * TICK_S
    return used_s


def rss_mib(engine: Engine | None = None) -> float:
    """The resident memory of this process and of the engine's process."""
    files = [Path(f"/proc/{pid}/statm") for pid in ("self", *_child(engine))]
    pages = sum(int(file.read_text(encoding="ascii").split()[1]) for file in files)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _child(engine: Engine | None) -> list[int]:
    """The number of the engine's process, if it has one."""
    process = engine.info().process if engine else None
    return [process.pid] if process and process.pid else []
