"""Reading models: recognised families with their evidence, refusals with their messages."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from tiny_models import TinyDetector, classifier
from visionedge.errors import ModelError
from visionedge.model.labels import COCO_80, choose_labels, read_class_names
from visionedge.model.model import load_model

DETECTOR = TinyDetector()


def refusal(path: Path) -> str:
    """The message of a model that is refused; always one line that starts with the path."""
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message.removeprefix(f"{path}: ")


def saved(path: Path, metadata: dict[str, str], **changes: Any) -> Path:
    return TinyDetector(metadata=metadata, **changes).save(path)


# --- what is understood -------------------------------------------------------------------------------------


def test_a_detector_reports_its_family_and_the_evidence(tmp_path: Path) -> None:
    model = load_model(DETECTOR.save(tmp_path / "tiny.onnx"))
    assert (model.name, model.head, len(model.sha256)) == ("tiny", "nanodet", 64)
    assert (model.input.width_px, model.input.height_px, model.input.fit) == (64, 48, "letterbox")
    assert any("strides 8, 16, 32" in clause for clause in model.evidence)


def test_a_model_travels_to_another_process(tmp_path: Path) -> None:
    model = load_model(DETECTOR.save(tmp_path / "tiny.onnx"))
    assert pickle.loads(pickle.dumps(model)) == model  # noqa: S301 - our own bytes


def test_stated_input_values_are_used_and_the_rest_comes_from_the_family(tmp_path: Path) -> None:
    stated = {"fit": "stretch", "pad": 0}
    path = saved(tmp_path / "m.onnx", {"visionedge.head": "nanodet", "visionedge.input": json.dumps(stated)})
    way = load_model(path).interpretation.preprocess
    assert (way.fit, way.pad, way.color, way.std[0]) == ("stretch", 0, "bgr", 57.375)


def test_picodet_is_recognised_by_its_producer(tmp_path: Path) -> None:
    path = saved(tmp_path / "pico.onnx", {}, strides=(8, 16, 32, 64), classes=80, producer="PaddlePaddle")
    model = load_model(path)
    assert (model.head, model.input.fit, model.interpretation.preprocess.color) == (
        "picodet",
        "stretch",
        "rgb",
    )


def test_picodet_without_a_producer_is_recognised_by_paddles_operators(tmp_path: Path) -> None:
    """As written by tools that rewrite a model."""
    proto = TinyDetector(metadata={}, strides=(8, 16, 32, 64), classes=10, producer="").proto()
    proto.opset_import.add(domain="Paddle", version=1)
    onnx.save(proto, tmp_path / "pico.onnx")
    assert load_model(tmp_path / "pico.onnx").head == "picodet"


def test_maps_are_paired_by_shape_and_not_by_name(tmp_path: Path) -> None:
    """The names of the outputs are exchanged; a sigmoid still shows the scores."""
    proto = DETECTOR.proto()
    for name in ("8", "16", "32"):
        _rename(proto, f"scores.{name}", "aside")
        _rename(proto, f"boxes.{name}", f"scores.{name}")
        _rename(proto, "aside", f"boxes.{name}")
    onnx.save(proto, tmp_path / "liar.onnx")
    interpretation = load_model(tmp_path / "liar.onnx").interpretation
    assert [scale.scores for scale in interpretation.decoder.scales] == ["boxes.8", "boxes.16", "boxes.32"]  # type: ignore[attr-defined]  # the DFL decoder's own


def _rename(proto: onnx.ModelProto, old: str, new: str) -> None:
    for node in proto.graph.node:
        for index, name in enumerate(node.output):
            if name == old:
                node.output[index] = new
    for value in proto.graph.output:
        value.name = new if value.name == old else value.name


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.onnx") == "there is no such model file"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder, not a file" in refusal(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    assert "is empty" in refusal(path)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(random.Random(seed).randbytes(300))  # noqa: S311 - noise, not a secret
    assert "is not an ONNX file" in refusal(path)


@pytest.mark.parametrize("content", [b"just text\n", b"PK\x03\x04 a zip", b"\x00" * 64, b"{}"])
def test_other_file_types_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    assert "is not an ONNX file" in refusal(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    content = DETECTOR.proto().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(len(content) * part)])
    assert "damaged" in refusal(path)


def test_a_network_without_a_layer_is_refused_with_the_evidence(tmp_path: Path) -> None:
    message = refusal(classifier(tmp_path / "class.onnx"))
    assert "not a detector" in message
    assert "image float32[1,3,8,8]" in message
    assert "flat float32[1,3]" in message


def test_an_ambiguous_family_is_not_guessed(tmp_path: Path) -> None:
    """Four scales without a producer: NanoDet-Plus and PicoDet look alike and need different pictures."""
    message = refusal(saved(tmp_path / "m.onnx", {}, strides=(8, 16, 32, 64), classes=80))
    assert "Seen: " in message


def test_an_unknown_head_in_the_metadata_is_refused(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "m.onnx", {"visionedge.head": "yolo99"}))
    assert "'yolo99'" in message
    assert "known heads: " in message


def test_a_stated_head_that_the_shapes_contradict_is_refused(tmp_path: Path) -> None:
    proto = onnx.load(classifier(tmp_path / "c.onnx"))
    helper.set_model_props(proto, {"visionedge.head": "nanodet"})
    onnx.save(proto, tmp_path / "c.onnx")
    message = refusal(tmp_path / "c.onnx")
    assert "'nanodet'" in message
    assert "flat float32[1,3]" in message


@pytest.mark.parametrize(
    ("stated", "complaint"),
    [
        ("[1]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"colour": "rgb"}', "unknown key 'colour'"),
        ('{"color": "grey"}', "color must be bgr or rgb"),
        ('{"std": [1, 0, 1]}', "std must be"),
        ('{"mean": [1, 2]}', "mean must be"),
        ('{"scale": "big"}', "scale must be"),
        ('{"pad": 300}', "pad must be"),
        ('{"resample": "area"}', "resample must be bilinear"),
    ],
)
def test_wrong_statements_about_the_input_are_refused(tmp_path: Path, stated: str, complaint: str) -> None:
    metadata = {"visionedge.head": "nanodet", "visionedge.input": stated}
    assert complaint in refusal(saved(tmp_path / "m.onnx", metadata))


def test_stated_bins_that_the_outputs_contradict_are_refused(tmp_path: Path) -> None:
    metadata = {"visionedge.head": "nanodet", "visionedge.decode": '{"reg_max": 99}'}
    assert "reg_max is 99, but its outputs say 7" in refusal(saved(tmp_path / "m.onnx", metadata))


# --- external data ------------------------------------------------------------------------------------------


def external(path: Path, **place: str) -> Path:
    """A model whose first weight is at `place`."""
    proto = DETECTOR.proto()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        weight.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_in_the_models_folder_is_read_and_counts_in_its_sha256(tmp_path: Path) -> None:
    whole = load_model(DETECTOR.save(tmp_path / "whole.onnx"))
    path = tmp_path / "split.onnx"
    onnx.save(DETECTOR.proto(), path, save_as_external_data=True, location="split.bin", size_threshold=0)
    first = load_model(path)
    content = bytearray((tmp_path / "split.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "split.bin").write_bytes(content)
    assert first.interpretation == whole.interpretation
    assert load_model(path).sha256 != first.sha256


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "", "sub/../../secret.bin"])
def test_external_data_outside_the_folder_is_never_opened(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(b"x" * 10_000)
    (tmp_path / "models").mkdir()
    path = external(tmp_path / "models" / "m.onnx", location=location)
    assert "outside the folder of the model" in refusal(path)


def test_external_data_behind_a_link_out_of_the_folder_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"x" * 10_000)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = external(tmp_path / "models" / "m.onnx", location="link.bin")
    assert "outside the folder of the model" in refusal(path)


def test_missing_or_short_external_data_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", location="w.bin", offset="0", length=str(1 << 31))
    assert "w.bin is missing" in refusal(path)
    (tmp_path / "w.bin").write_bytes(b"short")
    assert "ends at 5 bytes, but 2147483648 bytes are needed" in refusal(path)


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("length", "many")])
def test_external_data_without_a_location_is_refused(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "w.bin").write_bytes(b"x" * 100)
    place = {"location": "w.bin", "offset": "0", "length": "4", key: value}
    assert "the offset or length of its external data" in refusal(external(tmp_path / "m.onnx", **place))


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{0: 'cat', 1: 'dog'}",
        '{"0": "cat", "1": "dog"}',
        '["cat", "dog"]',
        "('cat', 'dog')",
        '{"1":"dog","0":"cat"}',
    ],
)
def test_names_are_read_as_python_or_json(text: str) -> None:
    assert read_class_names({"names": text}) == ("cat", "dog")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "{0: 'cat', 2: 'dog'}",
        "[1.5, 2]",
        "[True]",
        "[]",
        "cat, dog",
        "[" * 9999,
    ],
)
def test_names_in_another_form_are_refused_and_never_evaluated(text: str) -> None:
    with pytest.raises(ModelError, match="'names' is neither a list"):
        read_class_names({"names": text})


def test_labels_come_from_metadata_then_files_then_the_number_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert choose_labels(path, {}, 3) == (("class-0", "class-1", "class-2"), "nothing")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n\n")
    assert choose_labels(path, {}, 3)[0] == ("a", "b", "c")
    (tmp_path / "m.labels.txt").write_text("\ufeffx\r\ny\r\nz\r\n")
    assert choose_labels(path, {}, 3)[0] == ("x", "y", "z")
    assert choose_labels(path, {"names": "['p', 'q', 'r']"}, 3)[0] == ("p", "q", "r")


def test_eighty_classes_get_the_labels_of_coco(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert choose_labels(path, {}, 80)[0] == COCO_80
    ninety, ninety_one = (choose_labels(path, {}, count)[0] for count in (90, 91))
    assert (len(set(COCO_80)), len(ninety), len(ninety_one)) == (80, 90, 91)
    assert (ninety[0], ninety[17], ninety[89]) == ("person", "dog", "toothbrush")  # COCO's 1, 18 and 90
    assert (ninety_one[1], ninety_one[18], ninety_one[90]) == ("person", "dog", "toothbrush")


def test_labels_for_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(ModelError, match=r"it has 3 classes, but labels\.txt names 2"):
        choose_labels(tmp_path / "m.onnx", {}, 3)


def test_a_model_without_labels_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_model(DETECTOR.save(tmp_path / "m.onnx")).labels[4] == "class-4"
    assert "put them into m.labels.txt beside it" in caplog.text
