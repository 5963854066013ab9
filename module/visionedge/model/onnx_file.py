"""An ONNX file: read, checked, parsed and normalised. Nothing in it is executed.

`read_model_file` is the entry point. The model that it returns has its nodes in order, opset 11 or newer, a
batch axis in front of its picture, and neither TensorRT's NMS plugin nor a map of labels at its end. A file
of another format is refused with a remedy.
"""

import hashlib
import json
import logging
import math
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf publishes no types
from onnx import TensorProto, external_data_helper, helper, numpy_helper, version_converter

from visionedge.errors import ModelError, UnavailableError, VisionedgeError
from visionedge.model.graph import (
    MIN_OPSET,
    PICTURE_TYPES,
    list_graph_inputs,
    list_subgraphs,
    read_attributes,
    read_opset,
    remove_unused,
    sort_nodes,
)

log = logging.getLogger(__name__)


# The domains of onnxruntime's own operators. Others need a library, and no library is loaded.
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})

# Operators of onnxruntime that run something outside the graph: a compiled engine, a path to one, Python
# code.
_FORBIDDEN_OPERATORS = frozenset({"EPContext", "PyOp", "PyCustomOp", "PythonOp", "PythonOpGrad", "Snpe"})

_OLDER_OPSET_HINT = "export it with opset 17"

MAX_ENTRIES = 100
"""Inputs, outputs or opsets that a model may have. Raw maps of several scales are some dozens of outputs."""

MAX_NESTING = 8
"""How deep loops and branches may nest; detectors have one or two levels."""


def check_model_is_safe(model: onnx.ModelProto) -> None:
    """Refuse a model that cannot be analysed or run safely.

    Raises:
        ModelError: its format is too new, it needs unknown operators, or its nodes are not a valid graph.
    """
    _check_counts(model)
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise ModelError(
                f"uses opset {entry.version}; the newest that is supported is {newest}; {_OLDER_OPSET_HINT}"
            )
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"has IR version {model.ir_version}; the newest that is supported is {int(onnx.IR_VERSION)};"
            f" {_OLDER_OPSET_HINT}"
        )
    own = {(function.domain, function.name) for function in model.functions}
    for function in model.functions:
        _check_operators(function.node, own, 0)
    _check_operators(model.graph.node, own, 0)
    _check_graph(model.graph)


def _check_counts(model: onnx.ModelProto) -> None:
    """Limit the work of the analysis, which compares each input, output and opset with all others."""
    counts = {
        "inputs": len(list_graph_inputs(model.graph)),
        "outputs": len(model.graph.output),
        "opsets": len(model.opset_import),
    }
    for what, count in counts.items():
        if count > MAX_ENTRIES:
            raise ModelError(f"has {count:,} {what}; no detector has more than {MAX_ENTRIES}", state=())


def _check_operators(nodes: Iterable[onnx.NodeProto], own: set[tuple[str, str]], depth: int) -> None:
    if depth > MAX_NESTING:
        raise ModelError(f"nests loops and branches deeper than {MAX_NESTING} levels; no detector does")
    for node in nodes:
        if node.domain == "com.microsoft.nchwc":
            raise ModelError(
                f"has the operator '{node.op_type}' of '{node.domain}': onnxruntime's own optimiser wrote it"
                " for one kind of processor; give the file that was optimised, or optimise it with"
                " ORT_ENABLE_EXTENDED at most"
            )
        known = node.domain in _KNOWN_DOMAINS or (node.domain, node.op_type) in own
        if not known or node.op_type in _FORBIDDEN_OPERATORS:
            raise ModelError(
                f"needs the operator '{node.op_type}' of '{node.domain or 'ai.onnx'}', whose code is not part"
                " of onnxruntime and is never loaded; export the model without it"
            )
        for graph in list_subgraphs(node):
            _check_operators(graph.node, own, depth + 1)


def _check_graph(graph: onnx.GraphProto) -> None:
    """Refuse a tensor that is computed twice or used before it is computed: so there is no cycle."""
    inputs = [value.name for value in graph.input]
    known = {*inputs, *(tensor.name for tensor in graph.initializer)}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    if len(set(inputs)) < len(inputs):
        raise ModelError("is damaged: two of its inputs have one name")
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise ModelError(
                    f"is damaged: its node {node.op_type} uses '{name}', which no earlier node computes"
                )
        for name in node.output:
            if name and name in known:
                raise ModelError(f"is damaged: '{name}' is computed twice")
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise ModelError(f"is damaged: no node computes its output '{value.name}'")


# Protocol buffers end at 2 GB, and the compiled graph is one.
_MAX_BYTES = (1 << 31) - (1 << 20)

