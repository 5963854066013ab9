"""One compiled graph on one device: its buffers, its runs, and which device computes its nodes.

The same code serves every device: pictures are bound as the input, and rows are copied out of a tensor that
is bound once. The CPU reads pictures where they are in memory; for a GPU they are gathered in a host buffer
and copied into a tensor in its memory, and each batch size may be replayed as a CUDA graph.
"""

import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from visionedge.engine.device.devices import (
    PROVIDERS,
    EffectiveDevice,
    Runtime,
    device_preference,
    get_effective_device,
)
from visionedge.engine.device.faults import EngineError, describe_error
from visionedge.frames.types import Picture
from visionedge.model.postprocess import Rows
from visionedge.runtime.ort import import_onnxruntime, load_cuda_libraries, make_session_options

log = logging.getLogger(__name__)

_SCORE_TOLERANCE = 0.01
"""Two runs on one device may pick different algorithms; scores that differ by more are an error."""

PictureBatch = Sequence[Picture] | NDArray[np.uint8]
"""Pictures at a model's input size, uint8 (H, W, 3) each: a sequence, or one array (n, H, W, 3)."""


class BatchBuffer:
    """Memory for a batch uint8 (N, H, W, 3) that is not contiguous already."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._host = np.zeros(shape, np.uint8)

    def gather(self, pictures: PictureBatch) -> NDArray[np.uint8]:
        """The batch as one contiguous array: as given, or gathered, and valid until the next call."""
        if len(pictures) == len(self._host):
            whole = pictures if isinstance(pictures, np.ndarray) else pictures[0][None]
            if len(whole) == len(self._host) and whole.flags.c_contiguous:
                return whole
        for place, picture in zip(self._host, pictures, strict=False):
            place[:] = picture
        return self._host  # rows beyond the batch hold stale data; callers ignore them


@dataclass(frozen=True, slots=True)
class GraphInput:
    """The input of a compiled graph; `batch` is None if any batch size will do."""

    name: str
    batch: int | None
    height_px: int
    width_px: int

    @staticmethod
    def of(session: Any) -> "GraphInput":
        """Read it from a session of onnxruntime."""
        source = session.get_inputs()[0]
        batch, height_px, width_px, _ = source.shape
        return GraphInput(source.name, batch if isinstance(batch, int) else None, height_px, width_px)


@dataclass(frozen=True, slots=True)
class NodePlacement:
    """How many nodes of a session run on its device, and which ones run on the CPU instead.

    `on_cpu` is empty for a session on the CPU.
    """

    on_device: int
    on_cpu: tuple[str, ...] = ()


class Session:
    """A graph uint8 (N, H, W, 3) → float32 (N, K, 6), opened. Any number of threads may call `run`.

    `device` is the one that computes. `rows` is K. `notes` are options that it refused, with the reason.
    """

    runtime: Runtime = "onnxruntime"

    def __init__(
        self, raw: Any, device: EffectiveDevice, *, cuda_graphs: bool = False, notes: Sequence[str] = ()
    ) -> None:
        self.device = device
        self.cuda_graphs = cuda_graphs
        self.notes = tuple(notes)
        self.node_placement = _read_node_placement(raw, device)
        self._raw: Any = raw
        self._source = GraphInput.of(raw)
        self._result = raw.get_outputs()[0].name
        self._idle: dict[int, list[_BindingSet]] = {}
        self._numbers = itertools.count(1)
        # A captured graph belongs to the thread that captured it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="graphs") if cuda_graphs else None
        self.rows = 0
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        state = "closed" if self._raw is None else "open"
        cuda_graphs = ", with CUDA graphs" if self.cuda_graphs else ""
        return f"<Session {state} on {self.device}{cuda_graphs} K={self.rows}>"

    def run(self, pictures: PictureBatch, size: int) -> Rows:
        """Compute pictures as one batch, padded to `size`; their rows float32 (n, K, 6), copied.

        Raises:
            EngineError: the session is closed.
            Exception: whatever onnxruntime raises.
        """
        raw = self._raw
        if raw is None:
            raise EngineError("the engine is closed")
        bindings = self._take_bindings(raw, size)
        if self._thread is None:
            rows = bindings.compute(pictures)
        else:
            rows = self._thread.submit(bindings.compute, pictures).result()
        # Only now: bindings whose run failed are not used again.
        self._idle.setdefault(size, []).append(bindings)
        return rows[: len(pictures)]

    def keep_only(self, sizes: Collection[int]) -> None:
        """Free the memory of other batch sizes; on the CPU no run may be in progress."""
        for size in set(self._idle) - set(sizes):
            del self._idle[size]
        if self.device != "cpu" or self._raw is None:
            return  # captured CUDA graphs contain the addresses of this memory
        options = import_onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        smallest = (min(sizes), self._source.height_px, self._source.width_px, 3)
        self._raw.run(None, {self._source.name: np.zeros(smallest, np.uint8)}, options)

    def close(self) -> None:
        """Free everything; runs in progress are finished."""
        self._raw = None
        self._idle.clear()
        if self._thread is not None:
            self._thread.shutdown()

    def _take_bindings(self, raw: Any, size: int) -> "_BindingSet":
        try:
            return self._idle[size].pop()
        except (KeyError, IndexError):
            number = next(self._numbers) if self.cuda_graphs else None
            shape = (size, self._source.height_px, self._source.width_px, 3)
            return _BindingSet(
                raw,
                names=(self._source.name, self._result),
                pictures=shape,
                rows=(size, self.rows, 6),
                memory="cpu" if self.device == "cpu" else "cuda",
                graph=number,
            )

    def _check(self) -> None:
        """Learn K from a run without bindings, which need it; a run with bindings must give the same rows."""
        size = self._source.batch or 1
        shape = (size, self._source.height_px, self._source.width_px, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        options = import_onnxruntime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1")
        (plain,) = self._raw.run(None, {self._source.name: noise}, options)
        if plain.ndim != 3 or len(plain) != size or plain.shape[2] != 6:
            raise EngineError(f"the graph gave shape {plain.shape} for a batch of {size}")
        self.rows = int(plain.shape[1])
        for _ in range(2 if self.cuda_graphs else 1):  # captured, and then replayed
            bound = self.run(noise, size)
            if not np.allclose(bound[..., 4], plain[..., 4], atol=_SCORE_TOLERANCE, equal_nan=True):
                raise EngineError("a run with bound buffers and one without gave different scores")


class _BindingSet:
    """The input and output tensors that one caller needs for batches of one size, bound.

    `names` and shapes are those of the input and the output. The CPU reads a contiguous batch in place; other
    batches are gathered, and for a GPU copied into a tensor whose address never changes.
    """

    def __init__(
        self,
        raw: Any,
        *,
        names: tuple[str, str],
        pictures: tuple[int, ...],
        rows: tuple[int, ...],
        memory: str,
        graph: int | None,
    ) -> None:
        onnxruntime = import_onnxruntime()
        tensor: Callable[..., Any] = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._wrap_array: Callable[..., Any] = onnxruntime.OrtValue.ortvalue_from_numpy
        self._raw = raw
        self._input = names[0]
        self._buffer = BatchBuffer(pictures)
        self._pictures = tensor(list(pictures), np.uint8, memory, 0) if memory != "cpu" else None
        self._rows = tensor(list(rows), np.float32, memory, 0)
        self._binding = raw.io_binding()
        if self._pictures is not None:
            self._binding.bind_ortvalue_input(self._input, self._pictures)
        self._binding.bind_ortvalue_output(names[1], self._rows)
        self._options = onnxruntime.RunOptions()
        if graph is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(graph))

    def compute(self, pictures: PictureBatch) -> Rows:
        """The rows of the pictures and of the padding."""
        whole = self._buffer.gather(pictures)
        if self._pictures is None:
            self._binding.bind_ortvalue_input(self._input, self._wrap_array(whole))
        else:
            self._pictures.update_inplace(whole)
        self._raw.run_with_iobinding(self._binding, self._options)
        rows: Rows = (
            self._rows.numpy().copy()
        )  # a copy: on the CPU `numpy` is a view that the next run overwrites
        return rows


# --- opening a session: the options of each provider --------------------------------------------------------

KNOWN_OPTIONS: Mapping[str, frozenset[str]] = {
    "TensorrtExecutionProvider": frozenset(
        {"device_id", "trt_engine_cache_enable", "trt_engine_cache_path", "trt_engine_cache_prefix"}
        | {"trt_timing_cache_enable", "trt_timing_cache_path", "trt_builder_optimization_level"}
        | {"trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"}
        | {"trt_fp16_enable", "trt_max_workspace_size", "trt_context_memory_sharing_enable"}
    ),
    "CUDAExecutionProvider": frozenset(
        {"device_id", "arena_extend_strategy", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace"}
        | {"do_copy_in_default_stream", "use_tf32", "gpu_mem_limit", "prefer_nhwc", "enable_cuda_graph"}
        | {"use_ep_level_unified_stream"}
    ),
    "CPUExecutionProvider": frozenset(),
}
"""Every option that we pass, by provider. onnxruntime reports a misspelt one only where CUDA really loads."""

# The memory arena grows by what is requested, not by doubling, because other processes share the GPU.
# Shapes are fixed, so the exhaustive search for convolution algorithms runs once a batch size, at warm-up.
# TF32 is the default of onnxruntime from Ampere on; it is set here so that a new default changes nothing.
# One stream for all threads, as lanes only wait for each other. NHWC is off: it was not measured.
CUDA_OPTIONS: Mapping[str, str] = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "cudnn_conv_use_max_workspace": "1",
    "do_copy_in_default_stream": "1",
    "use_tf32": "1",
    "prefer_nhwc": "0",
    "use_ep_level_unified_stream": "1",
}
CUDA_GRAPH_OPTIONS: Mapping[str, str] = {**CUDA_OPTIONS, "enable_cuda_graph": "1"}
CUDA_MINIMAL_OPTIONS: Mapping[str, str] = {
    name: CUDA_OPTIONS[name] for name in ("device_id", "arena_extend_strategy", "cudnn_conv_algo_search")
}
"""For a provider that refuses some of our options, because it is older or newer than the ones we know."""


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """One way to open a session: options by device, and whether runs are captured as CUDA graphs."""

    name: str
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cuda_graphs: bool = False


def list_provider_configs(
    device: EffectiveDevice, graph: bytes, *, max_batch: int, data: Path | None
) -> tuple[ProviderConfig, ...]:
    """The ways to open a session on a device, best first; the last one has the fewest options."""
    if device == "cuda":
        return (
            ProviderConfig("CUDA graphs", {"cuda": CUDA_GRAPH_OPTIONS}, cuda_graphs=True),
            ProviderConfig("CUDA with all our options", {"cuda": CUDA_OPTIONS}),
            ProviderConfig("CUDA", {"cuda": CUDA_MINIMAL_OPTIONS}),
        )
    if device == "tensorrt":
        return (
            ProviderConfig(
                "TensorRT", {"tensorrt": make_tensorrt_options(graph, max_batch, data), "cuda": CUDA_OPTIONS}
            ),
        )
    return (ProviderConfig("CPU"),)


def make_tensorrt_options(graph: bytes, max_batch: int, data: Path | None) -> dict[str, str]:
    """TensorRT's options: one engine for all batch sizes, cached on disk, because building takes minutes.

    TensorRT itself checks whether a cached engine fits the graph, the GPU and its version.
    """
    options = {"device_id": "0", **_make_shape_profile(graph, max_batch)}
    if data is None:
        return options
    folder = data / "tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    return options | {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _make_shape_profile(graph: bytes, max_batch: int) -> dict[str, str]:
    """The smallest, usual and largest shapes of the input; empty if the shape is fixed."""
    source = onnx.ModelProto.FromString(graph).graph.input[0]
    batch, *rest = source.type.tensor_type.shape.dim
    if batch.HasField("dim_value"):
        return {}
    size = "x".join(str(dim.dim_value) for dim in rest)
    shapes = {"min": 1, "opt": max_batch, "max": max_batch}
    return {f"trt_profile_{name}_shapes": f"{source.name}:{count}x{size}" for name, count in shapes.items()}


def check_provider_options(provider: str, options: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A provider and its options, as `InferenceSession` takes them.

    Raises:
        ValueError: an option is not in `KNOWN_OPTIONS`.
    """
    if unknown := sorted(set(options) - KNOWN_OPTIONS[provider]):
        raise ValueError(f"{provider} has no option {unknown[0]}")
    return provider, dict(options)


