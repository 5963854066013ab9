"""Every metric: declared once with its kind, labels and unit, and read when Prometheus scrapes ``/metrics``.

Metrics are not kept here: the module's parts count for themselves, and `collect_samples` reads their
statistics. Only durations are observed as they happen, because no statistics hold their distribution.
"""

import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from visionedge import __version__
from visionedge.app.load_meter import cores_by_purpose, find_bottleneck
from visionedge.app.overload_policy import DEGRADATION_LEVELS
from visionedge.app.state import InboundStatistics, SceneStatistics, StateSnapshot
from visionedge.app.status import uptime_s
from visionedge.engine.interface import EngineInfo, RecoveryStatistics
from visionedge.frames.types import FrameResult
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.identity import Identity
from visionedge.runtime.build_identity import read_build_identity
from visionedge.scene.events import TOTALS_OF_LINES, TOTALS_OF_ZONES

Labels = tuple[str, ...]
Sample = tuple[str, Labels, float | Mapping[int, int]]
"""The name of a metric without its prefix, the values of its labels, and its value.

The value of a histogram that is scraped is the number of observations by what was observed.
"""


class MetricDeclaration(NamedTuple):
    """A metric: its kind, the names of its labels, and the text of its HELP line.

    `buckets`: the upper bounds of a histogram that is scraped; empty for all others.
    """

    kind: str
    labels: Labels
    help: str
    buckets: tuple[int, ...] = ()

    @property
    def is_observed(self) -> bool:
        """Whether each value is observed as it happens."""
        return self.kind == "histogram" and not self.buckets


def _gauge(text: str, *labels: str) -> MetricDeclaration:
    return MetricDeclaration("gauge", labels, text)


def _counter(text: str, *labels: str) -> MetricDeclaration:
    return MetricDeclaration("counter", labels, text)


def _histogram(text: str, *labels: str) -> MetricDeclaration:
    return MetricDeclaration("histogram", labels, text)


