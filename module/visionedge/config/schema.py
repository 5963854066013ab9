"""The schema of the configuration: sections, keys, defaults and limits, and the JSON Schema for editors.

The models are frozen, and their fields are the camelCase keys of documents in snake case. `load.parse_config`
makes a `Config` of a document; constructing one directly skips the checks across keys.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

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
"""At most so many problems of a document are reported, and the number of the others."""

CAMERA_NAME_PATTERN = re.compile(r"[a-z0-9_-]{1,64}")
_HOST_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,31}\.?")


def _check_uri(uri: str) -> str:
    try:
        parse_camera_uri(uri)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return uri


def _fallback_from_bool(value: object) -> object:
    """Accept the booleans of earlier versions."""
    return {True: "degrade", False: "exit"}[value] if isinstance(value, bool) else value


def _integer_from_float(value: object) -> object:
    """Accept 8.0 as the whole number 8, because tools that write JSON may not distinguish the two."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off_from_false(value: object) -> object:
    """Accept the word off without quotes, which YAML reads as a boolean."""
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
        raise ValueError("a camera's name must be 1 to 64 characters of a-z, 0-9, '_' and '-'")
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
    """The motion gate of a camera: frames without motion are not analysed."""

    enabled: bool = Field(default=True, description="false keeps the settings and analyses every frame.")
    every_seconds: float = Field(
        default=10.0, ge=0.1, le=86400, description="At least one frame is analysed in this time."
    )
    sensitivity: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="A higher value finds smaller and fainter motion, and more false motion.",
    )


class TlsConfig(_Section):
    """How the certificate of an rtsps:// or https:// camera is checked."""

    verify: bool = Field(
        default=False, description="true refuses a camera whose certificate is not trusted; needs PyAV."
    )
    ca_file: str | None = Field(
        default=None,
        min_length=1,
        description="PEM: the certificate of the camera or its authority; absent = the system's authorities.",
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
        default=None,
        gt=0,
        le=1000,
        description="Analysed frames per second; absent = every frame of the camera.",
    )
    enabled: bool = Field(default=True, description="false closes the camera and keeps its settings.")
    gate: GateConfig | None = Field(
        default=None, description="Analyse only frames with motion; absent = all frames."
    )
    priority: WholeNumber = Field(
        default=0,
        ge=-1000,
        le=1000,
        description="In an overload, cameras with a lower priority are slowed first.",
    )
    transport: Literal["tcp", "udp", "auto"] = Field(
        default="tcp", description="RTSP: auto = TCP, or UDP if the camera refuses TCP."
    )
    decoder: Literal["auto", "pyav", "opencv"] = Field(
        default="auto", description="auto = PyAV if it is installed, else OpenCV."
    )
    tls: TlsConfig | None = Field(default=None, description="absent = certificates are not checked.")
    follow_redirects: Literal["same-host", "any"] = Field(
        default="same-host",
        description="HTTP and RTSP: the hosts that redirects may lead to; any = other hosts, too.",
    )
    loop: bool = Field(default=False, description="A file or a folder starts again at its end.")


class CameraConfig(CameraDefaults):
    """One camera."""

    uri: Annotated[str, AfterValidator(_check_uri)] = Field(
        description="rtsp(s)://, http(s)://, a file, a folder of pictures, v4l2:///dev/video0 or demo:"
    )


class ModelConfig(_Section):
    """Which model; absent = the bundled one."""

    path: str | None = Field(default=None, description="An ONNX file.")
    allow_insecure: bool = Field(
        default=False, description="Also allow http: and file: in 'url'; only in the local file."
    )
    max_megabytes: WholeNumber = Field(
        default=1000, ge=1, le=2000, description="A larger file at 'url' is refused."
    )
    url: str | None = Field(default=None, description="An https address of an ONNX file.")
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{64}$", description="The SHA-256 of the file at 'url'."
    )

    @field_validator("url", mode="after")
    @classmethod
    def _known_address(cls, url: str | None, before: ValidationInfo) -> str | None:
        if url is not None:
            check_model_url(url, insecure=bool(before.data.get("allow_insecure")))
        return url


