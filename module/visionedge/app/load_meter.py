"""Demanded and delivered frames, and in one sentence what holds the module back and which knob to turn.

`judge` decides purely; `Meter` reads the processor times of threads and processes, as Linux tells them.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visionedge.camera.timing import Counts
from visionedge.engine.batcher import BatcherStatistics, CameraStatistics, Drop
from visionedge.runtime.process_limits import cpu_quota, usable_cores

Bottleneck = Literal["none", "quota", "decode", "engine", "others", "idle"]

BOTTLENECKS: tuple[Bottleneck, ...] = ("none", "quota", "decode", "engine", "others", "idle")

_ENOUGH = 0.95
_SLACK_PER_S = 0.5
_FULL = 0.85
_OTHERS = 0.25
_DECODER_THREADS = "av:"
"""What FFmpeg calls the threads that decode beside the cameras' own."""


@dataclass(frozen=True, slots=True)
class CameraLoad:
    """A camera's frames per second, and the cores that its thread uses.

    `demanded` is what the configuration asks for, `let_in` what the overload ladder leaves of it, `offered`
    what the camera hands on, `delivered` what is analysed, `lost` what another frame or its age pushed out.
    """

    demanded: float
    let_in: float
    offered: float
    delivered: float
    lost: float
    decode_cores: float


@dataclass(frozen=True, slots=True)
class Reading:
    """A stretch of time: loads by camera, and cores in use on average.

    `cores` is what this process may use, `other_cores` what it uses for neither decoding nor inference,
    `foreign_cores` those of `cores` that other programs of the machine leave no time on. `gpu` tells whether
    the engine computes on one. `quota` is the number of cores that a CPU quota allows; None without one.
    """

    seconds: float
    cameras: Mapping[str, CameraLoad]
    cores: int
    decode_cores: float
    infer_cores: float
    other_cores: float
    foreign_cores: float
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
    def let_in(self) -> float:
        """Frames per second that the overload ladder leaves of them."""
        return sum(camera.let_in for camera in self.cameras.values())

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
    def full(self) -> bool:
        """Whether the cores are as good as all in use."""
        return self.used_cores + self.foreign_cores >= _FULL * self.limit

    def share(self, cores: float) -> str:
        """So many cores in words."""
        plural = "s" if self.limit > 1 else ""
        return f"{cores / self.limit:.0%} of {self.limit:.3g} core{plural}".replace("%", " %")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is the limit, and a sentence that names it and the knob."""

    bottleneck: Bottleneck
    sentence: str


def judge(seen: Reading) -> Verdict:
    """What holds the module back."""
    if not seen.demanded:
        return Verdict("idle", "no camera hands on frames")
    rates = f"{seen.delivered:.1f} of {seen.demanded:.1f} frames/s"
    if nearly(seen.delivered, seen.demanded):
        return Verdict("none", f"keeps up: {rates} with {seen.share(seen.used_cores)}")
    hungry = _most(seen, lambda camera: camera.demanded)
    if seen.quota is not None and seen.quota <= seen.cores and seen.used_cores >= _FULL * seen.quota:
        return Verdict(
            "quota",
            f"{rates}: the module uses {seen.share(seen.used_cores)}, all that its CPU quota allows: raise"
            f" the quota (docker run --cpus, HostConfig.NanoCpus), or lower fps of {hungry}",
        )
    if seen.full and seen.foreign_cores >= _OTHERS * seen.limit and seen.foreign_cores > seen.decode_cores:
        return Verdict(
            "others",
            f"{rates}: other programs take {seen.foreign_cores:.1f} cores and leave {seen.used_cores:.1f} to"
            f" the module: move them, or lower fps of {hungry}",
        )
    return _decode(seen, rates) or _engine(seen, rates, hungry)


def _decode(seen: Reading, rates: str) -> Verdict | None:
    """The verdict where decoding is the limit: of all cores, or of the one that a camera's thread has."""
    if seen.full and seen.decode_cores > seen.infer_cores:
        costly = _most(seen, lambda camera: camera.decode_cores)
        return Verdict(
            "decode",
            f"{rates}: decode takes {seen.share(seen.decode_cores)}: lower fps of {costly}, or give it a"
            " substream of lower resolution",
        )
    if seen.full or seen.lost >= seen.let_in - seen.offered:
        return None
    name = _most(seen, lambda camera: camera.let_in - camera.offered)
    slow = seen.cameras[name]
    return Verdict(
        "decode",
        f"{rates}: {name} is decoded at {slow.offered:.1f} of {slow.let_in:.1f} frames/s, all that its"
        " thread can: give it a substream of lower resolution",
    )


def _engine(seen: Reading, rates: str, hungry: str) -> Verdict:
    if seen.gpu:
        return Verdict(
            "engine",
            f"{rates}: the GPU is the limit, the module uses only {seen.share(seen.used_cores)}: lower fps of"
            f" {hungry}, or take a smaller model",
        )
    return Verdict(
        "engine",
        f"{rates}: the model takes {seen.share(seen.infer_cores)}: lower fps of {hungry}, take a smaller"
        " model or its int8 variant, or use a GPU",
    )


def nearly(delivered: float, wanted: float) -> bool:
    """Whether a rate is as good as the one that was wanted."""
    return delivered >= min(_ENOUGH * wanted, wanted - _SLACK_PER_S)


def _most(seen: Reading, figure: Callable[[CameraLoad], float]) -> str:
    """The camera that has most of it."""
    return max(sorted(seen.cameras), key=lambda name: figure(seen.cameras[name]))


