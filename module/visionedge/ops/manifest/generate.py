"""`visionedge manifest generate`: makes a deployment manifest, a template, or a layered deployment.

`generate_manifest` checks its result with `lint_manifest`, so that both agree.
"""

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from visionedge.config.addresses import parse_camera_uri
from visionedge.config.documents import Document
from visionedge.config.load import find_local_only_problems, merge, parse_config
from visionedge.config.schema import Config
from visionedge.errors import ConfigError
from visionedge.ops.manifest.docker_api import CREATE_OPTIONS
from visionedge.ops.manifest.document import (
    EDGE_AGENT,
    EDGE_HUB,
    fill_placeholders,
    has_placeholder,
)
from visionedge.ops.manifest.gpu_options import (
    BY_HAND_OPTIONS,
    GPU_OPTIONS,
    WSL_FOLDER,
    make_dri_options,
    to_compact_json,
)
from visionedge.ops.manifest.lint import lint_manifest
from visionedge.ops.manifest.module_settings import (
    BUILT_IMAGE_PREFIX,
    DATA_FOLDER,
    IMAGE_PORT,
    MODULE_ID,
    is_loopback,
)
from visionedge.ops.manifest.routes import OUTPUTS
from visionedge.ops.support_dates import IOT_EDGE_TAG
from visionedge.runtime.memory_requirement import recommend_memory_mib
from visionedge.runtime.redaction import find_secrets, redact, register_secrets

Gpu = Literal["none", "dda", "gpu-pv", "gpu-pv-by-hand", "dri"]

TOKEN_VARIABLE = "VISIONEDGE_HTTP_TOKEN"  # noqa: S105 - the name of a variable
TEMPLATE_SCHEMA = "4.0.0"
HUB_SCHEMA = "1.2"
"""Version 4.0.0 of the templates' schema wants it; edgeHub reads 1.0 to 1.3."""

