"""The plan of an engine: how many lanes call it, and with which batch sizes. All sizes are warmed up.

`make_default_plan` follows from the kind of device; `autotune` measures a better one, `plan_cache` keeps it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from visionedge.runtime.process_limits import MAX_LANES

_MAX_BATCH = 4096


@dataclass(frozen=True, slots=True, order=True)
class OperatingPoint:
    """A number of lanes, each with batches of so many pictures."""

    lanes: int
    batch: int

    def __str__(self) -> str:
        return f"{self.lanes} {'lane' if self.lanes == 1 else 'lanes'} x batch {self.batch}"


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """One line of the table: medians over `rounds`. The figures are None if the point was not run.

    `batch_ms` is the time of one batch while all lanes work, `cpu_ms` the processor time of one picture.
    `note` says why the point was not run, or failed.
    """

    point: OperatingPoint
    frames_per_s: float | None = None
    batch_ms: float | None = None
    cpu_ms: float | None = None
    rounds: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class LatencyFit:
    """With so many lanes, a batch of n pictures takes n * `ms_per_picture` + `ms_fixed`."""

    lanes: int
    ms_per_picture: float
    ms_fixed: float

    def batch_ms(self, batch: int) -> float:
        """The time of a batch of this size by the fit."""
        return self.ms_per_picture * batch + self.ms_fixed


@dataclass(frozen=True, slots=True)
class AutotuneResult:
    """What was measured, what was chosen, and why in one line.

    `settled` False: other processes kept the machine busy. The choice is used now, and measured again at the
    next start.
    """

    table: tuple[MeasuredPoint, ...]
    fits: tuple[LatencyFit, ...]
    choice: OperatingPoint
    buckets: tuple[int, ...]
    reason: str
    spent_s: float
    settled: bool = True

    def document(self) -> dict[str, Any]:
        """As status, reports and the cache contain it."""
        return {
            "choice": asdict(self.choice),
            "buckets": list(self.buckets),
            "reason": self.reason,
            "spentSeconds": round(self.spent_s, 3),
            "table": [
                {
                    "lanes": line.point.lanes,
                    "batch": line.point.batch,
                    "framesPerSecond": _round_or_none(line.frames_per_s),
                    "batchMs": _round_or_none(line.batch_ms),
                    "cpuMs": _round_or_none(line.cpu_ms),
                    "rounds": line.rounds,
                    "note": line.note,
                }
                for line in self.table
            ],
            "fits": [
                {
                    "lanes": fit.lanes,
                    "msPerPicture": round(fit.ms_per_picture, 3),
                    "msFixed": round(fit.ms_fixed, 3),
                }
                for fit in self.fits
            ],
        }

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> "AutotuneResult":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError: the document is invalid.
        """
        choice = _parse_point(document["choice"])
        buckets = tuple(_parse_count(size) for size in document["buckets"])
        if list(buckets) != sorted(set(buckets)) or buckets[-1:] != (choice.batch,):
            raise ValueError("buckets must rise and end with the batch that was chosen")
        return AutotuneResult(
            tuple(_parse_measured_point(line) for line in document["table"]),
            tuple(
                LatencyFit(_parse_count(f["lanes"]), float(f["msPerPicture"]), float(f["msFixed"]))
                for f in document["fits"]
            ),
            choice,
            buckets,
            str(document["reason"]),
            float(document["spentSeconds"]),
        )


def _round_or_none(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _parse_count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} must be a number greater than 0")
    return value


def _parse_point(entry: Mapping[str, Any]) -> OperatingPoint:
    point = OperatingPoint(_parse_count(entry["lanes"]), _parse_count(entry["batch"]))
    if point.lanes > MAX_LANES or point.batch > _MAX_BATCH:
        raise ValueError(f"{point} must not exceed {MAX_LANES} lanes and batch {_MAX_BATCH}")
    return point


def _parse_measured_point(line: Mapping[str, Any]) -> MeasuredPoint:
    figures = [line[key] for key in ("framesPerSecond", "batchMs", "cpuMs")]
    speed, batch_ms, cpu_ms = [None if figure is None else float(figure) for figure in figures]
    return MeasuredPoint(_parse_point(line), speed, batch_ms, cpu_ms, int(line["rounds"]), str(line["note"]))


@dataclass(frozen=True, slots=True)
class Plan:
    """How many lanes call the engine, and the batch sizes that are ever run.

    `buckets` rise; a shorter batch is padded to the next one. `measured` is None for the default plan.
    """

    lanes: int
    buckets: tuple[int, ...]
    reason: str
    measured: AutotuneResult | None = None

    @staticmethod
    def of(measured: AutotuneResult) -> "Plan":
        """The plan that was measured."""
        return Plan(measured.choice.lanes, measured.buckets, measured.reason, measured)

    @property
    def max_batch(self) -> int:
        """The largest batch size."""
        return self.buckets[-1]

    def bucket(self, count: int) -> int:
        """The smallest bucket for so many pictures, or the largest bucket."""
        return next((size for size in self.buckets if size >= count), self.buckets[-1])


def make_default_plan(device: str, max_batch: int, fixed_batch: int | None, cores: int) -> Plan:
    """The plan that suits most machines with such a device.

    A CPU is fastest with one single-threaded lane per core and one picture each; a GPU with large batches,
    and a second lane that prepares a batch while the first one is computed.
    """
    on_gpu = device != "cpu"
    lanes = 2 if on_gpu else min(cores, MAX_LANES)
    why = (
        "a GPU: two lanes, batches in buckets"
        if on_gpu
        else f"{cores} usable cores: a lane each, one picture"
    )
    if fixed_batch is not None:
        return Plan(lanes, (fixed_batch,), f"{why}; the model fixes its batch at {fixed_batch}")
    if not on_gpu:
        return Plan(lanes, (1,), why)
    return Plan(lanes, list_batch_sizes(max_batch), why)


def list_batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The powers of two below `max_batch`, and `max_batch` itself."""
    powers = [1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch]
    return (*powers, max_batch)
