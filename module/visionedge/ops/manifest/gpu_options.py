"""createOptions that hand a GPU to a module, and those that do so only by halves."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from visionedge.ops.manifest.agent import Module
from visionedge.ops.manifest.document import Findings, Place, below, has_placeholder

GPU_OPTIONS = {"HostConfig": {"DeviceRequests": [{"Count": -1, "Capabilities": [["gpu"]]}]}}
"""Both kinds of passthrough, where the host has an NVIDIA runtime (EFLOW has)."""

DXG = "/dev/dxg"
WSL = "/usr/lib/wsl"
BY_HAND_OPTIONS = {
    "Env": [f"LD_LIBRARY_PATH={WSL}/lib"],
    "HostConfig": {
        "Devices": [{"PathOnHost": DXG, "PathInContainer": DXG, "CgroupPermissions": "rwm"}],
        "Binds": [f"{WSL}:{WSL}:ro"],
    },
}
"""GPU-PV without the help of an NVIDIA runtime."""

_NODES = "/dev/nvidia"
_KIND = re.compile(r"(?<![a-z])(?:cpu|gpu|cuda)(?![a-z])")
_ASKS = "put {} into its createOptions"


def compact(document: object) -> str:
    """JSON in one line, as createOptions want it."""
    return json.dumps(document, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Mount:
    """What a container sees at `target`: a folder of the host, or a volume of Docker's by its name."""

    place: Place
    source: str
    target: str
    read_only: bool


def mounts(module: Module) -> Iterator[Mount]:
    """The binds and mounts of a module's createOptions."""
    host = module.options.at("HostConfig") if module.options else None
    for bind in _items(host, "Binds"):
        # Of host folders of Windows nothing is known here: EFLOW's and IoT Edge's hosts are Linux.
        source, _, rest = bind.text.partition(":")
        target, _, mode = rest.partition(":")
        yield Mount(bind, source, (target or source).rstrip("/"), "ro" in mode.split(","))
    for mount in _items(host, "Mounts"):
        source, target = texts(mount, "Source", "Target")
        read_only = mount.at("ReadOnly")
        yield Mount(mount, source, target.rstrip("/"), read_only is not None and read_only.value is True)
    volumes = module.options.at("Volumes") if module.options else None
    for target, volume in (volumes.entries if volumes else {}).items():
        yield Mount(volume, "", target.rstrip("/"), read_only=False)


@dataclass(frozen=True, slots=True)
class Device:
    """A device node of the host, and what the container calls it."""

    place: Place
    source: str
    target: str


def devices(module: Module) -> Iterator[Device]:
    """The device nodes that a module is handed."""
    host = module.options.at("HostConfig") if module.options else None
    for device in _items(host, "Devices"):
        source, target = texts(device, "PathOnHost", "PathInContainer")
        yield Device(device, source, target or source)


def texts(place: Place, *keys: str) -> list[str]:
    """The texts that stand at these keys; an empty one where none does."""
    return [found.text if (found := place.at(key)) else "" for key in keys]


def passthrough(module: Module) -> str:
    """What GPU a module is handed, and for which kind of passthrough, in a few words."""
    if _runtime(module) is not None:
        return "a GPU through the NVIDIA runtime, for DDA as well as GPU-PV"
    nodes = [device.source for device in devices(module)]
    if DXG in nodes:
        return "a GPU by hand, for GPU-PV alone"
    return "device nodes of a GPU" if any(node.startswith(_NODES) for node in nodes) else "no GPU"


def check_gpu(module: Module, device: str | None, findings: Findings) -> None:
    """Judge how a module is handed a GPU, and whether it can use it; `device` is what it is told to use."""
    host = module.options.at("HostConfig") if module.options else None
    for request in _items(host, "DeviceRequests"):
        _request(request, findings)
    asked = _runtime(module)
    nodes = {d.source: d.place for d in devices(module) if d.source == DXG or d.source.startswith(_NODES)}
    libraries = [m for m in mounts(module) if m.source == WSL or m.source.startswith(f"{WSL}/")]
    _by_hand(module, nodes.get(DXG), libraries, findings)
    bare = next((place for node, place in nodes.items() if node != DXG), None)
    if bare is not None and asked is None:
        what = "bare device nodes are not enough: the driver's libraries come with a request for the GPU"
        findings.warning(bare, what, _ASKS.format(compact(GPU_OPTIONS)))
    pv = nodes.get(DXG) or (libraries[0].place if libraries else None)
    if asked is not None and pv is not None:
        what = "hands GPU-PV over by hand beside a request to the NVIDIA runtime, which does the same"
        findings.warning(pv, what, "keep the request, or keep /dev/dxg and /usr/lib/wsl")
    if asked is not None:
        _hidden(environment(module), findings)
    _fits(module, asked or pv or bare, device, findings)


