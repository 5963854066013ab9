"""`make demo-edge`: what is typed there reaches the module's twin and methods, and slips are told."""

import json
from pathlib import Path

import pytest

from edge_runtime.__main__ import listen, with_demo
from edge_runtime.console import HELP, run_command
from edge_runtime.runtime import EdgeRuntime

pytestmark = pytest.mark.system


def test_desired_properties_are_changed_and_shown(edge_runtime: EdgeRuntime) -> None:
    """Patch by patch, as the cloud does it."""
    assert run_command(edge_runtime, 'desired {"telemetry": {"mode": "all"}, "http": {}}').endswith("version 2")
    assert run_command(edge_runtime, 'desired {"http": null}\n').endswith("version 3")
    twin = json.loads(run_command(edge_runtime, "twin"))
    assert twin["desired"] == {"telemetry": {"mode": "all"}, "$version": 3}


def test_a_method_without_a_subscriber_is_404(edge_runtime: EdgeRuntime) -> None:
    """No module is connected here."""
    assert run_command(edge_runtime, "call ping") == "404 null"
    assert run_command(edge_runtime, 'call snapshot {"camera": "dock"}') == "404 null"


def test_a_file_waits_for_the_module_at_its_input(edge_runtime: EdgeRuntime, tmp_path: Path) -> None:
    """Messages between modules are kept while one is away."""
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    assert "is sent to frames" in run_command(edge_runtime, f"send frames {tmp_path / 'photo.jpg'}")
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
def test_a_wrong_command_is_reported(edge_runtime: EdgeRuntime, line: str, words: str) -> None:
    """In a line, and the module runs on."""
    assert words in run_command(edge_runtime, line)


@pytest.mark.parametrize("line", ["", "help", "what"])
def test_any_other_input_shows_the_help(edge_runtime: EdgeRuntime, line: str) -> None:
    """Also an empty line."""
    assert run_command(edge_runtime, line) == HELP


@pytest.mark.parametrize(
    ("command", "added"),
    [
        (["run"], True),
        (["run", "--http", "127.0.0.1:0"], True),
        (["run", "--duration", "5", "--camera", "dock=rtsp://192.0.2.5/1"], False),
        (["run", "--camera=dock=yard.mp4"], False),
        (["run", "--config", "vision.yaml"], False),
        (["doctor"], False),
    ],
)
def test_the_demo_camera_stays_unless_cameras_are_given(command: list[str], added: bool) -> None:
    """Other arguments do not take it away; a named camera or file replaces it."""
    assert with_demo(command, {}) == [*command, *(["--camera", "demo=demo:"] if added else [])]


def test_a_configuration_in_the_environment_disables_the_demo_camera() -> None:
    assert with_demo(["run"], {"VISIONEDGE_CONFIG": "vision.yaml"}) == ["run"]


@pytest.mark.parametrize("word", ["quit\n", " exit \n"])
def test_quit_ends_the_module_and_the_console(
    edge_runtime: EdgeRuntime, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    """What is typed after it is not obeyed any more."""
    ended: list[str] = []
    listen(edge_runtime, ["help\n", word, "twin\n"], lambda: ended.append("module"))
    assert ended == ["module"]
    assert capsys.readouterr().out == HELP + "\n"
