"""deploy/monitoring and docs/monitoring.md: every rule names what exists, and fires when it should."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from visionedge.app.metrics import METRICS
from visionedge.camera.camera import CameraState
from visionedge.outbound.metering import UNIT_BLOCKS_PER_DAY

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
RULES = FOLDER / "alerts.prometheus.yaml"
DOCS = (ROOT / "docs" / "monitoring.md").read_text()
IDENTITY = {"iothub", "edge_device", "module_name", "instance_number"}

MODULE = 'job="visionedge",instance="press-7:8080"'
FIRES: Mapping[str, tuple[str, str, str]] = {
    # the rule: a series, its samples (one a minute) that make it fire, and samples that do not
    "VisionedgeDown": (f"up{{{MODULE}}}", "0x90", "1x90"),
    "VisionedgeNotReady": (f"visionedge_ready{{{MODULE}}}", "0x90", "0x5 1x84"),
    "VisionedgeDegraded": (f"visionedge_engine_degraded{{{MODULE}}}", "1x90", "0x90"),
    "VisionedgeEngineRestarts": (f"visionedge_engine_restarts_total{{{MODULE}}}", "0+1x90", "0x40 1x49"),
    "VisionedgeCameraNotLive": (
        f'visionedge_camera_state{{{MODULE},camera="dock",state="failed"}}',
        "1x90",
        "1x5 _x84",
    ),
    "VisionedgeOverloaded": (f"visionedge_overload_exhausted{{{MODULE}}}", "1x90", "0x90"),
    "VisionedgeHubDisconnected": (f"visionedge_hub_connected{{{MODULE}}}", "0x90", "0x20 1x69"),
    "VisionedgeMessagesLost": (
        f'visionedge_hub_messages_dropped_total{{{MODULE},reason="full"}}',
        "0x80 5x9",
        "5x90",
    ),
    "VisionedgeSpoolInMemory": (f"visionedge_spool_on_disk{{{MODULE}}}", "0x90", "1x90"),
    "VisionedgeQuota": (f'visionedge_hub_unit_share{{{MODULE},tier="S1"}}', "0.9x90", "0.7x90"),
    "VisionedgeConfigurationRejected": (
        f'visionedge_twin_configurations_total{{{MODULE},outcome="rejected"}}',
        "0x80 1x9",
        "3x90",
    ),
}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def expressions() -> Iterator[str]:
    """Every PromQL expression that is shipped."""
    yield from (rule["expr"] for rule in rules())
    for panel in json.loads((FOLDER / "grafana-dashboard.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def kusto_queries() -> dict[str, str]:
    """The queries of alerts.kql by the name of their rule."""
    parts = re.split(r"^// (Visionedge\w+): .*\n", (FOLDER / "alerts.kql").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def declared(name: str) -> str:
    """The metric of which `name` is a series, without the prefix."""
    bare = name.removeprefix("visionedge_")
    if bare in METRICS:
        return bare
    histogram = re.sub(r"_(bucket|sum|count)$", "", bare)
    assert METRICS[histogram].kind == "histogram", name
    return histogram


def test_every_expression_names_metrics_and_labels_that_exist() -> None:
    for expression in expressions():
        for name, selector in re.findall(r"(visionedge_\w+)(?:\{([^}]*)\})?", expression):
            known = {*METRICS[declared(name)].labels, "instance", "job", "le", *IDENTITY}
            assert set(re.findall(r"(\w+)=", selector)) <= known, expression


def test_every_kusto_query_names_metrics_and_labels_that_exist() -> None:
    for query in [*kusto_queries().values(), *re.findall(r"(    IoTEdgeMetrics_CL\n(?:    .*\n)+)", DOCS)]:
        assert "TimeGenerated > ago(" in query
        (name,) = re.findall(r'Name == "(\w+)"', query) or ["visionedge_ready"]
        used = set(re.findall(r"Labels\.(\w+)", query))
        assert used <= {*METRICS[declared(name)].labels, *IDENTITY}, query


def test_values_of_labels_exist() -> None:
    text = RULES.read_text() + (FOLDER / "alerts.kql").read_text()
    states = set(get_args(CameraState))
    for found in re.findall(r'state=~"([^"]*)"', text):
        assert set(found.split("|")) <= states
    for found in re.findall(r"State in \(([^)]*)\)", text):
        assert set(re.findall(r'"(\w+)"', found)) <= states
    assert set(re.findall(r'tier(?:\) == |=)"(\w+)"', text)) <= set(UNIT_BLOCKS_PER_DAY)


def test_both_systems_have_the_same_rules_and_the_docs_explain_each() -> None:
    prometheus, kusto = {rule["alert"] for rule in rules()}, set(kusto_queries())
    # A module that is away: Prometheus knows whom it should scrape, Azure Monitor only who was there before.
    assert prometheus - {"VisionedgeDown"} == kusto - {"VisionedgeSilent"}
    for name in prometheus | kusto:
        assert re.search(rf"^\|[^|]*{name}[^|]*\|", DOCS, flags=re.MULTILINE), name


def test_every_rule_has_a_case_that_fires() -> None:
    assert {rule["alert"] for rule in rules()} == set(FIRES)


def run_promtool(tmp_path: Path, which: int) -> subprocess.CompletedProcess[str]:
    """Each rule alone with its own series; `which` picks the samples: 1 fires, 2 does not."""
    tests = []
    for rule in rules():
        case = FIRES[rule["alert"]]
        labels = dict(re.findall(r'(\w+)="([^"]*)"', case[0]))
        if rule["alert"] == "VisionedgeQuota":
            labels = {"instance": labels["instance"]}  # the maximum over tiers keeps only these
        alert = {"exp_labels": {**labels, **rule["labels"]}}
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": case[0], "values": case[which]}],
                "alert_rule_test": [
                    {
                        "eval_time": "85m",
                        "alertname": rule["alert"],
                        "exp_alerts": [alert] if which == 1 else [],
                    }
                ],
            }
        )
    # Without annotations: promtool would compare their texts, too.
    bare = tmp_path / "rules.yaml"
    plain = [{key: value for key, value in rule.items() if key != "annotations"} for rule in rules()]
    bare.write_text(yaml.safe_dump({"groups": [{"name": "visionedge", "rules": plain}]}))
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(bare)], "evaluation_interval": "1m", "tests": tests}))
    return subprocess.run(
        ["promtool", "test", "rules", str(path)], capture_output=True, text=True, timeout=60, check=False
    )


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing (Debian: prometheus)"
)


@needs_promtool
def test_prometheus_accepts_the_rules() -> None:
    checked = subprocess.run(
        ["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


@needs_promtool
def test_every_rule_is_quiet_while_all_is_well(tmp_path: Path) -> None:
    ended = run_promtool(tmp_path, 2)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs_promtool
def test_every_rule_fires_when_it_should(tmp_path: Path) -> None:
    ended = run_promtool(tmp_path, 1)
    assert ended.returncode == 0, ended.stdout + ended.stderr
