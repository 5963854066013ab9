"""`visionedge manifest eflow`: a file with which Microsoft's eflowAutoDeploy installs EFLOW.

The keys are those of its template (Azure/iotedge-eflow, eflowautodeploy/eflow-userconfig-template.json,
2022-08-29), the rules those of its script (eflowAutoDeploy.ps1, 2022-08-31) and of EFLOW.
"""

import ipaddress
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from visionedge.errors import ConfigError
from visionedge.ops.eflow import (
    DATA_SIZES_GB,
    DISK_SIZES_GB,
    MIN_MEMORY_MB,
    PassthroughType,
    classify_gpu,
    find_passthrough_fault,
    read_gpu_name,
    show_in_one_line,
)

ProvisioningType = Literal[
    "ManualConnectionString", "ManualX509", "DpsTPM", "DpsX509", "DpsSymmetricKey", "none"
]
SwitchType = Literal["default", "internal", "external"]

PROVISIONING_KEYS: dict[ProvisioningType, tuple[str, ...]] = {
    "ManualConnectionString": ("devConnString",),
    "ManualX509": ("iotHubHostname", "deviceId", "identityCertPath", "identityPrivKeyPath"),
    "DpsTPM": ("scopeId",),
    "DpsX509": ("scopeId", "identityCertPath", "identityPrivKeyPath"),
    "DpsSymmetricKey": ("scopeId", "symmKey", "registrationId"),
    "none": (),
}
"""What each way of provisioning needs, besides an optional globalEndpoint."""
SECRET_KEYS = ("devConnString", "symmKey")
OPTIONS = {
    "scopeId": "--scope-id",
    "registrationId": "--registration-id",
    "globalEndpoint": "--global-endpoint",
    "iotHubHostname": "--hub",
    "deviceId": "--device-id",
    "identityCertPath": "--certificate",
    "identityPrivKeyPath": "--private-key",
    "devConnString": "--secret-env or --secret-file",
    "symmKey": "--secret-env or --secret-file",
}
"""The option that gives each key, for errors."""

# The script knows no newer name. With this one it accepts vmDataSize; eflowProductUrl decides.
_PRODUCT = "Azure IoT Edge 1.4 LTS X64"
_INTERNAL_PREFIX = 24
_MAX_CORES = 240
_MAX_MEMORY_MB = 12 * 2**20
_WINDOWS_FILE = re.compile(r"[A-Za-z]:\\[^\x00-\x1f\"<>|?*]+")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_PLAIN = {
    "scopeId": (re.compile(r"0ne[0-9A-Fa-f]{8}"), "write the ID scope, such as 0ne00A0A0A0"),
    "iotHubHostname": (_HOST, "write a host name, such as HUB.azure-devices.net"),
    "globalEndpoint": (re.compile(r"https://\S+"), "write an https address"),
    "identityCertPath": (_WINDOWS_FILE, r"write a path on Windows, such as C:\certs\device.pem"),
    "identityPrivKeyPath": (_WINDOWS_FILE, r"write a path on Windows, such as C:\certs\device.key.pem"),
    "deviceId": (re.compile(r"[A-Za-z0-9\-:.+%_#*?!(),=@;$']{1,128}"), "write the device's id in IoT Hub"),
    "registrationId": (re.compile(r"[A-Za-z0-9\-._:]{1,128}"), "write the registration's id in DPS"),
}


@dataclass(frozen=True, slots=True)
class EflowRequest:
    """The content of the file. Addresses are texts, sizes are in GB, memory is in MB.

    `server`: for Windows Server. `data_gb` and `disk_gb`: one of them at most; neither: EFLOW's default.
    `provisioning`: the keys of the file and their values; empty values are left out.
    """

    msi_url: str
    server: bool
    accept_eula: bool
    optional_telemetry: bool = False
    switch: SwitchType = "default"
    switch_name: str = ""
    adapter: str = ""
    address: str = ""
    gateway: str = ""
    prefix_length: int = _INTERNAL_PREFIX
    dns: tuple[str, ...] = ()
    cores: int = 4
    memory_mb: int = 8192
    data_gb: int | None = 20
    disk_gb: int | None = None
    passthrough: PassthroughType = "none"
    gpu: str = ""
    provisioning_type: ProvisioningType = "none"
    provisioning: tuple[tuple[str, str], ...] = ()


