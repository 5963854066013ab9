"""Keeps the promise: shows the overload ladder what is measured, and does what it says.

The variant changes over in the engine room, which takes seconds and goes on beside the loop; everything else
is done by cameras that run, and none is opened again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal, Protocol

from visionedge.app.load_meter import Reading
from visionedge.app.overload_policy import (
    Asked,
    AtTheEnd,
    Direction,
    GivenUp,
    Ladder,
    Policy,
    Return,
    Rung,
    Sight,
    Step,
    Take,
    cameras_in_words,
    device_in_words,
    gated,
    has_room,
    least,
    limits,
    load_of,
    rates_in_words,
    slowed_in_words,
    throttles,
)
from visionedge.app.state import Rooms
from visionedge.config.schema import CameraConfig, OverloadConfig
from visionedge.errors import VisionedgeError
from visionedge.frames.types import utc_now

log = logging.getLogger(__name__)

Code = Literal["overload-taken", "overload-returned", "overload-exhausted"]
Tell = Callable[[Code, str, Mapping[str, Any]], None]
"""Tells an event: code, words, details."""

_AS_IT_WAS: Mapping[Rung, str] = {
    "variant": "the model computes as it is",
    "gate": "no motion gate but those of the configuration",
    "fps": "all cameras at the rates that are asked for",
}


class Engines(Protocol):
    """What the keeper asks of the engine room."""

    @property
    def stand_in(self) -> str | None:
        """The precision that computes in place of the one of the configuration; None: that one does."""

    async def could_be_faster(self) -> bool:
        """Whether another precision might compute more than the engine in use."""

    async def call_stand_in(self) -> str | None:
        """Let the fastest precision compute; which one that is, or None where there is no faster one."""

    async def dismiss_stand_in(self) -> None:
        """Let the engine of the configuration compute again."""


class Keeper:
    """Loop only: `step` after each measurement; `close` before the engines are closed."""

    def __init__(
        self, rooms: Rooms, engines: Engines, tell: Tell, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._rooms, self._engines = rooms, engines
        self._tell = tell
        self._clock = clock
        self._ladder = Ladder()
        self._asked = Asked()
        self._slowed: Mapping[str, float] = {}
        self._since_utc: dict[Rung, datetime] = {}
        self._seen: Reading | None = None
        self._fresh = False
        self._changing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Keeper {self._ladder!r}>"

    async def step(self) -> None:
        """Look at the newest reading, and act; quick, as what takes long goes on beside it."""
        seen = self._rooms.meter.reading
        if seen is None or seen is self._seen:
            return
        self._seen = seen
        self._asked.note(seen)
        if self._changing is None or self._changing.done():
            for step in await self._decide(seen):
                self._do(step)
        self._ease()
        self._publish()

    async def close(self) -> None:
        """End what goes on beside the loop."""
        if self._changing is not None:
            self._changing.cancel()
            with contextlib.suppress(asyncio.CancelledError, VisionedgeError):
                await self._changing

    # --- deciding -------------------------------------------------------------------------------------------

    @property
    def _has_say(self) -> bool:
        config, engine = self._rooms.config.overload, self._rooms.engine
        degraded = engine is not None and engine.device.degraded
        return bool(config.ladder) and (config.when == "always" or degraded)

    async def _decide(self, seen: Reading) -> tuple[Step, ...]:
        now_s, policy = self._clock() / 1e9, _policy(self._rooms.config.overload)
        if self._rooms.readiness():
            # Nothing is computed: that says nothing of what the device carries, nor of which one comes next.
            self._fresh = False
            return self._ladder.look(policy, None, now_s) if self._has_say else ()
        if not self._has_say:
            return self._ladder.release(now_s)
        if "variant" in self._ladder.held and self._engines.stand_in is None:
            self._ladder.lapse("variant")
            self._done(Return("variant"), "another engine computes")
        # The first reading after a change is of both sides of it.
        sight = await self._sight(seen) if self._fresh else None
        self._fresh = True
        return self._ladder.look(policy, sight, now_s)

    async def _sight(self, seen: Reading) -> Sight:
        config, cameras = self._rooms.config.overload, self._cameras()
        wishes = self._asked.wishes(cameras)
        reach: set[Rung] = {"fps"}
        if gated(cameras):
            reach.add("gate")
        if "variant" in config.ladder and await self._engines.could_be_faster():
            reach.add("variant")
        return Sight(
            load=load_of(seen),
            demanded=sum(wish.asked_per_s for wish in wishes.values()),
            delivered=seen.delivered,
            least=least(wishes, config.min_fps),
            room=has_room(seen),
            within_reach=frozenset(reach),
        )

    def _cameras(self) -> dict[str, CameraConfig]:
        """Those that run."""
        running = self._rooms.cameras_by_name
        return {name: each for name, each in self._rooms.config.cameras.items() if name in running}

    # --- acting ---------------------------------------------------------------------------------------------

    def _do(self, step: Step) -> None:
        self._fresh = False
        if isinstance(step, AtTheEnd):
            log.warning("overload: %s: nothing is left to be given up", self._rates())
            self._event("overload-exhausted", f"{self._rates()}: nothing is left to be given up", {})
        elif step.rung == "variant":
            change = self._take_variant() if isinstance(step, Take) else self._return_variant()
            self._changing = asyncio.ensure_future(change)
        else:
            self._ease()
            self._done(step)

    async def _take_variant(self) -> None:
        try:
            precision = await self._engines.call_stand_in()
        except VisionedgeError as error:
            log.warning("overload: the faster variant does not compute: %s", error)
            precision = None
        self._fresh = False
        if precision is None:
            self._ladder.lapse("variant")
        else:
            self._done(Take("variant"))
        self._publish()

    async def _return_variant(self) -> None:
        await self._engines.dismiss_stand_in()
        self._fresh = False
        self._done(Return("variant"))
        self._publish()

    def _ease(self) -> None:
        """Throttle the cameras as far as what is given up says."""
        held, cameras = self._ladder.held, self._cameras()
        wishes, least_per_s = self._asked.wishes(cameras), self._rooms.config.overload.min_fps
        self._slowed = limits(held, wishes, least_per_s, self._slowed)
        wanted = throttles(held, cameras, self._slowed)
        if self._rooms.fleet is not None and wanted != self._rooms.promise.throttles:
            self._rooms.fleet.ease(wanted)
            self._rooms.promise = replace(self._rooms.promise, throttles=wanted)

    # --- telling --------------------------------------------------------------------------------------------

    def _done(self, step: Take | Return, why: str | None = None) -> None:
        """A step is done: counted, and told once."""
        rung, way = step.rung, _way(step)
        if rung in self._ladder.held:
            self._since_utc.setdefault(rung, utc_now())
            what = self._words(rung)
        else:
            self._since_utc.pop(rung, None)
            what = _AS_IT_WAS[rung]
        promise = self._rooms.promise
        steps = {**promise.steps, (rung, way): promise.steps[rung, way] + 1}
        self._rooms.promise = replace(promise, steps=steps)
        words = f"{why or self._reason(way)}: {what}"
        log.log(logging.WARNING if way == "taken" else logging.INFO, "overload: %s", words)
        budget = {} if step.budget_per_s is None else {"framesPerSecond": round(step.budget_per_s, 2)}
        self._event(
            "overload-taken" if way == "taken" else "overload-returned", words, {"rung": rung, **budget}
        )

    def _event(self, code: Code, words: str, details: Mapping[str, Any]) -> None:
        seen = self._seen
        rates = {} if seen is None else {
            "demandedPerSecond": round(seen.demanded, 2), "deliveredPerSecond": round(seen.delivered, 2)
        }  # fmt: skip
        self._tell(code, words, {**details, **rates, "rungs": list(self._since_utc)})

    def _reason(self, way: Direction) -> str:
        if way == "taken":
            return self._rates()
        if self._has_say:
            return "the load has eased"
        return "the device is what was asked for" if self._rooms.config.overload.ladder else "switched off"

    def _rates(self) -> str:
        """What is delivered of what is asked for, and by whom."""
        engine = self._rooms.engine
        device = device_in_words(engine.device.effective) if engine is not None else "the engine"
        rates = "" if self._seen is None else rates_in_words(self._seen)
        return f"too much for {device} ({rates})"

    def _words(self, rung: Rung) -> str:
        """What a rung that is taken means just now."""
        if rung == "variant":
            return self._engines.stand_in or "a faster variant"
        if rung == "gate":
            return f"a motion gate on {cameras_in_words(gated(self._cameras()))}"
        return slowed_in_words(self._slowed, self._asked.per_s)

    def _publish(self) -> None:
        given_up = tuple(
            GivenUp(rung, self._since_utc[rung], self._words(rung))
            for rung in self._ladder.held
            if rung in self._since_utc
        )
        self._rooms.promise = replace(
            self._rooms.promise,
            has_say=self._has_say,
            at_the_end=self._ladder.at_the_end,
            given_up=given_up,
        )


def _policy(config: OverloadConfig) -> Policy:
    return Policy(config.ladder, config.after_seconds, config.back_after_seconds)


def _way(step: Take | Return) -> Direction:
    return "taken" if isinstance(step, Take) else "returned"
