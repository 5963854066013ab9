"""manifest eflow: the keys of Microsoft's template, checked values, and secrets that stay secret."""

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repository_paths import REPOSITORY
from visionedge.__main__ import main
from visionedge.errors import ConfigError
from visionedge.ops.manifest.eflow import PROVISIONING_KEYS, EflowRequest, make_eflow_config

TEMPLATE: dict[str, Any] = json.loads(
    (REPOSITORY / "tests" / "data" / "eflow-userconfig-keys.json").read_text(encoding="utf-8")
)
URL = "https://example.com/AzureIoTEdge.msi"
KEY = "c2VjcmV0LWtleS1vZi10aGUtZW5yb2xtZW50"
CONNECTION = f"HostName=hub.azure-devices.net;DeviceId=d;SharedAccessKey={KEY}"
VALUES = {
    "devConnString": CONNECTION,
    "iotHubHostname": "hub.azure-devices.net",
    "deviceId": "site-7",
    "identityCertPath": "C:\\certs\\device.pem",
    "identityPrivKeyPath": "C:\\certs\\device.key.pem",
    "scopeId": "0ne00A0A0A0",
    "symmKey": KEY,
    "registrationId": "site-7",
}
CLIENT = EflowRequest(msi_url=URL, server=False, accept_eula=True)
SERVER = replace(
    CLIENT,
    server=True,
    switch="internal",
    switch_name="EFLOW",
    address="172.20.0.2",
    gateway="172.20.0.1",
    dns=("10.0.0.53",),
    passthrough="DirectDeviceAssignment",
    gpu="NVIDIA A2",
)
EXTERNAL = replace(SERVER, server=False, switch="external", adapter="Ethernet 2")
IDENTITIES = [
    replace(
        CLIENT,
        provisioning_type=kind,
        provisioning=tuple((key, VALUES[key]) for key in PROVISIONING_KEYS[kind]),
    )
    for kind in PROVISIONING_KEYS
]


def read(request: EflowRequest) -> dict[str, Any]:
    """The file as a document."""
    document: dict[str, Any] = json.loads(make_eflow_config(request))
    return document


def parts(document: dict[str, Any]) -> dict[str, set[str]]:
    """Its keys by part; "" for the outermost ones."""
    found = {"": {key for key, value in document.items() if not isinstance(value, dict)}}
    return found | {key: set(value) for key, value in document.items() if isinstance(value, dict)}


@pytest.mark.parametrize("request_", [CLIENT, SERVER, EXTERNAL, *IDENTITIES])
def test_every_key_is_one_of_microsofts_template_and_the_required_ones_are_there(
    request_: EflowRequest,
) -> None:
    found = parts(read(request_))
    for part, keys in found.items():
        assert keys <= set(TEMPLATE["keys"][part]), part
    required = TEMPLATE["required"] | (TEMPLATE["requiredOnServer"] if request_.server else {})
    for part, keys in required.items():
        assert set(keys) <= found[part], part


def test_a_server_gets_its_switch_addresses_dns_and_gpu() -> None:
    document = read(SERVER)
    assert document["schemaVersion"] == "1.1"
    assert document["network"] == {
        "vswitchName": "EFLOW",
        "vswitchType": "Internal",
        "ip4Address": "172.20.0.2",
        "ip4GatewayAddress": "172.20.0.1",
        "ip4PrefixLength": 24,
        "dnsServers": ["10.0.0.53"],
    }
    assert document["vmConfig"] == {
        "cpuCount": 4,
        "memoryInMB": 8192,
        "vmDataSize": 20,
        "gpuPassthroughType": "DirectDeviceAssignment",
        "gpuName": "NVIDIA A2",
        "gpuCount": 1,
    }


def test_windows_10_and_11_need_no_network_part() -> None:
    """Microsoft's script then uses the Default Switch."""
    assert "network" not in read(CLIENT)
    assert read(replace(CLIENT, dns=("10.0.0.53",)))["network"] == {"dnsServers": ["10.0.0.53"]}
    assert read(EXTERNAL)["network"]["adapterName"] == "Ethernet 2"