# Types of less than a byte are packed in the file: at least two bits per value.
_PACKED_TYPES = ("INT2", "INT4", "FLOAT4E2M1", "FLOAT6E2M3", "FLOAT6E3M2")

# Texts of errors that mean a limit of the machine (processes, threads, memory), not a damaged model.
_RESOURCE_ERRORS = ("Resource temporarily unavailable", "can't start new thread", "Cannot allocate memory")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A parsed model and the sha256 of all its bytes, external data included."""

    proto: onnx.ModelProto
    sha256: str


def read_model_file(path: Path) -> ModelFile:
    """Read and parse an ONNX file with its external data.

    Raises:
        ModelError: the file is missing, empty, damaged, too large, or refers to files outside its folder.
        UnavailableError: this machine has too little memory.
    """
    try:
        return _read(path)
    except MemoryError:
        raise UnavailableError(f"{path}: too little memory on this machine to read this model") from None


@contextmanager
def wrap_model_errors(path: Path) -> Iterator[None]:
    """Turn errors inside the context into errors of the model file, such as a node without inputs.

    Raises:
        ModelError: with the path, in place of any error of the model.
        UnavailableError: the machine has too little memory, or too few processes or threads.
    """
    try:
        yield
    except ModelError as error:
        text = str(error)
        text = text if text.startswith(f"{path}: ") else f"{path}: {text}"
        raise ModelError(text, state=error.state) from None
    except VisionedgeError:
        raise
    except MemoryError:
        raise UnavailableError(f"{path}: too little memory on this machine to examine this model") from None
    except Exception as error:
        if isinstance(error, OSError | RuntimeError) and any(sign in str(error) for sign in _RESOURCE_ERRORS):
            raise UnavailableError(f"{path}: cannot be examined: {error}") from None
        log.debug("%s", path, exc_info=True)
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: is damaged, or no valid ONNX model: {text}") from None


def _read(path: Path) -> ModelFile:
    content = _read_content(path)
    if not content:
        raise ModelError(f"{path}: is empty; it must be an ONNX file")
    try:
        model = onnx.load_model_from_string(content)
    except (DecodeError, ValueError, RuntimeError, TypeError):
        raise _make_not_onnx_error(path, content, "copy it again") from None
    if not model.graph.node or not model.opset_import:
        raise _make_not_onnx_error(path, content, "it has no graph")
    with wrap_model_errors(path):
        model = remove_nms_plugin(model)
        sort_nodes(model.graph)
        check_model_is_safe(model)
        _check_weights(model)
        digest = hashlib.sha256(content)
        for data in _list_external_files(model, path):
            with data.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        _load_external_data(model, path)
        open_score_map(model)
        model = add_batch_axis(convert_opset(model))
    return ModelFile(model, digest.hexdigest())


def _make_not_onnx_error(path: Path, content: bytes, otherwise: str) -> ModelError:
    text = describe_foreign_format(path, content[:HEADER_BYTES])
    return ModelError(f"{path}: {text or f'is not an ONNX file, or is a damaged one; {otherwise}'}", state=())


def _read_content(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(
                f"{path}: is a folder, not a file; give the ONNX file itself, such as {path}/model.onnx"
            )
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe or a device would never end.
            raise ModelError(f"{path}: cannot be read: it is not a regular file")
        if status.st_size > _MAX_BYTES:
            raise ModelError(f"{path}: is larger than 2 GB, which no ONNX file can be")
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such model file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


# --- weights ------------------------------------------------------------------------------------------------


def iterate_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All weights and constants, those of subgraphs and functions included."""
    yield from _iterate_graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _iterate_node_tensors(node)


def _iterate_graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _iterate_sparse_tensors(graph.sparse_initializer)
    for node in graph.node:
        yield from _iterate_node_tensors(node)


def _iterate_node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from attribute.tensors
        if attribute.HasField("t"):
            yield attribute.t
        yield from _iterate_sparse_tensors(attribute.sparse_tensors)
        if attribute.HasField("sparse_tensor"):
            yield from _iterate_sparse_tensors([attribute.sparse_tensor])
    for graph in list_subgraphs(node):
        yield from _iterate_graph_tensors(graph)


