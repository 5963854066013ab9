"""Probes that may hang or crash, run as a child process: drivers, CUDA libraries, OpenVINO, network, clock.

``python -I probe_child.py PROBE ARGUMENTS`` prints a JSON line after each step, so that a crash loses only
the later steps. Only the standard library is used, except by the last steps of `probe_openvino`.
"""

import ctypes
import errno
import http.client
import json
import os
import socket
import ssl
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_NAME_BYTES = 100
_print_lock = threading.Lock()


def report_step(step: str, **facts: Any) -> None:
    """Print a step as a line for the parent."""
    line = json.dumps({"step": step, **facts})
    with _print_lock:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def probe_driver(arguments: dict[str, Any]) -> None:
    """Open the device nodes, load libcuda, initialise it, list the devices and their memory."""
    report_step("open", errors={node: _open_error(node) for node in arguments["nodes"]})
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        report_step("library", error=str(error))
        return
    report_step("library", path=_loaded_path("libcuda.so"))
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    report_step("version", cuda=version.value)
    _probe_nvml()
    report_step("starting")
    code = driver.cuInit(0)
    report_step("init", code=code, name=_error_name(driver, code))
    if code == 0:
        count = ctypes.c_int()
        driver.cuDeviceGetCount(ctypes.byref(count))
        report_step("devices", devices=[_device(driver, index) for index in range(count.value)])
        if count.value:
            report_step("memory", **_memory(driver))


def _open_error(node: str) -> str | None:
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return None


def _loaded_path(name: str) -> str:
    """The file from which a library was loaded."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if name in path:
                return os.path.realpath(path)
    return ""


def _error_name(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(text))
    return (text.value or b"").decode(errors="replace")


def _device(driver: Any, index: int) -> dict[str, Any]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    total, name = ctypes.c_size_t(), ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    return {
        "name": name.value.decode(errors="replace"),
        "capability": major.value * 10 + minor.value,
        "totalBytes": total.value,
    }


def _memory(driver: Any) -> dict[str, int]:
    """The free memory of the first device; the query needs a context on it."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    code = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    if code:
        return {"code": code}
    driver.cuCtxSetCurrent(context)
    code = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.cuDevicePrimaryCtxRelease_v2(0)
    return {"code": code, "freeBytes": free.value, "totalBytes": total.value}


def _probe_nvml() -> None:
    """The driver's version from NVML, which may refuse all queries under WSL."""
    with suppress(OSError, AttributeError):
        management = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(_NAME_BYTES)
        if management.nvmlInit_v2() == 0:
            if management.nvmlSystemGetDriverVersion(text, _NAME_BYTES) == 0:
                report_step("management", driver=text.value.decode(errors="replace"))
            management.nvmlShutdown()


