"""How much memory a container of visionedge needs: one figure for doctor, lint and generate's limit."""

CPU_MEMORY_MIB = 768
"""On the CPU with the bundled model and four cameras, in MiB: 200 to 400 are used, the rest is for peaks.

`make image-test` runs the image with this limit.
"""

GPU_MEMORY_MIB = 4096
"""On a GPU, in MiB of the host's memory: CUDA and cuDNN take some GiB beside it (not measured)."""

MORE_MODEL_MIB = 256
"""For each model beside the first, in MiB: its engine is a process of its own.

Private memory of engine processes of YOLOX-nano and PicoDet-S (2 cores, 2026-11-30): 60 to 140 with
onnxruntime, 110 to 210 with OpenVINO; at the first start, which measures, 245 to 460 for some seconds. Not
measured on a GPU.
"""

MINIMUM_MIB = 300
"""With less the module does not start: 256 MiB ended with exit code 1 (CPU image, 2026-11-29)."""

MINIMUM_PIDS = 20
"""With less the module does not start: 10 failed, 20 started (CPU image, one camera, 2026-11-29)."""


def recommend_memory_mib(*, gpu: bool, more_models: int = 0) -> int:
    """The limit of memory for a container in MiB; `more_models` are those beside the first."""
    return (GPU_MEMORY_MIB if gpu else CPU_MEMORY_MIB) + more_models * MORE_MODEL_MIB
