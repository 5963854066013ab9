"""Models from outside that are broken or hostile: one line, exit code 2, and nothing worse."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clips import make_picture
from command_line import CommandLine
from tiny_models import TinyDetector, classifier
from visionedge.model.compiler import trial_run

DETECTOR = TinyDetector()


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path_factory.getbasetemp() / "state"))


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


# --- makers: each writes a bad model to a path --------------------------------------------------------------

Maker = Callable[[Path], None]


def content(data: bytes) -> Maker:
    return lambda path: (path.write_bytes(data), None)[1]


def changed(change: Callable[[onnx.ModelProto], None], **kind: object) -> Maker:
    """The tiny detector with something changed in it."""

    def make(path: Path) -> None:
        proto = TinyDetector(**kind).proto()  # type: ignore[arg-type]  # the fields of a tiny detector
        change(proto)
        path.write_bytes(proto.SerializeToString())

    return make


def first_node(operator: str, domain: str = "", **attributes: Any) -> Maker:
    """One more node in front of the tiny detector, whose output is unused."""

    def change(proto: onnx.ModelProto) -> None:
        node = helper.make_node(operator, ["image"], ["aside"], domain=domain, **attributes)
        proto.graph.node.insert(0, node)
        if domain:
            proto.opset_import.add(domain=domain, version=1)

    return changed(change)


def external(location: str) -> Maker:
    def change(proto: onnx.ModelProto) -> None:
        weight = proto.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)

    return changed(change)


def external_sparse(proto: onnx.ModelProto) -> None:
    """External data in a place where few look: the values of a sparse constant, in a file that is there."""
    node = helper.make_node("Constant", [], ["aside"])
    sparse = onnx.SparseTensorProto(dims=[4])
    sparse.values.CopyFrom(helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [1], [2]))
    sparse.values.ClearField("float_data")
    sparse.values.data_location = TensorProto.EXTERNAL
    sparse.values.external_data.add(key="location", value="a.png")
    node.attribute.append(helper.make_attribute("sparse_value", sparse))
    proto.graph.node.insert(0, node)


def link_out(path: Path) -> None:
    """External data that is a link to a file elsewhere."""
    (path.parent / "w.bin").symlink_to("/etc/passwd")
    external("w.bin")(path)


def huge_dimensions(proto: onnx.ModelProto) -> None:
    """Two gigabytes of weights, of which not one byte is there."""
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    del weight.dims[:]
    weight.dims.extend([1 << 15, 1 << 14])


def huge_external_data(path: Path) -> None:
    """The same, in a file beside it that is short."""

    def change(proto: onnx.ModelProto) -> None:
        weight = proto.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(1 << 31))):
            weight.external_data.add(key=key, value=value)

    (path.parent / "w.bin").write_bytes(b"short")
    changed(change)(path)


def opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = version

    return change


def future_form(proto: onnx.ModelProto) -> None:
    proto.ir_version = 99


def shaped(*dims: int) -> Callable[[onnx.ModelProto], None]:
    """The picture's input with other dimensions."""

    def change(proto: onnx.ModelProto) -> None:
        shape = proto.graph.input[0].type.tensor_type.shape
        del shape.dim[:]
        for size in dims:
            shape.dim.add(dim_value=size)

    return change


def second_picture(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, ["N", 3, 48, 64]))


def no_outputs(proto: onnx.ModelProto) -> None:
    del proto.graph.output[:]


def no_inputs(proto: onnx.ModelProto) -> None:
    del proto.graph.input[:]


def text_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


def sequence_output(proto: onnx.ModelProto) -> None:
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    proto.graph.output[0].type.CopyFrom(helper.make_sequence_type_proto(kind))


def optional_output(proto: onnx.ModelProto) -> None:
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    proto.graph.output[0].type.CopyFrom(helper.make_optional_type_proto(kind))


def circle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = proto.graph.node[0].output[0]


def long_circle(proto: onnx.ModelProto) -> None:
    """The first convolution needs its own scores as input: no order of nodes can help."""
    proto.graph.node[0].input[0] = proto.graph.node[3].output[0]


def made_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(proto.graph.node[0])


def no_arguments(proto: onnx.ModelProto) -> None:
    del proto.graph.node[0].input[:]


def wrong_size(proto: onnx.ModelProto) -> None:
    weight = proto.graph.initializer[0]
    weight.dims[0] -= 1


def long_names(proto: onnx.ModelProto) -> None:
    """Names of ten thousand letters, on a model that is no detector."""
    no_detector(proto, "x" * 10_000)


def screen_names(proto: onnx.ModelProto) -> None:
    """Names that would break the line and paint the terminal."""
    no_detector(proto, "a\nvisionedge: all is well\r\x1b[2J\x07")


def no_detector(proto: onnx.ModelProto, name: str) -> None:
    del proto.graph.output[1:]
    kept = proto.graph.output[0]
    proto.graph.node.append(helper.make_node("ReduceMean", [kept.name], [name], keepdims=1))
    kept.name = name
    del kept.type.tensor_type.shape.dim[:]


