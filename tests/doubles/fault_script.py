"""A script of faults, each of which begins and ends with a file; `fault_injection` reads it."""

from pathlib import Path
from typing import Any

import yaml

STICKY = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=vm ; line=63"
GONE = "CUDA failure 100: no CUDA-capable device is detected ; GPU=0 ; hostname=vm"
NO_MEMORY = "CUDA failure 2: out of memory ; GPU=0 ; hostname=vm ; expr=cudaMalloc((void**)&p, size)"
REFUSED = "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel for this node"

FAULTS: dict[str, dict[str, Any]] = {
    "sticky": {"raise": STICKY},
    "gone": {"raise": GONE},
    "memory": {"raise": NO_MEMORY, "when": {"minBatch": 4}},
    "no-memory": {"raise": NO_MEMORY},
    "refused": {"raise": REFUSED},
    "hang": {"hang": True},
    "nan": {"rows": "nan"},
    "wrong": {"rows": "wrong"},
    "killed": {"signal": "SIGKILL"},
    "crashed": {"signal": "SIGSEGV"},
    "absent": {"at": "probe", "raise": GONE},
    "absent-session": {"at": "open", "raise": GONE},
    "crashes-opening": {"at": "open", "signal": "SIGSEGV"},
}


class FaultScript:
    """`begin` lets a fault of `FAULTS` happen until `end`."""

    def __init__(self, folder: Path, *, run_s: float = 30.0, first_s: float = 0.3, **timing: float) -> None:
        self._folder = folder
        self.path = folder / "faults.yaml"
        waits = {"firstSeconds": first_s, "maxWaitSeconds": 1.0, "windowSeconds": 0.1, "healthySeconds": 0.1}
        faults = [
            {**fault, "when": {**fault.get("when", {}), "file": str(folder / name)}}
            for name, fault in FAULTS.items()
        ]
        document = {
            "timing": {**waits, **timing},
            "limits": {"runSeconds": run_s},
            "faults": faults,
        }
        self.path.write_text(yaml.safe_dump(document))

    def begin(self, *names: str) -> None:
        """These faults happen from now on."""
        for name in names:
            assert name in FAULTS
            (self._folder / name).touch()

    def end(self, *names: str) -> None:
        """These faults happen no more."""
        for name in names:
            (self._folder / name).unlink()
