"""The chain of checks from this process to a session on an NVIDIA GPU; each depends on the ones before it.

A check evaluates the facts and reads nothing itself. docs/gpu.md explains each.
"""

from dataclasses import replace

from visionedge.ops.doctor import remedies
from visionedge.ops.doctor.checks import Check, CheckResult, CheckState, broken, info, ok, warning
from visionedge.ops.doctor.facts import HostFacts
from visionedge.ops.doctor.host import DXG, WSL_LIBRARIES
from visionedge.ops.doctor.wheel import MIN_DRIVER, cudnn_sass, format_capability, sass_supports

_MIB = 2**20
_MIN_FREE_MIB = 1024
_KERNELS = {
    "eflow": "probably the VM of EFLOW (Azure Linux on Hyper-V)",
    "wsl": "WSL 2 on Windows",
    "hyper-v": "a virtual machine on Hyper-V",
    "linux": "Linux, not on Hyper-V",
}
_CUDA_ERRORS = {
    34: "libcuda is a stub for linking, not the driver's library",
    100: "the driver sees no CUDA device",
    101: "the device number is not valid",
    802: "the system's NVLink fabric is not ready",
    803: "the driver's kernel module and libcuda have different versions",
    804: "forward compatibility is not supported on this GPU",
}


def run_gpu_checks(facts: HostFacts, checks: tuple[Check, ...]) -> tuple[CheckResult, ...]:
    """Run the checks in order; after the first broken one only independent checks.

    Without a GPU, and without a demand for one, nothing is broken: a missing link is only reported. If a
    session computes on the GPU although a check fails, that check is only a warning.
    """
    results: list[CheckResult] = []
    is_broken = False
    for check in checks:
        result = check.run(facts) if check.independent or not is_broken else None
        if result is None:
            results.append(CheckResult(CheckState.SKIPPED, "not checked", (), check.name, check.title))
            continue
        if result.state is CheckState.BROKEN:
            shown = {one.instruction for each in results for one in each.remedies}
            result, is_broken = (
                _weigh(result, facts, shown, is_first=not is_broken),
                is_broken or not facts.fulfilled,
            )
        results.append(result)
    return tuple(results)


def _weigh(result: CheckResult, facts: HostFacts, shown: set[str], *, is_first: bool) -> CheckResult:
    """A failed check as it counts on this machine; `shown`: the instructions of earlier checks."""
    if facts.fulfilled:
        return replace(
            result, state=CheckState.WARNING, found=f"{result.found}; but a session works", remedies=()
        )
    if facts.intel_is_unused and facts.request.device == "auto":  # what the Intel GPU needs is of interest
        remedies_left = tuple(one for one in result.remedies if one.instruction not in shown)
        return replace(result, state=CheckState.INFO, remedies=remedies_left)
    if facts.gpu_is_absent or facts.intel_is_unused or facts.request.device == "remote":
        return replace(result, state=CheckState.INFO, remedies=())
    return result if is_first else replace(result, remedies=())  # one remedy at a time


def _container(facts: HostFacts) -> CheckResult:
    return info(f"{'yes' if facts.environment.container else 'no'}, user {facts.uid}")


def _iot_edge(facts: HostFacts) -> CheckResult:
    match facts.environment.edge:
        case "edge":
            return info(f"yes, module {facts.environ['IOTEDGE_MODULEID']}")
        case "simulator":
            return info("the IoT Edge simulator")
        case "half":
            return warning(
                "some of its environment variables are set, others are missing", *remedies.PARTIAL_IDENTITY
            )
        case _:
            return info("no")


def _kernel(facts: HostFacts) -> CheckResult:
    release = facts.environment.release or "unknown"
    return info(f"{release}: {_KERNELS[facts.environment.kernel]}")


def _passthrough(facts: HostFacts) -> CheckResult:
    environment = facts.environment
    match environment.passthrough:
        case "dda" | "native":
            kind = "DDA, the VM owns the whole GPU" if environment.passthrough == "dda" else "of this machine"
            return _native(facts, f"{kind} ({', '.join(environment.nodes)})")
        case "gpu-pv":
            return _gpu_pv(facts)
        case "intel":
            return broken("no NVIDIA GPU here; an Intel GPU is not a CUDA device", *remedies.intel_gpu(facts))
        case _:
            return _no_gpu(facts)


