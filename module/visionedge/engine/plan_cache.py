"""Measured plans on disk: the next start with the same graph on the same machine does not measure again."""

import contextlib
import hashlib
import json
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from visionedge import __version__
from visionedge.engine.plan import AutotuneResult
from visionedge.runtime.files import DamagedStateFileError, read_json, set_aside_damaged, write_json

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA = "visionedge/plan/1"
_MAX_CACHED_PLANS = 32
"""The oldest files beyond this number are deleted."""

_CPUINFO_FLAG_KEYS = ("flags", "Features")  # on x86 and Arm
_INT8_CPU_FLAGS = ("avx2", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything that a plan depends on: the compiled graph (one per model and precision), and the machine.

    `versions` are those of visionedge and onnxruntime, `hardware` is the name of the CPU.
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
        """The key of a compiled graph on this machine, with the installed versions."""
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


def read_cpu_name() -> str:
    """The name of the CPU, as Linux gives it."""
    lines = _read_cpuinfo()
    if not lines:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def read_int8_cpu_flags() -> tuple[str, ...]:
    """The CPU feature flags that select onnxruntime's int8 kernels.

    A key needs them beside the name of the CPU, because virtual CPUs share model names.
    """
    lines = _read_cpuinfo()
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.startswith(_CPUINFO_FLAG_KEYS)), []
    )
    return tuple(name for name in _INT8_CPU_FLAGS if name in flags)


def _read_cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
