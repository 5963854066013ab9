"""Demanded and delivered frames, and in one sentence what holds the module back and which knob to turn.

`judge` decides purely; `LoadMeter` reads the processor times of threads and processes, as Linux tells them.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visionedge.camera.timing import AdmissionCounts
from visionedge.engine.batcher import BatcherStatistics, CameraStatistics, DropReason
from visionedge.runtime.process_limits import cpu_quota, usable_cores

Bottleneck = Literal["none", "quota", "decode", "engine", "others", "idle"]

BOTTLENECKS: tuple[Bottleneck, ...] = ("none", "quota", "decode", "engine", "others", "idle")

_KEEPS_UP_SHARE = 0.95
_SLACK_PER_S = 0.5
_SATURATED_SHARE = 0.85
_OTHER_PROGRAMS_SHARE = 0.25
_FFMPEG_THREAD_PREFIX = "av:"
"""What FFmpeg calls the threads that decode beside the cameras' own."""


@dataclass(frozen=True, slots=True)
class CameraLoad:
    """A camera's frames per second, and the cores that its thread uses.

    `demanded` is what the configuration asks for, `admitted` what the overload ladder leaves of it, `offered`
    what the camera hands on, `delivered` what is analysed, `lost` what another frame or its age pushed out.
    """

    demanded: float
    admitted: float
    offered: float
    delivered: float
    lost: float
    decode_cores: float


@dataclass(frozen=True, slots=True)
class LoadMeasurement:
    """A stretch of time: loads by camera, and cores in use on average.

    `cores` is what this process may use, `other_cores` what it uses for neither decoding nor inference,
    `external_cores` those of `cores` that other programs of the machine leave no time on. `gpu` tells whether
    the engine computes on one. `quota` is the number of cores that a CPU quota allows; None without one.
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
    def limit(self) -> float:
        """The cores that can be used up: fewer than `cores` where a quota says so."""
        return self.cores if self.quota is None else min(self.cores, self.quota)

    @property
    def demanded(self) -> float:
        """Frames per second that the cameras are asked for."""
        return sum(camera.demanded for camera in self.cameras.values())

    @property
    def admitted(self) -> float:
        """Frames per second that the overload ladder leaves of them."""
        return sum(camera.admitted for camera in self.cameras.values())

    @property
    def offered(self) -> float:
        """Frames per second that the cameras hand on."""
        return sum(camera.offered for camera in self.cameras.values())

    @property
    def lost(self) -> float:
        """Frames per second that were handed on in vain."""
        return sum(camera.lost for camera in self.cameras.values())

    @property
    def delivered(self) -> float:
        """Frames per second that are analysed."""
        return sum(camera.delivered for camera in self.cameras.values())

    @property
    def used_cores(self) -> float:
        """All cores that the module uses."""
        return self.decode_cores + self.infer_cores + self.other_cores

    @property
    def is_saturated(self) -> bool:
        """Whether the cores are as good as all in use."""
        return self.used_cores + self.external_cores >= _SATURATED_SHARE * self.limit

    def share(self, cores: float) -> str:
        """So many cores in words."""
        plural = "s" if self.limit > 1 else ""
        return f"{cores / self.limit:.0%} of {self.limit:.3g} core{plural}".replace("%", " %")


@dataclass(frozen=True, slots=True)
class BottleneckVerdict:
    """What is the limit, and a sentence that names it and the knob."""

    bottleneck: Bottleneck
    sentence: str


def find_bottleneck(seen: LoadMeasurement) -> BottleneckVerdict:
    """What holds the module back."""
    if not seen.demanded:
        return BottleneckVerdict("idle", "no camera hands on frames")
    rates = f"{seen.delivered:.1f} of {seen.demanded:.1f} frames/s"
    if is_nearly(seen.delivered, seen.demanded):
        return BottleneckVerdict("none", f"keeps up: {rates} with {seen.share(seen.used_cores)}")
    most_demanding = _camera_with_highest(seen, lambda camera: camera.demanded)
    if (
        seen.quota is not None
        and seen.quota <= seen.cores
        and seen.used_cores >= _SATURATED_SHARE * seen.quota
    ):
        return BottleneckVerdict(
            "quota",
            f"{rates}: the module uses {seen.share(seen.used_cores)}, all that its CPU quota allows: raise"
            f" the quota (docker run --cpus, HostConfig.NanoCpus), or lower fps of {most_demanding}",
        )
    if (
        seen.is_saturated
        and seen.external_cores >= _OTHER_PROGRAMS_SHARE * seen.limit
        and seen.external_cores > seen.decode_cores
    ):
        return BottleneckVerdict(
            "others",
            f"{rates}: other programs take {seen.external_cores:.1f} cores and leave {seen.used_cores:.1f} to"
            f" the module: move them, or lower fps of {most_demanding}",
        )
    return _decode_verdict(seen, rates) or _engine_verdict(seen, rates, most_demanding)


def _decode_verdict(seen: LoadMeasurement, rates: str) -> BottleneckVerdict | None:
    """The verdict where decoding is the limit: of all cores, or of the one that a camera's thread has."""
    if seen.is_saturated and seen.decode_cores > seen.infer_cores:
        costly = _camera_with_highest(seen, lambda camera: camera.decode_cores)
        return BottleneckVerdict(
            "decode",
            f"{rates}: decode takes {seen.share(seen.decode_cores)}: lower fps of {costly}, or give it a"
            " substream of lower resolution",
        )
    if seen.is_saturated or seen.lost >= seen.admitted - seen.offered:
        return None
    name = _camera_with_highest(seen, lambda camera: camera.admitted - camera.offered)
    slow = seen.cameras[name]
    return BottleneckVerdict(
        "decode",
        f"{rates}: {name} is decoded at {slow.offered:.1f} of {slow.admitted:.1f} frames/s, all that its"
        " thread can: give it a substream of lower resolution",
    )


