"""The start of the module while its first model is read, which may take long."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from visionedge.edge.desired import Carriers
from visionedge.fetching import supply
from visionedge.inference.model import Model, load_model
from visionedge.service import Options, Service

WAIT_S = 60


def test_a_model_that_takes_long_to_read_does_not_keep_the_module_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal is heard, and the module ends, while the model is still read."""
    stopped = threading.Event()

    def slow(path: Path) -> Model:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.wait(WAIT_S)
        return load_model(path)

    monkeypatch.setattr(supply, "load_model", slow)
    document = {"inference": {"process": False, "device": "cpu"}, "http": {"port": 0}}
    service = Service(Options(Carriers.read(document), tmp_path, duration_s=60, environ={}))
    ended = service._shut_down

    async def shut_down() -> None:
        stopped.set()
        await ended()

    monkeypatch.setattr(service, "_shut_down", shut_down)
    assert asyncio.run(service.main()) == 0
    assert stopped.is_set()
    assert service.left == []
