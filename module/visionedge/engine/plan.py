"""The plan: how many lanes call the engine, and with which batch sizes; all are warmed up before ready.

What is known of a kind of device makes a first plan; `planner` measures it and makes a better one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from visionedge.runtime.process_limits import MOST_LANES

_MOST_BATCH = 4096


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """So many lanes, each with batches of so many pictures."""

    lanes: int
    batch: int

    def __str__(self) -> str:
        return f"{self.lanes} {'lane' if self.lanes == 1 else 'lanes'} x batch {self.batch}"


@dataclass(frozen=True, slots=True)
class Timed:
    """One line of the table: medians over `rounds`. The figures are None where it was not run.

    `batch_ms` is what computing one batch takes while all lanes work, `cpu_ms` the processor's time for one
    picture. `note` says why it was not run, or failed, or was not run again.
    """

    pair: Pair
    frames_per_s: float | None = None
    batch_ms: float | None = None
    cpu_ms: float | None = None
    rounds: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """With so many lanes a batch of n takes n * `ms_per_picture` + `ms_fixed`."""

    lanes: int
    ms_per_picture: float
    ms_fixed: float

    def batch_ms(self, batch: int) -> float:
        """What a batch of this size takes by the fit."""
        return self.ms_per_picture * batch + self.ms_fixed


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, what was chosen, and why in one line.

    Not `settled` is a choice that was made while others kept the machine busy: it is used now, and measured
    anew at the next start.
    """

    table: tuple[Timed, ...]
    fits: tuple[Fit, ...]
    choice: Pair
    buckets: tuple[int, ...]
    reason: str
    spent_s: float
    settled: bool = True

    def document(self) -> dict[str, Any]:
        """As status, reports and the cache show it."""
        return {
            "choice": asdict(self.choice),
            "buckets": list(self.buckets),
            "reason": self.reason,
            "spentSeconds": round(self.spent_s, 3),
            "table": [
                {
                    "lanes": line.pair.lanes,
                    "batch": line.pair.batch,
                    "framesPerSecond": _rounded(line.frames_per_s),
                    "batchMs": _rounded(line.batch_ms),
                    "cpuMs": _rounded(line.cpu_ms),
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
    def of_document(document: Mapping[str, Any]) -> "Measured":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        choice = _pair(document["choice"])
        buckets = tuple(_count(size) for size in document["buckets"])
        if list(buckets) != sorted(set(buckets)) or buckets[-1:] != (choice.batch,):
            raise ValueError("the buckets do not rise to the batch that was chosen")
        return Measured(
            tuple(_timed(line) for line in document["table"]),
            tuple(
                Fit(_count(f["lanes"]), float(f["msPerPicture"]), float(f["msFixed"]))
                for f in document["fits"]
            ),
            choice,
            buckets,
            str(document["reason"]),
            float(document["spentSeconds"]),
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no count")
    return value


def _pair(entry: Mapping[str, Any]) -> Pair:
    pair = Pair(_count(entry["lanes"]), _count(entry["batch"]))
    if pair.lanes > MOST_LANES or pair.batch > _MOST_BATCH:
        raise ValueError(f"{pair} is larger than a plan can be")
    return pair


def _timed(line: Mapping[str, Any]) -> Timed:
    figures = [line[key] for key in ("framesPerSecond", "batchMs", "cpuMs")]
    speed, batch_ms, cpu_ms = [None if figure is None else float(figure) for figure in figures]
    return Timed(_pair(line), speed, batch_ms, cpu_ms, int(line["rounds"]), str(line["note"]))


@dataclass(frozen=True, slots=True)
class Plan:
    """`buckets` are the only batch sizes that ever run, rising; shorter batches are padded to the next.

    `measured` is None where a rule decided.
    """

    lanes: int
    buckets: tuple[int, ...]
    reason: str
    measured: Measured | None = None

    @staticmethod
    def of(measured: Measured) -> "Plan":
        """The plan that was chosen by measuring."""
        return Plan(measured.choice.lanes, measured.buckets, measured.reason, measured)

    @property
    def max_batch(self) -> int:
        """The largest batch worth forming."""
        return self.buckets[-1]

    def bucket(self, count: int) -> int:
        """The smallest bucket that holds so many pictures, or the largest there is."""
        return next((size for size in self.buckets if size >= count), self.buckets[-1])


def make_plan(device: str, max_batch: int, fixed_batch: int | None, cores: int) -> Plan:
    """What suits a device, from what is known of its kind.

    A CPU does best with as many single-threaded lanes as cores and one picture each; a GPU with large
    batches, and a second lane that prepares one while the first is computed.
    """
    on_gpu = device != "cpu"
    lanes = 2 if on_gpu else min(cores, MOST_LANES)
    why = (
        "a GPU: two lanes, batches in buckets"
        if on_gpu
        else f"{cores} usable cores: a lane each, one picture"
    )
    if fixed_batch is not None:
        return Plan(lanes, (fixed_batch,), f"{why}; the model fixes its batch at {fixed_batch}")
    if not on_gpu:
        return Plan(lanes, (1,), why)
    return Plan(lanes, batch_sizes(max_batch), why)


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The powers of two below `max_batch`, and `max_batch` itself."""
    powers = [1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch]
    return (*powers, max_batch)
