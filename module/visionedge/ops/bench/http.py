"""`visionedge bench http`: clients on the result endpoints of a module, and what they cost its pipeline.

Each client keeps one connection open and sends its requests at fixed times: a request that is due while an
earlier one is unanswered waits, and its waiting counts as latency. Each round measures the pipeline with and
without clients, and the processor time of the module's main thread and of the clients, which run in this
process.
"""

import asyncio
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import aiohttp
import numpy as np

from visionedge.errors import VisionedgeError
from visionedge.ops.bench.machine import describe_machine, format_camera_count
from visionedge.ops.module_client import fetch_status
from visionedge.runtime.child_process import start_child
from visionedge.runtime.measurement import run_in_rounds
from visionedge.runtime.process_limits import usable_cores
from visionedge.runtime.redaction import mask_address, redact

_READY = re.compile(r"ready: open (http://\S+)/")
_STOP_S = 15.0
_SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class HttpLoad:
    """`rate` requests per second from `clients` connections together.

    Without `url` a module with `cameras` cameras of the bundled clip is started; `arguments` are for its
    `visionedge run`. `token` is the module's HTTP token.
    """

    url: str | None = None
    token: str | None = None
    clients: int = 16
    rate: float = 200.0
    seconds: float = 5.0
    rounds: int = 3
    cameras: int = 16
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """`rate` requests per second from `clients` connections together, for the addresses in turn.

    A response that is missing `limit_s` after the last request counts as ``no answer``.
    """

    urls: Sequence[str]
    headers: Mapping[str, str]
    clients: int
    rate: float
    seconds: float
    limit_s: float = 10.0


@dataclass(slots=True)
class ClientResults:
    """Latencies in ms from when each request was due, statuses with counts, and processor time."""

    latencies_ms: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadPhase:
    """The results of the clients of one phase, and the frames that the pipeline analysed.

    `main_thread_cpu_s` is the processor time of the module's main thread; None if it cannot be read.
    """

    took_s: float
    frames: int
    replaced: int
    main_thread_cpu_s: float | None
    clients: ClientResults = field(default_factory=ClientResults)

    @property
    def frames_per_s(self) -> float:
        """The speed of the pipeline."""
        return self.frames / self.took_s

    @property
    def responses(self) -> int:
        """The number of responses, at least 1."""
        return max(1, len(self.clients.latencies_ms))

    def percentile_ms(self, q: int) -> float:
        """A percentile of the latencies."""
        return float(np.percentile(self.clients.latencies_ms, q))


