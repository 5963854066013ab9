"""The chain to the GPU: each link judges what was seen, in the order in which they need each other."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from visionedge.ops.doctor import passthrough, remedies
from visionedge.ops.doctor.facts import HostFacts
from visionedge.ops.doctor.host import (
    DXG,
    WSL_LIBRARIES,
    CheckOutcome,
    CheckResult,
    CheckState,
    broken,
    info,
    ok,
    warning,
)
from visionedge.ops.doctor.wheel import MIN_DRIVER, cudnn_sass, format_capability, sass_supports

_MIB = 2**20
_MIN_FREE_MIB = 1024
_NOT_FOUND = 500
_KERNELS = {
    "eflow": "looks like the VM of EFLOW (Azure Linux on Hyper-V)",
    "wsl": "WSL 2 on Windows",
    "hyper-v": "a virtual machine on Hyper-V",
    "linux": "Linux, not on Hyper-V",
}
_CUDA_ERRORS = {
    34: "libcuda is a stub that is only there to link against",
    100: "the driver sees no CUDA device",
    101: "the device number is not valid",
    802: "the system's NVLink fabric is not ready",
    803: "the driver's kernel part and libcuda are of different versions",
    804: "forward compatibility is not supported on this GPU",
}


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """One link. `alone` = it can be judged even when an earlier one is broken."""

    name: str
    title: str
    check: Callable[[HostFacts], CheckOutcome]
    independent: bool = False


def run_gpu_checks(facts: HostFacts) -> tuple[CheckResult, ...]:
    """Judge link by link; after the first broken one only what stands alone is still looked at.

    Where there is no GPU and nobody demanded one, nothing is broken: what is missing is only reported.
    Where a session computes on a GPU all the same, no sign of trouble outweighs it: it is a warning then.
    """
    findings: list[CheckResult] = []
    is_broken = False
    for gpu_check in GPU_CHECKS:
        if is_broken and not gpu_check.independent:
            findings.append(CheckResult(gpu_check.name, gpu_check.title, CheckState.SKIPPED, "not looked at"))
            continue
        outcome = gpu_check.check(facts)
        if outcome.state is CheckState.BROKEN and facts.fulfilled:
            outcome = warning(f"{outcome.found}; yet a session works")
        is_absent = outcome.state is CheckState.BROKEN and facts.gpu_is_absent
        if outcome.state is CheckState.BROKEN and is_broken:
            outcome = replace(outcome, remedies=())  # one thing at a time
        is_broken = is_broken or outcome.state is CheckState.BROKEN
        if is_absent:
            outcome = info(outcome.found)
        findings.append(
            CheckResult(gpu_check.name, gpu_check.title, outcome.state, outcome.found, outcome.remedies)
        )
    return tuple(findings)


def _container(facts: HostFacts) -> CheckOutcome:
    return info(f"{'yes' if facts.environment.container else 'no'}, user {facts.uid}")


def _iot_edge(facts: HostFacts) -> CheckOutcome:
    match facts.environment.edge:
        case "edge":
            return info(f"yes, module {facts.environ['IOTEDGE_MODULEID']}")
        case "simulator":
            return info("its simulator")
        case "half":
            return warning("some of its variables are set, and some are missing", *remedies.PARTIAL_IDENTITY)
        case _:
            return info("no")


def _kernel(facts: HostFacts) -> CheckOutcome:
    release = facts.environment.release or "unknown"
    return info(f"{release}: {_KERNELS[facts.environment.kernel]}")


def _passthrough(facts: HostFacts) -> CheckOutcome:
    environment = facts.environment
    match environment.passthrough:
        case "dda" | "native":
            way = (
                "DDA, the whole GPU is in this VM"
                if environment.passthrough == "dda"
                else "the machine's own"
            )
            return _native(facts, f"{way} ({', '.join(environment.nodes)})")
        case "gpu-pv":
            return _gpu_pv(facts)
        case "intel":
            return broken("no NVIDIA GPU here: an Intel GPU is no CUDA device", *passthrough.intel_gpu(facts))
        case _:
            return _no_gpu(facts)


def _native(facts: HostFacts, found: str) -> CheckOutcome:
    nodes = set(facts.environment.nodes)
    if missing := sorted({"/dev/nvidiactl", "/dev/nvidia-uvm"} - nodes):
        return broken(
            f"{found}, but {' and '.join(missing)} missing", *passthrough.missing_device_nodes(facts)
        )
    if not any(node[-1].isdigit() for node in nodes):
        return broken(f"{found}, but no GPU among them", *passthrough.gpu_not_exposed(facts))
    driver = facts.environment.kernel_driver
    return ok(f"{found}, driver {driver}" if driver else found)


def _gpu_pv(facts: HostFacts) -> CheckOutcome:
    environment = facts.environment
    stores = [name for name in environment.wsl_stores if name.lower().startswith("nv")]
    if not environment.wsl_libraries and not stores:
        if "path" in facts.probed.driver.step("library"):
            return ok(f"GPU-PV ({DXG}), its libraries lie elsewhere")
        return broken(f"GPU-PV ({DXG}), but {WSL_LIBRARIES} is empty here", *passthrough.wsl_libraries(facts))
    if environment.wsl_libraries and "libdxcore.so" not in environment.wsl_libraries:
        return broken(
            f"GPU-PV ({DXG}), but libdxcore.so is not in {WSL_LIBRARIES}", *passthrough.wsl_libraries(facts)
        )
    stores_without_library = [n for n in stores if "libnvdxgdmal.so.1" not in environment.wsl_stores[n]]
    if stores and len(stores_without_library) == len(stores):
        text = f"GPU-PV ({DXG}), without libnvdxgdmal.so.1 (drivers from 555 on need it)"
        if facts.probed.driver.step("init").get("code") == _NOT_FOUND:
            return broken(text, *passthrough.old_container_toolkit(facts))
        return info(text)
    return ok(f"GPU-PV ({DXG}), shared with Windows")


def _no_gpu(facts: HostFacts) -> CheckOutcome:
    environment = facts.environment
    match environment.host_gpu:
        case "driver" if environment.container:
            driver = f" {environment.kernel_driver}" if environment.kernel_driver else ""
            return broken(
                f"the host has the NVIDIA driver{driver}, but this container was not given the GPU",
                *passthrough.gpu_not_exposed(facts),
            )
        case "driver":
            return broken(
                "the NVIDIA driver is loaded, but has made no /dev/nvidia*",
                *passthrough.missing_device_nodes(facts),
            )
        case "dxg":
            who = "this container was not given it" if environment.container else f"there is no {DXG}"
            return broken(f"the VM has GPU-PV, but {who}", *passthrough.gpu_not_exposed(facts))
        case "pci":
            return broken(
                "an NVIDIA GPU is on the PCI bus, but no driver drives it", *remedies.missing_driver(facts)
            )
        case _:
            return broken(f"no GPU here: no /dev/nvidia*, no {DXG}", *passthrough.no_gpu(facts))


def _permissions(facts: HostFacts) -> CheckOutcome:
    errors = facts.probed.driver.step("open").get("errors", {})
    refused = {node: error for node, error in errors.items() if error}
    if not refused:
        return ok(f"user {facts.uid} may open {len(errors)} device node{'s' if len(errors) != 1 else ''}")
    node, error = next(iter(refused.items()))
    others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return broken(
        f"user {facts.uid} cannot open {node}: {error}{others}", *passthrough.denied_device_node(facts, error)
    )


def _libcuda(facts: HostFacts) -> CheckOutcome:
    probed = facts.probed.driver
    if "error" in (library := probed.step("library")):
        if "cannot open shared object" in library["error"]:
            return broken("libcuda.so.1 is missing", *remedies.missing_libcuda(facts))
        return broken(f"libcuda.so.1 cannot be loaded: {library['error']}", *remedies.missing_libcuda(facts))
    if "version" not in probed.steps:
        return broken(f"loading libcuda.so.1 went wrong: {probed.reason}", *remedies.hanging_driver(facts))
    cuda = probed.step("version")["cuda"]
    path = library["path"] or "libcuda.so.1"
    text = f"{path}, speaks CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    if driver := probed.step("management").get("driver"):
        text += f", driver {driver}"
    if facts.environment.passthrough == "gpu-pv" and path.startswith("/") and "/wsl/" not in path:
        judge = broken if probed.step("init").get("code") else warning
        return judge(f"{text}; under GPU-PV it has to be that of /usr/lib/wsl", *remedies.FOREIGN_LIBCUDA)
    return ok(text)


def _wheel(facts: HostFacts) -> CheckOutcome:
    wheel = facts.wheel
    if not wheel.cuda:
        if "onnxruntime-gpu" in wheel.others:
            found = f"{wheel.name} was installed over onnxruntime-gpu, and has no CUDA"
            return broken(found, *remedies.conflicting_onnxruntimes(facts))
        return broken(f"{wheel.name} was built without CUDA", *remedies.cpu_only_onnxruntime(facts))
    codes = ", ".join(format_capability(code) for code in wheel.sass)
    newer = f" and, by PTX, from {format_capability(wheel.ptx[0])} on" if wheel.ptx else ""
    text = f"{wheel.name} for CUDA {wheel.cuda}, compiled for {codes}{newer}"
    if wheel.others:
        return warning(
            f"{text}; installed over {', '.join(wheel.others)}", *remedies.conflicting_onnxruntimes(facts)
        )
    return ok(text)


def _driver_version(facts: HostFacts) -> CheckOutcome:
    cuda = facts.probed.driver.step("version").get("cuda", 0)
    driver = facts.probed.driver.step("management").get("driver") or facts.environment.kernel_driver
    speaks = f"CUDA {cuda // 1000}.{cuda % 1000 // 10}" + (f", driver {driver}" if driver else "")
    least = facts.wheel.cuda
    if cuda < least * 1000:
        return broken(
            f"{speaks}; {facts.wheel.name} needs CUDA {least}, driver {MIN_DRIVER[least]} or newer",
            *remedies.old_driver(facts),
        )
    return ok(f"{speaks} is enough for CUDA {least}")


def _libraries(facts: HostFacts) -> CheckOutcome:
    probed = facts.probed.libraries
    if not facts.wheel.cuda:
        return info("this onnxruntime needs none")
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
                f"loading {name} went wrong: {probed.reason}", *remedies.missing_cuda_library(facts, name)
            )
        versions.append(f"{name.split('.so')[0]} {_version(name, step.get('version', 0))}".rstrip())
    return ok(", ".join(versions))


def _version(name: str, number: int) -> str:
    """A library's own number, in dots: each family packs it its own way."""
    if not number:
        return ""
    kind = name.split(".so", maxsplit=1)[0]
    if kind == "libcudart":
        return f"{number // 1000}.{number % 1000 // 10}"
    if kind in ("libcublasLt", "libcublas", "libcudnn") and number >= 90000:
        return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
    return f"{number // 1000}.{number % 1000 // 100}.{number % 100}"


