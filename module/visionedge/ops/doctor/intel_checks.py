"""The chain of checks from this process to a session of OpenVINO on an Intel GPU.

Intel's OpenCL driver belongs to Linux, also under GPU-PV, where Windows gives the device /dev/dxg and the
libraries in /usr/lib/wsl (WSL.md of github.com/intel/compute-runtime, read 2026-11-30). The driver opens
/usr/lib/wsl/lib/libdxcore.so under GPU-PV, else /dev/dri/renderD* (seen in Debian's 22.43.24595.41). Without
this driver OpenVINO lists the CPU only and gives no reason (seen with 2026.4.1).
"""

from visionedge.ops.doctor import remedies
from visionedge.ops.doctor.checks import Check, CheckResult, broken, info, ok
from visionedge.ops.doctor.facts import HostFacts
from visionedge.ops.doctor.gpu_checks import COMMON_CHECKS
from visionedge.ops.doctor.host import DRI, DXG, WSL_DRIVERS, WSL_LIBRARIES

_VENDORS = {"0x1002": "AMD", "0x10de": "NVIDIA"}
_INTEL_OPENCL = ("intel", "igdrcl")


def _passthrough(facts: HostFacts) -> CheckResult:
    environment = facts.environment
    if nodes := environment.intel_nodes:
        return ok(f"an Intel GPU ({', '.join(nodes)})")
    return _gpu_pv(facts) if environment.dxg else _no_device(facts)


def _no_device(facts: HostFacts) -> CheckResult:
    environment = facts.environment
    if names := environment.intel_names:
        where = f"the host has an Intel GPU ({', '.join(names)})"
        if environment.container:
            return broken(f"{where} that is not passed to this container", *remedies.intel_not_exposed(facts))
        return broken(f"{where}, but no {DRI}/{names[0]}", *remedies.missing_render_node(facts))
    if environment.intel_on_pci:
        found = "an Intel GPU is on the PCI bus, but the kernel has no render node for it"
        return broken(found, *remedies.missing_render_node(facts))
    if environment.host_gpu == "dxg":
        reason = "it is not passed to this container" if environment.container else f"there is no {DXG}"
        return broken(f"the VM has GPU-PV, but {reason}", *remedies.intel_not_exposed(facts))
    others = [
        f"{name} is of {_VENDORS.get(v, v or 'an unknown vendor')}"
        for name, v in environment.render_vendors.items()
    ]
    found = f"no Intel GPU here: neither {DXG} nor one of Intel in {DRI}"
    return broken("; ".join([found, *others]), *remedies.no_intel_gpu(facts))


def _gpu_pv(facts: HostFacts) -> CheckResult:
    """GPU-PV has one device for GPUs of all vendors; only the driver store of Windows names them."""
    environment = facts.environment
    if stores := environment.intel_stores:
        return ok(f"GPU-PV ({DXG}), shared with Windows, whose driver is {stores[0]}")
    if environment.wsl_stores:
        found = (
            f"GPU-PV ({DXG}), but no driver of Intel in {WSL_DRIVERS}: {', '.join(environment.wsl_stores)}"
        )
        return broken(found, *remedies.no_intel_gpu(facts))
    return info(f"GPU-PV ({DXG}), of an unknown vendor, as {WSL_DRIVERS} is empty here")


def _permissions(facts: HostFacts) -> CheckResult:
    errors = facts.probed.openvino.step("open").get("errors", {})
    refused = {node: error for node, error in errors.items() if error}
    opened = [node for node in errors if node not in refused]
    if refused and not opened:
        node, error = next(iter(refused.items()))
        found = f"user {facts.uid} cannot open {node}: {error}"
        return broken(found, *remedies.denied_intel_node(facts, node, error))
    return ok(f"user {facts.uid} may open {', '.join(opened)}") if opened else info("there is no device node")


