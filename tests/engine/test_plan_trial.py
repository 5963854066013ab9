"""One trial of the plan, with real threads and a clock that only the batches move."""

import threading
from collections.abc import Callable

import pytest

from visionedge.engine.autotune import MAX_BATCHES, autotune_plan, run_interleaved, run_trial
from visionedge.engine.plan import OperatingPoint


class SimulatedWorkload:
    """Batches that take time on a clock of each thread's own, as those on cores of their own would."""

    def __init__(self, picture_ms: float) -> None:
        self.picture_ms = picture_ms
        self.batches: list[int] = []
        self.threads: set[int] = set()
        self._own = threading.local()

    def run(self, batch: int) -> None:
        self.batches.append(batch)
        self.threads.add(threading.get_ident())
        self._own.now_ns = self.clock() + int(self.picture_ms * batch * 1e6)

    def clock(self) -> int:
        now_ns: int = getattr(self._own, "now_ns", 0)
        return now_ns


def test_a_trial_runs_for_its_time_and_returns_the_speed() -> None:
    work = SimulatedWorkload(picture_ms=10)
    sample = run_trial(work.run, OperatingPoint(1, 2), 0.1, clock=work.clock, cpu_clock=work.clock)
    assert (sample.frames_per_s, sample.batch_ms, sample.cpu_ms) == pytest.approx((100, 20, 10))
    assert work.batches == [2] * 6, "one to settle, five to fill the time"


def test_the_throughput_of_lanes_is_summed() -> None:
    work = SimulatedWorkload(picture_ms=10)
    sample = run_trial(work.run, OperatingPoint(3, 1), 0.1, clock=work.clock, cpu_clock=work.clock)
    assert (sample.frames_per_s, sample.batch_ms, sample.cpu_ms) == pytest.approx((300, 10, 10))
    assert len(work.threads) == 3


def test_compared_workloads_alternate_batch_by_batch() -> None:
    """Each has its time, and none always comes after the same."""
    order: list[str] = []
    now = [0]

    def run(name: str, picture_ms: int) -> Callable[[int], None]:
        def batch(size: int) -> None:
            order.append(name)
            now[0] += picture_ms * size * 1_000_000

        return batch

    runs = {"fast": run("fast", 10), "slow": run("slow", 20)}
    found = run_interleaved(runs, OperatingPoint(1, 1), 0.09, clock=lambda: now[0], cpu_clock=lambda: now[0])
    assert (found["fast"].batch_ms, found["slow"].batch_ms) == pytest.approx((10, 20))
    assert (found["fast"].frames_per_s, found["slow"].frames_per_s) == pytest.approx((100, 50))
    assert order[2:8] == ["fast", "slow", "slow", "fast", "fast", "slow"]
    assert len(order) == 2 + 2 * 6


def test_a_batch_longer_than_the_time_is_run_once() -> None:
    work = SimulatedWorkload(picture_ms=300)
    sample = run_trial(work.run, OperatingPoint(1, 1), 0.1, clock=work.clock)
    assert work.batches == [1]
    assert sample.batch_ms == pytest.approx(300)


def test_the_number_of_runs_of_a_tiny_network_is_limited() -> None:
    work = SimulatedWorkload(picture_ms=0.001)
    run_trial(work.run, OperatingPoint(1, 1), 0.1, clock=work.clock)
    assert len(work.batches) == 1 + MAX_BATCHES


def test_an_error_of_a_batch_is_raised() -> None:
    def run(_: int) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        run_trial(run, OperatingPoint(2, 1), 0.1)


def test_lanes_run_concurrently() -> None:
    """Each batch waits until the other lane is in one as well; one after the other would never end."""
    both = threading.Barrier(2)
    run_trial(lambda _: both.wait(10), OperatingPoint(2, 1), 0.001, max_count=3, clock=SimulatedWorkload(1).clock)


def test_measuring_runs_the_given_batch_on_real_threads() -> None:
    """Two threads that share nothing are twice as fast as one, whatever the batch: one picture each."""
    work = SimulatedWorkload(picture_ms=20)
    measured = autotune_plan(
        work.run, device="cpu", max_batch=4, fixed_batch=None, cores=2, clock=work.clock, spend_s=60
    )
    assert (measured.choice, measured.buckets) == (OperatingPoint(2, 1), (1,))
    assert set(work.batches) == {1, 2, 4}
