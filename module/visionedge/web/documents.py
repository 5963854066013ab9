"""The JSON documents that leave the process: one model each, with what every key means and its unit.

`app.status` and `ops.doctor` build their documents as models and return them with `dump`; `openapi` makes
the schemas of /openapi.json of all models. Frame objects and messages are built for every frame, so they are
plain dicts (`frames.types`, `outbound.messages`): their models here only describe them, and tests hold the
two together.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from visionedge.camera.camera import CameraState
from visionedge.config.documents import Document
from visionedge.config.schema import CAMERA_NAME_PATTERN
from visionedge.engine.device.devices import EffectiveDevice, ReasonCode, RequestedDevice, Runtime
from visionedge.engine.interface import RecoveryStage
from visionedge.iothub.client import HubState
from visionedge.outbound.messages import EventKind
from visionedge.scene.events import EventType, LineTotal

_SUFFIX = "Document"

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
"""UTC with milliseconds: ``2026-11-22T10:00:00.123Z``."""

Polyline = list[list[float]]
CameraName = Annotated[str, Field(pattern=f"^{CAMERA_NAME_PATTERN.pattern}$")]


def schema_name(model_name: str) -> str:
    """The name of a model in /openapi.json: `Status` of `StatusDocument`."""
    return model_name.removesuffix(_SUFFIX)


def _absent(description: str) -> Any:
    """A key that is left out where it has no meaning: it is neither required nor null."""
    return Field(default=None, description=description)


class JsonDocument(BaseModel):
    """Keys are camelCase. Programs must expect more keys than these: a later version may add some."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        serialize_by_alias=True,
        extra="allow",
        model_title_generator=lambda model: schema_name(model.__name__),
    )

    @classmethod
    def of(cls, source: object) -> Self:
        """The document of an object whose attributes have the names of the fields."""
        return cls.model_validate(source, from_attributes=True)

    def dump(self) -> Document:
        """The plain document: the keys that were set, in the order of the fields."""
        return self.model_dump(exclude_unset=True)


class _ClosedDocument(JsonDocument):
    """Exactly these keys; a change needs a new number in `schema`."""

    model_config = ConfigDict(extra="forbid")


# --- errors and health --------------------------------------------------------------------------------------


class ErrorDetailsDocument(_ClosedDocument):
    """What went wrong."""

    code: str = Field(pattern="^[a-z_]+$", description="For programs; docs/http.md lists the codes.")
    message: str = Field(description="For people: one line, secrets masked.")


class ErrorDocument(JsonDocument):
    """The answer to a request that failed."""

    error: ErrorDetailsDocument


class ProtocolErrorDocument(JsonDocument):
    """The same under /v2, as the Open Inference Protocol wants it."""

    error: str


class HealthDocument(JsonDocument):
    """Whether the module works."""

    status: Literal["ok", "unhealthy"]
    reasons: list[str] = _absent("Why the module is not healthy; absent when it is.")
    error: ErrorDetailsDocument = _absent("The same as an error; absent when the module is healthy.")


class ReadinessDeviceDocument(JsonDocument):
    """The device, so that a module that computes on the CPU in place of a GPU is not silent about it."""

    requested: RequestedDevice
    effective: EffectiveDevice | None
    degraded: bool = _absent("The effective device is less than what was requested.")


class ReadinessDocument(JsonDocument):
    """Whether a warmed-up engine answers."""

    status: Literal["ready", "not_ready"]
    reasons: list[str] = _absent("Why the module is not ready; absent when it is.")
    engine: ReadinessDeviceDocument = _absent("The requested and the effective device.")
    error: ErrorDetailsDocument = _absent("The same as an error; absent when the module is ready.")


# --- the engine ---------------------------------------------------------------------------------------------


class OperatingPointDocument(JsonDocument):
    """A number of lanes and a batch size."""

    lanes: Count
    batch: Count