def document(seen: Reading) -> dict[str, Any]:
    """The object `capacity` of status."""
    verdict = judge(seen)
    return {
        "windowSeconds": round(seen.seconds, 1),
        "demandedPerSecond": round(seen.demanded, 2),
        "letInPerSecond": round(seen.let_in, 2),
        "deliveredPerSecond": round(seen.delivered, 2),
        "cores": seen.cores,
        "cpuQuota": None if seen.quota is None else round(seen.quota, 3),
        "coresUsed": {name: round(cores, 3) for name, cores in used(seen).items()},
        "bottleneck": verdict.bottleneck,
        "sentence": verdict.sentence,
        "cameras": {
            name: {
                "demandedPerSecond": round(camera.demanded, 2),
                "letInPerSecond": round(camera.let_in, 2),
                "deliveredPerSecond": round(camera.delivered, 2),
                "decodeCores": round(camera.decode_cores, 3),
            }
            for name, camera in seen.cameras.items()
        },
    }


def used(seen: Reading) -> dict[str, float]:
    """The cores in use, by what for."""
    return {"decode": seen.decode_cores, "infer": seen.infer_cores, "other": seen.other_cores}


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counted:
    """A camera's frames until one moment; see `CameraLoad`."""

    demanded: int
    let_in: int
    offered: int
    delivered: int
    lost: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters at one moment: seconds of processor time, and frames by camera."""

    at_ns: int
    threads: Mapping[int, tuple[str, float]]
    process_s: float
    child_s: float
    machine_s: float
    frames: Mapping[str, Counted]


def between(
    before: Sample,
    after: Sample,
    *,
    cores: int,
    machine_cores: int,
    gpu: bool,
    quota: float | None = None,
) -> Reading:
    """What happened from one moment to a later one; the machine may have more cores than we may use."""
    seconds = max(1e-9, (after.at_ns - before.at_ns) / 1e9)
    cores_by_name: dict[str, float] = {}
    for number, (name, cpu_s) in after.threads.items():
        was_s = before.threads.get(number, (name, 0.0))[1]
        cores_by_name[name] = cores_by_name.get(name, 0.0) + max(0.0, cpu_s - was_s) / seconds
    cameras = {
        # Of one that was not there before it is not known what came within this time.
        name: _load(before.frames[name], counted, seconds, cores_by_name.get(f"camera:{name}", 0.0))
        for name, counted in after.frames.items()
        if name in before.frames
    }
    child = max(0.0, after.child_s - before.child_s) / seconds
    own = max(0.0, after.process_s - before.process_s) / seconds
    decode = _sum(cores_by_name, ("camera:", _DECODER_THREADS))
    lanes = _sum(cores_by_name, ("lane:",))
    idle = machine_cores - (after.machine_s - before.machine_s) / seconds
    return Reading(
        seconds=seconds,
        cameras=cameras,
        cores=cores,
        decode_cores=decode,
        infer_cores=lanes + child,
        other_cores=max(0.0, own - decode - lanes),
        foreign_cores=max(0.0, min(cores, quota or cores) - own - child - max(0.0, idle)),
        gpu=gpu,
        quota=quota,
    )


def _load(before: Counted, after: Counted, seconds: float, decode_cores: float) -> CameraLoad:
    def per_s(was: int, now: int) -> float:
        return (now - was if now >= was else now) / seconds  # a camera that was opened again counts anew

    return CameraLoad(
        demanded=per_s(before.demanded, after.demanded),
        let_in=per_s(before.let_in, after.let_in),
        offered=per_s(before.offered, after.offered),
        delivered=per_s(before.delivered, after.delivered),
        lost=per_s(before.lost, after.lost),
        decode_cores=decode_cores,
    )


def _counted(asked: Counts, seen: CameraStatistics) -> Counted:
    return Counted(
        demanded=asked.asked,
        let_in=asked.let_in,
        offered=seen.offered - seen.dropped[Drop.GATED],
        delivered=seen.analysed,
        lost=seen.dropped[Drop.REPLACED] + seen.dropped[Drop.STALE],
    )


def _sum(cores: Mapping[str, float], prefixes: tuple[str, ...]) -> float:
    return sum(share for name, share in cores.items() if name.startswith(prefixes))


class Meter:
    """Takes a sample now and then; `reading` is what happened between the last two. `proc` is Linux's."""

    def __init__(self, proc: Path = Path("/proc"), clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.reading: Reading | None = None
        self._proc = proc
        self._clock = clock
        self._last: Sample | None = None
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")

    def note(
        self, frames: BatcherStatistics, asked: Mapping[str, Counts], *, child: int | None, gpu: bool
    ) -> None:
        """Take a sample of the cameras that are `asked`, by name. Reads files; quick.

        `child` is the process id of the engine where it has one.

        Raises:
            OSError: the threads cannot be listed, as when no descriptor is left; nothing is noted.
        """
        sample = Sample(
            at_ns=self._clock(),
            threads=self._threads(),
            process_s=self._cpu_s(self._proc / "self" / "stat"),
            child_s=self._cpu_s(self._proc / str(child) / "stat") if child else 0.0,
            machine_s=self._machine_s(),
            frames={
                name: _counted(asked[name], camera)
                for name, camera in frames.cameras.items()
                if name in asked
            },
        )
        if self._last is not None:
            machine_cores = os.cpu_count() or 1
            self.reading = between(
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
            name = names.get(number) or _text(task / "comm").strip()
            found[number] = (name, self._cpu_s(task / "stat"))
        return found

    def _cpu_s(self, path: Path) -> float:
        """User and system time; 0 of what is gone."""
        fields = _text(path).rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * self._tick_s if len(fields) > 12 else 0.0

    def _machine_s(self) -> float:
        """The time in which the machine's cores were not idle."""
        fields = _text(self._proc / "stat").partition("\n")[0].split()[1:9]
        # user nice system idle iowait irq softirq steal
        return sum(int(field) for place, field in enumerate(fields) if place not in (3, 4)) * self._tick_s


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
