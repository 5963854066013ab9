"""Desired properties as a carrier of the configuration: judged whole, applied, acknowledged, kept on disk.

twin ─▶ Wish ─▶ laid over the local document ─▶ validated ─▶ applied ─▶ last good on disk
                                       └ any problem: nothing is applied, every section says why
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from visionedge.config import Config, local_only, validate
from visionedge.documents import Document
from visionedge.edge.last_good import LastGood
from visionedge.edge.wish import Refusals, Wish, acknowledgement, in_force, overlaid, refusals, wish_of
from visionedge.errors import ConfigError
from visionedge.uris import redact

log = logging.getLogger(__name__)

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


def start_with(local: Document, last_good: LastGood | None) -> Start:
    """The configuration of a start: the local document, and over it what was kept of the twin. Blocks.

    Raises:
        ConfigError: the local document is wrong.
    """
    config = validate(local)
    wish = None if last_good is None else last_good.read()
    if wish is None:
        return Start(config)
    try:
        return Start(validate(overlaid(local, wish.document)), wish)
    except ConfigError as error:
        # The local document or the module's version may have changed since; the hub will be asked soon.
        log.warning("the last good desired properties fit no more and are not used: %s", redact(str(error)))
        return Start(config)


class Desired:
    """Takes one wish after the other, the newest first. For the asyncio loop; `run` is its only task.

    Args:
        local: the document of the other carriers; desired properties are laid over it.
        start: what runs now.
        apply: makes another configuration run.
        last_good: where what is in force is kept; None: nowhere.
        tell: sends an event.
    """

    def __init__(
        self, local: Document, start: Start, apply: Apply, last_good: LastGood | None, tell: Tell
    ) -> None:
        self._local = local
        self._running = start.config
        self._force: Document = {} if start.wish is None else start.wish.document
        self._kept = start.wish
        self._apply = apply
        self._last_good = last_good
        self._tell = tell
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
        if ours:
            raise ConfigError(ours)
        return config

    async def run(self) -> None:
        """Take wishes until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            wish, self._waiting = self._waiting, None
            if wish is None:
                continue
            self._judged = wish
            try:
                await self._take(wish)
            except Exception:  # what comes next must be heard
                log.exception("taking desired properties failed")

    async def _take(self, wish: Wish) -> None:
        try:
            config = await asyncio.to_thread(self.judge, wish.document)
        except ConfigError as error:
            self._reject(wish, refusals(wish, error.problems))
            return
        refused = await self._applied(config)
        if "" in refused:
            self._reject(wish, refused)
            return
        before, self._force = self._force, in_force(wish, self._force, refused)
        kept = {key: getattr(self._running, key) for key in refused if key in Config.model_fields}
        self._running = config.model_copy(update=kept)
        changed = sorted(key for key in {*before, *self._force} if before.get(key) != self._force.get(key))
        if refused:
            self._reject(wish, refused)
        else:
            self.acknowledgement = acknowledgement(wish, {}, self._force)
        if changed:
            self._accept(wish, changed)
        await self._keep(Wish(wish.version, self._force))

    async def _applied(self, config: Config) -> Refusals:
        """Apply a configuration; the sections that were refused."""
        if config == self._running:
            return {}
        try:
            refused = await self._apply(config)
        except Exception as error:
            log.exception("applying desired properties failed")
            return {"": [f"applying it failed: {redact(str(error))}"]}
        return {section: [_with_path(section, reason)] for section, reason in refused.items()}

    def _accept(self, wish: Wish, changed: list[str]) -> None:
        self.counts["applied"] += 1
        sections = ", ".join(changed)
        text = f"desired properties, version {wish.version}, are applied: {sections}"
        log.info("%s", redact(text))
        self._tell("config-applied", text, {"version": wish.version, "sections": changed})

    def _reject(self, wish: Wish, refused: Refusals) -> None:
        self.counts["rejected"] += 1
        self.acknowledgement = acknowledgement(wish, refused, self._force)
        problems = [problem for reasons in refused.values() for problem in reasons]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        text = f"desired properties, version {wish.version}, are not applied: {count}"
        for problem in problems:
            log.warning("desired properties: %s", redact(problem))
        log.warning("%s", text)
        self._tell(
            "config-rejected", f"{text}; {problems[0]}", {"version": wish.version, "problems": problems}
        )

    async def _keep(self, wish: Wish) -> None:
        if self._last_good is None or wish == self._kept:
            return
        try:
            await asyncio.to_thread(self._last_good.keep, wish)
        except OSError as error:
            log.warning("the desired properties cannot be kept (%s)", error.strerror)
        else:
            self._kept = wish


def _with_path(section: str, reason: str) -> str:
    return reason if reason.startswith((f"{section}.", f"{section}:")) else f"{section}: {reason}"