class MeasuredPointDocument(OperatingPointDocument):
    """One measurement of the warm-up: medians over `rounds`, null where it was not run."""

    frames_per_second: float | None
    batch_ms: float | None = Field(description="Milliseconds for one batch while all lanes work.")
    cpu_ms: float | None = Field(description="Milliseconds of processor time for one picture.")
    rounds: Count
    note: str = Field(description="Why it was not run or not run again, or how it failed; else empty.")


class LatencyFitDocument(JsonDocument):
    """With `lanes` lanes a batch of n takes n * `msPerPicture` + `msFixed` milliseconds."""

    lanes: Count
    ms_per_picture: float
    ms_fixed: float


class PlanMeasurementDocument(JsonDocument):
    """What the warm-up measured, and what was chosen by it."""

    choice: OperatingPointDocument
    buckets: list[int]
    reason: str
    spent_seconds: float = Field(description="How long measuring took.")
    table: list[MeasuredPointDocument]
    fits: list[LatencyFitDocument]


class PlanDocument(JsonDocument):
    """Lanes and batch sizes of the engine."""

    lanes: Count
    buckets: list[int] = Field(description="The only batch sizes that run, rising.")
    reason: str = Field(description="Why this plan, in one line.")
    measured: PlanMeasurementDocument | None = Field(description="null where a rule decided.")


class PrecisionDocument(JsonDocument):
    """The precision that the engine computes in."""

    precision: str = Field(description="fp32, bf16, fp16 or int8.")
    reason: str
    milliseconds: dict[str, float] = Field(description="Milliseconds for a batch on one lane, by precision.")


class EngineCandidateDocument(JsonDocument):
    """What was measured of an engine that may compute the model; null where it was not measured."""

    runtime: Runtime
    precision: str
    options: str = Field(description="plain, or the options of the device that were tried.")
    ms: float | None = Field(description="Milliseconds for a batch on one lane, alone.")
    frames_per_second: float | None = Field(description="All lanes at once.")
    times_as_fast: float | None = Field(description="Relative to the first candidate.")
    agreement: str = Field(description="The comparison with onnxruntime in fp32 on the CPU.")
    note: str = Field(description="Why it is not used; empty for the one in use.")


class ApComparisonDocument(JsonDocument):
    """Average precision on labelled pictures: fp32, and the variant."""

    pictures: Count
    fp32: float
    variant: float
    fp32_ap50: float
    variant_ap50: float


class ParityBoxesDocument(JsonDocument):
    """How far the boxes of two engines agree."""

    pictures: Count
    boxes: Count = Field(description="Boxes that were compared.")
    confidence: Share = Field(description="Boxes below this confidence do not count.")
    iou: Share = Field(description="Two boxes match from this overlap on.")
    matched: Share = Field(description="The part of the boxes that match.")
    score_shift: float = Field(description="The mean difference of the scores of boxes that match.")
    largest_score_shift: float
    ap: ApComparisonDocument | None


class ParityDocument(JsonDocument):
    """A comparison of the device with the CPU."""

    on: Literal["pictures", "frames"] = Field(description="Bundled pictures, or frames of the cameras.")
    pictures: Count
    rows: Share | None = Field(
        description="The part of the strongest output rows that both have; null where neither has any."
    )
    boxes: ParityBoxesDocument
    refusal: str | None = Field(description="Why the device cannot be trusted; null where it can.")


class SpeedCheckDocument(JsonDocument):
    """Milliseconds for one picture on the device, and on one core of the CPU."""

    device_ms: float
    cpu_ms: float
    doubt: str | None = Field(description="Why the device is implausibly slow; null where it is not.")


class EngineProcessDocument(JsonDocument):
    """The process that the engine runs in."""

    pid: int | None = Field(description="null while no process runs.")
    restarts: Count
    down: str | None = Field(description="Why the process computes nothing now; null where it computes.")


