"""The soak by itself: it finds what it looks for, and seconds of it pass; the long one is `make soak`."""

from dataclasses import replace

import pytest

from soak import Sample, Soak, find_violations, slope_mib_per_hour, unaccounted


def samples(seconds: int, **step: float) -> list[Sample]:
    """One sample a second; `step` is what a figure grows by each second."""
    fine = Sample(0.0, 300.0, 30, 100.0, 30.0, {"a": 0})
    return [
        replace(
            fine,
            at_s=float(at),
            rss_mib=300.0 + (at % 7) / 10 + at * step.get("rss_mib", 0.0),
            threads=30 + int(at * step.get("threads", 0.0)),
            age_ms=100 + at * step.get("age_ms", 0.0),
        )
        for at in range(seconds)
    ]


def test_a_run_without_growth_has_no_violation() -> None:
    assert find_violations(samples(3600)) == []


@pytest.mark.parametrize(
    ("step", "complaint"),
    [({"rss_mib": 2 / 3600}, "memory"), ({"threads": 6 / 3600}, "threads"), ({"age_ms": 2.0}, "age_ms")],
)
def test_growth_within_an_hour_is_found(step: dict[str, float], complaint: str) -> None:
    broken = find_violations(samples(3600, **step))
    assert len(broken) == 1
    assert broken[0].startswith(complaint)


def test_a_single_lost_frame_is_found() -> None:
    given = samples(100)
    given[50] = replace(given[50], unaccounted={"a": 1})
    assert find_violations(given) == ["1 frames are not accounted for"]


def test_the_slope_is_that_of_the_trend() -> None:
    assert slope_mib_per_hour(samples(3600, rss_mib=5 / 3600)) == pytest.approx(5, abs=0.05)


def test_frames_are_counted_from_the_metrics() -> None:
    text = (
        'visionedge_frames_offered_total{camera="a"} 10.0\n'
        'visionedge_frames_analysed_total{camera="a"} 6.0\n'
        'visionedge_frames_dropped_total{camera="a",reason="replaced"} 2.0\n'
        'visionedge_frames_dropped_total{camera="a",reason="stale"} 0.0\n'
        'visionedge_frames_waiting{camera="a"} 1.0\n'
    )
    assert unaccounted(text) == {"a": 1}


@pytest.mark.timeout(150)
def test_a_short_run_with_a_dying_server_has_no_violation() -> None:
    figures = Soak(seconds=20, fault_every_s=8, fault_duration_s=2).run()
    assert figures["broken"] == []
    assert figures["faults"] == {"halt": 1, "kill": 1}
    assert figures["cameras"]["shaken"]["epoch"] >= 2
    assert figures["cameras"]["steady"]["epoch"] == 1
