"""tools/decode_cost.py: the measured playbacks and the report. A small clip, one or two rounds."""

import json
from pathlib import Path

import pytest

from clips import make_clip

pytest.importorskip("av", reason="PyAV is not installed")

import decode_cost


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "yard.mp4", pictures=90)


def test_each_playback_is_measured_and_compared_to_bare_decoding(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "decode.json"
    words = ["--source", str(clip), "--size", "96", "--fps", "2", "--rounds", "2", "--json", str(path)]
    assert decode_cost.main(words) == 0
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == ["round 1/2", "round 2/2"]
    report = json.loads(path.read_text())
    playbacks = {"bare", "grab", "ours", "plain", "oursOpencv", "fps", "keyFps"}
    assert report["cpuMsPerPicture"].keys() == playbacks
    assert min(report["cpuMsPerPicture"].values()) >= 0
    assert report["ratio"].keys() == {"aboveDecoding", "fps", "keyFps"}
    assert report["load"]["pictures"] == 90
    for part in ("above decoding", "ratio", "grey levels"):
        assert part in out


def test_the_picture_equals_a_slow_reference(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    words = ["--source", str(clip), "--size", "96", "--rounds", "1", "--json", str(path)]
    assert decode_cost.main(words) == 0
    assert json.loads(path.read_text())["meanErrorGreyLevels"]["most"] < 2


def test_a_missing_clip_gives_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_cost.main(["--source", "no-such.mp4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such.mp4" in line
