"""The fault `stuck` as edgeAgent sees it: the module ends with its own exit code."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from visionedge.app.service import RunOptions, Service
from visionedge.iothub.desired_properties import ConfigurationSources
from visionedge.runtime.watchdog import EXIT_HUNG

pytestmark = pytest.mark.system


class StuckService(Service):
    """Its hub client is stuck before there is an engine."""

    async def _start_cameras_and_engines(self, *_: Any) -> None:
        await asyncio.to_thread(self._on_hub_stuck)


def test_a_stuck_sdk_ends_the_module_in_order_with_its_own_exit_code(tmp_path: Path) -> None:
    """Exit code 75 has no other meaning; no thread is left."""
    document = {"inference": {"process": False, "device": "cpu"}, "http": {"port": 0}}
    options = RunOptions(ConfigurationSources.read(document), tmp_path, duration_s=60, environ={})
    service = StuckService(options)
    assert asyncio.run(service.main()) == EXIT_HUNG == 75
    assert service.still_running == []
