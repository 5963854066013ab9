"""`visionedge scene` with a second stage: the crops of a clip through a second model."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from command_line import CommandLine, call_in
from drawn_clips import CAR, PERSON, Actor, write_clip, write_detector
from tiny_classifiers import save_colour_classifier
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.engine.crops import answer_crops
from visionedge.engine.lanes import EngineWithSelection
from visionedge.frames.types import Picture
from visionedge.ops import scene_clips

Document = dict[str, Any]
HALL = {"polygon": [[0.3, 0], [0.7, 0], [0.7, 1], [0.3, 1]], "minSeconds": 0}
DOOR = {"start": [0.5, 0], "end": [0.5, 1], "minSeconds": 0}
CAMERA: Document = {
    "uri": "demo:",
    "zones": {"hall": {**HALL, "attributes": {"warm": "no"}}},
    "lines": {"door": {**DOOR, "attributes": {"warm": "yes"}}, "way": DOOR},
    "then": {"model": "warm"},
}
"""The classifier says yes of a red object and no of a blue one: a car is warm, and a person is not."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both models, and a clip in which a person and a car go to the right."""
    folder = tmp_path_factory.mktemp("made")
    write_detector(folder / "figures.onnx")
    save_colour_classifier(folder / "warm.onnx")
    person, car = [(0.0, 0.1, 0.5), (3.0, 0.9, 0.5)], [(0.0, 0.1, 0.9), (3.0, 0.9, 0.9)]
    write_clip(folder / "walk.mp4", [Actor(PERSON, person), Actor(CAR, car)], 3)
    return folder


@pytest.fixture
def visionedge(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """Calls the command line in that folder."""
    return call_in(made, monkeypatch, capsys)


def write_config(folder: Path, camera: Document = CAMERA, **keys: Any) -> Path:
    path = folder / "vision.yaml"
    document = {"cameras": {"dock": camera}, "models": {"warm": {"path": "warm.onnx"}}, **keys}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def test_rules_count_by_what_the_second_model_says(visionedge: CommandLine, tmp_path: Path) -> None:
    """`inference.classes` are those of the first model; two runs give the same."""
    config = write_config(tmp_path, inference={"classes": ["person", "car"]})
    command = ("scene", "walk.mp4", "--config", config, "--json", "--summary")
    outcome = visionedge(*command)
    assert (outcome.code, outcome.complaints) == (0, [])
    *events, scene = [json.loads(line) for line in outcome.out.splitlines()]
    found = sorted(
        (event["type"], event.get("line"), event["label"]) for event in events if "way" not in event
    )
    assert found == [
        ("line-crossed", "door", "car"),
        ("line-crossed", "way", "car"),
        ("line-crossed", "way", "person"),
        ("zone-entered", None, "person"),
        ("zone-left", None, "person"),
    ]
    assert scene["zones"]["hall"]["entered"] == {"person": 1}
    assert visionedge(*command).out == outcome.out


@pytest.mark.parametrize(("every", "questions"), [("track", 2), (10, 6)])
def test_a_track_is_asked_about_until_it_has_an_answer_or_again_after_so_many_pictures(
    visionedge: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: Any, questions: int
) -> None:
    answers: list[str | None] = []

    def count(running: EngineWithSelection, crops: Sequence[Picture]) -> list[str | None]:
        answers.extend(answer_crops(running, crops))
        return answers[-len(crops) :]

    monkeypatch.setattr(scene_clips, "answer_crops", count)
    config = write_config(tmp_path, {**CAMERA, "then": {"model": "warm", "every": every}})
    assert visionedge("scene", "walk.mp4", "--config", config).code == 0
    assert sorted(map(str, answers)) == ["no"] * (questions // 2) + ["yes"] * (questions // 2)


def test_an_annotated_video_shows_the_attributes_beside_the_labels(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    widths = []
    for name, then in (("with.mp4", CAMERA["then"]), ("without.mp4", None)):
        camera = {"uri": "demo:", "tracking": "on", **({"then": then} if then else {})}
        config = write_config(tmp_path, camera)
        assert visionedge("scene", "walk.mp4", "--config", config, "--annotate", tmp_path / name).code == 0
        plain, drawn = (read_picture(path, 15) for path in (Path("walk.mp4"), tmp_path / name))
        changed = np.abs(plain.astype(int) - drawn).max(axis=2)[:200] > 40  # around the person
        widths.append(int(changed.any(axis=0).sum()))
    assert widths[0] > widths[1] + 30


def read_picture(path: Path, number: int) -> Picture:
    with closing(open_source(CameraUri("file", str(path)))) as source:
        for _ in range(number):
            source.read()
        decoded = source.read()
        assert decoded is not None
        return decoded.picture()


def test_mistakes_of_the_second_model_are_one_line(visionedge: CommandLine, tmp_path: Path) -> None:
    def complain(model: Document, camera: Document = CAMERA) -> str:
        config = write_config(tmp_path, camera, models={"warm": model})
        outcome = visionedge("scene", "walk.mp4", "--config", config)
        assert (outcome.code, outcome.out) == (2, "")
        (line,) = outcome.complaints
        return line.removeprefix("visionedge: ")

    at_address = {"url": "https://models.example/m.onnx", "sha256": "a" * 64}
    assert complain(at_address).startswith("models.warm.url: scene downloads no model;")
    assert complain({"path": "missing.onnx"}).startswith("missing.onnx: ")
    other = {**CAMERA, "zones": {"hall": {**HALL, "attributes": {"warm": "maybe"}}}}
    expected = "cameras.dock.zones.hall.attributes.warm: warm has no class 'maybe'; it has yes, no"
    assert complain({"path": "warm.onnx"}, other) == expected
