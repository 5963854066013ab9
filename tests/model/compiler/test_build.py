"""Building a model: a batch is opened only if this is proven, and the trial run may fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tiny_models import TinyDetector, pictures
from visionedge.errors import ModelError, UnavailableError
from visionedge.model.compiled_metadata import (
    CompiledMetadata,
    read_compiled_metadata,
    require_compiled_metadata,
)
from visionedge.model.compiler import trial_run
from visionedge.model.compiler.build import build_graph, load_or_compile_with_batch
from visionedge.model.compiler.passes import make_batch_dynamic
from visionedge.model.compiler.trial_run import compare_outputs, compute_matching_share
from visionedge.model.model import load_model

FIXED = TinyDetector(batch=1)


def built(path: Path) -> tuple[onnxruntime.InferenceSession, CompiledMetadata]:
    """The graph of a model with an open batch, and its metadata."""
    graph = build_graph(load_model(path))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session, require_compiled_metadata(onnx.load_model_from_string(graph))


def run(session: onnxruntime.InferenceSession, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    (rows,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(rows)


def saved(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def on_scores(proto: onnx.ModelProto, *nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Nodes from `in` to `out` between the first scores and their sigmoid."""
    maker = next(node for node in proto.graph.node if "scores.8.flat" in node.output)
    maker.output[0] = "in"
    place = list(proto.graph.node).index(maker) + 1
    for index, node in enumerate(nodes):
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "scores.8.flat" if name == "out" else name
        proto.graph.node.insert(place + index, node)
    return proto


# --- the batch --------------------------------------------------------------------------------------------


def test_a_batch_that_was_fixed_at_one_is_opened(tmp_path: Path) -> None:
    """Three pictures at once give the rows of a slow reference, which takes them one by one."""
    session, compiled_metadata = built(FIXED.save(tmp_path / "fixed.onnx"))
    assert session.get_inputs()[0].shape == ["N", 48, 64, 3]
    assert compiled_metadata.batch is None
    assert compiled_metadata.batch_reason.startswith("fixed at 1 in the file; open: ")
    images = pictures(3)
    rows, expected = run(session, images)[:, :40], np.array(FIXED.rows(images, 40))
    np.testing.assert_array_equal(rows[..., 5], expected[..., 5])
    np.testing.assert_allclose(rows[..., :5], expected[..., :5], atol=1e-2)


def test_an_engine_knows_that_a_batch_was_opened(tmp_path: Path) -> None:
    """So it forms batches; without a data folder nothing is tried, and it runs as the file has it."""
    model = load_model(FIXED.save(tmp_path / "fixed.onnx"))
    opened, _ = load_or_compile_with_batch(model, tmp_path / "data")
    assert opened.interpretation.input.batch is None
    again, _ = load_or_compile_with_batch(opened, tmp_path / "data")
    assert again.interpretation.input.batch is None  # an engine may be opened again for the model of another
    assert load_or_compile_with_batch(model, None)[0].interpretation.input.batch == 1


def test_an_open_batch_stays_open(tmp_path: Path) -> None:
    session, compiled_metadata = built(TinyDetector().save(tmp_path / "open.onnx"))
    assert session.get_inputs()[0].shape[0] == "N"
    assert compiled_metadata.batch_reason.startswith("open in the file; open: ")


def test_a_larger_fixed_batch_is_unchanged(tmp_path: Path) -> None:
    session, compiled_metadata = built(TinyDetector(batch=2).save(tmp_path / "two.onnx"))
    assert session.get_inputs()[0].shape[0] == compiled_metadata.batch == 2
    assert run(session, pictures(2)).shape[0] == 2


MIXING = {
    "the best of all pictures is added": [
        helper.make_node("ReduceMax", ["in"], ["best"], axes=[0], keepdims=1),
        helper.make_node("Add", ["in", "best"], ["sum"]),
        helper.make_node("Mul", ["sum", "half"], ["out"]),
    ],
    "the first picture is taken for all": [
        helper.make_node("Gather", ["in", "first"], ["one"], axis=0),
        helper.make_node("Sub", ["in", "in"], ["none"]),
        helper.make_node("Add", ["one", "none"], ["out"]),
    ],
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("declared", [1, None])
def test_a_network_that_mixes_pictures_runs_one_by_one(
    tmp_path: Path, name: str, declared: int | None
) -> None:
    """With a fixed or a declared open batch: never silently wrong."""
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in MIXING[name]]
    proto = on_scores(TinyDetector(batch=declared).proto(), *nodes)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "first"))
    session, compiled_metadata = built(saved(proto, tmp_path / "mixing.onnx"))
    assert session.get_inputs()[0].shape[0] == compiled_metadata.batch == 1
    assert "one by one: " in compiled_metadata.batch_reason


