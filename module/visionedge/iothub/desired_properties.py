"""Desired properties as a source of the configuration: validated, applied, acknowledged, kept on disk.

twin ─▶ DesiredDocument ─▶ merged over the local document ─▶ validated ─▶ applied ─▶ last good file
                                    └ any problem: nothing is applied, and every section says why

`DesiredProperties` does this in one task. `ConfigurationSources` reads what the module starts with: the local
document and the last good file, so that a restart without a hub uses the last desired properties that were in
force.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic.alias_generators import to_camel

from visionedge.config.applied import Applied, ConfigTarget
from visionedge.config.documents import Document
from visionedge.config.load import find_local_only_problems, merge, parse_config
from visionedge.config.schema import Config
from visionedge.errors import ConfigError
from visionedge.runtime.files import DamagedStateFileError, parse_count
from visionedge.runtime.redaction import find_secrets, redact, register_secrets
from visionedge.runtime.retry import Backoff, RetryPolicy
from visionedge.runtime.state_file import StateFile

log = logging.getLogger(__name__)

# --- desired documents, and how they are acknowledged -------------------------------------------------------

MAX_ACKNOWLEDGEMENT_BYTES = 10_000
"""A third of the limit of a twin. Reasons that do not fit are in the event `config-rejected`."""

_MAX_SECTIONS = 24
_MAX_REASON_CHARACTERS = 300
_MAX_KEY_CHARACTERS = 128
_MORE_BYTES = 80
_FORBIDDEN = frozenset(".$# ")
_SECTIONS = frozenset(map(to_camel, Config.model_fields))


@dataclass(frozen=True, slots=True)
class DesiredDocument:
    """Desired properties at one version, without what the hub adds to them (`$version`, `$metadata`)."""

    version: int
    document: Document


RejectionReasons = Mapping[str, Sequence[str]]
"""The reasons by section; the empty name has reasons that belong to no section in particular."""


def read_desired_document(twin: Mapping[str, Any]) -> DesiredDocument | None:
    """The desired document of a twin; None if its desired half cannot be read."""
    desired = twin.get("desired")
    if not isinstance(desired, Mapping):
        return None
    version = desired.get("$version")
    is_number = isinstance(version, int) and not isinstance(version, bool)
    document = {str(key): value for key, value in desired.items() if not str(key).startswith("$")}
    return DesiredDocument(version if is_number else 0, document)  # type: ignore[arg-type]  # an int, as checked above


def overlay_desired(local: Mapping[str, Any], desired: Mapping[str, Any]) -> Document:
    """Merge the desired document over the local one, key by key.

    A model has either a path or a URL: the desired one replaces the other one of the local document.
    """
    model, models = desired.get("model"), desired.get("models")
    if isinstance(model, Mapping) and isinstance(local.get("model"), Mapping):
        local = {**local, "model": _without_other_location(local["model"], model)}
    if isinstance(models, Mapping) and isinstance(local.get("models"), Mapping):
        below = {
            name: _without_other_location(each, models.get(name)) for name, each in local["models"].items()
        }
        local = {**local, "models": below}
    return merge(local, desired)


def _without_other_location(below: object, over: object) -> object:
    """A model without its path where `over` has a URL, and without its URL where `over` has a path."""
    if not isinstance(below, Mapping) or not isinstance(over, Mapping):
        return below
    other = ("path",) if "url" in over else ("url", "sha256") if "path" in over else ()
    return {key: value for key, value in below.items() if key not in other}


def group_problems_by_section(desired: DesiredDocument, problems: Sequence[str]) -> dict[str, list[str]]:
    """Group the problems of a `ConfigError` by section."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        found.setdefault(_section(desired, problem), []).append(problem)
    return found


def compute_effective_document(
    desired: DesiredDocument, before: Mapping[str, Any], rejected: RejectionReasons
) -> Document:
    """The desired document in force: rejected sections stay as they were `before`."""
    taken = {key: value for key, value in desired.document.items() if key not in rejected}
    return {**taken, **{key: before[key] for key in rejected if key in before}}


def build_acknowledgement(
    desired: DesiredDocument, rejected: RejectionReasons, effective: Mapping[str, Any], *, kept: bool = True
) -> Document:
    """The reported property `config`; `effective` is the desired document that is in force now.

    `kept=False`: the document is not on disk yet, so a kill of the module would lose it.
    """
    # Also acknowledge required sections that were removed from the desired properties.
    keys = {*desired.document, *(key for key in rejected if key)}
    reported = {key: _reasons(key, desired, rejected, effective) for key in sorted(keys, key=_sort_key)}
    first = dict(list(reported.items())[:_MAX_SECTIONS])
    if len(first) < len(reported):
        first["_more"] = [f"{len(reported) - len(first)} more keys; see the event config-rejected"]
    cut = _limit_reasons(
        first, MAX_ACKNOWLEDGEMENT_BYTES - sum(len(_sanitize_key(key)) + _MORE_BYTES for key in first)
    )
    return {_sanitize_key(key): _entry(desired.version, reasons, kept=kept) for key, reasons in cut.items()}


