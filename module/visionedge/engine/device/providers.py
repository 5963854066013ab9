"""The options that each provider gets, checked against our own list, and the order of trying them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from visionedge.engine.device.devices import Effective

# Every option we pass, by provider. A misspelt one raises only where CUDA really loads, so it is checked
# here.
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

# An arena that grows by what is asked, not by doubling: other processes share the GPU. Shapes are fixed, so
# the exhaustive search for convolution algorithms runs once for each bucket, at warm-up. TF32 is what
# onnxruntime takes by itself from Ampere on; it stands here so that a new default changes nothing. One stream
# for all threads, as lanes only wait for each other. NHWC stays off until somebody has measured it.
CUDA: Mapping[str, str] = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "cudnn_conv_use_max_workspace": "1",
    "do_copy_in_default_stream": "1",
    "use_tf32": "1",
    "prefer_nhwc": "0",
    "use_ep_level_unified_stream": "1",
}
CUDA_GRAPHS: Mapping[str, str] = {**CUDA, "enable_cuda_graph": "1"}
CUDA_LEAST: Mapping[str, str] = {
    name: CUDA[name] for name in ("device_id", "arena_extend_strategy", "cudnn_conv_algo_search")
}
"""For a provider that is older or newer than the ones we know; better than no GPU at all."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to open a session: options by device, and whether its runs are captured as CUDA graphs."""

    name: str
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    graphs: bool = False


@dataclass(frozen=True, slots=True)
class GraphInput:
    """The input of a compiled graph; `batch` is None where it is open."""

    name: str
    batch: int | None
    height_px: int
    width_px: int

    @staticmethod
    def of(session: Any) -> "GraphInput":
        """As a session tells it."""
        source = session.get_inputs()[0]
        batch, height_px, width_px, _ = source.shape
        return GraphInput(source.name, batch if isinstance(batch, int) else None, height_px, width_px)


def choices(device: Effective, graph: bytes, *, max_batch: int, data: Path | None) -> tuple[Choice, ...]:
    """The ways to open a session on a device, best first; the last one is plain."""
    if device == "cuda":
        return (
            Choice("CUDA graphs", {"cuda": CUDA_GRAPHS}, graphs=True),
            Choice("CUDA with all our options", {"cuda": CUDA}),
            Choice("CUDA", {"cuda": CUDA_LEAST}),
        )
    if device == "tensorrt":
        return (Choice("TensorRT", {"tensorrt": tensorrt(graph, max_batch, data), "cuda": CUDA}),)
    return (Choice("CPU"),)


def tensorrt(graph: bytes, max_batch: int, data: Path | None) -> dict[str, str]:
    """TensorRT's options: one engine for all batch sizes, kept on disk, as building takes minutes.

    It is its own business to see whether a kept engine still fits graph, GPU and version.
    """
    options = {"device_id": "0", **_profile(graph, max_batch)}
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


def _profile(graph: bytes, max_batch: int) -> dict[str, str]:
    """The least, usual and largest shapes; none where the shape is fixed."""
    source = onnx.ModelProto.FromString(graph).graph.input[0]
    batch, *rest = source.type.tensor_type.shape.dim
    if batch.HasField("dim_value"):
        return {}
    size = "x".join(str(dim.dim_value) for dim in rest)
    shapes = {"min": 1, "opt": max_batch, "max": max_batch}
    return {f"trt_profile_{name}_shapes": f"{source.name}:{count}x{size}" for name, count in shapes.items()}


def provider_options(provider: str, options: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A provider as a session takes it.

    Raises:
        ValueError: an option is not one of ours.
    """
    if unknown := sorted(set(options) - KNOWN_OPTIONS[provider]):
        raise ValueError(f"{provider} has no option {unknown[0]}")
    return provider, dict(options)
