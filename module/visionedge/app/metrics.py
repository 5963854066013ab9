"""Every metric: declared once with its kind, labels and unit, and read when Prometheus scrapes ``/metrics``.

Counters and gauges are not kept here: the module's parts count for themselves, and `collect_samples` reads
their statistics. Only durations are observed as they happen, because no statistics hold their distribution.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from visionedge import __version__
from visionedge.app.load_meter import cores_by_purpose, find_bottleneck
from visionedge.app.overload_policy import DEGRADATION_LEVELS
from visionedge.app.state import InboundStatistics, StateSnapshot
from visionedge.app.status import uptime_s
from visionedge.engine.interface import EngineInfo, RecoveryStatistics
from visionedge.frames.types import FrameResult
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.identity import Identity

Labels = tuple[str, ...]
Sample = tuple[str, Labels, float]
"""The name of a metric without its prefix, the values of its labels, and its value."""


class MetricDeclaration(NamedTuple):
    """A metric: its kind, the names of its labels, and the text of its HELP line."""

    kind: str
    labels: Labels
    help: str


SCRAPED_METRICS: Mapping[str, MetricDeclaration] = {
    "info": MetricDeclaration("gauge", ("version", "model"), "Version and model."),
    "uptime_seconds": MetricDeclaration("gauge", (), "Since the start of the module."),
    "ready": MetricDeclaration("gauge", (), "1 when a warmed-up engine answers."),
    "engine_device": MetricDeclaration(
        "gauge", ("requested", "effective", "code"), "Where frames are computed."
    ),
    "engine_info": MetricDeclaration(
        "gauge",
        ("model", "device", "precision"),
        "Model, device and precision.",
    ),
    "engine_degraded": MetricDeclaration(
        "gauge", (), "1 when the effective device is not the requested one."
    ),
    "engine_restarts_total": MetricDeclaration("counter", (), "Restarts of the engine process."),
    "engine_faults_total": MetricDeclaration(
        "counter", ("fault",), "Failed batches and processes, by fault."
    ),
    "engine_recovering": MetricDeclaration("gauge", (), "1 while a lost or absent device is probed."),
    "engine_probes_total": MetricDeclaration("counter", ("code",), "Probes of a device, by result."),
    "engine_change_overs_total": MetricDeclaration("counter", (), "Returns of a device to use."),
    "nodes_on_cpu": MetricDeclaration("gauge", (), "Nodes on the CPU while the rest is on a GPU."),
    "pictures_copied_total": MetricDeclaration(
        "counter", (), "Frames copied to the engine because shared memory was full."
    ),
    "unplanned_shape_total": MetricDeclaration(
        "counter", (), "Batches of a size that was not warmed up; must stay 0."
    ),
    "frames_offered_total": MetricDeclaration(
        "counter", ("camera",), "Frames that reached the camera's slot."
    ),
    "frames_analysed_total": MetricDeclaration("counter", ("camera",), "Frames that were computed."),
    "frames_dropped_total": MetricDeclaration("counter", ("camera", "reason"), "Dropped frames, by reason."),
    "frames_waiting": MetricDeclaration("gauge", ("camera",), "Frames in the slot or in flight."),
    "camera_state": MetricDeclaration("gauge", ("camera", "state"), "The camera's state."),
    "camera_epoch": MetricDeclaration("gauge", ("camera",), "Grows by one at each reconnect."),
    "camera_frames_read_total": MetricDeclaration(
        "counter", ("camera",), "Pictures decoded from the source."
    ),
    "camera_frame_age_seconds": MetricDeclaration("gauge", ("camera",), "Age of the newest picture."),
    "demanded_frames_per_second": MetricDeclaration(
        "gauge", ("camera",), "Frames that the configuration asks for."
    ),
    "admitted_frames_per_second": MetricDeclaration(
        "gauge", ("camera",), "Frames that remain after degradation."
    ),
    "delivered_frames_per_second": MetricDeclaration("gauge", ("camera",), "Analysed frames."),
    "cores_used": MetricDeclaration("gauge", ("purpose",), "Cores used for decode, infer and other work."),
    "bottleneck": MetricDeclaration(
        "gauge", ("bottleneck",), "The limit: none, quota, decode, engine, others, idle."
    ),
    "overload_level": MetricDeclaration(
        "gauge", ("level",), "1 while the level is in force: variant, gate or fps."
    ),
    "overload_steps_total": MetricDeclaration(
        "counter", ("level", "direction"), "Degradation steps, taken or returned."
    ),
    "overload_exhausted": MetricDeclaration("gauge", (), "1 when overloaded with no level left."),
    "camera_fps_limit": MetricDeclaration(
        "gauge", ("camera",), "The limit in frames per second that overload sets."
    ),
    "hub_connected": MetricDeclaration("gauge", (), "1 when connected to edgeHub."),
    "messages_total": MetricDeclaration("counter", ("output",), "Messages made."),
    "telemetry_frames_dropped_total": MetricDeclaration(
        "counter", ("reason",), "Frames not sent, by reason."
    ),
    "hub_messages_sent_total": MetricDeclaration("counter", (), "Messages acknowledged by edgeHub."),
    "hub_messages_waiting": MetricDeclaration("gauge", (), "Messages without an acknowledgement yet."),
    "hub_messages_dropped_total": MetricDeclaration("counter", ("reason",), "Dropped messages, by reason."),
    "hub_faults_total": MetricDeclaration("counter", ("fault",), "Faults of hub or SDK, by reaction."),
    "message_blocks_total": MetricDeclaration("counter", ("output",), "Blocks of 4 KB that IoT Hub bills."),
    "hub_unit_share": MetricDeclaration(
        "gauge", ("tier",), "Share of one unit's daily quota, projected from the last hour."
    ),
    "spool_bytes": MetricDeclaration("gauge", (), "Bytes of waiting messages."),
    "spool_on_disk": MetricDeclaration("gauge", (), "1 when messages wait on disk, 0 in memory only."),
    "twin_configurations_total": MetricDeclaration(
        "counter", ("outcome",), "Desired properties, applied or rejected."
    ),
    "twin_patches_total": MetricDeclaration("counter", (), "Patches of reported properties."),
    "method_calls_total": MetricDeclaration("counter", ("method", "status"), "Direct method calls."),
    "method_calls_dropped_total": MetricDeclaration(
        "counter", (), "Direct method calls dropped because too many waited."
    ),
    "input_pictures_answered_total": MetricDeclaration("counter", (), "Answered pictures of other modules."),
    "input_pictures_dropped_total": MetricDeclaration(
        "counter", ("reason",), "Unanswered pictures of other modules, by reason."
    ),
    "result_queue_dropped_total": MetricDeclaration(
        "counter", (), "Results lost between lanes and loop; must stay 0."
    ),
}
"""Scraped metrics, without the prefix ``visionedge_``."""

HISTOGRAMS: Mapping[str, MetricDeclaration] = {
    "frame_wait_seconds": MetricDeclaration("histogram", ("camera",), "From capture to the batch."),
    "frame_infer_seconds": MetricDeclaration("histogram", ("device",), "In the engine, per batch."),
    "frame_total_seconds": MetricDeclaration("histogram", ("camera",), "From capture to result."),
}
"""Observed metrics, without the prefix."""

_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

MetricsSnapshot = Callable[[], Iterable[Sample]]
"""Reads the scraped metrics."""


class _ScrapeCollector(Collector):
    def __init__(self, snapshot: MetricsSnapshot) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        families = {name: _make_family(name) for name in SCRAPED_METRICS}
        for name, labels, value in self._snapshot():
            families[name].add_metric(list(labels), value)
        return [family for family in families.values() if family.samples]


def _make_family(name: str) -> CounterMetricFamily | GaugeMetricFamily:
    declared = SCRAPED_METRICS[name]
    kind = CounterMetricFamily if declared.kind == "counter" else GaugeMetricFamily
    return kind(f"visionedge_{name}", declared.help, labels=declared.labels)


def identity_labels(identity: Identity | None) -> Mapping[str, str]:
    """The labels that the metrics of IoT Edge's own modules have; none outside IoT Edge."""
    if identity is None:
        return {}
    return {
        "iothub": identity.hub,
        "edge_device": identity.device,
        "module_name": identity.module,
        "instance_number": str(uuid.uuid4()),
    }


