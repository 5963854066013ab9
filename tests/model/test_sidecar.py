"""`MODEL.yaml` beside a model: what its owner states outright, checked, and stronger than everything else."""

import shutil
from pathlib import Path

import pytest

from tiny_graphs import Graph, compiled_rows, network, noise_pictures, state
from tiny_models import TinyDetector, classifier
from visionedge.errors import ModelError
from visionedge.model.labels import COCO_80
from visionedge.model.model import load_model
from visionedge.model.sidecar import DataYaml, read_sidecar

QUERIES, CLASSES = 25, 3


def _detector(path: Path, metadata: dict[str, str] | None = None, *, twins: bool = False) -> Path:
    """Queries of three classes; as `twins` with four, so that scores and boxes cannot be told apart."""
    graph = Graph()
    classes = 4 if twins else CLASSES
    picture = graph.input("pixel_values", "float32", "N", 3, 48, 64)
    logits = graph.attend(graph.features(picture, QUERIES * classes), QUERIES, classes)
    boxes = graph.add("Sigmoid", graph.attend(graph.features(picture, QUERIES * 4), QUERIES, 4))
    graph.output(
        graph.add("Sigmoid", logits) if twins else logits, "logits", "float32", "N", QUERIES, classes
    )
    graph.output(boxes, "pred_boxes", "float32", "N", QUERIES, 4)
    return graph.save(path, metadata)


def test_without_a_sidecar_nothing_is_stated(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path / "m.onnx").metadata == {}
    assert read_sidecar(tmp_path / "m.onnx").evidence == ()


def test_stated_keys_of_the_input_win_and_the_rest_is_recognised(tmp_path: Path) -> None:
    path = _detector(tmp_path / "m.onnx")
    before = load_model(path).interpretation.preprocess
    state(path, input={"color": "bgr", "fit": "letterbox", "anchor": "top-left", "pad": 0})
    after = load_model(path)
    way = after.interpretation.preprocess
    assert (way.color, way.fit, way.anchor, way.pad) == ("bgr", "letterbox", "top-left", 0)
    assert (way.scale, way.mean, way.std) == (before.scale, before.mean, before.std)
    assert after.evidence[0] == "m.yaml states input"
    assert (after.input.fit, after.input.anchor, after.input.pad) == ("letterbox", "top-left", 0)


def test_the_network_gets_the_stated_input(tmp_path: Path) -> None:
    path = _detector(tmp_path / "m.onnx")
    state(path, input={"color": "bgr", "scale": 0.5, "mean": [1, 2, 3], "std": [4, 5, 6]})
    pictures = noise_pictures(1, 64, 48)
    floats = (pictures.astype("float64") * 0.5 - [1, 2, 3]) / [4, 5, 6]
    tensor = floats.transpose(0, 3, 1, 2).astype("float32")
    best = 1 / (1 + 2.718281828459045 ** -network(path, {"pixel_values": tensor})["logits"].max())
    assert compiled_rows(load_model(path), pictures)[0, 0, 4] == pytest.approx(best, abs=1e-5)


def test_the_sidecar_wins_over_the_metadata(tmp_path: Path) -> None:
    """A model that states NanoDet's input in its metadata is fed as its owner says."""
    path = TinyDetector().save(tmp_path / "m.onnx")
    assert load_model(path).interpretation.preprocess.color == "bgr"
    state(path, input={"color": "rgb"}, labels=["a", "b", "c", "d", "e"])
    model = load_model(path)
    assert model.interpretation.preprocess.color == "rgb"
    assert model.labels == ("a", "b", "c", "d", "e")


def test_stated_labels_win_over_metadata_and_files_and_their_number_must_match(tmp_path: Path) -> None:
    path = _detector(tmp_path / "m.onnx", {"names": '{"0": "x", "1": "y", "2": "z"}'})
    (tmp_path / "m.labels.txt").write_text("u\nv\nw\n")
    assert load_model(path).labels == ("x", "y", "z")
    state(path, labels=["person", "forklift", "dog"])
    assert load_model(path).labels == ("person", "forklift", "dog")
    state(path, labels=["person", "forklift"])
    with pytest.raises(ModelError, match=r"has 3 classes, but m\.yaml names 2"):
        load_model(path)