def open_ort_session(
    graph: bytes,
    device: EffectiveDevice,
    *,
    max_batch: int,
    data: Path | None = None,
) -> Session:
    """Open a compiled graph on a device, with the best of our options that it takes.

    The session may come up on a lesser device: look at its `device`. Raises what onnxruntime raises.
    """
    onnxruntime = import_onnxruntime()
    if device != "cpu":
        load_cuda_libraries(onnxruntime)
    notes: list[str] = []
    *preferred, last = list_provider_configs(device, graph, max_batch=max_batch, data=data)
    for choice in preferred:
        try:
            return _open_with(onnxruntime, graph, device, choice, notes)
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no other base
            notes.append(f"{choice.name} refused: {describe_error(error)}")
            log.info("%s on %s", notes[-1], device)
    return _open_with(onnxruntime, graph, device, last, notes)


def _open_with(
    onnxruntime: Any, graph: bytes, device: EffectiveDevice, choice: ProviderConfig, notes: list[str]
) -> Session:
    # One thread: lanes run in parallel on a CPU, and a GPU needs none.
    options = make_session_options(1, {"session.record_ep_graph_assignment_info": "1"})
    providers = [
        check_provider_options(PROVIDERS[name], choice.options.get(name, {}))
        for name in device_preference("cpu" if device == "cpu" else device)
    ]
    raw = onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    raw.disable_fallback()
    effective = get_effective_device(raw.get_providers())
    return Session(raw, effective, cuda_graphs=choice.cuda_graphs and effective == device, notes=notes)


