"""Every example of docs/spatial-analysis.md is what the code makes of it, or is valid."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from repository_paths import REPOSITORY
from spatial_analysis_schema import find_problems
from visionedge.config import spatial_analysis
from visionedge.config.spatial_analysis import import_spatial_analysis

PAGE = (REPOSITORY / "docs" / "spatial-analysis.md").read_text(encoding="utf-8")
BLOCKS = [
    re.sub("^    ", "", block, flags=re.MULTILINE)
    for block in re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)
]
DOCUMENTS: list[dict[str, Any]] = [json.loads(block) for block in BLOCKS if block.startswith("{")]


def test_the_page_is_short() -> None:
    assert len(PAGE.split()) <= 1_200


def test_the_yaml_and_the_lines_of_the_page_are_what_the_command_prints_of_its_twin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the YAML is a configuration without problems."""
    (twin,) = [document for document in DOCUMENTS if "properties" in document]
    (shown,) = [block for block in BLOCKS if block.startswith("cameras:")]
    (lines,) = [block for block in BLOCKS if block.startswith("visionedge: ")]
    visionedge, source, target = CommandLine(capsys), tmp_path / "twin.json", tmp_path / "vision.yaml"
    source.write_text(json.dumps(twin))
    outcome = visionedge("config", "import-spatial-analysis", source)
    assert outcome.out == shown
    assert outcome.complaints == lines.splitlines()
    with pytest.MonkeyPatch.context() as environment:
        for name in import_spatial_analysis(twin).variables:
            environment.setenv(name, "word")
        target.write_text(shown)
        assert visionedge("config", "check", target).code == 0


def test_the_messages_of_the_page_are_valid_and_of_every_type() -> None:
    messages = [document for document in DOCUMENTS if "schemaVersion" in document]
    assert len(messages) + 1 == len(DOCUMENTS)
    assert [find_problems(message) for message in messages] == [[]] * len(messages)
    assert {event["type"] for message in messages for event in message["events"]} == {
        "personCountEvent",
        "personLineEvent",
        "personZoneEnterExitEvent",
        "personZoneDwellTimeEvent",
    }


@pytest.mark.parametrize(
    "name",
    [
        *spatial_analysis._TRANSLATED,
        *spatial_analysis._ANCHORS,
        *spatial_analysis._ZONE_EVENTS,
        "linecrossing",
    ],
)
def test_the_page_names_what_is_translated(name: str) -> None:
    assert name in PAGE


@pytest.mark.parametrize("name", spatial_analysis._REASONS)
def test_the_page_names_what_has_no_counterpart(name: str) -> None:
    """Those of the calibration by a part of their names."""
    assert name in PAGE or ("CALIBRAT" in name and "*CALIBRAT*" in PAGE)
