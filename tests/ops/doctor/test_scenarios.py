"""doctor in every scenario: the first broken link, and the whole report.

The expected reports are in tests/golden/doctor. After an intended change `VISIONEDGE_GOLDEN=write make test`
with `ARGS="-k doctor"` rewrites them; read them before you commit.
"""

import json
import os
import re
from pathlib import Path

import pytest

from doctor_fault_scenarios import BROKEN, PARAVIRTUAL
from doctor_hosts import DATA, linux
from doctor_intel_scenarios import INTEL_GPU_PV, INTEL_LINUX
from doctor_scenarios import NO_GPU, NOT_PASSED_THROUGH, SYSTEM_CHECK_SCENARIOS, WORKING, Scenario
from repository_paths import REPOSITORY
from visionedge.config.load import parse_config
from visionedge.engine.device.devices import REMEDIES, ReasonCode
from visionedge.ops.doctor.checks import CheckState
from visionedge.ops.doctor.facts import DoctorRequest
from visionedge.ops.doctor.gpu_checks import GPU_CHECKS
from visionedge.ops.doctor.intel_checks import INTEL_CHECKS
from visionedge.ops.doctor.report import DoctorReport, examine
from visionedge.ops.doctor.system_checks import SYSTEM_CHECKS
from visionedge.runtime.build_identity import read_build_identity
from visionedge.web.documents import DoctorDocument

SCENARIOS = [
    *(*NO_GPU, *NOT_PASSED_THROUGH, *BROKEN, *PARAVIRTUAL, *WORKING, *SYSTEM_CHECK_SCENARIOS),
    *(*INTEL_GPU_PV, *INTEL_LINUX),
]
CHAINS = {check.name: check for check in (*GPU_CHECKS, *INTEL_CHECKS)}
GOLDEN = Path(__file__).parents[2] / "golden" / "doctor"


def examine_scenario(scenario: Scenario, root: Path) -> DoctorReport:
    """The report on a machine in this scenario."""
    config = parse_config(scenario.config | {"inference": {"device": scenario.device}})
    machine = scenario.machine(root)
    return examine(DoctorRequest(config.inference.device, config, DATA), machine.host())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_first_broken_link_and_the_reason_are_correct(scenario: Scenario, tmp_path: Path) -> None:
    report = examine_scenario(scenario, tmp_path / "root")
    first = report.first_broken
    assert (first.name if first else None, str(report.code)) == (scenario.broken, scenario.code)


@pytest.mark.parametrize("name", ["cpu-laptop", "amd-laptop", "gpu-extra-no-driver"])
def test_without_a_gpu_nothing_is_reported_as_broken(name: str, tmp_path: Path) -> None:
    """No GPU was demanded; the chain is still shown."""
    (scenario,) = (each for each in SCENARIOS if each.name == name)
    report = examine_scenario(scenario, tmp_path / "root")
    to_text = report.to_text()
    assert "✗" not in to_text
    assert "broken" not in to_text
    assert to_text.endswith("no NVIDIA GPU here: the CPU computes\n")
    assert len(report.chain) == len(GPU_CHECKS)


UNUSED = ["intel-laptop", "intel-linux-unused-without-openvino", "gpu-pv-intel"]


@pytest.mark.parametrize("name", UNUSED)
def test_an_intel_gpu_without_openvino_is_no_fault_unless_it_is_requested(name: str, tmp_path: Path) -> None:
    """The report still says what is missing for it."""
    (scenario,) = (each for each in SCENARIOS if each.name == name)
    report = examine_scenario(scenario, tmp_path / "root")
    text = report.to_text()
    assert "✗" not in text
    assert text.endswith("no OpenVINO for the Intel GPU: the CPU computes\n")
    assert [finding.name for finding in report.chain] == [check.name for check in INTEL_CHECKS]
    assert any(finding.remedies for finding in report.chain)


def test_where_openvino_is_missing_for_an_intel_gpu_the_remedy_names_how_to_get_it(tmp_path: Path) -> None:
    """The extra on a machine, the build argument in a container; whether the GPU is demanded or only seen."""
    names = {"intel-linux-without-openvino", "intel-linux-unused-without-openvino", "intel-laptop"}
    for number, scenario in enumerate(each for each in SCENARIOS if each.name in names):
        assert "pip install '.[cpu,openvino]'" in examine_scenario(scenario, tmp_path / str(number)).to_text()
    for number, scenario in enumerate(each for each in SCENARIOS if each.name.startswith("intel-pv-without")):
        assert "make image WITH_OPENVINO=1" in examine_scenario(scenario, tmp_path / f"pv{number}").to_text()