class InferenceConfig(_Section):
    """How frames are analysed, and what counts as a detection."""

    device: Literal["auto", "cuda", "tensorrt", "cpu"] = Field(
        default="auto", description="auto = CUDA if it works, else the CPU."
    )
    fallback: Annotated[
        Literal["degrade", "hold", "exit"],
        BeforeValidator(
            _fallback_from_bool, json_schema_input_type=Literal["degrade", "hold", "exit"] | bool
        ),
    ] = Field(
        default="degrade",
        description="Without the device: degrade = use the CPU, hold = wait, exit = end with exit code 3.",
    )
    parity: Annotated[Literal["refuse", "warn", "off"], BeforeValidator(_off_from_false)] = Field(
        default="refuse",
        description="A device with other results than the CPU: refuse = not used, warn = a log line.",
    )
    confidence: float = Field(
        default=0.3, ge=0, le=1, description="The lowest score of a detection that is reported."
    )
    iou: float = Field(
        default=0.5, ge=0, le=1, description="Boxes of one class with a higher overlap count as one object."
    )
    max_batch: WholeNumber = Field(default=8, ge=1, le=64, description="The largest batch.")
    precision: Literal["auto", "fp32", "fp16", "int8"] = Field(
        default="auto", description="auto = the fastest one on this machine that stays within its tolerance."
    )
    latency_budget_ms: float | None = Field(
        default=None,
        gt=0,
        description="The longest time that a batch should take, in milliseconds; absent = no limit.",
    )
    process: bool = Field(
        default=True,
        description="Run the engine in a process of its own, so that its crash does not end the module.",
    )
    max_age_seconds: float = Field(
        default=2.0,
        gt=0,
        le=3600,
        description="A frame that waited longer is dropped and counted as 'stale'.",
    )
    classes: tuple[str, ...] | None = Field(
        default=None, strict=False, description="Only these labels are reported; absent = all."
    )


def _check_unique(levels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(levels)) < len(levels):
        raise ValueError("has a level twice")
    return levels


class OverloadConfig(_Section):
    """How the load is reduced while the device cannot analyse the configured rates."""

    when: Literal["degraded", "always"] = Field(
        default="degraded",
        description="degraded = only while a lesser device than the requested one is in use.",
    )
    levels: Annotated[
        tuple[Literal["variant", "gate", "fps"], ...], Field(strict=False), AfterValidator(_check_unique)
    ] = Field(
        default=("variant", "gate", "fps"),
        description="The steps in their order, taken back in reverse; empty = the load is never reduced.",
    )
    min_fps: float = Field(
        default=0.5, ge=0.01, le=1000, description="fps: no camera is slowed below this rate."
    )
    after_seconds: float = Field(
        default=15.0, ge=1, le=3600, description="The time of overload before each step."
    )
    back_after_seconds: float = Field(
        default=60.0, ge=1, le=86400, description="The time without overload before a step is taken back."
    )


class TelemetryConfig(_Section):
    """Which messages go to IoT Hub, and how often."""

    interval_seconds: float = Field(
        default=1.0, ge=0.1, le=86400, description="Frames are collected for this time before they are sent."
    )
    mode: Literal["changes", "all", "none"] = Field(
        default="changes",
        description="changes = only frames that differ from the last one that was sent.",
    )
    change_seconds: float = Field(
        default=1.0,
        ge=0,
        le=3600,
        description="changes: a box, its absence or its class must last this long before it counts.",
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
        description="changes: a box has moved when an edge moved further, as a part of the frame;"
        " for motion alone a camera sends one frame in changeSeconds at most.",
    )
    heartbeat_seconds: float = Field(
        default=60.0,
        ge=1,
        le=86400,
        description="changes: a frame of each camera is sent at least this often.",
    )
    fill_seconds: float = Field(
        default=4.0,
        ge=0,
        le=86400,
        description="The longest additional time that frames wait until their 4 KB block is full.",
    )
    spool_megabytes: WholeNumber = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="The most megabytes of messages that wait on disk for the hub.",
    )
    spool_hours: float = Field(
        default=168.0,
        gt=0,
        le=87600,
        description="How long a message waits, counted in hours in which the module ran.",
    )