class RecoveryDocument(JsonDocument):
    """Faults and probes since the start, and the state of the recovery of a lost device."""

    stage: RecoveryStage = Field(description="settled: no device is looked for.")
    failed_attempts: Count
    reason_code: ReasonCode | None
    reason: str | None
    next_try_seconds: float | None = Field(description="When the next attempt begins, from now.")
    change_overs: Count = Field(description="How often a device was put back to use.")
    faults: dict[str, int] = Field(description="By kind of fault.")
    probes: dict[str, int] = Field(description="By the reason code of the answer.")


class ReplicaDocument(JsonDocument):
    """A server of the remote device."""

    url: str = Field(description="Its address.")
    state: Literal["up", "down"] = Field(description="up: it gets batches.")
    reason: str | None = Field(description="Why it gets none.")
    batches: Count = Field(description="Batches that it computed.")
    failures: Count = Field(description="Requests that failed.")


class RemoteDocument(JsonDocument):
    """The servers of the device `remote`."""

    sentence: str = Field(description="Whether pictures leave this device, and to which servers.")
    replicas: list[ReplicaDocument] = Field(description="The servers; empty before the first one was used.")


class EngineDocument(JsonDocument):
    """The device that computes frames, the one that was requested, and why they differ."""

    requested: RequestedDevice = Field(description="The device of the configuration.")
    effective: EffectiveDevice | None = Field(description="The device that computes; null before warm-up.")
    degraded: bool = _absent("The effective device is less than what was requested.")
    reason_code: ReasonCode | Literal["warming-up"] = Field(description="Why this device, for programs.")
    reason: str = Field(description="Why this device, for people.")
    since: Moment = _absent("When the effective device was taken.")
    plan: PlanDocument = _absent("Lanes and batch sizes, the reason in one line, and the measurements.")
    runtime: Runtime = _absent("The library that computes.")
    precision: PrecisionDocument = _absent("The precision, the reason, and the measurements.")
    candidates: list[EngineCandidateDocument] = _absent("The engines that were measured; empty: none.")
    nodes_on_cpu: list[str] = _absent("Nodes of the graph that run on the CPU beside a GPU.")
    notes: list[str] = _absent("Options that the device or the model refused, and why.")
    unplanned_shapes: Count = _absent("Batches of a size that was not warmed up; stays 0.")
    process: EngineProcessDocument | None = _absent("null where the engine runs in the module's process.")
    parity: list[ParityDocument] = _absent("How the device compared with the CPU.")
    speed_check: SpeedCheckDocument | None = _absent("The speed of the device; null where it is the CPU.")
    recovery: RecoveryDocument | None = _absent("The recovery of a lost device.")
    remote: RemoteDocument | None = _absent("The servers of the device 'remote'; null for other devices.")


class EngineEventDocument(JsonDocument):
    """The `details` of an event about the engine; everything else is in the status."""

    requested: RequestedDevice
    effective: EffectiveDevice
    degraded: bool
    reason_code: ReasonCode
    since: Moment
    reason: str = Field(max_length=500)
    runtime: Runtime
    precision: str
    recovery_stage: RecoveryStage | None
    model: str = _absent("The name in `models`; absent: the section `model`.")


# --- cameras ------------------------------------------------------------------------------------------------


class ThrottleDocument(JsonDocument):
    """What overload limits a camera to."""

    fps: float | None = Field(description="Analysed frames per second at most; null: no limit.")
    gate: bool = Field(description="Pictures without motion are not analysed.")


