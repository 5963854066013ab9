"""Desired properties as a carrier of the configuration: judged whole, applied, acknowledged, kept on disk.

twin ─▶ Wish ─▶ laid over the local document ─▶ validated ─▶ applied ─▶ last good on disk
                                       └ any problem: nothing is applied, every section says why
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic.alias_generators import to_camel

from visionedge.config.documents import Document
from visionedge.config.load import local_only, merge, validate
from visionedge.config.schema import Config
from visionedge.errors import ConfigError
from visionedge.runtime.files import DamagedError, read_json, set_aside, whole_number, write_json
from visionedge.runtime.redaction import keep_secret, redact, secrets_in

# Desired properties: what they wish of the module, and the acknowledgement that answers them. Pure.
#
# A document with any problem is not used at all: what was in force before goes on. The acknowledgement has an
# entry for each top-level key of the wish: `applied` when that section is in force as it is wished, else
# `rejected` with the reasons.


MAX_ACKNOWLEDGEMENT_BYTES = 10_000
"""A third of what a twin takes; what is cut off stands in the event `config-rejected`."""

_MOST_SECTIONS = 24
_MOST_CHARACTERS = 300
_KEY_CHARACTERS = 128
_MORE_BYTES = 80
_FORBIDDEN = frozenset(".$# ")
_SECTIONS = frozenset(map(to_camel, Config.model_fields))


@dataclass(frozen=True, slots=True)
class Wish:
    """Desired properties at one version, without what the hub adds to them (`$version`, `$metadata`)."""

    version: int
    document: Document


Refusals = Mapping[str, Sequence[str]]
"""The reasons by section; those under an empty name belong to none in particular."""


def wish_of(twin: Mapping[str, Any]) -> Wish | None:
    """What a twin wishes; None where it has no desired half that can be read."""
    desired = twin.get("desired")
    if not isinstance(desired, Mapping):
        return None
    version = desired.get("$version")
    known = isinstance(version, int) and not isinstance(version, bool)
    document = {str(key): value for key, value in desired.items() if not str(key).startswith("$")}
    return Wish(version if known else 0, document)  # type: ignore[arg-type]  # an int, as was just seen


def overlaid(local: Mapping[str, Any], desired: Mapping[str, Any]) -> Document:
    """The desired document laid over the local one: key by key, but a model is one place or the other."""
    below, over = local.get("model"), desired.get("model")
    if isinstance(below, Mapping) and isinstance(over, Mapping):
        other = ("path",) if "url" in over else ("url", "sha256") if "path" in over else ()
        local = {**local, "model": {key: value for key, value in below.items() if key not in other}}
    return merge(local, desired)


def refusals(wish: Wish, problems: Sequence[str]) -> dict[str, list[str]]:
    """The problems of `config.validate` by the section that they are in."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        found.setdefault(_section(wish, problem), []).append(problem)
    return found


def in_force(wish: Wish, before: Mapping[str, Any], refused: Refusals) -> Document:
    """The desired document in force after a wish of which some sections were refused."""
    taken = {key: value for key, value in wish.document.items() if key not in refused}
    return {**taken, **{key: before[key] for key in refused if key in before}}


def acknowledgement(
    wish: Wish, refused: Refusals, force: Mapping[str, Any], *, kept: bool = True
) -> Document:
    """The reported property `config`; `force` is the desired document that is in force now.

    Not `kept`: it is not on disk yet, and a kill would take it away.
    """
    # A section that was taken away, and that cannot be done without, has its say as well.
    keys = {*wish.document, *(key for key in refused if key)}
    told = {key: _reasons(key, wish, refused, force) for key in sorted(keys, key=_rank)}
    first = dict(list(told.items())[:_MOST_SECTIONS])
    if len(first) < len(told):
        more = f"{len(told) - len(first)} more keys; the event config-rejected has their problems"
        first["_more"] = [more]
    cut = _cut(first, MAX_ACKNOWLEDGEMENT_BYTES - sum(len(_key(key)) + _MORE_BYTES for key in first))
    return {_key(key): _entry(wish.version, reasons, kept=kept) for key, reasons in cut.items()}


