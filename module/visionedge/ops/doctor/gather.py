"""Looking, all at once: what the links of the chain are judged by, gathered in a few seconds at most."""

import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from visionedge.config.addresses import parse_camera_uri
from visionedge.config.schema import Config, ModelConfig
from visionedge.engine.device.devices import DeviceState, Effective, Reason, Requested, Verdict, probe, wishes
from visionedge.engine.device.session import NodePlaces
from visionedge.errors import ConfigError
from visionedge.iothub.identity import Identity
from visionedge.model.model_store import kept_path
from visionedge.ops.doctor.host import DXG, Answer, Host, Place, Space, look_around
from visionedge.ops.doctor.wheel import Wheel, look_at_wheel

_DRIVER_LIMIT_S = 10.0
_LIBRARIES_LIMIT_S = 20.0
_SESSION_LIMIT_S = 30.0
_PLACEMENT_LIMIT_S = 60.0
_NETWORK_LIMIT_S = 3.0
_CLOCK_LIMIT_S = 3.0
_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Running:
    """The engine of a module that runs in this very process; `doubt`: its pace is none of a GPU."""

    device: DeviceState
    places: NodePlaces
    doubt: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What doctor is asked: for which device, with which configuration (None: none is known)."""

    device: Requested = "auto"
    config: Config | None = None
    data: Path = Path("/data")
    running: Running | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes; `total_bytes` is the container's limit where that is less."""

    total_bytes: int
    available_bytes: int
    limited: bool


