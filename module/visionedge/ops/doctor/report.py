"""The whole examination: look, judge, and tell it as JSON or in words."""

import asyncio
import textwrap
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from visionedge import __version__
from visionedge.engine.device.devices import EffectiveDevice, ReasonCode, RequestedDevice
from visionedge.frames.types import format_utc
from visionedge.ops.doctor.facts import DoctorRequest, gather_facts
from visionedge.ops.doctor.gpu_checks import run_gpu_checks
from visionedge.ops.doctor.host import CheckResult, CheckState, Document, Host, HostEnvironment
from visionedge.ops.doctor.system_checks import run_system_checks
from visionedge.runtime.redaction import redact, redact_document
from visionedge.web.documents import DoctorDeviceDocument, DoctorDocument, DoctorEnvironmentDocument

_WIDTH = 104
_MARKS = {
    CheckState.OK: "✓",
    CheckState.INFO: "·",
    CheckState.WARNING: "!",
    CheckState.BROKEN: "✗",
    CheckState.SKIPPED: "-",
}

_COLOURS = {
    CheckState.OK: 32,
    CheckState.INFO: 90,
    CheckState.WARNING: 33,
    CheckState.BROKEN: 31,
    CheckState.SKIPPED: 90,
}
"""Green, grey, yellow, red, grey: the codes of a terminal."""


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What was found. `chain` leads to the GPU, `surroundings` is everything else."""

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

    @property
    def first_broken(self) -> CheckResult | None:
        """The first broken link of the chain."""
        return next((finding for finding in self.chain if finding.state is CheckState.BROKEN), None)

    @property
    def fulfilled(self) -> bool:
        """Whether this machine does what is asked of it; the CPU is fine unless a GPU is demanded."""
        return self.requested in ("auto", self.effective)

    def document(self) -> Document:
        """As JSON, secrets masked."""
        first = self.first_broken
        document = DoctorDocument(
            schema="visionedge/doctor/1",
            version=__version__,
            at=self.at,
            system=self.system,
            fulfilled=self.fulfilled,
            device=DoctorDeviceDocument(
                requested=self.requested,
                effective=self.effective,
                reason_code=self.code,
                reason=self.reason,
            ),
            environment=DoctorEnvironmentDocument(
                container=self.environment.container,
                iot_edge=self.environment.edge,
                kernel=self.environment.kernel,
                release=self.environment.release,
                passthrough=self.environment.passthrough,
            ),
            first_broken=first.name if first else None,
            chain=[finding.document() for finding in self.chain],
            system_checks=[finding.document() for finding in self.system_checks],
        )
        masked: Document = redact_document(document.dump())
        return masked

    def to_text(self, *, colours: bool = False) -> str:
        """For people, secrets masked; the marks with the colours of a terminal."""
        device = f"requested {self.requested}, effective {self.effective}"
        if self.code is not ReasonCode.OK:
            device += f": {redact(self.reason)} ({self.code})"
        lines = [
            f"visionedge {__version__}, {self.system}",
            f"device: {device}",
            "",
            "The chain to the GPU",
            *_table(self.chain, but=self.first_broken, colours=colours),
            "",
            "Beside it",
            *_table(self.system_checks, colours=colours),
            "",
            *self._summary(),
        ]
        return "\n".join(lines) + "\n"

    def _summary(self) -> list[str]:
        first = self.first_broken
        if first is None and self.gpu_is_absent:
            return ["no NVIDIA GPU here: the CPU computes"]
        if first is None:
            return ["the chain to the GPU is whole" if self.effective != "cpu" else "no link is broken"]
        instead = {"cpu": "the CPU", "cuda": "CUDA"}.get(self.effective, self.effective)
        fine = f"; {instead} computes instead" if self.fulfilled else ""
        lines = _wrap("", f"first broken link: {first.title}: {first.found}{fine}")
        lines += _remedies(first)
        later = [
            f"{f.title}: {f.found}" for f in self.chain if f.state is CheckState.BROKEN and f is not first
        ]
        return lines + (_wrap("", f"also broken: {'; '.join(later)}") if later else [])


def examine(request: DoctorRequest, host: Host) -> DoctorReport:
    """Look at a machine and judge it. Takes a second or two, at most what its children are given."""
    facts = gather_facts(request, host)
    return DoctorReport(
        at=format_utc(host.utc_now()),
        system=host.system,
        environment=facts.environment,
        requested=request.device,
        effective=facts.probed.effective,
        code=facts.probed.verdict.code,
        reason=facts.probed.verdict.reason,
        chain=run_gpu_checks(facts),
        system_checks=run_system_checks(facts),
        gpu_is_absent=facts.gpu_is_absent,
    )


def _table(findings: tuple[CheckResult, ...], but: CheckResult | None = None, *, colours: bool) -> list[str]:
    """One line a finding, and what to do below it; of `but` that is told elsewhere."""
    width = max(len(finding.title) for finding in findings)
    lines = []
    for finding in findings:
        head = f"  {_MARKS[finding.state]} {finding.title:<{width}}  "
        first, *more = _wrap(head, finding.found)
        lines += [_colour_line(first, finding.state) if colours else first, *more]
        if finding is not but:
            lines += [f"      {line}" for line in _remedies(finding)]
    return lines


def _colour_line(line: str, state: CheckState) -> str:
    """A line of a table with its mark in colour; what needs no attention is grey, the whole line."""
    end = len(line) if state in (CheckState.INFO, CheckState.SKIPPED) else 3
    return f"\x1b[{_COLOURS[state]}m{line[:end]}\x1b[0m{line[end:]}"


def _remedies(finding: CheckResult) -> list[str]:
    lines: list[str] = []
    for remedy in finding.remedies:
        lines += _wrap("  → ", remedy.instruction)
        lines += [f"        {redact(line)}" for line in remedy.lines]  # to be copied, so never broken
    return lines


def _wrap(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        head + redact(text),  # before it is broken: a secret may hold a blank
        _WIDTH,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


# Doctor for a module that runs: one examination at a time, and none oftener than once a minute.


MAX_AGE_NS = 60_000_000_000


class CachedReport:
    """Answers from the last examination while it is fresh. Loop only.

    `examine` makes a new one; whoever asks meanwhile waits for the same, and if one of them leaves, the
    others still get it.
    """

    def __init__(
        self, examine: Callable[[], Awaitable[Document]], clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._examine = examine
        self._clock = clock
        self._task: asyncio.Future[Document] | None = None
        self._begun_ns = 0

    async def report(self) -> Document:
        """The newest report; raises what the examination raised."""
        if self._task is None or self._is_old(self._task):
            self._begun_ns = self._clock()
            self._task = asyncio.ensure_future(self._examine())
        return await asyncio.shield(self._task)

    def _is_old(self, task: "asyncio.Future[Document]") -> bool:
        if not task.done():
            return False
        failed = task.cancelled() or task.exception() is not None
        return failed or self._clock() - self._begun_ns >= MAX_AGE_NS