def nested(depth: int) -> Maker:
    """Branches in branches."""

    def change(proto: onnx.ModelProto) -> None:
        flat = helper.make_tensor_value_info("flat", TensorProto.FLOAT, None)
        ends = helper.make_graph([helper.make_node("Identity", ["image"], ["flat"])], "ends", [], [flat])
        inner = helper.make_node("Identity", ["image"], ["deep.0"])
        for level in range(1, depth + 1):
            out = helper.make_tensor_value_info(f"deep.{level - 1}", TensorProto.FLOAT, None)
            branch = helper.make_graph([inner], f"b{level}", [], [out])
            inner = helper.make_node("If", ["yes"], [f"deep.{level}"], then_branch=branch, else_branch=ends)
        proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        proto.graph.node.insert(0, inner)

    return changed(change)


def message_bomb(levels: int) -> bytes:
    """A model whose graph contains a node with a graph, and so on, as bytes without other content."""
    data = b""
    for _ in range(levels):
        attribute = b"\x32" + varint(len(data)) + data  # AttributeProto.g
        node = b"\x2a" + varint(len(attribute)) + attribute  # NodeProto.attribute
        data = b"\x0a" + varint(len(node)) + node  # GraphProto.node
    return b"\x08\x08\x3a" + varint(len(data)) + data + b"\x42\x04\x0a\x00\x10\x11"


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def memory_bomb(proto: onnx.ModelProto) -> None:
    """A few bytes that become terabytes, added to the picture as a mean of one."""
    graph = proto.graph
    graph.initializer.append(numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "huge"))
    graph.node.insert(0, helper.make_node("ConstantOfShape", ["huge"], ["terabytes of memory"]))
    graph.node.insert(1, helper.make_node("ReduceMean", ["terabytes of memory"], ["mean"], keepdims=0))
    graph.node.insert(2, helper.make_node("Add", ["image", "mean"], ["with mean"]))
    for node in list(graph.node)[3:]:
        for index, name in enumerate(node.input):
            if name == "image":
                node.input[index] = "with mean"