_HUB_STORE = "/iotedge/storage"
_LOG_OPTIONS = {"LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}}
_HUB_PORTS = (5671, 8883, 443)
_DAY_S = 86_400
_PRIORITIES = {"events": (0, 7 * _DAY_S), "scene": (1, 7 * _DAY_S), "detections": (5, _DAY_S)}


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """The content of a manifest.

    Args:
        image: the module's image; empty in a template means the image that its tools build.
        gpu: how the host passes a GPU to the module.
        device: `inference.device` of the module; empty: as the configuration says.
        render_group: the number of the group that owns the render nodes of the host, for `dri`.
        document: the configuration; None: that of the shipped templates.
        cameras: merged into those of the configuration; they replace those of the shipped templates.
        registries: addresses by name. User and password come from the environment.
        module: the module's id.
        published: address and port of the device for HTTP; None: not published.
        runtime: the tag of edgeAgent's and edgeHub's images.
        binds: folders or files of the host to mount, as in createOptions
            (``HOST:CONTAINER``, ``HOST:CONTAINER:ro``).
        memory_bytes: the limit of the container; None: what the module needs, 0: no limit.
        cpus: the limit in cores; None: no limit.
        pids: the limit of processes and threads; None: no limit.
        env: variables of the module.
        dns: addresses of DNS servers.
        labels: labels of the container.
        form: a deployment, a template, or a layered deployment.
    """

    image: str = ""
    gpu: Gpu = "none"
    device: str = ""
    render_group: str = ""
    document: Document | None = None
    cameras: Document = field(default_factory=dict)
    registries: Mapping[str, str] = field(default_factory=dict)
    module: str = MODULE_ID
    published: tuple[str, int] | None = ("127.0.0.1", IMAGE_PORT)
    runtime: str = IOT_EDGE_TAG
    binds: tuple[str, ...] = ()
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    dns: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    form: Literal["deployment", "template", "layered"] = "deployment"


@dataclass(frozen=True, slots=True)
class GeneratedManifest:
    """A manifest as text, notes for the user, and whether it has secrets."""

    text: str
    notes: tuple[str, ...]
    secret: bool


def generate_manifest(request: ManifestRequest, environ: Mapping[str, str]) -> GeneratedManifest:
    """Make a manifest; placeholders are replaced from the environment, except in a template.

    Raises:
        ConfigError: the configuration is not valid, a variable is missing, or lint finds an error.
    """
    desired, notes = _desired_properties(request, environ)
    document = _document(request, desired)
    variables = fill_placeholders(dict(request.env), {} if request.form == "template" else environ, set())
    register_secrets(secret for secret in find_secrets(variables) if not has_placeholder(secret))
    if request.form != "template":
        missing: set[str] = set()
        document = _encode_create_options(fill_placeholders(document, environ, missing))
        if missing:
            remedy = "set it, or use --template"
            raise ConfigError([f"the environment has no {name}; {remedy}" for name in sorted(missing)])
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    report = lint_manifest(text.encode(errors="surrogatepass"), "the manifest", [request.module])
    if report.errors:
        raise ConfigError([finding.line() for finding in report.findings if finding.severity == "error"])
    notes += [finding.line() for finding in report.findings]
    secret = any(not has_placeholder(text) for text in (*find_secrets(document), *find_secrets(variables)))
    return GeneratedManifest(text, tuple(notes), secret)


def _desired_properties(request: ManifestRequest, environ: Mapping[str, str]) -> tuple[Document, list[str]]:
    """The desired properties of the module, checked, and notes about them."""
    base = _example(request.gpu) if request.document is None else request.document
    if request.cameras and request.document is None:
        base = {**base, "cameras": {}}
    desired = merge(base, {"cameras": request.cameras} if request.cameras else {})
    if request.device:
        desired = merge(desired, {"inference": {"device": request.device}})
    checked = _checked(desired, published=request.published is not None)
    desired, notes = _publish_http(request, desired, environ)
    cameras_with_secrets = [name for name, camera in checked.cameras.items() if _has_secret(camera.uri)]
    if cameras_with_secrets and request.form != "template":
        notes.append(
            f"the passwords of {', '.join(cameras_with_secrets)} will be in the module twin, "
            "readable for everyone with access to it; to keep them on the device, put these cameras into a"
            " file there and set VISIONEDGE_CONFIG to its path"
        )
    return desired, notes


def _checked(desired: Document, *, published: bool) -> Config:
    problems = find_local_only_problems(desired)
    try:
        checked = parse_config(desired)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if published and checked.http.port == 0:
        problems.append(
            "http.port: 0 means any free port, which cannot be published; set a port, or use --no-http"
        )
    if problems:
        raise ConfigError(problems)
    return checked


def _publish_http(
    request: ManifestRequest, desired: Document, environ: Mapping[str, str]
) -> tuple[Document, list[str]]:
    """The configuration for a published HTTP port; it may come from a machine without containers."""
    if request.published is None:
        return desired, []
    notes = []
    http = dict(desired.get("http") or {})
    if is_loopback(http.get("host")):
        notes.append("http.host is removed: it would be the loopback of the container")
        del http["host"]
    has_rule = http.get("token") or http.get("allowAnonymous")
    if not is_loopback(request.published[0]) and not has_rule:
        if request.form == "template" or TOKEN_VARIABLE in environ:
            http["token"] = f"${{{TOKEN_VARIABLE}}}"
        else:
            notes.append(
                "the module makes the HTTP token at its first start; on the device"
                f" `docker exec {request.module} visionedge token` prints it"
            )
    rest = {key: value for key, value in desired.items() if key != "http"}
    return {**rest, **({"http": http} if http else {})}, notes


def _has_secret(uri: str) -> bool:
    return any(not has_placeholder(secret) for secret in find_secrets(uri))


def _example(gpu: Gpu) -> Document:
    """The configuration of the shipped templates."""
    return {
        "cameras": {"demo": {"uri": "demo:", "fps": 5}},
        "inference": {
            "device": "cpu" if gpu == "none" else "auto",
            "fallback": "degrade",
            "confidence": 0.4,
            "iou": 0.5,
            "maxBatch": 8,
        },
        "telemetry": {"intervalSeconds": 1, "mode": "changes", "maxPerDay": 100_000},
    }


def _document(request: ManifestRequest, desired: Document) -> Document:
    module, routes = _module(request, desired), _routes(request.module)
    if request.form == "layered":
        content: Document = {
            EDGE_AGENT: {f"properties.desired.modules.{request.module}": module},
            EDGE_HUB: {f"properties.desired.routes.{name}": route for name, route in routes.items()},
        }
        # `properties.desired` as a whole would replace all that the device's own twin has, its cameras too.
        if sections := {f"properties.desired.{key}": value for key, value in desired.items()}:
            content[request.module] = sections
        return {"content": {"modulesContent": content}}
    content = {
        EDGE_AGENT: {"properties.desired": _agent(request, module)},
        EDGE_HUB: {
            "properties.desired": {
                "schemaVersion": HUB_SCHEMA,
                "routes": routes,
                "storeAndForwardConfiguration": {"timeToLiveSecs": _DAY_S},
            }
        },
        request.module: {"properties.desired": desired},
    }
    head = {"$schema-template": TEMPLATE_SCHEMA} if request.form == "template" else {}
    return {**head, "modulesContent": content}


def _agent(request: ManifestRequest, module: Document) -> Document:
    settings: Document = {"minDockerVersion": "v1.25", "loggingOptions": ""}
    if request.registries:
        settings["registryCredentials"] = _credentials(request.registries)
    return {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": settings},
        "systemModules": {
            "edgeAgent": {"type": "docker", "settings": _system("agent", request.runtime, {})},
            "edgeHub": {
                "type": "docker",
                "status": "running",
                "restartPolicy": "always",
                "startupOrder": 0,
                "env": {"StorageFolder": {"value": _HUB_STORE}},
                "settings": _system(
                    "hub",
                    request.runtime,
                    {
                        "PortBindings": {f"{port}/tcp": [{"HostPort": str(port)}] for port in _HUB_PORTS},
                        "Binds": [f"visionedge-edgehub:{_HUB_STORE}"],
                    },
                ),
            },
        },
        "modules": {request.module: module},
    }


def _system(name: str, tag: str, host: Document) -> Document:
    return {
        "image": f"mcr.microsoft.com/azureiotedge-{name}:{tag}",
        CREATE_OPTIONS: {"HostConfig": {**host, **_LOG_OPTIONS}},
    }


def _credentials(registries: Mapping[str, str]) -> Document:
    """With the placeholders of the tools of IoT Edge; with the name if there are several registries."""

    def placeholder(what: str, name: str) -> str:
        return f"$CONTAINER_REGISTRY_{what}" + (f"_{name}" if len(registries) > 1 else "")

    return {
        name: {
            "address": address,
            "username": placeholder("USERNAME", name),
            "password": placeholder("PASSWORD", name),
        }
        for name, address in registries.items()
    }


def _routes(module: str) -> Document:
    routes = {}
    for output in reversed(OUTPUTS):
        priority, keep_s = _PRIORITIES[output]
        routes[f"{module}{output.capitalize()}"] = {
            "route": f"FROM /messages/modules/{module}/outputs/{output} INTO $upstream",
            "priority": priority,
            "timeToLiveSecs": keep_s,
        }
    return routes


def _module(request: ManifestRequest, desired: Document) -> Document:
    kind = "cpu" if request.gpu in ("none", "dri") or request.device == "openvino-gpu" else "gpu"
    image = request.image or f"{BUILT_IMAGE_PREFIX}.amd64.{kind}}}"
    # Without it, GPU-PV refuses images that set NVIDIA_REQUIRE_CUDA.
    variables = {**({"NVIDIA_DISABLE_REQUIRE": "1"} if request.gpu == "gpu-pv" else {}), **request.env}
    return {
        "version": "1.0",
        "type": "docker",
        "status": "running",
        "restartPolicy": "always",
        "startupOrder": 1,
        "imagePullPolicy": "on-create",
        **({"env": {name: {"value": value} for name, value in variables.items()}} if variables else {}),
        "settings": {"image": image, CREATE_OPTIONS: _options(request, desired)},
    }


def _options(request: ManifestRequest, desired: Document) -> Document:
    """Minimal rights: a read-only file system, no capabilities, a volume for the state."""
    access_options = _gpu_options(request)
    host: Document = dict(access_options.get("HostConfig", {}))
    host["Binds"] = [*host.get("Binds", []), f"{_volume(request.module)}:{DATA_FOLDER}", *request.binds]
    if nodes := _video_nodes(desired.get("cameras") or {}):
        host["Devices"] = [*host.get("Devices", []), *map(_device, nodes)]
        host["GroupAdd"] = [*host.get("GroupAdd", []), "video"]
    ports: Document = {}
    if request.published is not None:
        address, port = request.published
        inner = f"{(desired.get('http') or {}).get('port', IMAGE_PORT)}/tcp"
        ports = {"ExposedPorts": {inner: {}}}
        host["PortBindings"] = {inner: [{"HostIp": address, "HostPort": str(port)}]}
    host |= {
        "ReadonlyRootfs": True,
        "Tmpfs": {"/tmp": "rw,nosuid,nodev,size=64m"},  # noqa: S108 - a path inside the container
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Init": True,  # reaps the processes of `docker exec`
        **_limits(request, len(desired.get("models") or {})),
        **({"Dns": list(request.dns)} if request.dns else {}),
        **_LOG_OPTIONS,
    }
    return {
        **({"Labels": dict(request.labels)} if request.labels else {}),
        **({"Env": access_options["Env"]} if "Env" in access_options else {}),
        **ports,
        "HostConfig": host,
    }


def _gpu_options(request: ManifestRequest) -> Mapping[str, Any]:
    match request.gpu:
        case "none":
            return {}
        case "gpu-pv-by-hand":
            return BY_HAND_OPTIONS
        case "dri":
            return make_dri_options(request.render_group)
        case _:
            return GPU_OPTIONS


def _limits(request: ManifestRequest, more_models: int) -> Document:
    """A limit of memory protects edgeAgent and edgeHub from a leak of the module."""
    needed_mib = recommend_memory_mib(gpu=request.gpu != "none", more_models=more_models)
    memory_bytes = needed_mib * 2**20 if request.memory_bytes is None else request.memory_bytes
    return {
        **({"Memory": memory_bytes} if memory_bytes else {}),
        **({"NanoCpus": round(request.cpus * 1e9)} if request.cpus is not None else {}),
        **({"PidsLimit": request.pids} if request.pids is not None else {}),
    }


def check_binds(binds: Sequence[str], gpu: Gpu) -> list[str]:
    """The problems of the binds of a request, one line each."""
    problems = []
    taken = {DATA_FOLDER, "/tmp", *([WSL_FOLDER] if gpu == "gpu-pv-by-hand" else [])}  # noqa: S108 - inside the container
    for bind in binds:
        source, target, mode = [*bind.split(":"), "", ""][:3]
        shown = "".join(c if c.isprintable() else "?" for c in redact(bind))
        problem = f"--bind {shown}:"
        if bind.count(":") not in (1, 2) or (bind.count(":") == 2 and mode not in ("ro", "rw")):
            problems.append(f"{problem} write HOST:CONTAINER or HOST:CONTAINER:ro")
        elif not all(_is_plain_path(path) for path in (source, target)):
            problems.append(
                f"{problem} both paths must be absolute, without '.', '..', '//' and control characters"
            )
        elif target.rstrip("/") in ("", *taken):
            problems.append(f"{problem} {target} is already used in the container; choose another path there")
        taken.add(target.rstrip("/"))
    return problems


def _is_plain_path(path: str) -> bool:
    # normpath keeps two leading slashes.
    plain = path == "/" or (posixpath.normpath(path) == path.rstrip("/") and not path.startswith("//"))
    return plain and path.startswith("/") and path.isprintable()


def _volume(module: str) -> str:
    """The name of the data volume; two modules cannot share one."""
    return "visionedge-data" if module == MODULE_ID else f"{module}-data"


def _video_nodes(cameras: Mapping[str, Any]) -> Sequence[str]:
    uris = [parse_camera_uri(camera["uri"]) for camera in cameras.values() if camera]
    return sorted({uri.target for uri in uris if uri.kind == "v4l2"})


def _device(node: str) -> Document:
    return {"PathOnHost": node, "PathInContainer": node, "CgroupPermissions": "rw"}


def _encode_create_options(value: Any) -> Any:
    """A document with createOptions as strings, as in a deployment."""
    if not isinstance(value, dict):
        return value
    return {
        key: to_compact_json(item) if key == CREATE_OPTIONS else _encode_create_options(item)
        for key, item in value.items()
    }
