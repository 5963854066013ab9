"""doctor --plan: which passthrough EFLOW supports on a Windows, and the line to type there."""

import pytest

from visionedge.errors import ConfigError
from visionedge.ops.doctor.eflow_plan import classify_gpu, make_eflow_plan

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
def test_a_listed_pair_of_gpu_and_windows_is_supported(build: str, edition: str, gpu: str, passthrough: str) -> None:
    plan = make_eflow_plan(build, edition, gpu)
    assert (plan.supported, plan.passthrough) == (True, passthrough)
    assert f'-gpuPassthroughType {passthrough} -gpuCount 1 -gpuName "{gpu}"' in plan.to_text()


@pytest.mark.parametrize(
    ("build", "edition", "gpu", "why"),
    [
        ("19044.1619", "pro", "NVIDIA A2", "19044.1620 or newer"),
        ("19043", "enterprise", "NVIDIA GeForce RTX 3060", "19044.1620 or newer"),
        ("22631", "home", "NVIDIA GeForce RTX 3060", "needs Pro, Enterprise"),
        ("20348", "server", "NVIDIA GeForce RTX 3060", "not supported on Windows Server"),
        ("17763", "server", "Intel(R) UHD Graphics 770", "not supported on Windows Server"),
        ("26100", "server", "NVIDIA A2", "on Windows Server 2019 and 2022 only"),
        ("20348", "pro", "NVIDIA A2", "not Windows 10"),
        ("22631", "pro", "NVIDIA GeForce GTX 970", "Pascal or newer"),
        ("22631", "pro", "AMD Radeon RX 7600", "EFLOW supports NVIDIA T4"),
        ("22631", "pro", "NVIDIA L4", "EFLOW supports NVIDIA T4"),
    ],
)
def test_any_other_pair_is_unsupported_with_the_reason(build: str, edition: str, gpu: str, why: str) -> None:
    """What is left is a line that deploys without a GPU."""
    plan = make_eflow_plan(build, edition, gpu)
    assert not plan.supported
    assert why in plan.why
    assert "-gpu" not in "".join(line for step in plan.steps for line in step.lines)


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
    assert "computes on the CPU" in plan.to_text()
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