def _engine_verdict(seen: LoadMeasurement, rates: str, most_demanding: str) -> BottleneckVerdict:
    if seen.gpu:
        return BottleneckVerdict(
            "engine",
            f"{rates}: the GPU is the limit, the module uses only {seen.share(seen.used_cores)}: lower fps of"
            f" {most_demanding}, or take a smaller model",
        )
    return BottleneckVerdict(
        "engine",
        f"{rates}: the model takes {seen.share(seen.infer_cores)}: lower fps of {most_demanding}, "
        "take a smaller"
        " model or its int8 variant, or use a GPU",
    )


def is_nearly(delivered: float, wanted: float) -> bool:
    """Whether a rate is as good as the one that was wanted."""
    return delivered >= min(_KEEPS_UP_SHARE * wanted, wanted - _SLACK_PER_S)


def _camera_with_highest(seen: LoadMeasurement, figure: Callable[[CameraLoad], float]) -> str:
    """The camera that has most of it."""
    return max(sorted(seen.cameras), key=lambda name: figure(seen.cameras[name]))


def cores_by_purpose(seen: LoadMeasurement) -> dict[str, float]:
    """The cores in use, by what for."""
    return {"decode": seen.decode_cores, "infer": seen.infer_cores, "other": seen.other_cores}


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FrameCounters:
    """A camera's frames until one moment; see `CameraLoad`."""

    demanded: int
    admitted: int
    offered: int
    delivered: int
    lost: int


@dataclass(frozen=True, slots=True)
class LoadSample:
    """Counters at one moment: seconds of processor time, and frames by camera."""

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
    """What happened from one moment to a later one; the machine may have more cores than we may use."""
    seconds = max(1e-9, (after.at_ns - before.at_ns) / 1e9)
    cores_by_name: dict[str, float] = {}
    for number, (name, cpu_s) in after.threads.items():
        was_s = before.threads.get(number, (name, 0.0))[1]
        cores_by_name[name] = cores_by_name.get(name, 0.0) + max(0.0, cpu_s - was_s) / seconds
    cameras = {
        # Of one that was not there before it is not known what came within this time.
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
        return (now - was if now >= was else now) / seconds  # a camera that was opened again counts anew

    return CameraLoad(
        demanded=per_s(before.demanded, after.demanded),
        admitted=per_s(before.admitted, after.admitted),
        offered=per_s(before.offered, after.offered),
        delivered=per_s(before.delivered, after.delivered),
        lost=per_s(before.lost, after.lost),
        decode_cores=decode_cores,
    )


def _count_frames(asked: AdmissionCounts, seen: CameraStatistics) -> FrameCounters:
    return FrameCounters(
        demanded=asked.demanded,
        admitted=asked.admitted,
        offered=seen.offered - seen.dropped[DropReason.GATED],
        delivered=seen.analysed,
        lost=seen.dropped[DropReason.REPLACED] + seen.dropped[DropReason.STALE],
    )


def _sum(cores: Mapping[str, float], prefixes: tuple[str, ...]) -> float:
    return sum(share for name, share in cores.items() if name.startswith(prefixes))


class LoadMeter:
    """Takes a sample now and then; `reading` is what happened between the last two. `proc` is Linux's."""

    def __init__(self, proc: Path = Path("/proc"), clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.measurement: LoadMeasurement | None = None
        self._proc = proc
        self._clock = clock
        self._last: LoadSample | None = None
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")

    def take_sample(
        self, frames: BatcherStatistics, asked: Mapping[str, AdmissionCounts], *, child: int | None, gpu: bool
    ) -> None:
        """Take a sample of the cameras that are `asked`, by name. Reads files; quick.

        `child` is the process id of the engine where it has one.

        Raises:
            OSError: the threads cannot be listed, as when no descriptor is left; nothing is noted.
        """
        sample = LoadSample(
            at_ns=self._clock(),
            threads=self._threads(),
            process_s=self._cpu_s(self._proc / "self" / "stat"),
            child_s=self._cpu_s(self._proc / str(child) / "stat") if child else 0.0,
            machine_s=self._machine_s(),
            frames={
                name: _count_frames(asked[name], camera)
                for name, camera in frames.cameras.items()
                if name in asked
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
        """User and system time; 0 of what is gone."""
        fields = _read_text(path).rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * self._tick_s if len(fields) > 12 else 0.0

    def _machine_s(self) -> float:
        """The time in which the machine's cores were not idle."""
        fields = _read_text(self._proc / "stat").partition("\n")[0].split()[1:9]
        # user nice system idle iowait irq softirq steal
        return sum(int(field) for place, field in enumerate(fields) if place not in (3, 4)) * self._tick_s


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
