"""The installed onnxruntime: its CUDA version, its supported GPUs, and the libraries that it needs.

`read_wheel` reads package metadata and the names of files; nothing is loaded.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from visionedge.ops.doctor.host import Host

_FOLDER = "onnxruntime/capi"
_PROVIDER = "libonnxruntime_providers_cuda.so"
_BUILD_INFO = re.compile(r"^(\w+) = '([^']*)'", re.MULTILINE)
_ONNXRUNTIME_NAME = re.compile(r"onnxruntime(-gpu|-openvino|-rocm|-training|-directml|-qnn)?")
_TENSORRT = ("libnvinfer.so.10", "libnvonnxparser.so.10")

# The libraries that the providers of CUDA 12 and 13 load, in the loader's order.
_LIBRARIES = {
    12: ("libcublasLt.so.12", "libcublas.so.12", "libcurand.so.10", "libcufft.so.11", "libcudart.so.12"),
    13: ("libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcufft.so.12", "libcudart.so.13"),
}
_CUDNN = "libcudnn.so.9"
# The published wheels have machine code for these compute capabilities, and PTX for newer GPUs.
_FIRST_CUDA_13 = (1, 27)
_SASS = {12: (60, 70, 75, 80, 86, 90), 13: (75, 80, 86, 89, 90, 120)}
_PTX: dict[int, tuple[int, ...]] = {12: (90,), 13: ()}

MIN_DRIVER = {12: "525.60.13", 13: "580"}
"""On Linux, by CUDA version."""
MIN_WINDOWS_DRIVER = {12: "527.41", 13: "580"}
"""On Windows (GPU-PV), by CUDA version."""

# Read from the machine code of cuDNN 9.10.2 and 9.28.0 for CUDA 12.
_CUDNN_SASS = (50, 60, 61, 70, 75, 80, 86, 90, 100, 120)
_CUDNN_WITHOUT_VOLTA = 91100


@dataclass(frozen=True, slots=True)
class OnnxruntimeWheel:
    """The installed onnxruntime; `cuda` is its major CUDA version, 0 without CUDA.

    `others`: packages that share its folder. `has_provider`: the file of the CUDA provider exists. `folders`:
    those of libraries installed as packages, searched before the system's.
    """

    package: str
    version: str
    others: tuple[str, ...]
    cuda: int
    has_provider: bool = False
    sass: tuple[int, ...] = ()
    ptx: tuple[int, ...] = ()
    needed: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Package and version: ``onnxruntime-gpu 1.26.0``."""
        return f"{self.package} {self.version}" if self.package else "no onnxruntime"

    def supports(self, capability: int) -> bool:
        """Whether its kernels run on a device of this compute capability (75 for 7.5)."""
        return sass_supports(capability, self.sass) or any(capability >= least for least in self.ptx)


def sass_supports(capability: int, sass: tuple[int, ...]) -> bool:
    """Machine code runs on GPUs of the same major capability and of the same or a newer minor one."""
    return any(code // 10 == capability // 10 and code <= capability for code in sass)


def cudnn_sass(version: int, cuda: int) -> tuple[int, ...]:
    """The capabilities for which a cuDNN 9 of this `cudnnGetVersion` has kernels; CUDA 13: from 7.5 on."""
    from_turing = cuda > 12 or version >= _CUDNN_WITHOUT_VOLTA
    return tuple(code for code in _CUDNN_SASS if code >= 75 or not from_turing)


def format_capability(capability: int) -> str:
    """A compute capability as NVIDIA writes it: ``7.5`` for 75."""
    return f"{capability // 10}.{capability % 10}"


def read_wheel(host: Host, *, tensorrt: bool = False) -> OnnxruntimeWheel:
    """The installed onnxruntime; with `tensorrt` it needs TensorRT's libraries too."""
    installed = sorted(name for name in host.packages if _ONNXRUNTIME_NAME.fullmatch(name))
    # With two packages in the folder, its own file names the one that was installed last.
    stated = dict(_BUILD_INFO.findall(host.text(host.site / _FOLDER / "build_and_package_info.py")))
    package = stated.get("package_name") or (installed[-1] if installed else "")
    if not package:
        return OnnxruntimeWheel("", "", (), 0)
    version = stated.get("__version__") or host.packages[package]
    others = tuple(name for name in installed if name != package)
    provider = host.site / _FOLDER / _PROVIDER
    is_there = host.exists(provider)
    if package == "onnxruntime" or not (is_there or package == "onnxruntime-gpu"):
        return OnnxruntimeWheel(package, version, others, 0)
    cuda = _cuda(stated.get("cuda_version", ""), version)
    folders = [host.site / "nvidia" / name / "lib" for name in host.names(host.site / "nvidia")]
    return OnnxruntimeWheel(
        package=package,
        version=version,
        others=others,
        cuda=cuda,
        has_provider=is_there,
        sass=_SASS[cuda],
        ptx=_PTX[cuda],
        needed=(*_LIBRARIES[cuda], _CUDNN, *(_TENSORRT if tensorrt else ())),
        folders=tuple(folder for folder in folders if host.exists(folder)),
    )


def _cuda(stated: str, version: str) -> int:
    """The CUDA version of the provider: as stated, else from the wheel's version."""
    if (major := stated.split(".", maxsplit=1)[0]) in ("12", "13"):
        return int(major)
    number = re.match(r"(\d+)\.(\d+)", version)
    newer = number is not None and (int(number[1]), int(number[2])) >= _FIRST_CUDA_13
    return 13 if newer else 12
