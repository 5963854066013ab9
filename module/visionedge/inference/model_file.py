"""A model's file: read, checked for what must never be followed, and parsed. Nothing in it is run."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf publishes no types
from onnx import external_data_helper

from visionedge.errors import ModelError

# Protocol buffers end at 2 GB, and the compiled graph is one.
_LARGEST_BYTES = (1 << 31) - (1 << 20)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A parsed model and the sha256 of all its bytes, external data included."""

    proto: onnx.ModelProto
    sha256: str


def read_model(path: Path) -> ModelFile:
    """Read and parse an ONNX file, with its external data.

    Raises:
        ModelError: it is not there, empty, damaged, too large, or points out of its own folder.
    """
    content = _content(path)
    if not content:
        raise ModelError(f"{path}: is empty; it must be an ONNX file")
    try:
        model = onnx.load_model_from_string(content)
    except (DecodeError, ValueError, RuntimeError, TypeError):
        raise ModelError(f"{path}: is no ONNX file, or a damaged one; copy it again") from None
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path}: is no ONNX file, or a damaged one: it has no graph")
    digest = hashlib.sha256(content)
    for data in _external_files(model, path):
        with data.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    _load_external(model, path)
    return ModelFile(model, digest.hexdigest())


def _content(path: Path) -> bytes:
    try:
        if path.is_file() and path.stat().st_size > _LARGEST_BYTES:
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
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from attribute.tensors
        if attribute.HasField("t"):
            yield attribute.t
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from _graph_tensors(graph)


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
