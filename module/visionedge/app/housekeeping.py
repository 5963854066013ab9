"""What the service does a few times a second while it runs, and how it counts errors that should not happen.

`Housekeeping.tick` sends what is due, watches the cameras, measures the load, and stores sequence numbers. A
step that fails is logged and retried at the next tick; `FailureCounter` ends the module if that never helps.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from visionedge.app.metrics import Metrics
from visionedge.app.overload_controller import OverloadController
from visionedge.app.scene_host import SceneHost
from visionedge.app.state import AppState, StateSnapshot
from visionedge.camera.registry import SequencePosition, SequenceStore
from visionedge.iothub.delivery import Delivery
from visionedge.runtime.logs import LogLimiter
from visionedge.runtime.threads import ThreadGroup, run_on_thread

log = logging.getLogger(__name__)

TICK_S = 0.2

_SLOW_TICKS = 50
"""Every 10 s: sequence numbers are stored, and removed cameras forgotten."""

_MEASURE_INTERVAL_RANGE_S = (1.0, 5.0)
_MAX_CONSECUTIVE_FAILURES = 50


class FailureCounter:
    """Counts unexpected errors in a row; at the 50th calls `on_limit`, as only a new process helps."""

    def __init__(self, on_limit: Callable[[str, Exception], None]) -> None:
        self.consecutive = 0
        self._on_limit = on_limit
        self._log = LogLimiter(log)

    def __repr__(self) -> str:
        return f"<FailureCounter {self.consecutive} in a row>"

    def record(self, what: str, error: Exception) -> None:
        """Log an error of `what`, and count it."""
        self.consecutive += 1
        if self.consecutive == _MAX_CONSECUTIVE_FAILURES:
            self._on_limit(f"{what} failed {_MAX_CONSECUTIVE_FAILURES} times in a row", error)
        else:
            self._log.warning(f"{what} failed; retrying", error=error)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step that may fail. Lack of memory or descriptors does not count: a new process has it, too."""
        try:
            yield
        except (OSError, MemoryError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            self._log.warning(f"{what} failed ({why}); retrying")
        except Exception as error:  # noqa: BLE001 - counted, and the end of the module if it never stops
            self.record(what, error)


class PositionStore:
    """Stores the sequence numbers of the cameras and of the hub's images in `sequences.json`."""

    def __init__(
        self,
        sequences: SequenceStore,
        state: AppState,
        next_sequences: Callable[[], Mapping[str, int]],
        data: Path,
    ) -> None:
        self._sequences = sequences
        self._state = state
        self._next_sequences = next_sequences
        self._data = data
        self._writable = True
        self._is_stalled = False

    async def save(self, thread_group: ThreadGroup) -> None:
        """Write the file on a thread of the group; that it cannot be written is logged once."""
        registry = self._state.snapshot().camera_registry
        last: dict[str, SequencePosition] = {} if registry is None else dict(registry.positions())
        last |= {name: SequencePosition(number) for name, number in self._next_sequences().items()}
        try:
            await run_on_thread(thread_group, "remembering", lambda: self._sequences.remember(last))
        except OSError as error:
            # The numbers also begin at the clock, so they repeat only if the clock is set back.
            if self._writable:
                log.warning("%s", describe_unwritable_folder(self._data, error))
            self._writable = False
        else:
            self._writable = True
        if self._is_stalled:
            self._is_stalled = False
            log.info("%s: the disk answers again", self._data)

    def report_stall(self) -> None:
        """`save` has not returned for ten seconds: log it once."""
        if not self._is_stalled:
            self._is_stalled = True
            log.warning(
                "%s: the disk has not answered for %.0f s; frames go on, but no state is kept; check the disk"
                " and its driver",
                self._data,
                _SLOW_TICKS * TICK_S,
            )


class Housekeeping:
    """The periodic work of the service. For the loop; `tick` is called every `TICK_S`."""

    def __init__(
        self,
        state: AppState,
        thread_group: ThreadGroup,
        *,
        controller: OverloadController,
        positions: PositionStore,
        metrics: Metrics,
        scene_host: SceneHost,
        failures: FailureCounter,
    ) -> None:
        self._state = state
        self._thread_group = thread_group
        self._controller = controller
        self._positions = positions
        self._metrics = metrics
        self._scene_host = scene_host
        self._failures = failures
        self._ticks = 0
        self._measure_tick = 0
        self._saving: asyncio.Task[None] | None = None

    async def tick(self, delivery: Delivery) -> None:
        """Do once what is due."""
        now, failures_before = self._state.snapshot(), self._failures.consecutive
        self._ticks += 1
        with self._failures.step("the delivery"):
            delivery.tick()
        with self._failures.step("the scenes"):
            self._scene_host.acknowledge(delivery.take_acknowledged())
            self._scene_host.tick()
        if now.camera_registry is not None:
            with self._failures.step("watching the cameras"):
                now.camera_registry.check_liveness()
        if self._ticks % _SLOW_TICKS == 0:
            with self._failures.step("forgetting removed cameras"):
                self._forget_removed_cameras(now)
            if self._saving is None or self._saving.done():
                self._saving = asyncio.ensure_future(self._positions.save(self._thread_group))
            else:
                self._positions.report_stall()
        if now.engine_infos() and self._ticks >= self._measure_tick:
            self._measure_tick = self._ticks + round(_measure_interval_s(now) / TICK_S)
            with self._failures.step("measuring the load"):
                await run_on_thread(self._thread_group, "measuring", lambda: _measure(now))
                await self._controller.step()
        if self._failures.consecutive == failures_before:
            self._failures.consecutive = 0

    def _forget_removed_cameras(self, now: StateSnapshot) -> None:
        """Free the metrics and results of cameras that left the configuration a while ago."""
        if now.camera_registry is not None:
            for name in now.camera_registry.forget_removed(now.config.cameras):
                self._metrics.forget(name)
                now.latest_results.forget(name)


def _measure_interval_s(now: StateSnapshot) -> float:
    """A third of the time after which load counts as an overload, from 1 to 5 s."""
    shortest_s, longest_s = _MEASURE_INTERVAL_RANGE_S
    return min(longest_s, max(shortest_s, now.config.overload.after_seconds / 3))


def _measure(now: StateSnapshot) -> None:
    infos = now.engine_infos().values()
    children = [info.process.pid for info in infos if info.process is not None and info.process.pid]
    counts = {} if now.camera_registry is None else now.camera_registry.counts()
    gpu = any(info.device.effective != "cpu" for info in infos)
    now.meter.take_sample(now.batcher.statistics(), counts, children=children, gpu=gpu)


def describe_unwritable_folder(folder: Path, error: OSError) -> str:
    """One line about a data folder that cannot be written, with the remedy."""
    text = f"{folder} cannot be written ({error.strerror}): no state is kept"
    if not isinstance(error, PermissionError):
        return text
    owner = f"{os.getuid()}:{os.getgid()}"
    return f"{text}; give the folder that is mounted there to this user: chown {owner} FOLDER"
