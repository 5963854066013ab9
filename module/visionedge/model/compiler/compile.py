"""The compiler: for every model one graph from bytes to rows.

    uint8 [N, H, W, 3] BGR  →  float32 [N, K, 6]   left, top, right, bottom (input pixels), score, class

Nodes in front of the network compute colour order, normalisation and layout; nodes behind it decode its
outputs and choose the best rows. N is open if it is open in the model; else it is that of the model.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from visionedge.errors import ModelError
from visionedge.model.compiler.passes import fold_focus, fold_layout, fold_scale
from visionedge.model.graph import NodeBuilder, read_opset
from visionedge.model.interpretation import ModelInterpretation, NetworkInput, Preprocess
from visionedge.model.model import Model
from visionedge.model.onnx_file import read_model_file, wrap_model_errors
from visionedge.runtime.ort import is_gpu_wheel

MAX_ROWS = 500
"""The most rows per picture. With NanoDet-g on 128 COCO pictures at a score floor of 0.01, AP grows up to 300
rows (0.328 at 100, 0.344 at 300) and not beyond; 500 rows cost 1 % of its time, 1000 rows 2 %."""


def compile_model(model: Model, rows: int = MAX_ROWS) -> bytes:
    """The compiled graph of a model, serialised, without a trial run (see `build.build_graph`).

    Raises:
        ModelError: the file changed since it was loaded, or cannot be compiled.
    """
    network = read_unchanged_network(model)
    with wrap_model_errors(model.path):
        return bytes(compile_graph(network, model.interpretation, rows).SerializeToString())


def read_unchanged_network(model: Model) -> onnx.ModelProto:
    """The network in a model's file, which must not have changed since it was recognised.

    Raises:
        ModelError: it changed, or cannot be read.
    """
    file = read_model_file(model.path)
    if file.sha256 != model.sha256:
        raise ModelError(f"{model.path}: changed while it was in use; start again")
    return file.proto


def compile_graph(
    network: onnx.ModelProto,
    interpretation: ModelInterpretation,
    rows: int = MAX_ROWS,
    *,
    watched: Sequence[str] = (),
) -> onnx.ModelProto:
    """`network` with our nodes around it; it is changed in place and returned.

    The float tensors `watched` become outputs too, with the values that they have in the network itself.
    """
    graph = network.graph
    nodes = NodeBuilder(read_opset(network), _list_names(graph))
    pictures, result = nodes.name("pictures"), nodes.name("rows")
    feeds = {
        interpretation.input.name: _add_preprocessing(
            nodes, pictures, interpretation.input, interpretation.preprocess
        ),
        **interpretation.decoder.feeds(nodes, pictures),
    }
    for name, tensor in feeds.items():
        nodes.add("Identity", tensor, output=name)
    front = len(nodes.nodes)
    ours = {node.name for node in nodes.nodes}
    nodes.add("Identity", interpretation.decoder.rows(nodes, rows), output=result)
    body = list(graph.node)
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend([*nodes.nodes[:front], *body, *nodes.nodes[front:]])
    graph.initializer.extend(nodes.constants)
    _declare_inputs_outputs(graph, pictures, result, interpretation.input)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in watched)
    fold_focus(graph)
    for cast in [node for node in graph.node if node.op_type == "Cast" and node.name in ours]:
        fold_scale(graph, cast.output[0])
    if not is_gpu_wheel():
        fold_layout(graph, pictures)
    return network


def _declare_inputs_outputs(
    graph: onnx.GraphProto, pictures: str, result: str, picture: NetworkInput
) -> None:
    batch, size = picture.batch or "N", [picture.height_px, picture.width_px, 3]
    graph.input.append(helper.make_tensor_value_info(pictures, TensorProto.UINT8, [batch, *size]))
    graph.output.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, [batch, None, 6]))


def _add_preprocessing(
    nodes: NodeBuilder, pictures: str, target: NetworkInput, preprocess: Preprocess
) -> str:
    """The pictures as input of the network. They are transposed as bytes, then cast to floats."""
    tensor = pictures
    if target.layout == "NCHW":
        tensor = nodes.add("Transpose", tensor, perm=[0, 3, 1, 2])
    channels = (1, 3, 1, 1) if target.layout == "NCHW" else (1, 1, 1, 3)
    if preprocess.color == "rgb":
        tensor = nodes.add("Gather", tensor, nodes.int64s(2, 1, 0), axis=channels.index(3))
    factor, offset = _as_affine(preprocess)
    plain = bool((factor == 1).all() and (offset == 0).all())
    if target.dtype == "uint8":
        if not plain:
            raise ModelError("its input takes bytes, so no mean or scale can be applied to its pictures")
        return tensor
    tensor = nodes.cast(tensor, "float32")
    if not plain:
        tensor = nodes.add("Mul", tensor, nodes.constant(factor.reshape(channels)))
        tensor = nodes.add("Add", tensor, nodes.constant(offset.reshape(channels)))
    return tensor if target.dtype == "float32" else nodes.cast(tensor, target.dtype)


def _as_affine(preprocess: Preprocess) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(factor, offset) of pixel * factor + offset = (pixel * scale - mean) / std, per channel."""
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    return (preprocess.scale / std).astype(np.float32), (-mean / std).astype(np.float32)


def _list_names(graph: onnx.GraphProto) -> set[str]:
    """All names of tensors and nodes of the network."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        names |= {node.name, *node.input, *node.output}
    return names
