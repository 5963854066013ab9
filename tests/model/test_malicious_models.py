"""Models made to harm whoever reads them: crashes, work beyond measure, words for a terminal."""

import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny_yolos as yolos
from clips import make_picture
from detr_models import raw_detr_model
from tiny_graphs import Graph, state
from visionedge.errors import ModelError, UnavailableError
from visionedge.model.analysis import shape_inference
from visionedge.model.compiler.compile import compile_model
from visionedge.model.compiler.passes import make_batch_dynamic
from visionedge.model.labels import choose_labels
from visionedge.model.model import load_model
from visionedge.model.onnx_file import wrap_model_errors
from visionedge.runtime.child_process import explain_machine_limit

PROGRAM = (sys.executable, "-P", "-m", "visionedge")

# --- crashes ------------------------------------------------------------------------------------------------


def _aborting(path: Path, *, convolution: bool = False) -> Path:
    """A pooling larger than its picture gives a negative side, and a Slice of that makes onnx assert."""
    graph = Graph()
    picture = graph.input("images", "float32", 1, 3, 64, 96)
    if convolution:
        beyond = graph.add("Conv", picture, graph.constant(np.ones((4, 3, 99, 99))))
    else:
        beyond = graph.add("MaxPool", picture, kernel_shape=[200, 200])
    part = graph.add("Slice", beyond, graph.whole(0), graph.whole(5), graph.whole(2))
    node = helper.make_node("Identity", [part], ["output0"])
    value = helper.make_tensor_value_info("output0", TensorProto.FLOAT, None)
    made = helper.make_graph([*graph.nodes, node], "tiny", graph.inputs, [value], graph.weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("convolution", [False, True], ids=["pooling", "convolution"])
@pytest.mark.parametrize("verb", ["inspect", "compile", "detect"])
def test_a_graph_that_aborts_shape_inference_gives_a_one_line_error(
    tmp_path: Path, verb: str, convolution: bool
) -> None:
    """The process that asks for its shapes is lost, and not the one that a person started."""
    path = _aborting(tmp_path / "m.onnx", convolution=convolution)
    words = {
        "inspect": ["model", "inspect", str(path)],
        "compile": ["model", "compile", str(path), "-o", str(tmp_path / "out.onnx")],
        "detect": ["detect", str(make_picture(tmp_path / "yard.jpg")), "--model", str(path)],
    }
    environ = os.environ | {"VISIONEDGE_DATA": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*PROGRAM, *words[verb]], capture_output=True, text=True, env=environ, timeout=120, check=False
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "shape inference crash (SIGABRT)" in line


# --- work ---------------------------------------------------------------------------------------------------


def _steps(work: Callable[[], object]) -> int:
    """How many instructions of Python some work takes; the same for the same work."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def _chained(path: Path, count: int, link: str, *, front: bool) -> Path:
    """A model with a chain of nodes without weights before its first layer, or behind its last."""
    model = onnx.load(path)
    graph = model.graph
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(1, np.float32), "chain.one"),
            numpy_helper.from_array(np.array([0, 0, -1], np.int64), "chain.shape"),
        ]
    )
    inputs = {"Mul": ["chain.one"], "Add": ["chain.one"], "Reshape": ["chain.shape"]}
    extra: dict[str, dict[str, Any]] = {"Concat": {"axis": 1}, "Cast": {"to": TensorProto.FLOAT}}
    names = [f"chain.{i}" for i in range(count + 1)]
    nodes = []
    for source, target in itertools.pairwise(names):
        many = [source] * (2 if link == "Max" else 1)
        nodes.append(helper.make_node(link, [*many, *inputs.get(link, [])], [target], **extra.get(link, {})))
    body = list(graph.node)
    if front:
        given = graph.input[0].name
        body = [_renamed(node, given, names[-1]) for node in body]
        nodes[0].input[0] = given
    else:
        given = graph.output[0].name
        body = [_renamed(node, given, names[0]) for node in body]
        nodes[-1].output[0] = given
    del graph.node[:]
    graph.node.extend([*nodes, *body] if front else [*body, *nodes])
    onnx.save(model, path)
    return path


def _renamed(node: onnx.NodeProto, old: str, new: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for names in (copy.input, copy.output):
        for place, name in enumerate(names):
            names[place] = new if name == old else name
    return copy


def _all_of_it(path: Path) -> None:
    try:
        model = load_model(path)
    except ModelError:
        return
    compile_model(model)
    make_batch_dynamic(onnx.load(path))


@pytest.mark.parametrize("front", [True, False], ids=["in front", "behind"])
@pytest.mark.parametrize("link", ["Identity", "Mul", "Add", "Concat", "Max"])
@pytest.mark.parametrize("build", [yolos.yolov8, raw_detr_model], ids=["table", "queries"])
def test_work_on_a_model_grows_linearly_with_its_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[Path], Path], link: str, front: bool
) -> None:
    """Twice the nodes of a chain take about twice the steps, whichever walk goes over it."""
    monkeypatch.setattr(shape_inference, "_infer_in_child", lambda _: shape_inference.InferredTypes({}, {}))
    steps = []
    _all_of_it(build(tmp_path / "first.onnx"))  # what is imported or kept once does not count
    for count in (60, 120, 240):
        path = build(tmp_path / f"{count}.onnx")
        _chained(path, count, link, front=front)
        steps.append(_steps(lambda path=path: _all_of_it(path)))  # type: ignore[misc]
    first, second = steps[1] - steps[0], steps[2] - steps[1]
    assert second <= 2.3 * first, steps


def test_thousands_of_outputs_or_opsets_are_refused(tmp_path: Path) -> None:
    """Each output is gone through by itself."""
    path = yolos.yolov8(tmp_path / "m.onnx")
    model = onnx.load(path)
    for _ in range(200):
        model.graph.output.append(model.graph.output[0])
    onnx.save(model, path)
    with pytest.raises(ModelError, match="has 201 outputs; no detector"):
        load_model(path)
    model = onnx.load(yolos.yolov8(path))
    model.opset_import.extend([helper.make_opsetid(f"domain.{i}", 1) for i in range(200)])
    onnx.save(model, path)
    with pytest.raises(ModelError, match="has 201 opsets"):
        load_model(path)


@pytest.mark.parametrize(
    ("batch", "size", "words"),
    [
        (2**31 - 1, (64, 96), "takes 2,147,483,647 pictures at once"),
        (1, (64, 2**20), "takes pictures of 1048576 x 64"),
    ],
)
def test_input_sizes_that_exceed_the_memory_are_refused(
    tmp_path: Path, batch: int, size: tuple[int, int], words: str
) -> None:
    model = onnx.load(yolos.yolov8(tmp_path / "m.onnx"))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = batch
    dims[2].dim_value, dims[3].dim_value = size
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "m.onnx")


# --- what lies beside a model -------------------------------------------------------------------------------


def _exploding(depth: int) -> str:
    """YAML of a few hundred bytes whose aliases stand for 9 to the power of `depth` numbers."""
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join([*lines, f"anchors: *a{depth - 1}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_exploding(9), "more than 100000 values"),
        ("anchors: " + "[" * 60 + "1" + "]" * 60, "nested deeper than 50 levels"),
        ("anchors: " + "[" * 5000 + "]" * 5000, "nested deeper than 50 levels"),
        ("# " + "x" * (2 << 20), "larger than 1 MiB"),
    ],
    ids=["aliases", "deep", "very deep", "large"],
)
def test_an_exploding_model_yaml_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = yolos.yolov8(tmp_path / "m.onnx")
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ModelError, match=words) as refused:
        load_model(path)
    assert len(str(refused.value)) < 500


def test_invalid_labels_are_refused_without_reading_them_all(tmp_path: Path) -> None:
    path = yolos.yolov8(tmp_path / "m.onnx")
    with (tmp_path / "m.labels.txt").open("wb") as file:
        file.truncate(3 << 30)  # takes no room on the disk
    with pytest.raises(ModelError, match=r"m\.labels\.txt: is larger than 1 MiB"):
        load_model(path)


@pytest.mark.parametrize("by", ["metadata", "labels.txt"])
def test_control_characters_in_labels_never_reach_a_terminal(tmp_path: Path, by: str) -> None:
    """Escape sequences, and marks that turn the direction of a line, are shown as question marks."""
    wild = ["\x1b[2Jgone", "\x9b31mred", "\u202eevil", "caf\u00e9 au\u00a0lait"]
    metadata = {"names": json.dumps(wild)} if by == "metadata" else {}
    path = tmp_path / "m.onnx"
    if by == "labels.txt":
        (tmp_path / "labels.txt").write_text("\n".join(wild))
    labels, _ = choose_labels(path, metadata, 4)
    assert labels == ("?[2Jgone", "?31mred", "?evil", "caf\u00e9 au lait")


# --- the machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [
        b"OpenBLAS blas_thread_init: pthread_create failed: Resource temporarily unavailable",
        b"ImportError: libonnxruntime.so: failed to map segment from shared object",
        b"RuntimeError: can't start new thread",
        b"OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_reaching_a_resource_limit_is_not_blamed_on_the_model(told: bytes) -> None:
    assert explain_machine_limit(told)
    assert explain_machine_limit(b"Traceback: IndexError: list index out of range") is None


def test_a_lack_of_memory_is_blamed_on_the_machine_only_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    free = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: (free, free))
    assert explain_machine_limit(b"std::bad_alloc") is None
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, free))
    assert "limited to 1024 MiB" in str(explain_machine_limit(b"std::bad_alloc"))


def test_a_failed_start_of_a_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container may have no more of them."""
    path = _aborting(tmp_path / "m.onnx")

    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(shape_inference, "run_child", refused)
    with pytest.raises(UnavailableError, match="no process can be started"):
        load_model(path)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't start new thread"), OSError(12, "Cannot allocate memory")]
)
def test_a_lack_of_resources_is_not_reported_as_a_damaged_model(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UnavailableError), wrap_model_errors(tmp_path / "m.onnx"):
        raise error
    with pytest.raises(ModelError, match="is damaged"), wrap_model_errors(tmp_path / "m.onnx"):
        raise IndexError("list index out of range")