def _native(facts: HostFacts, found: str) -> CheckResult:
    nodes = set(facts.environment.nodes)
    if missing := sorted({"/dev/nvidiactl", "/dev/nvidia-uvm"} - nodes):
        return broken(f"{found}, but without {' and '.join(missing)}", *remedies.missing_device_nodes(facts))
    if not any(node[-1].isdigit() for node in nodes):
        return broken(f"{found}, but without a device node of a GPU", *remedies.gpu_not_exposed(facts))
    driver = facts.environment.kernel_driver
    return ok(f"{found}, driver {driver}" if driver else found)


def _gpu_pv(facts: HostFacts) -> CheckResult:
    environment = facts.environment
    stores = [name for name in environment.wsl_stores if name.lower().startswith("nv")]
    if not environment.wsl_libraries and not stores:
        if "path" in facts.probed.driver.step("library"):
            return ok(f"GPU-PV ({DXG}), libcuda is in another folder than {WSL_LIBRARIES}")
        return broken(f"GPU-PV ({DXG}), but {WSL_LIBRARIES} is empty here", *remedies.wsl_libraries(facts))
    if environment.wsl_libraries and "libdxcore.so" not in environment.wsl_libraries:
        return broken(
            f"GPU-PV ({DXG}), but libdxcore.so is not in {WSL_LIBRARIES}", *remedies.wsl_libraries(facts)
        )
    stores_without_library = [n for n in stores if "libnvdxgdmal.so.1" not in environment.wsl_stores[n]]
    if stores and len(stores_without_library) == len(stores):
        text = f"GPU-PV ({DXG}), without libnvdxgdmal.so.1 (needed by drivers from 555 on)"
        if facts.probed.driver.step("init").get("code") == remedies.CUDA_ERROR_NOT_FOUND:
            return broken(text, *remedies.old_container_toolkit(facts))
        return info(text)
    return ok(f"GPU-PV ({DXG}), shared with Windows")


def _no_gpu(facts: HostFacts) -> CheckResult:
    environment = facts.environment
    match environment.host_gpu:
        case "driver" if environment.container:
            driver = f" {environment.kernel_driver}" if environment.kernel_driver else ""
            return broken(
                f"the host has the NVIDIA driver{driver}, but the GPU is not passed to this container",
                *remedies.gpu_not_exposed(facts),
            )
        case "driver":
            return broken(
                "the NVIDIA driver is loaded, but there is no /dev/nvidia*",
                *remedies.missing_device_nodes(facts),
            )
        case "dxg":
            reason = "it is not passed to this container" if environment.container else f"there is no {DXG}"
            return broken(f"the VM has GPU-PV, but {reason}", *remedies.gpu_not_exposed(facts))
        case "pci":
            return broken(
                "an NVIDIA GPU is on the PCI bus, but no driver is loaded for it",
                *remedies.missing_driver(facts),
            )
        case _:
            return broken(f"no GPU here: neither /dev/nvidia* nor {DXG}", *remedies.no_gpu(facts))


def _permissions(facts: HostFacts) -> CheckResult:
    errors = facts.probed.driver.step("open").get("errors", {})
    refused = {node: error for node, error in errors.items() if error}
    if not refused:
        return ok(f"user {facts.uid} may open {len(errors)} device node{'s' if len(errors) != 1 else ''}")
    node, error = next(iter(refused.items()))
    others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return broken(
        f"user {facts.uid} cannot open {node}: {error}{others}", *remedies.denied_device_node(facts, error)
    )


def _libcuda(facts: HostFacts) -> CheckResult:
    probed = facts.probed.driver
    if "error" in (library := probed.step("library")):
        if "cannot open shared object" in library["error"]:
            return broken("libcuda.so.1 is missing", *remedies.missing_libcuda(facts))
        return broken(f"libcuda.so.1 cannot be loaded: {library['error']}", *remedies.missing_libcuda(facts))
    if "version" not in probed.steps:
        return broken(f"loading libcuda.so.1 failed: {probed.reason}", *remedies.hanging_driver(facts))
    cuda = probed.step("version")["cuda"]
    path = library["path"] or "libcuda.so.1"
    text = f"{path}, supports CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    if driver := probed.step("management").get("driver"):
        text += f", driver {driver}"
    if facts.environment.passthrough == "gpu-pv" and path.startswith("/") and "/wsl/" not in path:
        state = broken if probed.step("init").get("code") else warning
        return state(f"{text}; under GPU-PV libcuda must be that of /usr/lib/wsl", *remedies.FOREIGN_LIBCUDA)
    return ok(text)


