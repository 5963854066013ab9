"""Probing a device on a thread: there is always a result, and it is counted."""

import queue

import pytest

from visionedge.engine.device.devices import DeviceVerdict, EffectiveDevice, ReasonCode
from visionedge.engine.process.worker_pool import DeviceProber
from visionedge.runtime.threads import ThreadGroup


def test_a_device_that_cannot_be_probed_is_not_usable(caplog: pytest.LogCaptureFixture) -> None:
    def failing(_device: EffectiveDevice) -> DeviceVerdict:
        raise OSError("no more processes")

    answers: queue.SimpleQueue[DeviceVerdict] = queue.SimpleQueue()
    probing = DeviceProber(ThreadGroup(lambda _name, _error: None), failing)
    probing.start("cuda", lambda _device, verdict: answers.put(verdict))
    verdict = answers.get(timeout=20)
    assert (verdict.code, verdict.reason) == (
        ReasonCode.PROBE_CRASHED,
        "could not be probed: no more processes",
    )
    assert probing.counts == {"probe-crashed": 1}
    assert "no more processes" in caplog.text
