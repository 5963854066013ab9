"""`doctor --plan`: the way from bare Windows to the module in EFLOW, as lines to type.

`ops.eflow` knows what EFLOW supports; here are the steps. A line is for an elevated PowerShell, or a part of
a deployment; the names of cmdlets and parameters are those of deploy/eflow/cmdlets.json.
"""

from typing import Literal

from pydantic import Field

from visionedge.errors import ConfigError
from visionedge.ops.doctor.checks import Remedies, remedy
from visionedge.ops.doctor.remedies import (
    DISABLE_REQUIRE_ENV,
    GPU_NAME_COMMAND,
    MIN_CORES,
    MIN_INTEL_WINDOWS_DRIVER,
    MIN_MEMORY_MIB,
    OPENVINO_IMAGE,
)
from visionedge.ops.doctor.remedies import eflow_vm_command as in_vm
from visionedge.ops.doctor.wheel import MIN_WINDOWS_DRIVER
from visionedge.ops.eflow import (
    MIN_GPU_BUILD,
    SERVER_BUILDS,
    GpuFamily,
    PassthroughType,
    WindowsVersion,
    choose_passthrough,
    classify_gpu,
    read_gpu_name,
    read_windows,
)
from visionedge.ops.manifest.gpu_options import BY_HAND_OPTIONS, GPU_OPTIONS, to_compact_json
from visionedge.ops.support_dates import EFLOW_ARM64_VERSION, EFLOW_VERSION, TABLE_DATE, find_support
from visionedge.web.documents import JsonDocument

DATA_DISK_GB = 20
CPU_MEMORY_MIB = 4096

_PORT = 8080
_BLACKWELL_DRIVER = "570"
_RELEASES = "https://github.com/Azure/iotedge-eflow/releases"
_DNS_COMMAND = (
    "Set-EflowVmDNSServers -vendpointName (Get-EflowVmEndpoint).Name"
    " -dnsServers @((Get-DnsClientServerAddress -AddressFamily IPv4).ServerAddresses | Select-Object -Unique)"
)
_STATIC_ADDRESS = (
    ' -vswitchName "EFLOW" -vswitchType Internal'
    " -ip4Address 172.20.0.2 -ip4PrefixLength 24 -ip4GatewayAddress 172.20.0.1"
)
_SWITCH_COMMANDS = (
    'New-VMSwitch -Name "EFLOW" -SwitchType Internal',
    'New-NetIPAddress -IPAddress 172.20.0.1 -PrefixLength 24 -InterfaceAlias "vEthernet (EFLOW)"',
    'New-NetNat -Name "EFLOW" -InternalIPInterfaceAddressPrefix "172.20.0.0/24"',
)


class EflowPlan(JsonDocument):
    """Whether GPU passthrough is supported, which one, why, and what to type on Windows."""

    schema_: Literal["visionedge/doctor-plan/1"] = Field(alias="schema")
    windows: str
    gpu: str
    supported: bool
    cuda: bool
    passthrough: PassthroughType
    why: str
    steps: Remedies

    def to_text(self) -> str:
        """As text."""
        answer = f"supported: {self.passthrough}" if self.supported else "not supported"
        lines = [f"{self.gpu} on {self.windows}: {answer}", f"  {self.why}", ""]
        for number, step in enumerate(self.steps, 1):
            lines += [f"{number}. {step.instruction}", *(f"     {line}" for line in step.lines)]
        return "\n".join(lines).rstrip() + "\n"


def make_eflow_plan(build: str | None, edition: str | None, gpu: str | None) -> EflowPlan:
    """The plan for a Windows build ("19045" or "19044.1620"), an edition and a GPU.

    Raises:
        ConfigError: one of them is missing or not valid.
    """
    problems: list[str] = []
    windows, name = None, ""
    try:
        windows = read_windows(build, edition)
    except ConfigError as error:
        problems += error.problems
    try:
        name = read_gpu_name(gpu)
    except ConfigError as error:
        problems += error.problems
    if problems or windows is None:
        raise ConfigError(problems)
    return _plan(windows, name, classify_gpu(name))


