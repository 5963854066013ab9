"""One compiled graph in OpenVINO, on the CPU or on an Intel GPU: a second runtime beside onnxruntime.

OpenVINO is fastest with fixed shapes, so the graph is compiled once for each batch size. On the CPU it gets a
stream of one thread for each usable core: lanes compute side by side, as with onnxruntime, and share the
weights. Threads are not pinned. Bytes are read where they are in memory.

Seen on CPUs only. That nodes run on an Intel GPU, and how it fails, is written after OpenVINO's sources and
the texts in its plugin (2026.4), and was not seen on one.
"""

import ctypes
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionedge.engine.device.devices import EffectiveDevice, Runtime
from visionedge.engine.device.faults import EngineError
from visionedge.engine.device.openvino_rounding import reduce_rounding
from visionedge.engine.device.session import BatchBuffer, NodePlacement, PictureBatch
from visionedge.model.postprocess import Rows
from visionedge.runtime.ov import import_openvino
from visionedge.runtime.process_limits import usable_cores

_GPU = "openvino-gpu"
_GPU_STREAMS = 2
"""As many as the lanes of the default plan of a GPU: one prepares a batch while the other one is computed."""

_PLUGINS = {"cpu": "CPU", _GPU: "GPU"}
_PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class OpenVinoSession:
    """A graph uint8 (N, H, W, 3) → float32 (N, K, 6), opened. Any number of threads may call `run`.

    `device` is the one that computes. `rows` is K, `size_px` (H, W). `notes` are options that it refused,
    with the reason.
    """

    runtime: Runtime = "openvino"

    def __init__(
        self, graph: bytes, device: EffectiveDevice, *, precision: str = "fp32", data: Path | None = None
    ) -> None:
        """Open a graph; `data` is the folder in which a GPU keeps its compiled kernels.

        Raises:
            UnavailableError: OpenVINO is not installed.
            EngineError: the graph's output has another shape.
            RuntimeError: OpenVINO refuses the graph or the device.
        """
        self.device = device
        self.precision = precision
        self.notes: tuple[str, ...] = ()
        self._openvino = import_openvino()
        self._core = self._openvino.Core()
        self._plugin, self._options = _PLUGINS[device], _make_options(device, precision, data)
        model = self._core.read_model(graph)
        batch, height_px, width_px, _ = model.input(0).get_partial_shape()
        self._batch = batch.get_length() if batch.is_static else None
        self.size_px = (height_px.get_length(), width_px.get_length())
        self._model: Any = model
        self._lock = threading.Lock()
        self._compiled: dict[int, _CompiledGraph] = {}
        self.rows = 0
        self._check()
        self.node_placement = NodePlacement(self._get_compiled(self._batch or 1).count_nodes())

    def __repr__(self) -> str:
        state = "closed" if self._model is None else "open"
        return f"<OpenVinoSession {state} on {self.device} in {self.precision} K={self.rows}>"

    def run(self, pictures: PictureBatch, size: int) -> Rows:
        """Compute pictures as one batch, padded to `size`; their rows float32 (n, K, 6), copied.

        Raises:
            EngineError: the session is closed.
            RuntimeError: whatever OpenVINO raises.
        """
        return self._get_compiled(size).compute(pictures)[: len(pictures)]

    @property
    def compiled_sizes(self) -> set[int]:
        """The batch sizes that hold memory."""
        return set(self._compiled)

    def keep_only(self, sizes: Collection[int]) -> None:
        """Free the graphs of other batch sizes; runs in progress are finished."""
        with self._lock:
            for size in set(self._compiled) - set(sizes):
                del self._compiled[size]

    def close(self) -> None:
        """Free everything; runs in progress are finished."""
        with self._lock:
            self._model = None
            self._compiled.clear()

    def _get_compiled(self, size: int) -> "_CompiledGraph":
        found = self._compiled.get(size)
        if found is not None:
            return found
        with self._lock:
            if self._model is None:
                raise EngineError("the engine is closed")
            if size not in self._compiled:
                shape = (size, *self.size_px, 3)
                model = self._model.clone()
                if self._batch is None:
                    model.reshape(list(shape))
                if self.precision != "fp32":
                    reduce_rounding(model, self.device)
                compiled = self._core.compile_model(model, self._plugin, self._options)
                self._compiled[size] = _CompiledGraph(self._openvino, compiled, shape)
            return self._compiled[size]

    def _check(self) -> None:
        """Learn K from a first run."""
        size = self._batch or 1
        rows = self._get_compiled(size).compute(np.zeros((size, *self.size_px, 3), np.uint8))
        if rows.ndim != 3 or len(rows) != size or rows.shape[2] != 6:
            raise EngineError(f"the graph gave shape {rows.shape} for a batch of {size}")
        self.rows = int(rows.shape[1])


def _make_options(device: EffectiveDevice, precision: str, data: Path | None) -> dict[str, Any]:
    """The properties of a compiled graph; none of them changes the process."""
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _PRECISION_HINTS[precision]}
    if device == _GPU:
        options |= {"NUM_STREAMS": _GPU_STREAMS}
        return options if data is None else options | {"CACHE_DIR": str(data / "openvino")}
    streams = usable_cores()
    return options | {
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": streams,
        "ENABLE_CPU_PINNING": False,  # lanes share the cores with cameras and other modules
        "ENABLE_HYPER_THREADING": True,  # else not every usable core counts
    }


class _CompiledGraph:
    """The graph for one batch size, and its idle requests: one for each run in progress at a time."""

    def __init__(self, openvino: Any, compiled: Any, pictures: tuple[int, ...]) -> None:
        self._openvino = openvino
        self._compiled = compiled
        self._shape = pictures
        self._idle: list[_Request] = []

    def compute(self, pictures: PictureBatch) -> Rows:
        """The rows of the pictures and of the padding."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = _Request(self._openvino, self._compiled.create_infer_request(), self._shape)
        rows = request.compute(pictures)
        self._idle.append(request)  # only now: a request that failed is not used again
        return rows

    def count_nodes(self) -> int:
        """The operators of the graph as OpenVINO runs it, without constants."""
        operators: Iterable[Any] = self._compiled.get_runtime_model().get_ops()
        return sum(
            _read_layer_type(operator) not in ("Const", "Constant", "Input", "Output")
            for operator in operators
        )


def _read_layer_type(operator: Any) -> str:
    return str(operator.get_rt_info()["layerType"].astype(str))


class _Request:
    """One run at a time. The CPU reads a contiguous batch in place; other batches are gathered."""

    def __init__(self, openvino: Any, request: Any, pictures: tuple[int, ...]) -> None:
        self._openvino = openvino
        self._request = request
        self._buffer = BatchBuffer(pictures)

    def compute(self, pictures: PictureBatch) -> Rows:
        """The rows, copied: OpenVINO writes those of the next run to the same memory."""
        whole = self._buffer.gather(pictures)
        self._request.set_input_tensor(self._openvino.Tensor(_make_writeable(whole), shared_memory=True))
        self._request.infer()  # releases Python's lock
        rows: Rows = np.array(self._request.get_output_tensor(0).data, np.float32)
        return rows


def _make_writeable(whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same memory as an array that may be written to: OpenVINO shares no other, although it only reads.

    The frames of cameras are read-only in the engine's process.
    """
    if whole.flags.writeable:
        return whole
    memory = (ctypes.c_uint8 * whole.nbytes).from_address(whole.ctypes.data)
    return np.frombuffer(memoryview(memory), np.uint8).reshape(whole.shape)
