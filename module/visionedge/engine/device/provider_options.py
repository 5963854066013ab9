"""The options that each execution provider of onnxruntime gets, and in which order they are tried."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from visionedge.engine.device.devices import EffectiveDevice

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