def _iterate_sparse_tensors(sparse: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _check_weights(model: onnx.ModelProto) -> None:
    """Refuse a model in which a weight has fewer bytes than its shape needs."""
    for tensor in iterate_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not _is_complete(tensor):
            shape = " x ".join(str(size) for size in tensor.dims)
            raise ModelError(f"is damaged: its weight '{tensor.name}' ({shape}) is not complete")


def _is_complete(tensor: onnx.TensorProto) -> bool:
    count = math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims):
        return False
    lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    if not tensor.HasField("raw_data"):
        return count == 0 or any(lists) or bool(tensor.string_data)
    try:
        bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    except (KeyError, TypeError, ValueError):
        return True  # a type that onnxruntime may know and this onnx does not
    packed = onnx.TensorProto.DataType.Name(tensor.data_type).endswith(_PACKED_TYPES)
    return bool(len(tensor.raw_data) * 8 >= count * (2 if packed else bits))


def _list_external_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The files of external data, each once. They must be in the folder of the model, and long enough."""
    files: dict[Path, int] = {}
    for tensor in iterate_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            file, end = _read_external_range(tensor, path)
            files[file] = max(end, files.get(file, 0))
    for file, end in files.items():
        size = file.stat().st_size
        if size < end:
            raise ModelError(
                f"its external data {file.name} ends at {size} bytes, but {end} bytes are needed"
            )
    if sum(files.values()) > _MAX_BYTES:
        raise ModelError("has more than 2 GB of weights, which one graph cannot hold")
    return sorted(files)


def _read_external_range(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    file = (folder / location).resolve()
    if not location or not file.is_relative_to(folder) or file == folder:
        raise ModelError(
            f"its external data '{location}' is outside the folder of the model; move it into that folder"
        )
    if not file.is_file():
        raise ModelError(f"its external data {location} is missing; put it beside the model")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except ValueError:
        raise ModelError(f"the offset or length of its external data {location} is not a number") from None
    if offset < 0 or length < 0:
        raise ModelError(f"the offset or length of its external data {location} is negative")
    return file, offset + length


def _load_external_data(model: onnx.ModelProto, path: Path) -> None:
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent.resolve()))
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"its external data cannot be read: {reason}") from None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in iterate_tensors(model)):
        # onnxruntime would look for it in the working directory of this process.
        raise ModelError("has external data in a sparse tensor or a function, where none is read")


# --- opset --------------------------------------------------------------------------------------------------
#
# Azure Custom Vision exports opset 7 to 10 and offers no other, so its users cannot export again.

MIN_CONVERTIBLE_OPSET = 7
"""The oldest opset that onnxruntime runs and onnx can convert."""

TARGET_OPSET = 12
"""The last opset in which Squeeze, Unsqueeze and ReduceSum take their axes as attributes."""


def convert_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in opset `MIN_OPSET` or newer; the same object if it has one already.

    Raises:
        ModelError: the opset is older than `MIN_CONVERTIBLE_OPSET`, or a node cannot be converted.
    """
    opset = read_opset(model)
    if opset >= MIN_OPSET:
        return model
    hint = f"export the model with opset {MIN_OPSET} or newer"
    if opset < MIN_CONVERTIBLE_OPSET:
        raise ModelError(f"opset {opset} is too old: {hint}")
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, TARGET_OPSET)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:120]
        raise ModelError(f"opset {opset} is too old and cannot be converted ({text}): {hint}") from None
    del converted.metadata_props[:]
    converted.metadata_props.extend(model.metadata_props)
    converted.producer_name = model.producer_name
    return converted


# --- batch axis ---------------------------------------------------------------------------------------------
#
# torchvision and detectron2 export networks that take one picture without a batch axis.


