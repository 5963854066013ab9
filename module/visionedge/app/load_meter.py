"""Measures the load: frames per second demanded and delivered, CPU cores in use, and the bottleneck.

`LoadMeter` takes samples of the frame counters and of the CPU times in `/proc`; `compute_load` makes a
`LoadMeasurement` of two samples; `find_bottleneck` names the limit and the setting that helps. Both functions
are pure.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from visionedge.camera.timing import AdmissionCounts
from visionedge.engine.batcher import BatcherStatistics, CameraStatistics, DropReason
from visionedge.runtime.process_limits import cpu_quota, usable_cores

Bottleneck = Literal["none", "quota", "decode", "engine", "others", "idle"]

_KEEPS_UP_SHARE = 0.95
_SLACK_PER_S = 0.5
_SATURATED_SHARE = 0.85
_OTHER_PROGRAMS_SHARE = 0.25
_FFMPEG_THREAD_PREFIX = "av:"
"""The names of FFmpeg's decoding threads begin with it."""


@dataclass(frozen=True, slots=True)
class CameraLoad:
    """A camera's frames per second, and the CPU cores that its thread uses.

    `demanded`: the configured rate; `admitted`: the rate that the overload levels leave of it; `offered`:
    frames that the camera put into its slot; `delivered`: frames that were analysed; `lost`: frames that were
    replaced by a newer one or became too old.
    """

    demanded: float
    admitted: float
    offered: float
    delivered: float
    lost: float
    decode_cores: float


@dataclass(frozen=True, slots=True)
class LoadMeasurement:
    """The load between two samples: rates by camera, and the average number of CPU cores in use.

    `cores`: cores that this process may use; `other_cores`: those that it uses for neither decoding nor
    inference; `external_cores`: those of `cores` that other programs use. `gpu`: the engine runs on a GPU.
    `quota`: the number of cores that a CPU quota allows; None without one.
    """

    seconds: float
    cameras: Mapping[str, CameraLoad]
    cores: int
    decode_cores: float
    infer_cores: float
    other_cores: float
    external_cores: float
    gpu: bool
    quota: float | None = None

    @property
    def available_cores(self) -> float:
        """The cores that the module can use: fewer than `cores` under a quota."""
        return self.cores if self.quota is None else min(self.cores, self.quota)

    @property
    def demanded(self) -> float:
        """The configured frames per second of all cameras."""
        return sum(camera.demanded for camera in self.cameras.values())

    @property
    def admitted(self) -> float:
        """The frames per second that the overload levels leave of them."""
        return sum(camera.admitted for camera in self.cameras.values())

    @property
    def offered(self) -> float:
        """The frames per second that cameras put into their slots."""
        return sum(camera.offered for camera in self.cameras.values())

    @property
    def lost(self) -> float:
        """The frames per second that were replaced or became too old."""
        return sum(camera.lost for camera in self.cameras.values())

    @property
    def delivered(self) -> float:
        """The frames per second that were analysed."""
        return sum(camera.delivered for camera in self.cameras.values())

    @property
    def used_cores(self) -> float:
        """The cores that the module uses."""
        return self.decode_cores + self.infer_cores + self.other_cores

    @property
    def is_saturated(self) -> bool:
        """Whether at least 85 % of the available cores are in use, by any program."""
        return self.used_cores + self.external_cores >= _SATURATED_SHARE * self.available_cores

    @property
    def is_under_quota(self) -> bool:
        """Whether a CPU quota allows fewer cores than there are."""
        return self.quota is not None and self.quota < self.cores

    def describe_cores(self, cores: float) -> str:
        """A number of cores as text: ``40 % of 4 cores``, or ``40 % of 0.5 core (CPU quota)``."""
        return self.describe_share(cores) + (" (CPU quota)" if self.is_under_quota else "")

    def describe_share(self, cores: float) -> str:
        """Like `describe_cores`, without the reason."""
        plural = "s" if self.available_cores > 1 else ""
        share = f"{cores / self.available_cores:.0%}".replace("%", " %")
        return f"{share} of {self.available_cores:.3g} core{plural}"


@dataclass(frozen=True, slots=True)
class BottleneckVerdict:
    """The bottleneck, and a sentence that names it and the setting that helps."""

    bottleneck: Bottleneck
    sentence: str


