"""What the module says of itself: the documents of status and cameras, and the samples of the metrics.

Pure readings of the rooms' own statistics; nothing is counted here.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NamedTuple

from visionedge import __version__
from visionedge.app import load_meter
from visionedge.app.overload_policy import DEGRADATION_LEVELS, describe_device, describe_overload
from visionedge.app.state import AppState
from visionedge.camera.camera import CameraStatus
from visionedge.engine.batcher import CameraStatistics
from visionedge.engine.interface import EngineInfo, RecoveryStatistics
from visionedge.frames.types import format_utc, utc_now
from visionedge.iothub.delivery import Delivery
from visionedge.outbound.metering import MeteredUsage
from visionedge.runtime.redaction import mask_address
from visionedge.web.backend import ModelMetadata
from visionedge.web.latest_results import CameraTraffic

Document = dict[str, Any]


def build_status(state: AppState) -> Document:
    """The `Status` object of HTTP."""
    reasons = state.readiness()
    loaded_model, info = state.loaded_model, state.engine_info()
    return {
        "version": __version__,
        "uptimeSeconds": round(_uptime_s(state), 3),
        "ready": not reasons,
        "reasons": reasons,
        "engine": build_engine(info) if info else _build_missing_engine(state),
        "model": None
        if loaded_model is None
        else {
            "name": loaded_model.name,
            "sha256": loaded_model.sha256,
            "head": loaded_model.head,
            "classes": len(loaded_model.labels),
            "inputWidth": loaded_model.input.width_px,
            "inputHeight": loaded_model.input.height_px,
        },
        "fetching": state.fetch_progress,
        "cameras": build_cameras(state),
        "capacity": build_capacity(state),
        "hub": build_hub(state.delivery) | _build_inbound(state),
    }


def build_capacity(state: AppState) -> Document | None:
    """What is delivered of what is asked, what limits that, and what is given up for it."""
    seen, overload_status = state.meter.measurement, state.overload_status
    if seen is None:
        return None
    document = load_meter.build_load_document(seen)
    if overload_status.taken_levels or overload_status.exhausted:
        info = state.engine_info()
        device = describe_device(info.device.effective) if info else "the engine"
        document["sentence"] = describe_overload(seen, overload_status, device)
    return {**document, "overload": overload_status.document()}


def build_engine(running: EngineInfo) -> Document:
    """Where frames are computed, where they were asked to be, and why."""
    device, plan = running.device, running.plan
    return {
        "requested": device.requested,
        "effective": device.effective,
        "degraded": device.degraded,
        "reasonCode": device.code,
        "reason": device.reason,
        "since": format_utc(device.since_utc),
        "plan": {
            "lanes": plan.lanes,
            "buckets": list(plan.buckets),
            "reason": plan.reason,
            "measured": plan.measured.document() if plan.measured else None,
        },
        "precision": running.precision.document(),
        "nodesOnCpu": list(running.node_placement.on_cpu),
        "notes": list(running.notes),
        "unplannedShapes": running.unplanned_shapes,
        "process": asdict(running.process) if running.process else None,
        "parity": [parity_result.document() for parity_result in running.device_check.parity_results],
        "speedCheck": running.device_check.speed_check.document(device.effective)
        if running.device_check.speed_check
        else None,
        "recovery": _build_recovery(running.recovery) if running.recovery else None,
    }


_EVENT_REASON_CHARACTERS = 500


def build_engine_event(running: EngineInfo) -> Document:
    """What the cloud needs of `engine` with an event: what is used, and why. The tables stay in status."""
    seen = build_engine(running)
    recovery = seen["recovery"] or {}
    return {
        **{key: seen[key] for key in ("requested", "effective", "degraded", "reasonCode", "since")},
        "reason": shorten(seen["reason"]),
        "precision": seen["precision"]["precision"],
        "recoveryStage": recovery.get("stage"),
    }


def shorten(text: str) -> str:
    """A sentence in the length of an event: what libraries report can be pages."""
    return text if len(text) <= _EVENT_REASON_CHARACTERS else f"{text[: _EVENT_REASON_CHARACTERS - 1]}…"


def _build_recovery(seen: RecoveryStatistics) -> Document:
    """Where the way back of a device stands, and what happened so far."""
    recovery_state = seen.recovery_state
    return {
        "stage": recovery_state.stage,
        "failedAttempts": recovery_state.failed_attempts,
        "reasonCode": recovery_state.reason.code if recovery_state.reason else None,
        "reason": recovery_state.reason.reason if recovery_state.reason else None,
        "nextTrySeconds": _remaining_s(recovery_state.retry_at_s),
        "changeOvers": seen.device_recoveries,
        "faults": dict(seen.faults),
        "probes": dict(seen.probes),
    }


def _remaining_s(at_s: float | None) -> float | None:
    return None if at_s is None else round(max(0.0, at_s - time.monotonic()), 1)


def _build_missing_engine(state: AppState) -> Document:
    return {
        "requested": state.config.inference.device,
        "effective": None,
        "reasonCode": "warming-up",
        "reason": state.fetch_progress or state.waiting_reason or "the engine is warming up",
    }


def build_cameras(state: AppState) -> list[Document]:
    """One `Camera` object per configured camera."""
    counted = _CameraCounters(state.batcher.statistics().cameras, state.latest_results.statistics().cameras)
    return [_build_camera(state, name, counted) for name in state.config.cameras]


def build_camera(state: AppState, name: str) -> Document | None:
    """One of them; None where no camera is configured under this name."""
    if name not in state.config.cameras:
        return None
    return _build_camera(
        state,
        name,
        _CameraCounters(state.batcher.statistics().cameras, state.latest_results.statistics().cameras),
    )


class _CameraCounters(NamedTuple):
    """What was counted of all cameras: a snapshot is taken once for as many as are told of."""

    slots: Mapping[str, CameraStatistics]
    traffic: Mapping[str, CameraTraffic]


def _build_camera(state: AppState, name: str, counted: _CameraCounters) -> Document:
    configured = state.config.cameras[name]
    worker = state.running_cameras.get(name)
    slot, traffic = counted.slots.get(name), counted.traffic.get(name)
    document: Document = {
        "name": name,
        "uri": mask_address(configured.uri),
        "enabled": configured.enabled,
        "state": "waiting" if configured.enabled and state.camera_registry is None else "disabled",
        "epoch": 0,
        "framesRead": 0,
        "framesAnalysed": slot.analysed if slot else 0,
        "dropped": dict(slot.dropped) if slot else {},
        "fps": round(traffic.fps, 2) if traffic else 0.0,
        "ageMs": round(traffic.age_ns / 1e6, 1) if traffic else None,
        "lastError": None,
        "nextTrySeconds": None,
    }
    if worker is not None:
        seen = worker.status()
        document |= {
            "state": seen.state,
            "since": format_utc(
                utc_now() - timedelta(microseconds=(time.monotonic_ns() - seen.since_ns) / 1e3)
            ),
            "epoch": seen.epoch,
            "framesRead": seen.frames_read,
            "sourceFps": round(seen.fps, 2),
            "lastError": seen.last_error,
            "nextTrySeconds": None if seen.next_try_s is None else round(seen.next_try_s, 1),
            "width": seen.width or None,
            "height": seen.height or None,
            "decoder": seen.decoder,
        }
    throttle = state.overload_status.throttles.get(name)
    document["throttle"] = None if throttle is None else {
        "fps": throttle.fps, "gate": throttle.gate is not None
    }  # fmt: skip
    latest = state.latest_results.latest(name)
    document["sequence"] = latest.frame.sequence if latest else None
    return document


def build_hub(delivery: Delivery | None) -> Document:
    """What goes to IoT Hub, and whether it arrives."""
    if delivery is None:
        return {"state": "starting"}
    seen = delivery.status()
    published, client, messages_file = seen.telemetry, seen.hub, seen.messages_file
    document: Document = {"state": "local", "device": seen.device, "module": seen.module}
    if client is not None:
        document |= {
            "state": client.state,
            "connected": client.connected,
            "sent": client.sent,
            "waiting": client.queued,
            "dropped": dict(client.dropped),
            "lastError": client.last_error,
            "rebuilds": client.rebuilds,
            "abandonedCalls": client.abandoned,
            "faults": dict(client.faults),
        }
    if seen.spool is not None:
        document["spool"] = {
            "mode": seen.spool.mode,
            "reason": seen.spool.reason,
            "waiting": seen.spool.waiting,
            "waitingBytes": seen.spool.waiting_bytes,
            "dropped": dict(seen.spool.dropped),
        }
    document["telemetry"] = {
        "framesOffered": published.offered,
        "framesPublished": published.published,
        "framesUnchanged": published.unchanged,
        "framesDropped": dict(published.dropped),
        "messages": dict(published.messages),
        "leftToday": published.left_today,
    }
    document["metering"] = build_metering(published.usage)
    if messages_file is not None:
        document["messagesFile"] = {"written": messages_file.written, "lastError": messages_file.last_error}
    return document


def _build_inbound(state: AppState) -> Document:
    """What the cloud and other modules have asked for; nothing outside IoT Edge, where nobody can."""
    if state.inbound_statistics is None or state.delivery is None or not state.delivery.inside_edge:
        return {}
    seen = state.inbound_statistics()
    return {
        "config": dict(seen.config),
        "configurations": dict(seen.configurations),
        "reportedPatches": seen.patches,
        "methodCalls": sum(seen.methods.values()),
        "inputPictures": {"answered": seen.pictures_answered, "dropped": dict(seen.pictures_dropped)},
    }


def build_metering(counted: MeteredUsage) -> Document:
    """Messages as IoT Hub meters them, and which part of a unit's day the last hour would come to."""
    return {
        "messages": dict(counted.messages),
        "blocks": dict(counted.blocks),
        "blockFill": round(counted.fill_ratio, 3),
        "blocksPerDay": round(counted.blocks_per_day),
        "blocksPerDayByOutput": {output: round(count) for output, count in counted.per_day.items()},
        "projectedFromSeconds": round(counted.span_s),
        "unitShare": {tier: round(share, 5) for tier, share in counted.shares.items()},
    }