class CameraDocument(JsonDocument):
    """A configured camera."""

    name: CameraName = Field(description="As in the configuration.")
    uri: str = Field(description="Its address, secrets masked.")
    enabled: bool = Field(description="As in the configuration.")
    state: CameraState | Literal["disabled"] = Field(description="docs/cameras.md explains the states.")
    epoch: Count = Field(description="Grows by one at each reconnect.")
    frames_read: Count = Field(description="Pictures decoded from the source.")
    frames_analysed: Count = Field(description="Frames that were computed.")
    dropped: dict[str, int] = Field(description="Frames that were dropped, by reason.")
    fps: float = Field(description="Analysed frames per second, over the last 5 s.")
    age_ms: float | None = Field(description="Age of the newest result in ms; null before the first one.")
    last_error: str | None = Field(description="The newest error, secrets masked; null without one.")
    next_try_seconds: float | None = Field(
        description="Until the next connection attempt; null unless the camera waits for one."
    )
    since: Moment = _absent("When the state began.")
    source_fps: float = _absent("Pictures per second that the source sends, over the last 5 s.")
    model: str = _absent("Its model in `models`; absent: the section `model`.")
    width: int | None = _absent("In px; null before the first picture.")
    height: int | None = _absent("In px; null before the first picture.")
    decoder: str | None = _absent("What decodes the source.")
    throttle: ThrottleDocument | None = Field(description="What overload limits it to; null: nothing.")
    sequence: int | None = Field(description="Of the newest result; null before the first one.")
    zones: dict[str, Polyline] = Field(description="The polygons of the zones that count, 0 to 1.")
    lines: dict[str, Polyline] = Field(description="Start and end of the lines that count, 0 to 1.")


class CamerasDocument(JsonDocument):
    """All configured cameras."""

    cameras: list[CameraDocument]


# --- capacity and overload ----------------------------------------------------------------------------------


class CameraLoadDocument(JsonDocument):
    """The rates of one camera."""

    demanded_per_second: float
    admitted_per_second: float
    delivered_per_second: float
    decode_cores: float = Field(description="Cores that its thread uses.")


class OverloadLevelDocument(JsonDocument):
    """A level of degradation that is in force."""

    level: Literal["variant", "gate", "fps"]
    since: Moment
    what: str = Field(description="What it means now, in a few words.")


class OverloadDocument(JsonDocument):
    """How the load is reduced."""

    active: bool = Field(description="The configuration allows it (`overload.when`).")
    exhausted: bool = Field(description="The load is still too high, and no level is left.")
    since: Moment | None = Field(description="When the first level in force was taken; null without one.")
    levels: list[OverloadLevelDocument] = Field(description="The levels in force, in their order.")


class CapacityDocument(JsonDocument):
    """How many of the configured frames are analysed, and what limits it."""

    window_seconds: float = Field(description="All rates are averages over this time.")
    demanded_per_second: float = Field(description="Frames that the configuration asks for.")
    admitted_per_second: float = Field(description="Frames that overload leaves of these.")
    delivered_per_second: float = Field(description="Frames that are analysed.")
    cores: Count = Field(description="Cores that the process may use.")
    cpu_quota: float | None = Field(description="Cores that a CPU quota allows; null without one.")
    cores_used: dict[str, float] = Field(description="By purpose: decode, infer, other.")
    bottleneck: Literal["none", "quota", "decode", "engine", "others", "idle"]
    sentence: str = Field(description="All of it for people, with the setting to change.")
    cameras: dict[str, CameraLoadDocument]
    overload: OverloadDocument


# --- IoT Hub ------------------------------------------------------------------------------------------------


class SpoolDocument(JsonDocument):
    """The messages that wait for the hub."""

    mode: Literal["disk", "memory"]
    reason: str | None = Field(description="Why only in memory; null on disk.")
    waiting: Count = Field(description="Messages.")
    waiting_bytes: Count
    dropped: dict[str, int] = Field(description="Messages that were dropped, by reason.")
    stalled_seconds: float = Field(description="For so long the disk has hung; 0 if it does not.")


