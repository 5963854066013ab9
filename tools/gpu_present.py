"""Is there an NVIDIA device that the `gpu` extra could use? Exit code 0 for yes, 1 for no; one line says why.

The driver itself is asked, in a child with a time limit: a broken driver can hang or crash whoever calls it.
Only the standard library is used, because this runs before anything is installed.
"""

import ctypes
import json
import platform
import subprocess
import sys
from typing import Any

LIBRARIES = ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1")
TIME_LIMIT_S = 30.0
CUDA_NEEDED = 12000  # as cuDriverGetVersion counts; the extra carries CUDA 12
CAPABILITY_NEEDED = (6, 0)  # Pascal: the oldest that the pinned onnxruntime-gpu and cuDNN have kernels for
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


def usable_device(time_limit_s: float = TIME_LIMIT_S) -> tuple[bool, str]:
    """Whether a usable device is there, and the reason in a few words."""
    if platform.machine() != "x86_64":
        return False, f"the gpu extra exists for x86_64 only, this is {platform.machine()}"
    try:
        child = subprocess.run(
            [sys.executable, "-I", __file__, "--ask-driver"],
            capture_output=True,
            text=True,
            timeout=time_limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"the NVIDIA driver did not answer within {time_limit_s:g} s"
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        return False, f"asking the NVIDIA driver ended with code {child.returncode}"
    return bool(answer["usable"]), str(answer["reason"])


def judge(driver: Any) -> tuple[bool, str]:
    """What the loaded driver library says of itself and its devices; None stands for no library."""
    if driver is None:
        return False, "no NVIDIA driver here (libcuda.so.1)"
    if code := driver.cuInit(0):
        return False, f"the NVIDIA driver found no working device (cuInit answered {code})"
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    if version.value < CUDA_NEEDED:
        have = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return False, f"the NVIDIA driver speaks CUDA {have}, 12.0 is needed: update the driver"
    capabilities = [_capability(driver, index) for index in range(count.value)]
    if not any(capability >= CAPABILITY_NEEDED for capability in capabilities):
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities) or "none"
        return False, f"no NVIDIA device of compute capability 6.0 or newer (found: {found})"
    return True, f"{count.value} NVIDIA device(s) found"


def _load() -> ctypes.CDLL | None:
    for library in LIBRARIES:
        try:
            return ctypes.CDLL(library)
        except OSError:
            continue
    return None


def _capability(driver: Any, index: int) -> tuple[int, int]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return major.value, minor.value


def main(arguments: list[str]) -> int:
    """The command: with ``--ask-driver`` the child, else the whole question."""
    if arguments == ["--ask-driver"]:
        usable, reason = judge(_load())
        print(json.dumps({"usable": usable, "reason": reason}))
        return 0
    usable, reason = usable_device()
    print(reason)
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
