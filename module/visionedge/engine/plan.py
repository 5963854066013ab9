"""The plan: how many lanes call the engine, and with which batch sizes; all are warmed up before ready.

What is known of a kind of device makes a first plan; `planner` measures it and makes a better one.
"""

import contextlib
import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from visionedge import __version__
from visionedge.runtime.files import DamagedStateFileError, read_json, set_aside_damaged, write_json
from visionedge.runtime.process_limits import MAX_LANES

_MAX_BATCH = 4096


@dataclass(frozen=True, slots=True, order=True)
class OperatingPoint:
    """So many lanes, each with batches of so many pictures."""

    lanes: int
    batch: int

    def __str__(self) -> str:
        return f"{self.lanes} {'lane' if self.lanes == 1 else 'lanes'} x batch {self.batch}"


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """One line of the table: medians over `rounds`. The figures are None where it was not run.

    `batch_ms` is what computing one batch takes while all lanes work, `cpu_ms` the processor's time for one
    picture. `note` says why it was not run, or failed, or was not run again.
    """

    point: OperatingPoint
    frames_per_s: float | None = None
    batch_ms: float | None = None
    cpu_ms: float | None = None
    rounds: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class LatencyFit:
    """With so many lanes a batch of n takes n * `ms_per_picture` + `ms_fixed`."""

    lanes: int
    ms_per_picture: float
    ms_fixed: float

    def batch_ms(self, batch: int) -> float:
        """What a batch of this size takes by the fit."""
        return self.ms_per_picture * batch + self.ms_fixed


@dataclass(frozen=True, slots=True)
class AutotuneResult:
    """What was measured, what was chosen, and why in one line.

    Not `settled` is a choice that was made while others kept the machine busy: it is used now, and measured
    anew at the next start.
    """

    table: tuple[MeasuredPoint, ...]
    fits: tuple[LatencyFit, ...]
    choice: OperatingPoint
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
            KeyError, TypeError, ValueError: it is none.
        """
        choice = _parse_point(document["choice"])
        buckets = tuple(_parse_count(size) for size in document["buckets"])
        if list(buckets) != sorted(set(buckets)) or buckets[-1:] != (choice.batch,):
            raise ValueError("the buckets do not rise to the batch that was chosen")
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
        raise ValueError(f"{value!r} is no count")
    return value


def _parse_point(entry: Mapping[str, Any]) -> OperatingPoint:
    point = OperatingPoint(_parse_count(entry["lanes"]), _parse_count(entry["batch"]))
    if point.lanes > MAX_LANES or point.batch > _MAX_BATCH:
        raise ValueError(f"{point} is larger than a plan can be")
    return point


def _parse_measured_point(line: Mapping[str, Any]) -> MeasuredPoint:
    figures = [line[key] for key in ("framesPerSecond", "batchMs", "cpuMs")]
    speed, batch_ms, cpu_ms = [None if figure is None else float(figure) for figure in figures]
    return MeasuredPoint(_parse_point(line), speed, batch_ms, cpu_ms, int(line["rounds"]), str(line["note"]))


@dataclass(frozen=True, slots=True)
class Plan:
    """`buckets` are the only batch sizes that ever run, rising; shorter batches are padded to the next.

    `measured` is None where a rule decided.
    """

    lanes: int
    buckets: tuple[int, ...]
    reason: str
    measured: AutotuneResult | None = None

    @staticmethod
    def of(measured: AutotuneResult) -> "Plan":
        """The plan that was chosen by measuring."""
        return Plan(measured.choice.lanes, measured.buckets, measured.reason, measured)

    @property
    def max_batch(self) -> int:
        """The largest batch worth forming."""
        return self.buckets[-1]

    def bucket(self, count: int) -> int:
        """The smallest bucket that holds so many pictures, or the largest there is."""
        return next((size for size in self.buckets if size >= count), self.buckets[-1])


def make_default_plan(device: str, max_batch: int, fixed_batch: int | None, cores: int) -> Plan:
    """What suits a device, from what is known of its kind.

    A CPU does best with as many single-threaded lanes as cores and one picture each; a GPU with large
    batches, and a second lane that prepares one while the first is computed.
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


