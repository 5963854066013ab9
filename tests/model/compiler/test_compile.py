"""The compiled graph: whatever the network wants in and gives out, it equals the slow way in numpy."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from tiny_models import PLAIN_INPUT, TinyDetector, pictures
from visionedge.errors import ModelError
from visionedge.model.analysis.signature import read_signature
from visionedge.model.compiler.compile import compile_graph, compile_model
from visionedge.model.graph import CUDA_OPERATORS, NodeBuilder
from visionedge.model.heads import interpret_model
from visionedge.model.model import load_model


def described(**changes: Any) -> dict[str, str]:
    """A model's metadata with some of ``visionedge.input`` changed."""
    return {"visionedge.head": "nanodet", "visionedge.input": json.dumps(PLAIN_INPUT | changes)}


def compiled(tiny: TinyDetector, limit: int) -> onnxruntime.InferenceSession:
    model = tiny.proto()
    graph = compile_graph(model, interpret_model(read_signature(model)), limit)
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    (rows,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(rows)


VARIANTS = {
    "as NanoDet is": TinyDetector(),
    "the oldest opset": TinyDetector(opset=11),
    "an opset where reductions changed": TinyDetector(opset=18),
    "a new opset": TinyDetector(opset=21),
    "scores without a sigmoid": TinyDetector(
        sigmoid=False, metadata=described() | {"names": '["a","b","c","d","e"]'}
    ),
    "one class": TinyDetector(classes=1),
    "two scales and many bins": TinyDetector(strides=(16, 32), reg_max=15),
    "four scales": TinyDetector(strides=(8, 16, 32, 64)),
    "a size that strides do not divide": TinyDetector(width_px=52, height_px=44),
    "channels last": TinyDetector(layout="NHWC"),
    "half floats": TinyDetector(dtype="float16"),
    "red first, scaled": TinyDetector(
        metadata=described(color="rgb", scale=1 / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    ),
    "red first, channels last": TinyDetector(layout="NHWC", metadata=described(color="rgb")),
    "bytes": TinyDetector(dtype="uint8", metadata=described(mean=[0, 0, 0], std=[1, 1, 1])),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_equal_those_of_a_slow_reference(name: str) -> None:
    """Boxes within a hundredth of a pixel, scores and classes the same, in the same order."""
    tiny = VARIANTS[name]
    images = pictures(3, tiny.width_px, tiny.height_px)
    rows = run(compiled(tiny, 40), images)
    expected = np.array(tiny.rows(images, 40))
    exact = tiny.dtype != "float16"
    assert rows.shape == expected.shape == (3, 40, 6)
    np.testing.assert_allclose(rows[..., 4], expected[..., 4], atol=1e-5 if exact else 5e-3)
    if exact:
        np.testing.assert_array_equal(rows[..., 5], expected[..., 5])
        np.testing.assert_allclose(rows[..., :4], expected[..., :4], atol=1e-2)


def test_rows_are_sorted_by_descending_score() -> None:
    scores = run(compiled(TinyDetector(), 50), pictures(2))[..., 4]
    assert (np.diff(scores, axis=1) <= 0).all()


def test_the_number_of_rows_does_not_exceed_the_number_of_pairs() -> None:
    """63 cells of one class give 63 rows, whatever the limit."""
    tiny = TinyDetector(classes=1)
    cells = sum(columns * rows for _, columns, rows in tiny.grids())
    assert run(compiled(tiny, 500), pictures(1)).shape == (1, cells, 6)


def test_the_two_step_selection_loses_no_row() -> None:
    """Every limit gives the beginning of the longest list: the best pairs lie in the best cells."""
    tiny, images = TinyDetector(), pictures(1)
    whole = run(compiled(tiny, 10_000), images)
    for limit in (1, 7, 84, 200):
        np.testing.assert_allclose(run(compiled(tiny, limit), images), whole[:, :limit], atol=1e-4)


def test_the_batch_is_open_or_fixed_like_that_of_the_model() -> None:
    assert compiled(TinyDetector(), 5).get_inputs()[0].shape == ["N", 48, 64, 3]
    assert compiled(TinyDetector(batch=2), 5).get_inputs()[0].shape == [2, 48, 64, 3]


def test_scaling_is_refused_for_a_network_that_takes_bytes(tmp_path: Path) -> None:
    path = TinyDetector(dtype="uint8").save(tmp_path / "bytes.onnx")
    with pytest.raises(ModelError, match="takes bytes"):
        compile_model(load_model(path))


def test_added_names_never_collide_with_names_of_the_network() -> None:
    """A network with tensors named as ours would be wired wrong; ours give way."""
    nodes = NodeBuilder(17, ["visionedge.Add.0", "_visionedge.x"])
    assert nodes.add("Add", "a", "b") == "__visionedge.Add.0"


def test_an_operator_without_a_known_gpu_kernel_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="NonMaxSuppression"):
        NodeBuilder(17, []).add("NonMaxSuppression", "a")


def test_an_old_opset_is_refused_with_the_remedy() -> None:
    with pytest.raises(ModelError, match="opset 9 is too old: export the model with opset 11 or newer"):
        NodeBuilder(9, [])


@pytest.mark.shared
def test_every_added_operator_has_a_cuda_kernel_in_onnxruntimes_list(shared_data: Path) -> None:
    with (shared_data.parent / "reference" / "cuda-kernels.tsv").open(encoding="utf-8") as file:
        listed = {row[1] for row in csv.reader(file, delimiter="\t") if row[0] == "ai.onnx"}
    assert listed >= CUDA_OPERATORS


def test_a_file_that_changed_after_it_was_loaded_is_not_compiled(tmp_path: Path) -> None:
    path = TinyDetector().save(tmp_path / "tiny.onnx")
    model = load_model(path)
    TinyDetector(seed=1).save(path)
    with pytest.raises(ModelError, match="changed while it was in use"):
        compile_model(model)