def add_batch_axis(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a batch of one in front of its picture and of each output.

    The same object if the model has several inputs, or one that is not a picture [3, H, W] or [H, W, 3].
    """
    inputs = list_graph_inputs(model.graph)
    if len(inputs) != 1 or not _is_single_picture(inputs[0]):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    axes: list[str] = []
    attributes: dict[str, Any] = {"axes": [0]}
    if read_opset(model) >= 13:  # since opset 13, axes are an input
        axes, attributes = [_make_free_name("batch.axis", taken)], {}
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), axes[0]))
    (picture,) = list_graph_inputs(graph)
    inner = picture.name
    picture.name = _make_free_name(f"{inner}.batch", taken)
    _prepend_batch(picture)
    nodes = [helper.make_node("Squeeze", [picture.name, *axes], [inner], **attributes), *graph.node]
    for value in graph.output:
        outer = _make_free_name(f"{value.name}.batch", taken)
        nodes.append(helper.make_node("Unsqueeze", [value.name, *axes], [outer], **attributes))
        value.name = outer
        if value.type.tensor_type.HasField("shape"):
            _prepend_batch(value)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _is_single_picture(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    sides = [dim.dim_value for dim in kind.shape.dim]
    return kind.elem_type in PICTURE_TYPES and len(sides) == 3 and 3 in (sides[0], sides[2])


def _prepend_batch(value: onnx.ValueInfoProto) -> None:
    shape = value.type.tensor_type.shape
    dims = [onnx.TensorShapeProto.Dimension(dim_value=1), *shape.dim]
    del shape.dim[:]
    shape.dim.extend(dims)


def _make_free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


# --- NMS plugins of TensorRT --------------------------------------------------------------------------------
#
# `EfficientNMS_TRT` and `BatchedNMS_TRT` exist only in TensorRT. Their inputs are the boxes and scores of
# all anchors, and their attributes say how both are written, so our own non-maximum suppression can replace
# them.

NMS_PLUGIN_KEY = "visionedge.boxes"
"""The metadata key with the JSON of `NmsPluginInputs`."""

_EFFICIENT_NMS = ("EfficientNMS_TRT",)
_BATCHED_NMS = ("BatchedNMS_TRT", "BatchedNMSDynamic_TRT")
_EXPORT_HINT = "export the model without its suppression (such as end2end=False or nms=False)"


@dataclass(frozen=True, slots=True)
class NmsPluginInputs:
    """How the inputs of a plugin are written.

    `centers`: boxes are a centre and a size, else two corners. `relative`: boxes are 0-1 instead of pixels;
    None if the plugin does not say. `logits`: scores still need a sigmoid. `background`: the class index of
    the background; -1 for none.
    """

    plugin: str
    centers: bool = False
    relative: bool | None = None
    logits: bool = False
    background: int = -1


def remove_nms_plugin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the inputs of its NMS plugin as outputs; the same object if it has none.

    Raises:
        ModelError: the plugin has inputs or attributes that are not supported.
    """
    found = [node for node in model.graph.node if node.op_type in (*_EFFICIENT_NMS, *_BATCHED_NMS)]
    if not found:
        return model
    plugin = found[0]
    if len(found) > 1 or len(plugin.input) != 2 or not all(plugin.input):
        raise ModelError(f"uses {plugin.op_type} in a way that is not supported; {_EXPORT_HINT}")
    inputs = _read_plugin_inputs(plugin)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    computed_from_plugin = set(plugin.output)
    kept = []
    for node in graph.node:
        if node.name == plugin.name and list(node.output) == list(plugin.output):
            continue
        if computed_from_plugin & set(node.input):
            computed_from_plugin |= set(node.output)
        else:
            kept.append(node)
    del graph.node[:], graph.output[:]
    graph.node.extend(kept)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in plugin.input)
    entry = changed.metadata_props.add()
    entry.key, entry.value = NMS_PLUGIN_KEY, json.dumps(asdict(inputs))
    return changed


def _read_plugin_inputs(node: onnx.NodeProto) -> NmsPluginInputs:
    attributes = read_attributes(node)
    if node.op_type in _EFFICIENT_NMS:
        return NmsPluginInputs(
            node.op_type,
            centers=attributes.get("box_coding", 0) == 1,
            logits=attributes.get("score_activation", 0) == 1,
            background=int(attributes.get("background_class", -1)),
        )
    if attributes.get("shareLocation", 1) != 1:
        raise ModelError(
            f"uses {node.op_type} with separate boxes for each class, which is not supported; {_EXPORT_HINT}"
        )
    return NmsPluginInputs(
        node.op_type,
        relative=attributes.get("isNormalized", 1) == 1,
        background=int(attributes.get("backgroundLabelId", -1)),
    )


# --- a map of labels at the end -----------------------------------------------------------------------------

_ML_DOMAIN = "ai.onnx.ml"


