"""Whether one more engine fits into the memory of this machine, judged before its process starts.

Only what cannot fit is refused: the estimate is less than any process took that was measured, and what the
kernel can drop counts as free. The memory of a GPU is not judged: an engine that does not get it falls back.

Private memory in MiB of engine processes on the CPU, 2 cores, batch 1 (2026-11-30); models by the MiB of
their files, the last two are synthetic convolutions in fp32; in brackets the most while one opened:

| | YOLOX-nano, 3.5 | PicoDet-S, 3.9 | SSD-MobileNet, 4.1 | DEIMv2-femto, 3.9 | 106 | 205 |
|---|---|---|---|---|---|---|
| onnxruntime fp32 | 60 to 72 | 66 to 91 | 64 | 87 | 265 (434) | 463 (862) |
| OpenVINO fp32 | 112 (148) | 132 (183) | 158 (189) | 160 (211) | 289 (611) | 487 (1098) |
| OpenVINO bf16 | 153 to 212 | 190 | | | 241 | |

A first start, which measures engines, took 245 to 460 with the first two models for some seconds. That much
is not demanded here, because later starts need no more than the table says.
"""

from collections.abc import Callable
from pathlib import Path

from visionedge.config.schema import InferenceConfig
from visionedge.errors import UnavailableError
from visionedge.model.model import Model
from visionedge.model.quantization.variants import make_variant_path
from visionedge.runtime.process_limits import MemoryRoom, read_memory_room

_MIB = 2**20

_PROCESS_BYTES = 40 * _MIB
"""A process with onnxruntime and next to no model took 44 MiB."""

_BYTES_PER_WEIGHT_BYTE = 1.5
"""A session keeps the weights twice, as read and as laid out for its kernels; bf16 halves one of them."""

_BYTES_PER_WEIGHT_BYTE_INT8 = 0.5
"""For a model with an int8 variant, whose weights have a quarter of the bytes."""

_FLOAT_PICTURES = 2
"""Activations, in float32 pictures of the input's size: 4 were measured with YOLOX-nano, 6 with PicoDet-S."""

_EXTERNAL_SUFFIXES = (".data", "_data")
"""What exporters append to the name of the model for its external weights."""


def estimate_memory_bytes(model: Model, inference: InferenceConfig, data: Path | None = None) -> int:
    """The least memory of the host that an engine of this model takes; 0 on a remote device.

    `data` is the data folder, which may have an int8 variant.
    """
    if inference.device == "remote":
        return 0
    spec, batch = model.input, model.interpretation.input.batch or 1
    picture_bytes = 3 * spec.width_px * spec.height_px * 4
    factor = _BYTES_PER_WEIGHT_BYTE_INT8 if _may_be_int8(model, inference, data) else _BYTES_PER_WEIGHT_BYTE
    session_bytes = round(factor * _weight_bytes(model)) + _FLOAT_PICTURES * batch * picture_bytes
    return session_bytes + (_PROCESS_BYTES if inference.process else 0)


def check_fits(
    model: Model,
    inference: InferenceConfig,
    data: Path | None = None,
    *,
    read_room: Callable[[], MemoryRoom | None] = read_memory_room,
) -> None:
    """Refuse a model that does not fit beside what runs already. Call it when the engines before are open.

    An engine that a new one of the same camera is to replace runs on meanwhile, and counts, too.

    Raises:
        UnavailableError: it does not fit.
    """
    room, needed_bytes = read_room(), estimate_memory_bytes(model, inference, data)
    if room is None or needed_bytes <= room.left_bytes:
        return
    remedy = "raise the memory limit of this container" if room.is_limited else "add memory to this machine"
    raise UnavailableError(
        f"model {model.name} is not opened: it needs at least {-(-needed_bytes // _MIB)} MiB beside the other"
        f" models, and {room.left_bytes // _MIB} of {room.total_bytes // _MIB} MiB are left; {remedy}, or use"
        " fewer or smaller models"
    )


def _may_be_int8(model: Model, inference: InferenceConfig, data: Path | None) -> bool:
    if inference.precision in ("fp32", "bf16"):
        return False
    if inference.precision in ("int8", "fp16"):
        return True
    folders = (None,) if data is None else (None, data)
    return any(make_variant_path(model, "int8", data=folder).exists() for folder in folders)


def _weight_bytes(model: Model) -> int:
    """The size of the file, and of external weights beside it; 0 if it cannot be read."""
    names = (model.path.name, *(f"{model.path.name}{suffix}" for suffix in _EXTERNAL_SUFFIXES))
    size_bytes = 0
    for name in names:
        try:
            size_bytes += model.path.with_name(name).stat().st_size
        except OSError:
            continue
    return size_bytes
