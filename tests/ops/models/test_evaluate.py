"""`model eval`: COCO's figures through the very pipeline, and all that can be wrong with annotations."""

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from clips import make_picture
from command_line import CommandLine
from tiny_models import TinyDetector
from visionedge.config.schema import InferenceConfig
from visionedge.errors import ConfigError
from visionedge.model.labels import COCO_80
from visionedge.model.model import find_bundled_model
from visionedge.ops.models.evaluate import (
    Annotations,
    CocoDetection,
    EvaluationRequest,
    compute_average_precision,
    evaluate,
    match_categories,
    read_annotations,
)

LABELS = ["ant", "bee", "cat", "dog", "emu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def _own_state(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_DATA", str(data))


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny detector whose classes have names."""
    metadata = TinyDetector().metadata | {"names": json.dumps(LABELS)}
    return TinyDetector(metadata=metadata).save(tmp_path / "tiny.onnx")


def annotated(folder: Path, pictures: int = 3, names: list[str] | None = None) -> dict[str, Any]:
    """Pictures in a folder, and a document with a box in the middle of each."""
    folder.mkdir(exist_ok=True)
    names = LABELS if names is None else names
    images = []
    for number in range(1, pictures + 1):
        make_picture(folder / f"p{number}.png", number)
        images.append({"id": number * 10, "file_name": f"p{number}.png", "width": 160, "height": 120})
    return {
        "images": images,
        # The numbers have gaps, and are not in the order of the names.
        "categories": [{"id": 7 + 3 * i, "name": name} for i, name in reversed(list(enumerate(names)))],
        "annotations": [
            {"id": i, "image_id": image["id"], "category_id": 7, "bbox": [40, 30, 80, 60], "iscrowd": 0}
            for i, image in enumerate(images, start=1)
        ],
    }


def written(document: Any, path: Path) -> Path:
    path.write_text(json.dumps(document))
    return path


# --- the verb -----------------------------------------------------------------------------------------------


def test_eval_prints_the_coco_figures_as_one_document(
    visionedge: CommandLine, tmp_path: Path, model: Path
) -> None:
    """On stdout nothing else; progress goes to stderr, as lines where that is no terminal."""
    coco = written(annotated(tmp_path / "in"), tmp_path / "coco.json")
    outcome = visionedge("model", "eval", model, "--coco", coco, "--images", tmp_path / "in", "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert (report["model"], report["device"], report["pictures"], report["missing"]) == ("tiny", "cpu", 3, 0)
    assert 0 <= report["ap"] <= report["ap50"] <= 1
    assert report["apSmall"] is None  # there is no small box to be found
    assert report["classesWithCategory"] == 5
    assert 0 < report["detections"] <= 300
    assert "3/3 pictures" in outcome.err
    assert "\r" not in outcome.err


def test_the_text_output_is_a_table(visionedge: CommandLine, tmp_path: Path, model: Path) -> None:
    coco = written(annotated(tmp_path / "in"), tmp_path / "coco.json")
    outcome = visionedge("model", "eval", model, "--coco", coco, "--images", tmp_path / "in")
    assert [line.split()[0] for line in outcome.out.splitlines()[1:4]] == ["AP", "AP50", "AP75"]
    assert "3 pictures" in outcome.out


def test_the_limit_selects_the_first_pictures(visionedge: CommandLine, tmp_path: Path, model: Path) -> None:
    coco = written(annotated(tmp_path / "in"), tmp_path / "coco.json")
    outcome = visionedge(
        "model", "eval", model, "--coco", coco, "--images", tmp_path / "in", "--json", "--limit", "2"
    )
    assert outcome.code == 0
    assert json.loads(outcome.out)["pictures"] == 2


def test_missing_pictures_are_one_line_and_the_others_are_evaluated(
    visionedge: CommandLine, tmp_path: Path, model: Path
) -> None:
    """They count neither for nor against the model; the exit code tells that something was not done."""
    coco = written(annotated(tmp_path / "in"), tmp_path / "coco.json")
    (tmp_path / "in" / "p2.png").unlink()
    (tmp_path / "in" / "p3.png").write_bytes(b"no picture")
    outcome = visionedge("model", "eval", model, "--coco", coco, "--images", tmp_path / "in", "--json")
    assert outcome.code == 1
    report = json.loads(outcome.out)
    assert (report["pictures"], report["missing"]) == (1, 2)
    missing, damaged = outcome.complaints
    assert "1 of 3 pictures are missing, such as p2.png" in missing
    assert "p3.png" in damaged


def test_a_set_without_pictures_is_an_error(visionedge: CommandLine, tmp_path: Path, model: Path) -> None:
    coco = written(annotated(tmp_path / "in"), tmp_path / "coco.json")
    (tmp_path / "empty").mkdir()
    outcome = visionedge("model", "eval", model, "--coco", coco, "--images", tmp_path / "empty")
    assert outcome.code == 1
    (line,) = outcome.complaints
    assert "none of the 3 pictures exists, such as p1.png" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("no json", "is not a JSON file"),
        ("[1]", "is not in COCO's format"),
        ("{}", "is not in COCO's format"),
        ('{"images": [{"id": 1}], "categories": [], "annotations": []}', "is not in COCO's format"),
        ('{"images": [], "categories": [], "annotations": []}', "has no images"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1, "name": "x"}],'
            ' "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}]}',
            "is not in COCO's format",
        ),
    ],
)
def test_wrong_annotations_give_a_one_line_error(
    visionedge: CommandLine, tmp_path: Path, model: Path, content: str | None, words: str
) -> None:
    coco = tmp_path / "coco.json"
    if content is not None:
        coco.write_text(content)
    outcome = visionedge("model", "eval", model, "--coco", coco, "--images", tmp_path)
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert words in line
    assert "coco.json" in line


def test_labels_without_any_matching_category_are_reported_with_both_lists(
    visionedge: CommandLine, tmp_path: Path, model: Path
) -> None:
    coco = written(annotated(tmp_path / "in", names=["lathe", "drill"]), tmp_path / "coco.json")
    outcome = visionedge("model", "eval", model, "--coco", coco, "--images", tmp_path / "in")
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert "ant, bee" in line
    assert "lathe" in line


def test_without_pycocotools_the_error_names_the_package_to_install(
    visionedge: CommandLine, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not after minutes of computing; the machine is not up to it, so 3."""
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    outcome = visionedge("model", "eval", model, "--coco", tmp_path / "none.json", "--images", tmp_path)
    assert outcome.code == 3
    (line,) = outcome.complaints
    assert "-m pip install pycocotools==" in line


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_a_bar(tmp_path: Path, model: Path, data: Path) -> None:
    """One line that grows, and is left at the end."""
    coco = written(annotated(tmp_path / "in"), tmp_path / "coco.json")
    screen = Terminal()
    request = EvaluationRequest(model, coco, tmp_path / "in", InferenceConfig(device="cpu"), data)
    evaluate(request, screen)
    last = screen.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("[##############################] 3/3 pictures")
    assert screen.getvalue().count("\n") == 1


