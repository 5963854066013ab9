"""The schema of the configuration: sections, keys, defaults and limits.

The models are frozen, and their fields are the camelCase keys of documents in snake case. `load.parse_config`
makes a `Config` of a document; constructing one directly skips the checks across keys.
"""

import difflib
import ipaddress
import re
import zoneinfo
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

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

from visionedge.config.addresses import check_model_url, check_remote_url, parse_camera_uri
from visionedge.errors import ConfigError
from visionedge.frames.geometry import Point, find_polygon_problem

MAX_PROBLEMS = 500
"""The problems of a document that are reported; the others are only counted."""

MAX_MODELS = 16
"""Of the section `models`. Each has a process of its own."""

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


def _key(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=True,
        hide_input_in_errors=True,
    )


_FormatName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")]


class GateConfig(_Section):
    """The motion gate of a camera: frames without motion are not analysed."""

    enabled: bool = _key(True, "false keeps the settings and analyses every frame.")
    every_seconds: float = _key(10.0, "At least one frame is analysed in this time.", ge=0.1, le=86400)
    sensitivity: float = _key(
        0.5, "A higher value finds smaller and fainter motion, and more false motion.", ge=0, le=1
    )


class TlsConfig(_Section):
    """How the certificate of an rtsps:// or https:// camera is checked."""

    verify: bool = _key(False, "true refuses a camera whose certificate is not trusted; needs PyAV.")
    ca_file: str | None = _key(
        None,
        "PEM: the certificate of the camera or its authority; absent = the system's authorities.",
        min_length=1,
    )

    @field_validator("ca_file", mode="after")
    @classmethod
    def _needs_verify(cls, ca_file: str | None, before: ValidationInfo) -> str | None:
        if ca_file is not None and not before.data.get("verify"):
            raise ValueError("has no effect without 'verify: true'")
        return ca_file


# --- zones and lines of a camera ----------------------------------------------------------------------------

_MAX_POLYGON_POINTS = 64
RULE_NAME_PATTERN = re.compile(r"[A-Za-z0-9_.-]([A-Za-z0-9_. -]{0,62}[A-Za-z0-9_.-])?")
_CLOCK_TIME = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)")
_DAY_MINUTES = 24 * 60
_MAX_EVERY = 100_000


def _check_rule_name(name: str) -> str:
    if not RULE_NAME_PATTERN.fullmatch(name):
        raise ValueError(
            "a name must be 1 to 64 characters of A-Z, a-z, 0-9, '_', '-', '.' and blanks between them"
        )
    return name


