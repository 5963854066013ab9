"""From a model to the graph that runs: compiled, tried where that harms nobody, its batch open if proven."""

import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge import __version__
from visionedge.errors import ModelError
from visionedge.model.analysis.shape_inference import infer_types
from visionedge.model.compiled_metadata import (
    _OUTDATED_KEYS,
    _RESIZE_KEYS,
    COMPILED_HEAD,
    COMPILED_KEY,
    COMPILED_SIGNATURE,
    CompiledMetadata,
    read_compiled_metadata,
)
from visionedge.model.compiler.compile import MAX_ROWS, compile_graph, compile_model, read_unchanged_network
from visionedge.model.compiler.trial_run import run_trial
from visionedge.model.model import Model
from visionedge.model.onnx_file import wrap_model_errors
from visionedge.runtime.files import is_special_file, set_aside_damaged, write_atomically
from visionedge.runtime.ort import installed_wheel


def write_compiled_metadata(
    graph: onnx.ModelProto, model: Model, *, rows: int, batch: int | None, batch_reason: str
) -> None:
    """Write into a compiled graph what it is, over what the network said of itself."""
    interpretation, preprocess = model.interpretation, model.interpretation.preprocess
    compiled_metadata = CompiledMetadata(
        *(__version__, model.name, model.sha256, model.head, interpretation.class_count, model.evidence),
        *(rows, batch, batch_reason),
    )
    metadata = {entry.key: entry.value for entry in graph.metadata_props if entry.key not in _OUTDATED_KEYS}
    metadata |= {
        COMPILED_KEY: json.dumps(asdict(compiled_metadata)),
        "visionedge.head": COMPILED_HEAD,
        "visionedge.input": json.dumps({key: getattr(preprocess, key) for key in _RESIZE_KEYS}),
        "visionedge.nms": json.dumps(interpretation.needs_nms),
    }
    if model.labels:
        metadata["names"] = json.dumps(model.labels)
    del graph.metadata_props[:]
    helper.set_model_props(graph, metadata)
    graph.producer_name, graph.producer_version = "visionedge", __version__
    graph.doc_string = f"{model.name}, compiled by visionedge: {COMPILED_SIGNATURE}"


def require_compiled_metadata(graph: onnx.ModelProto) -> CompiledMetadata:
    """What a graph says of itself that was built here.

    Raises:
        ModelError: it was not.
    """
    compiled_metadata = read_compiled_metadata({entry.key: entry.value for entry in graph.metadata_props})
    if compiled_metadata is None:
        raise ModelError("was not compiled here")
    return compiled_metadata


# A network whose batch was fixed at one, opened to any number of pictures.
#
# Exporters write the one into shapes all over a graph. Here it is taken out again where it can stand for the
# batch; that this is right is never assumed: `run_trial` computes several pictures at once and one by one.


# How many values these give depends on the pictures, so several of them do not stack.
UNBATCHABLE_OPERATORS = frozenset(
    {"NonMaxSuppression", "NonZero", "Unique", "Compress", "If", "Loop", "Scan", "SequenceConstruct"}
    | {"SplitToSequence", "ConcatFromSequence", "SequenceInsert", "SequenceEmpty"}
)

DYNAMIC_BATCH = "N"


def make_batch_dynamic(network: onnx.ModelProto) -> onnx.ModelProto | str:
    """A copy that may take any number of pictures, or why there can be none, in words."""
    operators = sorted({node.op_type for node in network.graph.node} & UNBATCHABLE_OPERATORS)
    if operators:
        return f"its {operators[0]} gives another number of values for each picture"
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    graph = copy.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].dim_value != 1:
            return f"its input '{value.name}' has no batch of one in front"
        dims[0].dim_param = DYNAMIC_BATCH
    shapes = _infer_shapes(network)
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    _make_nodes_dynamic(graph, {value.name for value in inputs}, shapes)
    return copy