def endless(proto: onnx.ModelProto) -> None:
    """A loop that would end in some hundred thousand years."""
    graph = proto.graph
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["value"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    graph.initializer.append(numpy_helper.from_array(np.array((1 << 62) + 1, np.int64), "turns"))
    graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    graph.node.insert(0, helper.make_node("Loop", ["turns", "yes", "image"], ["turned"], body=body))
    for node in list(graph.node)[1:]:
        for index, name in enumerate(node.input):
            if name == "image":
                node.input[index] = "turned"


def nothing(_: onnx.ModelProto) -> None:
    """Unchanged."""


NOISE = random.Random(0).randbytes(5000)  # noqa: S311 - noise, not a secret
WHOLE = DETECTOR.proto().SerializeToString()

BAD: dict[str, tuple[Maker, str]] = {
    "empty": (content(b""), "is empty"),
    "random bytes": (content(NOISE), "not an ONNX file"),
    "zeros": (content(bytes(1000)), "not an ONNX file"),
    "text": (content(b"<html>404 Not Found</html>\n"), "not an ONNX file"),
    "truncated": (content(WHOLE[: len(WHOLE) // 2]), "damaged"),
    "truncated in the last byte": (content(WHOLE[:-1]), "damaged"),
    "no layer": (lambda path: (classifier(path), None)[1], "not a detector"),
    "a folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "missing external data": (external("w.bin"), "w.bin is missing"),
    "external data in the parent folder": (external("../w.bin"), "outside"),
    "external data at an absolute path": (external("/etc/passwd"), "outside"),
    "external data via a link": (link_out, "outside"),
    "external data in memory": (external("*/_ORT_MEM_ADDR_/*"), "is missing"),
    "external data of a sparse tensor": (changed(external_sparse), "external data"),
    "2 GB declared inside": (changed(huge_dimensions), "is not complete"),
    "2 GB declared as external data": (huge_external_data, "ends at 5 bytes"),
    "a future opset": (changed(opset(99)), "opset 99"),
    "an old opset": (changed(opset(5)), "opset 5 is too old"),
    "a future IR version": (changed(future_form), "IR version 99"),
    "NaN outputs": (changed(nothing, poison=float("nan")), "contains NaN or infinity"),
    "an input of three dimensions": (changed(shaped(3, 48, 64)), "Seen: "),
    "an input of five dimensions": (changed(shaped(1, 1, 3, 48, 64)), "Seen: "),
    "an input without dimensions": (changed(shaped()), "Seen: "),
    "an input of size 0": (changed(shaped(1, 3, 0, 0)), ""),
    "two pictures": (changed(second_picture), "Seen: "),
    "no output": (changed(no_outputs), ""),
    "no input": (changed(no_inputs), "which no earlier node computes"),
    "text as input": (changed(text_input), ""),
    "a sequence as output": (changed(sequence_output), ""),
    "an optional output": (changed(optional_output), ""),
    "an operator of an unknown domain": (first_node("Exec", "evil.domain"), "'Exec' of 'evil.domain'"),
    "an operator of an extension": (first_node("Inverse2", "ai.onnx.contrib"), "ai.onnx.contrib"),
    "an engine for one device": (
        first_node("EPContext", "com.microsoft", ep_cache_context="/tmp/x", embed_mode=0),  # noqa: S108 - bait
        "'EPContext'",
    ),
    "an unknown operator": (first_node("FlyToTheMoon"), "FlyToTheMoon"),
    "a node that uses itself": (changed(circle), "which no earlier node computes"),
    "nodes that use each other": (changed(long_circle), "which no earlier node computes"),
    "a tensor computed twice": (changed(made_twice), "computed twice"),
    "a node without arguments": (changed(no_arguments), ""),
    "a weight of another size": (changed(wrong_size), ""),
    "names of 10 000 letters": (changed(long_names), "Seen: "),
    "names with escape sequences": (changed(screen_names), "Seen: "),
    "branches 20 deep": (nested(20), "deeper than"),
    "messages 200 deep": (content(message_bomb(200)), "not an ONNX file"),
    "messages 10 000 deep": (content(message_bomb(10_000)), "not an ONNX file"),
    "terabytes of memory": (changed(memory_bomb), "cannot be run"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_gives_a_one_line_error_and_exit_code_2(
    visionedge: CommandLine, tmp_path: Path, name: str
) -> None:
    """Named by its path, without a traceback, a hang or the end of the process."""
    make, expected = BAD[name]
    path = tmp_path / "bad.onnx"
    make(path)
    outcome = visionedge("detect", make_picture(tmp_path / "a.png"), "--model", path)
    assert outcome.code == 2, outcome.err
    (line,) = outcome.complaints
    assert str(path) in line
    assert expected in line
    assert len(line) < 2000
    assert line.isprintable()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["no layer", "NaN outputs", "names with escape sequences"])
@pytest.mark.parametrize("command", ["inspect", "compile"])
def test_the_other_commands_refuse_a_bad_model_too(
    visionedge: CommandLine, tmp_path: Path, name: str, command: str
) -> None:
    """inspect teaches on stdout, but ends with the same line and code; compile writes nothing."""
    path = tmp_path / "bad.onnx"
    BAD[name][0](path)
    output = ("-o", tmp_path / "out.onnx") if command == "compile" else ()
    outcome = visionedge("model", command, path, *output)
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert BAD[name][1] in line
    assert not (tmp_path / "out.onnx").exists()
    assert "\x1b" not in outcome.out


@pytest.mark.timeout(60)
def test_a_model_that_never_finishes_is_reported_in_time(
    visionedge: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first run is in a process of its own, which is ended."""
    monkeypatch.setattr(trial_run, "FIRST_PICTURE_TIMEOUT_S", 2)
    path = tmp_path / "endless.onnx"
    changed(endless)(path)
    outcome = visionedge("detect", make_picture(tmp_path / "a.png"), "--model", path)
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert "does not finish a picture within 2 s" in line


def test_a_file_of_more_than_2_gb_is_not_read(visionedge: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "sparse.onnx"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    outcome = visionedge("model", "inspect", path)
    assert outcome.code == 2
    assert "larger than 2 GB" in outcome.complaints[0]


def test_an_unreadable_file_is_refused(visionedge: CommandLine, tmp_path: Path) -> None:
    """Root may read everything, so the process changes its user for the command."""
    path = DETECTOR.save(tmp_path / "secret.onnx")
    assert visionedge("model", "inspect", path).code == 0  # imports files that the other user may not read
    path.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        outcome = visionedge("model", "inspect", path)
    finally:
        os.seteuid(user)
    assert outcome.code == 2
    assert "cannot be read: Permission denied" in outcome.complaints[0]


def test_a_path_below_a_file_is_refused(visionedge: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = visionedge("model", "inspect", tmp_path / "file" / "m.onnx")
    assert outcome.code == 2
    assert "cannot be read" in outcome.complaints[0]


@pytest.mark.timeout(110)
def test_sixty_damaged_models_are_each_refused_or_run(visionedge: CommandLine, tmp_path: Path) -> None:
    """Single bytes are changed anywhere: the exit code is 0, 1 or 2, with one line if it is not 0."""
    dice = random.Random(7)  # noqa: S311 - damage, not a secret
    path = tmp_path / "damaged.onnx"
    for _ in range(60):
        damaged = bytearray(WHOLE)
        # What is not weights: there a changed byte is only another number.
        for _ in range(dice.randint(1, 3)):
            damaged[dice.choice([dice.randrange(700), -dice.randrange(1, 1500)])] = dice.randrange(256)
        path.write_bytes(damaged)
        outcome = visionedge("model", "inspect", path)
        assert outcome.code in (0, 2), damaged
        assert len(outcome.complaints) == (outcome.code != 0)