# Plans that were measured before, kept on disk: the next start need not measure again.


log = logging.getLogger(__name__)

_SCHEMA = "visionedge/plan/1"
_MAX_CACHED_PLANS = 32
"""Plans; the oldest go."""

_CPUINFO_FLAG_KEYS = ("flags", "Features")  # as x86 and Arm call them
_INT8_CPU_FLAGS = ("avx2", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True)
class PlanKey:
    """All that a plan depends on: the compiled graph (no two models or precisions share it), the machine.

    `versions` are those of what computes, `hardware` is the processor's name.
    """

    graph_sha256: str
    device: str
    hardware: str
    versions: tuple[str, ...]
    cores: int
    max_batch: int
    latency_budget_ms: float | None

    @staticmethod
    def of(
        graph: bytes,
        *,
        device: str,
        cores: int,
        max_batch: int,
        latency_budget_ms: float | None,
        hardware: str | None = None,
    ) -> "PlanKey":
        """The key of a compiled graph on this machine, with the versions that are installed."""
        found = []
        for package in ("onnxruntime", "onnxruntime-gpu"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.append(f"{package} {metadata.version(package)}")
        return PlanKey(
            hashlib.sha256(graph).hexdigest(),
            device,
            read_cpu_name() if hardware is None else hardware,
            (f"visionedge {__version__}", *found),
            cores,
            max_batch,
            latency_budget_ms,
        )

    def name(self) -> str:
        """A short name that differs where anything differs."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class PlanCache:
    """Plans in a folder, a file each. Nothing here raises: without a plan one is measured, that is all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: PlanKey) -> AutotuneResult | None:
        """The plan measured earlier for exactly this, or None. A damaged file is as good as none."""
        path = self._path(key)
        try:
            measured, day = _read_cached(path, key)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("the plan %s cannot be read (%s): measuring anew", path.name, error.strerror)
            return None
        except (
            DamagedStateFileError,
            ArithmeticError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
        ) as error:
            log.warning("the plan %s is damaged (%s) and set aside: measuring anew", path.name, error)
            set_aside_damaged(path)
            return None
        return replace(measured, reason=f"from the cache, of {day}: {measured.reason}")

    def store(self, key: PlanKey, measured: AutotuneResult) -> None:
        """Keep a settled plan (atomically), and let the oldest go; where that cannot be, say so and go on."""
        if not measured.settled:
            return
        document = {
            "schema": _SCHEMA,
            "key": asdict(key),
            "measuredAt": datetime.now(UTC).isoformat(timespec="seconds"),
            "measured": measured.document(),
        }
        path = self._path(key)
        try:
            write_json(path, document)
            kept = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
            for old in kept[:-_MAX_CACHED_PLANS]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the plan cannot be kept in %s: %s", self.folder, error.strerror or error)

    def _path(self, key: PlanKey) -> Path:
        return self.folder / f"{key.name()}.json"


def _read_cached(path: Path, key: PlanKey) -> tuple[AutotuneResult, str]:
    document = read_json(path)
    if document["schema"] != _SCHEMA or document["key"] != json.loads(json.dumps(asdict(key))):
        raise ValueError("it was measured for something else")
    day = datetime.fromisoformat(document["measuredAt"]).date()
    return AutotuneResult.from_document(document["measured"]), day.isoformat()


def read_cpu_name() -> str:
    """The processor's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def read_int8_cpu_flags() -> tuple[str, ...]:
    """What the processor has of that which onnxruntime's integer kernels differ by; names hide it.

    Virtual machines give all processors of a maker one name.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.startswith(_CPUINFO_FLAG_KEYS)), []
    )
    return tuple(name for name in _INT8_CPU_FLAGS if name in flags)