DATA_YAML = "path: ../datasets/plant\ntrain: images/train\nval: images/val\nnc: 3\n"


@pytest.mark.parametrize(
    "text",
    [
        DATA_YAML + "names: [pallet, forklift, person]\n",
        DATA_YAML + "names:\n  0: pallet\n  1: forklift\n  2: person\nroboflow: {version: 2}\n",
        "names: [pallet, ' forklift', person]\n",
        "nc: 3\nnames: ['pallet', 'forklift', 'person']\n",
    ],
)
def test_the_names_of_a_training_data_set_are_labels(tmp_path: Path, text: str) -> None:
    """A data.yaml of Ultralytics that is kept beside the model under its name."""
    path = _detector(tmp_path / "best.onnx")
    (tmp_path / "best.yaml").write_text(text)
    model = load_model(path)
    assert model.labels == ("pallet", "forklift", "person")
    assert (
        model.interpretation.preprocess
        == load_model(_detector(tmp_path / "other.onnx")).interpretation.preprocess
    )


def test_the_names_of_a_data_set_win_over_a_guess_by_number() -> None:
    """80 classes are COCO's only where nothing else names them, and only as many names are taken."""
    plant = DataYaml("best.yaml", tuple(f"part {number}" for number in range(80)))
    assert plant.labels(COCO_80, "COCO by their number") == (plant.names, "best.yaml")
    assert plant.labels(COCO_80, "its metadata") == (COCO_80, "its metadata")
    assert plant.labels(("a", "b"), "nothing") == (("a", "b"), "nothing")
    assert plant.labels((), "nothing") == (plant.names, "best.yaml"), "nothing tells how many there are"


@pytest.mark.parametrize(
    "names", ["names: [a, b]\n", "names: {1: a, 2: b, 3: c}\n", "names: [[a], b, c]\n", "names: 3\n", ""]
)
def test_a_training_data_set_that_does_not_fit_is_ignored_with_a_line(
    tmp_path: Path, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no statement about the model, so it cannot be a wrong one."""
    path = _detector(tmp_path / "best.onnx")
    (tmp_path / "best.yaml").write_text(DATA_YAML + names)
    assert load_model(path).labels == ("class-0", "class-1", "class-2")
    assert "best.yaml describes a training data set" in caplog.text
    assert "the file is ignored" in caplog.text


def test_the_models_own_labels_win_over_those_of_a_training_data_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And so does a file of labels."""
    (tmp_path / "m.yaml").write_text(DATA_YAML + "names: [a, b, c]\n")
    assert load_model(_detector(tmp_path / "m.onnx", {"names": '["x", "y", "z"]'})).labels == ("x", "y", "z")
    assert "m.yaml describes a training data set with 3 class names" in caplog.text
    caplog.clear()
    assert load_model(_detector(tmp_path / "m.onnx", {"names": '["a", "b", "c"]'})).labels == ("a", "b", "c")
    assert caplog.text == "", "the same names are no news"
    (tmp_path / "m.labels.txt").write_text("u\nv\nw\n")
    assert load_model(_detector(tmp_path / "m.onnx")).labels == ("u", "v", "w")


@pytest.mark.parametrize("text", ["names: [a, b, c]\nhead: yolox\n", "names: [a, b, c]\nheads: yolox\n"])
def test_a_sidecar_with_a_wrong_key_is_still_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ModelError, match="names: unknown key"):
        load_model(_detector(tmp_path / "m.onnx"))


@pytest.mark.parametrize("wanted", [True, False])
def test_stated_suppression_is_used(tmp_path: Path, wanted: bool) -> None:
    path = _detector(tmp_path / "m.onnx")
    state(path, nms=wanted)
    model = load_model(path)
    assert model.interpretation.needs_nms is wanted
    assert any("as stated" in clause for clause in model.evidence)


