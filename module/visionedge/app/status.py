"""The documents of status and cameras, and the texts and details of events.

Everything is read from the statistics of the parts; nothing is counted here. The documents are built as the
models of `web.documents` and returned as plain dicts.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from visionedge import __version__
from visionedge.app.load_meter import LoadMeasurement, cores_by_purpose, find_bottleneck
from visionedge.app.overload_policy import OverloadStatus, describe_device, describe_overload
from visionedge.app.state import SceneStatistics, StateSnapshot
from visionedge.camera.camera import CameraStatus
from visionedge.config.documents import Document
from visionedge.config.schema import HttpConfig
from visionedge.engine.batcher import CameraStatistics
from visionedge.engine.device.devices import DeviceState
from visionedge.engine.device.remote import describe_destination
from visionedge.engine.interface import EngineInfo, RecoveryStatistics
from visionedge.engine.plan import Plan
from visionedge.frames.types import DEFAULT_MODEL, format_utc, utc_now
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.telemetry import TelemetryStatistics
from visionedge.model.model import Model
from visionedge.outbound.metering import MeteredUsage
from visionedge.runtime.build_identity import read_build_identity
from visionedge.runtime.redaction import mask_address
from visionedge.web.backend import ModelMetadata
from visionedge.web.documents import (
    BuildDocument,
    CameraDocument,
    CameraLoadDocument,
    CapacityDocument,
    EngineCandidateDocument,
    EngineDocument,
    EngineEventDocument,
    EngineProcessDocument,
    HttpDocument,
    HubDocument,
    InputPicturesDocument,
    LoadedModelDocument,
    MessagesFileDocument,
    MeteringDocument,
    OverloadDocument,
    OverloadLevelDocument,
    ParityDocument,
    PlanDocument,
    PlanMeasurementDocument,
    PrecisionDocument,
    RecoveryDocument,
    RemoteDocument,
    ReplicaDocument,
    ScenesDocument,
    SceneStorageDocument,
    SceneSummaryDocument,
    SpeedCheckDocument,
    SpoolDocument,
    StatusDocument,
    TelemetryDocument,
    ThrottleDocument,
)
from visionedge.web.latest_results import CameraTraffic

_EVENT_REASON_CHARACTERS = 500


def build_status(state: StateSnapshot) -> Document:
    """`StatusDocument`: the whole module."""
    reasons, counters = state.readiness(), _CameraCounters.read(state)
    return StatusDocument(
        version=__version__,
        build=build_identity_document(),
        uptime_seconds=round(uptime_s(state), 3),
        ready=not reasons,
        reasons=reasons,
        engine=_engine_of(state, DEFAULT_MODEL),
        model=_model(state.loaded_model) if state.loaded_model else None,
        models=_named_models(state),
        fetching=state.fetch_progress,
        cameras=[_camera(state, name, counters) for name in state.config.cameras],
        scenes=_scenes(state.read_scenes()),
        capacity=build_capacity(state),
        hub=_hub(state),
        http=HttpDocument(access=_http_access(state.config.http)),
        newer_state=_newer_state(state),
    ).dump()


def _newer_state(state: StateSnapshot) -> list[str]:
    spool = None if state.delivery is None else state.delivery.status().spool
    databases = (spool, state.read_scenes().storage)
    newer = [each.newer for each in databases if each is not None and each.newer is not None]
    return [*state.newer_state, *newer]


def build_identity_document() -> BuildDocument:
    """`BuildDocument`: which build runs."""
    build = read_build_identity()
    return BuildDocument(text=str(build), revision=build.revision, built_at=build.built_at)


def _http_access(http: HttpConfig) -> Literal["local", "token", "anonymous"]:
    if http.is_open:
        return "anonymous"
    return "token" if http.token is not None or http.lacks_token else "local"


def build_cameras(state: StateSnapshot) -> list[Document]:
    """`CameraDocument` of each configured camera, in the order of the configuration."""
    counters = _CameraCounters.read(state)
    return [_camera(state, name, counters).dump() for name in state.config.cameras]


def build_camera(state: StateSnapshot, name: str) -> Document | None:
    """`CameraDocument` of one camera; None where no camera is configured under this name."""
    if name not in state.config.cameras:
        return None
    return _camera(state, name, _CameraCounters.read(state)).dump()


def build_engine_event(info: EngineInfo, model: str = DEFAULT_MODEL) -> Document:
    """`EngineEventDocument`: the details of an event about the engine of a model. Tables stay in status."""
    name: Document = {"model": model} if model else {}
    return EngineEventDocument(
        **_device_keys(info.device) | {"reason": shorten(info.device.reason)},
        runtime=info.runtime,
        precision=info.choice.precision,
        recovery_stage=info.recovery.recovery_state.stage if info.recovery else None,
        **name,
    ).dump()


def shorten(text: str) -> str:
    """A text cut to the length that an event may have: libraries report errors of several pages."""
    return text if len(text) <= _EVENT_REASON_CHARACTERS else f"{text[: _EVENT_REASON_CHARACTERS - 1]}…"


def describe_camera(camera: CameraStatus) -> str:
    """The message of an event about a camera's new state."""
    because = f": {camera.last_error}" if camera.last_error and camera.state != "live" else ""
    return f"camera {camera.name} is {camera.state}{because}"


