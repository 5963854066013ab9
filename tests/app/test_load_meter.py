"""The limiting resource and the advice, computed from fake figures."""

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from visionedge.app.load_meter import (
    CameraLoad,
    FrameCounters,
    LoadMeasurement,
    LoadMeter,
    LoadSample,
    compute_load,
    find_bottleneck,
)
from visionedge.camera.timing import AdmissionCounts
from visionedge.engine.batcher import BatcherStatistics, CameraStatistics, DropReason


def load(demanded: float, delivered: float, decode_cores: float) -> CameraLoad:
    """A camera that delivers the requested rate; the engine analyses a part of it."""
    return CameraLoad(demanded, demanded, demanded, delivered, demanded - delivered, decode_cores)


SLOW = LoadMeasurement(
    seconds=5.0,
    cameras={"door": load(10.0, 5.0, 0.2), "yard": load(25.0, 5.0, 1.02)},
    cores=2,
    decode_cores=1.22,
    infer_cores=0.6,
    other_cores=0.1,
    external_cores=0.0,
    gpu=False,
)


def test_a_camera_that_gets_its_full_rate_keeps_up() -> None:
    fine = replace(SLOW, cameras={"yard": load(5.0, 4.9, 0.2)}, decode_cores=0.2, infer_cores=0.4)
    verdict = find_bottleneck(fine)
    assert (verdict.bottleneck, verdict.sentence) == (
        "none",
        "keeps up: 4.9 of 5.0 frames/s with 35 % of 2 cores",
    )


def test_decoding_is_the_limit_with_the_most_expensive_camera() -> None:
    verdict = find_bottleneck(SLOW)
    assert verdict.bottleneck == "decode"
    assert "10.0 of 35.0 frames/s: decode takes 61 % of 2 cores: lower fps of yard" in verdict.sentence


def test_a_model_that_uses_the_cores_is_the_limit_with_its_remedies() -> None:
    verdict = find_bottleneck(replace(SLOW, decode_cores=0.3, infer_cores=1.6))
    assert verdict.bottleneck == "engine"
    assert "the model takes 80 % of 2 cores" in verdict.sentence
    assert "int8" in verdict.sentence


def test_a_gpu_is_the_limit_if_the_processor_is_not() -> None:
    verdict = find_bottleneck(replace(SLOW, decode_cores=0.5, infer_cores=0.2, gpu=True))
    assert verdict.bottleneck == "engine"
    assert "the GPU is the limit, the module uses only 40 % of 2 cores" in verdict.sentence


def test_even_with_a_gpu_decoding_can_be_the_limit() -> None:
    assert find_bottleneck(replace(SLOW, decode_cores=1.8, infer_cores=0.1, gpu=True)).bottleneck == "decode"


def test_a_camera_that_one_thread_cannot_decode_is_named_on_an_idle_machine() -> None:
    lame = CameraLoad(30.0, 30.0, 12.0, 12.0, 0.0, 1.0)
    verdict = find_bottleneck(
        replace(SLOW, cores=8, cameras={"yard": lame}, decode_cores=1.0, infer_cores=0.5)
    )
    assert verdict.bottleneck == "decode"
    assert "12.0 of 30.0 frames/s: yard is decoded at 12.0 of 30.0 frames/s" in verdict.sentence


def test_other_programs_that_use_the_cores_are_the_limit() -> None:
    verdict = find_bottleneck(
        replace(SLOW, decode_cores=0.3, infer_cores=0.4, other_cores=0.0, external_cores=1.2)
    )
    assert verdict.bottleneck == "others"
    assert "other programs take 1.2 cores and leave 0.7 to the module" in verdict.sentence


def test_a_cpu_quota_that_is_used_up_is_the_limit() -> None:
    """Not other programs, and not a whole core that the module never gets."""
    verdict = find_bottleneck(
        replace(SLOW, cores=1, quota=0.5, decode_cores=0.2, infer_cores=0.25, other_cores=0.04)
    )
    assert verdict.bottleneck == "quota"
    assert "uses 98 % of 0.5 core, its whole CPU quota: raise the quota" in verdict.sentence


def test_a_cpu_quota_is_named_whatever_the_limit_is() -> None:
    """Who reads `of 0.5 core` must know where the other cores are."""
    throttled = replace(SLOW, cores=4, quota=0.5, decode_cores=0.05, infer_cores=0.2, other_cores=0.02)
    assert "of 0.5 core (CPU quota)" in find_bottleneck(throttled).sentence
    enough = replace(throttled, quota=4.0)
    assert "quota" not in find_bottleneck(enough).sentence


def test_a_cpu_quota_above_what_is_used_is_not_the_limit() -> None:
    """Other programs may use the cores that the quota allows, and a quota may exceed the affinity."""
    crowded = replace(SLOW, cores=2, quota=2.0, decode_cores=0.3, infer_cores=0.4, external_cores=1.2)
    assert find_bottleneck(crowded).bottleneck == "others"
    assert find_bottleneck(replace(SLOW, quota=6.0)).bottleneck == "decode"


def test_a_quota_bounds_the_share_of_other_programs() -> None:
    """Of a machine with 24 busy cores, half a core is missing at most."""
    after = sample(4, {}, {}, process_s=1.6, machine_s=96.0)
    seen = compute_load(sample(0, {}, {}), after, cores=1, machine_cores=24, gpu=False, quota=0.5)
    assert seen.external_cores == pytest.approx(0.1)
    assert seen.quota == 0.5


def test_without_frames_nothing_is_the_limit() -> None:
    assert find_bottleneck(replace(SLOW, cameras={})).bottleneck == "idle"
    still = {"yard": load(0.0, 0.0, 0.1)}
    assert find_bottleneck(replace(SLOW, cameras=still)).sentence == "no camera delivers frames"