def _check_point(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("must be a point [x, y]")
    return value


def check_polygon(polygon: tuple[Point, ...]) -> tuple[Point, ...]:
    """The points of a polygon, if they make one.

    Raises:
        ValueError: the reason why they do not.
    """
    count = len(polygon)
    if not 3 <= count <= _MAX_POLYGON_POINTS:
        points = "1 point" if count == 1 else f"{count} points"
        raise ValueError(f"has {points}; a polygon needs 3 to {_MAX_POLYGON_POINTS}")
    if polygon[0] == polygon[-1]:
        raise ValueError("ends with its first point; leave the last one out")
    if problem := find_polygon_problem(polygon):
        raise ValueError(problem)
    return polygon


def _clock_time(value: object) -> object:
    """The time of a day as HH:MM; YAML 1.1 reads an unquoted 18:00 as 1080, the minutes of the day."""
    if isinstance(value, int) and not isinstance(value, bool) and 60 <= value <= _DAY_MINUTES:
        return f"{value // 60:02}:{value % 60:02}"
    found = _CLOCK_TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None or int(found[1]) * 60 + int(found[2]) > _DAY_MINUTES:
        raise ValueError('must be a time from "00:00" to "24:00"; quote it (YAML reads 18:00 as a number)')
    return f"{int(found[1]):02}:{found[2]}"


def _check_timezone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        known = zoneinfo.available_timezones()
        close = difflib.get_close_matches(name[:64], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "give a name such as Europe/Berlin"
        if not known:
            hint = "this machine has no time zone database (package tzdata)"
        raise ValueError(f"is no known time zone; {hint}") from None
    return name


def _quoted_text(value: object) -> object:
    """Refuse yes and no without quotes, which YAML reads as booleans: the label is not known any more."""
    if isinstance(value, bool):
        wrong = 'must be a text; quote it: "yes" or "no" (YAML reads them as booleans)'
        raise ValueError(wrong)  # noqa: TRY004 - pydantic reports no TypeError
    return value


def _track_or_frames(value: object) -> object:
    value = _integer_from_float(value)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_EVERY
    if value != "track" and not is_count:
        raise ValueError(f"must be 'track' or a number of frames from 1 to {_MAX_EVERY}")
    return value


def _one_model(value: object) -> object:
    if isinstance(value, list | tuple):
        wrong = (
            "is a list; a camera has one model: set up a second camera with the same uri for another model,"
            " or look at the detections with a second one ('then')"
        )
        raise ValueError(wrong)  # noqa: TRY004 - pydantic reports no TypeError
    return value


def _check_model_name(name: str) -> str:
    if not CAMERA_NAME_PATTERN.fullmatch(name):
        raise ValueError("a model's name must be 1 to 64 characters of a-z, 0-9, '_' and '-'")
    return name


def _on_or_off(value: object) -> object:
    """Accept on and off without quotes, which YAML reads as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


_Coordinate = Annotated[float, Field(ge=0, le=1)]
_Point = Annotated[
    tuple[_Coordinate, _Coordinate],
    BeforeValidator(_check_point, json_schema_input_type=tuple[_Coordinate, _Coordinate]),
    Field(strict=False),
]
_Polygon = Annotated[
    tuple[_Point, ...],
    Field(strict=False, json_schema_extra={"minItems": 3, "maxItems": _MAX_POLYGON_POINTS}),
    AfterValidator(check_polygon),
]
_ClockTime = Annotated[
    str,
    BeforeValidator(_clock_time, json_schema_input_type=str),
    Field(json_schema_extra={"pattern": f"^({_CLOCK_TIME.pattern})$"}),
]
_RuleName = Annotated[str, AfterValidator(_check_rule_name)]
_ModelName = Annotated[str, AfterValidator(_check_model_name)]
_Attributes = dict[
    str, Annotated[str, BeforeValidator(_quoted_text, json_schema_input_type=str), Field(min_length=1)]
]
_AnchorName = Literal["bottom-center", "center"]
_Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_ALL_DAYS: tuple[_Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class ScheduleConfig(_Section):
    """When a zone counts."""

    from_: _ClockTime = Field(
        alias="from", description="HH:MM, quoted: the zone counts from this time of the day."
    )
    to: _ClockTime = Field(description="HH:MM or 24:00, quoted; before 'from' = on the day after.")
    days: tuple[_Day, ...] = _key(_ALL_DAYS, "The days on which it begins.", strict=False)
    timezone: Annotated[str, AfterValidator(_check_timezone)] = _key(
        "UTC", "A name of the time zone database, such as Europe/Berlin."
    )

    @field_validator("from_", mode="after")
    @classmethod
    def _is_in_the_day(cls, from_: str) -> str:
        if from_ == "24:00":
            raise ValueError('must be before "24:00"; the day ends there, so write "00:00" of the next day')
        return from_

    @field_validator("to", mode="after")
    @classmethod
    def _opens_at_all(cls, to: str, before: ValidationInfo) -> str:
        if to == before.data.get("from_"):
            raise ValueError(
                "is equal to 'from', so the zone never counts; leave 'schedule' out to count always"
            )
        return to

    @field_validator("days", mode="after")
    @classmethod
    def _has_a_day(cls, days: tuple[str, ...]) -> tuple[str, ...]:
        if not days:
            raise ValueError("is empty, so the zone never counts; leave 'days' out to count on all days")
        return days


class OccupancyConfig(_Section):
    """Events when many objects are in a zone."""

    at_least: WholeNumber = Field(description="zone-occupied: so many objects are inside.", ge=1, le=10_000)
    for_seconds: float = _key(0.0, "… for so long. zone-vacated: fewer are inside again.", ge=0, le=86400)


class EmptyConfig(_Section):
    """Events when nothing is in a zone."""

    for_seconds: float = _key(
        0.0, "zone-empty: nothing is inside for so long; then zone-filled.", ge=0, le=86400
    )


SpatialAnalysisEvent = Literal["count", "zonecrossing", "zonedwelltime"]
"""The events of a zone, by the names that they have in a configuration of Spatial Analysis."""


class ZoneConfig(_Section):
    """An area of the picture in which objects are counted."""

    polygon: _Polygon = Field(
        description="3 to 64 points [x, y], 0-1 of the picture, that do not cross themselves."
    )
    classes: tuple[str, ...] | None = _key(
        None, "Only these labels count; absent = all of the camera.", min_length=1, strict=False
    )
    attributes: _Attributes | None = _key(
        None,
        'Only objects with these attributes count, such as {helmet: "no"}; absent = all.',
        min_length=1,
    )
    anchor: _AnchorName = _key("bottom-center", "The point of the box that counts.")
    min_seconds: float = _key(0.5, "In or out for so long before it counts.", ge=0, le=3600)
    dwell_seconds: float | None = _key(
        None, "zone-dwell, once a visit: inside for so long; absent = none.", gt=0, le=604_800
    )
    occupancy: OccupancyConfig | None = _key(None, "Events when many are inside; absent = none.")
    empty: EmptyConfig | None = _key(None, "Events when nothing is inside; absent = none.")
    schedule: ScheduleConfig | None = _key(None, "When the zone counts; absent = always.")
    spatial_analysis: tuple[SpatialAnalysisEvent, ...] = _key(
        get_args(SpatialAnalysisEvent),
        "telemetry.format spatial-analysis: the events of the zone that are sent.",
        strict=False,
    )


class LineConfig(_Section):
    """A segment of the picture over which objects are counted, by direction."""

    start: _Point = Field(description="[x, y], 0-1 of the picture.")
    end: _Point = Field(
        description="[x, y]; left and right are those of a person at 'start' who looks to 'end'."
    )
    classes: tuple[str, ...] | None = _key(None, "As of a zone.", min_length=1, strict=False)
    attributes: _Attributes | None = _key(
        None,
        "As of a zone.",
        min_length=1,
    )
    anchor: _AnchorName = _key("bottom-center", "As of a zone.")
    min_seconds: float = _key(
        0.3, "On the other side for so long before it counts, or 2 % of the width away.", ge=0, le=3600
    )

    @field_validator("end", mode="after")
    @classmethod
    def _has_a_length(cls, end: Point, before: ValidationInfo) -> Point:
        if end == before.data.get("start"):
            raise ValueError("is equal to 'start', so the line has no length")
        return end


class SecondStageConfig(_Section):
    """A second model that looks at the detections of a camera, each cut out of the picture."""

    model: str = Field(description="One of 'models': a classifier, or a detector.")
    classes: tuple[str, ...] | None = _key(
        None, "Only objects with these labels; absent = all.", min_length=1, strict=False
    )
    margin: float = _key(0.1, "The box is widened by this part of its size on each side.", ge=0, le=1)
    every: Annotated[
        int | Literal["track"],
        BeforeValidator(
            _track_or_frames,
            json_schema_input_type=Annotated[int, Field(ge=1, le=_MAX_EVERY)] | Literal["track"],
        ),
    ] = _key(
        "track",
        "track = until there is an answer, which is kept; a number = again after so many frames.",
    )


class CameraDefaults(_Section):
    """Settings for all cameras; a camera's own keys win."""

    fps: float | None = _key(
        None,
        "Analysed frames per second; absent = every frame, but 1 of a folder or a still picture.",
        gt=0,
        le=1000,
    )
    enabled: bool = _key(True, "false closes the camera and keeps its settings.")
    gate: GateConfig | None = _key(None, "Analyse only frames with motion; absent = all frames.")
    priority: WholeNumber = _key(
        0, "In an overload, cameras with a lower priority are slowed first.", ge=-1000, le=1000
    )
    transport: Literal["tcp", "udp", "auto"] = _key(
        "tcp", "RTSP: auto = TCP, or UDP if the camera refuses TCP."
    )
    decoder: Literal["auto", "pyav", "opencv"] = _key("auto", "auto = PyAV if it is installed, else OpenCV.")
    tls: TlsConfig | None = _key(None, "How certificates are checked; absent = not at all.")
    follow_redirects: Literal["same-host", "any"] = _key(
        "same-host", "HTTP and RTSP: redirects lead to the camera's host only, or to any."
    )
    loop: bool = _key(
        False, "A file or a folder begins again at its end, in the same epoch and without an event."
    )
    extra_codecs: tuple[_FormatName, ...] = _key(
        (), "Codecs that are allowed beside the usual ones, by FFmpeg's names.", max_length=32, strict=False
    )
    extra_containers: tuple[_FormatName, ...] = _key(
        (),
        "Containers that are allowed beside the usual ones, by FFmpeg's names.",
        max_length=32,
        strict=False,
    )
    classes: tuple[str, ...] | None = _key(
        None,
        "Only these labels are reported; absent = those of its model.",
        min_length=1,
        strict=False,
    )
    confidence: float | None = _key(
        None,
        "The lowest score of a detection that is reported; absent = that of its model.",
        ge=0,
        le=1,
    )
    tracking: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(_on_or_off, json_schema_input_type=Literal["auto", "on", "off"] | bool),
    ] = _key("auto", "Follow objects from picture to picture; auto = where zones, lines or 'then' are.")
    model: Annotated[str, BeforeValidator(_one_model, json_schema_input_type=str)] | None = _key(
        None, "One of 'models'; absent = the section 'model'."
    )
    then: SecondStageConfig | None = _key(None, "A second model for the detections; absent = none.")


MAX_SOURCE_ID_CHARACTERS = 256


class CameraConfig(CameraDefaults):
    """One camera."""

    uri: Annotated[str, AfterValidator(_check_uri)] = Field(
        description="rtsp(s)://, http(s)://, a file, a folder of pictures, v4l2:///dev/video0 or demo:"
    )
    source_id: str | None = _key(
        None,
        "telemetry.format spatial-analysis: sourceInfo.id; absent = the camera's name.",
        min_length=1,
        max_length=MAX_SOURCE_ID_CHARACTERS,
    )
    masks: tuple[_Polygon, ...] = _key(
        (), "Polygons; a detection whose bottom centre lies inside is dropped.", strict=False
    )
    zones: dict[_RuleName, ZoneConfig] = Field(
        default_factory=dict, description="Areas in which objects are counted."
    )
    lines: dict[_RuleName, LineConfig] = Field(
        default_factory=dict, description="Segments over which they are counted."
    )

    @property
    def is_tracked(self) -> bool:
        """Whether objects are followed from picture to picture."""
        is_needed = bool(self.zones or self.lines or self.then)
        return self.tracking == "on" or (self.tracking == "auto" and is_needed)


def list_class_keys(name: str, camera: CameraConfig) -> dict[str, tuple[str, ...]]:
    """The labels of a camera, its zones and lines, by the path of their key; to be checked with its model."""
    base = f"cameras.{name}"
    found = {
        f"{base}.classes": camera.classes,
        f"{base}.then.classes": camera.then.classes if camera.then else None,
        **{f"{base}.zones.{zone}.classes": each.classes for zone, each in camera.zones.items()},
        **{f"{base}.lines.{line}.classes": each.classes for line, each in camera.lines.items()},
    }
    return {path: labels for path, labels in found.items() if labels is not None}


SCENE_KEYS = ("classes", "confidence", "tracking", "masks", "zones", "lines", "source_id", "then")
"""The fields of a camera that say what is done with its detections; its source does not depend on them."""


class ModelConfig(_Section):
    """Which model; absent = the bundled one."""

    path: str | None = _key(None, "An ONNX file; absent = the bundled YOLOX-nano, or the one at 'url'.")
    allow_insecure: bool = _key(False, "Also allow http: and file: in 'url'; only in the local file.")
    max_megabytes: WholeNumber = _key(1000, "A larger file at 'url' is refused.", ge=1, le=2000)
    url: str | None = _key(None, "Instead of 'path': the https address of an ONNX file.")
    sha256: str | None = _key(
        None,
        "Required with 'url': the SHA-256 of the file, 64 hexadecimal digits.",
        pattern=r"^[0-9a-fA-F]{64}$",
    )

    @field_validator("url", mode="after")
    @classmethod
    def _known_address(cls, url: str | None, before: ValidationInfo) -> str | None:
        if url is not None:
            check_model_url(url, insecure=bool(before.data.get("allow_insecure")))
        return url


class NamedModelConfig(ModelConfig):
    """A model for the cameras that name it."""

    classes: tuple[str, ...] | None = _key(
        None, "Only these labels are reported; absent = inference.classes.", strict=False
    )
    confidence: float | None = _key(
        None, "The lowest score that is reported; absent = inference.confidence.", ge=0, le=1
    )


def _tuple_from_text(value: object) -> object:
    """Accept one address without a list."""
    return (value,) if isinstance(value, str) else value


def _check_bearer_token(token: str) -> str:
    if not re.fullmatch(r"[!-~]{1,8192}", token):
        raise ValueError("must be 1 to 8192 printable ASCII characters without spaces")
    return token


class RemoteConfig(_Section):
    """The servers of `device: remote`; see docs/gpu.md."""

    insecure: bool = _key(False, "Also allow http:// and grpc://: pictures and token are not encrypted.")
    url: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(_tuple_from_text, json_schema_input_type=str | tuple[str, ...] | None),
    ] = _key(
        None,
        "https:// or grpcs:// address of an Open Inference Protocol server, or a list of replicas.",
        min_length=1,
        max_length=16,
        strict=False,
    )
    model: str | None = _key(
        None, "The name on the server; of another visionedge: NAME.detect.", min_length=1, max_length=256
    )
    timeout_seconds: float = _key(
        1.0, "A request that takes longer fails, and another replica gets its pictures.", ge=0.05, le=20
    )
    certificate: str | None = _key(
        None,
        "PEM: the certificate of the servers or their authority; absent = the system's authorities.",
        min_length=1,
    )
    token: Annotated[str, AfterValidator(_check_bearer_token)] | None = _key(
        None, "Sent as 'Authorization: Bearer …'; better in VISIONEDGE_REMOTE_TOKEN."
    )

    @field_validator("url", mode="after")
    @classmethod
    def _known_addresses(cls, urls: tuple[str, ...] | None, before: ValidationInfo) -> tuple[str, ...] | None:
        for url in urls or ():
            check_remote_url(url, insecure=bool(before.data.get("insecure")))
        if len(set(urls or ())) < len(urls or ()):
            raise ValueError("has an address twice")
        return urls


