"""doctor --plan: which passthrough EFLOW supports on a Windows, and the line to type there."""

import os
from pathlib import Path

import pytest

from visionedge.errors import ConfigError
from visionedge.ops.doctor.eflow_plan import make_eflow_plan
from visionedge.ops.eflow import classify_gpu

DDA, PV = "DirectDeviceAssignment", "ParaVirtualization"


@pytest.mark.parametrize(
    ("build", "edition", "gpu", "passthrough"),
    [
        ("19044.1620", "pro", "NVIDIA A2", DDA),
        ("19044", "pro", "NVIDIA A2", DDA),
        ("10.0.22631.4317", "Windows 11 Enterprise", "NVIDIA T4", DDA),
        ("17763", "server", "Tesla T4", DDA),
        ("20348.2700", "server", "NVIDIA A2", DDA),
        ("19045", "iot-enterprise", "NVIDIA GeForce RTX 3060", PV),
        ("22631", "Windows 11 IoT Enterprise LTSC", "NVIDIA RTX A2000", PV),
        ("22631", "pro", "Quadro P2000", PV),
        ("22631", "pro", "Intel(R) Iris(R) Xe Graphics", PV),
    ],
)
def test_a_listed_pair_of_gpu_and_windows_is_supported(
    build: str, edition: str, gpu: str, passthrough: str
) -> None:
    plan = make_eflow_plan(build, edition, gpu)
    assert (plan.supported, plan.passthrough) == (True, passthrough)
    assert f'-gpuPassthroughType {passthrough} -gpuCount 1 -gpuName "{gpu}"' in plan.to_text()


@pytest.mark.parametrize(
    ("build", "edition", "gpu", "why"),
    [
        ("19044.1619", "pro", "NVIDIA A2", "19044.1620 or newer"),
        ("19043", "enterprise", "NVIDIA GeForce RTX 3060", "19044.1620 or newer"),
        ("22631", "home", "NVIDIA GeForce RTX 3060", "needs Pro, Enterprise"),
        ("22631", "education", "NVIDIA GeForce RTX 3060", "needs Pro, Enterprise"),
        (None, "server-2016", "NVIDIA T4", "Windows Server 2019 and 2022 only"),
        ("20348", "server", "NVIDIA GeForce RTX 3060", "not supported on Windows Server"),
        ("17763", "server", "Intel(R) UHD Graphics 770", "not supported on Windows Server"),
        ("26100", "server", "NVIDIA A2", "Windows Server 2019 and 2022 only"),
        ("20348", "pro", "NVIDIA A2", "not Windows 10"),
        ("22631", "pro", "NVIDIA GeForce GTX 970", "Pascal or newer"),
        ("22631", "pro", "AMD Radeon RX 7600", "EFLOW supports NVIDIA T4"),
        ("22631", "pro", "NVIDIA L4", "EFLOW supports NVIDIA T4"),
    ],
)
def test_any_other_pair_is_unsupported_with_the_reason(
    build: str | None, edition: str, gpu: str, why: str
) -> None:
    """The remaining step is a command that deploys without a GPU."""
    plan = make_eflow_plan(build, edition, gpu)
    assert not plan.supported
    assert why in plan.why
    assert "-gpu" not in "".join(line for step in plan.steps for line in step.lines)


def test_a_name_with_control_characters_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError) as raised:
        make_eflow_plan("19045", "pro", "NVIDIA\nT4\x1b[31m")
    (problem,) = raised.value.problems
    assert problem.startswith("--gpu: 'NVIDIA?T4?[31m' is not valid")


def test_an_rtx_a2000_is_not_an_a2_and_a_t400_is_not_a_t4() -> None:
    names = ("NVIDIA A2", "NVIDIA RTX A2000", "Tesla T4", "NVIDIA T400", "NVIDIA A10")
    assert [classify_gpu(name) for name in names] == [
        "datacenter",
        "graphics",
        "datacenter",
        "unknown",
        "unknown",
    ]


