"""`bench decode`: what is measured, and what the report says of it. A small clip, one or two rounds."""

import json
from pathlib import Path

import pytest

from clips import make_clip
from command_line import CommandLine
from visionedge.frames.types import InputSpec
from visionedge.ops.bench.decode import DecodeLoad, bench_decode, format_report

pytest.importorskip("av", reason="PyAV is not installed")


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "yard.mp4", pictures=90)


def test_each_way_is_measured_and_held_against_bare_decoding(clip: Path) -> None:
    told: list[str] = []
    report = bench_decode(DecodeLoad(clip, InputSpec(96, 96), fps=2.0, key_fps=0.5, rounds=2), told.append)
    assert [line.split(":")[0] for line in told] == ["round 1/2", "round 2/2"]
    ways = {"bare", "grab", "ours", "plain", "oursOpencv", "fps", "keyFps"}
    assert report["cpuMsPerPicture"].keys() == ways
    assert min(report["cpuMsPerPicture"].values()) >= 0
    assert report["ratio"].keys() == {"aboveDecoding", "fps", "keyFps"}
    assert report["load"]["pictures"] == 90
    assert json.loads(json.dumps(report)) == report
    for part in ("above decoding", "ratio", "grey levels"):
        assert part in format_report(report)


def test_the_picture_is_the_one_of_a_slow_reference(clip: Path) -> None:
    report = bench_decode(DecodeLoad(clip, InputSpec(96, 96), rounds=1), lambda _: None)
    assert report["meanErrorGreyLevels"]["most"] < 2


def test_a_clip_that_is_not_there_is_one_line(visionedge: CommandLine) -> None:
    outcome = visionedge("bench", "decode", "--source", "no-such.mp4")
    assert outcome.code == 1
    assert "no-such.mp4" in outcome.complaints[0]
