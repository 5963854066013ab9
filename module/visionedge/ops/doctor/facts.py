"""The facts that the checks evaluate, gathered from a `Host` within the time limits of its probes."""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from visionedge.config.addresses import parse_camera_uri
from visionedge.config.schema import Config, ModelConfig
from visionedge.engine.device.devices import (
    USABLE,
    DeviceState,
    DeviceVerdict,
    EffectiveDevice,
    ReasonCode,
    RequestedDevice,
    device_preference,
    probe_device,
)
from visionedge.engine.device.remote import RemoteSettings, ReplicaStatus, ServerExamination
from visionedge.engine.device.session import NodePlacement
from visionedge.errors import ConfigError
from visionedge.frames.types import DEFAULT_MODEL
from visionedge.iothub.identity import Identity
from visionedge.model.model_store import make_model_path
from visionedge.ops.doctor.host import (
    DXG,
    DiskSpace,
    Host,
    HostEnvironment,
    MemorySize,
    ProbeResult,
    detect_environment,
    read_memory,
)
from visionedge.ops.doctor.last_start import LAST_START_FILE_NAME, LastGoodStart, gather_start_facts
from visionedge.ops.doctor.wheel import OnnxruntimeWheel, read_wheel

_DRIVER_LIMIT_S = 10.0
_LIBRARIES_LIMIT_S = 20.0
_SESSION_LIMIT_S = 30.0
_PLACEMENT_LIMIT_S = 60.0
# Intel's driver compiles nothing for a list of devices, but openvino is imported for it.
_OPENVINO_LIMIT_S = 30.0
_NETWORK_LIMIT_S = 3.0
_CLOCK_LIMIT_S = 3.0
NOT_DOWNLOADED = "not downloaded"
"""The state of a model by address that is not in the data folder."""

