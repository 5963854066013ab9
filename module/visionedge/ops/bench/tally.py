"""What a measured stretch gave: every result noted as it is delivered, and the figures made of them."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from visionedge.errors import SourceError
from visionedge.frames.types import Result
from visionedge.ops.bench.virtual_cameras import StampedFrame

_QUANTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Row:
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
class Cost:
    """What a stretch took: seconds, processor seconds, frames let go by reason, and memory at its end."""

    took_s: float
    cpu_s: float
    dropped: Mapping[str, int]
    rss_mib: float


@dataclass(frozen=True, slots=True)
class Run:
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


class Tally:
    """Collects results; lanes deliver, the measurer takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[Row] = []

    def deliver(self, result: Result) -> None:
        """Note a result, now."""
        row = row_of(result, time.monotonic_ns())
        with self._lock:
            self._rows.append(row)

    def take(self) -> list[Row]:
        """Everything since the last time."""
        with self._lock:
            rows, self._rows = self._rows, []
        return rows

    def progress(self, elapsed_s: float, seconds: float) -> str:
        """How it goes, in a line."""
        with self._lock:
            rows = list(self._rows)
        p99_ms = np.percentile([row.total_ns for row in rows], 99) / 1e6 if rows else float("nan")
        return (
            f"  {elapsed_s:.0f} of {seconds:g} s: {len(rows) / elapsed_s:.1f} frames/s, p99 {p99_ms:.0f} ms"
        )


def row_of(result: Result, now_ns: int) -> Row:
    """A result with its stages: late, decode, wait, infer, deliver; together they are its latency."""
    frame, timing = result.frame, result.timing
    taken_ns = frame.captured_ns + timing.wait_ns
    put_ns, decode_ns = frame.captured_ns, 0
    if isinstance(frame, StampedFrame):
        put_ns, decode_ns = frame.put_ns, frame.decode_ns
    return Row(
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


def run_of(rows: Sequence[Row], cost: Cost, slo_ms: float, cameras: int = 1) -> Run:
    """The figures of a stretch with so many cameras.

    Raises:
        SourceError: there is no result.
    """
    if not rows:
        raise SourceError("no frame came through in the time given; give --seconds more, or another --source")
    total_ms = np.array([row.total_ns for row in rows]) / 1e6
    stages = {name: [getattr(row, f"{name}_ns") for row in rows] for name in STAGES}
    return Run(
        frames_per_s=len(rows) / cost.took_s,
        goodput_per_s=float((total_ms <= slo_ms).sum()) / cost.took_s,
        cpu_ms_per_frame=cost.cpu_s * 1000 / len(rows),
        latency_ms=_percentiles(total_ms),
        age_ms=_percentiles(np.array(ages_ns(rows) or [0]) / 1e6),
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


def ages_ns(rows: Sequence[Row]) -> list[int]:
    """How old each camera's newest result was each time that the next one came."""
    by_camera: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_camera[row.camera].append(row)
    return [
        after.delivered_ns - before.captured_ns
        for given in by_camera.values()
        for before, after in pairwise(sorted(given, key=lambda row: row.delivered_ns))
    ]


def _percentiles(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in _QUANTILES}


def summed(runs: Sequence[Run]) -> dict[str, int]:
    """The frames that were let go in all of them, by reason."""
    return dict(sum((Counter(run.dropped) for run in runs), Counter()))