def describe_camera(seen: CameraStatus) -> str:
    """One line about a camera's new state, for people who read events."""
    because = f": {seen.last_error}" if seen.last_error and seen.state != "live" else ""
    return f"camera {seen.name} is {seen.state}{because}"


def build_model_facts(running: EngineInfo, max_batch: int) -> ModelMetadata:
    """What a client of the Open Inference Protocol must know.

    `max_batch` is the configured one, whatever the plan is: clients must not break when the device changes.
    """
    model = running.model
    return ModelMetadata(model.name, model.sha256, model.input, running.max_rows, max_batch, model.labels)


def collect_samples(state: AppState) -> Iterable[tuple[str, tuple[str, ...], float]]:
    """The scraped metrics (`metrics.DECLARED`), read off the rooms."""
    model = state.loaded_model.name if state.loaded_model else ""
    yield "info", (__version__, model), 1
    yield "uptime_seconds", (), _uptime_s(state)
    yield "ready", (), float(not state.readiness())
    yield "result_queue_dropped_total", (), state.loop_queue.dropped
    if (info := state.engine_info()) is not None:
        device = info.device
        yield "engine_device", (device.requested, device.effective, device.code), 1
        yield "engine_info", (info.model.name, device.effective, info.precision.precision), 1
        yield "engine_degraded", (), float(device.degraded)
        yield "unplanned_shape_total", (), info.unplanned_shapes
        yield "nodes_on_cpu", (), len(info.node_placement.on_cpu)
        if info.process is not None:
            yield "engine_restarts_total", (), info.process.restarts
        if info.recovery is not None:
            yield from _recovery_samples(info.recovery)
    if state.frame_pool is not None:
        yield "pictures_copied_total", (), state.frame_pool.exhausted_count
    for name, slot in state.batcher.statistics().cameras.items():
        yield "frames_offered_total", (name,), slot.offered
        yield "frames_analysed_total", (name,), slot.analysed
        yield "frames_waiting", (name,), slot.waiting + slot.in_flight
        for reason, count in slot.dropped.items():
            yield "frames_dropped_total", (name, reason), count
    yield from _camera_samples(state)
    yield from _capacity_samples(state)
    yield from _overload_samples(state)
    yield from _hub_samples(state)
    yield from _inbound_samples(state)


