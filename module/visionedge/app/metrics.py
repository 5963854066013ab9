"""Every metric, declared once: name, unit, labels; rendered as Prometheus text 0.0.4.

Counters and gauges are not kept here: the rooms count for themselves, and `Metrics` asks for a snapshot when
somebody scrapes. Only durations are observed as they happen, because a histogram cannot be asked for later.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from visionedge.frames.types import FrameResult

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[str, ...]
Sample = tuple[Labels, float]


class MetricDeclaration(NamedTuple):
    """A metric: its kind, its labels, and what it tells."""

    kind: str
    labels: Labels
    help: str


SCRAPED_METRICS: Mapping[str, MetricDeclaration] = {
    "info": MetricDeclaration("gauge", ("version", "model"), "Always 1; what runs."),
    "uptime_seconds": MetricDeclaration("gauge", (), "Since the module started."),
    "ready": MetricDeclaration("gauge", (), "1 when a warmed-up engine answers."),
    "engine_device": MetricDeclaration(
        "gauge", ("requested", "effective", "code"), "Always 1; where frames are computed."
    ),
    "engine_info": MetricDeclaration(
        "gauge",
        ("model", "device", "precision"),
        "Always 1; the model, its device and its precision.",
    ),
    "engine_degraded": MetricDeclaration(
        "gauge", (), "1 when the effective device is not what was asked for."
    ),
    "engine_restarts_total": MetricDeclaration(
        "counter", (), "How often the engine's process was started again."
    ),
    "engine_faults_total": MetricDeclaration(
        "counter", ("fault",), "Batches and processes that failed, by fault."
    ),
    "engine_recovering": MetricDeclaration(
        "gauge", (), "1 while a device that was lost or absent is looked for."
    ),
    "engine_probes_total": MetricDeclaration(
        "counter", ("code",), "How often a device was looked for, by answer."
    ),
    "engine_change_overs_total": MetricDeclaration("counter", (), "How often a device was put back to use."),
    "nodes_on_cpu": MetricDeclaration("gauge", (), "Nodes that fell to the CPU while the rest is on a GPU."),
    "pictures_copied_total": MetricDeclaration(
        "counter", (), "Frames that found no room in shared memory and are copied to the engine."
    ),
    "unplanned_shape_total": MetricDeclaration(
        "counter", (), "Batches of a size that was not warmed; must stay 0."
    ),
    "frames_offered_total": MetricDeclaration(
        "counter", ("camera",), "Frames that reached the camera's slot."
    ),
    "frames_analysed_total": MetricDeclaration("counter", ("camera",), "Frames that were computed."),
    "frames_dropped_total": MetricDeclaration("counter", ("camera", "reason"), "Frames let go, by reason."),
    "frames_waiting": MetricDeclaration("gauge", ("camera",), "Frames in the slot or in flight."),
    "camera_state": MetricDeclaration("gauge", ("camera", "state"), "Always 1; the camera's state."),
    "camera_epoch": MetricDeclaration("gauge", ("camera",), "Grows by one at each reconnect."),
    "camera_frames_read_total": MetricDeclaration(
        "counter", ("camera",), "Pictures decoded from the source."
    ),
    "camera_frame_age_seconds": MetricDeclaration("gauge", ("camera",), "Age of the newest picture."),
    "demanded_frames_per_second": MetricDeclaration(
        "gauge", ("camera",), "Frames that the camera is asked for."
    ),
    "admitted_frames_per_second": MetricDeclaration(
        "gauge", ("camera",), "Frames of these that overload leaves."
    ),
    "delivered_frames_per_second": MetricDeclaration(
        "gauge", ("camera",), "Frames of the camera that are analysed."
    ),
    "cores_used": MetricDeclaration("gauge", ("purpose",), "Cores in use for decode, infer and other work."),
    "bottleneck": MetricDeclaration(
        "gauge", ("bottleneck",), "Always 1; the limit: none, quota, decode, engine, others or idle."
    ),
    "overload_level": MetricDeclaration("gauge", ("level",), "1 while it is given up: variant, gate or fps."),
    "overload_steps_total": MetricDeclaration(
        "counter", ("level", "direction"), "Steps of the overload ladder: taken or returned."
    ),
    "overload_exhausted": MetricDeclaration(
        "gauge", (), "1 when it is too much still, and nothing is left to give up."
    ),
    "camera_fps_limit": MetricDeclaration(
        "gauge", ("camera",), "Frames per second that overload slows it to."
    ),
    "hub_connected": MetricDeclaration("gauge", (), "1 when connected to edgeHub."),
    "messages_total": MetricDeclaration("counter", ("output",), "Messages made, by output."),
    "telemetry_frames_dropped_total": MetricDeclaration(
        "counter", ("reason",), "Frames not told, by reason."
    ),
    "hub_messages_sent_total": MetricDeclaration("counter", (), "Messages acknowledged by edgeHub."),
    "hub_messages_waiting": MetricDeclaration("gauge", (), "Messages that wait for their acknowledgement."),
    "hub_messages_dropped_total": MetricDeclaration("counter", ("reason",), "Messages let go, by reason."),
    "hub_faults_total": MetricDeclaration(
        "counter", ("fault",), "What was done about a hub or an SDK that failed."
    ),
    "message_blocks_total": MetricDeclaration(
        "counter", ("output",), "Blocks of 4 KB that IoT Hub meters for the messages."
    ),
    "hub_unit_share": MetricDeclaration(
        "gauge", ("tier",), "Part of one unit's daily quota that the last hour would come to."
    ),
    "spool_bytes": MetricDeclaration("gauge", (), "Bytes of messages that wait for the hub."),
    "spool_on_disk": MetricDeclaration("gauge", (), "1 when messages wait on disk, 0 when only in memory."),
    "twin_configurations_total": MetricDeclaration(
        "counter", ("outcome",), "Desired properties that were applied or rejected."
    ),
    "twin_patches_total": MetricDeclaration("counter", (), "Patches of reported properties."),
    "method_calls_total": MetricDeclaration(
        "counter", ("method", "status"), "Direct methods that were called."
    ),
    "method_calls_dropped_total": MetricDeclaration(
        "counter", (), "Direct methods that came too many at once."
    ),
    "input_pictures_answered_total": MetricDeclaration(
        "counter", (), "Pictures of other modules that got an answer."
    ),
    "input_pictures_dropped_total": MetricDeclaration(
        "counter", ("reason",), "Pictures of other modules that got none, by reason."
    ),
    "result_queue_dropped_total": MetricDeclaration(
        "counter", (), "Results lost between the lanes and the loop; must stay 0."
    ),
}
"""Scraped metrics, without the prefix ``visionedge_``."""

HISTOGRAMS: Mapping[str, MetricDeclaration] = {
    "frame_wait_seconds": MetricDeclaration(
        "histogram", ("camera",), "From capture to being taken into a batch."
    ),
    "frame_infer_seconds": MetricDeclaration("histogram", ("device",), "In the engine, by batch."),
    "frame_total_seconds": MetricDeclaration("histogram", ("camera",), "From capture to result."),
}
"""Observed metrics, without the prefix."""

_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

MetricsSnapshot = Callable[[], Iterable[tuple[str, Labels, float]]]
"""Gives (name, label values, value) for the scraped metrics, as they are now."""


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


class Metrics:
    """The module's metrics. `observe` and `render` are called on the loop."""

    def __init__(self, snapshot: MetricsSnapshot) -> None:
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
        """Take note of how long a frame took."""
        camera, timing = result.frame.camera, result.timing
        self._histograms["frame_wait_seconds"].labels(camera).observe(timing.wait_ns / 1e9)
        self._histograms["frame_infer_seconds"].labels(result.device).observe(timing.infer_ns / 1e9)
        self._histograms["frame_total_seconds"].labels(camera).observe(timing.total_ns / 1e9)

    def forget(self, camera: str) -> None:
        """Let go of what was observed of a camera that is gone."""
        for name in ("frame_wait_seconds", "frame_total_seconds"):
            with contextlib.suppress(KeyError):  # nothing of it was observed
                self._histograms[name].remove(camera)

    def render(self) -> bytes:
        """Prometheus text, classic format."""
        return generate_latest(self._registry)