def _wheel(facts: HostFacts) -> CheckResult:
    wheel = facts.wheel
    if not wheel.cuda:
        if "onnxruntime-gpu" in wheel.others:
            found = f"{wheel.name}, without CUDA, was installed over onnxruntime-gpu"
            return broken(found, *remedies.conflicting_onnxruntimes(facts))
        return broken(f"{wheel.name} was built without CUDA", *remedies.cpu_only_onnxruntime(facts))
    codes = ", ".join(format_capability(code) for code in wheel.sass)
    newer = f" and, as PTX, for {format_capability(wheel.ptx[0])} and newer" if wheel.ptx else ""
    text = f"{wheel.name} for CUDA {wheel.cuda}, compiled for {codes}{newer}"
    if wheel.others:
        return warning(
            f"{text}; installed over {', '.join(wheel.others)}", *remedies.conflicting_onnxruntimes(facts)
        )
    return ok(text)


def _driver_version(facts: HostFacts) -> CheckResult:
    cuda = facts.probed.driver.step("version").get("cuda", 0)
    driver = facts.probed.driver.step("management").get("driver") or facts.environment.kernel_driver
    supported = f"CUDA {cuda // 1000}.{cuda % 1000 // 10}" + (f", driver {driver}" if driver else "")
    least = facts.wheel.cuda
    if cuda < least * 1000:
        return broken(
            f"{supported}; {facts.wheel.name} needs CUDA {least}, driver {MIN_DRIVER[least]} or newer",
            *remedies.old_driver(facts),
        )
    return ok(f"{supported} is enough for CUDA {least}")


def _libraries(facts: HostFacts) -> CheckResult:
    probed = facts.probed.libraries
    if not facts.wheel.cuda:
        return info("not needed by this onnxruntime")
    versions = []
    for name in facts.wheel.needed:
        step = probed.step(name)
        if "error" in step:
            reason = (
                "is missing" if "cannot open shared object" in step["error"] else f"fails: {step['error']}"
            )
            missing = [n for n in facts.wheel.needed if "error" in probed.step(n)]
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            return broken(f"{name} {reason}{more}", *remedies.missing_cuda_library(facts, name))
        if "path" not in step:
            return broken(
                f"loading {name} failed: {probed.reason}", *remedies.missing_cuda_library(facts, name)
            )
        versions.append(f"{name.split('.so')[0]} {_version(name, step.get('version', 0))}".rstrip())
    return ok(", ".join(versions))


def _version(name: str, number: int) -> str:
    """A library's version number with dots; each library encodes it in its own way."""
    if not number:
        return ""
    kind = name.split(".so", maxsplit=1)[0]
    if kind == "libcudart":
        return f"{number // 1000}.{number % 1000 // 10}"
    if kind in ("libcublasLt", "libcublas", "libcudnn") and number >= 90000:
        return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
    return f"{number // 1000}.{number % 1000 // 100}.{number % 100}"


def _cudnn(facts: HostFacts) -> CheckResult:
    number = facts.probed.libraries.step("libcudnn.so.9").get("version", 0)
    if not number:
        return info("version unknown")
    sass = cudnn_sass(number, facts.wheel.cuda)
    codes = ", ".join(format_capability(code) for code in sass)
    text = f"{_version('libcudnn.so.9', number)} has kernels for {codes}"
    for device in facts.probed.driver.step("devices").get("devices", [])[:1]:
        if not sass_supports(device["capability"], sass):
            found = f"{text}; {device['name']} is {format_capability(device['capability'])}"
            return broken(found, *remedies.unsupported_by_cudnn(facts))
    return ok(text)


def _cuda_init(facts: HostFacts) -> CheckResult:
    probed = facts.probed.driver
    init = probed.step("init")
    if "code" not in init:
        how = "did not return" if probed.ended == "late" else f"crashed ({probed.reason})"
        return broken(f"cuInit {how}", *remedies.hanging_driver(facts))
    code = init["code"]
    if code:
        name = init.get("name") or f"error {code}"
        reason = f": {_CUDA_ERRORS[code]}" if code in _CUDA_ERRORS else ""
        return broken(f"cuInit returned {code} ({name}){reason}", *remedies.cuda_init_failed(facts, code))
    devices = probed.step("devices").get("devices", [])
    if not devices:
        return broken("the driver works, but reports no device", *remedies.cuda_init_failed(facts, 100))
    names = ", ".join(f"{device['name']} ({format_capability(device['capability'])})" for device in devices)
    return ok(f"{len(devices)} device{'s' if len(devices) > 1 else ''}: {names}")


def _capability(facts: HostFacts) -> CheckResult:
    device = facts.probed.driver.step("devices")["devices"][0]
    capability = device["capability"]
    text = f"{device['name']} is {format_capability(capability)}"
    if not facts.wheel.supports(capability):
        return broken(
            f"{text}; {facts.wheel.name} has no kernels for it",
            *remedies.unsupported_capability(facts, capability),
        )
    if not sass_supports(capability, facts.wheel.sass):
        return warning(f"{text}: the first start compiles its kernels from PTX, which takes minutes")
    return ok(f"{text}, supported by {facts.wheel.name}")


