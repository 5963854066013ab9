"""The configuration: one schema, several carriers, every problem at once.

Carriers, later ones win: a file (YAML or JSON), the environment (`VISIONEDGE_…`), the command line, the
module twin. Each gives a plain document with the same camelCase keys; `merge` lays one over the other and
`validate` reads the whole. A document with problems gives no `Config` at all, so it can never replace a
working one.
"""

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic.alias_generators import to_camel

from visionedge.config.addresses import check_model_url, parse_camera_uri
from visionedge.config.documents import EXTENSION_PREFIX
from visionedge.errors import ConfigError

MAX_PROBLEMS = 500
"""So many are put into words; of more, only their number."""

CAMERA_NAME_PATTERN = re.compile(r"[a-z0-9_-]{1,64}")
_HOST_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,31}\.?")


def _check_uri(uri: str) -> str:
    try:
        parse_camera_uri(uri)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return uri


def _fallback_from_bool(value: object) -> object:
    """It was a truth value once."""
    return {True: "degrade", False: "exit"}[value] if isinstance(value, bool) else value


def _integer_from_float(value: object) -> object:
    """A whole number, also where a tool wrote it as 8.0: JSON and twins know one kind of number only."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off_from_false(value: object) -> object:
    """The word off, which YAML reads as a truth value where it is not quoted."""
    return "off" if value is False else value


WholeNumber = Annotated[int, BeforeValidator(_integer_from_float)]
"""A whole number, such as 8 or 8.0."""


def _check_host_name(name: str) -> str:
    if not _HOST_NAME_PATTERN.fullmatch(name):
        raise ValueError("must be a host name without scheme and port, such as vision.example")
    return name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_camera_name(name: str) -> str:
    if not CAMERA_NAME_PATTERN.fullmatch(name):
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
    priority: WholeNumber = Field(
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

    uri: Annotated[str, AfterValidator(_check_uri)] = Field(
        description="rtsp(s)://, http(s)://, a file, a folder of pictures, v4l2:///dev/video0 or demo:"
    )


class ModelConfig(_Section):
    """Which model; absent = the bundled one."""

    path: str | None = Field(default=None, description="An ONNX file.")
    allow_insecure: bool = Field(
        default=False, description="Let 'url' be http: or file:, too; only the local file may say so."
    )
    max_megabytes: WholeNumber = Field(
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
            check_model_url(url, insecure=bool(before.data.get("allow_insecure")))
        return url


class InferenceConfig(_Section):
    """How frames are computed and what counts as a detection."""

    device: Literal["auto", "cuda", "tensorrt", "cpu"] = Field(
        default="auto", description="auto = CUDA where it works, else the CPU."
    )
    fallback: Annotated[
        Literal["degrade", "hold", "exit"],
        BeforeValidator(
            _fallback_from_bool, json_schema_input_type=Literal["degrade", "hold", "exit"] | bool
        ),
    ] = Field(
        default="degrade",
        description="Without the device: degrade = the CPU computes, hold = wait for it, exit = end with 3.",
    )
    parity: Annotated[Literal["refuse", "warn", "off"], BeforeValidator(_off_from_false)] = Field(
        default="refuse", description="What becomes of a device that computes otherwise than the CPU."
    )
    confidence: float = Field(default=0.3, ge=0, le=1, description="The least score that is reported.")
    iou: float = Field(default=0.5, ge=0, le=1, description="Boxes that overlap more are one.")
    max_batch: WholeNumber = Field(
        default=8, ge=1, le=64, description="The largest batch that may be formed."
    )
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


def _check_unique(levels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(levels)) < len(levels):
        raise ValueError("each rung can be taken once")
    return levels


class OverloadConfig(_Section):
    """What is given up while the device cannot carry what the cameras are asked for."""

    when: Literal["degraded", "always"] = Field(
        default="degraded",
        description="degraded = only while the device is less than what was asked for.",
    )
    levels: Annotated[
        tuple[Literal["variant", "gate", "fps"], ...], Field(strict=False), AfterValidator(_check_unique)
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
    max_per_day: WholeNumber = Field(
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
    spool_megabytes: WholeNumber = Field(
        default=256, ge=1, le=1_000_000, description="What waits for the hub on disk, at most."
    )
    spool_hours: float = Field(
        default=168.0, gt=0, le=87600, description="How long a message waits, in hours that the module ran."
    )


class HttpConfig(_Section):
    """Where HTTP is served."""

    host: str = Field(default="127.0.0.1", min_length=1, description="0.0.0.0 serves other machines too.")
    port: WholeNumber = Field(default=8080, ge=0, le=65535, description="0 = any free one.")
    token: str | None = Field(
        default=None,
        min_length=1,
        description="Asked as 'Authorization: Bearer …' by all but the health checks.",
    )
    names: tuple[Annotated[str, AfterValidator(_check_host_name)], ...] = Field(
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

    cameras: dict[Annotated[str, AfterValidator(_check_camera_name)], CameraConfig] = Field(
        default_factory=dict, description="Cameras by name."
    )
    camera_defaults: CameraDefaults = Field(default_factory=CameraDefaults)
    model: ModelConfig = Field(default_factory=ModelConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    overload: OverloadConfig = Field(default_factory=OverloadConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    http: HttpConfig = Field(default_factory=HttpConfig)


# The configuration's schema for others: JSON Schema, for editors, pipelines and whoever writes a twin.


SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration document, the same for a file and for desired properties.

    It says what can be said of a key by itself; `config.validate` also reads the URIs of cameras.
    """
    schema = _without_titles(Config.model_json_schema(by_alias=True))
    schema["properties"]["cameras"]["propertyNames"] = {"pattern": f"^{CAMERA_NAME_PATTERN.pattern}$"}
    schema["$defs"]["ModelConfig"] |= {
        "not": {"required": ["path", "url"]},
        "dependentRequired": {"url": ["sha256"], "sha256": ["url"]},
    }
    # Any value: they are there for YAML anchors and are not read.
    schema["patternProperties"] = {f"^{EXTENSION_PREFIX}": {}}
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "visionedge configuration"}


def _without_titles(value: Any) -> Any:
    """Without the titles that pydantic makes of the names: they say nothing more than those."""
    if isinstance(value, dict):
        return {key: _without_titles(item) for key, item in value.items() if key != "title"}
    return [_without_titles(item) for item in value] if isinstance(value, list) else value
