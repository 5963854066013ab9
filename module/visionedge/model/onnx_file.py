"""A model's file: read, checked for what must never be followed, and parsed. Nothing in it is run."""

import hashlib
import heapq
import json
import logging
import math
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf publishes no types
from onnx import TensorProto, external_data_helper, helper, numpy_helper, version_converter

from visionedge.errors import ModelError, UnavailableError, VisionedgeError
from visionedge.model.safety import check_model_is_safe

# Files that are given as models and are not ONNX: what they are, and how to get an ONNX file instead.


HEADER_BYTES = 1 << 16
"""How much of a file's beginning is enough."""


@dataclass(frozen=True, slots=True)
class _FileFormat:
    """`magics` are (offset, bytes) of its beginning; `{name}` in `remedy` is the file's name."""

    what: str
    remedy: str
    suffixes: tuple[str, ...] = ()
    magics: tuple[tuple[int, bytes], ...] = ()


_ULTRALYTICS = "yolo export model={name} format=onnx"
_FILE_FORMATS: Sequence[_FileFormat] = (
    _FileFormat(
        "a Git LFS pointer",
        "fetch the file with: git lfs pull",
        magics=((0, b"version https://git-lfs"),),
    ),
    _FileFormat(
        "a web page",
        "the download gave it instead of the model: download it again",
        magics=((0, b"<!DOCTYPE html"), (0, b"<!doctype html"), (0, b"<html")),
    ),
    _FileFormat(
        "a PyTorch model",
        f"export it to ONNX: {_ULTRALYTICS} (Ultralytics), else torch.onnx.export",
        (".pt", ".pth", ".torchscript", ".ckpt"),
        ((0, b"\x80\x02"), (0, b"\x80\x04")),
    ),
    _FileFormat(
        "a TensorRT engine, which only runs on the kind of GPU that it was built on",
        "give the ONNX file that it was built from; TensorRT builds its own from that",
        (".engine", ".trt", ".plan"),
        ((0, b"ftrt"),),
    ),
    _FileFormat(
        "a TensorFlow Lite model",
        "export the model it was made from to ONNX: yolo export model=best.pt format=onnx (Ultralytics), "
        "or python -m tf2onnx.convert --tflite {name} --output model.onnx",
        (".tflite",),
        ((4, b"TFL3"),),
    ),
    _FileFormat(
        "an OpenVINO model",
        "export the model it was made from to ONNX: yolo export model=best.pt format=onnx (Ultralytics)",
        (".xml", ".bin"),
        ((0, b"<?xml"), (0, b"<net ")),
    ),
    _FileFormat(
        "a Keras model",
        "convert it to ONNX: python -m tf2onnx.convert --keras {name} --output model.onnx",
        (".h5", ".hdf5", ".keras"),
        ((0, b"\x89HDF\r\n"),),
    ),
    _FileFormat(
        "a file of weights alone (safetensors), without the network",
        "load it with the program that trained it, and export ONNX there, as optimum-cli export onnx does",
        (".safetensors",),
        ((8, b'{"'),),
    ),
    _FileFormat(
        "a TensorFlow model",
        "convert it to ONNX: python -m tf2onnx.convert --saved-model FOLDER --output model.onnx",
        (".pb",),
    ),
    _FileFormat(
        "a Core ML model",
        "export the model it was made from to ONNX: yolo export model=best.pt format=onnx (Ultralytics)",
        (".mlmodel", ".mlpackage"),
    ),
    _FileFormat(
        "an ncnn model",
        "export the model it was made from to ONNX",
        (".param",),
        ((0, b"7767517"),),
    ),
    _FileFormat(
        "a Paddle model",
        "convert it to ONNX: paddle2onnx --model_dir FOLDER --save_file model.onnx",
        (".pdmodel", ".pdiparams", ".pdparams"),
    ),
    _FileFormat("a Darknet model", "convert it to ONNX with a port of it to PyTorch", (".weights", ".cfg")),
    _FileFormat("an RKNN model", "give the ONNX file that it was built from", (".rknn",), ((0, b"RKNN"),)),
    _FileFormat("a compressed file", "unpack it", (".gz", ".tgz", ".zip", ".tar"), ((0, b"\x1f\x8b"),)),
)