def build_model_metadata(info: EngineInfo, max_batch: int) -> ModelMetadata:
    """What a client of the Open Inference Protocol has to know of the model.

    `max_batch` is the configured one, not the plan's: clients must not break when the device changes.
    """
    model = info.model
    return ModelMetadata(
        model.name, model.original_sha256, model.input, info.max_rows, max_batch, model.labels
    )


def uptime_s(state: StateSnapshot) -> float:
    """The time since the module started."""
    return (time.monotonic_ns() - state.started_ns) / 1e9


# --- the engine ---------------------------------------------------------------------------------------------


def _device_keys(device: DeviceState) -> Document:
    """The keys that say which device computes, and why: the same in status and in events."""
    return {
        "requested": device.requested,
        "effective": device.effective,
        "degraded": device.degraded,
        "reason_code": device.code,
        "reason": device.reason,
        "since": format_utc(device.since_utc),
    }


def _engine_of(state: StateSnapshot, model: str) -> EngineDocument:
    if (info := state.engine_info(model)) is not None:
        return _engine(info)
    return EngineDocument(
        requested=state.config.inference.device,
        effective=None,
        reason_code="warming-up",
        reason=state.no_engine_reason,
    )


def _engine(info: EngineInfo) -> EngineDocument:
    check, speed = info.device_check, info.device_check.speed_check
    return EngineDocument(
        **_device_keys(info.device),
        plan=_plan(info.plan),
        precision=PrecisionDocument.model_validate(info.choice.precision_document()),
        runtime=info.runtime,
        candidates=[
            EngineCandidateDocument.model_validate(figures.document()) for figures in info.choice.results
        ],
        nodes_on_cpu=list(info.node_placement.on_cpu),
        notes=list(info.notes),
        unplanned_shapes=info.unplanned_shapes,
        process=EngineProcessDocument.of(info.process) if info.process else None,
        parity=[ParityDocument.model_validate(result.document()) for result in check.parity_results],
        speed_check=SpeedCheckDocument.model_validate(speed.document(info.device.effective))
        if speed
        else None,
        recovery=_recovery(info.recovery) if info.recovery else None,
        remote=_remote(info) if info.device.requested == "remote" else None,
    )


def _remote(info: EngineInfo) -> RemoteDocument:
    sentence = "no picture leaves this device: the CPU computes"
    if info.device.effective == "remote":
        sentence = describe_destination(info.replicas)
    replicas = [ReplicaDocument.model_validate(each, from_attributes=True) for each in info.replicas]
    return RemoteDocument(sentence=sentence, replicas=replicas)


def _plan(plan: Plan) -> PlanDocument:
    measured = plan.measured
    return PlanDocument(
        lanes=plan.lanes,
        buckets=list(plan.buckets),
        reason=plan.reason,
        measured=PlanMeasurementDocument.model_validate(measured.document()) if measured else None,
    )


def _remaining_s(at_s: float | None) -> float | None:
    return None if at_s is None else round(max(0.0, at_s - time.monotonic()), 1)


def _recovery(statistics: RecoveryStatistics) -> RecoveryDocument:
    state = statistics.recovery_state
    return RecoveryDocument(
        stage=state.stage,
        failed_attempts=state.failed_attempts,
        reason_code=state.reason.code if state.reason else None,
        reason=state.reason.reason if state.reason else None,
        next_try_seconds=_remaining_s(state.retry_at_s),
        change_overs=statistics.device_recoveries,
        faults=dict(statistics.faults),
        probes=dict(statistics.probes),
    )


