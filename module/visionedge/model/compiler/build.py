"""From a model to the graph that runs: compiled, tried in a child process, and kept in a cache on disk.

`load_or_compile` is what the engine calls. On a cache miss it calls `build_graph`, which compiles the
network for one picture and for several, runs both in a child process (`trial_run`), and chooses the one for
several only if it gives the same results.

A cache entry is the file `KEY.graph`: a checksum of 32 bytes, then the graph.
"""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import helper

from visionedge import __version__
from visionedge.model.compiled_metadata import (
    COMPILED_HEAD,
    COMPILED_KEY,
    COMPILED_SIGNATURE,
    OUTDATED_KEYS,
    RESIZE_KEYS,
    CompiledMetadata,
)
from visionedge.model.compiler.compile import MAX_ROWS, compile_graph, compile_model, read_unchanged_network
from visionedge.model.compiler.passes import make_batch_dynamic
from visionedge.model.compiler.trial_run import run_trial
from visionedge.model.model import Model
from visionedge.model.onnx_file import wrap_model_errors
from visionedge.runtime.files import (
    evict_least_recently_used,
    set_aside_special_file,
    write_atomically,
)
from visionedge.runtime.ort import installed_wheel

log = logging.getLogger(__name__)

CACHE_FOLDER = "compiled"
CACHE_SUFFIX = ".graph"
MAX_CACHE_BYTES = 2 << 30
MAX_CACHE_ENTRIES = 32
_CHECKSUM_BYTES = 32
_ENTRY_NAME = re.compile(r".*\.(graph|part)")
"""Entries, and partial files that a killed process left."""


def load_or_compile(model: Model, folder: Path | None, *, rows: int = MAX_ROWS) -> bytes:
    """The compiled graph of a model, serialised: from the cache in the data folder `folder`, else built now.

    If the cache cannot be written, a warning is logged and the graph is built again at the next start. With
    `folder=None` the model is compiled without a trial run and without a cache, as tests need it.

    Raises:
        ModelError: the model cannot be compiled, or its trial run fails.
        UnavailableError: onnxruntime cannot be used.
    """
    if folder is None:
        return compile_model(model, rows)
    entry = folder / CACHE_FOLDER / f"{compute_cache_key(model, rows)}{CACHE_SUFFIX}"
    graph = _read_entry(entry)
    if graph is None:
        log.info("compiling %s and trying it in a child process: takes some seconds, once", model.name)
        graph = build_graph(model, rows)
        if _write_entry(entry, graph):
            _evict_entries(entry)
    return graph


def load_or_compile_with_batch(
    model: Model, folder: Path | None, *, rows: int = MAX_ROWS
) -> tuple[Model, bytes]:
    """The model with the batch size of its compiled graph, and that graph (see `load_or_compile`)."""
    graph = load_or_compile(model, folder, rows=rows)
    if folder is None:
        return model, graph
    dims = onnx.load_model_from_string(graph).graph.input[0].type.tensor_type.shape.dim
    return with_batch(model, dims[0].dim_value or None), graph


def build_graph(model: Model, rows: int = MAX_ROWS) -> bytes:
    """The graph that runs, serialised, with its metadata. Takes seconds, because child processes are started.

    Its batch is open if, in the trial run, several pictures at once have the results of each alone.

    Raises:
        ModelError: the file changed, cannot be compiled, or its trial run fails.
        UnavailableError: onnxruntime cannot be used.
    """
    network = read_unchanged_network(model)
    with wrap_model_errors(model.path):
        if model.interpretation.input.batch is None and _declared_batch(model, network) == 1:
            model = with_batch(model, 1)  # the batch was opened by an earlier build; the file is unchanged
        return _build(model, network, rows)


def with_batch(model: Model, batch: int | None) -> Model:
    """The model for a number of pictures at a time; None: any number."""
    picture = replace(model.interpretation.input, batch=batch)
    return replace(model, interpretation=replace(model.interpretation, input=picture))


def _build(model: Model, network: onnx.ModelProto, rows: int) -> bytes:
    batch = model.interpretation.input.batch
    dynamic_network = _make_dynamic_network(model, network)
    fixed = _compile_copy(network, model, batch or 1, rows)
    dynamic = None if isinstance(dynamic_network, str) else _compile_copy(dynamic_network, model, None, rows)
    found = run_trial(
        _with_outputs(fixed, network.graph.output),
        batch or 1,
        None if dynamic is None else _with_outputs(dynamic, network.graph.output),
        [value.name for value in network.graph.output],
        declared=batch is None,
    )
    if isinstance(dynamic_network, str):
        found = replace(found, batchable=False, reason=dynamic_network)
    chosen = dynamic if dynamic is not None and found.batchable else fixed
    decision = "open" if found.batchable else "one by one" if batch in (None, 1) else "left as it is"
    _write_metadata(
        chosen,
        model,
        rows=found.rows,
        batch=None if found.batchable else batch or 1,
        batch_reason=f"{_describe_declared_batch(model, network)}; {decision}: {found.reason}",
    )
    return bytes(chosen.SerializeToString())