def describe_foreign_format(path: Path, head: bytes) -> str | None:
    """What a file is that is no ONNX, by its first bytes, else by its name; and what to do. None: unknown."""
    # What PyTorch saves is an archive, and Ultralytics writes a description in front of an engine.
    zipped = head.startswith(b"PK\x03\x04")
    if zipped and b"data.pkl" in head:
        return _describe_format(next(kind for kind in _FILE_FORMATS if ".pt" in kind.suffixes), path)
    found = next((kind for kind in _FILE_FORMATS if _has_magic(kind, head)), None)
    suffix = path.suffix.lower()
    found = found or next((kind for kind in _FILE_FORMATS if suffix in kind.suffixes), None)
    if found is None and zipped:
        found = _FILE_FORMATS[-1]
    return None if found is None else _describe_format(found, path)


def _has_magic(kind: _FileFormat, head: bytes) -> bool:
    return any(head[start : start + len(magic)] == magic for start, magic in kind.magics)


def _describe_format(kind: _FileFormat, path: Path) -> str:
    return f"is no ONNX file but {kind.what}; {kind.remedy.replace('{name}', path.name)}"


# Models of old opsets, brought to one in which our own nodes can be written.
#
# Azure Custom Vision exports opset 7 to 10 and offers no other, so its users cannot export anew.


MIN_CONVERTIBLE_OPSET = 7
"""The oldest opset that onnxruntime runs and onnx can convert."""

MIN_OPSET = 11
"""The oldest opset in which every node of ours exists."""

TARGET_OPSET = 12
"""Converted to: the last opset in which Squeeze, Unsqueeze and ReduceSum take their axes as attributes."""


def convert_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in an opset of `MIN_OPSET` or newer; the very model if it has one already.

    Raises:
        ModelError: it is older than `MIN_CONVERTIBLE_OPSET`, or holds a node that cannot be converted.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset >= MIN_OPSET:
        return model
    hint = f"export the model with opset {MIN_OPSET} or newer"
    if opset < MIN_CONVERTIBLE_OPSET:
        raise ModelError(f"opset {opset} is too old: {hint}")
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, TARGET_OPSET)
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:120]
        raise ModelError(f"opset {opset} is too old and cannot be converted ({words}): {hint}") from None
    del converted.metadata_props[:]
    converted.metadata_props.extend(model.metadata_props)
    converted.producer_name = model.producer_name
    return converted


# Networks that take one picture without a batch in front of it: torchvision and detectron2 export such.


_PICTURE_TYPES = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8})


