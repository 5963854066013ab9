"""The chain to the GPU: each link judges what was seen, in the order in which they need each other."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from visionedge.ops.doctor import passthrough, remedies
from visionedge.ops.doctor.finding import Finding, Judged, State, broken, info, ok, warning
from visionedge.ops.doctor.gather import Facts
from visionedge.ops.doctor.host import DXG, WSL_LIBRARIES
from visionedge.ops.doctor.wheel import LEAST_DRIVER, carried, cudnn_sass, dotted

_MIB = 2**20
_LEAST_FREE_MIB = 1024
_NOT_FOUND = 500
_KERNELS = {
    "eflow": "looks like the VM of EFLOW (Azure Linux on Hyper-V)",
    "wsl": "WSL 2 on Windows",
    "hyper-v": "a virtual machine on Hyper-V",
    "linux": "Linux, not on Hyper-V",
}
_CODES = {
    34: "libcuda is a stub that is only there to link against",
    100: "the driver sees no CUDA device",
    101: "the device number is not valid",
    802: "the system's NVLink fabric is not ready",
    803: "the driver's kernel part and libcuda are of different versions",
    804: "forward compatibility is not supported on this GPU",
}


@dataclass(frozen=True, slots=True)
class Link:
    """One link. `alone` = it can be judged even when an earlier one is broken."""

    name: str
    title: str
    check: Callable[[Facts], Judged]
    alone: bool = False


def walk(facts: Facts) -> tuple[Finding, ...]:
    """Judge link by link; after the first broken one only what stands alone is still looked at.

    Where there is no GPU and nobody demanded one, nothing is broken: what is missing is only reported.
    Where a session computes on a GPU all the same, no sign of trouble outweighs it: it is a warning then.
    """
    findings: list[Finding] = []
    is_broken = False
    for link in CHAIN:
        if is_broken and not link.alone:
            findings.append(Finding(link.name, link.title, State.SKIPPED, "not looked at"))
            continue
        judged = link.check(facts)
        if judged.state is State.BROKEN and facts.fulfilled:
            judged = warning(f"{judged.found}; yet a session works")
        is_absent = judged.state is State.BROKEN and facts.gpu_is_absent
        if judged.state is State.BROKEN and is_broken:
            judged = replace(judged, remedies=())  # one thing at a time
        is_broken = is_broken or judged.state is State.BROKEN
        if is_absent:
            judged = info(judged.found)
        findings.append(Finding(link.name, link.title, judged.state, judged.found, judged.remedies))
    return tuple(findings)


def _container(facts: Facts) -> Judged:
    return info(f"{'yes' if facts.place.container else 'no'}, user {facts.uid}")


def _iot_edge(facts: Facts) -> Judged:
    match facts.place.edge:
        case "edge":
            return info(f"yes, module {facts.environ['IOTEDGE_MODULEID']}")
        case "simulator":
            return info("its simulator")
        case "half":
            return warning("some of its variables are set, and some are missing", *remedies.WHOLE_IDENTITY)
        case _:
            return info("no")


def _kernel(facts: Facts) -> Judged:
    release = facts.place.release or "unknown"
    return info(f"{release}: {_KERNELS[facts.place.kernel]}")


def _passthrough(facts: Facts) -> Judged:
    place = facts.place
    match place.passthrough:
        case "dda" | "native":
            way = "DDA, the whole GPU is in this VM" if place.passthrough == "dda" else "the machine's own"
            return _native(facts, f"{way} ({', '.join(place.nodes)})")
        case "gpu-pv":
            return _paravirtual(facts)
        case "intel":
            return broken("no NVIDIA GPU here: an Intel GPU is no CUDA device", *passthrough.intel(facts))
        case _:
            return _nothing(facts)


def _native(facts: Facts, found: str) -> Judged:
    nodes = set(facts.place.nodes)
    if missing := sorted({"/dev/nvidiactl", "/dev/nvidia-uvm"} - nodes):
        return broken(f"{found}, but {' and '.join(missing)} missing", *passthrough.device_nodes(facts))
    if not any(node[-1].isdigit() for node in nodes):
        return broken(f"{found}, but no GPU among them", *passthrough.give_gpu(facts))
    driver = facts.place.kernel_driver
    return ok(f"{found}, driver {driver}" if driver else found)


def _paravirtual(facts: Facts) -> Judged:
    place = facts.place
    stores = [name for name in place.wsl_stores if name.lower().startswith("nv")]
    if not place.wsl_libraries and not stores:
        if "path" in facts.told.driver.step("library"):
            return ok(f"GPU-PV ({DXG}), its libraries lie elsewhere")
        return broken(f"GPU-PV ({DXG}), but {WSL_LIBRARIES} is empty here", *passthrough.wsl_libraries(facts))
    if place.wsl_libraries and "libdxcore.so" not in place.wsl_libraries:
        return broken(
            f"GPU-PV ({DXG}), but libdxcore.so is not in {WSL_LIBRARIES}", *passthrough.wsl_libraries(facts)
        )
    lacking = [n for n in stores if "libnvdxgdmal.so.1" not in place.wsl_stores[n]]
    if stores and len(lacking) == len(stores):
        text = f"GPU-PV ({DXG}), without libnvdxgdmal.so.1 (drivers from 555 on need it)"
        if facts.told.driver.step("init").get("code") == _NOT_FOUND:
            return broken(text, *passthrough.old_toolkit(facts))
        return info(text)
    return ok(f"GPU-PV ({DXG}), shared with Windows")


def _nothing(facts: Facts) -> Judged:
    place = facts.place
    match place.offered:
        case "driver" if place.container:
            driver = f" {place.kernel_driver}" if place.kernel_driver else ""
            return broken(
                f"the host has the NVIDIA driver{driver}, but this container was not given the GPU",
                *passthrough.give_gpu(facts),
            )
        case "driver":
            return broken(
                "the NVIDIA driver is loaded, but has made no /dev/nvidia*", *passthrough.device_nodes(facts)
            )
        case "dxg":
            who = "this container was not given it" if place.container else f"there is no {DXG}"
            return broken(f"the VM has GPU-PV, but {who}", *passthrough.give_gpu(facts))
        case "pci":
            return broken("an NVIDIA GPU is on the PCI bus, but no driver drives it", *remedies.driver(facts))
        case _:
            return broken(f"no GPU here: no /dev/nvidia*, no {DXG}", *passthrough.no_gpu(facts))


def _permissions(facts: Facts) -> Judged:
    errors = facts.told.driver.step("open").get("errors", {})
    refused = {node: error for node, error in errors.items() if error}
    if not refused:
        return ok(f"user {facts.uid} may open {len(errors)} device node{'s' if len(errors) != 1 else ''}")
    node, error = next(iter(refused.items()))
    others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return broken(
        f"user {facts.uid} cannot open {node}: {error}{others}", *passthrough.permission(facts, error)
    )


def _libcuda(facts: Facts) -> Judged:
    told = facts.told.driver
    if "error" in (library := told.step("library")):
        if "cannot open shared object" in library["error"]:
            return broken("libcuda.so.1 is missing", *remedies.libcuda(facts))
        return broken(f"libcuda.so.1 cannot be loaded: {library['error']}", *remedies.libcuda(facts))
    if "version" not in told.steps:
        return broken(f"loading libcuda.so.1 went wrong: {told.words}", *remedies.hangs(facts))
    cuda = told.step("version")["cuda"]
    path = library["path"] or "libcuda.so.1"
    text = f"{path}, speaks CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    if driver := told.step("management").get("driver"):
        text += f", driver {driver}"
    if facts.place.passthrough == "gpu-pv" and path.startswith("/") and "/wsl/" not in path:
        judge = broken if told.step("init").get("code") else warning
        return judge(f"{text}; under GPU-PV it has to be that of /usr/lib/wsl", *remedies.FOREIGN_LIBCUDA)
    return ok(text)


def _wheel(facts: Facts) -> Judged:
    wheel = facts.wheel
    if not wheel.cuda:
        if "onnxruntime-gpu" in wheel.others:
            found = f"{wheel.name} was installed over onnxruntime-gpu, and has no CUDA"
            return broken(found, *remedies.one_runtime(facts))
        return broken(f"{wheel.name} was built without CUDA", *remedies.gpu_build(facts))
    codes = ", ".join(dotted(code) for code in wheel.sass)
    newer = f" and, by PTX, from {dotted(wheel.ptx[0])} on" if wheel.ptx else ""
    text = f"{wheel.name} for CUDA {wheel.cuda}, compiled for {codes}{newer}"
    if wheel.others:
        return warning(f"{text}; installed over {', '.join(wheel.others)}", *remedies.one_runtime(facts))
    return ok(text)


def _driver_version(facts: Facts) -> Judged:
    cuda = facts.told.driver.step("version").get("cuda", 0)
    driver = facts.told.driver.step("management").get("driver") or facts.place.kernel_driver
    speaks = f"CUDA {cuda // 1000}.{cuda % 1000 // 10}" + (f", driver {driver}" if driver else "")
    least = facts.wheel.cuda
    if cuda < least * 1000:
        return broken(
            f"{speaks}; {facts.wheel.name} needs CUDA {least}, driver {LEAST_DRIVER[least]} or newer",
            *remedies.newer_driver(facts),
        )
    return ok(f"{speaks} is enough for CUDA {least}")


def _libraries(facts: Facts) -> Judged:
    told = facts.told.libraries
    if not facts.wheel.cuda:
        return info("this onnxruntime needs none")
    versions = []
    for name in facts.wheel.needed:
        step = told.step(name)
        if "error" in step:
            reason = (
                "is missing" if "cannot open shared object" in step["error"] else f"fails: {step['error']}"
            )
            missing = [n for n in facts.wheel.needed if "error" in told.step(n)]
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            return broken(f"{name} {reason}{more}", *remedies.libraries(facts, name))
        if "path" not in step:
            return broken(f"loading {name} went wrong: {told.words}", *remedies.libraries(facts, name))
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


def _cudnn(facts: Facts) -> Judged:
    number = facts.told.libraries.step("libcudnn.so.9").get("version", 0)
    if not number:
        return info("its version is not known")
    sass = cudnn_sass(number, facts.wheel.cuda)
    text = f"{_version('libcudnn.so.9', number)} carries {', '.join(dotted(code) for code in sass)}"
    for device in facts.told.driver.step("devices").get("devices", [])[:1]:
        if not carried(device["capability"], sass):
            found = f"{text}; {device['name']} is {dotted(device['capability'])}"
            return broken(found, *remedies.older_cudnn(facts))
    return ok(text)


def _cuda_init(facts: Facts) -> Judged:
    told = facts.told.driver
    init = told.step("init")
    if "code" not in init:
        how = "did not come back" if told.ended == "late" else f"crashed ({told.words})"
        return broken(f"cuInit {how}", *remedies.hangs(facts))
    code = init["code"]
    if code:
        name = init.get("name") or f"error {code}"
        words = f": {_CODES[code]}" if code in _CODES else ""
        return broken(f"cuInit answers {code} ({name}){words}", *remedies.cuda_init(facts, code))
    devices = told.step("devices").get("devices", [])
    if not devices:
        return broken("the driver works and counts no device", *remedies.cuda_init(facts, 100))
    names = ", ".join(f"{device['name']} ({dotted(device['capability'])})" for device in devices)
    return ok(f"{len(devices)} device{'s' if len(devices) > 1 else ''}: {names}")


def _capability(facts: Facts) -> Judged:
    device = facts.told.driver.step("devices")["devices"][0]
    capability = device["capability"]
    text = f"{device['name']} is {dotted(capability)}"
    if not facts.wheel.carries(capability):
        return broken(
            f"{text}, {facts.wheel.name} has no kernels for it", *remedies.capability(facts, capability)
        )
    if not carried(capability, facts.wheel.sass):
        return warning(f"{text}: its kernels are compiled from PTX at the first start, which takes minutes")
    return ok(f"{text}, which {facts.wheel.name} was compiled for")


def _gpu_memory(facts: Facts) -> Judged:
    memory = facts.told.driver.step("memory")
    if not memory:
        how = "did not come back" if facts.told.driver.ended == "late" else "crashed"
        return broken(f"asking for the GPU's memory {how}", *remedies.hangs(facts))
    if memory.get("code"):
        found = f"no context can be made on the GPU: CUDA error {memory['code']}"
        return broken(found, *remedies.gpu_memory(facts, memory["code"]))
    free, total = memory["freeBytes"] // _MIB, memory["totalBytes"] // _MIB
    text = f"{free} MiB of {total} MiB free"
    if free < _LEAST_FREE_MIB and not facts.works:
        return broken(f"{text}, {_LEAST_FREE_MIB} MiB are wanted", *remedies.gpu_memory(facts, 2))
    return ok(text)


def _provider(facts: Facts) -> Judged:
    if not facts.wheel.cuda:
        return info("this onnxruntime has none")
    if not facts.wheel.has_provider:
        found = f"libonnxruntime_providers_cuda.so of {facts.wheel.name} is not there"
        return broken(found, *remedies.one_runtime(facts))
    return ok(f"libonnxruntime_providers_cuda.so of {facts.wheel.name}")


def _session(facts: Facts) -> Judged:
    verdict = facts.told.verdict
    if facts.works:
        which = "the engine of this module" if facts.request.running is not None else "a session of one node"
        if facts.request.device not in ("auto", facts.told.effective):
            text = (
                f"{which} computes on {facts.told.effective}, not on {facts.request.device}: {verdict.reason}"
            )
            return broken(text, *remedies.session(facts, verdict.code))
        return ok(f"{which} computes on {facts.told.effective}")
    if facts.request.device == "cpu":
        return info("not tried: the CPU was asked for")
    return broken(f"{verdict.reason} ({verdict.code})", *remedies.session(facts, verdict.code))


def _placement(facts: Facts) -> Judged:
    told = facts.told.placement.step("placement")
    if not told:
        words = facts.told.placement.words or "not tried"
        return info(f"not known: {words}")
    if "error" in told:
        return broken(f"the model cannot be opened on {facts.told.effective}: {told['error']}")
    if told["device"] != facts.told.effective:
        return broken(
            f"the model came up on {told['device']} only", *remedies.session(facts, "provider-refused")
        )
    nodes, on_cpu = told["onDevice"], told["onCpu"]
    if on_cpu:
        some = ", ".join(on_cpu[:5]) + (" …" if len(on_cpu) > 5 else "")
        doubt = f"; {told['doubt']}" if told.get("doubt") else ""
        return warning(f"{nodes} nodes on {told['device']}, {len(on_cpu)} on the CPU: {some}{doubt}")
    if told.get("doubt"):
        return warning(told["doubt"])
    return ok(f"all {nodes} nodes of the model on {told['device']}" if nodes else f"on {told['device']}")


CHAIN = (
    Link("container", "container", _container, alone=True),
    Link("iot-edge", "IoT Edge", _iot_edge, alone=True),
    Link("kernel", "kernel", _kernel, alone=True),
    Link("passthrough", "GPU", _passthrough),
    Link("permissions", "permissions", _permissions),
    Link("libcuda", "libcuda", _libcuda, alone=True),
    Link("onnxruntime", "onnxruntime", _wheel, alone=True),
    Link("driver-version", "driver version", _driver_version),
    Link("libraries", "CUDA libraries", _libraries, alone=True),
    Link("cuda-init", "CUDA start", _cuda_init),
    Link("capability", "capability", _capability),
    Link("cudnn", "cuDNN", _cudnn),
    Link("gpu-memory", "GPU memory", _gpu_memory),
    Link("provider", "CUDA provider", _provider, alone=True),
    Link("session", "first session", _session),
    Link("placement", "node placement", _placement),
)
"""Every link, in order; docs/gpu.md explains each."""