def find_bottleneck(seen: LoadMeasurement) -> BottleneckVerdict:
    """The bottleneck of the module, by the rates and the cores in use."""
    if not seen.demanded:
        return BottleneckVerdict("idle", "no camera delivers frames")
    rates = f"{seen.delivered:.1f} of {seen.demanded:.1f} frames/s"
    if is_nearly(seen.delivered, seen.demanded):
        return BottleneckVerdict("none", f"keeps up: {rates} with {seen.describe_cores(seen.used_cores)}")
    most_demanding = _camera_with_highest(seen, lambda camera: camera.demanded)
    if (
        seen.quota is not None
        and seen.quota <= seen.cores
        and seen.used_cores >= _SATURATED_SHARE * seen.quota
    ):
        return BottleneckVerdict(
            "quota",
            f"{rates}: the module uses {seen.describe_share(seen.used_cores)}, its whole CPU quota: raise"
            f" the quota (docker run --cpus, HostConfig.NanoCpus), or lower fps of {most_demanding}",
        )
    if (
        seen.is_saturated
        and seen.external_cores >= _OTHER_PROGRAMS_SHARE * seen.available_cores
        and seen.external_cores > seen.decode_cores
    ):
        return BottleneckVerdict(
            "others",
            f"{rates}: other programs take {seen.external_cores:.1f} cores and leave {seen.used_cores:.1f} to"
            f" the module: move them, or lower fps of {most_demanding}",
        )
    return _decode_verdict(seen, rates) or _engine_verdict(seen, rates, most_demanding)


def _decode_verdict(seen: LoadMeasurement, rates: str) -> BottleneckVerdict | None:
    """The verdict if decoding is the limit: of all cores, or of the one core of a camera's thread."""
    if seen.is_saturated and seen.decode_cores > seen.infer_cores:
        costly = _camera_with_highest(seen, lambda camera: camera.decode_cores)
        return BottleneckVerdict(
            "decode",
            f"{rates}: decode takes {seen.describe_cores(seen.decode_cores)}: lower fps of {costly}, or give"
            " it a substream of lower resolution",
        )
    if seen.is_saturated or seen.lost >= seen.admitted - seen.offered:
        return None
    name = _camera_with_highest(seen, lambda camera: camera.admitted - camera.offered)
    slow = seen.cameras[name]
    return BottleneckVerdict(
        "decode",
        f"{rates}: {name} is decoded at {slow.offered:.1f} of {slow.admitted:.1f} frames/s, the limit of its"
        " thread: give it a substream of lower resolution",
    )


def _engine_verdict(seen: LoadMeasurement, rates: str, most_demanding: str) -> BottleneckVerdict:
    if seen.gpu:
        return BottleneckVerdict(
            "engine",
            f"{rates}: the GPU is the limit, the module uses only {seen.describe_cores(seen.used_cores)}:"
            f" lower fps of {most_demanding}, or use a smaller model",
        )
    return BottleneckVerdict(
        "engine",
        f"{rates}: the model takes {seen.describe_cores(seen.infer_cores)}: lower fps of {most_demanding},"
        " use a smaller model, its int8 variant or a GPU",
    )


def is_nearly(delivered: float, wanted: float) -> bool:
    """Whether a rate is at least 95 % of the wanted one, or at most 0.5 frames/s below it."""
    return delivered >= min(_KEEPS_UP_SHARE * wanted, wanted - _SLACK_PER_S)


def _camera_with_highest(seen: LoadMeasurement, figure: Callable[[CameraLoad], float]) -> str:
    """The camera with the highest figure."""
    return max(sorted(seen.cameras), key=lambda name: figure(seen.cameras[name]))


def cores_by_purpose(seen: LoadMeasurement) -> dict[str, float]:
    """The cores in use, by purpose."""
    return {"decode": seen.decode_cores, "infer": seen.infer_cores, "other": seen.other_cores}


# --- measuring ----------------------------------------------------------------------------------------------


class FrameCounters(NamedTuple):
    """A camera's frames since its start; the fields are the first ones of `CameraLoad`."""

    demanded: int
    admitted: int
    offered: int
    delivered: int
    lost: int


@dataclass(frozen=True, slots=True)
class LoadSample:
    """Counters at one moment: CPU seconds by thread and process, and frames by camera."""

    at_ns: int
    threads: Mapping[int, tuple[str, float]]
    process_s: float
    child_s: float
    machine_s: float
    frames: Mapping[str, FrameCounters]