class TelemetryDocument(JsonDocument):
    """What became of the results since the start; `telemetry.mode` and the budget decide."""

    frames_offered: Count
    frames_published: Count
    frames_unchanged: Count
    frames_dropped: dict[str, int] = Field(description="By reason.")
    messages: dict[str, int] = Field(description="By output.")
    left_today: int = Field(description="Blocks of 4 KB that `telemetry.maxPerDay` still allows today.")


class MeteringDocument(JsonDocument):
    """Messages as IoT Hub meters them, in blocks of 4 KB, and what the last hour projects for a day."""

    messages: dict[str, int] = Field(description="By output.")
    blocks: dict[str, int] = Field(description="By output.")
    block_fill: float = Field(description="The mean part of a block that is used.")
    blocks_per_day: int
    blocks_per_day_by_output: dict[str, int]
    projected_from_seconds: int = Field(description="3600, or less in the first hour.")
    unit_share: dict[str, float] = Field(description="The part of one unit's daily quota, by tier.")


class MessagesFileDocument(JsonDocument):
    """The file of `--messages`."""

    written: Count = Field(description="Lines.")
    last_error: str | None


class InputPicturesDocument(JsonDocument):
    """Pictures that other modules sent."""

    answered: Count
    dropped: dict[str, int] = Field(description="By reason.")


class HubDocument(JsonDocument):
    """What goes to IoT Hub and comes from it; outside IoT Edge only `state`, telemetry and metering."""

    state: HubState | Literal["local"] = Field(description="local: outside IoT Edge.")
    device: str = _absent("The device id of the messages.")
    module: str = _absent("The module id of the messages.")
    connected: bool = _absent("edgeHub answers.")
    sent: Count = _absent("Messages acknowledged by edgeHub.")
    waiting: Count = _absent("Messages that wait for their acknowledgement.")
    dropped: dict[str, int] = _absent("Messages that were dropped, by reason.")
    last_error: str | None = _absent("The newest error, secrets masked; null without one.")
    rebuilds: Count = _absent("How often the SDK's client was made anew.")
    abandoned_calls: Count = _absent("Calls into the SDK that did not return in time.")
    faults: dict[str, int] = _absent("What was done about a hub or an SDK that failed.")
    spool: SpoolDocument = _absent("The messages that wait for the hub.")
    telemetry: TelemetryDocument = _absent("What became of the results.")
    metering: MeteringDocument = _absent("Messages as IoT Hub meters them.")
    messages_file: MessagesFileDocument = _absent("The file of `--messages`.")
    config: dict[str, Any] = _absent("The module's answer to its desired properties.")
    configurations: dict[str, int] = _absent("Desired properties, by outcome.")
    reported_patches: Count = _absent("Patches of reported properties that were sent.")
    method_calls: Count = _absent("Direct methods that were called.")
    input_pictures: InputPicturesDocument = _absent("Pictures that other modules sent.")


# --- status -------------------------------------------------------------------------------------------------


class LoadedModelDocument(JsonDocument):
    """The loaded model."""

    name: str
    sha256: str
    head: str = Field(description="The family it was recognised as.")
    classes: Count
    input_width: int = Field(description="In px.")
    input_height: int = Field(description="In px.")
    engine: EngineDocument = _absent("The device that computes it, in `models`.")


class HttpDocument(JsonDocument):
    """Who may use HTTP."""

    access: Literal["local", "token", "anonymous"] = Field(
        description="local: only this machine, without a token; token: whoever sends it; anonymous: every"
        " machine that reaches it (`http.allowAnonymous`)."
    )


class BuildDocument(JsonDocument):
    """Which build of visionedge runs: of the same commit, every build has the same values."""

    text: str = Field(description="All in one: version, revision, time.")
    revision: str = Field(description="12 digits of the commit; `-dirty`: with changes; or `unknown`.")
    built_at: str = Field(description="The time of the commit, UTC; or `unknown`.")