class InferenceConfig(_Section):
    """How frames are analysed, and what counts as a detection."""

    device: Literal["auto", "cuda", "tensorrt", "openvino-gpu", "cpu", "remote"] = _key(
        "auto",
        "auto = a GPU that works, else the CPU; openvino-gpu = Intel's; remote = the servers of 'remote'.",
    )
    runtime: Literal["auto", "onnxruntime", "openvino"] = _key(
        "auto", "What computes on the CPU; needs 'device' auto or cpu."
    )
    remote: RemoteConfig | None = _key(None, "The servers of 'device: remote'.")
    fallback: Annotated[
        Literal["degrade", "hold", "exit"],
        BeforeValidator(
            _fallback_from_bool, json_schema_input_type=Literal["degrade", "hold", "exit"] | bool
        ),
    ] = _key(
        "degrade", "Without the device: degrade = use the CPU, hold = wait, exit = end with exit code 3."
    )
    parity: Annotated[Literal["refuse", "warn", "off"], BeforeValidator(_off_from_false)] = _key(
        "refuse", "A device with other results than the CPU: refuse = not used, warn = a log line."
    )
    confidence: float = _key(0.3, "The lowest score of a detection that is reported.", ge=0, le=1)
    iou: float = _key(0.5, "Boxes of one class with a higher overlap count as one object.", ge=0, le=1)
    max_batch: WholeNumber = _key(8, "The largest batch.", ge=1, le=64)
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = _key(
        "auto", "auto = the fastest one on this machine that stays within its tolerance."
    )
    latency_budget_ms: float | None = _key(
        None, "The longest typical batch time of the plan in milliseconds; absent = no limit.", gt=0
    )
    process: bool = _key(
        True, "Run the engine in its own process, so that its crash does not end the module."
    )
    max_age_seconds: float = _key(
        2.0, "A frame that waited longer is dropped and counted as 'stale'.", gt=0, le=3600
    )
    classes: tuple[str, ...] | None = _key(
        None, "Only these labels are reported; absent = all.", strict=False
    )