def _model(model: Model) -> LoadedModelDocument:
    return LoadedModelDocument(
        name=model.name,
        sha256=model.sha256,
        head=model.head,
        classes=len(model.labels),
        input_width=model.input.width_px,
        input_height=model.input.height_px,
    )


def _named_models(state: StateSnapshot) -> dict[str, LoadedModelDocument]:
    found = {}
    for name, loaded in state.models.items():
        if name:
            found[name] = _model(loaded.model)
            found[name].engine = _engine_of(state, name)
    return found


# --- cameras and capacity -----------------------------------------------------------------------------------


class _CameraCounters(NamedTuple):
    """The counters of all cameras: one snapshot for all documents that are built together."""

    slots: Mapping[str, CameraStatistics]
    traffic: Mapping[str, CameraTraffic]

    @staticmethod
    def read(state: StateSnapshot) -> "_CameraCounters":
        return _CameraCounters(state.batcher.statistics().cameras, state.latest_results.statistics().cameras)


def _camera(state: StateSnapshot, name: str, counters: _CameraCounters) -> CameraDocument:
    configured, slot, traffic = (
        state.config.cameras[name],
        counters.slots.get(name),
        counters.traffic.get(name),
    )
    throttle, latest = state.overload_status.throttles.get(name), state.latest_results.latest(name)
    zones, lines = (configured.zones, configured.lines) if configured.is_tracked else ({}, {})
    document = CameraDocument(
        name=name,
        uri=mask_address(configured.uri),
        enabled=configured.enabled,
        state="waiting" if configured.enabled and _waits_for_model(state, name) else "disabled",
        epoch=0,
        frames_read=0,
        frames_analysed=slot.analysed if slot else 0,
        dropped={str(reason): count for reason, count in slot.dropped.items()} if slot else {},
        fps=round(traffic.fps, 2) if traffic else 0.0,
        age_ms=round(traffic.age_ns / 1e6, 1) if traffic else None,
        last_error=None,
        next_try_seconds=None,
        throttle=ThrottleDocument(fps=throttle.fps, gate=throttle.gate is not None) if throttle else None,
        sequence=latest.frame.sequence if latest else None,
        zones={each: _points(zone.polygon) for each, zone in zones.items()},
        lines={each: _points((line.start, line.end)) for each, line in lines.items()},
    )
    if configured.model is not None:
        document.model = configured.model
    camera = state.running_cameras.get(name)
    if camera is not None:
        _add_camera_status(document, camera.status())
    return document


def _waits_for_model(state: StateSnapshot, camera: str) -> bool:
    return state.camera_registry is None or state.camera_registry.waits_for_model(camera)


def _points(points: Iterable[Sequence[float]]) -> list[list[float]]:
    return [list(point) for point in points]


def _add_camera_status(document: CameraDocument, status: CameraStatus) -> None:
    """What is known of a camera that runs."""
    age = timedelta(microseconds=(time.monotonic_ns() - status.since_ns) / 1e3)
    document.state = status.state
    document.since = format_utc(utc_now() - age)
    document.epoch = status.epoch
    document.frames_read = status.frames_read
    document.source_fps = round(status.fps, 2)
    document.last_error = status.last_error
    document.next_try_seconds = _round_or_none(status.next_try_s)
    document.width = status.width or None
    document.height = status.height or None
    document.decoder = status.decoder


def _scenes(statistics: SceneStatistics) -> ScenesDocument:
    storage = statistics.storage
    return ScenesDocument(
        storage=None if storage is None else SceneStorageDocument.of(storage),
        cameras={name: summarize_scene(scene) for name, scene in statistics.cameras.items()},
    )


def summarize_scene(scene: Mapping[str, Any]) -> SceneSummaryDocument:
    """A scene with its totals over all labels."""

    def add_up(rule: Mapping[str, Any]) -> dict[str, int]:
        return {total: sum(by_label.values()) for total, by_label in rule.items() if total != "since"}

    return SceneSummaryDocument(
        tracks=len(scene["tracks"]),
        zones={name: add_up(zone) for name, zone in scene["zones"].items()},
        lines={name: add_up(line) for name, line in scene["lines"].items()},
    )


