"""A model's file: read, checked for what must never be followed, and parsed. Nothing in it is run."""

import hashlib
import logging
import math
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf publishes no types
from onnx import external_data_helper

from visionedge.errors import ModelError, UnavailableError, VisionedgeError
from visionedge.model.batch_axis import with_batch_axis
from visionedge.model.foreign import HEAD_BYTES, foreign_kind
from visionedge.model.nms_plugins import without_plugin
from visionedge.model.opset import with_new_opset
from visionedge.model.order import put_in_order
from visionedge.model.safety import check_sound

log = logging.getLogger(__name__)

# Protocol buffers end at 2 GB, and the compiled graph is one.
_LARGEST_BYTES = (1 << 31) - (1 << 20)

# Types of less than a byte lie packed in the file: two bits a piece at least.
_PACKED = ("INT2", "INT4", "FLOAT4E2M1", "FLOAT6E2M3", "FLOAT6E3M2")


# No more processes or threads: the machine's limits, and no fault of a model.
_NO_MORE = ("Resource temporarily unavailable", "can't start new thread", "Cannot allocate memory")


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
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
        if isinstance(error, OSError | RuntimeError) and any(sign in str(error) for sign in _NO_MORE):
            raise UnavailableError(f"{path}: cannot be examined: {error}") from None
        log.debug("%s", path, exc_info=True)
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: is damaged, or no valid ONNX model: {words}") from None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A parsed model and the sha256 of all its bytes, external data included."""

    proto: onnx.ModelProto
    sha256: str


def read_model(path: Path) -> ModelFile:
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
    content = _content(path)
    if not content:
        raise ModelError(f"{path}: is empty; it must be an ONNX file")
    try:
        model = onnx.load_model_from_string(content)
    except (DecodeError, ValueError, RuntimeError, TypeError):
        raise _no_onnx(path, content, "copy it again") from None
    if not model.graph.node or not model.opset_import:
        raise _no_onnx(path, content, "it has no graph")
    with blamed_on(path):
        model = without_plugin(model)
        put_in_order(model.graph)
        check_sound(model)
        _check_weights(model, path)
        digest = hashlib.sha256(content)
        for data in _external_files(model, path):
            with data.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        _load_external(model, path)
        model = with_batch_axis(with_new_opset(model))
    return ModelFile(model, digest.hexdigest())


def _no_onnx(path: Path, content: bytes, otherwise: str) -> ModelError:
    words = foreign_kind(path, content[:HEAD_BYTES])
    return ModelError(f"{path}: {words or f'is no ONNX file, or a damaged one; {otherwise}'}", state=())


def _content(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(
                f"{path}: is no file but a folder; give the ONNX file itself, such as {path}/model.onnx"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: cannot be read: it is no file")  # a pipe would never end, nor a device
        if status.st_size > _LARGEST_BYTES:
            raise ModelError(f"{path}: is larger than 2 GB, which no ONNX file can be")
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such model file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
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
    for tensor in tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not _is_whole(tensor):
            shape = " x ".join(str(size) for size in tensor.dims)
            raise ModelError(f"{path}: is damaged: its weight '{tensor.name}' ({shape}) is not all there")


def _is_whole(tensor: onnx.TensorProto) -> bool:
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
    packed = onnx.TensorProto.DataType.Name(tensor.data_type).endswith(_PACKED)
    return bool(len(tensor.raw_data) * 8 >= count * (2 if packed else bits))


def _external_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The files of external data, each once, each in the model's folder and long enough."""
    files: dict[Path, int] = {}
    for tensor in tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            file, end = _external_place(tensor, path)
            files[file] = max(end, files.get(file, 0))
    for file, end in files.items():
        size = file.stat().st_size
        if size < end:
            raise ModelError(
                f"{path}: its external data {file.name} ends at {size} bytes, but {end} are needed"
            )
    if sum(files.values()) > _LARGEST_BYTES:
        raise ModelError(f"{path}: has more than 2 GB of weights, which one graph cannot hold")
    return sorted(files)


def _external_place(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int]:
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
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors(model)):
        # Left as it is, onnxruntime would look for it in the folder that this process happens to stand in.
        raise ModelError(f"{path}: has external data where none is read: in a sparse tensor or a function")