@dataclass(frozen=True, slots=True)
class Told:
    """What the children told; `effective` and `verdict` are those of a session or of the engine here."""

    driver: Answer
    libraries: Answer
    network: Answer
    clock: Answer
    placement: Answer
    effective: Effective
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was seen; judged by `links` and `surroundings`."""

    request: Request
    place: Place
    wheel: Wheel
    told: Told
    environ: Mapping[str, str]
    cores: int
    uid: int
    memory: Memory
    space: Space | None
    writable: bool
    socket: str
    cameras: Mapping[str, str] = field(default_factory=dict)
    now_s: float = 0.0
    newest_file_s: float = 0.0
    cpu_quota: float | None = None

    @property
    def works(self) -> bool:
        """Whether a session on a GPU computed, which no other sign can contradict."""
        return self.told.effective != "cpu"

    @property
    def demanded(self) -> bool:
        """Whether nothing but a GPU will do."""
        return self.request.device in ("cuda", "tensorrt")

    @property
    def gpu_is_absent(self) -> bool:
        """Whether there is no NVIDIA GPU and nobody demanded one, so that nothing is wrong without it.

        A VM on Windows, and a container that cannot see the PCI bus, may be without one that the host has.
        """
        place = self.place
        nothing = place.offered == "none" and place.passthrough in ("none", "intel")
        looked = place.kernel == "linux" and (place.bus or not place.container)
        return nothing and looked and not self.demanded

    @property
    def fulfilled(self) -> bool:
        """Whether it is the GPU, and the way of using it, that was asked for."""
        return self.works and self.request.device in ("auto", self.told.effective)


def gather(request: Request, host: Host) -> Facts:
    """Look at everything; children run side by side, each with its limit."""
    place = look_around(host)
    wheel = look_at_wheel(host, tensorrt=request.device == "tensorrt")
    cameras, addresses = _cameras(request.config, host)
    return Facts(
        request=request,
        place=place,
        wheel=wheel,
        told=_ask(request, host, (place, wheel), addresses),
        environ=host.environ,
        cores=host.cores,
        uid=host.uid,
        memory=_memory(host),
        space=host.space(request.data),
        writable=_writable(host, request.data),
        socket=_socket(host),
        cameras=cameras,
        now_s=host.utc_now().timestamp(),
        newest_file_s=_newest_file_s(host),
        cpu_quota=host.cpu_quota,
    )


def _ask(
    request: Request, host: Host, seen: tuple[Place, Wheel], addresses: Mapping[str, tuple[str, int]]
) -> Told:
    place, wheel = seen
    nodes = {"nodes": [*place.nodes, *([DXG] if host.exists(DXG) else [])]}
    wanted = {"folders": [str(folder) for folder in wheel.folders], "names": list(wheel.needed)}
    with ThreadPoolExecutor(4, thread_name_prefix="doctor") as pool:
        driver = pool.submit(host.ask, "driver", nodes, _DRIVER_LIMIT_S)
        libraries = pool.submit(host.ask, "libraries", wanted, _LIBRARIES_LIMIT_S)
        network = pool.submit(_ask_network, host, addresses)
        clock = pool.submit(host.ask, "clock", {}, _CLOCK_LIMIT_S)
        effective, verdict = _session(request, host, wheel, driver.result)
        placement = _placement(request, host, effective)
        told = (driver.result(), libraries.result(), network.result(), clock.result())
    return Told(*told, placement, effective, verdict)


def _session(
    request: Request, host: Host, wheel: Wheel, driver: Callable[[], Answer]
) -> tuple[Effective, Verdict]:
    """Where a first session really computes; the engine that runs here knows it better than a probe."""
    if request.running is not None and request.running.device.effective != "cpu":
        device = request.running.device
        return device.effective, Verdict(device.code, device.reason)
    if request.device == "cpu":
        return "cpu", Verdict(Reason.ASKED_CPU, "the CPU was asked for")
    if not wheel.cuda:
        return "cpu", Verdict(Reason.NO_GPU_BUILD, f"{wheel.name} was built without CUDA")
    first: Verdict | None = None
    for wish in wishes(request.device)[:-1]:
        found = probe(
            wish,
            host.session,
            _SESSION_LIMIT_S,
            driver_present=lambda: "path" in driver().step("library"),
        )
        if found.code is Reason.OK:
            return wish, first or found
        first = first or found
    return "cpu", first or Verdict(Reason.ASKED_CPU, "the CPU was asked for")


def _placement(request: Request, host: Host, effective: Effective) -> Answer:
    """Where the nodes of the model lie, worth asking only where a GPU works."""
    if effective == "cpu":
        return Answer({})
    if request.running is not None and request.running.device.effective == effective:
        places = request.running.places
        told: dict[str, Any] = {"device": effective, "doubt": request.running.doubt}
        told |= {"onDevice": places.on_device, "onCpu": list(places.on_cpu)}
        return Answer({"placement": told})
    model = request.config.model if request.config else ModelConfig()
    path = model.path
    if model.sha256 is not None:
        kept = kept_path(request.data, model.sha256)
        if not kept.is_file():
            return Answer({}, words="the model was not fetched yet")
        path = str(kept)
    return host.ask("placement", {"device": effective, "model": path}, _PLACEMENT_LIMIT_S)


def _cameras(config: Config | None, host: Host) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """For each camera what is known without the network ("" is fine, "network" is to be asked), and where."""
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
            states[name] = _local(host, uri.target)
    return states, addresses


def _local(host: Host, target: str) -> str:
    path = host.at(target) if target.startswith("/") else Path(target)
    try:
        path.stat()
    except OSError as error:
        return error.strerror or "cannot be read"
    return "" if host.access(path, os.R_OK) else "Permission denied"


def _ask_network(host: Host, addresses: Mapping[str, tuple[str, int]]) -> Answer:
    identity = _identity(host)
    question: dict[str, Any] = {
        "resolve": [identity.gateway] if identity else [],
        "reach": {name: list(address) for name, address in addresses.items()},
        "date": [identity.hub] if identity else [],
    }
    if not any(question.values()):
        return Answer({})
    return host.ask("network", question, _NETWORK_LIMIT_S)


def _identity(host: Host) -> Identity | None:
    try:
        return Identity.from_environ(host.environ)
    except ConfigError:
        return None


def _memory(host: Host) -> Memory:
    kib = {}
    for line in host.text("/proc/meminfo").splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            kib[words[0].rstrip(":")] = int(words[1])
    total, available = kib.get("MemTotal", 0) * _KIB, kib.get("MemAvailable", 0) * _KIB
    text = host.text("/sys/fs/cgroup/memory.max") or host.text("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    limit = int(text) if text.strip().isdigit() else total
    return Memory(min(total, limit), min(available, limit), limit < total)


def _writable(host: Host, data: Path) -> bool:
    """Whether the data folder, or the nearest parent in which it would be made, can be written."""
    for place in (data, *data.parents):
        if host.exists(place):
            return host.access(host.at(place), os.W_OK | os.X_OK)
    return False


def _socket(host: Host) -> str:
    """What is wrong with the workload socket; empty where all is well or there is none."""
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
        return f"{uri.path} is no socket"
    return "" if host.access(path, os.R_OK | os.W_OK) else f"{uri.path}: Permission denied"


def _newest_file_s(host: Host) -> float:
    """When the newest of our own files was written: no honest clock is earlier."""
    try:
        return (host.at(host.site) / "onnxruntime" / "__init__.py").stat().st_mtime
    except OSError:
        return 0.0
