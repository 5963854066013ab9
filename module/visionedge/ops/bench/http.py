"""`visionedge bench http`: clients on the result endpoints of a module, and what they cost its pipeline.

Requests leave on schedule, whether the earlier ones were answered or not, and their latency counts from when
they were due. The clients run in a process of their own (`http_clients`) on the same machine, so each round
has three phases: clients of the module (loaded), clients that do the same work over a socket pair without the
module (loopback), and no clients (unloaded). Loaded against loopback is what HTTP costs the pipeline, loaded
against unloaded what HTTP and the clients cost it.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from visionedge.errors import VisionedgeError
from visionedge.ops.bench.http_clients import ClientLoad
from visionedge.ops.bench.machine import describe_machine, format_camera_count
from visionedge.runtime.child_process import start_child
from visionedge.runtime.measurement import run_in_rounds
from visionedge.runtime.process_limits import usable_cores
from visionedge.runtime.redaction import mask_address, redact

_READY = re.compile(r"ready: open (http://\S+)/")
_STOP_S = 15.0
_SETTLE_S = 0.5
_LIMIT_S = 10.0


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


@dataclass(slots=True)
class LoadPhase:
    """The responses of one phase with their latencies in ms, and the frames that the pipeline analysed.

    `main_thread_cpu_s` is the processor time of the module's main thread; None if it cannot be read.
    """

    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    took_s: float = 0.0
    frames: int = 0
    replaced: int = 0
    clients_cpu_s: float = 0.0
    main_thread_cpu_s: float | None = None

    @property
    def frames_per_s(self) -> float:
        """The speed of the pipeline."""
        return self.frames / self.took_s


RunClients = Callable[[], Mapping[str, Any]]
"""Lets the clients send their requests, waits for the end, and returns their results."""


@dataclass(frozen=True, slots=True)
class LoadPhases:
    """The phases of all rounds, by kind; one of each kind per round."""

    loaded: Sequence[LoadPhase]
    loopback: Sequence[LoadPhase]
    unloaded: Sequence[LoadPhase]


def bench_http(load: HttpLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the report as a document. `progress` gets a line for each step.

    Raises:
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
    module = _ModuleClient(url, load.token, pid)
    status = module.status()
    names = [camera["name"] for camera in status["cameras"]]
    if not names:
        raise VisionedgeError(f"{mask_address(url)} has no camera whose frames could be requested")
    client_load = module.client_load(load, [f"/api/v1/cameras/{quote(name)}/frame" for name in names])

    def run_phase(clients: ClientLoad | None) -> LoadPhase:
        with nullcontext() if clients is None else _clients(clients) as run_clients:
            phase = _measure_phase(module, load.seconds, run_clients)
        if clients is not None and not phase.latencies_ms:
            raise VisionedgeError(f"{mask_address(url)} answered no request within {_LIMIT_S:g} s")
        time.sleep(_SETTLE_S)
        return phase

    kinds = {
        "unloaded": partial(run_phase, None),
        "loopback": partial(run_phase, replace(client_load, loopback=True)),
        "loaded": partial(run_phase, client_load),
    }
    phases = run_in_rounds(
        kinds, load.rounds, lambda number, results: progress(_progress(number, load, LoadPhases(**results)))
    )
    return _report(load, status, LoadPhases(**phases))


@contextmanager
def run_module(cameras: int, arguments: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """Run a module with cameras of the bundled clip: its address and its process id; stop it afterwards.

    `arguments` are for `visionedge run`.

    Raises:
        VisionedgeError: the module does not start.
    """
    given = [word for n in range(cameras) for word in ("--camera", f"bench-{n}=demo:")]
    words = ("run", "--http", "127.0.0.1:0", *given, *arguments)
    # A file, not a pipe: the benchmark does not read the output, and a full pipe would block the module.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        module = start_child("visionedge", *words, stdout=log, stderr=log)
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


@contextmanager
def _clients(client_load: ClientLoad) -> Iterator[RunClients]:
    """Connected clients in a child process, which is ended afterwards.

    Raises:
        VisionedgeError: they cannot connect.
    """
    with start_child(
        "visionedge.ops.bench.http_clients", stdin=subprocess.PIPE, stderr=None, text=True
    ) as process:
        assert process.stdin is not None  # noqa: S101 - both were asked for
        assert process.stdout is not None  # noqa: S101
        # Over stdin: other users can read a process's arguments, and the requests have the token.
        process.stdin.write(json.dumps(asdict(client_load)) + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "ready\n":
            raise VisionedgeError("the clients of the benchmark cannot connect to the module")

        def run_clients() -> Mapping[str, Any]:
            results, _ = process.communicate("go\n")
            found: Mapping[str, Any] = json.loads(results)
            return found

        try:
            yield run_clients
        finally:
            process.kill()


def _measure_phase(module: "_ModuleClient", seconds: float, run_clients: RunClients | None) -> LoadPhase:
    phase = LoadPhase()
    before, main_thread_cpu_s, began_s = module.count_frames(), module.main_thread_cpu_s(), time.monotonic()
    if run_clients is not None:
        results = run_clients()
        phase.latencies_ms, phase.clients_cpu_s = results["latencies_ms"], results["cpu_s"]
        phase.statuses = Counter(results["statuses"])
    time.sleep(max(0.0, began_s + seconds - time.monotonic()))
    loop_end_s, after = module.main_thread_cpu_s(), module.count_frames()
    phase.frames, phase.replaced = after[0] - before[0], after[1] - before[1]
    phase.took_s = time.monotonic() - began_s
    if main_thread_cpu_s is not None and loop_end_s is not None:
        phase.main_thread_cpu_s = loop_end_s - main_thread_cpu_s
    return phase


class _ModuleClient:
    """The measured module: its status, its frame counts, and the requests that clients send to it."""

    def __init__(self, url: str, token: str | None, pid: int | None) -> None:
        self._shown = mask_address(url)
        self._parts = urlsplit(url)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._pid = pid

    def client_load(self, load: HttpLoad, paths: list[str]) -> ClientLoad:
        """The load of the clients."""
        host, tls = self._parts.hostname or "", self._parts.scheme == "https"
        port = self._parts.port or (443 if tls else 80)
        lines = [f"Host: {self._parts.netloc.rpartition('@')[2]}"]
        lines += [f"{name}: {value}" for name, value in self._headers.items()]
        heads = [f"GET {self._parts.path}{path} HTTP/1.1" for path in paths]
        requests = tuple("\r\n".join([head, *lines, "", ""]) for head in heads)
        return ClientLoad(host, port, tls, load.clients, load.rate, load.seconds, requests, _LIMIT_S)

    def status(self) -> dict[str, Any]:
        """The answer of `/api/v1/status`.

        Raises:
            VisionedgeError: the module cannot be reached, or refuses.
        """
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        try:
            connection = kind(self._parts.hostname or "", self._parts.port, timeout=_LIMIT_S)
            try:
                connection.request("GET", f"{self._parts.path}/api/v1/status", headers=self._headers)
                answer = connection.getresponse()
                if answer.status != 200:
                    raise VisionedgeError(
                        f"{self._shown} answers {answer.status}; if it needs a token, use --token"
                    )
                found: dict[str, Any] = json.loads(answer.read())
            finally:
                connection.close()
        except (OSError, HTTPException, ValueError) as error:
            raise VisionedgeError(
                f"{self._shown} cannot be reached: {redact(str(error)) or 'no answer'}"
            ) from None
        return found

    def count_frames(self) -> tuple[int, int]:
        """The frames so far: analysed, and replaced by newer ones."""
        cameras = self.status()["cameras"]
        analysed = sum(int(camera["framesAnalysed"]) for camera in cameras)
        return analysed, sum(int(camera["dropped"].get("replaced", 0)) for camera in cameras)

    def main_thread_cpu_s(self) -> float | None:
        """The processor time of its main thread, which runs the event loop; None if it cannot be read."""
        if self._pid is None:
            return None
        try:
            ran_ns = Path(f"/proc/{self._pid}/task/{self._pid}/schedstat").read_text("ascii").split()[0]
        except (OSError, IndexError):
            return None
        return int(ran_ns) / 1e9


# --- figures ------------------------------------------------------------------------------------------------


def _report(load: HttpLoad, status: dict[str, Any], phases: LoadPhases) -> dict[str, Any]:
    loaded = phases.loaded
    statuses = sum((phase.statuses for phase in loaded), Counter[str]())
    pairs = list(zip(loaded, phases.unloaded, strict=True))
    return {
        "schema": "visionedge/bench-http/2",
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
            "responsesPerSecond": round(median(len(s.latencies_ms) / s.took_s for s in loaded), 2),
            "latencyMs": {
                f"p{q}": round(median(float(np.percentile(s.latencies_ms, q)) for s in loaded), 3)
                for q in (50, 95, 99)
            },
            "statuses": dict(sorted(statuses.items())),
            "serverCpuMsPerResponse": _server_ms(pairs),
            "clientCpuMsPerResponse": round(median(_ms_per_response(s.clients_cpu_s, s) for s in loaded), 4),
            "rounds": [
                {f"p{q}": round(float(np.percentile(s.latencies_ms, q)), 3) for q in (50, 95, 99)}
                for s in loaded
            ],
        },
        "pipeline": {
            "withClients": _collect_speeds(loaded),
            "withLoopbackClients": _collect_speeds(phases.loopback),
            "withoutClients": _collect_speeds(phases.unloaded),
            "kept": _kept(loaded, phases.loopback),
            "keptVersusNoClients": _kept(loaded, phases.unloaded),
            "serverShare": _server_share(pairs),
            "clientShare": round(median(s.clients_cpu_s / s.took_s for s in loaded) / usable_cores(), 4),
            "replacedWithoutClients": sum(phase.replaced for phase in phases.unloaded),
        },
    }


def _collect_speeds(phase_list: Sequence[LoadPhase]) -> list[float]:
    return [round(phase.frames_per_s, 3) for phase in phase_list]


def _kept(loaded: Sequence[LoadPhase], other: Sequence[LoadPhase]) -> float | None:
    """The median over the rounds of the ratio of frames/s to those of the other phase."""
    ratios = [a.frames_per_s / b.frames_per_s for a, b in zip(loaded, other, strict=True) if b.frames]
    return round(median(ratios), 4) if ratios else None


def _ms_per_response(used_s: float, phase: LoadPhase) -> float:
    return used_s * 1000 / max(1, len(phase.latencies_ms))


def _server_ms(pairs: Sequence[tuple[LoadPhase, LoadPhase]]) -> float | None:
    """The processor ms of a response in the module's main thread, above that of the unloaded phases."""
    costs = [
        _ms_per_response(used_s, loaded)
        for loaded, unloaded in pairs
        if (used_s := _added_loop_s(loaded, unloaded)) is not None
    ]
    return round(median(costs), 4) if costs else None