def open_score_map(model: onnx.ModelProto) -> None:
    """Let a classifier output its scores instead of a map from labels to scores, and of the best label.

    Older exports of Azure Custom Vision end with such a map (`ZipMap`). Its labels become the metadata key
    `names`, unless the model has it. A model without a map is left as it is.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    maps = [n for n in graph.node if (n.op_type, n.domain) == ("ZipMap", _ML_DOMAIN) and n.input]
    if len(maps) != 1 or maps[0].output[0] not in outputs or maps[0].input[0] in outputs:
        return
    (score_map,) = maps
    scores, dropped = score_map.input[0], [score_map.output[0]]
    dropped += [
        name for name, value in outputs.items() if value.type.tensor_type.elem_type == TensorProto.STRING
    ]
    labels = [
        label.decode("utf-8", "replace")
        for label in read_attributes(score_map).get("classlabels_strings", [])
    ]
    for place in reversed(range(len(graph.output))):
        if graph.output[place].name in dropped:
            del graph.output[place]
    graph.output.append(helper.make_tensor_value_info(scores, TensorProto.FLOAT, None))
    remove_unused(graph, dropped)
    if labels and all(entry.key != "names" for entry in model.metadata_props):
        model.metadata_props.add(key="names", value=json.dumps(labels))
    if all(node.domain != _ML_DOMAIN for node in graph.node):
        kept = [entry for entry in model.opset_import if entry.domain != _ML_DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)


# --- files of other formats ---------------------------------------------------------------------------------

HEADER_BYTES = 1 << 16
"""How much of a file `describe_foreign_format` needs."""


class _FileFormat(NamedTuple):
    """`magic` is a pattern for its first bytes; `{name}` in `remedy` is replaced by the file name."""

    what: str
    remedy: str
    suffixes: tuple[str, ...] = ()
    magic: bytes = rb"(?!)"


_EXPORT_AGAIN = "export the original model to ONNX"
_ULTRALYTICS = f"{_EXPORT_AGAIN}: yolo export model=best.pt format=onnx (Ultralytics)"
_CONVERT = "convert it to ONNX: python -m tf2onnx.convert"
_PYTORCH = _FileFormat(
    "a PyTorch model",
    "export it to ONNX: yolo export model={name} format=onnx (Ultralytics), else torch.onnx.export",
    (".pt", ".pth", ".torchscript", ".ckpt"),
    rb"\x80[\x02\x04]",
)
_COMPRESSED = _FileFormat("a compressed file", "unpack it", (".gz", ".tgz", ".zip", ".tar"), rb"\x1f\x8b")
_FILE_FORMATS = (
    _FileFormat("a Git LFS pointer", "fetch the file with: git lfs pull", magic=rb"version https://git-lfs"),
    _FileFormat(
        "a web page",
        "it was downloaded instead of the model; download the model again",
        magic=rb"(?i)<!doctype html|<html",
    ),
    _PYTORCH,
    _FileFormat(
        "a TensorRT engine, which only runs on the kind of GPU that it was built on",
        "give the ONNX file that it was built from; TensorRT builds its own from that",
        (".engine", ".trt", ".plan"),
        rb"ftrt",
    ),
    _FileFormat(
        "a TensorFlow Lite model",
        f"{_ULTRALYTICS}, or python -m tf2onnx.convert --tflite {{name}} --output model.onnx",
        (".tflite",),
        rb".{4}TFL3",
    ),
    _FileFormat("an OpenVINO model", _ULTRALYTICS, (".xml", ".bin"), rb"<\?xml|<net "),
    _FileFormat(
        "a Keras model",
        f"{_CONVERT} --keras {{name}} --output model.onnx",
        (".h5", ".hdf5", ".keras"),
        rb"\x89HDF\r\n",
    ),
    _FileFormat(
        "a file of weights without the network (safetensors)",
        "load it with the program that trained it, and export ONNX there, as optimum-cli export onnx does",
        (".safetensors",),
        rb'.{8}\{"',
    ),
    _FileFormat("a TensorFlow model", f"{_CONVERT} --saved-model FOLDER --output model.onnx", (".pb",)),
    _FileFormat("a Core ML model", _ULTRALYTICS, (".mlmodel", ".mlpackage")),
    _FileFormat("an ncnn model", _EXPORT_AGAIN, (".param",), rb"7767517"),
    _FileFormat(
        "a Paddle model",
        "convert it to ONNX: paddle2onnx --model_dir FOLDER --save_file model.onnx",
        (".pdmodel", ".pdiparams", ".pdparams"),
    ),
    _FileFormat("a Darknet model", "convert it to ONNX with a port of it to PyTorch", (".weights", ".cfg")),
    _FileFormat("an RKNN model", "give the ONNX file that it was built from", (".rknn",), rb"RKNN"),
    _COMPRESSED,
)


def describe_foreign_format(path: Path, head: bytes) -> str | None:
    """What a file is instead of ONNX, by its first bytes, else by its suffix, and what to do.

    None if unknown.
    """
    is_zip, suffix = head.startswith(b"PK\x03\x04"), path.suffix.lower()
    # Ultralytics writes metadata in front of a TensorRT engine, so only its suffix is recognised.
    fitting = (
        *(kind for kind in _FILE_FORMATS if re.match(kind.magic, head, re.DOTALL)),
        *(kind for kind in _FILE_FORMATS if suffix in kind.suffixes),
        *((_COMPRESSED,) if is_zip else ()),
    )
    found = _PYTORCH if is_zip and b"data.pkl" in head else next(iter(fitting), None)
    if found is None:
        return None
    return f"is not an ONNX file but {found.what}; {found.remedy.replace('{name}', path.name)}"
