"""createOptions that pass a GPU to a module, and checks of incomplete or contradictory ones."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from visionedge.ops.manifest.agent import EdgeModule
from visionedge.ops.manifest.document import JsonNode, LintFindings, has_placeholder

GPU_OPTIONS = {"HostConfig": {"DeviceRequests": [{"Count": -1, "Capabilities": [["gpu"]]}]}}
"""For DDA and GPU-PV on a host with an NVIDIA runtime, such as EFLOW."""

DXG = "/dev/dxg"
WSL_FOLDER = "/usr/lib/wsl"
BY_HAND_OPTIONS = {
    "Env": [f"LD_LIBRARY_PATH={WSL_FOLDER}/lib"],
    "HostConfig": {
        "Devices": [{"PathOnHost": DXG, "PathInContainer": DXG, "CgroupPermissions": "rwm"}],
        "Binds": [f"{WSL_FOLDER}:{WSL_FOLDER}:ro"],
    },
}
"""For GPU-PV without an NVIDIA runtime: NVIDIA's GPUs, and Intel's, for which there is no runtime."""

DRI = "/dev/dri"


def make_dri_options(group: str) -> dict[str, Any]:
    """createOptions for an Intel GPU on Linux; `group` is the number of the group of its render node."""
    node = {"PathOnHost": DRI, "PathInContainer": DRI, "CgroupPermissions": "rwm"}
    return {"HostConfig": {"Devices": [node], "GroupAdd": [group]}}


_NVIDIA_NODES = "/dev/nvidia"
_KIND = re.compile(r"(?<![a-z])(?:cpu|gpu|cuda)(?![a-z])")
_ADD_TO_OPTIONS = "add {} to its createOptions"


def to_compact_json(document: object) -> str:
    """JSON in one line, as in createOptions."""
    return json.dumps(document, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class ContainerMount:
    """A mount at `target` in the container: a folder of the host, or a Docker volume by name."""

    node: JsonNode
    source: str
    target: str
    read_only: bool


def read_mounts(module: EdgeModule) -> Iterator[ContainerMount]:
    """The binds and mounts of a module's createOptions."""
    for bind in module.option_items("HostConfig", "Binds"):
        # A Windows path would be split wrongly, but the hosts of IoT Edge and EFLOW are Linux.
        source, _, rest = bind.text.partition(":")
        target, _, mode = rest.partition(":")
        yield ContainerMount(bind, source, (target or source).rstrip("/"), "ro" in mode.split(","))
    for mount in module.option_items("HostConfig", "Mounts"):
        source, target = read_texts(mount, "Source", "Target")
        read_only = mount.at("ReadOnly")
        yield ContainerMount(
            mount, source, target.rstrip("/"), read_only is not None and read_only.value is True
        )
    for target, volume in module.option_entries("Volumes").items():
        yield ContainerMount(volume, "", target.rstrip("/"), read_only=False)


@dataclass(frozen=True, slots=True)
class ContainerDevice:
    """A device node of the host, and its path in the container."""

    node: JsonNode
    source: str
    target: str


def read_devices(module: EdgeModule) -> Iterator[ContainerDevice]:
    """The device nodes that are passed to a module."""
    for device in module.option_items("HostConfig", "Devices"):
        source, target = read_texts(device, "PathOnHost", "PathInContainer")
        yield ContainerDevice(device, source, target or source)


def read_texts(node: JsonNode, *keys: str) -> list[str]:
    """The strings at these keys, also of numbers, which edgeAgent converts; empty for a missing one."""
    return [
        _text(found.value) if (found := node.at(key)) and isinstance(found.value, str | int) else ""
        for key in keys
    ]


def describe_gpu_access(module: EdgeModule) -> str:
    """The GPU access of a module, and the kind of passthrough, in a few words."""
    if _find_gpu_request(module) is not None:
        return "a GPU through the NVIDIA runtime, for DDA and GPU-PV"
    nodes = [device.source for device in read_devices(module)]
    if DXG in nodes:
        return "a GPU by hand (without the NVIDIA runtime), for GPU-PV only"
    if any(map(_is_dri, nodes)):
        return "a GPU of Intel or AMD by its render node, for Linux without Hyper-V"
    return (
        "device nodes of a GPU"
        if any(device_node.startswith(_NVIDIA_NODES) for device_node in nodes)
        else "no GPU"
    )


def _is_dri(node: str) -> bool:
    return node == DRI or node.startswith(f"{DRI}/")


