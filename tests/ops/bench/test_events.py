"""`bench pipeline --events`: the age of scene events in a client, and the load of the module."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from visionedge.__main__ import main
from visionedge.errors import VisionedgeError
from visionedge.frames.types import format_utc, utc_now
from visionedge.ops.bench.compare import collect_figures
from visionedge.ops.bench.event_reader import AgeMeter, EventAges
from visionedge.ops.bench.event_reader import main as read
from visionedge.ops.bench.events import (
    EventRound,
    build_report,
    format_report,
    make_event_scene,
    share_load,
)
from visionedge.ops.bench.pipeline_run import PipelineLoad
from visionedge.ops.bench.report import render_page

MS = 1_000_000
START_NS = round(datetime(2026, 11, 30, 10, tzinfo=UTC).timestamp() * 1e9)
LOAD = PipelineLoad(Path("tiny.onnx"), "demo:", seconds=2.0, rounds=2, scene=make_event_scene())


def at(after_ms: float) -> str:
    return format_utc(datetime.fromtimestamp(START_NS / 1e9 + after_ms / 1000, UTC))


# --- the client ---------------------------------------------------------------------------------------------


def test_the_age_of_an_event_is_from_its_capture_to_its_arrival() -> None:
    meter = AgeMeter(monotonic_ns=5_000, utc_ns=START_NS)
    meter.add(at(100), 5_000 + 180 * MS, START_NS + 180 * MS)
    meter.add(at(200), 5_000 + 290 * MS, START_NS + 290 * MS)
    assert meter.ages.ages_ms == pytest.approx([80, 90])


def test_an_event_of_a_frame_before_the_start_does_not_count() -> None:
    """It may have waited for the client."""
    meter = AgeMeter(monotonic_ns=0, utc_ns=START_NS)
    meter.add(at(-100), 10 * MS, START_NS + 10 * MS)
    assert meter.ages == EventAges()


@pytest.mark.parametrize("step_s", [-3600, -1, 1, 3600])
def test_events_after_a_clock_that_was_set_do_not_count(step_s: float) -> None:
    meter = AgeMeter(monotonic_ns=0, utc_ns=START_NS)
    step_ns = round(step_s * 1e9)
    meter.add(at(100 + step_s * 1000), 150 * MS, START_NS + 150 * MS + step_ns)
    assert meter.ages == EventAges([], 1)


class EventStream(BaseHTTPRequestHandler):
    """Answers with the lines of the server, then closes the connection or waits."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, EventServer)
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(server.text)
        self.wfile.flush()
        if server.stays_open:
            server.closing.wait()

    def log_message(self, *_arguments: object) -> None:
        """Nothing."""