def _make_nodes_dynamic(graph: onnx.GraphProto, moving: set[str], shapes: dict[str, list[int]]) -> None:
    """Take the one out of the nodes that see pictures; `moving` are the tensors that do."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        if moving.isdisjoint(node.input):
            continue
        moving.update(node.output)
        change = _HANDLERS.get(node.op_type)
        if change is not None and node.input[0] in moving:
            change(node, constants, shapes, graph)


def _reshape(
    node: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    _: dict[str, list[int]],
    graph: onnx.GraphProto,
) -> None:
    """A shape that is written out in full gets its first size from the data instead."""
    if len(node.input) < 2 or node.input[1] not in constants:
        return
    shape = numpy_helper.to_array(constants[node.input[1]]).astype(np.int64).ravel()
    keeps_zero = any(a.name == "allowzero" and a.i for a in node.attribute)
    if not shape.size or shape[0] in (0, -1):
        return
    if -1 not in shape:
        shape = np.concatenate([[-1], shape[1:]])
    elif shape[0] == 1 and not keeps_zero:
        shape = np.concatenate([[0], shape[1:]])
    node.input[1] = _add_constant(graph, shape.astype(np.int64))


def _resize(
    node: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    shapes: dict[str, list[int]],
    graph: onnx.GraphProto,
) -> None:
    """Sizes of all dimensions, the batch among them, become factors."""
    before = shapes.get(node.input[0])
    if len(node.input) < 4 or node.input[3] not in constants or before is None:
        return
    sizes = numpy_helper.to_array(constants[node.input[3]]).ravel()
    if len(sizes) != len(before) or 0 in before:
        return
    # A hair more than the quotient: what is cut off below is then the very size, never one less.
    factors = np.nextafter((sizes / np.array(before)).astype(np.float32), np.float32(np.inf))
    factors[sizes == before] = 1
    del node.input[3]
    node.input[2] = _add_constant(graph, factors)


_HANDLERS = {"Reshape": _reshape, "Resize": _resize}


def _add_constant(graph: onnx.GraphProto, values: NDArray[np.generic]) -> str:
    """A new constant: the old one may serve other nodes too."""
    taken = {tensor.name for tensor in graph.initializer} | {name for n in graph.node for name in n.output}
    name = next(name for i in itertools.count() if (name := f"open.batch.{i}") not in taken)
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _infer_shapes(network: onnx.ModelProto) -> dict[str, list[int]]:
    """The whole shapes that are known of tensors, with the batch of one; none where inference fails."""
    try:
        types = infer_types(network).onnx
    except ModelError:
        return {}  # what runs it will tell whether that matters
    sides = {name: [d.dim_value for d in kind.tensor_type.shape.dim] for name, kind in types.items()}
    return {name: dims for name, dims in sides.items() if all(side > 0 for side in dims)}


def build_graph(model: Model, rows: int = MAX_ROWS) -> bytes:
    """The graph that runs, serialised, with its imprint. Takes seconds: other processes are started.

    Its batch is open wherever several pictures at once were found to give what each alone gives.

    Raises:
        ModelError: the model changed, cannot be compiled, or its first run does not end well.
        UnavailableError: onnxruntime cannot be used.
    """
    network = read_unchanged_network(model)
    with wrap_model_errors(model.path):
        if model.interpretation.input.batch is None and _declared_batch(model, network) == 1:
            model = with_batch(model, 1)  # opened before, but the file is as it was
        return _build(model, network, rows)


def with_batch(model: Model, batch: int | None) -> Model:
    """The model for so many pictures at a time; None: any number."""
    picture = replace(model.interpretation.input, batch=batch)
    return replace(model, interpretation=replace(model.interpretation, input=picture))


def _build(model: Model, network: onnx.ModelProto, rows: int) -> bytes:
    batch = model.interpretation.input.batch
    wide = _dynamic_network(model, network)
    fixed_graph = _compile_copy(network, model, batch or 1, rows)
    many = None if isinstance(wide, str) else _compile_copy(wide, model, None, rows)
    found = run_trial(
        _with_outputs(fixed_graph, network.graph.output),
        batch or 1,
        None if many is None else _with_outputs(many, network.graph.output),
        [value.name for value in network.graph.output],
        declared=batch is None,
    )
    if isinstance(wide, str):
        found = replace(found, batchable=False, reason=wide)
    chosen = many if many is not None and found.batchable else fixed_graph
    after = "open" if found.batchable else "one by one" if batch in (None, 1) else "left as it is"
    reason = f"{_describe_declared_batch(model, network)}; {after}: {found.reason}"
    write_compiled_metadata(
        chosen, model, rows=found.rows, batch=None if found.batchable else batch or 1, batch_reason=reason
    )
    return bytes(chosen.SerializeToString())


def _dynamic_network(model: Model, network: onnx.ModelProto) -> onnx.ModelProto | str:
    """The network for any number of pictures, or why there is none."""
    batch = model.interpretation.input.batch
    if batch is None:
        return network
    if batch != 1:
        return "only a batch of one is opened"
    if _declared_batch(model, network) != 1:
        return f"what {model.head} gives for several pictures is one list"
    return make_batch_dynamic(network)


def _declared_batch(model: Model, network: onnx.ModelProto) -> int:
    """The batch of the picture's input in the file; 0 where it is open."""
    inputs = {value.name: value.type.tensor_type.shape.dim for value in network.graph.input}
    return int(inputs[model.interpretation.input.name][0].dim_value)


def _describe_declared_batch(model: Model, network: onnx.ModelProto) -> str:
    declared = _declared_batch(model, network)
    return f"fixed at {declared} in the file" if declared > 0 else "open in the file"


