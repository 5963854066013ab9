"""Soak: the whole module for an hour on RTSP servers that die, freeze and change, and the laws checked.

    make soak SECONDS=3600

Three cameras: one steady, one whose server is killed, frozen (SIGSTOP), started again and given another
resolution in turns, and one far faster than real time. Every second memory and threads of module and engine,
ages and every frame's whereabouts are noted. One JSON document on stdout; exit code 1 if a law was broken.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from clips import make_clip
from module_process import ModuleProcess
from rtsp_server import RtspServer

MOST_MIB_PER_HOUR = 1.0
MOST_AGE_MS = 5_000.0
MOST_LATENCY_MS = 2_000.0
_WARM_SHARE = 0.25
_SLOPE_FROM_S = 1800
_MOST_GROWTH_MIB = 40.0
_BACK_WITHIN_S = 45.0
_METRIC = re.compile(r'^visionedge_frames_(\w+)\{camera="([^"]+)"[^}]*\} (\S+)$', re.MULTILINE)
_SIZES = ((160, 120), (320, 240))


@dataclass(frozen=True)
class Sample:
    """The module at one moment. `unaccounted` frames by camera must be 0 always."""

    at_s: float
    rss_mib: float
    threads: int
    age_ms: float
    latency_ms: float
    unaccounted: dict[str, int] = field(default_factory=dict)


def find_violations(samples: Sequence[Sample]) -> list[str]:
    """What the samples forbid to be called a success; nothing if all is well."""
    warm = samples[int(len(samples) * _WARM_SHARE) :]
    if len(warm) < 4:  # quarters of fewer mean nothing
        return [f"only {len(samples)} samples were taken"]
    broken = []
    lost = sum(abs(count) for sample in samples for count in sample.unaccounted.values())
    if lost:
        broken.append(f"{lost} frames are not accounted for")
    slope, span_s = slope_mib_per_hour(warm), warm[-1].at_s - warm[0].at_s
    grown = span_s / 3600 * slope
    if span_s >= _SLOPE_FROM_S * (1 - _WARM_SHARE):
        if slope > MOST_MIB_PER_HOUR:
            broken.append(f"memory grows by {slope:.2f} MiB an hour")
    elif grown > _MOST_GROWTH_MIB:
        broken.append(f"memory grew by {grown:.1f} MiB")
    quarter = max(1, len(warm) // 4)
    first, last = (median(s.threads for s in part) for part in (warm[:quarter], warm[-quarter:]))
    if last > first + 1:
        broken.append(f"threads grew from {first:g} to {last:g}")
    for name, most in (("age_ms", MOST_AGE_MS), ("latency_ms", MOST_LATENCY_MS)):
        # The median of ten neighbours: one moment in which the machine was busy is no growing queue.
        worst = max(
            median(getattr(s, name) for s in warm[at : at + 10]) for at in range(max(1, len(warm) - 9))
        )
        if worst > most:
            broken.append(f"{name} of the steady camera reached {worst:.0f}")
    return broken


def slope_mib_per_hour(samples: Sequence[Sample]) -> float:
    """The trend of memory, as a straight line through all samples."""
    hours = np.array([sample.at_s for sample in samples]) / 3600
    return float(np.polyfit(hours, [sample.rss_mib for sample in samples], 1)[0])


@dataclass
class Soak:
    """A run of so many seconds with a fault every so many."""

    seconds: float
    fault_every_s: float = 60.0
    fault_duration_s: float = 6.0
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Run it; the figures as a document, what was broken among them."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with self._module(folder) as (module, faulty):
                module.ready(120)
                module.until(lambda cameras: all(camera["framesAnalysed"] for camera in cameras.values()))
                self._run_with_faults(module, faulty, folder)
                broken = find_violations(self.samples) + self._find_missing_cameras(module)
                cameras = module.cameras()
                if (code := module.stop(10)) != 0:
                    broken.append(f"the module ended with {code}")
        return self._figures(broken, cameras)

    @contextmanager
    def _module(self, folder: Path) -> Iterator[tuple[ModuleProcess, RtspServer]]:
        make_clip(folder / "steady.mp4", pictures=100, fps=10)
        make_clip(folder / "shaken.mp4", pictures=100, fps=10)
        make_clip(folder / "fast.mp4", pictures=1500, fps=300)
        with RtspServer(folder) as steady, RtspServer(folder) as faulty:
            uris = {
                "steady": steady.uri("steady.mp4"),
                "shaken": faulty.uri("shaken.mp4"),
                "fast": steady.uri("fast.mp4"),
            }
            words = [word for name, uri in uris.items() for word in ("--camera", f"{name}={uri}")]
            with ModuleProcess(folder / "data", *words, "--device", "cpu") as module:
                yield module, faulty

    def _run_with_faults(self, module: ModuleProcess, faulty: RtspServer, folder: Path) -> None:
        began_s = time.monotonic()
        end_s, fault_s, repair_s = began_s + self.seconds, began_s + self.fault_every_s, float("inf")
        while (now_s := time.monotonic()) < end_s:
            if now_s >= repair_s:
                self._end_fault(faulty)
                repair_s = float("inf")
            elif now_s >= fault_s:
                self._start_fault(faulty, folder)
                fault_s, repair_s = now_s + self.fault_every_s, now_s + self.fault_duration_s
            self.samples.append(sample(module, now_s - began_s))
            time.sleep(max(0.0, now_s + 1 - time.monotonic()))  # the pace of the samples
        if repair_s < float("inf"):
            self._end_fault(faulty)

    def _start_fault(self, server: RtspServer, folder: Path) -> None:
        kind = ("kill", "halt", "resize")[len(self.faults) % 3]
        self.faults.append(kind)
        if kind == "halt":
            server.halt()
            return
        server.kill()
        if kind == "resize":
            width_px, height_px = _SIZES[(1 + self.faults.count("resize")) % 2 - 1]
            make_clip(folder / "shaken.mp4", pictures=100, fps=10, width_px=width_px, height_px=height_px)

    def _end_fault(self, server: RtspServer) -> None:
        if self.faults[-1] == "halt":
            server.resume()
        else:
            server.start()

    def _find_missing_cameras(self, module: ModuleProcess) -> list[str]:
        """Every camera gives frames again."""
        before = {name: camera["framesAnalysed"] for name, camera in module.cameras().items()}
        deadline_s = time.monotonic() + _BACK_WITHIN_S
        missing = list(before)
        while missing and time.monotonic() < deadline_s:
            seen = module.cameras()
            missing = [name for name in missing if seen[name]["framesAnalysed"] == before[name]]
            if missing:
                module.get(f"/api/v1/cameras/steady/frame?after={seen['steady']['sequence']}&timeout=1")
        return [f"camera {name} never came back" for name in missing]

    def _figures(self, broken: list[str], cameras: dict[str, dict[str, Any]]) -> dict[str, Any]:
        warm = self.samples[int(len(self.samples) * _WARM_SHARE) :]
        return {
            "seconds": self.seconds,
            "faults": {kind: self.faults.count(kind) for kind in sorted(set(self.faults))},
            "rssMiB": {"first": round(warm[0].rss_mib, 1), "last": round(warm[-1].rss_mib, 1)},
            "rssMiBPerHour": round(slope_mib_per_hour(warm), 3),
            "threads": {"first": warm[0].threads, "last": warm[-1].threads},
            "ageMs": {"median": median(s.age_ms for s in warm), "most": max(s.age_ms for s in warm)},
            "latencyMs": {
                "median": median(s.latency_ms for s in warm), "most": max(s.latency_ms for s in warm)
            },
            "cameras": {
                name: {key: camera[key] for key in ("epoch", "framesRead", "framesAnalysed", "dropped")}
                for name, camera in cameras.items()
            },
            "broken": broken,
        }  # fmt: skip


def sample(module: ModuleProcess, at_s: float) -> Sample:
    """Ask the module and the kernel how it is."""
    status = module.get("/api/v1/status")
    pids = [module.pid, (status["engine"].get("process") or {}).get("pid")]
    kernel = [process(pid) for pid in pids if pid]
    steady = next(camera for camera in status["cameras"] if camera["name"] == "steady")
    newest = module.get("/api/v1/cameras/steady/frame")
    return Sample(
        at_s=at_s,
        rss_mib=sum(rss_mib for rss_mib, _ in kernel),
        threads=sum(threads for _, threads in kernel),
        age_ms=float(steady["ageMs"] or 0.0),
        latency_ms=float(newest["timing"]["totalMs"]),
        unaccounted=unaccounted(module.raw("/metrics").decode()),
    )


def process(pid: int) -> tuple[float, int]:
    """Resident memory in MiB and threads of a process; nothing of one that is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0, 0
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(facts["VmRSS"].split()[0]) / 1024, int(facts["Threads"])


def unaccounted(metrics: str) -> dict[str, int]:
    """Frames of each camera that were offered and are neither analysed, dropped nor waiting."""
    left: dict[str, int] = {}
    for what, camera, value in _METRIC.findall(metrics):
        sign = 1 if what == "offered_total" else -1
        left[camera] = left.get(camera, 0) + sign * int(float(value))
    return left


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--fault-every", type=float, default=60.0)
    arguments = parser.parse_args()
    figures = Soak(arguments.seconds, arguments.fault_every).run()
    json.dump(figures, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 1 if figures["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
