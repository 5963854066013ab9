"""The candidates of an engine in their bare runtimes: the ceiling of the engine, and the speed of each."""

import functools
import threading
from pathlib import Path
from typing import Any

from visionedge.engine.autotune import BatchRunner
from visionedge.engine.candidates import CandidateGraph, CandidateSource
from visionedge.engine.device.backend import DEVICE_BACKEND
from visionedge.engine.device.devices import EffectiveDevice
from visionedge.engine.device.session import PLAIN
from visionedge.engine.interface import EngineInfo, EngineSettings
from visionedge.frames.types import Picture
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.model import Model
from visionedge.ops.bench.baseline import open_plain_session
from visionedge.runtime.ov import import_openvino
from visionedge.runtime.process_limits import usable_cores


def list_bare_graphs(
    loaded: Model, settings: EngineSettings, info: EngineInfo, data: Path | None
) -> list[CandidateGraph]:
    """The graphs of the engine's candidates that could be measured; else that of the engine alone."""
    source = CandidateSource(
        loaded,
        *load_or_compile_with_batch(loaded, data),
        info.device.effective,
        "openvino" if info.device.effective == "openvino-gpu" else "onnxruntime",
        DEVICE_BACKEND,
        settings,
        data,
    )
    measured = {each.candidate for each in info.choice.results if each.speedup is not None}
    wanted = measured or {info.choice.candidate}
    graphs = [graph for graph in source.list_graphs()[0] if graph.candidate in wanted]
    return graphs or [source.plain]


def open_bare_runner(graph: CandidateGraph, device: EffectiveDevice, pictures: Picture) -> BatchRunner:
    """A function that runs a batch of pictures in the bare runtime of a candidate, on any thread.

    Raises what the runtime raises.
    """
    if graph.candidate.options != PLAIN or device == "openvino-gpu":
        return _open_session(graph, device, pictures)
    if graph.candidate.runtime == "openvino":
        return _open_openvino_runner(graph, pictures)
    return open_onnxruntime_runner(graph.graph, device, pictures)


def open_onnxruntime_runner(graph: bytes, device: str, pictures: Picture) -> BatchRunner:
    """The same for `session.run` of onnxruntime, with default options."""
    session = open_plain_session(graph, 1, device)
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: pictures[:batch]})


def _open_openvino_runner(graph: CandidateGraph, pictures: Picture) -> BatchRunner:
    """`infer` of OpenVINO with a stream for each core; a thread has a request for each batch size."""
    openvino = import_openvino()
    core, cores, own = openvino.Core(), usable_cores(), threading.local()
    hint = {"fp32": "f32", "bf16": "bf16"}[graph.computed_precision]
    options = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": cores, "INFERENCE_NUM_THREADS": cores}

    @functools.cache
    def compile_for(batch: int) -> Any:
        model = core.read_model(graph.graph)
        model.reshape([batch, *pictures.shape[1:]])
        return core.compile_model(model, "CPU", options | {"ENABLE_CPU_PINNING": False})

    def run(batch: int) -> object:
        requests: dict[int, Any] = own.__dict__.setdefault("requests", {})
        if batch not in requests:
            requests[batch] = compile_for(batch).create_infer_request()
            requests[batch].set_input_tensor(openvino.Tensor(pictures[:batch], shared_memory=True))
        requests[batch].infer()
        return requests[batch].get_output_tensor(0).data

    return run


def _open_session(graph: CandidateGraph, device: EffectiveDevice, pictures: Picture) -> BatchRunner:
    """The session of the engine: a bare one has no options of a device."""
    session = DEVICE_BACKEND.open(
        graph.graph,
        device,
        max_batch=len(pictures),
        data=None,
        runtime=graph.candidate.runtime,
        precision=graph.computed_precision,
        options=graph.candidate.options,
    )
    return lambda batch: session.run(pictures[:batch], batch)