def _check_unique(levels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(levels)) < len(levels):
        raise ValueError("has a level twice")
    return levels


class OverloadConfig(_Section):
    """How the load is reduced while the device cannot analyse the configured rates."""

    when: Literal["degraded", "always"] = _key(
        "degraded", "degraded = only while the device is less than the requested one; always = on any."
    )
    levels: Annotated[
        tuple[Literal["variant", "gate", "fps"], ...], Field(strict=False), AfterValidator(_check_unique)
    ] = _key(
        ("variant", "gate", "fps"),
        "The steps in their order, taken back in reverse; empty = the load is never reduced.",
    )
    min_fps: float = _key(0.5, "fps: no camera is slowed below this rate.", ge=0.01, le=1000)
    after_seconds: float = _key(15.0, "The time of overload before each step.", ge=1, le=3600)
    back_after_seconds: float = _key(
        60.0, "The time without overload before a step is taken back.", ge=1, le=86400
    )


class TelemetryConfig(_Section):
    """Which messages go to IoT Hub, and how often."""

    interval_seconds: float = _key(
        1.0, "Frames are collected for this time before they are sent.", ge=0.1, le=86400
    )
    mode: Literal["changes", "all", "none"] = _key(
        "changes",
        "changes = only frames that differ from the last one that was sent; none = no frames, scene events"
        " are sent.",
    )
    change_seconds: float = _key(
        1.0, "changes: a box, its absence or its class must last this long before it counts.", ge=0, le=3600
    )
    format: Literal["visionedge", "spatial-analysis"] = _key(
        "visionedge", "Scene events: visionedge/scene/1, or Spatial Analysis's schema 2.0."
    )
    max_per_day: WholeNumber = _key(
        100_000,
        "Blocks of 4 KB that IoT Hub bills for detections and scene events in a UTC day, a tenth of them for"
        " scene events alone where there are zones or lines; events are always sent.",
        ge=0,
    )
    move_threshold: float = _key(
        0.05, "changes: a box has moved when an edge moved further, as a part of the frame.", ge=0, le=1
    )
    heartbeat_seconds: float = _key(
        60.0, "changes: a frame of each camera is sent at least this often.", ge=1, le=86400
    )
    fill_seconds: float = _key(
        4.0,
        "The longest additional time that frames wait until their 4 KB block is full; 0 = none.",
        ge=0,
        le=86400,
    )
    spool_megabytes: WholeNumber = _key(
        256,
        "The most megabytes of messages on disk; then the oldest detections are dropped, events last.",
        ge=1,
        le=1_000_000,
    )
    spool_hours: float = _key(
        168.0, "How long a message waits, counted in hours in which the module ran.", gt=0, le=87600
    )