def _entry(version: int, reasons: Sequence[str], *, kept: bool) -> Document:
    if not reasons:
        return {"status": "applied", "version": version, **({} if kept else {"kept": False})}
    return {"status": "rejected", "version": version, "reasons": list(reasons)}


def _reasons(
    key: str, desired: DesiredDocument, rejected: RejectionReasons, effective: Mapping[str, Any]
) -> list[str]:
    """Why a section is not in force; empty if it is."""
    own = list(rejected.get(key, ()))
    if own:
        return own
    if key in effective and effective[key] == desired.document[key]:
        return []
    wrong = ", ".join(sorted(_sanitize_key(name) for name in rejected if name))
    return [*rejected.get("", ()), *([f"not applied because of problems in {wrong}"] if wrong else [])]


def _section(desired: DesiredDocument, problem: str) -> str:
    """The section whose name begins the line of a problem; empty if there is none."""
    named = [key for key in desired.document if problem.startswith((f"{redact(key)}.", f"{redact(key)}:"))]
    return max(named, key=len, default="")


def _sort_key(key: str) -> tuple[bool, str]:
    """Known sections come before unknown ones."""
    return key not in _SECTIONS, key


def _sanitize_key(section: str) -> str:
    """The name of a section as a key that edgeHub accepts."""
    plain = (c if c.isprintable() and c not in _FORBIDDEN else "_" for c in redact(section))
    return "".join(plain)[:_MAX_KEY_CHARACTERS] or "_"


def _limit_reasons(reported: Mapping[str, Sequence[str]], left_bytes: int) -> dict[str, list[str]]:
    """Keep as many reasons as fit, one of each section in turn, and count the rest."""
    kept: dict[str, list[str]] = {key: [] for key in reported}
    for turn in range(max(map(len, reported.values()), default=0)):
        for key, reasons in reported.items():
            # After one reason that does not fit, no further reasons of this section are added.
            if turn != len(kept[key]) or turn >= len(reasons):
                continue
            text = _shortened(reasons[turn])
            size = len(json.dumps(text)) + 1
            if size <= left_bytes:
                kept[key].append(text)
                left_bytes -= size
    for key, reasons in reported.items():
        if missing := len(reasons) - len(kept[key]):
            kept[key].append(f"and {missing} more; see the event config-rejected")
    return kept


def _shortened(reason: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in redact(reason))
    return text if len(text) <= _MAX_REASON_CHARACTERS else f"{text[:_MAX_REASON_CHARACTERS]}…"


# --- the file with the last good desired properties ---------------------------------------------------------

DESIRED_FILE_NAME = "desired.json"
DESIRED_SCHEMA = "visionedge/desired/1"