def add_batch_axis(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a batch of one in front of its picture and of each output.

    The very model where its one input is no picture of three axes, [3, H, W] or [H, W, 3].
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or not _is_single_picture(inputs[0]):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | weights
    picture = next(value for value in graph.input if value.name not in weights)
    inner = picture.name
    picture.name = _make_free_name(f"{inner}.batch", taken)
    dims = [onnx.TensorShapeProto.Dimension(dim_value=1), *picture.type.tensor_type.shape.dim]
    del picture.type.tensor_type.shape.dim[:]
    picture.type.tensor_type.shape.dim.extend(dims)
    axis = _make_free_name("batch.axis", taken)
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    by_input = opset >= 13  # from then on axes are an input and no attribute
    given = [axis] if by_input else []
    attributes: dict[str, Any] = {} if by_input else {"axes": [0]}
    if by_input:
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), axis))
    nodes = [helper.make_node("Squeeze", [picture.name, *given], [inner], **attributes), *graph.node]
    for value in graph.output:
        outer = _make_free_name(f"{value.name}.batch", taken)
        nodes.append(helper.make_node("Unsqueeze", [value.name, *given], [outer], **attributes))
        value.name = outer
        if value.type.tensor_type.HasField("shape"):
            shape = [onnx.TensorShapeProto.Dimension(dim_value=1), *value.type.tensor_type.shape.dim]
            del value.type.tensor_type.shape.dim[:]
            value.type.tensor_type.shape.dim.extend(shape)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _is_single_picture(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    sides = [dim.dim_value for dim in kind.shape.dim]
    return kind.elem_type in _PICTURE_TYPES and len(sides) == 3 and 3 in (sides[0], sides[2])


def _make_free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


# The order of a graph's nodes: ONNX demands that each follows those that it uses; not all exporters do.
#
# Onnxruntime sorts nodes by itself and so runs such files; converters to float16 are known to write them.


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Let every node follow those whose outputs it uses, and change no more than that.

    A graph with a circle in it is left as it is.
    """
    producers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    needs = [
        {producers[name] for name in _list_inputs(node) if producers.get(name, place) != place}
        for place, node in enumerate(graph.node)
    ]
    if all(max(needed, default=-1) < place for place, needed in enumerate(needs)):
        return
    order = _sort_topologically(needs)
    if len(order) < len(needs):
        return
    nodes = [graph.node[place] for place in order]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _sort_topologically(needs: list[set[int]]) -> list[int]:
    """Places, each behind those that it needs and else as they were; those in circles are left out."""
    users: list[list[int]] = [[] for _ in needs]
    for place, needed in enumerate(needs):
        for other in needed:
            users[other].append(place)
    missing = [len(needed) for needed in needs]
    ready = [place for place, count in enumerate(missing) if not count]
    order = []
    while ready:
        place = heapq.heappop(ready)
        order.append(place)
        for user in users[place]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, user)
    return order


def _list_inputs(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node needs, those that its loops and branches take from outside included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in graph.node:
                yield from _list_inputs(inner)


# Suppression by a plugin of TensorRT at the end of a graph: it is taken out, and its inputs become outputs.
#
# `EfficientNMS_TRT` and `BatchedNMS_TRT` exist in TensorRT alone. Their inputs are boxes and scores of all
# anchors, and their attributes say how both are written, so that our own suppression can take their place.


NMS_PLUGIN_KEY = "visionedge.boxes"
"""The metadata key that says how boxes and scores are written (`NmsPluginInputs`), as JSON."""

_EFFICIENT_NMS = ("EfficientNMS_TRT",)
_BATCHED_NMS = ("BatchedNMS_TRT", "BatchedNMSDynamic_TRT")


@dataclass(frozen=True, slots=True)
class NmsPluginInputs:
    """How a plugin's inputs are written.

    `centers`: a box is a centre and a size, else two corners. `relative`: 0-1 instead of pixels; None: not
    said. `logits`: scores still need a sigmoid. `background`: the class that means nothing; -1 for none.
    """

    plugin: str
    centers: bool = False
    relative: bool | None = None
    logits: bool = False
    background: int = -1


def remove_nms_plugin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the plugin's inputs as its outputs; the very model where there is no such plugin.

    Raises:
        ModelError: the plugin has inputs or attributes that are not understood.
    """
    found = [node for node in model.graph.node if node.op_type in (*_EFFICIENT_NMS, *_BATCHED_NMS)]
    if not found:
        return model
    node = found[0]
    if len(found) > 1 or len(node.input) != 2 or not all(node.input):
        raise ModelError(f"uses {node.op_type} in a way that is not known here; {_EXPORT_HINT}")
    told = _read_plugin_inputs(node)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    behind = set(node.output)
    kept = []
    for each in graph.node:
        if each.name == node.name and list(each.output) == list(node.output):
            continue
        if behind & set(each.input):
            behind |= set(each.output)  # what only passes the plugin's outputs on
        else:
            kept.append(each)
    del graph.node[:], graph.output[:]
    graph.node.extend(kept)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.input)
    entry = changed.metadata_props.add()
    entry.key, entry.value = NMS_PLUGIN_KEY, json.dumps(asdict(told))
    return changed


_EXPORT_HINT = "export the model without its suppression (such as end2end=False or nms=False)"


def _read_plugin_inputs(node: onnx.NodeProto) -> NmsPluginInputs:
    values: Mapping[str, Any] = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if node.op_type in _EFFICIENT_NMS:
        return NmsPluginInputs(
            node.op_type,
            centers=values.get("box_coding", 0) == 1,
            logits=values.get("score_activation", 0) == 1,
            background=int(values.get("background_class", -1)),
        )
    if values.get("shareLocation", 1) != 1:
        raise ModelError(
            f"uses {node.op_type} with other boxes for each class: not known here; {_EXPORT_HINT}"
        )
    return NmsPluginInputs(
        node.op_type,
        relative=values.get("isNormalized", 1) == 1,
        background=int(values.get("backgroundLabelId", -1)),
    )


log = logging.getLogger(__name__)

# Protocol buffers end at 2 GB, and the compiled graph is one.
_MAX_BYTES = (1 << 31) - (1 << 20)

# Types of less than a byte lie packed in the file: two bits a piece at least.
_PACKED_TYPES = ("INT2", "INT4", "FLOAT4E2M1", "FLOAT6E2M3", "FLOAT6E3M2")


# No more processes or threads: the machine's limits, and no fault of a model.
_RESOURCE_ERRORS = ("Resource temporarily unavailable", "can't start new thread", "Cannot allocate memory")


