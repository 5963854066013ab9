"""From a model to the graph that runs: compiled, tried where that harms nobody, its batch open if proven."""

import functools
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge import __version__
from visionedge.errors import ModelError
from visionedge.model.analysis.shape_inference import infer
from visionedge.model.compiler.compile import ROWS, checked_network, compile_graph, compile_model
from visionedge.model.compiler.trial_run import first_run
from visionedge.model.model import Model
from visionedge.model.onnx_file import blamed_on
from visionedge.model.stamp import _OUTDATED, _RESIZING, HEAD, KEY, SIGNATURE, Imprint, read_imprint
from visionedge.runtime.files import drop_damaged, is_odd
from visionedge.runtime.ort import wheel


def stamp(graph: onnx.ModelProto, model: Model, *, rows: int, batch: int | None, batch_words: str) -> None:
    """Write into a compiled graph what it is, over what the network said of itself."""
    reading, way = model.reading, model.reading.preprocess
    imprint = Imprint(
        *(__version__, model.name, model.sha256, model.head, reading.class_count, model.evidence),
        *(rows, batch, batch_words),
    )
    metadata = {entry.key: entry.value for entry in graph.metadata_props if entry.key not in _OUTDATED}
    metadata |= {
        KEY: json.dumps(asdict(imprint)),
        "visionedge.head": HEAD,
        "visionedge.input": json.dumps({key: getattr(way, key) for key in _RESIZING}),
        "visionedge.nms": json.dumps(reading.suppress),
    }
    if model.labels:
        metadata["names"] = json.dumps(model.labels)
    del graph.metadata_props[:]
    helper.set_model_props(graph, metadata)
    graph.producer_name, graph.producer_version = "visionedge", __version__
    graph.doc_string = f"{model.name}, compiled by visionedge: {SIGNATURE}"


def imprint_of(graph: onnx.ModelProto) -> Imprint:
    """What a graph says of itself that was built here.

    Raises:
        ModelError: it was not.
    """
    imprint = read_imprint({entry.key: entry.value for entry in graph.metadata_props})
    if imprint is None:
        raise ModelError("was not compiled here")
    return imprint


# A network whose batch was fixed at one, opened to any number of pictures.
#
# Exporters write the one into shapes all over a graph. Here it is taken out again where it can stand for the
# batch; that this is right is never assumed: `first_run` computes several pictures at once and one by one.


# How many values these give depends on the pictures, so several of them do not stack.
UNSTACKABLE = frozenset(
    {"NonMaxSuppression", "NonZero", "Unique", "Compress", "If", "Loop", "Scan", "SequenceConstruct"}
    | {"SplitToSequence", "ConcatFromSequence", "SequenceInsert", "SequenceEmpty"}
)

OPEN = "N"


def opened(network: onnx.ModelProto) -> onnx.ModelProto | str:
    """A copy that may take any number of pictures, or why there can be none, in words."""
    operators = sorted({node.op_type for node in network.graph.node} & UNSTACKABLE)
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
        dims[0].dim_param = OPEN
    shapes = _shapes(network)
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    _open_nodes(graph, {value.name for value in inputs}, shapes)
    return copy


def _open_nodes(graph: onnx.GraphProto, moving: set[str], shapes: dict[str, list[int]]) -> None:
    """Take the one out of the nodes that see pictures; `moving` are the tensors that do."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        if moving.isdisjoint(node.input):
            continue
        moving.update(node.output)
        change = _CHANGES.get(node.op_type)
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
    node.input[1] = _constant(graph, shape.astype(np.int64))


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
    node.input[2] = _constant(graph, factors)


_CHANGES = {"Reshape": _reshape, "Resize": _resize}


def _constant(graph: onnx.GraphProto, values: NDArray[np.generic]) -> str:
    """A new constant: the old one may serve other nodes too."""
    taken = {tensor.name for tensor in graph.initializer} | {name for n in graph.node for name in n.output}
    name = next(name for i in itertools.count() if (name := f"open.batch.{i}") not in taken)
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _shapes(network: onnx.ModelProto) -> dict[str, list[int]]:
    """The whole shapes that are known of tensors, with the batch of one; none where inference fails."""
    try:
        types = infer(network).onnx
    except ModelError:
        return {}  # what runs it will tell whether that matters
    sides = {name: [d.dim_value for d in kind.tensor_type.shape.dim] for name, kind in types.items()}
    return {name: dims for name, dims in sides.items() if all(side > 0 for side in dims)}


def build(model: Model, rows: int = ROWS) -> bytes:
    """The graph that runs, serialised, with its imprint. Takes seconds: other processes are started.

    Its batch is open wherever several pictures at once were found to give what each alone gives.

    Raises:
        ModelError: the model changed, cannot be compiled, or its first run does not end well.
        UnavailableError: onnxruntime cannot be used.
    """
    network = checked_network(model)
    with blamed_on(model.path):
        if model.reading.input.batch is None and _declared(model, network) == 1:
            model = with_batch(model, 1)  # opened before, but the file is as it was
        return _built(model, network, rows)


def with_batch(model: Model, batch: int | None) -> Model:
    """The model for so many pictures at a time; None: any number."""
    picture = replace(model.reading.input, batch=batch)
    return replace(model, reading=replace(model.reading, input=picture))


def _built(model: Model, network: onnx.ModelProto, rows: int) -> bytes:
    batch = model.reading.input.batch
    wide = _wide(model, network)
    single = _compiled(network, model, batch or 1, rows)
    many = None if isinstance(wide, str) else _compiled(wide, model, None, rows)
    found = first_run(
        _with_outputs(single, network.graph.output),
        batch or 1,
        None if many is None else _with_outputs(many, network.graph.output),
        [value.name for value in network.graph.output],
        declared=batch is None,
    )
    if isinstance(wide, str):
        found = replace(found, stacks=False, words=wide)
    chosen = many if many is not None and found.stacks else single
    after = "open" if found.stacks else "one by one" if batch in (None, 1) else "left as it is"
    words = f"{_as_it_was(model, network)}; {after}: {found.words}"
    stamp(chosen, model, rows=found.rows, batch=None if found.stacks else batch or 1, batch_words=words)
    return bytes(chosen.SerializeToString())


def _wide(model: Model, network: onnx.ModelProto) -> onnx.ModelProto | str:
    """The network for any number of pictures, or why there is none."""
    batch = model.reading.input.batch
    if batch is None:
        return network
    if batch != 1:
        return "only a batch of one is opened"
    if _declared(model, network) != 1:
        return f"what {model.head} gives for several pictures is one list"
    return opened(network)


def _declared(model: Model, network: onnx.ModelProto) -> int:
    """The batch of the picture's input in the file; 0 where it is open."""
    inputs = {value.name: value.type.tensor_type.shape.dim for value in network.graph.input}
    return int(inputs[model.reading.input.name][0].dim_value)


