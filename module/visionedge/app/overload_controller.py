"""Acts while the module is overloaded: gives the measured load to `DegradationPolicy`, and does its steps.

`EngineHost` opens the faster variant, which takes seconds and runs beside the loop; the other levels throttle
cameras that run, and no camera is opened again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal, Protocol

from visionedge.app.load_meter import LoadMeasurement
from visionedge.app.overload_policy import (
    CameraDemand,
    DegradationLevel,
    DegradationPolicy,
    DegradationStep,
    Exhausted,
    LoadSnapshot,
    ReturnLevel,
    StepDirection,
    TakeLevel,
    TakenLevel,
    build_throttles,
    classify_load,
    compute_fps_limits,
    describe_cameras,
    describe_device,
    describe_fps_limits,
    describe_rates,
    find_gateable_cameras,
    has_headroom,
    sum_of_minimums,
)
from visionedge.app.state import AppState
from visionedge.config.schema import CameraConfig
from visionedge.errors import VisionedgeError
from visionedge.frames.types import utc_now

log = logging.getLogger(__name__)

OverloadEventCode = Literal["overload-taken", "overload-returned", "overload-exhausted"]
EventCallback = Callable[[OverloadEventCode, str, Mapping[str, Any]], None]
"""Sends an event: code, message, details."""

_RETURNED_TEXT: Mapping[DegradationLevel, str] = {
    "variant": "the model in its configured precision",
    "gate": "no motion gates but those of the configuration",
    "fps": "all cameras at their configured rates",
}


class VariantSwitcher(Protocol):
    """What the controller needs of `EngineHost`."""

    @property
    def substitute_precision(self) -> str | None:
        """The precision of the substitute engine; None without a substitute."""

    async def can_try_faster_variant(self) -> bool:
        """Whether another precision may be faster than the engine in use."""

    async def start_substitute(self) -> str | None:
        """Send frames to the fastest precision, and return it; None if no other one is faster."""

    async def stop_substitute(self) -> None:
        """Send frames to the engine of the configuration again."""


class OverloadController:
    """For the loop: call `step` after each measurement, and `close` before the engines are closed."""

    def __init__(
        self,
        state: AppState,
        variant_switcher: VariantSwitcher,
        emit_event: EventCallback,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._state, self._variant_switcher = state, variant_switcher
        self._emit_event = emit_event
        self._clock = clock
        self._degradation = DegradationPolicy()
        self._demand = CameraDemand()
        self._fps_limits: Mapping[str, float] = {}
        self._since_utc: dict[DegradationLevel, datetime] = {}
        self._last_measurement: LoadMeasurement | None = None
        self._is_settled = False
        self._variant_change: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<OverloadController {self._degradation!r}>"

    async def step(self) -> None:
        """Act on the newest measurement. Quick: a change of the variant goes on as a task."""
        seen = self._state.meter.measurement
        if seen is None or seen is self._last_measurement:
            return
        self._last_measurement = seen
        self._demand.update(seen)
        if self._variant_change is None or self._variant_change.done():
            for step in await self._decide(seen):
                self._execute(step)
        self._throttle_cameras()
        self._publish_status()

    async def close(self) -> None:
        """Cancel a change of the variant that is under way."""
        if self._variant_change is not None:
            self._variant_change.cancel()
            with contextlib.suppress(asyncio.CancelledError, VisionedgeError):
                await self._variant_change

    # --- deciding -------------------------------------------------------------------------------------------

    @property
    def _may_act(self) -> bool:
        now = self._state.snapshot()
        config, info = now.config.overload, now.engine_info()
        degraded = info is not None and info.device.degraded
        return bool(config.levels) and (config.when == "always" or degraded)

    async def _decide(self, seen: LoadMeasurement) -> tuple[DegradationStep, ...]:
        now = self._state.snapshot()
        now_s, settings = self._clock() / 1e9, now.config.overload
        if now.readiness():
            # No frame is analysed, so the measurement says nothing about this device or the next one.
            self._is_settled = False
            return self._degradation.decide(settings, None, now_s) if self._may_act else ()
        if not self._may_act:
            return self._degradation.return_all(now_s)
        if "variant" in self._degradation.active and self._variant_switcher.substitute_precision is None:
            self._degradation.drop_level("variant")
            self._report_step(ReturnLevel("variant"), "another engine is in use")
        # The first measurement after a step covers the time before it, too.
        snapshot = await self._take_snapshot(seen) if self._is_settled else None
        self._is_settled = True
        return self._degradation.decide(settings, snapshot, now_s)

    async def _take_snapshot(self, seen: LoadMeasurement) -> LoadSnapshot:
        config, cameras = self._state.snapshot().config.overload, self._cameras()
        requests = self._demand.requests(cameras)
        available_levels: set[DegradationLevel] = {"fps"}
        if find_gateable_cameras(cameras):
            available_levels.add("gate")
        if "variant" in config.levels and await self._variant_switcher.can_try_faster_variant():
            available_levels.add("variant")
        return LoadSnapshot(
            load=classify_load(seen),
            demanded=sum(request.asked_per_s for request in requests.values()),
            delivered=seen.delivered,
            min_total_per_s=sum_of_minimums(requests, config.min_fps),
            headroom=has_headroom(seen),
            available_levels=frozenset(available_levels),
        )

    def _cameras(self) -> dict[str, CameraConfig]:
        """The settings of the cameras that run."""
        now = self._state.snapshot()
        return {name: each for name, each in now.config.cameras.items() if name in now.running_cameras}

    # --- acting ---------------------------------------------------------------------------------------------

    def _execute(self, step: DegradationStep) -> None:
        self._is_settled = False
        if isinstance(step, Exhausted):
            message = f"{self._describe_overload()}: no level is left to reduce the load"
            log.warning("overload: %s", message)
            self._event("overload-exhausted", message, {})
        elif step.level == "variant":
            change = self._take_variant() if isinstance(step, TakeLevel) else self._return_variant()
            self._variant_change = asyncio.ensure_future(change)
        else:
            self._throttle_cameras()
            self._report_step(step)

    async def _take_variant(self) -> None:
        try:
            precision = await self._variant_switcher.start_substitute()
        except VisionedgeError as error:
            log.warning("overload: the faster variant cannot be used: %s", error)
            precision = None
        self._is_settled = False
        if precision is None:
            self._degradation.drop_level("variant")
        else:
            self._report_step(TakeLevel("variant"))
        self._publish_status()

    async def _return_variant(self) -> None:
        await self._variant_switcher.stop_substitute()
        self._is_settled = False
        self._report_step(ReturnLevel("variant"))
        self._publish_status()

    def _throttle_cameras(self) -> None:
        """Throttle the cameras as the active levels require."""
        active, cameras = self._degradation.active, self._cameras()
        requests, least_per_s = self._demand.requests(cameras), self._state.snapshot().config.overload.min_fps
        self._fps_limits = compute_fps_limits(active, requests, least_per_s, self._fps_limits)
        wanted = build_throttles(active, cameras, self._fps_limits)
        now = self._state.snapshot()
        if now.camera_registry is not None and wanted != now.overload_status.throttles:
            now.camera_registry.throttle(wanted)
            self._state.set_overload_status(replace(now.overload_status, throttles=wanted))

    # --- log, events and status -----------------------------------------------------------------------------

    def _report_step(self, step: TakeLevel | ReturnLevel, why: str | None = None) -> None:
        """Count a step that is done, and report it to the log and as an event."""
        level, direction = step.level, _direction_of(step)
        if level in self._degradation.active:
            self._since_utc.setdefault(level, utc_now())
            what = self._describe_level(level)
        else:
            self._since_utc.pop(level, None)
            what = _RETURNED_TEXT[level]
        overload_status = self._state.snapshot().overload_status
        steps = {**overload_status.steps, (level, direction): overload_status.steps[level, direction] + 1}
        self._state.set_overload_status(replace(overload_status, steps=steps))
        message = f"{why or self._reason(direction)}: {what}"
        log.log(logging.WARNING if direction == "taken" else logging.INFO, "overload: %s", message)
        budget = {} if step.budget_per_s is None else {"framesPerSecond": round(step.budget_per_s, 2)}
        self._event(
            "overload-taken" if direction == "taken" else "overload-returned",
            message,
            {"level": level, **budget},
        )

    def _event(self, code: OverloadEventCode, message: str, details: Mapping[str, Any]) -> None:
        seen = self._last_measurement
        rates = {} if seen is None else {
            "demandedPerSecond": round(seen.demanded, 2), "deliveredPerSecond": round(seen.delivered, 2)
        }  # fmt: skip
        self._emit_event(code, message, {**details, **rates, "levels": list(self._since_utc)})

    def _reason(self, direction: StepDirection) -> str:
        if direction == "taken":
            return self._describe_overload()
        if self._may_act:
            return "the load is lower"
        levels = self._state.snapshot().config.overload.levels
        return "the requested device is in use" if levels else "switched off"

    def _describe_overload(self) -> str:
        """The device and its rates, in a few words."""
        info = self._state.snapshot().engine_info()
        device = describe_device(info.device.effective) if info is not None else "the engine"
        rates = "" if self._last_measurement is None else describe_rates(self._last_measurement)
        return f"too much for {device} ({rates})"

    def _describe_level(self, level: DegradationLevel) -> str:
        """What an active level means now, in a few words."""
        if level == "variant":
            return self._variant_switcher.substitute_precision or "a faster variant"
        if level == "gate":
            return f"a motion gate on {describe_cameras(find_gateable_cameras(self._cameras()))}"
        return describe_fps_limits(self._fps_limits, self._demand.per_s)

    def _publish_status(self) -> None:
        taken_levels = tuple(
            TakenLevel(level, self._since_utc[level], self._describe_level(level))
            for level in self._degradation.active
            if level in self._since_utc
        )
        self._state.set_overload_status(
            replace(
                self._state.snapshot().overload_status,
                may_act=self._may_act,
                exhausted=self._degradation.exhausted,
                taken_levels=taken_levels,
            )
        )


def _direction_of(step: TakeLevel | ReturnLevel) -> StepDirection:
    return "taken" if isinstance(step, TakeLevel) else "returned"
