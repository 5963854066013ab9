"""A start says what changed since the last good one."""

import json
import re
from pathlib import Path

from module_process import ModuleProcess

SECRET = "horse-battery-staple"


def test_the_second_start_names_the_section_that_changed_and_no_secret(tmp_path: Path) -> None:
    config, data = tmp_path / "vision.json", tmp_path / "data"
    kept = data / "last-good-start.json"
    document = {"cameras": {"dock": {"uri": "demo:"}}, "inference": {"precision": "fp32", "device": "cpu"}}
    logs = []
    for http in ({}, {"token": SECRET}):
        config.write_text(json.dumps({**document, "http": http}))
        with ModuleProcess(data, environ={"VISIONEDGE_CONFIG": str(config)}) as module:
            module.ready()
            assert module.stop() == 0
            logs.append(module.log)
    assert "changed since" not in logs[0]
    assert re.search(r"changed since the last good start \(20\S+\): configuration: http\n", logs[1])
    assert json.loads(kept.read_text())["device"] == "cpu"
    assert SECRET not in kept.read_text() + logs[1]
