"""The configuration: one schema, several carriers, every problem at once.

Carriers, later ones win: a file (YAML or JSON), the environment (`VISIONEDGE_…`), the command line, the
module twin. Each gives a plain document with the same camelCase keys; `merge` lays one over the other and
`validate` reads the whole. A document with problems gives no `Config` at all, so it can never replace a
working one.
"""

import difflib
import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.alias_generators import to_camel

from visionedge.documents import Document, kind_of, without_extensions
from visionedge.errors import ConfigError
from visionedge.fetching.address import check_address
from visionedge.uris import keep_secret, masked_address, parse_camera_uri, redact, secrets_in

MAX_PROBLEMS = 500
"""So many are put into words; of more, only their number."""

CAMERA_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,31}\.?")


def _known_uri(uri: str) -> str:
    try:
        parse_camera_uri(uri)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return uri


def _fallback(value: object) -> object:
    """It was a truth value once."""
    return {True: "degrade", False: "exit"}[value] if isinstance(value, bool) else value


def _whole(value: object) -> object:
    """A whole number, also where a tool wrote it as 8.0: JSON and twins know one kind of number only."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off(value: object) -> object:
    """The word off, which YAML reads as a truth value where it is not quoted."""
    return "off" if value is False else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number, such as 8 or 8.0."""


def _host_name(name: str) -> str:
    if not _HOST_NAME.fullmatch(name):
        raise ValueError("must be a host name without scheme and port, such as vision.example")
    return name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _camera_name(name: str) -> str:
    if not CAMERA_NAME.fullmatch(name):
        raise ValueError("a camera's name is 1 to 64 of a-z, 0-9, '_' and '-'")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=True,
        hide_input_in_errors=True,
    )


class GateConfig(_Section):
    """The motion gate of a camera: what does not move is not analysed."""

    enabled: bool = Field(default=True, description="false keeps the settings and lets everything pass.")
    every_seconds: float = Field(
        default=10.0, ge=0.1, le=86400, description="A picture is analysed at least so often."
    )
    sensitivity: float = Field(
        default=0.5, ge=0, le=1, description="More sees smaller and fainter things, and more that is none."
    )


class TlsConfig(_Section):
    """How the certificate of an rtsps:// or https:// camera is checked."""

    verify: bool = Field(
        default=False, description="true refuses a camera whose certificate is not trusted; needs PyAV."
    )
    ca_file: str | None = Field(
        default=None,
        min_length=1,
        description="PEM: the certificate of the camera or of its authority; absent = the system's ones.",
    )

    @field_validator("ca_file", mode="after")
    @classmethod
    def _needs_verify(cls, ca_file: str | None, before: ValidationInfo) -> str | None:
        if ca_file is not None and not before.data.get("verify"):
            raise ValueError("has no effect without 'verify: true'")
        return ca_file


class CameraDefaults(_Section):
    """Settings for all cameras; a camera's own keys win."""

    fps: float | None = Field(
        default=None, gt=0, le=1000, description="Analysed frames per second; absent = as fast as the camera."
    )
    enabled: bool = Field(default=True, description="false closes the camera and keeps its settings.")
    gate: GateConfig | None = Field(default=None, description="Analyse only what moves; absent = everything.")
    priority: Whole = Field(
        default=0, ge=-1000, le=1000, description="In an overload, cameras of a lower one are slowed first."
    )
    transport: Literal["tcp", "udp", "auto"] = Field(
        default="tcp", description="RTSP: auto = TCP, and UDP where the camera refuses that."
    )
    decoder: Literal["auto", "pyav", "opencv"] = Field(
        default="auto", description="auto = PyAV where it is installed, else OpenCV."
    )
    tls: TlsConfig | None = Field(default=None, description="absent = certificates are not checked.")
    follow_redirects: Literal["same-host", "any"] = Field(
        default="same-host",
        description="HTTP and RTSP: where redirects and playlists may lead; any = other hosts, too.",
    )
    loop: bool = Field(default=False, description="A file or a folder begins again at its end.")


class CameraConfig(CameraDefaults):
    """One camera."""

    uri: Annotated[str, AfterValidator(_known_uri)] = Field(
        description="rtsp(s)://, http(s)://, a file, a folder of pictures, v4l2:///dev/video0 or demo:"
    )