@pytest.mark.shared
def test_the_bundled_model_reaches_the_accuracy_of_its_card(
    tmp_path: Path, shared_data: Path, data: Path
) -> None:
    """AP 0.330 on 128 pictures of COCO."""
    with tarfile.open(shared_data / "labelled" / "coco128.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    request = EvaluationRequest(
        find_bundled_model(),
        tmp_path / "annotations" / "instances_val2017.json",
        tmp_path / "val2017",
        InferenceConfig(device="cpu"),
        data,
    )
    report = evaluate(request, io.StringIO())
    assert report["precision"] == "fp32"
    assert report["ap"] == pytest.approx(0.3301, abs=0.005)
    card = find_bundled_model().with_suffix(".md").read_text(encoding="utf-8")
    assert "| **0.3301** | **0.5125** |" in card
    assert (report["pictures"], report["classesWithCategory"]) == (128, 80)
    shutil.rmtree(tmp_path / "val2017")


# --- labels and categories ----------------------------------------------------------------------------------


def categories(**names: int) -> Annotations:
    return Annotations({}, (), {number: name.replace("_", " ") for name, number in names.items()})


def test_classes_match_categories_by_name_and_not_by_number() -> None:
    """COCO's numbers have gaps; words may be spelt as Darknet spells them."""
    named = categories(person=1, traffic_light=10, dining_table=67, tv=72)
    assert match_categories(["tvmonitor", "Person", "diningtable", "traffic-light", "ghost"], named) == {
        0: 72,
        1: 1,
        2: 67,
        3: 10,
    }