class SceneSummaryDocument(JsonDocument):
    """The scene of a camera, over all labels."""

    tracks: Count = Field(description="Confirmed ones.")
    zones: dict[str, dict[str, Count]] = Field(description="By name: inside, entered, left, lost.")
    lines: dict[str, dict[str, Count]] = Field(description="By name and direction.")


class SceneStorageDocument(JsonDocument):
    """The file of totals and events, `scene.db`."""

    mode: Literal["disk", "memory"]
    reason: str | None = Field(description="Why only in memory; null on disk.")
    waiting: Count = Field(description="Changes that are not on the disk yet.")
    lost: str | None = Field(description="Why an older file was set aside; null without one.")
    newer: str | None = Field(description="The file of a newer version that is not used, and what to do.")


class ScenesDocument(JsonDocument):
    """The scenes of all cameras with tracking."""

    storage: SceneStorageDocument | None = Field(description="The file; null while there is none.")
    cameras: dict[str, SceneSummaryDocument] = Field(description="By name.")


class StatusDocument(JsonDocument):
    """The whole module."""

    version: str = Field(description="The version of visionedge.")
    build: BuildDocument = Field(description="The build.")
    uptime_seconds: float = Field(description="Since the start of the module.")
    ready: bool = Field(description="A warmed-up engine answers.")
    reasons: list[str] = Field(description="Why no frame can be computed now; empty when ready.")
    engine: EngineDocument = Field(description="The device, and why it is used.")
    model: LoadedModelDocument | None = Field(description="The model; null before it is loaded.")
    models: dict[str, LoadedModelDocument] = Field(description="The loaded ones of `models`, by name.")
    fetching: str | None = Field(description="The state of a model download; null without one.")
    cameras: list[CameraDocument] = Field(description="All configured cameras.")
    scenes: ScenesDocument = Field(description="Tracks, zones and lines, and the state of their file.")
    capacity: CapacityDocument | None = Field(description="The load; null in the first seconds.")
    hub: HubDocument = Field(description="What goes to IoT Hub and comes from it.")
    http: HttpDocument = Field(description="Who may use HTTP.")
    newer_state: list[str] = Field(
        description="Files in the data folder that a newer version wrote, and what to do; usually empty."
    )


# --- frames and messages: described here, built as plain dicts ----------------------------------------------


class BoxDocument(_ClosedDocument):
    """Relative to the picture, 0 to 1, clipped to it."""

    left: Share
    top: Share
    width: Share
    height: Share


class DetectionDocument(_ClosedDocument):
    """One detected object."""

    label: str = Field(description="The name of its class, frame/2: of its track.")
    class_id: Count = Field(description="The number of its class in the model, from 0.")
    confidence: Share = Field(description="Its score.")
    box: BoxDocument = Field(description="As parts of the picture, 0 to 1, clipped to it.")
    track_id: Count | None = _absent("frame/2: never used twice for a camera; null: no confirmed track.")
    attributes: dict[str, str] = _absent("frame/2: what a second model says, by its name.")


class TimingDocument(_ClosedDocument):
    """How long a frame took."""

    wait_ms: float = Field(description="From capture to its batch.")
    infer_ms: float = Field(description="In the engine.")
    total_ms: float = Field(description="From capture to result.")
    batch_size: int = Field(ge=1, description="Frames that were computed together.")