class HttpConfig(_Section):
    """The address of HTTP, and its access control."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="The address to listen on; 0.0.0.0 serves other machines, too.",
    )
    port: WholeNumber = Field(
        default=8080, ge=0, le=65535, description="The port to listen on; 0 = any free port."
    )
    token: str | None = Field(
        default=None,
        min_length=1,
        description="Clients must send it as 'Authorization: Bearer …', except to the health checks; absent ="
        " none on loopback, else one is made: `visionedge token` prints it.",
    )
    allow_anonymous: bool = Field(
        default=False,
        description="true makes no token: every machine that reaches the port may ask everything.",
    )
    metrics_token: Literal["none"] | None = Field(
        default=None,
        description="none = /metrics alone is answered without the token, for collectors that send none.",
    )
    names: tuple[Annotated[str, AfterValidator(_check_host_name)], ...] = Field(
        default=(),
        max_length=100,
        strict=False,
        description="Host names that clients use for the module; without a token other names are refused.",
    )

    @property
    def is_open(self) -> bool:
        """Whether other machines have access without a token."""
        return self.allow_anonymous and self._needs_protection

    @property
    def lacks_token(self) -> bool:
        """Whether a token has to be made."""
        return not self.allow_anonymous and self._needs_protection

    @property
    def _needs_protection(self) -> bool:
        return self.token is None and not _is_loopback(self.host)


class LogConfig(_Section):
    """What is logged on stderr, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lines of a lower level are not logged."
    )
    format: Literal["text", "json", "iotedge"] | None = Field(
        default=None,
        description="iotedge = the form of which IoT Edge's log collection reads level and time; json = one"
        " object per line; absent = iotedge inside IoT Edge, else text.",
    )


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
    log: LogConfig = Field(default_factory=LogConfig)


SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration document, the same for a file and for desired properties.

    It describes each key by itself; `load.parse_config` also checks the URIs of cameras.
    """
    schema = _without_titles(Config.model_json_schema(by_alias=True))
    schema["properties"]["cameras"]["propertyNames"] = {"pattern": f"^{CAMERA_NAME_PATTERN.pattern}$"}
    schema["$defs"]["ModelConfig"] |= {
        "not": {"required": ["path", "url"]},
        "dependentRequired": {"url": ["sha256"], "sha256": ["url"]},
    }
    # Any value: these keys hold YAML anchors and are ignored.
    schema["patternProperties"] = {f"^{EXTENSION_PREFIX}": {}}
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "visionedge configuration"}


def _without_titles(value: Any) -> Any:
    """Without the titles that pydantic makes of names, which repeat the names."""
    if isinstance(value, dict):
        return {key: _without_titles(item) for key, item in value.items() if key != "title"}
    return [_without_titles(item) for item in value] if isinstance(value, list) else value


SECTIONS: Mapping[str, str] = {to_camel(name): name for name in Config.model_fields}
"""The top-level keys of a configuration, as documents write them, and the field of `Config` of each."""


@dataclass(frozen=True, slots=True)
class SectionOutcome:
    """What became of one section; `reason` says why it is not applied, and is empty if it is.

    `pending`: accepted, but what it configures does not run yet. `rejected`: the section stays as it was.
    """

    status: Literal["applied", "pending", "rejected"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a wanted configuration: an outcome for each key of `SECTIONS`.

    Raises:
        ValueError: a section has no outcome, or an outcome is of no section.
    """

    outcomes: Mapping[str, SectionOutcome]

    def __post_init__(self) -> None:
        if self.outcomes.keys() != SECTIONS.keys():
            raise ValueError(f"sections without an outcome: {sorted(SECTIONS.keys() ^ self.outcomes.keys())}")

    @property
    def is_complete(self) -> bool:
        """Whether every section is in force as it was wanted."""
        return not self.unapplied

    @property
    def pending(self) -> dict[str, str]:
        """The reasons of the sections that are accepted and not in use yet."""
        return self._reasons("pending")

    @property
    def rejected(self) -> dict[str, str]:
        """The reasons of the sections that stay as they were."""
        return self._reasons("rejected")

    @property
    def unapplied(self) -> dict[str, str]:
        """The reasons of all sections that are not in force, pending or rejected."""
        return self._reasons("pending", "rejected")

    def _reasons(self, *statuses: str) -> dict[str, str]:
        return {key: each.reason for key, each in self.outcomes.items() if each.status in statuses}


class ConfigTarget(Protocol):
    """What a configuration is applied to: the running module (`AppState`)."""

    def compare(self, wanted: Config) -> Applied:
        """What of a configuration is in force now; changes nothing."""

    async def apply(self, wanted: Config) -> Applied:
        """Make the running module that of a configuration, and return what became of it."""