def test_a_network_with_variable_output_length_runs_one_by_one(tmp_path: Path) -> None:
    """Suppression in the graph gives each picture another number of boxes."""
    proto = FIXED.proto()
    proto.graph.node.append(helper.make_node("NonZero", ["scores.8"], ["places"]))
    _, compiled_metadata = built(saved(proto, tmp_path / "counting.onnx"))
    assert compiled_metadata.batch == 1
    assert "the number of values that its NonZero outputs differs" in compiled_metadata.batch_reason


def test_resize_sizes_become_factors(tmp_path: Path) -> None:
    """A resize to [1, 3, 30, 50] and back is one for any number of pictures."""
    proto = FIXED.proto()
    graph = proto.graph
    for name, sizes in (("small", [1, 3, 30, 50]), ("large", [1, 3, 48, 64])):
        graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "resized" if name == "image" else name
    there = helper.make_node("Resize", ["image", "", "", "small"], ["smaller"], mode="linear")
    back = helper.make_node("Resize", ["smaller", "", "", "large"], ["resized"], mode="linear")
    graph.node.insert(0, there)
    graph.node.insert(1, back)
    _, compiled_metadata = built(saved(proto, tmp_path / "resizing.onnx"))
    assert compiled_metadata.batch is None, compiled_metadata.batch_reason


def test_a_batch_that_is_merged_with_windows_is_opened() -> None:
    """[1, 4, 6, 6] → [4, 36] → [1, 4, 36] → its first size comes from the data each time."""
    nodes = [
        helper.make_node("Reshape", ["image", "windows"], ["cut"]),
        helper.make_node("Reshape", ["cut", "whole"], ["out"]),
    ]
    weights = [
        numpy_helper.from_array(np.array([4, 36], np.int64), "windows"),
        numpy_helper.from_array(np.array([1, 4, 36], np.int64), "whole"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4, 6, 6])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 4, 36])
    graph = helper.make_graph(nodes, "windows", [image], [out], weights)
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    opened = make_batch_dynamic(network)
    assert isinstance(opened, onnx.ModelProto)
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(3, 4, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(session.run(None, {"image": images})[0], images.reshape(3, 4, 36))
    assert network.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1  # the original is untouched


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "open_"),
    [
        ("yolox_nano_416_coco80", True),
        ("picodet_s_416_coco80", True),
        ("deimv2_hgnetv2_femto_416_coco80", True),
        ("ssd_mobilenet_v1_300_tfod4out_coco90", False),
    ],
)
def test_real_models_get_the_expected_batch(shared_data: Path, name: str, open_: bool) -> None:
    """Two are opened, one is open, and one suppresses in its graph."""
    _, compiled_metadata = built(shared_data / "models" / f"{name}.onnx")
    assert (compiled_metadata.batch is None) == open_, compiled_metadata.batch_reason


# --- comparing --------------------------------------------------------------------------------------------


def test_values_are_equal_up_to_the_order_of_summation() -> None:
    together = np.array([[100.0, 1.0], [3.0, 0.0]], np.float32)
    alone = [[together[:1] + 0.005], [together[1:]]]
    assert compare_outputs(["a"], [together], alone)[0]
    assert not compare_outputs(["a"], [together], [[together[:1] + 0.05], [together[1:]]])[0]
    assert "differs by" in compare_outputs(["a"], [together], [[together[:1] + 1], [together[1:]]])[1]


@pytest.mark.parametrize("broken", [np.array([[np.nan], [1]], np.float32), np.ones((1, 1), np.float32)])
def test_nan_and_other_shapes_are_never_equal(broken: NDArray[np.float32]) -> None:
    ones = np.ones((1, 1), np.float32)
    assert not compare_outputs(["a"], [broken], [[ones], [ones]])[0]