def _recovery_samples(seen: RecoveryStatistics) -> Iterable[tuple[str, tuple[str, ...], float]]:
    yield "engine_recovering", (), float(seen.recovery_state.stage != "settled")
    yield "engine_change_overs_total", (), seen.device_recoveries
    for fault, count in seen.faults.items():
        yield "engine_faults_total", (fault,), count
    for code, count in seen.probes.items():
        yield "engine_probes_total", (code,), count


def _camera_samples(state: AppState) -> Iterable[tuple[str, tuple[str, ...], float]]:
    for name, worker in state.running_cameras.items():
        seen = worker.status()
        yield "camera_state", (name, seen.state), 1
        yield "camera_epoch", (name,), seen.epoch
        yield "camera_frames_read_total", (name,), seen.frames_read
        if seen.age_ms is not None:
            yield "camera_frame_age_seconds", (name,), seen.age_ms / 1000


def _capacity_samples(state: AppState) -> Iterable[tuple[str, tuple[str, ...], float]]:
    seen = state.meter.measurement
    if seen is None:
        return
    for name, camera in seen.cameras.items():
        yield "demanded_frames_per_second", (name,), camera.demanded
        yield "admitted_frames_per_second", (name,), camera.admitted
        yield "delivered_frames_per_second", (name,), camera.delivered
    for purpose, cores in load_meter.cores_by_purpose(seen).items():
        yield "cores_used", (purpose,), cores
    yield "bottleneck", (load_meter.find_bottleneck(seen).bottleneck,), 1


