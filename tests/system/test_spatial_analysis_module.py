"""A twin of Spatial Analysis with two cameras: its YAML runs as it is, and its messages are valid."""

import contextlib
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from module_process import ModuleProcess
from repository_paths import REPOSITORY
from spatial_analysis_schema import find_problems
from spatial_analysis_twins import make_graph, make_space

CLIP = REPOSITORY / "media" / "demo.mp4"
TYPES = {"personCountEvent", "personLineEvent", "personZoneEnterExitEvent", "personZoneDwellTimeEvent"}


def make_twin(folder: Path) -> dict[str, Any]:
    """Two recordings, all events but the distance; the people of the demo clip walk through the middle."""
    config = {"trigger": "event", "focus": "footprint"}
    interval = {**config, "trigger": "interval", "output_frequency": 2}
    zones = [
        {
            "name": "middle",
            "polygon": [[0.3, 0], [0.3, 1], [0.7, 1], [0.7, 0], [0.3, 0]],
            "events": [
                {"type": "count", "config": interval},
                {"type": "zonecrossing", "config": config},
                {"type": "zonedwelltime", "config": config},
            ],
        }
    ]
    ends = {"start": {"x": 0.5, "y": 0}, "end": {"x": 0.5, "y": 1}}
    lines = [{"name": "door", "line": ends, "events": [{"type": "linecrossing", "config": config}]}]
    instances: dict[str, Any] = {}
    for name in ("Lobby Camera 1", "dock"):
        copy = folder / f"{len(instances)}.mp4"
        copy.write_bytes(CLIP.read_bytes())
        instances[name] = {"parameters": {"VIDEO_URL": str(copy), "VIDEO_SOURCE_ID": name}}
    space = make_space(zones, lines)
    graph = make_graph(instances=instances, SPACEANALYTICS_CONFIG=space, VIDEO_IS_LIVE=False)
    for key in ("VIDEO_URL", "VIDEO_SOURCE_ID"):
        del graph["parameters"][key]
    return {"properties": {"desired": {"graphs": {"shop": graph}}}}


def read_messages(path: Path) -> list[dict[str, Any]]:
    """The documents of Spatial Analysis in a messages file, each once; a kill may have cut a line."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().split("\n")[:-1] if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            document = json.loads(line)
            if "schema" not in document:
                found.setdefault(document["events"][0]["id"], document)
    return [*found.values()]


def test_the_yaml_of_a_twin_runs_and_its_documents_are_valid_over_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, messages = (tmp_path / name for name in ("twin.json", "vision.yaml", "out.jsonl"))
    source.write_text(json.dumps(make_twin(tmp_path)))
    imported = CommandLine(capsys)("config", "import-spatial-analysis", source)
    assert imported.code == 0
    event = "properties.desired.graphs.shop.parameters.SPACEANALYTICS_CONFIG.zones.0.events.0.config"
    assert [line.split(": ")[1] for line in imported.complaints] == [
        f"{event}.trigger",
        f"{event}.output_frequency",
    ]
    target.write_text(imported.out)

    def found() -> dict[str, Counter[str]]:
        counts: dict[str, Counter[str]] = {"Lobby Camera 1": Counter(), "dock": Counter()}
        for document in read_messages(messages):
            counts[document["sourceInfo"]["id"]].update(event["type"] for event in document["events"])
        return counts

    environ = {"VISIONEDGE_DEVICE": "cpu"}
    arguments = ("--config", str(target), "--messages", str(messages))
    with ModuleProcess(tmp_path / "data", *arguments, environ=environ) as module:
        module.until(lambda _: all(counts.keys() == TYPES for counts in found().values()), timeout_s=120)
        module.stop(number=signal.SIGKILL)
    before = found()
    with ModuleProcess(tmp_path / "data", *arguments, environ=environ) as module:
        module.until(
            lambda _: all(
                counts["personLineEvent"] > before[name]["personLineEvent"]
                for name, counts in found().items()
            ),
            timeout_s=120,
        )
        assert module.stop() == 0
    documents = read_messages(messages)
    assert [find_problems(document) for document in documents] == [[]] * len(documents)
    sizes = {(document["sourceInfo"]["width"], document["sourceInfo"]["height"]) for document in documents}
    assert len(sizes) == 1
    check_conservation(documents)
    assert '"visionedge/batch/1"' not in messages.read_text()  # telemetry.mode is none


def check_conservation(documents: list[dict[str, Any]]) -> None:
    """Each count is the entries less the exits before it, by camera; who was inside at the kill has left."""
    inside = Counter[str]()
    for document in documents:
        source = document["sourceInfo"]["id"]
        for event in document["events"]:
            if event["type"] == "personZoneEnterExitEvent":
                inside[source] += 1 if event["properties"]["status"] == "Enter" else -1
            elif event["type"] == "personCountEvent":
                assert event["properties"]["personCount"] == inside[source]
