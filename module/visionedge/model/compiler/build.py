"""From a model to the graph that runs: compiled, tried where that harms nobody, its batch open if proven."""

from collections.abc import Iterable
from dataclasses import replace

import onnx

from visionedge.model.compiler.batch import opened
from visionedge.model.compiler.compile import ROWS, checked_network, compile_graph
from visionedge.model.compiler.stamp import stamp
from visionedge.model.compiler.trial_run import first_run
from visionedge.model.model import Model
from visionedge.model.onnx_file import blamed_on


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