def _as_it_was(model: Model, network: onnx.ModelProto) -> str:
    declared = _declared(model, network)
    return f"fixed at {declared} in the file" if declared > 0 else "open in the file"


def _compiled(network: onnx.ModelProto, model: Model, batch: int | None, rows: int) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    return compile_graph(copy, with_batch(model, batch).reading, rows)


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

FOLDER = "compiled"
SUFFIX = ".graph"

MOST_BYTES = 2 << 30
MOST_ENTRIES = 32
_CHECK_BYTES = 32


def compiled(model: Model, folder: Path | None, *, rows: int = ROWS) -> bytes:
    """The compiled graph of a model: from the data folder `folder` if it is there, else built and kept.

    A folder that cannot be written costs a warning and the time to build it again. None keeps nothing and
    tries nothing: the model is compiled as it is, as suits tests and models that are known.

    Raises:
        ModelError: the model cannot be compiled, or its first run does not end well.
        UnavailableError: onnxruntime cannot be used.
    """
    if folder is None:
        return compile_model(model, rows)
    entry = folder / FOLDER / f"{key_of(model, rows)}{SUFFIX}"
    graph = _read(entry)
    if graph is None:
        log.info("compiling %s and trying it in a process of its own: some seconds, once", model.name)
        graph = build(model, rows)
        if _write(entry, graph):
            _tidy(entry)
    return graph


def ready(model: Model, folder: Path | None, *, rows: int = ROWS) -> tuple[Model, bytes]:
    """The model with the batch that its compiled graph has, and that graph (see `compiled`)."""
    graph = compiled(model, folder, rows=rows)
    if folder is None:
        return model, graph
    dims = onnx.load_model_from_string(graph).graph.input[0].type.tensor_type.shape.dim
    return with_batch(model, dims[0].dim_value or None), graph


def key_of(model: Model, rows: int) -> str:
    """What tells one entry from another: the model and how it is understood, and all that compiles it."""
    reading = (model.sha256, model.name, model.labels, model.reading, rows)
    versions = (__version__, onnx.__version__, wheel(), _compiler())
    parts = (*(repr(part) for part in reading), *versions)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


@functools.cache
def _compiler() -> str:
    """The version of this very compiler: its source, which changes more often than the release does."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _check(entry: Path, graph: bytes) -> bytes:
    """Bound to the name too, so that an entry that was moved is not taken for another."""
    return hashlib.sha256(entry.name.encode() + graph).digest()


def _read(entry: Path) -> bytes | None:
    if is_odd(entry):  # a pipe would be waited for
        log.warning("%s: is no regular file and set aside", entry)
        drop_damaged(entry)
        return None
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    check, graph = content[:_CHECK_BYTES], content[_CHECK_BYTES:]
    if check != _check(entry, graph):
        log.warning("%s: is damaged and made again", entry)
        return None
    try:
        os.utime(entry)  # used just now: it goes last
    except OSError:
        log.debug("%s: cannot be touched", entry)
    return graph


def _write(entry: Path, graph: bytes) -> bool:
    """Whole or not at all: readers see the old entry or the new one. Whether it is there."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=entry.parent, suffix=".part")
    except OSError as error:
        log.warning("%s: compiled models cannot be kept there: %s", entry.parent, error.strerror)
        return False
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_check(entry, graph))
            file.write(graph)
        part.replace(entry)
    except OSError as error:
        log.warning("%s: compiled models cannot be kept there: %s", entry.parent, error.strerror)
        part.unlink(missing_ok=True)
        return False
    return True


def _tidy(newest: Path) -> None:
    """Let go of what was used longest ago, until the folder is within its bounds again."""
    total, count = 0, 0
    for age, path, size in sorted(_entries(newest.parent), key=lambda entry: entry[0], reverse=True):
        count, total = count + 1, total + size
        if path != newest and (count > MOST_ENTRIES or total > MOST_BYTES):
            path.unlink(missing_ok=True)
            log.info("%s: let go, last used at %d", path, age)


def _entries(folder: Path) -> list[tuple[float, Path, int]]:
    """(last used, path, bytes) of each entry, and of parts that a process left when it died."""
    found = []
    for path in folder.iterdir():
        if path.suffix in (SUFFIX, ".part"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process tidies too
            found.append((status.st_mtime, path, status.st_size))
    return found