def _read_node_placement(raw: Any, device: EffectiveDevice) -> NodePlacement:
    """What onnxruntime recorded when it assigned the nodes to providers; older versions record nothing."""
    recorded: Sequence[Any] = getattr(raw, "get_provider_graph_assignment_info", list)()
    node_placement = [
        (part.ep_name, f"{node.op_type} {node.name}".rstrip())
        for part in recorded
        for node in part.get_nodes()
    ]
    on_cpu_nodes = tuple(
        name for provider, name in node_placement if device != "cpu" and provider == PROVIDERS["cpu"]
    )
    return NodePlacement(len(node_placement) - len(on_cpu_nodes), on_cpu_nodes)


# --- what an engine uses of a session, whatever its runtime -------------------------------------------------


class DeviceSession(Protocol):
    """A graph uint8 (N, H, W, 3) → float32 (N, K, 6), opened. Any number of threads may call `run`."""

    @property
    def device(self) -> EffectiveDevice:
        """The device that computes."""

    @property
    def runtime(self) -> Runtime:
        """The library that computes."""

    @property
    def rows(self) -> int:
        """K: the number of rows for a picture."""

    @property
    def node_placement(self) -> NodePlacement:
        """How many nodes run on the device, and which on the CPU."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that it refused, with the reason."""

    def run(self, pictures: PictureBatch, size: int) -> Rows:
        """Compute pictures as one batch, padded to `size`."""

    def keep_only(self, sizes: Collection[int]) -> None:
        """Free the memory of other batch sizes."""

    def close(self) -> None:
        """Free everything."""


class SessionOpener(Protocol):
    """The signature of `backend.open_session`."""

    def __call__(
        self,
        graph: bytes,
        device: EffectiveDevice,
        *,
        max_batch: int,
        data: Path | None,
        runtime: Runtime = "onnxruntime",
        precision: str = "fp32",
    ) -> DeviceSession:
        """Open a compiled graph on a device; raises what the runtime raises."""