class EventServer(ThreadingHTTPServer):
    """A module that sends this text as its stream of events."""

    def __init__(self, text: bytes = b"", *, status: int = 200, stays_open: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), EventStream)
        self.text, self.status, self.stays_open = text, status, stays_open
        self.closing = threading.Event()

    @contextmanager
    def serve(self) -> Iterator[str]:
        thread = threading.Thread(target=self.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{self.server_address[1]}"
        finally:
            self.closing.set()
            self.shutdown()
            thread.join()
            self.server_close()


def test_the_client_reads_events_between_comments_for_its_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    far = format_utc(utc_now().replace(year=2100))
    event = f'data: {{"at": "{far}"}}\n\n'
    text = f"retry: 2000\n: live\n\nid: a\n{event}: still here\n\n{event}"
    with EventServer(text.encode()).serve() as url:
        assert read([url, "0.1"]) == 0
    ages = EventAges(**json.loads(capsys.readouterr().out))
    assert len(ages.ages_ms) == 2
    assert all(age < 0 for age in ages.ages_ms)


@pytest.mark.parametrize(
    ("server", "problem"),
    [
        (lambda: EventServer(status=503), "answers 503"),
        (lambda: EventServer(stays_open=False), "has ended"),
        (lambda: EventServer(b"data: no JSON\n\n"), "Expecting value"),
        (lambda: EventServer(b"data: {}\n\n"), "at"),
    ],
    ids=["refused", "ended", "no JSON", "no event"],
)
def test_a_stream_that_fails_is_reported(
    server: "type[EventServer]", problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with server().serve() as url:
        assert read([url, "5"]) == 1
    assert problem in json.loads(capsys.readouterr().out)["error"]


# --- load and figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "max_fps", "cameras", "fps"),
    [(58.0, 10.0, 6, 9.667), (50.0, 10.0, 5, 10.0), (3.0, 10.0, 1, 3.0), (7.2, 2.5, 3, 2.4)],
)
def test_the_fewest_cameras_share_the_load(frames: float, max_fps: float, cameras: int, fps: float) -> None:
    found, rate = share_load(frames, max_fps)
    assert (found, round(rate, 3)) == (cameras, fps)


def measured(*ages_ms: float) -> EventRound:
    return EventRound(EventAges(list(ages_ms)), 2.0, 116, {"replaced": 1})


def test_the_report_says_whether_the_slowest_events_are_within_the_bound() -> None:
    rounds = [measured(50.0, 60.0), measured(70.0), measured(80.0, 90.0)]
    report = build_report(LOAD, rounds, capacity=72.5, cameras=6, fps=9.6667) | {"machine": {}}
    events = report["events"]
    assert (events["count"], events["latencyMs"]["p50"], events["boundMs"]) == (5, 70.0, 163.45)
    assert events["withinBound"]
    assert [each["count"] for each in events["rounds"]] == [2, 1, 2]
    assert report["module"]["loadShare"] == 0.8
    assert report["module"]["dropped"] == {"replaced": 3}
    assert "p99 is within one frame interval and 60 ms (163.4 ms)" in format_report(report)
    assert list(collect_figures(report)) == ["scene event p95 ms"]
    assert "<!doctype html>" in render_page(report, format_report(report))
    slow = build_report(LOAD, [*rounds, measured(400.0)], capacity=72.5, cameras=6, fps=9.6667)
    assert not slow["events"]["withinBound"]
    assert "p99 is NOT within" in format_report(slow)


def test_a_round_without_events_has_no_percentiles_and_events_after_a_clock_step_are_named() -> None:
    empty = replace(measured(), ages=EventAges([], 2))
    assert math.isnan(empty.percentile_ms(99))
    report = build_report(LOAD, [empty, measured(50.0)], capacity=72.5, cameras=6, fps=9.6667)
    assert report["events"]["rounds"][0] == {"count": 0, "p50": None, "p95": None, "p99": None}
    assert "2 events do not count, because the clock was set" in format_report(report)


def test_a_load_without_events_fails_and_says_what_to_do() -> None:
    with pytest.raises(VisionedgeError, match="no scene event came; use more --seconds"):
        build_report(LOAD, [measured()], capacity=72.5, cameras=6, fps=9.7)


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--source", "synthetic:64x64@5"), "--events needs a video file"),
        (("--baseline",), "--events: the plain loop of --baseline has no events"),
        (("--scene", "missing.yaml"), "missing.yaml"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    words: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "pipeline", "--events", *words]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.system
def test_a_module_sends_its_events_to_a_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a data folder of its own: nothing of the bench is left in that of the user."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "module"))
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path))
    short = ["--cameras", "1", "--seconds", "1.5", "--rounds", "1", "--device", "cpu", "--precision", "fp32"]
    assert main(["bench", "pipeline", "--events", *short, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "visionedge/bench-events/1"
    assert report["events"]["count"] > 0
    assert 0 < report["events"]["latencyMs"]["p50"] <= report["events"]["latencyMs"]["p99"]
    assert report["events"]["afterClockSteps"] == 0
    assert report["module"]["framesPerSecond"] > 0
    assert report["machine"]["effectiveDevice"] == "cpu"
    assert {each.name for each in tmp_path.iterdir()} <= {"compiled", "engines", "plans", "variants"}
