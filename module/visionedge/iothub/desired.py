"""Desired properties as a carrier of the configuration: judged whole, applied, acknowledged, kept on disk.

twin ─▶ Wish ─▶ laid over the local document ─▶ validated ─▶ applied ─▶ last good on disk
                                       └ any problem: nothing is applied, every section says why
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from visionedge.config.documents import Document
from visionedge.config.load import local_only, validate
from visionedge.config.schema import Config
from visionedge.errors import ConfigError
from visionedge.iothub.last_good import LastGood
from visionedge.iothub.wish import Refusals, Wish, acknowledgement, in_force, overlaid, refusals, wish_of
from visionedge.runtime.redaction import keep_secret, redact, secrets_in

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 3600.0
_KEEP_AGAIN_S = 2.0
_MOST_LINES = 50
_MOST_TOLD = 500
"""Problems in the log and in an event: a twin of 32 KB can be wrong in thousands of ways."""

Apply = Callable[[Config], Awaitable[Mapping[str, str]]]
"""Makes the running module that of a configuration; gives the sections that stay as they were, and why."""

Code = Literal["config-applied", "config-rejected"]
Tell = Callable[[Code, str, Mapping[str, Any]], None]
"""Sends an event: its code, its text, its details."""


@dataclass(frozen=True, slots=True)
class Start:
    """What the module starts with: the configuration, and the desired document in it, if one was kept."""

    config: Config
    wish: Wish | None = None


@dataclass(frozen=True, slots=True)
class Carriers:
    """Where the configuration comes from: the local document, what the module starts with, and the keeper.

    `last_good` None: nothing is kept, as outside IoT Edge.
    """

    local: Document
    start: Start
    last_good: LastGood | None = None

    @staticmethod
    def read(local: Document, last_good: LastGood | None = None) -> "Carriers":
        """The local document, and over it what was kept of the twin, if that fits still. Blocks.

        Raises:
            ConfigError: the local document is wrong.
        """
        start = Start(validate(local))
        wish = None if last_good is None else last_good.read()
        if wish is not None:
            try:
                start = Start(validate(overlaid(local, wish.document)), wish)
            except ConfigError as error:
                # The local document or the module's version may have changed since; the hub is asked soon.
                log.warning("the last good desired properties fit no more: %s", redact(str(error)))
            except Exception as error:  # noqa: BLE001 - no content of a state file may keep the module from starting
                assert last_good is not None  # noqa: S101 - it gave the document
                last_good.set_aside(f"it cannot be understood: {type(error).__name__}")
        return Carriers(local, start, last_good)

    def without_wish(self) -> "Carriers":
        """The same, starting with the local document alone."""
        return replace(self, start=Start(validate(self.local)))


class Desired:
    """Takes one wish after the other, the newest first. For the asyncio loop; `run` is its only task.

    Args:
        carriers: what runs now, the document that desired properties are laid over, and who keeps them.
        apply: makes another configuration run; what it refused is tried again, ever more rarely.
        tell: sends an event.
        give_way: called when another model is wished while `apply` may still be fetching one.
        retry_s: how long after a refusal it is tried again, at first.
    """

    def __init__(
        self,
        carriers: Carriers,
        apply: Apply,
        tell: Tell,
        *,
        give_way: Callable[[], None] = lambda: None,
        retry_s: float = 30.0,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        start = carriers.start
        self._local = carriers.local
        # The configuration of which every section is in force; None where some may not be.
        self._running: Config | None = None
        self._started_with = start.wish
        self._force: Document = {} if start.wish is None else start.wish.document
        self._kept = start.wish
        self._to_keep: Wish | None = None
        self._again = False
        self._reading: Callable[[], Document] | None = None
        self._apply = apply
        self._last_good = carriers.last_good
        self._tell = tell
        self._give_way = give_way
        self._clock_s = clock_s
        self._first_retry_s = self._retry_s = retry_s
        self._refused: Refusals = {}
        self._refused_s = 0.0
        self._refusals: Refusals = {}
        self._told: tuple[Wish, Refusals] | None = None
        self._applying = False
        self._judged: Wish | None = None
        self._waiting: Wish | None = None
        self._news = asyncio.Event()
        self.acknowledgement: Document = (
            {} if start.wish is None else acknowledgement(start.wish, {}, self._force)
        )
        self.counts = {"applied": 0, "rejected": 0}

    def __repr__(self) -> str:
        version = self._judged.version if self._judged else None
        return f"<Desired version={version} {self.counts}>"

    def seen(self, twin: Mapping[str, Any]) -> None:
        """The whole twin was read: take what it wishes, unless that is what was judged last."""
        wish = wish_of(twin)
        if wish is not None and wish not in (self._judged, self._waiting):
            self._waiting = wish
            self._news.set()
            judged = {} if self._judged is None else self._judged.document
            if self._applying and judged.get("model") != wish.document.get("model"):
                self._give_way()

    def judge(self, document: Mapping[str, Any]) -> Config:
        """What a desired document would make of the configuration. Blocks a little.

        Raises:
            ConfigError: it would be refused, with every problem.
        """
        ours = local_only(document)
        try:
            config = validate(overlaid(self._local, document))
        except ConfigError as error:
            raise ConfigError([*error.problems, *ours]) from None
        finally:
            # So many documents may be judged that their secrets would push out those that are in use.
            keep_secret(secrets_in(self._local) | secrets_in(self._force))
        if ours:
            raise ConfigError(ours)
        return config

    def retry(self) -> None:
        """What was refused for the time being may be possible now: try it at once."""
        if self._refused:
            self._again = True
            self._news.set()

    def reload(self, read: Callable[[], Document]) -> None:
        """Take the local document anew, as `read` gives it; it may block."""
        self._reading = read
        self._news.set()

    async def run(self) -> None:
        """Take wishes until cancelled."""
        while True:
            timed_out = await self._waited()
            try:
                await self._step(timed_out)
            except Exception:  # what comes next must be heard
                log.exception("taking desired properties failed")

    async def _waited(self) -> bool:
        """Wait for news, or until something is to be tried again; whether a refusal's time is up."""
        pauses_s = [_KEEP_AGAIN_S] if self._to_keep is not None else []
        pauses_s += [self._left_s()] if self._refused else []
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), max(0.0, min(pauses_s)) if pauses_s else None)
        self._news.clear()
        return bool(self._refused) and self._left_s() <= 0

    def _left_s(self) -> float:
        return self._refused_s + self._retry_s - self._clock_s()

    async def _step(self, timed_out: bool) -> None:
        if self._to_keep is not None:
            await self._keep(self._to_keep)
        if (read := self._reading) is not None:
            self._reading = None
            await self._take_local(read)
        again, self._again = self._again, False
        if self._waiting is not None:
            wish, self._waiting = self._waiting, None
            self._retry_s, self._refused, self._judged = self._first_retry_s, {}, wish
            await self._take(wish)
        elif self._judged is not None and (timed_out or (again and self._refused)):
            self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
            await self._take(self._judged)

    async def _take_local(self, read: Callable[[], Document]) -> None:
        """Take another local document if it is sound, alone and under what is desired; else say why not."""
        try:
            local = await asyncio.to_thread(read)
            await asyncio.to_thread(validate, local)
            config = await asyncio.to_thread(validate, overlaid(local, self._force))
        except ConfigError as error:
            for problem in error.problems[:_MOST_LINES]:
                log.warning("configuration file: %s", redact(problem))
            log.warning("the configuration file is wrong (%d problems): it is not used", len(error.problems))
            return
        finally:
            keep_secret(secrets_in(self._local) | secrets_in(self._force))
        refused = await self._applied(config)
        for reason in (reason for reasons in refused.values() for reason in reasons):
            log.warning("configuration file: %s; this section stays as it was", redact(reason))
        if "" in refused:
            self._running = None
            return
        changed = {key for key in {*local, *self._local} if local.get(key) != self._local.get(key)}
        self._local = {
            **{key: value for key, value in local.items() if key not in refused},
            **{key: self._local[key] for key in refused if key in self._local},
        }
        self._running = None if refused else config
        applied = sorted(changed - refused.keys())
        log.info("the configuration file is applied: %s", ", ".join(applied) or "nothing in it has changed")

    async def keep_waiting(self) -> None:
        """Keep a wish that waits and would be taken, without applying it: for the next start."""
        wish = self._waiting or self._judged
        if wish is None:
            return
        try:
            await asyncio.to_thread(self.judge, wish.document)
        except ConfigError:
            return
        await self._keep(wish)

    async def _take(self, wish: Wish) -> None:
        self._refusals = {}
        try:
            config = await asyncio.to_thread(self.judge, wish.document)
        except ConfigError as error:
            self._reject(wish, refusals(wish, error.problems))
            return
        if wish == self._started_with:
            self._running = config  # the module starts with it, and ends where it cannot
        self._started_with = None
        refused = await self._applied(config)
        refused = self._answerable(wish, refused)
        again, self._told = (wish, refused) == self._told, (wish, refused)
        self._refused, self._refused_s = refused, self._clock_s()
        if "" in refused:
            self._running = None
            self._reject(wish, refused, again=again)
            return
        before, self._force = self._force, in_force(wish, self._force, refused)
        self._running = None if refused else config
        changed = sorted(key for key in {*before, *self._force} if before.get(key) != self._force.get(key))
        # Kept first: what was acknowledged outlives a kill.
        await self._keep(Wish(wish.version, self._force))
        if refused:
            self._reject(wish, refused, again=again)
        else:
            self._acknowledge()
        if changed:
            self._accept(wish, changed)

    def _answerable(self, wish: Wish, refused: Refusals) -> Refusals:
        """Without the sections that are not desired, and were not before: they need no answer."""
        known = {"", *wish.document, *self._force}
        return {key: reasons for key, reasons in refused.items() if key in known}

    async def _applied(self, config: Config) -> Refusals:
        """Apply a configuration; the sections that were refused."""
        if config == self._running:
            return {}
        self._applying = True
        try:
            refused = await self._apply(config)
        except Exception as error:
            log.exception("applying desired properties failed")
            return {"": [f"applying it failed: {redact(str(error))}"]}
        finally:
            self._applying = False
        return {section: [_with_path(section, reason)] for section, reason in refused.items()}

    def _accept(self, wish: Wish, changed: list[str]) -> None:
        self.counts["applied"] += 1
        sections = ", ".join(changed)
        text = f"desired properties, version {wish.version}, are applied: {sections}"
        log.info("%s", redact(text))
        self._tell("config-applied", text, {"version": wish.version, "sections": changed})

    def _reject(self, wish: Wish, refused: Refusals, *, again: bool = False) -> None:
        """Acknowledge and tell a refusal, the same one of the same wish once."""
        self._refusals = refused
        self._acknowledge()
        if again:
            return
        self.counts["rejected"] += 1
        problems = [problem for reasons in refused.values() for problem in reasons]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        text = f"desired properties, version {wish.version}, are not applied: {count}"
        for problem in problems[:_MOST_LINES]:
            log.warning("desired properties: %s", redact(problem))
        log.warning("%s", text)
        details = {"version": wish.version, "count": len(problems), "problems": problems[:_MOST_TOLD]}
        self._tell("config-rejected", f"{text}; {problems[0]}", details)

    def _acknowledge(self) -> None:
        """Say what became of the last wish, and that it is not on disk where that is so."""
        if self._judged is not None:
            kept = self._to_keep is None
            self.acknowledgement = acknowledgement(self._judged, self._refusals, self._force, kept=kept)

    async def _keep(self, wish: Wish) -> None:
        """Have a wish on disk; one that cannot be written is tried again, unless another takes its place."""
        if self._last_good is None or wish == self._kept:
            self._to_keep = None
            return
        known, self._to_keep = self._to_keep, wish
        try:
            await asyncio.to_thread(self._last_good.keep, wish)
        except OSError as error:
            if known is None:
                log.warning(
                    "the desired properties cannot be kept on disk (%s): tried again every %g s",
                    error.strerror,
                    _KEEP_AGAIN_S,
                )
            return
        self._kept, self._to_keep = wish, None
        if known is not None:
            log.info("the desired properties, version %d, are kept on disk now", wish.version)
            self._acknowledge()


def _with_path(section: str, reason: str) -> str:
    return reason if reason.startswith((f"{section}.", f"{section}:")) else f"{section}: {reason}"