def _plan(windows: WindowsVersion, gpu: str, family: GpuFamily) -> EflowPlan:
    no_eflow = windows.find_fault()
    fault = no_eflow or windows.find_gpu_fault(family)
    passthrough: PassthroughType = "none" if fault else choose_passthrough(family)
    if no_eflow:
        steps = _without_eflow()
    elif fault:
        steps = _alternatives(windows, family) + _common_steps(windows, _deploy_command(windows))
    else:
        gpu_options = f' -gpuPassthroughType {passthrough} -gpuCount 1 -gpuName "{gpu}"'
        steps = _check_build(windows) + _prepare_gpu(windows, family)
        steps += _common_steps(windows, _deploy_command(windows, MIN_MEMORY_MIB) + gpu_options, gpu=True)
        steps += _module_options(family, passthrough)
    if not no_eflow:
        steps += _run_doctor() + _reach_page() + _add_usb_camera()
    return EflowPlan(
        schema="visionedge/doctor-plan/1",
        windows=windows.name,
        gpu=gpu,
        supported=not fault,
        cuda=not fault and family != "intel",
        passthrough=passthrough,
        why=fault or _explain(family, passthrough),
        steps=steps,
    )


def _explain(family: GpuFamily, passthrough: PassthroughType) -> str:
    if family == "intel":
        return "GPU-PV is supported; an Intel GPU is not a CUDA device: OpenVINO computes (not seen on a GPU)"
    if passthrough == "DirectDeviceAssignment":
        return "DDA: the VM owns the GPU and uses its own Linux driver; Windows cannot use the GPU"
    return "GPU-PV: Windows and the VM share the GPU and the NVIDIA driver of Windows"


# --- what works instead -------------------------------------------------------------------------------------


def _without_eflow() -> Remedies:
    return remedy(
        "use Windows 10 or 11 Pro, Enterprise or IoT Enterprise, or Windows Server 2019 or 2022, for EFLOW"
    ) + remedy("or run the container without IoT Edge, in WSL 2 or on Linux (docs/docker.md)")


def _alternatives(windows: WindowsVersion, family: GpuFamily) -> Remedies:
    """What computes instead of a GPU that EFLOW does not pass through."""
    if family in ("graphics", "blackwell") and windows.is_server:
        other = "use this GPU on Windows 10 or 11 (Pro, Enterprise, IoT Enterprise), or with Linux instead of"
        return remedy(
            f"{other} Windows; on Windows Server use an NVIDIA T4 or A2. Without: the CPU, as below"
        )
    if family in ("graphics", "blackwell", "datacenter", "intel") and not windows.is_server:
        return remedy("after the update of Windows ask again; until then: the CPU, as below")
    return remedy("the CPU computes, as below; for a GPU use one that EFLOW supports")


# --- the steps ----------------------------------------------------------------------------------------------


def _check_build(windows: WindowsVersion) -> Remedies:
    if windows.is_server or windows.build != MIN_GPU_BUILD[0] or windows.revision is not None:
        return ()
    least = ".".join(map(str, MIN_GPU_BUILD))
    return remedy(f"check in winver that the build is {least} or newer, else update Windows")


def _prepare_gpu(windows: WindowsVersion, family: GpuFamily) -> Remedies:
    steps: Remedies = ()
    if family == "datacenter":
        if windows.build == SERVER_BUILDS["2019"] and windows.is_server:
            steps += remedy("all cumulative updates of Windows Server 2019 must be installed")
        return steps + remedy(
            "on Windows, install NVIDIA's device mitigation driver for T4 and A2 (recommended, for security)"
        )
    if family == "intel":
        steps += remedy(f"on Windows, install Intel's graphics driver {MIN_INTEL_WINDOWS_DRIVER} or newer")
    elif family == "blackwell":
        steps += remedy(
            f"on Windows, install NVIDIA's driver {_BLACKWELL_DRIVER} or newer, the first branch for RTX 50;"
            " install none in the VM. The first start also compiles kernels for this GPU (PTX)"
        )
    else:
        least = MIN_WINDOWS_DRIVER[12]
        steps += remedy(
            f"on Windows, install NVIDIA's driver {least} or newer (CUDA 12); install none in the VM"
        )
    if windows.is_windows_10:
        steps += remedy("Windows 10 also needs the libraries of WSL", "wsl --install")
    return steps


def _deploy_command(windows: WindowsVersion, memory_mib: int = CPU_MEMORY_MIB) -> str:
    network = _STATIC_ADDRESS if windows.is_server else ""
    return f"Deploy-Eflow -cpuCount {MIN_CORES} -memoryInMB {memory_mib} -vmDataSize {DATA_DISK_GB}{network}"


