"""How much memory a container of visionedge needs: one figure for doctor, lint and generate's limit."""

CPU_MEMORY_MIB = 768
"""On the CPU with the bundled model and four cameras, in MiB: 200 to 400 are used, the rest is for peaks.

`make image-test` runs the image with this limit.
"""

GPU_MEMORY_MIB = 4096
"""On a GPU, in MiB of the host's memory: CUDA and cuDNN take some GiB beside it (not measured)."""

MINIMUM_MIB = 300
"""With less the module does not start: 256 MiB ended with exit code 1 (CPU image, 2026-11-29)."""

MINIMUM_PIDS = 20
"""With less the module does not start: 10 failed, 20 started (CPU image, one camera, 2026-11-29)."""