class Metrics(Collector):
    """The metrics of one module. `observe` and `render` are called on the event loop.

    `labels` stand in every sample, behind its own labels.
    """

    def __init__(self, snapshot: MetricsSnapshot, labels: Mapping[str, str] | None = None) -> None:
        self._labels = labels or {}
        self._registry = CollectorRegistry()
        self._registry.register(_ScrapeCollector(snapshot))
        ProcessCollector(namespace="visionedge", registry=self._registry)
        self._histograms = {
            name: Histogram(
                f"visionedge_{name}", d.help, d.labels, registry=self._registry, buckets=_BUCKETS_S
            )
            for name, d in HISTOGRAMS.items()
        }

    def observe(self, result: FrameResult) -> None:
        """Count how long a frame took."""
        camera, timing = result.frame.camera, result.timing
        self._histograms["frame_wait_seconds"].labels(camera).observe(timing.wait_ns / 1e9)
        self._histograms["frame_infer_seconds"].labels(result.device).observe(timing.infer_ns / 1e9)
        self._histograms["frame_total_seconds"].labels(camera).observe(timing.total_ns / 1e9)

    def forget(self, camera: str) -> None:
        """End the series of a camera that was removed."""
        for name in ("frame_wait_seconds", "frame_total_seconds"):
            with contextlib.suppress(KeyError):  # the camera had no result
                self._histograms[name].remove(camera)

    def render(self) -> bytes:
        """All metrics as Prometheus text 0.0.4."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Every metric with its samples at this moment."""
        for metric in self._registry.collect():
            metric.samples = [s._replace(labels={**s.labels, **self._labels}) for s in metric.samples]
            yield metric