class ModelConfig(_Section):
    """Which model; absent = the bundled one."""

    path: str | None = Field(default=None, description="An ONNX file.")
    allow_insecure: bool = Field(
        default=False, description="Let 'url' be http: or file:, too; only the local file may say so."
    )
    max_megabytes: Whole = Field(
        default=1000, ge=1, le=2000, description="A file behind 'url' that is larger is refused."
    )
    url: str | None = Field(default=None, description="An https address of an ONNX file.")
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{64}$", description="Of the file behind `url`."
    )

    @field_validator("url", mode="after")
    @classmethod
    def _known_address(cls, url: str | None, before: ValidationInfo) -> str | None:
        if url is not None:
            check_address(url, insecure=bool(before.data.get("allow_insecure")))
        return url


class InferenceConfig(_Section):
    """How frames are computed and what counts as a detection."""

    device: Literal["auto", "cuda", "tensorrt", "cpu"] = Field(
        default="auto", description="auto = CUDA where it works, else the CPU."
    )
    fallback: Annotated[
        Literal["degrade", "hold", "exit"],
        BeforeValidator(_fallback, json_schema_input_type=Literal["degrade", "hold", "exit"] | bool),
    ] = Field(
        default="degrade",
        description="Without the device: degrade = the CPU computes, hold = wait for it, exit = end with 3.",
    )
    parity: Annotated[Literal["refuse", "warn", "off"], BeforeValidator(_off)] = Field(
        default="refuse", description="What becomes of a device that computes otherwise than the CPU."
    )
    confidence: float = Field(default=0.3, ge=0, le=1, description="The least score that is reported.")
    iou: float = Field(default=0.5, ge=0, le=1, description="Boxes that overlap more are one.")
    max_batch: Whole = Field(default=8, ge=1, le=64, description="The largest batch that may be formed.")
    precision: Literal["auto", "fp32", "fp16", "int8"] = Field(
        default="auto", description="auto = the fastest here, of those that stay within their tolerance."
    )
    latency_budget_ms: float | None = Field(
        default=None, gt=0, description="The longest that computing a batch should take; absent = no limit."
    )
    process: bool = Field(
        default=True, description="Compute in a process of its own, which the module survives."
    )
    max_age_seconds: float = Field(
        default=2.0, gt=0, le=3600, description="A waiting frame older than this is dropped, counted 'stale'."
    )
    classes: tuple[str, ...] | None = Field(
        default=None, strict=False, description="Only these labels are reported; absent = all."
    )


def _each_once(rungs: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(rungs)) < len(rungs):
        raise ValueError("each rung can be taken once")
    return rungs


class OverloadConfig(_Section):
    """What is given up while the device cannot carry what the cameras are asked for."""

    when: Literal["degraded", "always"] = Field(
        default="degraded",
        description="degraded = only while the device is less than what was asked for.",
    )
    ladder: Annotated[
        tuple[Literal["variant", "gate", "fps"], ...], Field(strict=False), AfterValidator(_each_once)
    ] = Field(
        default=("variant", "gate", "fps"),
        description="In this order, and back in reverse; empty = nothing is ever given up.",
    )
    min_fps: float = Field(default=0.5, ge=0.01, le=1000, description="fps: no camera is slowed below this.")
    after_seconds: float = Field(
        default=15.0, ge=1, le=3600, description="Overloaded for so long, before a rung is taken."
    )
    back_after_seconds: float = Field(
        default=60.0, ge=1, le=86400, description="Fine for so long, before a rung is given back."
    )


class TelemetryConfig(_Section):
    """What goes to IoT Hub, and how often."""

    interval_seconds: float = Field(
        default=1.0, ge=0.1, le=86400, description="Frames are gathered this long."
    )
    mode: Literal["changes", "all", "none"] = Field(
        default="changes",
        description="changes = only frames in which something differs from the last one that was sent.",
    )
    change_seconds: float = Field(
        default=1.0,
        ge=0,
        le=3600,
        description="changes: a box, its absence or its class must hold this long before it counts.",
    )
    max_per_day: Whole = Field(
        default=100_000,
        ge=0,
        description="Blocks of 4 KB that IoT Hub bills for detections in a UTC day; events are always sent.",
    )
    move_threshold: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="changes: a box has moved when an edge is further away;"
        " for that alone a camera sends one frame in changeSeconds at most.",
    )
    heartbeat_seconds: float = Field(
        default=60.0, ge=1, le=86400, description="changes: a camera is told this often in any case."
    )
    fill_seconds: float = Field(
        default=4.0, ge=0, le=86400, description="How much longer frames may wait for their block to fill."
    )
    spool_megabytes: Whole = Field(
        default=256, ge=1, le=1_000_000, description="What waits for the hub on disk, at most."
    )
    spool_hours: float = Field(
        default=168.0, gt=0, le=87600, description="How long a message waits, in hours that the module ran."
    )