_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """The engine of the module in this process; `doubt`: why its speed is implausible for a GPU.

    `replicas` are the servers of a remote device.
    """

    device: DeviceState
    node_placement: NodePlacement
    doubt: str | None = None
    replicas: tuple[ReplicaStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class DoctorRequest:
    """The requested device, the configuration (None: unknown), the data folder, and the running engine.

    `local`: the configuration that a start would begin with, without desired properties; None: unknown.
    """

    device: RequestedDevice = "auto"
    config: Config | None = None
    data: Path = Path("/data")
    running: RunningEngine | None = None
    local: Config | None = None


@dataclass(frozen=True, slots=True)
class ProbeResults:
    """The results of the probes; `effective` and `verdict` are of a test session or of the running engine."""

    driver: ProbeResult
    libraries: ProbeResult
    network: ProbeResult
    clock: ProbeResult
    placement: ProbeResult
    openvino: ProbeResult
    effective: EffectiveDevice
    verdict: DeviceVerdict


@dataclass(frozen=True, slots=True)
class HostFacts:
    """All facts, for `gpu_checks` and `system_checks`.

    `cameras`: the state of each camera: "" (readable), "disabled", "network" (see the network probe), or an
    error. `models`: the state of each model with a file of its own, by name: "" (readable), `NOT_DOWNLOADED`,
    or an error. `socket`: the error of the workload socket, else "". `last_start`: the time of the last good
    start and what changed since, None if none is known. `servers` are those of a remote device. `openvino` is
    the version of the installed package, else "".
    """

    request: DoctorRequest
    environment: HostEnvironment
    wheel: OnnxruntimeWheel
    probed: ProbeResults
    environ: Mapping[str, str]
    cores: int
    uid: int
    memory: MemorySize
    space: DiskSpace | None
    writable: bool
    socket: str
    cameras: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    now_s: float = 0.0
    newest_file_s: float = 0.0
    cpu_quota: float | None = None
    last_start: tuple[str, str] | None = None
    servers: tuple[ServerExamination, ...] = ()
    openvino: str = ""

    @property
    def gpu_works(self) -> bool:
        """Whether a session computed on a GPU; this outweighs all other facts."""
        return self.probed.effective not in ("cpu", "remote")

    @property
    def gpu_required(self) -> bool:
        """Whether a GPU was demanded."""
        return self.request.device in ("cuda", "tensorrt", "openvino-gpu")

    @property
    def concerns_intel(self) -> bool:
        """Whether the chain is that of an Intel GPU: it is requested, or the only GPU here."""
        return _concerns_intel(self.request, self.environment)

    @property
    def intel_is_unused(self) -> bool:
        """Whether an Intel GPU is the only one and is not wanted: `auto` wants it if OpenVINO is there."""
        is_asked = self.request.device == "openvino-gpu" or (self.request.device == "auto" and self.openvino)
        return self.concerns_intel and not is_asked

    @property
    def gpu_is_absent(self) -> bool:
        """Whether there is no NVIDIA GPU and none was demanded, so that nothing is wrong.

        False in a VM on Windows and in a container that cannot read the PCI bus: the host may have a GPU.
        """
        environment = self.environment
        is_missing = environment.host_gpu == "none" and environment.passthrough == "none"
        is_missing = is_missing or (self.intel_is_unused and environment.passthrough == "intel")
        is_visible = environment.kernel == "linux" and (environment.pci_visible or not environment.container)
        return is_missing and is_visible and not self.gpu_required

    @property
    def fulfilled(self) -> bool:
        """Whether the requested device, which is a GPU, works: that of the chain."""
        is_other = self.probed.effective == "openvino-gpu" and not self.concerns_intel
        return self.gpu_works and not is_other and self.request.device in ("auto", self.probed.effective)


def gather_facts(request: DoctorRequest, host: Host) -> HostFacts:
    """Gather all facts; the probes run in parallel, each with its time limit."""
    environment = detect_environment(host)
    wheel = read_wheel(host, tensorrt=request.device == "tensorrt")
    cameras, addresses = _cameras(request.config, host)
    servers = _examine_servers(request, host)
    return HostFacts(
        request=request,
        environment=environment,
        wheel=wheel,
        probed=_run_probes(request, host, (environment, wheel), addresses, servers),
        servers=servers,
        environ=host.environ,
        cores=host.cores,
        uid=host.uid,
        memory=read_memory(host),
        space=host.space(request.data),
        writable=_is_writable(host, request.data),
        socket=_check_socket(host),
        cameras=cameras,
        models=_check_models(request, host),
        now_s=host.utc_now().timestamp(),
        newest_file_s=_newest_file_s(host),
        cpu_quota=host.cpu_quota,
        last_start=_compare_last_start(request, host),
        openvino=host.packages.get("openvino", ""),
    )


def _concerns_intel(request: DoctorRequest, environment: HostEnvironment) -> bool:
    if request.device in ("cuda", "tensorrt", "openvino-gpu"):
        return request.device == "openvino-gpu"
    return environment.passthrough == "intel"


def _compare_last_start(request: DoctorRequest, host: Host) -> tuple[str, str] | None:
    last = LastGoodStart.read(host.at(request.data.absolute() / LAST_START_FILE_NAME))
    if last is None:
        return None
    is_local = request.running is None
    config = request.local if is_local else request.config
    return last.at, last.describe_changes(gather_start_facts(host), config, is_local=is_local)


def _run_probes(
    request: DoctorRequest,
    host: Host,
    examined: tuple[HostEnvironment, OnnxruntimeWheel],
    addresses: Mapping[str, tuple[str, int]],
    servers: Sequence[ServerExamination],
) -> ProbeResults:
    environment, wheel = examined
    nodes = {"nodes": [*environment.nodes, *([DXG] if host.exists(DXG) else [])]}
    wanted = {"folders": [str(folder) for folder in wheel.folders], "names": list(wheel.needed)}
    with ThreadPoolExecutor(5, thread_name_prefix="doctor") as pool:
        openvino = pool.submit(_probe_openvino, request, host, environment)
        driver = pool.submit(host.probe, "driver", nodes, _DRIVER_LIMIT_S)
        libraries = pool.submit(host.probe, "libraries", wanted, _LIBRARIES_LIMIT_S)
        network = pool.submit(_probe_network, host, addresses)
        clock = pool.submit(host.probe, "clock", {}, _CLOCK_LIMIT_S)
        if request.device == "remote":
            effective, verdict = _find_usable_server(request, servers)
        else:
            effective, verdict = _find_effective_device(request, host, examined, driver.result)
        placement = _placement(request, host, effective)
        probed = (driver.result(), libraries.result(), network.result(), clock.result())
    return ProbeResults(*probed, placement, openvino.result(), effective, verdict)


def _probe_openvino(request: DoctorRequest, host: Host, environment: HostEnvironment) -> ProbeResult:
    """Intel's OpenCL driver and OpenVINO's list of devices; skipped if they are of no interest here."""
    if not _concerns_intel(request, environment):
        return ProbeResult({})
    nodes = environment.intel_nodes or ((DXG,) if environment.dxg else ())
    installed = "openvino" in host.packages
    return host.probe("openvino", {"nodes": list(nodes), "installed": installed}, _OPENVINO_LIMIT_S)


def _find_effective_device(
    request: DoctorRequest,
    host: Host,
    examined: tuple[HostEnvironment, OnnxruntimeWheel],
    driver: Callable[[], ProbeResult],
) -> tuple[EffectiveDevice, DeviceVerdict]:
    """The device that really computes: that of the running engine, else of a test session."""
    environment, wheel = examined
    if request.running is not None and request.running.device.effective != "cpu":
        device = request.running.device
        return device.effective, DeviceVerdict(device.code, device.reason)
    if request.device == "cpu":
        return "cpu", DeviceVerdict(ReasonCode.CPU_REQUESTED, "the CPU was requested")
    if request.device == "openvino-gpu":
        return _try_openvino(host)
    effective, verdict = _try_cuda(request, host, wheel, driver)
    has_node = environment.intel_nodes or environment.dxg
    if effective != "cpu" or request.device != "auto" or not has_node or "openvino" not in host.packages:
        return effective, verdict
    effective, found = _try_openvino(host)
    return effective, found if effective != "cpu" or _concerns_intel(request, environment) else verdict


def _try_cuda(
    request: DoctorRequest, host: Host, wheel: OnnxruntimeWheel, driver: Callable[[], ProbeResult]
) -> tuple[EffectiveDevice, DeviceVerdict]:
    if not wheel.cuda:
        return "cpu", DeviceVerdict(ReasonCode.NO_GPU_BUILD, f"{wheel.name} was built without CUDA")
    first: DeviceVerdict | None = None
    for candidate in device_preference(request.device):
        if candidate not in ("cuda", "tensorrt"):
            continue
        found = probe_device(
            candidate,
            host.session,
            _SESSION_LIMIT_S,
            driver_present=lambda: "path" in driver().step("library"),
        )
        if found.code is ReasonCode.OK:
            return candidate, first or found
        first = first or found
    return "cpu", first or DeviceVerdict(ReasonCode.CPU_REQUESTED, "the CPU was requested")


def _try_openvino(host: Host) -> tuple[EffectiveDevice, DeviceVerdict]:
    if "openvino" not in host.packages:
        return "cpu", DeviceVerdict(ReasonCode.NO_GPU_BUILD, "the package openvino is not installed")
    found = probe_device("openvino-gpu", host.session, _SESSION_LIMIT_S)
    return ("openvino-gpu" if found.code is ReasonCode.OK else "cpu"), found


def _examine_servers(request: DoctorRequest, host: Host) -> tuple[ServerExamination, ...]:
    """The servers of the remote device: as the running engine knows them, else asked now."""
    inference = None if request.config is None else request.config.inference
    if request.device != "remote" or inference is None or inference.remote is None:
        return ()
    if request.running is None:
        return host.servers(RemoteSettings.of(inference.remote))
    absent = ReasonCode.REMOTE_UNREACHABLE
    return tuple(
        ServerExamination(each.url, USABLE, f"in use, {each.batches} batches, {each.failures} failures")
        if each.state == "up"
        else ServerExamination(
            each.url, DeviceVerdict(absent, each.reason or "not used"), each.reason or "not used"
        )
        for each in request.running.replicas
    )


def _find_usable_server(
    request: DoctorRequest, servers: Sequence[ServerExamination]
) -> tuple[EffectiveDevice, DeviceVerdict]:
    """Whether a remote device computes; the engine also compares the model, which this does not."""
    if request.running is not None:
        device = request.running.device
        return device.effective, DeviceVerdict(device.code, device.reason)
    if any(each.verdict.code is ReasonCode.OK for each in servers):
        return "remote", USABLE
    absent = DeviceVerdict(ReasonCode.REMOTE_UNREACHABLE, "no server is configured")
    return "cpu", next((each.verdict for each in servers), absent)


def _placement(request: DoctorRequest, host: Host, effective: EffectiveDevice) -> ProbeResult:
    """The devices of the model's nodes, probed only if a GPU works, and not with OpenVINO, which has one."""
    if effective in ("cpu", "remote", "openvino-gpu"):
        return ProbeResult({})
    if request.running is not None and request.running.device.effective == effective:
        node_placement = request.running.node_placement
        probed: dict[str, Any] = {"device": effective, "doubt": request.running.doubt}
        probed |= {"onDevice": node_placement.on_device, "onCpu": list(node_placement.on_cpu)}
        return ProbeResult({"placement": probed})
    model = request.config.model if request.config else ModelConfig()
    path = model.path
    if model.sha256 is not None:
        kept = make_model_path(request.data, model.sha256)
        if not kept.is_file():
            return ProbeResult({}, reason="the model is not downloaded yet")
        path = str(kept)
    return host.probe("placement", {"device": effective, "model": path}, _PLACEMENT_LIMIT_S)


def _cameras(config: Config | None, host: Host) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """The states of the cameras (see `HostFacts`), and the addresses of those in state "network"."""
    states: dict[str, str] = {}
    addresses: dict[str, tuple[str, int]] = {}
    for name, camera in (config.cameras if config else {}).items():
        uri = parse_camera_uri(camera.uri)
        if not camera.enabled:
            states[name] = "disabled"
        elif uri.kind in ("rtsp", "http"):
            parts = urlsplit(uri.target)
            states[name] = "network"
            addresses[name] = (parts.hostname or "", parts.port or _PORTS.get(parts.scheme.lower(), 554))
        elif uri.kind == "demo":
            states[name] = ""
        else:
            states[name] = _check_local(host, uri.target)
    return states, addresses


def _check_models(request: DoctorRequest, host: Host) -> dict[str, str]:
    """The states of the models that are neither the bundled one nor on a server (see `HostFacts`)."""
    config = request.config
    states: dict[str, str] = {}
    if config is None or request.device == "remote":
        return states
    for name, model in ({DEFAULT_MODEL: config.model} | config.models).items():
        if model.sha256 is not None:
            kept = host.at(make_model_path(request.data.absolute(), model.sha256))
            states[name] = "" if kept.is_file() else NOT_DOWNLOADED
        elif model.path is not None:
            error = _check_local(host, model.path)
            states[name] = f"{model.path}: {error}" if error else ""
    return states


def _check_local(host: Host, target: str) -> str:
    path = host.at(target) if target.startswith("/") else Path(target)
    try:
        path.stat()
    except OSError as error:
        return error.strerror or "cannot be read"
    return "" if host.access(path, os.R_OK) else "Permission denied"


def _probe_network(host: Host, addresses: Mapping[str, tuple[str, int]]) -> ProbeResult:
    identity = _identity(host)
    arguments: dict[str, Any] = {
        "resolve": [identity.gateway] if identity else [],
        "reach": {name: list(address) for name, address in addresses.items()},
        "date": [identity.hub] if identity else [],
    }
    if not any(arguments.values()):
        return ProbeResult({})
    return host.probe("network", arguments, _NETWORK_LIMIT_S)


def _identity(host: Host) -> Identity | None:
    try:
        return Identity.from_environ(host.environ)
    except ConfigError:
        return None


def _is_writable(host: Host, data: Path) -> bool:
    """Whether the data folder, or the nearest parent in which it would be created, can be written."""
    for folder in (data, *data.parents):
        if host.exists(folder):
            return host.access(host.at(folder), os.W_OK | os.X_OK)
    return False


def _check_socket(host: Host) -> str:
    """The error of the workload socket; empty if it works or there is none."""
    identity = _identity(host)
    uri = urlsplit(identity.workload_uri) if identity else None
    if uri is None or uri.scheme != "unix":
        return ""
    path = host.at(uri.path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{uri.path}: {error.strerror}"
    if not stat.S_ISSOCK(mode):
        return f"{uri.path} is not a socket"
    return "" if host.access(path, os.R_OK | os.W_OK) else f"{uri.path}: Permission denied"


def _newest_file_s(host: Host) -> float:
    """The modification time of the installation: a correct clock is not earlier."""
    try:
        return (host.at(host.site) / "onnxruntime" / "__init__.py").stat().st_mtime
    except OSError:
        return 0.0
