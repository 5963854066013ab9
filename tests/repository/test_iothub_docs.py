"""The statements of docs/iot-edge.md and docs/messages.md about delivery, checked against the code."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from edge_runtime.driver import POLICY
from visionedge.app import hosted_model
from visionedge.app.direct_methods import DirectMethods
from visionedge.app.hub_bridge import MAX_CAMERAS_BYTES
from visionedge.app.overload_controller import OverloadEventCode as OverloadCode
from visionedge.camera.camera import CameraState
from visionedge.config.load import parse_config
from visionedge.iothub.client import Deadlines, HubFault
from visionedge.iothub.desired_properties import MAX_ACKNOWLEDGEMENT_BYTES
from visionedge.iothub.desired_properties import ConfigEventCode as ConfigCode
from visionedge.iothub.direct_methods import MAX_RESULT_BYTES, DirectMethod
from visionedge.iothub.image_requests import ImageDropReason
from visionedge.iothub.reported_properties import MAX_PATCH_BYTES, PATCH_BURST, PATCH_INTERVAL_NS
from visionedge.iothub.telemetry import TelemetryEventCode as TelemetryCode
from visionedge.outbound.messages import MAX_BYTES, EventKind
from visionedge.outbound.metering import UNIT_BLOCKS_PER_DAY
from visionedge.outbound.spool import SpoolEventCode, SpoolOptions
from visionedge.outbound.sqlite_store import MessageDropReason, SpoolLimits
from visionedge.runtime.watchdog import EXIT_HUNG

DOCS = Path(__file__).resolve().parents[2] / "docs"
IOT_EDGE = (DOCS / "iot-edge.md").read_text()


@pytest.mark.parametrize("fault", get_args(HubFault))
def test_every_fault_is_documented(fault: str) -> None:
    """In the table of reactions."""
    assert f"`{fault}`" in IOT_EDGE


@pytest.mark.parametrize("code", [*get_args(SpoolEventCode), "spool-dropped"])
def test_every_event_of_the_spool_is_documented(code: str) -> None:
    """Where the events are listed, and where they are explained."""
    assert f"`{code}`" in (DOCS / "messages.md").read_text()
    assert f"`{code}`" in IOT_EDGE


@pytest.mark.parametrize("code", get_args(hosted_model.ModelEventCode))
def test_every_event_of_the_model_is_documented(code: str) -> None:
    """Where the events are listed, and where models are explained."""
    assert f"`{code}`" in (DOCS / "messages.md").read_text()
    assert f"`{code}`" in (DOCS / "models.md").read_text()


@pytest.mark.parametrize("code", get_args(OverloadCode))
def test_every_event_of_an_overload_is_documented(code: str) -> None:
    """Where the events are listed."""
    assert f"`{code}`" in (DOCS / "messages.md").read_text()


@pytest.mark.parametrize("code", get_args(TelemetryCode))
def test_every_event_of_telemetry_is_documented(code: str) -> None:
    """Where the events are listed."""
    assert f"`{code}`" in (DOCS / "messages.md").read_text()


@pytest.mark.parametrize("kind", get_args(EventKind))
def test_every_kind_of_event_has_a_row(kind: str) -> None:
    """Those of cameras too, whose states are listed with the cameras."""
    (row,) = [
        line for line in (DOCS / "messages.md").read_text().splitlines() if line.startswith(f"| `{kind}` |")
    ]
    if kind == "camera":
        assert all(
            f"`{state}`" in row and f"| `{state}` |" in (DOCS / "cameras.md").read_text()
            for state in get_args(CameraState)
        )


@pytest.mark.parametrize("reason", get_args(MessageDropReason))
def test_every_reason_for_a_dropped_message_is_documented(reason: str) -> None:
    """With its meaning."""
    assert f"`{reason}`" in IOT_EDGE


@pytest.mark.parametrize(
    "method", ["ping", "status", "snapshot", "validateConfig", "restartCamera", "bundle"]
)
def test_every_method_is_documented_with_its_deadline(method: str, methods: dict[str, DirectMethod]) -> None:
    """A row of the table, and the keys of its payload in it."""
    (row,) = [line for line in IOT_EDGE.splitlines() if line.startswith(f"| `{method}` |")]
    assert row.endswith(f"| {methods[method].deadline_s:g} s |")
    assert all(f"`{key}`" in row for key in methods[method].keys or ())


def test_no_method_is_left_out(methods: dict[str, DirectMethod]) -> None:
    """The contract's five, and the support bundle."""
    assert methods.keys() == {"ping", "status", "snapshot", "validateConfig", "restartCamera", "bundle"}


