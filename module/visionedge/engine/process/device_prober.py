"""Probing whether a device is usable, in a separate process, while frames are computed elsewhere."""

import logging
import subprocess
import threading
from collections.abc import Callable, Mapping
from functools import partial

from visionedge.engine.device.devices import (
    DeviceVerdict,
    EffectiveDevice,
    ProbeOutput,
    ReasonCode,
    probe_device,
    run_probe,
)
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)


class DeviceProber:
    """Probes one device at a time on a thread, and counts the results. Any thread may call `close`."""

    def __init__(
        self, thread_group: ThreadGroup, prober: Callable[[EffectiveDevice], DeviceVerdict] | None = None
    ) -> None:
        self._thread_group = thread_group
        self._prober = prober or partial(probe_device, run=self._run)
        self._process: subprocess.Popen[str] | None = None
        self._closing = threading.Event()
        self._counts = dict.fromkeys(ReasonCode, 0)

    def start(
        self, device: EffectiveDevice, on_result: Callable[[EffectiveDevice, DeviceVerdict], None]
    ) -> None:
        """Probe a device; `on_result` is called from the thread that probes."""

        def probe() -> None:
            try:
                verdict = self._prober(device)
            except Exception as error:
                log.exception("%s could not be probed", device)
                verdict = DeviceVerdict(ReasonCode.PROBE_CRASHED, f"could not be probed: {error}")
            self._counts[verdict.code] += 1
            on_result(device, verdict)

        self._thread_group.start("engine-probe", probe)

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each result came, without those that never did."""
        return {str(code): count for code, count in self._counts.items() if count}

    def close(self) -> None:
        """Kill the process of the probe in progress."""
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
