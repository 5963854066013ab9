"""`bench http`: requests on schedule, what was answered, and what it cost the pipeline."""

import asyncio
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from visionedge.__main__ import main
from visionedge.errors import VisionedgeError
from visionedge.ops.bench.http import HttpLoad, format_caution, format_report, measure_module
from visionedge.ops.bench.http_clients import ClientLoad, ClientResults, LoadClients, read_response

pytestmark = pytest.mark.system

LOAD = HttpLoad(clients=4, rate=100.0, seconds=0.3, rounds=2)


class FakeModule:
    """A module of two cameras that analyses 100 frames a second of each."""

    def __init__(self, *, answer_s: float = 0.0, replaced: int = 1, status: int = 200, cuts: int = 0) -> None:
        self.cuts = cuts
        self.answer_s = answer_s
        self.replaced = replaced
        self.status = status
        self.asked: list[str] = []
        self.began_s = time.monotonic()

    async def answer_line(self, _request: web.Request) -> web.Response:
        analysed = int((time.monotonic() - self.began_s) * 100)
        camera = {"framesAnalysed": analysed, "dropped": {"replaced": analysed * self.replaced}}
        document = {"engine": {"effective": "cpu"}, "model": {"name": "tiny"}}
        cameras = [{"name": name, **camera} for name in ("a", "b")]
        return web.json_response(document | {"cameras": cameras}, status=self.status)

    async def frame(self, request: web.Request) -> web.Response:
        self.asked.append(request.match_info["name"])
        await asyncio.sleep(self.answer_s)
        if self.cuts and len(self.asked) % self.cuts == 0:
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent")
            request.transport.close()
        return web.json_response({})


def measured(module: FakeModule, load: HttpLoad = LOAD) -> dict[str, Any]:
    async def scenario() -> dict[str, Any]:
        app = web.Application()
        app.router.add_get("/api/v1/status", module.tell)
        app.router.add_get("/api/v1/cameras/{name}/frame", module.frame)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            return await asyncio.to_thread(measure_module, load, url, lambda _line: None, os.getpid())
        finally:
            await runner.cleanup()

    return asyncio.run(scenario())


def test_every_request_of_the_rate_is_sent_to_the_cameras_in_turn() -> None:
    module = FakeModule()
    report = measured(module)
    assert len(module.asked) == 2 * 30
    assert module.asked.count("a") == module.asked.count("b")
    assert report["http"]["statuses"] == {"200": 60}


def test_the_delay_after_a_slow_answer_counts_in_later_latencies() -> None:
    """One client, an answer each 50 ms, a request each 10 ms: the last is due long before it can be sent."""
    load = HttpLoad(clients=1, rate=100.0, seconds=0.2, rounds=1)
    latency_ms = measured(FakeModule(answer_s=0.05), load)["http"]["latencyMs"]
    assert latency_ms["p99"] > 600
    assert latency_ms["p50"] > 300


def test_the_share_of_the_pipeline_comes_from_interleaved_measurements() -> None:
    report = measured(FakeModule())
    assert report["pipeline"]["kept"] == pytest.approx(1.0, abs=0.3)
    assert report["pipeline"]["keptVersusNoClients"] == pytest.approx(1.0, abs=0.3)
    kinds = ("withClients", "withLoopbackClients", "withoutClients")
    assert [len(report["pipeline"][kind]) for kind in kinds] == [2, 2, 2]
    assert format_caution(report) == ""
    assert json.loads(json.dumps(report)) == report


def test_the_cost_of_clients_is_separated_from_that_of_the_module() -> None:
    report = measured(FakeModule())
    assert report["http"]["clientCpuMsPerResponse"] > 0
    assert 0 < report["pipeline"]["clientShare"] < 1
    assert report["http"]["serverCpuMsPerResponse"] > 0
    assert "ms per response" in format_report(report)


def test_clients_without_a_module_do_the_same_work() -> None:
    """They keep the same schedule and read answers as long, without a server: nothing listens there."""
    client_load = ClientLoad(
        "127.0.0.1", 9, tls=False, clients=3, rate=200.0, seconds=0.2, requests=("GET",), loopback=True
    )

    async def scenario() -> ClientResults:
        clients = LoadClients(client_load)
        await clients.connect()
        try:
            return await clients.run()
        finally:
            await clients.close()

    results = asyncio.run(scenario())
    assert results.statuses == {"200": 40}
    assert len(results.latencies_ms) == 40
    assert results.cpu_s > 0


def test_a_connection_that_breaks_is_counted_and_opened_again() -> None:
    """Each third answer ends with the connection cut, in the midst of the head."""
    module = FakeModule(cuts=3)
    statuses = measured(module, HttpLoad(clients=1, rate=50.0, seconds=0.3, rounds=1))["http"]["statuses"]
    assert statuses == {"200": 10, "closed": 5}


async def read_all(data: bytes) -> tuple[str, bytes]:
    """The status that is read from these bytes, and the bytes that are left."""
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await read_response(reader), await reader.read()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", ("200", b"")),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nServer: x\r\n\r\nabcHTTP/1.1", ("200", b"HTTP/1.1")),
        (b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n", ("204", b"")),
    ],
)
def test_a_response_is_read_by_its_status_and_length(data: bytes, found: tuple[str, bytes]) -> None:
    assert asyncio.run(read_all(data)) == found


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", b"HTTP/1.1 200 OK\r\nConte"]
)
def test_a_truncated_response_is_an_error(data: bytes) -> None:
    with pytest.raises(EOFError):
        asyncio.run(read_all(data))


def test_a_response_without_a_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="without a length"):
        asyncio.run(read_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"))


def test_a_server_that_never_answers_is_counted() -> None:
    async def scenario(port: int) -> ClientResults:
        load = ClientLoad(
            "127.0.0.1", port, tls=False, clients=1, rate=10.0, seconds=0.1, requests=("GET",), limit_s=0.1
        )
        clients = LoadClients(load)
        await clients.connect()
        try:
            return await clients.run()
        finally:
            await clients.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        results = asyncio.run(scenario(server.getsockname()[1]))
    assert (results.statuses, results.latencies_ms) == ({"no answer": 1}, [])


def test_a_pipeline_that_is_not_saturated_is_reported_as_inconclusive() -> None:
    assert "Use more --cameras" in format_report(measured(FakeModule(replaced=0)))


def test_a_missing_token_gives_a_one_line_error() -> None:
    with pytest.raises(VisionedgeError, match="answers 401; if it needs a token, use --token"):
        measured(FakeModule(status=401))


def test_an_unreachable_module_gives_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http", "--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_the_benchmark_starts_measures_and_stops_its_own_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "module"))
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path))
    short = ["--clients", "2", "--rate", "20", "--seconds", "0.5", "--rounds", "1", "--cameras", "2"]
    assert main(["bench", "http", *short, "--device", "cpu", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["load"]["ownModule"]
    assert sum(report["http"]["statuses"].values()) == 10


def test_a_module_that_does_not_start_is_reported_with_its_last_log_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "module"))
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path))
    assert main(["bench", "http", "--model", str(tmp_path / "none.onnx")]) == 1
    assert "none.onnx" in capsys.readouterr().err
