"""`make demo-edge`: what is typed there reaches the module's twin and methods, and slips are told."""

import json
from pathlib import Path

import pytest

from edge_runtime.console import HELP, obey
from edge_runtime.runtime import EdgeRuntime


def test_desired_properties_are_changed_and_shown(edge_runtime: EdgeRuntime) -> None:
    """Patch by patch, as the cloud does it."""
    assert obey(edge_runtime, 'desired {"telemetry": {"mode": "all"}, "http": {}}').endswith("version 2")
    assert obey(edge_runtime, 'desired {"http": null}\n').endswith("version 3")
    twin = json.loads(obey(edge_runtime, "twin"))
    assert twin["desired"] == {"telemetry": {"mode": "all"}, "$version": 3}


def test_a_method_that_nobody_hears_is_404(edge_runtime: EdgeRuntime) -> None:
    """No module is connected here."""
    assert obey(edge_runtime, "call ping") == "404 null"
    assert obey(edge_runtime, 'call snapshot {"camera": "dock"}') == "404 null"


def test_a_file_waits_for_the_module_at_its_input(edge_runtime: EdgeRuntime, tmp_path: Path) -> None:
    """Messages between modules are kept while one is away."""
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    assert "is sent to frames" in obey(edge_runtime, f"send frames {tmp_path / 'photo.jpg'}")
    (waiting,) = edge_runtime.broker.sessions[edge_runtime.account.client_id].queue
    assert waiting.body == b"jpeg"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("desired {", "desired: "),
        ("desired [1]", "must be a JSON object"),
        ("send frames /none", "No such file"),
    ],
)
def test_a_slip_is_told(edge_runtime: EdgeRuntime, line: str, words: str) -> None:
    """In a line, and the module runs on."""
    assert words in obey(edge_runtime, line)


@pytest.mark.parametrize("line", ["", "help", "what"])
def test_anything_else_shows_what_can_be_typed(edge_runtime: EdgeRuntime, line: str) -> None:
    """Also an empty line."""
    assert obey(edge_runtime, line) == HELP