def _opencl(facts: HostFacts) -> CheckResult:
    """The libraries of Windows under GPU-PV, the loader of OpenCL, and Intel's driver behind it."""
    probed, environment = facts.probed.openvino, facts.environment
    if environment.dxg and not environment.intel_nodes:
        for folder, there in (
            (WSL_LIBRARIES, environment.wsl_libraries),
            (WSL_DRIVERS, environment.wsl_stores),
        ):
            if not there:
                return broken(f"GPU-PV, but {folder} is empty here", *remedies.intel_not_exposed(facts))
        if "libdxcore.so" not in environment.wsl_libraries:
            found = f"GPU-PV, but libdxcore.so is not in {WSL_LIBRARIES}"
            return broken(found, *remedies.intel_not_exposed(facts))
    if error := probed.step("opencl").get("error"):
        is_missing = "cannot open shared object" in error
        found = "libOpenCL.so.1 is missing" if is_missing else f"libOpenCL.so.1 cannot be loaded: {error}"
        if probed.step("level-zero").get("error", "") is None:
            found += "; Level Zero is here, but OpenVINO uses OpenCL"
        return broken(found, *remedies.missing_opencl(facts))
    if "drivers" not in probed.steps:
        return broken(f"loading the OpenCL driver failed: {probed.reason}", *remedies.hanging_driver(facts))
    return _opencl_driver(facts)


def _opencl_driver(facts: HostFacts) -> CheckResult:
    drivers = facts.probed.openvino.step("drivers")["drivers"]
    intel = [
        one for one in drivers if any(word in f"{one['icd']} {one['library']}" for word in _INTEL_OPENCL)
    ]
    if not intel:
        found = "no OpenCL driver of Intel in /etc/OpenCL/vendors"
        others = f" (there: {', '.join(one['library'] for one in drivers)})" if drivers else ""
        return broken(found + others, *remedies.missing_opencl(facts))
    working = [one for one in intel if not one["error"]]
    if not working:
        found = f"Intel's OpenCL driver cannot be loaded: {intel[0]['error']}"
        return broken(found, *remedies.missing_opencl(facts))
    return ok(f"libOpenCL.so.1 and {working[0]['library']}")


def _openvino(facts: HostFacts) -> CheckResult:
    if not facts.openvino:
        return broken("the package openvino is not installed", *remedies.missing_openvino(facts))
    if error := facts.probed.openvino.step("package").get("error"):
        found = f"openvino {facts.openvino} cannot be imported: {error}"
        return broken(found, *remedies.missing_openvino(facts))
    return ok(f"openvino {facts.openvino}")


def _devices(facts: HostFacts) -> CheckResult:
    probed = facts.probed.openvino
    if "devices" not in probed.steps:
        how = "did not return" if probed.ended == "late" else f"crashed ({probed.reason})"
        return broken(f"OpenVINO's query of the devices {how}", *remedies.hanging_driver(facts))
    names = probed.step("devices")["devices"]
    gpus = {name: title for name, title in names.items() if name.startswith("GPU")}
    if not gpus:
        listed = ", ".join(names) or "nothing"
        return broken(f"OpenVINO lists no GPU, only: {listed}", *remedies.gpu_not_listed(facts))
    return ok(", ".join(f"{name}: {title}" if title else name for name, title in gpus.items()))


def _session(facts: HostFacts) -> CheckResult:
    verdict, requested = facts.probed.verdict, facts.request.device
    if facts.probed.effective == "openvino-gpu":
        running = facts.request.running is not None
        which = "the engine of this module" if running else "a test session of one node"
        return ok(f"{which} computes on openvino-gpu")
    if requested in ("cpu", "remote"):
        return info(f"not tried: {requested} was requested; auto and openvino-gpu use this GPU")
    found = f"{verdict.reason} ({verdict.code})"
    return broken(found, *remedies.openvino_failed(facts, verdict.code))


INTEL_CHECKS = (
    *COMMON_CHECKS,
    Check("passthrough", "GPU", _passthrough),
    Check("permissions", "permissions", _permissions),
    Check("opencl", "OpenCL driver", _opencl),
    Check("openvino", "OpenVINO", _openvino, independent=True),
    Check("openvino-devices", "device list", _devices),
    Check("session", "first session", _session),
)
"""All checks of the chain to an Intel GPU, in order."""