def make_eflow_config(request: EflowRequest) -> str:
    """The file as text.

    Raises:
        ConfigError: values are missing, not valid, or do not fit together; all of them are named.
    """
    problems = [
        *_install_problems(request),
        *_network_problems(request),
        *_vm_problems(request),
        *_provisioning_problems(request),
    ]
    if problems:
        raise ConfigError(problems)
    document: dict[str, Any] = {
        "schemaVersion": "1.1",
        "version": "1.0",
        "eflowProduct": _PRODUCT,
        "eflowProductUrl": request.msi_url,
        "enduser": {
            "acceptEula": "Yes",
            "acceptOptionalTelemetry": "Yes" if request.optional_telemetry else "No",
        },
        "network": _network(request),
        "vmConfig": _vm(request),
        "vmFeature": {"DpsTpm": request.provisioning_type == "DpsTPM", "Defender": False},
        "eflowProvisioning": _provisioning(request),
    }
    return json.dumps({key: value for key, value in document.items() if value}, indent=2) + "\n"


# --- the parts ----------------------------------------------------------------------------------------------


def _network(request: EflowRequest) -> dict[str, Any]:
    part: dict[str, Any] = {}
    if request.switch != "default":
        part |= {"vswitchName": request.switch_name, "vswitchType": request.switch.capitalize()}
    if request.switch == "external":
        part["adapterName"] = request.adapter
    if request.address:
        part |= {
            "ip4Address": request.address,
            "ip4GatewayAddress": request.gateway,
            "ip4PrefixLength": request.prefix_length,
        }
    if request.dns:
        part["dnsServers"] = list(request.dns)
    return part


def _vm(request: EflowRequest) -> dict[str, Any]:
    part: dict[str, Any] = {"cpuCount": request.cores, "memoryInMB": request.memory_mb}
    if request.disk_gb is not None:
        part["vmDiskSize"] = request.disk_gb
    elif request.data_gb is not None:
        part["vmDataSize"] = request.data_gb
    if request.passthrough != "none":
        part |= {"gpuPassthroughType": request.passthrough, "gpuName": request.gpu.strip(), "gpuCount": 1}
    return part


def _provisioning(request: EflowRequest) -> dict[str, str]:
    if request.provisioning_type == "none":
        return {}
    values = {key: value for key, value in request.provisioning if value}
    return {"provisioningType": request.provisioning_type, **values}


# --- the checks ---------------------------------------------------------------------------------------------


def _install_problems(request: EflowRequest) -> list[str]:
    problems = []
    if not request.accept_eula:
        problems.append("--accept-eula: Microsoft's script installs only with the licence of EFLOW accepted")
    if not re.fullmatch(r"https://[^\s/]+/\S+", request.msi_url):
        problems.append(
            "--msi-url: write the https address of EFLOW's MSI; without it EFLOW 1.4 is installed"
        )
    return problems


def _network_problems(request: EflowRequest) -> list[str]:
    problems = []
    if request.server and request.switch == "default":
        problems.append("--switch: Windows Server has no Default Switch; write internal or external")
    if not request.server and request.switch == "internal":
        problems.append("--switch: internal is for Windows Server only; write default or external")
    if request.switch != "default" and not re.fullmatch(r"[\w .()-]{1,64}", request.switch_name):
        problems.append("--switch-name: write a name of letters, digits, spaces, '-', '_', '.' and brackets")
    if (request.switch == "external") is not bool(request.adapter):
        problems.append("--adapter: name the network adapter with --switch external, and only then")
    return problems + _address_problems(request)


