"""Threads and the door between them and the loop."""

import threading

import pytest

from visionedge.errors import UnavailableError
from visionedge.runtime.threads import LoopQueue, ThreadGroup, TimedJoinExecutor, non_daemon_threads


def test_the_death_of_a_vital_thread_is_reported_with_its_error(caplog: pytest.LogCaptureFixture) -> None:
    """The thread group is notified once, with the name and the error."""
    deaths: list[tuple[str, BaseException | None]] = []
    thread_group = ThreadGroup(lambda name, error: deaths.append((name, error)))

    def die() -> None:
        raise RuntimeError("boom")

    thread_group.start("lane:0", die, vital=True).join()
    thread_group.start("lane:1", lambda: None, vital=True).join()
    assert [name for name, _ in deaths] == ["lane:0", "lane:1"]
    assert isinstance(deaths[0][1], RuntimeError)
    assert "lane:0: ended by an exception" in caplog.text


def test_threads_may_end_while_the_module_stops() -> None:
    """A requested end is not reported."""
    deaths: list[str] = []
    thread_group = ThreadGroup(lambda name, _: deaths.append(name))
    release = threading.Event()

    def work() -> None:
        release.wait(5)

    thread_group.start("lane:0", work, vital=True)
    assert thread_group.alive() == ["lane:0"]
    thread_group.stopping.set()
    release.set()
    assert thread_group.join(5) == []
    assert deaths == []


def test_the_loop_queue_wakes_its_reader_once_and_drops_the_oldest() -> None:
    """One wake for many items; a full box loses its oldest and counts it."""
    wakes: list[int] = []
    box: LoopQueue[int] = LoopQueue(lambda: wakes.append(1), limit=3)
    for item in range(5):
        box.put(item)
    assert (box.drain(), box.dropped, len(wakes)) == ([2, 3, 4], 2, 1)
    box.put(9)
    assert (box.drain(), len(wakes)) == ([9], 2)


def test_a_reader_that_stays_awake_needs_no_further_wake_until_it_finds_nothing() -> None:
    wakes: list[int] = []
    box: LoopQueue[int] = LoopQueue(lambda: wakes.append(1))
    box.put(1)
    assert box.drain(stay_awake=True) == [1]
    box.put(2)
    assert len(wakes) == 1
    assert box.drain(stay_awake=True) == [2]
    assert box.drain(stay_awake=True) == []
    box.put(3)
    assert (len(wakes), box.drain()) == (2, [3])


def test_closing_an_executor_does_not_wait_for_a_hanging_job() -> None:
    """It is named, so that the process can be ended without it; jobs that have not begun are dropped."""
    release, begun = threading.Event(), threading.Event()
    executor = TimedJoinExecutor(1, "request", join_s=0.01)

    def hang() -> None:
        begun.set()
        release.wait()

    hanging, waiting = executor.submit(hang), executor.submit(hang)
    assert begun.wait(5)
    executor.shutdown(wait=True, cancel_futures=True)
    assert executor.alive() == ["request_0"]
    assert "request_0" in non_daemon_threads()
    assert waiting.cancelled()
    release.set()
    hanging.result(5)
    for thread in threading.enumerate():
        if thread.name == "request_0":
            thread.join(5)
    assert executor.alive() == []
    assert "request_0" not in non_daemon_threads()


def test_closing_an_executor_waits_for_a_job_that_ends() -> None:
    executor = TimedJoinExecutor(2, "request")
    done = executor.submit(lambda: "result")
    executor.shutdown(wait=True)
    assert (done.result(0), executor.alive()) == ("result", [])


def test_a_limit_on_threads_is_named_and_does_not_disturb_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that never ran is not joined."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread_group = ThreadGroup(lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(UnavailableError, match=r"the thread lane:0 cannot be started: .*pids limit"):
            thread_group.start("lane:0", lambda: None)
    assert thread_group.join(5) == []
