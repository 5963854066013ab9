"""The plan of an engine: how many lanes call it, and with which batch sizes. All sizes are warmed up.

`make_default_plan` suits the kind of device; `autotune` measures a better plan, and `PlanCache` keeps it.
"""

import contextlib
import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from visionedge import __version__
from visionedge.runtime.files import DamagedStateFileError, read_json, set_aside_damaged, write_json
from visionedge.runtime.process_limits import MAX_LANES

log = logging.getLogger(__name__)


_MAX_BATCH = 4096


@dataclass(frozen=True, slots=True, order=True)
class OperatingPoint:
    """A number of lanes, and the batch size of each."""

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
    """With `lanes` lanes, a batch of n pictures takes n * `ms_per_picture` + `ms_fixed`."""

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
        """The smallest bucket for `count` pictures, or the largest bucket."""
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


T = TypeVar("T")

_SCHEMA = "visionedge/plan/1"
_MAX_CACHED_PLANS = 32
"""The oldest files beyond this number are deleted."""

_CPUINFO_FLAG_KEYS = ("flags", "Features")  # on x86 and Arm
_CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "avx_vnni_int8", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),  # Arm
)


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything that a plan depends on: the compiled graph (one per model and precision), and the machine.

    `device` also names runtime, precision and options, where they are not those of plain onnxruntime.
    `versions` are those of visionedge and its runtimes, `hardware` is the name of the CPU.
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
    ) -> "PlanKey":
        """The key of a compiled graph on this machine, with the installed versions."""
        return PlanKey(
            hashlib.sha256(graph).hexdigest(),
            device,
            read_cpu_name(),
            read_versions(),
            cores,
            max_batch,
            latency_budget_ms,
        )

    def name(self) -> str:
        """A hash of all fields, as a file name."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class PlanCache:
    """Plans in a folder, one file each. Never raises OSError: without a plan, one is measured again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: PlanKey) -> AutotuneResult | None:
        """The plan that was measured for exactly this key, or None. A damaged file is set aside."""
        found = load_cached(self._path(key), lambda document: _parse_cached(document, key), "plan")
        if found is None:
            return None
        measured, day = found
        return replace(measured, reason=f"from the cache, of {day}: {measured.reason}")

    def store(self, key: PlanKey, measured: AutotuneResult) -> None:
        """Write a settled plan atomically, delete the oldest files; an error of the disk is only logged."""
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
            log.warning(
                "%s: the plan cannot be saved (%s); the next start measures again",
                self.folder,
                error.strerror,
            )

    def _path(self, key: PlanKey) -> Path:
        return self.folder / f"{key.name()}.json"


def _parse_cached(document: Any, key: PlanKey) -> tuple[AutotuneResult, str]:
    if document["schema"] != _SCHEMA or document["key"] != json.loads(json.dumps(asdict(key))):
        raise ValueError("measured for another key")
    day = datetime.fromisoformat(document["measuredAt"]).date()
    return AutotuneResult.from_document(document["measured"]), day.isoformat()


def load_cached(path: Path, parse: Callable[[Any], T], what: str) -> T | None:
    """What `parse` makes of a JSON file; None if the file is absent, cannot be read or is damaged.

    A damaged file is set aside. `what` names the content in the log.
    """
    try:
        return parse(read_json(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cannot be read (%s); measuring the %s again", path, error.strerror, what)
        return None
    except (
        DamagedStateFileError,
        ArithmeticError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        log.warning("%s: damaged (%s); set aside, measuring the %s again", path, error, what)
        set_aside_damaged(path)
        return None


CPUINFO = Path("/proc/cpuinfo")


def read_cpu_name() -> str:
    """The name of the CPU, as Linux gives it."""
    lines = _read_cpuinfo(CPUINFO)
    if not lines:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def read_cpu_flags(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """The CPU feature flags that select kernels of the runtimes, and the precisions that are fast.

    A key needs them beside the name of the CPU, because virtual CPUs share model names.
    """
    lines = _read_cpuinfo(cpuinfo)
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.startswith(_CPUINFO_FLAG_KEYS)), []
    )
    return tuple(name for name in _CPU_FLAGS if name in flags)


def read_versions() -> tuple[str, ...]:
    """The versions of visionedge and of the installed runtimes."""
    found = [f"visionedge {__version__}"]
    for package in ("onnxruntime", "onnxruntime-gpu", "openvino"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return tuple(found)


def _read_cpuinfo(cpuinfo: Path) -> list[str]:
    try:
        return cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