@pytest.fixture
def methods() -> dict[str, DirectMethod]:
    """The methods, over no module."""
    nothing: Any = None
    return DirectMethods(nothing, nothing, nothing, nothing).methods()


@pytest.mark.parametrize("reason", get_args(ImageDropReason))
def test_every_reason_for_a_picture_without_an_answer_is_documented(reason: str) -> None:
    """With its meaning."""
    assert f"| `{reason}` |" in IOT_EDGE


@pytest.mark.parametrize("code", [*get_args(ConfigCode), "input-picture-refused"])
def test_every_event_of_the_twin_and_the_input_is_documented(code: str) -> None:
    """Where the events are listed, and where they are explained."""
    assert f"`{code}`" in (DOCS / "messages.md").read_text()
    assert f"`{code}`" in IOT_EDGE or code == "config-applied"


def test_the_bounds_of_the_twin_are_those_of_the_code() -> None:
    """Reported properties and answers."""
    assert f"({MAX_ACKNOWLEDGEMENT_BYTES // 1000} KB)" in IOT_EDGE
    assert PATCH_BURST == 3
    assert f"Three patches may be sent at once, then one every {PATCH_INTERVAL_NS // 10**9} s" in IOT_EDGE
    assert f"{MAX_PATCH_BYTES // 1000} KB" in IOT_EDGE
    assert MAX_ACKNOWLEDGEMENT_BYTES + MAX_CAMERAS_BYTES < MAX_PATCH_BYTES
    assert f"below {MAX_RESULT_BYTES:,} bytes" in IOT_EDGE


def test_the_numbers_are_those_of_the_code() -> None:
    """Bounds, deadlines, quotas and the exit code."""
    deadlines, policy = Deadlines(), parse_config({}).telemetry
    assert POLICY.mode == "all"
    assert f"exit code **{EXIT_HUNG}**" in IOT_EDGE
    assert f"{MAX_BYTES:,} bytes" in IOT_EDGE
    assert f"({policy.spool_megabytes})" in IOT_EDGE
    assert f"({policy.spool_hours:g})" in IOT_EDGE
    assert SpoolLimits() == SpoolLimits(policy.spool_megabytes * 1_000_000, policy.spool_hours * 3600)
    assert f"{SpoolOptions().memory_bytes // 1_000_000} MB" in IOT_EDGE
    assert f"tried again every {SpoolOptions().retry_s:g} s" in IOT_EDGE
    assert deadlines.connect_s == deadlines.build_s == deadlines.send_s == 20
    assert deadlines.max_wait_s == 15
    assert all(f"{quota:,}" in IOT_EDGE for quota in UNIT_BLOCKS_PER_DAY.values())


def test_the_measured_examples_are_consistent() -> None:
    """A quiet door, a yard and a street: the share of a unit is that of the blocks."""
    rows = [
        line.split("|")[1:-1] for line in IOT_EDGE.splitlines() if re.match(r"\| (quiet|yard|street)", line)
    ]
    assert len(rows) == 4
    for _, analysed, sent, messages, counted, full, share in rows:
        seen, sent_count, made, metered = (
            int(cell.replace(",", "")) for cell in (analysed, sent, messages, counted)
        )
        assert sent_count <= seen
        assert made <= metered
        assert 0 < float(full.split()[0]) <= 100
        assert float(share.split()[0]) == pytest.approx(
            100 * metered / UNIT_BLOCKS_PER_DAY["S1"], abs=0.06 if sent_count < seen else 0.5
        )
