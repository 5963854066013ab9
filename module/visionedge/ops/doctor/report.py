"""`visionedge doctor`: examine a machine, and report the result as JSON or as text.

`examine` gathers the facts, runs all checks and returns a `DoctorReport`. A running module answers from a
`CachedReport`, so that its HTTP endpoint examines the machine at most once a minute.
"""

import asyncio
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from visionedge import __version__
from visionedge.engine.device.devices import EffectiveDevice, ReasonCode, RequestedDevice
from visionedge.frames.types import format_utc
from visionedge.ops.doctor.checks import CheckResult, CheckState
from visionedge.ops.doctor.facts import DoctorRequest, gather_facts
from visionedge.ops.doctor.gpu_checks import GPU_CHECKS, run_gpu_checks
from visionedge.ops.doctor.host import Document, Host, HostEnvironment
from visionedge.ops.doctor.intel_checks import INTEL_CHECKS
from visionedge.ops.doctor.system_checks import run_system_checks
from visionedge.runtime.build_identity import read_build_identity
from visionedge.runtime.redaction import redact, redact_document
from visionedge.web.documents import (
    DoctorDeviceDocument,
    DoctorDocument,
    DoctorEnvironmentDocument,
    FindingDocument,
)

_WIDTH = 104
_MARKS = {
    CheckState.OK: ("✓", 32),
    CheckState.INFO: ("·", 90),
    CheckState.WARNING: ("!", 33),
    CheckState.BROKEN: ("✗", 31),
    CheckState.SKIPPED: ("-", 90),
}
"""The mark, and its colour on a terminal: green, grey, yellow, red, grey."""


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """The results of all checks. `chain` has those of the GPU, in order."""

    at: str
    system: str
    environment: HostEnvironment
    requested: RequestedDevice
    effective: EffectiveDevice
    code: ReasonCode
    reason: str
    chain: tuple[CheckResult, ...]
    system_checks: tuple[CheckResult, ...]
    gpu_is_absent: bool = False
    intel_is_unused: bool = False

    @property
    def first_broken(self) -> CheckResult | None:
        """The first broken check of the chain."""
        return next((finding for finding in self.chain if finding.state is CheckState.BROKEN), None)

    @property
    def fulfilled(self) -> bool:
        """Whether the effective device is the requested one; with `auto` every device is."""
        return self.requested in ("auto", self.effective)

    def document(self) -> Document:
        """As JSON, secrets masked."""
        first = self.first_broken
        document = DoctorDocument(
            schema="visionedge/doctor/1",
            version=__version__,
            build=str(read_build_identity()),
            at=self.at,
            system=self.system,
            fulfilled=self.fulfilled,
            device=DoctorDeviceDocument(
                requested=self.requested, effective=self.effective, reason_code=self.code, reason=self.reason
            ),
            environment=DoctorEnvironmentDocument(
                container=self.environment.container,
                iot_edge=self.environment.edge,
                kernel=self.environment.kernel,
                release=self.environment.release,
                passthrough=self.environment.passthrough,
            ),
            first_broken=first.name if first else None,
            chain=_dump_findings(self.chain),
            system_checks=_dump_findings(self.system_checks),
        )
        masked: Document = redact_document(document.dump())
        return masked

    def to_text(self, *, colours: bool = False) -> str:
        """As text, secrets masked; with `colours` for a terminal."""
        device = f"requested {self.requested}, effective {self.effective}"
        if self.code is not ReasonCode.OK:
            device += f": {redact(self.reason)} ({self.code})"
        lines = [
            f"visionedge {read_build_identity()}, {self.system}",
            f"device: {device}",
            "",
            "The chain to the GPU",
            *_table(self.chain, but=self.first_broken, colours=colours),
            "",
            "Other checks",
            *_table(self.system_checks, colours=colours),
            "",
            *self._summary(),
        ]
        return "\n".join(lines) + "\n"

    def _summary(self) -> list[str]:
        first = self.first_broken
        if self.requested == "remote":
            broken = _wrap("", f"the CPU computes instead of a server: {self.reason} ({self.code})")
            return ["a server computes: pictures leave this device"] if self.fulfilled else broken
        if first is None and self.intel_is_unused:
            return ["no NVIDIA GPU here, and no OpenVINO for the Intel GPU: the CPU computes"]
        if first is None and self.gpu_is_absent:
            return ["no NVIDIA GPU here: the CPU computes"]
        if first is None:
            return ["the chain to the GPU works" if self.effective != "cpu" else "no link is broken"]
        instead = {"cpu": "the CPU", "cuda": "CUDA"}.get(self.effective, self.effective)
        fine = f"; {instead} computes instead" if self.fulfilled else ""
        lines = _wrap("", f"first broken link: {first.title}: {first.found}{fine}")
        lines += _remedies(first)
        later = [
            f"{f.title}: {f.found}" for f in self.chain if f.state is CheckState.BROKEN and f is not first
        ]
        return lines + (_wrap("", f"also broken: {'; '.join(later)}") if later else [])