def test_an_intel_gpu_is_supported_without_cuda() -> None:
    plan = make_eflow_plan("22631", "pro", "Intel(R) Iris(R) Xe Graphics")
    assert plan.supported
    assert not plan.cuda
    assert "OpenVINO computes" in plan.to_text()
    assert "make image WITH_OPENVINO=1" in plan.to_text()
    assert "/dev/dxg" in plan.to_text()
    assert "DeviceRequests" not in plan.to_text()


def test_windows_10_needs_wsl_for_gpu_pv_and_windows_11_does_not() -> None:
    assert "wsl --install" in make_eflow_plan("19045", "pro", "NVIDIA GeForce RTX 3060").to_text()
    assert "wsl --install" not in make_eflow_plan("22631", "pro", "NVIDIA GeForce RTX 3060").to_text()
    assert "wsl --install" not in make_eflow_plan("19045", "pro", "NVIDIA A2").to_text()


def test_a_build_without_a_revision_must_be_looked_up_if_it_matters() -> None:
    assert "winver" in make_eflow_plan("19044", "pro", "NVIDIA A2").to_text()
    for build, edition in (("19044.1620", "pro"), ("19045", "pro"), ("17763", "server")):
        assert "winver" not in make_eflow_plan(build, edition, "NVIDIA A2").to_text()