class HttpConfig(_Section):
    """The address of HTTP, and its access control."""

    host: str = _key(
        "127.0.0.1",
        "The address to listen on; 0.0.0.0 and :: serve other machines, too.",
        min_length=1,
    )
    port: WholeNumber = _key(8080, "The port to listen on; 0 = any free port.", ge=0, le=65535)
    token: str | None = _key(
        None,
        "Clients must send it as 'Authorization: Bearer …', except to the health checks; absent = none on"
        " loopback, else one is made, which `visionedge token` prints.",
        min_length=1,
    )
    allow_anonymous: bool = _key(
        False, "true makes no token: every machine that reaches the port may ask everything."
    )
    metrics_token: Literal["none"] | None = _key(
        None, "none = /metrics alone is answered without the token, for collectors that send none."
    )
    names: tuple[Annotated[str, AfterValidator(_check_host_name)], ...] = _key(
        (),
        "Host names that clients use for the module; without a token other names are refused.",
        max_length=100,
        strict=False,
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


class EventLogConfig(_Section):
    """The bound of the scene events on disk; the oldest are deleted first."""

    megabytes: WholeNumber = _key(64, "The most megabytes of events.", ge=1, le=100_000)
    days: float = _key(31.0, "The longest time that an event is kept.", gt=0, le=3660)


class EventsConfig(_Section):
    """The log of scene events on disk."""

    keep: EventLogConfig = Field(default_factory=EventLogConfig, description="The bound of the log.")


class LogConfig(_Section):
    """What is logged on stderr, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = _key(
        "info", "Lines of a lower level are not logged."
    )
    format: Literal["text", "json", "iotedge"] | None = _key(
        None,
        "iotedge = IoT Edge's log collection reads level and time; json = one object per line; absent ="
        " iotedge inside IoT Edge, else text.",
    )


class Config(_Section):
    """The whole configuration, checked."""

    cameras: dict[Annotated[str, AfterValidator(_check_camera_name)], CameraConfig] = Field(
        default_factory=dict, description="Cameras by name."
    )
    camera_defaults: CameraDefaults = Field(default_factory=CameraDefaults)
    model: ModelConfig = Field(default_factory=ModelConfig)
    models: dict[_ModelName, NamedModelConfig] = Field(
        default_factory=dict,
        description="More models by name, for cameras ('model') and what they find ('then').",
        max_length=MAX_MODELS,
    )
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    overload: OverloadConfig = Field(default_factory=OverloadConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    http: HttpConfig = Field(default_factory=HttpConfig)
    events: EventsConfig = Field(default_factory=EventsConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    def find_model(self, name: str | None) -> ModelConfig:
        """The model of this name; None or `DEFAULT_MODEL`: the section `model`."""
        return self.models[name] if name else self.model

    def find_inference(self, name: str | None) -> InferenceConfig:
        """The section `inference` with the classes and the confidence of the model of this name."""
        own = (
            self.models[name].model_dump(include={"classes", "confidence"}, exclude_none=True) if name else {}
        )
        return self.inference.model_copy(update=own)


SECTIONS: Mapping[str, str] = {to_camel(name): name for name in Config.model_fields}
"""The top-level keys of a configuration, as documents write them, and the field of `Config` of each."""