def _overload_samples(state: AppState) -> Iterable[tuple[str, tuple[str, ...], float]]:
    overload_status = state.overload_status
    taken_levels = {each.level for each in overload_status.taken_levels}
    yield "overload_exhausted", (), float(overload_status.exhausted)
    for (level, direction), count in overload_status.steps.items():
        yield "overload_steps_total", (level, direction), count
    for level in DEGRADATION_LEVELS:
        yield "overload_level", (level,), float(level in taken_levels)
    for name, throttle in overload_status.throttles.items():
        if throttle.fps is not None:
            yield "camera_fps_limit", (name,), throttle.fps


def _hub_samples(state: AppState) -> Iterable[tuple[str, tuple[str, ...], float]]:
    if state.delivery is None:
        return
    seen = state.delivery.status()
    for output, count in seen.telemetry.messages.items():
        yield "messages_total", (output,), count
    for output, count in seen.telemetry.usage.blocks.items():
        yield "message_blocks_total", (output,), count
    for tier, share in seen.telemetry.usage.shares.items():
        yield "hub_unit_share", (tier,), share
    for reason, count in seen.telemetry.dropped.items():
        yield "telemetry_frames_dropped_total", (reason,), count
    if seen.hub is not None:
        yield "hub_connected", (), float(seen.hub.connected)
        yield "hub_messages_sent_total", (), seen.hub.sent
        yield "hub_messages_waiting", (), seen.hub.queued
        for reason, count in seen.hub.dropped.items():
            yield "hub_messages_dropped_total", (reason,), count
        for level, count in seen.hub.faults.items():
            yield "hub_faults_total", (level,), count
    if seen.spool is not None:
        yield "spool_bytes", (), seen.spool.waiting_bytes
        yield "spool_on_disk", (), float(seen.spool.mode == "disk")


def _inbound_samples(state: AppState) -> Iterable[tuple[str, tuple[str, ...], float]]:
    if state.inbound_statistics is None:
        return
    seen = state.inbound_statistics()
    for outcome, count in seen.configurations.items():
        yield "twin_configurations_total", (outcome,), count
    yield "twin_patches_total", (), seen.patches
    for (method, status_code), count in seen.methods.items():
        yield "method_calls_total", (method, str(status_code)), count
    yield "method_calls_dropped_total", (), seen.calls_dropped
    yield "input_pictures_answered_total", (), seen.pictures_answered
    for reason, count in seen.pictures_dropped.items():
        yield "input_pictures_dropped_total", (reason,), count


def _uptime_s(state: AppState) -> float:
    return (time.monotonic_ns() - state.started_ns) / 1e9