def test_integers_must_be_exactly_equal() -> None:
    whole = np.array([[1], [2]], np.int64)
    assert compare_outputs(["ids"], [whole], [[whole[:1]], [whole[1:]]])[0]
    assert not compare_outputs(["ids"], [whole], [[whole[:1]], [whole[1:] + 1]])[0]


def test_rows_may_change_places_but_not_pictures() -> None:
    """Equal scores may be in any order; the share is that of the picture with the fewest matches."""
    random = np.random.default_rng(0)
    rows = np.asarray(random.uniform(0, 1, (2, 10, 6)) * [400, 400, 400, 400, 1, 80], np.float32)
    assert compute_matching_share(rows, rows[:, ::-1]) == 1
    assert compute_matching_share(rows, rows[::-1]) == 0
    moved = rows.copy()
    moved[1, :5, 0] += 3
    assert compute_matching_share(rows, moved) == 0.5


# --- the first run ----------------------------------------------------------------------------------------


def interpreter(path: Path, script: str) -> str:
    """A stand-in for Python that does something else."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -SEGV $$", r"makes onnxruntime crash \(SIGSEGV\)"),
        ("kill -ALRM $$", "does not finish a picture within"),
        ("kill -KILL $$", r"crash \(SIGKILL\)"),
        ("exit 7", "ended with code 7"),
        ('echo \'{"error": "no kernel", "finite": false}\'', "cannot be run: no kernel"),
    ],
)
def test_a_failed_trial_run_is_blamed_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    """A crash of native code takes the child, and not the module."""
    model = load_model(TinyDetector().save(tmp_path / "m.onnx"))
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", f"cat >/dev/null; {script}"))
    with pytest.raises(ModelError, match=words) as caught:
        build_graph(model)
    assert str(caught.value).startswith(f"{model.path}: ")


def test_a_failed_comparison_keeps_one_picture_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture was fine, so the model is used; only its batch is not opened."""
    found = {"error": "", "finite": True, "doubt": "", "rows": 500}
    script = f"cat >/dev/null; echo '{json.dumps(found)}'; kill -SEGV $$"
    model = load_model(FIXED.save(tmp_path / "m.onnx"))
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", script))
    compiled_metadata = require_compiled_metadata(onnx.load_model_from_string(build_graph(model)))
    assert compiled_metadata.batch == 1
    assert "crash (SIGSEGV)" in compiled_metadata.batch_reason


def test_without_onnxruntime_the_machine_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the model's fault, so another exit code."""
    model = load_model(TinyDetector().save(tmp_path / "m.onnx"))
    script = 'cat >/dev/null; echo \'{"unavailable": "onnxruntime cannot be imported"}\''
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", script))
    with pytest.raises(UnavailableError, match="cannot be imported"):
        build_graph(model)