@pytest.mark.parametrize("request_", IDENTITIES, ids=lambda request: request.provisioning_type)
def test_each_way_of_provisioning_has_what_it_needs(request_: EflowRequest) -> None:
    document = read(request_)
    kind = request_.provisioning_type
    part = document.get("eflowProvisioning", {})
    assert set(part) == ({"provisioningType", *PROVISIONING_KEYS[kind]} if kind != "none" else set())
    assert document["vmFeature"]["DpsTpm"] is (kind == "DpsTPM")


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (replace(CLIENT, accept_eula=False), "--accept-eula"),
        (replace(CLIENT, msi_url=""), "--msi-url"),
        (replace(CLIENT, msi_url="http://example.com/a.msi"), "--msi-url"),
        (replace(CLIENT, server=True), "--switch: Windows Server has no Default Switch"),
        (replace(SERVER, server=False), "--switch: internal is for Windows Server only"),
        (replace(SERVER, switch_name='a"b'), "--switch-name"),
        (replace(EXTERNAL, adapter=""), "--adapter"),
        (replace(CLIENT, adapter="Ethernet"), "--adapter"),
        (replace(SERVER, address="172.20.0.300"), "--address: '172.20.0.300' is not an IPv4 address"),
        (replace(SERVER, gateway="fe80::1"), "--gateway: 'fe80::1' is not an IPv4 address"),
        (replace(SERVER, gateway=""), "give both"),
        (replace(SERVER, address="172.20.1.2"), "not in one network"),
        (replace(EXTERNAL, address="172.20.1.2", prefix_length=16), "not in one network of 24 bits"),
        (replace(SERVER, address="172.20.0.1"), "is the address of the gateway"),
        (replace(SERVER, address="172.20.0.255"), "is no address of a machine"),
        (replace(SERVER, gateway="172.20.0.0"), "is no address of a machine"),
        (replace(SERVER, prefix_length=16), "--prefix-length"),
        (replace(EXTERNAL, prefix_length=31), "--prefix-length"),
        (replace(CLIENT, address="172.20.0.2", gateway="172.20.0.1"), "Default Switch has DHCP only"),
        (replace(CLIENT, dns=("dns.example.com",)), "--dns"),
        (replace(CLIENT, cores=0), "--cpus"),
        (replace(CLIENT, memory_mb=4097), "--memory-mb: write an even number"),
        (replace(CLIENT, memory_mb=10**20), "--memory-mb: write an even number"),
        (replace(CLIENT, memory_mb=512), "--memory-mb"),
        (replace(CLIENT, data_gb=1), "--data-gb: write 2 to 2000"),
        (replace(CLIENT, data_gb=None, disk_gb=20), "--disk-gb: write 21 to 2000"),
        (replace(CLIENT, disk_gb=29), "takes one of them"),
        (replace(SERVER, passthrough="ParaVirtualization"), "this GPU needs dda"),
        (
            replace(SERVER, passthrough="ParaVirtualization", gpu="NVIDIA GeForce RTX 3060"),
            "not supported on Windows Server",
        ),
        (replace(CLIENT, passthrough="DirectDeviceAssignment", gpu="NVIDIA RTX A2000"), "needs gpu-pv"),
        (replace(CLIENT, passthrough="ParaVirtualization", gpu="AMD Radeon RX 7600"), "EFLOW supports"),
        (replace(CLIENT, passthrough="ParaVirtualization"), "--gpu: is missing"),
        (replace(CLIENT, gpu="NVIDIA A2"), "--gpu: needs --passthrough"),
        (replace(CLIENT, provisioning_type="DpsX509"), "DpsX509 needs --scope-id"),
        (replace(CLIENT, provisioning=(("scopeId", "0ne00A0A0A0"),)), "none does not use --scope-id"),
        (replace(CLIENT, provisioning_type="DpsTPM", provisioning=(("scopeId", "x"),)), "--scope-id: 'x'"),
        (
            replace(
                CLIENT, provisioning_type="ManualConnectionString", provisioning=(("devConnString", "x"),)
            ),
            "must have HostName",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_option(request_: EflowRequest, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_eflow_config(request_)
    assert any(problem in each for each in raised.value.problems), raised.value.problems


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        make_eflow_config(replace(CLIENT, msi_url="", cores=0, dns=("x",), provisioning_type="DpsTPM"))
    assert len(raised.value.problems) == 4


COMMAND = ["manifest", "eflow", "--edition", "pro", "--accept-eula", "--msi-url", URL]


def test_a_secret_comes_from_the_environment_and_its_file_is_for_the_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPS_KEY", KEY)
    path = tmp_path / "eflow.json"
    options = [
        "--provisioning",
        "DpsSymmetricKey",
        "--scope-id",
        "0ne00A0A0A0",
        "--registration-id",
        "site-7",
    ]
    assert main([*COMMAND, *options, "--secret-env", "DPS_KEY", "-o", str(path)]) == 0
    assert json.loads(path.read_text())["eflowProvisioning"]["symmKey"] == KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err


def test_a_secret_comes_from_a_file_of_one_line(tmp_path: Path) -> None:
    secret, path = tmp_path / "connection", tmp_path / "eflow.json"
    secret.write_text(f"{CONNECTION}\n")
    options = ["--provisioning", "ManualConnectionString", "--secret-file", str(secret), "-o", str(path)]
    assert main([*COMMAND, *options]) == 0
    assert json.loads(path.read_text())["eflowProvisioning"]["devConnString"] == CONNECTION


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--provisioning", "DpsSymmetricKey", "--scope-id", "0ne00A0A0A0"], "needs --secret-env"),
        (["--secret-env", "NOT_SET"], "the environment has no NOT_SET"),
        (["--secret-env", "DPS_KEY", "-o", "x.json"], "uses no secret"),
        (["--provisioning", "ManualConnectionString", "--secret-env", "DPS_KEY"], "is not printed"),
        (["--secret-file", "missing", "-o", "x.json"], "missing: cannot be read"),
        (["--memory-mb", "4097"], "--memory-mb"),
    ],
)
def test_wrong_arguments_end_with_2_and_never_show_the_secret(
    options: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPS_KEY", KEY)
    assert main([*COMMAND, *options]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert KEY not in shown.err + shown.out
    assert list(tmp_path.iterdir()) == []


def test_without_a_secret_the_file_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    assert json.loads(capsys.readouterr().out)["eflowProductUrl"] == URL
