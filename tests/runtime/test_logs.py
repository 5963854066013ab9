"""Log lines: the forms that people, collectors and edgeAgent read, without secrets."""

import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from visionedge.runtime import logs
from visionedge.runtime.redaction import register_secrets

EDGE_AGENT = re.compile(
    r"<(?P<level>[0-7])> (?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [+-]\d\d:\d\d)"
    r" \[(?P<name>[A-Z]{3})\] (?P<text>.*)"
)
"""What edgeAgent reads from a line: syslog level, time with its zone, text (LogMessageParser.cs)."""


@pytest.fixture(autouse=True)
def root() -> Iterator[logging.Logger]:
    """The root logger, with its handlers and its level as before at the end."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = before
    root.setLevel(level)


def log_failure(text: str) -> None:
    error = ValueError("line one\nline two")
    logging.getLogger("x").error(text, exc_info=error)


@pytest.mark.parametrize(
    ("level", "number", "name"),
    [("debug", "7", "DBG"), ("info", "6", "INF"), ("warning", "4", "WRN"), ("error", "3", "ERR")],
)
def test_iot_edge_reads_level_and_time_of_each_line(
    capsys: pytest.CaptureFixture[str], level: str, number: str, name: str
) -> None:
    logs.configure_logging("debug", "iotedge")
    getattr(logging.getLogger("x"), level)("the camera %s is offline", "dock")
    found = EDGE_AGENT.fullmatch(capsys.readouterr().err.rstrip("\n"))
    assert found is not None
    assert (found["level"], found["name"]) == (number, name)
    assert found["time"].endswith("+00:00")
    assert found["text"] == "MainThread: the camera dock is offline"


def test_iot_edge_gets_a_traceback_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_logging("info", "iotedge")
    log_failure("it failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert EDGE_AGENT.fullmatch(line)
    assert line.endswith(": it failed | ValueError: line one | line two")


def test_json_lines_are_objects_with_the_exception(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_logging("info", "json")
    logging.getLogger("x").warning('a "quoted" text')
    log_failure("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.keys() == {"time", "level", "thread", "message"}
    assert (first["level"], first["message"]) == ("warning", 'a "quoted" text')
    assert re.fullmatch(r"[0-9-]{10}T[0-9:.]{12}Z", first["time"])
    assert second["exception"].endswith("ValueError: line one\nline two")


@pytest.mark.parametrize("log_format", ["text", "json", "iotedge"])
def test_no_format_shows_a_secret(capsys: pytest.CaptureFixture[str], log_format: logs.LogFormat) -> None:
    register_secrets(["Tr1cky-Pass"])
    logs.configure_logging("info", log_format)
    error = OSError("rtsp://admin:Tr1cky-Pass@192.0.2.5/s refuses")
    logging.getLogger("x").error("the password Tr1cky-Pass is wrong", exc_info=error)
    shown = capsys.readouterr().err
    assert "***" in shown
    assert "Tr1cky-Pass" not in shown


def test_another_level_and_format_keep_the_recent_lines(
    root: logging.Logger,
) -> None:
    logs.configure_logging("info")
    logging.getLogger("x").info("first")
    logs.configure_logging("error", "json")
    logging.getLogger("x").info("not logged")
    logging.getLogger("x").error("second")
    assert [line.split(": ", 1)[1] for line in logs.read_recent_log().splitlines()] == ["first", "second"]
    assert sys.stderr is root.handlers[0].stream  # type: ignore[attr-defined]