def compute_load(
    before: LoadSample,
    after: LoadSample,
    *,
    cores: int,
    machine_cores: int,
    gpu: bool,
    quota: float | None = None,
) -> LoadMeasurement:
    """The load between two samples. `machine_cores` may be more than `cores`, which this process may use."""
    seconds = max(1e-9, (after.at_ns - before.at_ns) / 1e9)
    cores_by_name: dict[str, float] = {}
    for number, (name, cpu_s) in after.threads.items():
        was_s = before.threads.get(number, (name, 0.0))[1]
        cores_by_name[name] = cores_by_name.get(name, 0.0) + max(0.0, cpu_s - was_s) / seconds
    cameras = {
        # Cameras that are not in both samples are left out, as their rates are unknown.
        name: _compute_camera_load(
            before.frames[name], counted, seconds, cores_by_name.get(f"camera:{name}", 0.0)
        )
        for name, counted in after.frames.items()
        if name in before.frames
    }
    child = max(0.0, after.child_s - before.child_s) / seconds
    own = max(0.0, after.process_s - before.process_s) / seconds
    decode = _sum(cores_by_name, ("camera:", _FFMPEG_THREAD_PREFIX))
    lanes = _sum(cores_by_name, ("lane:",))
    idle = machine_cores - (after.machine_s - before.machine_s) / seconds
    return LoadMeasurement(
        seconds=seconds,
        cameras=cameras,
        cores=cores,
        decode_cores=decode,
        infer_cores=lanes + child,
        other_cores=max(0.0, own - decode - lanes),
        external_cores=max(0.0, min(cores, quota or cores) - own - child - max(0.0, idle)),
        gpu=gpu,
        quota=quota,
    )


def _compute_camera_load(
    before: FrameCounters, after: FrameCounters, seconds: float, decode_cores: float
) -> CameraLoad:
    def per_s(was: int, now: int) -> float:
        return (now - was if now >= was else now) / seconds  # counters restart when a camera is reopened

    demanded, admitted, offered, delivered, lost = map(per_s, before, after)
    return CameraLoad(demanded, admitted, offered, delivered, lost, decode_cores)


def _count_frames(counts: AdmissionCounts, seen: CameraStatistics) -> FrameCounters:
    return FrameCounters(
        demanded=counts.demanded,
        admitted=counts.admitted,
        offered=seen.offered - seen.dropped[DropReason.GATED],
        delivered=seen.analysed,
        lost=seen.dropped[DropReason.REPLACED] + seen.dropped[DropReason.STALE],
    )


def _sum(cores: Mapping[str, float], prefixes: tuple[str, ...]) -> float:
    return sum(share for name, share in cores.items() if name.startswith(prefixes))


class LoadMeter:
    """Takes samples; `measurement` is the load between the last two, None before. `proc` is Linux's /proc."""

    def __init__(self, proc: Path = Path("/proc"), clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.measurement: LoadMeasurement | None = None
        self._proc = proc
        self._clock = clock
        self._last: LoadSample | None = None
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")

    def take_sample(
        self,
        frames: BatcherStatistics,
        counts: Mapping[str, AdmissionCounts],
        *,
        children: Collection[int],
        gpu: bool,
    ) -> None:
        """Take a sample of the cameras in `counts`. Reads files of /proc, which is quick.

        `children` are the process ids of the engines, none if they have no processes of their own.

        Raises:
            OSError: the threads cannot be listed, for example without a free descriptor; no sample is taken.
        """
        sample = LoadSample(
            at_ns=self._clock(),
            threads=self._threads(),
            process_s=self._cpu_s(self._proc / "self" / "stat"),
            child_s=sum(self._cpu_s(self._proc / str(child) / "stat") for child in children),
            machine_s=self._machine_s(),
            frames={
                name: _count_frames(counts[name], camera)
                for name, camera in frames.cameras.items()
                if name in counts
            },
        )
        if self._last is not None:
            machine_cores = os.cpu_count() or 1
            self.measurement = compute_load(
                self._last,
                sample,
                cores=usable_cores(),
                machine_cores=machine_cores,
                gpu=gpu,
                quota=cpu_quota(),
            )
        self._last = sample

    def _threads(self) -> dict[int, tuple[str, float]]:
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        found = {}
        for task in (self._proc / "self" / "task").glob("*"):
            number = int(task.name)
            name = names.get(number) or _read_text(task / "comm").strip()
            found[number] = (name, self._cpu_s(task / "stat"))
        return found

    def _cpu_s(self, path: Path) -> float:
        """User and system time in seconds; 0 if the thread or process has ended."""
        fields = _read_text(path).rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * self._tick_s if len(fields) > 12 else 0.0

    def _machine_s(self) -> float:
        """The seconds in which the machine's cores were not idle, summed over the cores."""
        fields = _read_text(self._proc / "stat").partition("\n")[0].split()[1:9]
        # user nice system idle iowait irq softirq steal
        return sum(int(field) for place, field in enumerate(fields) if place not in (3, 4)) * self._tick_s


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