class LastGoodFile:
    """The file with the last desired properties that were in force.

    It contains secrets, so only its user can read it. The file belongs to one module of one hub
    (`Identity.owner`); a file of another module is not used. `file.lost` says why a file was set aside, None
    if none was.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.file = StateFile(path, DESIRED_SCHEMA)
        self._owner = owner

    def __repr__(self) -> str:
        return f"<LastGoodFile {self.file!r}>"

    def read(self) -> DesiredDocument | None:
        """The document in the file; None without a usable file.

        A file that is damaged or of another module is set aside, and `file.lost` says why.
        """
        return next(iter(self.file.read(self._parse)), None)

    def _parse(self, kept: Any) -> DesiredDocument:
        if not isinstance(kept, dict) or not isinstance(kept.get("desired"), dict):
            raise DamagedStateFileError("no desired properties in it")
        if "schema" not in kept:
            raise DamagedStateFileError("its schema is unknown")
        if kept.get("owner") != self._owner:
            raise DamagedStateFileError("it belongs to another module")
        return DesiredDocument(parse_count(kept.get("version")), kept["desired"])

    def keep(self, desired: DesiredDocument) -> None:
        """Replace the document in the file. When this returns, it survives a kill and a power cut. Blocks.

        Raises:
            OSError: the folder cannot be written; the file stays as it was.
        """
        self.file.write({"owner": self._owner, "version": desired.version, "desired": desired.document})


@dataclass(frozen=True, slots=True)
class StartConfiguration:
    """The configuration that the module starts with, and the desired document in it, if there is one."""

    config: Config
    desired: DesiredDocument | None = None


@dataclass(frozen=True, slots=True)
class ConfigurationSources:
    """The local document, the configuration to start with, and the last good file; None outside IoT Edge."""

    local: Document
    start: StartConfiguration
    last_good: LastGoodFile | None = None

    @staticmethod
    def read(local: Document, last_good: LastGoodFile | None = None) -> "ConfigurationSources":
        """Read the last good file and merge it over the local document, if the result is valid. Blocks.

        Raises:
            ConfigError: the local document is not valid.
        """
        start = StartConfiguration(parse_config(local))
        desired = None if last_good is None else last_good.read()
        if desired is not None:
            try:
                start = StartConfiguration(parse_config(overlay_desired(local, desired.document)), desired)
            except ConfigError as error:
                # The local document or the version of the module may have changed; the twin is read soon.
                log.warning(
                    "the last good desired properties are not valid any more: %s; starting without them",
                    redact(str(error)),
                )
            except Exception as error:  # noqa: BLE001 - no content of a state file may prevent the start
                assert last_good is not None  # noqa: S101 - `desired` came from it
                last_good.file.set_aside(f"its content caused {type(error).__name__}")
        return ConfigurationSources(local, start, last_good)

    def without_desired(self) -> "ConfigurationSources":
        """The same sources, to start with the local document only."""
        return replace(self, start=StartConfiguration(parse_config(self.local)))


# --- the task that applies desired properties ---------------------------------------------------------------

_RETRY_POLICY = RetryPolicy(first_wait_s=30.0, max_wait_s=3600.0)
_SAVE_RETRY_S = 2.0
_MAX_LOG_LINES = 50
_MAX_EVENT_PROBLEMS = 500
"""The limits of problems in the log and in an event: a twin of 32 KB can have thousands of them."""

ConfigEventCode = Literal["config-applied", "config-rejected"]
SendConfigEvent = Callable[[ConfigEventCode, str, Mapping[str, Any]], None]
"""Sends an event: its code, its text, its details."""


class DesiredProperties:
    """Processes desired documents, always the newest. For the asyncio loop; `run` is its only task.

    Args:
        config_sources: the local document, the configuration that runs now, and the last good file.
        target: the running module; a section that it rejects is tried again at growing intervals, up to one
            hour.
        send_event: sends an event.
        cancel_pending_model: called when another model is desired while the target may be downloading one.
        retry_policy: the waits before rejected sections are tried again.
    """

    def __init__(
        self,
        config_sources: ConfigurationSources,
        target: ConfigTarget,
        send_event: SendConfigEvent,
        *,
        cancel_pending_model: Callable[[], None] = lambda: None,
        retry_policy: RetryPolicy = _RETRY_POLICY,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        start = config_sources.start
        self._local = config_sources.local
        self._target = target
        # Whether the last change put every section in force: then only a different configuration is applied.
        self._last_complete = True
        self._started_with = start.desired
        self._start_config = start.config
        self._effective: Document = {} if start.desired is None else start.desired.document
        self._kept = start.desired
        self._to_keep: DesiredDocument | None = None
        self._retry_now = False
        self._local_reader: Callable[[], Document] | None = None
        self._last_good = config_sources.last_good
        self._send_event = send_event
        self._cancel_pending_model = cancel_pending_model
        self._clock_s = clock_s
        self._backoff = Backoff(retry_policy)
        self._retry_s = 0.0
        self._rejected: RejectionReasons = {}
        self._rejected_s = 0.0
        self._rejection_reasons: RejectionReasons = {}
        self._last_reported: tuple[DesiredDocument, RejectionReasons] | None = None
        self._applying = False
        self._last_validated: DesiredDocument | None = None
        self._waiting: DesiredDocument | None = None
        self._wake = asyncio.Event()
        self.acknowledgement: Document = {}
        self._acknowledge_start()
        self.counts = {"applied": 0, "rejected": 0}

    def __repr__(self) -> str:
        version = self._last_validated.version if self._last_validated else None
        return f"<DesiredProperties version={version} {self.counts}>"

    def on_twin(self, twin: Mapping[str, Any]) -> None:
        """The whole twin was read: process its desired document, unless it is the last one."""
        desired = read_desired_document(twin)
        if desired is not None and desired not in (self._last_validated, self._waiting):
            self._waiting = desired
            self._wake.set()
            before = {} if self._last_validated is None else self._last_validated.document
            if self._applying and any(
                before.get(key) != desired.document.get(key) for key in ("model", "models")
            ):
                self._cancel_pending_model()

    def validate_desired(self, document: Mapping[str, Any]) -> Config:
        """The configuration that a desired document would give. Blocks for some milliseconds.

        Raises:
            ConfigError: it is not valid; the error has every problem.
        """
        local_only = find_local_only_problems(document)
        try:
            config = parse_config(overlay_desired(self._local, document))
        except ConfigError as error:
            raise ConfigError([*error.problems, *local_only]) from None
        finally:
            # The list of secrets is bounded: validating many documents must not remove the secrets in use.
            register_secrets(find_secrets(self._local) | find_secrets(self._effective))
        if local_only:
            raise ConfigError(local_only)
        return config

    def retry(self) -> None:
        """Try rejected sections again at once, because the reason may be gone."""
        if self._last_validated is None:
            self._acknowledge_start()
        if self._rejected:
            self._retry_now = True
            self._wake.set()

    def reload(self, read: Callable[[], Document]) -> None:
        """Process the local document again; `read` returns it and may block."""
        self._local_reader = read
        self._wake.set()

    async def run(self) -> None:
        """Process desired documents until cancelled."""
        while True:
            timed_out = await self._wait()
            try:
                await self._step(timed_out)
            except Exception:  # the next document must be processed
                log.exception("processing desired properties failed")

    async def _wait(self) -> bool:
        """Wait for work or for a retry; returns whether it is time to try rejected sections again."""
        pauses_s = [_SAVE_RETRY_S] if self._to_keep is not None else []
        pauses_s += [self._remaining_s()] if self._rejected else []
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(0.0, min(pauses_s)) if pauses_s else None)
        self._wake.clear()
        return bool(self._rejected) and self._remaining_s() <= 0

    def _remaining_s(self) -> float:
        return self._rejected_s + self._retry_s - self._clock_s()

    async def _step(self, timed_out: bool) -> None:
        if self._to_keep is not None:
            await self._keep(self._to_keep)
        if (read := self._local_reader) is not None:
            self._local_reader = None
            await self._process_local(read)
        again, self._retry_now = self._retry_now, False
        if self._waiting is not None:
            desired, self._waiting = self._waiting, None
            self._rejected, self._last_validated = {}, desired
            self._backoff.reset()
            self._retry_s = self._backoff.next_wait_s()
            await self._process(desired)
        elif self._last_validated is not None and (timed_out or (again and self._rejected)):
            self._retry_s = self._backoff.next_wait_s()
            await self._process(self._last_validated)

    async def _process_local(self, read: Callable[[], Document]) -> None:
        """Apply another local document if it is valid, alone and with the desired properties."""
        try:
            local = await asyncio.to_thread(read)
            await asyncio.to_thread(parse_config, local)
            config = await asyncio.to_thread(parse_config, overlay_desired(local, self._effective))
        except ConfigError as error:
            for problem in error.problems[:_MAX_LOG_LINES]:
                log.warning("configuration file: %s", redact(problem))
            log.warning("the configuration file is not used: %d problems", len(error.problems))
            return
        finally:
            register_secrets(find_secrets(self._local) | find_secrets(self._effective))
        rejected = await self._apply_and_collect(config)
        for reason in (reason for reasons in rejected.values() for reason in reasons):
            log.warning("configuration file: %s; this section stays as it was", redact(reason))
        if "" in rejected:
            return
        changed = {key for key in {*local, *self._local} if local.get(key) != self._local.get(key)}
        self._local = {
            **{key: value for key, value in local.items() if key not in rejected},
            **{key: self._local[key] for key in rejected if key in self._local},
        }
        applied = sorted(changed - rejected.keys())
        log.info("the configuration file is applied: %s", ", ".join(applied) or "nothing in it has changed")

    async def save_pending(self) -> None:
        """Write a valid waiting document to disk without applying it: for the next start."""
        desired = self._waiting or self._last_validated
        if desired is None:
            return
        try:
            await asyncio.to_thread(self.validate_desired, desired.document)
        except ConfigError:
            return
        await self._keep(desired)

    async def _process(self, desired: DesiredDocument) -> None:
        self._rejection_reasons = {}
        try:
            config = await asyncio.to_thread(self.validate_desired, desired.document)
        except ConfigError as error:
            self._report_rejected(desired, group_problems_by_section(desired, error.problems))
            return
        if desired == self._started_with and not self._target.compare(config).rejected:
            self._await_start(config)
            if self._rejected:
                return
        self._started_with = None
        rejected = await self._apply_and_collect(config)
        rejected = self._only_known_sections(desired, rejected)
        again, self._last_reported = (desired, rejected) == self._last_reported, (desired, rejected)
        self._rejected, self._rejected_s = rejected, self._clock_s()
        if "" in rejected:
            self._report_rejected(desired, rejected, again=again)
            return
        before, self._effective = (
            self._effective,
            compute_effective_document(desired, self._effective, rejected),
        )
        changed = sorted(
            key for key in {*before, *self._effective} if before.get(key) != self._effective.get(key)
        )
        # Written before the acknowledgement, so that an acknowledged document survives a kill.
        await self._keep(DesiredDocument(desired.version, self._effective))
        if rejected:
            self._report_rejected(desired, rejected, again=again)
        else:
            self._acknowledge()
        if changed:
            self._report_applied(desired, changed)

    def _only_known_sections(self, desired: DesiredDocument, rejected: RejectionReasons) -> RejectionReasons:
        """Remove sections that are not desired and were not before: they need no acknowledgement."""
        known = {"", *desired.document, *self._effective}
        return {key: reasons for key, reasons in rejected.items() if key in known}

    def _await_start(self, config: Config) -> None:
        """The module is starting with this document: look again later at the sections that are pending."""
        self._acknowledge_start()
        self._rejected, self._rejected_s = _reasons_by_section(self._target.compare(config)), self._clock_s()

    def _acknowledge_start(self) -> None:
        """Acknowledge of the document that the module starts with the sections that are in force already."""
        if self._started_with is None:
            return
        waiting = self._target.compare(self._start_config).unapplied
        document = {key: value for key, value in self._started_with.document.items() if key not in waiting}
        in_force = DesiredDocument(self._started_with.version, document)
        self.acknowledgement = build_acknowledgement(in_force, {}, self._effective)

    async def _apply_and_collect(self, config: Config) -> RejectionReasons:
        """Apply a configuration; returns the sections that are not in force after that."""
        if self._last_complete and self._target.compare(config).is_complete:
            return {}
        self._applying, self._last_complete = True, False
        try:
            applied = await self._target.apply(config)
        except Exception as error:
            log.exception("applying desired properties failed")
            return {"": [f"applying failed: {redact(str(error))}"]}
        finally:
            self._applying = False
        self._last_complete = applied.is_complete
        return _reasons_by_section(applied)

    def _report_applied(self, desired: DesiredDocument, changed: list[str]) -> None:
        self.counts["applied"] += 1
        sections = ", ".join(changed)
        text = f"desired properties, version {desired.version}, are applied: {sections}"
        log.info("%s", redact(text))
        self._send_event("config-applied", text, {"version": desired.version, "sections": changed})

    def _report_rejected(
        self, desired: DesiredDocument, rejected: RejectionReasons, *, again: bool = False
    ) -> None:
        """Acknowledge a rejection and report it, unless the same was reported before (`again`)."""
        self._rejection_reasons = rejected
        self._acknowledge()
        if again:
            return
        self.counts["rejected"] += 1
        problems = [problem for reasons in rejected.values() for problem in reasons]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        text = f"desired properties, version {desired.version}, are not applied: {count}"
        for problem in problems[:_MAX_LOG_LINES]:
            log.warning("desired properties: %s", redact(problem))
        log.warning("%s", text)
        details = {
            "version": desired.version,
            "count": len(problems),
            "problems": problems[:_MAX_EVENT_PROBLEMS],
        }
        self._send_event("config-rejected", f"{text}; {problems[0]}", details)

    def _acknowledge(self) -> None:
        """Acknowledge the last document, and whether it is on disk."""
        if self._last_validated is not None:
            kept = self._to_keep is None
            self.acknowledgement = build_acknowledgement(
                self._last_validated, self._rejection_reasons, self._effective, kept=kept
            )

    async def _keep(self, desired: DesiredDocument) -> None:
        """Write a document to disk; if that fails it is retried, unless another document replaces it."""
        if self._last_good is None or desired == self._kept:
            self._to_keep = None
            return
        known, self._to_keep = self._to_keep, desired
        try:
            await asyncio.to_thread(self._last_good.keep, desired)
        except OSError as error:
            if known is None:
                log.warning(
                    "the desired properties cannot be written to disk: %s; retrying every %g s",
                    error.strerror,
                    _SAVE_RETRY_S,
                )
            return
        self._kept, self._to_keep = desired, None
        if known is not None:
            log.info("the desired properties, version %d, are on disk now", desired.version)
            self._acknowledge()


def _reasons_by_section(applied: Applied) -> RejectionReasons:
    return {section: [_with_path(section, reason)] for section, reason in applied.unapplied.items()}


def _with_path(section: str, reason: str) -> str:
    return reason if reason.startswith((f"{section}.", f"{section}:")) else f"{section}: {reason}"
