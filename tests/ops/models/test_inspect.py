"""`model inspect`: the report about a model, its nodes and weights, and about a refused one."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny_yolos as yolos
from command_line import CommandLine
from raw_map_models import raw_map_model
from tiny_graphs import state
from tiny_models import TinyDetector, classifier
from visionedge.model.analysis.cuda_kernels import explain_missing_kernel, load_cuda_kernels, read_opsets
from visionedge.model.analysis.shape_inference import infer_node_by_node
from visionedge.model.compiler.build import build_graph
from visionedge.model.graph import CUDA_OPERATORS
from visionedge.model.model import Model, find_bundled_model, load_model
from visionedge.ops.models.inspect import compute_cost, count_operators, format_report, inspect_model

TINY = TinyDetector(batch=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def _own_state(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_DATA", str(data))


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


# --- the verb -----------------------------------------------------------------------------------------------


def test_inspect_reports_a_model_and_its_compiled_graph(visionedge: CommandLine, tmp_path: Path) -> None:
    """Head and evidence, tensors, classes, weights, work, the compiled graph, the batch, CUDA."""
    path = TINY.save(tmp_path / "tiny.onnx")
    outcome = visionedge("model", "inspect", path, "--json")
    assert outcome.code == 0
    facts = json.loads(outcome.out)
    assert facts["refused"] is None
    assert facts["head"] == "nanodet"
    assert any("strides 8, 16, 32" in clause for clause in facts["evidence"])
    assert facts["inputs"] == [{"name": "image", "type": "float32", "shape": [1, 3, 48, 64]}]
    assert len(facts["outputs"]) == 6
    assert (facts["classes"], facts["labelsFrom"]) == (5, "nothing")
    assert facts["picture"]["mean"] == [103.53, 116.28, 123.675]
    assert facts["batch"]["open"] is True
    assert facts["batch"]["why"].startswith("fixed at 1 in the file; open: ")
    assert facts["compiled"]["takes"] == "uint8 [N,48,64,3]"
    assert facts["compiled"]["gives"] == "float32 [N,320,6]"
    assert set(facts["compiled"]["added"]) <= CUDA_OPERATORS
    assert facts["cuda"]["withoutKernel"] == []
    assert facts["operators"]["Conv"] == 6


def test_weights_and_operations_match_the_definition(visionedge: CommandLine, tmp_path: Path) -> None:
    """Six convolutions of stride s and kernel s x s over 3 channels, padded: each pixel once for each of
    5 + 32 maps of each of three scales."""
    facts = json.loads(visionedge("model", "inspect", TINY.save(tmp_path / "t.onnx"), "--json").out)
    cells = [(s, columns * rows) for s, columns, rows in TINY.grids()]
    assert facts["parameters"] == sum(3 * s * s * (5 + 32) for s, _ in cells)
    assert facts["macsPerPicture"] == sum(count * 3 * s * s * (5 + 32) for s, count in cells)
    assert facts["macsUncountedNodes"] == 0


def test_the_text_output_is_readable(visionedge: CommandLine, tmp_path: Path) -> None:
    """The same, to be read from above; every line fits on one screen line or is a list."""
    outcome = visionedge("model", "inspect", TINY.save(tmp_path / "tiny.onnx"))
    for part in (
        "Recognised as nanodet, because",
        "letterboxed to 64 x 48, in the middle, padded with grey 114; BGR, pixels of 0-255, minus 103.53/",
        "Overlapping boxes are suppressed afterwards (NMS).",
        "multiply-adds per picture",
        "fixed at 1 in the file; open: ",
        "nodes have a kernel",
    ):
        assert part in outcome.out


@pytest.mark.parametrize(
    ("model", "gigamacs", "megaweights"),
    [
        ("yolox_nano_416_coco80", 0.54, 0.91),
        ("picodet_s_416_coco80", 0.62, 0.99),
        ("ssd_mobilenet_v1_300_tfod4out_coco90", 0.72, 4.2),
    ],
)
@pytest.mark.shared
def test_operations_and_weights_of_real_models_match_the_published_ones(
    shared_data: Path, data: Path, model: str, gigamacs: float, megaweights: float
) -> None:
    """To a twentieth: makers count a bias here and an activation there."""
    facts = inspect_model(shared_data / "models" / f"{model}.onnx", data).document
    assert facts["macsPerPicture"] / 1e9 == pytest.approx(gigamacs, rel=0.05)
    assert facts["parameters"] / 1e6 == pytest.approx(megaweights, rel=0.05)


def test_no_node_of_the_bundled_model_needs_the_cpu_on_a_gpu(data: Path) -> None:
    """None of its nodes, added ones included, falls back to the CPU."""
    facts = inspect_model(find_bundled_model(), data).document
    assert facts["cuda"]["withoutKernel"] == []
    assert facts["macsPerPicture"] == pytest.approx(0.54e9, rel=0.05)  # 1.08 GFLOPs, as published


def test_a_node_without_a_gpu_kernel_is_named_without_a_gpu(visionedge: CommandLine, tmp_path: Path) -> None:
    """By operator, with the reason and its own name."""
    proto = TINY.proto()
    proto.graph.node.insert(0, helper.make_node("Acos", ["image"], ["aside"], name="the odd one"))
    path = tmp_path / "odd.onnx"
    path.write_bytes(proto.SerializeToString())
    facts = json.loads(visionedge("model", "inspect", path, "--json").out)
    assert facts["cuda"]["withoutKernel"] == [
        {"operator": "Acos", "why": "there is no CUDA kernel for it", "nodes": ["the odd one"]}
    ]
    spoken = visionedge("model", "inspect", path).out
    assert "nodes would run on the CPU:" in spoken
    assert "1 Acos: there is no CUDA kernel for it (the odd one)" in spoken


def test_a_refused_model_is_reported_with_the_evidence(visionedge: CommandLine, tmp_path: Path) -> None:
    """Its tensors and operators, how MODEL.yaml could help, the families there are, and exit code 2."""
    path = classifier(tmp_path / "class.onnx")
    outcome = visionedge("model", "inspect", path)
    assert outcome.code == 2
    assert "image float32[1,3,8,8]" in outcome.out
    assert "1 GlobalAveragePool" in outcome.out
    assert "class.yaml" in outcome.out
    assert "head: " in outcome.out
    assert "yolox" in outcome.out
    facts = json.loads(visionedge("model", "inspect", path, "--json").out)
    assert "is not a detector or classifier of a supported family" in facts["refused"]
    assert "head" not in facts
    assert {"yolox", "nanodet", "yolov8"} <= set(facts["heads"])


def test_the_operations_of_an_open_model_are_those_of_the_used_size(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    sized = yolos.yolov8(tmp_path / "sized.onnx")
    opened = yolos.yolov8(tmp_path / "opened.onnx", size=("height", "width"))
    state(opened, input={"width": yolos.WIDTH_PX, "height": yolos.HEIGHT_PX})
    documents = [json.loads(visionedge("model", "inspect", path, "--json").out) for path in (sized, opened)]
    assert documents[0]["macsPerPicture"] == documents[1]["macsPerPicture"] > 0


def test_a_refusal_suggests_the_missing_statements(visionedge: CommandLine, tmp_path: Path) -> None:
    """Anchors where only these are missing, a family where that is open, and nothing that cannot help."""
    maps_only = visionedge("model", "inspect", raw_map_model(tmp_path / "onnx")).out
    assert "anchors: [[10, 13]" in maps_only
    assert "head:" not in maps_only
    pose = visionedge("model", "inspect", yolos.yolov8(tmp_path / "p.onnx", metadata={"task": "pose"})).out
    assert "The model is refused" in pose
    assert ".yaml" not in pose
    none = visionedge("model", "inspect", classifier(tmp_path / "class.onnx")).out
    assert "head: FAMILY" in none
    assert "head: yolov8" not in none


def test_a_model_that_cannot_run_is_reported_with_its_head(tmp_path: Path, data: Path) -> None:
    """The interpretation is printed; the error of the trial run is the reason."""
    path = TinyDetector(poison=float("nan")).save(tmp_path / "nan.onnx")
    inspection = inspect_model(path, data)
    assert inspection.document["head"] == "nanodet"
    assert inspection.refused is not None
    assert "contains NaN or infinity" in inspection.refused
    assert "Recognised as nanodet" in format_report(inspection)


def test_the_measured_node_placement_is_reported_on_request(visionedge: CommandLine, tmp_path: Path) -> None:
    """By a session that is really opened; a lesser device than requested is reported."""
    path = TINY.save(tmp_path / "tiny.onnx")
    placed = json.loads(visionedge("model", "inspect", path, "--json", "--device", "cpu").out)["placed"]
    assert (placed["asked"], placed["device"], placed["onCpu"]) == ("cpu", "cpu", [])
    assert placed["onDevice"] > 6
    assert "requested cpu, runs on cpu" in visionedge("model", "inspect", path, "--device", "cpu").out


def test_a_missing_file_gives_a_one_line_error(visionedge: CommandLine, tmp_path: Path) -> None:
    outcome = visionedge("model", "inspect", tmp_path / "no.onnx")
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.complaints) == 1


def test_the_source_of_the_labels_is_reported(visionedge: CommandLine, tmp_path: Path) -> None:
    path = TINY.save(tmp_path / "m.onnx")
    (tmp_path / "m.labels.txt").write_text("a\nb\nc\nd\ne\n")
    facts = json.loads(visionedge("model", "inspect", path, "--json").out)
    assert (facts["labelsFrom"], facts["labels"]) == ("m.labels.txt", ["a", "b", "c", "d", "e"])
    (tmp_path / "m.yaml").write_text("labels: [v, w, x, y, z]\n")
    facts = json.loads(visionedge("model", "inspect", path, "--json").out)
    assert (facts["labelsFrom"], facts["labels"][0]) == ("m.yaml", "v")


# --- kernels ------------------------------------------------------------------------------------------------


def node(operator: str, inputs: int = 1, domain: str = "") -> onnx.NodeProto:
    return helper.make_node(operator, [f"i{k}" for k in range(inputs)], ["o"], domain=domain)


FLOAT, HALF, BYTES, WHOLE, TEXT = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.UINT8,
    TensorProto.INT64,
    TensorProto.STRING,
)


@pytest.mark.parametrize(
    ("operator", "opset", "types", "missing"),
    [
        ("Conv", 17, {"i0": FLOAT, "i1": FLOAT}, False),
        ("Conv", 11, {"i0": HALF}, False),
        ("Acos", 17, {"i0": FLOAT}, True),
        ("Pad", 17, {"i0": FLOAT, "i1": WHOLE}, False),
        ("Pad", 17, {"i0": WHOLE, "i1": WHOLE}, True),
        ("Clip", 11, {"i0": HALF}, True),
        ("Clip", 13, {"i0": HALF}, False),
        ("Add", 13, {"i0": BYTES}, True),
        ("Add", 14, {"i0": BYTES}, False),
        ("Transpose", 17, {"i0": BYTES}, False),
        ("Gather", 17, {"i0": BYTES, "i1": WHOLE}, False),
        ("TopK", 17, {"i0": FLOAT, "i1": WHOLE}, False),
        ("TopK", 17, {"i0": HALF, "i1": WHOLE}, False),
        ("TopK", 17, {"i0": BYTES, "i1": WHOLE}, True),
        ("NonMaxSuppression", 11, {"i0": FLOAT}, False),
        ("HardSwish", 14, {"i0": FLOAT}, False),
        ("Upsample", 9, {"i0": FLOAT}, False),
        ("GridSample", 16, {"i0": FLOAT}, False),
        ("Mish", 18, {"i0": FLOAT}, False),  # a function: written out in operators that have kernels
        ("Constant", 17, {}, False),
        ("Conv", 17, {}, False),  # a type that is not known is not held against it
    ],
)
def test_kernels_are_looked_up_by_operator_version_and_type(
    operator: str, opset: int, types: dict[str, int], missing: bool
) -> None:
    why = explain_missing_kernel(node(operator, 2), {"": opset}, types)
    assert (why is not None) == missing, why


def test_operators_of_onnxruntime_itself_are_listed_too() -> None:
    assert (
        explain_missing_kernel(node("FusedConv", 2, "com.microsoft"), {"": 17, "com.microsoft": 1}, {})
        is None
    )
    assert (
        explain_missing_kernel(node("QLinearAdd", 2, "com.microsoft"), {"": 17, "com.microsoft": 1}, {})
        is not None
    )


def test_the_list_of_kernels_is_read_completely() -> None:
    """Versions as ranges, types by constraint."""
    assert len(load_cuda_kernels()) > 200
    conv, gather = load_cuda_kernels()["ai.onnx", "Conv"], load_cuda_kernels()["ai.onnx", "Gather"]
    assert all(conv.supports(version) for version in (1, 11, 21, 22, 99))
    assert set(gather.types) == {"T", "Tind"}
    assert not load_cuda_kernels()["ai.onnx", "Trilu"].supports(13)


def test_every_operator_of_the_compiler_has_a_gpu_kernel() -> None:
    listed = {operator for domain, operator in load_cuda_kernels() if domain == "ai.onnx"}
    assert listed >= CUDA_OPERATORS


COMPILED = {
    "plain": TinyDetector(),
    "oldest opset": TinyDetector(opset=11),
    "new opset": TinyDetector(opset=21),
    "half floats": TinyDetector(dtype="float16"),
    "channels last": TinyDetector(layout="NHWC"),
    "without sigmoid": TinyDetector(
        sigmoid=False, metadata=TinyDetector().metadata | {"names": '["a","b","c","d","e"]'}
    ),
    "one class": TinyDetector(classes=1),
}


def fallen(model: Model) -> list[str]:
    """The nodes of a compiled graph that were added by us and have no kernel for their types."""
    graph = onnx.load_model_from_string(build_graph(model))
    types = {name: kind.tensor_type.elem_type for name, kind in infer_node_by_node(graph).items()}
    ours = [n for n in graph.graph.node if n.name.lstrip("_").startswith("visionedge.")]
    assert len(ours) > 1
    named = {name for n in ours for name in (*n.input, *n.output) if name}
    assert named <= set(types), "every type is known, so nothing is let off"
    return [
        f"{n.op_type}: {why}"
        for n in ours
        if (why := explain_missing_kernel(n, read_opsets(graph), types)) is not None
    ]


@pytest.mark.parametrize("name", COMPILED)
def test_every_added_node_has_a_gpu_kernel_for_its_types(tmp_path: Path, name: str) -> None:
    """Not the operator alone: the version of its opset, and the types of its tensors."""
    assert fallen(load_model(COMPILED[name].save(tmp_path / "m.onnx"))) == []


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [
        "yolox_nano_416_coco80",
        "picodet_s_416_coco80",
        "deimv2_hgnetv2_femto_416_coco80",
    ],
)
def test_every_node_added_to_a_real_model_has_a_gpu_kernel(shared_data: Path, name: str) -> None:
    assert fallen(load_model(shared_data / "models" / f"{name}.onnx")) == []


# --- counting -----------------------------------------------------------------------------------------------


def network(nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    values = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()]
    graph = helper.make_graph(nodes, "n", [], [], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    ("made", "shapes", "macs"),
    [
        # 8 maps of 5 x 5, each value from 3 x 3 x 3
        (helper.make_node("Conv", ["x", "w"], ["y"]), {"w": (8, 3, 3, 3), "y": (1, 8, 5, 5)}, 200 * 27),
        # depthwise: one channel each
        (
            helper.make_node("Conv", ["x", "w"], ["y"], group=8),
            {"w": (8, 1, 3, 3), "y": (1, 8, 5, 5)},
            200 * 9,
        ),
        # each of 4 x 25 values spreads over 2 maps of 2 x 2
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"]),
            {"x": (1, 4, 5, 5), "w": (4, 2, 2, 2)},
            100 * 8,
        ),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), {"x": (1, 10, 16), "w": (16, 32)}, 10 * 16 * 32),
        (
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            {"x": (2, 4, 10, 16), "w": (2, 4, 16, 10)},
            8 * 10 * 16 * 10,
        ),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), {"w": (32, 16), "y": (10, 32)}, 320 * 16),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), {"w": (16, 32), "y": (10, 32)}, 320 * 16),
        (helper.make_node("Relu", ["x"], ["y"]), {"x": (1, 8, 5, 5)}, 0),
    ],
)
def test_multiply_adds_match_the_definition(
    made: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], macs: int
) -> None:
    count = compute_cost(network([made], {}), shapes)
    assert (count.macs, count.uncounted) == (macs, 0)


def test_nodes_that_cannot_be_counted_are_reported() -> None:
    """A product of unknown shapes is no zero."""
    count = compute_cost(network([helper.make_node("MatMul", ["x", "w"], ["y"])], {}), {"w": (4, 4)})
    assert (count.macs, count.counted, count.uncounted) == (0, 0, 1)


def test_weights_are_counted_and_shapes_are_not() -> None:
    model = network([helper.make_node("Relu", ["x"], ["y"])], {"w": (3, 4)})
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, -1], np.int64), "shape"))
    model.graph.node.append(
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(5, np.float32)))
    )
    assert compute_cost(model, {}).parameters == 17
    assert count_operators(model.graph.node) == {"Relu": 1, "Constant": 1}