def _common_steps(windows: WindowsVersion, deploy: str, *, gpu: bool = False) -> Remedies:
    names = remedy("the GPU must have this name in Windows, else use that", GPU_NAME_COMMAND) if gpu else ()
    nested = " (EFLOW inside a VM cannot use a GPU)" if gpu else ""
    return (
        *_enable_hyper_v(windows),
        *_make_switch(windows),
        *_install_eflow(),
        *names,
        *remedy(f"deploy the VM{nested}", deploy),
        *_set_dns(windows),
        *remedy(
            "give the VM the identity of a device in IoT Hub (other ways: deploy/eflow/install.ps1)",
            "Provision-EflowVm -provisioningType ManualConnectionString"
            ' -devConnString (Read-Host "connection string of the device")',
        ),
    )


def _enable_hyper_v(windows: WindowsVersion) -> Remedies:
    if windows.is_server:
        line = "Install-WindowsFeature -Name Hyper-V -IncludeManagementTools -Restart"
        return remedy("in an elevated PowerShell (all following lines too), add the Hyper-V role", line)
    line = "Enable-WindowsOptionalFeature -Online -FeatureName Microsoft-Hyper-V -All"
    return remedy("in an elevated PowerShell (all following lines too), enable Hyper-V and restart", line)


def _make_switch(windows: WindowsVersion) -> Remedies:
    """On Windows 10 and 11 Hyper-V has a Default Switch with DHCP, NAT and DNS."""
    if not windows.is_server:
        return ()
    return remedy(
        "Windows Server has no Default Switch: make an internal one with NAT (choose a free network)",
        *_SWITCH_COMMANDS,
    )


def _install_eflow() -> Remedies:
    ended = find_support("EFLOW", EFLOW_ARM64_VERSION)
    until = f"; 1.5 {ended.describe()}, ARM64 has no newer one" if ended else f" (as of {TABLE_DATE})"
    return remedy(
        f"download EFLOW {EFLOW_VERSION} for X64 as AzureIoTEdge.msi to this folder from {_RELEASES}{until}",
        "Set-ExecutionPolicy -ExecutionPolicy AllSigned -Force",
        'Start-Process -Wait -FilePath msiexec -ArgumentList "/i","AzureIoTEdge.msi","/qn"',
    )


def _set_dns(windows: WindowsVersion) -> Remedies:
    check = in_vm("resolvectl query mcr.microsoft.com")
    if windows.is_server:
        first = remedy(
            "with a static address the VM has no DNS: give it that of Windows", _DNS_COMMAND, check
        )
    else:
        first = remedy("check that the VM can resolve names", check)
        first += remedy("if it cannot, give it the DNS servers of Windows", _DNS_COMMAND)
    return first + remedy(
        "if a container cannot resolve names though the VM can: its createOptions, with your DNS server",
        to_compact_json({"HostConfig": {"Dns": ["192.0.2.53"]}}),
    )


def _module_options(family: GpuFamily, passthrough: PassthroughType) -> Remedies:
    if family == "intel":
        image = remedy("build the CPU image with OpenVINO and Intel's OpenCL driver", OPENVINO_IMAGE)
        instruction = "the module's createOptions (manifest generate --device openvino-gpu)"
        return image + remedy(instruction, to_compact_json(BY_HAND_OPTIONS))
    steps = remedy("the module's createOptions", to_compact_json(GPU_OPTIONS))
    if passthrough == "ParaVirtualization":
        steps += remedy("and its env, for images that set NVIDIA_REQUIRE_CUDA", DISABLE_REQUIRE_ENV)
    return steps


def _reach_page() -> Remedies:
    return remedy(
        f"to open the page from Windows, publish its port (manifest generate --http 0.0.0.0:{_PORT}); open"
        f" http://ADDRESS:{_PORT}/ with the VM's address and the token",
        "Get-EflowVmAddr",
        in_vm("sudo docker exec vision visionedge token"),
    ) + remedy(
        "if the VM's firewall drops it (a published port should pass; not seen), until the VM restarts",
        in_vm(f"sudo iptables -A INPUT -p tcp --dport {_PORT} -j ACCEPT"),
    )


def _add_usb_camera() -> Remedies:
    return remedy(
        "a USB camera: serve it as RTSP on Windows (Microsoft's sample camera-over-rtsp), or attach it by"
        " usbipd-win after each start of the VM (docs/eflow.md)"
    )


def _run_doctor() -> Remedies:
    return remedy(
        "deploy the module (docs/eflow.md), then check it from inside",
        in_vm("sudo docker exec vision visionedge doctor"),
    )
