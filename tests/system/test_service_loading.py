"""The start of the module while its first model is read, which may take long."""

import asyncio
import json
import logging
import os
import re
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from visionedge.app.service import RunOptions, Service
from visionedge.iothub.desired_properties import ConfigurationSources
from visionedge.model import provider
from visionedge.model.model import Model, load_model

WAIT_S = 60


def test_a_slow_model_load_does_not_delay_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal is heard, and the module ends, while the model is still read."""
    stopped = threading.Event()

    def slow(path: Path) -> Model:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.wait(WAIT_S)
        return load_model(path)

    monkeypatch.setattr(provider, "load_model", slow)
    document = {"inference": {"process": False, "device": "cpu"}, "http": {"port": 0}}
    service = Service(RunOptions(ConfigurationSources.read(document), tmp_path, duration_s=60, environ={}))
    ended = service._shut_down

    async def shut_down() -> None:
        stopped.set()
        await ended()

    monkeypatch.setattr(service, "_shut_down", shut_down)
    assert asyncio.run(service.main()) == 0
    assert stopped.is_set()
    assert service.still_running == []


def test_the_address_is_logged_and_answers_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the first line of all, and readyz says there what is missing, however long the model takes."""
    first: list[str] = []
    answered: list[tuple[int, str]] = []

    def slow(path: Path) -> Model:
        first.append(caplog.messages[0])
        found = re.match(r"open (http://127\.0\.0\.1:[0-9]+/) ", first[0])
        try:
            assert found is not None
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{found[1]}readyz", timeout=WAIT_S)  # noqa: S310 - http, see above
            with refused.value as answer:
                answered.append((answer.code, json.load(answer)["status"]))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        return load_model(path)

    monkeypatch.setattr(provider, "load_model", slow)
    document = {"inference": {"process": False, "device": "cpu"}, "http": {"port": 0}}
    with caplog.at_level(logging.INFO, "visionedge"):
        assert (
            asyncio.run(Service(RunOptions(ConfigurationSources.read(document), tmp_path, environ={})).main())
            == 0
        )
    assert answered == [(503, "not_ready")], first