def _cudnn(facts: HostFacts) -> CheckOutcome:
    number = facts.probed.libraries.step("libcudnn.so.9").get("version", 0)
    if not number:
        return info("its version is not known")
    sass = cudnn_sass(number, facts.wheel.cuda)
    text = (
        f"{_version('libcudnn.so.9', number)} carries {', '.join(format_capability(code) for code in sass)}"
    )
    for device in facts.probed.driver.step("devices").get("devices", [])[:1]:
        if not sass_supports(device["capability"], sass):
            found = f"{text}; {device['name']} is {format_capability(device['capability'])}"
            return broken(found, *remedies.unsupported_by_cudnn(facts))
    return ok(text)


def _cuda_init(facts: HostFacts) -> CheckOutcome:
    probed = facts.probed.driver
    init = probed.step("init")
    if "code" not in init:
        how = "did not come back" if probed.ended == "late" else f"crashed ({probed.reason})"
        return broken(f"cuInit {how}", *remedies.hanging_driver(facts))
    code = init["code"]
    if code:
        name = init.get("name") or f"error {code}"
        reason = f": {_CUDA_ERRORS[code]}" if code in _CUDA_ERRORS else ""
        return broken(f"cuInit answers {code} ({name}){reason}", *remedies.cuda_init_failed(facts, code))
    devices = probed.step("devices").get("devices", [])
    if not devices:
        return broken("the driver works and counts no device", *remedies.cuda_init_failed(facts, 100))
    names = ", ".join(f"{device['name']} ({format_capability(device['capability'])})" for device in devices)
    return ok(f"{len(devices)} device{'s' if len(devices) > 1 else ''}: {names}")