def test_beside_an_nvidia_gpu_the_chain_is_that_of_nvidia_unless_openvino_is_requested(
    tmp_path: Path,
) -> None:
    (scenario,) = (each for each in SCENARIOS if each.name == "nvidia-beside-intel")
    report = examine_scenario(scenario, tmp_path / "auto")
    assert [finding.name for finding in report.chain] == [check.name for check in GPU_CHECKS]
    assert "intel-gpu" in [finding.name for finding in report.system_checks]
    (scenario,) = (each for each in SCENARIOS if each.name == "nvidia-beside-intel-used")
    report = examine_scenario(scenario, tmp_path / "used")
    assert [finding.name for finding in report.chain] == [check.name for check in INTEL_CHECKS]


def test_without_an_intel_gpu_openvino_is_not_probed(tmp_path: Path) -> None:
    machine = linux(tmp_path).cpu_wheel().openvino()
    examine(DoctorRequest("auto", parse_config({}), DATA), machine.host())
    assert "openvino" not in machine.asked


@pytest.mark.parametrize(("quota", "state"), [(None, None), (4.0, None), (1.5, "info"), (0.5, "warning")])
def test_a_limiting_cpu_quota_is_reported(quota: float | None, state: str | None, tmp_path: Path) -> None:
    """On a machine of 4 cores."""
    machine = linux(tmp_path).cpu_wheel()
    machine.cpu_quota = quota
    report = examine(DoctorRequest("auto", parse_config({}), DATA), machine.host())
    states = [str(found.state) for found in report.system_checks if found.name == "cpu-quota"]
    assert states == ([] if state is None else [state])


@pytest.mark.parametrize(
    ("release", "state", "says"),
    [
        ("5.15.186.1-1.cm2", "warning", "IoT Edge 1.6 does not support Mariner"),
        ("6.6.96.2-2.azl3", "info", "out of support since 2026-11-10 (as of 2026-11-30)"),
    ],
)
def test_in_eflow_the_end_of_its_support_is_reported(
    release: str, state: str, says: str, tmp_path: Path
) -> None:
    """A Mariner kernel belongs to a version that is too old."""
    report = examine(
        DoctorRequest("auto", parse_config({}), DATA),
        linux(tmp_path).eflow().kernel(release).cpu_wheel().host(),
    )
    (found,) = (each for each in report.system_checks if each.name == "eflow-support")
    assert str(found.state) == state
    assert says in found.found
    assert bool(found.remedies) is (state == "warning")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_json_report_has_the_documented_keys_in_order(scenario: Scenario, tmp_path: Path) -> None:
    report = examine_scenario(scenario, tmp_path / "root")
    document = report.document()
    keys = "schema version build at system fulfilled device environment firstBroken chain systemChecks"
    assert list(document) == keys.split()
    assert list(document["device"]) == ["requested", "effective", "reasonCode", "reason"]
    assert list(document["environment"]) == ["container", "iotEdge", "kernel", "release", "passthrough"]
    assert document["firstBroken"] == (report.first_broken.name if report.first_broken else None)
    assert len(document["chain"]) == len(report.chain)
    for finding in document["chain"] + document["systemChecks"]:
        assert list(finding) == ["name", "title", "state", "found", "remedies"]
        for remedy in finding["remedies"]:
            assert list(remedy) == ["instruction", "lines"]
    assert DoctorDocument.model_validate(document).dump() == document
    assert json.loads(json.dumps(document)) == document