def _dump_findings(findings: Iterable[CheckResult]) -> list[FindingDocument]:
    return [FindingDocument.model_validate(finding, from_attributes=True) for finding in findings]


def examine(request: DoctorRequest, host: Host) -> DoctorReport:
    """Examine a machine: 1 to 2 s, at most the sum of the probes' time limits."""
    facts = gather_facts(request, host)
    return DoctorReport(
        at=format_utc(host.utc_now()),
        system=host.system,
        environment=facts.environment,
        requested=request.device,
        effective=facts.probed.effective,
        code=facts.probed.verdict.code,
        reason=facts.probed.verdict.reason,
        chain=run_gpu_checks(facts, INTEL_CHECKS if facts.concerns_intel else GPU_CHECKS),
        system_checks=run_system_checks(facts),
        gpu_is_absent=facts.gpu_is_absent,
        intel_is_unused=facts.intel_is_unused and request.device == "auto",
    )


def _table(findings: tuple[CheckResult, ...], but: CheckResult | None = None, *, colours: bool) -> list[str]:
    """One line per result, followed by its remedies; those of `but` are in the summary."""
    width = max(len(finding.title) for finding in findings)
    lines = []
    for finding in findings:
        head = f"  {_MARKS[finding.state][0]} {finding.title:<{width}}  "
        first, *more = _wrap(head, finding.found)
        lines += [_colour_line(first, finding.state) if colours else first, *more]
        if finding is not but:
            lines += [f"      {line}" for line in _remedies(finding)]
    return lines


def _colour_line(line: str, state: CheckState) -> str:
    """A line with its mark in colour; lines that need no attention are grey as a whole."""
    end = len(line) if state in (CheckState.INFO, CheckState.SKIPPED) else 3
    return f"\x1b[{_MARKS[state][1]}m{line[:end]}\x1b[0m{line[end:]}"


def _remedies(finding: CheckResult) -> list[str]:
    lines: list[str] = []
    for remedy in finding.remedies:
        lines += _wrap("  → ", remedy.instruction)
        lines += [f"        {redact(line)}" for line in remedy.lines]  # no wrapping: people copy this line
    return lines


def _wrap(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        head + redact(text),  # mask before wrapping: a secret may contain a space
        _WIDTH,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


# --- the report of a running module -------------------------------------------------------------------------


MAX_AGE_NS = 60_000_000_000


class CachedReport:
    """Keeps the last report for a minute. For the event loop only.

    While `examine` runs, all callers wait for the same report; a cancelled caller does not cancel it.
    """

    def __init__(
        self, examine: Callable[[], Awaitable[Document]], clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._examine = examine
        self._clock = clock
        self._task: asyncio.Future[Document] | None = None
        self._begun_ns = 0

    async def report(self) -> Document:
        """A report that is at most a minute old. Raises what `examine` raises."""
        if self._task is None or self._is_old(self._task):
            self._begun_ns = self._clock()
            self._task = asyncio.ensure_future(self._examine())
        return await asyncio.shield(self._task)

    def _is_old(self, task: "asyncio.Future[Document]") -> bool:
        if not task.done():
            return False
        failed = task.cancelled() or task.exception() is not None
        return failed or self._clock() - self._begun_ns >= MAX_AGE_NS
