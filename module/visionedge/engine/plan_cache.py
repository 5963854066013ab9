"""Plans that were measured before, kept on disk: the next start need not measure again."""

import contextlib
import hashlib
import json
import logging
import platform
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from visionedge import __version__
from visionedge.engine.plan import Measured
from visionedge.runtime.files import DamagedError, drop_damaged, read_json, write_json

log = logging.getLogger(__name__)

_SCHEMA = "visionedge/plan/1"
_KEPT = 32
"""Plans; the oldest go."""

_FLAGS = ("flags", "Features")  # as x86 and Arm call them
_INTEGER_KERNELS = ("avx2", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


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
            processor() if hardware is None else hardware,
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

    def load(self, key: PlanKey) -> Measured | None:
        """The plan measured earlier for exactly this, or None. A damaged file is as good as none."""
        path = self._path(key)
        try:
            measured, day = _read(path, key)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("the plan %s cannot be read (%s): measuring anew", path.name, error.strerror)
            return None
        except (DamagedError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError) as error:
            log.warning("the plan %s is damaged (%s) and set aside: measuring anew", path.name, error)
            drop_damaged(path)
            return None
        return replace(measured, reason=f"from the cache, of {day}: {measured.reason}")

    def store(self, key: PlanKey, measured: Measured) -> None:
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
            for old in kept[:-_KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the plan cannot be kept in %s: %s", self.folder, error.strerror or error)

    def _path(self, key: PlanKey) -> Path:
        return self.folder / f"{key.name()}.json"


def _read(path: Path, key: PlanKey) -> tuple[Measured, str]:
    document = read_json(path)
    if document["schema"] != _SCHEMA or document["key"] != json.loads(json.dumps(asdict(key))):
        raise ValueError("it was measured for something else")
    day = datetime.fromisoformat(document["measuredAt"]).date()
    return Measured.of_document(document["measured"]), day.isoformat()


def processor() -> str:
    """The processor's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def integer_instructions() -> tuple[str, ...]:
    """What the processor has of that which onnxruntime's integer kernels differ by; names hide it.

    Virtual machines give all processors of a maker one name.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    words = next((line.partition(":")[2].split() for line in lines if line.startswith(_FLAGS)), [])
    return tuple(name for name in _INTEGER_KERNELS if name in words)
