"""Fake hosts for doctor: a root folder with files, and recorded answers of probes."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from visionedge.engine.device.devices import PROVIDERS, ProbeOutput
from visionedge.ops.doctor.host import DiskSpace, Host, ProbeResult

NOW = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)
SITE = Path("/opt/visionedge/site-packages")
DATA = Path("/data")
_CAPI = SITE / "onnxruntime" / "capi"
INTEL_OPENCL = "/usr/lib/x86_64-linux-gnu/intel-opencl/libigdrcl.so"
_MIB, _GIB = 2**20, 2**30

VERSIONS_12 = {
    "libcublasLt.so.12": 120903,
    "libcublas.so.12": 120903,
    "libcurand.so.10": 10310,
    "libcufft.so.11": 11401,
    "libcudart.so.12": 12090,
    "libcudnn.so.9": 91002,
}
VERSIONS_13 = {
    "libcublasLt.so.13": 130100,
    "libcublas.so.13": 130100,
    "libcurand.so.10": 10400,
    "libcufft.so.12": 12000,
    "libcudart.so.13": 13000,
    "libcudnn.so.9": 92800,
}
EDGE = {
    "IOTEDGE_IOTHUBHOSTNAME": "hub.example.net",
    "IOTEDGE_DEVICEID": "line-4",
    "IOTEDGE_MODULEID": "vision",
    "IOTEDGE_GATEWAYHOSTNAME": "gateway",
    "IOTEDGE_MODULEGENERATIONID": "1",
    "IOTEDGE_WORKLOADURI": "unix:///var/run/iotedge/workload.sock",
    "IOTEDGE_APIVERSION": "2022-08-03",
}


def missing(library: str) -> str:
    """The loader's error for a missing library."""
    return f"{library}: cannot open shared object file: No such file or directory"


def cuda_failure(number: int, text: str) -> str:
    """The error text of the CUDA provider."""
    return (
        "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:122 onnxruntime::CudaCall "
        f"CUDA failure {number}: {text} ; GPU=0 ; hostname=vm ; expr=cudaSetDevice(device_id_);"
    )