def probe_libraries(arguments: dict[str, Any]) -> None:
    """Load libraries in order and report their versions.

    As onnxruntime does: from the folders of packages first, then from the loader's search path.
    """
    folders = [Path(folder) for folder in arguments["folders"]]
    for name in arguments["names"]:
        found = next((folder / name for folder in folders if (folder / name).exists()), None)
        report_step(name, loading=True)
        try:
            library = ctypes.CDLL(str(found or name), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            report_step(name, error=str(error))
            continue
        report_step(name, path=str(found or _loaded_path(name)), version=_version(name, library))


def _version(name: str, library: Any) -> int:
    """The library's own version number; 0 if it has none."""
    value = ctypes.c_int()
    with suppress(AttributeError):
        match name.split(".so", maxsplit=1)[0]:
            case "libcudart":
                library.cudaRuntimeGetVersion(ctypes.byref(value))
            case "libcufft":
                library.cufftGetVersion(ctypes.byref(value))
            case "libcurand":
                library.curandGetVersion(ctypes.byref(value))
            case "libcublas":
                return _property(library, 0) * 10000 + _property(library, 1) * 100 + _property(library, 2)
            case "libcublasLt":
                library.cublasLtGetVersion.restype = ctypes.c_size_t
                return int(library.cublasLtGetVersion())
            case "libcudnn":
                library.cudnnGetVersion.restype = ctypes.c_size_t
                return int(library.cudnnGetVersion())
    return value.value


def _property(library: Any, which: int) -> int:
    """The major (0), minor (1) or patch (2) version of cuBLAS."""
    value = ctypes.c_int()
    library.cublasGetProperty(which, ctypes.byref(value))
    return value.value


_OPENCL_VENDORS = Path("/etc/OpenCL/vendors")


def probe_openvino(arguments: dict[str, Any]) -> None:
    """Open the device nodes, load OpenCL and its drivers, ask OpenVINO for its devices.

    The GPU plugin of the openvino wheel (2026.4.1, its ELF header) links libOpenCL.so.1 and does not use
    Level Zero. Without this library, or a driver behind it, OpenVINO lists the CPU only and gives no reason.
    """
    report_step("open", errors={node: _open_error(node) for node in arguments["nodes"]})
    report_step("level-zero", error=_load_error("libze_intel_gpu.so.1"))
    error = _load_error("libOpenCL.so.1")
    report_step("opencl", error=error, path="" if error else _loaded_path("libOpenCL.so"))
    report_step("loading")
    report_step("drivers", drivers=[_opencl_driver(path) for path in sorted(_OPENCL_VENDORS.glob("*.icd"))])
    if not arguments["installed"]:
        return
    report_step("starting")
    from visionedge.runtime.ov import import_openvino

    try:
        openvino = import_openvino()
    except Exception as caught:  # noqa: BLE001 - a broken package may raise anything: its text is the result
        reason = caught.__context__ or caught  # without the remedy, which the parent has for this machine
        report_step("package", error=str(reason) or type(reason).__name__)
        return
    core = openvino.Core()
    names = dict.fromkeys(core.available_devices, "")
    for name in names:
        with suppress(Exception):  # a device without a name is still listed
            names[name] = str(core.get_property(name, "FULL_DEVICE_NAME"))
    report_step("devices", devices=names)


def _load_error(library: str) -> str | None:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def _opencl_driver(icd: Path) -> dict[str, str | None]:
    """The library that a file of the OpenCL loader names, and the error if it cannot be loaded."""
    try:
        library = icd.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return {"icd": str(icd), "library": "", "error": error.strerror}
    return {"icd": str(icd), "library": library, "error": _load_error(library)}


def probe_network(arguments: dict[str, Any]) -> None:
    """Resolve names, connect to ports and read a server's clock, in parallel; the parent limits the time."""
    work = [
        *(threading.Thread(target=_resolve, args=(name,), daemon=True) for name in arguments["resolve"]),
        *(
            threading.Thread(target=_try_connect, args=(key, *address), daemon=True)
            for key, address in arguments["reach"].items()
        ),
        *(
            threading.Thread(target=_read_server_date, args=(name,), daemon=True)
            for name in arguments["date"]
        ),
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()


def _resolve(name: str) -> None:
    try:
        found = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
    except OSError as error:
        report_step(f"resolve:{name}", error=error.strerror or str(error))
    else:
        report_step(f"resolve:{name}", addresses=sorted({str(item[4][0]) for item in found}))


def _try_connect(key: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        report_step(f"reach:{key}", error=error.strerror or str(error))
    else:
        report_step(f"reach:{key}", reached=True)


def _read_server_date(name: str) -> None:
    """The clock of a server. Without verification, because no certificate is valid under a wrong clock."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        connection = http.client.HTTPSConnection(name, timeout=10, context=context)
        connection.request("HEAD", "/")
        date = connection.getresponse().getheader("Date")
        connection.close()
    except (OSError, http.client.HTTPException) as error:
        report_step("date", error=str(error))
    else:
        report_step("date", date=date)


class _Timex(ctypes.Structure):
    """The first fields of the kernel's `struct timex`, and space for the others."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("most_error_us", ctypes.c_long),
        ("error_us", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def probe_clock(_arguments: dict[str, Any]) -> None:
    """Whether the kernel considers its clock synchronised."""
    state = _Timex()
    unsynchronised = 0x40
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(state)) >= 0:
        kept = not state.status & unsynchronised
        report_step("kernel", synchronised=kept, errorMs=state.most_error_us / 1000)


PROBES = {
    "driver": probe_driver,
    "libraries": probe_libraries,
    "openvino": probe_openvino,
    "network": probe_network,
    "clock": probe_clock,
}

if __name__ == "__main__":
    PROBES[sys.argv[1]](json.loads(sys.argv[2]))