def test_a_terminal_gets_coloured_marks_and_the_same_text(tmp_path: Path) -> None:
    """Red for broken, green for working, grey for information."""
    (scenario,) = (each for each in SCENARIOS if each.name == "all-system-checks-fail")
    report = examine_scenario(scenario, tmp_path / "root")
    coloured = report.to_text(colours=True)
    for mark, code in (("✓", 32), ("!", 33), ("✗", 31), ("-", 90), ("·", 90)):
        assert f"\x1b[{code}m  {mark}" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == report.to_text()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_report_equals_the_golden_file(scenario: Scenario, tmp_path: Path) -> None:
    to_text = (
        examine_scenario(scenario, tmp_path / "root").to_text().replace(str(read_build_identity()), "VERSION")
    )
    golden = GOLDEN / f"{scenario.name}.txt"
    if os.environ.get("VISIONEDGE_GOLDEN") == "write":
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(to_text)
    assert to_text == golden.read_text()


def test_every_golden_file_belongs_to_a_scenario() -> None:
    kept = {path.stem for path in GOLDEN.glob("*.txt")}
    assert kept == {scenario.name for scenario in SCENARIOS}
    assert len(kept) >= 25


def test_the_docs_show_the_real_output_of_a_good_machine() -> None:
    """docs/gpu.md quotes a whole report."""
    to_text = (GOLDEN / "dda-good.txt").read_text()
    quoted = "".join(f"    {line}" if line.strip() else line for line in to_text.splitlines(keepends=True))
    assert quoted in (GOLDEN.parents[2] / "docs" / "gpu.md").read_text()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_a_broken_link_has_a_remedy_and_later_links_are_not_judged(
    scenario: Scenario, tmp_path: Path
) -> None:
    report = examine_scenario(scenario, tmp_path / "root")
    names = [finding.name for finding in report.chain]
    (chain,) = (each for each in (GPU_CHECKS, INTEL_CHECKS) if [link.name for link in each] == names)
    independent = {link.name for link in chain if link.independent}
    first = report.first_broken
    if first is None:
        is_unused = report.gpu_is_absent or report.intel_is_unused
        assert is_unused or not [f for f in report.chain if f.state is CheckState.SKIPPED]
        return
    assert first.remedies
    behind = report.chain[report.chain.index(first) + 1 :]
    assert all(f.name in independent or f.state is CheckState.SKIPPED for f in behind)
    assert not [f for f in behind if f.state is CheckState.BROKEN and f.remedies]


def test_every_link_breaks_in_some_scenario() -> None:
    """Except informational links, and the last one, which cannot break if the one before works."""
    telling = {"container", "iot-edge", "kernel", "placement"}
    assert {s.broken for s in SCENARIOS} - {None} == set(CHAINS) - telling


def test_every_passthrough_has_a_broken_and_a_working_scenario(tmp_path: Path) -> None:
    met: dict[str, set[bool]] = {}
    for number, scenario in enumerate(SCENARIOS):
        report = examine_scenario(scenario, tmp_path / str(number))
        met.setdefault(report.environment.passthrough, set()).add(report.first_broken is None)
    ways = ("dda", "gpu-pv", "native", "intel", "none")
    assert met == {way: {True, False} for way in ways}, (
        "without a GPU nothing is broken unless one is demanded"
    )


def test_a_windows_command_is_never_wrapped() -> None:
    """Set-EflowVM resets every argument that is left out."""
    lines = [line for path in GOLDEN.glob("*.txt") for line in path.read_text().splitlines()]
    setting = [line.strip() for line in lines if "Set-EflowVM" in line]
    assert setting
    for line in setting:
        assert re.fullmatch(
            r"Set-EflowVM -cpuCount \d+ -memoryInMB \d*[02468]"
            r'( -gpuName ".+")? -gpuPassthroughType \w+( -gpuCount 1)?',
            line,
        )
        assert ("-gpuCount" in line) == ("DirectDeviceAssignment" in line)


def test_every_device_problem_has_a_reason_code_of_the_engine() -> None:
    assert set(REMEDIES) >= {ReasonCode(s.code) for s in SCENARIOS} - {
        ReasonCode.OK,
        ReasonCode.CPU_REQUESTED,
    }


def test_every_link_and_every_system_check_is_documented() -> None:
    text = (REPOSITORY / "docs" / "gpu.md").read_text()
    assert not [name for name in CHAINS if f"| `{name}` |" not in text]
    assert not [
        name for name in ("camera", *(thing.name for thing in SYSTEM_CHECKS)) if f"`{name}`" not in text
    ]


def test_the_report_contains_no_secret_of_a_camera() -> None:
    assert "hunter2" not in "".join(path.read_text() for path in GOLDEN.glob("*.txt"))
