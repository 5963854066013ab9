"""A script for `fault_injection`: each fault is active while its file exists."""

from pathlib import Path
from typing import Any

import yaml

STICKY = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=vm ; line=63"
GONE = "CUDA failure 100: no CUDA-capable device is detected ; GPU=0 ; hostname=vm"
NO_MEMORY = "CUDA failure 2: out of memory ; GPU=0 ; hostname=vm ; expr=cudaMalloc((void**)&p, size)"
REFUSED = "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel for this node"

OPENVINO_TEXTS = {
    STICKY: "Exception from src/a.cpp:224:\n[GPU] clFlush, error code: -5 CL_OUT_OF_RESOURCES",
    GONE: "[GPU] Can't get FULL_DEVICE_NAME property as no supported devices found",
    NO_MEMORY: "[GPU] clCreateBuffer, error code: -4 CL_MEM_OBJECT_ALLOCATION_FAILURE",
    REFUSED: "Check 'a' failed at src/b.cpp:61:\nShapes are not consistent",
}
"""The same errors, as OpenVINO on an Intel GPU reports them."""

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
    """`begin` activates faults of `FAULTS`, `end` deactivates them; their texts are those of the device."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cuda",
        run_s: float = 30.0,
        first_s: float = 0.3,
        **timing: float,
    ) -> None:
        self._folder = folder
        self.path = folder / "faults.yaml"
        waits = {"firstSeconds": first_s, "maxWaitSeconds": 1.0, "windowSeconds": 0.1, "healthySeconds": 0.1}
        faults = [
            {**fault, "when": {**fault.get("when", {}), "file": str(folder / name)}}
            for name, fault in FAULTS.items()
        ]
        for fault in faults:
            if device == "openvino-gpu" and "raise" in fault:
                fault["raise"] = OPENVINO_TEXTS[fault["raise"]]
        document = {
            "device": device,
            "timing": {**waits, **timing},
            "limits": {"runSeconds": run_s},
            "faults": faults,
        }
        self.path.write_text(yaml.safe_dump(document))

    def begin(self, *names: str) -> None:
        """Activate faults."""
        for name in names:
            assert name in FAULTS
            (self._folder / name).touch()

    def end(self, *names: str) -> None:
        """Deactivate faults."""
        for name in names:
            (self._folder / name).unlink()