def _capability(facts: HostFacts) -> CheckOutcome:
    device = facts.probed.driver.step("devices")["devices"][0]
    capability = device["capability"]
    text = f"{device['name']} is {format_capability(capability)}"
    if not facts.wheel.supports(capability):
        return broken(
            f"{text}, {facts.wheel.name} has no kernels for it",
            *remedies.unsupported_capability(facts, capability),
        )
    if not sass_supports(capability, facts.wheel.sass):
        return warning(f"{text}: its kernels are compiled from PTX at the first start, which takes minutes")
    return ok(f"{text}, which {facts.wheel.name} was compiled for")


def _gpu_memory(facts: HostFacts) -> CheckOutcome:
    memory = facts.probed.driver.step("memory")
    if not memory:
        how = "did not come back" if facts.probed.driver.ended == "late" else "crashed"
        return broken(f"asking for the GPU's memory {how}", *remedies.hanging_driver(facts))
    if memory.get("code"):
        found = f"no context can be made on the GPU: CUDA error {memory['code']}"
        return broken(found, *remedies.gpu_memory_unavailable(facts, memory["code"]))
    free, total = memory["freeBytes"] // _MIB, memory["totalBytes"] // _MIB
    text = f"{free} MiB of {total} MiB free"
    if free < _MIN_FREE_MIB and not facts.gpu_works:
        return broken(f"{text}, {_MIN_FREE_MIB} MiB are wanted", *remedies.gpu_memory_unavailable(facts, 2))
    return ok(text)


