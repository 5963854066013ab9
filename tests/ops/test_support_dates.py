"""Support dates: one table with its date, used by doctor and by manifest lint."""

import json
from typing import Any

import pytest

from manifests import AGENT, change, fresh_known_secrets, valid_manifest
from visionedge.ops.manifest.lint import LintReport, lint_manifest
from visionedge.ops.support_dates import (
    EFLOW_ARM64_VERSION,
    EFLOW_VERSION,
    IOT_EDGE_TAG,
    SUPPORT_DATES,
    TABLE_DATE,
    Product,
    find_image_support,
    find_support,
)

__all__ = ["fresh_known_secrets"]

MICROSOFT = "mcr.microsoft.com/azureiotedge"


def lint(document: dict[str, Any]) -> LintReport:
    """The report of a manifest."""
    return lint_manifest(json.dumps(document).encode(), "deployment.json")


@pytest.mark.parametrize(
    ("product", "version", "state", "says"),
    [
        ("IoT Edge", "1.1.15", "ended", "since 2024-11-12"),
        ("IoT Edge", "1.4.37", "ended", "since 2024-11-12"),
        ("IoT Edge", "1.5", "ended", "since 2026-11-10"),
        ("IoT Edge", "1.5.44", "ended", "since 2026-11-10"),
        ("IoT Edge", "1.6", "supported", "until 2028-11-14"),
        ("IoT Edge", "1.6.1", "supported", "until 2028-11-14"),
        ("edgeHub", "1.6.0", "faulty", "loses MQTT connections"),
        ("edgeHub", "1.6.1-linux-amd64", "faulty", "loses MQTT connections"),
        ("EFLOW", "1.4.14.24074", "ended", "since 2024-11-12"),
        ("EFLOW", "1.5.6.08025", "faulty", "withdrawn"),
        ("EFLOW", EFLOW_ARM64_VERSION, "ended", "since 2026-11-10"),
        ("EFLOW", EFLOW_VERSION, "supported", "until 2028-11-14"),
        ("metrics collector", "1.3.1", "faulty", "since 2026-09-14"),
    ],
)
def test_a_version_has_a_state_with_the_date_of_the_table(
    product: Product, version: str, state: str, says: str
) -> None:
    found = find_support(product, version)
    assert found is not None
    assert found.state == state
    assert says in found.describe()
    assert f"(as of {TABLE_DATE})" in found.describe()


@pytest.mark.parametrize(
    ("product", "version"),
    [
        ("edgeHub", "1.6.2"),
        ("edgeHub", "1.6"),
        ("edgeHub", "1.5.44"),
        ("metrics collector", "2.0.0"),
        ("IoT Edge", "2.0"),
        ("IoT Edge", "latest"),
        ("EFLOW", ""),
    ],
)
def test_a_version_that_the_table_does_not_know_has_no_state(product: Product, version: str) -> None:
    assert find_support(product, version) is None


def test_the_recommended_versions_are_supported_and_every_ended_one_has_a_remedy() -> None:
    for product, version in (("IoT Edge", IOT_EDGE_TAG), ("EFLOW", EFLOW_VERSION)):
        found = find_support(product, version)  # type: ignore[arg-type]
        assert found is not None
        assert found.state == "supported"
    assert find_support("edgeHub", IOT_EDGE_TAG) is None
    assert all(bool(entry.remedy) is (entry.state != "supported") for entry in SUPPORT_DATES)
    assert all(entry.source for entry in SUPPORT_DATES)


@pytest.mark.parametrize(
    ("image", "states"),
    [
        (f"{MICROSOFT}-agent:1.5", ["ended"]),
        (f"{MICROSOFT}-hub:1.6.1", ["faulty", "supported"]),
        ("mirror.example.com:5000/azureiotedge-hub:1.5.44", ["ended"]),
        (f"{MICROSOFT}-metrics-collector:1.3.1", ["faulty"]),
        (f"{MICROSOFT}-hub", []),
        (f"{MICROSOFT}-hub:latest", []),
        ("registry.example.com/visionedge:1.5", []),
        ("", []),
    ],
)
def test_an_image_of_microsoft_is_known_by_its_name_and_tag(image: str, states: list[str]) -> None:
    assert [entry.state for entry in find_image_support(image)] == states


@pytest.mark.parametrize("name", ["edgeAgent", "edgeHub"])
@pytest.mark.parametrize(
    ("version", "severity", "end"), [("1.5", "note", "2026-11-10"), ("1.4.27", "warning", "2024-11-12")]
)
def test_lint_reports_an_image_that_is_out_of_support(
    name: str, version: str, severity: str, end: str
) -> None:
    """As a note in the first year, because whole fleets still have it."""
    image = f"{MICROSOFT}-{name[4:].lower()}:{version}"
    path = (*AGENT, "systemModules", name, "settings", "image")
    found = [f for f in lint(change(valid_manifest(), path, image)).findings if "support" in f.problem]
    [finding] = found
    assert finding.severity == severity
    assert finding.path.endswith(f"{name}.settings.image")
    assert end in finding.problem
    assert IOT_EDGE_TAG in finding.remedy


def test_lint_warns_of_the_tag_1_6_of_edge_hub_which_a_device_may_have_pulled_earlier() -> None:
    path = (*AGENT, "systemModules", "edgeHub", "settings", "image")
    report = lint(change(valid_manifest(), path, f"{MICROSOFT}-hub:1.6"))
    assert [f.severity for f in report.findings if "may be 1.6.1" in f.problem] == ["warning"]


@pytest.mark.parametrize(
    ("env", "warned"),
    [
        ({}, True),
        ({"UploadTarget": {"value": "AzureMonitor"}}, True),
        ({"UploadTarget": {"value": "IotMessage"}}, False),
    ],
)
def test_lint_warns_of_an_old_metrics_collector_unless_it_sends_to_the_hub(
    env: dict[str, Any], warned: bool
) -> None:
    module = {
        "type": "docker",
        "status": "running",
        "restartPolicy": "always",
        "env": env,
        "settings": {"image": f"{MICROSOFT}-metrics-collector:1.3.1", "createOptions": "{}"},
    }
    report = lint(change(valid_manifest(), (*AGENT, "modules", "metrics"), module))
    assert any("Azure Monitor since 2026-09-14" in f.problem for f in report.findings) is warned