def test_a_plan_has_all_steps_from_windows_to_doctor() -> None:
    to_text = make_eflow_plan("19044.1620", "pro", "NVIDIA A2").to_text()
    assert (
        to_text.splitlines()[0]
        == "NVIDIA A2 on Windows 10 pro (19044.1620): supported: DirectDeviceAssignment"
    )
    wanted = (
        "Deploy-Eflow -cpuCount 4 -memoryInMB 8192 -vmDataSize 20",
        '"DeviceRequests"',
        "visionedge doctor",
    )
    places = [to_text.index(text) for text in wanted]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("build", "edition", "gpu", "key"),
    [
        (None, "pro", "NVIDIA A2", "--windows-build: is missing"),
        ("eleven", "pro", "NVIDIA A2", "--windows-build: 'eleven'"),
        ("22631", None, "NVIDIA A2", "--edition: is missing"),
        ("22631", "ultimate", "NVIDIA A2", "--edition: 'ultimate'"),
        ("22631", "pro", None, "--gpu: is missing"),
        ("22631", "pro", 'A2"; Remove-Item C:\\', "--gpu: "),
        ("22631", "pro", "A2$(calc)", "--gpu: "),
    ],
)
def test_an_invalid_name_is_reported_and_never_put_into_a_command(
    build: str | None, edition: str | None, gpu: str | None, key: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        make_eflow_plan(build, edition, gpu)
    assert str(raised.value).startswith(key)


WINDOWS = {
    "server-2019": ("17763", "server"),
    "server-2022": ("20348", "server"),
    "windows-10": ("19045", "pro"),
    "windows-11": ("22631", "enterprise"),
}
GPUS = {
    "t4": "NVIDIA T4",
    "a2": "NVIDIA A2",
    "rtx-3060": "NVIDIA GeForce RTX 3060",
    "rtx-5070": "NVIDIA GeForce RTX 5070",
    "intel-uhd": "Intel(R) UHD Graphics 770",
    "unknown": "AMD Radeon RX 7600",
}
GOLDEN = Path(__file__).parents[2] / "golden" / "plan"


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("windows", WINDOWS)
def test_a_plan_equals_its_golden_file(windows: str, gpu: str) -> None:
    """`VISIONEDGE_GOLDEN=write` writes them; tests/repository/test_eflow.py checks their lines."""
    text = make_eflow_plan(*WINDOWS[windows], GPUS[gpu]).to_text()
    path = GOLDEN / f"{windows}-{gpu}.txt"
    if os.environ.get("VISIONEDGE_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_golden_plan_belongs_to_a_windows_and_a_gpu() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {f"{w}-{g}" for w in WINDOWS for g in GPUS}


def test_windows_server_gets_a_switch_a_static_address_and_dns_and_windows_11_the_default_switch() -> None:
    server = make_eflow_plan("20348", "server", "NVIDIA A2").to_text()
    places = [
        server.index(text)
        for text in (
            "Install-WindowsFeature",
            "New-VMSwitch",
            "New-NetIPAddress",
            "New-NetNat",
            "Deploy-Eflow",
        )
    ]
    assert places == sorted(places)
    assert "-ip4Address 172.20.0.2 -ip4PrefixLength 24 -ip4GatewayAddress 172.20.0.1" in server
    assert server.index("Deploy-Eflow") < server.index("Set-EflowVmDNSServers")
    client = make_eflow_plan("22631", "pro", "NVIDIA A2").to_text()
    assert "vswitch" not in client.lower()
    assert "Enable-WindowsOptionalFeature" in client


def test_a_server_without_gpu_pv_is_told_what_works_instead_and_how_to_use_the_cpu() -> None:
    plan = make_eflow_plan("20348", "server", "NVIDIA GeForce RTX 3060")
    assert not plan.supported
    assert "Windows 10 or 11" in plan.steps[0].instruction
    assert "T4 or A2" in plan.steps[0].instruction
    assert "Deploy-Eflow -cpuCount 4 -memoryInMB 4096 -vmDataSize 20 -vswitchName" in plan.to_text()


@pytest.mark.parametrize(("build", "edition"), [("22631", "home"), ("26100", "server"), ("17134", "pro")])
def test_without_eflow_nothing_of_eflow_is_to_be_typed(build: str, edition: str) -> None:
    plan = make_eflow_plan(build, edition, "NVIDIA A2")
    assert not plan.supported
    assert not [line for step in plan.steps for line in step.lines]
    assert "Linux" in plan.to_text()


def test_cumulative_updates_are_for_server_2019_and_the_mitigation_driver_for_t4_and_a2() -> None:
    for build, edition, gpu in (("17763", "server", "NVIDIA T4"), ("20348", "server", "NVIDIA A2")):
        text = make_eflow_plan(build, edition, gpu).to_text()
        assert ("cumulative updates" in text) is (build == "17763")
        assert "mitigation driver for T4 and A2" in text
    assert "mitigation" not in make_eflow_plan("22631", "pro", "NVIDIA GeForce RTX 3060").to_text()


def test_an_rtx_50_needs_a_newer_driver_than_other_gpus() -> None:
    assert "driver 570 or newer" in make_eflow_plan("22631", "pro", "NVIDIA GeForce RTX 5070 Ti").to_text()
    assert "driver 527.41 or newer" in make_eflow_plan("22631", "pro", "NVIDIA RTX 5000 Ada").to_text()


def test_intels_integrated_gpus_need_intels_driver_and_its_cards_are_not_supported() -> None:
    text = make_eflow_plan("19045", "pro", "Intel(R) UHD Graphics 770").to_text()
    assert "Intel's graphics driver 30.0.100.9955 or newer" in text
    assert "wsl --install" in text
    assert make_eflow_plan("22631", "pro", "Intel(R) Arc(TM) 140V GPU (16GB)").supported
    assert not make_eflow_plan("22631", "pro", "Intel(R) Arc(TM) A770 Graphics").supported


@pytest.mark.parametrize(
    ("edition", "build", "name"),
    [
        ("server-2019", None, "Windows Server 2019 (17763)"),
        ("Windows Server 2022 Datacenter", None, "Windows Server 2022 (20348)"),
        ("Datacenter", "20348.2700", "Windows Server 2022 (20348)"),
    ],
)
def test_a_server_may_be_named_by_its_year(edition: str, build: str | None, name: str) -> None:
    assert make_eflow_plan(build, edition, "NVIDIA A2").windows == name


def test_a_build_of_another_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not Windows Server 2022"):
        make_eflow_plan("17763", "server-2022", "NVIDIA A2")