@dataclass
class HostBuilder:
    """Builds a `Host`; every method adds to it and returns it."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=lambda: {"numpy": "2.4.6"})
    uid: int = 1000
    cores: int = 4
    cpu_quota: float | None = None
    refused: dict[str, str] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    missing_libraries: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    driver_steps: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"library": {"error": missing("libcuda.so.1")}}
    )
    driver_end: tuple[str, str] = ("fine", "")
    session: ProbeOutput | None = None
    placement: dict[str, Any] | None = None
    openvino_steps: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            "level-zero": {"error": missing("libze_intel_gpu.so.1")},
            "opencl": {"error": missing("libOpenCL.so.1"), "path": ""},
            "loading": {},
            "drivers": {"drivers": []},
        }
    )
    openvino_end: tuple[str, str] = ("fine", "")
    openvino_session: ProbeOutput | None = None
    network: dict[str, dict[str, Any]] = field(default_factory=dict)
    synchronised: bool = True
    free: DiskSpace | None = field(default_factory=lambda: DiskSpace(40 * _GIB, 30 * _GIB))
    asked: list[str] = field(default_factory=list)

    def file(self, path: str | Path, text: str = "") -> "HostBuilder":
        """A file with a text."""
        place = self.root / str(path).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return self

    def memory(self, total_mib: int = 7960, available_mib: int = 6200) -> "HostBuilder":
        """Main memory."""
        total, available = total_mib * 1024, available_mib * 1024
        return self.file("/proc/meminfo", f"MemTotal:  {total} kB\nMemAvailable:  {available} kB\n")

    # --- where it is ----------------------------------------------------------------------------------------

    def kernel(self, release: str) -> "HostBuilder":
        """The kernel."""
        self.file("/proc/sys/kernel/osrelease", f"{release}\n")
        return self.file("/proc/version", f"Linux version {release} (gcc)\n")

    def eflow(self) -> "HostBuilder":
        """The VM of EFLOW."""
        self.file("/sys/class/dmi/id/sys_vendor", "Microsoft Corporation\n")
        self.file("/sys/class/dmi/id/product_name", "Virtual Machine\n")
        return self.kernel("6.6.96.2-2.azl3")

    def wsl(self) -> "HostBuilder":
        """WSL 2."""
        return self.kernel("5.15.153.1-microsoft-standard-WSL2")

    def container(self) -> "HostBuilder":
        """Inside a container, as the user of our images."""
        self.uid = 10001
        return self.file("/.dockerenv")

    def module(self) -> "HostBuilder":
        """Inside a container of IoT Edge."""
        self.environ |= EDGE
        self.network |= {
            "resolve:gateway": {"addresses": ["172.18.0.2"]},
            "date": {"date": "Sun, 22 Nov 2026 09:59:58 GMT"},
        }
        socket = self.root / "var/run/iotedge/workload.sock"
        socket.parent.mkdir(parents=True)
        os.mknod(socket, stat.S_IFSOCK | 0o666)
        return self.container()

    # --- its GPU --------------------------------------------------------------------------------------------

    def nvidia_nodes(self, *names: str) -> "HostBuilder":
        """The device nodes of the Linux driver."""
        for name in names or ("nvidia0", "nvidiactl", "nvidia-uvm"):
            self.file(f"/dev/{name}")
        return self

    def kernel_driver(self, version: str = "550.144.03") -> "HostBuilder":
        """The kernel module of the driver, which containers see too."""
        return self.file("/sys/module/nvidia/version", f"{version}\n")

    def on_pci(self, vendor: str = "0x10de") -> "HostBuilder":
        """A display controller on the PCI bus."""
        folder = "/sys/bus/pci/devices/0000:01:00.0"
        return self.file(f"{folder}/vendor", f"{vendor}\n").file(f"{folder}/class", "0x030000\n")

    def dxg(self, *libraries: str, store: str = "nv_dispi.inf_amd64_1", dmal: bool = True) -> "HostBuilder":
        """GPU-PV with the libraries of Windows; with "-" none are visible."""
        self.file("/dev/dxg").file("/proc/misc", "126 dxg\n")
        if libraries == ("-",):
            return self
        for name in libraries or ("libcuda.so.1", "libdxcore.so", "nvidia-smi"):
            self.file(f"/usr/lib/wsl/lib/{name}")
        for name in ("libcuda.so.1.1", *(["libnvdxgdmal.so.1"] if dmal else [])):
            self.file(f"/usr/lib/wsl/drivers/{store}/{name}")
        return self

    def driver(
        self,
        name: str = "NVIDIA T4",
        capability: int = 75,
        *,
        cuda: int = 12040,
        version: str = "550.144.03",
        path: str = "/usr/lib/x86_64-linux-gnu/libcuda.so.550.144.03",
        free_mib: int = 14000,
    ) -> "HostBuilder":
        """A working driver with one device."""
        total = 15 * _GIB
        self.driver_steps = {
            "library": {"path": path},
            "version": {"cuda": cuda},
            "management": {"driver": version},
            "starting": {},
            "init": {"code": 0, "name": "CUDA_SUCCESS"},
            "devices": {"devices": [{"name": name, "capability": capability, "totalBytes": total}]},
            "memory": {"code": 0, "freeBytes": free_mib * _MIB, "totalBytes": total},
        }
        return self

    def init_fails(self, code: int, name: str) -> "HostBuilder":
        """cuInit returns an error."""
        for step in ("devices", "memory"):
            self.driver_steps.pop(step, None)
        self.driver_steps["init"] = {"code": code, "name": name}
        return self

    def driver_ends(self, how: str, words: str, *, after: str = "starting") -> "HostBuilder":
        """The child that probes the driver hangs ("late") or dies after a step."""
        steps = list(self.driver_steps)
        for step in steps[steps.index(after) + 1 :]:
            del self.driver_steps[step]
        self.driver_end = (how, words)
        return self

    # --- an Intel GPU, and OpenVINO -------------------------------------------------------------------------

    def render_node(
        self, vendor: str = "0x8086", name: str = "renderD128", *, here: bool = True
    ) -> "HostBuilder":
        """A GPU with a render node, which is in /dev unless it is not `here`."""
        self.file(f"/sys/class/drm/{name}/device/vendor", f"{vendor}\n")
        return self.file(f"/dev/dri/{name}") if here else self

    def intel_dxg(self, *libraries: str) -> "HostBuilder":
        """GPU-PV with the graphics driver of Intel on Windows."""
        return self.dxg(*(libraries or ("libdxcore.so", "libd3d12.so")), store="iigd_dch.inf_amd64_1")

    def opencl(self, *, level_zero: bool = False, error: str | None = None) -> "HostBuilder":
        """The OpenCL loader and Intel's driver; `error`: why the loader of libraries refuses the driver."""
        icd = {"icd": "/etc/OpenCL/vendors/intel.icd", "library": INTEL_OPENCL, "error": error}
        self.openvino_steps["opencl"] = {
            "error": None,
            "path": "/usr/lib/x86_64-linux-gnu/libOpenCL.so.1.0.0",
        }
        self.openvino_steps["drivers"] = {"drivers": [icd]}
        return self.level_zero() if level_zero else self

    def level_zero(self) -> "HostBuilder":
        """Intel's driver for Level Zero."""
        self.openvino_steps["level-zero"] = {"error": None}
        return self

    def opencl_loader_only(self, *drivers: str) -> "HostBuilder":
        """The OpenCL loader, with drivers of others."""
        self.opencl()
        found = [
            {"icd": f"/etc/OpenCL/vendors/{n}.icd", "library": f"lib{n}.so.2", "error": None} for n in drivers
        ]
        self.openvino_steps["drivers"] = {"drivers": found}
        return self

    def openvino(self, **devices: str) -> "HostBuilder":
        """The package openvino, which lists the CPU and these devices."""
        self.packages["openvino"] = "2026.4.1"
        self.openvino_steps |= {"starting": {}, "devices": {"devices": {"CPU": "a CPU", **devices}}}
        return self

    def openvino_ends(self, how: str, words: str, *, after: str = "starting") -> "HostBuilder":
        """The child that probes OpenVINO hangs ("late") or dies after a step."""
        steps = list(self.openvino_steps)
        for step in steps[steps.index(after) + 1 :]:
            del self.openvino_steps[step]
        self.openvino_end = (how, words)
        self.openvino_session = ProbeOutput(None if how == "late" else -11, "", "")
        return self

    def openvino_fails(self, words: str) -> "HostBuilder":
        """A first inference on the GPU fails with an error."""
        self.openvino_session = ProbeOutput(0, json.dumps({"providers": [], "error": words}), "")
        return self

    # --- its onnxruntime ------------------------------------------------------------------------------------

    def cpu_wheel(self, version: str = "1.31.1") -> "HostBuilder":
        """onnxruntime."""
        self.packages["onnxruntime"] = version
        return self._owner("onnxruntime", version, "")

    def gpu_wheel(self, version: str = "1.26.0", cuda: str = "12.8") -> "HostBuilder":
        """onnxruntime-gpu, with all of its libraries."""
        self.packages["onnxruntime-gpu"] = version
        self.versions = dict(VERSIONS_12 if cuda.startswith("12") else VERSIONS_13)
        self.file(_CAPI / "libonnxruntime_providers_cuda.so")
        return self._owner("onnxruntime-gpu", version, cuda)

    def _owner(self, package: str, version: str, cuda: str) -> "HostBuilder":
        lines = [f"package_name = '{package}'", f"__version__ = '{version}'"]
        self.file(
            _CAPI / "build_and_package_info.py",
            "\n".join([*lines, *([f"cuda_version = '{cuda}'"] if cuda else [])]),
        )
        first = SITE / "onnxruntime" / "__init__.py"
        self.file(first)
        installed = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
        os.utime(self.root / str(first).lstrip("/"), (installed, installed))
        return self

    def without_libraries(self, *libraries: str) -> "HostBuilder":
        """The loader does not find these libraries; the session fails at the first one."""
        self.missing_libraries |= {name: missing(name) for name in libraries}
        return self.session_fails(
            f"Failed to load library /x.so with error: {missing(libraries[0])}", silently=True
        )

    def session_works(self, *on_cpu: str, nodes: int = 212) -> "HostBuilder":
        """A first session computes on the GPU, as do all nodes of the model except `on_cpu`."""
        document = {"providers": [PROVIDERS["cuda"], PROVIDERS["cpu"]], "error": ""}
        self.session = ProbeOutput(0, json.dumps(document), "")
        self.placement = {"device": "cuda", "onDevice": nodes, "onCpu": list(on_cpu)}
        return self

    def session_fails(self, words: str, *, silently: bool = False) -> "HostBuilder":
        """A first session fails with an error, or with `silently` only with a text on stderr."""
        document = {"providers": [PROVIDERS["cpu"]] if silently else [], "error": "" if silently else words}
        self.session = ProbeOutput(0, json.dumps(document), words if silently else "")
        return self

    # --- the host of doctor ---------------------------------------------------------------------------------

    def host(self) -> Host:
        """The finished host."""
        return Host(
            root=self.root,
            environ=self.environ,
            packages=self.packages,
            site=SITE,
            system="Linux x86_64, Python 3.12.8",
            cores=self.cores,
            cpu_quota=self.cpu_quota,
            uid=self.uid,
            probe=self._ask,
            session=self._session,
            space=lambda _path: self.free,
            access=lambda path, _mode: f"/{path.relative_to(self.root)}" not in self.denied,
            utc_now=lambda: NOW,
        )

    def _session(self, provider: str, _limit_s: float) -> ProbeOutput:
        self.asked.append(f"session {provider}")
        if provider not in PROVIDERS.values() or provider == PROVIDERS.get("openvino-gpu"):
            working = ProbeOutput(0, json.dumps({"providers": [provider], "error": ""}), "")
            return self.openvino_session or working
        assert self.session is not None, "the test defines no session result"
        if provider == PROVIDERS["tensorrt"]:
            return ProbeOutput(
                0, json.dumps({"providers": [], "error": "Please install TensorRT libraries"}), ""
            )
        return self.session

    def _ask(self, question: str, arguments: dict[str, Any], _limit_s: float) -> ProbeResult:
        self.asked.append(question)
        answers: dict[str, Callable[[dict[str, Any]], ProbeResult]] = {
            "driver": self._driver,
            "libraries": self._libraries,
            "openvino": self._openvino,
            "network": self._network,
            "clock": lambda _: ProbeResult({"kernel": {"synchronised": self.synchronised, "errorMs": 12.0}}),
            "placement": lambda _: ProbeResult({"placement": self.placement} if self.placement else {}),
        }
        return answers[question](arguments)

    def _driver(self, arguments: dict[str, Any]) -> ProbeResult:
        errors = {node: self.refused.get(node) for node in arguments["nodes"]}
        how, words = self.driver_end
        return ProbeResult({"open": {"errors": errors}, **self.driver_steps}, how, words)  # type: ignore[arg-type]  # of the closed list

    def _openvino(self, arguments: dict[str, Any]) -> ProbeResult:
        errors = {node: self.refused.get(node) for node in arguments["nodes"]}
        how, words = self.openvino_end
        assert arguments["installed"] == ("openvino" in self.packages)
        return ProbeResult({"open": {"errors": errors}, **self.openvino_steps}, how, words)  # type: ignore[arg-type]  # of the closed list

    def _libraries(self, arguments: dict[str, Any]) -> ProbeResult:
        steps: dict[str, dict[str, Any]] = {}
        for name in arguments["names"]:
            if name in self.missing_libraries:
                steps[name] = {"error": self.missing_libraries[name]}
            elif name in self.versions:
                steps[name] = {"path": f"/lib/{name}", "version": self.versions[name]}
        return ProbeResult(steps)

    def _network(self, arguments: dict[str, Any]) -> ProbeResult:
        asked = [
            *(f"resolve:{n}" for n in arguments["resolve"]),
            *(f"reach:{n}" for n in arguments["reach"]),
            "date",
        ]
        known = {step: self.network[step] for step in asked if step in self.network}
        return ProbeResult(
            known, "fine" if len(known) == len(asked) else "late", "" if known else "no answer within 3 s"
        )


def linux(root: Path) -> HostBuilder:
    """A Linux machine without GPU, container and packages."""
    (root / "data").mkdir(parents=True)
    return HostBuilder(root).kernel("6.12.9-amd64").memory()