def _make_dynamic_network(model: Model, network: onnx.ModelProto) -> onnx.ModelProto | str:
    """The network for any number of pictures, or the reason why it cannot be made."""
    batch = model.interpretation.input.batch
    if batch is None:
        return network
    if batch != 1:
        return "only a batch of one is opened"
    if _declared_batch(model, network) != 1:
        return f"{model.head} outputs one list for all pictures of a batch"
    return make_batch_dynamic(network)


def _declared_batch(model: Model, network: onnx.ModelProto) -> int:
    """The batch size of the picture input in the file; 0 if it is open."""
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
    """The graph with the network's own outputs beside the rows.

    The trial compares these, because the choice of the best rows can turn tiny differences into large ones.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for value in outputs:
        added = copy.graph.output.add(name=value.name)
        added.type.tensor_type.elem_type = value.type.tensor_type.elem_type
    return bytes(copy.SerializeToString())


def _write_metadata(
    graph: onnx.ModelProto, model: Model, *, rows: int, batch: int | None, batch_reason: str
) -> None:
    """Replace the metadata of the network by those of the compiled graph."""
    interpretation, preprocess = model.interpretation, model.interpretation.preprocess
    compiled_metadata = CompiledMetadata(
        version=__version__,
        name=model.name,
        sha256=model.sha256,
        head=model.head,
        classes=interpretation.class_count,
        evidence=model.evidence,
        rows=rows,
        batch=batch,
        batch_reason=batch_reason,
    )
    metadata = {entry.key: entry.value for entry in graph.metadata_props if entry.key not in OUTDATED_KEYS}
    metadata |= {
        COMPILED_KEY: compiled_metadata.to_json(),
        "visionedge.head": COMPILED_HEAD,
        "visionedge.input": json.dumps({key: getattr(preprocess, key) for key in RESIZE_KEYS}),
        "visionedge.nms": json.dumps(interpretation.needs_nms),
    }
    if model.labels:
        metadata["names"] = json.dumps(model.labels)
    del graph.metadata_props[:]
    helper.set_model_props(graph, metadata)
    graph.producer_name, graph.producer_version = "visionedge", __version__
    graph.doc_string = f"{model.name}, compiled by visionedge: {COMPILED_SIGNATURE}"


# --- the cache on disk --------------------------------------------------------------------------------------


def compute_cache_key(model: Model, rows: int) -> str:
    """A hash of everything that determines the graph: model, interpretation, software versions."""
    interpretation = (model.sha256, model.name, model.labels, model.interpretation, rows)
    versions = (__version__, onnx.__version__, installed_wheel(), _hash_own_source())
    parts = (*(repr(part) for part in interpretation), *versions)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


@functools.cache
def _hash_own_source() -> str:
    """A hash of the source of this package: it changes more often than the version number."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _checksum(entry: Path, graph: bytes) -> bytes:
    """The checksum of an entry. It includes the file name, so that a renamed entry is not accepted."""
    return hashlib.sha256(entry.name.encode() + graph).digest()


def _read_entry(entry: Path) -> bytes | None:
    if set_aside_special_file(entry):
        return None
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    check, graph = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if check != _checksum(entry, graph):
        log.warning("%s: is damaged; the model is compiled again", entry)
        return None
    try:
        os.utime(entry)  # the modification time is the time of last use, see `_evict`
    except OSError:
        log.debug("%s: its time of last use cannot be set", entry)
    return graph


def _write_entry(entry: Path, graph: bytes) -> bool:
    """Write an entry atomically: readers see the old one or the new one. False if it cannot be written."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(entry, _checksum(entry, graph) + graph, mode=0o600)
    except OSError as error:
        text = "%s: cannot be written: %s; the model is compiled again at the next start"
        log.warning(text, entry.parent, error.strerror)
        return False
    return True


def _evict_entries(newest: Path) -> None:
    deleted = evict_least_recently_used(
        newest.parent,
        _ENTRY_NAME,
        max_files=MAX_CACHE_ENTRIES,
        max_bytes=MAX_CACHE_BYTES,
        keep=lambda path: path == newest,
    )
    for path in deleted:
        log.info("%s: deleted, as the cache is full", path)