class FrameDocument(_ClosedDocument):
    """What was detected in one picture."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["camera"]}, {"required": ["source"]}]}
    )

    schema_: Literal["visionedge/frame/1", "visionedge/frame/2"] = Field(
        alias="schema", description="frame/2 for a camera with tracking."
    )
    camera: str = _absent("Absent for a picture that was uploaded or given to `detect`.")
    source: str = _absent("Instead of `camera`: 'upload', or the picture as it was given.")
    sequence: Count = Field(description="Rises; never repeats for a camera, restarts included.")
    epoch: Count = Field(description="Grows by one at each reconnect of the camera.")
    captured_at: Moment = Field(description="When the picture was taken, UTC.")
    width: Count = Field(description="In px.")
    height: Count = Field(description="In px.")
    model: str = Field(description="The model's name.")
    device: str = Field(description="The device that computed this frame.")
    precision: Literal["fp32", "bf16", "fp16", "int8"] = _absent("frame/2: of the engine.")
    timing: TimingDocument = Field(description="How long the frame took, in milliseconds.")
    detections: list[DetectionDocument] = Field(description="Sorted by falling confidence, at most 100.")


class SceneTrackDocument(JsonDocument):
    """A confirmed track."""

    track_id: Count = Field(description="As in frame objects.")
    label: str = Field(description="Decided when the track was confirmed.")
    age_seconds: float = Field(description="Since it was confirmed.")
    box: BoxDocument = Field(description="As parts of the picture, 0 to 1, clipped to it.")
    zones: list[str] = Field(description="The zones it is inside.")


class ZoneTotalsDocument(JsonDocument):
    """By label: `entered` = `left` + `lost` + `inside`."""

    since: Moment = Field(description="When it began at 0.")
    inside: dict[str, Count] = Field(description="Tracks inside now, by label.")
    entered: dict[str, Count] = Field(description="By label, as all totals.")
    left: dict[str, Count] = Field(description="Who went out.")
    lost: dict[str, Count] = Field(description="Whose track ended inside, or who was inside at a stop.")


class LineTotalsDocument(JsonDocument):
    """Crossings by direction and label."""

    since: Moment = Field(description="When it began at 0.")
    left_to_right: dict[str, Count] = Field(alias="left-to-right", description="By label.")
    right_to_left: dict[str, Count] = Field(alias="right-to-left", description="By label.")


class SceneDocument(JsonDocument):
    """Tracks, zones and lines of a camera; empty without tracking."""

    camera: str = Field(description="Its name.")
    since: Moment | None = Field(description="When its first zone or line began at 0; null without one.")
    tracks: list[SceneTrackDocument] = Field(description="The confirmed ones.")
    zones: dict[str, ZoneTotalsDocument] = Field(description="By name.")
    lines: dict[str, LineTotalsDocument] = Field(description="By name.")


class SceneEventDocument(JsonDocument):
    """What a zone or line has found; keys that make no sense for a type are absent."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["zone"]}, {"required": ["line"]}]})

    id: str = Field(description="Stable over retries and restarts.")
    camera: str = Field(description="Its name.")
    type: EventType = Field(description="docs/scene.md explains the types.")
    zone: str = _absent("The name of the zone.")
    line: str = _absent("The name of the line.")
    direction: LineTotal = _absent("Of a crossing, seen from `start` to `end`.")
    label: str = _absent("Of the track.")
    track_id: Count = _absent("As in frame objects.")
    count: Count = _absent("Tracks inside the zone.")
    dwell_seconds: float = _absent("How long the track was inside.")
    at: Moment = Field(description="When the picture was taken in which the rule decided.")
    sequence: Count = Field(description="Of this picture.")
    epoch: Count = Field(description="Of this picture.")
    model: str = Field(description="The model's name.")
    device: str = Field(description="The device that computed the picture.")
    confidence: Share = _absent("Of the track in this picture.")
    box: BoxDocument = _absent("Of the track in this picture.")
    evidence: dict[str, Any] = Field(description="Enough to count again; docs/scene.md explains it.")


class SceneEventsDocument(JsonDocument):
    """Events of the log."""

    events: list[SceneEventDocument] = Field(description="The newest first.")


class SceneCountDocument(JsonDocument):
    """What a zone or line counted of a label in an hour or a day."""

    start: Moment = Field(description="When the hour or UTC day begins.")
    zone: str = _absent("The name of the zone.")
    line: str = _absent("The name of the line.")
    label: str = Field(description="What was counted.")
    entered: Count = _absent("Of a zone.")
    left: Count = _absent("Of a zone.")
    lost: Count = _absent("Of a zone.")
    crossed: dict[LineTotal, Count] = _absent("Of a line, by direction.")