def _entry(version: int, reasons: Sequence[str], *, kept: bool) -> Document:
    if not reasons:
        return {"status": "applied", "version": version, **({} if kept else {"kept": False})}
    return {"status": "rejected", "version": version, "reasons": list(reasons)}


def _reasons(key: str, wish: Wish, refused: Refusals, force: Mapping[str, Any]) -> list[str]:
    """Why a section is not in force; empty when it is."""
    own = list(refused.get(key, ()))
    if own:
        return own
    if key in force and force[key] == wish.document[key]:
        return []
    wrong = ", ".join(sorted(_key(name) for name in refused if name))
    return [*refused.get("", ()), *([f"not applied, because of what is wrong in {wrong}"] if wrong else [])]


def _section(wish: Wish, problem: str) -> str:
    """The section that a problem names in the beginning of its line; empty where none fits."""
    fitting = [key for key in wish.document if problem.startswith((f"{redact(key)}.", f"{redact(key)}:"))]
    return max(fitting, key=len, default="")


def _rank(key: str) -> tuple[bool, str]:
    """The sections that there are come first."""
    return key not in _SECTIONS, key


def _key(section: str) -> str:
    """A section's name as edgeHub takes it for a key."""
    plain = (c if c.isprintable() and c not in _FORBIDDEN else "_" for c in redact(section))
    return "".join(plain)[:_KEY_CHARACTERS] or "_"


def _cut(told: Mapping[str, Sequence[str]], left_bytes: int) -> dict[str, list[str]]:
    """As many reasons as fit, in turns, so that no section's hide those of another; the rest is counted."""
    kept: dict[str, list[str]] = {key: [] for key in told}
    for turn in range(max(map(len, told.values()), default=0)):
        for key, reasons in told.items():
            # One that was left out once stays the end of its list.
            if turn != len(kept[key]) or turn >= len(reasons):
                continue
            text = _shortened(reasons[turn])
            size = len(json.dumps(text)) + 1
            if size <= left_bytes:
                kept[key].append(text)
                left_bytes -= size
    for key, reasons in told.items():
        if missing := len(reasons) - len(kept[key]):
            kept[key].append(f"and {missing} more; the event config-rejected has them")
    return kept


def _shortened(reason: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in redact(reason))
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


# The last desired properties that were in force, on disk: what the module starts with without a hub.


log = logging.getLogger(__name__)

FILE_NAME = "desired.json"

_SCHEMA = "visionedge/desired/1"


class LastGood:
    """One file, readable for its owner alone: it holds the secrets of cameras as they are.

    It belongs to one module of one hub (`owner`); what another one left is not used. `lost` says why a file
    was set aside, None where none was.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.lost: str | None = None
        self._path = path
        self._owner = owner

    def __repr__(self) -> str:
        return f"<LastGood {self._path.name}>"

    def read(self) -> Wish | None:
        """What was kept; None where there is nothing of use, which is logged if there is a file.

        A file that is damaged, another module's or of another version is set aside, and `lost` says why.
        """
        try:
            return self._wish(read_json(self._path))
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s)", self._path, error.strerror)
        except DamagedError as error:
            self.set_aside(str(error))
        return None

    def _wish(self, kept: Any) -> Wish:
        if not isinstance(kept, dict) or not isinstance(kept.get("desired"), dict):
            raise DamagedError("it holds no desired properties")
        if kept.get("schema") != _SCHEMA:
            raise DamagedError("its schema is not known here")
        if kept.get("owner") != self._owner:
            raise DamagedError("it belongs to another module")
        return Wish(whole_number(kept.get("version")), kept["desired"])

    def set_aside(self, why: str) -> None:
        """Rename the file, which is of no use for the reason `why`; its text may be a secret."""
        self.lost = why
        try:
            set_aside(self._path)
        except OSError as error:
            self.lost = f"{why}; it cannot be moved: {error.strerror or error}"
        log.warning("%s is not used (%s): it was set aside", self._path, self.lost)

    def keep(self, wish: Wish) -> None:
        """Replace what was kept; when this returns, it outlives a kill and a power cut. Blocks.

        Raises:
            OSError: the folder cannot be written; what was kept before stays.
        """
        write_json(
            self._path,
            {"schema": _SCHEMA, "owner": self._owner, "version": wish.version, "desired": wish.document},
        )


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