# --- the samples of a scrape --------------------------------------------------------------------------------


def collect_samples(state: StateSnapshot) -> Iterator[Sample]:
    """The samples of `SCRAPED_METRICS` at this moment."""
    yield "info", (__version__, state.loaded_model.name if state.loaded_model else ""), 1
    yield "uptime_seconds", (), uptime_s(state)
    yield "ready", (), float(not state.readiness())
    yield "result_queue_dropped_total", (), state.loop_queue.dropped
    if (info := state.engine_info()) is not None:
        yield from _engine_samples(info)
    if state.frame_pool is not None:
        yield "pictures_copied_total", (), state.frame_pool.exhausted_count
    yield from _camera_samples(state)
    yield from _load_samples(state)
    yield from _overload_samples(state)
    if state.delivery is not None:
        yield from _hub_samples(state.delivery)
    if state.inbound_statistics is not None:
        yield from _inbound_samples(state.inbound_statistics())


def _engine_samples(info: EngineInfo) -> Iterator[Sample]:
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


def _recovery_samples(recovery: RecoveryStatistics) -> Iterator[Sample]:
    yield "engine_recovering", (), float(recovery.recovery_state.stage != "settled")
    yield "engine_change_overs_total", (), recovery.device_recoveries
    for fault, count in recovery.faults.items():
        yield "engine_faults_total", (fault,), count
    for code, count in recovery.probes.items():
        yield "engine_probes_total", (code,), count


def _camera_samples(state: StateSnapshot) -> Iterator[Sample]:
    for name, slot in state.batcher.statistics().cameras.items():
        yield "frames_offered_total", (name,), slot.offered
        yield "frames_analysed_total", (name,), slot.analysed
        yield "frames_waiting", (name,), slot.waiting + slot.in_flight
        for reason, count in slot.dropped.items():
            yield "frames_dropped_total", (name, reason), count
    for name, camera in state.running_cameras.items():
        status = camera.status()
        yield "camera_state", (name, status.state), 1
        yield "camera_epoch", (name,), status.epoch
        yield "camera_frames_read_total", (name,), status.frames_read
        if status.age_ms is not None:
            yield "camera_frame_age_seconds", (name,), status.age_ms / 1000


def _load_samples(state: StateSnapshot) -> Iterator[Sample]:
    load = state.meter.measurement
    if load is None:
        return
    for name, camera in load.cameras.items():
        yield "demanded_frames_per_second", (name,), camera.demanded
        yield "admitted_frames_per_second", (name,), camera.admitted
        yield "delivered_frames_per_second", (name,), camera.delivered
    for purpose, cores in cores_by_purpose(load).items():
        yield "cores_used", (purpose,), cores
    yield "bottleneck", (find_bottleneck(load).bottleneck,), 1


def _overload_samples(state: StateSnapshot) -> Iterator[Sample]:
    overload = state.overload_status
    taken_levels = {each.level for each in overload.taken_levels}
    yield "overload_exhausted", (), float(overload.exhausted)
    for (level, direction), count in overload.steps.items():
        yield "overload_steps_total", (level, direction), count
    for level in DEGRADATION_LEVELS:
        yield "overload_level", (level,), float(level in taken_levels)
    for name, throttle in overload.throttles.items():
        if throttle.fps is not None:
            yield "camera_fps_limit", (name,), throttle.fps


def _hub_samples(delivery: Delivery) -> Iterator[Sample]:
    status = delivery.status()
    for output, count in status.telemetry.messages.items():
        yield "messages_total", (output,), count
    for output, count in status.telemetry.usage.blocks.items():
        yield "message_blocks_total", (output,), count
    for tier, share in status.telemetry.usage.shares.items():
        yield "hub_unit_share", (tier,), share
    for reason, count in status.telemetry.dropped.items():
        yield "telemetry_frames_dropped_total", (reason,), count
    if status.hub is not None:
        yield "hub_connected", (), float(status.hub.connected)
        yield "hub_messages_sent_total", (), status.hub.sent
        yield "hub_messages_waiting", (), status.hub.queued
        for reason, count in status.hub.dropped.items():
            yield "hub_messages_dropped_total", (reason,), count
        for fault, count in status.hub.faults.items():
            yield "hub_faults_total", (fault,), count
    if status.spool is not None:
        yield "spool_bytes", (), status.spool.waiting_bytes
        yield "spool_on_disk", (), float(status.spool.mode == "disk")


def _inbound_samples(inbound: InboundStatistics) -> Iterator[Sample]:
    for outcome, count in inbound.configurations.items():
        yield "twin_configurations_total", (outcome,), count
    yield "twin_patches_total", (), inbound.patches
    for (method, status_code), count in inbound.methods.items():
        yield "method_calls_total", (method, str(status_code)), count
    yield "method_calls_dropped_total", (), inbound.calls_dropped
    yield "input_pictures_answered_total", (), inbound.pictures_answered
    for reason, count in inbound.pictures_dropped.items():
        yield "input_pictures_dropped_total", (reason,), count