def bench_http(load: HttpLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the report as a document. `progress` gets a line for each step.

    Raises:
        ConfigError: the address or the token is not valid.
        VisionedgeError: the module cannot be started or reached.
    """
    if load.url is not None:
        return measure_module(load, load.url.rstrip("/"), progress)
    progress(f"starting a module with {format_camera_count(load.cameras)}")
    with run_module(load.cameras, load.arguments) as (url, pid):
        return measure_module(load, url, progress, pid)


def measure_module(
    load: HttpLoad, url: str, progress: Callable[[str], None], pid: int | None = None
) -> dict[str, Any]:
    """Measure the module at this address, which runs as process `pid` of this machine; see `bench_http`."""
    status = fetch_status(url, load.token)
    urls = [f"{url}/api/v1/cameras/{quote(camera['name'])}/frame" for camera in status["cameras"]]
    if not urls:
        raise VisionedgeError(f"{mask_address(url)} has no camera whose frames could be requested")
    headers = {"Authorization": f"Bearer {load.token}"} if load.token else {}
    clients = ClientLoad(urls, headers, load.clients, load.rate, load.seconds)

    def count_frames() -> tuple[int, int]:
        """The frames so far: analysed, and replaced by newer ones."""
        cameras = fetch_status(url, load.token)["cameras"]
        analysed = sum(int(camera["framesAnalysed"]) for camera in cameras)
        return analysed, sum(int(camera["dropped"].get("replaced", 0)) for camera in cameras)

    def measure_phase(clients: ClientLoad | None) -> LoadPhase:
        before, used_s, began_s = count_frames(), _main_thread_cpu_s(pid), time.monotonic()
        results = asyncio.run(run_clients(clients)) if clients else ClientResults()
        if clients and not results.latencies_ms:
            raise VisionedgeError(f"{mask_address(url)} answered no request within {clients.limit_s:g} s")
        time.sleep(max(0.0, began_s + load.seconds - time.monotonic()))
        end_s, after = _main_thread_cpu_s(pid), count_frames()
        took_s, cpu_s = (
            time.monotonic() - began_s,
            None if used_s is None or end_s is None else end_s - used_s,
        )
        time.sleep(_SETTLE_S)
        return LoadPhase(took_s, after[0] - before[0], after[1] - before[1], cpu_s, results)

    def after_round(number: int, phases: Mapping[str, Sequence[LoadPhase]]) -> None:
        loaded, unloaded = phases["loaded"][-1], phases["unloaded"][-1]
        progress(
            f"round {number}/{load.rounds}: p99 {loaded.percentile_ms(99):.1f} ms; pipeline"
            f" {loaded.frames_per_s:.1f} frames/s with clients, {unloaded.frames_per_s:.1f} without clients"
        )

    phases = run_in_rounds(
        {"unloaded": partial(measure_phase, None), "loaded": partial(measure_phase, clients)},
        load.rounds,
        after_round,
    )
    return _report(load, status, phases["loaded"], phases["unloaded"])


@contextmanager
def run_module(cameras: int, arguments: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """Run a module with cameras of the bundled clip: its address and its process id; stop it afterwards.

    `arguments` are for `visionedge run`.

    Raises:
        VisionedgeError: the module does not start.
    """
    given = [word for n in range(cameras) for word in ("--camera", f"bench-{n}=demo:")]
    with start_module((*given, *arguments)) as module:
        yield module


@contextmanager
def start_module(
    arguments: Sequence[str], variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[str, int]]:
    """As `run_module`, with the cameras that the arguments name, and with variables of the environment."""
    words = ("run", "--http", "127.0.0.1:0", *arguments)
    # A file, not a pipe: the benchmark does not read the output, and a full pipe would block the module.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        module = start_child("visionedge", *words, stdout=log, stderr=log, variables=variables)
        try:
            yield _wait_for_address(module, log.fileno()), module.pid
        finally:
            module.terminate()
            try:
                module.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                module.kill()
                module.wait()


def _wait_for_address(module: "subprocess.Popen[bytes]", log: int) -> str:
    """The address of the module, as soon as it is ready."""
    while True:
        text = os.pread(log, 1 << 20, 0).decode(errors="replace")
        if found := _READY.search(text):
            return found[1]
        try:
            code = module.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        last = (text.strip().splitlines() or ["no output"])[-1]
        raise VisionedgeError(f"the module ended with exit code {code}: {redact(last)}")


def _main_thread_cpu_s(pid: int | None) -> float | None:
    """The processor time of a process's main thread, which runs the event loop; None if it cannot be read."""
    try:
        ran_ns = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text("ascii").split()[0]
    except (OSError, IndexError):
        return None
    return int(ran_ns) / 1e9


# --- clients ------------------------------------------------------------------------------------------------


async def run_clients(load: ClientLoad) -> ClientResults:
    """Send all requests on schedule, and wait for the responses."""
    results, count = ClientResults(), round(load.rate * load.seconds)
    used_s, began_s = time.process_time(), time.monotonic()

    async def run_client(session: aiohttp.ClientSession, number: int) -> None:
        for index in range(number, count, load.clients):
            due_s = began_s + index / load.rate
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            status = await _request(session, load.urls[index % len(load.urls)])
            results.statuses[status] = results.statuses.get(status, 0) + 1
            results.latencies_ms.append((time.monotonic() - due_s) * 1000)

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=load.clients), headers=load.headers
    ) as session:
        clients = [asyncio.create_task(run_client(session, number)) for number in range(load.clients)]
        _, late = await asyncio.wait(clients, timeout=load.seconds + load.limit_s)
        for client in late:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    if missing := count - sum(results.statuses.values()):
        results.statuses["no answer"] = missing
    results.cpu_s = time.process_time() - used_s
    return results


async def _request(session: aiohttp.ClientSession, url: str) -> str:
    """The status of the response, or the kind of error."""
    try:
        async with session.get(url, allow_redirects=False) as response:
            await response.read()
            return str(response.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error).__name__


