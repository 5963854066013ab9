"""Asking a device whether it is usable, in a process of its own, while frames are computed elsewhere."""

import logging
import subprocess
import threading
from collections.abc import Callable, Mapping
from functools import partial

from visionedge.engine.device.devices import Effective, ProbeOutput, Reason, Verdict, probe, run_probe
from visionedge.runtime.threads import Crew

log = logging.getLogger(__name__)


class Probing:
    """Asks one device at a time on a thread of `crew`, and counts the answers. Any thread may `close`."""

    def __init__(self, crew: Crew, prober: Callable[[Effective], Verdict] | None = None) -> None:
        self._crew = crew
        self._prober = prober or partial(probe, run=self._run)
        self._process: subprocess.Popen[str] | None = None
        self._closing = threading.Event()
        self._counts = dict.fromkeys(Reason, 0)

    def ask(self, device: Effective, then: Callable[[Effective, Verdict], None]) -> None:
        """Ask; `then` is called from the thread that asked."""

        def asked() -> None:
            try:
                verdict = self._prober(device)
            except Exception as error:
                log.exception("%s could not be asked", device)
                verdict = Verdict(Reason.PROBE_CRASHED, f"it could not be asked: {error}")
            self._counts[verdict.code] += 1
            then(device, verdict)

        self._crew.start("engine-probe", asked)

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each answer came."""
        return {str(code): count for code, count in self._counts.items() if count}

    def close(self) -> None:
        """End the process that is being asked."""
        self._closing.set()
        process = self._process
        if process is not None:
            process.kill()

    def _run(self, provider: str, timeout_s: float) -> ProbeOutput:
        def keep(process: subprocess.Popen[str]) -> None:
            self._process = process
            if self._closing.is_set():
                process.kill()

        try:
            return run_probe(provider, timeout_s, keep)
        finally:
            self._process = None