def counted(demanded: int, delivered: int) -> FrameCounters:
    return FrameCounters(demanded, demanded, demanded, delivered, 0)


def sample(
    at_s: float,
    threads: Mapping[int, tuple[str, float]],
    frames: Mapping[str, FrameCounters],
    **cpu_s: float,
) -> LoadSample:
    times = {"process_s": 0.0, "child_s": 0.0, "machine_s": 0.0} | cpu_s
    return LoadSample(round(at_s * 1e9), threads, frames=frames, **times)


def test_threads_are_classified_by_their_names() -> None:
    before = sample(
        0, {1: ("MainThread", 1.0), 2: ("camera:a", 1.0), 4: ("lane:0", 0.0)}, {"a": counted(100, 50)}
    )
    threads = {1: ("MainThread", 1.4), 2: ("camera:a", 3.0), 3: ("av:h264:df0", 1.0), 4: ("lane:0", 0.4)}
    after = sample(4, threads, {"a": counted(140, 70)}, process_s=4.0, child_s=2.0, machine_s=7.2)
    seen = compute_load(before, after, cores=2, machine_cores=2, gpu=False)
    assert seen.cameras == {"a": CameraLoad(10.0, 10.0, 10.0, 5.0, 0.0, 0.5)}
    figures = (seen.decode_cores, seen.infer_cores, seen.other_cores, seen.external_cores)
    assert figures == pytest.approx((0.75, 0.6, 0.15, 0.3))


def test_a_restarted_engine_gives_no_negative_time() -> None:
    before = sample(0, {}, {}, child_s=9.0)
    after = sample(5, {}, {}, child_s=1.0)
    assert compute_load(before, after, cores=2, machine_cores=2, gpu=False).infer_cores == 0.0


@pytest.mark.parametrize(("machine_busy_s", "foreign"), [(60.0, 0.0), (128.0, 1.0)])
def test_busy_foreign_cores_do_not_limit_the_module_until_all_are_busy(
    machine_busy_s: float, foreign: float
) -> None:
    before, after = sample(0, {}, {}), sample(2, {}, {}, process_s=2.0, machine_s=machine_busy_s)
    assert compute_load(before, after, cores=2, machine_cores=64, gpu=False).external_cores == foreign


def taken(offered: int, analysed: int, **dropped: int) -> BatcherStatistics:
    counts = dict.fromkeys(DropReason, 0) | {DropReason(reason): count for reason, count in dropped.items()}
    return BatcherStatistics({"a": CameraStatistics(offered, analysed, 0, 0, counts)}, {})


def read(*moments: tuple[BatcherStatistics, dict[str, AdmissionCounts]]) -> LoadMeasurement:
    """The last of several readings, two seconds apart."""
    times_ns = iter(range(0, 1_000_000_000_000, 2_000_000_000))
    meter = LoadMeter(clock=lambda: next(times_ns))
    for frames, asked in moments:
        meter.take_sample(frames, asked, children=[os.getpid()], gpu=False)
    assert meter.measurement is not None
    return meter.measurement


def test_requested_admitted_offered_analysed_and_lost_frames_are_separate() -> None:
    seen = read(
        (taken(10, 0, gated=10), {"a": AdmissionCounts(50, 20)}),
        (taken(30, 4, gated=20, replaced=3, stale=1, failed=1), {"a": AdmissionCounts(150, 40)}),
    )
    assert seen.cameras["a"] == replace(seen.cameras["a"], demanded=50, admitted=10, offered=5)
    assert (seen.delivered, seen.lost) == (2, 2)


def test_a_reopened_camera_is_counted_from_its_reopening() -> None:
    seen = read(
        (taken(100, 90), {"a": AdmissionCounts(500, 500)}), (taken(110, 100), {"a": AdmissionCounts(10, 10)})
    )
    assert (seen.demanded, seen.offered, seen.delivered) == (5, 5, 5)


def test_a_new_camera_is_not_judged_yet() -> None:
    """Counts of an earlier camera with the same name do not belong to these seconds."""
    assert read((taken(100, 90), {}), (taken(110, 100), {"a": AdmissionCounts(10, 10)})).cameras == {}
    seen = read(
        (taken(100, 90), {}),
        (taken(110, 100), {"a": AdmissionCounts(10, 10)}),
        (taken(120, 110), {"a": AdmissionCounts(20, 20)}),
    )
    assert seen.delivered == 5


def test_a_busy_camera_thread_is_measured_by_its_cpu_clock() -> None:
    stop, busy = threading.Event(), threading.Event()

    def burn() -> None:
        while not stop.is_set():
            busy.set()

    meter = LoadMeter()
    thread = threading.Thread(target=burn, name="camera:a")
    thread.start()
    try:
        assert busy.wait(5)
        meter.take_sample(taken(0, 0), {"a": AdmissionCounts()}, children=(), gpu=False)
        stop.wait(0.3)
        meter.take_sample(taken(10, 10), {"a": AdmissionCounts(10, 10)}, children=(), gpu=False)
    finally:
        stop.set()
        thread.join()
    assert meter.measurement is not None
    assert meter.measurement.cameras["a"].decode_cores > 0.02
    assert meter.measurement.decode_cores >= meter.measurement.cameras["a"].decode_cores


def test_ended_processes_count_nothing(tmp_path: Path) -> None:
    meter = LoadMeter(proc=tmp_path)
    for _ in range(2):
        meter.take_sample(taken(0, 0), {}, children=[1], gpu=False)
    assert meter.measurement is not None
    assert meter.measurement.used_cores == 0.0