def _compile_copy(network: onnx.ModelProto, model: Model, batch: int | None, rows: int) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    return compile_graph(copy, with_batch(model, batch).interpretation, rows)


def _with_outputs(graph: onnx.ModelProto, outputs: Iterable[onnx.ValueInfoProto]) -> bytes:
    """The graph with the network's own outputs beside the rows: what is compared lies before any choice."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for value in outputs:
        added = copy.graph.output.add(name=value.name)
        added.type.tensor_type.elem_type = value.type.tensor_type.elem_type
    return bytes(copy.SerializeToString())


# Compiled graphs on disk, so that a model is compiled once: found again by all that went into them.
#
# An entry is a file ``KEY.graph``: 32 bytes of check, then the graph. A damaged entry, or one that belongs
# elsewhere, is made again. The folder keeps to a size; what was used longest ago goes first.


log = logging.getLogger(__name__)

CACHE_FOLDER = "compiled"
CACHE_SUFFIX = ".graph"

MAX_CACHE_BYTES = 2 << 30
MAX_CACHE_ENTRIES = 32
_CHECKSUM_BYTES = 32


def load_or_compile(model: Model, folder: Path | None, *, rows: int = MAX_ROWS) -> bytes:
    """The compiled graph of a model: from the data folder `folder` if it is there, else built and kept.

    A folder that cannot be written costs a warning and the time to build it again. None keeps nothing and
    tries nothing: the model is compiled as it is, as suits tests and models that are known.

    Raises:
        ModelError: the model cannot be compiled, or its first run does not end well.
        UnavailableError: onnxruntime cannot be used.
    """
    if folder is None:
        return compile_model(model, rows)
    entry = folder / CACHE_FOLDER / f"{compute_cache_key(model, rows)}{CACHE_SUFFIX}"
    graph = _read_entry(entry)
    if graph is None:
        log.info("compiling %s and trying it in a process of its own: some seconds, once", model.name)
        graph = build_graph(model, rows)
        if _write_entry(entry, graph):
            _evict(entry)
    return graph


def load_or_compile_with_batch(
    model: Model, folder: Path | None, *, rows: int = MAX_ROWS
) -> tuple[Model, bytes]:
    """The model with the batch that its compiled graph has, and that graph (see `compiled`)."""
    graph = load_or_compile(model, folder, rows=rows)
    if folder is None:
        return model, graph
    dims = onnx.load_model_from_string(graph).graph.input[0].type.tensor_type.shape.dim
    return with_batch(model, dims[0].dim_value or None), graph


def compute_cache_key(model: Model, rows: int) -> str:
    """What tells one entry from another: the model and how it is understood, and all that compiles it."""
    interpretation = (model.sha256, model.name, model.labels, model.interpretation, rows)
    versions = (__version__, onnx.__version__, installed_wheel(), _compiler_version())
    parts = (*(repr(part) for part in interpretation), *versions)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


@functools.cache
def _compiler_version() -> str:
    """The version of this very compiler: its source, which changes more often than the release does."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _checksum(entry: Path, graph: bytes) -> bytes:
    """Bound to the name too, so that an entry that was moved is not taken for another."""
    return hashlib.sha256(entry.name.encode() + graph).digest()


def _read_entry(entry: Path) -> bytes | None:
    if is_special_file(entry):  # a pipe would be waited for
        log.warning("%s: is no regular file and set aside", entry)
        set_aside_damaged(entry)
        return None
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    check, graph = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if check != _checksum(entry, graph):
        log.warning("%s: is damaged and made again", entry)
        return None
    try:
        os.utime(entry)  # used just now: it goes last
    except OSError:
        log.debug("%s: cannot be touched", entry)
    return graph


def _write_entry(entry: Path, graph: bytes) -> bool:
    """Whole or not at all: readers see the old entry or the new one. Whether it is there."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(entry, _checksum(entry, graph) + graph, mode=0o600)
    except OSError as error:
        log.warning("%s: compiled models cannot be kept there: %s", entry.parent, error.strerror)
        return False
    return True


def _evict(newest: Path) -> None:
    """Let go of what was used longest ago, until the folder is within its bounds again."""
    total, count = 0, 0
    for age, path, size in sorted(_list_entries(newest.parent), key=lambda entry: entry[0], reverse=True):
        count, total = count + 1, total + size
        if path != newest and (count > MAX_CACHE_ENTRIES or total > MAX_CACHE_BYTES):
            path.unlink(missing_ok=True)
            log.info("%s: let go, last used at %d", path, age)


def _list_entries(folder: Path) -> list[tuple[float, Path, int]]:
    """(last used, path, bytes) of each entry, and of parts that a process left when it died."""
    found = []
    for path in folder.iterdir():
        if path.suffix in (CACHE_SUFFIX, ".part"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process tidies too
            found.append((status.st_mtime, path, status.st_size))
    return found
