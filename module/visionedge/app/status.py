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
from visionedge.app.overload_policy import RUNGS, device_in_words, sentence
from visionedge.app.state import Rooms
from visionedge.camera.camera import CameraStatus
from visionedge.engine.batcher import CameraStatistics
from visionedge.engine.interface import AnyEngine, Recovery
from visionedge.frames.types import utc_now, utc_text
from visionedge.iothub.delivery import Delivery
from visionedge.outbound.metering import Bill
from visionedge.runtime.redaction import masked_address
from visionedge.web.backend import ModelFacts
from visionedge.web.results import CameraTraffic

Document = dict[str, Any]


def status(rooms: Rooms) -> Document:
    """The `Status` object of HTTP."""
    reasons = rooms.readiness()
    loaded = rooms.loaded
    return {
        "version": __version__,
        "uptimeSeconds": round(_uptime_s(rooms), 3),
        "ready": not reasons,
        "reasons": reasons,
        "engine": engine(rooms.engine) if rooms.engine else _no_engine(rooms),
        "model": None
        if loaded is None
        else {
            "name": loaded.name,
            "sha256": loaded.sha256,
            "head": loaded.head,
            "classes": len(loaded.labels),
            "inputWidth": loaded.input.width_px,
            "inputHeight": loaded.input.height_px,
        },
        "fetching": rooms.fetching,
        "cameras": cameras(rooms),
        "capacity": load(rooms),
        "hub": hub(rooms.delivery) | _asked(rooms),
    }


def load(rooms: Rooms) -> Document | None:
    """What is delivered of what is asked, what limits that, and what is given up for it."""
    seen, promise = rooms.meter.reading, rooms.promise
    if seen is None:
        return None
    document = load_meter.document(seen)
    if promise.given_up or promise.at_the_end:
        device = device_in_words(rooms.engine.device.effective) if rooms.engine else "the engine"
        document["sentence"] = sentence(seen, promise, device)
    return {**document, "overload": promise.document()}


def engine(running: AnyEngine) -> Document:
    """Where frames are computed, where they were asked to be, and why."""
    device, plan = running.device, running.plan
    return {
        "requested": device.requested,
        "effective": device.effective,
        "degraded": device.degraded,
        "reasonCode": device.code,
        "reason": device.reason,
        "since": utc_text(device.since_utc),
        "plan": {
            "lanes": plan.lanes,
            "buckets": list(plan.buckets),
            "reason": plan.reason,
            "measured": plan.measured.document() if plan.measured else None,
        },
        "precision": running.precision.document(),
        "nodesOnCpu": list(running.places.on_cpu),
        "notes": list(running.notes),
        "unplannedShapes": running.unplanned_shapes,
        "process": asdict(running.process) if running.process else None,
        "parity": [likeness.document() for likeness in running.proof.likenesses],
        "pace": running.proof.pace.document(device.effective) if running.proof.pace else None,
        "recovery": _recovery(running.recovery) if running.recovery else None,
    }


_EVENT_REASON_CHARACTERS = 500


def engine_event(running: AnyEngine) -> Document:
    """What the cloud needs of `engine` with an event: what is used, and why. The tables stay in status."""
    seen = engine(running)
    recovery = seen["recovery"] or {}
    return {
        **{key: seen[key] for key in ("requested", "effective", "degraded", "reasonCode", "since")},
        "reason": shortened(seen["reason"]),
        "precision": seen["precision"]["precision"],
        "recoveryStage": recovery.get("stage"),
    }


def shortened(text: str) -> str:
    """A sentence in the length of an event: what libraries report can be pages."""
    return text if len(text) <= _EVENT_REASON_CHARACTERS else f"{text[: _EVENT_REASON_CHARACTERS - 1]}…"


def _recovery(seen: Recovery) -> Document:
    """Where the way back of a device stands, and what happened so far."""
    outlook = seen.outlook
    return {
        "stage": outlook.stage,
        "vainTries": outlook.vain,
        "reasonCode": outlook.reason.code if outlook.reason else None,
        "reason": outlook.reason.reason if outlook.reason else None,
        "nextTrySeconds": None if outlook.next_in_s is None else round(outlook.next_in_s, 1),
        "changeOvers": seen.change_overs,
        "faults": dict(seen.faults),
        "probes": dict(seen.probes),
    }


def _no_engine(rooms: Rooms) -> Document:
    return {
        "requested": rooms.config.inference.device,
        "effective": None,
        "reasonCode": "warming-up",
        "reason": rooms.fetching or rooms.held or "the engine is warming up",
    }


def cameras(rooms: Rooms) -> list[Document]:
    """One `Camera` object per configured camera."""
    counted = _Counted(rooms.batcher.statistics().cameras, rooms.board.statistics().cameras)
    return [_camera(rooms, name, counted) for name in rooms.config.cameras]