def passes_gpu(module: EdgeModule) -> bool:
    """Whether a GPU is passed to a module, in any way."""
    nodes = [device.source for device in read_devices(module)]
    by_node = any(node == DXG or node.startswith(_NVIDIA_NODES) for node in nodes)
    return by_node or _find_gpu_request(module) is not None


def check_gpu_options(module: EdgeModule, device: str | None, findings: LintFindings) -> None:
    """Check how a GPU is passed to a module, and whether it can use one; `device` is inference.device."""
    for request in module.option_items("HostConfig", "DeviceRequests"):
        _check_device_request(request, findings)
    gpu_request = _find_gpu_request(module)
    nodes = {
        d.source: d.node
        for d in read_devices(module)
        if d.source == DXG or d.source.startswith(_NVIDIA_NODES)
    }
    libraries = [
        m for m in read_mounts(module) if m.source == WSL_FOLDER or m.source.startswith(f"{WSL_FOLDER}/")
    ]
    _check_manual_gpu_pv(module, nodes.get(DXG), libraries, findings)
    device_only = next((node for device_node, node in nodes.items() if device_node != DXG), None)
    if device_only is not None and gpu_request is None:
        what = "device nodes alone are not enough: only a request for the GPU mounts the driver's libraries"
        findings.warning(device_only, what, _ADD_TO_OPTIONS.format(to_compact_json(GPU_OPTIONS)))
    gpu_pv = nodes.get(DXG) or (libraries[0].node if libraries else None)
    if gpu_request is not None and gpu_pv is not None:
        what = "passes GPU-PV explicitly, and the request to the NVIDIA runtime does the same"
        findings.warning(gpu_pv, what, "keep either the request, or /dev/dxg and /usr/lib/wsl")
    if gpu_request is not None:
        _check_nvidia_variables(read_module_environment(module), findings)
    if device == "openvino-gpu":
        _check_openvino(module, nodes.get(DXG), gpu_request, findings)
    else:
        _check_image_and_device(module, gpu_request or gpu_pv or device_only, device, findings)


def _check_openvino(
    module: EdgeModule, dxg: JsonNode | None, gpu_request: JsonNode | None, findings: LintFindings
) -> None:
    """What OpenVINO needs for an Intel GPU: a device node, the group of a render node, the CPU image."""
    dri = next((device.node for device in read_devices(module) if _is_dri(device.source)), None)
    if dri is None and dxg is None:
        what = "passes no Intel GPU, but inference.device is openvino-gpu"
        options = to_compact_json(BY_HAND_OPTIONS)
        how = f"{options} (GPU-PV), or {to_compact_json(make_dri_options('992'))} (Linux)"
        findings.warning(create_options_node(module), what, _ADD_TO_OPTIONS.format(how))
    if dri is not None and not _may_open_render_node(module):
        what = "gives the module no group, so that its user cannot open the render node"
        remedy = (
            'add "GroupAdd": ["992"] to HostConfig, with the number that `stat -c %g /dev/dri/render*` prints'
        )
        findings.warning(dri, what, remedy)
    if gpu_request is not None:
        what = "requests a GPU from the NVIDIA runtime, but inference.device is openvino-gpu"
        findings.warning(gpu_request, what, "remove this request")
    if classify_image(module.image) == "gpu":
        what = "is the image for NVIDIA GPUs, which has no OpenVINO"
        findings.warning(module.image_node(), what, "use the CPU image, built with WITH_OPENVINO=1")


def _may_open_render_node(module: EdgeModule) -> bool:
    user = module.option("User")
    is_root = user is not None and user.text.partition(":")[0] in ("root", "0")
    return is_root or bool(list(module.option_items("HostConfig", "GroupAdd")))


def _check_nvidia_variables(variables: Mapping[str, JsonNode], findings: LintFindings) -> None:
    """Variables that make the NVIDIA runtime hide the GPU or its compute libraries."""
    visible, able = (variables.get(f"NVIDIA_{what}") for what in ("VISIBLE_DEVICES", "DRIVER_CAPABILITIES"))
    if visible is not None and visible.text.lower() in ("", "none", "void"):
        findings.warning(visible, "hides all GPUs from the module", "write all, or remove it")
    if (
        able is not None
        and not has_placeholder(able.text)
        and not {"compute", "all"} & set(able.text.split(","))
    ):
        findings.warning(able, "has no compute", "write compute,utility,video, or remove it")


def _find_gpu_request(module: EdgeModule) -> JsonNode | None:
    """The node that requests a GPU from the NVIDIA runtime."""
    runtime = module.option("HostConfig", "Runtime")
    if runtime is not None and runtime.text == "nvidia":
        return runtime
    requests = module.option_items("HostConfig", "DeviceRequests")
    return next((request for request in requests if _wants_gpu(request)), None)


