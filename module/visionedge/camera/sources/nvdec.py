"""NVIDIA's video decoder through PyAV: whether there is one, asked once."""

import logging
from functools import lru_cache

import av
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.error import FFmpegError

log = logging.getLogger(__name__)

# One CUDA context for all cameras: each of its own would cost hundreds of megabytes.
_OPTIONS: dict[str, object] = {"primary_ctx": "1"}


@lru_cache(maxsize=1)
def hardware() -> HWAccel | None:
    """What `av.open` takes to decode on the GPU; None where this machine or this PyAV has none.

    A stream that the GPU cannot decode goes to the CPU by itself.
    """
    if "cuda" not in hwdevices_available():
        return None
    wanted = HWAccel("cuda", allow_software_fallback=True, options=_OPTIONS)
    try:
        wanted.create(av.Codec("h264", "r"))
    except (FFmpegError, RuntimeError, NotImplementedError) as error:
        log.debug("videos are decoded on the CPU: the GPU's decoder is not usable (%s)", error)
        return None
    return wanted