def _server_share(pairs: Sequence[tuple[LoadPhase, LoadPhase]]) -> float | None:
    """The processor time of all responses in the module's main thread as a share of all cores."""
    shares = [
        used_s / loaded.took_s
        for loaded, unloaded in pairs
        if (used_s := _added_loop_s(loaded, unloaded)) is not None
    ]
    return round(median(shares) / usable_cores(), 4) if shares else None


def _added_loop_s(loaded: LoadPhase, unloaded: LoadPhase) -> float | None:
    if loaded.main_thread_cpu_s is None or unloaded.main_thread_cpu_s is None:
        return None
    return loaded.main_thread_cpu_s - unloaded.main_thread_cpu_s * loaded.took_s / unloaded.took_s


def _progress(number: int, load: HttpLoad, phases: LoadPhases) -> str:
    loaded = phases.loaded[-1]
    p99_ms = float(np.percentile(loaded.latencies_ms, 99))
    return (
        f"round {number}/{load.rounds}: p99 {p99_ms:.1f} ms; pipeline {loaded.frames_per_s:.1f} frames/s with"
        f" clients, {phases.loopback[-1].frames_per_s:.1f} with loopback clients,"
        f" {phases.unloaded[-1].frames_per_s:.1f} without clients"
    )


def format_caution(report: Mapping[str, Any]) -> str:
    """A warning that the cost for the pipeline was not measured; empty if the pipeline was at its limit."""
    if report["pipeline"]["replacedWithoutClients"]:
        return ""
    return (
        "The pipeline was not at its limit: it analysed all frames with and without clients, so their cost is"
        " not visible. Use more --cameras."
    )


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    load, http, pipeline = report["load"], report["http"], report["pipeline"]
    latency = "  ".join(f"{key} {value:.1f}" for key, value in http["latencyMs"].items())
    kept = "no frames were analysed"
    if None not in (pipeline["kept"], pipeline["keptVersusNoClients"]):
        kept = (
            f"{pipeline['kept']:.1%} of its frames/s compared to loopback clients,"
            f" {pipeline['keptVersusNoClients']:.1%} compared to no clients"
        )
    return (
        f"{load['clients']} clients, {load['rate']:g} requests/s for the newest frames of"
        f" {format_camera_count(load['cameras'])}\n"
        f"  {http['responsesPerSecond']:.1f} responses/s  latency ms {latency}"
        f"  {_format_counts(http['statuses'])}\n"
        f"  processor: {_cost(http['serverCpuMsPerResponse'], pipeline['serverShare'])} in the module,"
        f" {_cost(http['clientCpuMsPerResponse'], pipeline['clientShare'])} in the clients\n"
        f"  pipeline: {kept}\n  {_range(pipeline['withClients'])} frames/s with clients,"
        f" {_range(pipeline['withLoopbackClients'])} with loopback clients,"
        f" {_range(pipeline['withoutClients'])} without clients\n"
        f"{format_caution(report)}"
    ).rstrip() + "\n"


def _format_counts(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in statuses.items()) or "no responses"


def _cost(ms_per_response: float | None, share: float | None) -> str:
    if ms_per_response is None or share is None:
        return "unknown"
    return f"{ms_per_response:.2f} ms per response ({share:.1%} of the cores)"


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"