def _gpu_memory(facts: HostFacts) -> CheckResult:
    memory = facts.probed.driver.step("memory")
    if not memory:
        how = "did not return" if facts.probed.driver.ended == "late" else "crashed"
        return broken(f"the query of the GPU's memory {how}", *remedies.hanging_driver(facts))
    if memory.get("code"):
        found = f"creating a context on the GPU failed: CUDA error {memory['code']}"
        return broken(found, *remedies.gpu_memory_unavailable(facts, memory["code"]))
    free, total = memory["freeBytes"] // _MIB, memory["totalBytes"] // _MIB
    text = f"{free} MiB of {total} MiB free"
    if free < _MIN_FREE_MIB and not facts.gpu_works:
        return broken(f"{text}, {_MIN_FREE_MIB} MiB are needed", *remedies.gpu_memory_unavailable(facts, 2))
    return ok(text)


def _provider(facts: HostFacts) -> CheckResult:
    if not facts.wheel.cuda:
        return info("not in this onnxruntime")
    if not facts.wheel.has_provider:
        found = f"libonnxruntime_providers_cuda.so of {facts.wheel.name} is missing"
        return broken(found, *remedies.conflicting_onnxruntimes(facts))
    return ok(f"libonnxruntime_providers_cuda.so of {facts.wheel.name}")


def _session(facts: HostFacts) -> CheckResult:
    verdict = facts.probed.verdict
    if facts.gpu_works:
        which = (
            "the engine of this module" if facts.request.running is not None else "a test session of one node"
        )
        if facts.request.device not in ("auto", facts.probed.effective):
            text = (
                f"{which} computes on {facts.probed.effective}, not on {facts.request.device}: "
                f"{verdict.reason}"
            )
            return broken(text, *remedies.session_failed(facts, verdict.code))
        return ok(f"{which} computes on {facts.probed.effective}")
    if facts.request.device in ("cpu", "remote"):
        requested = "the CPU" if facts.request.device == "cpu" else "a remote device"
        return info(f"not tried: {requested} was requested")
    return broken(f"{verdict.reason} ({verdict.code})", *remedies.session_failed(facts, verdict.code))


def _placement(facts: HostFacts) -> CheckResult:
    probed = facts.probed.placement.step("placement")
    if not probed:
        reason = facts.probed.placement.reason or "not tried"
        return info(f"unknown: {reason}")
    if "error" in probed:
        return broken(f"the model cannot be opened on {facts.probed.effective}: {probed['error']}")
    if probed["device"] != facts.probed.effective:
        return broken(
            f"the model runs on {probed['device']} only", *remedies.session_failed(facts, "provider-refused")
        )
    nodes, on_cpu = probed["onDevice"], probed["onCpu"]
    if on_cpu:
        some = ", ".join(on_cpu[:5]) + (" …" if len(on_cpu) > 5 else "")
        doubt = f"; {probed['doubt']}" if probed.get("doubt") else ""
        return warning(f"{nodes} nodes on {probed['device']}, {len(on_cpu)} on the CPU: {some}{doubt}")
    if probed.get("doubt"):
        return warning(probed["doubt"])
    return ok(f"all {nodes} nodes of the model on {probed['device']}" if nodes else f"on {probed['device']}")


COMMON_CHECKS = (
    Check("container", "container", _container, independent=True),
    Check("iot-edge", "IoT Edge", _iot_edge, independent=True),
    Check("kernel", "kernel", _kernel, independent=True),
)
"""The checks with which the chain to any GPU begins."""

GPU_CHECKS = (
    *COMMON_CHECKS,
    Check("passthrough", "GPU", _passthrough),
    Check("permissions", "permissions", _permissions),
    Check("libcuda", "libcuda", _libcuda, independent=True),
    Check("onnxruntime", "onnxruntime", _wheel, independent=True),
    Check("driver-version", "driver version", _driver_version),
    Check("libraries", "CUDA libraries", _libraries, independent=True),
    Check("cuda-init", "CUDA start", _cuda_init),
    Check("capability", "capability", _capability),
    Check("cudnn", "cuDNN", _cudnn),
    Check("gpu-memory", "GPU memory", _gpu_memory),
    Check("provider", "CUDA provider", _provider, independent=True),
    Check("session", "first session", _session),
    Check("placement", "node placement", _placement),
)
"""All checks of the chain to an NVIDIA GPU, in order."""
