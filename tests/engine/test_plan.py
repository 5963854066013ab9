"""The plan: lanes and buckets by device, and how many cores there really are."""

from pathlib import Path

import pytest

from visionedge.engine.autotune import AutotuneRequest
from visionedge.engine.plan import make_default_plan
from visionedge.runtime.process_limits import MAX_LANES, bounded_cores, cpu_quota, usable_cores


def test_a_cpu_gets_a_lane_for_each_core_and_one_picture_at_a_time() -> None:
    plan = make_default_plan("cpu", 8, None, 4)
    assert (plan.lanes, plan.buckets, plan.max_batch) == (4, (1,), 1)
    assert "4 usable cores" in plan.reason


@pytest.mark.parametrize(
    ("most", "buckets"),
    [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12)), (64, (1, 2, 4, 8, 16, 32, 64))],
)
def test_a_gpu_gets_two_lanes_and_buckets_up_to_the_largest_batch(
    most: int, buckets: tuple[int, ...]
) -> None:
    plan = make_default_plan("cuda", most, None, 4)
    assert (plan.lanes, plan.buckets) == (2, buckets)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_with_a_fixed_batch_has_one_bucket_of_that_size(device: str) -> None:
    assert make_default_plan(device, 8, 3, 2).buckets == (3,)


def test_a_batch_goes_into_the_smallest_bucket_that_holds_it() -> None:
    plan = make_default_plan("cuda", 8, None, 1)
    assert [plan.bucket(count) for count in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 8]


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("?", 8)],
)
def test_the_cpu_quota_of_a_container_counts(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert usable_cores(lambda: 8, tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3)])
def test_the_cpu_quota_of_cgroups_v1_counts(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cores(lambda: 8, tmp_path) == cores


@pytest.mark.parametrize(
    ("groups", "folder", "text"),
    [
        ("0::/system.slice/vision.service", "system.slice", "150000 100000"),
        ("0::/system.slice/vision.service", "system.slice/vision.service", "150000 100000"),
        ("4:cpu,cpuacct:/machine/vision\n1:name=systemd:/x", "cpu/machine", "150000"),
    ],
)
def test_outside_a_container_the_quotas_of_the_cgroup_and_its_ancestors_count(
    tmp_path: Path, groups: str, folder: str, text: str
) -> None:
    """The smallest of them, in cores; as of a service that systemd limits."""
    membership = tmp_path / "cgroup"
    membership.write_text(f"{groups}\n")
    (tmp_path / "fs" / folder).mkdir(parents=True)
    if "cpu/" in folder:
        (tmp_path / "fs" / folder / "cpu.cfs_quota_us").write_text(text)
        (tmp_path / "fs" / folder / "cpu.cfs_period_us").write_text("100000")
    else:
        (tmp_path / "fs" / folder / "cpu.max").write_text(text)
        (tmp_path / "fs" / "cpu.max").write_text("max 100000")
    assert cpu_quota(tmp_path / "fs", membership) == 1.5
    assert usable_cores(lambda: 8, tmp_path / "fs", membership) == 2


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(lambda: 3, tmp_path / "none") == 3
    assert usable_cores() >= 1


@pytest.mark.parametrize("cores", [1, 250, 1024])
def test_the_number_of_lanes_is_bounded(cores: int) -> None:
    """Each lane has a socket to the engine's process, and one message hands over 253 at most."""
    wanted = AutotuneRequest("cpu", 8, None, cores)
    most = min(cores, MAX_LANES)
    assert make_default_plan("cpu", 8, None, cores).lanes == most
    assert max(wanted.lanes()) == wanted.default_point().lanes == bounded_cores(cores) == most
    assert len(wanted.lanes()) <= 10