def test_a_stated_head_and_a_wrong_key_are_reported_together(tmp_path: Path) -> None:
    path = yolos.yolov8(tmp_path / "m.onnx")
    state(path, head="yolov9000", lables=["a"])
    with pytest.raises(ModelError, match=r"head: must be the name of a known head.*lables: unknown key"):
        load_model(path)


# --- files that are something else --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "best.pt",
            b"PK\x03\x04" + b"\0" * 26 + b"best/data.pkl",
            r"PyTorch.*yolo export model=best\.pt format=onnx",
        ),
        ("model.onnx", b"PK\x03\x04" + b"\0" * 26 + b"best/data.pkl", "PyTorch"),
        ("old.pth", b"\x80\x02}q\x00.", r"PyTorch.*yolo export model=old\.pth"),
        ("best.engine", b'\x80\x00\x00\x00{"description": "Ultralytics"}', "TensorRT engine"),
        ("model.bin", b"ftrt\0\0", "TensorRT engine"),
        ("best.tflite", b"\x1c\0\0\0TFL3\0\0", "TensorFlow Lite.*onnx"),
        ("best.xml", b"<?xml version='1.0'?><net name='m'>", "OpenVINO.*format=onnx"),
        ("best.bin", b"\xff" * 64, "OpenVINO"),
        ("frozen.pb", b"\n\x0c\n\x05input\x12\x03abc", "TensorFlow model.*tf2onnx"),
        ("w.safetensors", b'\x40\0\0\0\0\0\0\0{"w": 1}', "safetensors"),
        ("m.h5", b"\x89HDF\r\n\x1a\n", "Keras"),
        ("m.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        ("m.onnx", b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    ],
)
def test_files_of_other_frameworks_are_refused_with_the_export_command(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"is no ONNX file but .*{words}"):
        load_model(tmp_path / name)


def test_a_file_written_by_onnxruntimes_optimiser_is_recognised(tmp_path: Path) -> None:
    model = onnx.load(yolos.yolov8(tmp_path / "m.onnx"))
    next(node for node in model.graph.node if node.op_type == "Conv").domain = "com.microsoft.nchwc"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="onnxruntime's own optimiser wrote it"):
        load_model(tmp_path / "m.onnx")
