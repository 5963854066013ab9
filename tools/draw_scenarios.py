"""Make the pictures of docs/scenarios.md: `python tools/draw_scenarios.py [--videos DIR]`.

Each is a picture of the video that `visionedge scene --annotate` makes of the drawn clip of a scenario, with
the configuration in the document. `--videos` keeps these videos. The tests' doubles draw the clips.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / name) for name in ("module", "tests/doubles")]

from drawn_clips import write_detector  # noqa: E402 - needs the path above
from scenario_clips import CLIPS, read_scenarios  # noqa: E402 - as above
from visionedge.__main__ import main as visionedge  # noqa: E402 - as above

_QUALITY = 80
_START = "2026-11-30T10:00:00+01:00"


def draw(name: str, document: dict[str, Any], folder: Path, target: Path) -> None:
    """Run a scenario on its clip and write the picture of its moment to `target`."""
    clip, config, video = folder / f"{name}.clip.mp4", folder / f"{name}.yaml", folder / f"{name}.mp4"
    CLIPS[name].write(clip)
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    (camera,) = document["cameras"]
    detector = write_detector(folder / "parts.onnx")
    arguments = ["scene", clip, "--config", config, "--camera", camera, "--model", detector]
    # A Monday in opening hours.
    if code := visionedge([*map(str, arguments), "--annotate", str(video), "--start", _START]):
        raise SystemExit(code)
    reader = cv2.VideoCapture(str(video))
    reader.set(cv2.CAP_PROP_POS_MSEC, 1000 * CLIPS[name].shown_s)
    is_read, picture = reader.read()
    reader.release()
    if not is_read or not cv2.imwrite(str(target), picture, [cv2.IMWRITE_WEBP_QUALITY, _QUALITY]):
        raise SystemExit(f"{video} has no picture at {CLIPS[name].shown_s} s, or {target} cannot be written")


def main() -> int:
    """Draw all pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, help="keep the annotated videos in this folder")
    wanted = parser.parse_args()
    target = REPOSITORY / "docs" / "scenarios"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["VISIONEDGE_DATA"] = temporary
        folder = wanted.videos or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        text = (REPOSITORY / "docs" / "scenarios.md").read_text(encoding="utf-8")
        for name, document in read_scenarios(text).items():
            draw(name, document, folder, target / f"{name}.webp")
    return 0


if __name__ == "__main__":
    sys.exit(main())