_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Up to the largest `inference.maxBatch`."""

METRICS: Mapping[str, MetricDeclaration] = {
    "info": _gauge("Version and model.", "version", "model"),
    "build_info": _gauge(
        "The build: version, git revision, time of the commit.", "version", "revision", "built"
    ),
    "uptime_seconds": _gauge("Since the start of the module."),
    "ready": _gauge("1 when a warmed-up engine answers."),
    "engine_device": _gauge("Where frames are computed.", "requested", "effective", "code"),
    "engine_info": _gauge("Model, device, runtime and precision.", "model", "device", "runtime", "precision"),
    "engine_degraded": _gauge("1 when the effective device is not the requested one."),
    "engine_restarts_total": _counter("Restarts of the engine process."),
    "engine_faults_total": _counter("Failed batches and processes, by fault.", "fault"),
    "engine_recovering": _gauge("1 while a lost or absent device is probed."),
    "engine_probes_total": _counter("Probes of a device, by result.", "code"),
    "engine_change_overs_total": _counter("Returns of a device to use."),
    "remote_replica_up": _gauge("1 while a server of the remote device gets batches.", "replica"),
    "remote_batches_total": _counter("Batches that a server computed.", "replica"),
    "remote_failures_total": _counter("Requests to a server that failed.", "replica"),
    "nodes_on_cpu": _gauge("Nodes on the CPU while the rest is on a GPU."),
    "pictures_copied_total": _counter("Frames copied to the engine because shared memory was full."),
    "batch_size": MetricDeclaration("histogram", (), "Frames that were computed together.", _BATCH_SIZES),
    "unplanned_shape_total": _counter("Batches of a size that was not warmed up; must stay 0."),
    "frames_offered_total": _counter("Frames that reached the camera's slot.", "camera"),
    "frames_analysed_total": _counter("Frames that were computed.", "camera"),
    "frames_dropped_total": _counter("Dropped frames, by reason.", "camera", "reason"),
    "camera_engine_seconds_total": _counter("Engine time of a camera, its part of each batch.", "camera"),
    "frames_waiting": _gauge("Frames in the slot or in flight.", "camera"),
    "camera_state": _gauge("The camera's state.", "camera", "state"),
    "camera_epoch": _gauge("Grows by one at each reconnect.", "camera"),
    "camera_frames_read_total": _counter("Pictures decoded from the source.", "camera"),
    "camera_frame_age_seconds": _gauge("Age of the newest picture.", "camera"),
    "tracks": _gauge("Confirmed tracks.", "camera"),
    "zone_inside": _gauge("Tracks inside a zone.", "camera", "zone", "label"),
    "zone_entered_total": _counter("Tracks that entered a zone.", "camera", "zone", "label"),
    "zone_left_total": _counter("Tracks that left it.", "camera", "zone", "label"),
    "zone_lost_total": _counter("Tracks that ended inside it.", "camera", "zone", "label"),
    "line_crossed_total": _counter("Crossings of a line.", "camera", "line", "direction", "label"),
    "scene_events_total": _counter("Scene events since the start.", "camera", "type"),
    "crops_asked_total": _counter("Questions to a second model.", "model"),
    "crops_total": _counter("Crops: answered, unsure or dropped.", "model", "outcome"),
    "crops_waiting": _gauge("Crops that wait.", "model"),
    "demanded_frames_per_second": _gauge("Frames that the configuration asks for.", "camera"),
    "admitted_frames_per_second": _gauge("Frames that remain after degradation.", "camera"),
    "delivered_frames_per_second": _gauge("Analysed frames.", "camera"),
    "cores_used": _gauge("Cores used for decode, infer and other work.", "purpose"),
    "bottleneck": _gauge("The limit: none, quota, decode, engine, others, idle.", "bottleneck"),
    "overload_level": _gauge("1 while the level is in force: variant, gate or fps.", "level"),
    "overload_steps_total": _counter("Degradation steps, taken or returned.", "level", "direction"),
    "overload_exhausted": _gauge("1 when overloaded with no level left."),
    "camera_fps_limit": _gauge("The limit in frames per second that overload sets.", "camera"),
    "hub_connected": _gauge("1 when connected to edgeHub."),
    "messages_total": _counter("Messages made.", "output"),
    "telemetry_frames_dropped_total": _counter("Frames not sent, by reason.", "reason"),
    "hub_messages_sent_total": _counter("Messages acknowledged by edgeHub."),
    "hub_messages_waiting": _gauge("Messages without an acknowledgement yet."),
    "hub_messages_dropped_total": _counter("Dropped messages, by reason.", "reason"),
    "hub_faults_total": _counter("Faults of hub or SDK, by reaction.", "fault"),
    "message_blocks_total": _counter("Blocks of 4 KB that IoT Hub bills.", "output"),
    "hub_unit_share": _gauge("Share of one unit's daily quota, projected from the last hour.", "tier"),
    "spool_bytes": _gauge("Bytes of waiting messages."),
    "spool_stalled_seconds": _gauge("For so long the disk has hung; 0 if it does not."),
    "spool_on_disk": _gauge("1 when messages wait on disk, 0 in memory only."),
    "twin_configurations_total": _counter("Desired properties, applied or rejected.", "outcome"),
    "twin_patches_total": _counter("Patches of reported properties."),
    "method_calls_total": _counter("Direct method calls.", "method", "status"),
    "method_calls_dropped_total": _counter("Direct method calls dropped because too many waited."),
    "input_pictures_answered_total": _counter("Answered pictures of other modules."),
    "input_pictures_dropped_total": _counter("Unanswered pictures of other modules, by reason.", "reason"),
    "result_queue_dropped_total": _counter("Results lost between lanes and loop; must stay 0."),
    "frame_wait_seconds": _histogram("From capture to the batch.", "camera"),
    "frame_infer_seconds": _histogram("In the engine, per batch.", "device"),
    "frame_total_seconds": _histogram("From capture to result.", "camera"),
}
"""All metrics, by name without the prefix ``visionedge_``; durations are observed, the others scraped."""

_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

MetricsSnapshot = Callable[[], Iterable[Sample]]
"""Reads the scraped metrics."""


class _ScrapeCollector(Collector):
    def __init__(self, snapshot: MetricsSnapshot) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        families = {name: _make_family(name) for name, d in METRICS.items() if not d.is_observed}
        for name, labels, value in self._snapshot():
            _add_sample(families[name], list(labels), value, METRICS[name].buckets)
        return [family for family in families.values() if family.samples]


_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def _make_family(name: str) -> _Family:
    declared = METRICS[name]
    kinds: Mapping[str, type[_Family]] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[declared.kind](f"visionedge_{name}", declared.help, labels=declared.labels)


def _add_sample(
    family: _Family, labels: list[str], value: float | Mapping[int, int], bounds: tuple[int, ...]
) -> None:
    if isinstance(value, Mapping):
        assert isinstance(family, HistogramMetricFamily)  # noqa: S101 - only these are counted by value
        filled = [(f"{bound:.1f}", sum(n for size, n in value.items() if size <= bound)) for bound in bounds]
        filled.append(("+Inf", sum(value.values())))
        family.add_metric(labels, filled, sum(size * count for size, count in value.items()))
    else:
        assert not isinstance(family, HistogramMetricFamily)  # noqa: S101 - as above
        family.add_metric(labels, value)


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
            for name, d in METRICS.items()
            if d.is_observed
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
    """The samples of all scraped metrics at this moment."""
    yield "info", (__version__, state.loaded_model.name if state.loaded_model else ""), 1
    build = read_build_identity()
    yield "build_info", (build.version, build.revision, build.built_at), 1
    yield "uptime_seconds", (), uptime_s(state)
    yield "ready", (), float(not state.readiness())
    yield "result_queue_dropped_total", (), state.loop_queue.dropped
    if infos := tuple(state.engine_infos().values()):
        yield from _engine_samples(infos)
    pools = [model.frame_pool for model in state.models.values() if model.frame_pool is not None]
    if pools:
        yield "pictures_copied_total", (), sum(pool.exhausted_count for pool in pools)
    yield from _camera_samples(state)
    yield from _scene_samples(state)
    yield from _load_samples(state)
    yield from _overload_samples(state)
    if state.delivery is not None:
        yield from _hub_samples(state.delivery)
    if state.inbound_statistics is not None:
        yield from _inbound_samples(state.inbound_statistics())


def _engine_samples(infos: Sequence[EngineInfo]) -> Iterator[Sample]:
    """The engines of all models together; `engine_info` has one series for each."""
    for requested, effective, code in {
        (info.device.requested, info.device.effective, info.device.code): None for info in infos
    }:
        yield "engine_device", (requested, effective, code), 1
    for info in infos:
        effective = info.device.effective
        yield "engine_info", (info.model.name, effective, info.runtime, info.choice.precision), 1
    yield "engine_degraded", (), float(any(info.device.degraded for info in infos))
    yield "unplanned_shape_total", (), sum(info.unplanned_shapes for info in infos)
    yield "nodes_on_cpu", (), sum(len(info.node_placement.on_cpu) for info in infos)
    for replica in (replica for info in infos for replica in info.replicas):
        yield "remote_replica_up", (replica.url,), float(replica.state == "up")
        yield "remote_batches_total", (replica.url,), replica.batches
        yield "remote_failures_total", (replica.url,), replica.failures
    if processes := [info.process for info in infos if info.process is not None]:
        yield "engine_restarts_total", (), sum(process.restarts for process in processes)
    if recoveries := [info.recovery for info in infos if info.recovery is not None]:
        yield from _recovery_samples(recoveries)


def _recovery_samples(recoveries: Sequence[RecoveryStatistics]) -> Iterator[Sample]:
    recovering = any(recovery.recovery_state.stage != "settled" for recovery in recoveries)
    yield "engine_recovering", (), float(recovering)
    yield "engine_change_overs_total", (), sum(recovery.device_recoveries for recovery in recoveries)
    faults: Counter[str] = Counter()
    probes: Counter[str] = Counter()
    for recovery in recoveries:
        faults.update(recovery.faults)
        probes.update(recovery.probes)
    for fault, count in faults.items():
        yield "engine_faults_total", (fault,), count
    for code, count in probes.items():
        yield "engine_probes_total", (code,), count


def _camera_samples(state: StateSnapshot) -> Iterator[Sample]:
    batcher = state.batcher.statistics()
    yield "batch_size", (), batcher.batch_sizes
    for name, slot in batcher.cameras.items():
        yield "frames_offered_total", (name,), slot.offered
        yield "frames_analysed_total", (name,), slot.analysed
        yield "frames_waiting", (name,), slot.waiting + slot.in_flight
        yield "camera_engine_seconds_total", (name,), slot.engine_ns / 1e9
        for reason, count in slot.dropped.items():
            yield "frames_dropped_total", (name, reason), count
    for name, camera in state.running_cameras.items():
        status = camera.status()
        yield "camera_state", (name, status.state), 1
        yield "camera_epoch", (name,), status.epoch
        yield "camera_frames_read_total", (name,), status.frames_read
        if status.age_ms is not None:
            yield "camera_frame_age_seconds", (name,), status.age_ms / 1000


def _scene_samples(state: StateSnapshot) -> Iterator[Sample]:
    """A label has a series once it was counted, or where the configuration names it."""
    scenes = state.read_scenes()
    for camera, scene in scenes.cameras.items():
        configured = state.config.cameras.get(camera)
        if configured is None:
            continue
        yield "tracks", (camera,), len(scene["tracks"])
        for name, zone in scene["zones"].items():
            classes = configured.zones[name].classes if name in configured.zones else ()
            for label in {*zone["entered"], *(classes or configured.classes or ())}:
                for total in ("inside", *(f"{each}_total" for each in TOTALS_OF_ZONES)):
                    count = zone[total.removesuffix("_total")].get(label, 0)
                    yield f"zone_{total}", (camera, name, label), count
        for name, line in scene["lines"].items():
            classes = configured.lines[name].classes if name in configured.lines else ()
            seen = {label for direction in TOTALS_OF_LINES for label in line[direction]}
            for label in {*seen, *(classes or configured.classes or ())}:
                for direction in TOTALS_OF_LINES:
                    yield (
                        "line_crossed_total",
                        (camera, name, direction, label),
                        line[direction].get(label, 0),
                    )
    for labels, count in scenes.events.items():
        yield "scene_events_total", labels, count
    yield from _crop_samples(scenes)


def _crop_samples(scenes: SceneStatistics) -> Iterator[Sample]:
    for model, crops in scenes.second_stage.items():
        yield "crops_asked_total", (model,), crops.asked
        yield "crops_waiting", (model,), crops.waiting
        for outcome in ("answered", "unsure", "dropped"):
            yield "crops_total", (model, outcome), getattr(crops, outcome)


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
        yield "hub_messages_waiting", (), status.hub.waiting
        for reason, count in status.hub.dropped.items():
            yield "hub_messages_dropped_total", (reason,), count
        for fault, count in status.hub.faults.items():
            yield "hub_faults_total", (fault,), count
    if status.spool is not None:
        yield "spool_bytes", (), status.spool.waiting_bytes
        yield "spool_stalled_seconds", (), status.spool.stalled_seconds
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