def build_capacity(state: StateSnapshot) -> CapacityDocument | None:
    """The object `capacity` of status; None before the load was measured."""
    load, overload = state.meter.measurement, state.overload_status
    if load is None:
        return None
    verdict = find_bottleneck(load)
    sentence = verdict.sentence
    if overload.taken_levels or overload.exhausted:
        info = state.engine_info()
        device = describe_device(info.device.effective) if info else "the engine"
        sentence = describe_overload(load, overload, device)
    return CapacityDocument(
        window_seconds=round(load.seconds, 1),
        demanded_per_second=round(load.demanded, 2),
        admitted_per_second=round(load.admitted, 2),
        delivered_per_second=round(load.delivered, 2),
        cores=load.cores,
        cpu_quota=None if load.quota is None else round(load.quota, 3),
        cores_used={purpose: round(cores, 3) for purpose, cores in cores_by_purpose(load).items()},
        bottleneck=verdict.bottleneck,
        sentence=sentence,
        cameras=_camera_loads(load),
        overload=_overload(overload),
    )


def _camera_loads(load: LoadMeasurement) -> dict[str, CameraLoadDocument]:
    return {
        name: CameraLoadDocument(
            demanded_per_second=round(camera.demanded, 2),
            admitted_per_second=round(camera.admitted, 2),
            delivered_per_second=round(camera.delivered, 2),
            decode_cores=round(camera.decode_cores, 3),
        )
        for name, camera in load.cameras.items()
    }


def _overload(overload: OverloadStatus) -> OverloadDocument:
    taken = overload.taken_levels
    return OverloadDocument(
        active=overload.may_act,
        exhausted=overload.exhausted,
        since=format_utc(min(each.since_utc for each in taken)) if taken else None,
        levels=[
            OverloadLevelDocument(level=each.level, since=format_utc(each.since_utc), what=each.text)
            for each in taken
        ],
    )


# --- IoT Hub ------------------------------------------------------------------------------------------------


def _hub(state: StateSnapshot) -> HubDocument:
    if state.delivery is None:
        return HubDocument(state="starting")
    status = state.delivery.status()
    document = HubDocument(state="local") if status.hub is None else HubDocument.of(status.hub)
    document.device, document.module = status.device, status.module
    if status.spool is not None:
        document.spool = SpoolDocument.of(status.spool)
    document.telemetry = _telemetry(status.telemetry)
    document.metering = build_metering(status.telemetry.usage)
    if status.messages_file is not None:
        document.messages_file = MessagesFileDocument.of(status.messages_file)
    _add_inbound(document, state, state.delivery)
    return document


def _telemetry(telemetry: TelemetryStatistics) -> TelemetryDocument:
    return TelemetryDocument(
        frames_offered=telemetry.offered,
        frames_published=telemetry.published,
        frames_unchanged=telemetry.unchanged,
        frames_dropped=dict(telemetry.dropped),
        messages=dict(telemetry.messages),
        left_today=telemetry.left_today,
    )


def build_metering(usage: MeteredUsage) -> MeteringDocument:
    """The object `hub.metering` of status."""
    return MeteringDocument(
        messages=dict(usage.messages),
        blocks=dict(usage.blocks),
        block_fill=round(usage.fill_ratio, 3),
        blocks_per_day=round(usage.blocks_per_day),
        blocks_per_day_by_output={output: round(blocks) for output, blocks in usage.per_day.items()},
        projected_from_seconds=round(usage.span_s),
        unit_share={tier: round(share, 5) for tier, share in usage.shares.items()},
    )


def _add_inbound(document: HubDocument, state: StateSnapshot, delivery: Delivery) -> None:
    """What the cloud and other modules sent: only inside IoT Edge."""
    if state.inbound_statistics is None or not delivery.inside_edge:
        return
    statistics = state.inbound_statistics()
    document.config = dict(statistics.config)
    document.configurations = dict(statistics.configurations)
    document.reported_patches = statistics.patches
    document.method_calls = sum(statistics.methods.values())
    document.input_pictures = InputPicturesDocument(
        answered=statistics.pictures_answered, dropped=dict(statistics.pictures_dropped)
    )


def _round_or_none(seconds: float | None) -> float | None:
    """To a tenth of a second."""
    return None if seconds is None else round(seconds, 1)