class SceneCountsDocument(JsonDocument):
    """The counts of a camera."""

    camera: str = Field(description="Its name.")
    by: Literal["hour", "day"] = Field(description="Days are those of UTC.")
    from_: Moment = Field(alias="from", description="The begin of the hour or UTC day.")
    to: Moment = Field(description="The end; hours that begin later do not count.")
    counts: list[SceneCountDocument] = Field(description="By time; what counted nothing is absent.")


class _MessageDocument(_ClosedDocument):
    device: str = Field(description="The device id in IoT Hub; outside IoT Edge the name of the host.")
    module: str = Field(description="The module id in IoT Hub; outside IoT Edge 'vision'.")
    message_sequence: Count = Field(description="Counts the messages of an output without a gap.")


class BatchDocument(_MessageDocument):
    """The body of a message of the output `detections`."""

    schema_: Literal["visionedge/batch/1"] = Field(alias="schema")
    frames: list[FrameDocument] = Field(description="Frame objects.")


class EventDocument(_MessageDocument):
    """The body of a message of the output `events`."""

    schema_: Literal["visionedge/event/1"] = Field(alias="schema")
    at: Moment = Field(description="When it happened, UTC.")
    kind: EventKind = Field(description="engine, camera, model, storage or module.")
    code: str = Field(description="What happened; docs/messages.md lists the codes.")
    message: str = Field(description="For people: one line, secrets masked.")
    details: dict[str, Any] = Field(description="More for programs, by code.")


# --- doctor -------------------------------------------------------------------------------------------------


class RemedyDocument(JsonDocument):
    """What to do."""

    instruction: str
    lines: list[str] = Field(description="To be typed or copied.")


class FindingDocument(JsonDocument):
    """The result of one check."""

    name: str = Field(pattern="^[a-z-]+$")
    title: str
    state: Literal["ok", "info", "warning", "broken", "skipped"]
    found: str
    remedies: list[RemedyDocument]


class DoctorDeviceDocument(JsonDocument):
    """The device that this machine offers."""

    requested: RequestedDevice
    effective: EffectiveDevice
    reason_code: ReasonCode
    reason: str


class DoctorEnvironmentDocument(JsonDocument):
    """What surrounds the process."""

    container: bool
    iot_edge: Literal["no", "edge", "simulator", "half"]
    kernel: Literal["eflow", "wsl", "hyper-v", "linux"]
    release: str = Field(description="Of the kernel.")
    passthrough: Literal["dda", "gpu-pv", "native", "intel", "none"] = Field(
        description="How a GPU gets into the virtual machine."
    )


class DoctorDocument(JsonDocument):
    """What this machine offers, and the first broken check of the chain to the GPU."""

    schema_: Literal["visionedge/doctor/1"] = Field(alias="schema")
    version: str
    build: str = Field(description="Version, revision and time of the build.")
    at: Moment
    system: str
    fulfilled: bool = Field(description="The machine does what is requested of it.")
    device: DoctorDeviceDocument
    environment: DoctorEnvironmentDocument
    first_broken: str | None = Field(description="The name of the first broken check of the chain.")
    chain: list[FindingDocument] = Field(description="The checks up to the GPU, in their order.")
    system_checks: list[FindingDocument]


DOCUMENTS: tuple[type[JsonDocument], ...] = (
    ErrorDocument,
    ProtocolErrorDocument,
    HealthDocument,
    ReadinessDocument,
    BuildDocument,
    StatusDocument,
    CamerasDocument,
    FrameDocument,
    SceneDocument,
    SceneEventsDocument,
    SceneCountsDocument,
    BatchDocument,
    EventDocument,
    EngineEventDocument,
    DoctorDocument,
)
"""The documents that leave the process; the models inside them follow from these."""