def camera(rooms: Rooms, name: str) -> Document | None:
    """One of them; None where no camera is configured under this name."""
    if name not in rooms.config.cameras:
        return None
    return _camera(
        rooms, name, _Counted(rooms.batcher.statistics().cameras, rooms.board.statistics().cameras)
    )


class _Counted(NamedTuple):
    """What was counted of all cameras: a snapshot is taken once for as many as are told of."""

    slots: Mapping[str, CameraStatistics]
    traffic: Mapping[str, CameraTraffic]


def _camera(rooms: Rooms, name: str, counted: _Counted) -> Document:
    configured = rooms.config.cameras[name]
    worker = rooms.cameras_by_name.get(name)
    slot, traffic = counted.slots.get(name), counted.traffic.get(name)
    document: Document = {
        "name": name,
        "uri": masked_address(configured.uri),
        "enabled": configured.enabled,
        "state": "waiting" if configured.enabled and rooms.fleet is None else "disabled",
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
            "since": utc_text(
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
    throttle = rooms.promise.throttles.get(name)
    document["throttle"] = None if throttle is None else {
        "fps": throttle.fps, "gate": throttle.gate is not None
    }  # fmt: skip
    latest = rooms.board.latest(name)
    document["sequence"] = latest.frame.sequence if latest else None
    return document


def hub(delivery: Delivery | None) -> Document:
    """What goes to IoT Hub, and whether it arrives."""
    if delivery is None:
        return {"state": "starting"}
    seen = delivery.status()
    told, client, journal = seen.telemetry, seen.hub, seen.journal
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
            "rungs": dict(client.rungs),
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
        "framesOffered": told.offered,
        "framesTold": told.told,
        "framesUnchanged": told.unchanged,
        "framesDropped": dict(told.dropped),
        "messages": dict(told.messages),
        "leftToday": told.left_today,
    }
    document["bill"] = bill(told.bill)
    if journal is not None:
        document["messagesFile"] = {"written": journal.written, "lastError": journal.last_error}
    return document


def _asked(rooms: Rooms) -> Document:
    """What the cloud and other modules have asked for; nothing outside IoT Edge, where nobody can."""
    if rooms.asked is None or rooms.delivery is None or not rooms.delivery.inside_edge:
        return {}
    seen = rooms.asked()
    return {
        "config": dict(seen.config),
        "configurations": dict(seen.wishes),
        "reportedPatches": seen.patches,
        "methodCalls": sum(seen.methods.values()),
        "inputPictures": {"answered": seen.pictures_answered, "dropped": dict(seen.pictures_dropped)},
    }


def bill(counted: Bill) -> Document:
    """Messages as IoT Hub meters them, and which part of a unit's day the last hour would come to."""
    return {
        "messages": dict(counted.messages),
        "blocks": dict(counted.blocks),
        "blockFill": round(counted.fill, 3),
        "blocksPerDay": round(counted.blocks_per_day),
        "blocksPerDayByOutput": {output: round(count) for output, count in counted.per_day.items()},
        "projectedFromSeconds": round(counted.span_s),
        "unitShare": {tier: round(share, 5) for tier, share in counted.shares.items()},
    }


def camera_sentence(seen: CameraStatus) -> str:
    """One line about a camera's new state, for people who read events."""
    because = f": {seen.last_error}" if seen.last_error and seen.state != "live" else ""
    return f"camera {seen.name} is {seen.state}{because}"


def model_facts(running: AnyEngine, max_batch: int) -> ModelFacts:
    """What a client of the Open Inference Protocol must know.

    `max_batch` is the configured one, whatever the plan is: clients must not break when the device changes.
    """
    model = running.model
    return ModelFacts(model.name, model.sha256, model.input, running.rows, max_batch, model.labels)


def samples(rooms: Rooms) -> Iterable[tuple[str, tuple[str, ...], float]]:
    """The scraped metrics (`metrics.DECLARED`), read off the rooms."""
    model = rooms.loaded.name if rooms.loaded else ""
    yield "info", (__version__, model), 1
    yield "uptime_seconds", (), _uptime_s(rooms)
    yield "ready", (), float(not rooms.readiness())
    yield "outbox_dropped_total", (), rooms.outbox.dropped
    if rooms.engine is not None:
        device = rooms.engine.device
        yield "engine_device", (device.requested, device.effective, device.code), 1
        yield "engine_info", (rooms.engine.model.name, device.effective, rooms.engine.precision.precision), 1
        yield "engine_degraded", (), float(device.degraded)
        yield "unplanned_shape_total", (), rooms.engine.unplanned_shapes
        yield "nodes_on_cpu", (), len(rooms.engine.places.on_cpu)
        if rooms.engine.process is not None:
            yield "engine_restarts_total", (), rooms.engine.process.restarts
        if rooms.engine.recovery is not None:
            yield from _recovery_samples(rooms.engine.recovery)
    if rooms.arena is not None:
        yield "pictures_copied_total", (), rooms.arena.dry
    for name, slot in rooms.batcher.statistics().cameras.items():
        yield "frames_offered_total", (name,), slot.offered
        yield "frames_analysed_total", (name,), slot.analysed
        yield "frames_waiting", (name,), slot.waiting + slot.in_flight
        for reason, count in slot.dropped.items():
            yield "frames_dropped_total", (name, reason), count
    yield from _camera_samples(rooms)
    yield from _capacity_samples(rooms)
    yield from _overload_samples(rooms)
    yield from _hub_samples(rooms)
    yield from _asked_samples(rooms)


def _recovery_samples(seen: Recovery) -> Iterable[tuple[str, tuple[str, ...], float]]:
    yield "engine_recovering", (), float(seen.outlook.stage != "settled")
    yield "engine_change_overs_total", (), seen.change_overs
    for fault, count in seen.faults.items():
        yield "engine_faults_total", (fault,), count
    for code, count in seen.probes.items():
        yield "engine_probes_total", (code,), count


def _camera_samples(rooms: Rooms) -> Iterable[tuple[str, tuple[str, ...], float]]:
    for name, worker in rooms.cameras_by_name.items():
        seen = worker.status()
        yield "camera_state", (name, seen.state), 1
        yield "camera_epoch", (name,), seen.epoch
        yield "camera_frames_read_total", (name,), seen.frames_read
        if seen.age_ms is not None:
            yield "camera_frame_age_seconds", (name,), seen.age_ms / 1000


def _capacity_samples(rooms: Rooms) -> Iterable[tuple[str, tuple[str, ...], float]]:
    seen = rooms.meter.reading
    if seen is None:
        return
    for name, camera in seen.cameras.items():
        yield "demanded_frames_per_second", (name,), camera.demanded
        yield "let_in_frames_per_second", (name,), camera.let_in
        yield "delivered_frames_per_second", (name,), camera.delivered
    for purpose, cores in load_meter.used(seen).items():
        yield "cores_used", (purpose,), cores
    yield "bottleneck", (load_meter.judge(seen).bottleneck,), 1


def _overload_samples(rooms: Rooms) -> Iterable[tuple[str, tuple[str, ...], float]]:
    promise = rooms.promise
    given_up = {each.rung for each in promise.given_up}
    yield "overload_exhausted", (), float(promise.at_the_end)
    for (rung, direction), count in promise.steps.items():
        yield "overload_steps_total", (rung, direction), count
    for rung in RUNGS:
        yield "overload_rung", (rung,), float(rung in given_up)
    for name, throttle in promise.throttles.items():
        if throttle.fps is not None:
            yield "camera_fps_limit", (name,), throttle.fps


def _hub_samples(rooms: Rooms) -> Iterable[tuple[str, tuple[str, ...], float]]:
    if rooms.delivery is None:
        return
    seen = rooms.delivery.status()
    for output, count in seen.telemetry.messages.items():
        yield "messages_total", (output,), count
    for output, count in seen.telemetry.bill.blocks.items():
        yield "message_blocks_total", (output,), count
    for tier, share in seen.telemetry.bill.shares.items():
        yield "hub_unit_share", (tier,), share
    for reason, count in seen.telemetry.dropped.items():
        yield "telemetry_frames_dropped_total", (reason,), count
    if seen.hub is not None:
        yield "hub_connected", (), float(seen.hub.connected)
        yield "hub_messages_sent_total", (), seen.hub.sent
        yield "hub_messages_waiting", (), seen.hub.queued
        for reason, count in seen.hub.dropped.items():
            yield "hub_messages_dropped_total", (reason,), count
        for rung, count in seen.hub.rungs.items():
            yield "hub_rungs_total", (rung,), count
    if seen.spool is not None:
        yield "spool_bytes", (), seen.spool.waiting_bytes
        yield "spool_on_disk", (), float(seen.spool.mode == "disk")


def _asked_samples(rooms: Rooms) -> Iterable[tuple[str, tuple[str, ...], float]]:
    if rooms.asked is None:
        return
    seen = rooms.asked()
    for outcome, count in seen.wishes.items():
        yield "twin_configurations_total", (outcome,), count
    yield "twin_patches_total", (), seen.patches
    for (method, status_code), count in seen.methods.items():
        yield "method_calls_total", (method, str(status_code)), count
    yield "method_calls_dropped_total", (), seen.calls_dropped
    yield "input_pictures_answered_total", (), seen.pictures_answered
    for reason, count in seen.pictures_dropped.items():
        yield "input_pictures_dropped_total", (reason,), count


def _uptime_s(rooms: Rooms) -> float:
    return (time.monotonic_ns() - rooms.started_ns) / 1e9