def _address_problems(request: EflowRequest) -> list[str]:
    problems = []
    for option, text in (("--address", request.address), ("--gateway", request.gateway)):
        if text and not _is_address(text):
            problems.append(f"{option}: '{text}' is not an IPv4 address")
    problems += [f"--dns: '{text}' is not an IPv4 address" for text in request.dns if not _is_address(text)]
    if bool(request.address) is not bool(request.gateway):
        problems.append("--address and --gateway: give both, or neither for DHCP")
    if problems or not request.address:
        return problems
    if request.switch == "default":
        return ["--address: the Default Switch has DHCP only"]
    if request.switch == "internal" and request.prefix_length != _INTERNAL_PREFIX:
        return [f"--prefix-length: Microsoft's script makes a network of {_INTERNAL_PREFIX} bits"]
    if not 8 <= request.prefix_length <= 30:
        return ["--prefix-length: write 8 to 30"]
    return _subnet_problems(request)


def _subnet_problems(request: EflowRequest) -> list[str]:
    network = ipaddress.ip_network(f"{request.gateway}/{request.prefix_length}", strict=False)
    address, gateway = map(ipaddress.ip_address, (request.address, request.gateway))
    if address == gateway:
        return ["--address: is the address of the gateway"]
    # The script compares the first 24 bits, whatever the prefix length is.
    narrow = ipaddress.ip_network(f"{request.gateway}/24", strict=False)
    if address not in network or address not in narrow:
        return [f"--address: {address} and the gateway {gateway} are not in one network of 24 bits"]
    borders = (network.network_address, network.broadcast_address)
    named = ((option, each) for option, each in (("--address", address), ("--gateway", gateway)))
    return [f"{option}: {each} is no address of a machine" for option, each in named if each in borders]


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False


def _vm_problems(request: EflowRequest) -> list[str]:
    problems = []
    if not 1 <= request.cores <= _MAX_CORES:
        problems.append(f"--cpus: write 1 to {_MAX_CORES}")
    if not MIN_MEMORY_MB <= request.memory_mb <= _MAX_MEMORY_MB or request.memory_mb % 2:
        problems.append(f"--memory-mb: write an even number of {MIN_MEMORY_MB} to {_MAX_MEMORY_MB}")
    if request.data_gb is not None and request.disk_gb is not None:
        problems.append("--data-gb and --disk-gb: EFLOW takes one of them")
    sizes = (("--data-gb", request.data_gb, DATA_SIZES_GB), ("--disk-gb", request.disk_gb, DISK_SIZES_GB))
    for option, size, (least, most) in sizes:
        if size is not None and not least <= size <= most:
            problems.append(f"{option}: write {least} to {most}")
    return problems + _gpu_problems(request)


def _gpu_problems(request: EflowRequest) -> list[str]:
    if request.passthrough == "none":
        return ["--gpu: needs --passthrough dda or gpu-pv"] if request.gpu else []
    try:
        name = read_gpu_name(request.gpu)
    except ConfigError as error:
        return list(error.problems)
    fault = find_passthrough_fault(request.passthrough, classify_gpu(name), server=request.server)
    return [f"--passthrough: {fault}"] if fault else []


def _provisioning_problems(request: EflowRequest) -> list[str]:
    """The values are checked by their form; a secret is never shown."""
    kind, values = request.provisioning_type, {key: value for key, value in request.provisioning if value}
    needed = PROVISIONING_KEYS[kind]
    optional = {"globalEndpoint"} if kind.startswith("Dps") else set()
    optional |= {"registrationId"} if kind == "DpsTPM" else set()
    problems = [f"--provisioning {kind} needs {OPTIONS[key]}" for key in needed if key not in values]
    unused = (key for key in values if key not in {*needed, *optional})
    problems += [f"--provisioning {kind} does not use {OPTIONS[key]}" for key in unused]
    for key, value in values.items():
        if key in _PLAIN and not _PLAIN[key][0].fullmatch(value):
            problems.append(f"{OPTIONS[key]}: '{show_in_one_line(value)}' is not valid; {_PLAIN[key][1]}")
    connection = values.get("devConnString", "")
    if connection and not all(
        f"{name}=" in connection for name in ("HostName", "DeviceId", "SharedAccessKey")
    ):
        problems.append("--secret-env, --secret-file: must have HostName, DeviceId and SharedAccessKey")
    if "symmKey" in values and not re.fullmatch(r"[A-Za-z0-9+/]{20,}={0,2}", values["symmKey"]):
        problems.append("--secret-env, --secret-file: is not base64")
    return problems
