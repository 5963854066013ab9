"""The watchdog: a loop that hangs ends the process; one that is only slow, or stopped, does not."""

import asyncio
import subprocess
import sys
import time

import pytest

from visionedge.runtime.watchdog import EXIT_HUNG, LoopWatchdog, format_all_stacks


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pass_time(watchdog: LoopWatchdog, clock: Clock, seconds: float, *, beats: bool) -> list[float]:
    found = []
    for _ in range(int(seconds / 5)):
        clock.now_s += 5
        if beats:
            watchdog.beat()
        if (silent_s := watchdog.look()) is not None:
            found.append(silent_s)
    return found


def test_a_loop_that_beats_is_never_reported() -> None:
    clock = Clock()
    assert not pass_time(LoopWatchdog(clock_s=clock), clock, 600, beats=True)


def test_a_loop_without_a_heartbeat_is_reported_after_the_limit() -> None:
    clock = Clock()
    watchdog = LoopWatchdog(clock_s=clock)
    assert not pass_time(watchdog, clock, 60, beats=False)
    assert pass_time(watchdog, clock, 5, beats=False) == [65]


def test_a_loop_that_runs_again_in_time_is_not_reported() -> None:
    clock = Clock()
    watchdog = LoopWatchdog(clock_s=clock)
    assert not pass_time(watchdog, clock, 55, beats=False)
    watchdog.beat()
    assert not pass_time(watchdog, clock, 60, beats=False)


def test_time_in_which_the_whole_process_was_stopped_does_not_count() -> None:
    clock = Clock()
    watchdog = LoopWatchdog(clock_s=clock)
    clock.now_s += 3600
    assert watchdog.look() is None
    assert not pass_time(watchdog, clock, 60, beats=False)
    assert pass_time(watchdog, clock, 5, beats=False)


def test_stacks_name_threads_and_functions() -> None:
    text = format_all_stacks()
    assert "thread MainThread:" in text
    assert "test_stacks_name_threads_and_functions" in text


HANGS = """
import asyncio, logging, sys, time
from visionedge.runtime.logs import configure_logging
from visionedge.runtime.watchdog import LoopWatchdog
configure_logging("info", "iotedge")
async def main():
    watchdog = LoopWatchdog(limit_s=0.5)
    watchdog.start(asyncio.get_running_loop())
    await asyncio.sleep(0.2)
    {hang}
asyncio.run(main())
"""


def run_hanging(hang: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANGS.format(hang=hang)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_hung_loop_ends_the_process_with_75_and_all_stacks_in_one_line() -> None:
    ended = run_hanging("time.sleep(60)")
    assert ended.returncode == EXIT_HUNG
    (line,) = ended.stderr.splitlines()
    assert line.startswith("<3> ")
    assert "the main loop has not run for" in line
    assert "thread MainThread:" in line


def test_a_lock_of_the_log_does_not_keep_the_process_alive() -> None:
    ended = run_hanging("logging.getLogger().handlers[0].acquire(); time.sleep(60)")
    assert ended.returncode == EXIT_HUNG
    assert "File" in ended.stderr


def test_native_code_that_holds_the_interpreter_lock_does_not_keep_the_process_alive() -> None:
    """A regular expression with catastrophic backtracking never releases the lock."""
    ended = run_hanging("import re; re.match('(a+)+$', 'a' * 100 + 'b')")
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr


def test_a_closed_watchdog_ends_nothing() -> None:
    reported: list[float] = []

    async def main() -> None:
        watchdog = LoopWatchdog(limit_s=0.05, on_hang=reported.append)
        watchdog.start(asyncio.get_running_loop())
        watchdog.close()
        time.sleep(0.2)  # noqa: ASYNC251 - the loop hangs
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert not reported


@pytest.mark.parametrize("limit_s", [0.1])
def test_a_hang_is_reported_once(limit_s: float) -> None:
    reported: list[float] = []

    async def main() -> None:
        watchdog = LoopWatchdog(limit_s=limit_s, on_hang=reported.append)
        watchdog.start(asyncio.get_running_loop())
        deadline = time.monotonic() + 30
        while not reported and time.monotonic() < deadline:
            time.sleep(0.01)  # noqa: ASYNC251 - the loop hangs
        watchdog.close()

    asyncio.run(main())
    assert len(reported) == 1