def test_the_child_imports_nothing_from_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file called onnxruntime.py beside a model is not run."""
    model = load_model(TinyDetector().save(tmp_path / "m.onnx"))
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('taken over')\n")
    monkeypatch.chdir(tmp_path)
    assert build_graph(model)


def test_the_pictures_of_a_trial_run_are_different_and_reproducible() -> None:
    first, again = trial_run.make_test_pictures(30, 50), trial_run.make_test_pictures(30, 50)
    assert first.shape == (trial_run.COMPARED_PICTURES, 30, 50, 3)
    np.testing.assert_array_equal(first, again)
    assert all((first[i] != first[j]).mean() > 0.9 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert trial_run.make_test_pictures(1, 1).shape == (trial_run.COMPARED_PICTURES, 1, 1, 3)


# --- what a compiled graph says of itself -----------------------------------------------------------------


def test_a_compiled_graph_can_be_loaded_as_a_model(tmp_path: Path) -> None:
    """With the same labels, head, picture and rows; the old description of the network is removed."""
    tiny = TinyDetector(batch=1, metadata=TinyDetector().metadata | {"names": '["a","b","c","d","e"]'})
    first = load_model(tiny.save(tmp_path / "tiny.onnx"))
    (tmp_path / "again.onnx").write_bytes(build_graph(first))
    again = load_model(tmp_path / "again.onnx")
    assert (again.head, again.labels, again.input) == (first.head, first.labels, first.input)
    assert again.interpretation.needs_nms == first.interpretation.needs_nms
    assert again.evidence[0].startswith("was compiled by visionedge")
    assert again.original_sha256 == first.original_sha256 == first.sha256 != again.sha256
    images = pictures(2)
    once = onnxruntime.InferenceSession(build_graph(first), providers=["CPUExecutionProvider"])
    twice = onnxruntime.InferenceSession(build_graph(again, 7), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(run(twice, images), run(once, images)[:, :7])


def test_a_compiled_graph_has_the_whole_interpretation_in_its_metadata(tmp_path: Path) -> None:
    """The file can be used without visionedge."""
    model = load_model(TinyDetector().save(tmp_path / "tiny.onnx"))
    proto = onnx.load_model_from_string(build_graph(model))
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["names"]) == list(model.labels)
    assert json.loads(metadata["visionedge.input"]) == {
        "fit": "letterbox",
        "anchor": "center",
        "pad": 114,
        "resample": "bilinear",
        "rounding": "nearest",
    }
    assert metadata["visionedge.nms"] == "true"
    compiled_metadata: dict[str, Any] = json.loads(metadata["visionedge.compiled"])
    assert (compiled_metadata["sha256"], compiled_metadata["rows"], compiled_metadata["classes"]) == (
        model.sha256,
        320,
        5,
    )
    onnx.checker.check_model(proto)


def test_the_metadata_of_version_0_1_is_read() -> None:
    """Its keys are a file format: graphs compiled by 0.1.0 still work."""
    text = (
        '{"version": "0.1.0", "name": "yolox-nano-416", '
        '"sha256": "695e750a5d5754bb5a8d5325643b59282191a7e7a564e435a415fd3c578eab14", "head": "yolox", '
        '"classes": 80, "evidence": ["no node decodes the boxes yet", "takes BGR, letterbox"], "rows": 500, '
        '"batch": null, "batch_words": "fixed at 1 in the file; open: 3 pictures at once give the same", '
        '"signature": "uint8 [N,H,W,3] BGR -> float32 [N,K,6] (left, top, right, bottom in input pixels, '
        'score, class)"}'
    )
    compiled_metadata = read_compiled_metadata({"visionedge.compiled": text})
    assert compiled_metadata is not None
    assert (compiled_metadata.head, compiled_metadata.rows, compiled_metadata.batch) == ("yolox", 500, None)
    assert compiled_metadata.batch_reason == "fixed at 1 in the file; open: 3 pictures at once give the same"
    assert compiled_metadata.evidence == ("no node decodes the boxes yet", "takes BGR, letterbox")
    assert compiled_metadata.to_json() == text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "null", "[" * 9999])
def test_a_damaged_stamp_is_refused(tmp_path: Path, text: str) -> None:
    proto = onnx.load_model_from_string(build_graph(load_model(TinyDetector().save(tmp_path / "tiny.onnx"))))
    for entry in proto.metadata_props:
        entry.value = text if entry.key == "visionedge.compiled" else entry.value
    with pytest.raises(ModelError, match=r"visionedge\.compiled cannot be read by this version"):
        load_model(saved(proto, tmp_path / "bad.onnx"))


def test_a_graph_that_wrongly_claims_to_be_compiled_is_refused(tmp_path: Path) -> None:
    """The metadata is used only as far as the shapes agree."""
    built_ = onnx.load_model_from_string(build_graph(load_model(TinyDetector().save(tmp_path / "tiny.onnx"))))
    proto = TinyDetector().proto()
    helper.set_model_props(proto, {entry.key: entry.value for entry in built_.metadata_props})
    with pytest.raises(
        ModelError, match="says that visionedge compiled it, but its inputs or outputs differ"
    ):
        load_model(saved(proto, tmp_path / "liar.onnx"))


def test_plain_onnxruntime_runs_a_compiled_graph_without_this_package(tmp_path: Path) -> None:
    """One input of bytes, one output of rows, and nothing to install but onnxruntime and numpy."""
    path = tmp_path / "compiled.onnx"
    path.write_bytes(build_graph(load_model(TinyDetector().save(tmp_path / "tiny.onnx"))))
    script = (
        "import sys, numpy as np, onnxruntime as o;"
        "s = o.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider']);"
        "print(s.run(None, {s.get_inputs()[0].name: np.zeros((2, 48, 64, 3), np.uint8)})[0].shape)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert answer.stdout.strip() == "(2, 320, 6)"