def test_a_stated_head_must_still_fit_the_shapes(tmp_path: Path) -> None:
    path = _detector(tmp_path / "m.onnx")
    state(path, head="nanodet")
    with pytest.raises(ModelError, match="'nanodet' does not fit its shapes"):
        load_model(path)
    state(path, head="nanodett")
    with pytest.raises(
        ModelError,
        match=r"head: must be the name of a known head; did you mean 'nanodet'\?; known: .*nanodet",
    ):
        load_model(path)
    none = classifier(tmp_path / "c.onnx")
    state(none, head="detr-raw")
    with pytest.raises(ModelError, match="does not fit its shapes"):
        load_model(none)


def test_indistinguishable_outputs_are_refused(tmp_path: Path) -> None:
    """Four classes and boxes of four numbers, both made by a sigmoid."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(_detector(tmp_path / "m.onnx", twins=True))


def test_all_problems_are_reported_together_with_their_paths(tmp_path: Path) -> None:
    path = _detector(tmp_path / "m.onnx")
    state(
        path,
        heads="yolox",
        nms="yes",
        labels="person",
        anchors=[1, 2, 3],
        input={
            "colour": "rgb",
            "color": "grey",
            "std": [1, 0, 1],
            "pad": 300,
            "width": 0,
            "scale": -1,
            "mean": 0,
        },
    )
    with pytest.raises(ModelError) as caught:
        load_model(path)
    text = str(caught.value)
    assert text.startswith(f"{path.with_suffix('.yaml')}: ")
    assert "\n" not in text
    for problem in (
        "heads: unknown key; did you mean 'head'?",
        "nms: must be true or false",
        "labels: must be a list of words",
        "anchors: must be pairs",
        "input.colour: unknown key; did you mean 'color'?",
        "input.color: must be bgr or rgb",
        "input.std: must be three numbers, none of them 0",
        "input.pad: must be a grey level, 0 to 255",
        "input.width: must be a number of pixels",
        "input.scale: must be a number above 0",
        "input.mean: must be three numbers",
    ):
        assert problem in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("input: [1, 2]", "input: must be a mapping"),
        ("- head", "must be a mapping"),
        ("head: a\nhead: b", "given twice"),
        ("head: [", "is not valid YAML"),
        ("head: 3", "head: must be the name of a known head"),
        ("made_up: 1", "made_up: unknown key; known here: head, input, labels, nms, anchors"),
        ("input: {mean: [.nan, 0, 0]}", "input.mean: must be three numbers"),
    ],
)
def test_a_file_in_another_format_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = _detector(tmp_path / "m.onnx")
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_states_nothing(tmp_path: Path) -> None:
    path = _detector(tmp_path / "m.onnx")
    path.with_suffix(".yaml").write_text("# nothing yet\n")
    assert load_model(path).head == "detr-raw"


def test_a_stated_size_must_match_a_fixed_input(tmp_path: Path) -> None:
    path = _detector(tmp_path / "m.onnx")
    state(path, input={"width": 64, "height": 48})
    assert load_model(path).input.width_px == 64
    state(path, input={"width": 640})
    with pytest.raises(
        ModelError, match=r"input\.width is stated as 640, but the model has a fixed width of 64"
    ):
        load_model(path)


def test_a_sidecar_belongs_only_to_the_model_of_its_name(tmp_path: Path) -> None:
    path = _detector(tmp_path / "m.onnx")
    state(tmp_path / "other.onnx", nms=True)
    assert not load_model(path).interpretation.needs_nms
    shutil.copy(path, tmp_path / "other.onnx")
    assert load_model(tmp_path / "other.onnx").interpretation.needs_nms


def test_stated_anchors_become_metadata_of_the_model(tmp_path: Path) -> None:
    state(tmp_path / "m.onnx", anchors=[[10, 13], [16, 30]])
    sidecar = read_sidecar(tmp_path / "m.onnx")
    assert sidecar.metadata == {"anchors": "[[10, 13], [16, 30]]"}
    assert sidecar.evidence == ("m.yaml states anchors",)