class HttpConfig(_Section):
    """Where HTTP is served."""

    host: str = Field(default="127.0.0.1", min_length=1, description="0.0.0.0 serves other machines too.")
    port: Whole = Field(default=8080, ge=0, le=65535, description="0 = any free one.")
    token: str | None = Field(
        default=None,
        min_length=1,
        description="Asked as 'Authorization: Bearer …' by all but the health checks.",
    )
    names: tuple[Annotated[str, AfterValidator(_host_name)], ...] = Field(
        default=(),
        max_length=100,
        strict=False,
        description="Host names by which clients reach the module; without a token others are refused.",
    )

    @property
    def is_open(self) -> bool:
        """Whether other machines may ask without a token."""
        return self.token is None and not _is_loopback(self.host)


class Config(_Section):
    """The whole configuration, checked."""

    cameras: dict[Annotated[str, AfterValidator(_camera_name)], CameraConfig] = Field(
        default_factory=dict, description="Cameras by name."
    )
    camera_defaults: CameraDefaults = Field(default_factory=CameraDefaults)
    model: ModelConfig = Field(default_factory=ModelConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    overload: OverloadConfig = Field(default_factory=OverloadConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    http: HttpConfig = Field(default_factory=HttpConfig)


def validate(document: object) -> Config:
    """Read a whole document; its top-level keys that begin with ``x-`` are ignored.

    Raises:
        ConfigError: with every problem, each starting with the path of its key.
    """
    # From here on they are masked wherever they turn up, also if the document is refused.
    keep_secret(secrets_in(document))
    if not isinstance(document, dict):
        raise ConfigError([f"the configuration is {kind_of(document)}; it must be a mapping of keys"])
    given = _with_defaults(_without_nulls(without_extensions(document)))
    # Looked at here: pydantic would look at a section as a whole only when each of its keys is right.
    whole = _model_problems(given.get("model"))
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False)
        single = [_problem(dict(item)) for item in found[:MAX_PROBLEMS]]
        more = len(found) - len(single)
        rest = [f"configuration: and {more} more problems like these"] if more else []
        raise ConfigError([*single, *whole, *rest]) from None
    if whole:
        raise ConfigError(whole)
    return config


def _with_defaults(document: Document) -> Document:
    """The document with `cameraDefaults` laid under each camera, as far as its keys are right.

    A wrong key is reported once, where it stands.
    """
    defaults, cameras = document.get("cameraDefaults"), document.get("cameras")
    if not isinstance(defaults, Mapping) or not isinstance(cameras, Mapping):
        return document
    try:
        CameraDefaults.model_validate(defaults)
    except ValidationError as error:
        wrong = {item["loc"][0] for item in error.errors(include_url=False) if item["loc"]}
        defaults = {key: value for key, value in defaults.items() if key not in wrong}
    laid = {
        name: merge(defaults, camera) if isinstance(camera, Mapping) else camera
        for name, camera in cameras.items()
    }
    return {**document, "cameras": laid}


def _model_problems(model: object) -> list[str]:
    """What is wrong with the keys of `model` together."""
    if not isinstance(model, Mapping):
        return []
    problems = []
    if "path" in model and "url" in model:
        problems.append("model: give 'path' or 'url', not both")
    if ("url" in model) != ("sha256" in model):
        problems.append("model: 'url' and 'sha256' go together")
    return problems


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Document:
    """`over` laid over `base`, mapping by mapping; a null in `over` takes the key away."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def local_only(document: object) -> list[str]:
    """The problems of a document from outside this machine: what only the local file may say."""
    model = document.get("model") if isinstance(document, Mapping) else None
    if isinstance(model, Mapping) and model.get("allowInsecure") is not None:
        return ["model.allowInsecure: can only be set in the local configuration file"]
    return []


def from_environment(environ: Mapping[str, str]) -> Document:
    """The document that the environment carries: the few keys that a container needs.

    VISIONEDGE_MODEL, VISIONEDGE_DEVICE, VISIONEDGE_HTTP (HOST:PORT) and VISIONEDGE_HTTP_TOKEN.
    """
    document: Document = {}
    if model := environ.get("VISIONEDGE_MODEL"):
        document["model"] = {"path": model, "url": None, "sha256": None}
    if device := environ.get("VISIONEDGE_DEVICE"):
        document["inference"] = {"device": device}
    http: Document = {}
    if address := environ.get("VISIONEDGE_HTTP"):
        http |= http_address(address, "VISIONEDGE_HTTP")
    if token := environ.get("VISIONEDGE_HTTP_TOKEN"):
        http["token"] = token
    if http:
        document["http"] = http
    return document


def http_address(text: str, carrier: str) -> Document:
    """``HOST:PORT`` (or ``[::1]:PORT``) as the keys of the `http` section.

    ``PORT`` and ``:PORT`` give the port alone, and the host stays what it is.
    """
    host, _, port = text.strip().rpartition(":")
    if not port.isascii() or not port.isdigit():
        raise ConfigError([f"{carrier}: '{text}' is not HOST:PORT or PORT, such as 127.0.0.1:8080 or 8080"])
    document: Document = {"port": int(port)}
    if host:
        document["host"] = host.strip("[]")
    return document


def redacted(config: Config) -> Document:
    """The configuration as a document that may be shown: secrets are ``***``."""
    document = config.model_dump(by_alias=True, mode="json", exclude_none=True)
    for camera in document["cameras"].values():
        camera["uri"] = masked_address(camera["uri"])
    if "url" in document["model"]:
        document["model"]["url"] = masked_address(document["model"]["url"])
    if "token" in document["http"]:
        document["http"]["token"] = "***"  # noqa: S105 - the mask, not a password
    return document


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _problem(item: dict[str, Any]) -> str:
    """One line in our words for one of pydantic's findings; never the value itself, it may hold a secret."""
    where = tuple(part for part in item["loc"] if part != "[key]")
    path = ".".join(str(part)[:_LONGEST_SHOWN] for part in where) or "configuration"
    context = item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden":
            reason = "unknown key" + _suggestion(str(where[-1]), _known_keys(where[:-1]))
        case "missing":
            reason = "is missing"
        case "model_type" | "dict_type" | "model_attributes_type":
            reason = "must be a mapping of keys"
        case "literal_error":
            reason = f"must be {context['expected']}"
        case "string_pattern_mismatch":
            reason = "must be 64 hexadecimal digits"
        case "value_error":
            reason = redact(str(context["error"]))
        case "tuple_type":
            reason = "must be a list" + _as_list(where, item["input"])
        case "string_type" | "bool_type" if isinstance(item["input"], bool | str):
            reason = f"must be {_WANTED[item['type']]}"
        case _:
            reason = str(item["msg"]).replace("Input should be", "must be")
    return redact(f"{path}: {reason}")


_WANTED = {
    "string_type": "a text; quote it (YAML reads on, off, yes and no as truth values)",
    "bool_type": "true or false, without quotes",
}


def _as_list(where: tuple[Any, ...], value: object) -> str:
    """How a single value is written as a list; no other value than a label is shown, it may be a secret."""
    return f": [{value}]" if where[-1] == "classes" and isinstance(value, str) and len(value) < 100 else ""


def _known_keys(where: tuple[Any, ...]) -> list[str]:
    """The keys that the section at this path knows."""
    section: Any = Config
    for part in where:
        if section is Config and part != "cameras":
            section = {_alias(n): f for n, f in Config.model_fields.items()}[str(part)].annotation
        elif section is Config:
            section = dict
        else:
            section = {"gate": GateConfig, "tls": TlsConfig}.get(str(part), CameraConfig)
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    return [_alias(name) for name in section.model_fields]


_LONGEST_SHOWN = 100

_LONGEST_KEY = 40
"""Above that a key is no slip of the pen."""


def _alias(name: str) -> str:
    return to_camel(name)


def _suggestion(key: str, known: list[str]) -> str:
    if len(key) > _LONGEST_KEY:
        return ""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close = close or [name for name in known if name.lower().startswith(key.lower())]
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known here: {', '.join(known)}" if known else ""