def _hidden(variables: Mapping[str, Place], findings: Findings) -> None:
    """The variables with which the NVIDIA runtime is asked for less than a GPU that computes."""
    visible, able = (variables.get(f"NVIDIA_{what}") for what in ("VISIBLE_DEVICES", "DRIVER_CAPABILITIES"))
    if visible is not None and visible.text.lower() in ("", "none", "void"):
        findings.warning(visible, "hides every GPU from the module", "write all, or leave it out")
    if (
        able is not None
        and not has_placeholder(able.text)
        and not {"compute", "all"} & set(able.text.split(","))
    ):
        findings.warning(able, "leaves compute out", "write compute,utility,video, or leave it out")


def _runtime(module: Module) -> Place | None:
    """Where the NVIDIA runtime is asked for a GPU."""
    host = module.options.at("HostConfig") if module.options else None
    runtime = host.at("Runtime") if host else None
    if runtime is not None and runtime.text == "nvidia":
        return runtime
    return next((request for request in _items(host, "DeviceRequests") if _wants_gpu(request)), None)


def _wants_gpu(request: Place) -> bool:
    driver, capabilities = request.at("Driver"), request.at("Capabilities")
    if driver is not None and driver.text == "nvidia":
        return True
    return any("gpu" in [i.text for i in (*item.items, item)] for item in (capabilities or request).items)


def _request(request: Place, findings: Findings) -> None:
    capabilities = findings.mapping(request).get("Capabilities")
    if capabilities is not None and any(item.text for item in capabilities.items):
        remedy = 'mind the double brackets: "Capabilities": [["gpu"]]'
        findings.error(capabilities, "is a flat list, which Docker refuses", remedy)
    count, ids = request.at("Count"), request.at("DeviceIDs")
    if count is not None and count.value != 0 and ids is not None and ids.items:
        findings.error(request, "gives both Count and DeviceIDs, which Docker refuses", "leave one out")
    if (count is None or count.value == 0) and not (ids is not None and ids.items):
        findings.warning(request, "asks for no GPU in particular", 'write "Count": -1 for all')


def _by_hand(module: Module, dxg: Place | None, libraries: list[Mount], findings: Findings) -> None:
    """GPU-PV takes the device, the whole folder of libraries, and a loader that looks there."""
    if dxg is None and not libraries:
        return
    whole = any(mount.source.rstrip("/") == WSL for mount in libraries)
    where = dxg or libraries[0].place
    if dxg is None:
        findings.warning(where, f"are the libraries of GPU-PV without {DXG}", _add("Devices"))
    elif not libraries:
        findings.warning(where, "is GPU-PV without its libraries", _add("Binds"))
    elif not whole:
        findings.warning(
            libraries[0].place, f"is a part of {WSL}: what is in lib loads from drivers", _add("Binds")
        )
    path = environment(module).get("LD_LIBRARY_PATH")
    if path is not None and f"{WSL}/lib" not in path.text.split(":") and not has_placeholder(path.text):
        findings.warning(path, "hides the libraries of GPU-PV from the loader", f"add {WSL}/lib to it")


def _add(key: str) -> str:
    host = BY_HAND_OPTIONS["HostConfig"]
    return f"add {compact({'HostConfig': {key: host[key]}})}" if isinstance(host, dict) else ""


def environment(module: Module) -> dict[str, Place]:
    """The variables of a module: those of createOptions, those of edgeAgent's `env` over them.

    The places of the former hold `NAME=value` in the manifest; here they are the value alone.
    """
    found = {}
    for item in _items(module.options, "Env"):
        name, _, value = item.text.partition("=")
        found[name] = Place(item.path, value)
    return {**found, **{name: Place(place.path, _text(place.value)) for name, place in module.env.items()}}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fits(module: Module, handed: Place | None, device: str | None, findings: Findings) -> None:
    """Whether the image, the device that is asked for and what is handed in belong together."""
    kind = image_kind(module.image)
    image = module.image_place()
    if kind == "gpu" and handed is None and device != "cpu":
        findings.warning(image, "is for a GPU, and none is handed in", _ASKS.format(compact(GPU_OPTIONS)))
    elif kind == "cpu" and handed is not None:
        what = "hands in a GPU, which this image cannot use; where there is none it does not even start"
        findings.warning(handed, what, "take the GPU image, or leave this out")
    elif device in ("cuda", "tensorrt") and (kind == "cpu" or handed is None):
        what = f"cannot use a GPU, and inference.device asks for {device}"
        findings.warning(image, what, "take the GPU image and hand a GPU in, or ask for auto or cpu")
    elif device == "cpu" and handed is not None:
        what = "hands in a GPU that inference.device does not use"
        findings.warning(handed, what, "ask for auto, or leave this out")


def image_kind(image: str) -> str:
    """`gpu` or `cpu` where the name of an image, its tag or the key of its platform says so; else empty."""
    kinds = {found.replace("cuda", "gpu") for found in _KIND.findall(image.lower().rpartition("/")[2])}
    return kinds.pop() if len(kinds) == 1 else ""


def _items(place: Place | None, key: str) -> tuple[Place, ...]:
    found = place.at(key) if place is not None else None
    return found.items if found is not None else ()


def options_path(module: Module) -> str:
    """Where the createOptions of a module stand, or should."""
    settings = below(module.place.path, "settings")
    return module.options.path if module.options is not None else below(settings, "createOptions")
