"""Desired properties as a carrier of the configuration: judged whole, applied, acknowledged, kept on disk.

twin ─▶ Wish ─▶ laid over the local document ─▶ validated ─▶ applied ─▶ last good on disk
                                       └ any problem: nothing is applied, every section says why
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from visionedge.config import Config, local_only, validate
from visionedge.documents import Document
from visionedge.edge.last_good import LastGood
from visionedge.edge.wish import Refusals, Wish, acknowledgement, in_force, overlaid, refusals, wish_of
from visionedge.errors import ConfigError
from visionedge.uris import keep_secret, redact, secrets_in

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 3600.0
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
    ) -> None:
        start = carriers.start
        self._local = carriers.local
        # None where a change failed half-way and nobody knows.
        self._running: Config | None = start.config
        self._force: Document = {} if start.wish is None else start.wish.document
        self._kept = start.wish
        self._apply = apply
        self._last_good = carriers.last_good
        self._tell = tell
        self._give_way = give_way
        self._first_retry_s = self._retry_s = retry_s
        self._refused: Refusals = {}
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

    async def run(self) -> None:
        """Take wishes until cancelled."""
        while True:
            wish = await self._next()
            try:
                await self._take(wish)
            except Exception:  # what comes next must be heard
                log.exception("taking desired properties failed")

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

    async def _next(self) -> Wish:
        """The newest wish; or the last one again, of which something could not be had, after a while."""
        while True:
            try:
                await asyncio.wait_for(self._news.wait(), self._retry_s if self._refused else None)
            except TimeoutError:
                self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
            else:
                self._retry_s, self._refused = self._first_retry_s, {}
            self._news.clear()
            wish, self._waiting = self._waiting or self._judged, None
            if wish is not None:
                self._judged = wish
                return wish

    async def _take(self, wish: Wish) -> None:
        try:
            config = await asyncio.to_thread(self.judge, wish.document)
        except ConfigError as error:
            self._reject(wish, refusals(wish, error.problems))
            return
        told, self._refused = self._refused, await self._applied(config)
        refused = self._refused
        if "" in refused:
            self._running = None
            self._reject(wish, refused, again=refused == told)
            return
        before, self._force = self._force, in_force(wish, self._force, refused)
        self._running = _with_sections(config, self._running, refused)
        changed = sorted(key for key in {*before, *self._force} if before.get(key) != self._force.get(key))
        # Kept first: what was acknowledged outlives a kill.
        await self._keep(Wish(wish.version, self._force))
        if refused:
            self._reject(wish, refused, again=refused == told)
        else:
            self.acknowledgement = acknowledgement(wish, {}, self._force)
        if changed:
            self._accept(wish, changed)

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
        self.acknowledgement = acknowledgement(wish, refused, self._force)
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

    async def _keep(self, wish: Wish) -> None:
        if self._last_good is None or wish == self._kept:
            return
        try:
            await asyncio.to_thread(self._last_good.keep, wish)
        except OSError as error:
            log.warning("the desired properties cannot be kept (%s)", error.strerror)
        else:
            self._kept = wish


def _with_sections(config: Config, before: Config | None, refused: Refusals) -> Config | None:
    """The configuration of which some sections stayed as they were before."""
    if before is None or not refused:
        return None if refused else config
    kept = {key: getattr(before, key) for key in refused if key in Config.model_fields}
    return config.model_copy(update=kept)


def _with_path(section: str, reason: str) -> str:
    return reason if reason.startswith((f"{section}.", f"{section}:")) else f"{section}: {reason}"