def _wants_gpu(request: JsonNode) -> bool:
    driver, capabilities = request.at("Driver"), request.at("Capabilities")
    if driver is not None and driver.text == "nvidia":
        return True
    return any("gpu" in [i.text for i in (*item.items, item)] for item in (capabilities or request).items)


def _check_device_request(request: JsonNode, findings: LintFindings) -> None:
    count, ids = request.at("Count"), request.at("DeviceIDs")
    if count is not None and count.value != 0 and ids is not None and ids.items:
        findings.error(request, "has both Count and DeviceIDs, which Docker refuses", "remove one of them")
    if (count is None or count.value == 0) and not (ids is not None and ids.items):
        findings.warning(request, "requests no GPU", 'write "Count": -1 for all')


def _check_manual_gpu_pv(
    module: EdgeModule, dxg: JsonNode | None, libraries: list[ContainerMount], findings: LintFindings
) -> None:
    """GPU-PV needs the device, the whole folder of libraries, and that folder in the library path."""
    if dxg is None and not libraries:
        return
    whole = any(mount.source.rstrip("/") == WSL_FOLDER for mount in libraries)
    where = dxg or libraries[0].node
    if dxg is None:
        findings.warning(where, f"has the libraries of GPU-PV, but not {DXG}", _add("Devices"))
    elif not libraries:
        findings.warning(where, "has the device of GPU-PV, but not its libraries", _add("Binds"))
    elif not whole:
        findings.warning(
            libraries[0].node,
            f"is only a part of {WSL_FOLDER}: the libraries in lib load others from drivers",
            _add("Binds"),
        )
    path = read_module_environment(module).get("LD_LIBRARY_PATH")
    if (
        path is not None
        and f"{WSL_FOLDER}/lib" not in path.text.split(":")
        and not has_placeholder(path.text)
    ):
        findings.warning(path, "hides the libraries of GPU-PV from the loader", f"add {WSL_FOLDER}/lib to it")


def _add(key: str) -> str:
    host = BY_HAND_OPTIONS["HostConfig"]
    return f"add {to_compact_json({'HostConfig': {key: host[key]}})}" if isinstance(host, dict) else ""


def read_module_environment(module: EdgeModule) -> dict[str, JsonNode]:
    """The variables of a module: those of createOptions, overridden by those of edgeAgent's `env`.

    A node of the former is `NAME=value` in the manifest; here it has only the value.
    """
    found = {}
    for item in module.option_items("Env"):
        name, _, value = item.text.partition("=")
        found[name] = replace(item, value=value)
    return {**found, **{name: replace(node, value=_text(node.value)) for name, node in module.env.items()}}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_image_and_device(
    module: EdgeModule, gpu_node: JsonNode | None, device: str | None, findings: LintFindings
) -> None:
    """Whether the image, inference.device and the passed GPU go together."""
    kind = classify_image(module.image)
    image = module.image_node()
    if kind == "gpu" and gpu_node is None and device not in ("cpu", "remote"):
        findings.warning(
            image,
            "is a GPU image, but no GPU is passed to it",
            _ADD_TO_OPTIONS.format(to_compact_json(GPU_OPTIONS)),
        )
    elif kind == "cpu" and gpu_node is not None:
        what = "passes a GPU that this image cannot use; on a host without GPU the module does not start"
        findings.warning(gpu_node, what, "use the GPU image, or remove this")
    elif device in ("cuda", "tensorrt") and (kind == "cpu" or gpu_node is None):
        what = f"cannot use a GPU, but inference.device is {device}"
        findings.warning(image, what, "use the GPU image and pass a GPU, or set auto or cpu")
    elif device == "cpu" and gpu_node is not None:
        what = "passes a GPU that inference.device does not use"
        findings.warning(gpu_node, what, "set inference.device to auto, or remove this")


def classify_image(image: str) -> str:
    """`gpu` or `cpu` if the name, the tag or the platform of an image says so, else empty."""
    kinds = {found.replace("cuda", "gpu") for found in _KIND.findall(image.lower().rpartition("/")[2])}
    return kinds.pop() if len(kinds) == 1 else ""


def create_options_node(module: EdgeModule) -> JsonNode:
    """The createOptions of a module, or the place of missing ones."""
    if module.options is not None:
        return module.options
    settings = module.node.at("settings") or module.node.missing("settings")
    return settings.missing("createOptions")