def _provider(facts: HostFacts) -> CheckOutcome:
    if not facts.wheel.cuda:
        return info("this onnxruntime has none")
    if not facts.wheel.has_provider:
        found = f"libonnxruntime_providers_cuda.so of {facts.wheel.name} is not there"
        return broken(found, *remedies.conflicting_onnxruntimes(facts))
    return ok(f"libonnxruntime_providers_cuda.so of {facts.wheel.name}")


def _session(facts: HostFacts) -> CheckOutcome:
    verdict = facts.probed.verdict
    if facts.gpu_works:
        which = "the engine of this module" if facts.request.running is not None else "a session of one node"
        if facts.request.device not in ("auto", facts.probed.effective):
            text = (
                f"{which} computes on {facts.probed.effective}, not on {facts.request.device}: "
                f"{verdict.reason}"
            )
            return broken(text, *remedies.session_failed(facts, verdict.code))
        return ok(f"{which} computes on {facts.probed.effective}")
    if facts.request.device == "cpu":
        return info("not tried: the CPU was asked for")
    return broken(f"{verdict.reason} ({verdict.code})", *remedies.session_failed(facts, verdict.code))


def _placement(facts: HostFacts) -> CheckOutcome:
    probed = facts.probed.placement.step("placement")
    if not probed:
        reason = facts.probed.placement.reason or "not tried"
        return info(f"not known: {reason}")
    if "error" in probed:
        return broken(f"the model cannot be opened on {facts.probed.effective}: {probed['error']}")
    if probed["device"] != facts.probed.effective:
        return broken(
            f"the model came up on {probed['device']} only",
            *remedies.session_failed(facts, "provider-refused"),
        )
    nodes, on_cpu = probed["onDevice"], probed["onCpu"]
    if on_cpu:
        some = ", ".join(on_cpu[:5]) + (" …" if len(on_cpu) > 5 else "")
        doubt = f"; {probed['doubt']}" if probed.get("doubt") else ""
        return warning(f"{nodes} nodes on {probed['device']}, {len(on_cpu)} on the CPU: {some}{doubt}")
    if probed.get("doubt"):
        return warning(probed["doubt"])
    return ok(f"all {nodes} nodes of the model on {probed['device']}" if nodes else f"on {probed['device']}")


GPU_CHECKS = (
    GpuCheck("container", "container", _container, independent=True),
    GpuCheck("iot-edge", "IoT Edge", _iot_edge, independent=True),
    GpuCheck("kernel", "kernel", _kernel, independent=True),
    GpuCheck("passthrough", "GPU", _passthrough),
    GpuCheck("permissions", "permissions", _permissions),
    GpuCheck("libcuda", "libcuda", _libcuda, independent=True),
    GpuCheck("onnxruntime", "onnxruntime", _wheel, independent=True),
    GpuCheck("driver-version", "driver version", _driver_version),
    GpuCheck("libraries", "CUDA libraries", _libraries, independent=True),
    GpuCheck("cuda-init", "CUDA start", _cuda_init),
    GpuCheck("capability", "capability", _capability),
    GpuCheck("cudnn", "cuDNN", _cudnn),
    GpuCheck("gpu-memory", "GPU memory", _gpu_memory),
    GpuCheck("provider", "CUDA provider", _provider, independent=True),
    GpuCheck("session", "first session", _session),
    GpuCheck("placement", "node placement", _placement),
)
"""Every link, in order; docs/gpu.md explains each."""