@contextmanager
def wrap_model_errors(path: Path) -> Iterator[None]:
    """What goes wrong in here is the model's fault: a node without its inputs, a weight of another size.

    Raises:
        ModelError: naming the file, in place of any error but that the machine is not up to it.
    """
    try:
        yield
    except ModelError as error:
        words = str(error)
        words = words if words.startswith(f"{path}: ") else f"{path}: {words}"
        raise ModelError(words, state=error.state) from None
    except VisionedgeError:
        raise
    except MemoryError:
        raise UnavailableError(f"{path}: too little memory on this machine to examine this model") from None
    except Exception as error:
        if isinstance(error, OSError | RuntimeError) and any(sign in str(error) for sign in _RESOURCE_ERRORS):
            raise UnavailableError(f"{path}: cannot be examined: {error}") from None
        log.debug("%s", path, exc_info=True)
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: is damaged, or no valid ONNX model: {words}") from None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A parsed model and the sha256 of all its bytes, external data included."""

    proto: onnx.ModelProto
    sha256: str


def read_model_file(path: Path) -> ModelFile:
    """Read and parse an ONNX file, with its external data.

    Raises:
        ModelError: it is not there, empty, damaged, too large, or points out of its own folder.
        UnavailableError: there is too little memory here.
    """
    try:
        return _read(path)
    except MemoryError:
        raise UnavailableError(f"{path}: too little memory on this machine to read this model") from None


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
        _check_weights(model, path)
        digest = hashlib.sha256(content)
        for data in _external_files(model, path):
            with data.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        _load_external(model, path)
        model = add_batch_axis(convert_opset(model))
    return ModelFile(model, digest.hexdigest())


def _make_not_onnx_error(path: Path, content: bytes, otherwise: str) -> ModelError:
    words = describe_foreign_format(path, content[:HEADER_BYTES])
    return ModelError(f"{path}: {words or f'is no ONNX file, or a damaged one; {otherwise}'}", state=())


def _read_content(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(
                f"{path}: is no file but a folder; give the ONNX file itself, such as {path}/model.onnx"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: cannot be read: it is no file")  # a pipe would never end, nor a device
        if status.st_size > _MAX_BYTES:
            raise ModelError(f"{path}: is larger than 2 GB, which no ONNX file can be")
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such model file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def iterate_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All weights and constants, those of subgraphs and functions included."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _sparse_tensors(graph.sparse_initializer)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from attribute.tensors
        if attribute.HasField("t"):
            yield attribute.t
        yield from _sparse_tensors(attribute.sparse_tensors)
        if attribute.HasField("sparse_tensor"):
            yield from _sparse_tensors([attribute.sparse_tensor])
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from _graph_tensors(graph)


def _sparse_tensors(sparse: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for each in sparse:
        yield from (each.values, each.indices)


def _check_weights(model: onnx.ModelProto, path: Path) -> None:
    """Every weight in the file has all the bytes that its shape promises."""
    for tensor in iterate_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not _is_complete(tensor):
            shape = " x ".join(str(size) for size in tensor.dims)
            raise ModelError(f"{path}: is damaged: its weight '{tensor.name}' ({shape}) is not all there")


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


def _external_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The files of external data, each once, each in the model's folder and long enough."""
    files: dict[Path, int] = {}
    for tensor in iterate_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            file, end = _read_external_range(tensor, path)
            files[file] = max(end, files.get(file, 0))
    for file, end in files.items():
        size = file.stat().st_size
        if size < end:
            raise ModelError(
                f"{path}: its external data {file.name} ends at {size} bytes, but {end} are needed"
            )
    if sum(files.values()) > _MAX_BYTES:
        raise ModelError(f"{path}: has more than 2 GB of weights, which one graph cannot hold")
    return sorted(files)


def _read_external_range(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    file = (folder / location).resolve()
    if not location or not file.is_relative_to(folder) or file == folder:
        raise ModelError(
            f"{path}: its external data '{location}' lies outside the model's own folder; refused"
        )
    if not file.is_file():
        raise ModelError(f"{path}: its external data {location} is missing; put it beside the model")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except ValueError:
        raise ModelError(f"{path}: the place of its external data {location} is no number") from None
    if offset < 0 or length < 0:
        raise ModelError(f"{path}: the place of its external data {location} is negative")
    return file, offset + length


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent.resolve()))
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: its external data cannot be read: {reason}") from None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in iterate_tensors(model)):
        # Left as it is, onnxruntime would look for it in the folder that this process happens to stand in.
        raise ModelError(f"{path}: has external data where none is read: in a sparse tensor or a function")