def test_unnamed_classes_match_categories_by_order() -> None:
    """Only where the model has no words at all, and as many classes as there are categories."""
    named = categories(b=9, a=4)
    assert match_categories(["class-0", "class-1"], named) == {0: 4, 1: 9}
    with pytest.raises(ConfigError):
        match_categories(["class-0", "class-1", "class-2"], named)
    with pytest.raises(ConfigError):
        match_categories(["x", "y"], named)


# --- the figures --------------------------------------------------------------------------------------------


def perfect_annotations(boxes: list[tuple[int, int, list[float]]], tmp_path: Path) -> Annotations:
    """Annotations with (picture, category, box)."""
    return read_annotations(
        written(
            {
                "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)],
                "categories": [{"id": 3, "name": "a"}, {"id": 8, "name": "b"}],
                "annotations": [
                    {"image_id": image, "category_id": category, "bbox": box}
                    for image, category, box in boxes
                ],
            },
            tmp_path / "truth.json",
        )
    )


BOX = [10.0, 10.0, 50.0, 40.0]


def test_perfect_boxes_give_1_and_no_boxes_give_0(tmp_path: Path) -> None:
    annotations = perfect_annotations([(1, 3, BOX), (2, 8, BOX)], tmp_path)
    place = (10.0, 10.0, 50.0, 40.0)
    perfect = [CocoDetection(1, 3, place, 0.9), CocoDetection(2, 8, place, 0.4)]
    assert compute_average_precision(annotations, [1, 2], perfect)["ap"] == pytest.approx(1)
    figures = compute_average_precision(annotations, [1, 2], [])
    assert (figures["ap"], figures["ar100"], figures["apSmall"]) == (0, 0, None)


def test_a_box_of_the_wrong_class_or_picture_does_not_count(tmp_path: Path) -> None:
    annotations = perfect_annotations([(1, 3, BOX)], tmp_path)
    place = (10.0, 10.0, 50.0, 40.0)
    assert compute_average_precision(annotations, [1, 2], [CocoDetection(1, 8, place, 0.9)])["ap"] == 0
    assert compute_average_precision(annotations, [1, 2], [CocoDetection(2, 3, place, 0.9)])["ap"] == 0


def test_pictures_that_were_not_evaluated_do_not_count(tmp_path: Path) -> None:
    annotations = perfect_annotations([(1, 3, BOX), (2, 3, BOX)], tmp_path)
    found = [CocoDetection(1, 3, (10.0, 10.0, 50.0, 40.0), 0.9)]
    assert compute_average_precision(annotations, [1], found)["ap"] == pytest.approx(1)
    assert compute_average_precision(annotations, [1, 2], found)["ar100"] == pytest.approx(0.5)


def test_labels_of_coco_are_all_among_its_categories() -> None:
    """Each of the eighty meets a category of its own."""
    named = Annotations({}, (), {number * 2: name for number, name in enumerate(COCO_80)})
    assert len(set(match_categories(COCO_80, named).values())) == 80
