"""An update, a roll-back and an update again, each version a process of its own on the same data folder.

The next version is made up (`next_version`). The hub is a stand-in and the SDK is the real one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.contract import check_messages
from edge_runtime.runtime import EdgeRuntime
from module_process import ModuleProcess
from next_version import Kind

TODAY = ("visionedge",)


@pytest.fixture
def start(edge_runtime: EdgeRuntime, tmp_path: Path) -> Callable[..., ModuleProcess]:
    """Starts a version in IoT Edge on one data folder, with the bundled clip as a camera."""
    config = tmp_path / "vision.json"
    config.write_text(
        json.dumps(
            {
                "cameras": {"dock": {"uri": "demo:", "fps": 4}},
                "inference": {"precision": "fp32", "device": "cpu"},
                "telemetry": {"mode": "all", "intervalSeconds": 0.5},
            }
        )
    )

    def begin(*program: str) -> ModuleProcess:
        environ = {**edge_runtime.environ, "VISIONEDGE_CONFIG": str(config)}
        return ModuleProcess(tmp_path / "data", environ=environ, program=program)

    return begin


def waiting(module: ModuleProcess, count: int) -> dict[str, Any]:
    """Status, as soon as so many messages wait on disk."""
    status: dict[str, Any] = {}

    def look(_cameras: object) -> bool:
        status.update(module.get("/api/v1/status"))
        assert status["hub"]["spool"]["mode"] == "disk"
        return bool(status["hub"]["spool"]["waiting"] >= count)

    module.until(look)
    return status


@pytest.mark.parametrize("kind", ["additive", "incompatible"])
def test_an_update_a_roll_back_and_an_update_lose_no_message_and_repeat_no_number(
    edge_runtime: EdgeRuntime, start: Callable[..., ModuleProcess], tmp_path: Path, kind: Kind
) -> None:
    following = ("next_version", kind)
    edge_runtime.hub_down()
    with start(*TODAY) as old:
        assert waiting(old, 4)["newerState"] == []
        assert old.stop() == 0
    with start(*following) as new:
        assert waiting(new, 8)["newerState"] == []
        assert new.stop() == 0
    with start(*TODAY) as back:
        status = waiting(back, 3 if kind == "incompatible" else 12)
        assert [line.partition(" ")[0] for line in status["newerState"]] == (
            ["sequences.json", "spool.db"] if kind == "incompatible" else ["sequences.json"]
        )
        assert (tmp_path / "data" / "spool.1.db").exists() == (kind == "incompatible")
        assert back.stop() == 0
    with start(*following) as again:
        assert again.get("/api/v1/status")["newerState"] == []
        edge_runtime.hub_up()
        messages = edge_runtime.wait_for(
            lambda received: again.get("/api/v1/status")["hub"]["waiting"] == 0 and len(received) >= 15, 60
        )
        assert again.stop(15) == 0
    check_messages(messages)
    assert not list((tmp_path / "data").glob("*.aside"))
    assert not list((tmp_path / "data").glob("*.[0-9].*"))
    for output in ("detections", "events"):  # from the first one on; check_messages finds gaps
        assert next(each for each in messages if each.output == output).json()["messageSequence"] == 1
    frames = {each.message_id: each.json()["frames"] for each in messages if each.output == "detections"}
    sequences = [frame["sequence"] for batch in frames.values() for frame in batch]
    assert len(sequences) == len(set(sequences)) > 4
    codes = {each.json()["code"] for each in messages if each.output == "events"}
    assert codes & {"state-newer", "spool-newer", "state-lost", "spool-lost"} == (
        {"state-newer", "spool-newer"} if kind == "incompatible" else {"state-newer"}
    )