# --- figures ------------------------------------------------------------------------------------------------


def _report(
    load: HttpLoad, status: dict[str, Any], loaded: Sequence[LoadPhase], unloaded: Sequence[LoadPhase]
) -> dict[str, Any]:
    pairs = list(zip(loaded, unloaded, strict=True))
    rounds = [{f"p{q}": round(phase.percentile_ms(q), 3) for q in (50, 95, 99)} for phase in loaded]
    statuses = sum((Counter(phase.clients.statuses) for phase in loaded), Counter[str]())
    # The processor time of the main thread above that without clients; None if it cannot be read.
    added_s = [
        (a, a.main_thread_cpu_s - b.main_thread_cpu_s * a.took_s / b.took_s)
        for a, b in pairs
        if a.main_thread_cpu_s is not None and b.main_thread_cpu_s is not None
    ]
    return {
        "schema": "visionedge/bench-http/3",
        "machine": describe_machine() | {"effectiveDevice": status["engine"].get("effective")},
        "load": {
            "clients": load.clients,
            "rate": load.rate,
            "cameras": len(status["cameras"]),
            "seconds": load.seconds,
            "rounds": load.rounds,
            "ownModule": load.url is None,
        },
        "model": (status.get("model") or {}).get("name"),
        "http": {
            "responsesPerSecond": _median(phase.responses / phase.took_s for phase in loaded),
            "latencyMs": {key: _median(each[key] for each in rounds) for key in rounds[0]},
            "statuses": dict(sorted(statuses.items())),
            "serverCpuMsPerResponse": _median(cpu_s * 1000 / phase.responses for phase, cpu_s in added_s),
            "clientCpuMsPerResponse": _median(
                phase.clients.cpu_s * 1000 / phase.responses for phase in loaded
            ),
            "rounds": rounds,
        },
        "pipeline": {
            "withClients": [round(phase.frames_per_s, 3) for phase in loaded],
            "withoutClients": [round(phase.frames_per_s, 3) for phase in unloaded],
            "kept": _median(a.frames_per_s / b.frames_per_s for a, b in pairs if b.frames),
            "serverShare": _median(cpu_s / phase.took_s / usable_cores() for phase, cpu_s in added_s),
            "clientShare": _median(phase.clients.cpu_s / phase.took_s / usable_cores() for phase in loaded),
            "replacedWithoutClients": sum(phase.replaced for phase in unloaded),
        },
    }


def _median(values: Iterable[float]) -> float | None:
    """The median over the rounds; None without values."""
    found = list(values)
    return round(median(found), 4) if found else None


# --- text ---------------------------------------------------------------------------------------------------


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    load, http, pipeline = report["load"], report["http"], report["pipeline"]
    latency = "  ".join(f"{key} {value:.1f}" for key, value in http["latencyMs"].items())
    statuses = ", ".join(f"{count} x {status}" for status, count in http["statuses"].items())
    kept = (
        "no frames were analysed" if pipeline["kept"] is None else f"{pipeline['kept']:.1%} of its frames/s"
    )
    lines = [
        f"{load['clients']} clients, {load['rate']:g} requests/s for the newest frames of"
        f" {format_camera_count(load['cameras'])}",
        f"  {http['responsesPerSecond']:.1f} responses/s  latency ms {latency}  {statuses or 'no responses'}",
        f"  processor: {_cost(http['serverCpuMsPerResponse'], pipeline['serverShare'])} in the module,"
        f" {_cost(http['clientCpuMsPerResponse'], pipeline['clientShare'])} in the clients",
        f"  pipeline: {kept}; {_range(pipeline['withClients'])} frames/s with clients,"
        f" {_range(pipeline['withoutClients'])} without clients",
    ]
    if not pipeline["replacedWithoutClients"]:
        lines.append(
            "The pipeline was not at its limit: it analysed all frames with and without clients, so their"
            " cost is not visible. Use more --cameras."
        )
    return "\n".join(lines) + "\n"


def _cost(ms_per_response: float | None, share: float | None) -> str:
    if ms_per_response is None or share is None:
        return "unknown"
    return f"{ms_per_response:.2f} ms per response ({share:.1%} of the cores)"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"
