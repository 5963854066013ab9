"""`/metrics` as Azure Monitor's collector reads it."""

from collections.abc import Iterable

import pytest

from metrics_collector import collect
from visionedge.app.metrics import METRICS, Metrics, Sample, identity_labels
from visionedge.iothub.identity import Identity

IDENTITY = Identity("factory.azure-devices.net", "press-7", "vision", "edge-7")

SCRAPED = {name: declared for name, declared in METRICS.items() if not declared.is_observed}


def samples() -> Iterable[Sample]:
    for name, declared in SCRAPED.items():
        value = {1: 3, 3: 2} if declared.buckets else 1.5
        yield name, tuple(f'{label} "x"\\' for label in declared.labels), value


def test_the_collector_loses_no_line_and_finds_every_metric() -> None:
    text = Metrics(samples, identity_labels(IDENTITY)).render().decode()
    names = {name for name, _, _ in collect(text)}
    ends = {name: "_count" if declared.buckets else "" for name, declared in SCRAPED.items()}
    assert {f"visionedge_{name}{end}" for name, end in ends.items()} <= names
    assert len(list(collect(text))) == sum(not line.startswith("#") for line in text.splitlines())


def test_inside_iot_edge_every_sample_names_hub_device_module_and_instance() -> None:
    metrics = Metrics(samples, identity_labels(IDENTITY))
    found = list(collect(metrics.render().decode()))
    instances = {labels["instance_number"] for _, labels, _ in found}
    assert len(instances) == 1
    assert {(d["iothub"], d["edge_device"], d["module_name"]) for _, d, _ in found} == {
        ("factory.azure-devices.net", "press-7", "vision")
    }
    assert identity_labels(IDENTITY)["instance_number"] not in instances  # another start, another instance


def test_outside_iot_edge_samples_have_only_their_own_labels() -> None:
    text = Metrics(samples, identity_labels(None)).render().decode()
    assert "visionedge_ready 1.5" in text.splitlines()


def test_the_labels_of_a_histogram_stay() -> None:
    metrics = Metrics(list, {"edge_device": "press-7"})
    metrics._histograms["frame_infer_seconds"].labels("cpu").observe(0.003)
    found = [s for s in collect(metrics.render().decode()) if s[0] == "visionedge_frame_infer_seconds_bucket"]
    assert {labels["device"] for _, labels, _ in found} == {"cpu"}
    assert found[-1][1] == {"device": "cpu", "le": "+Inf", "edge_device": "press-7"}


def test_batch_sizes_are_a_histogram_with_cumulative_buckets_of_powers_of_two() -> None:
    lines = Metrics(samples).render().decode().splitlines()
    found = [line.removeprefix("visionedge_batch_size_") for line in lines if "_batch_size_" in line]
    assert found == [
        'bucket{le="1.0"} 3.0',
        'bucket{le="2.0"} 3.0',
        'bucket{le="4.0"} 5.0',
        'bucket{le="8.0"} 5.0',
        'bucket{le="16.0"} 5.0',
        'bucket{le="32.0"} 5.0',
        'bucket{le="64.0"} 5.0',
        'bucket{le="+Inf"} 5.0',
        "count 5.0",
        "sum 9.0",
    ]


@pytest.mark.parametrize("line", ["x{a=b} 1", 'x 1 # {trace="1"} 2', "x +Inf", "x NaN", 'x{a="1" 2'])
def test_the_collectors_rules_refuse_what_it_would_lose(line: str) -> None:
    with pytest.raises(ValueError, match=r"lost|labels|dropped"):
        list(collect(line))
